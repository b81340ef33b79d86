"""Scores against scikit-learn on random cases, and against cases worked out by hand."""

import math
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score, f1_score
from torch import nn

from dmd import Batch, PerModality
from dmd.data import Dataset
from dmd.metrics import compute, evaluate, evaluate_with_edges, legacy_f1

KEYS = ["mae", "corr", "acc2_has0", "f1_has0", "acc2_non0", "f1_non0", "acc5", "acc7"]


def random_cases(count):
    """Scores on a grid of halves, so that zeros, ties and halves are common; some out of range."""
    rng = np.random.default_rng(0)
    for _ in range(count):
        n = int(rng.integers(1, 12))
        yield rng.integers(-9, 10, n) / 2, rng.integers(-6, 7, n) / 2


def reference(p, y):
    """The same scores, written with scikit-learn and NumPy."""
    kept = y != 0
    constant = len(set(p)) == 1 or len(set(y)) == 1
    found = {
        "mae": np.abs(p - y).mean(),
        "corr": math.nan if constant else np.corrcoef(p, y)[0, 1],
        "acc2_has0": accuracy_score(y >= 0, p >= 0),
        "f1_has0": f1_score(y >= 0, p >= 0, average="weighted"),
        "acc2_non0": accuracy_score(y[kept] > 0, p[kept] > 0) if kept.any() else math.nan,
        "f1_non0": math.nan,
    }
    if kept.any():
        found["f1_non0"] = f1_score(y[kept] > 0, p[kept] > 0, average="weighted")
    for bound in (2, 3):
        p_class, y_class = (np.rint(np.clip(x, -bound, bound)).astype(int) for x in (p, y))
        found[f"acc{2 * bound + 1}"] = accuracy_score(y_class, p_class)
    return found


def test_equals_scikit_learn_on_random_cases():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for p, y in random_cases(1500):
            found, expected = compute(p, y), reference(p, y)
            assert list(found) == KEYS
            for key in KEYS:
                close = pytest.approx(expected[key], abs=1e-12, nan_ok=True)
                assert found[key] == close, (key, p, y)


def test_legacy_f1_equals_scikit_learn_with_swapped_arguments_and_differs_from_f1():
    differing = 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for p, y in random_cases(500):
            kept = y != 0
            swapped = f1_score(p >= 0, y >= 0, average="weighted")
            assert legacy_f1(p, y, zeros="has0") == pytest.approx(swapped, abs=1e-12)
            differing += abs(swapped - compute(p, y)["f1_has0"]) > 1e-6
            if kept.any():
                swapped = f1_score(p[kept] > 0, y[kept] > 0, average="weighted")
                assert legacy_f1(p, y) == pytest.approx(swapped, abs=1e-12)
            else:
                assert math.isnan(legacy_f1(p, y))
    assert differing > 50
    with pytest.raises(ValueError, match="zeros must be"):
        legacy_f1([1.0], [1.0], zeros="both")


@pytest.mark.parametrize(
    ("prediction", "seven", "five"),
    [
        (0.5, 0, 0),
        (-0.5, 0, 0),
        (1.5, 2, 2),
        (2.5, 2, 2),
        (-2.5, -2, -2),
        (3.7, 3, 2),
        (-40.0, -3, -2),
        (0.49, 0, 0),
        (0.51, 1, 1),
    ],
)
def test_classes_are_clipped_and_halves_go_to_the_even_neighbour(prediction, seven, five):
    for c in range(-3, 4):
        assert compute([prediction], [float(c)])["acc7"] == (c == seven)
    for c in range(-2, 3):
        assert compute([prediction], [float(c)])["acc5"] == (c == five)
    assert compute([prediction], [3.0])["acc5"] == (five == 2)  # the truth is clipped as well


def test_has0_and_non0_treat_zero_differently():
    # Truth 0 with a prediction just below: wrong in has0, left out of non0.
    scores = compute([-0.1, 1.0, -1.0], [0.0, 1.0, -1.0])
    assert scores["acc2_has0"] == pytest.approx(2 / 3)
    assert scores["acc2_non0"] == 1
    # A prediction of exactly zero counts as positive in has0, as not positive in non0.
    scores = compute([0.0, 0.0], [1.0, -1.0])
    assert scores["acc2_has0"] == scores["acc2_non0"] == 0.5
    assert compute([0.0], [1.0])["acc2_has0"] == 1
    assert compute([0.0], [1.0])["acc2_non0"] == 0


def test_f1_is_weighted_by_the_support_of_the_truth():
    # Truth: three positive, one negative; prediction: one positive, three negative.
    prediction, label = [1.0, -1.0, -1.0, -1.0], [1.0, 1.0, 1.0, -1.0]
    positive, negative = 2 * 1 / (1 + 3), 2 * 1 / (3 + 1)
    assert positive == negative  # a case that can't tell the weights apart ...
    prediction, label = [1.0, 1.0, -1.0, -1.0], [1.0, 1.0, 1.0, -1.0]
    positive, negative = 2 * 2 / (2 + 3), 2 * 1 / (2 + 1)  # ... and one that can
    expected = 3 / 4 * positive + 1 / 4 * negative
    assert compute(prediction, label)["f1_non0"] == pytest.approx(expected)
    assert legacy_f1(prediction, label) == pytest.approx((positive + negative) / 2)


def test_mae_and_correlation_see_unclipped_values():
    scores = compute([30.0, -30.0], [3.0, -3.0])
    assert scores["mae"] == 27
    assert scores["corr"] == pytest.approx(1, abs=1e-12)
    for p, _ in random_cases(200):
        assert not abs(compute(p, p / 3)["corr"]) > 1  # not by a rounding error either
    label = [1.0, 2.0, 3.0]
    assert compute([6.0, 2.0, -2.0], label)["corr"] == pytest.approx(-1, abs=1e-12)
    assert compute([0.0, 0.0, 9.0], label)["corr"] == pytest.approx(3 / math.sqrt(12))


def test_what_is_not_defined_is_nan():
    one = compute([1.0], [1.0])
    assert math.isnan(one["corr"])
    assert one["acc7"] == one["f1_non0"] == one["acc2_has0"] == 1
    constant = compute([0.1] * 7, [-3.0, -2.0, -1.0, 0.0, 1.0, 2.0, 3.0])
    assert math.isnan(constant["corr"])
    for n in range(2, 20):  # the mean of n equal numbers need not be exactly that number
        fixed, varied = np.full(n, 0.1), np.linspace(-1, 2, n) ** 2
        assert math.isnan(compute(fixed, varied)["corr"])
        assert math.isnan(compute(varied, fixed)["corr"])
    assert constant["acc2_has0"] == pytest.approx(4 / 7)
    neutral = compute([1.0, -1.0], [0.0, 0.0])
    assert [key for key in KEYS if math.isnan(neutral[key])] == ["corr", "acc2_non0", "f1_non0"]


def test_all_of_one_class():
    scores = compute([1.0, 2.0, -1.0], [1.0, 2.0, 3.0])
    assert scores["acc2_non0"] == pytest.approx(2 / 3)
    assert scores["f1_non0"] == pytest.approx(2 * 2 / (2 + 3))


def test_computed_in_float64():
    # In float32 the sum of 1e8 and 1 is 1e8: the mean error would lose what is asked for.
    label = torch.zeros(3)
    prediction = torch.tensor([1e8, 1.0, 1.0], dtype=torch.float32)
    assert compute(prediction, label)["mae"] == (1e8 + 2) / 3
    tiny = compute(np.array([1e-170, 2e-170, 3e-170]), np.array([1.0, 3.0, 2.0]))
    assert tiny["corr"] == pytest.approx(0.5)  # although the squares of these underflow


@pytest.mark.parametrize(
    ("prediction", "label", "message"),
    [
        ([], [], "no predictions"),
        ([1.0], [1.0, 2.0], r"\(1,\) and \(2,\)"),
        ([[1.0]], [[1.0]], "one shape"),
        ([[1.0]], [1.0], r"\(1, 1\) and \(1,\)"),
        ([1.0, math.nan], [1.0, 1.0], "prediction of clip 1, nan"),
        ([math.inf], [1.0], "prediction of clip 0, inf"),
        ([1.0], [math.nan], "label of clip 0, nan"),
    ],
)
def test_bad_input_is_one_sentence(prediction, label, message):
    with pytest.raises(ValueError, match=message) as error:
        compute(prediction, label)
    assert "\n" not in str(error.value)


class Mean(nn.Module):
    """Predicts the mean of the first language feature; random in training mode."""

    def __init__(self):
        super().__init__()
        self.dropout = nn.Dropout(0.5)
        self.frozen = nn.BatchNorm1d(2)
        self.scale = nn.Parameter(torch.ones(()))
        self.sizes, self.modes = [], []

    def forward(self, batch):
        self.sizes.append(len(batch))
        self.modes.append((self.training, torch.is_inference_mode_enabled()))
        mean = self.dropout(batch.language[:, :, 0]).mean(dim=1)
        return SimpleNamespace(prediction=self.scale * mean)


def split_of(n):
    generator = torch.Generator().manual_seed(0)
    language, visual, acoustic = (torch.randn(n, 3, 2, generator=generator) for _ in range(3))
    label = torch.randn(n, generator=generator).clamp(-3, 3)
    names = PerModality(*[["a", "b"]] * 3)
    return Dataset("test", Batch(language, visual, acoustic, label=label), names)


def test_evaluate_runs_in_eval_mode_and_leaves_every_mode_as_it_was():
    model, split = Mean(), split_of(10)
    model.train()
    model.frozen.eval()
    found = evaluate(model, split, batch_size=4)
    assert found == compute(split.clips.language[:, :, 0].mean(dim=1), split.label)
    assert model.sizes == [4, 4, 2]
    assert set(model.modes) == {(False, True)}
    assert model.training and model.dropout.training and not model.frozen.training
    assert evaluate(model, split, batch_size=3) == pytest.approx(found, abs=1e-6)
    model.eval()
    evaluate(model, split)
    assert not model.training


def test_evaluate_restores_the_mode_after_an_error():
    model, split = Mean(), split_of(4)
    model.scale.data.fill_(math.nan)
    with pytest.raises(ValueError, match="prediction of clip 0, nan"):
        evaluate(model, split)
    assert model.training

    class Broken(Mean):
        def forward(self, batch):
            raise RuntimeError("broken")

    broken = Broken()
    with pytest.raises(RuntimeError, match="broken"):
        evaluate(broken, split)
    assert broken.training and broken.dropout.training
    with pytest.raises(ValueError, match="batch_size"):
        evaluate(model, split, batch_size=0)


def test_evaluate_takes_a_model_without_parameters():
    split = split_of(5)
    model = nn.Module()
    model.forward = lambda batch: SimpleNamespace(prediction=batch.label)
    assert evaluate(model, split, device="cpu")["mae"] == 0
    assert evaluate(model, split)["corr"] == pytest.approx(1)


def test_mean_edges_are_those_of_every_clip_from_teacher_to_student():
    class Fixed(nn.Module):
        def forward(self, batch):
            edges = torch.arange(9.0).view(3, 3) * batch.label[:, None, None]
            return SimpleNamespace(
                prediction=batch.label / 2,
                homo=SimpleNamespace(edges=edges),
                hetero=SimpleNamespace(edges=-edges),
            )

    split = split_of(300)  # more than one batch
    mean = split.label.mean()
    scores, found = evaluate_with_edges(Fixed(), split)
    assert scores == evaluate(Fixed(), split)
    expected = torch.arange(9.0).view(3, 3) * mean
    torch.testing.assert_close(torch.tensor(found["homo"]), expected)
    torch.testing.assert_close(torch.tensor(found["hetero"]), -expected)
