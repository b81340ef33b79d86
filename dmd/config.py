"""Every setting of the model, the objective and the training loop, as three dataclasses.

A configuration is plain data: it can be written to JSON and read back, and a key that does
not exist is an error that names the nearest key that does.
"""

import dataclasses
import difflib
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from types import NoneType
from typing import Any, Literal, Self, get_args, get_origin, get_type_hints


def nearest(name: str, known: Iterable[str], kind: str) -> str:
    """The sentence for an unknown name: what it was, the nearest known one, and all of them."""
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.4)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return f"unknown {kind} {name!r}: {hint}known are {', '.join(names)}"


def _convert(value: Any, kind: Any, key: str) -> Any:
    """Turn a value as JSON or a caller gives it into the type of its field, or refuse."""
    refusal = ValueError(f"{key}={value!r} is not of type {_name(kind)}")
    if dataclasses.is_dataclass(kind):
        if isinstance(value, kind):  # type: ignore[arg-type]
            return value
        return kind.from_dict(value)  # type: ignore[union-attr]
    if get_origin(kind) is Literal:
        if value in get_args(kind):
            return value
        raise ValueError(f"{key}: " + nearest(str(value), map(str, get_args(kind)), "value"))
    if get_origin(kind) is tuple:
        if not isinstance(value, list | tuple) or len(value) != len(get_args(kind)):
            raise refusal
        return tuple(_convert(v, k, key) for v, k in zip(value, get_args(kind), strict=True))
    if NoneType in get_args(kind):
        inner = next(k for k in get_args(kind) if k is not NoneType)
        return None if value is None else _convert(value, inner, key)
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is not kind:
        raise refusal
    if kind is float and not math.isfinite(value):
        raise ValueError(f"{key} must be finite, not {value}")
    return value


def _name(kind: Any) -> str:
    return kind.__name__ if isinstance(kind, type) and not get_args(kind) else str(kind)


class Config:
    """What the three configurations have in common: types, presets, and the way to JSON and back.

    Raises ValueError for a value whose type is not that of its field.
    """

    def __post_init__(self) -> None:
        for key, kind in get_type_hints(type(self)).items():
            object.__setattr__(self, key, _convert(getattr(self, key), kind, key))

    @classmethod
    def presets(cls) -> dict[str, dict[str, Any]]:
        """The named presets: for each, the fields in which it differs from the defaults."""
        return {"paper": {}}

    @classmethod
    def preset(cls, name: str, /, **overrides: Any) -> Self:
        """The configuration called `name`, with single fields replaced.

        Raises ValueError for an unknown preset or field, naming the nearest known one.
        """
        presets = cls.presets()
        if name not in presets:
            raise ValueError(nearest(name, presets, "preset"))
        return cls.from_dict({**presets[name], **overrides})

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Build the configuration from a mapping; fields that are left out keep their defaults."""
        if not isinstance(values, Mapping):
            raise ValueError(f"{cls.__name__}: expected its options by name, not {values!r}")
        known = get_type_hints(cls)
        for key in values:
            if key not in known:
                raise ValueError(nearest(key, known, f"{cls.__name__} option"))
        return cls(**values)

    @classmethod
    def from_json(cls, text: str) -> Self:
        """The inverse of `to_json`."""
        return cls.from_dict(json.loads(text))

    def to_dict(self) -> dict[str, Any]:
        """All fields as builtin values, nested configurations as nested dictionaries."""
        return dataclasses.asdict(self)  # type: ignore[call-overload]

    def to_json(self) -> str:
        """All fields as JSON text."""
        return json.dumps(self.to_dict(), indent=2)

    def replace(self, **changes: Any) -> Self:
        """A copy in which some fields have other values, checked as in `from_dict`."""
        return self.from_dict({**self.to_dict(), **changes})

    def _require(self, condition: bool, message: str) -> None:
        if not condition:
            raise ValueError(f"{type(self).__name__}: {message}")

    def _require_probability(self, *names: str) -> None:
        for name in names:
            value = getattr(self, name)
            for p in value if isinstance(value, tuple) else (value,):
                self._require(0 <= p < 1, f"{name} must lie in [0, 1), not {p}")


@dataclass(frozen=True)
class ModelConfig(Config):
    """The model: its sizes, its dropout rates, and one named option for every choice.

    Triples are in the order language, visual, acoustic. The defaults are the `paper` preset;
    where the paper gives no value they are the ones published with its code for CMU-MOSI.

    Sizes
        widths: input features of each modality, D_L, D_V, D_A.
        lengths: the most time steps that a clip may have, T_L, T_V, T_A.
        dim: width d of every feature after the shallow encoder.
        heads, layers: of each crossmodal and self-attention encoder.
        kernels: width in steps of the shallow convolutions.
    Dropout rates, in training only
        language_dropout: of the language features as they come in.
        embedding_dropout: of the sequences that enter an encoder, with their position code.
        attention_dropout: of attention weights, by the modality of the source; the encoders that
            attend to themselves use that of language.
        output_dropout: inside the residual network that fuses the parts.
    Choices
        causal_mask: let step t of an attention query see only steps up to t of its keys, or up to
            t plus the difference where the two sequences of a clip differ in length.
        pooling: how a sequence becomes a vector, the `mean` over valid steps or the `last` one.
        stop_teacher_gradient: a distillation edge moves its student only (Eq. 7). The distance
            |f_i - f_j| is symmetric, so without this the direction of an edge means nothing.
        edge_temperature: the logits of the edges are divided by it before the softmax.
    Ablations (Table 3): each switch removes the part and its parameters
        decoupling: without it the shallow features stand for both parts (Eqs. 1-6 vanish).
        homo_distillation, hetero_distillation: without it the unit keeps its regressor f, which
            predicts from each modality alone, and has no edges.
        crossmodal_attention: without it the private features are pooled as they are (no Eq. 10).
    """

    widths: tuple[int, int, int] = (300, 20, 5)
    lengths: tuple[int, int, int] = (50, 50, 50)
    dim: int = 50
    heads: int = 10
    layers: int = 4
    kernels: tuple[int, int, int] = (5, 5, 5)
    language_dropout: float = 0.5
    embedding_dropout: float = 0.2
    attention_dropout: tuple[float, float, float] = (0.3, 0.0, 0.2)
    output_dropout: float = 0.5
    causal_mask: bool = False
    pooling: Literal["mean", "last"] = "mean"
    stop_teacher_gradient: bool = True
    edge_temperature: float = 1.0
    decoupling: bool = True
    homo_distillation: bool = True
    crossmodal_attention: bool = True
    hetero_distillation: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("widths", "lengths", "kernels"):
            value = getattr(self, name)
            self._require(
                min(value) > 0,
                f"{name} must be three positive integers (language, visual, acoustic), not {value}",
            )
        for name in ("dim", "heads", "layers"):
            self._require(getattr(self, name) > 0, f"{name} must be positive")
        self._require(
            self.dim % self.heads == 0,
            f"dim={self.dim} must be a multiple of heads={self.heads}",
        )
        self._require(self.edge_temperature > 0, "edge_temperature must be positive")
        self._require_probability(
            "language_dropout", "embedding_dropout", "attention_dropout", "output_dropout"
        )

    @classmethod
    def presets(cls) -> dict[str, dict[str, Any]]:
        """`paper`, and `tiny`: the same model small enough to train while one reads a page."""
        tiny = {
            "widths": (32, 12, 8), "lengths": (12, 12, 12), "dim": 16, "heads": 2, "layers": 1,
            "kernels": (3, 3, 3), "language_dropout": 0.1, "embedding_dropout": 0.0,
            "attention_dropout": (0.0, 0.0, 0.0), "output_dropout": 0.1,
        }  # fmt: skip
        return {"paper": {}, "tiny": tiny}


@dataclass(frozen=True)
class LossConfig(Config):
    """The weights of the objective (Eqs. 6 and 11) and the choices inside its terms.

    lambda1, lambda2, gamma: as in the paper (Sec. 4, chosen there on validation data).
    alpha: the margin of Eq. 4; the paper does not print it, the published code uses 0.15.
    unimodal: weight of the task loss of each of the six unimodal heads. The paper names one
        task loss, but f of Eq. 8 has to be trained by something.
    orthogonality: `signed` is Eq. 5 as printed (lowest at cosine -1), `hinge` and `squared`
        are lowest at orthogonal features.
    """

    lambda1: float = 0.1
    lambda2: float = 0.05
    gamma: float = 0.1
    alpha: float = 0.15
    unimodal: float = 1.0
    orthogonality: Literal["signed", "hinge", "squared"] = "signed"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("lambda1", "lambda2", "gamma", "alpha", "unimodal"):
            self._require(getattr(self, name) >= 0, f"{name} must not be negative")


@dataclass(frozen=True)
class TrainConfig(Config):
    """The training loop.

    epochs, batch_size: 30 and 16 in the paper (Sec. 4).
    learning_rate, weight_decay: of Adam; the published code uses 1e-4 and no decay.
    accumulate: batches whose gradients are averaged before a step.
    clip, clip_at: bound each gradient `value`, the `norm` of all, or nothing.
    scheduler: `plateau` halves the rate when more than 5 epochs bring no better validation score,
        `cosine` lets it fall to zero over the epochs.
    patience: stop after that many epochs without a better validation score (None: never).
    select: the validation score that picks the epoch to keep; `mae` is lowest, others highest.
    device: `auto` takes cuda, else mps, else cpu.
    seed: of everything random in a run.
    precision: `bf16` and `fp16` run the forward pass in mixed precision.
    loss: the weights of the objective.
    """

    epochs: int = 30
    batch_size: int = 16
    learning_rate: float = 1e-4
    weight_decay: float = 0.0
    accumulate: int = 1
    clip: Literal["none", "value", "norm"] = "norm"
    clip_at: float = 1.0
    scheduler: Literal["none", "plateau", "cosine"] = "plateau"
    patience: int | None = 10
    select: Literal["mae", "corr", "acc2_has0", "acc2_non0", "acc7"] = "mae"
    seed: int = 0
    device: str = "auto"
    precision: Literal["float32", "bf16", "fp16"] = "float32"
    loss: LossConfig = field(default_factory=LossConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("epochs", "batch_size", "accumulate", "learning_rate", "clip_at"):
            self._require(getattr(self, name) > 0, f"{name} must be positive")
        self._require(self.weight_decay >= 0, "weight_decay must not be negative")
        self._require(0 <= self.seed < 2**32, f"seed must lie in [0, 2**32), not {self.seed}")
        self._require(self.patience is None or self.patience > 0, "patience must be positive")
