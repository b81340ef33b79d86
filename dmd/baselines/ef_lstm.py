"""Early fusion: one LSTM over the features of all modalities side by side."""

import torch
from torch import nn

from dmd.baselines.base import LSTM, Baseline, BaselineOutput, Triple, masks, mlp
from dmd.batch import Batch


class EFLSTM(Baseline):
    """Early-fusion LSTM: what all modalities show at a step is one long vector.

    hidden: width of the LSTM's state. dropout: in the network that reads the last state.
    Faithful: the joined step, batch normalisation over the steps, one LSTM, its last state. It
    takes aligned clips only; unaligned rows in the literature align the clips first.
    Adapted: normalisation counts valid steps only, and the LSTM stops at a clip's last valid one.
    """

    aligned_only = True

    def __init__(
        self, widths: Triple, lengths: Triple, hidden: int = 128, dropout: float = 0.2
    ) -> None:
        super().__init__(widths, lengths)
        self.norm = nn.BatchNorm1d(sum(widths))
        self.lstm = LSTM(sum(widths), hidden)
        self.head = mlp(hidden, hidden, 1, dropout)

    def forward(self, batch: Batch) -> BaselineOutput:
        """A batch of B clips -> predictions (B,)."""
        self.check(batch)
        mask = masks(batch)[0]  # aligned: the same in all modalities
        joined = torch.cat(batch.features, dim=2)  # (B, T, D_L + D_V + D_A)
        steps = torch.zeros_like(joined)
        steps[mask] = self.norm(joined[mask])
        _, last = self.lstm(steps, mask)
        return BaselineOutput(self.head(last).squeeze(1), {})
