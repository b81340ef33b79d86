"""Studies: cells that are done stay done, tuning never sees the test split, and honest tables."""

import json

import numpy as np
import pytest

from dmd import cells, checkpoint, data, studies, tables
from dmd.baselines import METHODS
from dmd.cells import Cell, run
from dmd.data import mmsa
from dmd.studies import Row, Scale, run_setting

TINY = {"size": "tiny"}
SCALE = Scale({}, {}, {"epochs": 1}, (0.1, 0.2, 0.3))


def cell(row="lf_lstm", seed=0, rate=1e-3, **more):
    method = {"method": row, "model": {"hidden": 4}} if row in METHODS else {}
    train = {"epochs": 1, "batch_size": 64, "device": "cpu"}
    return Cell("synthetic", "synthetic", row, seed, rate, data=TINY, train=train, **method, **more)


def quiet(text):
    pass


@pytest.fixture
def fake(monkeypatch):
    """Training that only writes down what it was asked for: validation likes 0.2, the test 0.1."""
    calls = []

    def train(cell):
        calls.append((cell.row, cell.seed, cell.learning_rate))
        found = {"row": cell.row, "seed": cell.seed, "learning_rate": cell.learning_rate}
        if cell.row == "fails" and cell.learning_rate == 0.2:
            return {**found, "failed": "NaN"}
        valid = {0.1: 1.0, 0.2: 0.5, 0.3: 0.9}[cell.learning_rate]
        return {**found, "valid": {"mae": valid}, "test": {"mae": cell.learning_rate}}

    monkeypatch.setattr(cells, "train_cell", train)
    return calls


# Cells


def test_a_cell_is_trained_once_and_its_result_is_whole(tmp_path):
    first = run([cell()], tmp_path, tell=quiet)
    (path,) = tmp_path.rglob("*.json")
    stamp = path.stat().st_mtime_ns
    assert run([cell()], tmp_path, tell=quiet) == first
    assert path.stat().st_mtime_ns == stamp
    (found,) = first
    label = np.array(found["label"])
    assert len(found["prediction"]) == len(label) == 160
    mae = np.abs(np.array(found["prediction"]) - label).mean()
    assert mae == pytest.approx(found["test"]["mae"], abs=1e-4)
    assert found["parameters"] > 0 and found["best_epoch"] == 1


def test_a_study_that_was_stopped_goes_on_where_it_was(tmp_path, fake):
    todo = [cell(seed=n, rate=0.1) for n in range(4)]
    run(todo[:2], tmp_path, tell=quiet)
    run(todo, tmp_path, tell=quiet)
    assert [seed for _, seed, _ in fake] == [0, 1, 2, 3]


def test_several_processes_give_what_one_gives(tmp_path):
    todo = [cell(seed=n) for n in range(2)]
    one, two = (
        run(todo, tmp_path / name, jobs=jobs, tell=quiet) for name, jobs in (("one", 1), ("two", 2))
    )
    for x, y in zip(one, two, strict=True):
        assert x["seed"] == y["seed"]
        assert x["prediction"] == pytest.approx(y["prediction"], abs=1e-4)


def test_dmd_cells_have_the_scores_of_their_heads(tmp_path):
    small = {"dim": 8, "heads": 2, "layers": 1}
    (found,) = run([cell("dmd", model=small, loss={"lambda2": 0.0})], tmp_path, tell=quiet)
    assert len(found["heads_homo"]) == len(found["heads_hetero"]) == 3
    assert found["loss"] == {"lambda2": 0.0}


def test_a_loss_that_is_not_finite_is_a_result(tmp_path, monkeypatch):
    (found,) = run([cell(rate=1e30)], tmp_path, tell=quiet)
    assert "not finite" in found["failed"] and "test" not in found


def test_ray_that_is_not_there_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "ray", None)
    with pytest.raises(ValueError, match="pip install ray"):
        run([cell()], tmp_path, ray="local", tell=quiet)


def test_a_local_ray_cluster_gives_what_this_process_gives(tmp_path):
    pytest.importorskip("ray", reason="ray is not installed")
    here, there = (
        run([cell()], tmp_path / name, ray=ray, tell=quiet)
        for name, ray in (("here", None), ("there", "local"))
    )
    assert here[0]["prediction"] == pytest.approx(there[0]["prediction"], abs=1e-4)


# Studies


def test_the_learning_rate_is_chosen_on_the_validation_split(tmp_path, fake):
    rows = [Row("a", "lf_lstm"), Row("fails", "lf_lstm")]
    dataset = ("synthetic", TINY)
    found, tuning = run_setting(rows, "s", dataset, SCALE, tmp_path, seeds=range(3), tell=quiet)
    assert {x["learning_rate"] for x in found["a"]} == {0.2}
    assert {x["learning_rate"] for x in found["fails"]} == {0.3}  # the best of those that trained
    assert tuning["a"] == {"0.1": 1.0, "0.2": 0.5, "0.3": 0.9}
    assert tuning["fails"]["0.2"] is None
    assert [x["seed"] for x in found["a"]] == [0, 1, 2]
    grid = [call for call in fake if call[0] == "a"]
    assert grid == [("a", 0, 0.1), ("a", 0, 0.2), ("a", 0, 0.3), ("a", 1, 0.2), ("a", 2, 0.2)]


def test_methods_that_need_aligned_clips_have_no_cells_elsewhere(tmp_path, fake):
    rows = [Row("dmd"), *(Row(name, name) for name in METHODS)]
    options = {"size": "tiny", "aligned": False}
    dataset = ("synthetic", options)
    found, _ = run_setting(rows, "s", dataset, SCALE, tmp_path, seeds=[4], tell=quiet)
    assert set(found) == {"dmd", *(x for x in METHODS if not METHODS[x].aligned_only)}
    assert len(found) < len(rows)


def test_every_study_has_dmd_first_and_options_that_exist():
    for name, rows in studies.STUDIES.items():
        found = rows()
        assert found[0] == Row("dmd"), name
        assert len({row.name for row in found}) == len(found)
        for row in found:
            studies.LossConfig(**(row.loss or {}))
            studies.TrainConfig(**(row.train or {}))
            if row.method == "dmd":
                studies.ModelConfig(**(row.model or {}))
            else:
                assert row.method in METHODS


def test_table_three_adds_one_part_at_a_time():
    rows = studies.STUDIES["table3"]()
    configs = {row.name: studies.ModelConfig(**(row.model or {})) for row in rows}
    parts = ("decoupling", "homo_distillation", "crossmodal_attention", "hetero_distillation")
    has = {name: tuple(getattr(x, part) for part in parts) for name, x in configs.items()}
    assert has == {
        "dmd": (True, True, True, True),
        "nothing": (False, False, False, False),
        "decoupling": (True, False, False, False),
        "decoupling_homo": (True, True, False, False),
        "decoupling_homo_attention": (True, True, True, False),
        "decoupling_homo_hetero": (True, True, False, True),
    }


@pytest.mark.parametrize("setting", ["synthetic", "unaligned"])
def test_the_methods_of_a_study_are_of_one_size(setting):
    scale = studies.SCALES["study"]
    dataset = scale.settings[setting]
    make = studies.maker(setting, dataset, scale)
    sizes = {"widths": dataset[1]["widths"], "lengths": dataset[1]["lengths"]}
    count = {}
    for row in studies.METHOD_ROWS:
        if setting == "unaligned" and row.method != "dmd" and METHODS[row.method].aligned_only:
            continue
        made = make(row, 0, 1e-3)
        whole = {"method": row.method, **sizes, "options": dict(made.model)}
        options = {**made.model, **sizes} if row.method == "dmd" else whole
        model = checkpoint.build_model(options)
        count[row.name] = sum(x.numel() for x in model.parameters())
    assert all(0.8 * count["dmd"] < n < 1.2 * count["dmd"] for n in count.values()), count


# Tables


def result(row, prediction, seed=0, commit="a" * 40, label=None):
    label = [-2.0, -1.0, 0.0, 1.0, 2.0] * 20 if label is None else label
    return {
        "row": row, "seed": seed, "commit": commit, "learning_rate": 1e-3, "parameters": 1234,
        "seconds": 3.0, "label": label, "prediction": list(prediction),
        "test": tables.compute(list(prediction), label),
    }  # fmt: skip


LABEL = np.array([-2.0, -1.0, 0.0, 1.0, 2.0] * 20)


def runs(row, shift, noise=0.3):
    random = np.random.default_rng(0)
    return [
        result(row, LABEL + shift + noise * random.standard_normal(100), seed) for seed in range(5)
    ]


def test_a_row_does_not_differ_from_itself_and_a_worse_one_does():
    same = tables.difference(runs("dmd", 0.0), runs("dmd", 0.0))
    assert same["mae"] == {"mean": 0.0, "low": 0.0, "high": 0.0}
    worse = tables.difference(runs("x", 1.5), runs("dmd", 0.0))
    assert 1.0 < worse["mae"]["low"] < worse["mae"]["mean"] < worse["mae"]["high"] < 1.6
    assert worse["acc2_non0"]["high"] < 0  # negative clips are called positive


def test_the_interval_covers_zero_where_only_noise_differs():
    random = np.random.default_rng(1)
    other = [result("x", LABEL + 0.3 * random.standard_normal(100), seed) for seed in range(5)]
    gap = tables.difference(other, runs("dmd", 0.0))["mae"]
    assert gap["low"] < 0 < gap["high"]


def test_a_record_says_what_it_is_and_refuses_cells_of_two_commits():
    results = {"dmd": runs("dmd", 0.0), "x": runs("x", 0.5)}
    found = tables.record("table1", "synthetic", {"scale": "study"}, results, "command")
    assert [row["row"] for row in found["rows"]] == ["dmd", "x"]
    assert "difference" in found["rows"][1] and "difference" not in found["rows"][0]
    assert found["provenance"]["commit"] == "a" * 40
    assert found["rows"][0]["mae"]["mean"] == pytest.approx(
        np.mean([run["test"]["mae"] for run in results["dmd"]])
    )
    json.dumps(found)
    results["x"][0]["commit"] = "b" * 40
    with pytest.raises(ValueError, match="several commits"):
        tables.record("table1", "synthetic", {}, results, "command")


def test_the_same_numbers_as_text_markdown_and_latex():
    results = {"dmd": runs("dmd", 0.0), "late_fusion": runs("late_fusion", 0.5)}
    results["bad"] = [{**runs("bad", 0.0)[0], "failed": "NaN"}]
    found = tables.record("table1", "synthetic", {}, results, "command")
    text, markdown, latex = (form(found) for form in tables.FORMATS.values())
    mean = f"{found['rows'][0]['mae']['mean']:.3f}"
    assert all(mean in table for table in (text, markdown, latex))
    assert r"late\_fusion" in latex and r"$\pm$" in latex and "late_fusion" in markdown
    assert all("failed" in table for table in (text, markdown, latex))
    assert len({line.count("|") for line in markdown.splitlines()}) == 1
    assert len({line.count("&") for line in latex.splitlines() if "&" in line}) == 1


# Published files


SETTING = studies.SCALES["study"].settings["mosi"], Scale({}, {}, {"epochs": 1}, (1e-3,))


def test_whoever_has_the_published_files_runs_the_same_rows_on_them(tmp_path, monkeypatch):
    monkeypatch.setenv("DMD_DATA", str(tmp_path))
    path = tmp_path / "MOSI" / "Processed" / "aligned_50.pkl"
    with pytest.raises(OSError, match=f"cannot read {path}"):
        run_setting([Row("lmf", "lmf")], "mosi", *SETTING, tmp_path / "runs", tell=quiet)
    path.parent.mkdir(parents=True)
    mmsa.export(data.load("synthetic", clips=(40, 20, 20)), path)
    with pytest.warns(UserWarning, match="none of the published"):
        found, _ = run_setting(
            [Row("lmf", "lmf")], "mosi", *SETTING, tmp_path / "runs", seeds=[0, 1], tell=quiet
        )
    assert [len(run["label"]) for run in found["lmf"]] == [20, 20]


def test_a_folder_of_other_runs_is_not_taken_for_this_study_s(tmp_path, fake):
    run([cell(rate=0.1)], tmp_path, tell=quiet)
    (path,) = tmp_path.rglob("*.json")
    path.write_text(json.dumps({**json.loads(path.read_text()), "data": {"size": "mosi"}}))
    with pytest.raises(ValueError, match="choose another --output") as caught:
        run([cell(rate=0.1)], tmp_path, tell=quiet)
    assert str(path) in str(caught.value) and "mosi" in str(caught.value)


def test_rows_of_one_name_are_one_thing_in_all_studies():
    known = {}
    for rows in studies.STUDIES.values():
        for row in rows():
            assert known.setdefault(row.name, row) == row
