"""The captured step: where it can't be had it says why, and where it can it is the plain one."""

import warnings

import pytest
import torch
from tiny_runs import config, model, same, splits, without_times

from dmd import Trainer
from dmd.fast import WARM_UP, CapturedStep, capture, obstacle
from dmd.steps import make_cases

CUDA = torch.device("cuda")
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.parametrize(
    ("options", "device", "processes", "message"),
    [
        ({}, "cpu", 1, "CUDA device, and this is cpu"),
        ({"precision": "fp16"}, "cuda", 1, "float32 or bf16"),
        ({"accumulate": 2}, "cuda", 1, "accumulate=1"),
        ({}, "cuda", 2, "single process"),
    ],
)
def test_what_stands_in_the_way_is_said_in_one_line(options, device, processes, message):
    reason = obstacle(config(capture=True, **options), torch.device(device), processes)
    assert message in reason
    assert "\n" not in reason


def test_nothing_stands_in_the_way_of_a_plain_run_on_a_gpu():
    assert obstacle(config(capture=True), CUDA) is None
    assert obstacle(config(capture=True, precision="bf16"), CUDA) is None


def test_without_the_option_there_is_neither_a_capture_nor_a_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert capture(lambda batch: {}, config(), torch.device("cpu")) is None


def test_where_it_is_not_possible_a_run_is_the_plain_one_with_a_warning():
    plain = Trainer(model(), config())
    expected = plain.fit(splits())
    other = Trainer(model(), config(capture=True))
    with pytest.warns(UserWarning, match="capture needs a CUDA device"):
        found = other.fit(splits())
    assert without_times(found.epochs) == without_times(expected.epochs)
    assert same(other.model.state_dict(), plain.model.state_dict())


def test_the_bench_refuses_the_captured_step_where_there_is_none():
    assert "captured" not in make_cases("tiny", device="cpu")
    with pytest.raises(ValueError, match="'captured': capture needs a CUDA device"):
        make_cases("tiny", device="cpu", variants=["captured"])


@needs_cuda
def test_a_captured_run_is_the_plain_one():
    """Ten and more steps, a last batch of another size, and a learning rate that changes."""
    runs = []
    for option in (False, True):
        options = {"scheduler": "cosine", "epochs": 4, "device": "cuda", "capture": option}
        trainer = Trainer(model(language_dropout=0.0, output_dropout=0.0), config(**options))
        history = trainer.fit(splits(train=30, full=True))
        assert (trainer.captured is not None) == option
        runs.append((history, trainer.model.state_dict()))
    (expected, weights), (found, captured) = runs
    for row, other in zip(expected.epochs, found.epochs, strict=True):
        assert other["train"] == pytest.approx(row["train"], rel=1e-4)
        assert other["learning_rate"] == row["learning_rate"]
    for name, weight in weights.items():
        torch.testing.assert_close(captured[name], weight, rtol=1e-3, atol=1e-4)


@needs_cuda
def test_a_step_is_replayed_and_a_batch_of_another_shape_is_not():
    calls = []

    def step(batch):
        calls.append(len(batch))
        return {"total": batch.label.sum()}

    captured = CapturedStep(step)
    clips = splits(train=30, full=True).train.clips
    for _ in range(WARM_UP + 5):
        batch = clips[torch.randperm(30)[:8]].to("cuda")
        assert torch.isclose(captured(batch)["total"], batch.label.sum())
    assert len(calls) == WARM_UP + 1  # the last of them was the recording
    captured(clips[:3].to("cuda"))
    assert calls[-1] == 3
