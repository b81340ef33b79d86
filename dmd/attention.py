"""Crossmodal attention (Eq. 10) and the transformer encoder that is built from it.

One modality asks (the target, whose features are reinforced) and another answers (the source).
With the source equal to the target the same encoder is ordinary self-attention.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def sinusoidal_positions(steps: int, dim: int) -> Tensor:
    """The position code (steps, dim): sines in the first half, cosines in the second.

    Step t is counted from 1; wavelengths grow geometrically from 2 pi to 20,000 pi. The last
    channel of an odd number is zero. In single precision, whatever the precision of the features.
    """
    half = dim // 2
    ratio = math.log(10_000) / max(half - 1, 1)
    frequency = torch.exp(torch.arange(half, dtype=torch.float32) * -ratio)
    angle = torch.arange(1, steps + 1, dtype=torch.float32)[:, None] * frequency  # (steps, half)
    return F.pad(torch.cat([angle.sin(), angle.cos()], dim=1), (0, dim % 2))


def _steps(x: Tensor, mask: Tensor | None) -> Tensor:
    """Valid steps of each clip (B,) of x (B, T, dim) with mask (B, T); without one, (1,): T."""
    return torch.tensor([x.shape[1]], device=x.device) if mask is None else mask.sum(dim=1)


class MultiheadAttention(nn.Module):
    """Scaled dot-product attention of several heads (Eq. 10).

    Q = target P_q, K = source P_k, V = source P_v; each head has dim / heads columns of them and
    computes softmax(Q K^T / sqrt(dim / heads)) V; the heads are joined by a linear map.
    """

    def __init__(self, dim: int, heads: int, dropout: float = 0.0, causal: bool = False) -> None:
        super().__init__()
        self.heads = heads
        self.dropout = dropout
        self.causal = causal
        self.query = nn.Linear(dim, dim)
        self.key_value = nn.Linear(dim, 2 * dim)
        self.output = nn.Linear(dim, dim)

    def split(self, x: Tensor) -> Tensor:
        """Features (B, T, dim) -> their columns by head, (B, heads, T, dim / heads)."""
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def visible(
        self,
        target: Tensor,
        source: Tensor,
        source_mask: Tensor | None = None,
        target_mask: Tensor | None = None,
    ) -> Tensor | None:
        """Which keys each query may see: (B or 1, 1, T_q or 1, T_k), or None for all of them."""
        mask = None if source_mask is None else source_mask[:, None, None, :]
        if not self.causal:
            return mask
        # Lengths of the clips, not of their padding: else padding would move what is visible.
        shift = _steps(source, source_mask) - _steps(target, target_mask)  # (B or 1,)
        query = torch.arange(target.shape[1], device=target.device)[:, None]
        key = torch.arange(source.shape[1], device=target.device)
        past = key <= query + shift.abs()[:, None, None, None]
        # A query without any valid key would be 0/0: the first key is always valid.
        return past if mask is None else past & mask

    def forward(
        self,
        target: Tensor,
        source: Tensor,
        source_mask: Tensor | None = None,
        target_mask: Tensor | None = None,
        values: Tensor | None = None,
    ) -> Tensor:
        """Target (B, T_q, dim), source (B, T_k, dim), masks (B, T_k), (B, T_q) -> (B, T_q, dim).

        The mask of the target matters only with `causal`, for the length of each clip. `values`
        (B, T_k, dim), where given, takes the place of the source in V.
        """
        key, value = self.key_value(source).chunk(2, dim=-1)
        if values is not None:
            value = self.key_value(values).chunk(2, dim=-1)[1]
        mixed = F.scaled_dot_product_attention(
            self.split(self.query(target)),
            self.split(key),
            self.split(value),
            attn_mask=self.visible(target, source, source_mask, target_mask),
            dropout_p=self.dropout if self.training else 0.0,
        )
        return self.output(mixed.transpose(1, 2).flatten(2))

    def weights(
        self,
        target: Tensor,
        source: Tensor,
        source_mask: Tensor | None = None,
        target_mask: Tensor | None = None,
    ) -> Tensor:
        """The weights (B, heads, T_q, T_k) with which `forward` averages; each row sums to 1."""
        key, _ = self.key_value(source).chunk(2, dim=-1)
        q, k = self.split(self.query(target)), self.split(key)
        score = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
        visible = self.visible(target, source, source_mask, target_mask)
        if visible is not None:
            score = score.masked_fill(~visible, -math.inf)
        return score.softmax(dim=-1)


class EncoderLayer(nn.Module):
    """Attention to the source, then a two-layer network a step; each normalised and residual."""

    def __init__(self, dim: int, heads: int, dropout: float, causal: bool) -> None:
        super().__init__()
        self.attention = MultiheadAttention(dim, heads, dropout, causal)
        self.attention_norm = nn.LayerNorm(dim)
        self.feedforward = nn.Sequential(
            nn.Linear(dim, 4 * dim), nn.ReLU(), nn.Linear(4 * dim, dim)
        )
        self.feedforward_norm = nn.LayerNorm(dim)

    def forward(
        self,
        target: Tensor,
        source: Tensor | None,
        source_mask: Tensor | None,
        target_mask: Tensor | None,
        values: Tensor | None = None,
    ) -> Tensor:
        """Target (B, T_q, dim), source (B, T_k, dim) or None (self-attention) -> (B, T_q, dim)."""
        query = self.attention_norm(target)
        key = query if source is None else self.attention_norm(source)
        value = None if values is None else self.attention_norm(values)
        target = target + self.attention(query, key, source_mask, target_mask, value)
        return target + self.feedforward(self.feedforward_norm(target))


class CrossmodalEncoder(nn.Module):
    """Reinforce a target sequence with a source sequence of another modality (Sec. 3.2, HeteroGD).

    dim, heads, layers: width, attention heads and layers.
    embedding_dropout: on the embedded sequences; attention_dropout: on the attention weights.
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
        attention_dropout: float = 0.0,
        causal: bool = False,
        position_at_zero: bool = True,
        separate_values: bool = False,
    ) -> None:
        super().__init__()
        self.position_at_zero = position_at_zero
        self.separate_values = separate_values
        self.embedding_dropout = nn.Dropout(embedding_dropout)
        self.layers = nn.ModuleList(
            EncoderLayer(dim, heads, attention_dropout, causal) for _ in range(layers)
        )
        self.norm = nn.LayerNorm(dim)

    def embed(self, x: Tensor) -> Tensor:
        """Features (B, T, dim) -> scaled features plus position code, same shape."""
        positions = sinusoidal_positions(x.shape[1], x.shape[2]).to(x)
        if not self.position_at_zero:
            positions = positions * (x[:, :, :1] != 0)
        return self.embedding_dropout(math.sqrt(x.shape[2]) * x + positions)

    def forward(
        self,
        target: Tensor,
        source: Tensor | None = None,
        source_mask: Tensor | None = None,
        target_mask: Tensor | None = None,
    ) -> Tensor:
        """Target (B, T_q, dim), source (B, T_k, dim), masks (B, T_k), (B, T_q) -> (B, T_q, dim).

        Without a source the target attends to itself, and source_mask is the mask of the target.
        Masked steps of the source have no influence on the result; those of the target come out
        as numbers without meaning.
        """
        target = self.embed(target)
        values = None
        if source is None:
            target_mask = source_mask
        else:
            if self.separate_values and self.training:  # else they are equal
                values = self.embed(source)
            source = self.embed(source)
        for layer in self.layers:
            target = layer(target, source, source_mask, target_mask, values)
        return self.norm(target)
