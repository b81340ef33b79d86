"""The losses, one function an equation (Eqs. 2-6, 9, 11), and the objective that adds them up."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from dmd.config import LossConfig, nearest
from dmd.model import Output

Masks = Sequence[Tensor] | None


def _single(x: Tensor) -> Tensor:
    """At least single precision: sums of half-precision features lose digits or overflow."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _valid(x: Tensor, mask: Tensor | None) -> Tensor:
    """Features (B, T, d), zero where mask (B, T) is false.

    Masking what enters a loss, not what it has computed, keeps NaN out of the gradient too.
    """
    return _single(x) if mask is None else _single(x).masked_fill(~mask[:, :, None], 0.0)


def _mean(values: Tensor, mask: Tensor | None) -> Tensor:
    """Mean of values (B, T, ...) over the valid steps; they have to be zero at the others."""
    if mask is None:
        return values.mean()
    return values.sum() / (mask.sum() * math.prod(values.shape[2:])).clamp_min(1)


def _masks(masks: Masks, like: Sequence[Tensor]) -> Sequence[Tensor | None]:
    return [None] * len(like) if masks is None else masks


def _squared_error(xs: Sequence[Tensor], ys: Sequence[Tensor], masks: Masks) -> Tensor:
    triples = zip(xs, ys, _masks(masks, xs), strict=True)
    return torch.stack(
        [_mean((_valid(x, mask) - _valid(y, mask)).square(), mask) for x, y, mask in triples]
    ).sum()


def normalise(x: Tensor) -> Tensor:
    """Vectors on the last axis, scaled to length one; a zero vector stays zero.

    The gradient at a zero vector is zero too: dividing by a small constant instead would multiply
    it by the inverse of that constant.
    """
    x = _single(x)
    square = x.square().sum(dim=-1, keepdim=True)
    zero = square == 0
    return torch.where(zero, 0.0, x * torch.where(zero, 1.0, square).rsqrt())


def cosine(x: Tensor, y: Tensor) -> Tensor:
    """Cosine of the angle between x and y over the last axis; zero where either vector is zero."""
    return (normalise(x) * normalise(y)).sum(dim=-1)


def reconstruction(
    shallow: Sequence[Tensor], reconstructed: Sequence[Tensor], masks: Masks = None
) -> Tensor:
    """Eq. (2): how far the decoders' features are from the shallow ones.

    shallow, reconstructed: (B, T_m, d) a modality; masks: (B, T_m) a modality, true where valid.
    Squared difference, mean over the valid elements, summed over the modalities.
    """
    return _squared_error(shallow, reconstructed, masks)


def cycle(
    private: Sequence[Tensor], private_again: Sequence[Tensor], masks: Masks = None
) -> Tensor:
    """Eq. (3): how far the private features are from those encoded again after decoding.

    Arguments and reduction as in `reconstruction`.
    """
    return _squared_error(private, private_again, masks)


def sentiment_class(label: Tensor) -> Tensor:
    """Scores (B,) -> the seven classes -3..3 as integers (B,): clipped, rounded half to even."""
    return label.clamp(-3, 3).round().long()


def margin(common: Tensor, classes: Tensor, alpha: float) -> Tensor:
    """Eq. (4): same emotion in another modality must be nearer than another emotion in the same.

    common: (B, M, d), one common vector a clip and modality; classes: (B,) integers.
    Over all triples (i, j, k) with m[i] != m[j], m[i] = m[k], c[i] = c[j], c[i] != c[k], the mean
    of max(0, alpha - cos(i, j) + cos(i, k)). Zero, with a zero gradient, if there is no triple:
    one modality, or labels that are all equal. The clip of i and j may be the same.
    """
    unit = normalise(common.transpose(0, 1))  # (M, B, d)
    cosines = torch.einsum("mid,njd->minj", unit, unit)  # (M, B, M, B)
    same_class = classes[:, None] == classes  # (B, B)
    other_modality = ~torch.eye(len(unit), dtype=torch.bool, device=unit.device)
    first, second = other_modality.nonzero(as_tuple=True)  # all pairs of modalities m != n
    positive = cosines[first, :, second, :]  # (pairs, B_i, B_j)
    negative = cosines[first, :, first, :]  # (pairs, B_i, B_k)
    triple = same_class[:, :, None] & ~same_class[:, None, :]  # (B_i, B_j, B_k)
    hinge = (alpha - positive[:, :, :, None] + negative[:, :, None, :]).clamp_min(0)
    count = triple.sum() * len(first)
    return (hinge * triple).sum() / count.clamp_min(1)


def orthogonality(
    common: Sequence[Tensor],
    private: Sequence[Tensor],
    masks: Masks = None,
    variant: Literal["signed", "hinge", "squared"] = "signed",
) -> Tensor:
    """Eq. (5): the cosine between the common and the private part of each step.

    common, private: (B, T_m, d) a modality; the cosine runs over d. Mean over the valid steps,
    summed over the modalities. `signed` is Eq. 5 as printed, lowest at cosine -1; `hinge`
    counts positive cosines only; `squared` is lowest at orthogonal features.
    """
    shapes = {"signed": lambda c: c, "hinge": lambda c: c.clamp_min(0), "squared": torch.square}
    if variant not in shapes:
        raise ValueError(nearest(variant, shapes, "variant of the orthogonality loss"))
    triples = zip(common, private, _masks(masks, common), strict=True)
    cosines = [(cosine(_valid(c, mask), _valid(p, mask)), mask) for c, p, mask in triples]
    return torch.stack([_mean(shapes[variant](c), mask) for c, mask in cosines]).sum()


def distillation(edges: Tensor, distances: Tensor) -> Tensor:
    """Eq. (9): ||W * E||_1, edges and distances (B, M, M): sum over edges, mean over the batch."""
    return (_single(edges) * _single(distances)).abs().sum(dim=(1, 2)).mean()


def task(prediction: Tensor, label: Tensor) -> Tensor:
    """The task loss of Eq. (11): mean absolute error, prediction (..., B) against label (B,).

    Raises ValueError where the two would be broadcast to each other, clip against every clip.
    """
    if prediction.shape[-1:] != label.shape:
        raise ValueError(
            f"the task loss needs one label a clip, shape {tuple(prediction.shape[-1:])}, "
            f"got {tuple(label.shape)}"
        )
    return (prediction - label).abs().mean()


@dataclass
class LossTerms:
    """The terms of the objective by name, each before and after its weight; all scalars."""

    unweighted: dict[str, Tensor]
    weighted: dict[str, Tensor]

    @property
    def total(self) -> Tensor:
        """The sum of the weighted terms (Eq. 11)."""
        return torch.stack(list(self.weighted.values())).sum()


def objective(output: Output, label: Tensor, config: LossConfig) -> LossTerms:
    """Eqs. (6) and (11): every term of the training loss for one batch with labels (B,).

    Without decoupling its four terms are missing; a unit that does not distil has a zero term.
    """
    terms = {"task": task(output.prediction, label)}
    weights = {"task": 1.0}
    for name, graph in (("homo", output.homo), ("hetero", output.hetero)):
        # three heads: the mean over modalities and clips, times three, is the sum of their losses
        terms[f"task_{name}"] = len(graph.logits) * task(graph.logits, label)
        weights[f"task_{name}"] = config.unimodal
    if output.reconstructed is not None and output.private_again is not None:
        masks = output.masks
        terms["reconstruction"] = reconstruction(output.shallow, output.reconstructed, masks)
        terms["cycle"] = cycle(output.private, output.private_again, masks)
        vectors = output.homo.features.transpose(0, 1)  # (B, 3, d)
        terms["margin"] = margin(vectors, sentiment_class(label), config.alpha)
        terms["orthogonality"] = orthogonality(
            output.common, output.private, masks, config.orthogonality
        )
        for name in ("reconstruction", "cycle"):
            weights[name] = config.lambda1
        for name in ("margin", "orthogonality"):
            weights[name] = config.lambda1 * config.gamma
    for name, graph in (("homo", output.homo), ("hetero", output.hetero)):
        terms[f"distil_{name}"] = distillation(graph.edges, graph.distances)
        weights[f"distil_{name}"] = config.lambda2
    return LossTerms(terms, {name: weights[name] * term for name, term in terms.items()})
