"""Tensor fusion: every product of a language, a visual and an acoustic feature."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from dmd.baselines.base import Baseline, BaselineOutput, Triple, UnimodalEmbeddings, with_one
from dmd.batch import Batch


class TFN(Baseline):
    """Tensor Fusion Network (Zadeh et al., 2017).

    Each modality becomes a vector; a constant 1 joins each vector, and a network reads the outer
    product of the three. Thanks to the constant the product holds the vectors themselves and the
    products of two as well as those of all three.

    sizes: of the vectors of language, visual, acoustic. hidden: width of the LSTM that reads the
    language. fused: width of the network after the fusion. dropout: before the networks.
    bounded: whether a scaled sigmoid keeps predictions between -3 and 3.
    Faithful: an LSTM for language, three ReLU layers over the mean of the normalised visual and
    acoustic features, the outer product, two ReLU layers and a bounded output.
    Adapted: smaller vectors (the paper has 128, 32, 32, which makes a first layer of 18 million
    weights); means over time count valid steps only, and the LSTM stops at the last of them. Since
    means need no alignment it takes unaligned clips as well.
    """

    def __init__(
        self,
        widths: Triple,
        lengths: Triple,
        sizes: Triple = (32, 16, 16),
        hidden: int = 64,
        fused: int = 64,
        dropout: float = 0.2,
        bounded: bool = True,
    ) -> None:
        super().__init__(widths, lengths)
        self.bounded = bounded
        self.embed = UnimodalEmbeddings(widths, sizes, hidden, dropout)
        self.head = nn.Sequential(
            nn.Dropout(dropout),
            *(nn.Linear(math.prod(1 + size for size in sizes), fused), nn.ReLU()),
            *(nn.Linear(fused, fused), nn.ReLU()),
            nn.Linear(fused, 1),
        )

    @staticmethod
    def outer(vectors: Sequence[Tensor]) -> Tensor:
        """Vectors (B, d_L), (B, d_V), (B, d_A) -> (B, 1 + d_L, 1 + d_V, 1 + d_A).

        Index 0 of an axis belongs to the constant: [:, i, 0, 0] is a language feature alone.
        """
        return torch.einsum("bl,bv,ba->blva", *map(with_one, vectors))

    def forward(self, batch: Batch) -> BaselineOutput:
        """A batch of B clips -> predictions (B,)."""
        self.check(batch)
        score = self.head(self.outer(self.embed(batch)).flatten(1)).squeeze(1)
        return BaselineOutput(6 * score.sigmoid() - 3 if self.bounded else score, {})
