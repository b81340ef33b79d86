"""A browser, and the built book as a reader's browser gets it: from a server, without a network."""

import functools
import http.server
import shutil
import threading
from pathlib import Path

import pytest

SITE = Path(__file__).resolve().parents[2] / "_build" / "html"
PROGRAMS = ("chromium", "chromium-browser", "google-chrome", "chrome")


class Quiet(http.server.SimpleHTTPRequestHandler):
    """A file server that does not write a line for each file."""

    def log_message(self, *_):
        pass


@pytest.fixture(scope="session")
def address():
    """Where the built book is served."""
    if not (SITE / "book" / "index.html").exists():
        pytest.skip("the book is not built: `make book`")
    handler = functools.partial(Quiet, directory=SITE)
    with http.server.ThreadingHTTPServer(("localhost", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://localhost:{server.server_port}"
        server.shutdown()


@pytest.fixture(scope="session")
def browser():
    """Chromium without a window, or a skip that says what is missing."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    program = next(filter(None, map(shutil.which, PROGRAMS)), None)
    if program is None:
        pytest.skip("no Chromium is installed")
    arguments = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
    with playwright.sync_playwright() as control:
        chromium = control.chromium.launch(executable_path=program, args=arguments)
        yield chromium
        chromium.close()


@pytest.fixture
def visit(browser, address):
    """visit(page, width=..., scheme=...) opens a page of the book in a window of its own.

    The page that comes back has `problems`: what it wrote to the console as an error, and every
    address outside this machine that it asked for.
    """
    contexts = []

    def open_page(name, width=1400, scheme="light", **more):
        context = browser.new_context(
            viewport={"width": width, "height": 900}, color_scheme=scheme, **more
        )
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(20_000)
        page.problems = []
        context.route(
            lambda url: not url.startswith((address, "data:", "blob:")),
            lambda route: (page.problems.append(f"asks for {route.request.url}"), route.abort()),
        )
        page.on("console", lambda m: page.problems.append(m.text) if m.type == "error" else None)
        page.on("pageerror", lambda error: page.problems.append(str(error)))
        page.goto(f"{address}/book/{name}.html")
        page.wait_for_function(READY)
        return page

    yield open_page
    for context in contexts:
        context.close()


# MathJax has set what there is to set; pages without formulas do not load it.
READY = """() => document.readyState === "complete" &&
    (typeof MathJax === "undefined" || !!(MathJax.startup && MathJax.startup.promise))"""
