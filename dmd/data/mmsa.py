"""CMU-MOSI and CMU-MOSEI as the pickles of the MMSA framework, read and written.

A file maps each of `train`, `valid`, `test` to: `text` (N, T_L, 768), features of BERT;
`text_bert` (N, 3, T_L), rows of token ids, mask and segments; `audio` (N, T_A, D_A); `vision`
(N, T_V, D_V); `raw_text`, `id` (`video$_$clip`), `annotations`, `classification_labels` and
`regression_labels` (N,). Files of unaligned clips also have `audio_lengths` and
`vision_lengths`. The order there is audio before vision; here it is language, visual, acoustic.
"""

import hashlib
import os
import pickle
import warnings
from pathlib import Path
from typing import Any

import numpy as np

from dmd.batch import PerModality
from dmd.data.dataset import Dataset, Splits
from dmd.data.pickled import (
    SPLITS,
    Fields,
    Sequences,
    at_least_one,
    make_dataset,
    read_splits,
    trailing_length,
)

NAME = "mmsa"
CHECKSUMS = {
    "MOSI aligned_50": "d3994fd25681f9c7ad6e9c6596a6fe9b4beb85ff7d478ba978b124139002e5f9",
    "MOSI unaligned_50": "78e0f8b5ef8ff71558e7307848fc1fa929ecb078203f565ab22b9daab2e02524",
    "MOSEI aligned_50": "45eccfb748a87c80ecab9bfac29582e7b1466bf6605ff29d3b338a75120bf791",
    "MOSEI unaligned_50": "ad8b23d50557045e7d47959ce6c5b955d8d983f2979c7d9b7b9226f6dd6fec1f",
}
CLASSES = ("Negative", "Neutral", "Positive")  # `annotations`, by `classification_labels`


def load(path: str | os.PathLike[str], language: str = "text") -> Splits:
    """The splits of the MMSA pickle at `path`.

    language: the key of the language features. `text_bert` is refused: it holds token ids.
    Lengths are those that the file states (for language: the mask of `text_bert`), else a clip
    ends at its last step that is not all zeros; a clip of length 0 becomes one step of zeros.
    Features that are not finite become 0, and a warning says how many. A file that is none of
    the four published ones gives a warning.
    Raises OSError where the file can't be read, ValueError where it is not of this layout, both
    with one sentence that names the file and the field.
    """
    path = Path(path)
    if not isinstance(language, str):
        raise ValueError(f"language={language!r} is not the name of a key: use language='text'")
    if language == "text_bert":
        raise ValueError(
            f"{path}: 'text_bert' holds BERT token ids, not features: use language='text'"
        )

    def read(fields: Fields) -> Dataset:
        labels = fields.labels("regression_labels")
        clips = len(labels)
        sequences = PerModality(
            _language(fields, language, clips),
            _sequences(fields, "vision", clips),
            _sequences(fields, "audio", clips),
        )
        transcripts = fields.texts("raw_text", clips) if "raw_text" in fields else None
        ids = fields.texts("id", clips)
        # A file written by `export` has empty transcripts where there were none.
        return make_dataset(
            fields, sequences, labels, ids, transcripts if any(transcripts or ()) else None
        )

    splits = read_splits(path, read, NAME, {"path": str(path), "language": language})
    with path.open("rb") as file:  # after reading, so that a broken file gives one message
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest not in CHECKSUMS.values():
        warnings.warn(
            f"{path} is none of the published MMSA files (SHA-256 {digest}): its content is taken "
            "as it is",
            stacklevel=2,
        )
    return splits


def _language(fields: Fields, key: str, clips: int) -> Sequences:
    x, present = fields.features(key, clips)
    if key != "text" or "text_bert" not in fields:
        return at_least_one(x, trailing_length(present))
    bert = fields.numbers("text_bert")
    if bert.shape != (clips, 3, x.shape[1]):
        raise fields.wrong(
            "text_bert", f"must have shape {(clips, 3, x.shape[1])} to go with {key!r}, "
            f"not {bert.shape}"
        )  # fmt: skip
    mask = bert[:, 1] != 0
    lengths = mask.sum(axis=1)
    if not np.array_equal(mask, np.arange(x.shape[1]) < lengths[:, None]):
        raise fields.wrong("text_bert", "has a mask with a gap, or one that does not begin at 0")
    return at_least_one(x, lengths)


def _sequences(fields: Fields, key: str, clips: int) -> Sequences:
    x, present = fields.features(key, clips)
    stated = f"{key}_lengths"
    if stated in fields:
        return at_least_one(x, fields.lengths(stated, clips, x.shape[1]))
    return at_least_one(x, trailing_length(present))


def export(splits: Splits, path: str | os.PathLike[str]) -> None:
    """Write the splits as an MMSA pickle, from which `load` gives the same clips back.

    The keys are those of unaligned files, so that all lengths are kept. `text` holds the
    language features, whatever they are. There is no BERT: the token ids and segments of
    `text_bert` are 0, and its mask is true at the valid steps of `text`. Clips without ids are
    numbered; without transcripts `raw_text` is empty. Names of features and the truth of
    synthetic data are not kept. Written by protocol 4, which NumPy 1.26 and newer read, to a
    temporary file that then takes the place of `path`. Raises OSError where that fails.
    """
    path = Path(path)
    if not path.parent.is_dir():
        raise FileNotFoundError(f"cannot write {path}: there is no folder {path.parent}")
    content = {name: _mapping(s, name) for name, s in zip(SPLITS, splits, strict=True)}
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        try:
            with part.open("wb") as file:
                pickle.dump(content, file, protocol=4)
            os.replace(part, path)
        finally:
            part.unlink(missing_ok=True)
    except OSError as error:
        raise type(error)(f"cannot write {path}: {os.strerror(error.errno or 0)}") from None


def _mapping(split: Dataset, name: str) -> dict[str, Any]:
    clips = split.clips
    assert clips.lengths is not None  # set by Batch
    language, visual, acoustic = (x.float().numpy() for x in clips.features)
    lengths = clips.lengths.numpy()
    bert = np.zeros((len(split), 3, language.shape[1]), np.int64)
    bert[:, 1] = np.arange(language.shape[1]) < lengths[:, :1]
    label = split.label.float().numpy()
    classes = np.sign(label).astype(np.int64) + 1
    return {
        "raw_text": list(split.transcripts or [""] * len(split)),
        "audio": acoustic,
        "vision": visual,
        "id": list(clips.ids or [f"{name}$_${n}" for n in range(len(split))]),
        "text": language,
        "text_bert": bert,
        "audio_lengths": lengths[:, 2],
        "vision_lengths": lengths[:, 1],
        "annotations": [CLASSES[c] for c in classes],
        "classification_labels": classes,
        "regression_labels": label,
    }
