"""The first cell of a chapter, run where torch, numpy and the rest are installed, as in Colab."""

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest
import set_repository as repository
from test_tooling import copy_of_tree, needs_git

ROOT = Path(__file__).resolve().parent.parent

# What the environment holds, and where it takes a module from.
REPORT = """
import importlib.metadata, importlib.util, json
found = {}
for d in importlib.metadata.distributions():  # in the order of the path: the first one counts
    found.setdefault(d.name.lower(), d.version)
spec = importlib.util.find_spec("dmd")
print(json.dumps([found, spec and spec.origin]))
"""


class Colab:
    """A virtual environment that sees the packages of the running one, all but dmd."""

    def __init__(self, root):
        venv.create(root / "venv", with_pip=True, symlinks=True)
        self.python = root / "venv/bin/python"
        self.folder = root
        hidden = ("PYTHONPATH", "VIRTUAL_ENV", "PIP_CONSTRAINT", "PIP_NO_DEPS")
        self.environment = {k: v for k, v in os.environ.items() if k not in hidden}
        self.environment["IPYTHONDIR"] = str(root / "ipython")
        fetch = ("download", "--quiet", "--no-deps", "-d", root / "got", "setuptools")
        if self.run("-m", "pip", *fetch).returncode != 0:  # offline: build with what is there
            self.environment["PIP_NO_BUILD_ISOLATION"] = "false"  # pip's way to switch it off
        self.run("-m", "pip", "uninstall", "--yes", "setuptools")  # venv's, older than torch wants
        # Links to what is installed, in a folder outside the new environment: pip counts it as
        # installed and can't touch it, and whatever pip adds comes first.
        host = root / "host"
        host.mkdir()
        for entry in Path(sysconfig.get_path("purelib")).iterdir():
            if not re.match(r"dmd|__editable__|_?_?pycache|pip\b|.*\.pth$", entry.name, re.I):
                (host / entry.name).symlink_to(entry)
        site = next((root / "venv/lib").glob("python*/site-packages"))
        (site / "host.pth").write_text(f"{host}\n")

    def run(self, *arguments):
        return subprocess.run(
            [self.python, *arguments],
            cwd=self.folder,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=300,
        )

    def report(self):
        return json.loads(self.run("-c", REPORT).stdout)


def first_code_cell():
    """The first code cell of the first chapter."""
    chapter = next(p for p in repository.chapters(ROOT) if p.suffix == ".ipynb")
    cells = json.loads(chapter.read_text(encoding="utf-8"))["cells"]
    return "".join(next(cell["source"] for cell in cells if cell["cell_type"] == "code"))


@needs_git
@pytest.mark.skipif(sys.platform == "win32", reason="links need rights that Windows withholds")
def test_the_install_cell_adds_dmd_and_nothing_else(tmp_path):
    clone = tmp_path / "clone"
    clone.mkdir()
    copy_of_tree(clone)
    url = repository.repository_url(ROOT)
    cell = first_code_cell()
    assert cell.count(url) == 1
    cell = cell.replace(url, f"file://{clone}")
    colab = Colab(tmp_path)
    before, origin = colab.report()
    assert {"torch", "numpy", "safetensors", "matplotlib", "ipython"} <= {*before}
    assert origin is None and "dmd-book" not in before

    ran = colab.run("-m", "IPython", "--colors=NoColor", "-c", cell)

    after, origin = colab.report()
    added = {name: version for name, version in after.items() if before.get(name) != version}
    assert {*added} == {"dmd-book"}, ran.stdout + ran.stderr
    assert after == before | added
    installed = Path(origin).parent
    assert installed.is_relative_to(tmp_path / "venv")

    # The whole package came along, and works, and the cell does nothing a second time.
    sources = {p.relative_to(clone / "dmd") for p in (clone / "dmd").rglob("*.py")}
    assert {p.relative_to(installed) for p in installed.rglob("*.py")} == sources
    use = "import dmd, torch; print(dmd.ModelConfig.preset('tiny').widths)"
    assert colab.run("-c", use).stdout.startswith("(")
    shutil.rmtree(clone)
    again = colab.run("-m", "IPython", "--colors=NoColor", "-c", cell)
    assert "pip" not in (again.stdout + again.stderr).lower()
