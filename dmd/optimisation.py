"""What surrounds a step of the optimiser: its clips, the bound of its gradients, its rate."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.optim import Optimizer, lr_scheduler

from dmd.batch import Batch
from dmd.config import TrainConfig
from dmd.data import Dataset
from dmd.device import PRECISIONS
from dmd.distributed import Share, world_size
from dmd.losses import LossTerms, objective, task
from dmd.model import Output


def groups(order: Tensor, config: TrainConfig) -> list[Tensor]:
    """Cut the clips of an epoch, indices (N,), into the groups of batches that make one step."""
    found = order.split(config.batch_size * config.accumulate)
    too_few = config.batch_size * (config.accumulate - 1)  # with so many a batch is missing
    return [group for group in found if len(group) > too_few or not config.drop_incomplete]


def require_steps(train: Dataset, config: TrainConfig) -> None:
    """Refuse, with a ValueError, a configuration in which there is no step, or an idle process."""
    if not groups(torch.arange(len(train)), config):
        raise ValueError(
            f"the {train.name} split has {len(train)} clips, too few for a step of "
            f"accumulate={config.accumulate} batches of batch_size={config.batch_size}: "
            "lower these, or set drop_incomplete=False"
        )
    if config.batch_size < world_size():
        raise ValueError(
            f"batch_size={config.batch_size}, which the processes share, leaves some of the "
            f"{world_size()} without a clip: raise it, or start fewer"
        )


def flatten(model: nn.Module) -> nn.Parameter:
    """All weights of a model side by side in one parameter, with a gradient of zero.

    The model's own weights and gradients become views of it: what changes one changes the other,
    and an optimiser has one long vector to work on instead of hundreds of small tensors.
    """
    weights = list(model.parameters())
    flat = nn.Parameter(torch.cat([x.detach().flatten() for x in weights]))
    flat.grad = torch.zeros_like(flat)
    sizes = [x.numel() for x in weights]
    parts = zip(weights, flat.data.split(sizes), flat.grad.split(sizes), strict=True)
    for weight, data, grad in parts:
        weight.data, weight.grad = data.view_as(weight), grad.view_as(weight)
    return flat


def bound_gradients(parameters: Iterable[nn.Parameter], config: TrainConfig) -> None:
    """Bound the gradients in place, each or all together, as `config.clip` says."""
    if config.clip == "value":
        nn.utils.clip_grad_value_(parameters, config.clip_at)
    elif config.clip == "norm":
        nn.utils.clip_grad_norm_(parameters, config.clip_at)


def loss_terms(
    model: nn.Module, config: TrainConfig, batch: Batch, share: Share | None = None
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The terms of the loss of a batch, unweighted and weighted, in the configured precision.

    share: as in `dmd.losses.objective`. The terms of a method of `dmd.baselines` are the task loss
    and its own extra losses, which have their weights in them.
    """
    dtype = PRECISIONS[config.precision]
    with torch.autocast(batch.language.device.type, dtype, enabled=dtype != torch.float32):
        output = model(batch)
    assert batch.label is not None  # checked by Dataset
    if not isinstance(output, Output):  # a method of `dmd.baselines`
        terms = {"task": task(output.prediction, batch.label), **output.extra_losses}
        return terms, terms
    found = objective(output, batch.label, config.loss, share)
    return found.unweighted, found.weighted


def update(
    batch: Batch,
    terms: Callable[..., tuple[dict[str, Tensor], dict[str, Tensor]]],
    weights: nn.Parameter,
    optimiser: Optimizer,
    config: TrainConfig,
) -> dict[str, Tensor]:
    """One update of `weights` (see `flatten`) from one batch: the unweighted terms, and `total`.

    terms: `loss_terms` of a model. No result is looked at, so that a GPU can record it all.
    """
    optimiser.zero_grad(set_to_none=False)  # gradients are views
    found = LossTerms(*terms(batch, None))
    found.total.backward()
    bound_gradients([weights], config)
    optimiser.step()
    return {**found.unweighted, "total": found.total}


def make_optimiser(weights: nn.Parameter, config: TrainConfig) -> Optimizer:
    """Adam as `config` says, in one kernel where there is one."""
    return torch.optim.Adam(
        [weights],
        lr=config.learning_rate,
        weight_decay=config.weight_decay,
        fused=weights.device.type in ("cpu", "cuda"),
        capturable=config.capture and weights.device.type == "cuda",
    )


def make_scheduler(optimiser: Optimizer, config: TrainConfig) -> lr_scheduler.LRScheduler:
    """The learning-rate schedule of `config`, to be stepped at the end of each epoch."""
    if config.scheduler == "plateau":
        return lr_scheduler.ReduceLROnPlateau(
            optimiser, mode="max", factor=0.5, patience=5, threshold=0.0
        )
    if config.scheduler == "cosine":
        assert config.epochs is not None  # checked by TrainConfig
        return lr_scheduler.CosineAnnealingLR(optimiser, config.epochs)
    return lr_scheduler.ConstantLR(optimiser, factor=1.0)
