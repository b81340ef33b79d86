"""What a training run leaves behind: its history, or the reason why it stopped."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


class NonFiniteLoss(ArithmeticError):
    """Training produced NaN or infinity; the message names the term and the clips."""


class Interrupted(Exception):
    """Training was stopped by Ctrl-C after its state had been saved."""


@dataclass
class History:
    """What happened: a row an epoch, which epoch was kept, and its scores on the test split.

    epochs: dictionaries with `epoch`, `seconds`, `learning_rate`, `train` (unweighted loss terms
        and `total`, mean over the clips that were seen), `valid` (metrics) and `edges` (the mean
        edges of both graphs over the validation split), with `test_each_epoch` also `test`.
    """

    epochs: list[dict[str, Any]] = field(default_factory=list)
    best_epoch: int = 0
    test: dict[str, float] = field(default_factory=dict)

    def curve(self, part: str, name: str) -> list[float]:
        """One number an epoch, for example `curve("valid", "mae")`."""
        return [row[part][name] for row in self.epochs]


def require_finite(terms: Mapping[str, Tensor], epoch: int, clips: str = "") -> None:
    """Raise NonFiniteLoss, naming the first term that is NaN or infinite, if there is one."""
    for name, value in terms.items():
        if not torch.isfinite(value):
            where = f" for the clips {clips}" if clips else ""
            raise NonFiniteLoss(f"the loss term {name!r} is not finite in epoch {epoch}{where}")
