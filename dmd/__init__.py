"""DMD: decoupled multimodal distilling for emotion recognition (Li, Wang and Cui, CVPR 2023)."""

from dmd import data, losses
from dmd.batch import MODALITIES, Batch, PerModality
from dmd.config import LossConfig, ModelConfig, TrainConfig
from dmd.graph import GDUnit, GraphOutput
from dmd.losses import LossTerms, objective
from dmd.model import DMD, Output

__all__ = [
    "DMD",
    "MODALITIES",
    "Batch",
    "GDUnit",
    "GraphOutput",
    "LossConfig",
    "LossTerms",
    "ModelConfig",
    "Output",
    "PerModality",
    "TrainConfig",
    "data",
    "losses",
    "objective",
]
