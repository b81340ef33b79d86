"""Keep the two forms of every chapter the same: `make notebooks`, or with --check only look.

A chapter is `book/NN_name.md`, which people edit, and `book/NN_name.ipynb`, its twin without
outputs. They are compared by content: times of modification mean nothing in a fresh clone.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import jupytext
import nbformat
from jupytext.combine import combine_inputs_with_outputs
from nbformat import NotebookNode

ROOT = Path(__file__).resolve().parent.parent
AGREED = Path(".pairs.json")  # what each pair held when it last agreed; not in git
FORMAT = "md:myst"


def stems(root: Path = ROOT) -> list[str]:
    """The chapters, by name: every notebook in book/, and every Markdown file NN_name.md."""
    book = root / "book"
    return sorted({p.stem for p in [*book.glob("*.ipynb"), *book.glob("[0-9][0-9]_*.md")]})


def content(text: str, suffix: str) -> str:
    """What a chapter says, as canonical Markdown, from the text of either form."""
    if suffix == ".md":
        return _canonical(jupytext.reads(text, fmt=FORMAT))
    return _canonical(nbformat.reads(text, as_version=4))


def problems(root: Path = ROOT) -> list[str]:
    """One sentence for each fault of a pair: no twin, other content, outputs, another kernel."""
    found = []
    for stem in stems(root):
        md, ipynb = (root / "book" / (stem + suffix) for suffix in (".md", ".ipynb"))
        missing = [p for p in (md, ipynb) if not p.exists()]
        if missing:
            found.append(f"book/{missing[0].name} is missing: make notebooks")
            continue
        notebook = _read(ipynb)
        if content(_text(md), ".md") != _canonical(notebook):
            found.append(f"book/{stem}.md and .ipynb differ: make notebooks")
        if not _is_stripped(notebook):
            found.append(f"book/{ipynb.name} holds outputs or execution counts: make notebooks")
        if notebook.metadata.get("kernelspec", {}).get("name") != "python3":
            found.append(f"book/{stem}: its kernelspec is not python3: name it in the .md's head")
    return found


def sync(root: Path = ROOT, source: str | None = None) -> list[Path]:
    """Bring every pair into agreement; the paths of the files that were written.

    source: `md` or `ipynb`, the form to take where the two differ. None: the one that was edited
        since they last agreed or since the last commit; where that can't be told, the Markdown.
    Raises ValueError, before anything is written, where both were edited and differ.
    """
    agreed = _agreed(root)
    chosen = {stem: source or _edited(root, stem, agreed.get(stem)) for stem in stems(root)}
    written = []
    for stem, form in chosen.items():
        md, ipynb = (root / "book" / (stem + suffix) for suffix in (".md", ".ipynb"))
        if form == "ipynb" and _differ(md, ipynb):
            md.write_text(content(_text(ipynb), ".ipynb"), encoding="utf-8")
            written.append(md)
        if _differ(md, ipynb) or not _is_stripped(_read(ipynb)):
            notebook = jupytext.reads(_text(md), fmt=FORMAT)
            if ipynb.exists():  # keeps the ids of the cells that stay
                notebook = combine_inputs_with_outputs(notebook, _read(ipynb), fmt=FORMAT)
            _write(ipynb, notebook)
            written.append(ipynb)
        agreed[stem] = content(_text(md), ".md")
    (root / AGREED).write_text(json.dumps(agreed), encoding="utf-8")
    return written


def _edited(root: Path, stem: str, agreed: str | None) -> str:
    """Which form of a pair to take: `md` or `ipynb`."""
    md, ipynb = (root / "book" / (stem + suffix) for suffix in (".md", ".ipynb"))
    if not md.exists():
        return "ipynb"
    if not _differ(md, ipynb) or not ipynb.exists():
        return "md"
    edited = []
    for path in (md, ipynb):
        known = [agreed, _committed(root, path)]
        now = content(_text(path), path.suffix)
        edited.append(any(k is not None for k in known) and now not in known)
    if all(edited):
        raise ValueError(
            f"book/{stem}.md and book/{stem}.ipynb were both edited and differ: keep one with "
            f"`make notebooks FROM=md` or `FROM=ipynb`, which overwrites the other"
        )
    return "ipynb" if edited[1] else "md"


def _committed(root: Path, path: Path) -> str | None:
    """What the file says in the last commit; None where git does not know it, or there is none."""
    try:
        shown = subprocess.run(
            ["git", "-C", str(root), "show", f"HEAD:./{path.relative_to(root).as_posix()}"],
            capture_output=True,
        )
    except FileNotFoundError:  # no git
        return None
    return content(shown.stdout.decode(), path.suffix) if shown.returncode == 0 else None


def _agreed(root: Path) -> dict[str, str]:
    try:
        return json.loads((root / AGREED).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def _read(path: Path) -> NotebookNode:
    return nbformat.reads(_text(path), as_version=4)


def _differ(md: Path, ipynb: Path) -> bool:
    if not (md.exists() and ipynb.exists()):
        return True
    return content(_text(md), ".md") != content(_text(ipynb), ".ipynb")


def _canonical(notebook: NotebookNode) -> str:
    notebook = nbformat.from_dict(json.loads(json.dumps(notebook, sort_keys=True)))  # a copy
    notebook.metadata = {
        "kernelspec": notebook.metadata.get("kernelspec", {}),
        "language_info": {"name": "python", "pygments_lexer": "ipython3"},
    }
    return jupytext.writes(notebook, fmt=FORMAT)


def _is_stripped(notebook: NotebookNode) -> bool:
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    return not any(cell.outputs or cell.execution_count is not None for cell in code)


def _write(path: Path, notebook: NotebookNode) -> None:
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    notebook.metadata = {"kernelspec": notebook.metadata.get("kernelspec", {})}
    notebook.nbformat, notebook.nbformat_minor = 4, 5
    nbformat.write(notebook, path)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--check", action="store_true", help="name what is wrong, change nothing")
    parser.add_argument("--from", dest="source", choices=("md", "ipynb"), help="the form to keep")
    arguments = parser.parse_args()
    if arguments.check:
        sys.exit("\n".join(problems()) or 0)
    try:
        for path in sync(source=arguments.source):
            print(path.relative_to(ROOT))
    except ValueError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
