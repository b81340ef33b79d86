"""The scoreboard: every claim of the paper with its verdict, written from the records.

    python tools/scoreboard.py            write the generated part of book/scoreboard.md
    python tools/scoreboard.py --check    say whether it is up to date

The rule is in `evidence.py`, the claims are in `claims.py`. It trains nothing.
"""

import argparse
import math
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from claims import CLAIMS, GROUPS, Claim
from evidence import (
    FAILS,
    HOLDS,
    MIXED,
    OPEN,
    RESULTS,
    REVERSED,
    UNTESTED,
    WORTH,
    Comparison,
    Finding,
    Records,
    Verdict,
    overall,
    read,
)
from myst_parser.mdit_to_docutils.base import default_slugify
from set_repository import repository_url

PAGE = Path(__file__).resolve().parent.parent / "book" / "scoreboard.md"
BEGIN, END = "<!-- written by tools/scoreboard.py -->", "<!-- end of what it writes -->"
WORDS = (HOLDS, FAILS, OPEN, MIXED, UNTESTED)
CHANCE = 0.025  # of an interval that lies wholly on one given side, where there is no difference


def number(x: float) -> str:
    """A gain with its sign, one decimal."""
    return "0.0" if abs(x) < 0.05 else f"{x:+.1f}".replace("-", "−")


def plural(n: float, noun: str) -> str:
    """A count with its noun."""
    return f"{n:,.0f} {noun}" + ("" if n == 1 else "s")


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def to_see(c: Comparison) -> str:
    """How many seeds would see the paper's gain."""
    gain = f"reported {number(c.reported)}" if c.reported is not None else "a point"
    seeds = c.seeds_needed()
    return f"{gain}: " + ("too few clips" if math.isinf(seeds) else plural(seeds, "seed"))


def cells(what: str, c: Comparison) -> list[str]:
    """A comparison as a row: gain with its interval, power, verdict."""
    interval = f"{number(c.mean)} ({number(c.low)} to {number(c.high)})"
    return [what, interval, to_see(c), str(c.verdict)]


def span(values: Sequence[float]) -> str:
    """The range of some sizes in points."""
    low, high = f"{min(values):.1f}", f"{max(values):.1f}"
    return low if low == high else f"{low} to {high}"


def power(comparisons: Sequence[Comparison]) -> str:
    """What an interval is about, and what it could have shown."""
    about = "seeds and clips" if comparisons[0].clips else "seeds, for these clips"
    return (
        f"Intervals over {about}; {min(len(c.seeds) for c in comparisons)} seeds. Gains smaller "
        f"than {span([c.visible for c in comparisons])} points would not have been seen."
    )


def tally(verdicts: Sequence[Verdict]) -> str:
    """How many there are of each word."""
    count = Counter(v.word for v in verdicts)
    return ", ".join(f"{word} {count[word]}" for word in WORDS if count[word])


def evidence(findings: Sequence[Finding]) -> str:
    """The numbers of a claim: one table if each kind of data has one comparison, else one each."""
    if all(len(f.comparisons) == 1 for f in findings):
        comparisons = [f.comparisons[0] for f in findings]
        named = {c.what for c in comparisons} - {f.data for f in findings}
        head = ["Data", "Gain (95 %)", "Seeds to see it", "Verdict"]
        rows = [cells(f.data, c) for f, c in zip(findings, comparisons, strict=True)]
        what = f"Compared: {'; '.join(sorted(named))}. " if named else ""
        return f"{table(head, rows)}\n\n{what}{power(comparisons)}"
    texts = []
    for f in findings:
        verdicts = [c.verdict for c in f.comparisons]
        text = f"**On {f.data}: {f.verdict}.** {plural(len(verdicts), 'comparison')}: "
        text += f"{tally(verdicts)}. {power(f.comparisons)}"
        if f.missing:
            text += f" The record has no complete row of {', '.join(f.missing)}."
        if len(verdicts) > 5:
            text += (
                f" Were there no differences at all, about {CHANCE * len(verdicts):.1f} of them "
                f"would look reversed by chance; {verdicts.count(Verdict(FAILS, REVERSED))} did."
            )
        head = ["Compared", "Gain (95 %)", "Seeds to see it", "Verdict"]
        texts += [text, table(head, [cells(c.what, c) for c in f.comparisons])]
    return "\n\n".join(texts)


def link(claim: Claim) -> str:
    """A link to the claim's section on the page."""
    return f"[{claim.title}](#{default_slugify(claim.title)})"


def record(name: str) -> str:
    """A link to a record."""
    return f"[{name}]({repository_url()}/blob/main/data/results/{name}.json)"


def section(claim: Claim, findings: Sequence[Finding]) -> str:
    """All about one claim."""
    verdict = str(overall([f.verdict for f in findings]))
    chapter = f"[chapter {int(claim.chapter[:2])}]({claim.chapter})"
    lines = [
        f"### {claim.title}",
        f"*{claim.place}:* {claim.words}",
        f"**Verdict: {verdict}.**",
    ]
    if findings:
        lines.append(evidence(findings))
        names = dict.fromkeys(name for f in findings for name in f.records)
        source = f"More in {chapter}. Records: {', '.join(map(record, names))}."
    else:
        source = f"No record tests it; `{claim.command}` would. Related: {chapter}."
    lines.append(f"*Limits.* {claim.limits} {source}" if claim.limits else source)
    return "\n\n".join(lines)


def summary_row(claim: Claim, findings: Sequence[Finding]) -> list[str]:
    """The claim in the first table, with the gain that decides on each kind of data."""
    means = [f.deciding.mean for f in findings]
    gain = "; ".join(map(number, means))
    if len(means) > 3:
        gain = f"{number(min(means))} to {number(max(means))}"
    verdict = str(overall([f.verdict for f in findings]))
    return [f"{link(claim)} ({claim.place})", verdict, gain or "none"]


def distillation(found: Sequence[tuple[Claim, Sequence[Finding]]]) -> str:
    """What all comparisons say that add a graph and nothing else."""
    claims = [(claim, findings) for claim, findings in found if claim.graphs and findings]
    comparisons = [c for _, findings in claims for f in findings for c in f.comparisons]
    if not comparisons:
        return "No record compares a model with and without a graph."
    above, below = sum(c.low > 0 for c in comparisons), sum(c.high < 0 for c in comparisons)
    n = len(comparisons)
    numbered = [c for c in comparisons if c.reported is not None]
    excluded = sum(c.high < c.reported for c in numbered if c.reported is not None)
    needed = [replace(c, reported=WORTH).seeds_needed() for c in comparisons]
    few = [x for x in needed if math.isfinite(x)]
    names = "; ".join(link(claim) for claim, _ in claims)
    text = (
        f"{plural(n, 'comparison')} on this page add a distillation graph and nothing else. "
        f"**{n - above - below} of {n} intervals contain zero: there the gain lies within the "
        f"noise.** Above zero: {above}; below: {below}; were there no effect at all, about "
        f"{CHANCE * n:.1f} each would by chance. The mean gains run from "
        f"{number(min(c.mean for c in comparisons))} to "
        f"{number(max(c.mean for c in comparisons))} points. Of the {len(numbered)} for which the "
        f"paper reports a gain, {excluded} exclude one as large."
    )
    seeds = (
        f" For {len(few)} of them {min(few):.0f} to {plural(max(few), 'seed')} would "
        "see a gain of one point four times in five"
        if few
        else " None of them could see a gain of one point four times in five"
    )
    rest = f"; for {n - len(few)} no number of seeds would, on so few clips" if few else ""
    visible = span([c.visible for c in comparisons])
    return (
        f"{text}\n\n*Power.* Gains smaller than {visible} points, by comparison, would not have "
        f"been seen.{seeds}{rest}.\n\nThe claims: {names}."
    )


def generated(records: Records) -> str:
    """The part of the page that is computed."""
    found = {claim.title: claim.test(records) for claim in CLAIMS}
    verdicts = [overall([f.verdict for f in findings]) for findings in found.values()]
    head = ["Claim (place in the paper)", "Verdict", "Gain"]
    texts = [
        "## All claims",
        f"{plural(len(CLAIMS), 'claim')}: {tally(verdicts)}. The last column has the gain, in "
        "points, that decides; one for each kind of data.",
        table(head, [summary_row(claim, found[claim.title]) for claim in CLAIMS]),
        "## What distillation gains",
        distillation([(claim, found[claim.title]) for claim in CLAIMS]),
    ]
    for group, claims in GROUPS.items():
        texts += [f"## {group}", *(section(claim, found[claim.title]) for claim in claims)]
    used = sorted({name for fs in found.values() for f in fs for name in f.records})
    lines = []
    for name in used:
        made = records[name]["provenance"]
        lines.append(
            f"- {record(name)}: {made['date'][:10]}, commit `{made['commit'][:10]}`, "
            f"`{made['command']}`, {made['machine']}"
        )
    return "\n\n".join([*texts, "## The records", "\n".join(lines) or "None is at hand."])


def page(text: str, records: Records) -> str:
    """The page with its generated part written anew. Raises ValueError without the markers."""
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise ValueError(f"{PAGE.name}: the markers {BEGIN!r} and {END!r} are not there once each")
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    return f"{before}{BEGIN}\n\n{generated(records)}\n\n{END}{after}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the page, or check it; the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing, exit 1 if outdated")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the records")
    options = parser.parse_args(arguments)
    text = PAGE.read_text(encoding="utf-8")
    new = page(text, read(options.results))
    if new == text:
        return 0
    if options.check:
        print(f"book/{PAGE.name} is older than the records: python tools/scoreboard.py")
        return 1
    PAGE.write_text(new, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
