"""The built book in a browser: what a reader sees, moves, opens and follows."""

import re
from html.parser import HTMLParser
from urllib.parse import unquote, urljoin, urlsplit

import pytest
from conftest import SITE

PAGES = sorted(path.stem for path in (SITE / "book").glob("*.html"))
CHAPTERS = [name for name in PAGES if re.match(r"\d\d_", name)]
PHONE = 390  # CSS pixels
HEAVIEST = 3_000_000  # bytes of a page with its pictures
SERIOUS = ("serious", "critical")

every_page = pytest.mark.parametrize("name", PAGES)
every_chapter = pytest.mark.parametrize("name", CHAPTERS)


# Loading


@every_page
def test_a_page_loads_without_errors_or_a_network_and_sets_its_formulas(visit, name):
    page = visit(name)
    page.evaluate("async () => { if (window.MathJax) await MathJax.startup.promise; }")
    assert page.problems == []
    written = page.locator("article .math").count()
    assert page.locator("article .math mjx-container").count() == written
    assert page.locator("mjx-merror, [data-mjx-error]").count() == 0
    assert not re.search(r"\$\$|\\tag|\\mathcal", page.locator("article").inner_text())
    pictures = page.locator("article img")
    for picture in pictures.all():
        assert picture.evaluate("x => x.complete && x.naturalWidth > 0")
        assert (picture.get_attribute("alt") or "").strip()


@every_chapter
def test_a_chapter_has_formulas_pictures_and_is_not_heavy(visit, name):
    page = visit(name)
    assert page.locator("article img").count() > 0
    assert page.locator("article .math").count() > 0 or name[:2] in ("10", "16")
    files = [SITE / "book" / f"{name}.html"]
    for source in page.eval_on_selector_all("article img", "all => all.map(x => x.src)"):
        if not source.startswith("data:"):
            files.append(SITE / urlsplit(source).path.lstrip("/"))
    assert sum(file.stat().st_size for file in files) < HEAVIEST


@every_chapter
def test_a_chapter_opens_in_colab_and_downloads_as_a_notebook(visit, name):
    page = visit(name)
    colab = page.locator("a[href*='colab.research.google.com']").first.get_attribute("href")
    assert colab.endswith(f"/book/{name}.ipynb")
    notebook = page.locator("a[href$='.ipynb'][href*='_sources']").first
    assert (SITE / urlsplit(notebook.evaluate("x => x.href")).path.lstrip("/")).is_file()


# What a reader moves and opens

SEEN = """x => { const img = x.closest("figure").querySelector("img");
               return [img.src, img.alt, x.closest("figure").querySelector("output").value]; }"""


@every_chapter
def test_sliders_move_by_keyboard_and_by_pointer(visit, name):
    page = visit(name)
    sliders = page.locator("figure.dmd-slider input[type=range]").all()
    assert sliders
    for slider in sliders:
        last = int(slider.get_attribute("max"))
        start = slider.evaluate(SEEN)
        slider.focus()
        seen = [start]
        for _ in range(last):
            page.keyboard.press("ArrowRight")
            seen.append(slider.evaluate(SEEN))
        assert len({picture for picture, _, _ in seen}) > 1
        assert len({alt for _, alt, _ in seen}) > 1
        assert len({shown for _, _, shown in seen}) == last + 1
        assert slider.get_attribute("aria-valuetext") == seen[-1][2]
        page.keyboard.press("Home")
        assert slider.evaluate(SEEN) == start
        slider.scroll_into_view_if_needed()
        box = slider.bounding_box()
        page.mouse.click(box["x"] + box["width"] - 3, box["y"] + box["height"] / 2)
        assert slider.evaluate(SEEN) == seen[-1]


@every_chapter
def test_questions_say_right_or_wrong_when_they_are_opened(visit, name):
    page = visit(name)
    verdicts = []
    for answer in page.locator("article details:not(.hide):not(.toggle-details)").all():
        summary = answer.locator("> summary")
        hidden = answer.locator("> :not(summary)").first
        assert not hidden.is_visible()
        summary.focus()
        page.keyboard.press("Enter")
        assert hidden.is_visible()
        verdicts += re.findall(r"^(Right|Wrong)\b", hidden.inner_text().strip())
    assert verdicts.count("Right") >= 3 and verdicts.count("Wrong") >= 3


@every_chapter
def test_solutions_open(visit, name):
    page = visit(name)
    solutions = page.locator("article details.hide.above-input, article details.hide").all()
    assert len(solutions) >= 3
    for solution in solutions:
        code = solution.locator("pre").first
        assert not code.is_visible()
        solution.locator("summary").click()
        assert code.is_visible()


# Phones, dark pages, print, and readers who hear the page


# The theme lets the column of the article scroll, so that the page itself never does.
TOO_WIDE = """() => { const found = [];
    for (let x = document.querySelector("article"); x; x = x.parentElement)
        if (x.scrollWidth > x.clientWidth) found.push(`${x.tagName}.${x.className}`);
    return found; }"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
@every_page
def test_no_serious_barrier_and_nothing_wider_than_a_phone(visit, name, scheme):
    axe = pytest.importorskip("axe_playwright_python.sync_playwright")
    page = visit(name, width=PHONE, scheme=scheme)
    page.evaluate("async () => { if (window.MathJax) await MathJax.startup.promise; }")
    assert page.evaluate("document.documentElement.dataset.theme") == scheme
    assert page.evaluate(TOO_WIDE) == []
    found = axe.Axe().run(page, options={"resultTypes": ["violations"]}).response["violations"]
    barriers = {
        rule["id"]: [node["html"][:120] for node in rule["nodes"][:3]]
        for rule in found
        if rule["impact"] in SERIOUS
    }
    assert barriers == {}


@every_page
def test_a_printed_page_is_the_text_alone(visit, name):
    page = visit(name, width=800)
    page.emulate_media(media="print")
    for part in (".bd-sidebar-primary", ".bd-sidebar-secondary", ".bd-header-article"):
        for shown in page.locator(part).all():
            assert not shown.is_visible(), part
    assert page.locator("article").is_visible()
    assert page.evaluate(TOO_WIDE) == []


def test_the_theme_button_changes_the_theme(visit):
    page = visit("index")
    button = page.locator("button.theme-switch-button:visible").first
    seen = set()
    for _ in range(3):
        button.click()
        seen.add(page.evaluate("document.documentElement.dataset.theme"))
    assert seen == {"light", "dark"}


def test_the_search_finds_a_chapter(visit, address):
    page = visit("index")
    page.goto(f"{address}/search.html?q=margin+loss")
    page.wait_for_selector("#search-results li a")
    found = page.eval_on_selector_all("#search-results li a", "all => all.map(x => x.href)")
    assert any("04_the_margin_loss" in link for link in found)
    assert page.problems == []


# Links


class Document(HTMLParser):
    """The links and anchors of a page."""

    def __init__(self, path):
        super().__init__()
        self.links, self.anchors = set(), set()
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        values = dict(attrs)
        if tag == "a" and values.get("href"):
            self.links.add(values["href"])
        self.anchors |= {values[key] for key in ("id", "name") if values.get(key)}


def test_all_links_and_anchors_of_the_site_lead_somewhere():
    if not PAGES:
        pytest.skip("the book is not built: `make book`")
    pages = {path: Document(path) for path in SITE.rglob("*.html") if "_static" not in path.parts}
    lost = []
    for path, document in pages.items():
        here = path.as_uri()
        for link in document.links:
            target = urlsplit(urljoin(here, link))
            if target.scheme != "file":
                continue
            file = type(path)(unquote(target.path))
            anchor = unquote(target.fragment)
            if not file.exists() or (
                anchor and file in pages and anchor not in pages[file].anchors
            ):
                lost.append(f"{path.name}: {link}")
    assert sorted(lost) == []
