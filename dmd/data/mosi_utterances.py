"""Real CMU-MOSI: the features of 2,199 spoken utterances of 93 videos, from public CSV files.

The videos and labels are CMU-MOSI's (Zadeh et al., 2016), the features those of Poria et al.
(ACL 2017): one vector an utterance and modality. Sequences come from context: the time steps of
a clip are utterances. `data/README.md` tells what to know before trusting a number made here.
"""

import csv
import hashlib
import io
import os
import random
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from dmd.batch import Batch, PerModality
from dmd.data.dataset import Dataset, Splits

NAME = "mosi_utterances"
FOLDERS = PerModality("text", "video", "audio")
FEATURES = PerModality("text-CNN", "3D-CNN", "openSMILE")

# Paths as in the public repository, each with its SHA-256.
FILES = {
    "transcripts.csv": "e7689e6d70720addd2a6b316419d245a68839c32b014ff426c406063ee777466",
    "text_train.csv": "73770b6302ad0f7a51f4eddcae6788efde4d0b6802e09f78249d5b538d1c1d67",
    "text_test.csv": "f3b735070bf07ceff7a6ef6c8f4c32757e988de484e35bd6d38b2aecef851a59",
    "text/text_train0.csv": "cc327045db6cc361a08b4037b97bb24de4ddb5efb381468c4835cc4a60674668",
    "text/text_test0.csv": "a343e22272919d1384c2075dbcdd5fef5aa9f9366b0552a83f7c3147b64b047a",
    "video/video_train0.csv": "b6efc0413132d627efd06f67f1706830e775e90af9a75696f535c48dbc73f12f",
    "video/video_test0.csv": "cab836253d81100f59d533fa2ff65cd53c486be3ec9fd82203c5e25a7a77265f",
    "audio/audio_train0.csv": "5435398a54664e7b00304587dc59ae84a438852be033c2a2fba779588624a2a1",
    "audio/audio_test0.csv": "ddd17eeefd3d951d51d4e2ef8a0d132652d8161e1886f71eb7262b7a14bffff6",
}


def default_root() -> Path:
    """Where datasets are looked for and downloaded to: $DMD_DATA, or else data/downloads."""
    return Path(os.environ.get("DMD_DATA") or Path("data", "downloads"))


def candidates(root: Path, path: str) -> list[Path]:
    """The places below `root` where the file `path` exists: in its sub-folder or beside it."""
    bases = (root, root / NAME, root / "mosi-utterance")
    places = (base / place for base in bases for place in (path, Path(path).name))
    return [place for place in dict.fromkeys(places) if place.is_file()]


def _read(root: Path, path: str) -> str:
    """The text of a file whose SHA-256 is the expected one."""
    to = "" if root == default_root() else f" --to {root}"
    cure = f"`python -m dmd data fetch {NAME}{to}` downloads it"
    found = candidates(root, path)
    if not found:
        raise FileNotFoundError(f"{path} is missing below {root}: {cure}")
    for place in found:
        content = place.read_bytes()
        if hashlib.sha256(content).hexdigest() == FILES[path]:
            return content.decode()
    raise ValueError(f"{found[0]} differs from the published file (its SHA-256 is wrong): {cure}")


@dataclass
class Utterances:
    """N utterances: features (N, D_m), labels (N,) of -1 and +1, and for each what it is."""

    video: list[str]
    segment: list[int]
    transcript: list[str]
    features: list[np.ndarray]
    label: np.ndarray

    def __getitem__(self, rows: list[int]) -> "Utterances":
        return Utterances(
            [self.video[n] for n in rows],
            [self.segment[n] for n in rows],
            [self.transcript[n] for n in rows],
            [x[rows] for x in self.features],
            self.label[rows],
        )


def read_utterances(root: Path, split: str) -> Utterances:
    """One of the published splits, `train` or `test`, ordered by video and then by segment."""

    def numbers(path: str, columns: int | None = None) -> np.ndarray:
        text = io.StringIO(_read(root, path))
        return np.loadtxt(text, delimiter=",", quotechar='"', usecols=columns, ndmin=2)

    table = list(csv.reader(io.StringIO(_read(root, "transcripts.csv"))))
    lines = [table[int(n)] for n in numbers(f"text_{split}.csv", columns=0)[:, 0]]
    label = np.array([float(line[3]) for line in lines])
    features = []
    for folder in FOLDERS:
        path = f"{folder}/{folder}_{split}0.csv"
        columns = numbers(path)
        if not np.array_equal(columns[:, -1], label):
            raise ValueError(f"{path}: its labels are not those of transcripts.csv")
        features.append(columns[:, :-1])
    names = [line[0].rpartition("_") for line in lines]
    found = Utterances(
        video=[video for video, _, _ in names],
        segment=[int(segment) for _, _, segment in names],
        transcript=[line[1] for line in lines],
        features=features,
        label=2 * label - 1,
    )
    return found[sorted(range(len(lines)), key=lambda n: (found.video[n], found.segment[n]))]


def with_context(name: str, part: Utterances, context: int) -> Dataset:
    """Each utterance, after up to `context` predecessors of its video, as one clip."""
    rows = np.arange(len(part.video))
    # The row at which the video of each row begins: the rows are ordered by video.
    begins = np.array([part.video.index(video) for video in part.video])
    first = np.maximum(begins, rows - context)
    steps = first[:, None] + np.arange(context + 1)
    valid = steps <= rows[:, None]
    language, visual, acoustic = (
        torch.from_numpy(np.where(valid[..., None], x[np.where(valid, steps, 0)], 0)).float()
        for x in part.features
    )
    clips = Batch(
        language,
        visual,
        acoustic,
        lengths=torch.from_numpy(rows - first + 1)[:, None].repeat(1, 3),
        label=torch.from_numpy(part.label).float(),
        ids=[f"{v}_{s}" for v, s in zip(part.video, part.segment, strict=True)],
    )
    names = (
        [f"{kind} {n}" for n in range(x.shape[1])]
        for kind, x in zip(FEATURES, part.features, strict=True)
    )
    return Dataset(name, clips, PerModality(*names), part.transcript)


def _standardise(train: Utterances, others: tuple[Utterances, ...]) -> None:
    """Centre and scale every column, in place, by its mean and spread over `train`."""
    for m, x in enumerate(train.features):
        mean, spread = x.mean(axis=0), x.std(axis=0)
        spread[np.ptp(x, axis=0) == 0] = 1  # a column that never varies is only centred
        for part in (train, *others):
            part.features[m] = (part.features[m] - mean) / spread


def load(
    root: str | Path | None = None,
    context: int = 4,
    valid_share: float = 0.2,
    seed: int = 0,
    standardise: bool = True,
) -> Splits:
    """Real CMU-MOSI utterances in the published split, whose parts share no video.

    root: the folder of the CSV files, flat or in the sub-folders text, audio and video, or a
        folder that holds it as `mosi_utterances` or `mosi-utterance`; None: the environment
        variable DMD_DATA, or else `data/downloads` below the current directory.
    context: a clip is an utterance after up to that many predecessors of its video, oldest
        first: T = context + 1 steps in all modalities, the utterance itself at the last valid
        one, zeros after it. No clip sees a later utterance or another video.
    valid_share, seed: about this share of the training videos, whole videos drawn with the
        seed, becomes the validation split.
    standardise: centre every feature and scale it to unit spread, with the mean and spread of
        the training utterances alone (those of the validation videos left out).

    The labels are -1.0 (negative) and +1.0 (positive): these files tell only the sign, so read
    the binary metrics; five and seven classes mean nothing here. Ids are `video_segment`.
    The language and visual features were made with the labels of all training videos, those
    held out for validation included: only test accuracy means something.
    Raises ValueError for a bad option or a file whose SHA-256 is not the published one, and
    FileNotFoundError for a missing file.
    """
    if type(context) is not int or context < 0:  # True is an int too
        raise ValueError(f"context must be a whole number, 0 or more, not {context!r}")
    if not isinstance(valid_share, int | float) or not 0 < valid_share < 1:
        raise ValueError(f"valid_share must be a number between 0 and 1, not {valid_share!r}")
    if type(seed) is not int:
        raise ValueError(f"seed must be a whole number, not {seed!r}")
    if not isinstance(standardise, bool):
        raise ValueError(f"standardise={standardise!r} is neither True nor False")
    folder = default_root() if root is None else Path(root)
    known, test = read_utterances(folder, "train"), read_utterances(folder, "test")

    videos = sorted(set(known.video))
    count = min(max(round(valid_share * len(videos)), 1), len(videos) - 1)
    held_out = set(random.Random(seed).sample(videos, count))
    train = known[[n for n, video in enumerate(known.video) if video not in held_out]]
    valid = known[[n for n, video in enumerate(known.video) if video in held_out]]
    if standardise:
        _standardise(train, (valid, test))
    options = {
        "root": None if root is None else str(root),
        "context": context,
        "valid_share": valid_share,
        "seed": seed,
        "standardise": standardise,
    }
    return Splits(
        with_context("train", train, context),
        with_context("valid", valid, context),
        with_context("test", test, context),
        name=NAME,
        options=options,
    )
