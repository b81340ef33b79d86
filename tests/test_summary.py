"""The summary of a dataset, counted by hand."""

import json
import math

import torch

from dmd import Batch, PerModality
from dmd.data import Dataset, Splits
from dmd.data.summary import describe, table

NAMES = PerModality(["l0", "l1"], ["v0", "v1", "v2"], ["a0"])


def split_of(name, labels, ids, lengths, edit=None):
    n = len(labels)
    clips = Batch(
        torch.ones(n, 4, 2),
        torch.ones(n, 6, 3),
        torch.ones(n, 5, 1),
        torch.tensor(lengths),
        torch.tensor(labels),
        ids,
    )
    if edit:
        edit(clips)
    return Dataset(name, clips, NAMES)


def holes(clips):
    """Two zero features and one zero clip among the visual ones, and bad padding of language."""
    clips.visual[:, :, 1:] = 0
    clips.visual[2] = 0
    clips.visual[2, 5] = 9.0  # in the padding, which does not count
    clips.visual[0, 2, 1] = 9.0  # so does this one
    clips.language[0, 3, 0] = math.nan
    clips.language[1, 3, 1] = -math.inf


def splits_of():
    return Splits(
        split_of(
            "train",
            [-3.0, 2.6, 0.5, 1.5, -2.5],
            ["a_b_1", "a_b_2", "a_1", "c$_$1_2", "c$_$2_3$_$4"],
            [[1, 2, 5], [3, 6, 5], [3, 4, 5], [2, 1, 5], [4, 5, 5]],
            holes,
        ),
        split_of("valid", [0.0], ["x"], [[4, 6, 5]]),
        split_of("test", [1.0, 1.0], None, [[4, 6, 5], [3, 6, 5]]),
        name="handmade",
    )


def test_describe_counts_what_is_there():
    found = describe(splits_of())
    assert found["name"] == "handmade"
    assert list(found["splits"]) == ["train", "valid", "test"]
    train, valid, test = found["splits"].values()
    assert [s["clips"] for s in (train, valid, test)] == [5, 1, 2]
    # a_b, a and c: an id that holds `$_$` is cut at the first, any other at its last `_`
    assert [s["videos"] for s in (train, valid, test)] == [3, 1, None]
    assert train["labels"] == {"-3": 1, "-2": 1, "-1": 0, "0": 1, "1": 0, "2": 1, "3": 1}
    assert test["labels"]["1"] == 2
    assert train["modalities"]["language"] == {
        "width": 2,
        "padded": 4,
        "min": 1,
        "median": 3.0,
        "max": 4,
        "non_finite": 2,
        "zero_features": 0,
        "zero_clips": 0,
    }
    assert train["modalities"]["visual"] == {
        "width": 3,
        "padded": 6,
        "min": 1,
        "median": 4.0,
        "max": 6,
        "non_finite": 0,
        "zero_features": 2,
        "zero_clips": 1,
    }
    assert train["modalities"]["acoustic"]["min"] == train["modalities"]["acoustic"]["max"] == 5
    assert test["modalities"]["language"]["median"] == 3.5


def test_describe_is_plain_data():
    found = describe(splits_of())
    assert json.loads(json.dumps(found, allow_nan=False)) == found


def test_table_is_aligned_and_says_the_same():
    lines = table(splits_of()).splitlines()
    blocks = "\n".join(lines).split("\n\n")
    assert "handmade" in lines[0] and len(blocks) == 2
    counts, details = (block.splitlines()[1:] for block in blocks)
    assert counts[0].split() == [
        "split",
        "clips",
        "videos",
        "-3",
        "-2",
        "-1",
        "0",
        "+1",
        "+2",
        "+3",
    ]
    assert counts[1].split() == ["train", "5", "3", "1", "1", "0", "1", "0", "1", "1"]
    assert counts[3].split()[:3] == ["test", "2", "-"]
    assert details[2].split() == ["train", "visual", "3", "6", "1", "4", "6", "0", "2", "1"]
    assert details[7].split()[2:7] == ["2", "4", "3", "3.5", "4"]
    assert len(details) == 1 + 9
    assert details[2].index("visual") == details[0].index("modality")
    for block in (counts, details):  # right-aligned columns: every line ends at one place
        assert len({len(line) for line in block}) == 1
