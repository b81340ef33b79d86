"""The scoreboard: the rule on made-up intervals, verdicts that follow records, a page that fits.

Records are made here by the tools that make the real ones, from predictions whose quality is
chosen, so that what has to come out is known.
"""

import ast
import copy
import math
import re
from pathlib import Path

import ablation_pairs
import book_rules as rules
import conditions_map
import evidence as e
import measures
import numpy as np
import paper
import pytest
import scoreboard
from claims import CLAIMS, GROUPS, Claim
from evidence import Comparison, Finding, Verdict

from dmd import studies, tables
from dmd.baselines import METHODS
from dmd.metrics import compute

ROOT = Path(__file__).parent.parent
LABEL = np.random.default_rng(0).choice([-2.0, -1.0, 1.0, 2.0], 400)
HARD = np.random.default_rng(1).permutation(400)  # which clips a model gets right first
SEEDS = range(5)
BASE = 0.7  # share of right signs of a row that isn't named


def prediction(share, seed):
    """Signs of which about `share` are right: the easy clips, but for a few that the seed takes."""
    right = share * 400 > HARD
    few = np.random.default_rng([seed, round(1000 * share)]).integers(400, size=6)
    right[few] = ~right[few]
    return np.where(right, LABEL, -LABEL)


def cell(row, seed, share, heads):
    """A run as `dmd.cells` keeps it."""
    said = prediction(share, seed)
    found = {
        "row": row, "seed": seed, "learning_rate": 1e-3, "parameters": 9, "seconds": 1.0,
        "test": compute(said, LABEL), "prediction": said.tolist(), "label": LABEL.tolist(),
    }  # fmt: skip
    for graph, shares in heads.items():
        found[f"heads_{graph}"] = [compute(prediction(x, seed), LABEL) for x in shares]
    return found


def made(study, setting, shares, heads=None):
    """The record of a study, and its runs; shares: row -> share of right signs."""
    heads = heads or {}
    plain = {"homo": (0.7, 0.6, 0.6), "hetero": (0.7, 0.7, 0.7)}
    rows = [
        row for row in studies.STUDIES[study]()
        if "unaligned" not in setting or row.method == "dmd" or not METHODS[row.method].aligned_only
    ]  # fmt: skip
    runs = {
        row.name: [
            cell(
                row.name, seed, shares.get(row.name, BASE),
                plain | heads.get(row.name, {}) if row.method == "dmd" else {},
            )
            for seed in SEEDS
        ]
        for row in rows
    }  # fmt: skip
    return {"study": study, "setting": setting, "rows": tables.summarise(runs)}, runs


PROVENANCE = {"date": "2026-01-01", "commit": "0" * 40, "command": "c", "machine": "m"}


def records_of(setting="synthetic", shares=None, heads=None):
    """All records of a setting as the tools write them."""
    found, pairs, single = {}, [], {}
    methods = "table2" if setting.startswith("mosei") else "table1"
    for study in (methods, "table3", "table4", "table5"):
        record, runs = made(study, setting, shares or {}, heads)
        found[f"study_{study}_{setting}"] = record | {"provenance": PROVENANCE}
        if study in ablation_pairs.PAIRS:
            pairs += ablation_pairs.compare(study, runs)
            single[study] = ablation_pairs.heads(runs)
    found[f"ablations_{setting}"] = {"pairs": pairs, "heads": single, "provenance": PROVENANCE}
    return found


def claim(title):
    (found,) = [c for c in CLAIMS if c.title == title]
    return found


def verdict(title, records):
    return str(e.overall([f.verdict for f in claim(title).test(records)]))


@pytest.fixture(scope="module", autouse=True)
def quick():
    """Coarser intervals: what has to come out here is far from their ends."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tables, "DRAWS", 60)
        yield


@pytest.fixture(scope="module")
def committed():
    return e.read()


@pytest.fixture(scope="module")
def alike(quick):
    """Everything equally good, but for chance."""
    return records_of()


# The rule


@pytest.mark.parametrize(
    ("low", "high", "reported", "expected"),
    [
        (0.1, 5.0, 2.0, "holds"),
        (0.1, 0.2, 2.0, "holds"),  # however small
        (-3.0, -0.1, 2.0, "does not hold (the other way)"),
        (-3.0, 1.9, 2.0, "does not hold (less than reported)"),
        (-3.0, 2.1, 2.0, "can't tell"),
        (-30.0, 30.0, 2.0, "can't tell"),
        (0.0, 5.0, 2.0, "can't tell"),
        (-0.5, 0.9, None, "does not hold (not worth a point)"),
        (-0.5, 1.1, None, "can't tell"),
        (-0.5, -0.1, None, "does not hold (the other way)"),
        (-0.5, 0.9, 0.3, "can't tell"),
    ],
)
def test_the_rule(low, high, reported, expected):
    assert str(e.judge(low, high, reported)) == expected


HOLDS, OPEN = Verdict(e.HOLDS), Verdict(e.OPEN)
REVERSED, SMALLER = Verdict(e.FAILS, e.REVERSED), Verdict(e.FAILS, e.SMALLER)


@pytest.mark.parametrize(
    ("verdicts", "together"),
    [
        ([HOLDS, HOLDS], HOLDS),
        ([HOLDS, OPEN], OPEN),
        ([HOLDS, OPEN, SMALLER], SMALLER),
        ([SMALLER, REVERSED, HOLDS], REVERSED),
    ],
)
def test_several_comparisons_have_to_hold_together(verdicts, together):
    assert e.all_of(verdicts) == together == e.all_of(verdicts[::-1])


@pytest.mark.parametrize(
    ("verdicts", "word"),
    [
        ([], "untested"),
        ([HOLDS], "holds"),
        ([HOLDS, HOLDS], "holds"),
        ([HOLDS, OPEN], "mixed"),
        ([REVERSED, REVERSED], "does not hold (the other way)"),
        ([REVERSED, SMALLER], "does not hold"),
        ([REVERSED, HOLDS], "mixed"),
    ],
)
def test_several_data_agree_or_are_mixed(verdicts, word):
    assert str(e.overall(verdicts)) == word


# Intervals and power


def test_an_interval_over_seeds_is_that_of_student():
    found = e.over_seeds("x", [0.01, 0.02, 0.03], 2.0)
    assert (found.mean, found.reported, found.clips) == (pytest.approx(2.0), 2.0, False)
    half = 4.302653 / 3**0.5  # t with two degrees of freedom; the deviation is one point
    assert (found.low, found.high) == (pytest.approx(2 - half), pytest.approx(2 + half))
    assert found.visible == pytest.approx(half)


def test_the_sign_turns_gain_and_interval_round():
    gap = {"mean": -0.02, "low": -0.05, "high": 0.01}
    found = e.over_seeds_and_clips("x", gap, [-0.01, -0.03], "record", sign=-1)
    assert (found.low, found.mean, found.high) == pytest.approx((-1, 2, 5))
    assert found.seeds == pytest.approx((1, 3))


def test_an_interval_of_other_runs_is_refused():
    gap = {"mean": 0.02, "low": -0.05, "high": 0.05}
    with pytest.raises(ValueError, match=r"some_record: .* from the same runs"):
        e.over_seeds_and_clips("x", gap, [0.01, 0.02], "some_record")


@pytest.mark.parametrize("gain", [1.0, 2.5])
def test_as_many_seeds_as_said_see_the_gain_four_times_in_five(gain):
    seeds = tuple(np.array([-1.0, -0.5, 0.0, 0.5, 1.0]) * 2)
    n = Comparison("x", 0, -1, 1, seeds, clips=False, reported=gain).seeds_needed()
    spread = np.std(seeds, ddof=1)
    draws = np.random.default_rng(0).normal(gain, spread, (4000, n))
    seen = {k: np.mean([e.over_seeds("x", x[:k] / 100).low > 0 for x in draws]) for k in (n, n - 1)}
    assert seen[n] > 0.77 and seen[n - 1] < 0.83


def test_clips_set_a_floor_that_no_seeds_remove():
    seeds = (-1.0, 0.0, 1.0, 0.5, -0.5)
    wide = Comparison("x", 0, -2.0, 2.0, seeds, clips=True, reported=1.0)
    assert wide.seeds_needed() == math.inf
    fixed = Comparison("x", 0, -2.0, 2.0, seeds, clips=False, reported=1.0)
    assert fixed.seeds_needed() < 20
    spread = tuple(2 * x for x in seeds)  # so that much of the interval is due to seeds
    larger = Comparison("x", 0, -2.0, 2.0, spread, clips=True, reported=3.2)
    variance, bootstrap = np.var(spread, ddof=1), np.var(spread) / 5
    room = (3.2 / 2.8) ** 2 - ((2 / 1.96) ** 2 - bootstrap)
    assert larger.seeds_needed() == math.ceil(variance / room) > 2


# Verdicts follow the records

GOOD, BAD = 0.85, 0.55


@pytest.mark.parametrize(
    ("title", "shares", "expected"),
    [
        ("Feature decoupling improves the prediction", {"decoupling": GOOD}, "holds"),
        (
            "Feature decoupling improves the prediction",
            {"nothing": GOOD},
            "does not hold (the other way)",
        ),
        ("HomoGD adds to decoupling", {"decoupling_homo": GOOD}, "holds"),
        ("HeteroGD without crossmodal attention harms", {"decoupling_homo_hetero": BAD}, "holds"),
        (
            "HeteroGD without crossmodal attention harms",
            {"decoupling_homo_hetero": GOOD},
            "does not hold (the other way)",
        ),
        ("Crossmodal attention is the key to HeteroGD", {"dmd": GOOD}, "holds"),
        ("HeteroGD improves DMD behind attention", {"dmd": GOOD}, "holds"),
        ("DMD improves on a model without its parts", {"nothing": BAD}, "holds"),
        ("A GD-Unit improves MulT", {"mult_gd": GOOD}, "holds"),
        ("DMD beats MulT with a GD-Unit", {"mult_gd": BAD}, "holds"),
        ("DMD beats MulT", {"mult": GOOD}, "does not hold (the other way)"),
        ("DMD beats the other methods on aligned clips", {"dmd": GOOD}, "holds"),
        (
            "DMD beats the other methods on aligned clips",
            {"dmd": GOOD, "tfn": 0.95},
            "does not hold (the other way)",
        ),
        ("DMD beats the other methods on aligned clips", {"dmd": GOOD, "mica": 0.95}, "holds"),
        (
            "DMD beats the methods that disentangle features",
            {"dmd": GOOD, "misa": 0.95},
            "does not hold (the other way)",
        ),
        (
            "DMD beats the methods with crossmodal transformers",
            {"dmd": GOOD, "pmr": 0.95},
            "does not hold (the other way)",
        ),
        ("Graph-MFN falls far behind", {"graph_mfn": BAD}, "holds"),
    ],
)
def test_a_verdict_follows_the_predictions(title, shares, expected, alike):
    assert verdict(title, records_of(shares=shares)) == expected
    assert verdict(title, alike) != "holds"


@pytest.mark.parametrize(
    ("title", "row", "heads"),
    [
        ("Decoupling improves each modality", "decoupling", (0.8, 0.7, 0.7)),
        ("Decoupling brings the modalities closer", "decoupling", (0.7, 0.7, 0.7)),
        ("HomoGD improves each modality, the weak ones most", "decoupling_homo", (0.8, 0.7, 0.7)),
    ],
)
def test_verdicts_follow_the_heads(title, row, heads):
    records = records_of(heads={row: {"homo": heads}})
    records["ablations_synthetic"]["heads"].pop("table4")  # leaves the one contrast that changed
    assert verdict(title, records) == "holds"
    weaker = records_of(heads={row: {"homo": (0.9, 0.3, 0.3)}})
    weaker["ablations_synthetic"]["heads"].pop("table4")
    assert verdict(title, weaker) == "does not hold (the other way)"


def test_language_and_vision_follow_the_heads():
    vision = records_of(heads={"decoupling": {"homo": (0.6, 0.9, 0.6)}})
    assert verdict("Language is the strongest modality", vision).startswith("does not hold")
    deaf = records_of(heads={"dmd": {"hetero": (0.7, 0.5, 0.7)}})
    assert verdict("Attention lifts vision", deaf) == "does not hold (the other way)"
    assert verdict("Attention lifts vision", records_of()) == "holds"


def test_unaligned_data_count_for_the_unaligned_claim_only():
    records = records_of("unaligned", {"dmd": GOOD})
    assert verdict("DMD beats the other methods on aligned clips", records) == "untested"
    assert verdict("DMD beats the other methods on unaligned clips", records) == "holds"
    (found,) = claim("DMD beats the other methods on unaligned clips").test(records)
    assert set(found.missing) == {
        measures.NAMES[x] for x in paper.MOSI_UNALIGNED
        if x != "dmd" and METHODS[x].aligned_only
    }  # fmt: skip


@pytest.mark.parametrize("setting", ["mosei", "mosei_unaligned"])
def test_records_of_the_second_dataset_count_for_its_claim_only(setting):
    title, other = "DMD beats the other methods on CMU-MOSEI", "A GD-Unit improves MulT"
    records = records_of(setting, {"dmd": GOOD, "mult_gd": BAD})
    assert [verdict(x, records) for x in (title, other)] == ["holds", "untested"]
    assert verdict(title, records_of(setting, {"pmr": GOOD})).endswith("(the other way)")
    assert verdict("DMD beats the other methods on aligned clips", records) == "untested"


def test_bert_features_count_on_the_published_files_only():
    title = "DMD beats MISA and FDMER with BERT features"
    assert verdict(title, records_of("mosi", {"misa": GOOD})).endswith("(the other way)")
    assert verdict(title, records_of("mosei", {"dmd": GOOD})) == "holds"
    assert verdict(title, records_of("synthetic")) == "untested"


def test_two_data_that_disagree_are_mixed():
    records = records_of(shares={"mult_gd": GOOD}) | records_of("mosi_utterances", {"mult": GOOD})
    assert verdict("A GD-Unit improves MulT", records) == "mixed"


def with_edges(record, change):
    record = copy.deepcopy(record)
    for run in record["rows"]["paper"]["runs"]:
        for graph, groups in run["edges_by_reliable"].items():
            run["edges_by_reliable"][graph] = change(graph, np.array(groups)).tolist()
    return {measures.OBJECTIVE: record}


def test_verdicts_follow_the_edges(committed):
    record = committed[measures.OBJECTIVE]

    def from_language(graph, x):
        x = np.full_like(x, 0.05)
        x[:, 0, 1:] = x[:, 1, 2] = 0.3 + np.random.default_rng().uniform(0, 0.01)
        if graph == "homo":
            x[:, 1, 2] = 0.05
        return x

    def adapted(graph, x):
        x = np.full_like(x, 0.1) + np.random.default_rng().uniform(0, 0.01)
        for m in range(3):
            x[m, m] += 0.1
        return x

    homo, hetero, adapt = (c.title for c in GROUPS["Inside the model"][-3:])
    leads, adapts = with_edges(record, from_language), with_edges(record, adapted)
    assert [verdict(x, leads) for x in (homo, hetero)] == ["holds", "holds"]
    assert verdict(adapt, adapts) == "holds"
    assert verdict(adapt, leads) != "holds" and verdict(homo, adapts) != "holds"

    def to_vision_only(graph, x):
        x = from_language(graph, x)
        x[:, 0, 2] = 0.05
        return x

    one = with_edges(record, to_vision_only)
    assert all(verdict(x, one).startswith("does not hold") for x in (homo, hetero))


def test_verdicts_follow_the_scores_of_the_objectives_rows(committed):
    def better(row, by):
        record = copy.deepcopy(committed[measures.OBJECTIVE])
        for run in record["rows"][row]["runs"]:
            run["test"]["acc2_non0"] += by
            for head in run["heads"]["homo"]:
                head["acc7"] += by
        return {measures.OBJECTIVE: record}

    for title in (
        "Distillation helps where modalities differ in reliability",
        "Distilled common features separate seven classes",
    ):
        assert verdict(title, better("paper", 0.2)) == "holds"
        assert verdict(title, better("no_distillation", 0.2)).endswith("(the other way)")


def test_verdicts_follow_what_probes_read(committed):
    def changed(row, part, factors, by):
        record = copy.deepcopy(committed[measures.OBJECTIVE])
        for run in record["rows"][row]["runs"]:
            run["leakage"][part][factors] = [x + by for x in run["leakage"][part][factors]]
        return {measures.OBJECTIVE: record}

    title = "Decoupling reduces redundancy"
    assert verdict(title, changed("paper", "common", "own", -0.2)) == "holds"
    assert verdict(title, changed("paper", "private", "shared", 0.2)).endswith("(the other way)")
    title = "The margin loss consolidates the decoupling"
    assert verdict(title, changed("paper", "common", "own", 0.2)).endswith("(the other way)")
    both = changed("no_margin", "common", "own", 0.2)[measures.OBJECTIVE]
    for run in both["rows"]["no_margin"]["runs"]:
        run["leakage"]["private"]["shared"] = [x + 0.2 for x in run["leakage"]["private"]["shared"]]
    assert verdict(title, {measures.OBJECTIVE: both}) == "holds"
    title = "Features come apart into shared and own"
    both = changed("paper", "common", "own", -0.2)[measures.OBJECTIVE]
    assert verdict(title, {measures.OBJECTIVE: both}) != "holds"
    for run in both["rows"]["paper"]["runs"]:
        run["leakage"]["common"]["shared"] = [x + 0.2 for x in run["leakage"]["common"]["shared"]]
    assert verdict(title, {measures.OBJECTIVE: both}) == "holds"


def test_the_map_of_conditions_counts_where_reliabilities_differ():
    share = {"dmd": lambda gap: GOOD if gap else BAD, "no_graphs": lambda gap: BASE}
    runs = [
        cell(c.row, c.seed, share[c.row](c.data["reliability_gap"]), {}) | {"setting": c.setting}
        for c in conditions_map.cells()
    ]
    records = {measures.MAP: {"points": conditions_map.summary(runs), "provenance": PROVENANCE}}
    title = "Distillation helps where modalities differ in reliability"
    findings = claim(title).test(records)
    assert len(findings) == len(conditions_map.CLIPS) * sum(gap > 0 for gap in conditions_map.GAPS)
    assert verdict(title, records) == "holds"


# No record, no verdict


def test_without_records_every_claim_is_untested_and_says_what_would_test_it():
    text = scoreboard.generated({})
    assert f"{len(CLAIMS)} claims: untested {len(CLAIMS)}." in text
    assert all(f"`{c.command}`" in text for c in CLAIMS)


def test_a_claim_without_its_record_is_untested(committed):
    title = "HomoGD adds to decoupling"
    rest = {k: v for k, v in committed.items() if "table3" not in k}
    assert verdict(title, committed) != verdict(title, rest) == "untested"
    rest = {k: v for k, v in committed.items() if not k.startswith("ablations")}
    assert verdict(title, rest) == "untested"


def test_all_claims_that_can_be_tested_are_tested_by_full_records(committed):
    everything = committed | records_of() | records_of("unaligned") | records_of("mosei")
    untested = {c.title for c in CLAIMS if not c.test(everything)}
    assert untested == {c.title for c in CLAIMS if c.test is measures.not_tested}


def test_a_row_that_failed_is_named():
    records = records_of(shares={"dmd": GOOD})
    for row in records["study_table1_synthetic"]["rows"]:
        if row["row"] == "tfn":
            row["failed"] = 1
            del row["difference"], row["test"]
    (found,) = claim("DMD beats the other methods on aligned clips").test(records)
    assert found.missing == ("TFN",) and "TFN" in scoreboard.evidence([found])


# What the paper reports

BLOCKS = ("", "_BERT", "_UNALIGNED")


def test_the_papers_numbers_agree_with_each_other():
    for numbers, std in zip(paper.ALONE["FD"], paper.STD, strict=True):
        assert np.std(numbers) == pytest.approx(std, abs=0.06)
    assert paper.TABLE5["mult"] == paper.MOSI_UNALIGNED["mult"]
    assert paper.TABLE5["dmd"] == paper.MOSI_UNALIGNED["dmd"] == paper.TABLE3["dmd"]
    blocks = [getattr(paper, x + y) for x in ("MOSI", "MOSEI") for y in BLOCKS]
    for block in blocks:
        assert min(paper.gains(block).values()) > 0 and "dmd" not in paper.gains(block)


def test_reported_gains_are_positive_in_every_comparison(committed, alike):
    for c in CLAIMS:
        for finding in c.test(committed | alike):
            assert all(x.reported is None or x.reported > 0 for x in finding.comparisons), c.title


def test_settings_are_those_of_the_studies():
    assert set(measures.DATA) == set(studies.SCALES["study"].settings)
    assert {*measures.ALIGNED, *measures.UNALIGNED} < set(measures.DATA)


# The page


def test_the_page_is_as_new_as_the_records(committed):
    text = scoreboard.PAGE.read_text(encoding="utf-8")
    assert scoreboard.page(text, committed) == text, "run: python tools/scoreboard.py"


def test_check_says_so_when_it_is_not(tmp_path, capsys):
    assert scoreboard.main(["--check"]) == 0
    assert scoreboard.main(["--check", "--results", str(tmp_path)]) == 1
    assert "python tools/scoreboard.py" in capsys.readouterr().out


def test_a_page_without_its_markers_is_refused():
    with pytest.raises(ValueError, match="markers"):
        scoreboard.page("# Scoreboard\n", {})


def test_words_around_the_generated_part_stay(committed):
    text = f"# A\n\n{scoreboard.BEGIN}\nold\n{scoreboard.END}\n\nB\n"
    new = scoreboard.page(text, committed)
    assert new.startswith("# A\n") and new.endswith("\n\nB\n") and "\nold\n" not in new
    assert scoreboard.page(new, committed) == new


@pytest.mark.parametrize("c", CLAIMS, ids=lambda c: c.title)
def test_every_claim_leads_to_a_heading_of_a_chapter(c):
    name, anchor = c.chapter.split("#")
    page = (ROOT / "book" / name).with_suffix(".md")
    assert (ROOT / "book" / name).exists() and anchor in rules.anchors(page)


def test_titles_differ_and_every_section_is_linked(committed):
    text = scoreboard.generated(committed)
    assert len({c.title for c in CLAIMS}) == len(CLAIMS)
    for c in CLAIMS:
        assert f"### {c.title}\n" in text and text.count(scoreboard.link(c)) >= 1


def test_linked_records_exist_and_are_listed(committed):
    text = scoreboard.PAGE.read_text(encoding="utf-8")
    linked = set(re.findall(r"/blob/main/data/results/(\w+)\.json\)", text))
    assert linked and linked <= set(committed)
    assert all(committed[name]["provenance"]["commit"][:10] in text for name in linked)


def test_commands_name_what_exists():
    for c in CLAIMS:
        for tool in re.findall(r"python (tools/\w+\.py)", c.command):
            assert (ROOT / tool).is_file(), c.command
        for name in re.findall(r"dmd study (\w+)", c.command):
            assert name in studies.STUDIES, c.command
        for names in re.findall(r"--settings ([\w ]+)", c.command):
            assert all(name in studies.SCALES["study"].settings for name in names.split())


def test_tables_are_narrow(committed):
    text = scoreboard.generated(committed)
    columns = {line.count(" | ") + 1 for line in text.splitlines() if line.startswith("|")}
    assert columns == {3, 4}


def test_the_paragraph_on_distillation_counts_graph_claims_only():
    def claim_of(graphs, *ends):
        comparisons = tuple(
            Comparison("x", (a + b) / 2, a, b, (0.0, 0.1), False, 2.0) for a, b in ends
        )
        c = Claim("T", "p", "w", "07_homogd.ipynb", measures.not_tested, "c", graphs=graphs)
        return c, [Finding("synthetic", comparisons, ())]

    found = [claim_of(True, (-1, 1), (-1, 3), (0.5, 1), (-2, -1)), claim_of(False, (5, 6))]
    text = scoreboard.distillation(found)
    assert text.startswith("4 comparisons") and "**2 of 4 intervals contain zero" in text
    assert "Above zero: 1; below: 1;" in text and "3 exclude one as large" in text
    assert "run from −1.5 to +1.0 points" in text and "smaller than 0.2 to 2.0 points" in text


def test_chapter_13_reports_the_numbers_of_the_scoreboard():
    path = ROOT / "book" / "13_against_other_methods.md"
    cells = [c.text for c in rules.Chapter(path.read_text(encoding="utf-8")).code]
    (cell,) = [c for c in cells if "MOSEI = {" in c]
    told = {
        node.targets[0].id: ast.literal_eval(node.value)
        for node in ast.parse(cell).body
        if isinstance(node, ast.Assign) and node.targets[0].id in ("MOSI", "APART", "MOSEI", "BERT")
    }
    for name, plain, bert, kind in (
        ("MOSI", paper.MOSI, paper.MOSI_BERT, "aligned"),
        ("MOSEI", paper.MOSEI, paper.MOSEI_BERT, "larger"),
    ):
        assert told[name] == plain | {k: x for k, x in bert.items() if k != "dmd"}
        assert told["BERT"][kind] == bert["dmd"]
    assert told["APART"] == paper.MOSI_UNALIGNED
