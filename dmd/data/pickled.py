"""What the loaders of pickled datasets share: reading their fields, checking, putting together.

The files map `train`, `valid` and `test` to a mapping from a key to the values of all clips.
"""

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dmd.batch import MODALITIES, Batch, PerModality
from dmd.data import safe_pickle
from dmd.data.dataset import Dataset, Splits
from dmd.data.sanitise import sanitise
from dmd.options import nearest

SPLITS = ("train", "valid", "test")
Sequences = tuple[np.ndarray, np.ndarray]  # features (N, T, D) and lengths (N,)


@dataclass
class Fields:
    """One split of a file: gives its fields in the right type, or says which one is wrong."""

    path: Path
    split: str
    values: Mapping[Any, Any]
    replaced: list[str] = field(default_factory=list)  # what `features` had to sanitise

    def wrong(self, key: str, what: str) -> ValueError:
        """The error for a field: file, split, key and what is wrong with it."""
        return ValueError(f"{self.path}: {key!r} of the {self.split} split {what}")

    def __contains__(self, key: str) -> bool:
        return key in self.values

    def __getitem__(self, key: str) -> Any:
        if key not in self.values:
            raise ValueError(
                f"{self.path}: the {self.split} split has no {key!r}: {_found(key, self.values)}"
            )
        return self.values[key]

    def numbers(self, key: str) -> np.ndarray:
        """A field of numbers, from an array or from lists of numbers or arrays."""
        x = self[key]
        if isinstance(x, list | tuple) or (isinstance(x, np.ndarray) and x.dtype.hasobject):
            try:
                # Float before stacking: a list with one long text must not become a huge array.
                x = np.array([_numeric(row) for row in x])
            except (ValueError, TypeError, OverflowError):
                raise self.wrong(
                    key, "must hold numbers, in the same shape for all clips"
                ) from None
        if not isinstance(x, np.ndarray) or x.dtype.kind not in "biuf":
            what = f"an array of {x.dtype}" if isinstance(x, np.ndarray) else type(x).__name__
            raise self.wrong(key, f"must hold numbers, not {what}")
        return x

    def one_each(self, key: str) -> np.ndarray:
        """One number a clip (N,), from (N,) or (N, 1) or (N, 1, 1)."""
        x = self.numbers(key)
        if x.ndim == 0 or x.size != len(x):
            raise self.wrong(key, f"must be one number a clip, but has shape {x.shape}")
        return x.reshape(-1)

    def labels(self, key: str) -> np.ndarray:
        """Sentiment scores (N,), N at least 1; their range is left to `Dataset`."""
        x = self.one_each(key)
        if len(x) == 0:
            raise ValueError(f"{self.path}: the {self.split} split is empty")
        with np.errstate(over="ignore"):
            return x.astype(np.float32)

    def features(self, key: str, clips: int) -> tuple[np.ndarray, np.ndarray]:
        """Features (N, T, D), sanitised, and where a step (N, T) is not all zeros in the file."""
        x = self.numbers(key)
        if x.ndim != 3 or 0 in x.shape[1:]:
            raise self.wrong(key, f"must have shape (clips, steps, width), not {x.shape}")
        self.check_count(key, len(x), clips)
        present = (x != 0).any(axis=2)
        x, report = sanitise(x)
        if report.replaced:
            self.replaced.append(f"{key} of the {self.split} split: {report}")
        return x, present

    def lengths(self, key: str, clips: int, steps: int) -> np.ndarray:
        """Lengths (N,) as the file states them, each between 0 and `steps`."""
        x = self.one_each(key)
        self.check_count(key, len(x), clips)
        bad = ~((x >= 0) & (x <= steps) & (x == np.floor(x)))
        if bad.any():
            raise self.wrong(
                key,
                f"says {x[bad][0]:g} for clip {bad.argmax()}, but lengths are whole numbers "
                f"between 0 and {steps}, the steps of its features",
            )
        return x.astype(np.int64)

    def texts(self, key: str, clips: int, join: str = "") -> list[str]:
        """One text a clip; where it is several parts (MulT's ids), they are joined by `join`."""
        x = self[key]
        x = x.tolist() if isinstance(x, np.ndarray) else x
        if not isinstance(x, list | tuple):
            raise self.wrong(key, f"must be a list or an array, not {type(x).__name__}")
        self.check_count(key, len(x), clips)
        return [self._text(key, text, join) for text in x]

    def _text(self, key: str, x: Any, join: str) -> str:
        if isinstance(x, np.ndarray | np.generic):
            x = x.tolist()
        if isinstance(x, bytes):
            return x.decode("utf-8", errors="replace")
        if isinstance(x, list | tuple) and join:
            return join.join(self._text(key, part, "") for part in x)
        if isinstance(x, str | int | float):
            return str(x)
        raise self.wrong(key, f"must hold text, not {type(x).__name__}")

    def check_count(self, key: str, count: int, clips: int) -> None:
        """Refuse a field that has not one entry a clip."""
        if count != clips:
            raise self.wrong(key, f"has {count} entries, but there are {clips} labels")


def _numeric(row: Any) -> np.ndarray:
    numeric = isinstance(row, np.ndarray) and row.dtype.kind in "biuf"
    return row if numeric else np.asarray(row, np.float64)


def _found(key: str, values: Mapping[Any, Any]) -> str:
    names = [k[:40].encode("unicode_escape").decode() for k in values if isinstance(k, str)][:20]
    return nearest(key, names, "key").split(": ", 1)[1] if names else "it has no keys that are text"


def trailing_length(present: np.ndarray) -> np.ndarray:
    """Steps (N,) up to the last one that is present (N, T); 0 where none is."""
    return np.where(present.any(axis=1), present.shape[1] - present[:, ::-1].argmax(axis=1), 0)


def at_least_one(x: np.ndarray, lengths: np.ndarray) -> Sequences:
    """A clip without steps becomes a clip of one step of zeros, because a batch has no others."""
    none = lengths == 0
    if x[none, 0].any():
        x = x.copy()
        x[none, 0] = 0
    return x, np.maximum(lengths, 1)


def read_splits(
    path: Path,
    read: Callable[[Fields], Dataset],
    name: str,
    options: dict[str, Any],
) -> Splits:
    """Read the file and let `read` make a dataset of each split.

    Raises as `safe_pickle.load` and `Dataset` do, naming the file. Warns, in one sentence, of
    values that were replaced.
    """
    content = safe_pickle.load(path)
    if not isinstance(content, dict):
        raise ValueError(
            f"{path} holds a {type(content).__name__}, not a mapping of the splits {SPLITS}"
        )
    datasets, replaced = {}, []
    for split in SPLITS:
        if split not in content:
            raise ValueError(f"{path} has no split {split!r}: {_found(split, content)}")
        if not isinstance(content[split], dict):
            raise ValueError(
                f"{path}: the {split} split is a {type(content[split]).__name__}, not a mapping"
            )
        fields = Fields(path, split, content.pop(split))
        datasets[split] = read(fields)
        replaced += fields.replaced
    if replaced:
        warnings.warn(f"{path}: {'; '.join(replaced)}", stacklevel=3)
    try:
        return Splits(**datasets, name=name, options=options)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def make_dataset(
    fields: Fields,
    sequences: PerModality[Sequences],
    labels: np.ndarray,
    ids: list[str] | None,
    transcripts: list[str] | None = None,
) -> Dataset:
    """The dataset of one split; features have numbers for names, because the files name none."""
    language, visual, acoustic = features = [
        torch.from_numpy(np.require(x, requirements=["C", "W"])) for x, _ in sequences
    ]
    lengths = torch.from_numpy(np.stack([lengths for _, lengths in sequences], axis=1))
    names = (
        [f"{m} {i}" for i in range(x.shape[2])] for m, x in zip(MODALITIES, features, strict=True)
    )
    try:
        clips = Batch(language, visual, acoustic, lengths, torch.from_numpy(labels), ids)
        return Dataset(fields.split, clips, PerModality(*names), transcripts)
    except ValueError as error:
        raise ValueError(f"{fields.path}: {error}") from None
