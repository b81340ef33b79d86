"""DMD, assembled: decoupling, two distillation graphs, crossmodal attention, fusion (Fig. 2)."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dmd.attention import CrossmodalEncoder
from dmd.batch import MODALITIES, Batch, PerModality
from dmd.config import ModelConfig
from dmd.decoupling import Decoupling, ShallowEncoder, shorten
from dmd.fusion import AdaptiveFusion, ResidualRegressor
from dmd.graph import GDUnit, GraphOutput


@dataclass
class Output:
    """Everything that one forward pass computes for B clips.

    prediction: (B,) sentiment scores.
    homo, hetero: the two distillation graphs; their features are the pooled common vectors
        (3, B, d) and the reinforced private vectors (3, B, 2d; without crossmodal attention d),
        or what residual unimodal heads make of them.
    shallow, common, private, reconstructed, private_again: a tensor (B, T_m, d) a modality, the
        quantities of Eqs. 1-3 (the last two None without decoupling).
    masks: (B, T_m) a modality, true at the valid steps.
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
    margin_vectors: Tensor
    common_prediction: Tensor | None
    parts: tuple[Tensor, Tensor, Tensor, Tensor]
    fused: Tensor


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Mean over the valid steps: (B, T, d), mask (B, T) -> (B, d)."""
    total = x.masked_fill(~mask[:, :, None], 0.0).sum(dim=1)
    return total / mask.sum(dim=1, keepdim=True)


def last_valid(x: Tensor, mask: Tensor) -> Tensor:
    """The last valid step: (B, T, d), mask (B, T) -> (B, d)."""
    last = mask.sum(dim=1) - 1
    return x[torch.arange(len(x), device=x.device), last]


def apply_each(modules: Iterable[nn.Module], inputs: Iterable[Tensor]) -> list[Any]:
    """One module a modality, each on its own input."""
    return [module(x) for module, x in zip(modules, inputs, strict=True)]


class DMD(nn.Module):
    """Decoupled multimodal distilling, as `config` describes it.

    `model(batch)` maps a `Batch` of clips to an `Output`; it refuses, with a ValueError, clips
    whose widths or lengths are not those that it was built for.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        dim = config.dim
        self.language_dropout = nn.Dropout(config.language_dropout)
        self.shallow = nn.ModuleList(
            ShallowEncoder(
                width, dim, kernel, config.projection_padding, config.skip_equal_projection
            )
            for width, kernel in zip(config.widths, config.kernels, strict=True)
        )
        self.decoupling = Decoupling(dim) if config.decoupling else None
        self.crossmodal, self.memory = nn.ModuleDict(), nn.ModuleDict()
        if config.crossmodal_attention:
            dropouts = PerModality(*config.attention_dropout)
            depth = max(config.layers, config.memory_layers_min)
            for target in MODALITIES:
                for source in MODALITIES:
                    if source != target:
                        self.crossmodal[f"{source}_to_{target}"] = self._encoder(
                            dim, config.layers, getattr(dropouts, source)
                        )
                self.memory[target] = self._encoder(2 * dim, depth, dropouts.language)
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
        self.common_attention = nn.ModuleList()
        if config.common_attention:
            self.common_attention.extend(
                self._encoder(dim, config.layers, dropout) for dropout in config.attention_dropout
            )
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

    def _encoder(self, dim: int, layers: int, attention_dropout: float) -> CrossmodalEncoder:
        config = self.config
        return CrossmodalEncoder(
            dim,
            config.heads,
            layers,
            config.embedding_dropout,
            attention_dropout,
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

    def prepare(self, batch: Batch) -> tuple[PerModality[Tensor], PerModality[Tensor]]:
        """Features (B, T_m, D_m) and masks (B, T_m), as the choices about padding want them.

        Where the number of steps matters all clips are filled up to the lengths of the config.
        """
        config, features, masks = self.config, batch.features, batch.masks
        if self.fixed_lengths:
            gaps = [n - x.shape[1] for n, x in zip(config.lengths, features, strict=True)]
            features = PerModality(
                *(
                    F.pad(x.masked_fill(~mask[:, :, None], 0.0), (0, 0, 0, gap))
                    for x, mask, gap in zip(features, masks, gaps, strict=True)
                )
            )
            masks = PerModality(*(F.pad(x, (0, n)) for x, n in zip(masks, gaps, strict=True)))
        if not config.mask_padding:
            masks = PerModality(*(torch.ones_like(mask) for mask in masks))
        return features._replace(language=self.language_dropout(features.language)), masks

    def sources(self, target: str) -> list[str]:
        """The modalities that `target` asks, in the order of their channels in the answer."""
        sources = [source for source in MODALITIES if source != target]
        return sources[::-1] if self.config.acoustic_first and target == "language" else sources

    def reinforce(
        self, private: PerModality[Tensor], masks: PerModality[Tensor]
    ) -> PerModality[Tensor]:
        """Private features -> Z_m (Eq. 10): each modality asks the two others, then itself."""
        reinforced = []
        for target in MODALITIES:
            x, mask = getattr(private, target), getattr(masks, target)
            enhanced = [
                self.crossmodal[f"{source}_to_{target}"](
                    x, getattr(private, source), getattr(masks, source), mask
                )
                for source in self.sources(target)
            ]
            reinforced.append(self.memory[target](torch.cat(enhanced, dim=2), source_mask=mask))
        return PerModality(*reinforced)

    def _pooled(self, sequences: Sequence[Tensor], masks: Sequence[Tensor]) -> Tensor:
        """Sequences (B, T_m, d) a modality -> vectors (3, B, d)."""
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
        inputs, masks = self.prepare(batch)
        shallow = PerModality(
            *(encode(x, mask) for encode, x, mask in zip(self.shallow, inputs, masks, strict=True))
        )
        lost = [n - m for n, m in zip(self.config.lengths, self.config.steps, strict=True)]
        masks = PerModality(*(shorten(mask, n) for mask, n in zip(masks, lost, strict=True)))
        common = private = shallow
        reconstructed = private_again = None
        if self.decoupling is not None:
            parts = self.decoupling(shallow)
            common, private = parts.common, parts.private
            reconstructed, private_again = parts.reconstructed, parts.private_again

        pooled_common = self._pooled(common, masks)  # (3, B, d)
        pooled_private = self._pooled(  # (3, B, 2d)
            self.reinforce(private, masks) if self.memory else private, masks
        )
        homo, hetero = self._graphs(common, pooled_common, pooled_private)
        margin_vectors = pooled_common
        if self.margin_projection:
            # channel by channel, as published, where the heads read step by step
            flat = [x.transpose(1, 2).flatten(1) for x in common]
            margin_vectors = torch.stack(apply_each(self.margin_projection, flat))
        fused_common = pooled_common
        if self.common_attention:
            attended = [
                encode(x, source_mask=mask)
                for encode, x, mask in zip(self.common_attention, common, masks, strict=True)
            ]
            fused_common = self._pooled(attended, masks)
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
            margin_vectors=margin_vectors,
            common_prediction=self.common_head(vectors[0])[0] if self.common_head else None,
            parts=vectors,
            fused=fused,
        )
