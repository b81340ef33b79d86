"""A study's cells: one setting, one row, one seed, one learning rate; trained, stored, resumed.

Each cell is a file of its own, written when it is done. So a study that was stopped goes on where
it was, and cells may run in any order, in several processes or on the machines of a Ray cluster.
"""

import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from dmd import checkpoint, data
from dmd.config import LossConfig, ModelConfig, TrainConfig
from dmd.metrics import collect, compute
from dmd.model import DMD
from dmd.trainer import NonFiniteLoss, Trainer, seed_everything


@dataclass(frozen=True)
class Cell:
    """One run of a study.

    setting: its name, and the dataset with its options. row: its name in the table. method: `dmd`
    or one of `dmd.baselines.NAMES`; model, loss, train: options of the three configurations (a
    method of `dmd.baselines` has no loss options).
    """

    setting: str
    dataset: str
    row: str
    seed: int
    learning_rate: float
    method: str = "dmd"
    data: Mapping[str, Any] = field(default_factory=dict)
    model: Mapping[str, Any] = field(default_factory=dict)
    loss: Mapping[str, Any] = field(default_factory=dict)
    train: Mapping[str, Any] = field(default_factory=dict)

    def path(self, folder: Path) -> Path:
        """The file of the cell in the folder of a study."""
        return folder / self.setting / f"{self.row}-lr{self.learning_rate:g}-seed{self.seed}.json"


def train_cell(cell: Cell) -> dict[str, Any]:
    """Train, choose the epoch on the validation split, test once; the result as builtin values.

    A run whose loss is not finite is a result too: it says so, and has no scores.
    """
    began = time.perf_counter()
    splits = data.load(cell.dataset, **cell.data)
    sizes = {"widths": splits.widths, "lengths": splits.lengths}
    config = TrainConfig(
        **{
            **cell.train,
            "loss": LossConfig(**cell.loss),
            "seed": cell.seed,
            "learning_rate": cell.learning_rate,
        }
    )
    seed_everything(cell.seed)
    if cell.method == "dmd":
        options = ModelConfig(**{**cell.model, **sizes}).to_dict()
    else:
        options = {"method": cell.method, **sizes, "options": dict(cell.model)}
    model = checkpoint.build_model(options)
    found: dict[str, Any] = {
        **asdict(cell),
        "parameters": sum(x.numel() for x in model.parameters()),
        "commit": checkpoint.git_commit(),
    }
    try:
        history = Trainer(model, config).fit(splits)
    except NonFiniteLoss as error:
        return {**found, "failed": str(error), "seconds": time.perf_counter() - began}
    prediction = torch.cat(collect(lambda x: x.prediction, model, splits.test)).cpu()
    found |= {
        "valid": history.epochs[history.best_epoch - 1]["valid"],
        "test": compute(prediction, splits.test.label),
        "best_epoch": history.best_epoch,
        "epochs": len(history.epochs),
        "prediction": [round(float(x), 5) for x in prediction],
        "label": [round(float(x), 5) for x in splits.test.label],
        "device": str(next(model.parameters()).device),
    }
    if isinstance(model, DMD):
        heads = collect(lambda x: (x.homo.logits.T, x.hetero.logits.T), model, splits.test)
        for name, part in zip(("homo", "hetero"), zip(*heads, strict=True), strict=True):
            logits = torch.cat(part).cpu()
            found[f"heads_{name}"] = [compute(x, splits.test.label) for x in logits.T]
    return {**found, "seconds": round(time.perf_counter() - began, 2)}


def alone(cell: Cell) -> dict[str, Any]:
    """`train_cell` on one thread: where several cells run side by side, more threads only wait."""
    torch.set_num_threads(1)
    return train_cell(cell)


def run(
    cells: Sequence[Cell],
    folder: Path,
    jobs: int = 1,
    ray: str | None = None,
    tell: Callable[[str], None] = lambda text: print(text, end="\r", file=sys.stderr),
) -> list[dict[str, Any]]:
    """The results of all cells, in order; those whose file is there are read, not trained.

    jobs: processes on this machine. ray: address of a Ray cluster, or `local` for one on this
    machine, whose tasks the cells become; `jobs` then does not count. tell: takes the progress.
    Raises ValueError where Ray is asked for and not installed.
    """
    todo = [cell for cell in cells if stored(cell, folder) is None]
    began = time.perf_counter()
    finished = by_ray(todo, ray) if ray is not None else by_processes(todo, jobs)
    for done, (cell, result) in enumerate(finished, start=1):
        checkpoint.write_json(cell.path(folder), result)
        left = (time.perf_counter() - began) / done * (len(todo) - done) / 60
        tell(f"{done}/{len(todo)} cells, {left:.0f} min left   ")
    return [found for cell in cells if (found := stored(cell, folder)) is not None]


def stored(cell: Cell, folder: Path) -> dict[str, Any] | None:
    """The result of a cell, if its file is there.

    Raises ValueError where the file is that of another run: other data, options, or budget.
    """
    path = cell.path(folder)
    if not path.exists():
        return None
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    for key, value in json.loads(json.dumps(asdict(cell))).items():
        if found.get(key, value) != value:
            raise ValueError(
                f"{path} holds a run with {key}={found[key]}, not {value}: "
                "remove it or choose another --output"
            )
    return found


def by_processes(cells: Sequence[Cell], jobs: int) -> Iterator[tuple[Cell, dict[str, Any]]]:
    """Cells and their results as they end; with one job in this process, which a GPU likes."""
    if jobs == 1:
        yield from ((cell, train_cell(cell)) for cell in cells)
        return
    with ProcessPoolExecutor(jobs) as pool:
        futures = {pool.submit(alone, cell): cell for cell in cells}
        yield from ((futures[future], future.result()) for future in as_completed(futures))


def by_ray(cells: Sequence[Cell], address: str) -> Iterable[tuple[Cell, dict[str, Any]]]:
    """The same as tasks of a Ray cluster; a GPU there is shared by four cells."""
    try:
        import ray
    except ImportError as error:
        raise ValueError("--ray needs the package ray: pip install ray") from error
    where = None if address == "local" else address
    ray.init(where, ignore_reinit_error=True, log_to_driver=False)
    gpus = 0.25 if ray.cluster_resources().get("GPU") else 0
    task = ray.remote(num_cpus=1, num_gpus=gpus)(alone)
    waiting = {task.remote(cell): cell for cell in cells}
    while waiting:
        (ready,), _ = ray.wait(list(waiting), num_returns=1)
        yield waiting.pop(ready), ray.get(ready)
