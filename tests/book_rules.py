"""The rules for a chapter that a machine can check; `test_book_rules.py` applies them.

Each rule takes a chapter and returns its complaints, one sentence each: none if all is well.
"""

import ast
import re
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import jupytext
from markdown_it import MarkdownIt
from mdit_py_plugins.dollarmath import dollarmath_plugin
from myst_parser.mdit_to_docutils.base import default_slugify

WORDS = (1_500, 3_000)
WORDS_A_LINE = 4  # of prose for each line of visible code
CELL_LINES = {"visible": 15, "hidden": 30}
QUESTIONS = 3
EXERCISES = (3, 5)
LAST_SECTION = "Where this lives in dmd"
INSTALL_TAGS = {"remove-output"}
HIDDEN = {"hide-cell", "hide-input", "remove-cell", "remove-input"}
AMERICAN = (
    r"colou?rblind|colors?|colored|coloring|centers?|centered|behaviors?|favors?|favorite|honor|"
    r"neighbors?|neighboring|labeled|labeling|modeled|modeling|canceled|traveled|gray|artifacts?|"
    r"fulfill|catalog|analyzes?|analyzed|analyzing|"
    r"(?:normal|regular|organ|visual|optim|minim|maxim|summar|general|penal|recogn|real|initial|"
    r"special|vector|standard|random|emphas|memor|util|character|local|discret|quant|parametr)"
    r"iz(?:e|es|ed|er|ers|ing|ation|ations)"
)
AMERICAN_WORD = re.compile(rf"\b(?!colourblind\b)(?:{AMERICAN})\b", re.IGNORECASE)


@dataclass
class Heading:
    """A heading: its level, its words, and the anchor that links go to."""

    level: int
    title: str
    slug: str


@dataclass
class Cell:
    """A cell of a chapter: its kind (`markdown` or `code`), text and tags."""

    kind: str
    text: str
    tags: frozenset[str] = frozenset()

    @property
    def hidden(self) -> bool:
        return bool(self.tags & HIDDEN)

    @property
    def lines(self) -> list[str]:
        """The lines that count: neither blank nor a comment."""
        lines = (line.strip() for line in self.text.splitlines())
        return [line for line in lines if line and not line.startswith("#")]


class Chapter:
    """A chapter as its `.md` file says it."""

    def __init__(self, text: str) -> None:
        self.cells = [
            Cell(c.cell_type, c.source, frozenset(c.metadata.get("tags", [])))
            for c in jupytext.reads(text, fmt="md:myst").cells
            if c.cell_type in ("markdown", "code")
        ]

    @property
    def markdown(self) -> str:
        return "\n\n".join(c.text for c in self.cells if c.kind == "markdown")

    @property
    def code(self) -> list[Cell]:
        return [c for c in self.cells if c.kind == "code"]

    @property
    def headings(self) -> list[Heading]:
        return headings(self.markdown)


def headings(markdown: str) -> list[Heading]:
    """All headings, with the anchors that MyST and GitHub give them."""
    tokens = MarkdownIt("commonmark").use(dollarmath_plugin).enable("table").parse(markdown)
    found: list[Heading] = []
    for opening, inline in pairwise(tokens):
        if opening.type == "heading_open":
            parts = [c.content for c in inline.children or [] if c.type in ("text", "code_inline")]
            title, slug = "".join(parts), default_slugify("".join(parts))
            taken, n, unique = {h.slug for h in found}, 1, slug
            while unique in taken:
                unique, n = f"{slug}-{n}", n + 1
            found.append(Heading(int(opening.tag[1]), title, unique))
    return found


def strip_code(markdown: str) -> str:
    """The text without fenced blocks."""
    return re.sub(r"(?ms)^(`{3,}|~{3,}).*?^\1`*\s*$", "", markdown)


def strip_math(markdown: str, put: str = " ") -> str:
    """The text with `put` where a formula stood."""
    markdown = re.sub(r"(?s)\$\$.*?\$\$", put, markdown)
    return re.sub(r"(?<![\\$])\$(?!\s)[^$]+?(?<![\s\\])\$(?!\d)", put, markdown)


def words(markdown: str) -> int:
    """Words of prose; a formula in a line and a code span are one word each."""
    text = re.sub(r"(?s)\$\$.*?\$\$", " ", strip_code(markdown))
    text = strip_math(re.sub(r"`[^`]+`", "code", text), "formula")
    text = re.sub(r"\]\([^)]*\)", "]", re.sub(r"<[^>]+>", " ", text))
    return len(re.findall(r"[^\W_]+(?:['’-][^\W_]+)*", text))


def exercises(markdown: str) -> list[str]:
    """The text of each exercise: from `### Exercise 1` or `**Exercise 1.**` to the next heading."""
    start = r"(?m)^(?:#{2,6} +|\*\*)Exercise \d+"
    return [re.split(r"(?m)^#{1,6} ", t)[0] for t in re.split(start, strip_code(markdown))[1:]]


def details(markdown: str) -> list[tuple[str, str, int, int]]:
    """Each `<details>`: its summary, its body, and where it starts and ends."""
    pattern = r"(?is)<details[^>]*>\s*<summary>(.*?)</summary>(.*?)</details>"
    return [(m[1], m[2], m.start(), m.end()) for m in re.finditer(pattern, markdown)]


def no_directives(chapter: Chapter) -> list[str]:
    """Nothing that only MyST understands: elsewhere it would show as it is written."""
    found = []
    for line in chapter.markdown.splitlines():
        if re.match(r"\s*(`{3,}|~{3,})\s*\{", line) or re.match(r"\s*:{3,}", line):
            found.append(f"a directive: {line.strip()}")
        if re.search(r"(?<!`)\{[A-Za-z][\w:.+-]*\}`", line):
            found.append(f"a role: {line.strip()}")
        if re.match(r"\s*\([\w:.-]+\)=\s*$", line):
            found.append(f"a MyST target: {line.strip()}")
    return found


def one_install_cell(chapter: Chapter, install: str) -> list[str]:
    """The first code cell installs `dmd`, as everywhere, and pip's output is not shown."""
    if not chapter.code or chapter.code[0].text.strip() != install.strip():
        return ["the first code cell is not the install cell of tools/set_repository.py"]
    return [] if chapter.code[0].tags == INSTALL_TAGS else ["the install cell's tags differ"]


def no_typed_results(chapter: Chapter) -> list[str]:
    """A decimal number or a percentage stands in a formula, in code, or beside its source.

    Beside its source means: in a sentence with a link or a code span. Numbers of sections,
    figures, tables and versions are no results.
    """
    text = strip_math(strip_code(chapter.markdown), " formula ")
    text = re.sub(r"<[^>]+>", " ", text)
    found = []
    for sentence in re.split(r"(?<=[.!?:])\s+(?=[A-Z*_`\[])|\n\s*\n", text):
        if "`" in sentence or "](" in sentence:
            continue
        label = r"\b(?:Sec(?:tion|s)?|Fig(?:ure|s)?|Tab(?:le|s)?|Eq(?:uation|s)?|Python|PyTorch)"
        bare = re.sub(label + r"\.?\s*\(?\d+(?:\.\d+)*", " ", sentence)
        if re.search(r"\d\.\d|\d\s?(?:%|per cent\b|percent\b)", bare):
            found.append(f"a typed result: {' '.join(sentence.split())}")
    return found


def _calls(tree: ast.AST) -> list[str]:
    """The dotted names of all that is called, where it runs at once (not inside a function)."""
    names, todo = [], [tree]
    while todo:
        node = todo.pop()
        if isinstance(node, ast.Call):
            names.append(ast.unparse(node.func))
        if not isinstance(node, ast.FunctionDef | ast.Lambda | ast.ClassDef):
            todo.extend(ast.iter_child_nodes(node))
    return names


def pictures_speak(chapter: Chapter) -> list[str]:
    """All pictures go through `viz.show` or `viz.slider`, which ask for alternative text."""
    found = []
    for cell in chapter.code:
        text = re.sub(r"(?m)^(\s*)[%!].*$", r"\1pass", cell.text)
        tree = ast.parse(text)
        everywhere = [ast.unparse(n.func) for n in ast.walk(tree) if isinstance(n, ast.Call)]
        for name in everywhere:
            if re.fullmatch(r"plt\.show|\w*\.savefig|\w*Image|\w+\.Image", name):
                found.append(f"{name}(...): show figures with viz.show")
        if "<img" in text or "image/png" in text:
            found.append("an <img> by hand: show figures with viz.show")
        now = _calls(tree)
        draws = [n for n in now if re.match(r"(plt\.(?!close|rc)|sns\.(?!set|color))", n)]
        if draws and not any(re.fullmatch(r"(viz\.)?(show|slider)", n) for n in now):
            found.append(f"{draws[0]}(...) without viz.show in the same cell")
    markdown = chapter.markdown
    found += [
        f"a picture without alt text: {m[0]}" for m in re.finditer(r"!\[\s*\]\([^)]*\)", markdown)
    ]
    for image in re.findall(r"(?i)<img[^>]*>", markdown):
        if not re.search(r"(?i)\balt\s*=\s*(\"[^\"]+\"|'[^']+')", image):
            found.append(f"a picture without alt text: {image}")
    return found


def has_slider(chapter: Chapter) -> list[str]:
    """At least one slider that works in the static page."""
    called = any(re.search(r"(?m)^(viz\.)?slider\(", cell.text) for cell in chapter.code)
    return [] if called else ["no viz.slider"]


def lengths(chapter: Chapter) -> list[str]:
    """Words of the chapter, lines of each cell, and words for each line of visible code."""
    found = []
    count = words(chapter.markdown)
    if not WORDS[0] <= count <= WORDS[1]:
        found.append(f"{count} words, not {WORDS[0]} to {WORDS[1]}")
    code = sum(len(cell.lines) for cell in chapter.code if not cell.hidden)
    if count < WORDS_A_LINE * code:
        found.append(f"{count} words for {code} lines of code: fewer than {WORDS_A_LINE} a line")
    for cell in chapter.code:
        most = CELL_LINES["hidden" if cell.hidden else "visible"]
        size = len([line for line in cell.text.splitlines() if line.strip()])
        if size > most:
            first = cell.text.strip().splitlines()[0]
            found.append(f"a cell of {size} lines, more than {most}: {first}")
    return found


def headings_descend(chapter: Chapter) -> list[str]:
    """One title, and no level left out below it."""
    levels = [h.level for h in chapter.headings]
    found = [] if levels[:1] == [1] and levels.count(1) == 1 else ["not exactly one title (#)"]
    for above, heading in pairwise(chapter.headings):
        if heading.level > above.level + 1:
            found.append(f"{heading.title}: level {heading.level} under level {above.level}")
    return found


def equations_have_headings(chapter: Chapter) -> list[str]:
    """Each equation that carries a number of the paper stands under a heading that names it."""
    found, title = [], ""
    for line in strip_code(chapter.markdown).splitlines():
        heading = re.match(r"#{1,6} +(.*)", line)
        title = heading[1] if heading else title
        for number in re.findall(r"\\tag\{(.*?)\}", line):
            if not re.search(rf"Equation \({re.escape(number)}\)", title):
                found.append(f"Equation ({number}) is not named by its heading: {title!r}")
    return found


def questions_mark_themselves(chapter: Chapter) -> list[str]:
    """Three questions, each a list of answers that open to say right or wrong."""
    text, groups, last = strip_code(chapter.markdown), [], None
    for _, body, start, end in details(text):
        verdict = re.match(r"[\s*_]*(right|wrong)\b", body, re.IGNORECASE)
        if verdict:
            joined = last is not None and re.fullmatch(
                r"(?:[\s*+-]|\d+\.|</?(?:li|ul|ol)>)*", text[last:start]
            )
            if not joined:
                groups.append([])
            groups[-1].append(verdict[1].lower())
            last = end
    whole = [g for g in groups if {"right", "wrong"} <= set(g)]
    if len(whole) == QUESTIONS and len(whole) == len(groups):
        return []
    return [
        f"{len(whole)} of {len(groups)} lists of answers are questions, not {QUESTIONS} of them"
    ]


def exercises_have_solutions(chapter: Chapter) -> list[str]:
    """Three to five exercises, each with a solution that opens."""
    marks = "\n\n".join(
        c.text if c.kind == "markdown" else "@solution"
        for c in chapter.cells
        if c.kind == "markdown" or ("# @title Solution" in c.text and "hide-cell" in c.tags)
    )
    found = exercises(marks)
    complaints = []
    if not EXERCISES[0] <= len(found) <= EXERCISES[1]:
        complaints.append(f"{len(found)} exercises, not {EXERCISES[0]} to {EXERCISES[1]}")
    for number, text in enumerate(found, 1):
        opens = any(s.strip().startswith("Solution") for s, *_ in details(text))
        if not opens and "@solution" not in text:
            complaints.append(f"exercise {number} has no solution")
    return complaints


def ends_in_the_package(chapter: Chapter) -> list[str]:
    """The last section says where the chapter's ideas live in `dmd`."""
    tops = [h.title for h in chapter.headings if h.level == 2]
    return [] if tops[-1:] == [LAST_SECTION] else [f"the last section is not {LAST_SECTION!r}"]


def british(markdown: str) -> list[str]:
    """No American spellings in prose; titles of works, in italics, keep theirs."""
    text = re.sub(r"`[^`]+`|\]\([^)]*\)|<[^>]+>", " ", strip_math(strip_code(markdown)))
    text = re.sub(r"(?<!\*)\*[^*\n]+\*(?!\*)", " ", text)
    return [f"American spelling: {word}" for word in AMERICAN_WORD.findall(text)]


def links_resolve(markdown: str, book: Path, own: str) -> list[str]:
    """Links inside the book lead to a page and a heading that exist.

    own: the name of the page that holds the text. Links to chapters name the `.ipynb`.
    """
    found = []
    text = re.sub(r"`[^`]+`", " ", strip_code(markdown))
    for target in re.findall(r"\]\(([^)\s]+)\)|<a[^>]+href=\"([^\"]+)\"", text):
        link = target[0] or target[1]
        if re.match(r"[a-z]+:", link):
            continue
        name, _, anchor = link.partition("#")
        page = book / (name or own)
        source = page.with_suffix(".md")
        if page.parent != book or not page.exists() or not source.exists():
            found.append(f"{link}: no such page")
        elif name.endswith(".md") and re.match(r"\d", name):
            found.append(f"{link}: link to the .ipynb, the .md of a chapter is no page")
        elif anchor and anchor not in anchors(source):
            found.append(f"{link}: no such heading")
    return found


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings down to level 4, as deep as the build makes them."""
    text = page.read_text(encoding="utf-8")
    parsed = Chapter(text).headings if re.match(r"\d", page.name) else headings(text)
    return {h.slug for h in parsed if h.level <= 4}


RULES = [
    no_directives,
    no_typed_results,
    pictures_speak,
    has_slider,
    lengths,
    headings_descend,
    equations_have_headings,
    questions_mark_themselves,
    exercises_have_solutions,
    ends_in_the_package,
]
