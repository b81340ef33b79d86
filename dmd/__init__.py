"""DMD: decoupled multimodal distilling for emotion recognition (Li, Wang and Cui, CVPR 2023)."""

from dmd import baselines, data, losses, released
from dmd.batch import MODALITIES, Batch, PerModality
from dmd.checkpoint import load_model
from dmd.config import LossConfig, ModelConfig, TrainConfig
from dmd.device import seed_everything
from dmd.graph import GDUnit, GraphOutput
from dmd.losses import LossTerms, objective
from dmd.metrics import evaluate
from dmd.model import DMD, Output
from dmd.trainer import History, Trainer

__all__ = [
    "DMD",
    "MODALITIES",
    "Batch",
    "GDUnit",
    "GraphOutput",
    "History",
    "LossConfig",
    "LossTerms",
    "ModelConfig",
    "Output",
    "PerModality",
    "TrainConfig",
    "Trainer",
    "baselines",
    "data",
    "evaluate",
    "load_model",
    "losses",
    "objective",
    "released",
    "seed_everything",
]
