"""Crossmodal attention (Eq. 10) and the transformer encoder that is built from it.

One modality asks (the target, whose features are reinforced) and another answers (the source).
With the source equal to the target the same encoder is ordinary self-attention.

Several encoders of one shape, each with its own weights, run side by side: every weight has a
leading axis of encoders, and so have the features, (n, B, T, dim).
"""

import functools
import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dmd.kernels import attend, drop

ALL = slice(None)


@functools.lru_cache(maxsize=32)
def sinusoidal_positions(
    steps: int, dim: int, dtype: torch.dtype = torch.float32, device: torch.device | None = None
) -> Tensor:
    """The position code (steps, dim): sines in the first half, cosines in the second.

    Step t is counted from 1; wavelengths grow geometrically from 2 pi to 20,000 pi. The last
    channel of an odd number is zero. Computed in single precision, whatever the dtype.
    """
    half = dim // 2
    ratio = math.log(10_000) / max(half - 1, 1)
    with torch.inference_mode(False):  # the code is kept for training, whoever asks first
        frequency = torch.exp(torch.arange(half, dtype=torch.float32) * -ratio)
        angle = torch.arange(1, steps + 1, dtype=torch.float32)[:, None] * frequency
        code = F.pad(torch.cat([angle.sin(), angle.cos()], dim=1), (0, dim % 2))
        return code.to(device=device, dtype=dtype)


def visible_keys(
    target: Tensor,
    source: Tensor,
    source_mask: Tensor | None = None,
    target_mask: Tensor | None = None,
    causal: bool = False,
) -> Tensor | None:
    """Which keys each query may see: (n, B or 1, 1, T_q or 1, T_k), or None for all of them.

    target, source: features (n, B, T_q, dim) and (n, B, T_k, dim); masks (n, B, T), true at the
    valid steps. The mask of the target matters only with `causal`, for the length of each clip.
    causal: let query t see only keys up to t, shifted by the difference of the clip's lengths.
    """
    mask = None if source_mask is None else source_mask[:, :, None, None, :]
    if not causal:
        return mask
    # Lengths of the clips, not of their padding: else padding would move what is visible.
    shift = (_steps(source, source_mask) - _steps(target, target_mask)).abs()
    query = torch.arange(target.shape[2], device=target.device)[:, None]
    key = torch.arange(source.shape[2], device=target.device)
    past = key <= query + shift[:, :, None, None, None]
    # A query without any valid key would be 0/0: the first key is always valid.
    return past if mask is None else past & mask


def _steps(x: Tensor, mask: Tensor | None) -> Tensor:
    """Valid steps of each clip (n, B) of x (n, B, T, dim); without a mask, (n, 1): T."""
    if mask is None:
        return torch.full((len(x), 1), x.shape[2], device=x.device)
    return mask.sum(dim=2)


def pick(x: Tensor, members: slice) -> Tensor:
    """Some of n encoders, on the first axis of x; no operation where it is all of them."""
    return x if members == ALL else x[members]


class Linear(nn.Module):
    """Linear maps of n encoders side by side, (n, R, inputs) -> (n, R, outputs) for R rows."""

    def __init__(self, count: int, inputs: int, outputs: int) -> None:
        super().__init__()
        bound = 1 / math.sqrt(inputs)  # as in nn.Linear
        self.weight = nn.Parameter(torch.empty(count, inputs, outputs).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(count, 1, outputs).uniform_(-bound, bound))

    def forward(self, x: Tensor, members: slice = ALL) -> Tensor:
        """The maps of `members` of the encoders, x having as many on its first axis."""
        return torch.baddbmm(pick(self.bias, members), x, pick(self.weight, members))


class LayerNorm(nn.Module):
    """Layer normalisation of n encoders side by side, (n, B, T, dim) -> the same."""

    def __init__(self, count: int, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(count, 1, 1, dim))
        self.bias = nn.Parameter(torch.zeros(count, 1, 1, dim))

    def forward(self, x: Tensor, members: slice = ALL) -> Tensor:
        """The norms of `members` of the encoders."""
        weight, bias = pick(self.weight, members), pick(self.bias, members)
        return torch.addcmul(bias, F.layer_norm(x, x.shape[-1:]), weight)


class MultiheadAttention(nn.Module):
    """Scaled dot-product attention of several heads (Eq. 10), for n encoders side by side.

    Q = target P_q, K = source P_k, V = source P_v; each head has dim / heads columns of them and
    computes softmax(Q K^T / sqrt(dim / heads)) V; the heads are joined by a linear map.
    dropout: of the attention weights, one share for each encoder.
    """

    def __init__(self, dim: int, heads: int, dropout: Sequence[float] = (0.0,)) -> None:
        super().__init__()
        self.heads = heads
        self.dropout = tuple(dropout)
        self.query = Linear(len(dropout), dim, dim)
        self.key_value = Linear(len(dropout), dim, 2 * dim)
        self.output = Linear(len(dropout), dim, dim)

    def split(self, rows: Tensor, steps: int) -> Tensor:
        """Rows (n, B * T, dim) -> their columns by head, (n * B, heads, T, dim / heads)."""
        width = rows.shape[-1] // self.heads
        return rows.reshape(-1, steps, self.heads, width).transpose(1, 2)

    def forward(
        self,
        target: Tensor,
        source: Tensor,
        visible: Tensor | None = None,
        members: slice = ALL,
        values: Tensor | None = None,
    ) -> Tensor:
        """Target (n, B, T_q, dim), source (n, B, T_k, dim) -> (n, B, T_q, dim).

        visible: as `visible_keys` gives it. `values` (n, B, T_k, dim), where given, takes the place
        of the source in V.
        """
        count, clips, steps, _ = target.shape
        query = self.split(self.query(target.flatten(1, 2), members), steps)
        rows = self.key_value(source.flatten(1, 2), members).chunk(2, dim=-1)
        key, value = (self.split(x, source.shape[2]) for x in rows)
        if values is not None:
            rows = self.key_value(values.flatten(1, 2), members).chunk(2, dim=-1)
            value = self.split(rows[1], source.shape[2])
        if visible is not None:
            visible = visible.expand(count, clips, -1, -1, -1).flatten(0, 1)
        rates = self.dropout[members] if self.training else (0.0,) * count
        if len(set(rates)) == 1:
            mixed = attend(query, key, value, visible, rates[0])
        else:  # one call for all neighbours whose dropout is the same
            groups = [(rate, len([*same])) for rate, same in itertools.groupby(rates)]
            sizes = [clips * n for _, n in groups]
            parts = [x.split(sizes) for x in (query, key, value)]
            seen = [None] * len(groups) if visible is None else visible.split(sizes)
            mixed = torch.cat(
                [
                    attend(q, k, v, mask, rate)
                    for q, k, v, mask, (rate, _) in zip(*parts, seen, groups, strict=True)
                ]
            )
        joined = mixed.transpose(1, 2).reshape(count, clips * steps, -1)
        return self.output(joined, members).view_as(target)

    def weights(
        self, target: Tensor, source: Tensor, visible: Tensor | None = None, members: slice = ALL
    ) -> Tensor:
        """The weights (n, B, heads, T_q, T_k) with which `forward` averages; rows sum to 1."""
        rows, _ = self.key_value(source.flatten(1, 2), members).chunk(2, dim=-1)
        key = self.split(rows, source.shape[2])
        query = self.split(self.query(target.flatten(1, 2), members), target.shape[2])
        score = query @ key.transpose(-2, -1) / math.sqrt(query.shape[-1])
        score = score.unflatten(0, target.shape[:2])
        if visible is not None:
            score = score.masked_fill(~visible, -math.inf)
        return score.softmax(dim=-1)


class EncoderLayer(nn.Module):
    """Attention to the source, then a two-layer network a step; each normalised and residual."""

    def __init__(self, dim: int, heads: int, dropout: Sequence[float]) -> None:
        super().__init__()
        count = len(dropout)
        self.attention = MultiheadAttention(dim, heads, dropout)
        self.attention_norm = LayerNorm(count, dim)
        self.expand = Linear(count, dim, 4 * dim)
        self.contract = Linear(count, 4 * dim, dim)
        self.feedforward_norm = LayerNorm(count, dim)

    def forward(
        self,
        target: Tensor,
        source: Tensor | None,
        visible: Tensor | None,
        members: slice = ALL,
        values: Tensor | None = None,
    ) -> Tensor:
        """Target (n, B, T_q, dim), source (n, B, T_k, dim) or None: itself -> as the target."""
        query = self.attention_norm(target, members)
        key = query if source is None else self.attention_norm(source, members)
        value = None if values is None else self.attention_norm(values, members)
        target = target + self.attention(query, key, visible, members, value)
        rows = self.feedforward_norm(target, members).flatten(1, 2)
        hidden = self.expand(rows, members).relu()
        return target + self.contract(hidden, members).view_as(target)


class CrossmodalEncoder(nn.Module):
    """Reinforce target sequences with source sequences of other modalities (Sec. 3.2, HeteroGD).

    dim, heads, layers: width, attention heads and layers.
    embedding_dropout: on the embedded sequences.
    attention_dropout: on the attention weights; a number, or one for each of n encoders.
    causal: let query t see only keys up to t, shifted by the difference of the clip's lengths.
    position_at_zero: whether a step whose first channel is exactly zero has a position code.
    separate_values: embed the source twice, once for keys and once for values, which differ by
        their dropout.
    Both sequences keep their own length and rate; the position code lets the attention find
    which moments belong together.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        layers: int,
        embedding_dropout: float = 0.0,
        attention_dropout: float | Sequence[float] = 0.0,
        causal: bool = False,
        position_at_zero: bool = True,
        separate_values: bool = False,
    ) -> None:
        super().__init__()
        self.causal = causal
        self.position_at_zero = position_at_zero
        self.separate_values = separate_values
        self.embedding_dropout = embedding_dropout
        if isinstance(attention_dropout, int | float):
            attention_dropout = [attention_dropout]
        self.layers = nn.ModuleList(
            EncoderLayer(dim, heads, attention_dropout) for _ in range(layers)
        )
        self.norm = LayerNorm(len(attention_dropout), dim)

    def embed(self, x: Tensor) -> Tensor:
        """Features (n, B, T, dim) -> scaled features plus position code, same shape."""
        positions = sinusoidal_positions(*x.shape[-2:], dtype=x.dtype, device=x.device)
        if not self.position_at_zero:
            positions = positions * (x[..., :1] != 0)
        embedded = torch.add(positions, x, alpha=math.sqrt(x.shape[-1]))
        if self.training and self.embedding_dropout:
            return drop(embedded, self.embedding_dropout)
        return embedded

    def forward(
        self,
        target: Tensor,
        source: Tensor | None = None,
        source_mask: Tensor | None = None,
        target_mask: Tensor | None = None,
        members: slice = ALL,
    ) -> Tensor:
        """Target (n, B, T_q, dim), source (n, B, T_k, dim), masks (n, B, T) -> (n, B, T_q, dim).

        Without a source the target attends to itself, and source_mask is the mask of the target.
        Masked steps of the source have no influence on the result; those of the target come out
        as numbers without meaning. members: run only this part of the encoders, n of them. A
        single encoder also takes its arguments, and gives its result, without the axis of n.
        """
        if target.dim() == 3:
            source, source_mask, target_mask = (
                None if x is None else x[None] for x in (source, source_mask, target_mask)
            )
            return self.forward(target[None], source, source_mask, target_mask)[0]
        target = self.embed(target)
        values = None
        if source is None:
            visible = visible_keys(target, target, source_mask, source_mask, self.causal)
        else:
            if self.separate_values and self.training:  # else they are equal
                values = self.embed(source)
            source = self.embed(source)
            visible = visible_keys(target, source, source_mask, target_mask, self.causal)
        for layer in self.layers:
            target = layer(target, source, visible, members, values)
        return self.norm(target, members)


def side_by_side(
    encoders: CrossmodalEncoder,
    features: Sequence[Tensor],
    targets: Sequence[int],
    sources: Sequence[int] | None,
    masks: Sequence[Tensor] | None,
) -> list[Tensor]:
    """Run n encoders, each for a target (and a source) among the modalities' features (B, T_m, d).

    All at once where the lengths agree, one after the other where they do not.
    """
    parts = [targets] if sources is None else [targets, sources]
    target, *source = ([features[m] for m in part] for part in parts)
    if masks is None:
        hidden: list[list[Tensor] | None] = [None, None]
    else:
        hidden = [[masks[m] for m in part] for part in (parts[-1], targets)]
    together = len({x.shape[1] for x in features}) == 1
    found = []
    for i in [ALL] if together else [slice(n, n + 1) for n in range(len(targets))]:
        answer = encoders(
            torch.stack(target[i]),
            torch.stack(source[0][i]) if source else None,
            *(None if mask is None else torch.stack(mask[i]) for mask in hidden),
            members=i,
        )
        found += answer.unbind()
    return found
