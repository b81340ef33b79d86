"""The table of differences is made of the options, all of them and no others."""

from collections import Counter

import pytest

from dmd.config import LossConfig, ModelConfig, TrainConfig
from dmd.differences import DIFFERENCES, KINDS, options_that_differ, switched

BASES = {"model": ModelConfig(), "loss": LossConfig(), "train": TrainConfig()}


@pytest.mark.parametrize("kind", KINDS)
def test_every_option_that_differs_has_exactly_one_row(kind):
    listed = Counter(name for row in DIFFERENCES if row.kind == kind for name in row.options)
    assert set(listed) == set(options_that_differ(kind))
    assert set(listed.values()) == {1}


def test_there_are_about_thirty_and_each_has_a_name_of_its_own():
    assert 25 <= len(DIFFERENCES) <= 35
    assert len({row.name for row in DIFFERENCES}) == len(DIFFERENCES)
    for row in DIFFERENCES:
        assert all(text.endswith(".") for text in (row.paper, row.code, row.good_for))


@pytest.mark.parametrize("row", DIFFERENCES, ids=lambda row: row.name)
def test_a_switched_row_changes_its_options_and_nothing_else(row):
    for name, config in switched(row, **BASES).items():
        before, after = BASES[name].to_dict(), config.to_dict()
        changed = {key for key in before if before[key] != after[key]}
        assert changed == (set(row.options) if name == row.kind else set())


def test_all_rows_together_are_the_released_presets():
    configs = BASES
    for row in DIFFERENCES:
        configs = switched(row, **configs)
    assert configs["loss"] == LossConfig.preset("released")
    assert configs["model"].replace(widths=(768, 20, 5)) == ModelConfig.preset("released")
    loss = LossConfig.preset("released")
    assert configs["train"].replace(loss=loss.to_dict()) == TrainConfig.preset("released")
