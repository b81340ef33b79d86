"""The training loop: one readable pass over the epochs, which can be interrupted and resumed."""

import math
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim import lr_scheduler

from dmd import checkpoint, distributed, fast, optimisation
from dmd.baselines import Baseline
from dmd.batch import Batch
from dmd.config import TrainConfig
from dmd.data import Dataset, Splits
from dmd.device import seed_everything
from dmd.history import History, Interrupted, NonFiniteLoss, require_finite
from dmd.losses import LossTerms
from dmd.metrics import compute, evaluate, evaluate_with_edges
from dmd.model import DMD


class Trainer:
    """Train a model on the train split, choose the epoch on validation, test once at the end.

    output: folder for `last.safetensors` (everything needed to resume), `best.safetensors` (the
        chosen weights) and `run.json` (the history); None keeps all in memory.
    progress: report on standard error.

    Started by torchrun, each process trains on its share of the clips of every batch. The run is
    that of one process but for rounding and dropout: see `dmd.distributed`. Its checkpoints do not
    depend on the number of processes; resumed, all but the first draw new dropout.
    """

    def __init__(
        self,
        model: DMD | Baseline,
        config: TrainConfig | None = None,
        output: str | Path | None = None,
        progress: bool = False,
    ) -> None:
        self.model = model
        self.config = config or TrainConfig()
        self.output = None if output is None else Path(output)
        self.progress = progress and distributed.is_main()
        self.device = distributed.own_device(self.config.device)

    def fit(self, splits: Splits, resume: bool = False) -> History:
        """Train; with `resume` go on from the last checkpoint in the output folder.

        The model ends in evaluation mode with the weights of the chosen epoch. Raises ValueError
        for data that the model was not built for and for a checkpoint of another configuration or
        dataset, OSError for a folder that can't be written, NonFiniteLoss, and Interrupted.
        """
        for split in splits:
            self.model.check(split.clips)
        selected = self.config.select
        if math.isnan(compute(splits.valid.label, splits.valid.label)[selected]):
            raise ValueError(
                f"select={selected!r} is not defined for the labels of the {splits.valid.name} "
                "split: select 'mae'"
            )
        optimisation.require_steps(splits.train, self.config)
        if self.output is not None and distributed.is_main():
            checkpoint.check_output(self.output, resume)
        with distributed.connected(self.device):
            return self._fit(splits, resume)

    def _fit(self, splits: Splits, resume: bool) -> History:
        self._start(splits)
        if resume:
            self._restore()
        else:
            self._save_last()  # killed at any moment from here on, there is something to load
        distributed.own_random_numbers(self.device)
        with self._stop_on_interrupt():
            while not self._finished():
                clips = self._train_epoch(self.train)
                self._close_epoch(splits, clips)
        self.model.load_state_dict(self.best)
        self.history.test = distributed.from_main(evaluate, self.model.eval(), splits.test)
        if self.output is not None and distributed.is_main():
            checkpoint.write_json(self.output / "run.json", self._meta())
        return self.history

    def _start(self, splits: Splits) -> None:
        config = self.config
        self.model.to(self.device)
        self.flat = optimisation.flatten(self.model)
        terms = partial(optimisation.loss_terms, self.model, config)
        self.terms = distributed.replicate(self.model, terms)
        self.optimiser = optimisation.make_optimiser(self.flat, config)
        self.scheduler = optimisation.make_scheduler(self.optimiser, config)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=config.precision == "fp16")
        self.history = History()
        self.best = self._weights()
        self.best_score = -math.inf
        self.epoch, self.step, self.seconds = 0, 0, 0.0
        self.sums: dict[str, Tensor] = {}  # each loss term, summed over the clips of the epoch
        self.train = splits.train.to(self.device)
        self.captured = fast.capture(self._update, config, self.device)
        self.interrupted = False
        self.provenance = checkpoint.provenance()
        self.dataset = {
            "name": splits.name,
            "options": splits.options,
            "fingerprint": splits.fingerprint(),
        }
        seed_everything(config.seed)

    def _weights(self) -> dict[str, Tensor]:
        return {name: x.detach().clone() for name, x in self.model.state_dict().items()}

    def _finished(self) -> bool:
        patience = self.config.patience
        waited = self.epoch - self.history.best_epoch
        last = self.config.epochs
        return (last is not None and self.epoch >= last) or (
            patience is not None and waited >= patience
        )

    def _train_epoch(self, train: Dataset) -> int:
        """The rest of one pass over the clips; only seed and epoch determine their order.

        Returns how many clips the whole pass has.
        """
        began = time.perf_counter() - self.seconds
        shuffle = torch.Generator().manual_seed(1_000_003 * self.config.seed + self.epoch)
        order = torch.randperm(len(train), generator=shuffle)
        steps = optimisation.groups(order, self.config)
        self.model.train()
        while self.step < len(steps):
            self._train_step(train, steps[self.step])
            self.step += 1
            self.seconds = time.perf_counter() - began
            if sys.stderr.isatty():
                self._report(self.epoch + 1, f"step {self.step}/{len(steps)}", end="\r")
            if distributed.anyone(self.interrupted):
                self._save_last()
                distributed.anyone(True)  # nobody leaves before it is saved
                saved = "" if self.output is None else f", saved in {self.output}: --resume goes on"
                raise Interrupted(f"stopped in epoch {self.epoch + 1} at step {self.step}{saved}")
        return sum(map(len, steps))

    def _update(self, batch: Batch) -> dict[str, Tensor]:
        return optimisation.update(batch, self.terms, self.flat, self.optimiser, self.config)

    def _train_step(self, train: Dataset, group: Tensor) -> None:
        """One update, from the gradients of a group of one or more batches."""
        config = self.config
        if self.captured is not None:
            self._add(self.captured(train[group.to(self.device)]), len(group))
            return
        self.optimiser.zero_grad(set_to_none=False)  # gradients are views
        for index in group.split(config.batch_size):
            own, share = distributed.share(index, config.margin_over)
            terms = LossTerms(*self.terms(train[own.to(self.device)], share))
            if self.device.type == "cpu" and not torch.isfinite(terms.total):
                # elsewhere the question would wait for the device: it is put after the epoch
                clips = ", ".join(map(str, train[index].ids or index.tolist()))
                require_finite({**terms.weighted, "total": terms.total}, self.epoch + 1, clips)
            weight = len(index) / len(group) if config.accumulate_by == "mean" else 1.0
            self.scaler.scale(terms.total * weight).backward()
            if config.clip_each_batch:
                optimisation.bound_gradients([self.flat], config)
            self._add({**terms.unweighted, "total": terms.total}, len(index))
        self.scaler.unscale_(self.optimiser)
        if not config.clip_each_batch:
            optimisation.bound_gradients([self.flat], config)
        self.scaler.step(self.optimiser)
        self.scaler.update()

    def _add(self, terms: dict[str, Tensor], clips: int) -> None:
        """Add the terms of a batch to the sums of the epoch, on the device."""
        values = torch.stack([x.detach() for x in terms.values()]) * clips
        if self.sums:
            values = values + torch.stack([self.sums[name] for name in terms])
        self.sums = dict(zip(terms, values.unbind(), strict=True))

    def _rate(self) -> float:
        rate: float = self.optimiser.param_groups[0]["lr"]
        return rate

    def _close_epoch(self, splits: Splits, clips: int) -> None:
        """Score the epoch on the validation split, keep it if it is the best, and save."""
        require_finite(self.sums, self.epoch + 1)
        for name, weight in self.model.named_parameters():
            if not torch.isfinite(weight).all():
                raise NonFiniteLoss(
                    f"the weights {name} are not finite after epoch {self.epoch + 1}"
                )
        scores, edges = distributed.from_main(evaluate_with_edges, self.model, splits.valid)
        train = {name: float(total) / clips for name, total in self.sums.items()}
        self.epoch += 1
        row: dict[str, Any] = {"epoch": self.epoch, "seconds": round(self.seconds, 3)}
        row["learning_rate"] = self._rate()
        row |= {"train": train, "valid": scores, "edges": edges}
        if self.config.test_each_epoch:
            row["test"] = distributed.from_main(evaluate, self.model, splits.test)
        self.history.epochs.append(row)
        score = scores[self.config.select] * (-1 if self.config.select == "mae" else 1)
        if math.isnan(score):  # the correlation of constant predictions
            score = -math.inf
        improved = self.epoch == 1 or score > self.best_score
        if improved:
            self.best, self.best_score = self._weights(), score
            self.history.best_epoch = self.epoch
        if isinstance(self.scheduler, lr_scheduler.ReduceLROnPlateau):
            self.scheduler.step(score)
        else:
            self.scheduler.step()
        if self.captured is not None and self._rate() != row["learning_rate"]:
            self.captured.forget()  # the old rate is recorded in it
        self.step, self.seconds, self.sums = 0, 0.0, {}
        if improved:
            # Before `last`: a run that is killed in between does this epoch again when resumed.
            self._save("best", checkpoint.put("model", self.best), {})
        self._save_last()
        self._report(
            self.epoch,
            f"loss {train['total']:.4f}  validation MAE {scores['mae']:.4f}  "
            f"accuracy {scores['acc2_non0']:.3f}  {row['seconds']:.1f} s",
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
            "provenance": self.provenance,
        }

    def _save(self, name: str, tensors: dict[str, Tensor], more: dict[str, Any]) -> None:
        if self.output is not None and distributed.is_main():
            path = self.output / f"{name}.safetensors"
            checkpoint.save(path, tensors, {**self._meta(), **more})

    def _save_last(self) -> None:
        """Write all that the rest of the training depends on."""
        tensors = {
            **checkpoint.put("model", self.model.state_dict()),
            **checkpoint.put("best", self.best),
            **checkpoint.put("sums", self.sums),
        }
        state, meta = checkpoint.training_state(
            self.optimiser, self.scheduler, self.scaler, self.device
        )
        self._save("last", tensors | state, meta)

    def _restore(self) -> None:
        """Take up everything that `_save_last` wrote."""
        if self.output is None:
            raise ValueError("to resume, the trainer needs the output folder of the run")
        path = self.output / "last.safetensors"
        tensors, meta = checkpoint.load(path)
        checkpoint.require_same_run(path, meta, self._meta())
        self.model.load_state_dict(checkpoint.select(tensors, "model"))
        self.best = checkpoint.select(tensors, "best")
        self.sums = {k: x.to(self.device) for k, x in checkpoint.select(tensors, "sums").items()}
        checkpoint.restore_training_state(
            self.optimiser, self.scheduler, self.scaler, self.device, tensors, meta
        )
        self.history = History(**meta["history"])
        self.epoch, self.step, self.seconds = meta["epoch"], meta["step"], meta["seconds"]
        self.best_score = meta["best_score"]
        if self._finished():
            self.provenance = meta["provenance"]  # nothing is trained any more

    def _report(self, epoch: int, text: str, end: str = "\n") -> None:
        if self.progress:
            last = "" if self.config.epochs is None else f"/{self.config.epochs}"
            line = f"epoch {epoch}{last}  {text}"
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
