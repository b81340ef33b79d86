"""Linear probes: what they find, what they must not find, and the scorecard of leakage."""

import pytest
import torch

import dmd
from dmd.probes import PENALTIES, explained, leakage, linear_probe, pooled_parts, r_squared


def randn(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=torch.float64, generator=generator)


def test_the_probe_is_least_squares_where_the_penalty_is_small():
    x, weight = randn(50, 4), randn(4, 2, seed=1)
    y = x @ weight + 3
    assert torch.allclose(linear_probe(x, y, 1e-9)(x), y, atol=1e-6)
    assert torch.allclose(linear_probe(x, y, 1e12)(x), y.mean(dim=0).expand_as(y), atol=1e-6)


def test_the_scale_and_the_origin_of_features_change_nothing():
    x, y, new = randn(40, 3), randn(40, 1, seed=1), randn(5, 3, seed=2)
    found = linear_probe(x, y)(new)
    assert torch.allclose(linear_probe(1000 * x + 7, y)(1000 * new + 7), found)
    constant = [torch.cat([part, torch.full((len(part), 1), 9.0)], dim=1) for part in (x, new)]
    assert torch.allclose(linear_probe(constant[0], y)(constant[1]), found)


def test_r_squared_is_one_for_the_truth_zero_for_the_mean_and_by_factor():
    truth = randn(30, 2)
    half = torch.stack([truth[:, 0], truth[:, 1].mean().expand(30)], dim=1)
    assert torch.allclose(r_squared(half, truth), torch.tensor([1.0, 0.0]).double(), atol=1e-12)
    assert (r_squared(-truth, truth) < 0).all()


def splits_of(x, y):
    return [x[:300], x[300:400], x[400:]], [y[:300], y[300:400], y[400:]]


def test_the_probe_is_scored_on_clips_that_it_was_not_fitted_to():
    """As many features as clips would explain noise perfectly on the clips of the fit."""
    x = randn(600, 299)
    assert explained(*splits_of(x, randn(600, 1, seed=1))) < 0.05
    assert explained(*splits_of(x, x[:, :1])) > 0.9


def test_the_penalty_is_chosen_where_the_probe_is_not_scored():
    """The test split's factors are smaller: a stronger penalty would suit it, and isn't taken."""
    x = randn(600, 5)
    y = x[:, :1] * torch.cat([torch.ones(400, 1), torch.full((200, 1), 0.8)])
    truth = y[400:]
    scores = [
        float(r_squared(linear_probe(x[:300], y[:300], penalty)(x[400:]), truth))
        for penalty in PENALTIES
    ]
    assert scores[0] < max(scores) - 0.01
    assert explained(*splits_of(x, y)) == pytest.approx(scores[0])


def test_a_score_below_zero_counts_as_zero():
    x, y = randn(600, 5), randn(600, 1, seed=1)
    y[:400] = x[:400, :1]
    y[400:] = -x[400:, :1]
    assert explained(*splits_of(x, y)) == 0.0


class Known(torch.nn.Module):
    """A model whose common part is the shared factors and whose private part the own ones."""

    def __init__(self, truth):
        super().__init__()
        self.truth, self.at = truth, 0

    def forward(self, batch):
        rows = slice(self.at, self.at + len(batch))
        self.at += len(batch)
        masks = [torch.tensor([[True, False]]).expand(len(batch), 2)] * 3
        common = [self.padded(self.truth["shared"][rows])] * 3
        private = [self.padded(self.truth[f"private_{name}"][rows]) for name in dmd.MODALITIES]
        return type("Output", (), {"common": common, "private": private, "masks": masks})

    @staticmethod
    def padded(x):
        return torch.stack([x, torch.full_like(x, 1e6)], dim=1)


def test_the_scorecard_of_perfect_and_of_swapped_decoupling():
    splits = dmd.data.load("synthetic")
    truth = {k: torch.cat([s.truth[k] for s in splits]) for k in splits.train.truth}
    card = leakage(Known(truth), splits)
    for m in range(3):
        assert card["common"]["shared"][m] > 0.99 and card["private"]["own"][m] > 0.99
        for part, factors in (("common", "own"), ("common", "other"), ("private", "shared")):
            assert card[part][factors][m] < 0.2


def test_padding_is_not_pooled_and_clips_keep_their_order():
    splits = dmd.data.load("synthetic")
    parts = pooled_parts(Known(splits.train.truth), splits.train)
    assert parts["common"].shape == (3, len(splits.train), 2)
    assert torch.equal(parts["common"][1], splits.train.truth["shared"])
    assert torch.equal(parts["private"][2], splits.train.truth["private_acoustic"])


def test_without_a_truth_there_is_one_sentence():
    splits = dmd.data.load("synthetic")
    splits.train.truth.clear()
    with pytest.raises(ValueError, match="leakage is measured on 'synthetic'"):
        leakage(torch.nn.Identity(), splits)
