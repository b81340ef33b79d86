"""How each claim of the paper is tested: functions from the records to what was found.

A test returns what it found on each kind of data, and nothing for data without a record.
`claims.py` says which claim takes which test; `paper.py` has the numbers that the paper reports.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import paper
from evidence import Comparison, Finding, Records, over_seeds, over_seeds_and_clips

DATA = {  # settings of `python -m dmd study`
    "synthetic": "synthetic",
    "unaligned": "synthetic, unaligned",
    "larger": "synthetic, four times the clips",
    "mosi_utterances": "utterances",
    "mosi": "CMU-MOSI",
    "mosi_unaligned": "CMU-MOSI, unaligned",
    "mosei": "CMU-MOSEI",
    "mosei_unaligned": "CMU-MOSEI, unaligned",
}
ALIGNED = ("synthetic", "larger", "mosi_utterances", "mosi")
UNALIGNED = ("unaligned", "mosi_unaligned")
NAMES = {
    "ef_lstm": "EF-LSTM", "lf_lstm": "LF-LSTM", "tfn": "TFN", "lmf": "LMF", "mfm": "MFM",
    "raven": "RAVEN", "mctn": "MCTN", "mult": "MulT", "mult_gd": "MulT with GD",
    "graph_mfn": "Graph-MFN", "misa": "MISA", "pmr": "PMR", "mica": "MICA", "fdmer": "FDMER",
}  # fmt: skip
ROWS = {
    "nothing": "no parts", "decoupling": "FD", "decoupling_homo": "FD with HomoGD",
    "decoupling_homo_hetero": "all but attention", "decoupling_homo_attention": "all but HeteroGD",
    "dmd": "DMD", "mult": "MulT", "mult_gd": "MulT with GD",
}  # fmt: skip
MODALITIES = ("language", "visual", "acoustic")
OBJECTIVE, MAP = "objective_synthetic", "conditions_synthetic"

Test = Callable[[Records], list[Finding]]
Heads = Callable[[Mapping[str, np.ndarray]], Sequence[Comparison]]
Runs = Callable[[str], list[Any]]  # a row of the objective's record -> its runs


def accuracies(record: Mapping[str, Any], metric: str = "acc2_non0") -> dict[str, np.ndarray]:
    """row -> its scores seed by seed, of the rows of a study in which no run failed."""
    rows = [row for row in record["rows"] if not row["failed"]]
    return {row["row"]: np.array([run[metric] for run in row["test"]]) for row in rows}


def against(reported: Mapping[str, float], settings: Sequence[str]) -> Test:
    """DMD against other methods, all of them, on the records of Table 1 (CMU-MOSEI: 2)."""

    def test(records: Records) -> list[Finding]:
        found = []
        for setting in settings:
            name = f"study_table{2 if setting.startswith('mosei') else 1}_{setting}"
            if name not in records:
                continue
            scores = accuracies(records[name])
            differences = {r["row"]: r.get("difference") for r in records[name]["rows"]}
            comparisons = tuple(
                over_seeds_and_clips(
                    f"DMD − {NAMES[other]}", differences[other]["acc2_non0"],
                    scores[other] - scores["dmd"], name, gain, sign=-1,
                )
                for other, gain in reported.items() if differences.get(other)
            )  # fmt: skip
            if comparisons:
                missing = tuple(NAMES[x] for x in reported if not differences.get(x))
                found.append(Finding(DATA[setting], comparisons, (name,), missing))
        return found

    return test


def rows(study: str, one: str, other: str, sign: int = 1) -> Test:
    """A row of a study against another. sign: -1 where the paper claims a loss.

    Not on CMU-MOSEI, for which the paper reports other gains than those used here.
    """
    table = {"table3": paper.TABLE3, "table5": paper.TABLE5}[study]
    what = " − ".join([ROWS[one], ROWS[other]][::sign])
    reported = round(sign * (table[one] - table[other]), 1)

    def test(records: Records) -> list[Finding]:
        found = []
        for setting, data in DATA.items():
            names = (f"study_{study}_{setting}", f"ablations_{setting}")
            if setting.startswith("mosei") or any(name not in records for name in names):
                continue
            scores = accuracies(records[names[0]])
            intervals = {
                (p["with"], p["without"]): p["by_seeds"][-1]["acc2_non0"]
                for p in records[names[1]]["pairs"] if p["study"] == study
            }  # fmt: skip
            if (one, other) in intervals:
                comparison = over_seeds_and_clips(
                    what, intervals[one, other], scores[one] - scores[other], names[1], reported,
                    sign,
                )  # fmt: skip
                found.append(Finding(data, (comparison,), names))
        return found

    return test


def heads(records: Records, setting: str, study: str, row: str, graph: str) -> np.ndarray | None:
    """How well each modality does alone, seed by seed: (seeds, 3), or None without a record."""
    kept = records.get(f"ablations_{setting}", {"heads": {}})["heads"].get(study, {})
    return np.array(kept[row][graph]["acc2_non0"]) if row in kept else None


def alone(needed: Mapping[str, tuple[str, str, str]], compare: Heads, note: str = "") -> Test:
    """Heads of single modalities: `needed` names them as (study, row, graph) for `compare`."""

    def test(records: Records) -> list[Finding]:
        found = []
        for setting, data in DATA.items():
            read = {key: heads(records, setting, *where) for key, where in needed.items()}
            if all(x is not None for x in read.values()):
                comparisons = tuple(compare({k: x for k, x in read.items() if x is not None}))
                found.append(Finding(data + note, comparisons, (f"ablations_{setting}",)))
        return found

    return test


def contrasts(compare: Heads, *rows: tuple[str, str, str, str]) -> Test:
    """The same for a part in several models: (note, study, row with, row without) each."""

    def test(records: Records) -> list[Finding]:
        return [
            finding
            for note, study, one, other in rows
            for finding in alone(
                {"with": (study, one, "homo"), "without": (study, other, "homo")}, compare, note
            )(records)
        ]

    return test


def each_modality(part: str) -> Heads:
    """Every modality gains."""
    reported = np.subtract(*paper.ALONE[part][::-1]).round(1)

    def compare(read: Mapping[str, np.ndarray]) -> list[Comparison]:
        gain = read["with"] - read["without"]
        return [over_seeds(m, gain[:, k], reported[k]) for k, m in enumerate(MODALITIES)]

    return compare


def gap_closes(read: Mapping[str, np.ndarray]) -> list[Comparison]:
    """The standard deviation of the three modalities falls."""
    fall = read["without"].std(axis=1) - read["with"].std(axis=1)
    return [
        over_seeds("fall of the standard deviation", fall, round(paper.STD[0] - paper.STD[1], 1))
    ]


def language_leads(read: Mapping[str, np.ndarray]) -> list[Comparison]:
    """Language is above each other modality."""
    x, reported = read["heads"], paper.ALONE["HomoGD"][0]
    return [
        over_seeds(f"language − {m}", x[:, 0] - x[:, k], round(reported[0] - reported[k], 1))
        for k, m in enumerate(MODALITIES) if k
    ]  # fmt: skip


def vision_rises(read: Mapping[str, np.ndarray]) -> list[Comparison]:
    """The visual head behind attention is above the one on common features."""
    gain = read["hetero"][:, 1] - read["homo"][:, 1]
    return [
        over_seeds(
            "visual, HeteroGD − visual, HomoGD",
            gain,
            round(paper.BEHIND_ATTENTION - paper.ALONE["HomoGD"][0][1], 1),
        )
    ]


def in_runs(compare: Callable[[Runs], Sequence[Comparison]]) -> Test:
    """On the record of the objective's parts: `compare` gets the runs of a row by its name."""

    def test(records: Records) -> list[Finding]:
        if OBJECTIVE not in records:
            return []
        rows = records[OBJECTIVE]["rows"]
        return [
            Finding(DATA["synthetic"], tuple(compare(lambda row: rows[row]["runs"])), (OBJECTIVE,))
        ]

    return test


def parts(runs: Sequence[Mapping[str, Any]]) -> dict[str, np.ndarray]:
    """R² seed by seed, mean over modalities: what lies where it should, and where it shouldn't."""

    def mean(part: str, factors: str) -> np.ndarray:
        return np.array([np.mean(run["leakage"][part][factors]) for run in runs])

    shared = mean("common", "shared"), mean("private", "shared")
    own = mean("private", "own"), mean("common", "own")
    return {
        "shared": shared[0] - shared[1],
        "own": own[0] - own[1],
        "redundancy": (shared[1] + own[1]) / 2,
    }


def decouples(runs: Runs) -> list[Comparison]:
    """Each kind of factor is more readable in its own part than in the other."""
    found = parts(runs("paper"))
    return [
        over_seeds("shared factors: common − private part", found["shared"]),
        over_seeds("own factors: private − common part", found["own"]),
    ]


def less_redundant(runs: Runs) -> list[Comparison]:
    """Each part tells less of what belongs in the other than without the losses."""
    base = parts(runs("paper"))["redundancy"]
    rows = {
        "without all decoupling losses": "lambda1=0",
        "without orthogonality": "no_orthogonality",
    }
    return [
        over_seeds(f"{k} − with", parts(runs(row))["redundancy"] - base) for k, row in rows.items()
    ]


def margin_consolidates(runs: Runs) -> list[Comparison]:
    """Both kinds of factors are split better with the margin loss than without."""
    one, other = parts(runs("paper")), parts(runs("no_margin"))
    return [over_seeds(f"split of {k} factors", one[k] - other[k]) for k in ("shared", "own")]


def seven_classes(runs: Runs) -> list[Comparison]:
    """Heads on the common features tell seven classes apart better with the graphs."""

    def mean(row: str) -> np.ndarray:
        return np.array([np.mean([h["acc7"] for h in r["heads"]["homo"]]) for r in runs(row)])

    return [
        over_seeds("7-class accuracy, mean of three heads", mean("paper") - mean("no_distillation"))
    ]


def edges(graph: str, named: Sequence[tuple[int, int]]) -> Callable[[Runs], list[Comparison]]:
    """The weakest of the named edges is above the strongest of the others."""

    def compare(runs: Runs) -> list[Comparison]:
        mean = np.array([np.mean(r["edges_by_reliable"][graph], axis=0) for r in runs("paper")])
        rest = [(i, j) for i in range(3) for j in range(3) if i != j and (i, j) not in named]
        gain = [min(x[e] for e in named) - max(x[e] for e in rest) for x in mean]
        return [over_seeds("weakest named − strongest other edge", gain)]

    return compare


def adaptive(runs: Runs) -> list[Comparison]:
    """A modality teaches more in the clips where it is the most reliable than in the others."""
    found = []
    for graph in ("homo", "hetero"):
        groups = np.array([r["edges_by_reliable"][graph] for r in runs("paper")])
        share = groups.sum(axis=-1)  # (seeds, kinds of clips, teachers)
        own = np.trace(share, axis1=1, axis2=2)
        found.append(
            over_seeds(f"{graph}: there − elsewhere", own / 3 - (share.sum((1, 2)) - own) / 6)
        )
    return found


def graphs_help(records: Records) -> list[Finding]:
    """DMD against itself without both graphs, wherever reliabilities differ."""

    def compare(runs: Runs) -> list[Comparison]:
        one, other = (
            [r["test"]["acc2_non0"] for r in runs(x)] for x in ("paper", "no_distillation")
        )
        return [over_seeds("with − without both graphs", np.subtract(one, other))]

    found = in_runs(compare)(records)
    for point in records.get(MAP, {"points": []})["points"]:
        if not point["reliability_gap"]:
            continue  # of modalities that are equally reliable the paper says nothing
        scores = {row: np.array(x["acc2_non0"]) for row, x in point["scores"].items()}
        what = f"map: gap {point['reliability_gap']:g}, {point['clips']:,} clips"
        comparison = over_seeds_and_clips(
            what, point["gain"]["acc2_non0"], scores["dmd"] - scores["no_graphs"], MAP
        )
        found.append(Finding(what, (comparison,), (MAP,)))
    return found


def each(*tests: Test) -> Test:
    """The findings of several tests."""
    return lambda records: [finding for test in tests for finding in test(records)]


def not_tested(records: Records) -> list[Finding]:
    """No record could say."""
    return []
