"""Several processes train one model as one process would, and end together."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import distributed_runs as runs
import pytest
import torch
from torch import distributed as dist

from dmd import checkpoint, cli, distributed, load_model, objective

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or not dist.is_gloo_available(),
    reason="the processes of these tests talk by gloo and are ended by signals",
)
ROOT = Path(__file__).parents[1]
WORKER = str(ROOT / "tests" / "distributed_runs.py")
ENVIRONMENT = {
    **{key: x for key, x in os.environ.items() if key not in ("RANK", "WORLD_SIZE")},
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
}
SAME = {"rel": 1e-6, "abs": 1e-6}


def torchrun(*words):
    """Start two processes; what they print comes through pipes."""
    start = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    return subprocess.Popen(
        [sys.executable, *start, *map(str, words)],
        cwd=ROOT, env=ENVIRONMENT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def finish(process):
    """Exit code, standard output and standard error; nothing is left running."""
    try:
        output, errors = process.communicate(timeout=120)
    finally:
        process.kill()
    return process.returncode, output, errors


def state(folder):
    """What a run leaves: tensors of its last checkpoint, and its history without times."""
    tensors, meta = checkpoint.load(folder / "last.safetensors")
    history = json.loads((folder / "run.json").read_text())["history"]
    history["epochs"] = [{k: v for k, v in x.items() if k != "seconds"} for x in history["epochs"]]
    return tensors, meta, history


def flat(data):
    """Nested values by their path, for approximate comparison."""
    if not isinstance(data, dict | list):
        return {"": data}
    items = data.items() if isinstance(data, dict) else enumerate(data)
    return {f"{key}/{path}": x for key, value in items for path, x in flat(value).items()}


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """A folder with a run of which one of two processes was killed, and what torchrun said."""
    folder = tmp_path_factory.mktemp("killed")
    return folder, finish(torchrun(WORKER, "killed", folder))


@pytest.fixture(scope="module")
def two(killed, tmp_path_factory):
    """What both processes of a pair found in every case, their folder and what they printed."""
    folder = tmp_path_factory.mktemp("two")
    shutil.copytree(killed[0] / "killed", folder / "killed")
    code, output, errors = finish(torchrun(WORKER, "compare", folder))
    assert code == 0, errors
    return [torch.load(folder / f"rank{n}.pt") for n in range(2)], folder, (output, errors)


@pytest.fixture(scope="module")
def one():
    """The same cases in this process."""
    return {name: runs.run(name) for name in [*runs.CASES, "released"]}


EXACT = [name for name in [*runs.CASES, "released"] if name not in ("rank", "dropout")]


@pytest.mark.parametrize("name", EXACT)
def test_two_processes_train_as_one_does(one, two, name):
    alone, pair = one[name], two[0][0][name]
    assert len(alone["gradients"]) == len(pair["gradients"]) > 1
    assert alone["gradients"][0].abs().max() > 1e-3
    for ours, theirs in zip(alone["gradients"], pair["gradients"], strict=True):
        torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-6)
    for part in ("epochs", "test"):
        assert flat(pair[part]) == pytest.approx(flat(alone[part]), **SAME, nan_ok=True)
    assert pair["best"] == alone["best"]


@pytest.mark.parametrize("name", [*runs.CASES, "released"])
def test_both_processes_end_with_the_same(two, name):
    first, second = (rank[name] for rank in two[0])
    assert first["epochs"] == second["epochs"] and first["test"] == second["test"]
    for part in ("gradients", "weights"):
        values = [list(x[part].values() if part == "weights" else x[part]) for x in (first, second)]
        assert all(torch.equal(a, b) for a, b in zip(*values, strict=True))


def test_every_batch_is_shared_in_the_order_of_one_process(one, two):
    batches = one["paper"]["clips"]
    assert [len(batch) for batch in batches[:4]] == [4, 4, 4, 1]
    shares = zip(two[0][0]["paper"]["clips"], two[0][1]["paper"]["clips"], strict=True)
    for whole, (first, second) in zip(batches, shares, strict=True):
        # a process without a clip computes with one, which does not count
        assert whole == (first + second if len(whole) > 1 else first) and second


def test_dropout_differs_between_processes_and_the_first_draws_as_one_alone(one, two):
    first, second = (rank["dropout"]["random"] for rank in two[0])
    assert first[0] == one["dropout"]["random"][0]
    assert not {*first} & {*second}


def test_the_margin_over_each_rank_is_the_mean_by_clips_and_no_other_term_changes(one, two):
    model, config, data = runs.case("rank")  # one step, of 7 and 6 clips
    first, second = (rank["rank"]["clips"][0] for rank in two[0])

    def terms(clips):
        return objective(model(data.train[clips]), data.train[clips].label, config.loss).unweighted

    whole = terms(first + second)
    expected = (7 * terms(first)["margin"] + 6 * terms(second)["margin"]) / 13
    alone, pair = (dict(x["rank"]["epochs"][0]["train"]) for x in (one, two[0][0]))
    assert alone["margin"] == pytest.approx(whole["margin"].item(), rel=1e-6)  # one rank has all
    assert pair["margin"] == pytest.approx(expected.item(), rel=1e-6)
    assert pair["margin"] != pytest.approx(alone["margin"], rel=1e-3)
    for values in (alone, pair):
        del values["margin"], values["total"]
    assert pair == pytest.approx(alone, rel=1e-6, abs=1e-7)
    # and so does the gradient: it parts from that of one process by the gradients of the two
    weight = config.loss.lambda1 * config.loss.gamma
    gradients = torch.autograd.grad(
        weight * (expected - whole["margin"]), list(model.parameters()), materialize_grads=True
    )
    difference = torch.cat([x.flatten() for x in gradients])
    assert difference.abs().max() > 1e-4
    found = two[0][0]["rank"]["gradients"][0] - one["rank"]["gradients"][0]
    torch.testing.assert_close(found, difference, rtol=1e-3, atol=1e-6)


def test_early_stopping_is_agreed(one, two):
    epochs = {len(x["patience"]["epochs"]) for x in (one, *two[0])}
    assert len(epochs) == 1 and epochs < {*range(2, 9)}


def test_one_process_writes_and_prints(two):
    _, folder, (output, _) = two
    for name in [*runs.CASES, "released"]:
        names = sorted(path.name for path in (folder / "out" / name).iterdir())
        assert names == ["best.safetensors", "last.safetensors", "run.json"]
    assert json.loads(output)["output"] == str(folder / "killed")  # once, for it is whole JSON


def test_a_batch_that_is_too_small_is_refused_in_one_sentence(two):
    assert {rank["refusal"] for rank in two[0]} == {
        "batch_size=1, which the processes share, leaves some of the 2 without a clip: raise it, "
        "or start fewer"
    }


# Ends before the end


def test_one_killed_process_ends_all_and_leaves_a_whole_checkpoint(killed):
    folder, (code, output, errors) = killed
    assert code != 0 and output == ""
    assert "Signal 9 (SIGKILL)" in errors
    names = {path.name for path in (folder / "killed").iterdir()}
    assert names == {"last.safetensors", "best.safetensors"}
    model, meta = load_model(folder / "killed" / "last.safetensors")
    assert (meta["epoch"], meta["step"]) == (1, 0) and not model.training


def test_a_killed_run_goes_on_with_one_process_or_with_two(killed, two, tmp_path, capsys):
    shutil.copytree(killed[0] / "killed", tmp_path / "one")
    assert cli.main(runs.command(tmp_path / "one", "--resume")) == 0
    assert cli.main(runs.command(tmp_path / "whole")) == 0
    capsys.readouterr()
    whole, meta, history = state(tmp_path / "whole")
    assert meta["epoch"] == 3
    for folder in (tmp_path / "one", two[1] / "killed"):
        tensors, found, resumed = state(folder)
        assert flat(resumed) == pytest.approx(flat(history), **SAME, nan_ok=True)
        assert found.keys() == meta.keys() and tensors.keys() == whole.keys()
        assert found["train_config"] == meta["train_config"]
        for key in tensors:
            if not key.startswith("random"):
                torch.testing.assert_close(tensors[key], whole[key], rtol=1e-4, atol=1e-5)


def test_ctrl_c_saves_once_and_ends_all(tmp_path):
    words = runs.command(tmp_path / "run", epochs=100_000)
    words.remove("--quiet")
    process = torchrun("-m", "dmd", *words, "patience=None")
    try:
        first = process.stderr.readline()
        process.send_signal(signal.SIGINT)
    finally:
        code, output, errors = finish(process)
    assert first.startswith("epoch 1/") and code != 0 and output == ""
    said = [line for line in errors.splitlines() if line.startswith("dmd: ")]
    meta = checkpoint.load(tmp_path / "run" / "last.safetensors")[1]
    where = f"stopped in epoch {meta['epoch'] + 1} at step {meta['step']}"
    assert said == [f"dmd: {where}, saved in {tmp_path / 'run'}: --resume goes on"]


def test_the_others_say_why_they_stop_and_how_to_go_on(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    processes = [
        subprocess.Popen(
            [sys.executable, WORKER, "killed", str(tmp_path)],
            env={**ENVIRONMENT, **address, "RANK": str(rank), "WORLD_SIZE": "2"},
            cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )
        for rank in range(2)
    ]  # fmt: skip
    (code, output, errors), (other, *_) = map(finish, processes)
    assert other == -signal.SIGKILL
    assert code == 2 and output == ""
    assert errors.splitlines()[-1] == (
        "dmd: another process of this training has ended, so it stops: --resume goes on from the "
        "last checkpoint, with any number of processes"
    )
    assert "Traceback" not in errors


# One process at a time, as torchrun would start it


@pytest.fixture
def second_of_two(monkeypatch):
    """This process is told that it is rank 1 of 2; returns the pauses that it makes."""
    pauses = []
    for key in ("RANK", "LOCAL_RANK"):
        monkeypatch.setenv(key, "1")
    for key in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.setenv(key, "2")
    monkeypatch.setattr(distributed.time, "sleep", pauses.append)
    return pauses


def test_without_torchrun_there_is_one(monkeypatch):
    for key in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(key, raising=False)
    assert (distributed.rank(), distributed.world_size(), distributed.is_main()) == (0, 1, True)
    monkeypatch.setenv("WORLD_SIZE", "4")  # of something else: there is no rank
    assert distributed.world_size() == 1


def test_who_is_who(second_of_two):
    assert (distributed.rank(), distributed.world_size(), distributed.is_main()) == (1, 2, False)
    assert distributed.own_device("cpu") == torch.device("cpu")


@pytest.mark.parametrize(
    ("name", "gpus", "found"),
    [
        ("cuda", 2, torch.device("cuda", 1)),
        ("auto", 2, torch.device("cuda", 1)),
        ("cuda:0", 2, "device='cuda:0' would be one for all 2 processes"),
        ("mps", 2, "device='mps' would be one for all 2 processes"),
        ("cuda", 1, "torchrun started 2 processes here, but there are 1 GPUs"),
    ],
)
def test_every_process_has_a_gpu_of_its_own(second_of_two, monkeypatch, name, gpus, found):
    resolved = torch.device("cuda" if name == "auto" else name)
    monkeypatch.setattr(distributed, "find_device", lambda _: resolved)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    if isinstance(found, str):
        with pytest.raises(ValueError, match=found):
            distributed.own_device(name)
    else:
        assert distributed.own_device(name) == found


def test_the_main_process_complains_first_and_the_others_after_a_pause(
    second_of_two, monkeypatch, capsys
):
    words = ["train", "--data", "nowhere", "--output", "out"]
    assert cli.main(words) == 2
    assert len(second_of_two) == 1
    assert capsys.readouterr().err.startswith("dmd: process 1: unknown dataset 'nowhere'")
    monkeypatch.setenv("RANK", "0")
    assert cli.main(words) == 2
    assert len(second_of_two) == 1
    assert capsys.readouterr().err.startswith("dmd: unknown dataset 'nowhere'")


def test_other_commands_are_for_one_process(second_of_two, monkeypatch, capsys):
    monkeypatch.setenv("RANK", "0")
    assert cli.main(["data", "inspect", "synthetic"]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err == "dmd: only train takes several processes: call it without torchrun\n"
