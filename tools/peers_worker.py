"""Train methods of the public package MMSA, in the environment where that is installed.

    PYTHON_OF_MMSA tools/peers_worker.py CELLS.json

`tools/peers.py` calls it. CELLS.json is a list of cells; each becomes the file at its key `path`.
It needs torch, numpy and MMSA, nothing of `dmd`. Models, training loops, losses and scores are
MMSA's own, called where they are. Around them:

- `MMSA_run` is not called: it asks for a CUDA device. Its parts are, in the same order.
- After every epoch the clips of the validation split are predicted by the trainer's own `do_test`;
  the epoch with the lowest MAE over these clips is kept, and training ends after the given epochs.
  (MMSA's own criterion is a mean over batches, and for MISA a squared error.)
- `ReduceLROnPlateau` no longer takes `verbose`, which MulT's trainer passes: it is dropped.
- MISA takes language from BERT only. Another module takes BERT's place: it looks the clip up and
  returns the language features of the file; the map that follows is as wide as these.
- Rates, batch size, epochs and seed are the cell's, and data are loaded without worker processes.
"""

import functools
import json
import os
import platform
import sys
import tempfile
import time
from importlib import metadata
from pathlib import Path
from typing import Any

os.environ["TQDM_DISABLE"] = "1"

import contextlib

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import lr_scheduler

PACKAGES = ("MMSA", "torch", "numpy", "transformers")


class Enough(Exception):
    """All epochs have been trained."""


class GivenFeatures(nn.Module):
    """In the place of BERT: the language features of clips that are named by their numbers.

    table: (N, T, D) features of all clips.
    """

    def __init__(self, table: Tensor) -> None:
        super().__init__()
        self.register_buffer("table", table, persistent=False)

    def forward(self, text: Tensor) -> Tensor:
        """(B, 3, T), numbers of clips in the first row -> (B, T, D)."""
        return self.table[text[:, 0, 0].long()]


def number_clips(loaders: dict[str, Any], path: str) -> Tensor:
    """Write each clip's number in the place of its token ids; the features (N, T, D) of all."""
    import pickle

    with open(path, "rb") as file:
        content = pickle.load(file)  # written by `tools/peers.py export`
    start, table = 0, []
    for name, loader in loaders.items():
        text = loader.dataset.text
        text[:, 0] = np.arange(start, start + len(text))[:, None]
        start += len(text)
        table.append(torch.from_numpy(content[name]["text"]))
    return torch.cat(table)


def build(args: Any, cell: dict[str, Any], loaders: dict[str, Any]) -> nn.Module:
    """The model of a cell."""
    from MMSA.models.AMIO import AMIO

    if args["model_name"] != "misa":
        return AMIO(args)
    table = number_clips(loaders, cell["data"])
    module = sys.modules["MMSA.models.singleTask.MISA"]
    module.BertTextEncoder = lambda **_: GivenFeatures(table)  # type: ignore[attr-defined]
    model = AMIO(args)
    model.Model.project_t.project_t = nn.Linear(table.shape[2], args["hidden_size"])
    return model


def scores(found: dict[str, Any]) -> dict[str, float]:
    """The scores among what `do_test` returns."""
    return {key: float(value) for key, value in found.items() if np.isscalar(value)}


def error(found: dict[str, Any]) -> float:
    """Mean absolute error over the clips that `do_test` predicted."""
    prediction, label = (np.ravel(found[key]).astype(float) for key in ("SResults", "Labels"))
    return float(np.abs(prediction - label).mean())


def train(cell: dict[str, Any]) -> dict[str, Any]:
    """Train one cell, choose its epoch on the validation split, and test it."""
    from MMSA.config import get_config_regression
    from MMSA.data_loader import MMDataLoader
    from MMSA.trains.ATIO import ATIO
    from MMSA.utils.functions import setup_seed

    began, cpu = time.perf_counter(), time.process_time()
    args = get_config_regression(cell["row"], "mosi")
    rate = cell["learning_rate"]
    args.update(
        {
            **{"device": torch.device("cpu"), "train_mode": "regression", "cur_seed": cell["seed"]},
            **{"custom_feature": None, "feature_T": None, "feature_A": None, "feature_V": None},
            **cell["options"],
            **{"featurePath": cell["data"], "learning_rate": rate, "factor_lr": rate},
            **{"batch_size": cell["batch_size"], "early_stop": cell["epochs"] + 1},
        }
    )
    setup_seed(cell["seed"])
    loaders = MMDataLoader(args, num_workers=0)
    model = build(args, cell, loaders)
    trainer = ATIO().getTrain(args)
    plain, curve, best = trainer.do_test, [], {}

    def do_test(
        model: nn.Module, loader: Any, mode: str = "VAL", return_sample_results: bool = False
    ) -> dict[str, Any]:
        found = plain(model, loader, mode=mode, return_sample_results=True)
        curve.append(error(found))
        if curve[-1] <= min(curve):
            best.update({name: x.clone() for name, x in model.state_dict().items()})
        if len(curve) == cell["epochs"]:
            raise Enough
        return found

    trainer.do_test = do_test
    with tempfile.TemporaryDirectory() as folder:
        args["model_save_path"] = Path(folder, "model.pth")
        with contextlib.suppress(Enough):
            trainer.do_train(model, loaders)
    model.load_state_dict(best)
    found = plain(model, loaders["test"], mode="TEST", return_sample_results=True)
    by_clip = dict(zip(found["Ids"], np.ravel(found["SResults"]).tolist(), strict=True))
    ids = loaders["test"].dataset.ids
    order = dict(zip(ids, loaders["test"].dataset.labels["M"].tolist(), strict=True))
    return {
        "reported": scores(found),  # by MMSA, rounded to four digits
        "valid": {"mae": min(curve)},
        "curve": curve,
        "best_epoch": 1 + curve.index(min(curve)),
        "epochs": len(curve),
        "prediction": [round(by_clip[name], 5) for name in ids],
        "label": [round(order[name], 5) for name in ids],
        "parameters": sum(x.numel() for x in model.parameters() if x.grad is not None),
        "seconds": round(time.perf_counter() - began, 2),
        "cpu_seconds": round(time.process_time() - cpu, 2),
    }


def main() -> None:
    """Train the cells of a file, in order, and write each as it ends."""
    torch.set_num_threads(1)
    lr_scheduler.ReduceLROnPlateau.__init__ = without_verbose(  # type: ignore[method-assign]
        lr_scheduler.ReduceLROnPlateau.__init__
    )
    versions = {name: metadata.version(name) for name in PACKAGES}
    versions["python"] = platform.python_version()
    cells = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    for number, cell in enumerate(cells, start=1):
        path = Path(cell.pop("path"))
        found = {**cell, **train(cell), "versions": versions}
        del found["data"]
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(".part")
        part.write_text(json.dumps(found, indent=2), encoding="utf-8")
        part.replace(path)
        print(f"{number}/{len(cells)} {path.stem} {found['valid']['mae']:.3f}", file=sys.stderr)


def without_verbose(function: Any) -> Any:
    """A function that takes `verbose` and forgets it."""

    @functools.wraps(function)
    def call(*args: Any, verbose: bool = False, **options: Any) -> Any:
        return function(*args, **options)

    return call


if __name__ == "__main__":
    main()
