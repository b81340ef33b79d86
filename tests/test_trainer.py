"""The training loop: what it may depend on, what it keeps, and how it stops."""

import math

import pytest
import tiny_runs as tiny
import torch
from torch import nn

import dmd
from dmd import Batch, LossConfig, TrainConfig, Trainer, checkpoint, trainer
from dmd.data import Dataset
from dmd.device import find_device
from dmd.trainer import NonFiniteLoss

PER_CLIP = LossConfig(gamma=0)  # the margin loss compares clips, so it is no mean over them


def run(splits=None, seed=0, model=None, **options):
    """A trained model and its history."""
    net = tiny.model(seed, **(model or {}))
    history = Trainer(net, tiny.config(seed=seed, **options)).fit(splits or tiny.splits())
    return net, history


@pytest.fixture
def scores(monkeypatch):
    """Replace the scores on the validation split: in every run one value an epoch."""

    def script(**columns):
        epochs = 0

        def evaluate(model, split):
            nonlocal epochs
            found = dict.fromkeys(("mae", "corr", "acc2_has0", "acc2_non0", "acc7"), 0.5)
            if split.name == "valid":
                for name, values in columns.items():
                    found[name] = values[min(epochs, len(values) - 1)]
            epochs = epochs + 1 if split.name == "valid" else 0
            return found

        monkeypatch.setattr(trainer, "evaluate", evaluate)

    return script


# Determinism


def test_two_runs_are_bitwise_equal_and_another_seed_is_not():
    first, history = run()
    torch.rand(7)  # what happened before must not matter
    again, history_again = run()
    assert tiny.same(first.state_dict(), again.state_dict())
    rows = tiny.without_times(history.epochs)
    assert rows == tiny.without_times(history_again.epochs)
    assert history.test == history_again.test
    other, _ = run(seed=1)
    assert not tiny.same(first.state_dict(), other.state_dict())


def test_the_seed_alone_changes_order_and_dropout():
    start = tiny.model(0).state_dict()

    def losses(seed, **model):
        net = tiny.model(0, **model)
        assert tiny.same(start, net.state_dict())
        history = Trainer(net, tiny.config(seed=seed, epochs=1)).fit(tiny.splits())
        return history.curve("train", "total")

    still = {"language_dropout": 0.0, "output_dropout": 0.0}
    assert losses(0, **still) != losses(1, **still)  # the order of the clips
    assert losses(0) == losses(0) != losses(0, **still)  # dropout is on while training


def test_a_model_in_evaluation_mode_is_trained_with_dropout_too():
    start, net = tiny.model(), tiny.model().eval()
    Trainer(start, tiny.config(epochs=1)).fit(tiny.splits())
    Trainer(net, tiny.config(epochs=1)).fit(tiny.splits())
    assert tiny.same(start.state_dict(), net.state_dict())


def test_every_epoch_has_another_order_and_sees_every_clip_once(monkeypatch):
    taken = []
    get = Dataset.__getitem__
    monkeypatch.setattr(
        Dataset, "__getitem__", lambda self, index: taken.append(index.tolist()) or get(self, index)
    )
    run(epochs=2)
    clips = [n for index in taken for n in index]
    assert sorted(clips[:14]) == sorted(clips[14:]) == list(range(14))
    assert clips[:14] != clips[14:] and clips[:14] != list(range(14))


# The update


def gradients(monkeypatch, **options):
    """All gradients of each update, as the optimiser gets them."""
    seen = []
    step = torch.optim.Adam.step

    def spy(self, *args, **kwargs):
        given = [p.grad for group in self.param_groups for p in group["params"]]
        seen.append(torch.cat([g.flatten() for g in given if g is not None]))
        return step(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.Adam, "step", spy)
    run(epochs=1, **options)
    monkeypatch.setattr(torch.optim.Adam, "step", step)
    return seen


@pytest.mark.parametrize("clips", [16, 13, 11, 9])  # the last group: 8, 5 = 4 + 1, 3, 1
def test_accumulated_gradients_are_the_mean_over_the_clips(monkeypatch, clips):
    # weights that stay what they are, no randomness, losses that are means over clips
    options = {
        "splits": tiny.splits(train=clips, full=True),
        "model": {"language_dropout": 0.0, "output_dropout": 0.0},
        "loss": PER_CLIP,
        "clip": "none",
        "learning_rate": 1e-12,
    }
    whole = gradients(monkeypatch, batch_size=8, accumulate=1, **options)
    parts = gradients(monkeypatch, batch_size=4, accumulate=2, **options)
    assert len(whole) == len(parts) == 2
    for x, y in zip(whole, parts, strict=True):
        assert float(x.abs().max()) > 0.1
        torch.testing.assert_close(y, x, rtol=1e-4, atol=1e-6)


def test_gradients_are_clipped_as_told(monkeypatch):
    free = gradients(monkeypatch, clip="none")
    bound = 0.5 * float(free[0].abs().max())
    by_value = gradients(monkeypatch, clip="value", clip_at=bound)
    torch.testing.assert_close(by_value[0], free[0].clamp(-bound, bound))
    assert all(float(g.abs().max()) <= bound for g in by_value)
    bound = 0.5 * float(free[0].norm())
    by_norm = gradients(monkeypatch, clip="norm", clip_at=bound)
    torch.testing.assert_close(by_norm[0], 0.5 * free[0], rtol=1e-4, atol=1e-8)
    assert all(float(g.norm()) <= bound * 1.0001 for g in by_norm)
    loose = gradients(monkeypatch, clip="norm", clip_at=1e6)
    torch.testing.assert_close(loose[0], free[0])


def test_history_holds_the_mean_over_clips_of_every_term():
    net = tiny.model(0, language_dropout=0.0, output_dropout=0.0)
    data = tiny.splits(full=True)
    output = net(data.train.clips)
    expected = dmd.objective(output, data.train.label, PER_CLIP)
    # at a rate this small the weights stay what they are
    config = tiny.config(epochs=1, learning_rate=1e-12, loss=PER_CLIP)
    row = Trainer(net, config).fit(data).epochs[0]
    assert {*row["train"]} == {*expected.unweighted, "total"}
    for name, value in expected.unweighted.items():
        if name != "margin":
            assert row["train"][name] == pytest.approx(value.item(), rel=1e-5), name
    assert row["train"]["total"] == pytest.approx(expected.total.item(), rel=1e-5)


# Schedules, early stopping, selection


def test_rates_of_the_schedules(scores):
    scores(mae=[1.0])  # never better than in the first epoch
    for name, rates in {
        "none": [1.0] * 8,
        "plateau": [1.0] * 7 + [0.5],
        "cosine": [(1 + math.cos(math.pi * n / 8)) / 2 for n in range(8)],
    }.items():
        _, history = run(scheduler=name, epochs=8, patience=None)
        found = [row["learning_rate"] / 1e-2 for row in history.epochs]
        assert found == pytest.approx(rates), name


def test_plateau_waits_for_a_better_score(scores):
    scores(mae=[1.0 - n / 100 for n in range(12)])
    _, history = run(scheduler="plateau", epochs=12)
    assert {row["learning_rate"] for row in history.epochs} == {1e-2}


def test_early_stopping_counts_epochs_without_a_better_score(scores):
    scores(mae=[5.0, 3.0, 3.0, 4.0, 2.0, 2.5, 2.5, 2.0, 1.0])
    _, history = run(epochs=20, patience=3)
    assert history.best_epoch == 5 and len(history.epochs) == 8
    scores(mae=[5.0])
    _, history = run(epochs=6, patience=None)
    assert history.best_epoch == 1 and len(history.epochs) == 6


@pytest.mark.parametrize("select", ["corr", "acc2_has0", "acc2_non0", "acc7"])
def test_scores_but_the_error_are_best_when_highest(scores, select):
    scores(**{"mae": [1.0, 2.0, 3.0], select: [0.1, 0.3, 0.2]})
    assert run(select=select)[1].best_epoch == 2


def test_an_undefined_score_is_never_the_best(scores):
    scores(corr=[math.nan, -0.2, math.nan])
    assert run(select="corr")[1].best_epoch == 2
    scores(corr=[math.nan])
    assert run(select="corr")[1].best_epoch == 1


@pytest.mark.parametrize("select", ["corr", "acc2_non0"])
def test_a_score_that_the_labels_leave_undefined_is_refused(select):
    data = tiny.splits()
    data.valid.clips.label.zero_()
    with pytest.raises(ValueError, match=f"'{select}' is not defined .* valid split: select 'mae'"):
        run(data, select=select)
    run(data, select="mae", epochs=1)


def test_validation_chooses_and_the_test_split_is_read_once_at_the_end(monkeypatch):
    read = []

    def spy(name):
        method = getattr(Dataset, name)

        def wrapped(self, *args):
            if not read or read[-1] != self.name:
                read.append(self.name)
            return method(self, *args)

        monkeypatch.setattr(Dataset, name, wrapped)

    spy("__getitem__")
    spy("batches")
    net, history = run(epochs=3)
    assert read == ["train", "valid"] * 3 + ["test"]
    monkeypatch.undo()
    assert history.test == dmd.evaluate(net, tiny.splits().test)
    # the same run on other test clips has the same epochs and weights
    other = tiny.splits()
    other.test = tiny.dataset("test", 6, seed=77)
    net_other, history_other = run(other, epochs=3)
    assert tiny.same(net.state_dict(), net_other.state_dict())
    assert history_other.best_epoch == history.best_epoch and history_other.test != history.test


def test_the_model_ends_with_the_weights_of_the_best_epoch(scores):
    scores(mae=[3.0, 1.0, 2.0, 2.0])
    net, history = run(epochs=4, scheduler="none")
    assert history.best_epoch == 2
    scores(mae=[3.0, 1.0])
    two, _ = run(epochs=2, scheduler="none")
    assert tiny.same(net.state_dict(), two.state_dict())
    scores(mae=[4.0, 3.0, 2.0, 1.0])
    last, _ = run(epochs=4, scheduler="none")
    assert not tiny.same(net.state_dict(), last.state_dict())


def test_the_model_ends_in_evaluation_mode_and_without_dropout():
    net, history = run(epochs=2)
    assert not any(module.training for module in net.modules())
    data = tiny.splits()
    assert torch.equal(net(data.test.clips).prediction, net(data.test.clips).prediction)
    assert history.epochs[history.best_epoch - 1]["valid"] == dmd.evaluate(net, data.valid)


# Precision and devices


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_mixed_precision_trains_on_the_cpu(precision):
    exact, _ = run(epochs=1)
    net, history = run(precision=precision, epochs=1)
    assert all(p.dtype == torch.float32 and torch.isfinite(p).all() for p in net.parameters())
    assert math.isfinite(history.curve("train", "total")[0])
    assert not tiny.same(exact.state_dict(), net.state_dict())


def test_loss_falls_in_every_precision():
    for precision in ("float32", "bf16"):
        _, history = run(epochs=12, precision=precision, learning_rate=5e-3)
        curve = history.curve("train", "task")
        assert curve[-1] < 0.8 * curve[0], precision


@pytest.mark.parametrize("name", ["cdua", "cuda:99", "meta", "hpu", "", "cpu:x"])
def test_an_unknown_device_is_refused_in_one_sentence(name):
    with pytest.raises(
        ValueError, match=f"^device '{name}' is not available here: try auto or cpu"
    ):
        find_device(name)


def test_devices_that_are_there():
    assert find_device("cpu") == torch.device("cpu")
    assert find_device().type in ("cuda", "mps", "cpu")


# What goes wrong


def broken_after(monkeypatch, calls, term):
    """Make one term of the objective infinite from a certain call on."""
    real, count = trainer.objective, []

    def objective(*args):
        terms = real(*args)
        count.append(1)
        if len(count) > calls:
            names = [*terms.weighted]
            for name in (term, names[-1]):  # a later one is broken as well
                terms.weighted[name] = terms.weighted[name] * math.inf
        return terms

    monkeypatch.setattr(trainer, "objective", objective)


def test_a_loss_that_is_not_finite_names_term_and_clips_and_keeps_the_checkpoint(
    monkeypatch, tmp_path
):
    whole = tiny.model()
    Trainer(whole, tiny.config(epochs=2), tmp_path / "whole").fit(tiny.splits())
    broken_after(monkeypatch, calls=2 * 4 + 1, term="cycle")
    taken = []
    net = tiny.model()
    net.register_forward_pre_hook(lambda _, args: taken.append(args[0].ids))
    with pytest.raises(NonFiniteLoss) as caught:
        Trainer(net, tiny.config(epochs=4), tmp_path / "run").fit(tiny.splits())
    assert "'cycle' is not finite in epoch 3" in str(caught.value)
    assert str(caught.value).endswith(f"for the clips {', '.join(taken[-1])}")
    found, meta = checkpoint.load(tmp_path / "run" / "last.safetensors")
    expected, _ = checkpoint.load(tmp_path / "whole" / "last.safetensors")
    assert meta["epoch"] == 2 and tiny.same(found, expected)


def test_clips_without_ids_are_named_by_their_number(monkeypatch):
    broken_after(monkeypatch, calls=0, term="task")
    data = tiny.splits()
    data.train.clips.ids = None
    with pytest.raises(NonFiniteLoss, match=r"'task' .* for the clips \d+, \d+, \d+, \d+$"):
        run(data)


def test_weights_that_are_not_finite_are_never_saved(monkeypatch, tmp_path):
    def poison(*args, **kwargs):
        with torch.no_grad():
            next(net.parameters())[0] = math.nan

    net = tiny.model()
    monkeypatch.setattr(torch.optim.Adam, "step", poison)
    config = tiny.config(batch_size=100)
    with pytest.raises(NonFiniteLoss, match=r"weights shallow.0.convolution.weight are not finite"):
        Trainer(net, config, tmp_path / "run").fit(tiny.splits())
    saved, meta = checkpoint.load(tmp_path / "run" / "last.safetensors")
    assert meta["epoch"] == 0 and all(torch.isfinite(x).all() for x in saved.values())
    assert not (tmp_path / "run" / "best.safetensors").exists()


def test_there_is_something_to_load_before_the_first_step(monkeypatch, tmp_path):
    class Killed(BaseException):
        pass

    def killed(*args):
        raise Killed

    net = tiny.model()
    before = {name: x.clone() for name, x in net.state_dict().items()}
    monkeypatch.setattr(Trainer, "_train_step", killed)
    with pytest.raises(Killed):
        Trainer(net, tiny.config(), tmp_path / "run").fit(tiny.splits())
    loaded = dmd.load_model(tmp_path / "run" / "last.safetensors")[0].state_dict()
    assert tiny.same(loaded, before)


def test_data_of_other_sizes_are_refused_before_anything_is_written(tmp_path):
    out = tmp_path / "run"
    for wrong, what in (({"widths": (4, 9, 2)}, "visual"), ({"lengths": (5, 4, 2)}, "acoustic")):
        with pytest.raises(ValueError, match=what):
            Trainer(tiny.model(**wrong), tiny.config(), out).fit(tiny.splits())
    longer = tiny.splits()
    clips = longer.test.clips
    padded = nn.functional.pad(clips.language, (0, 0, 0, 1))
    longer.test.clips = Batch(padded, *clips.features[1:], clips.lengths, clips.label)
    with pytest.raises(ValueError, match="language sequences have 6 steps"):
        Trainer(tiny.model(), tiny.config(), out).fit(longer)
    assert not out.exists()


def test_training_without_an_output_folder_writes_nothing(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    run(epochs=1)
    assert not [*tmp_path.iterdir()]


def test_curve_reads_one_number_an_epoch():
    history = trainer.History([{"valid": {"mae": 2.0}}, {"valid": {"mae": 1.0}}])
    assert history.curve("valid", "mae") == [2.0, 1.0]


def test_default_configuration_is_the_papers():
    assert Trainer(tiny.model()).config == TrainConfig.preset("paper")
