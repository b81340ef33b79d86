"""Clips without labels, as `python -m dmd predict` takes them: arrays in an npz file."""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from dmd.batch import MODALITIES, Batch, PerModality
from dmd.options import nearest


def read_arrays(path: Path) -> dict[str, Any]:
    """The arrays of an npz file by name; OSError or ValueError with a sentence that names it."""
    try:
        with np.load(path, allow_pickle=False) as archive:
            return {name: archive[name] for name in archive.files}
    except OSError as error:
        raise OSError(f"can't read {path}: {error.strerror or error}") from error
    except Exception as error:  # zipfile, zlib and numpy each have their own for a broken file
        raise ValueError(
            f"{path} is not a readable npz file of plain arrays: numpy.savez writes one"
        ) from error


def read_clips(path: Path) -> Batch:
    """The clips in an npz file: `language`, `visual`, `acoustic` (clips, steps, width) and, if
    there are any, `lengths` (clips, 3) and `ids`.

    Raises OSError or ValueError with a sentence that names the file and the array.
    """
    arrays = read_arrays(path)
    known = (*MODALITIES, "lengths", "ids")
    try:
        for name in arrays:
            if name not in known:
                raise ValueError(nearest(name, known, "array"))
        for name in MODALITIES:
            if name not in arrays:
                raise ValueError(f"no array {name!r}: it needs {', '.join(MODALITIES)}")
            if arrays[name].dtype.kind not in "iuf":
                raise ValueError(f"{name} holds {arrays[name].dtype}, not numbers")
        if arrays.get("lengths", np.zeros(0, int)).dtype.kind not in "iu":
            raise ValueError(f"lengths holds {arrays['lengths'].dtype}, not integers")
        features = (torch.tensor(arrays[name].astype(float)).float() for name in MODALITIES)
        clips = Batch(
            *PerModality(*features),
            lengths=torch.tensor(arrays["lengths"].astype(int)) if "lengths" in arrays else None,
            ids=[str(x) for x in arrays["ids"].reshape(-1)] if "ids" in arrays else None,
        )
        if len(clips) == 0:
            raise ValueError("there are no clips in it")
        for name, x, mask in zip(MODALITIES, clips.features, clips.masks, strict=True):
            if not torch.isfinite(x[mask]).all():
                raise ValueError(f"{name} has NaN or inf: dmd.data.sanitise replaces them")
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return clips
