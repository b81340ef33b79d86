"""DMD: decoupled multimodal distilling for emotion recognition (Li, Wang and Cui, CVPR 2023)."""

from dmd.batch import MODALITIES, Batch, PerModality
from dmd.config import LossConfig, ModelConfig, TrainConfig

__all__ = [
    "MODALITIES",
    "Batch",
    "LossConfig",
    "ModelConfig",
    "PerModality",
    "TrainConfig",
]
