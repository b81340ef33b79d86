"""CMU-MOSI and CMU-MOSEI with GloVe features, as the pickles that came with MulT.

A file maps each of `train`, `valid`, `test` to: `vision`, `text` and `audio` (N, T, D), padded
with zeros on the left, `labels` (N, 1, 1) and `id`, a text a clip or three parts (video, start
and end), which may be bytes; a file may leave `id` out.
"""

import os
from pathlib import Path

import numpy as np

from dmd.batch import PerModality
from dmd.data.dataset import Dataset, Splits
from dmd.data.pickled import (
    Fields,
    Sequences,
    at_least_one,
    make_dataset,
    read_splits,
    trailing_length,
)

NAME = "mult"


def load(path: str | os.PathLike[str]) -> Splits:
    """The splits of the MulT pickle at `path`.

    A clip whose padding is on the left is moved so that its valid steps come first, each
    modality by itself; one with steps of zeros at both ends is left as it is. A clip ends at its
    last step that is not all zeros; where there is none it is one step of zeros. The parts of an
    id are joined by `$_$`. Features that are not finite become 0, and a warning says how many.
    Raises OSError where the file can't be read, ValueError where it is not of this layout, both
    with one sentence that names the file and the field.
    """
    path = Path(path)

    def read(fields: Fields) -> Dataset:
        labels = fields.labels("labels")
        clips = len(labels)
        sequences = PerModality(
            *(_sequences(fields, key, clips) for key in ("text", "vision", "audio"))
        )
        ids = fields.texts("id", clips, join="$_$") if "id" in fields else None
        return make_dataset(fields, sequences, labels, ids)

    return read_splits(path, read, NAME, {"path": str(path)})


def _sequences(fields: Fields, key: str, clips: int) -> Sequences:
    x, present = fields.features(key, clips)
    return at_least_one(*to_right_padding(x, present))


def to_right_padding(x: np.ndarray, present: np.ndarray) -> Sequences:
    """Features (N, T, D) with the padding on the right, and lengths (N,).

    present: (N, T), false at steps of zeros. Clips with such steps at both ends stay as they are.
    """
    steps = np.arange(x.shape[1])
    first = present.argmax(axis=1)
    shift = np.where(present[:, -1], first, 0)  # 0 where the last step is empty
    if shift.any():
        x = np.take_along_axis(x, ((steps + shift[:, None]) % x.shape[1])[..., None], axis=1)
    return x, trailing_length(present) - shift
