"""Training that is killed, interrupted and resumed ends bitwise as if nothing had happened."""

import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny_runs as tiny

from dmd import Trainer, checkpoint, load_model
from dmd.trainer import Interrupted

pytestmark = pytest.mark.skipif(
    not hasattr(signal, "SIGKILL"), reason="this system can't kill a process at once"
)
ROOT = Path(__file__).parents[1]
EPOCHS = 3
# One process that has imported torch forks all the others: each is there in milliseconds.
# An optimiser imports torch._dynamo at its first step, which takes longer than the training.
if hasattr(signal, "SIGKILL"):
    PROCESSES = multiprocessing.get_context("forkserver")
    PROCESSES.set_forkserver_preload(["dmd", "torch._dynamo"])


def trainer(folder, **options):
    """Three steps an epoch, dropout, a schedule; the second of three epochs is the best."""
    usual = {"epochs": EPOCHS, "batch_size": 3, "accumulate": 2, "learning_rate": 0.04}
    return Trainer(tiny.model(), tiny.config(**{**usual, **options}), folder)


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def arm(stage, number):
    """Die in the course of the write with that number, at one of four stages."""
    count = 0
    write, fsync, replace = checkpoint.write_atomically, os.fsync, os.replace

    def counting(path, content):
        nonlocal count
        count += 1
        if stage == "before" and count == number:
            die()
        write(path, content)
        if stage == "after" and count == number:
            die()

    def half(file):
        if stage == "half" and count == number:
            os.ftruncate(file, os.fstat(file).st_size // 2)
            die()
        fsync(file)

    def unreplaced(a, b):
        if stage == "whole" and count == number:
            die()
        replace(a, b)

    checkpoint.write_atomically, os.fsync, os.replace = counting, half, unreplaced


def child(folder, ready, stage=None, number=0):
    """Train in a process of its own: go on if there is a checkpoint, begin if there is none."""
    if stage:
        arm(stage, number)
    runner = trainer(folder)
    ready.set()
    runner.fit(tiny.splits(), resume=(folder / "last.safetensors").exists())


def start(folder, *deadly):
    ready = PROCESSES.Event()
    process = PROCESSES.Process(target=child, args=(folder, ready, *deadly), daemon=True)
    process.start()
    assert ready.wait(60)
    return process


def finish(process):
    process.join(60)
    return process.exitcode


def loadable(folder):
    """Every file of a killed run is whole, whatever the moment."""
    found = []
    for name in ("last", "best"):
        if (folder / f"{name}.safetensors").exists():
            found.append(name)
            load_model(folder / f"{name}.safetensors")
    if (folder / "run.json").exists():
        json.loads((folder / "run.json").read_text())
    # what is there is a file of the run or one that the next write takes the place of
    names = {"last.safetensors", "best.safetensors", "run.json"}
    for path in folder.glob("*"):
        assert path.name in names | {f".{name}.part" for name in names}
    return found


def state(folder):
    """All that a run leaves, but for times and the processes that it took."""
    tensors, meta = checkpoint.load(folder / "last.safetensors")
    best, best_meta = checkpoint.load(folder / "best.safetensors")
    run = json.loads((folder / "run.json").read_text())
    assert sorted(path.name for path in folder.iterdir()) == [
        "best.safetensors", "last.safetensors", "run.json",
    ]  # fmt: skip
    for part in (meta, best_meta, run):
        part.pop("provenance")
        part["history"]["epochs"] = tiny.without_times(part["history"]["epochs"])
    return tensors, best, (meta, best_meta, run)


def assert_same(folder, reference):
    found = state(folder)
    assert tiny.same(found[0], reference[0]), "the last weights, optimiser or random numbers"
    assert tiny.same(found[1], reference[1]), "the best weights"
    assert found[2] == reference[2], "history, scores or configuration"


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """What a run leaves that nobody disturbs, and how long one takes."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    process = start(folder)
    began = time.perf_counter()
    assert finish(process) == 0
    return state(folder), time.perf_counter() - began


def test_the_reference_is_worth_comparing_with(reference):
    (last, best, (meta, _, run)), _ = reference
    assert meta["epoch"] == EPOCHS and run["history"]["test"]["mae"] > 0
    assert 1 < run["history"]["best_epoch"] < EPOCHS
    weights = checkpoint.select(last, "model")
    assert not tiny.same(weights, checkpoint.select(best, "model"))
    assert tiny.same(checkpoint.select(last, "best"), checkpoint.select(best, "model"))


@pytest.mark.parametrize("stage", ["before", "half", "whole"])
def test_killed_within_a_save_again_and_again(tmp_path, reference, stage):
    folder, kills = tmp_path / "run", 0
    while (code := finish(start(folder, stage, kills + 1))) != 0:
        assert code == -signal.SIGKILL
        loadable(folder)
        kills += 1  # the next attempt gets one write further
        assert kills < 20
    assert kills >= 3
    assert_same(folder, reference[0])


@pytest.mark.parametrize("number", range(1, 7))  # best, last, best, last, last, run.json
def test_killed_after_a_save_and_resumed(tmp_path, reference, number):
    folder = tmp_path / "run"
    assert finish(start(folder, "after", number)) == -signal.SIGKILL
    assert loadable(folder)
    assert finish(start(folder)) == 0
    assert_same(folder, reference[0])


@pytest.mark.parametrize("seed", [0, 1])
def test_killed_at_random_moments(tmp_path, reference, seed):
    rng, folder = random.Random(seed), tmp_path / "run"
    whole, duration = reference
    for _ in range(3):
        process = start(folder)
        time.sleep(rng.uniform(0, 0.7 * duration))
        process.kill()
        if finish(process) == 0:
            break
        loadable(folder)
    assert finish(start(folder)) == 0
    assert_same(folder, whole)


def interrupted_after(steps, monkeypatch):
    """Press Ctrl-C in the middle of the training step with that number."""
    step, count = Trainer._train_step, 0

    def train_step(self, *args):
        nonlocal count
        count += 1
        if count == steps:
            os.kill(os.getpid(), signal.SIGINT)
        step(self, *args)

    monkeypatch.setattr(Trainer, "_train_step", train_step)


@pytest.mark.parametrize("steps", [1, 3, 5])  # three steps an epoch
def test_ctrl_c_saves_and_the_resumed_run_is_the_same(tmp_path, monkeypatch, reference, steps):
    before = signal.getsignal(signal.SIGINT)
    interrupted_after(steps, monkeypatch)
    with pytest.raises(Interrupted) as caught:
        trainer(tmp_path / "run").fit(tiny.splits())
    epoch, step = divmod(steps - 1, 3)
    assert f"stopped in epoch {epoch + 1} at step {step + 1}, saved in" in str(caught.value)
    assert signal.getsignal(signal.SIGINT) is before
    monkeypatch.undo()
    meta = checkpoint.load(tmp_path / "run" / "last.safetensors")[1]
    assert (meta["epoch"], meta["step"]) == (epoch, step + 1)
    net = trainer(tmp_path / "run")
    history = net.fit(tiny.splits(), resume=True)
    assert history.epochs[epoch]["train"].keys() >= {"task", "margin", "total"}
    assert_same(tmp_path / "run", reference[0])
    assert tiny.same(net.model.state_dict(), checkpoint.select(reference[0][1], "model"))


@pytest.mark.parametrize("steps", [1, 2, 3])  # two steps an epoch, and two clips left over
def test_an_interrupted_released_training_resumes_the_same(tmp_path, monkeypatch, steps):
    options = {
        "epochs": None, "patience": 2, "accumulate_by": "sum", "drop_incomplete": True,
        "clip": "value", "clip_at": 0.1, "clip_each_batch": True, "test_each_epoch": True,
    }  # fmt: skip
    whole = trainer(tmp_path / "whole", **options).fit(tiny.splits())
    assert len(whole.epochs) > 2 and all("test" in row for row in whole.epochs)
    interrupted_after(steps, monkeypatch)
    with pytest.raises(Interrupted, match=f"epoch {(steps + 1) // 2} at step {2 - steps % 2},"):
        trainer(tmp_path / "run", **options).fit(tiny.splits())
    monkeypatch.undo()
    trainer(tmp_path / "run", **options).fit(tiny.splits(), resume=True)
    assert_same(tmp_path / "run", state(tmp_path / "whole"))


def test_a_second_ctrl_c_stops_at_once(tmp_path, monkeypatch):
    def train_step(self, *args):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        raise AssertionError("still running")

    monkeypatch.setattr(Trainer, "_train_step", train_step)
    with pytest.raises(KeyboardInterrupt):
        trainer(tmp_path / "run").fit(tiny.splits())


def test_ctrl_c_at_the_command_line_saves_and_exits_with_130(tmp_path):
    out = tmp_path / "out"
    words = [
        sys.executable, "-m", "dmd", "train", "--data", "synthetic", "--preset", "tiny",
        "--output", str(out), "--train", "epochs=100000", "device=cpu", "patience=None",
    ]  # fmt: skip
    process = subprocess.Popen(
        words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        first = process.stderr.readline()  # the first epoch is over: training is under way
        process.send_signal(signal.SIGINT)
        rest, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    *epochs, message = [first, *errors.splitlines()]
    assert process.returncode == 130 and rest == ""
    assert all(line.startswith("epoch ") for line in epochs)
    assert message.startswith("dmd: stopped in epoch ")
    assert message.endswith(f"saved in {out}: --resume goes on")
    meta = checkpoint.load(out / "last.safetensors")[1]
    assert message.startswith(f"dmd: stopped in epoch {meta['epoch'] + 1} at step {meta['step']},")


# Resuming what can't be resumed, or need not be


@pytest.fixture
def half(tmp_path):
    """The folder of a run of two epochs."""
    trainer(tmp_path / "run", epochs=2).fit(tiny.splits())
    return tmp_path / "run"


def test_more_epochs_go_on_as_one_long_run(half, reference):
    trainer(half).fit(tiny.splits(), resume=True)
    last, best, (meta, _, run) = state(half)
    assert tiny.same(last, reference[0][0]) and tiny.same(best, reference[0][1])
    assert [meta, run] == [*reference[0][2]][::2]


@pytest.mark.parametrize(
    ("options", "key"),
    [
        ({"batch_size": 4}, "batch_size=3, this run has 4"),
        ({"learning_rate": 0.5}, "learning_rate=0.04, this run has 0.5"),
        ({"seed": 5}, "seed=0, this run has 5"),
        ({"loss": {"alpha": 0.5}}, "loss.alpha=0.15, this run has 0.5"),
        ({"patience": None}, "patience=10, this run has None"),
    ],
)
def test_another_configuration_is_refused_by_key_and_values(half, options, key):
    content = (half / "last.safetensors").read_bytes()
    with pytest.raises(ValueError) as error:
        trainer(half, **options).fit(tiny.splits(), resume=True)
    path = half / "last.safetensors"
    assert str(error.value) == f"{path} can't be resumed: its train config has {key}"
    assert path.read_bytes() == content


def test_another_model_is_refused(half):
    other = Trainer(tiny.model(pooling="last"), trainer(half).config, half)
    with pytest.raises(ValueError, match="model config has pooling='mean', this run has 'last'"):
        other.fit(tiny.splits(), resume=True)


def test_a_cosine_schedule_cannot_be_made_longer(tmp_path):
    trainer(tmp_path, scheduler="cosine", epochs=2).fit(tiny.splits())
    with pytest.raises(ValueError, match="epochs=2, this run has 3"):
        trainer(tmp_path, scheduler="cosine", epochs=3).fit(tiny.splits(), resume=True)


def test_other_data_are_refused(tmp_path):
    first = tiny.splits(name="one", options={"context": 2, "root": "here"})
    trainer(tmp_path, epochs=1).fit(first)

    def refused(match, **options):
        with pytest.raises(ValueError, match=match):
            trainer(tmp_path, epochs=2).fit(tiny.splits(**options), resume=True)

    options = {"context": 3, "root": "here"}
    refused("dataset has name='one', this run has 'two'", seed=1, name="two", options=options)
    refused("dataset has options.context=2, this run has 3", seed=1, name="one", options=options)
    refused("dataset has fingerprint=", seed=1, name="one", options=first.options)
    # the same data from another folder are the same data
    moved = tiny.splits(name="one", options={"context": 2, "root": "there"})
    trainer(tmp_path, epochs=2).fit(moved, resume=True)


def test_one_changed_feature_is_other_data(half):
    data = tiny.splits()
    data.test.clips.acoustic[0, 0, 0] += 1e-3
    with pytest.raises(ValueError, match="dataset has fingerprint="):
        trainer(half).fit(data, resume=True)


def test_a_finished_run_only_reports(half, monkeypatch):
    before = {path.name: path.read_bytes() for path in half.iterdir()}
    monkeypatch.setattr(Trainer, "_train_step", lambda *_: pytest.fail("trained again"))
    time.sleep(1)  # another second, another date
    runner = trainer(half, epochs=2)
    history = runner.fit(tiny.splits(), resume=True)
    assert {path.name: path.read_bytes() for path in half.iterdir()} == before
    assert history.test == json.loads(before["run.json"])["history"]["test"]
    assert tiny.same(runner.model.state_dict(), load_model(half)[0].state_dict())


def test_an_early_stopped_run_is_finished(tmp_path, monkeypatch):
    options = {"epochs": 40, "patience": 1, "learning_rate": 0.1}
    history = trainer(tmp_path, **options).fit(tiny.splits())
    assert len(history.epochs) < 40
    again = trainer(tmp_path, **options).fit(tiny.splits(), resume=True)
    assert again == history


def test_there_has_to_be_something_to_resume(tmp_path, half):
    with pytest.raises(FileNotFoundError, match="holds no run to resume"):
        trainer(tmp_path / "none").fit(tiny.splits(), resume=True)
    assert not (tmp_path / "none").exists()
    with pytest.raises(ValueError, match="needs the output folder"):
        trainer(None).fit(tiny.splits(), resume=True)
    with pytest.raises(ValueError, match="already holds a run"):
        trainer(half).fit(tiny.splits())
    (half / "last.safetensors").write_bytes(b"rubbish")
    with pytest.raises(ValueError, match=r"last\.safetensors is damaged"):
        trainer(half).fit(tiny.splits(), resume=True)
