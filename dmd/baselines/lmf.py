"""Low-rank fusion: tensor fusion without the tensor."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from dmd.baselines.base import Baseline, BaselineOutput, Triple, UnimodalEmbeddings, with_one
from dmd.batch import Batch


class LMF(Baseline):
    """Low-rank Multimodal Fusion (Liu et al., 2018).

    A linear map of the outer product of three vectors has a weight for every entry of the product.
    If these weights are a sum of `rank` products of one vector a modality, so is the result: each
    modality is mapped to `rank` numbers, the three maps are multiplied, and the products added up.

    sizes: of the vectors of language, visual, acoustic. hidden: width of the LSTM that reads the
    language. rank: number of products. dropout: before the networks.
    Faithful: the vectors are made as in TFN and have the constant 1; the sum over the rank has
    learned weights and a bias, as in the authors' code, and is the prediction.
    Adapted: means over time count valid steps only, and the LSTM stops at the last of them. Since
    means need no alignment it takes unaligned clips as well.
    """

    def __init__(
        self,
        widths: Triple,
        lengths: Triple,
        sizes: Triple = (32, 16, 16),
        hidden: int = 64,
        rank: int = 4,
        dropout: float = 0.2,
    ) -> None:
        super().__init__(widths, lengths)
        self.embed = UnimodalEmbeddings(widths, sizes, hidden, dropout)
        # The first column of a factor belongs to the constant 1.
        self.factors = nn.ParameterList(
            nn.init.xavier_normal_(torch.empty(rank, 1 + size)) for size in sizes
        )
        self.sum = nn.Linear(rank, 1)

    def fuse(self, vectors: Sequence[Tensor]) -> Tensor:
        """Vectors (B, d_L), (B, d_V), (B, d_A) -> (B,)."""
        product = torch.ones_like(vectors[0][:, :1])
        for x, factor in zip(vectors, self.factors, strict=True):
            product = product * (with_one(x) @ factor.T)  # (B, rank)
        return self.sum(product).squeeze(1)

    def forward(self, batch: Batch) -> BaselineOutput:
        """A batch of B clips -> predictions (B,)."""
        self.check(batch)
        return BaselineOutput(self.fuse(self.embed(batch)), {})
