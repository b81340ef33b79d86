"""MICA: crossmodal attention whose queries and keys are brought to one distribution."""

from collections.abc import Sequence

import torch
from torch import Tensor

from dmd.attention import ALL, EncoderLayer, visible_keys
from dmd.baselines.base import BaselineOutput, Triple, masks
from dmd.baselines.mult import SOURCES, TARGETS, MulT
from dmd.batch import Batch
from dmd.losses import normalise
from dmd.model import PAIRS


def moments(x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (n, d) and covariance (n, d, d) of the valid steps of all clips, (n, B, T, d)."""
    count = mask.sum(dim=(1, 2))
    x = x.masked_fill(~mask[..., None], 0.0)
    mean = x.sum(dim=(1, 2)) / count[:, None]
    centred = ((x - mean[:, None, None]) * mask[..., None]).flatten(1, 2)  # (n, B * T, d)
    return mean, centred.mT @ centred / count[:, None, None]


def marginal(query: Tensor, key: Tensor, query_mask: Tensor, key_mask: Tensor) -> Tensor:
    """How far apart the queries and keys of n encoders are as distributions, (n,).

    query (n, B, T_q, d), key (n, B, T_k, d), masks (n, B, T). All are scaled to length one, so that
    making them small is no way to make them alike; then their means and covariances are compared.
    """
    queries, keys = moments(normalise(query), query_mask), moments(normalise(key), key_mask)
    means = (queries[0] - keys[0]).square().sum(dim=1)
    return means + (queries[1] - keys[1]).square().sum(dim=(1, 2))


def correlated(query: Tensor, key: Tensor, chosen: Tensor) -> Tensor:
    """One minus the cosine of a query and a key, mean over the chosen pairs (n, B, T_q, T_k): (n,).

    query (n, B, T_q, d), key (n, B, T_k, d). Zero where no pair is chosen.
    """
    gap = (1 - normalise(query) @ normalise(key).mT).clamp(min=0)  # less by rounding
    total = gap.masked_fill(~chosen, 0.0).sum(dim=(1, 2, 3))
    return total / chosen.sum(dim=(1, 2, 3)).clamp(min=1)


class MICA(MulT):
    """Modality-Invariant Crossmodal Attention, after the paper (Liang et al., ICCV 2021).

    MulT, and two losses that let attention compare like with like: in each crossmodal layer, the
    queries of one modality and the keys of the other shall have one distribution, and pairs that
    attend to each other with confidence shall be close. With the same weights it predicts what
    MulT predicts. Takes aligned and unaligned clips.
    dim, heads, layers, kernels, causal, embedding_dropout, attention_dropout, output_dropout: as
    in MulT. marginal: weight of the first loss. correlated: weight of the second. confidence: a
    pair is confident if it has more than so many times the weight it would have if all keys that
    the query sees had the same.
    Faithful, to the paper's summary: the crossmodal transformer underneath, alignment of the
    marginal distributions of queries and keys, and of their elements with high-confidence
    correlations.
    Inferred: no official code exists. Distributions are compared by mean and covariance of the
    vectors at length one, over all valid steps of a batch: the loss is zero for equal distributions
    and blind to what differs in higher moments only. Confidence is the attention weight, averaged
    over the heads; the choice of pairs gets no gradient. Both losses are means over layers and
    ordered pairs of modalities. There are no layers besides those of MulT that make a common space.
    """

    def __init__(
        self,
        widths: Triple,
        lengths: Triple,
        dim: int = 30,
        heads: int = 5,
        layers: int = 4,
        kernels: Triple = (3, 3, 3),
        causal: bool = False,
        embedding_dropout: float = 0.25,
        attention_dropout: float = 0.1,
        output_dropout: float = 0.1,
        marginal: float = 0.1,
        correlated: float = 0.1,
        confidence: float = 1.2,
    ) -> None:
        dropouts = embedding_dropout, attention_dropout, output_dropout
        super().__init__(widths, lengths, dim, heads, layers, kernels, causal, *dropouts)
        self.weights = {"marginal": marginal, "correlated": correlated}
        self.confidence = confidence

    def alignment(
        self,
        layer: EncoderLayer,
        target: Tensor,
        source: Tensor,
        visible: Tensor,
        valid: tuple[Tensor, Tensor],
        members: slice = ALL,
    ) -> Tensor:
        """Both losses, (2, n), of what n encoders attend with in a layer: arguments as there.

        valid: the masks of target and source (n, B, T).
        """
        attention = layer.attention
        target, source = (layer.attention_norm(x, members) for x in (target, source))
        query = attention.query(target.flatten(1, 2), members).view_as(target)
        key = attention.key_value(source.flatten(1, 2), members).chunk(2, dim=-1)[0]
        key = key.reshape(source.shape)
        with torch.no_grad():
            weights = attention.weights(target, source, visible, members).mean(dim=2)
            seen = visible.sum(dim=-1)[:, :, 0, :, None]  # keys of a query, (n, B, T_q or 1, 1)
            chosen = (weights * seen > self.confidence) & valid[0][..., None]
        return torch.stack([marginal(query, key, *valid), correlated(query, key, chosen)])

    def aligned_answers(
        self, features: Sequence[Tensor], valid: Sequence[Tensor]
    ) -> tuple[dict[tuple[int, int], Tensor], Tensor]:
        """The answers as in MulT, and both losses, (2,)."""
        parts = zip(self.shallow, features, valid, strict=True)
        shallow = [encode(x, mask) for encode, x, mask in parts]
        together = len({x.shape[1] for x in shallow}) == 1
        encoder, answers, losses = self.crossmodal, [], []
        for part in [ALL] if together else [slice(n, n + 1) for n in range(len(PAIRS))]:
            ends = TARGETS[part], SOURCES[part]
            target, source = (encoder.embed(torch.stack([shallow[m] for m in x])) for x in ends)
            target_mask, source_mask = (torch.stack([valid[m] for m in x]) for x in ends)
            visible = visible_keys(target, source, source_mask, target_mask, encoder.causal)
            assert visible is not None  # there is a mask
            both = target_mask, source_mask
            for layer in encoder.layers:
                assert isinstance(layer, EncoderLayer)
                losses.append(self.alignment(layer, target, source, visible, both, part))
                target = layer(target, source, visible, part)
            answers += encoder.norm(target, part).unbind()
        return dict(zip(PAIRS, answers, strict=True)), torch.cat(losses, dim=1).mean(dim=1)

    def forward(self, batch: Batch) -> BaselineOutput:
        """A batch of B clips -> predictions (B,) and the two weighted losses."""
        self.check(batch)
        valid = masks(batch)
        answers, losses = self.aligned_answers(batch.features, valid)
        terms = zip(self.weights.items(), losses, strict=True)
        return BaselineOutput(
            self.predict(self.reinforce(answers, valid)),
            {name: weight * x for (name, weight), x in terms},
        )
