"""The losses, one function an equation (Eqs. 2-6, 9, 11), and the objective that adds them up."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from dmd.batch import MODALITIES
from dmd.config import LossConfig
from dmd.distributed import Share
from dmd.model import Output
from dmd.options import nearest

Masks = Sequence[Tensor] | None


def _single(x: Tensor) -> Tensor:
    """At least single precision: sums of half-precision features lose digits or overflow."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


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
    total = []
    for x, y, mask in zip(xs, ys, _masks(masks, xs), strict=True):
        if mask is None:
            total.append(F.mse_loss(_single(x), _single(y)))
        else:
            total.append(_mean((_valid(x, mask) - _valid(y, mask)).square(), mask))
    return torch.stack(total).sum()


def normalise(x: Tensor, epsilon: float = 0.0) -> Tensor:
    """Vectors on the last axis, scaled to length one; a zero vector stays zero.

    The gradient at a zero vector is zero too: dividing by a small constant instead would multiply
    it by the inverse of that constant. epsilon is added to the square of the length.
    """
    x = _single(x)
    square = x.square().sum(dim=-1, keepdim=True)
    zero = square == 0
    return torch.where(zero, 0.0, x * torch.where(zero, 1.0, square + epsilon).rsqrt())


def cosine(x: Tensor, y: Tensor, epsilon: float = 0.0) -> Tensor:
    """Cosine of the angle between x and y over the last axis; zero where either vector is zero."""
    return (normalise(x, epsilon) * normalise(y, epsilon)).sum(dim=-1)


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


def margin(
    common: Tensor,
    classes: Tensor,
    alpha: float | Tensor,
    pairs: Literal["triples", "all"] = "triples",
    mean: Literal["triples", "anchors"] = "triples",
) -> Tensor:
    """Eq. (4): same emotion in another modality must be nearer than another emotion in the same.

    common: (B, M, d), one common vector a clip and modality; classes: (B,), equal for clips of one
    emotion; alpha: the margin, or one for each pair of anchor and negative clip (B, B).
    Over all triples (i, j, k) with m[i] != m[j], m[i] = m[k], c[i] = c[j], c[i] != c[k], the mean
    of max(0, alpha - cos(i, j) + cos(i, k)). Zero, with a zero gradient, if there is no triple:
    one modality, or labels that are all equal. The clip of i and j may be the same.
    With pairs `all`, m[j] and m[k] are any modality, and only i = j is left out; with mean
    `anchors` the triples of each anchor i are averaged first.
    """
    clips, modalities, _ = common.shape
    unit = normalise(common.flatten(0, 1))  # (N, d), N = B * M vectors
    cosines = unit @ unit.T
    clip = torch.arange(clips, device=unit.device).repeat_interleave(modalities)
    modality = torch.arange(modalities, device=unit.device).repeat(clips)
    same_class = classes[clip][:, None] == classes[clip]  # (N, N)
    same_modality = modality[:, None] == modality
    if pairs == "triples":
        positive, negative = same_class & ~same_modality, ~same_class & same_modality
    else:
        positive = same_class & ~torch.eye(len(unit), dtype=torch.bool, device=unit.device)
        negative = ~same_class
    if isinstance(alpha, Tensor):
        alpha = alpha[clip][:, clip]
    # What is no pair stands at an infinity, where no hinge is above zero: no (N, N, N) mask.
    near = cosines.masked_fill(~positive, math.inf)  # (N_i, N_j)
    far = (alpha + cosines).masked_fill(~negative, -math.inf)  # (N_i, N_k)
    if pairs == "triples":  # one modality a row is above -infinity: M times less to compare
        far = far.unflatten(1, (clips, modalities)).amax(dim=2)  # (N_i, B_k)
    hinge = (far[:, None, :] - near[:, :, None]).relu().sum(dim=(1, 2))
    count = positive.sum(dim=1) * negative.sum(dim=1)  # triples of each anchor, (N_i,)
    if mean == "triples":
        return hinge.sum() / count.sum().clamp_min(1)
    return (hinge / count.clamp_min(1)).sum() / (count > 0).sum().clamp_min(1)


# What PyTorch's cosine embedding loss adds to squared lengths. The cosines of the released code
# have it, and over an axis as short as a batch it shows.
EPSILON = 1e-12


def orthogonality(
    common: Sequence[Tensor],
    private: Sequence[Tensor],
    masks: Masks = None,
    variant: Literal["signed", "hinge", "squared"] = "signed",
    axis: Literal["feature", "batch"] = "feature",
) -> Tensor:
    """Eq. (5): the cosine between the common and the private part of each step.

    common, private: (B, T_m, d) a modality; the cosine runs over d. Mean over the valid steps,
    summed over the modalities. `signed` is Eq. 5 as printed, lowest at cosine -1; `hinge`
    counts positive cosines only; `squared` is lowest at orthogonal features.
    axis: `batch` takes one cosine a step and channel, over the clips of the batch.
    """
    shapes = {"signed": lambda c: c, "hinge": lambda c: c.clamp_min(0), "squared": torch.square}
    if variant not in shapes:
        raise ValueError(nearest(variant, shapes, "variant of the orthogonality loss"))
    total = []
    for c, p, mask in zip(common, private, _masks(masks, common), strict=True):
        c, p = _valid(c, mask), _valid(p, mask)
        if axis == "feature":
            total.append(_mean(shapes[variant](cosine(c, p)), mask))
        else:  # (B, T, d) -> (T, d, B): steps that no clip has do not count
            over_clips = cosine(c.permute(1, 2, 0), p.permute(1, 2, 0), EPSILON)
            steps = None if mask is None else mask.any(dim=0)[None]
            total.append(_mean(shapes[variant](over_clips)[None], steps))
    return torch.stack(total).sum()


def distillation(edges: Tensor, distances: Tensor) -> Tensor:
    """Eq. (9): ||W * E||_1, edges and distances (B, M, M): sum over edges, mean over the batch."""
    return (_single(edges) * _single(distances)).abs().sum(dim=(1, 2)).mean()


FAVOURED = {
    "homo": (("language", "visual"), ("language", "acoustic")),
    "hetero": (("language", "visual"), ("language", "acoustic"), ("visual", "acoustic")),
}


def edge_prior(graph: str, kind: Literal["uniform", "released"]) -> Tensor:
    """The edges (3, 3) that a graph has before it has learned any; they sum to one.

    `uniform` is the same for all edges; `released` is the softmax over the edges with 1 / 0.25 at
    those that the published code favours in the graph `homo` or `hetero` (`FAVOURED`), else 0.
    """
    score = torch.zeros(3, 3, dtype=torch.float64).fill_diagonal_(-torch.inf)
    if kind == "released":
        for teacher, student in FAVOURED[graph]:
            score[MODALITIES.index(teacher), MODALITIES.index(student)] = 1 / 0.25
    return score.flatten().softmax(dim=0).unflatten(0, (3, 3)).float()


def edge_regulariser(edges: Tensor, prior: Tensor) -> Tensor:
    """Squared distance of the mean over a batch of edges (B, M, M) from their prior (M, M)."""
    return (_single(edges).mean(dim=0) - prior).square().sum()


def representation(features: Tensor, edges: Tensor) -> Tensor:
    """The released code's second distillation: edges (B, M, M) times distances of features.

    features: (M, B, d'). The distance of teacher i, whose gradient is stopped, and student j is
    the mean over the batch of max(0, cos): lowest where the student is at a right angle to the
    teacher or beyond. The weight of an edge is its mean over the batch.
    """
    teacher, student = features.detach()[:, None], features[None, :]  # (M, 1, B, d'), (1, M, B, d')
    alike = cosine(teacher, student, EPSILON).clamp_min(0).mean(dim=-1)  # (M, M)
    return (_single(edges).mean(dim=0) * alike).sum()


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


def margin_inputs(
    output: Output, label: Tensor, config: LossConfig
) -> tuple[Tensor, Tensor, float | Tensor]:
    """What Eq. (4) compares, as configured: the first three arguments of `margin`."""
    classes = sentiment_class(label) if config.margin_class == "rounded" else label
    size = (label[:, None] - label).abs() if config.margin_size == "labels" else 1.0
    return output.margin_vectors.transpose(0, 1), classes, config.alpha * size


def _margin(output: Output, label: Tensor, config: LossConfig) -> Tensor:
    """Eq. (4) as configured."""
    return margin(*margin_inputs(output, label, config), config.margin_pairs, config.margin_mean)


@dataclass
class LossTerms:
    """The terms of the objective by name, each before and after its weight; all scalars."""

    unweighted: dict[str, Tensor]
    weighted: dict[str, Tensor]

    @property
    def total(self) -> Tensor:
        """The sum of the weighted terms (Eq. 11)."""
        return torch.stack(list(self.weighted.values())).sum()


def objective(
    output: Output, label: Tensor, config: LossConfig, share: Share | None = None
) -> LossTerms:
    """Eqs. (6) and (11): every term of the training loss for one batch with labels (B,).

    Without decoupling its four terms are missing; a unit that does not distil has a zero term.
    share: the output and the labels are those of one rank's clips, the terms those of the batch
    that the ranks have together, the same on all. Means over clips or valid steps, and what else
    depends on the batch as a whole, are exact; only the margin loss over each `rank` is another.
    """
    own_label = label
    if share is not None:
        output, label = share.join(output, label)
    masks = output.masks if output.padded else None

    def over_steps(loss: Callable[..., Tensor], xs: Any, ys: Any) -> Tensor:
        if share is None:
            return loss(xs, ys, masks)
        return share.mean_over_steps(loss, xs, ys, masks, output.masks)

    terms = {"task": task(output.prediction, label)}
    weights = {"task": 1.0}
    graphs = (("homo", output.homo), ("hetero", output.hetero))
    for name, graph in graphs:
        # three heads: the mean over modalities and clips, times three, is the sum of their losses
        terms[f"task_{name}"] = len(graph.logits) * task(graph.logits, label)
        weights[f"task_{name}"] = config.unimodal
    if output.common_prediction is not None:
        terms["task_common"] = task(output.common_prediction, label)
        weights["task_common"] = config.unimodal
    if output.reconstructed is not None and output.private_again is not None:
        terms["reconstruction"] = over_steps(reconstruction, output.shallow, output.reconstructed)
        terms["cycle"] = over_steps(cycle, output.private, output.private_again)
        if share is not None and share.margin_over == "rank":
            terms["margin"] = share.mean_over_clips(_margin(output, own_label, config))
        else:
            terms["margin"] = _margin(output, label, config)
        axis = config.orthogonality_axis
        angles = partial(orthogonality, variant=config.orthogonality, axis=axis)
        if share is not None and axis == "batch":  # its cosines run over the clips of all ranks
            joined = share.gather([*output.common, *output.private, *output.masks])
            terms["orthogonality"] = angles(joined[:3], joined[3:6], joined[6:])
        else:
            terms["orthogonality"] = over_steps(angles, output.common, output.private)
        weights |= dict.fromkeys(("reconstruction", "cycle"), config.lambda1)
        weights |= dict.fromkeys(("margin", "orthogonality"), config.lambda1 * config.gamma)
        weights[config.leave_out] = 0.0  # `none` is no term
    for name, graph in graphs:
        edges = graph.edges
        if config.edge_prior != "none":
            distils = (edges.detach() > 0).any()  # a unit that does not has no prior either
            prior = edge_prior(name, config.edge_prior).to(edges) * distils
            if config.edge_regulariser:
                terms[f"edges_{name}"] = edge_regulariser(edges, prior)
                weights[f"edges_{name}"] = config.lambda2 * config.edge_regulariser
            edges = edges + prior
        terms[f"distil_{name}"] = distillation(edges, graph.distances)
        weights[f"distil_{name}"] = config.lambda2
        if config.representation and name == "hetero":
            terms["representation"] = representation(graph.features, edges)
            weights["representation"] = config.lambda2 * config.representation
    return LossTerms(terms, {name: weights[name] * term for name, term in terms.items()})
