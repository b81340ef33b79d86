"""MISA: each modality is split into a shared and a private vector before the six are fused."""

from itertools import combinations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dmd.baselines.base import LSTM, Baseline, BaselineOutput, Triple, masks
from dmd.batch import MODALITIES, Batch
from dmd.losses import normalise


def difference(x: Tensor, y: Tensor) -> Tensor:
    """How far the representations x and y (B, d) of B clips are from orthogonal; a scalar.

    Each is centred over the clips and each clip's vector scaled to length one; the loss is the mean
    square of X^T Y (d, d): zero where every channel of x is orthogonal to every one of y, over the
    clips.
    """
    x, y = (normalise(z - z.mean(dim=0)) for z in (x, y))
    return (x.T @ y).square().mean()


def central_moment_discrepancy(x: Tensor, y: Tensor, moments: int = 5) -> Tensor:
    """How far apart the distributions of x and y, samples (B, d) in (0, 1), are; a scalar.

    The distance of the means plus those of the central moments of orders 2 to `moments`.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)  # powers of half precision underflow
    x, y = x.to(dtype), y.to(dtype)
    means = x.mean(dim=0), y.mean(dim=0)
    x, y = x - means[0], y - means[1]
    gaps = [means[0] - means[1]]
    gaps += [x.pow(k).mean(dim=0) - y.pow(k).mean(dim=0) for k in range(2, moments + 1)]
    return torch.linalg.vector_norm(torch.stack(gaps), dim=1).sum()


class MISA(Baseline):
    """Modality-invariant and -specific representations (Hazarika et al., ACM Multimedia 2020).

    Two LSTMs on top of each other read a modality; what they end with becomes a vector, from which
    a shared encoder and a private one make two more. One transformer layer lets the six vectors of
    a clip attend to each other; a network reads them side by side. Takes unaligned clips as well.
    dim: width of the vectors. hidden: of an LSTM's state, in each direction. heads: of the
    attention. dropout: in the network that reads the six vectors. attention_dropout: in the
    transformer layer. moments: the highest order that is compared between shared vectors.
    difference: weight of the loss that keeps a modality's shared from its private vectors, and the
    private ones of two modalities from each other. similarity: weight of the central moment
    discrepancy between the shared vectors of two modalities, reconstruction: of the error of what
    a decoder makes of a modality's two vectors; both are means over three pairs, three modalities.
    Faithful: the parts, their order, normalisation and losses, and the weights of the public code,
    in which the difference loss is a mean over matrix entries; the paper prints the sum.
    Adapted: `hidden` is no longer the width of the features, and the transformer's inner layer is
    four times as wide as its outer one, not 2,048; language is a sequence of features like the
    others, also where the paper fine-tunes BERT; the gradient of the difference loss counts the
    scaling to length one, which the public code cuts off. The losses that compare modalities do so
    over the clips of a batch.
    """

    def __init__(
        self,
        widths: Triple,
        lengths: Triple,
        dim: int = 64,
        hidden: int = 32,
        heads: int = 2,
        dropout: float = 0.5,
        attention_dropout: float = 0.1,
        moments: int = 5,
        difference: float = 0.3,
        similarity: float = 1.0,
        reconstruction: float = 1.0,
    ) -> None:
        super().__init__(widths, lengths)
        if dim % heads:
            raise ValueError(f"heads={heads} must divide dim={dim}")
        self.moments = moments
        self.weights = {
            "difference": difference,
            "similarity": similarity,
            "reconstruction": reconstruction,
        }
        self.lower = nn.ModuleList(LSTM(width, hidden, bidirectional=True) for width in widths)
        self.norms = nn.ModuleList(nn.LayerNorm(2 * hidden) for _ in MODALITIES)
        self.upper = nn.ModuleList(LSTM(2 * hidden, hidden, bidirectional=True) for _ in MODALITIES)
        self.projections = nn.ModuleList(
            nn.Sequential(nn.Linear(4 * hidden, dim), nn.ReLU(), nn.LayerNorm(dim))
            for _ in MODALITIES
        )
        # The sigmoid keeps the vectors in (0, 1), on which the moments are compared.
        self.shared = nn.Sequential(nn.Linear(dim, dim), nn.Sigmoid())
        self.private = nn.ModuleList(
            nn.Sequential(nn.Linear(dim, dim), nn.Sigmoid()) for _ in MODALITIES
        )
        self.decoders = nn.ModuleList(nn.Linear(dim, dim) for _ in MODALITIES)
        self.fusion = nn.TransformerEncoderLayer(
            dim, heads, 4 * dim, attention_dropout, batch_first=True
        )
        self.head = nn.Sequential(
            nn.Linear(6 * dim, 3 * dim), nn.Dropout(dropout), nn.ReLU(), nn.Linear(3 * dim, 1)
        )

    def vectors(self, batch: Batch) -> Tensor:
        """A batch of B clips -> one vector a modality, (3, B, dim)."""
        found = []
        for m, (x, mask) in enumerate(zip(batch.features, masks(batch), strict=True)):
            states, low = self.lower[m](x, mask)  # (B, T, 2 * hidden), (B, 2 * hidden)
            _, high = self.upper[m](self.norms[m](states), mask)
            found.append(self.projections[m](torch.cat([low, high], dim=1)))
        return torch.stack(found)

    def split(self, vectors: Tensor) -> tuple[Tensor, Tensor]:
        """Vectors (3, B, dim) -> their shared and their private parts, the same shape each."""
        private = [encode(x) for encode, x in zip(self.private, vectors, strict=True)]
        return self.shared(vectors), torch.stack(private)

    def losses(self, vectors: Tensor, shared: Tensor, private: Tensor) -> dict[str, Tensor]:
        """The three losses between a modality's vector and its parts, (3, B, dim) each."""
        pairs = [*combinations(range(len(MODALITIES)), 2)]
        apart = [difference(s, p) for s, p in zip(shared, private, strict=True)]
        apart += [difference(private[i], private[j]) for i, j in pairs]
        alike = [central_moment_discrepancy(shared[i], shared[j], self.moments) for i, j in pairs]
        again = [decode(x) for decode, x in zip(self.decoders, shared + private, strict=True)]
        return {
            "difference": torch.stack(apart).sum(),
            "similarity": torch.stack(alike).mean(),
            "reconstruction": F.mse_loss(torch.stack(again), vectors),
        }

    def forward(self, batch: Batch) -> BaselineOutput:
        """A batch of B clips -> predictions (B,) and the three weighted losses."""
        self.check(batch)
        vectors = self.vectors(batch)
        shared, private = self.split(vectors)
        tokens = torch.cat([private, shared]).transpose(0, 1)  # (B, 6, dim)
        prediction = self.head(self.fusion(tokens).flatten(1)).squeeze(1)
        losses = self.losses(vectors, shared, private)
        return BaselineOutput(
            prediction, {name: self.weights[name] * x for name, x in losses.items()}
        )
