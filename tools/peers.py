"""Our versions of five methods beside those of the public package MMSA, on the same clips.

    python tools/peers.py export                      the clips, in MMSA's layout
    python tools/peers.py run --python PYTHON_OF_MMSA     train what is not there yet, both sides
    python tools/peers.py record                      write data/results/peers_synthetic.json

MMSA is installed in an environment of its own: `pip install MMSA==2.2.1` with the torch of
`constraints.txt`; `tools/peers_worker.py` runs there and says what it adapts. Both sides get the
same clips and splits, batches of 32 clips, ten epochs, the learning rate of the same grid whose run
with seed 0 has the lowest validation MAE, and then five seeds; the epoch is the one with the lowest
validation MAE. All scores are computed by `dmd.metrics` from the predictions of the test clips.
A run is a file of its own, so what was stopped goes on where it was. Run from a checkout without
uncommitted changes.
"""

import argparse
import json
import math
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from dmd import checkpoint, data, studies
from dmd.cells import train_cell
from dmd.data import mmsa
from dmd.metrics import compute
from dmd.tables import METRICS, difference, summarise

ROOT = Path(__file__).resolve().parent.parent
FOLDER, RECORD = ROOT / "_build" / "peers", "peers_synthetic.json"
SETTING, SCALE = "synthetic", studies.SCALES["study"]
SEEDS = range(5)
ROWS = ("ef_lstm", "tfn", "lmf", "mult", "misa")
# MMSA's options that give its methods our sizes, rates of dropout, weights of losses, and one step
# of Adam a batch. What stays different lies in MMSA's code.
MATCHED: dict[str, dict[str, Any]] = {
    "ef_lstm": {"hidden_dims": 128, "num_layers": 1, "dropout": 0.2, "weight_decay": 0.0},
    # language, acoustic, visual; dropout of acoustic, visual, language, fused
    "tfn": {"hidden_dims": [64, 8, 8], "text_out": 16, "dropouts": [0.2, 0.2, 0.2, 0.2]},
    "lmf": {
        "hidden_dims": [128, 24, 24], "rank": 16, "dropouts": [0.2, 0.2, 0.2, 0.2],
        "weight_decay": 0.0,
    },
    "mult": {
        "dst_feature_dim_nheads": [14, 2], "nlevels": 1, "conv1d_kernel_size_l": 3,
        "conv1d_kernel_size_a": 3, "conv1d_kernel_size_v": 3, "attn_dropout": 0.1,
        "attn_dropout_a": 0.1, "attn_dropout_v": 0.1, "embed_dropout": 0.1, "text_dropout": 0.0,
        "output_dropout": 0.1, "attn_mask": False, "update_epochs": 1, "patience": 10,
    },
    "misa": {
        "hidden_size": 30, "dropout": 0.5, "diff_weight": 0.3, "sim_weight": 1.0,
        "recon_weight": 1.0, "update_epochs": 1,
    },
}  # fmt: skip
# side -> row -> what it changes. `own`: MMSA's settings for CMU-MOSI. The further ones are probes.
PEERS: dict[str, dict[str, dict[str, Any]]] = {
    "matched": MATCHED,
    "own": {"ef_lstm": {}, "lmf": {}, "misa": {}},
    # `matched` with one thing of `own` put back, or two
    "decay": {row: {**MATCHED[row], "weight_decay": 0.005} for row in ("ef_lstm", "lmf")},
    "deep": {"ef_lstm": {**MATCHED["ef_lstm"], "num_layers": 4}},
    "deep_decay": {"ef_lstm": {**MATCHED["ef_lstm"], "num_layers": 4, "weight_decay": 0.005}},
}
OURS: dict[str, dict[str, dict[str, Any]]] = {"ours": {row: {} for row in ROWS}}
REPORTED = {
    "mae": "MAE", "corr": "Corr", "acc2_has0": "Has0_acc_2", "f1_has0": "Has0_F1_score",
    "acc2_non0": "Non0_acc_2", "f1_non0": "Non0_F1_score", "acc5": "Mult_acc_5",
    "acc7": "Mult_acc_7",
}  # fmt: skip


def clips() -> Path:
    """The file of the clips, made where it is missing."""
    path = FOLDER / f"{SETTING}.pkl"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        name, options = SCALE.settings[SETTING]
        mmsa.export(data.load(name, **options), path)
    return path


def file_of(side: str, row: str, rate: float, seed: int) -> Path:
    """The file of a run."""
    return FOLDER / side / f"{row}-lr{rate:g}-seed{seed}.json"


def train_ours(side: str, row: str, todo: list[tuple[float, int]]) -> None:
    """Train our method with the learning rates and seeds of a list."""
    make = studies.maker(SETTING, SCALE.settings[SETTING], SCALE)
    for rate, seed in todo:
        cell = make(studies.Row(row, row), seed, rate)
        began = time.process_time()
        found = train_cell(cell)
        found["cpu_seconds"] = round(time.process_time() - began, 2)
        checkpoint.write_json(file_of(side, row, rate, seed), found)


def train_theirs(side: str, row: str, todo: list[tuple[float, int]], python: str) -> None:
    """The same for MMSA's method, in its environment."""
    cells = [
        {
            **{"side": side, "row": row, "learning_rate": rate, "seed": seed},
            **{"options": PEERS[side][row], "commit": checkpoint.git_commit()},
            **{key: SCALE.train[key] for key in ("epochs", "batch_size")},
            **{"data": str(clips()), "path": str(file_of(side, row, rate, seed))},
        }
        for rate, seed in todo
    ]
    if cells:
        path = FOLDER / "cells.json"
        checkpoint.write_json(path, cells)
        subprocess.run([python, str(ROOT / "tools" / "peers_worker.py"), str(path)], check=True)


def read(side: str, row: str, rate: float, seed: int) -> dict[str, Any]:
    """A run, with the scores of `dmd.metrics`."""
    found: dict[str, Any] = json.loads(file_of(side, row, rate, seed).read_text(encoding="utf-8"))
    return {**found, "test": compute(found["prediction"], found["label"])}


def choose(side: str, row: str) -> tuple[float, dict[str, float]]:
    """The learning rate whose run with seed 0 has the lowest validation MAE, and all of these."""
    tried = {f"{rate:g}": read(side, row, rate, 0)["valid"]["mae"] for rate in SCALE.grid}
    return float(min(tried, key=tried.__getitem__)), tried


def run(python: str, rows: Sequence[str] = ROWS) -> None:
    """Train all runs that are missing: of a method ours and theirs, one after the other."""
    for row in rows:
        for side in (*OURS, *PEERS):
            if row not in {**OURS, **PEERS}[side]:
                continue
            train: Callable[..., None] = train_ours if side in OURS else train_theirs
            more = [] if side in OURS else [python]

            def missing(pairs: list[tuple[float, int]], side: str = side, row: str = row) -> Any:
                return [pair for pair in pairs if not file_of(side, row, *pair).exists()]

            train(side, row, missing([(rate, 0) for rate in SCALE.grid]), *more)
            best, _ = choose(side, row)
            train(side, row, missing([(best, seed) for seed in SEEDS]), *more)
            error = [read(side, row, best, seed)["test"]["mae"] for seed in SEEDS]
            print(f"{side} {row}: {best:g}, MAE {sum(error) / len(error):.3f}", file=sys.stderr)


def line(side: str, row: str, base: list[dict[str, Any]]) -> dict[str, Any]:
    """What is kept of a side of a row; `difference` is that to our method, base."""
    rate, tried = choose(side, row)
    runs = [read(side, row, rate, seed) for seed in SEEDS]
    labels = [run["label"] for run in (*base, *runs)]
    assert all(max(abs(x - y) for x, y in zip(labels[0], z, strict=True)) < 1e-4 for z in labels)
    # A model that says the same of every clip has no correlation: null in the record.
    none = [key for key in METRICS if any(not math.isfinite(run["test"][key]) for run in runs)]
    defined = [{**run, "test": {**run["test"], **dict.fromkeys(none, 0.0)}} for run in runs]
    found = summarise({row: defined})[0]
    found["test"] = [{key: run["test"][key] for key in METRICS} for run in runs]
    found |= {key: {"mean": None, "standard_deviation": None} for key in none}
    theirs = side in PEERS
    source = f"MMSA {runs[0]['versions']['MMSA']}" if theirs else "dmd"
    found.pop("failed")  # a run without scores would have no prediction to read
    found.pop("difference")  # to itself
    entry = {"row": row, "side": side, "source": source, **found, "tuning": tried}
    entry["cpu_seconds"] = sum(run["cpu_seconds"] for run in runs) / len(runs)
    entry["commit"] = runs[0]["commit"]
    assert {run["commit"] for run in runs} == {runs[0]["commit"]}
    if theirs:
        gaps = {
            k: [run["reported"][x] - run["test"][k] for run in runs] for k, x in REPORTED.items()
        }
        # the largest difference between MMSA's own scores and ours; a constant has no correlation
        entry["reported"] = {
            key: max((abs(x) for x in values if math.isfinite(x)), default=None)
            for key, values in gaps.items()
        }
    if side != "ours":
        entry["difference"] = difference(runs, base)
    return entry


def record() -> dict[str, Any]:
    """The record of all runs."""
    rows = []
    for row in ROWS:
        best, _ = choose("ours", row)
        base = [read("ours", row, best, seed) for seed in SEEDS]
        sides: Mapping[str, Any] = {**OURS, **PEERS}
        rows += [line(side, row, base) for side in sides if row in sides[side]]
    files = [json.loads(path.read_text()) for path in FOLDER.glob("*/*.json")]
    versions = next(x["versions"] for x in files if "versions" in x)
    name, options = SCALE.settings[SETTING]
    return {
        "what": "Five methods as `dmd.baselines` and as MMSA have them, on the same clips and with "
        "the same budget. Side `ours`, `matched`: MMSA with our sizes and settings where its "
        "options reach; `own`: MMSA with its settings for CMU-MOSI; the other sides are probes. "
        "`difference` is that to `ours`, with its 95 % interval.",
        "configuration": {
            "data": {"name": name, **options},
            "train": dict(SCALE.train),
            "learning_rates": list(SCALE.grid),
            "seeds": list(SEEDS),
            "ours": {row: dict(SCALE.sizes[row]) for row in ROWS},
            "sides": {**OURS, **PEERS},
        },
        "rows": rows,
        "provenance": {
            **checkpoint.provenance(),
            "command": "python tools/peers.py run --python PYTHON_OF_MMSA",
            "threads": 1,
            "seconds": round(sum(x["seconds"] for x in files), 1),
            "peers": versions,
        },
    }


def main() -> None:
    """Run one command."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("command", choices=["export", "run", "record"])
    parser.add_argument("--python", help="the interpreter of the environment with MMSA")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=ROWS, help="default: all")
    args = parser.parse_args()
    if args.command == "export":
        print(clips())
    elif args.command == "run":
        if not args.python:
            parser.error("run needs --python, the interpreter of the environment with MMSA")
        torch.set_num_threads(1)
        run(args.python, args.rows)
    else:
        checkpoint.write_json(ROOT / "data" / "results" / RECORD, record())


if __name__ == "__main__":
    main()
