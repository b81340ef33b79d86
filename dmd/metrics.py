"""Regression and classification scores of sentiment predictions, in every convention in use.

Scores lie in [-3, 3]. Reports differ in what to do with neutral clips, so two-class accuracy and
F1 come twice: `has0` counts a score of zero as positive, `non0` leaves out the clips whose true
score is zero. All shares are fractions in [0, 1], not percentages.
"""

import math
from collections.abc import Callable
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from dmd.baselines import Baseline
from dmd.data.dataset import Dataset

T = TypeVar("T")


def _check(prediction: Any, label: Any) -> tuple[Tensor, Tensor]:
    """Both as float64 on the CPU, or ValueError."""
    p, y = (torch.as_tensor(x).detach().cpu().double() for x in (prediction, label))
    if p.dim() != 1 or p.shape != y.shape:
        raise ValueError(
            "prediction and label must have one shape (N,), "
            f"but have {tuple(p.shape)} and {tuple(y.shape)}"
        )
    if len(p) == 0:
        raise ValueError("there are no predictions to score")
    for name, x in (("prediction", p), ("label", y)):
        if not torch.isfinite(x).all():
            clip = int((~torch.isfinite(x)).nonzero()[0])
            raise ValueError(f"the {name} of clip {clip}, {float(x[clip])}, is not a finite number")
    return p, y


def _signs(p: Tensor, y: Tensor, zeros: str) -> tuple[Tensor, Tensor]:
    """Prediction and truth as booleans, true for positive, in one of the two conventions."""
    if zeros == "has0":
        return p >= 0, y >= 0
    kept = y != 0
    return p[kept] > 0, y[kept] > 0


def _correlation(p: Tensor, y: Tensor) -> float:
    """Pearson's correlation, nan where one of the two is constant."""
    if (p == p[0]).all() or (y == y[0]).all():
        return math.nan
    p, y = p - p.mean(), y - y.mean()
    p, y = p / p.abs().max(), y / y.abs().max()  # so that no square underflows
    return float((p @ y / (p.norm() * y.norm())).clamp(-1, 1))


def _accuracy(p: Tensor, y: Tensor) -> float:
    return float((p == y).double().mean())  # nan for no clips


def _f1(p: Tensor, y: Tensor) -> float:
    """F1 of each of the two classes, averaged with the classes' shares in y as weights."""
    if len(y) == 0:
        return math.nan
    total = 0.0
    for positive in (False, True):
        here, there = p == positive, y == positive
        if there.any():
            f1 = 2 * int((here & there).sum()) / int(here.sum() + there.sum())
            total += f1 * int(there.sum()) / len(y)
    return total


def _classes(scores: Tensor, bound: int) -> Tensor:
    return scores.clamp(-bound, bound).round()  # halves go to the even neighbour


def compute(prediction: Any, label: Any) -> dict[str, float]:
    """All scores of N predictions against N true labels, tensors or arrays of shape (N,).

    mae, corr: mean absolute error and Pearson's correlation.
    acc2_has0, f1_has0: two classes, score >= 0 or not, on all clips.
    acc2_non0, f1_non0: two classes, score > 0 or not, on the clips whose label is not zero.
    acc5, acc7: shares of equal classes after clipping both to [-2, 2] or [-3, 3] and rounding,
        halves to the even neighbour.
    F1 is the mean over the two classes, weighted by how often each is the truth. What is not
    defined is nan: the correlation of a constant (so of one clip), the non0 scores where every
    label is zero. Computed in float64. Raises ValueError for no clips, for shapes that differ
    and for values that are not finite.
    """
    p, y = _check(prediction, label)
    has0, non0 = _signs(p, y, "has0"), _signs(p, y, "non0")
    return {
        "mae": float((p - y).abs().mean()),
        "corr": _correlation(p, y),
        "acc2_has0": _accuracy(*has0),
        "f1_has0": _f1(*has0),
        "acc2_non0": _accuracy(*non0),
        "f1_non0": _f1(*non0),
        "acc5": _accuracy(_classes(p, 2), _classes(y, 2)),
        "acc7": _accuracy(_classes(p, 3), _classes(y, 3)),
    }


def legacy_f1(prediction: Any, label: Any, zeros: Literal["has0", "non0"] = "non0") -> float:
    """F1 with prediction and truth swapped, so weighted by how often each class is *predicted*.

    Published code calls its F1 routine that way (MulT and what was built on it). Use it to
    compare with such reports, never to report: a model moves its own weights.
    """
    if zeros not in ("has0", "non0"):
        raise ValueError(f"zeros must be 'has0' or 'non0', not {zeros!r}")
    p, y = _signs(*_check(prediction, label), zeros)
    return _f1(y, p)


def collect(
    read: Callable[[Any], T],
    model: nn.Module,
    split: Dataset,
    batch_size: int = 256,
    device: torch.device | str | None = None,
) -> list[T]:
    """`read(model(batch))` for each batch of a split, in evaluation mode and without gradients.

    The model is left in the mode it came in. device: where the batches go; None: where the
    model's parameters are.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be positive, but is {batch_size}")
    if device is None:
        device = next((p.device for p in model.parameters()), torch.device("cpu"))
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.inference_mode():
            return [read(model(batch.to(device))) for batch in split.batches(batch_size)]
    finally:
        for module, training in modes:
            module.training = training


def evaluate(
    model: nn.Module,
    split: Dataset,
    batch_size: int = 256,
    device: torch.device | str | None = None,
) -> dict[str, float]:
    """The scores (see `compute`) of `model(batch).prediction` on all clips of a split.

    The model runs as in `collect`.
    """
    predictions = collect(lambda x: x.prediction, model, split, batch_size, device)
    return compute(torch.cat(predictions).cpu(), split.label)


def evaluate_with_edges(
    model: nn.Module, split: Dataset
) -> tuple[dict[str, float], dict[str, list[list[float]]]]:
    """The scores of `evaluate`, and in the same pass the mean edges (3, 3) of both graphs.

    An edge goes from its row (teacher) to its column (student). A model without graphs has none.
    """
    if isinstance(model, Baseline):
        return evaluate(model, split), {}
    parts = collect(lambda x: (x.prediction, x.homo.edges, x.hetero.edges), model, split)
    predictions, *graphs = (torch.cat(part) for part in zip(*parts, strict=True))
    means = [edges.float().mean(dim=0).tolist() for edges in graphs]
    edges = dict(zip(("homo", "hetero"), means, strict=True))
    return compute(predictions.cpu(), split.label), edges
