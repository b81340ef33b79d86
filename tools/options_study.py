"""What each point where the published code parts from the paper does to the scores.

    python tools/options_study.py run        train all cells that are not there yet
    python tools/options_study.py record     write data/results/options_*.json from the cells

A cell is one dataset, one row and one seed. A row is the paper's options, the published ones, or
the paper's with one point of `dmd.differences` switched. Every cell trains the same small model
with the same budget, chooses its epoch on the validation split, and is tested once; nothing else
is chosen. Each cell is a file of its own, so a study that was stopped goes on where it was.
Run from a checkout without uncommitted changes; real data are found by $DMD_DATA.
"""

import argparse
import json
import statistics
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import torch

from dmd import checkpoint, data
from dmd.config import LossConfig, ModelConfig, TrainConfig
from dmd.differences import DIFFERENCES, switched
from dmd.model import DMD
from dmd.options import Config
from dmd.trainer import Trainer, seed_everything

ROOT = Path(__file__).resolve().parent.parent
CELLS, RESULTS = ROOT / "_build" / "options_study", ROOT / "data" / "results"
SEEDS = range(5)
# The sizes of CMU-MOSI in clips, but narrower features and shorter clips.
DATASETS: dict[str, dict[str, Any]] = {
    "synthetic": {"size": "mosi", "widths": [32, 12, 8], "lengths": [12, 12, 12]},
    "mosi_utterances": {"context": 4, "valid_share": 0.05},
}
# The same for every row, and chosen before any was run: a small model, and few epochs.
SMALL: dict[str, Any] = {
    "dim": 16, "heads": 2, "layers": 1, "kernels": (3, 3, 3), "language_dropout": 0.1,
    "embedding_dropout": 0.1, "attention_dropout": (0.1, 0.0, 0.1), "output_dropout": 0.1,
}  # fmt: skip
BUDGET: dict[str, Any] = {
    "epochs": 10, "batch_size": 32, "learning_rate": 1e-3, "scheduler": "none", "device": "cpu",
}  # fmt: skip
METRICS = ("mae", "corr", "acc2_non0", "f1_non0", "acc7")
# One row with another seed is not a row; and what is only written down changes no score.
SKIPPED = ("seed", "test_each_epoch")
ROWS = ["paper", "released", *(row.name for row in DIFFERENCES if row.name not in SKIPPED)]


def configurations(row: str) -> dict[str, Config]:
    """The model (without the sizes of the data), the loss and the training of a row."""
    paper: dict[str, Config] = {
        "model": ModelConfig.preset("paper", **SMALL),
        "loss": LossConfig.preset("paper"),
        "train": TrainConfig.preset("paper", **BUDGET),
    }
    if row == "paper":
        return paper
    if row == "released":
        budget = {**BUDGET, "epochs": None, "test_each_epoch": False}
        return {
            "model": ModelConfig.preset("released", **SMALL),
            "loss": LossConfig.preset("released"),
            "train": TrainConfig.preset("released", **budget),
        }
    return switched(next(x for x in DIFFERENCES if x.name == row), **paper)


def train(dataset: str, row: str, seed: int) -> dict[str, Any]:
    """One cell: train, choose the epoch on the validation split, test."""
    torch.set_num_threads(1)
    began = time.perf_counter()
    splits = data.load(dataset, **DATASETS[dataset])
    configs = configurations(row)
    seed_everything(seed)
    sizes = {"widths": splits.widths, "lengths": splits.lengths}
    model = DMD(ModelConfig.from_dict({**configs["model"].to_dict(), **sizes}))
    config = TrainConfig.from_dict(
        {**configs["train"].to_dict(), "loss": configs["loss"], "seed": seed}
    )
    history = Trainer(model, config).fit(splits)
    return {
        "dataset": dataset,
        "row": row,
        "seed": seed,
        "commit": checkpoint.git_commit(),
        "test": {name: history.test[name] for name in METRICS},
        "epochs": len(history.epochs),
        "best_epoch": history.best_epoch,
        "parameters": sum(x.numel() for x in model.parameters()),
        "seconds": round(time.perf_counter() - began, 2),
    }


def path(dataset: str, row: str, seed: int) -> Path:
    """The file of a cell."""
    return CELLS / dataset / f"{row}-{seed}.json"


def run(jobs: int) -> None:
    """Train every cell whose file is missing; all rows of a seed before the next seed."""
    todo = [
        (dataset, row, seed)
        for seed in SEEDS
        for dataset in DATASETS
        for row in ROWS
        if not path(dataset, row, seed).exists()
    ]
    began = time.perf_counter()
    with ProcessPoolExecutor(jobs) as pool:
        futures = {pool.submit(train, *cell): cell for cell in todo}
        for done, future in enumerate(as_completed(futures), start=1):
            checkpoint.write_json(path(*futures[future]), future.result())
            left = (time.perf_counter() - began) / done * (len(todo) - done) / 60
            print(f"{done}/{len(todo)} cells, {left:.0f} min left   ", end="\r", file=sys.stderr)


def summary(dataset: str) -> dict[str, Any]:
    """The record of one dataset: mean and spread of each row, and its distance from the paper's."""
    cells = {row: [json.loads(path(dataset, row, s).read_text()) for s in SEEDS] for row in ROWS}
    commits = {cell["commit"] for row in cells.values() for cell in row}
    if len(commits) != 1:
        raise SystemExit(f"the cells come from several commits: {', '.join(sorted(commits))}")
    base = cells["paper"]
    rows = []
    for row in ROWS:
        found: dict[str, Any] = {"row": row, "parameters": cells[row][0]["parameters"]}
        found["epochs"] = [cell["epochs"] for cell in cells[row]]
        found["test"] = [cell["test"] for cell in cells[row]]
        for name in METRICS:
            values = [cell["test"][name] for cell in cells[row]]
            paired = [x - y["test"][name] for x, y in zip(values, base, strict=True)]
            found[name] = {
                "mean": statistics.mean(values),
                "standard_deviation": statistics.stdev(values),
                "difference": statistics.mean(paired),
                "standard_error": statistics.stdev(paired) / len(paired) ** 0.5,
            }
        rows.append(found)
    return {
        "what": "Scores on the test split of a small DMD under the paper's options, the published "
        "ones, and the paper's with one point switched; `difference` is that to the row `paper`, "
        "seed by seed.",
        "configuration": {
            "data": {"name": dataset, **DATASETS[dataset]},
            "model": SMALL,
            "train": BUDGET,
            "seeds": list(SEEDS),
        },
        "rows": rows,
        "provenance": {
            **checkpoint.provenance(),
            "commit": commits.pop(),
            "command": "python tools/options_study.py run",
            "threads": 1,
            "seconds": round(sum(cell["seconds"] for row in cells.values() for cell in row), 1),
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
    for dataset in DATASETS:
        checkpoint.write_json(RESULTS / f"options_{dataset}.json", summary(dataset))


if __name__ == "__main__":
    main()
