"""The training loop: one readable pass over the epochs, which can be interrupted and resumed."""

import json
import math
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import (
    ConstantLR,
    CosineAnnealingLR,
    LRScheduler,
    ReduceLROnPlateau,
)

from dmd import checkpoint
from dmd.batch import Batch
from dmd.config import TrainConfig
from dmd.data import Dataset, Splits
from dmd.losses import LossTerms, objective
from dmd.metrics import evaluate
from dmd.model import DMD

PRECISIONS = {"float32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class NonFiniteLoss(ArithmeticError):
    """Training produced NaN or infinity; the message names the term and the clips."""


class Interrupted(Exception):
    """Training was stopped by Ctrl-C after its state had been saved."""


@dataclass
class History:
    """What happened: a row an epoch, which epoch was kept, and its scores on the test split.

    epochs: dictionaries with `epoch`, `seconds`, `learning_rate`, `train` (unweighted loss terms
        and `total`, mean over clips) and `valid` (metrics).
    """

    epochs: list[dict[str, Any]] = field(default_factory=list)
    best_epoch: int = 0
    test: dict[str, float] = field(default_factory=dict)

    def curve(self, part: str, name: str) -> list[float]:
        """One number an epoch, for example `curve("valid", "mae")`."""
        return [row[part][name] for row in self.epochs]


def seed_everything(seed: int) -> None:
    """Seed the random numbers of PyTorch, for the first weights of a model and for dropout."""
    torch.manual_seed(seed)


def find_device(name: str = "auto") -> torch.device:
    """The device called `name`; `auto` is cuda, else mps, else cpu. ValueError if not there."""
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {name!r} is not available here: try auto or cpu") from error
    return device


class Trainer:
    """Train a model on the train split, choose the epoch on validation, test once at the end.

    output: folder for `last.safetensors` (everything needed to resume), `best.safetensors` (the
        chosen weights) and `run.json` (the history); None keeps all in memory.
    progress: report on standard error.
    """

    def __init__(
        self,
        model: DMD,
        config: TrainConfig | None = None,
        output: str | Path | None = None,
        progress: bool = False,
    ) -> None:
        self.model = model
        self.config = config or TrainConfig()
        self.output = None if output is None else Path(output)
        self.progress = progress
        self.device = find_device(self.config.device)

    def fit(self, splits: Splits, resume: bool = False) -> History:
        """Train; with `resume` go on from the last checkpoint in the output folder.

        The model ends with the weights of the chosen epoch. Raises ValueError for data that the
        model was not built for and for a checkpoint of another configuration or dataset, OSError
        for a folder that can't be written, NonFiniteLoss, and Interrupted.
        """
        for split in splits:
            self.model.check(split[:1])
        self._start(splits)
        if resume:
            self._restore()
        if self.output is not None:
            checkpoint.make_writable(self.output, new=not resume)
        with self._stop_on_interrupt():
            while not self._finished():
                self._train_epoch(splits.train)
                self._close_epoch(splits)
        self.model.load_state_dict(self.best)
        self.history.test = evaluate(self.model, splits.test)
        self._write_run()
        return self.history

    def _start(self, splits: Splits) -> None:
        config = self.config
        self.model.to(self.device)
        self.optimiser = torch.optim.Adam(
            self.model.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay
        )
        self.scheduler = make_scheduler(self.optimiser, config)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=config.precision == "fp16")
        self.history = History()
        self.best = self._weights()
        self.best_score = -math.inf
        self.epoch, self.step, self.seconds = 0, 0, 0.0
        self.sums: dict[str, Tensor] = {}  # each loss term, summed over the clips of the epoch
        self.interrupted = False
        self.dataset = {"name": splits.name, "options": splits.options}
        self.dataset["fingerprint"] = splits.fingerprint()
        seed_everything(config.seed)

    def _weights(self) -> dict[str, Tensor]:
        return {name: x.detach().clone() for name, x in self.model.state_dict().items()}

    def _finished(self) -> bool:
        patience = self.config.patience
        waited = self.epoch - self.history.best_epoch
        return self.epoch >= self.config.epochs or (patience is not None and waited >= patience)

    def _train_epoch(self, train: Dataset) -> None:
        """The rest of one pass over the clips; only seed and epoch determine their order."""
        began = time.perf_counter() - self.seconds
        shuffle = torch.Generator().manual_seed(1_000_003 * self.config.seed + self.epoch)
        order = torch.randperm(len(train), generator=shuffle)
        groups = order.split(self.config.batch_size * self.config.accumulate)
        self.model.train()
        while self.step < len(groups):
            self._train_step(train, groups[self.step])
            self.step += 1
            self.seconds = time.perf_counter() - began
            self._report(f"step {self.step}/{len(groups)}", end="\r")
            if self.interrupted:
                self._save_last()
                saved = "" if self.output is None else f", saved in {self.output}: --resume goes on"
                raise Interrupted(f"stopped in epoch {self.epoch + 1} at step {self.step}{saved}")

    def _train_step(self, train: Dataset, group: Tensor) -> None:
        """One update, from the mean gradient over a group of one or more batches."""
        config = self.config
        self.optimiser.zero_grad(set_to_none=True)
        for index in group.split(config.batch_size):
            batch = train[index].to(self.device)
            assert batch.label is not None  # checked by Dataset
            mixed = config.precision != "float32"
            with torch.autocast(self.device.type, PRECISIONS[config.precision], enabled=mixed):
                output = self.model(batch)
            terms = objective(output, batch.label, config.loss)
            if not torch.isfinite(terms.total):
                raise NonFiniteLoss(describe_failure(terms, batch))
            self.scaler.scale(terms.total * (len(index) / len(group))).backward()
            for name, value in {**terms.unweighted, "total": terms.total}.items():
                self.sums[name] = self.sums.get(name, 0) + value.detach() * len(index)
        self.scaler.unscale_(self.optimiser)
        if config.clip == "value":
            nn.utils.clip_grad_value_(self.model.parameters(), config.clip_at)
        elif config.clip == "norm":
            nn.utils.clip_grad_norm_(self.model.parameters(), config.clip_at)
        self.scaler.step(self.optimiser)
        self.scaler.update()

    def _close_epoch(self, splits: Splits) -> None:
        """Score the epoch on the validation split, keep it if it is the best, and save."""
        for name, weight in self.model.named_parameters():
            if not torch.isfinite(weight).all():
                raise NonFiniteLoss(
                    f"the weights {name} are not finite after epoch {self.epoch + 1}: "
                    "a lower learning rate may help"
                )
        scores = evaluate(self.model, splits.valid)
        train = {name: float(total) / len(splits.train) for name, total in self.sums.items()}
        self.epoch += 1
        row = {"epoch": self.epoch, "seconds": round(self.seconds, 3)}
        row["learning_rate"] = self.optimiser.param_groups[0]["lr"]
        self.history.epochs.append({**row, "train": train, "valid": scores})
        score = scores[self.config.select] * (-1 if self.config.select == "mae" else 1)
        improved = score > self.best_score
        if improved:
            self.best, self.best_score = self._weights(), score
            self.history.best_epoch = self.epoch
        if isinstance(self.scheduler, ReduceLROnPlateau):
            self.scheduler.step(score)
        else:
            self.scheduler.step()
        self.step, self.seconds, self.sums = 0, 0.0, {}
        self._save_last()
        if improved and self.output is not None:
            tensors = {f"model/{name}": x for name, x in self.best.items()}
            checkpoint.save(self.output / "best.safetensors", tensors, self._meta())
        self._report(
            f"loss {train['total']:.4f}  validation MAE {scores['mae']:.4f}  "
            f"accuracy {scores['acc2_non0']:.3f}  {row['seconds']:.1f} s"
        )

    def _meta(self) -> dict[str, Any]:
        return {
            "model_config": self.model.config.to_dict(),
            "train_config": self.config.to_dict(),
            "dataset": self.dataset,
            "epoch": self.epoch,
            "step": self.step,
            "seconds": self.seconds,
            "best_score": self.best_score,
            "history": asdict(self.history),
            "provenance": checkpoint.provenance(),
        }

    def _save_last(self) -> None:
        """Write all that the rest of the training depends on."""
        if self.output is None:
            return
        tensors = {f"model/{name}": x for name, x in self._weights().items()}
        tensors |= {f"best/{name}": x for name, x in self.best.items()}
        tensors |= {f"sums/{name}": x for name, x in self.sums.items()}
        tensors |= checkpoint.optimiser_tensors(self.optimiser)
        tensors["random/cpu"] = torch.get_rng_state()
        if self.device.type == "cuda":
            tensors["random/cuda"] = torch.cuda.get_rng_state(self.device)
        meta = self._meta()
        meta["param_groups"] = self.optimiser.state_dict()["param_groups"]
        meta["scheduler"] = self.scheduler.state_dict()
        meta["scaler"] = self.scaler.state_dict()
        checkpoint.save(self.output / "last.safetensors", tensors, meta)

    def _restore(self) -> None:
        """Take up everything that `_save_last` wrote."""
        if self.output is None:
            raise ValueError("to resume, the trainer needs the output folder of the run")
        path = self.output / "last.safetensors"
        tensors, meta = checkpoint.load(path)
        here = json.loads(json.dumps(self._meta()))
        for part in ("model_config", "train_config", "dataset"):
            for key, value in here[part].items():
                if meta[part].get(key) != value and key not in ("epochs", "device"):
                    raise ValueError(
                        f"{path} can't be resumed: its {part.replace('_', ' ')} has {key}="
                        f"{meta[part].get(key)!r}, this run has {value!r}"
                    )
        self.model.load_state_dict(checkpoint.select(tensors, "model"))
        self.best = checkpoint.select(tensors, "best")
        self.sums = {k: x.to(self.device) for k, x in checkpoint.select(tensors, "sums").items()}
        checkpoint.restore_optimiser(self.optimiser, tensors, meta["param_groups"])
        self.scheduler.load_state_dict(meta["scheduler"])
        self.scaler.load_state_dict(meta["scaler"])
        self.history = History(**meta["history"])
        self.epoch, self.step, self.seconds = meta["epoch"], meta["step"], meta["seconds"]
        self.best_score = meta["best_score"]
        torch.set_rng_state(tensors["random/cpu"])
        if self.device.type == "cuda" and "random/cuda" in tensors:
            torch.cuda.set_rng_state(tensors["random/cuda"], self.device)

    def _write_run(self) -> None:
        if self.output is not None:
            text = checkpoint.to_json(self._meta())
            checkpoint.write_atomically(self.output / "run.json", text.encode())

    def _report(self, text: str, end: str = "\n") -> None:
        if self.progress and (end == "\n" or sys.stderr.isatty()):
            # a finished epoch has been counted already, one under way has not
            epoch = self.epoch + (end != "\n")
            line = f"epoch {epoch}/{self.config.epochs}  {text}"
            print(f"{line:<79}", end=end, file=sys.stderr, flush=True)

    @contextmanager
    def _stop_on_interrupt(self) -> Iterator[None]:
        """Let the first Ctrl-C finish the step that is under way; a second one stops at once."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def stop(signum: int, frame: object) -> None:
            if self.interrupted:
                raise KeyboardInterrupt
            self.interrupted = True

        before = signal.signal(signal.SIGINT, stop)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)


def make_scheduler(optimiser: torch.optim.Optimizer, config: TrainConfig) -> LRScheduler:
    """The learning-rate schedule of `config`, to be stepped at the end of each epoch."""
    if config.scheduler == "plateau":
        return ReduceLROnPlateau(optimiser, mode="max", factor=0.5, patience=5, threshold=0.0)
    if config.scheduler == "cosine":
        return CosineAnnealingLR(optimiser, config.epochs)
    return ConstantLR(optimiser, factor=1.0)


def describe_failure(terms: LossTerms, batch: Batch) -> str:
    """The sentence for a loss that is not finite: the first such term, and the clips."""
    broken = next(name for name, x in terms.weighted.items() if not torch.isfinite(x))
    clips = ", ".join(batch.ids) if batch.ids is not None else "without ids"
    return f"the loss term {broken!r} is not finite for the clips {clips}"
