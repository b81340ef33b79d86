"""The training loop: what it may depend on, what it keeps, and how it stops."""

import math

import pytest
import tiny_runs as tiny
import torch
from torch import nn

import dmd
from dmd import Batch, LossConfig, TrainConfig, Trainer, checkpoint, optimisation, trainer
from dmd.data import Dataset
from dmd.device import find_device
from dmd.optimisation import groups
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
        with_edges = lambda model, split: (evaluate(model, split), {})  # noqa: E731
        monkeypatch.setattr(trainer, "evaluate_with_edges", with_edges)

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


def spy_on_steps(monkeypatch):
    """A list that gets all gradients of each update from now on, as the optimiser gets them."""
    seen = []
    step = torch.optim.Adam.step

    def spy(self, *args, **kwargs):
        given = [p.grad for group in self.param_groups for p in group["params"]]
        seen.append(torch.cat([g.flatten() for g in given if g is not None]))
        return step(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.Adam, "step", spy)
    return seen


def gradients(monkeypatch, **options):
    """All gradients of each update of one epoch."""
    with monkeypatch.context() as patch:
        seen = spy_on_steps(patch)
        run(epochs=1, **options)
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


STILL = {"language_dropout": 0.0, "output_dropout": 0.0}
# neither randomness nor any change of the weights: a batch has the same gradient in every run
FROZEN = {"model": STILL, "learning_rate": 1e-12, "clip": "none"}


def test_summed_gradients_add_up_the_batches(monkeypatch):
    # batches of 4, 4, 4 and 1 clips: the last one, smaller, counts as much as the others
    options = {**FROZEN, "splits": tiny.splits(train=13), "batch_size": 4}
    g = gradients(monkeypatch, **options)
    sums = gradients(monkeypatch, accumulate=2, accumulate_by="sum", **options)
    assert len(g) == 4 and len(sums) == 2
    torch.testing.assert_close(sums[0], g[0] + g[1], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(sums[1], g[2] + g[3], rtol=1e-4, atol=1e-6)
    means = gradients(monkeypatch, accumulate=2, **options)
    torch.testing.assert_close(sums[0], 2 * means[0], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("clip", ["value", "norm"])
def test_clipping_each_batch_bounds_all_that_has_accumulated(monkeypatch, clip):
    data = tiny.splits(train=12)
    g = gradients(monkeypatch, splits=data, batch_size=4, **FROZEN)
    assert len(g) == 3
    # such that it binds, and not always in the direction in which the sum would be bound
    bound = 0.5 * float(g[0].abs().mean() if clip == "value" else g[0].norm())

    def bounded(x):
        return x.clamp(-bound, bound) if clip == "value" else x * min(1, bound / float(x.norm()))

    options = {**FROZEN, "splits": data, "batch_size": 4, "accumulate": 3, "accumulate_by": "sum"}
    options |= {"clip": clip, "clip_at": bound}
    (once,) = gradients(monkeypatch, **options)
    (each,) = gradients(monkeypatch, clip_each_batch=True, **options)
    torch.testing.assert_close(once, bounded(sum(g)), rtol=1e-4, atol=1e-6)
    expected = bounded(bounded(bounded(g[0]) + g[1]) + g[2])
    torch.testing.assert_close(each, expected, rtol=1e-4, atol=1e-6)
    assert float((each - once).abs().max()) > 0.01 * bound


def test_half_precision_can_not_clip_each_batch():
    with pytest.raises(ValueError, match=r"clip_each_batch can't bound .* precision='fp16'"):
        TrainConfig(precision="fp16", clip_each_batch=True)


@pytest.mark.parametrize(
    ("clips", "complete", "steps"),  # batches of 4, two a step
    [(8, 8, 1), (9, 8, 2), (12, 8, 2), (13, 13, 2), (15, 15, 2), (16, 16, 2), (20, 16, 3)],
)
def test_incomplete_groups_are_dropped_only_if_told_so(monkeypatch, clips, complete, steps):
    options = {"splits": tiny.splits(train=clips), "batch_size": 4, "accumulate": 2}
    assert len(gradients(monkeypatch, **options)) == steps
    taken = []
    get = Dataset.__getitem__
    monkeypatch.setattr(
        Dataset, "__getitem__", lambda self, index: taken.extend(index.tolist()) or get(self, index)
    )
    kept = gradients(monkeypatch, drop_incomplete=True, **options)
    assert len(kept) == (steps if complete == clips else steps - 1)
    assert len(taken) == len({*taken}) == complete


def test_the_released_training_makes_eight_steps_an_epoch_on_mosi():
    released = TrainConfig.preset("released")
    order = torch.arange(1284)  # training clips of CMU-MOSI
    assert [len(clips) for clips in groups(order, released)] == [160] * 8
    every = groups(order, released.replace(drop_incomplete=False))
    assert torch.equal(torch.cat(every), order) and len(every) == 9


def test_too_few_clips_for_a_step_are_refused_before_anything_is_written(tmp_path):
    config = tiny.config(batch_size=5, accumulate=3, drop_incomplete=True)
    with pytest.raises(ValueError) as error:
        Trainer(tiny.model(), config, tmp_path / "run").fit(tiny.splits(train=10))
    assert str(error.value) == (
        "the train split has 10 clips, too few for a step of accumulate=3 batches of "
        "batch_size=5: lower these, or set drop_incomplete=False"
    )
    assert not (tmp_path / "run").exists()
    run(tiny.splits(train=11), epochs=1, batch_size=5, accumulate=3, drop_incomplete=True)


def test_history_holds_the_mean_over_the_clips_that_were_seen(monkeypatch):
    net, data, taken = tiny.model(**STILL), tiny.splits(train=15, full=True), []
    net.register_forward_pre_hook(
        lambda model, args: taken.extend(args[0].ids) if model.training else None
    )
    options = {"accumulate": 2, "drop_incomplete": True, "loss": PER_CLIP, "learning_rate": 1e-12}
    row = Trainer(net, tiny.config(epochs=1, batch_size=5, **options)).fit(data).epochs[0]
    seen = data.train[[data.train.clips.ids.index(name) for name in taken]]
    assert len(seen) == 10
    expected = dmd.objective(net(seen), seen.label, PER_CLIP).total.item()
    assert row["train"]["total"] == pytest.approx(expected, rel=1e-5)


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


def test_without_a_number_of_epochs_patience_ends_the_training(scores, capsys):
    scores(mae=[50.0 - n for n in range(40)] + [20.0])
    net = tiny.model()
    config = tiny.config(epochs=None, patience=2, batch_size=14)
    history = Trainer(net, config, progress=True).fit(tiny.splits())
    assert history.best_epoch == 40 and len(history.epochs) == 42
    lines = capsys.readouterr().err.splitlines()
    assert lines[-1].startswith("epoch 42  loss ")
    Trainer(net, tiny.config(epochs=1), progress=True).fit(tiny.splits())
    assert capsys.readouterr().err.startswith("epoch 1/1  loss ")


def test_scores_on_the_test_split_every_epoch_choose_nothing(tmp_path):
    plain, history = run(epochs=3)
    assert all("test" not in row for row in history.epochs)
    for epochs in (1, 2, 3):
        folder = tmp_path / str(epochs)
        net = tiny.model()
        tested = Trainer(net, tiny.config(epochs=epochs, test_each_epoch=True), folder).fit(
            tiny.splits()
        )
        last, _ = dmd.load_model(folder / "last.safetensors")
        assert tested.epochs[-1].pop("test") == dmd.evaluate(last, tiny.splits().test)
    assert tested.curve("valid", "mae") == history.curve("valid", "mae")
    assert all(row.pop("test") for row in tested.epochs[:-1])
    assert tiny.without_times(tested.epochs) == tiny.without_times(history.epochs)
    assert tiny.same(net.state_dict(), plain.state_dict())
    assert (tested.test, tested.best_epoch) == (history.test, history.best_epoch)
    # test clips of the opposite sentiment get worse while the others get better
    data = tiny.splits()
    data.test.label.neg_()
    _, history = run(data, epochs=6, test_each_epoch=True)
    best = {part: min(history.curve(part, "mae")) for part in ("valid", "test")}
    kept = history.epochs[history.best_epoch - 1]
    assert kept["valid"]["mae"] == best["valid"] and kept["test"]["mae"] > best["test"]


def test_the_released_preset_trains(monkeypatch):
    data = dmd.data.load("synthetic")
    sizes = {"widths": data.widths, "lengths": data.lengths, "heads": 2, "layers": 1}
    dmd.seed_everything(0)
    net = dmd.DMD(dmd.ModelConfig.preset("released", **sizes))
    config = TrainConfig.preset(
        "released", batch_size=8, accumulate=3, epochs=2, device="cpu", learning_rate=1e-3
    )
    seen = spy_on_steps(monkeypatch)
    history = Trainer(net, config).fit(data)
    assert len(seen) == 2 * (math.ceil(len(data.train) / 8) // 3)
    assert all(0 < float(g.abs().max()) <= torch.tensor(0.6) for g in seen)
    first, second = history.curve("train", "total")
    assert second < first
    assert {"task", "margin", "orthogonality"} < {*history.epochs[0]["train"]}
    assert history.epochs[history.best_epoch - 1]["test"] == history.test


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
    real, count = optimisation.objective, []

    def objective(*args):
        terms = real(*args)
        count.append(1)
        if len(count) > calls:
            names = [*terms.weighted]
            for name in (term, names[-1]):  # a later one is broken as well
                terms.weighted[name] = terms.weighted[name] * math.inf
        return terms

    monkeypatch.setattr(optimisation, "objective", objective)


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
