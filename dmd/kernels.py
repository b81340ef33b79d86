"""Softmax attention that keeps its weights only where they are few: the fastest form of a device.

All forms compute the same function; only dropout, which is random, differs in its draws.
"""

import functools
import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

CHUNK = 1 << 21  # attention weights that are worked on at a time: they stay in the cache
KEPT = 1 << 22  # attention weights of a call up to which they are kept for the backward pass
LONG = 1 << 14  # queries times keys from which PyTorch's kernel for processors is faster


def attend(
    query: Tensor, key: Tensor, value: Tensor, visible: Tensor | None, dropout: float
) -> Tensor:
    """softmax(Q K^T / sqrt(width)) V, heads side by side (Eq. 10).

    query: (N, H, T_q, width), key, value: (N, H, T_k, width); visible: (N, 1, T_q or 1, T_k), true
    where a query may see a key, or None for all; dropout: share of the weights that become zero,
    the others growing so that the mean stays.
    On a processor a dropped weight is one whose random byte lies below 256 times the share: the
    share is rounded to a multiple of 1/256. The bytes come from a seed drawn from PyTorch's own
    random numbers, and are drawn again in the backward pass.
    """
    width = query.shape[-1]
    on_processor = query.device.type == "cpu"
    half = query.dtype in (torch.bfloat16, torch.float16)
    if on_processor and not half and (dropout or query.shape[2] * key.shape[2] < LONG):
        bias = None
        if visible is not None:
            bias = torch.zeros_like(visible, dtype=query.dtype).masked_fill(~visible, -math.inf)
        clips, heads = query.shape[:2]
        flat = (x.flatten(0, 1) for x in (query, key, value))  # (N * H, T, width)
        result: Tensor = ChunkedAttention.apply(*flat, bias, heads, dropout)
        return result.unflatten(0, (clips, heads))
    # Kernels work on vectors of 16 (processor) or 8 numbers (GPU); a head has 5 or 10.
    gap = -width % (16 if on_processor else 8)
    if gap:
        query, key, value = (F.pad(x, (0, gap)) for x in (query, key, value))
    mixed = F.scaled_dot_product_attention(
        query, key, value, visible, dropout, scale=1 / math.sqrt(width)
    )
    return mixed[..., :width]


class ChunkedAttention(torch.autograd.Function):
    """Attention on a processor, a few clips at a time.

    Many weights are not kept but computed again in the backward pass, so that memory does not grow
    with queries times keys.
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        bias: Tensor | None,
        heads: int,
        dropout: float,
    ) -> Tensor:
        """query (N * H, T_q, width), key and value (N * H, T_k, width) -> as query.

        bias (N, 1, T_q or 1, T_k) is added to the scores.
        """
        seed = int(torch.randint(2**62, ())) if dropout else 0
        draws = _Draws(dropout, seed)
        mixed = _columns(query)
        few = len(query) * query.shape[1] * key.shape[1] <= KEPT
        saved: list[Tensor] = []
        for q, k, v, out, b in _chunks(heads, bias, query, key, value, mixed):
            weight, kept = _weights(q, k, b, heads, draws)
            if few:
                saved += (weight, kept)
            _product(v.mT, kept.mT, draws.scale, out)
        mixed = mixed.mT
        ctx.save_for_backward(query, key, value, bias, mixed, *saved)
        ctx.heads, ctx.dropout, ctx.seed = heads, dropout, seed
        return mixed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of query, key and value."""
        query, key, value, bias, mixed, *saved = ctx.saved_tensors
        draws = _Draws(ctx.dropout, ctx.seed)
        grads = [_columns(x) for x in (query, key, value)]
        mean = (grad * mixed).sum(dim=-1, keepdim=True)
        rows = (query, key, value, grad, mean, *grads)
        scale = 1 / math.sqrt(query.shape[-1])
        pairs = zip(saved[::2], saved[1::2], strict=True)
        for q, k, v, g, m, to_q, to_k, to_v, b in _chunks(ctx.heads, bias, *rows):
            weight, kept = next(pairs, None) or _weights(q, k, b, ctx.heads, draws)
            _product(g.mT, kept, draws.scale, to_v)
            slope = _product(g, v.mT, draws.scale).mul_(kept)
            slope.addcmul_(m, weight, value=-1)
            _product(k.mT, slope.mT, scale, to_q)
            _product(q.mT, slope, scale, to_k)
        return (*(x.mT for x in grads), None, None, None)


def _columns(like: Tensor) -> Tensor:
    """A place for (N, T, width) as (N, width, T).

    Products whose result has few columns are several times slower than those with few rows.
    """
    return like.new_empty(len(like), like.shape[2], like.shape[1])


def _product(x: Tensor, y: Tensor, scale: float = 1.0, out: Tensor | None = None) -> Tensor:
    """scale * x y for matrices (N, i, j), (N, j, k)."""
    if out is None:
        return torch.baddbmm(_nothing(x.dtype), x, y, beta=0, alpha=scale)
    return torch.baddbmm(_nothing(x.dtype), x, y, beta=0, alpha=scale, out=out)


@functools.cache
def _nothing(dtype: torch.dtype) -> Tensor:
    return torch.zeros((), dtype=dtype)


def _chunks(
    heads: int, bias: Tensor | None, query: Tensor, key: Tensor, *more: Tensor
) -> Iterable[tuple[Any, ...]]:
    """Cut tensors (N * H, ...), and the bias (N, ...), by clips: about CHUNK weights at a time."""
    clips = max(1, CHUNK // (heads * query.shape[1] * key.shape[1]))
    if clips * heads >= len(query):
        return [(query, key, *more, bias)]
    parts = [x.split(clips * heads) for x in (query, key, *more)]
    biases = [None] * len(parts[0]) if bias is None else bias.split(clips)
    return zip(*parts, biases, strict=True)


def _weights(
    query: Tensor, key: Tensor, bias: Tensor | None, heads: int, draws: "_Draws"
) -> tuple[Tensor, Tensor]:
    """The weights, and what dropout keeps of them."""
    score = _product(query, key.mT, 1 / math.sqrt(query.shape[-1]))
    if bias is not None:
        score.unflatten(0, (-1, heads)).add_(bias)
    weight = score.softmax(dim=-1)
    return weight, draws(weight)


class _Draws:
    """Dropout of weights, the same for the same seed; `scale` makes up for what it takes away."""

    def __init__(self, share: float, seed: int) -> None:
        self.threshold, self.scale = _threshold(share)
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, weight: Tensor) -> Tensor:
        if not self.threshold:
            return weight
        return _kept(weight, self.threshold, self.generator).mul_(weight)


def _threshold(share: float) -> tuple[int, float]:
    """Random bytes below the first number are dropped; the others grow by the second."""
    threshold = min(round(256 * share), 255)  # a share below 1 leaves some
    return threshold, 256 / (256 - threshold)


def _kept(like: Tensor, threshold: int, generator: torch.Generator | None = None) -> Tensor:
    """1 where a random byte is not below the threshold, else 0, in the shape of a tensor.

    Eight bytes at a draw, since draws take time; numbers, since to multiply is faster than to fill,
    and compared straight into their place, which is faster than by way of booleans.
    """
    words = torch.empty(-(-like.numel() // 8), dtype=torch.int64)
    words.random_(-(2**63), 2**63 - 1, generator=generator)
    drawn = words.view(torch.uint8)[: like.numel()].view(like.shape)
    return torch.ge(drawn, threshold, out=torch.empty_like(drawn, dtype=like.dtype))


def drop(x: Tensor, share: float) -> Tensor:
    """Dropout: a share of the elements becomes zero and the others grow, so that the mean stays.

    On a processor as in `attend`, in steps of 1/256; PyTorch's own elsewhere.
    """
    if x.device.type != "cpu":
        return F.dropout(x, share)
    threshold, scale = _threshold(share)
    return x * _kept(x, threshold).mul_(scale)
