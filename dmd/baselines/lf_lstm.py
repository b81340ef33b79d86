"""Late fusion: an LSTM for each modality, joined at their ends."""

import torch
from torch import nn

from dmd.baselines.base import LSTM, Baseline, BaselineOutput, Triple, masks, mlp
from dmd.batch import Batch


class LFLSTM(Baseline):
    """Late-fusion LSTM: each modality is read alone, and the last states are joined.

    hidden: width of each LSTM's state. dropout: in the network that reads the joined states.
    Faithful: an LSTM a modality, the last states side by side, a network over them.
    Adapted: each LSTM stops at the last valid step of a clip.
    """

    def __init__(
        self, widths: Triple, lengths: Triple, hidden: int = 64, dropout: float = 0.2
    ) -> None:
        super().__init__(widths, lengths)
        self.lstms = nn.ModuleList(LSTM(width, hidden) for width in widths)
        self.head = mlp(3 * hidden, hidden, 1, dropout)

    def forward(self, batch: Batch) -> BaselineOutput:
        """A batch of B clips -> predictions (B,)."""
        self.check(batch)
        parts = zip(self.lstms, batch.features, masks(batch), strict=True)
        last = torch.cat([lstm(x, mask)[1] for lstm, x, mask in parts], dim=1)  # (B, 3 * hidden)
        return BaselineOutput(self.head(last).squeeze(1), {})
