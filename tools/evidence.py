"""One rule for every claim: from scores in a record to a verdict, and what could have been seen.

Everything is in points, hundredths of an accuracy, of a share of variance or of a share of weight,
and a gain is positive where it goes the way that the paper claims. `claims.py` lists the claims,
`scoreboard.py` writes the page.
"""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import t as student

RESULTS = Path(__file__).resolve().parent.parent / "data" / "results"
HOLDS, FAILS, OPEN = "holds", "does not hold", "can't tell"
MIXED, UNTESTED = "mixed", "untested"
REVERSED, SMALLER, WORTHLESS = "the other way", "less than reported", "not worth a point"
WORTH = 1.0  # points: what a gain has to be where the paper gives no number
POWER = 0.8  # how often an effect should be seen
Z, BAR = 1.96, 1.96 + 0.84  # standard errors: the bar of a 5 % test; an effect seen at POWER
POINTS = 100
ROUNDING = 0.05  # points: kept predictions are rounded, so a clip may change its side of zero

Records = Mapping[str, Mapping[str, Any]]


def read(folder: Path = RESULTS) -> dict[str, dict[str, Any]]:
    """All records of a folder by name, without `.json`."""
    return {
        x.stem: json.loads(x.read_text(encoding="utf-8")) for x in sorted(folder.glob("*.json"))
    }


@dataclass(frozen=True)
class Verdict:
    """One of the five words, and in what way a claim does not hold."""

    word: str
    reason: str = ""

    def __str__(self) -> str:
        return f"{self.word} ({self.reason})" if self.reason else self.word


def judge(low: float, high: float, reported: float | None) -> Verdict:
    """The rule. low, high: the 95 % interval of the gain; reported: the paper's gain, or None.

    Holds where the interval lies above zero. Does not hold where it lies below zero, or below the
    paper's gain (below WORTH where the paper gives none). Otherwise we can't tell.
    """
    if low > 0:
        return Verdict(HOLDS)
    if high < 0:
        return Verdict(FAILS, REVERSED)
    if high < (WORTH if reported is None else reported):
        return Verdict(FAILS, WORTHLESS if reported is None else SMALLER)
    return Verdict(OPEN)


def all_of(verdicts: Iterable[Verdict]) -> Verdict:
    """Of several comparisons: a claim needs them all, and one that fails is enough against it."""
    found = set(verdicts)
    order = [Verdict(FAILS, REVERSED), Verdict(FAILS, SMALLER), Verdict(FAILS, WORTHLESS)]
    return next((v for v in [*order, Verdict(OPEN)] if v in found), Verdict(HOLDS))


def overall(verdicts: Sequence[Verdict]) -> Verdict:
    """Over several data: their common word, `mixed` where they differ, `untested` without any."""
    if not verdicts:
        return Verdict(UNTESTED)
    if len({v.word for v in verdicts}) > 1:
        return Verdict(MIXED)
    reasons = {v.reason for v in verdicts}
    return Verdict(verdicts[0].word, reasons.pop() if len(reasons) == 1 else "")


@dataclass(frozen=True)
class Comparison:
    """A gain in points with its 95 % interval, the same gain seed by seed, and the paper's.

    clips: whether the interval draws test clips anew as well as seeds.
    """

    what: str
    mean: float
    low: float
    high: float
    seeds: tuple[float, ...]
    clips: bool
    reported: float | None = None

    @property
    def verdict(self) -> Verdict:
        """What the rule says of it."""
        return judge(self.low, self.high, self.reported)

    @property
    def visible(self) -> float:
        """Half the width of the interval: a smaller gain would not have been seen."""
        return (self.high - self.low) / 2

    def seeds_needed(self) -> float:
        """Seeds that see the paper's gain (else WORTH) four times in five; inf: these clips can't.

        The variance of a mean over n seeds is s²/n and a part that the clips leave. That part is
        what remains of the interval's variance when that of its seeds, s²(n-1)/n² in a bootstrap,
        is taken away: a rough estimate from few seeds. Where clips stay the same there is no such
        part, and Student's t pays for not knowing s.
        """
        gain = WORTH if self.reported is None else self.reported
        n, variance = len(self.seeds), float(np.var(self.seeds, ddof=1))
        left = (self.visible / Z) ** 2 - variance * (n - 1) / n**2 if self.clips else 0.0
        room = (gain / BAR) ** 2 - max(0.0, left)
        if room <= 0:
            return math.inf
        needed = max(2, math.ceil(variance / room))
        while not self.clips and (
            student.ppf([0.975, POWER], needed - 1).sum() * (variance / needed) ** 0.5 > gain
        ):
            needed += 1
        return needed


@dataclass(frozen=True)
class Finding:
    """What came out on some data: the comparisons and the records that they were read from.

    missing: comparisons that the claim makes and the record doesn't have.
    """

    data: str
    comparisons: tuple[Comparison, ...]
    records: tuple[str, ...]
    missing: tuple[str, ...] = ()

    @property
    def verdict(self) -> Verdict:
        """That of all its comparisons together."""
        return all_of(c.verdict for c in self.comparisons)

    @property
    def deciding(self) -> Comparison:
        """Of the comparisons that carry the verdict, the one with the lowest lower end."""
        return min((c for c in self.comparisons if c.verdict == self.verdict), key=lambda c: c.low)


def over_seeds(what: str, gains: Sequence[float], reported: float | None = None) -> Comparison:
    """The interval of Student's t over seeds, for fixed clips; gains are fractions, one a seed."""
    x = POINTS * np.asarray(gains, dtype=float)
    half = student.ppf(0.975, len(x) - 1) * x.std(ddof=1) / len(x) ** 0.5
    mean = float(x.mean())
    return Comparison(what, mean, mean - half, mean + half, tuple(x.tolist()), False, reported)


def over_seeds_and_clips(
    what: str,
    gap: Mapping[str, float],
    gains: Sequence[float],
    source: str,
    reported: float | None = None,
    sign: int = 1,
) -> Comparison:
    """The recorded interval of a paired bootstrap, `gap`, beside the gains of the single seeds.

    sign: -1 where the claim is that the difference is negative. Raises ValueError where the
    interval is not one of these seeds, since then the records come from different runs.
    """
    x = POINTS * sign * np.asarray(gains, dtype=float)
    mean, *ends = (POINTS * sign * gap[key] for key in ("mean", "low", "high"))
    if abs(x.mean() - mean) > ROUNDING:
        raise ValueError(
            f"{source}: the interval for {what!r} has the mean {mean:.3f}, the scores of its seeds "
            f"{x.mean():.3f}; record the study and its pairs from the same runs"
        )
    return Comparison(what, mean, min(ends), max(ends), tuple(x.tolist()), True, reported)
