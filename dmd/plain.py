"""DMD written as research code often is: the yardstick for the package's speed, and a check of it.

Each encoder runs by itself, with a linear map for each of Q, K and V; masks and position codes are
built anew wherever they are used; the weights of attention are kept; the margin loss goes through
its anchors in a loop. The function that is computed is the package's.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dmd import losses
from dmd.attention import ALL, CrossmodalEncoder, sinusoidal_positions, visible_keys
from dmd.config import LossConfig
from dmd.model import DMD, Output


class PlainLayer(nn.Module):
    """One layer of an encoder: attention to the source, then a two-layer network a step."""

    def __init__(self, dim: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.query, self.key, self.value, self.output = (nn.Linear(dim, dim) for _ in range(4))
        self.expand, self.contract = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)
        self.attention_norm, self.feedforward_norm = nn.LayerNorm(dim), nn.LayerNorm(dim)

    def forward(
        self, target: Tensor, source: Tensor, values: Tensor, masks: Sequence[Any], causal: bool
    ) -> Tensor:
        """Target (B, T_q, dim), source and values (B, T_k, dim) -> as the target.

        masks: of target and source, (B, T) or None.
        """
        target_mask, source_mask = (
            torch.ones(x.shape[:2], dtype=torch.bool, device=x.device) if mask is None else mask
            for x, mask in zip((target, source), masks, strict=True)
        )
        visible = visible_keys(
            target[None], source[None], source_mask[None], target_mask[None], causal
        )
        assert visible is not None  # the source has a mask
        norm = self.attention_norm
        inputs = (
            (self.query, norm(target)), (self.key, norm(source)), (self.value, norm(values))
        )  # fmt: skip
        query, key, value = (
            project(x).unflatten(2, (self.heads, -1)).transpose(1, 2) for project, x in inputs
        )
        score = query @ key.transpose(2, 3) / math.sqrt(query.shape[-1])
        weight = score.masked_fill(~visible[0], -math.inf).softmax(dim=-1)
        weight = F.dropout(weight, self.dropout, self.training)
        target = target + self.output((weight @ value).transpose(1, 2).flatten(2))
        hidden = self.expand(self.feedforward_norm(target)).relu()
        return target + self.contract(hidden)


class PlainEncoder(nn.Module):
    """One encoder, the i-th of those that the package runs side by side, with the same weights."""

    def __init__(self, encoders: CrossmodalEncoder, i: int, embedding_dropout: float) -> None:
        super().__init__()
        self.causal, self.position_at_zero = encoders.causal, encoders.position_at_zero
        self.separate_values = encoders.separate_values
        self.embedding_dropout = nn.Dropout(embedding_dropout)
        self.layers = nn.ModuleList()
        weights = encoders.norm.weight
        dim = weights.shape[-1]
        layer: Any
        for layer in encoders.layers:
            attention = layer.attention
            plain = PlainLayer(dim, attention.heads, attention.dropout[i]).to(weights)
            key, value = (_member(attention.key_value, i, part) for part in (0, 1))
            plain.key.load_state_dict(key)
            plain.value.load_state_dict(value)
            plain.query.load_state_dict(_member(attention.query, i))
            plain.output.load_state_dict(_member(attention.output, i))
            for name in ("expand", "contract"):
                getattr(plain, name).load_state_dict(_member(getattr(layer, name), i))
            for name in ("attention_norm", "feedforward_norm"):
                getattr(plain, name).load_state_dict(_member_norm(getattr(layer, name), i))
            self.layers.append(plain)
        self.norm = nn.LayerNorm(dim).to(weights)
        self.norm.load_state_dict(_member_norm(encoders.norm, i))

    def embed(self, x: Tensor) -> Tensor:
        """Features (B, T, dim) -> scaled features plus position code, same shape."""
        code = sinusoidal_positions.__wrapped__(*x.shape[-2:], x.dtype, x.device)  # not cached
        if not self.position_at_zero:
            code = code * (x[..., :1] != 0)
        embedded: Tensor = self.embedding_dropout(math.sqrt(x.shape[-1]) * x + code)
        return embedded

    def forward(self, target: Tensor, source: Tensor | None, masks: Sequence[Any]) -> Tensor:
        """Target (B, T_q, dim), source (B, T_k, dim) or None: itself -> as the target.

        masks: of target and source, (B, T) or None.
        """
        x = self.embed(target)
        key = value = None
        if source is not None:
            key = value = self.embed(source)
            if self.separate_values:
                value = self.embed(source)
        for layer in self.layers:
            x = layer(
                x, x if key is None else key, x if value is None else value, masks, self.causal
            )
        normalised: Tensor = self.norm(x)
        return normalised


def _member(module: Any, i: int, part: int | None = None) -> dict[str, Tensor]:
    """Weight (outputs, inputs) and bias of one of n linear maps side by side, or half of it."""
    weight, bias = module.weight[i].detach().T, module.bias[i, 0].detach()
    if part is not None:
        weight, bias = weight.chunk(2)[part], bias.chunk(2)[part]
    return {"weight": weight, "bias": bias}


def _member_norm(module: Any, i: int) -> dict[str, Tensor]:
    return {"weight": module.weight[i, 0, 0].detach(), "bias": module.bias[i, 0, 0].detach()}


class PlainEncoders(nn.Module):
    """What stands in the place of a `CrossmodalEncoder`: its encoders, one after the other."""

    def __init__(self, encoders: CrossmodalEncoder, embedding_dropout: float) -> None:
        super().__init__()
        count = len(encoders.norm.weight)
        self.encoders = nn.ModuleList(
            PlainEncoder(encoders, i, embedding_dropout) for i in range(count)
        )

    def forward(
        self,
        target: Tensor,
        source: Tensor | None = None,
        source_mask: Tensor | None = None,
        target_mask: Tensor | None = None,
        members: slice = ALL,
    ) -> Tensor:
        """As `CrossmodalEncoder.forward`, (n, B, T, dim)."""
        if source is None:
            target_mask = source_mask
        found = []
        for i, encoder in enumerate(list(self.encoders)[members]):
            masks = [None if mask is None else mask[i] for mask in (target_mask, source_mask)]
            found.append(encoder(target[i], None if source is None else source[i], masks))
        return torch.stack(found)


class PlainDMD(DMD):
    """The model, with its encoders one after the other."""

    @classmethod
    def of(cls, model: DMD) -> Self:
        """A plain model with the weights of `model`."""
        plain = cls(model.config).to(next(model.parameters()))
        plain.load_state_dict(model.state_dict())
        for name in ("crossmodal", "memory", "common_attention"):
            encoders = getattr(plain, name)
            if encoders is not None:
                setattr(plain, name, PlainEncoders(encoders, model.config.embedding_dropout))
        return plain.train(model.training)


def margin(common: Tensor, classes: Tensor, alpha: float | Tensor, config: LossConfig) -> Tensor:
    """Eq. (4) as `dmd.losses.margin`, one anchor after the other."""
    clips, modalities, _ = common.shape
    vectors = losses.normalise(common.flatten(0, 1))
    clip = torch.arange(clips, device=common.device).repeat_interleave(modalities)
    modality = torch.arange(modalities, device=common.device).repeat(clips)
    total, triples, anchors = common.new_zeros(()), 0, 0
    for i in range(len(vectors)):
        positive = classes[clip] == classes[clip[i]]
        negative = ~positive
        if config.margin_pairs == "triples":
            positive = positive & (modality != modality[i])
            negative = negative & (modality == modality[i])
        else:
            positive[i] = False
        cosine = (vectors[i : i + 1] @ vectors.T)[0]
        size = alpha[clip[i]][clip][negative] if isinstance(alpha, Tensor) else alpha
        hinge = (size + cosine[negative][None, :] - cosine[positive][:, None]).relu()
        if hinge.numel():
            total = total + (hinge.sum() if config.margin_mean == "triples" else hinge.mean())
            triples, anchors = triples + hinge.numel(), anchors + 1
    return total / max(1, triples if config.margin_mean == "triples" else anchors)


def objective(output: Output, label: Tensor, config: LossConfig) -> Tensor:
    """The total of `dmd.losses.objective` (Eq. 11), with the margin loss of this module."""
    if output.reconstructed is None or output.private_again is None:
        return losses.objective(output, label, config).total
    others = losses.objective(dataclasses.replace(output, reconstructed=None), label, config)
    masks = output.masks
    decoupling = (
        losses.reconstruction(output.shallow, output.reconstructed, masks)
        + losses.cycle(output.private, output.private_again, masks)
        + config.gamma * margin(*losses.margin_inputs(output, label, config), config)
        + config.gamma * losses.orthogonality(
            output.common, output.private, masks, config.orthogonality, config.orthogonality_axis
        )
    )  # fmt: skip
    return others.total + config.lambda1 * decoupling
