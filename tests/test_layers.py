"""The rooms of the package: each module imports only from rooms above it, and stays small."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "dmd"
MODULES = sorted(p for p in PACKAGE.rglob("*.py") if "__pycache__" not in p.parts)

# In the order in which data flows.
ROOMS = [
    "options", "config", "batch", "data", "kernels", "attention", "decoupling", "graph", "fusion",
    "model", "device", "distributed", "losses", "baselines", "metrics", "probes", "optimisation",
    "checkpoint", "history", "fast", "trainer", "published_keys", "released", "differences",
    "cells", "studies", "tables", "flops", "plain", "steps", "bench", "commands", "cli", "viz",
]  # fmt: skip
NEVER = {"book", "tests", "tools", "sklearn", "pandas", "seaborn", "scipy"}
ONLY_VIZ = {"matplotlib", "IPython", "PIL", "ipywidgets"}
LONGEST = 320


def room_of(path: Path) -> str:
    """The room a module stands in: its own name, or that of its folder."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(source: str, package: str) -> list[str]:
    """The full names of all that a module's text imports, at the top and inside functions."""
    names = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:  # `from .x import y`, seen from the package that holds the module
                parents = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*parents, base] if base else parents)
            names += [f"{base}.{alias.name}" for alias in node.names]
    return names


def complaints(source: str, room: str, package: str = "dmd") -> list[str]:
    """What a module of `room` imports but must not."""
    found = []
    for name in imports(source, package):
        top, *rest = name.split(".")
        if top in NEVER or (top in ONLY_VIZ and room != "viz"):
            found.append(name)
        elif top == "dmd" and rest and rest[0] in ROOMS:
            if ROOMS.index(rest[0]) > ROOMS.index(room):
                found.append(name)
        elif top == "dmd" and room != "cli":
            found.append(name)  # the package itself: that is every room at once
    return found


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_a_module_imports_only_from_rooms_above_it(path):
    room = room_of(path)
    if room in ("__init__", "__main__"):
        return  # the front doors show every room
    assert room in ROOMS, f"{room} has no place in the order of the rooms"
    package = ".".join(["dmd", *path.relative_to(PACKAGE).parts[:-1]])
    assert complaints(path.read_text(encoding="utf-8"), room, package) == []


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_a_module_fits_in_one_reading(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) < LONGEST


@pytest.mark.parametrize(
    ("source", "room", "package"),
    [
        ("from dmd.trainer import Trainer", "losses", "dmd"),
        ("import dmd.trainer", "losses", "dmd"),
        ("from dmd import trainer", "losses", "dmd"),
        ("from .trainer import Trainer", "losses", "dmd"),
        ("from ..trainer import Trainer", "data", "dmd.data"),
        ("def f():\n    import dmd.trainer", "losses", "dmd"),
        ("from dmd import Trainer", "losses", "dmd"),
        ("import dmd", "losses", "dmd"),
        ("import matplotlib.pyplot as plt", "metrics", "dmd"),
        ("from sklearn.metrics import f1_score", "metrics", "dmd"),
        ("import pandas as pd", "viz", "dmd"),
        ("from tests.helpers import x", "cli", "dmd"),
    ],
)
def test_the_rule_can_fail(source, room, package):
    assert complaints(source, room, package)


def test_the_rule_allows_what_it_should():
    assert complaints("from .dataset import Dataset", "data", "dmd.data") == []
    assert complaints("from dmd.data.dataset import Dataset\nimport torch", "cli") == []
    assert complaints("from dmd.model import DMD", "losses") == []
    assert complaints("import matplotlib.pyplot as plt", "viz") == []
