"""What each part of the objective and of the model does: scores, leakage, edges, every head.

    python tools/objective_study.py run        train all cells that are not there yet
    python tools/objective_study.py record     write data/results/objective_synthetic.json

A cell is one row and one seed: the small model of `options_study`, with its budget, under the
paper's options with one thing changed. Nothing is chosen: every row is in the record. Each cell is
a file of its own, so a study that was stopped goes on where it was. Run from a checkout without
uncommitted changes.
"""

import argparse
import json
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import options_study
import torch

from dmd import checkpoint, data
from dmd.config import LossConfig, ModelConfig, TrainConfig
from dmd.metrics import collect, compute
from dmd.model import DMD
from dmd.probes import leakage
from dmd.trainer import Trainer, seed_everything

ROOT = Path(__file__).resolve().parent.parent
CELLS, RECORD = ROOT / "_build" / "objective_study", "objective_synthetic.json"
SEEDS = range(5)
DATA = options_study.DATASETS["synthetic"]
SMALL, BUDGET = options_study.SMALL, options_study.BUDGET
METRICS = ("mae", "corr", "acc2_non0", "acc7")
CURVES = ("paper", "prior")  # rows whose epochs are recorded for all seeds, others for the first
PRIOR = {"edge_prior": "released", "edge_regulariser": 10.0}
# A row: options of the model, options of the loss.
ROWS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "paper": ({}, {}),
    **{
        f"no_{term}": ({}, {"leave_out": term})
        for term in ("reconstruction", "cycle", "margin", "orthogonality")
    },
    "hinge": ({}, {"orthogonality": "hinge"}),
    "squared": ({}, {"orthogonality": "squared"}),
    "no_decoupling": ({"decoupling": False}, {}),
    "no_homo": ({"homo_distillation": False}, {}),
    "no_hetero": ({"hetero_distillation": False}, {}),
    "no_distillation": ({"homo_distillation": False, "hetero_distillation": False}, {}),
    "no_attention": ({"crossmodal_attention": False}, {}),
    "no_attention_no_hetero": (
        {"crossmodal_attention": False, "hetero_distillation": False}, {},
    ),
    "teacher_moves": ({"stop_teacher_gradient": False}, {}),
    "prior": ({}, PRIOR),
    **{f"lambda1={x:g}": ({}, {"lambda1": x}) for x in (0.0, 0.01, 1.0, 10.0)},
    **{f"lambda2={x:g}": ({}, {"lambda2": x}) for x in (0.0, 0.005, 0.5, 5.0)},
    **{f"gamma={x:g}": ({}, {"gamma": x}) for x in (0.0, 0.01, 1.0, 10.0)},
}  # fmt: skip


def train(row: str, seed: int) -> dict[str, Any]:
    """One cell: train, choose the epoch on the validation split, measure on the test split."""
    torch.set_num_threads(1)
    began = time.perf_counter()
    splits = data.load("synthetic", **DATA)
    model_options, loss_options = ROWS[row]
    sizes = {"widths": splits.widths, "lengths": splits.lengths}
    seed_everything(seed)
    model = DMD(ModelConfig.preset("paper", **SMALL, **sizes, **model_options))
    loss = LossConfig.preset("paper", **loss_options)
    history = Trainer(model, TrainConfig(**BUDGET, loss=loss, seed=seed)).fit(splits)
    found = collect(
        lambda x: (x.homo.logits.T, x.hetero.logits.T, x.homo.edges, x.hetero.edges),
        model, splits.test,
    )  # fmt: skip
    homo, hetero, *edges = (torch.cat(part) for part in zip(*found, strict=True))
    # Whom a clip's edges should trust: the modality that the generator made most reliable.
    best = splits.test.truth["reliability"].argmax(dim=1)
    return {
        "row": row,
        "seed": seed,
        "commit": checkpoint.git_commit(),
        "test": scores(history.test),
        "heads": {
            name: [scores(compute(guess, splits.test.label)) for guess in logits.T]
            for name, logits in (("homo", homo), ("hetero", hetero))
        },
        "leakage": leakage(model, splits),
        "edges_by_reliable": {
            name: [graph[best == m].mean(dim=0).tolist() for m in range(3)]
            for name, graph in zip(("homo", "hetero"), edges, strict=True)
        },
        "epochs": history.epochs,
        "best_epoch": history.best_epoch,
        "parameters": sum(x.numel() for x in model.parameters()),
        "seconds": round(time.perf_counter() - began, 2),
    }


def scores(found: dict[str, float]) -> dict[str, float]:
    """Those that are recorded."""
    return {name: found[name] for name in METRICS}


def path(row: str, seed: int) -> Path:
    """The file of a cell."""
    return CELLS / f"{row}-{seed}.json"


def run(jobs: int) -> None:
    """Train every cell whose file is missing; all rows of a seed before the next seed."""
    todo = [(row, seed) for seed in SEEDS for row in ROWS if not path(row, seed).exists()]
    began = time.perf_counter()
    with ProcessPoolExecutor(jobs) as pool:
        futures = {pool.submit(train, *cell): cell for cell in todo}
        for done, future in enumerate(as_completed(futures), start=1):
            checkpoint.write_json(path(*futures[future]), future.result())
            left = (time.perf_counter() - began) / done * (len(todo) - done) / 60
            print(f"{done}/{len(todo)} cells, {left:.0f} min left   ", end="\r", file=sys.stderr)


def rounded(x: Any) -> Any:
    """The same with four decimals: the cells are kept whole, the record is read by people."""
    if isinstance(x, dict):
        return {key: rounded(value) for key, value in x.items()}
    if isinstance(x, list):
        return [rounded(value) for value in x]
    return round(x, 4) if isinstance(x, float) else x


def summary() -> dict[str, Any]:
    """The record: every cell, by row."""
    cells = {row: [json.loads(path(row, s).read_text()) for s in SEEDS] for row in ROWS}
    commits = {cell["commit"] for row in cells.values() for cell in row}
    if len(commits) != 1:
        raise SystemExit(f"the cells come from several commits: {', '.join(sorted(commits))}")
    seconds = sum(cell["seconds"] for row in cells.values() for cell in row)
    rows = {}
    for row, runs in cells.items():
        model_options, loss_options = ROWS[row]
        kept = ("seed", "test", "heads", "leakage", "edges_by_reliable", "best_epoch", "epochs")
        rows[row] = {
            "model": model_options,
            "loss": loss_options,
            "parameters": runs[0]["parameters"],
            "runs": [{key: cell[key] for key in kept} for cell in runs],
        }
        for cell in rows[row]["runs"]:
            epochs = cell.pop("epochs")
            if row in CURVES or cell["seed"] == 0:
                cell["epochs"] = [
                    {key: epoch[key] for key in ("train", "valid", "edges")} for epoch in epochs
                ]
    return {
        "what": "Scores, leakage of known factors (R^2 of linear probes), scores of every head and "
        "edges on the test split of a small DMD under the paper's options with one thing changed.",
        "configuration": {
            "data": {"name": "synthetic", **DATA},
            "model": SMALL,
            "train": BUDGET,
            "seeds": list(SEEDS),
        },
        "rows": rounded(rows),
        "provenance": {
            **checkpoint.provenance(),
            "commit": commits.pop(),
            "command": "python tools/objective_study.py run",
            "threads": 1,
            "seconds": round(seconds, 1),
        },
    }


def main() -> None:
    """Run one command."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("command", choices=["run", "record"])
    parser.add_argument("--jobs", type=int, default=2)
    args = parser.parse_args()
    if args.command == "run":
        run(args.jobs)
        return
    checkpoint.write_json(ROOT / "data" / "results" / RECORD, summary())


if __name__ == "__main__":
    main()
