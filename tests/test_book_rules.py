"""The book as a text: every chapter keeps the rules, and every rule can be broken.

The rules are in `book_rules.py`. A chapter is any `book/NN_name.md`; the pages around the chapters
are checked for links, spelling and completeness.
"""

import importlib
import re
from pathlib import Path

import book_rules as rules
import pairs
import pytest
import set_repository
import yaml

ROOT = Path(__file__).resolve().parent.parent
BOOK = ROOT / "book"
CHAPTERS = sorted(BOOK.glob("[0-9][0-9]_*.md"))
PAGES = sorted(BOOK.glob("*.md"))
INSTALL = set_repository.install_cell(set_repository.repository_url(ROOT))

by_name = {"ids": lambda x: x.stem if isinstance(x, Path) else getattr(x, "__name__", None)}


def prose(path):
    """The Markdown of a page, without the cells and the head that a chapter has."""
    text = path.read_text(encoding="utf-8")
    return rules.Chapter(text).markdown if path in CHAPTERS else text


# Every chapter


@pytest.mark.parametrize("rule", rules.RULES, **by_name)
@pytest.mark.parametrize("path", CHAPTERS, **by_name)
def test_a_chapter_keeps_the_rule(path, rule):
    assert rule(rules.Chapter(path.read_text(encoding="utf-8"))) == []


@pytest.mark.parametrize("path", CHAPTERS, **by_name)
def test_a_chapter_begins_with_the_one_install_cell(path):
    chapter = rules.Chapter(path.read_text(encoding="utf-8"))
    assert rules.one_install_cell(chapter, INSTALL) == []


@pytest.mark.parametrize("path", PAGES, **by_name)
def test_links_lead_somewhere(path):
    own = path.with_suffix(".ipynb").name if path in CHAPTERS else path.name
    assert rules.links_resolve(prose(path), BOOK, own) == []


@pytest.mark.parametrize("path", [p for p in PAGES if p.stem != "references"], **by_name)
def test_the_spelling_is_british(path):
    assert rules.british(prose(path)) == []


def test_pairs_agree_and_carry_no_outputs():
    assert pairs.problems(ROOT) == []


# The book as a whole


def toc_files(toc):
    """The files of a table of contents, its root first."""
    return [toc["root"], *(c["file"] for part in toc["parts"] for c in part["chapters"])]


def test_every_page_is_in_the_table_of_contents_and_the_reverse():
    listed = toc_files(yaml.safe_load((ROOT / "_toc.yml").read_text(encoding="utf-8")))
    assert sorted(listed) == sorted(f"book/{path.stem}" for path in PAGES)
    chapters = [name for name in listed if re.match(r"book/\d", name)]
    assert chapters == sorted(chapters)


def table_rows(page, first=r"\d+"):
    """The cells of each row of a page's tables whose first cell matches."""
    lines = (BOOK / page).read_text(encoding="utf-8").splitlines()
    rows = [[c.strip() for c in line.strip("|").split("|")] for line in lines if "|" in line[:1]]
    return [row for row in rows if re.fullmatch(first, row[0])]


def test_the_front_page_links_exactly_the_chapters_that_exist():
    rows = table_rows("index.md")
    assert [int(row[0]) for row in rows] == list(range(1, 17))
    linked = {int(r[0]): m[1] for r in rows if (m := re.search(r"\]\((.*?)\)", r[1]))}
    assert linked == {int(p.stem[:2]): f"{p.stem}.ipynb" for p in CHAPTERS}


def test_the_index_has_each_equation_once():
    assert [int(row[0]) for row in table_rows("equations.md")] == list(range(1, 12))


@pytest.mark.parametrize("row", table_rows("equations.md"), ids=lambda row: f"Eq. {row[0]}")
def test_an_equation_leads_to_its_chapter_its_code_and_its_tests(row):
    number, _, chapter, symbol, tests = row
    there = {int(path.stem[:2]): path for path in CHAPTERS}
    text, link = re.fullmatch(r"\[?(\d+)(?:\]\((.*)\))?", chapter).groups()
    if int(text) in there:
        page = there[int(text)]
        assert link, f"{page.name} exists: link to it"
        name, anchor = link.split("#")
        assert name == f"{page.stem}.ipynb"
        assert anchor in rules.anchors(page)
        assert anchor.startswith(f"equation-{number}-")
    else:
        assert link is None
    assert resolves(symbol.strip("`"))
    for path in re.findall(r"`(.*?)`", tests):
        assert (ROOT / path).exists()
        assert symbol.strip("`").split(".")[-1] in (ROOT / path).read_text(encoding="utf-8")


def resolves(symbol):
    """Whether a dotted name leads to something in the package."""
    parts = symbol.split(".")
    for cut in range(len(parts) - 1, 0, -1):
        try:
            thing = importlib.import_module(".".join(parts[:cut]))
        except ModuleNotFoundError:
            continue
        for name in parts[cut:]:
            thing = getattr(thing, name, None)
        return thing is not None
    return False


def test_a_name_that_does_not_exist_does_not_resolve():
    assert resolves("dmd.losses.margin")
    assert resolves("dmd.graph.GDUnit.edge_weights")
    assert not resolves("dmd.losses.margins")
    assert not resolves("dmd.nowhere.margin")


def test_the_api_page_shows_every_module_and_no_other():
    package = ROOT / "dmd"
    dotted = {".".join(p.relative_to(ROOT).with_suffix("").parts) for p in package.rglob("*.py")}
    modules = {name.removesuffix(".__init__") for name in dotted}
    shown = re.findall(r"automodule:: (\S+)", (BOOK / "api.md").read_text(encoding="utf-8"))
    assert len(shown) == len(set(shown))
    assert set(shown) == modules - {"dmd", "dmd.__main__"}


# Every rule can be broken: a small chapter that keeps all of them but the length, broken one by
# one

GOOD = """---
kernelspec:
  display_name: Python 3
  language: python
  name: python3
---

# A chapter

```{code-cell}
:tags: [remove-output]

INSTALL
```

The paper reports 84.5% ([Li et al.](references.md#li-et-al-2023)). A weight of $0.15$, or `0.3`,
is in Sec. 3.1. The behaviour of two colours.

## Equation (4): the margin loss

$$
x = 1.5
\\tag{4}
$$

```{code-cell}
figure, axes = plt.subplots()
viz.show(figure, "words")
viz.slider(draw, values, "label", alt)
```

### Exercise 1: a

<details><summary>Solution</summary>

Yes.

</details>

**Exercise 2.** b

```{code-cell}
:tags: [hide-cell]

# @title Solution
print(1)
```

### Exercise 3: c

<details><summary>Solution</summary>

No.

</details>

## Check yourself

First?

<details><summary>a</summary>

Right: it is.

</details>
<details><summary>b</summary>

**Wrong**: it is not.

</details>

Second?

- <details><summary>a</summary>Wrong.</details>
- <details><summary>b</summary>Right.</details>

Third?

<details><summary>a</summary>

Wrong.

</details>

<details><summary>b</summary>

Right.

</details>

## Where this lives in `dmd`

In [the API](api.md#dmdlosses), after [Equation (4)](#equation-4-the-margin-loss).
""".replace("INSTALL", INSTALL)

BREAKS = [
    ("no_directives", "The behaviour", "\n:::{note}\nThe behaviour"),
    ("no_directives", "The behaviour", "See {ref}`there`. The behaviour"),
    ("no_directives", "The behaviour", "```{note}\nx\n```\n\nThe behaviour"),
    ("no_directives", "## Check", "(check)=\n\n## Check"),
    ("no_typed_results", "([Li et al.](references.md#li-et-al-2023))", "on MOSI"),
    ("no_typed_results", "The behaviour", "Accuracy is 77.0 here. The behaviour"),
    ("no_typed_results", "The behaviour", "It rises by 3 per cent. The behaviour"),
    ("no_typed_results", "Yes.", "It is 12.5."),
    ("pictures_speak", 'viz.show(figure, "words")', "plt.show()"),
    (
        "pictures_speak",
        'viz.show(figure, "words")\nviz.slider(draw, values, "label", alt)',
        "figure",
    ),
    ("pictures_speak", 'viz.show(figure, "words")', 'display(HTML("<img src=x>"))'),
    ("pictures_speak", 'viz.show(figure, "words")', 'display(Image("x.png"))'),
    ("pictures_speak", "Yes.", "![](x.png)"),
    ("pictures_speak", "Yes.", "<img src='x.png'>"),
    ("pictures_speak", "Yes.", "<img src='x.png' alt=''>"),
    ("has_slider", "viz.slider(", "viz.table("),
    ("headings_descend", "## Equation (4)", "### Equation (4)"),
    ("headings_descend", "## Check", "# Check"),
    ("headings_descend", "# A chapter\n", "\n"),
    ("equations_have_headings", "## Equation (4): the", "## The"),
    ("equations_have_headings", "\\tag{4}", "\\tag{5}"),
    ("questions_mark_themselves", "Right: it is.", "Perhaps."),
    ("questions_mark_themselves", "**Wrong**: it is not.", "Right too."),
    ("questions_mark_themselves", "Second?", ""),
    ("questions_mark_themselves", "Third?\n\n<details><summary>a</summary>\n\nWrong.", "x"),
    ("exercises_have_solutions", "# @title Solution\n", ""),
    ("exercises_have_solutions", "<summary>Solution</summary>\n\nNo", "<summary>Hint</summary>No"),
    ("exercises_have_solutions", "### Exercise 3: c", "### More"),
    ("exercises_have_solutions", "**Exercise 2.** b", "## More\n\nb"),
    ("ends_in_the_package", "## Where this lives in `dmd`", "## Recap"),
    ("ends_in_the_package", "after [", "see\n\n## More\n\n["),
]


@pytest.mark.parametrize("rule", [r for r in rules.RULES if r is not rules.lengths], **by_name)
def test_the_model_chapter_keeps_the_rule(rule):
    assert rule(rules.Chapter(GOOD)) == []


@pytest.mark.parametrize(("rule", "old", "new"), BREAKS)
def test_the_rule_can_be_broken(rule, old, new):
    assert GOOD.count(old) >= 1
    assert getattr(rules, rule)(rules.Chapter(GOOD.replace(old, new))) != []


def test_each_rule_is_broken_somewhere_above():
    assert {name for name, *_ in BREAKS} == {r.__name__ for r in rules.RULES} - {"lengths"}


def test_another_install_cell_or_one_without_its_tag_is_refused():
    assert rules.one_install_cell(rules.Chapter(GOOD), INSTALL) == []
    changed = GOOD.replace("%pip install", "%pip install --upgrade")
    assert rules.one_install_cell(rules.Chapter(changed), INSTALL)
    assert rules.one_install_cell(rules.Chapter(GOOD.replace("remove-output", "x")), INSTALL)
    assert rules.one_install_cell(rules.Chapter("# No code"), INSTALL)


def chapter_of(count, lines=(), tag=""):
    """A chapter of `count` words, with one cell of the given lines."""
    cell = "\n".join(["```{code-cell}", f":tags: [{tag}]\n" if tag else "", *lines, "```"])
    return rules.Chapter("word " * count + "\n\n" + (cell if lines else ""))


@pytest.mark.parametrize(
    ("chapter", "kept"),
    [
        (chapter_of(1_500), True),
        (chapter_of(3_000), True),
        (chapter_of(1_499), False),
        (chapter_of(3_001), False),
        (chapter_of(2_000, ["x = 1"] * 15), True),
        (chapter_of(2_000, ["x = 1"] * 16), False),
        (chapter_of(2_000, ["# why", "x = 1", ""] * 7), True),
        (chapter_of(2_000, ["x = 1"] * 30, "hide-cell"), True),
        (chapter_of(2_000, ["x = 1"] * 31, "hide-cell"), False),
    ],
)
def test_lengths_have_bounds(chapter, kept):
    assert (rules.lengths(chapter) == []) == kept


def test_code_needs_words_around_it():
    cells = "\n\n".join(["```{code-cell}\nx = 1\n# why\ny = 2\n```"] * 200)
    assert any(
        "a line" in c for c in rules.lengths(rules.Chapter("word " * 1_599 + "\n\n" + cells))
    )
    assert rules.lengths(rules.Chapter("word " * 1_600 + "\n\n" + cells)) == []


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("one two-part it's", 3),
        ("a $x + y$ and `code here` [link](a/b.md)", 5),
        ("$$\na + b\n$$", 0),
        ("<p class='x'>one</p>", 1),
        ("```python\na b c\n```", 0),
    ],
)
def test_words_are_those_of_the_prose(text, count):
    assert rules.words(text) == count


@pytest.mark.parametrize(
    "word", ["color", "Center", "behavior", "normalize", "optimizer", "modeling", "summarized"]
)
def test_american_spellings_are_seen_in_prose_only(word):
    assert rules.british(f"The {word} is here.") != []
    assert (
        rules.british(f"The `{word}`, a [link]({word}.md), *Title with {word}*, $\\{word}$.") == []
    )


def test_british_spellings_pass():
    text = "Colour, centre, behaviour, normalise, optimiser, size, prize, seize, colourblind, grey."
    assert rules.british(text) == []


@pytest.fixture
def small_book(tmp_path):
    (tmp_path / "page.md").write_text("# Page\n\n## A `code` heading: here\n\n##### Deep\n")
    (tmp_path / "01_one.md").write_text(GOOD)
    (tmp_path / "01_one.ipynb").write_text("{}")
    return tmp_path


@pytest.mark.parametrize(
    ("link", "kept"),
    [
        ("page.md", True),
        ("page.md#a-code-heading-here", True),
        ("01_one.ipynb#equation-4-the-margin-loss", True),
        ("#page", True),
        ("https://example.org/x#y", True),
        ("page.md#another-heading", False),
        ("page.md#deep", False),
        ("none.md", False),
        ("01_one.md", False),
        ("01_one.ipynb#x", False),
        ("../page.md", False),
        ("#nowhere", False),
    ],
)
def test_a_broken_link_is_seen(small_book, link, kept):
    assert (rules.links_resolve(f"See [it]({link}).", small_book, "page.md") == []) == kept
