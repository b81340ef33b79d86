"""A study's results as a record and as a table: means, spreads, intervals against DMD."""

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dmd import checkpoint
from dmd.metrics import compute

METRICS = ("mae", "corr", "acc2_non0", "f1_non0", "acc2_has0", "f1_has0", "acc5", "acc7")
SHOWN = {"mae": "MAE", "corr": "Corr", "acc2_non0": "Acc-2", "acc7": "Acc-7"}
PERCENT = ("acc2_non0", "acc7")
DRAWS = 2000


def difference(
    runs: Sequence[Mapping[str, Any]], base: Sequence[Mapping[str, Any]], seed: int = 0
) -> dict[str, dict[str, float]]:
    """How far a row lies from another: mean, and the 95 % interval of a paired bootstrap.

    Seeds and test clips are drawn anew, the same for both rows, 2,000 times: an interval without
    zero speaks of more than these seeds and these clips. `mae` is lower for the better,
    `acc2_non0` (a share, clips with a true score of zero left out) higher.
    """
    label = np.array(base[0]["label"])
    ours, theirs = (np.array([run["prediction"] for run in rows]) for rows in (runs, base))
    polar = label != 0
    right = [(x[:, polar] > 0) == (label[polar] > 0) for x in (ours, theirs)]
    gaps = {
        "mae": np.abs(ours - label) - np.abs(theirs - label),  # (seeds, clips)
        "acc2_non0": right[0].astype(float) - right[1],
    }
    random = np.random.default_rng(seed)
    found = {}
    for name, gap in gaps.items():
        seeds, clips = gap.shape
        draws = [
            gap[random.integers(seeds, size=seeds)].mean(axis=0)[random.integers(clips, size=clips)]
            for _ in range(DRAWS)
        ]
        low, high = np.quantile([draw.mean() for draw in draws], [0.025, 0.975])
        found[name] = {"mean": float(gap.mean()), "low": float(low), "high": float(high)}
    return found


def summarise(results: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[dict[str, Any]]:
    """A row a method: mean and standard deviation over seeds, and the difference from `dmd`.

    results: of each row the runs, seed by seed, as `dmd.studies.run_setting` gives them. A row of
    which a run failed has the number of those that did, and no scores.
    """
    rows = []
    for name, runs in results.items():
        row: dict[str, Any] = {
            "row": name,
            "parameters": runs[0]["parameters"],
            "learning_rate": runs[0]["learning_rate"],
            "seeds": [run["seed"] for run in runs],
            "failed": sum("failed" in run for run in runs),
        }
        if not row["failed"]:
            row["seconds"] = statistics.mean(run["seconds"] for run in runs)
            row["test"] = [{key: run["test"][key] for key in METRICS} for run in runs]
            for key in METRICS:
                values = [run["test"][key] for run in runs]
                spread = statistics.stdev(values) if len(values) > 1 else 0.0
                row[key] = {"mean": statistics.mean(values), "standard_deviation": spread}
            for heads in ("heads_homo", "heads_hetero"):
                if heads in runs[0]:
                    row[heads] = [
                        statistics.mean(run[heads][m]["acc2_non0"] for run in runs)
                        for m in range(3)
                    ]
            base = results.get("dmd", runs)
            if name != "dmd" and not any("failed" in run for run in base):
                row["difference"] = difference(runs, base)
        rows.append(row)
    return rows


def record(
    study: str,
    setting: str,
    configuration: Mapping[str, Any],
    results: Mapping[str, Sequence[Mapping[str, Any]]],
    command: str,
) -> dict[str, Any]:
    """What is kept of one setting of a study: the summary, its configuration, its provenance.

    Raises ValueError where the cells come from several commits: they can't be compared.
    """
    runs = [run for row in results.values() for run in row]
    commits = {run["commit"] for run in runs}
    if len(commits) != 1:
        raise ValueError(
            f"the cells of {setting} come from several commits ({', '.join(sorted(commits))}): "
            "remove the older ones, or choose another --output"
        )
    for run in runs:  # predictions and labels fit together
        if "failed" not in run:
            again = compute(run["prediction"], run["label"])["mae"]
            assert abs(again - run["test"]["mae"]) < 1e-4
    return {
        "study": study,
        "setting": setting,
        "configuration": dict(configuration),
        "rows": summarise(results),
        "provenance": {
            **checkpoint.provenance(),
            "commit": commits.pop(),
            "command": command,
            "threads": 1,
            "seconds": round(sum(run["seconds"] for run in runs), 1),
        },
    }


def read(path: str) -> dict[str, Any]:
    """The record of a study in a file, as `record` makes it.

    Raises OSError and ValueError with one sentence where there is none.
    """
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise OSError(f"can't read {path}: {error.strerror}") from error
    except ValueError:
        found = None
    if not isinstance(found, dict) or not {"study", "setting", "rows"} <= found.keys():
        raise ValueError(f"{path} is not the record of a study")
    return found


def lines(found: Mapping[str, Any]) -> list[list[str]]:
    """The record as text, cell by cell, its head first."""
    head = ["method", *SHOWN.values(), "Acc-2 against DMD", "parameters", "s"]
    body = []
    for row in found["rows"]:
        if row["failed"]:
            body.append([row["row"], *["failed"] * len(SHOWN), "", f"{row['parameters']:,}", ""])
            continue
        scores = []
        for key in SHOWN:
            mean, spread = row[key]["mean"], row[key]["standard_deviation"]
            digits, factor = (1, 100) if key in PERCENT else (3, 1)
            scores.append(f"{factor * mean:.{digits}f} ± {factor * spread:.{digits}f}")
        gap = row.get("difference", {}).get("acc2_non0")
        against = (
            f"{100 * gap['mean']:+.1f} [{100 * gap['low']:+.1f}, {100 * gap['high']:+.1f}]"
            if gap
            else ""
        )
        size = f"{row['parameters']:,}"
        body.append([row["row"], *scores, against, size, f"{row['seconds']:.0f}"])
    return [head, *body]


def as_text(found: Mapping[str, Any]) -> str:
    """Columns side by side."""
    table = lines(found)
    widths = [max(len(line[n]) for line in table) for n in range(len(table[0]))]
    rows = ("  ".join(x.ljust(n) for x, n in zip(line, widths, strict=True)) for line in table)
    return "\n".join(row.rstrip() for row in rows)


def as_markdown(found: Mapping[str, Any]) -> str:
    """A table as GitHub and notebooks show it."""
    head, *body = lines(found)
    rule = ["---", *["---:"] * (len(head) - 1)]
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, rule, *body))


def as_latex(found: Mapping[str, Any]) -> str:
    """A `tabular` with the rules of the package booktabs."""
    head, *body = (
        [x.replace("_", r"\_").replace("±", r"$\pm$") for x in line] for line in lines(found)
    )
    rows = [" & ".join(line) + r" \\" for line in (head, *body)]
    inner = [r"\toprule", rows[0], r"\midrule", *rows[1:], r"\bottomrule"]
    start = rf"\begin{{tabular}}{{l{'r' * (len(head) - 1)}}}"
    return "\n".join([start, *inner, r"\end{tabular}"])


FORMATS = {"text": as_text, "markdown": as_markdown, "latex": as_latex}
