"""A training step that a GPU records once and then replays: one launch in place of thousands."""

import warnings
from collections.abc import Callable
from dataclasses import fields

import torch
from torch import Tensor

from dmd.batch import Batch
from dmd.config import TrainConfig
from dmd.distributed import world_size

WARM_UP = 3  # steps that run as they are before one is recorded: they allocate and choose kernels

Step = Callable[[Batch], dict[str, Tensor]]


def obstacle(config: TrainConfig, device: torch.device, processes: int = 1) -> str | None:
    """Why a step of this training can't be captured, in one line; None if it can."""
    if device.type != "cuda":
        return f"capture needs a CUDA device, and this is {device.type}: steps run one by one"
    if config.precision == "fp16":
        return "capture needs float32 or bf16: the scaling of fp16 looks at every step"
    if config.accumulate > 1:
        return "capture needs accumulate=1: a step is then one batch"
    if processes > 1:
        return "capture needs a single process: gradients are exchanged between steps"
    return None


def capture(step: Step, config: TrainConfig, device: torch.device) -> "CapturedStep | None":
    """The step for `config.capture`, or None, with a warning that says why, where it can't be."""
    if not config.capture:
        return None
    reason = obstacle(config, device, world_size())
    if reason is not None:
        warnings.warn(reason, stacklevel=2)
        return None
    return CapturedStep(step)


class CapturedStep:
    """A step as a CUDA graph, for batches that all have the shapes of the first one, and padding
    where it has some.

    step: forward, backward and update for a batch, without looking at any result; returns scalars
    by name, which later calls overwrite. Batches of another shape run as they are.
    """

    def __init__(self, step: Step) -> None:
        self.step = step
        self.stream = torch.cuda.Stream()
        self.graph: torch.cuda.CUDAGraph | None = None
        self.place: Batch | None = None  # where a replay finds its batch
        self.terms: dict[str, Tensor] = {}
        self.calls = 0

    def __call__(self, batch: Batch) -> dict[str, Tensor]:
        """Run the step on a batch (on the GPU)."""
        if self.place is None:
            self.place = batch
        if shapes(batch) != shapes(self.place) or batch.padded != self.place.padded:
            return self.step(batch)
        if self.graph is None:
            self.calls += 1
            if self.calls <= WARM_UP:
                return self._aside(batch)
            self._capture(batch)
        assert self.graph is not None
        for name in tensors(batch):
            getattr(self.place, name).copy_(getattr(batch, name))
        self.graph.replay()
        return self.terms

    def forget(self) -> None:
        """Record anew at the next call: something has changed that is not in the batch."""
        self.graph = None

    def _aside(self, batch: Batch) -> dict[str, Tensor]:
        """Run the step on a stream of its own, as recording demands of what comes before it."""
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            terms = self.step(batch)
        torch.cuda.current_stream().wait_stream(self.stream)
        return terms

    def _capture(self, batch: Batch) -> None:
        """Record the step; recording runs nothing."""
        self.place = batch[torch.arange(len(batch), device=batch.language.device)]
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.terms = self.step(self.place)


def tensors(batch: Batch) -> list[str]:
    """The fields of a batch that are tensors."""
    return [f.name for f in fields(batch) if isinstance(getattr(batch, f.name), Tensor)]


def shapes(batch: Batch) -> dict[str, torch.Size]:
    """Their shapes."""
    return {name: getattr(batch, name).shape for name in tensors(batch)}
