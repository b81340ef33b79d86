"""What all configurations have in common: typed options, presets, and the way to JSON and back.

A configuration is plain data: it can be written to JSON and read back, and a key that does
not exist is an error that names the nearest key that does.
"""

import dataclasses
import difflib
import json
import math
from collections.abc import Iterable, Mapping
from types import NoneType
from typing import Any, Literal, Self, get_args, get_origin, get_type_hints


def nearest(name: str, known: Iterable[str], kind: str) -> str:
    """The sentence for an unknown name: what it was, the nearest known one, and all of them."""
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.4)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return f"unknown {kind} {name!r}: {hint}known are {', '.join(names)}"


def convert(value: Any, kind: Any, key: str) -> Any:
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
        return tuple(convert(v, k, key) for v, k in zip(value, get_args(kind), strict=True))
    if NoneType in get_args(kind):
        inner = next(k for k in get_args(kind) if k is not NoneType)
        return None if value is None else convert(value, inner, key)
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
    """Base of the three configurations in `dmd.config`.

    Raises ValueError for a value whose type is not that of its field.
    """

    def __post_init__(self) -> None:
        for key, kind in get_type_hints(type(self)).items():
            object.__setattr__(self, key, convert(getattr(self, key), kind, key))

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
