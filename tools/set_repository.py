"""Point the book at another repository: `make repository URL=https://github.com/you/yours`.

The one setting is `repository: url:` in `_config.yml`. This script writes it there and rewrites
every other place that holds it: the install cell of each chapter (`.md` and `.ipynb`), links in
Markdown, CITATION.cff, pyproject.toml. Running it twice changes nothing more, and running it with
the former address brings the former tree back. It needs git and the standard library only.
"""

import argparse
import json
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

# The single-line places, one a file; the first is the setting and the others repeat it.
PLACES = {
    "_config.yml": r"(?m)^repository:\s*\n(?:[ \t#].*\n|\n)*?[ \t]+url\s*:\s*[\"']?([^\s\"']+)",
    "CITATION.cff": r"(?m)^repository-code\s*:\s*[\"']?([^\s\"']+)",
    "pyproject.toml": r"(?m)^Repository\s*=\s*[\"']([^\"']+)",
}

INSTALL_CELL = """\
# In Colab this installs the package `dmd`; torch and numpy stay as they are.
try:
    import dmd
except ImportError:
    %pip install --quiet git+{url}"""


def install_cell(url: str) -> str:
    """The code of the first cell of every chapter."""
    return INSTALL_CELL.format(url=url)


def repository_url(root: Path = ROOT) -> str:
    """The setting: the address in `_config.yml`, such as https://github.com/owner/name."""
    return _held(root, "_config.yml")


def problems(root: Path = ROOT) -> list[str]:
    """One sentence for each place that does not hold the address that `_config.yml` holds."""
    url = repository_url(root)
    found = []
    for place in PLACES:
        if _held(root, place) != url:
            found.append(f"{place} holds {_held(root, place)}, but _config.yml holds {url}")
    for path in chapters(root):
        text = path.read_text(encoding="utf-8")
        if with_install_cell(path, text, url) != text:
            found.append(f"{path.relative_to(root)}: its install cell is not the one for {url}")
    return found


def set_repository(url: str, root: Path = ROOT) -> list[Path]:
    """Make `url` the address everywhere under `root`; the paths of the files that changed.

    Raises ValueError where `url` is no repository's address, or is already cited as another one.
    """
    url = url.strip().removesuffix("/").removesuffix(".git")
    if not re.fullmatch(r"https://github\.com/[\w-]+/[\w.-]+", url):
        raise ValueError(f"{url!r} is not of the form https://github.com/owner/name")
    old, new = (address.split("/", 3)[3] for address in (repository_url(root), url))
    changed, with_cell = {}, chapters(root)
    for path in files(root):
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:  # a picture or the like
            continue
        if old != new and any(pattern.search(text) for pattern, _ in _links(new)):
            raise ValueError(
                f"{path.relative_to(root)} already links to {url} as another repository: "
                "the change could not be undone, choose another name"
            )
        after = text
        for (pattern, _), (_, link) in zip(_links(old), _links(new), strict=True):
            after = pattern.sub(link, after)
        if path in with_cell:
            after = with_install_cell(path, after, url)
        if after != text:
            changed[path] = after
    for path, text in changed.items():
        path.write_text(text, encoding="utf-8")
    return list(changed)


def chapters(root: Path = ROOT) -> list[Path]:
    """Both forms of every chapter: book/NN_name.md and book/NN_name.ipynb."""
    return sorted(p for p in (root / "book").glob("[0-9][0-9]_*") if p.suffix in (".md", ".ipynb"))


def files(root: Path = ROOT) -> list[Path]:
    """Every file of the project that git tracks, or would track once it is added."""
    listing = subprocess.run(
        ["git", "-C", str(root), "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        capture_output=True,
    )
    if listing.returncode != 0:
        raise OSError(f"{root} is not a git repository: {listing.stderr.decode().strip()}")
    names = sorted(set(listing.stdout.decode().split("\0")) - {""})
    return [root / name for name in names if (root / name).is_file()]


def with_install_cell(path: Path, text: str, url: str) -> str:
    """The chapter's text with the code of its install cell written anew.

    Raises ValueError where no code cell holds `%pip install`.
    """
    code = install_cell(url)
    if path.suffix == ".ipynb":
        notebook = json.loads(text)
        for cell in notebook["cells"]:
            if cell["cell_type"] == "code" and "%pip install" in "".join(cell["source"]):
                cell["source"] = code.splitlines(keepends=True)
                return json.dumps(notebook, indent=1, ensure_ascii=False) + "\n"
    lines = text.split("\n")
    for at in (i for i, line in enumerate(lines) if line.lstrip().startswith("%pip install")):
        first = next((i for i in range(at, -1, -1) if lines[i].startswith("```{code-cell}")), at)
        last = next((i for i in range(at, len(lines)) if lines[i].startswith("```")), at)
        while lines[first].startswith(("```", ":")) or not lines[first]:  # fence and options
            first += 1
        return "\n".join([*lines[:first], *code.split("\n"), *lines[last:]])
    raise ValueError(f"{path} has no install cell: its first code cell must `%pip install` dmd")


def _held(root: Path, place: str) -> str:
    text = (root / place).read_text(encoding="utf-8")
    match = re.search(PLACES[place], text)
    if match is None:
        raise ValueError(f"{place} holds no repository's address where it should: {PLACES[place]}")
    return match[1]


def _links(name: str) -> list[tuple[re.Pattern[str], str]]:
    """For `owner/name`: patterns of links to it, on GitHub, in Colab and on its Pages."""
    owner, project = name.split("/")
    end = r"(?![\w-]|\.(?!git\b)\w)"  # the name ends here: `yours2` and `yours.old` are others
    forms = [
        ("github.com/", name),
        ("/github/", name),
        ("githubusercontent.com/", name),
        ("", f"{owner}.github.io/{project}"),
    ]
    return [(re.compile(re.escape(before + link) + end), before + link) for before, link in forms]


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("url", nargs="?", help="https://github.com/owner/name; none: check")
    url = parser.parse_args().url
    try:
        if not url:
            print(
                f"The book points at {repository_url()}; URL=https://github.com/you/yours moves it."
            )
            sys.exit("\n".join(problems()) or 0)
        for path in set_repository(url):
            print(path.relative_to(ROOT))
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
