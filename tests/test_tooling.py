"""The files around the book agree with each other, and the tools do what they say."""

import json
import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import nbformat
import pairs
import pytest
import set_repository as repository
import yaml

ROOT = Path(__file__).resolve().parent.parent
OWNER, NAME = "someone-else", "their-copy"
COPY = f"{OWNER}/{NAME}"
ELSEWHERE = f"https://github.com/{COPY}"

HEAD = "---\nkernelspec:\n  display_name: Python 3\n  language: python\n  name: python3\n---\n\n"

needs_git = pytest.mark.skipif(
    shutil.which("git") is None or not (ROOT / ".git").exists(), reason="no git repository"
)


def git(root, *arguments):
    author = ["-c", "user.name=test", "-c", "user.email=test@localhost"]
    subprocess.run(["git", "-C", str(root), *author, *arguments], check=True, capture_output=True)


def commit_all(root):
    git(root, "add", "--all")
    git(root, "commit", "--quiet", "--message", "all")


def copy_of_tree(target):
    """The project's files as they are now, committed in a repository of their own."""
    for path in repository.files(ROOT):
        copied = target / path.relative_to(ROOT)
        copied.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, copied)
    git(target, "init", "--quiet")
    commit_all(target)
    return target


# The repository's address


def test_all_places_hold_the_address_of_the_setting():
    assert repository.problems(ROOT) == []
    assert repository.repository_url(ROOT) in (ROOT / "README.md").read_text()


def small_project(root):
    """A project with everything that holds an address, and others that must stay."""
    (root / "book").mkdir()
    url = "https://github.com/dmd-owner/dmd-name"
    cell = repository.install_cell(url)
    files = {
        "_config.yml": f"title: x\nrepository:\n  # the setting\n  url: {url}\n  branch: main\n",
        "CITATION.cff": f"repository-code: {url}\n",
        "pyproject.toml": f'[project]\nname = "dmd-name"\n[project.urls]\nRepository = "{url}"\n',
        "README.md": (
            f"[a]({url}), {url}.git, {url}2, {url}.old, {url}. See dmd-owner/dmd-name2,\n"
            "https://colab.research.google.com/github/dmd-owner/dmd-name/blob/main/book/01_x.ipynb,\n"
            "https://dmd-owner.github.io/dmd-name/ and https://github.com/others/paper.\n"
        ),
        "book/01_x.md": (
            f"{HEAD}# One\n\n```{{code-cell}} ipython3\n:tags: [hide-input]\n\n{cell}\n```\n"
        ),
    }
    for name, text in files.items():
        (root / name).write_text(text)
    pairs.sync(root)
    git(root, "init", "--quiet")
    (root / ".gitignore").write_text(".pairs.json\n")
    commit_all(root)
    return url


def texts(root):
    return {path.relative_to(root): path.read_bytes() for path in repository.files(root)}


@needs_git
def test_the_address_changes_everywhere_and_back(tmp_path):
    old = small_project(tmp_path)
    before = texts(tmp_path)
    assert repository.problems(tmp_path) == []
    repository.set_repository(ELSEWHERE + ".git", tmp_path)

    assert repository.repository_url(tmp_path) == ELSEWHERE
    assert repository.problems(tmp_path) == []
    assert pairs.problems(tmp_path) == []
    assert (tmp_path / "README.md").read_text() == (
        f"[a]({ELSEWHERE}), {ELSEWHERE}.git, {old}2, {old}.old, {ELSEWHERE}. "
        "See dmd-owner/dmd-name2,\n"
        f"https://colab.research.google.com/github/{COPY}/blob/main/book/01_x.ipynb,\n"
        f"https://{OWNER}.github.io/{NAME}/ and https://github.com/others/paper.\n"
    )
    assert 'name = "dmd-name"' in (tmp_path / "pyproject.toml").read_text()
    assert repository.set_repository(ELSEWHERE, tmp_path) == []  # once is enough
    repository.set_repository(old, tmp_path)
    assert texts(tmp_path) == before


@needs_git
def test_no_mention_of_the_former_address_stays_in_this_tree(tmp_path):
    copy_of_tree(tmp_path)
    former = repository.repository_url(tmp_path).removeprefix("https://github.com/")
    before, faults = texts(tmp_path), pairs.problems(tmp_path)
    changed = repository.set_repository(ELSEWHERE, tmp_path)
    strays = [str(name) for name, text in texts(tmp_path).items() if former.encode() in text]
    assert strays == []
    assert {p.name for p in changed} >= {"_config.yml", "CITATION.cff", "pyproject.toml"}
    assert {*changed} >= {*repository.chapters(tmp_path)}
    assert repository.problems(tmp_path) == []
    assert pairs.problems(tmp_path) == faults
    repository.set_repository(f"https://github.com/{former}", tmp_path)
    assert texts(tmp_path) == before


@needs_git
def test_problems_name_each_place_that_differs(tmp_path):
    url = small_project(tmp_path)
    for place in ("CITATION.cff", "book/01_x.ipynb", "book/01_x.md"):
        path = tmp_path / place
        whole = path.read_text()
        path.write_text(whole.replace(url, url + "2"))
        (problem,) = repository.problems(tmp_path)
        assert problem.startswith(place)
        path.write_text(whole)


@needs_git
def test_the_install_cell_is_written_anew_whatever_it_was(tmp_path):
    url = small_project(tmp_path)
    before = texts(tmp_path)
    for name in ("book/01_x.ipynb", "book/01_x.md"):
        text = (tmp_path / name).read_text()
        (tmp_path / name).write_text(text.replace("# In Colab this", "# This"))
    changed = repository.set_repository(url, tmp_path)
    assert [p.name for p in changed] == ["01_x.ipynb", "01_x.md"]
    assert texts(tmp_path) == before


@needs_git
@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("you/yours", "not of the form https://github.com/owner/name"),
        ("https://github.com/you", "not of the form"),
        ("https://github.com/you/a b", "not of the form"),
        ("https://github.com/others/paper", "README.md already links to"),
    ],
)
def test_an_address_that_cannot_be_is_refused_and_nothing_written(tmp_path, url, message):
    small_project(tmp_path)
    before = texts(tmp_path)
    with pytest.raises(ValueError, match=message):
        repository.set_repository(url, tmp_path)
    assert texts(tmp_path) == before


# Pairs

CHAPTER = HEAD + (
    "# One\n\n```{code-cell} ipython3\nx = 1\n```\n\n$$a \\tag{1}$$\n\n+++\n\n<details>\n\n"
    "- *b*\n\n</details>\n\n```{code-cell} ipython3\n---\ntags: [hide-cell]\nmystnb:\n  k: v\n---\n"
    "# @title Solution\n%time x\n```\n\n    indented\n"
)


@pytest.fixture
def book(tmp_path):
    """A project of one chapter whose pair agrees; not yet in git."""
    (tmp_path / "book").mkdir()
    (tmp_path / "book/01_a.md").write_text(CHAPTER)
    assert pairs.problems(tmp_path) == ["book/01_a.ipynb is missing: make notebooks"]
    pairs.sync(tmp_path)
    return tmp_path


@pytest.fixture
def committed(book):
    if shutil.which("git") is None:
        pytest.skip("no git")
    git(book, "init", "--quiet")
    commit_all(book)
    (book / pairs.AGREED).unlink()  # as in a fresh clone
    return book


def edit_md(root, old="x = 1", new="x = 2"):
    path = root / "book/01_a.md"
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))


def edit_ipynb(root, change):
    path = root / "book/01_a.ipynb"
    notebook = nbformat.read(path, as_version=4)
    change(notebook)
    nbformat.write(notebook, path)


def set_code(notebook):
    notebook.cells[1].source = "x = 3"


def run_it(notebook):
    notebook.cells[1].execution_count = 1
    notebook.cells[1].outputs = [nbformat.v4.new_output("stream", text="hello")]
    notebook.metadata["language_info"] = {"name": "python", "version": "3.11.7"}


def both(root):
    return [(root / "book/01_a.md").read_text(), (root / "book/01_a.ipynb").read_text()]


def test_a_pair_that_agrees_is_left_alone(book):
    before = both(book)
    assert pairs.problems(book) == []
    assert pairs.sync(book) == []
    assert both(book) == before
    assert before[0] == CHAPTER


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("x = 1", "x = 2"),
        ("# One", "# Two"),
        ("tags: [hide-cell]", "tags: [hide-input]"),
        ("+++\n\n", ""),
        ("    indented\n", "indented\n"),
    ],
)
def test_every_edit_of_the_markdown_is_seen_and_carried_over(committed, old, new):
    edit_md(committed, old, new)
    text = (committed / "book/01_a.md").read_text()
    assert pairs.problems(committed) == ["book/01_a.md and .ipynb differ: make notebooks"]
    assert [p.name for p in pairs.sync(committed)] == ["01_a.ipynb"]
    assert pairs.problems(committed) == []
    assert (committed / "book/01_a.md").read_text() == text


def test_an_edit_of_the_notebook_is_carried_over(committed):
    edit_ipynb(committed, set_code)
    assert [p.name for p in pairs.sync(committed)] == ["01_a.md"]
    assert "x = 3" in (committed / "book/01_a.md").read_text()
    assert pairs.problems(committed) == []


def test_edits_may_follow_each_other_without_a_commit(committed):
    edit_md(committed)
    pairs.sync(committed)
    edit_md(committed, "# One", "# Two")
    assert [p.name for p in pairs.sync(committed)] == ["01_a.ipynb"]
    edit_ipynb(committed, set_code)
    assert [p.name for p in pairs.sync(committed)] == ["01_a.md"]
    assert "x = 3" in both(committed)[0] and "# Two" in both(committed)[0]


def test_two_edits_that_differ_are_refused_and_either_can_be_kept(committed):
    edit_md(committed)
    edit_ipynb(committed, set_code)
    before = both(committed)
    with pytest.raises(ValueError, match=r"01_a\.md and book/01_a\.ipynb were both edited"):
        pairs.sync(committed)
    assert both(committed) == before
    pairs.sync(committed, source="ipynb")
    assert "x = 3" in both(committed)[0]
    assert pairs.problems(committed) == []


def test_without_git_the_markdown_wins(book):
    (book / pairs.AGREED).unlink()
    edit_ipynb(book, set_code)
    assert [p.name for p in pairs.sync(book)] == ["01_a.ipynb"]
    assert both(book)[0] == CHAPTER


def test_a_notebook_that_was_run_is_no_edit_and_loses_its_outputs(committed):
    before = both(committed)
    edit_ipynb(committed, run_it)
    (problem,) = pairs.problems(committed)
    assert problem == "book/01_a.ipynb holds outputs or execution counts: make notebooks"
    edit_md(committed)
    pairs.sync(committed)
    edit_md(committed, "x = 2", "x = 1")
    pairs.sync(committed)
    assert both(committed) == before  # the ids of the cells too


def test_cells_that_stay_keep_their_ids(committed):
    ids = [cell.id for cell in nbformat.read(committed / "book/01_a.ipynb", as_version=4).cells]
    edit_md(committed, "# One\n", "# One\n\n```{code-cell} ipython3\nnew = 0\n```\n")
    pairs.sync(committed)
    after = [cell.id for cell in nbformat.read(committed / "book/01_a.ipynb", as_version=4).cells]
    assert [i for i in after if i in ids] == ids
    assert len(after) == len(ids) + 1


def test_a_missing_twin_and_another_kernel_are_named(book):
    edit_ipynb(book, lambda notebook: notebook.metadata.kernelspec.update(name="other"))
    assert any("kernelspec is not python3" in problem for problem in pairs.problems(book))
    (book / "book/01_a.md").unlink()
    assert pairs.problems(book) == ["book/01_a.md is missing: make notebooks"]
    pairs.sync(book)
    assert (book / "book/01_a.md").exists()


def test_pages_that_are_no_chapters_need_no_twin(book):
    (book / "book/index.md").write_text("# Index\n")
    assert pairs.problems(book) == []


# Dependencies


def requirements(lines):
    """Requirement strings as {normalised name: version condition}."""
    found = {}
    for line in lines:
        name, version = re.fullmatch(r"([\w.-]+)\s*(.*)", line).groups()
        found[re.sub(r"[-_.]+", "-", name).lower()] = version.replace(" ", "")
    return found


@pytest.fixture(scope="module")
def project():
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


@pytest.fixture(scope="module")
def wanted(project):
    extras = project["optional-dependencies"]
    return requirements([*project["dependencies"], *extras["book"], *extras["test"]])


def test_conda_gets_the_same_dependencies(project, wanted):
    listed = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
    (by_pip,) = [entry["pip"] for entry in listed if isinstance(entry, dict)]
    assert "--editable ." in by_pip
    names = [entry for entry in listed if isinstance(entry, str)]
    conda = requirements(names + [entry for entry in by_pip if not entry.startswith("-")])
    assert conda.pop("python") == project["requires-python"]
    conda.pop("pip")
    conda["torch"] = conda.pop("pytorch")
    assert conda == wanted


def test_every_dependency_is_pinned_to_a_version_that_is_allowed(wanted):
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pinned = requirements(line for line in lines if line and not line.startswith("#"))
    assert {*wanted, "setuptools", "wheel"} <= {*pinned}
    for name, version in pinned.items():
        assert re.fullmatch(r"==[\d.]+(post\d+)?", version), f"{name}{version} is no exact pin"
    for name in wanted:
        numbers = tuple(int(n) for n in re.findall(r"\d+", pinned[name]))
        for sign, bound in re.findall(r"(>=|<)([\d.]+)", wanted[name]):
            least = tuple(int(n) for n in bound.split("."))
            assert numbers >= least if sign == ">=" else numbers < least


def test_the_package_itself_states_lower_bounds_only(project):
    for name, version in requirements(project["dependencies"]).items():
        assert re.fullmatch(r">=[\d.]+", version), f"{name}{version} could replace Colab's"


# Texts


def test_the_citation_names_the_book_as_it_is_and_the_paper(project):
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == project["version"]
    assert {"cff-version", "message", "title", "authors"} <= citation.keys()
    (paper,) = citation["references"]
    assert paper["title"] == "Decoupled Multimodal Distilling for Emotion Recognition"
    assert [author["family-names"] for author in paper["authors"]] == ["Li", "Wang", "Cui"]


def test_the_workflow_tests_and_publishes_under_the_repository_s_own_name():
    text = (ROOT / ".github/workflows/book.yml").read_text()
    jobs = yaml.safe_load(text)["jobs"]
    ran = {name: [step.get("run", "") for step in job["steps"]] for name, job in jobs.items()}
    assert "make test" in ran["test"]
    assert jobs["publish"]["needs"] == "test"
    publish = ran["publish"]
    setting = 'make repository URL="$GITHUB_SERVER_URL/$GITHUB_REPOSITORY"'
    assert publish.index(setting) < publish.index("make book")
    owner, name = repository.repository_url(ROOT).split("/")[-2:]
    assert owner not in text and name not in text


def readme_example():
    text = (ROOT / "README.md").read_text()
    (code,) = re.findall(r"(?ms)^```python\n(.*?)^```$", text)
    return code


def test_the_readme_s_ten_lines_run(capsys):
    code, count = re.subn(r"epochs=\d+", "epochs=1", readme_example())
    assert count == 1
    assert len(code.split("\n\n")[1].splitlines()) <= 10
    names = {}
    exec(code, names)
    printed = capsys.readouterr().out
    assert "'mae'" in printed and "'acc7'" in printed
    assert names["output"].homo.edges.shape == (1, 3, 3)


def test_the_readme_s_commands_and_files_exist():
    text = (ROOT / "README.md").read_text() + (ROOT / "CONTRIBUTING.md").read_text()
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"(?:`|\$ )make ([a-z]+)", text):
        assert re.search(rf"(?m)^{target}:", makefile), f"make {target} is no target"
    for link in re.findall(r"\]\(([^):]+)\)", text):
        assert (ROOT / link).exists(), link
    for place in re.findall(r"`([\w.-]+/)`", text):
        assert (ROOT / place).is_dir(), place


def test_commands_of_the_readme_parse():
    from dmd.cli import make_parser

    text = (ROOT / "README.md").read_text()
    commands = re.findall(r"(?m)^\$ python -m dmd (.+)$", text)
    assert commands
    for command in commands:
        make_parser().parse_args(command.split())


@pytest.mark.skipif(shutil.which("make") is None, reason="no make")
def test_an_old_python_is_refused_in_one_sentence(tmp_path):
    for name in ("Makefile", "constraints.txt", "pyproject.toml"):
        shutil.copyfile(ROOT / name, tmp_path / name)
    old = tmp_path / "oldpython"
    old.write_text("#!/bin/sh\nexit 1\n")
    old.chmod(0o755)
    made = subprocess.run(
        ["make", "--silent", f"PYTHON={old}", "lint"], cwd=tmp_path, capture_output=True, text=True
    )
    assert made.returncode != 0
    (line,) = [line for line in made.stderr.splitlines() if line.startswith("error:")]
    assert "is not Python 3.11 or newer" in line
    assert not (tmp_path / ".venv").exists()


def test_results_are_json():
    for path in (ROOT / "data/results").glob("*.json"):
        json.loads(path.read_text())
