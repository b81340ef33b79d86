"""DMD, assembled: decoupling, two distillation graphs, crossmodal attention, fusion (Fig. 2)."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dmd.attention import CrossmodalEncoder
from dmd.batch import MODALITIES, Batch, PerModality
from dmd.config import ModelConfig
from dmd.decoupling import Decoupling, ShallowEncoder
from dmd.fusion import AdaptiveFusion
from dmd.graph import GDUnit, GraphOutput


@dataclass
class Output:
    """Everything that one forward pass computes for B clips.

    prediction: (B,) sentiment scores.
    homo, hetero: the two distillation graphs; their features are the pooled common vectors
        (3, B, d) and the reinforced private vectors (3, B, 2d; without crossmodal attention d).
    shallow, common, private, reconstructed, private_again: a tensor (B, T_m, d) a modality, the
        quantities of Eqs. 1-3 (the last two None without decoupling).
    masks: (B, T_m) a modality, true at the valid steps.
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
    fused: Tensor


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Mean over the valid steps: (B, T, d), mask (B, T) -> (B, d)."""
    total = x.masked_fill(~mask[:, :, None], 0.0).sum(dim=1)
    return total / mask.sum(dim=1, keepdim=True)


def last_valid(x: Tensor, mask: Tensor) -> Tensor:
    """The last valid step: (B, T, d), mask (B, T) -> (B, d)."""
    last = mask.sum(dim=1) - 1
    return x[torch.arange(len(x), device=x.device), last]


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
            ShallowEncoder(width, dim, kernel)
            for width, kernel in zip(config.widths, config.kernels, strict=True)
        )
        self.decoupling = Decoupling(dim) if config.decoupling else None
        self.crossmodal, self.memory = nn.ModuleDict(), nn.ModuleDict()
        if config.crossmodal_attention:
            for target in MODALITIES:
                for source, dropout in zip(MODALITIES, config.attention_dropout, strict=True):
                    if source != target:
                        self.crossmodal[f"{source}_to_{target}"] = self._encoder(dim, dropout)
                self.memory[target] = self._encoder(2 * dim, config.attention_dropout[0])
        private_dim = 2 * dim if config.crossmodal_attention else dim
        self.homo = self._unit(dim, config.homo_distillation)
        self.hetero = self._unit(private_dim, config.hetero_distillation)
        self.fusion = AdaptiveFusion([3 * dim, *[private_dim] * 3], config.output_dropout)
        self.pool = {"mean": masked_mean, "last": last_valid}[config.pooling]

    def _encoder(self, dim: int, attention_dropout: float) -> CrossmodalEncoder:
        config = self.config
        return CrossmodalEncoder(
            dim,
            config.heads,
            config.layers,
            config.embedding_dropout,
            attention_dropout,
            config.causal_mask,
        )

    def _unit(self, dim: int, distil: bool) -> GDUnit:
        config = self.config
        return GDUnit(
            dim, len(MODALITIES), config.stop_teacher_gradient, config.edge_temperature, distil
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
                for source in MODALITIES
                if source != target
            ]
            reinforced.append(self.memory[target](torch.cat(enhanced, dim=2), source_mask=mask))
        return PerModality(*reinforced)

    def forward(self, batch: Batch) -> Output:
        """A batch of B clips -> everything in `Output`."""
        self.check(batch)
        masks = batch.masks
        inputs = batch.features._replace(language=self.language_dropout(batch.language))
        shallow = PerModality(
            *(encode(x, mask) for encode, x, mask in zip(self.shallow, inputs, masks, strict=True))
        )
        common = private = shallow
        reconstructed = private_again = None
        if self.decoupling is not None:
            parts = self.decoupling(shallow)
            common, private = parts.common, parts.private
            reconstructed, private_again = parts.reconstructed, parts.private_again
        sequences = self.reinforce(private, masks) if self.memory else private
        homo = self.homo(torch.stack([self.pool(*x) for x in zip(common, masks, strict=True)]))
        hetero = self.hetero(
            torch.stack([self.pool(*x) for x in zip(sequences, masks, strict=True)])
        )
        prediction, fused = self.fusion([torch.cat([*homo.features], dim=1), *hetero.features])
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
            fused=fused,
        )
