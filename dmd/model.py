"""DMD, assembled: decoupling, two distillation graphs, crossmodal attention, fusion (Fig. 2)."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dmd.attention import CrossmodalEncoder, side_by_side
from dmd.batch import MODALITIES, Batch, PerModality
from dmd.config import ModelConfig
from dmd.decoupling import Decoupling, ShallowEncoder, shorten
from dmd.fusion import AdaptiveFusion, ResidualRegressor
from dmd.graph import GDUnit, GraphOutput
from dmd.kernels import drop


@dataclass
class Output:
    """Everything that one forward pass computes for B clips.

    prediction: (B,) sentiment scores.
    homo, hetero: the two distillation graphs; their features are the pooled common vectors
        (3, B, d) and the reinforced private vectors (3, B, 2d; without crossmodal attention d),
        or what residual unimodal heads make of them.
    shallow, common, private, reconstructed, private_again: a tensor (B, T_m, d) a modality, the
        quantities of Eqs. 1-3 (the last two None without decoupling).
    masks: (B, T_m) a modality, true at the valid steps; padded: whether some are not.
    margin_vectors: (3, B, d), the common vectors that Eq. 4 compares.
    common_prediction: (B,), from the common part alone; None without `common_head`.
    parts: what is fused: the common vector (B, 3d), the private ones (B, 2d or d) L, V, A.
    fused: (B, width) what the prediction is made from.
    """

    prediction: Tensor
    homo: GraphOutput
    hetero: GraphOutput
    shallow: PerModality[Tensor]
    common: PerModality[Tensor]
    private: PerModality[Tensor]
    reconstructed: PerModality[Tensor] | None
    private_again: PerModality[Tensor] | None
    masks: PerModality[Tensor]
    padded: bool
    margin_vectors: Tensor
    common_prediction: Tensor | None
    parts: tuple[Tensor, Tensor, Tensor, Tensor]
    fused: Tensor


def masked_mean(x: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean over the valid steps: (B, T, d), mask (B, T) or None for all -> (B, d)."""
    if mask is None:
        return x.mean(dim=1)
    total = x.masked_fill(~mask[:, :, None], 0.0).sum(dim=1)
    return total / mask.sum(dim=1, keepdim=True)


def last_valid(x: Tensor, mask: Tensor | None = None) -> Tensor:
    """The last valid step: (B, T, d), mask (B, T) or None for all -> (B, d)."""
    if mask is None:
        return x[:, -1]
    last = mask.sum(dim=1) - 1
    return x[torch.arange(len(x), device=x.device), last]


def apply_each(modules: Iterable[nn.Module], inputs: Iterable[Tensor]) -> list[Any]:
    """One module a modality, each on its own input."""
    return [module(x) for module, x in zip(modules, inputs, strict=True)]


# The six pairs of modalities by number, (source, target). Pairs with one source are neighbours:
# they share the rate of attention dropout.
PAIRS = [(s, t) for s in range(len(MODALITIES)) for t in range(len(MODALITIES)) if s != t]


class DMD(nn.Module):
    """Decoupled multimodal distilling, as `config` describes it.

    `model(batch)` maps a `Batch` of clips to an `Output`; it refuses, with a ValueError, clips
    whose widths or lengths are not those that it was built for.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        dim = config.dim
        self.shallow = nn.ModuleList(
            ShallowEncoder(
                width, dim, kernel, config.projection_padding, config.skip_equal_projection
            )
            for width, kernel in zip(config.widths, config.kernels, strict=True)
        )
        self.decoupling = Decoupling(dim) if config.decoupling else None
        self.crossmodal = self.memory = self.common_attention = None
        rates = config.attention_dropout
        if config.crossmodal_attention:
            depth = max(config.layers, config.memory_layers_min)
            self.crossmodal = self._encoders(dim, config.layers, [rates[s] for s, _ in PAIRS])
            self.memory = self._encoders(2 * dim, depth, [rates[0]] * len(MODALITIES))
        if config.common_attention:
            self.common_attention = self._encoders(dim, config.layers, rates)
        private_dim = 2 * dim if config.crossmodal_attention else dim
        flat = [steps * dim for steps in config.steps]
        self.homo = self._unit(dim, config.homo_distillation, config.edge_hidden[0])
        self.hetero = self._unit(private_dim, config.hetero_distillation, config.edge_hidden[1])
        self.homo_heads, self.hetero_heads = nn.ModuleList(), nn.ModuleList()
        if config.unimodal_heads == "residual":
            dropout = config.output_dropout
            self.homo_heads.extend(ResidualRegressor(width, dim, dropout) for width in flat)
            self.hetero_heads.extend(
                ResidualRegressor(private_dim, private_dim, dropout) for _ in MODALITIES
            )
        self.margin_projection, self.private_projection = nn.ModuleList(), nn.ModuleList()
        if config.margin_projection:
            self.margin_projection.extend(nn.Linear(width, dim) for width in flat)
        if config.private_projection:
            self.private_projection.extend(nn.Linear(width, dim) for width in flat)
        self.common_head = (
            ResidualRegressor(3 * dim, 3 * dim, config.output_dropout)
            if config.common_head
            else None
        )
        self.fusion = AdaptiveFusion(
            [3 * dim, *[private_dim] * 3], config.output_dropout, config.gates
        )
        self.fixed_lengths = (
            not config.mask_padding
            or config.projection_padding == "valid"
            or bool(self.homo_heads or self.margin_projection or self.private_projection)
        )
        self.pool = {"mean": masked_mean, "last": last_valid}[config.pooling]

    def _encoders(self, dim: int, layers: int, rates: Sequence[float]) -> CrossmodalEncoder:
        config = self.config
        return CrossmodalEncoder(
            dim,
            config.heads,
            layers,
            config.embedding_dropout,
            rates,
            config.causal_mask,
            config.position_at_zero,
            config.separate_values,
        )

    def _unit(self, dim: int, distil: bool, edge_hidden: int) -> GDUnit:
        config = self.config
        return GDUnit(
            dim,
            len(MODALITIES),
            config.stop_teacher_gradient,
            config.edge_temperature,
            distil,
            config.unimodal_heads == "linear",
            edge_hidden,
        )

    def check(self, batch: Batch) -> None:
        """Refuse a batch that the model was not built for, with a ValueError that says why."""
        weights = next(self.parameters()).dtype
        for m, (name, x) in enumerate(zip(MODALITIES, batch.features, strict=True)):
            width, steps = self.config.widths[m], self.config.lengths[m]
            if x.shape[2] != width:
                raise ValueError(
                    f"the {name} features are {x.shape[2]} wide, "
                    f"but the model was built for {width}"
                )
            if x.shape[1] > steps:
                raise ValueError(
                    f"the {name} sequences have {x.shape[1]} steps, "
                    f"but the model was built for at most {steps}"
                )
            if x.dtype != weights:
                raise ValueError(
                    f"the {name} features are {x.dtype}, but the weights are {weights}: convert one"
                )

    def prepare(self, batch: Batch) -> tuple[PerModality[Tensor], PerModality[Tensor], bool]:
        """Features (B, T_m, D_m) and masks (B, T_m), as the choices about padding want them, and
        whether there is any.

        Where the number of steps matters all clips are filled up to the lengths of the config.
        """
        config, features, masks = self.config, batch.features, batch.masks
        padded = bool(batch.padded)
        gaps = [n - x.shape[1] for n, x in zip(config.lengths, features, strict=True)]
        if self.fixed_lengths and (padded or any(gaps)):
            features = PerModality(
                *(
                    F.pad(x.masked_fill(~mask[:, :, None], 0.0), (0, 0, 0, gap))
                    for x, mask, gap in zip(features, masks, gaps, strict=True)
                )
            )
            masks = PerModality(*(F.pad(x, (0, n)) for x, n in zip(masks, gaps, strict=True)))
            padded = True
        if not config.mask_padding:
            masks = PerModality(*(torch.ones_like(mask) for mask in masks))
            padded = False
        return features, masks, padded

    def reinforce(
        self, private: Sequence[Tensor], masks: Sequence[Tensor] | None
    ) -> Sequence[Tensor]:
        """Private features -> Z_m (Eq. 10): each modality asks the two others, then itself."""
        if self.crossmodal is None or self.memory is None:
            return private
        sources, targets = zip(*PAIRS, strict=True)
        answers = dict(
            zip(PAIRS, side_by_side(self.crossmodal, private, targets, sources, masks), strict=True)
        )
        joined = []
        for target in range(len(MODALITIES)):
            order = [s for s, t in PAIRS if t == target]
            if self.config.acoustic_first and target == 0:
                order.reverse()
            joined.append(torch.cat([answers[s, target] for s in order], dim=2))
        return side_by_side(self.memory, joined, range(len(MODALITIES)), None, masks)

    def _pooled(self, sequences: Sequence[Tensor], masks: Sequence[Tensor] | None) -> Tensor:
        """Sequences (B, T_m, d) a modality -> vectors (3, B, d)."""
        if masks is None:
            return torch.stack([self.pool(x) for x in sequences])
        return torch.stack([self.pool(x, m) for x, m in zip(sequences, masks, strict=True)])

    def _graphs(
        self, common: Sequence[Tensor], pooled_common: Tensor, pooled_private: Tensor
    ) -> tuple[GraphOutput, GraphOutput]:
        """Both graphs, on the pooled vectors or on what residual heads make of the parts."""
        if not self.homo_heads:
            return self.homo(pooled_common), self.hetero(pooled_private)
        flat = [x.flatten(1) for x in common]
        logits, _, hidden = zip(*apply_each(self.homo_heads, flat), strict=True)
        homo = self.homo(torch.stack(hidden), torch.stack(logits))
        logits, refined, _ = zip(*apply_each(self.hetero_heads, pooled_private), strict=True)
        return homo, self.hetero(torch.stack(refined), torch.stack(logits))

    def forward(self, batch: Batch) -> Output:
        """A batch of B clips -> everything in `Output`."""
        self.check(batch)
        inputs, masks, padded = self.prepare(batch)
        if self.training and self.config.language_dropout:
            language = drop(inputs.language, self.config.language_dropout)
            inputs = inputs._replace(language=language)
        hidden = masks if padded else [None] * len(masks)  # no masks where none are needed
        shallow = PerModality(
            *(encode(x, mask) for encode, x, mask in zip(self.shallow, inputs, hidden, strict=True))
        )
        lost = [n - m for n, m in zip(self.config.lengths, self.config.steps, strict=True)]
        masks = PerModality(*(shorten(mask, n) for mask, n in zip(masks, lost, strict=True)))
        valid = masks if padded else None
        common = private = shallow
        reconstructed = private_again = None
        if self.decoupling is not None:
            parts = self.decoupling(shallow)
            common, private = parts.common, parts.private
            reconstructed, private_again = parts.reconstructed, parts.private_again

        pooled_common = self._pooled(common, valid)  # (3, B, d)
        pooled_private = self._pooled(self.reinforce(private, valid), valid)  # (3, B, 2d)
        homo, hetero = self._graphs(common, pooled_common, pooled_private)
        margin_vectors = pooled_common
        if self.margin_projection:
            # channel by channel, as published, where the heads read step by step
            flat = [x.transpose(1, 2).flatten(1) for x in common]
            margin_vectors = torch.stack(apply_each(self.margin_projection, flat))
        fused_common = pooled_common
        if self.common_attention is not None:
            attended = side_by_side(
                self.common_attention, common, range(len(MODALITIES)), None, valid
            )
            fused_common = self._pooled(attended, valid)
        vectors = (torch.cat([*fused_common], dim=1), *pooled_private)
        prediction, fused = self.fusion(vectors)
        return Output(
            prediction=prediction,
            homo=homo,
            hetero=hetero,
            shallow=shallow,
            common=common,
            private=private,
            reconstructed=reconstructed,
            private_again=private_again,
            masks=masks,
            padded=padded,
            margin_vectors=margin_vectors,
            common_prediction=self.common_head(vectors[0])[0] if self.common_head else None,
            parts=vectors,
            fused=fused,
        )
