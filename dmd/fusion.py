"""From features to one prediction: a residual network, and the adaptive fusion built on it."""

from collections.abc import Sequence
from typing import Literal

from torch import Tensor, cat, nn


class ResidualRegressor(nn.Module):
    """A two-layer network that adds to its input, and a linear prediction from the sum.

    width: of the input; hidden: of the inner layer; dropout: between the two.
    """

    def __init__(self, width: int, hidden: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.residual = nn.Sequential(
            nn.Linear(width, hidden), nn.ReLU(), nn.Dropout(dropout), nn.Linear(hidden, width)
        )
        self.regressor = nn.Linear(width, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B, width) -> prediction (B,), what it is made of (B, width), inner layer (B, hidden)."""
        inner, relu, dropout, outer = self.residual
        hidden = relu(inner(x))
        refined = x + outer(dropout(hidden))
        return self.regressor(refined).squeeze(-1), refined, hidden


class AdaptiveFusion(ResidualRegressor):
    """Weigh each part by a gate learned from it, join the parts, and regress the sentiment
    (Sec. 3.2, Feature fusion).

    widths: the width of each part; dropout: inside the residual network before the regressor.
    gates: the gates `multiply` the features of their part, or `replace` them.
    """

    def __init__(
        self,
        widths: Sequence[int],
        dropout: float = 0.0,
        gates: Literal["multiply", "replace"] = "multiply",
    ) -> None:
        linear = [nn.Linear(width, width) for width in widths]
        super().__init__(sum(widths), sum(widths), dropout)
        self.replace = gates == "replace"
        self.gates = nn.ModuleList(linear)

    def forward(self, parts: Sequence[Tensor]) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """Parts, (B, width) each -> prediction (B,) and the fused features (B, sum of widths)."""
        gates = [gate(x).sigmoid() for x, gate in zip(parts, self.gates, strict=True)]
        if not self.replace:
            gates = [x * gate for x, gate in zip(parts, gates, strict=True)]
        prediction, fused, _ = super().forward(cat(gates, dim=1))
        return prediction, fused
