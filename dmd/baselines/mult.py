"""Multimodal Transformer: each modality is reinforced by the two others, whatever their rates."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from dmd.attention import CrossmodalEncoder, side_by_side
from dmd.baselines.base import Baseline, BaselineOutput, Triple, masks
from dmd.batch import MODALITIES, Batch
from dmd.decoupling import ShallowEncoder
from dmd.fusion import ResidualRegressor
from dmd.model import PAIRS, last_valid

SOURCES, TARGETS = zip(*PAIRS, strict=True)


class MulT(Baseline):
    """Multimodal Transformer (Tsai et al., ACL 2019), for aligned and unaligned clips.

    A temporal convolution brings each modality to one width; six encoders let each modality, the
    target, attend to each other one, the source; the two answers to a target, side by side, attend
    to themselves; a residual network reads the three ends.
    dim: width of a modality; its state is twice as wide. heads: of the attention. layers: of the
    six crossmodal encoders; the three on top have as many, but at least 3. kernels: steps under
    each convolution (L, V, A). causal: let a step attend to earlier ones only.
    embedding_dropout: on the embedded sequences. attention_dropout: on the attention weights.
    output_dropout: in the residual network.
    Faithful: the convolutions without bias, sinusoidal positions on targets and sources, the same
    normalised source in every layer, normalisation before attention and network, self-attention
    over the joined answers, the last step, the residual network. The width is that of the public
    code, the depth and the lack of a causal mask those of the paper.
    Adapted: padding is masked, and a clip's last step is its last valid one; there is no dropout
    inside the encoders but on the attention weights, with one rate for all modalities.
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
    ) -> None:
        super().__init__(widths, lengths)
        if dim % heads:
            raise ValueError(f"heads={heads} must divide dim={dim}")

        def encoders(count: int, width: int, depth: int) -> CrossmodalEncoder:
            rates = [attention_dropout] * count
            return CrossmodalEncoder(width, heads, depth, embedding_dropout, rates, causal)

        self.shallow = nn.ModuleList(
            ShallowEncoder(width, dim, kernel)
            for width, kernel in zip(widths, kernels, strict=True)
        )
        self.crossmodal = encoders(len(PAIRS), dim, layers)
        self.memory = encoders(len(MODALITIES), 2 * dim, max(layers, 3))
        width = 2 * dim * len(MODALITIES)
        self.head = ResidualRegressor(width, width, output_dropout)

    def answers(
        self, features: Sequence[Tensor], valid: Sequence[Tensor]
    ) -> dict[tuple[int, int], Tensor]:
        """Features (B, T_m, D_m), masks (B, T_m) -> each (source, target) to (B, T_target, d)."""
        parts = zip(self.shallow, features, valid, strict=True)
        shallow = [encode(x, mask) for encode, x, mask in parts]
        found = side_by_side(self.crossmodal, shallow, TARGETS, SOURCES, valid)
        return dict(zip(PAIRS, found, strict=True))

    def reinforce(self, answers: dict[tuple[int, int], Tensor], valid: Sequence[Tensor]) -> Tensor:
        """The answers to each (source, target), masks (B, T_m) -> last steps (3, B, 2d)."""
        joined = [  # (B, T_m, 2d) a target
            torch.cat([answers[pair] for pair in PAIRS if pair[1] == target], dim=2)
            for target in range(len(MODALITIES))
        ]
        reinforced = side_by_side(self.memory, joined, range(len(MODALITIES)), None, valid)
        return torch.stack([last_valid(x, mask) for x, mask in zip(reinforced, valid, strict=True)])

    def states(self, batch: Batch) -> Tensor:
        """A batch of B clips -> the reinforced modalities at their last steps, (3, B, 2d)."""
        self.check(batch)
        valid = masks(batch)
        return self.reinforce(self.answers(batch.features, valid), valid)

    def predict(self, states: Tensor) -> Tensor:
        """States (3, B, 2d) -> predictions (B,)."""
        prediction: Tensor = self.head(torch.cat([*states], dim=1))[0]
        return prediction

    def forward(self, batch: Batch) -> BaselineOutput:
        """A batch of B clips -> predictions (B,)."""
        return BaselineOutput(self.predict(self.states(batch)), {})
