"""Which rows the ablation chapter compares: intervals of pairs, and every head seed by seed.

    python -m dmd study table3 --scale study --settings synthetic   (and table4, table5)
    python tools/ablation_pairs.py runs/studies/study SETTING [--output FILE]

`dmd study` compares every row with DMD. A part that is added to another row needs its interval
against that row, so this reads the same cells again. It trains nothing. A study whose record is
not there is left out.
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dmd import checkpoint
from dmd.tables import difference

RESULTS = Path(__file__).resolve().parent.parent / "data" / "results"
# study -> (row with a part, row without it)
PAIRS = {
    "table3": [
        ("decoupling", "nothing"),
        ("decoupling_homo", "decoupling"),
        ("decoupling_homo_hetero", "decoupling_homo"),
        ("decoupling_homo_attention", "decoupling_homo"),
        ("dmd", "decoupling_homo_hetero"),
        ("dmd", "decoupling_homo_attention"),
        ("dmd", "decoupling_homo"),
        ("dmd", "nothing"),
    ],
    "table4": [("dmd", "no_decoupling"), ("dmd", "no_homo"), ("dmd", "no_hetero")],
    "table5": [("mult_gd", "mult"), ("dmd", "mult_gd"), ("dmd", "mult")],
}
SCORES = ("acc2_non0", "f1_non0")

Runs = Mapping[str, Sequence[Mapping[str, Any]]]


def read(folder: Path, record: Mapping[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """The runs of each row of a study's record, seed by seed, from their cells."""
    where = folder / str(record["setting"])
    names = {
        row["row"]: [f"{row['row']}-lr{row['learning_rate']:g}-seed{s}.json" for s in row["seeds"]]
        for row in record["rows"]
        if not row["failed"]
    }
    found = {
        row: [json.loads((where / name).read_text(encoding="utf-8")) for name in files]
        for row, files in names.items()
    }
    commits = {run["commit"] for runs in found.values() for run in runs}
    if commits != {record["provenance"]["commit"]}:
        raise ValueError(f"{where}: its cells are not those of the record, run the study again")
    return found


def compare(study: str, runs: Runs) -> list[dict[str, Any]]:
    """Each pair with the intervals from its first seed, its first two seeds, and so on."""
    return [
        {
            "study": study,
            "with": one,
            "without": other,
            "by_seeds": [
                difference(runs[one][:k], runs[other][:k]) for k in range(1, len(runs[one]) + 1)
            ],
        }
        for one, other in PAIRS[study]
        if one in runs and other in runs
    ]


def heads(runs: Runs) -> dict[str, dict[str, dict[str, list[list[float]]]]]:
    """row -> graph -> score -> (seeds, modalities): how well each modality alone does."""
    return {
        row: {
            graph: {s: [[m[s] for m in run[f"heads_{graph}"]] for run in found] for s in SCORES}
            for graph in ("homo", "hetero")
        }
        for row, found in runs.items()
        if "heads_homo" in found[0]
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the record of one setting; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", type=Path, help="the folder of the studies' cells")
    parser.add_argument("setting", help="such as synthetic")
    parser.add_argument("--output", type=Path, help="default: data/results/ablations_SETTING.json")
    options = parser.parse_args(arguments)
    pairs, single, origins = [], {}, {}
    for study in PAIRS:
        file = options.runs / f"{study}_{options.setting}.json"
        if not file.is_file():
            print(f"{study}: no record, left out", file=sys.stderr)
            continue
        record = json.loads(file.read_text(encoding="utf-8"))
        runs = read(options.runs, record)
        pairs += compare(study, runs)
        single[study] = heads(runs)
        origins[study] = record["provenance"]
    if not origins:
        print(f"{options.runs}: no record of {', '.join(PAIRS)}", file=sys.stderr)
        return 2
    provenance = {
        **checkpoint.provenance(),
        **{key: next(iter(origins.values()))[key] for key in ("commit", "threads")},
        "command": f"python tools/ablation_pairs.py runs/studies/study {options.setting}",
        "seconds": sum(x["seconds"] for x in origins.values()),
        "studies": origins,
    }
    found = {"setting": options.setting, "pairs": pairs, "heads": single, "provenance": provenance}
    output = options.output or RESULTS / f"ablations_{options.setting}.json"
    checkpoint.write_json(output, found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
