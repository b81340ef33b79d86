"""The command line: what it prints and writes, and one sentence for everything that is wrong."""

import io
import json
import math
import os
import pickle
import subprocess
import sys
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest
import tiny_runs as tiny
import torch

import dmd
from dmd import (
    LossConfig,
    ModelConfig,
    TrainConfig,
    Trainer,
    checkpoint,
    cli,
    commands,
    released,
)
from dmd.data import load, mmsa

ROOT = Path(__file__).parents[1]
METRICS = ["mae", "corr", "acc2_has0", "f1_has0", "acc2_non0", "f1_non0", "acc5", "acc7"]
QUICK = ["--preset", "tiny", "--epochs", "1", "--device", "cpu", "--quiet", "--model", "dim=4"]
LOUD = [word for word in QUICK if word != "--quiet"]


def no_constants(name):
    raise AssertionError(f"{name} is not JSON")


def parse(text):
    return json.loads(text, parse_constant=no_constants)


@pytest.fixture
def run(capsys):
    """Run a command in this process: exit code, standard output, standard error."""

    def main(*words):
        capsys.readouterr()
        try:
            code = cli.main([str(word) for word in words])
        except SystemExit as stop:
            code = stop.code
        return code, *capsys.readouterr()

    return main


@pytest.fixture
def refused(run):
    """Run a command that must be refused: exit code 2 and one line, which is returned."""

    def main(*words):
        code, out, error = run(*words)
        assert (code, out) == (2, ""), (code, out, error)
        assert error.endswith("\n") and error.count("\n") == 1, error
        assert error.startswith(("dmd: ", "python -m dmd")) and "Error" not in error
        return error

    return main


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A dataset of the size of `tiny_runs` as an MMSA file."""
    path = tmp_path_factory.mktemp("data") / "clips.pkl"
    mmsa.export(tiny.splits(), path)
    return path


@pytest.fixture(scope="module")
def trained(source, tmp_path_factory):
    """The folder of a run that the command line has trained, and what the command printed."""
    out = tmp_path_factory.mktemp("runs") / "out"
    words = ["train", "--data", "mmsa", f"path={source}", "--output", str(out), *QUICK, "--json"]
    done = subprocess.run(
        [sys.executable, "-m", "dmd", *words], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return out, done


def write_clips(path, **changes):
    """An npz file of the test clips; a change of None leaves the array out."""
    clips = tiny.splits().test.clips
    arrays = {name: x.numpy() for name, x in zip(dmd.MODALITIES, clips.features, strict=True)}
    arrays |= {"lengths": clips.lengths.numpy(), "ids": np.array(clips.ids)}
    arrays = {name: x for name, x in {**arrays, **changes}.items() if x is not None}
    np.savez(path, **arrays)
    return path


# train, evaluate, predict, data


def test_train_writes_a_run_and_prints_it_as_json(trained, source):
    out, done = trained
    found = parse(done.stdout)
    assert done.stderr.startswith(f"dmd: {source} is none of the published MMSA files")
    assert done.stderr.count("\n") == 1  # a warning is one line, and nothing else is said
    assert found["output"] == str(out) and found["best_epoch"] == 1
    assert list(found["test"]) == METRICS
    saved = parse((out / "run.json").read_text())
    assert saved["history"] == {key: found[key] for key in ("epochs", "best_epoch", "test")}
    assert saved["provenance"]["command"].startswith("python -m dmd train --data mmsa path=")
    assert saved["dataset"]["options"]["path"] == str(source)
    assert (saved["train_config"]["epochs"], saved["model_config"]["dim"]) == (1, 4)
    assert saved["model_config"]["widths"] == list(tiny.WIDTHS)  # from the data


def test_the_command_trains_what_the_library_trains(trained, source):
    net = dmd.load_model(trained[0])[0]
    dmd.seed_everything(0)
    sizes = {"widths": tiny.WIDTHS, "lengths": tiny.LENGTHS}
    model = dmd.DMD(ModelConfig.preset("tiny", **sizes, dim=4))
    with warnings.catch_warnings(action="ignore"):
        splits = load("mmsa", path=source)
    Trainer(model, TrainConfig(epochs=1, device="cpu")).fit(splits)
    for name, x in model.state_dict().items():  # another process may have other threads
        torch.testing.assert_close(net.state_dict()[name], x, msg=name)


def test_options_reach_the_configurations(run, source, tmp_path):
    code, out, _ = run(
        "train", "--data", "mmsa", f"path={source}", "--output", tmp_path / "out", *QUICK,
        "--model", "kernels=1,3,5", "dim=8", "decoupling=false", "pooling=last",
        "--loss", "lambda2=0", "orthogonality=hinge",
        "--train", "epochs=7", "patience=None", "learning_rate=1e-3", "clip=value", "device=cpu",
        "--seed", "11", "--epochs", "2",
    )  # fmt: skip
    assert code == 0
    assert out.splitlines()[0].startswith("best epoch ")
    assert [line.split()[0] for line in out.splitlines()[1:]] == METRICS
    _, meta = checkpoint.load(tmp_path / "out" / "last.safetensors")
    sizes = {"widths": tiny.WIDTHS, "lengths": tiny.LENGTHS}
    assert ModelConfig.from_dict(meta["model_config"]) == ModelConfig.preset(
        "tiny", **sizes, kernels=(1, 3, 5), dim=8, decoupling=False, pooling="last"
    )
    assert TrainConfig.from_dict(meta["train_config"]) == TrainConfig(
        epochs=2, patience=None, learning_rate=1e-3, clip="value", device="cpu", seed=11,
        loss=LossConfig(lambda2=0.0, orthogonality="hinge"),
    )  # fmt: skip


def test_progress_is_a_line_an_epoch_and_resume_goes_on(run, source, tmp_path):
    words = ["train", "--data", "mmsa", f"path={source}", "--output", tmp_path / "out", *LOUD]
    code, _, error = run(*words)
    assert code == 0 and error.splitlines()[1].startswith("epoch 1/1  loss ")
    code, _, error = run(*words, "--epochs", 3, "--resume")
    assert code == 0
    assert [line.split()[1] for line in error.splitlines()[1:]] == ["2/3", "3/3"]
    code, out, error = run(*words, "--epochs", 3, "--resume")
    assert code == 0 and "best epoch" in out and len(error.splitlines()) == 1


@pytest.mark.parametrize("split", ["train", "valid", "test"])
def test_evaluate_gives_the_scores_of_the_library(run, trained, source, split):
    code, out, _ = run("evaluate", trained[0], "--split", split, "--json", "--device", "cpu")
    with warnings.catch_warnings(action="ignore"):
        data = getattr(load("mmsa", path=source), split)
    expected = dmd.evaluate(dmd.load_model(trained[0])[0], data)
    assert code == 0 and parse(out) == parse(checkpoint.to_json(expected))
    code, table, _ = run("evaluate", trained[0], "--split", split, "--data", "mmsa",
                         f"path={source}")  # fmt: skip
    assert code == 0 and table.splitlines()[0] == f"mae         {expected['mae']:.4f}"


def test_an_undefined_score_is_null_in_json(run, trained, tmp_path):
    data = tiny.splits()
    data.test.clips.label.zero_()
    mmsa.export(data, tmp_path / "zero.pkl")
    path = tmp_path / "zero.pkl"
    code, out, _ = run("evaluate", trained[0], "--data", "mmsa", f"path={path}", "--json")
    assert code == 0 and parse(out)["corr"] is None and parse(out)["acc2_non0"] is None
    code, out, _ = run("evaluate", trained[0], "--data", "mmsa", f"path={path}")
    assert code == 0 and "corr        nan" in out


def test_evaluate_warns_of_data_that_have_changed(run, trained, tmp_path, source):
    tensors, meta = checkpoint.load(trained[0] / "best.safetensors")
    changed = tiny.splits(seed=5)
    mmsa.export(changed, tmp_path / "changed.pkl")
    meta["dataset"]["options"]["path"] = str(tmp_path / "changed.pkl")
    checkpoint.save(tmp_path / "x.safetensors", tensors, meta)
    code, _, error = run("evaluate", tmp_path / "x.safetensors")
    assert code == 0 and error.splitlines()[-1].startswith("dmd: the data have changed since")
    _, _, error = run("evaluate", trained[0])
    assert "changed" not in error


@pytest.mark.parametrize("size", [1, 2, 4, 8, 9, 100])
def test_predictions_do_not_depend_on_the_batch(run, trained, tmp_path, size):
    path, out = write_clips(tmp_path / "clips.npz"), tmp_path / "new" / "out.npz"
    code, text, error = run("predict", trained[0], path, "--output", out, "--batch-size", size)
    assert code == 0 and error == ""
    net, clips = dmd.load_model(trained[0])[0], tiny.splits().test.clips
    with torch.no_grad():
        expected = net(clips)
    found = np.load(out)
    assert sorted(found) == ["hetero_edges", "homo_edges", "ids", "prediction"]
    for name, x in (
        ("prediction", expected.prediction),
        ("homo_edges", expected.homo.edges),
        ("hetero_edges", expected.hetero.edges),
    ):
        np.testing.assert_allclose(found[name], x.numpy(), rtol=1e-5, atol=1e-6)
    for name in ("homo_edges", "hetero_edges"):
        assert found[name].shape == (9, 3, 3)
        np.testing.assert_allclose(found[name].sum((1, 2)), 1, rtol=1e-5)
        assert not np.diagonal(found[name], axis1=1, axis2=2).any()
    assert found["ids"].tolist() == clips.ids
    lines = [line.split("\t") for line in text.splitlines()]
    assert [line[0] for line in lines] == clips.ids
    shown = [float(line[1]) for line in lines]
    np.testing.assert_allclose(shown, found["prediction"], atol=5.1e-4)


def test_one_clip_is_predicted_as_among_others(run, trained, tmp_path):
    clips = tiny.splits().test.clips
    alone = {name: x[3:4].numpy() for name, x in zip(dmd.MODALITIES, clips.features, strict=True)}
    path = write_clips(tmp_path / "1.npz", **alone, lengths=clips.lengths[3:4].numpy(), ids=None)
    code, out, _ = run("predict", trained[0], path, "--json")
    found = parse(out)
    assert code == 0 and list(found) == ["prediction", "homo_edges", "hetero_edges"]
    code, out, _ = run("predict", trained[0], write_clips(tmp_path / "9.npz"), "--json")
    among = parse(out)
    assert among["ids"] == clips.ids
    for name, x in found.items():
        np.testing.assert_allclose(x, among[name][3:4], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dtype", ["float64", "float16", ">f4", "int8"])
def test_clips_may_be_of_any_number_type(run, trained, tmp_path, dtype):
    clips = tiny.splits().test.clips
    arrays = {
        name: x.numpy().astype(dtype)
        for name, x in zip(dmd.MODALITIES, clips.features, strict=True)
    }
    path = write_clips(tmp_path / "x.npz", **arrays, lengths=clips.lengths.numpy().astype("uint8"))
    expected = write_clips(
        tmp_path / "y.npz", **{name: x.astype("float32") for name, x in arrays.items()}
    )
    assert run("predict", trained[0], path)[1] == run("predict", trained[0], expected)[1]


def test_what_stands_in_the_padding_does_not_count(run, trained, tmp_path):
    clips = tiny.splits().test.clips
    dirty = {
        name: np.where(mask[:, :, None], x, np.float32(math.nan))
        for name, x, mask in zip(dmd.MODALITIES, clips.features, clips.masks, strict=True)
    }
    found = run("predict", trained[0], write_clips(tmp_path / "x.npz", **dirty))
    assert found == run("predict", trained[0], write_clips(tmp_path / "y.npz"))
    assert found[0] == 0 and "nan" not in found[1]


def test_data_inspect_and_export(run, tmp_path, source):
    code, out, _ = run("data", "inspect", "synthetic", "seed=3", "lengths=7,7,7", "--json")
    assert code == 0 and parse(out)["name"] == "synthetic"
    assert parse(out)["splits"]["train"]["modalities"]["visual"]["padded"] == 7
    path = tmp_path / "again.pkl"
    code, out, _ = run("data", "export", "mmsa", f"path={source}", "--output", path)
    assert code == 0 and out == f"{path}\n"
    code, table, error = run("data", "inspect", "mmsa", f"path={path}")
    assert code == 0 and "test" in table and "acoustic" in table
    assert error.startswith(f"dmd: {path} is none of") and error.count("\n") == 1
    with warnings.catch_warnings(action="ignore"):
        assert load("mmsa", path=path).fingerprint() == load("mmsa", path=source).fingerprint()


# The published code: its preset, its checkpoints


@pytest.mark.parametrize(
    ("preset", "recipe"),
    [("paper", "paper"), ("tiny", "paper"), ("released", "released"),
     ("released_mosei", "released")],
)  # fmt: skip
def test_a_preset_takes_its_loss_and_training_along(run, monkeypatch, tmp_path, preset, recipe):
    found = []

    def fit(self, *args, **kwargs):
        found.append((self.model.config, self.config))
        raise KeyboardInterrupt

    monkeypatch.setattr(Trainer, "fit", fit)
    words = ["train", "--data", "synthetic", "size=tiny", "--output", tmp_path, "--preset", preset]
    run(*words)
    run(*words, "--model", "heads=1", "dim=4", "--loss", "alpha=0.3", "edge_regulariser=0",
        "--train", "epochs=9", "clip=none", "patience=3", "--epochs=2", "--seed=7",
        "--device=cpu")  # fmt: skip
    sizes = {"widths": (32, 12, 8), "lengths": (12, 12, 12)}  # those of the data
    loss = LossConfig.preset(recipe, alpha=0.3, edge_regulariser=0)
    assert found == [
        (ModelConfig.preset(preset, **sizes), TrainConfig.preset(recipe)),
        (
            ModelConfig.preset(preset, **sizes, heads=1, dim=4),
            TrainConfig.preset(
                recipe, epochs=2, clip="none", patience=3, seed=7, device="cpu", loss=loss
            ),
        ),
    ]
    assert (found[0][1].epochs is None) == (recipe == "released")


@pytest.mark.parametrize("none", ["none", "None", "null"])
def test_training_may_last_until_patience_ends(run, monkeypatch, tmp_path, none):
    found = []
    monkeypatch.setattr(
        Trainer, "__init__", lambda self, model, config, **more: found.append(config)
    )
    monkeypatch.setattr(Trainer, "fit", lambda *args, **more: dmd.History())
    words = ["train", "--data", "synthetic", "size=tiny", "--output", tmp_path, "--preset", "tiny"]
    code, _, _ = run(*words, "--train", f"epochs={none}", "clip=none", "scheduler=none")
    assert code == 0
    assert (found[0].epochs, found[0].clip, found[0].scheduler) == (None, "none", "none")


def test_help_lists_the_presets(run):
    text = " ".join(run("train", "--help")[1].split())
    assert f"preset of model, loss and training ({', '.join(ModelConfig.presets())})" in text


def test_the_released_preset_trains_resumes_scores_and_predicts(run, source, tmp_path):
    """Its training drops incomplete groups: the few clips here make a step of one batch."""
    out = tmp_path / "out"
    words = ["train", "--data", "mmsa", f"path={source}", "--output", out, "--preset", "released",
             "--model", "dim=4", "heads=2", "layers=1", "kernels=3,1,2", "--device", "cpu",
             "--train", "batch_size=4", "accumulate=3", "learning_rate=1e-2", "--json"]  # fmt: skip
    code, text, _ = run(*words, "--epochs", 1)
    assert code == 0 and len(parse(text)["epochs"]) == 1
    before = parse(text)["epochs"]
    code, text, _ = run(*words, "--epochs", 2, "--resume")
    assert code == 0 and parse(text)["epochs"][:1] == before and len(parse(text)["epochs"]) == 2
    code, scores, _ = run("evaluate", out, "--json", "--device", "cpu")
    assert code == 0 and parse(scores) == pytest.approx(parse(text)["test"], rel=1e-5)

    # Shorter clips are filled up with zeros, and that is what the model is then asked.
    code, text, _ = run("predict", out, write_clips(tmp_path / "clips.npz"), "--json")
    assert code == 0
    clips = tiny.splits().test.clips
    short = {"language": clips.language[:, :4].numpy(), "lengths": None}
    filled = {"language": np.pad(short["language"], ((0, 0), (0, 1), (0, 0))), "lengths": None}
    code, text, _ = run("predict", out, write_clips(tmp_path / "short.npz", **short), "--json")
    expected = run("predict", out, write_clips(tmp_path / "filled.npz", **filled), "--json")[1]
    assert code == 0 and text == expected


def published(folder, seed=3, **more):
    """A model of the published structure, and its weights as the published code would save them."""
    sizes = {"widths": tiny.WIDTHS, "lengths": tiny.LENGTHS, "kernels": (3, 2, 1), "layers": 1}
    dmd.seed_everything(seed)
    model = dmd.DMD(ModelConfig.preset("released", **{**sizes, "dim": 6, "heads": 2, **more}))
    for part, name in (("dmd", "model"), ("homo", "homo"), ("hetero", "hetero")):
        torch.save(released.to_state(model, part), folder / f"{name}.pth")
    return model.eval()


@pytest.mark.parametrize("mask", [True, False])
def test_a_published_checkpoint_is_converted(run, source, tmp_path, mask):
    model, out = published(tmp_path, causal_mask=mask), tmp_path / "new" / "out"
    words = ["released", "convert", tmp_path / "model.pth", out, "--homo", tmp_path / "homo.pth",
             "--hetero", tmp_path / "hetero.pth"]  # fmt: skip
    code, text, error = run(*words, "--model", "heads=2", f"causal_mask={mask}", "--json")
    found = parse(text)
    assert (code, error) == (0, "")
    assert [path.name for path in out.iterdir()] == ["best.safetensors"]
    assert found["output"] == str(out / "best.safetensors")
    assert (found["dim"], found["layers"], found["heads"], found["kernels"], found["widths"],
            found["lengths"], found["causal_mask"]) == (
        6, 1, 2, [3, 2, 1], list(tiny.WIDTHS), list(tiny.LENGTHS), mask)  # fmt: skip
    net, meta = dmd.load_model(out)
    assert tiny.same(net.state_dict(), model.state_dict()) and net.config == model.config
    files = {"dmd": "model.pth", "homo": "homo.pth", "hetero": "hetero.pth"}
    assert meta["converted_from"] == {part: str(tmp_path / name) for part, name in files.items()}
    assert meta["provenance"].keys() == checkpoint.provenance().keys()

    clips = tiny.splits().test.clips
    with torch.no_grad():
        expected = model(clips)
    code, text, _ = run("predict", out, write_clips(tmp_path / "clips.npz"), "--json")
    assert code == 0
    for name, x in (("prediction", expected.prediction), ("homo_edges", expected.homo.edges),
                    ("hetero_edges", expected.hetero.edges)):  # fmt: skip
        np.testing.assert_allclose(parse(text)[name], x.numpy(), rtol=1e-5, atol=1e-6)
    code, text, _ = run("evaluate", out, "--data", "mmsa", f"path={source}", "--json")
    with warnings.catch_warnings(action="ignore"):
        scores = dmd.evaluate(model, load("mmsa", path=source).test)
    assert code == 0 and parse(text) == pytest.approx(scores, rel=1e-5)


def test_without_kernels_only_the_edges_are_at_random(run, tmp_path):
    model = published(tmp_path)
    states = []
    for name in ("a", "b"):
        torch.rand(len(states) + 1)  # whatever was drawn before, the file is the same
        words = ["released", "convert", tmp_path / "model.pth", tmp_path / name]
        code, text, _ = run(*words, "--model", "heads=2")
        lines = text.splitlines()
        assert code == 0 and lines[0] == f"output      {tmp_path / name / 'best.safetensors'}"
        assert "lengths     (5, 4, 3)" in lines
        assert lines[-1].startswith("edges of homo and hetero: at random")
        states.append(dmd.load_model(tmp_path / name)[0].state_dict())
    assert tiny.same(*states)
    own = model.state_dict()
    differ = {name.split(".")[0] for name, x in own.items() if not torch.equal(x, states[0][name])}
    assert differ == {"homo", "hetero"}
    words = ["released", "convert", tmp_path / "model.pth", tmp_path / "c", "--model", "heads=2"]
    text = run(*words, "--homo", tmp_path / "homo.pth")[1]
    assert text.splitlines()[-1].startswith("edges of hetero: at random")


def test_without_options_the_published_heads_are_taken(run, refused, tmp_path):
    published(tmp_path, dim=20, heads=10)
    assert run("released", "convert", tmp_path / "model.pth", tmp_path / "out")[0] == 0
    assert dmd.load_model(tmp_path / "out")[0].config.heads == 10
    published(tmp_path)  # d = 6
    message = refused("released", "convert", tmp_path / "model.pth", tmp_path / "other")
    assert str(tmp_path / "model.pth") in message and "heads=..." in message


class Payload:
    """An object whose unpickling would make a folder."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def state_mistakes(state, folder):
    """What may stand in a file instead of a published state dict, and what is said of it."""
    weight = state["proj1.weight"]
    yield {**state, "x": Payload(folder / "ran")}, "nothing in it was run"
    yield Payload(folder / "ran"), "nothing in it was run"
    yield {"model": state, "epoch": 3}, "holds no state dict"
    yield {0: weight, **state}, "holds no state dict"
    yield [weight], "holds no state dict"
    yield {}, "'proj_l.weight' is missing"
    yield {f"model.{key}": x for key, x in state.items()}, "'proj_l.weight' is missing"
    yield {**state, "proj_l.weight": torch.zeros(6, 4)}, "'proj_l.weight' has shape (6, 4)"
    yield {**state, "proj_l.weight": torch.zeros(0, 4, 3)}, "has shape (0, 4, 3)"
    yield {k: x for k, x in state.items() if k != "proj1.weight"}, "'proj1.weight' is missing"
    yield {**state, "proj1.weight": weight[1:]}, "'proj1.weight' has shape"
    yield {**state, "proj3.weight": weight}, "'proj3.weight' has no place"
    yield {**state, "proj1.weight": weight.to_sparse()}, "'proj1.weight' is no plain tensor"
    yield {**state, "proj1.weight": weight.to("meta")}, "'proj1.weight' is no plain tensor"
    yield {key: x.long() for key, x in state.items()}, "no plain tensor of floating-point numbers"


def test_checkpoints_that_cannot_be_converted(refused, tmp_path):
    state = released.to_state(published(tmp_path))
    path, out = tmp_path / "bad.pth", tmp_path / "out"
    before = sorted([*tmp_path.iterdir(), path])
    for content, sentence in state_mistakes(state, tmp_path):
        torch.save(content, path)
        message = refused("released", "convert", path, out, "--model", "heads=2")
        assert str(path) in message and sentence in message
    words = ["released", "convert", tmp_path / "model.pth", out, "--model", "heads=2"]
    torch.save({"W_edge.bias": Payload(tmp_path / "ran")}, path)
    for kernel in ("--homo", "--hetero"):
        assert f"{path} is damaged" in refused(*words, kernel, path)
        assert f"{kernel[2:]}: the weight" in refused(*words, kernel, tmp_path / "model.pth")
    path.write_bytes((tmp_path / "model.pth").read_bytes()[:-100])
    assert f"{path} is damaged" in refused("released", "convert", path, out)
    assert sorted(tmp_path.iterdir()) == before  # no payload has run, nothing was written


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--model", "haeds=2"], "unknown ModelConfig option 'haeds': did you mean 'heads'?"),
        (["--model", "heads=4"], "dim=6 must be a multiple of heads=4"),
        (["--model", "heads=two"], "heads='two' is not of type int"),
        (["--model", "heads=2", "pooling=mean"], "pooling='mean', but the released model has"),
        (["--model", "heads=2", "layers=2"], "the config says layers=2, but the weights 1"),
        (["--model", "heads"], "expected KEY=VALUE, got 'heads'"),
        (["--homo", "no.pth"], "there is no checkpoint no.pth"),
        (["--hetreo", "x"], "unknown option '--hetreo': did you mean '--hetero'?"),
    ],
)
def test_mistakes_in_converting(refused, monkeypatch, tmp_path, words, sentence):
    published(tmp_path)
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.iterdir())
    assert sentence in refused("released", "convert", "model.pth", "out", *words)
    assert "there is no checkpoint none.pth" in refused("released", "convert", "none.pth", "out")
    assert sorted(tmp_path.iterdir()) == before


def test_converting_and_training_leave_what_is_there_alone(run, refused, trained, tmp_path):
    published(tmp_path)
    convert = ["released", "convert", tmp_path / "model.pth"]
    options, out = ["--model", "heads=2"], tmp_path / "out"
    assert run(*convert, out, *options)[0] == 0
    before = {place: place.read_bytes() for f in (out, trained[0]) for place in f.iterdir()}
    train = ["train", "--data", "synthetic", "--output", out, *QUICK]
    assert f"{out} already holds a model: choose another" in refused(*convert, out, *options)
    assert f"{out} already holds a model: choose another" in refused(*train)
    assert f"{out} holds no run to resume" in refused(*train, "--resume")
    assert f"{trained[0]} already holds a run" in refused(*convert, trained[0], *options)
    assert before == {place: place.read_bytes() for f in (out, trained[0]) for place in f.iterdir()}
    for place in unwritable(tmp_path):
        message = refused(*convert, place, *options)
        assert f"can't write to the output folder {place}: " in message


# The frame around the commands


@pytest.mark.parametrize("words", [[], ["data"]])
def test_without_a_command_there_is_help(run, words):
    code, out, error = run(*words)
    assert code == 2 and out == ""
    assert error.startswith(f"usage: {' '.join(['python -m dmd', *words])} ")
    assert ("inspect" if words else "evaluate") in error


def test_python_m_dmd_gives_help_and_exit_codes():
    for words, code in (([], 2), (["--help"], 0), (["train", "--epoch=3"], 2)):
        done = subprocess.run(
            [sys.executable, "-m", "dmd", *words], cwd=ROOT, capture_output=True, text=True
        )
        assert done.returncode == code and "Traceback" not in done.stderr
        assert (done.stdout if code == 0 else done.stderr) != ""


@pytest.mark.parametrize(
    "words",
    ["train", "evaluate", "predict", "data", "data fetch", "data inspect", "data export",
     "released", "released convert", "study"],
)  # fmt: skip
def test_each_command_has_help_and_says_what_it_misses(words, capsys):
    for more, code in (["--help"], 0), ([], 2):
        with pytest.raises(SystemExit) as stop:
            cli.main([*words.split(), *more])
        printed = capsys.readouterr()
        assert stop.value.code == code
        assert words in (printed.out if code == 0 else printed.err)


def test_too_little_memory_is_one_sentence(run, monkeypatch):
    def greedy(args):
        raise MemoryError

    monkeypatch.setattr(commands, "data_inspect", greedy)
    code, _, error = run("data", "inspect", "synthetic")
    assert code == 2 and error.startswith("dmd: not enough memory") and error.count("\n") == 1
    monkeypatch.setattr(commands, "data_inspect", lambda args: torch.empty(10**15))
    assert run("data", "inspect", "synthetic") == (code, "", error)


def test_warnings_are_one_line_and_as_before_afterwards(run, monkeypatch):
    def noisy(args):
        warnings.warn("something\n  odd", stacklevel=1)
        raise OSError("two\nlines")

    monkeypatch.setattr(commands, "data_inspect", noisy)
    before, filters = warnings.showwarning, warnings.filters[:]
    code, out, error = run("data", "inspect", "synthetic")
    assert (code, out, error) == (2, "", "dmd: something odd\ndmd: two lines\n")
    assert warnings.showwarning is before and warnings.filters == filters


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (cli.NonFiniteLoss("the loss is not finite"), 1, "the last good checkpoint is kept"),
        (cli.Interrupted("stopped in epoch 1"), 130, "stopped in epoch 1"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_exit_codes_of_training_that_stops(run, monkeypatch, tmp_path, error, code, text):
    def fit(*args, **kwargs):
        raise error

    monkeypatch.setattr(Trainer, "fit", fit)
    found, _, message = run("train", "--data", "synthetic", "--output", tmp_path / "x", *QUICK)
    assert found == code and message.startswith("dmd: ") and message.count("\n") == 1
    assert text in message


def test_a_bug_is_no_bad_input(monkeypatch):
    for bug, mistake in ((KeyError, lambda args: {}["bug"]),
                         (RuntimeError, lambda args: torch.zeros(2) @ torch.zeros(3))):  # fmt: skip
        monkeypatch.setattr(commands, "data_inspect", mistake)
        with pytest.raises(bug):
            cli.main(["data", "inspect", "synthetic"])


@pytest.mark.parametrize(
    ("word", "value"),
    [
        ("x=3", 3),
        ("x=-2.5e-3", -2.5e-3),
        ("x=5,5,5", [5, 5, 5]),
        ("x=[5, 5, 5]", [5, 5, 5]),
        ("x=1,", "1,"),
        ("x=true", True),
        ("x=False", False),
        ("x=None", None),
        ("x=null", None),
        ("x=none", "none"),
        ("x=paper", "paper"),
        ("x=a,b", "a,b"),
        ("x=/a/b c=d", "/a/b c=d"),
        ("x=", ""),
        ("x=007", "007"),
        ('x={"alpha": 0.5, "gamma": 0}', {"alpha": 0.5, "gamma": 0}),
    ],
)
def test_values_are_read_as_json_or_else_as_text(word, value):
    found = commands.key_values([word])["x"]
    assert found == value and type(found) is type(value)
    assert commands.key_values([word], {"x": str}) == {"x": word[2:]}
    assert commands.key_values([word], {"x": str | None}) == {"x": word[2:]}
    expected = None if value == "none" else value
    assert commands.key_values([word], {"x": int | None}) == {"x": expected}


@pytest.mark.parametrize("text", ["123", "1,2", "a,b", "true", "[1]"])
def test_paths_are_never_taken_for_numbers(monkeypatch, text):
    monkeypatch.setattr(commands, "load", lambda name, **options: options)
    for name, key in (("mmsa", "path"), ("mult", "path"), ("mosi_utterances", "root")):
        assert commands.load_data([name, f"{key}={text}"]) == {key: text}
    words = ["mosi_utterances", f"root={text}", "context=2", "standardise=false"]
    assert commands.load_data(words) == {"root": text, "context": 2, "standardise": False}


# Bad input: one sentence, exit code 2, nothing written

TRAIN_MISTAKES = [
    (["--preset", "papr"], "unknown preset 'papr': did you mean 'paper'?"),
    (["--model", "dimm=8"], "unknown ModelConfig option 'dimm': did you mean 'dim'?"),
    (["--loss", "alhpa=1"], "unknown LossConfig option 'alhpa': did you mean 'alpha'?"),
    (["--train", "epoch=1"], "unknown TrainConfig option 'epoch': did you mean 'epochs'?"),
    (["--train", "name=1"], "unknown TrainConfig option 'name'"),
    (["--model", "cls=1"], "unknown ModelConfig option 'cls'"),
    (["--train", "loss=3"], "LossConfig: expected its options by name, not 3"),
    (["--train", "epochs=abc"], "epochs='abc' is not of type int"),
    (["--train", "epochs=1.5"], "epochs=1.5 is not of type int"),
    (["--epochs", "abc"], "argument --epochs: invalid int value: 'abc'"),
    (["--epochs", "0"], "epochs must be positive"),
    (["--seed", "-1"], "seed must lie in [0, 2**32), not -1"),
    (["--train", "learning_rate=NaN"], "learning_rate must be finite"),
    (["--train", "clip=norms"], "did you mean 'norm'?"),
    (["--train", "epochs"], "expected KEY=VALUE, got 'epochs'"),
    (["--model", "dim=10", "heads=3"], "dim=10 must be a multiple of heads=3"),
    (["--model", "kernels=5,5"], "kernels=[5, 5] is not of type"),
    (["--device", "cdua"], "device 'cdua' is not available here: try auto or cpu"),
    (["--train", "device=meta"], "device 'meta' is not available here"),
    (["--resume"], "holds no run to resume"),
    (["--outptu", "x"], "unknown option '--outptu': did you mean '--output'?"),
    (["--epoch=3"], "unknown option '--epoch': did you mean '--epochs'?"),
    (["word"], "unrecognized arguments: word"),
    (["--model"], "argument --model: expected at least one argument"),
    (["--preset", "released_mosi"], "'released_mosi': did you mean 'released_mosei'?"),
    (["--preset", "released", "--loss", "edge_prior=none"], "needs an edge_prior"),
    (["--train", "epochs=none", "patience=none"], "epochs=None needs a patience"),
]


@pytest.mark.parametrize(("words", "sentence"), TRAIN_MISTAKES, ids=str)
def test_mistakes_in_training_options(refused, monkeypatch, source, tmp_path, words, sentence):
    monkeypatch.setattr(commands, "load_data", lambda words: pytest.fail("read the data first"))
    data = ["--data", "mmsa", f"path={source}", "--output", tmp_path / "out"]
    assert sentence in refused("train", *data, "--preset", "tiny", *words)
    assert not [*tmp_path.iterdir()]


def test_a_model_that_does_not_fit_the_data_is_refused(refused, tmp_path):
    data = ["--data", "synthetic", "--output", tmp_path / "out"]
    message = refused("train", *data, *QUICK, "widths=9,9,9")
    assert "the language features are 32 wide, but the model was built for 9" in message
    message = refused("train", *data, *QUICK, "lengths=12,12,5")
    assert "the acoustic sequences have 12 steps" in message
    assert not [*tmp_path.iterdir()]


DATA_MISTAKES = [
    (["synthetik"], "unknown dataset 'synthetik': did you mean 'synthetic'?"),
    (["synthetic", "sede=1"], "'sede': did you mean 'seed'?"),
    (["synthetic", "name=1"], "unknown option of dataset 'synthetic' 'name'"),
    (["synthetic", "size=tini"], "'tini': did you mean 'tiny'?"),
    (["synthetic", "size=3"], "'3'"),
    (["synthetic", "aligned=1"], "aligned=1"),
    (["synthetic", "seed=-1"], "seed"),
    (["synthetic", "widths=1,2"], "widths"),
    (["synthetic", "seed"], "expected KEY=VALUE, got 'seed'"),
    (["mmsa"], "dataset 'mmsa' needs the option path=..."),
    (["mmsa", "path=missing.pkl"], "missing.pkl"),
    (["mult", "path=missing.pkl"], "missing.pkl"),
    (["mmsa", "path=123"], "123"),
    (["mosi_utterances", "root=missing"], "transcripts.csv is missing below missing"),
    (["mosi_utterances", "root=1,2"], "transcripts.csv is missing below 1,2"),
    (["mosi_utterances", "root=missing", "context=-1"], "context"),
    (["mosi_utterances", "root=missing", "context=abc"], "context"),
    (["mosi_utterances", "root=missing", "valid_share=2"], "valid_share"),
]


@pytest.mark.parametrize(("words", "sentence"), DATA_MISTAKES, ids=str)
def test_mistakes_in_datasets(refused, trained, tmp_path, monkeypatch, words, sentence):
    monkeypatch.chdir(tmp_path)
    out = tmp_path / "out"
    for command in (
        ["train", "--output", out, *QUICK, "--data", *words],
        ["data", "inspect", *words],
        ["data", "export", "--output", out, *words],
        ["evaluate", trained[0], "--data", *words],
    ):
        assert sentence in refused(*command)
    assert not [*tmp_path.iterdir()]


def edited(edit):
    """A dataset as an MMSA pickle, edited after it was checked."""
    content = {}
    for name, split in zip(("train", "valid", "test"), tiny.splits(), strict=True):
        content[name] = mmsa._mapping(split, name)
    edit(content)
    return pickle.dumps(content)


def put(split, key, value):
    def edit(content):
        content[split][key] = value(content[split][key]) if callable(value) else value

    return edit


def cell(value):
    """Replace the first number of an array."""

    def change(x):
        x = np.array(x, np.float32)
        x.flat[0] = value
        return x

    return change


def emptied(content):
    for key, value in content["valid"].items():
        content["valid"][key] = value[:0]


FILE_MISTAKES = {
    "no key": (lambda c: c["train"].pop("vision"), ["vision", "train"]),
    "no split": (lambda c: c.pop("test"), ["test"]),
    "label NaN": (put("test", "regression_labels", cell(math.nan)), ["label", "test", "nan"]),
    "label inf": (put("train", "regression_labels", cell(math.inf)), ["label", "train", "inf"]),
    "label 7": (put("valid", "regression_labels", cell(7)), ["label", "valid", "7", "[-3, 3]"]),
    "empty": (emptied, ["valid", "empty"]),
    "counts": (put("test", "audio", lambda x: x[1:]), ["audio", "test"]),
    "lengths": (put("test", "audio_lengths", lambda x: x + 9), ["audio_lengths", "test"]),
    "fewer lengths": (put("test", "vision_lengths", lambda x: x[1:]), ["vision_lengths", "test"]),
    "widths": (put("valid", "vision", lambda x: x[:, :, :2]), ["valid", "width"]),
    "words": (put("train", "text", "hello"), ["text", "train"]),
}


@pytest.mark.parametrize("what", FILE_MISTAKES)
def test_mistakes_in_a_dataset_file(refused, tmp_path, what):
    edit, parts = FILE_MISTAKES[what]
    path = tmp_path / "bad.pkl"
    path.write_bytes(edited(edit))
    message = refused(
        "train", "--data", "mmsa", f"path={path}", "--output", tmp_path / "out", *QUICK
    )
    assert all(part in message for part in parts), message
    assert [*tmp_path.iterdir()] == [path]


def test_a_wrong_checksum_names_the_file_and_the_cure(refused, tmp_path):
    from dmd.data import mosi_utterances

    for name in mosi_utterances.FILES:
        (tmp_path / Path(name).name).write_text("1,2\n")
    message = refused("data", "inspect", "mosi_utterances", f"root={tmp_path}")
    assert f"{tmp_path / 'transcripts.csv'} differs from the published file" in message
    assert "python -m dmd data fetch" in message


def unwritable(tmp_path):
    (tmp_path / "file").write_text("x")
    yield tmp_path / "file" / "out"
    yield tmp_path / "file"
    if Path("/proc/self").exists():
        yield Path("/proc/dmd/out")


def test_an_unwritable_output_is_refused_before_the_data_are_read(
    refused, monkeypatch, tmp_path, source
):
    monkeypatch.setattr(commands, "load_data", lambda words: pytest.fail("read the data first"))
    for place in unwritable(tmp_path):
        message = refused("train", "--data", "mmsa", f"path={source}", "--output", place, *QUICK)
        assert f"can't write to the output folder {place}: " in message
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_folder_that_holds_a_run_is_left_alone(refused, trained, source):
    before = {path.name: path.read_bytes() for path in trained[0].iterdir()}
    words = ["train", "--data", "mmsa", f"path={source}", "--output", trained[0], *QUICK]
    assert "already holds a run: resume it, or choose another folder" in refused(*words)
    assert {path.name: path.read_bytes() for path in trained[0].iterdir()} == before


def test_output_files_that_cannot_be_written(refused, trained, tmp_path):
    clips = write_clips(tmp_path / "clips.npz")
    for place in (*list(unwritable(tmp_path))[:1], tmp_path, Path("/proc/dmd/x.npz")):
        message = refused("predict", trained[0], clips, "--output", place)
        assert f"can't write {place}: " in message
        message = refused("data", "export", "synthetic", "--output", place)
        assert str(place) in message
    assert sorted(path.name for path in tmp_path.iterdir()) == ["clips.npz", "file"]


def test_a_checkpoint_of_other_data_is_refused(refused, trained):
    message = refused("evaluate", trained[0], "--data", "synthetic")
    assert f"{trained[0]} does not fit these data: the language features are 32 wide" in message


def test_a_checkpoint_of_data_from_a_notebook_needs_data(refused, tmp_path):
    Trainer(tiny.model(), tiny.config(epochs=1), tmp_path).fit(tiny.splits())
    assert f"{tmp_path} does not say where its data come from: give --data" in refused(
        "evaluate", tmp_path
    )


def test_checkpoints_that_cannot_be_read(refused, trained, tmp_path):
    clips = write_clips(tmp_path / "clips.npz")
    bad = tmp_path / "bad.safetensors"
    bad.write_bytes((trained[0] / "best.safetensors").read_bytes()[:-9])
    other = tmp_path / "other.safetensors"
    tensors, meta = checkpoint.load(trained[0] / "best.safetensors")
    meta["model_config"]["dim"] = 8
    checkpoint.save(other, tensors, meta)
    for words in (["evaluate"], ["predict"]):
        rest = [clips] if words == ["predict"] else []
        assert f"there is no checkpoint {tmp_path / 'no'}" in refused(
            *words, tmp_path / "no", *rest
        )
        assert f"{bad} is damaged" in refused(*words, bad, *rest)
        assert f"the weights in {other} do not fit" in refused(*words, other, *rest)
        assert "device 'cdua'" in refused(*words, trained[0], *rest, "--device", "cdua")


features = {name: x.numpy() for name, x in
            zip(dmd.MODALITIES, tiny.splits().test.clips.features, strict=True)}  # fmt: skip
LENGTHS = tiny.splits().test.clips.lengths.numpy()
CLIP_MISTAKES = {
    "missing": ({"visual": None}, "no array 'visual': it needs language, visual, acoustic"),
    "typo": ({"lenghts": LENGTHS}, "unknown array 'lenghts': did you mean 'lengths'?"),
    "label": ({"label": LENGTHS[:, 0]}, "unknown array 'label'"),
    "flat": ({"acoustic": features["acoustic"][0]}, "acoustic: expected shape (clips, steps"),
    "count": ({"visual": features["visual"][1:]}, "visual has 8 clips, but language has 9"),
    "width": (
        {"visual": features["visual"][:, :, :2]},
        "visual features are 2 wide, but the model",
    ),
    "long": (
        {"language": np.zeros((9, 6, 4))},
        "language sequences have 6 steps, but the model was built for at most 5",
    ),
    "NaN": ({"language": cell(math.nan)(features["language"])}, "language has NaN or inf"),
    "large": ({"acoustic": np.full((9, 3, 2), 1e300)}, "acoustic has NaN or inf"),
    "text": ({"language": np.full((9, 5, 4), "x")}, "language holds <U1, not numbers"),
    "complex": ({"language": 1j * features["language"]}, "language holds complex64, not numbers"),
    "no clips": (
        {**{name: x[:0] for name, x in features.items()}, "lengths": None, "ids": None},
        "there are no clips in it",
    ),
    "lengths 0": ({"lengths": LENGTHS * 0}, "clip 0 says 0 language steps"),
    "lengths long": ({"lengths": LENGTHS + 9}, "steps, but it must have between 1 and 5"),
    "lengths of others": ({"lengths": LENGTHS[1:]}, "lengths: expected integers of shape (9, 3)"),
    "lengths float": ({"lengths": LENGTHS * 1.0}, "lengths holds float64, not integers"),
    "ids": ({"ids": np.array(["a"])}, "ids: expected 9 names, got 1"),
}


@pytest.mark.parametrize("what", CLIP_MISTAKES)
def test_mistakes_in_clips(refused, trained, tmp_path, what):
    changes, sentence = CLIP_MISTAKES[what]
    path = write_clips(tmp_path / "clips.npz", **changes)
    message = refused("predict", trained[0], path, "--output", tmp_path / "out.npz")
    assert str(path) in message and sentence in message
    assert [*tmp_path.iterdir()] == [path]


def broken_archives():
    """Files that are no npz of plain arrays."""
    good = io.BytesIO()
    np.savez_compressed(good, **features)
    good = good.getvalue()
    yield "empty", b""
    yield "text", b"language,visual\n1,2\n"
    yield "truncated", good[: len(good) // 2]
    yield "damaged", good[:60] + bytes(40) + good[100:]
    yield "pickle", pickle.dumps({"language": 1})
    single = io.BytesIO()
    np.save(single, features["language"])
    yield "npy", single.getvalue()
    objects = io.BytesIO()
    np.savez(objects, **{**features, "ids": np.array([{"a": 1}], dtype=object)})
    yield "objects", objects.getvalue()
    for name, shape in (("huge", "(99999999999999,)"), ("negative", "(-5,)"), ("code", "f()")):
        header = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}, }}".ljust(117) + "\n"
        array = b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header.encode()
        archive = io.BytesIO()
        with zipfile.ZipFile(archive, "w") as file:
            file.writestr("language.npy", array)
        yield name, archive.getvalue()


def test_files_that_are_no_archive_of_arrays(refused, trained, tmp_path):
    for name, content in broken_archives():
        path = tmp_path / name
        path.write_bytes(content)
        message = refused("predict", trained[0], path)
        assert f"{path} is not a readable npz file of plain arrays" in message, name
    assert f"can't read {tmp_path / 'no.npz'}: No such file" in refused(
        "predict", trained[0], tmp_path / "no.npz"
    )
    assert f"can't read {tmp_path}: Is a directory" in refused("predict", trained[0], tmp_path)


@pytest.mark.parametrize("size", ["0", "-1", "1.5", "x", "²"])
def test_a_batch_size_is_a_positive_whole_number(refused, trained, tmp_path, size):
    words = ["predict", trained[0], tmp_path / "x.npz", f"--batch-size={size}"]
    assert f"{size!r} is not a whole number from 1" in refused(*words)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["trian"], "invalid choice: 'trian'"),
        (["data", "inspekt"], "invalid choice: 'inspekt'"),
        (["evaluate", "x", "--split", "tset"], "invalid choice: 'tset'"),
        (["evaluate"], "required: checkpoint"),
        (["released", "convret"], "invalid choice: 'convret'"),
        (["released", "convert", "x.pth"], "required: output"),
        (["predict", "x", "y", "--outptu=z"], "did you mean '--output'?"),
        (["data", "export", "synthetic", "--format", "mat", "--output", "x"], "'mat'"),
        (["data", "fetch", "mosi"], "invalid choice: 'mosi'"),
    ],
)
def test_mistakes_in_commands(refused, monkeypatch, tmp_path, words, sentence):
    monkeypatch.chdir(tmp_path)
    assert sentence in refused(*words)
    assert not [*tmp_path.iterdir()]


STUDY = ["study", "table1", "--rows", "lmf", "--data", "synthetic", "size=tiny", "--seeds", "1",
         "--first-seed", "7"]  # fmt: skip


def test_a_study_is_trained_recorded_and_printed_again(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, printed, _ = run(*STUDY, "--output", "runs")
    assert code == 0 and "lmf" in printed
    path = tmp_path / "runs" / "table1_synthetic.json"
    found = parse(path.read_text())
    tuning = found["configuration"]["tuning"]["lmf"]
    assert float(min(tuning, key=tuning.get)) == found["rows"][0]["learning_rate"]
    words = "study table1 --scale study --data synthetic size=tiny --rows lmf --seeds 1"
    words += " --first-seed 7"
    assert found["rows"][0]["seeds"] == [7]
    assert found["provenance"]["command"] == f"python -m dmd {words}"
    shown = {form: run("study", path, "--format", form)[1] for form in ("text", "markdown")}
    assert shown["text"].strip() in printed and shown["markdown"].startswith("| method |")
    assert parse(run("study", path, "--json")[1]) == found


def test_mistakes_in_studies(refused, tmp_path):
    assert "did you mean 'table1'?" in refused("study", "tabel1")
    assert "did you mean 'mult'?" in refused("study", "table1", "--rows", "mlut")
    assert "did you mean 'unaligned'?" in refused("study", "table1", "--settings", "unalined")
    path = tmp_path / "x.json"
    assert f"can't read {path}: No such file" in refused("study", path)
    for content in ("no", "[]", '{"rows": []}'):
        path.write_text(content)
        assert f"{path} is not the record of a study" in refused("study", path)
