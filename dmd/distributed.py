"""Several processes that train one model: who is who, and what they tell each other.

`torchrun --nproc-per-node N -m dmd train ...` starts N processes, the ranks 0 to N - 1. Each has a
device of its own, the same weights, and its share of the clips of every batch; rank 0, the main
one, also scores, reports and writes. Without torchrun there is one rank, and all here does nothing.
"""

import atexit
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.autograd import Function
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from dmd.device import find_device
from dmd.model import Output


def rank() -> int:
    """The number of this process, from 0."""
    return dist.get_rank() if dist.is_initialized() else int(os.environ.get("RANK", 0))


def world_size() -> int:
    """How many processes train together; 1 without torchrun."""
    if dist.is_initialized():
        return dist.get_world_size()
    return int(os.environ.get("WORLD_SIZE", 1)) if "RANK" in os.environ else 1


def is_main() -> bool:
    """Whether this is the process that scores, reports and writes."""
    return rank() == 0


def own_device(name: str) -> torch.device:
    """The device of this process: `find_device(name)`, and of several processes each has a GPU.

    Raises ValueError where the device is not there or can't be one for each process.
    """
    device = find_device(name)
    if world_size() == 1 or device.type == "cpu":
        return device
    if device.type != "cuda" or device.index is not None:
        raise ValueError(
            f"device={name!r} would be one for all {world_size()} processes of torchrun: "
            "choose 'cuda' for a GPU each, or 'cpu'"
        )
    gpus, wanted = torch.cuda.device_count(), int(os.environ["LOCAL_WORLD_SIZE"])
    if wanted > gpus:
        raise ValueError(
            f"torchrun started {wanted} processes here, but there are {gpus} GPUs: lower "
            "--nproc-per-node, or choose device='cpu'"
        )
    return torch.device("cuda", int(os.environ["LOCAL_RANK"]))


@contextmanager
def connected(device: torch.device) -> Iterator[None]:
    """Connect the processes: by nccl between GPUs, else by gloo.

    Raises ConnectionError where another process ends meanwhile.
    """
    if world_size() == 1:
        yield
        return
    if not dist.is_initialized():
        if device.type == "cuda":
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        atexit.register(dist.destroy_process_group)
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and "gloo" not in str(error):
            raise
        raise ConnectionError(
            "another process of this training has ended, so it stops: --resume goes on from the "
            "last checkpoint, with any number of processes"
        ) from error


def defer_to_main(seconds: float = 5.0) -> None:
    """On every rank but the main one: leave it to the main one to fail first, and to say why.

    What is wrong is mostly wrong on every rank. When the main one ends, torchrun ends the others;
    one that is still there after some `seconds` has met something of its own.
    """
    if not is_main():
        time.sleep(seconds)


def from_main(compute: Callable[..., Any], *args: Any) -> Any:
    """What `compute(*args)` returns on the main rank, the same object on every rank."""
    if world_size() == 1:
        return compute(*args)
    found = [compute(*args) if is_main() else None]
    dist.broadcast_object_list(found)
    return found[0]


def anyone(flag: bool) -> bool:
    """Whether the flag is set on some rank; waits for all of them."""
    if world_size() == 1:
        return flag
    found = torch.tensor(int(flag), device="cuda" if dist.get_backend() == "nccl" else "cpu")
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return bool(found)


def own_random_numbers(device: torch.device) -> None:
    """Give each rank dropout of its own, from random numbers that are in the same state on all.

    Those of the main rank stay as they are: alone it draws what a single process would draw.
    """
    if not is_main():
        torch.manual_seed(int(torch.randint(2**62, (), device=device)) + rank())


class _Gather(Function):
    """Rows (B_r, K) of each rank -> the rows (B, K) of all; the gradient is that of the own ones.

    Every rank computes the same loss from all rows, so nothing is sent on the way back. There are
    as many such losses as ranks, and DistributedDataParallel takes the mean of their gradients,
    each of which is one rank's part of the sum: hence the factor.
    """

    @staticmethod
    def forward(ctx: Any, own: Tensor, clips: Sequence[int]) -> Tensor:
        ctx.clips = clips
        most = max(clips)
        padded = F.pad(own, (0, 0, 0, most - len(own))).contiguous()
        parts = [torch.empty_like(padded) for _ in clips]
        dist.all_gather(parts, padded)
        return torch.cat([part[:count] for part, count in zip(parts, clips, strict=True)])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0].split(ctx.clips)[rank()] * world_size(), None


class _Sum(Function):
    """The sum of a tensor over the ranks, the same on all; the gradient as in `_Gather`."""

    @staticmethod
    def forward(ctx: Any, own: Tensor) -> Tensor:
        total = own.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0] * world_size()


@dataclass(frozen=True)
class Share:
    """The part that this rank has of a batch, and how the terms of the whole batch come of it.

    clips: how many clips each rank has. A rank that has none computes with one that does not count.
    margin_over: as in `TrainConfig`.
    """

    clips: tuple[int, ...]
    margin_over: Literal["global", "rank"] = "global"

    @property
    def own(self) -> int:
        """The clips of this rank."""
        return self.clips[rank()]

    def gather(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Tensors (B_r, ...) of each rank -> tensors (B, ...) of the whole batch."""
        rows = [x.reshape(len(x), -1)[: self.own] for x in tensors]
        joined = _Gather.apply(torch.cat(rows, dim=1), self.clips)
        parts = joined.split([row.shape[1] for row in rows], dim=1)
        return [
            part.reshape(-1, *x.shape[1:]).to(x.dtype)
            for part, x in zip(parts, tensors, strict=True)
        ]

    def join(self, output: Output, label: Tensor) -> tuple[Output, Tensor]:
        """Labels (B,), and the output with all that is one vector a clip, of the whole batch.

        The sequences stay those of this rank, and with `margin_over="rank"` the margin vectors.
        """
        graphs = (output.homo, output.hetero)
        tensors = [label, output.prediction, output.margin_vectors.transpose(0, 1)]
        for graph in graphs:
            tensors += [
                graph.logits.T,
                graph.edges,
                graph.distances,
                graph.features.transpose(0, 1),
            ]
        if output.common_prediction is not None:
            tensors.append(output.common_prediction)
        label, prediction, vectors, *rest = self.gather(tensors)
        homo, hetero = (
            replace(
                graph,
                logits=logits.T,
                edges=edges,
                distances=distances,
                features=features.transpose(0, 1),
            )
            for graph, (logits, edges, distances, features) in zip(
                graphs, (rest[:4], rest[4:8]), strict=True
            )
        )
        whole = replace(output, prediction=prediction, homo=homo, hetero=hetero)
        if self.margin_over == "global":
            whole.margin_vectors = vectors.transpose(0, 1)
        if output.common_prediction is not None:
            whole.common_prediction = rest[8]
        return whole, label

    def mean_over_clips(self, own: Tensor) -> Tensor:
        """A term of each rank's clips -> the mean of the terms, weighted by how many clips."""
        return _Sum.apply(own * (self.own / sum(self.clips)))

    def mean_over_steps(
        self,
        loss: Callable[..., Tensor],
        xs: Sequence[Tensor],
        ys: Sequence[Tensor],
        masks: Sequence[Tensor] | None,
        valid: Sequence[Tensor],
    ) -> Tensor:
        """`loss(xs, ys, masks)`, a mean over valid steps a modality, over those of all ranks.

        xs, ys: (B_r, T_m, d) a modality; masks: what the loss takes, None where no step is padded;
        valid: (B_r, T_m) a modality, true at the valid steps.
        """
        alone = [None] * len(xs) if masks is None else [[mask] for mask in masks]
        means = [loss([x], [y], mask) for x, y, mask in zip(xs, ys, alone, strict=True)]
        own = torch.stack([mask[: self.own].sum() for mask in valid])
        total = own.clone()
        dist.all_reduce(total)
        return _Sum.apply((torch.stack(means) * (own / total.clamp_min(1))).sum())


def share(index: Tensor, margin_over: Literal["global", "rank"]) -> tuple[Tensor, Share | None]:
    """Clips (B,) of a batch -> those of this rank, and its share; all, and None, without torchrun.

    The shares are neighbours, and differ by at most one clip.
    """
    if world_size() == 1:
        return index, None
    parts = index.tensor_split(world_size())
    own = parts[rank()]
    return own if len(own) else index[:1], Share(tuple(map(len, parts)), margin_over)


class _Using(nn.Module):
    """A function that uses a model, as a module: its result shows which weights it depends on."""

    def __init__(self, model: nn.Module, compute: Callable[..., Any]) -> None:
        super().__init__()
        self.model, self.compute = model, compute

    def forward(self, *args: Any) -> Any:
        return self.compute(*args)


def replicate(model: nn.Module, compute: Callable[..., Any]) -> Callable[..., Any]:
    """`compute`, which uses the model, such that gradients come out as the mean over the ranks.

    compute: returns tensors in tuples and dictionaries, always from the same weights; those that it
        does not use keep their gradients. All ranks begin with the weights of the main one. The
        mean is written into the gradients that are there, so they may be views of one vector.
    """
    if world_size() == 1:
        return compute
    return DistributedDataParallel(_Using(model, compute), static_graph=True)
