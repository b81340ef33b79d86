"""Where does graph distillation help? Its gain over two conditions of the synthetic data.

    python tools/conditions_map.py run        train all cells that are not there yet
    python tools/conditions_map.py record     write data/results/conditions_synthetic.json

The axes: how many training clips there are, and how far a clip's other modalities fall behind its
most reliable one (`reliability_gap` of the synthetic data). At each point of the map DMD is
compared with itself without both graphs: the same model and data otherwise, the same five seeds.
Sizes are those of `python -m dmd study`, with DMD's learning rate there; with few clips there are
more epochs, so that no point is short of steps. Run from a checkout without uncommitted changes.
"""

import argparse
from pathlib import Path
from typing import Any

from dmd import checkpoint, tables
from dmd.cells import Cell, run
from dmd.studies import NARROW, NO_GRAPHS, SCALES

ROOT = Path(__file__).resolve().parent.parent
CELLS, RECORD = ROOT / "_build" / "conditions_map", "conditions_synthetic.json"
GAPS = (0.0, 0.5, 1.0)
CLIPS = (160, 400, 1284, 2568)
ROWS: dict[str, dict[str, Any]] = {"dmd": {}, "no_graphs": NO_GRAPHS}
SEEDS, RATE = 5, 3e-3
METRICS = ("mae", "acc2_non0")
SCALE = SCALES["study"]


def epochs(clips: int) -> int:
    """As many as see 12,840 clips, but 10 to 40."""
    return min(max(round(12_840 / clips), 10), 40)


def cell(gap: float, clips: int, row: str, seed: int) -> Cell:
    """One run: a point of the map, with or without graphs."""
    options = {
        **NARROW, "lengths": [12, 12, 12], "clips": [clips, 229, 686], "reliability_gap": gap,
    }  # fmt: skip
    model = {**SCALE.model, **ROWS[row]}
    train = {**SCALE.train, "epochs": epochs(clips)}
    setting = f"gap{gap:g}-clips{clips}"
    return Cell(setting, "synthetic", row, seed, RATE, data=options, model=model, train=train)


def cells() -> list[Cell]:
    """All of them, a whole map for each seed."""
    return [
        cell(gap, clips, row, seed)
        for seed in range(SEEDS) for gap in GAPS for clips in CLIPS for row in ROWS
    ]  # fmt: skip


def summary(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A point of the map each: the scores of both rows, seed by seed, and the gain of the graphs.

    gain: DMD's score minus that without graphs, with the interval of `dmd.tables.difference`.
    """
    points = []
    for gap in GAPS:
        for clips in CLIPS:
            setting = cell(gap, clips, "dmd", 0).setting
            runs = {
                row: [x for x in found if (x["setting"], x["row"]) == (setting, row)]
                for row in ROWS
            }
            points.append({
                "reliability_gap": gap,
                "clips": clips,
                "epochs": epochs(clips),
                "scores": {
                    row: {name: [x["test"][name] for x in runs[row]] for name in METRICS}
                    for row in ROWS
                },
                "gain": tables.difference(runs["dmd"], runs["no_graphs"]),
            })  # fmt: skip
    return points


def record(found: list[dict[str, Any]]) -> dict[str, Any]:
    """The map with its configuration and provenance."""
    commits = {x["commit"] for x in found}
    if len(commits) != 1:
        raise ValueError(f"{CELLS}: cells of several commits, remove the older ones")
    return {
        "configuration": {
            "rows": {row: dict(options) for row, options in ROWS.items()},
            "model": dict(SCALE.model),
            "train": dict(SCALE.train),
            "learning_rate": RATE,
            "seeds": list(range(SEEDS)),
        },
        "points": summary(found),
        "provenance": {
            **checkpoint.provenance(),
            "commit": commits.pop(),
            "command": "python tools/conditions_map.py run",
            "threads": 1,
            "seconds": round(sum(x["seconds"] for x in found), 1),
        },
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("what", choices=["run", "record"])
    parser.add_argument("--jobs", type=int, default=2)
    args = parser.parse_args()
    found = run(cells(), CELLS, jobs=args.jobs)
    if args.what == "record":
        path = ROOT / "data" / "results" / RECORD
        checkpoint.write_json(path, record(found))
        print(f"\n{path}")


if __name__ == "__main__":
    main()
