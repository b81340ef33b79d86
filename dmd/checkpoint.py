"""Checkpoints: one safetensors file that carries its own JSON, replaced in one step.

The tensors are weights (`model/...`), and in a training checkpoint also the state of optimiser and
random numbers. The JSON sits in the header of the file, so the two can never disagree.
"""

import json
import math
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialise
from torch import Tensor

from dmd.config import ModelConfig
from dmd.model import DMD

FORMAT = "dmd-1"


def write_atomically(path: Path, content: bytes) -> None:
    """Replace the file at `path` such that a reader finds the old content or the new, whole."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def to_json(data: Any) -> str:
    """JSON text of builtin values; NaN and infinity, which JSON does not have, become null."""

    def plain(x: Any) -> Any:
        if isinstance(x, dict):
            return {str(key): plain(value) for key, value in x.items()}
        if isinstance(x, list | tuple):
            return [plain(value) for value in x]
        return None if isinstance(x, float) and not math.isfinite(x) else x

    return json.dumps(plain(data), indent=2, allow_nan=False)


def save(path: Path, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
    """Write tensors and JSON-compatible `meta` to one file, atomically."""
    plain = {name: x.detach().cpu().contiguous().clone() for name, x in tensors.items()}
    header = {"format": FORMAT, "meta": json.dumps(meta)}
    write_atomically(path, serialise(plain, metadata=header))


def load(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what `save` wrote: tensors and meta.

    Raises FileNotFoundError if there is no such file, ValueError if it is not a checkpoint.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no checkpoint {path}")
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            if header.get("format") != FORMAT:
                raise ValueError(f"{path} is a safetensors file, but no checkpoint of dmd")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path} is not a readable checkpoint: {error}") from error
    return tensors, json.loads(header["meta"])


def select(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose names begin with `prefix/`, without it."""
    return {k.removeprefix(f"{prefix}/"): x for k, x in tensors.items() if k.startswith(prefix)}


def load_model(path: str | Path) -> tuple[DMD, dict[str, Any]]:
    """The model of a checkpoint, in evaluation mode, and the checkpoint's meta data.

    path: a checkpoint file, or the output folder of a training run (its best epoch).
    Raises FileNotFoundError or ValueError with a sentence that names the file.
    """
    path = Path(path)
    if path.is_dir():
        path = path / "best.safetensors"
    tensors, meta = load(path)
    model = DMD(ModelConfig.from_dict(meta["model_config"]))
    try:
        model.load_state_dict(select(tensors, "model"))
    except RuntimeError as error:
        raise ValueError(f"the weights in {path} do not fit its configuration") from error
    return model.eval(), meta


def optimiser_tensors(optimiser: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The tensors of an optimiser's state, named `optimiser/PARAMETER/QUANTITY`."""
    return {
        f"optimiser/{index}/{name}": x
        for index, state in optimiser.state_dict()["state"].items()
        for name, x in state.items()
    }


def restore_optimiser(
    optimiser: torch.optim.Optimizer, tensors: Mapping[str, Tensor], groups: list[dict[str, Any]]
) -> None:
    """Take up the state that `optimiser_tensors` named, and the parameter groups."""
    state: dict[int, dict[str, Tensor]] = {}
    for name, x in select(tensors, "optimiser").items():
        index, quantity = name.split("/")
        state.setdefault(int(index), {})[quantity] = x
    optimiser.load_state_dict({"state": state, "param_groups": groups})


def make_writable(folder: Path, new: bool) -> None:
    """Create an output folder.

    Raises OSError if it can't be written, ValueError if it is to be `new` and holds a run.
    """
    if new and (folder / "last.safetensors").exists():
        raise ValueError(f"{folder} already holds a run: resume it, or choose another folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OSError(f"can't write to the output folder {folder}: {error.strerror}") from error


def git_commit() -> str:
    """The commit of the checkout that this package runs from, or `unknown` outside of one."""
    try:
        answer = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            check=True,
            timeout=10,
        )
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return answer.stdout.strip()


def provenance() -> dict[str, Any]:
    """When, from which commit and command, with which versions and on what hardware this runs."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": git_commit(),
        "command": " ".join(["python -m dmd", *sys.argv[1:]]) if sys.argv else "",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": numpy.__version__,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "threads": torch.get_num_threads(),
        "gpu": gpu,
    }
