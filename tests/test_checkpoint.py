"""Checkpoints: what goes in comes out, and nothing else gets in."""

import json
import math
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy
import pytest
import safetensors.torch
import tiny_runs as tiny
import torch

import dmd
from dmd import DMD, ModelConfig, Trainer, checkpoint

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The output folder of a run, and the trained model."""
    net, folder = tiny.model(), tmp_path_factory.mktemp("runs") / "finished"
    Trainer(net, tiny.config(), folder).fit(tiny.splits())
    return folder, net


def copy(finished, tmp_path, name="best.safetensors"):
    path = tmp_path / name
    path.write_bytes((finished[0] / name).read_bytes())
    return path


def one_sentence(error, *parts):
    text = str(error.value)
    assert "\n" not in text and all(str(part) in text for part in parts), text
    return True


# Round trips


def test_tensors_and_meta_come_back_bitwise(tmp_path):
    tensors = {
        "a/x": torch.tensor([math.nan, -0.0, math.inf, 1e-45]),
        "a/half": torch.randn(3).bfloat16(),
        "b/view": torch.arange(12.0).reshape(3, 4).T[1:],  # not contiguous
        "b/empty": torch.zeros(0, 2),
        "scalar": torch.tensor(3),
        "random": torch.get_rng_state(),
    }
    tensors["shared"] = tensors["b/view"]
    meta = {"score": -math.inf, "nan": math.nan, "text": 'ü "\n', "list": [1, 2.5, None, True]}
    checkpoint.save(tmp_path / "x", tensors, meta)
    found, found_meta = checkpoint.load(tmp_path / "x")
    assert found.keys() == tensors.keys()
    for name, x in tensors.items():
        assert found[name].dtype == x.dtype and found[name].shape == x.shape
        assert torch.equal(torch.signbit(found[name]), torch.signbit(x))
        torch.testing.assert_close(found[name], x, rtol=0, atol=0, equal_nan=True)
    assert math.isnan(found_meta.pop("nan")) and math.isnan(meta.pop("nan"))
    assert found_meta == meta


def test_meta_may_hold_paths(tmp_path):
    checkpoint.save(tmp_path / "x", {}, {"options": {"path": Path("some") / "file"}})
    assert checkpoint.load(tmp_path / "x")[1] == {"options": {"path": str(Path("some/file"))}}


def test_names_are_put_and_selected():
    a, b = {"x": torch.tensor(1), "y/z": torch.tensor(2)}, {"x": torch.tensor(3)}
    both = checkpoint.put("a", a) | checkpoint.put("ab", b)
    assert checkpoint.select(both, "a") == a and checkpoint.select(both, "ab") == b


def test_training_state_goes_on_as_if_never_interrupted(tmp_path):
    device = torch.device("cpu")

    def parts(weight):
        optimiser = torch.optim.Adam([weight], lr=0.1)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, 9)
        return optimiser, schedule, torch.amp.GradScaler("cpu", init_scale=64.0, growth_interval=2)

    def go_on(weight, optimiser, schedule, scaler):
        for _ in range(3):
            optimiser.zero_grad()
            scaler.scale((weight * torch.randn(5)).square().sum()).backward()
            scaler.step(optimiser)
            scaler.update()
            schedule.step()
        return weight.detach().clone(), optimiser.param_groups[0]["lr"], scaler.get_scale()

    torch.manual_seed(3)
    weight = torch.ones(5, requires_grad=True)
    kept = parts(weight)
    go_on(weight, *kept)
    checkpoint.save(tmp_path / "x", *checkpoint.training_state(*kept, device))
    middle = weight.detach().clone().requires_grad_()
    expected = go_on(weight, *kept)
    torch.manual_seed(99)
    fresh = parts(middle)
    checkpoint.restore_training_state(*fresh, device, *checkpoint.load(tmp_path / "x"))
    found = go_on(middle, *fresh)
    assert torch.equal(found[0], expected[0]) and found[1:] == expected[1:]


@pytest.mark.parametrize("convert", [str, Path])
def test_load_model_takes_a_file_or_the_folder_of_a_run(finished, convert):
    folder, net = finished
    x = tiny.splits().test.clips
    for path in (folder, folder / "best.safetensors"):
        found, meta = dmd.load_model(convert(path))
        assert tiny.same(found.state_dict(), net.state_dict()) and found.config == net.config
        assert not found.training and torch.equal(found(x).prediction, net(x).prediction)
        assert meta["model_config"] == json.loads(net.config.to_json())
        assert meta["dataset"]["fingerprint"] == tiny.splits().fingerprint()
    last, meta = dmd.load_model(folder / "last.safetensors")
    assert meta["epoch"] == 3 and last.config == net.config


def test_to_json_is_strict_and_plain():
    data = {"nan": math.nan, "inf": [math.inf, (-math.inf, 1.5)], 3: {"x": None}, "p": Path("a")}
    assert json.loads(checkpoint.to_json(data), parse_constant=pytest.fail) == {
        "nan": None, "inf": [None, [None, 1.5]], "3": {"x": None}, "p": "a",
    }  # fmt: skip


# What is no checkpoint


def damage(content):
    yield "empty", b""
    yield "short", content[:7]
    yield "header only", content[: 8 + int.from_bytes(content[:8], "little")]
    yield "truncated", content[:-1]
    yield "longer", content + b"\0"
    yield "huge header", (2**62).to_bytes(8, "little") + content[8:]
    yield "no json", content[:8] + b"?" + content[9:]
    yield "text", b"this is a text" * 99
    yield "pickle", b"\x80\x04cos\nsystem\n(S'true'\ntR."


def test_damaged_files_are_refused_by_name(finished, tmp_path):
    content = (finished[0] / "best.safetensors").read_bytes()
    for what, broken in damage(content):
        path = tmp_path / what
        path.write_bytes(broken)
        with pytest.raises(ValueError) as error:
            dmd.load_model(path)
        assert one_sentence(error, path, "damaged, or not a checkpoint of dmd")


def test_other_safetensors_files_are_refused_by_name(tmp_path):
    path = tmp_path / "other.safetensors"
    for metadata in (None, {"format": "pt"}):
        safetensors.torch.save_file({"x": torch.zeros(2)}, path, metadata)
        with pytest.raises(ValueError) as error:
            dmd.load_model(path)
        assert one_sentence(error, path, "not a checkpoint of dmd")
    for metadata in ({"format": checkpoint.FORMAT}, {"format": checkpoint.FORMAT, "meta": "{"}):
        safetensors.torch.save_file({"x": torch.zeros(2)}, path, metadata)
        with pytest.raises(ValueError) as error:
            dmd.load_model(path)
        assert one_sentence(error, path, "damaged")


def test_missing_files_are_named(tmp_path):
    for path, named in (
        (tmp_path / "nothing", tmp_path / "nothing"),
        (tmp_path, tmp_path / "best.safetensors"),
    ):
        with pytest.raises(FileNotFoundError) as error:
            dmd.load_model(path)
        assert one_sentence(error, named, "train")


@pytest.mark.parametrize(
    "change", [{"dim": 8}, {"layers": 2}, {"crossmodal_attention": False}, {"widths": [4, 3, 9]}]
)
def test_weights_that_do_not_fit_their_configuration_are_refused(finished, tmp_path, change):
    path = copy(finished, tmp_path)
    tensors, meta = checkpoint.load(path)
    meta["model_config"] |= change
    checkpoint.save(path, tensors, meta)
    with pytest.raises(ValueError) as error:
        dmd.load_model(path)
    assert one_sentence(error, path, "do not fit")


@pytest.mark.parametrize(
    ("change", "named"),
    [({"dimm": 8}, "'dim'"), ({"dim": "8"}, "dim='8'"), ({"heads": 3}, "heads=3")],
)
def test_a_configuration_that_cannot_be_built_is_refused(finished, tmp_path, change, named):
    path = copy(finished, tmp_path)
    tensors, meta = checkpoint.load(path)
    meta["model_config"] |= change
    checkpoint.save(path, tensors, meta)
    with pytest.raises(ValueError) as error:
        dmd.load_model(path)
    assert one_sentence(error, path, named)


def test_loading_runs_no_pickle(finished, monkeypatch):
    def never(*args, **kwargs):
        raise AssertionError("a checkpoint was unpickled")

    for name in ("load", "loads", "Unpickler"):
        monkeypatch.setattr(f"pickle.{name}", never)
    monkeypatch.setattr(torch, "load", never)
    dmd.load_model(finished[0])


# Writing


class Full:
    """A file of a disk that is full."""

    def __init__(self, file):
        self.file = file

    def __enter__(self):
        return self

    def __exit__(self, *args):
        self.file.close()

    def write(self, content):
        self.file.write(content[: len(content) // 2])
        raise OSError(28, "No space left on device")


def full_disk(monkeypatch):
    monkeypatch.setattr(checkpoint, "open", lambda *a: Full(open(*a)), raising=False)  # noqa: SIM115


def no_replace(monkeypatch):
    def replace(a, b):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "replace", replace)


def no_fsync(monkeypatch):
    def fsync(number):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "fsync", fsync)


@pytest.mark.parametrize(
    ("fail", "reason"),
    [(full_disk, "No space left"), (no_replace, "Permission denied"), (no_fsync, "Input/output")],
)
def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(
    monkeypatch, tmp_path, fail, reason
):
    path = tmp_path / "x.safetensors"
    checkpoint.save(path, {"x": torch.tensor(1)}, {})
    fail(monkeypatch)
    with pytest.raises(OSError) as error:
        checkpoint.save(path, {"x": torch.tensor(2)}, {})
    assert one_sentence(error, f"can't write {path}: ", reason)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    assert checkpoint.load(path)[0] == {"x": torch.tensor(1)}


def test_a_full_disk_stops_training_and_keeps_the_last_checkpoint(monkeypatch, tmp_path):
    writes = []
    real = checkpoint.write_atomically

    def write(path, content):
        writes.append(path.name)
        if len(writes) == 4:
            full_disk(monkeypatch)
        real(path, content)

    monkeypatch.setattr(checkpoint, "write_atomically", write)
    with pytest.raises(OSError, match=r"can't write .*: No space left on device"):
        Trainer(tiny.model(), tiny.config(epochs=9), tmp_path).fit(tiny.splits())
    assert "last.safetensors" in writes[:3]
    assert checkpoint.load(tmp_path / "last.safetensors")[1]["epoch"] >= 1
    dmd.load_model(tmp_path)


def test_what_a_killed_writer_left_is_overwritten(tmp_path, monkeypatch):
    path = tmp_path / "x"
    left = []
    monkeypatch.setattr(os, "replace", lambda a, b: left.append(Path(a).name))
    monkeypatch.setattr(Path, "unlink", lambda *a, **k: None)  # as when the process is gone
    checkpoint.write_atomically(path, b"old" * 99)
    monkeypatch.undo()
    assert [p.name for p in tmp_path.iterdir()] == left
    checkpoint.write_atomically(path, b"new")
    assert [p.name for p in tmp_path.iterdir()] == ["x"] and path.read_bytes() == b"new"


def test_the_old_file_is_there_until_the_new_one_is_whole(monkeypatch, tmp_path):
    path = tmp_path / "x"
    path.write_bytes(b"old")
    seen = []
    replace = os.replace

    def spy(a, b):
        seen.append((path.read_bytes(), Path(a).read_bytes(), Path(a).parent))
        replace(a, b)

    monkeypatch.setattr(os, "replace", spy)
    checkpoint.write_atomically(path, b"new")
    assert seen == [(b"old", b"new", tmp_path)] and path.read_bytes() == b"new"


@pytest.mark.parametrize("resume", [False, True])
def test_output_folders_that_cannot_be_written_are_refused_and_left_alone(tmp_path, resume):
    file = tmp_path / "file"
    file.write_text("x")
    places = [file, file / "below" / "it"]
    if Path("/proc/self").exists():
        places.append(Path("/proc/dmd"))
    for place in places:
        with pytest.raises(OSError) as error:
            checkpoint.check_output(place, resume)
        assert one_sentence(error, place)
    assert file.read_text() == "x" and [*tmp_path.iterdir()] == [file]


def test_checking_an_output_folder_leaves_nothing(finished, tmp_path):
    checkpoint.check_output(tmp_path / "a" / "b", resume=False)
    checkpoint.check_output(tmp_path, resume=False)
    assert not [*tmp_path.iterdir()]
    before = sorted(finished[0].iterdir())
    checkpoint.check_output(finished[0], resume=True)
    with pytest.raises(ValueError, match="already holds a run: resume it, or choose another"):
        checkpoint.check_output(finished[0], resume=False)
    with pytest.raises(FileNotFoundError, match="holds no run to resume"):
        checkpoint.check_output(tmp_path, resume=True)
    assert sorted(finished[0].iterdir()) == before


# What a checkpoint says of itself


def git(*words):
    return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True).stdout.strip()


def test_provenance_says_what_ran_where(finished):
    last = checkpoint.load(finished[0] / "last.safetensors")[1]["provenance"]
    run = json.loads((finished[0] / "run.json").read_text())
    assert run["provenance"] == last == dmd.load_model(finished[0])[1]["provenance"]
    assert last["torch"] == torch.__version__ and last["numpy"] == numpy.__version__
    assert last["python"] == sys.version.split()[0]
    assert last["machine"].endswith(f", {os.cpu_count()} cores")
    assert last["threads"] == torch.get_num_threads()
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", last["date"])
    assert (last["gpu"] is None) == (not torch.cuda.is_available())
    assert shlex.split(last["command"]) == ["python", *sys.orig_argv[1:]]
    head = git("rev-parse", "HEAD")
    if head:
        assert checkpoint.git_commit().removesuffix("-dirty") == git("rev-parse", "HEAD")


def test_the_command_is_quoted_as_it_was_typed(monkeypatch):
    words = ["/somewhere/python3", "-m", "dmd", "train", "--output", "a folder"]
    monkeypatch.setattr(sys, "orig_argv", words)
    assert checkpoint.provenance()["command"] == "python -m dmd train --output 'a folder'"


def test_without_git_the_commit_is_unknown(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert checkpoint.git_commit() == "unknown"


def test_the_record_of_a_run_is_strict_json_that_tells_all(finished):
    text = (finished[0] / "run.json").read_text()
    run = json.loads(text, parse_constant=pytest.fail)
    assert [row["epoch"] for row in run["history"]["epochs"]] == [1, 2, 3]
    assert run["history"]["best_epoch"] in (1, 2, 3) and run["history"]["test"].keys() >= {"mae"}
    assert run["train_config"] == json.loads(tiny.config().to_json())
    assert run["dataset"]["name"] == "custom"


def test_differences_are_named_by_dotted_keys():
    there = {"a": 1, "b": {"c": 2, "d": [1, 2]}, "e": 5}
    here = {"a": 1, "b": {"c": 3, "d": [1, 2]}, "f": None}
    assert [*checkpoint.differences(there, here)] == [("b.c", 2, 3), ("e", 5, None)]
    assert not [*checkpoint.differences(there, dict(there))]


def test_the_configuration_travels_with_every_option(tmp_path):
    config = ModelConfig.preset(
        "tiny", hetero_distillation=False, pooling="last", kernels=(1, 3, 5)
    )
    net = DMD(config)
    meta = {"model_config": config.to_dict()}
    checkpoint.save(tmp_path / "x", checkpoint.put("model", net.state_dict()), meta)
    assert dmd.load_model(tmp_path / "x")[0].config == config
