"""A dataset held in memory, and the three splits of it."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Self

import torch
from torch import Tensor

from dmd.batch import MODALITIES, Batch, PerModality

LABEL_RANGE = 3.0  # sentiment scores lie in [-3, 3] (paper, Sec. 4)


@dataclass
class Dataset:
    """N labelled clips as one padded batch, with the names of their features.

    name: what messages call it, for example `test`.
    clips: features, lengths, labels and ids of all clips, on the CPU.
    feature_names: for each modality, one name a feature.
    transcripts: the words of each clip, where known.
    truth: synthetic data only; the known factors behind the clips, each a tensor (N, ...).
    Raises ValueError where the data can't be trained on: no clips, no labels, labels that are
    not finite or outside [-3, 3], features that are not finite at a valid step.
    """

    name: str
    clips: Batch
    feature_names: PerModality[Sequence[str]]
    transcripts: Sequence[str] | None = None
    truth: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if len(self) == 0:
            raise ValueError(f"the {self.name} split is empty")
        label = self.clips.label
        if label is None:
            raise ValueError(f"the {self.name} split has no labels")
        self._refuse(~torch.isfinite(label), label, "is not a finite number")
        self._refuse(
            label.abs() > LABEL_RANGE, label, f"lies outside [-{LABEL_RANGE:g}, {LABEL_RANGE:g}]"
        )
        for m, x, mask in zip(MODALITIES, self.clips.features, self.clips.masks, strict=True):
            broken = ~torch.isfinite(x).all(dim=2) & mask
            if broken.any():
                raise ValueError(
                    f"the {self.name} split has NaN or inf in the {m} features of "
                    f"{int(broken.any(dim=1).sum())} clips: dmd.data.sanitise replaces them"
                )

    def _refuse(self, wrong: Tensor, label: Tensor, what: str) -> None:
        if wrong.any():
            clip = int(wrong.nonzero()[0])
            name = self.clips.ids[clip] if self.clips.ids is not None else clip
            raise ValueError(
                f"the label of clip {name} of the {self.name} split, {float(label[clip]):g}, {what}"
            )

    def __len__(self) -> int:
        return len(self.clips)

    def __getitem__(self, index: slice | Tensor | Sequence[int]) -> Batch:
        """The clips at `index`, as a batch."""
        return self.clips[index]

    def to(self, device: torch.device) -> Self:
        """The same clips on a device; there without names, since one would wait for it."""
        if device.type == "cpu":
            return self
        return replace(self, clips=replace(self.clips, ids=None).to(device))

    @property
    def label(self) -> Tensor:
        """The sentiment scores (N,)."""
        assert self.clips.label is not None  # checked in __post_init__
        return self.clips.label

    @property
    def widths(self) -> tuple[int, int, int]:
        """Features of each modality, D_L, D_V, D_A."""
        language, visual, acoustic = (x.shape[2] for x in self.clips.features)
        return language, visual, acoustic

    @property
    def lengths(self) -> tuple[int, int, int]:
        """Padded time steps of each modality, T_L, T_V, T_A."""
        language, visual, acoustic = (x.shape[1] for x in self.clips.features)
        return language, visual, acoustic

    def batches(self, batch_size: int, order: Tensor | None = None) -> Iterator[Batch]:
        """All clips in batches, in the given order of their indices or else as they are stored."""
        order = torch.arange(len(self)) if order is None else order
        for index in order.split(batch_size):
            yield self.clips[index]


@dataclass
class Splits:
    """The train, validation and test part of one dataset.

    name, options: what `dmd.data.load` was called with.
    Raises ValueError where the widths of the three differ.
    """

    train: Dataset
    valid: Dataset
    test: Dataset
    name: str = "custom"
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for split in self:
            if split.widths != self.train.widths:
                raise ValueError(
                    f"the {split.name} split has widths {split.widths} (language, visual, "
                    f"acoustic), but the {self.train.name} split has {self.train.widths}"
                )

    def __iter__(self) -> Iterator[Dataset]:
        return iter((self.train, self.valid, self.test))

    @property
    def widths(self) -> tuple[int, int, int]:
        """Features of each modality, D_L, D_V, D_A."""
        return self.train.widths

    @property
    def lengths(self) -> tuple[int, int, int]:
        """The most padded steps of each modality over the three splits."""
        language, visual, acoustic = (
            max(steps) for steps in zip(*(s.lengths for s in self), strict=True)
        )
        return language, visual, acoustic

    def fingerprint(self) -> str:
        """SHA-256 over every feature, length and label, to tell whether two datasets are one."""
        digest = hashlib.sha256()
        for split in self:
            assert split.clips.lengths is not None  # set by Batch
            for x in (*split.clips.features, split.clips.lengths, split.label):
                digest.update(str((tuple(x.shape), x.dtype)).encode())
                digest.update(x.contiguous().numpy().tobytes())
        return digest.hexdigest()
