"""FDMER: common and private vectors, told apart by a modality discriminator and an adversary."""

from itertools import combinations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dmd.attention import CrossmodalEncoder, EncoderLayer, LayerNorm, side_by_side
from dmd.baselines.base import Baseline, BaselineOutput, Triple, masks, mean_over_time, mlp
from dmd.batch import MODALITIES, Batch
from dmd.decoupling import ShallowEncoder
from dmd.losses import cosine, normalise

PAIRS = [*combinations(range(len(MODALITIES)), 2)]


def reverse_gradient(x: Tensor, strength: float = 1.0) -> Tensor:
    """x itself, whose gradient comes back with the opposite sign, times `strength`."""
    return (1 + strength) * x.detach() - strength * x


def dependence(x: Tensor, y: Tensor) -> Tensor:
    """How much x and y (B, d) tell of each other over B clips, not only linearly; a scalar.

    The Hilbert-Schmidt independence criterion with Gaussian kernels of width 1 on the vectors
    scaled to length one: the covariance of the similarities between clips, zero where one of the
    two is the same for all clips.
    """
    similar = [(z @ z.T - 1).exp() for z in map(normalise, (x, y))]
    centred = similar[0] - similar[0].mean(dim=0)
    centred = centred - centred.mean(dim=1, keepdim=True)
    # Not less than zero but for rounding, as both kernels are positive.
    return (centred * similar[1]).mean().relu()


class FDMER(Baseline):
    """Feature-Disentangled Multimodal Emotion Recognition, after the paper (Yang et al., ACM
    Multimedia 2022).

    Each modality becomes one vector. An encoder that all share makes a common vector of it, an
    encoder of its own a private one. A discriminator learns to name the modality: the private
    encoders help it, the common encoder, which gets its gradient reversed, misleads it. So one
    backward pass and one optimiser train both sides. The six vectors attend to each other, get
    weights that depend on the clip, and are read side by side. Takes unaligned clips as well.
    dim: width of the vectors. heads: of the attention. layers: of the transformer that reads a
    modality. kernels: steps under the convolutions (L, V, A). dropout: in the network that reads
    the six vectors. attention_dropout: on the attention weights. consistency: weight of the loss
    that a clip's common vectors agree. disparity: weight of the loss that private vectors are
    independent of the common vector of their modality and of each other. adversarial: weight of
    the discriminator's cross-entropy. reversal: strength of the reversed gradient.
    Faithful, to the paper's summary: the two kinds of encoders, a modality discriminator that
    guides both adversarially, losses for consistency and disparity, attention between modalities
    with learned weights.
    Inferred: no official code exists. Gradient reversal is how the adversary is trained.
    Consistency is one minus the cosine, averaged over the pairs; disparity is the Hilbert-Schmidt
    independence criterion, averaged over six pairs; the default weights. A modality is read by a
    convolution and a transformer, whose mean over the valid steps is its vector; nothing is
    reconstructed. The weights are a softmax over the six attended vectors.
    """

    def __init__(
        self,
        widths: Triple,
        lengths: Triple,
        dim: int = 40,
        heads: int = 4,
        layers: int = 2,
        kernels: Triple = (3, 3, 3),
        dropout: float = 0.2,
        attention_dropout: float = 0.1,
        consistency: float = 0.1,
        disparity: float = 0.1,
        adversarial: float = 0.05,
        reversal: float = 1.0,
    ) -> None:
        super().__init__(widths, lengths)
        if dim % heads:
            raise ValueError(f"heads={heads} must divide dim={dim}")
        self.reversal = reversal
        self.weights = {
            "consistency": consistency,
            "disparity": disparity,
            "adversarial": adversarial,
        }
        self.shallow = nn.ModuleList(
            ShallowEncoder(width, dim, kernel)
            for width, kernel in zip(widths, kernels, strict=True)
        )
        rates = [attention_dropout] * len(MODALITIES)
        self.readers = CrossmodalEncoder(dim, heads, layers, attention_dropout=rates)
        self.common_encoder = mlp(dim, dim, dim)
        self.private_encoders = nn.ModuleList(mlp(dim, dim, dim) for _ in MODALITIES)
        self.discriminator = mlp(dim, dim, len(MODALITIES))
        self.attention = EncoderLayer(dim, heads, [attention_dropout])
        self.norm = LayerNorm(1, dim)
        self.score = nn.Sequential(nn.Linear(dim, dim), nn.Tanh(), nn.Linear(dim, 1, bias=False))
        self.head = mlp(6 * dim, 2 * dim, 1, dropout)

    def vectors(self, batch: Batch) -> Tensor:
        """A batch of B clips -> one vector a modality, (3, B, dim)."""
        valid = masks(batch)
        parts = zip(self.shallow, batch.features, valid, strict=True)
        shallow = [encode(x, mask) for encode, x, mask in parts]
        read = side_by_side(self.readers, shallow, range(len(MODALITIES)), None, valid)
        return torch.stack([mean_over_time(x, mask) for x, mask in zip(read, valid, strict=True)])

    def split(self, vectors: Tensor) -> tuple[Tensor, Tensor]:
        """Vectors (3, B, dim) -> their common and their private parts, the same shape each."""
        private = [encode(x) for encode, x in zip(self.private_encoders, vectors, strict=True)]
        return self.common_encoder(vectors), torch.stack(private)

    def discrimination(self, common: Tensor, private: Tensor) -> Tensor:
        """Cross-entropy of the modalities' names, from vectors (3, B, dim) of both kinds."""
        shown = torch.stack([reverse_gradient(common, self.reversal), private])
        names = torch.arange(len(MODALITIES), device=common.device)[:, None]
        names = names.expand(shown.shape[:3])  # (2, 3, B)
        return F.cross_entropy(self.discriminator(shown).flatten(0, 2), names.flatten())

    def fuse(self, common: Tensor, private: Tensor) -> tuple[Tensor, Tensor]:
        """Both kinds of vectors (3, B, dim) -> the fused vector (B, 6 * dim), weights (B, 6)."""
        tokens = torch.cat([common, private]).transpose(0, 1)  # (B, 6, dim)
        attended = self.norm(self.attention(tokens[None], None, None))[0]
        weights = self.score(attended).softmax(dim=1)  # (B, 6, 1)
        return (weights * attended).flatten(1), weights.squeeze(2)

    def forward(self, batch: Batch) -> BaselineOutput:
        """A batch of B clips -> predictions (B,) and the three weighted losses."""
        self.check(batch)
        common, private = self.split(self.vectors(batch))
        cosines = [cosine(common[i], common[j]) for i, j in PAIRS]
        apart = [dependence(c, p) for c, p in zip(common, private, strict=True)]
        apart += [dependence(private[i], private[j]) for i, j in PAIRS]
        losses = {
            "consistency": (1 - torch.stack(cosines)).mean().relu(),  # -1e-8 by rounding
            "disparity": torch.stack(apart).mean(),
            "adversarial": self.discrimination(common, private),
        }
        prediction = self.head(self.fuse(common, private)[0]).squeeze(1)
        return BaselineOutput(
            prediction, {name: self.weights[name] * x for name, x in losses.items()}
        )
