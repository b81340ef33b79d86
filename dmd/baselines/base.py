"""What all other methods have in common: how they are built, called and stored."""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple, get_type_hints

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dmd.batch import MODALITIES, Batch, padding_mask
from dmd.options import convert, nearest

Triple = tuple[int, int, int]


class BaselineOutput(NamedTuple):
    """What a method computes for B clips.

    prediction: (B,) sentiment scores. extra_losses: scalars by name, with their weights in them;
    training adds them to the task loss.
    """

    prediction: Tensor
    extra_losses: dict[str, Tensor]


@dataclass(frozen=True)
class MethodConfig:
    """What a checkpoint needs to build a method again: its name, sizes, and all its options."""

    method: str
    widths: Triple
    lengths: Triple
    options: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """All fields as builtin values."""
        return {
            "method": self.method,
            "widths": list(self.widths),
            "lengths": list(self.lengths),
            "options": dict(self.options),
        }


class Baseline(nn.Module):
    """A method to compare DMD with: `model(batch)` gives a `BaselineOutput`.

    widths: features of language, visual, acoustic; lengths: the most steps of each. The options of
    a method are the further arguments of its `__init__`.
    """

    aligned_only: ClassVar[bool] = False  # needs one step a word in all modalities
    config: MethodConfig

    def __init__(self, widths: Triple, lengths: Triple) -> None:
        super().__init__()
        self.widths, self.lengths = widths, lengths
        if self.aligned_only and len(set(lengths)) > 1:
            raise ValueError(
                f"{type(self).__name__} joins the modalities step by step and needs aligned clips: "
                f"the lengths are {lengths}, not three equal ones"
            )

    def check(self, batch: Batch) -> None:
        """Refuse a batch that the method was not built for, with a ValueError that says why."""
        for name, x, width, steps in zip(
            MODALITIES, batch.features, self.widths, self.lengths, strict=True
        ):
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
        if self.aligned_only and len({x.shape[1] for x in batch.features}) > 1:
            raise ValueError(
                f"{type(self).__name__} needs aligned clips, with as many steps in all modalities"
            )

    def forward(self, batch: Batch) -> BaselineOutput:
        """A batch of B clips -> predictions (B,) and further losses."""
        raise NotImplementedError

    @classmethod
    def options(cls) -> dict[str, Any]:
        """The options of the method with their defaults."""
        signature = inspect.signature(cls.__init__)
        return {
            name: parameter.default
            for name, parameter in signature.parameters.items()
            if name not in ("self", "widths", "lengths")
        }

    @classmethod
    def build(cls, method: str, widths: Triple, lengths: Triple, given: Mapping[str, Any]) -> Any:
        """The method with the given options, checked for names and types, and its `config`."""
        known, kinds = cls.options(), get_type_hints(cls.__init__)
        for name in given:
            if name not in known:
                raise ValueError(nearest(name, known, f"option of {method}"))
        values = {name: convert(value, kinds[name], name) for name, value in given.items()}
        sizes = {
            name: convert(value, Triple, name)
            for name, value in (("widths", widths), ("lengths", lengths))
        }
        model = cls(**sizes, **values)
        model.config = MethodConfig(method, options={**known, **values}, **sizes)
        return model


def masks(batch: Batch) -> list[Tensor]:
    """Which steps are valid, (B, T_m) for each modality."""
    return [
        padding_mask(batch.lengths[:, m], x.shape[1])
        if batch.lengths is not None
        else torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
        for m, x in enumerate(batch.features)
    ]


def mean_over_time(x: Tensor, mask: Tensor) -> Tensor:
    """Mean over the valid steps: (B, T, d), (B, T) -> (B, d)."""
    total = x.masked_fill(~mask[:, :, None], 0.0).sum(dim=1)
    return total / mask.sum(dim=1, keepdim=True)


class LSTM(nn.Module):
    """An LSTM that stops at the last valid step of each clip."""

    def __init__(self, width: int, hidden: int, bidirectional: bool = False) -> None:
        super().__init__()
        self.cells = nn.LSTM(width, hidden, batch_first=True, bidirectional=bidirectional)

    def forward(self, x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """(B, T, width), mask (B, T) -> states (B, T, h), zero where padded, and the last (B, h).

        h is `hidden`, or twice that where the LSTM reads both ways.
        """
        lengths = mask.sum(dim=1).cpu()
        packed = nn.utils.rnn.pack_padded_sequence(
            x, lengths, batch_first=True, enforce_sorted=False
        )
        states, (last, _) = self.cells(packed)
        states, _ = nn.utils.rnn.pad_packed_sequence(
            states, batch_first=True, total_length=x.shape[1]
        )
        return states, last.transpose(0, 1).flatten(1)


def mlp(width: int, hidden: int, outputs: int, dropout: float = 0.0) -> nn.Sequential:
    """Linear, ReLU, dropout, linear."""
    return nn.Sequential(
        nn.Linear(width, hidden), nn.ReLU(), nn.Dropout(dropout), nn.Linear(hidden, outputs)
    )


class BatchNorm(nn.BatchNorm1d):
    """Batch normalisation that takes its running statistics for a single row, which has no spread.

    The last batch of an epoch may hold one clip.
    """

    def forward(self, x: Tensor) -> Tensor:
        """(B, width) -> the same shape."""
        if len(x) > 1 or not self.training:
            return super().forward(x)
        kept = self.running_mean, self.running_var, self.weight, self.bias
        return F.batch_norm(x, *kept, training=False, eps=self.eps)


class UnimodalEmbeddings(nn.Module):
    """One vector a modality, each from that modality alone, as TFN and LMF begin.

    Language: the last state of an LSTM of `hidden` channels, then a linear map. Visual, acoustic:
    the mean over time, normalised over the batch, then three layers with ReLU.
    """

    def __init__(self, widths: Triple, sizes: Triple, hidden: int, dropout: float) -> None:
        super().__init__()
        self.lstm = LSTM(widths[0], hidden)
        self.language = nn.Sequential(nn.Dropout(dropout), nn.Linear(hidden, sizes[0]))
        self.visual, self.acoustic = (
            nn.Sequential(
                BatchNorm(width),
                nn.Dropout(dropout),
                *(nn.Linear(width, size), nn.ReLU()),
                *(nn.Linear(size, size), nn.ReLU()),
                *(nn.Linear(size, size), nn.ReLU()),
            )
            for width, size in zip(widths[1:], sizes[1:], strict=True)
        )

    def forward(self, batch: Batch) -> list[Tensor]:
        """A batch of B clips -> (B, sizes[m]) for language, visual, acoustic."""
        words, *others = masks(batch)
        _, last = self.lstm(batch.language, words)
        visual, acoustic = map(mean_over_time, batch.features[1:], others)
        return [self.language(last), self.visual(visual), self.acoustic(acoustic)]


def with_one(x: Tensor) -> Tensor:
    """(B, d) -> (B, 1 + d), a constant 1 before the vector: products keep what lacks a factor."""
    return F.pad(x, (1, 0), value=1.0)
