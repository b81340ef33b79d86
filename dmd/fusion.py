"""Adaptive fusion of the refined features into one prediction (Sec. 3.2, Feature fusion)."""

from collections.abc import Sequence

from torch import Tensor, cat, nn


class AdaptiveFusion(nn.Module):
    """Weigh each part by a gate learned from it, join the parts, and regress the sentiment.

    widths: the width of each part; dropout: inside the residual network before the regressor.
    """

    def __init__(self, widths: Sequence[int], dropout: float = 0.0) -> None:
        super().__init__()
        total = sum(widths)
        self.gates = nn.ModuleList(nn.Linear(width, width) for width in widths)
        self.residual = nn.Sequential(
            nn.Linear(total, total), nn.ReLU(), nn.Dropout(dropout), nn.Linear(total, total)
        )
        self.regressor = nn.Linear(total, 1)

    def forward(self, parts: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Parts, (B, width) each -> prediction (B,) and the fused features (B, sum of widths)."""
        weighted = [x * gate(x).sigmoid() for x, gate in zip(parts, self.gates, strict=True)]
        fused = cat(weighted, dim=1)
        fused = fused + self.residual(fused)
        return self.regressor(fused).squeeze(-1), fused
