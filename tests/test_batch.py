"""Batches: what they hold, what they refuse, and how clips are taken out of them."""

import numpy as np
import pytest
import torch

from dmd import MODALITIES, Batch, PerModality
from dmd.batch import padding_mask

STEPS, WIDTHS = (3, 5, 2), (4, 2, 6)
LENGTHS = torch.tensor([[3, 5, 2], [1, 1, 1], [2, 4, 2], [3, 2, 1]])
IDS = ("a", "b", "c", "d")


def batch(clips=4, **changes):
    """Features that name their clip: each number is the clip's index."""
    features = {
        name: torch.arange(clips).view(-1, 1, 1).expand(-1, steps, width).float()
        for name, steps, width in zip(MODALITIES, STEPS, WIDTHS, strict=True)
    }
    rest = {"lengths": LENGTHS, "label": torch.arange(4.0), "ids": IDS}
    return Batch(**{**features, **rest, **changes})


def test_the_order_is_language_visual_acoustic():
    assert MODALITIES == ("language", "visual", "acoustic") == PerModality._fields
    b = batch()
    assert tuple(x.shape for x in b.features) == ((4, 3, 4), (4, 5, 2), (4, 2, 6))
    assert b.features.visual is b.visual is b.features[1]
    positional = Batch(*b.features)
    assert positional.acoustic is b.acoustic


def test_masks_are_true_at_the_first_steps_of_each_clip():
    assert padding_mask(torch.tensor([2, 0, 3]), 3).tolist() == [
        [True, True, False],
        [False, False, False],
        [True, True, True],
    ]
    for m, mask in enumerate(batch().masks):
        assert mask.dtype == torch.bool
        assert mask.shape == (4, STEPS[m])
        assert mask.sum(dim=1).tolist() == LENGTHS[:, m].tolist()
        assert not (mask[:, 1:] & ~mask[:, :-1]).any()  # no valid step after a padded one


def test_without_lengths_every_step_is_valid():
    b = batch(lengths=None)
    assert b.lengths.tolist() == [list(STEPS)] * 4
    assert all(mask.all() for mask in b.masks)


@pytest.mark.parametrize(
    ("index", "clips"),
    [
        (slice(1, 3), [1, 2]),
        (slice(None, None, 2), [0, 2]),
        ([2, 0, 2], [2, 0, 2]),
        ([-1], [3]),
        ([], []),
        ((1, 3), [1, 3]),
        (range(2), [0, 1]),
        (torch.tensor([3, 1]), [3, 1]),
        (torch.tensor([True, False, False, True]), [0, 3]),
        ([True, False, False, True], [0, 3]),
        (np.array([True, False, False, True]), [0, 3]),
        (np.array([3, 1]), [3, 1]),
    ],
    ids=str,
)
def test_an_index_takes_all_parts_of_the_same_clips(index, clips):
    part = batch()[index]
    assert len(part) == len(clips)
    for name, steps, width in zip(MODALITIES, STEPS, WIDTHS, strict=True):
        x = getattr(part, name)
        assert x.shape == (len(clips), steps, width)
        assert x[:, 0, 0].tolist() == clips
    assert part.lengths.tolist() == LENGTHS[clips].tolist()
    assert part.label.tolist() == clips
    assert part.ids == [IDS[i] for i in clips]


def test_an_index_leaves_out_what_is_not_known():
    part = batch(label=None, ids=None, lengths=None)[:2]
    assert part.label is None
    assert part.ids is None
    assert part.lengths.tolist() == [list(STEPS)] * 2


def test_to_moves_every_part():
    moved = batch().to("meta")
    tensors = (*moved.features, moved.lengths, moved.label)
    assert {x.device.type for x in tensors} == {"meta"}
    assert moved.ids == IDS
    assert [x.shape for x in moved.features] == [x.shape for x in batch().features]
    assert batch(label=None).to("meta").label is None
    assert torch.equal(batch().to("cpu").visual, batch().visual)


FULL = torch.tensor([STEPS] * 4)


def test_whether_clips_are_padded_is_seen_in_their_lengths():
    assert batch().padded
    assert not batch(lengths=FULL).padded
    assert not batch(lengths=None).padded
    for m in range(3):
        lengths = FULL.clone()
        lengths[2, m] -= 1
        assert batch(lengths=lengths).padded


def test_a_part_is_padded_if_one_of_its_clips_is():
    lengths = FULL.clone()
    lengths[1] = 1
    b = batch(lengths=lengths)
    assert b.padded
    assert b[1:3].padded
    assert not b[[0, 2, 3]].padded
    assert not batch(lengths=None)[[0, 2]].padded


def test_another_device_is_not_asked_for_lengths():
    """What is known there is kept; what is not is assumed."""
    for lengths, padded in ((LENGTHS, True), (FULL, False), (None, False)):
        moved = batch(lengths=lengths, ids=None).to("meta")
        assert moved.padded is padded
        assert moved[:2].padded is padded
    b = batch(lengths=FULL).to("meta")
    assert Batch(*b.features, lengths=b.lengths).padded
    assert not Batch(*b.features, lengths=b.lengths, padded=False).padded
    assert not Batch(*b.features).padded


REFUSED = [
    ({"visual": torch.zeros(4, 5)}, "visual: expected shape (clips, steps, width), got (4, 5)"),
    ({"acoustic": torch.zeros(3, 2, 6)}, "acoustic has 3 clips, but language has 4"),
    ({"language": torch.zeros(4, 0, 4)}, "language has no time steps"),
    ({"lengths": LENGTHS[:3]}, "lengths: expected integers of shape (4, 3), got"),
    ({"lengths": LENGTHS[:, :2]}, "expected integers of shape (4, 3), got torch.int64 (4, 2)"),
    ({"lengths": LENGTHS.float()}, "expected integers of shape (4, 3), got torch.float32 (4, 3)"),
    ({"lengths": LENGTHS > 0}, "expected integers of shape (4, 3), got torch.bool (4, 3)"),
    ({"label": torch.zeros(4, 1)}, "label: expected shape (4,), got (4, 1)"),
    ({"label": torch.zeros(3)}, "label: expected shape (4,), got (3,)"),
    ({"ids": ["a"]}, "ids: expected 4 names, got 1"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "message"), REFUSED, ids=[m for _, m in REFUSED])
def test_parts_that_do_not_fit_together_are_refused(changes, message):
    with pytest.raises(ValueError) as caught:
        batch(**changes)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("m", "length"), [(0, 0), (1, 6), (2, -1), (2, 3)])
def test_lengths_outside_the_sequence_name_the_clip_and_the_modality(m, length):
    lengths = LENGTHS.clone()
    lengths[2, m] = length
    with pytest.raises(ValueError) as caught:
        batch(lengths=lengths)
    assert f"clip 2 says {length} {MODALITIES[m]} steps" in str(caught.value)
    assert f"between 1 and {STEPS[m]}" in str(caught.value)


def test_lengths_at_both_ends_are_accepted():
    for lengths in (torch.ones(4, 3, dtype=torch.int32), torch.tensor([STEPS] * 4)):
        assert batch(lengths=lengths).lengths is lengths
