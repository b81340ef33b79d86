"""Datasets: one loader a format, and `load`, which finds the loader by name."""

import inspect
import os
from collections.abc import Callable
from typing import Any

from dmd.data import mmsa, mosi_utterances, mult, synthetic
from dmd.data.dataset import Dataset, Splits
from dmd.data.sanitise import sanitise
from dmd.options import nearest

LOADERS: dict[str, Callable[..., Splits]] = {
    "synthetic": synthetic.load,
    "mosi_utterances": mosi_utterances.load,
    "mmsa": mmsa.load,
    "mult": mult.load,
}


def load(name: str, /, **options: Any) -> Splits:
    """The splits of the dataset called `name`; the options are those of its loader.

    A path may hold variables of the environment, as in `$DMD_DATA/file.pkl`.
    Raises ValueError for an unknown name or option (naming the nearest known one) and for
    broken content, OSError for a file that can't be read, each with one sentence that says what
    to do.
    """
    if name not in LOADERS:
        raise ValueError(nearest(name, LOADERS, "dataset"))
    known = inspect.signature(LOADERS[name]).parameters
    for key in options:
        if key not in known:
            raise ValueError(nearest(key, known, f"option of dataset {name!r}"))
    for key, parameter in known.items():
        if parameter.default is inspect.Parameter.empty and options.get(key) is None:
            raise ValueError(f"dataset {name!r} needs the option {key}=...")
    for key in {"path", "root"} & options.keys():
        if not isinstance(options[key], str | os.PathLike | None):
            raise ValueError(f"{key}={options[key]!r} is not the path of a file or folder")
        if options[key] is not None:
            options[key] = os.path.expandvars(os.fspath(options[key]))
    return LOADERS[name](**options)


__all__ = ["LOADERS", "Dataset", "Splits", "load", "sanitise"]
