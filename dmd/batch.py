"""A batch of clips: three sequences of features each, their lengths, and what is known of them.

The order of the modalities is language, visual, acoustic (L, V, A), everywhere.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, NamedTuple, Self, TypeVar

import torch
from torch import Tensor

MODALITIES = ("language", "visual", "acoustic")

T = TypeVar("T")


class PerModality(NamedTuple, Generic[T]):
    """Three things, one a modality: by name (`x.visual`), by index (`x[1]`), or unpacked."""

    language: T
    visual: T
    acoustic: T


def padding_mask(lengths: Tensor, steps: int) -> Tensor:
    """Lengths (B,) -> mask (B, steps), true at the valid steps: the first `length` of each row."""
    return torch.arange(steps, device=lengths.device) < lengths[:, None]


@dataclass
class Batch:
    """B clips, padded on the right.

    language, visual, acoustic: features (B, T_m, D_m).
    lengths: (B, 3) integers, the valid steps of each modality, at least 1; None: all T_m.
    label: (B,) sentiment scores, or None where they are not known.
    ids: B names, or None.
    padded: whether some clip has fewer valid steps than T_m; None: look, where `lengths` lie on
        the processor, and else assume so.
    Raises ValueError where the parts do not fit together.
    """

    language: Tensor
    visual: Tensor
    acoustic: Tensor
    lengths: Tensor | None = None
    label: Tensor | None = None
    ids: Sequence[str] | None = None
    padded: bool | None = None

    def __post_init__(self) -> None:
        for name, x in zip(MODALITIES, self.features, strict=True):
            if x.dim() != 3:
                raise ValueError(
                    f"{name}: expected shape (clips, steps, width), got {tuple(x.shape)}"
                )
            if len(x) != len(self):
                raise ValueError(f"{name} has {len(x)} clips, but language has {len(self)}")
            if x.shape[1] == 0:
                raise ValueError(f"{name} has no time steps")
        if self.lengths is None:
            self.padded = False
            full = torch.tensor([[x.shape[1] for x in self.features]])
            self.lengths = full.to(self.language.device).expand(len(self), 3)
        not_integers = self.lengths.is_floating_point() or self.lengths.dtype == torch.bool
        if self.lengths.shape != (len(self), 3) or not_integers:
            raise ValueError(
                f"lengths: expected integers of shape ({len(self)}, 3), "
                f"got {self.lengths.dtype} {tuple(self.lengths.shape)}"
            )
        if self.label is not None and self.label.shape != (len(self),):
            raise ValueError(f"label: expected shape ({len(self)},), got {tuple(self.label.shape)}")
        if self.ids is not None and len(self.ids) != len(self):
            raise ValueError(f"ids: expected {len(self)} names, got {len(self.ids)}")
        if self.padded is None:  # elsewhere than on the processor an answer would take a wait
            full = torch.tensor([x.shape[1] for x in self.features])
            self.padded = not self.lengths.is_cpu or bool((self.lengths != full).any())
        if self.lengths.is_cpu:  # elsewhere the comparison would wait for the device
            for m, name in enumerate(MODALITIES):
                steps = self.features[m].shape[1]
                wrong = (self.lengths[:, m] < 1) | (self.lengths[:, m] > steps)
                if wrong.any():
                    clip = int(wrong.nonzero()[0])
                    raise ValueError(
                        f"lengths: clip {clip} says {int(self.lengths[clip, m])} {name} steps, "
                        f"but it must have between 1 and {steps}"
                    )

    def __len__(self) -> int:
        return len(self.language)

    @property
    def features(self) -> PerModality[Tensor]:
        """The three feature tensors, in the order L, V, A."""
        return PerModality(self.language, self.visual, self.acoustic)

    @property
    def masks(self) -> PerModality[Tensor]:
        """For each modality a mask (B, T_m), true at the valid steps."""
        assert self.lengths is not None  # set in __post_init__
        return PerModality(
            *(padding_mask(self.lengths[:, m], x.shape[1]) for m, x in enumerate(self.features))
        )

    def __getitem__(self, index: slice | Tensor | Sequence[int]) -> Self:
        """The clips at `index`, as a batch: a slice, indices, or a mask (B,)."""
        assert self.lengths is not None  # set in __post_init__
        if not isinstance(index, slice | Tensor):
            index = torch.as_tensor(index, dtype=None if len(index) else torch.long)
        ids = None
        if self.ids is not None:
            positions = torch.arange(len(self), device=self.language.device)
            ids = [self.ids[i] for i in positions[index].tolist()]
        return type(self)(
            language=self.language[index],
            visual=self.visual[index],
            acoustic=self.acoustic[index],
            lengths=self.lengths[index],
            label=None if self.label is None else self.label[index],
            ids=ids,
            padded=None if self.padded else False,
        )

    def to(self, device: torch.device | str) -> Self:
        """The same clips on another device."""
        assert self.lengths is not None  # set in __post_init__
        return type(self)(
            language=self.language.to(device),
            visual=self.visual.to(device),
            acoustic=self.acoustic.to(device),
            lengths=self.lengths.to(device),
            label=None if self.label is None else self.label.to(device),
            ids=self.ids,
            padded=self.padded,
        )
