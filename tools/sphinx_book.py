"""What the book's build needs beyond its configuration.

Docstrings shown as they are written, a table of the facts of the build, equations of several lines
that carry the paper's number, and pages without errors on the browser's console.
"""

import os
import platform
import re
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

LIBRARIES = ("torch", "numpy", "matplotlib", "jupyter-book", "sphinx", "ipykernel", "jupytext")


def as_written(
    app: Sphinx, what: str, name: str, thing: object, options: object, lines: list[str]
) -> None:
    """Show a docstring line by line: docstrings are written for `help()`, not as markup."""
    if lines:
        lines[:] = [".. code-block:: none", "   :class: docstring", ""] + [
            f"   {line}" for line in lines
        ]


def readable(
    app: Sphinx, what: str, name: str, thing: object, options: object, args: str | None, out: str
) -> tuple[str | None, str]:
    """Take the markers of links off a signature that Sphinx can't parse, and so can't link.

    A dataclass field with a factory is one: its default reads `<factory>`.
    """
    if args is not None and "<factory>" in args:
        args = re.sub(r"~(\w+\.)+", "", args).replace("<factory>", "...")
    return args, out


def processor() -> str:
    """The name of the processor, as the operating system gives it."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        text = ""
    names = [line.split(":", 1)[1].strip() for line in text.splitlines() if "model name" in line]
    return names[0] if names else platform.processor() or platform.machine()


def facts() -> list[tuple[str, str]]:
    """When, on what and with which versions this build runs."""
    return [
        ("Built", datetime.now(UTC).strftime("%d %B %Y, %H:%M UTC")),
        ("Processor", f"{processor()}, {os.cpu_count()} logical"),
        ("GPU", torch.cuda.get_device_name() if torch.cuda.is_available() else "none"),
        ("System", f"{platform.system()} {platform.machine()}"),
        ("Python", platform.python_version()),
        *((name, version(name)) for name in LIBRARIES),
    ]


class BuildFacts(SphinxDirective):
    """A table of the facts of this build."""

    def run(self) -> list[nodes.Node]:
        """Lay the facts out as a table of two columns."""
        group = nodes.tgroup("", *(nodes.colspec(colwidth=w) for w in (30, 70)), cols=2)
        body = nodes.tbody()
        for row in facts():
            body += nodes.row("", *(nodes.entry("", nodes.paragraph(text=text)) for text in row))
        group += body
        return [nodes.table("", group, classes=["colwidths-auto"])]


def keep_tags(app: Sphinx, doctree: nodes.document) -> None:
    """Keep Sphinx from wrapping tagged equations of several lines in `split`, which has no tags."""
    for block in doctree.findall(nodes.math_block):
        text = block.astext()
        if "\\tag" in text and not block["nowrap"]:
            block["nowrap"] = True
            block.children = [nodes.Text(rf"\[{text}\]")]


def clear_console(
    app: Sphinx, page: str, template: str, context: dict[str, Any], doctree: nodes.document | None
) -> None:
    """Leave out what makes the theme's own scripts complain on every page.

    The theme declares the settings of Thebe twice, and the book does not run cells in the page;
    and it wants to be told that light or dark follows the reader's system.
    """
    context["script_files"] = [
        script
        for script in context["script_files"]
        if "thebe" not in f"{script.filename} {getattr(script, 'attributes', {})}".lower()
    ]
    context["default_mode"] = "auto"


def setup(app: Sphinx) -> dict[str, bool]:
    """Register all of it with Sphinx."""
    app.connect("autodoc-process-docstring", as_written)
    app.connect("autodoc-process-signature", readable)
    app.connect("doctree-read", keep_tags)
    app.connect("html-page-context", clear_console, priority=900)  # after the theme
    app.add_directive("build-facts", BuildFacts)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
