"""Checkpoints: one safetensors file that carries its own JSON, replaced in one step.

The tensors are weights (`model/...`), and in a training checkpoint also the state of optimiser and
random numbers. The JSON sits in the header of the file, so the two can never disagree.
"""

import json
import math
import os
import platform
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialise
from torch import Tensor
from torch.amp import GradScaler
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from dmd.baselines import Baseline, build
from dmd.config import ModelConfig
from dmd.model import DMD

FORMAT = "dmd-1"


def write_atomically(path: Path, content: bytes) -> None:
    """Replace the file at `path` such that a reader finds the old content or the new, whole.

    Folders that are missing are made. Raises OSError with a sentence that names the file.
    """
    # One name for all writers: what a killed one leaves behind, the next one overwrites.
    temporary = path.with_name(f".{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(temporary, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise OSError(f"can't write {path}: {error.strerror}") from error


def to_json(data: Any) -> str:
    """JSON text of builtin values; NaN and infinity, which JSON does not have, become null."""

    def plain(x: Any) -> Any:
        if isinstance(x, dict):
            return {str(key): plain(value) for key, value in x.items()}
        if isinstance(x, list | tuple):
            return [plain(value) for value in x]
        return None if isinstance(x, float) and not math.isfinite(x) else x

    return json.dumps(plain(data), indent=2, allow_nan=False, default=str)


def write_json(path: Path, data: Any) -> None:
    """Write `to_json(data)` to a file, atomically."""
    write_atomically(path, to_json(data).encode())


def save(path: Path, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
    """Write tensors and `meta`, as JSON, to one file, atomically."""
    plain = {name: x.detach().cpu().contiguous().clone() for name, x in tensors.items()}
    header = {"format": FORMAT, "meta": json.dumps(meta, default=str)}
    write_atomically(path, serialise(plain, metadata=header))


def load(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what `save` wrote: tensors and meta.

    Raises FileNotFoundError if there is no such file, ValueError if it is not a checkpoint.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no checkpoint {path}: train a model to get one")
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            if header.get("format") != FORMAT:
                raise ValueError(f"{path} is a safetensors file, but not a checkpoint of dmd")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            return tensors, json.loads(header["meta"])
    except (SafetensorError, KeyError, json.JSONDecodeError) as error:
        raise ValueError(
            f"{path} is damaged, or not a checkpoint of dmd: take another one, or train again"
        ) from error


def select(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose names begin with `prefix/`, without it."""
    start = f"{prefix}/"
    return {k.removeprefix(start): x for k, x in tensors.items() if k.startswith(start)}


def put(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `select`: the tensors with `prefix/` before their names."""
    return {f"{prefix}/{name}": x for name, x in tensors.items()}


def build_model(config: Mapping[str, Any]) -> DMD | Baseline:
    """DMD, or another method, with new weights: the inverse of `model.config.to_dict()`."""
    if "method" not in config:
        return DMD(ModelConfig.from_dict(config))
    return build(config["method"], config["widths"], config["lengths"], **config["options"])


def load_model(path: str | Path) -> tuple[DMD | Baseline, dict[str, Any]]:
    """The model of a checkpoint, in evaluation mode, and the checkpoint's meta data.

    path: a checkpoint file, or the output folder of a training run (its best epoch).
    Raises FileNotFoundError or ValueError with a sentence that names the file.
    """
    path = Path(path)
    if path.is_dir():
        path = path / "best.safetensors"
    tensors, meta = load(path)
    try:
        model = build_model(meta.get("model_config", {}))
    except ValueError as error:
        raise ValueError(f"{path} holds no model that this version can build: {error}") from error
    try:
        model.load_state_dict(select(tensors, "model"))
    except RuntimeError as error:
        raise ValueError(
            f"the weights in {path} do not fit the model configuration that it states"
        ) from error
    return model.eval(), meta


def training_state(
    optimiser: Optimizer, scheduler: LRScheduler, scaler: GradScaler, device: torch.device
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Optimiser, schedule, scaler and random numbers, as the tensors and the meta of `save`."""
    state = optimiser.state_dict()
    tensors = {
        f"optimiser/{index}/{name}": x
        for index, quantities in state["state"].items()
        for name, x in quantities.items()
    }
    tensors["random/cpu"] = torch.get_rng_state()
    if device.type == "cuda":
        tensors["random/cuda"] = torch.cuda.get_rng_state(device)
    return tensors, {
        "param_groups": state["param_groups"],
        "scheduler": scheduler.state_dict(),
        "scaler": scaler.state_dict(),
    }


def restore_training_state(
    optimiser: Optimizer,
    scheduler: LRScheduler,
    scaler: GradScaler,
    device: torch.device,
    tensors: Mapping[str, Tensor],
    meta: Mapping[str, Any],
) -> None:
    """Take up what `training_state` returned; a GPU's random numbers only if there are any."""
    state: dict[int, dict[str, Tensor]] = {}
    for name, x in select(tensors, "optimiser").items():
        index, quantity = name.split("/")
        state.setdefault(int(index), {})[quantity] = x
    optimiser.load_state_dict({"state": state, "param_groups": meta["param_groups"]})
    scheduler.load_state_dict(meta["scheduler"])
    scaler.load_state_dict(meta["scaler"])
    torch.set_rng_state(tensors["random/cpu"])
    if device.type == "cuda" and "random/cuda" in tensors:
        torch.cuda.set_rng_state(tensors["random/cuda"], device)


def check_output(folder: Path, resume: bool) -> None:
    """Refuse the output folder of a run before any time is spent on it; leaves nothing there.

    Raises OSError if it can't be written, ValueError if it holds a run that is not to be resumed or
    a converted model, FileNotFoundError if it holds no run that could be.
    """
    exists = (folder / "last.safetensors").exists()
    if exists and not resume:
        raise ValueError(f"{folder} already holds a run: resume it, or choose another folder")
    if resume and not exists:
        raise FileNotFoundError(f"{folder} holds no run to resume: start a new one")
    if not resume and (folder / "best.safetensors").exists():
        raise ValueError(f"{folder} already holds a model: choose another folder")
    try:
        nearest = next(place for place in (folder, *folder.parents) if place.exists())
        with tempfile.TemporaryDirectory(dir=nearest):
            pass
    except OSError as error:
        raise OSError(f"can't write to the output folder {folder}: {error.strerror}") from error


def differences(
    there: Mapping[str, Any], here: Mapping[str, Any], prefix: str = ""
) -> Iterator[tuple[str, Any, Any]]:
    """Where two nested mappings differ: the key (`loss.alpha` where nested) and both values."""
    for key in {**here, **there}:
        old, new = there.get(key), here.get(key)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            yield from differences(old, new, f"{prefix}{key}.")
        elif old != new:
            yield f"{prefix}{key}", old, new


def require_same_run(path: Path, there: Mapping[str, Any], here: Mapping[str, Any]) -> None:
    """Refuse to go on from a checkpoint of another configuration or dataset than this run's.

    path, there: the checkpoint and its meta data; here: those of this run. The device may differ,
    with it `capture`, the number of epochs too (unless the schedule depends on it), and the same
    data may lie in another folder. Raises ValueError naming the first key that differs, and both
    values.
    """
    here = json.loads(json.dumps(here, default=str))  # as it would look after reading
    free = {"device", "capture"}
    if here["train_config"]["scheduler"] != "cosine":
        free.add("epochs")
    parts = ["model_config", "train_config"]
    if there["dataset"]["fingerprint"] != here["dataset"]["fingerprint"]:
        parts.append("dataset")
    for part in parts:
        for key, old, new in differences(there[part], here[part]):
            if key not in free:
                raise ValueError(
                    f"{path} can't be resumed: its {part.replace('_', ' ')} has {key}={old!r}, "
                    f"this run has {new!r}"
                )


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
        "command": shlex.join(["python", *sys.orig_argv[1:]]),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": numpy.__version__,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "threads": torch.get_num_threads(),
        "gpu": gpu,
    }
