"""The losses against loops written from the paper's equations, and the objective by hand."""

import itertools
import math
from dataclasses import replace

import pytest
import torch

from dmd import DMD, Batch, LossConfig, ModelConfig, losses, objective
from dmd.batch import padding_mask

ALPHAS = (0.15, 1.0)
VARIANTS = {"signed": lambda c: c, "hinge": lambda c: max(0.0, c), "squared": lambda c: c * c}


def randn(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=torch.float64, generator=generator)


def sequences(seed=0, lengths=((3, 2), (5, 1), (1, 4)), dim=3):
    """Two random families of features of three modalities, T = 3, 5, 4, and their masks."""
    masks, xs, ys = [], [], []
    for m, valid in enumerate(lengths):
        steps = max(valid)
        masks.append(padding_mask(torch.tensor(valid), steps))
        xs.append(randn(2, steps, dim, seed=10 * seed + m))
        ys.append(randn(2, steps, dim, seed=10 * seed + m + 5))
    return xs, ys, masks


def steps_of(x, y, mask):
    """The valid steps of two families, as pairs of lists of numbers."""
    for b, t in itertools.product(range(x.shape[0]), range(x.shape[1])):
        if mask[b, t]:
            yield x[b, t].tolist(), y[b, t].tolist()


def loop_cosine(x, y):
    """Cosine of two lists of numbers; zero where one of them is the zero vector."""
    lengths = math.hypot(*x) * math.hypot(*y)
    return sum(a * b for a, b in zip(x, y, strict=True)) / lengths if lengths > 0 else 0.0


def value_and_gradients(loss, *inputs):
    """A loss at copies of the tensors, and its gradient with respect to each."""
    inputs = [x.detach().clone().requires_grad_() for x in inputs]
    value = loss(*inputs)
    return value.detach(), torch.autograd.grad(value, inputs)


# Eqs. (2) and (3)


@pytest.mark.parametrize("loss", [losses.reconstruction, losses.cycle])
def test_squared_errors_equal_a_loop(loss):
    xs, ys, masks = sequences()
    expected = 0.0
    for x, y, mask in zip(xs, ys, masks, strict=True):
        squares = [(a - b) ** 2 for u, v in steps_of(x, y, mask) for a, b in zip(u, v, strict=True)]
        expected += sum(squares) / len(squares)
    assert float(loss(xs, ys, masks)) == pytest.approx(expected, rel=1e-12)


def test_without_masks_every_step_is_valid():
    xs, ys, masks = sequences()
    full = [torch.ones_like(mask) for mask in masks]
    for loss in (losses.reconstruction, losses.cycle, losses.orthogonality):
        torch.testing.assert_close(loss(xs, ys), loss(xs, ys, full))
        assert not torch.isclose(loss(xs, ys), loss(xs, ys, masks))


# Eq. (4)


def loop_margin(common, classes, alpha):
    """Eq. (4) word by word: the samples are all pairs (clip, modality)."""
    samples = list(itertools.product(range(common.shape[0]), range(common.shape[1])))

    def cos(i, j):
        x, y = common[i], common[j]
        if not x.any() or not y.any():
            return common.new_zeros(())
        return (x * y).sum() / (x.square().sum().sqrt() * y.square().sum().sqrt())

    terms = []
    for i, j, k in itertools.product(samples, repeat=3):
        (ci, mi), (cj, mj), (ck, mk) = ((classes[clip], modality) for clip, modality in (i, j, k))
        if mi != mj and mi == mk and ci == cj and ci != ck:
            hinge = alpha - cos(i, j) + cos(i, k)
            terms.append(hinge if hinge > 0 else 0 * hinge)
    return sum(terms) / len(terms) if terms else 0 * common.sum()


def margin_cases():
    """Random clips: 2-4 modalities, 1-6 clips, 1-4 classes, equal and zero vectors."""
    generator = torch.Generator().manual_seed(3)
    for case in range(40):
        clips, count, dim, kinds = (
            int(torch.randint(low, high, (), generator=generator))
            for low, high in ((1, 7), (2, 5), (1, 5), (1, 5))
        )
        common = randn(clips, count, dim, seed=case)
        classes = torch.randint(-3, -3 + kinds, (clips,), generator=generator)
        if case % 3 == 1:
            common[-1] = common[0]  # two clips with the same vectors: ties of all cosines
        if case % 3 == 2:
            common[0, 0] = 0.0
        yield common, classes, ALPHAS[case % 2]


def test_margin_equals_the_triple_loop_in_value_and_gradient():
    found = []
    for common, classes, alpha in margin_cases():
        got, (gradient,) = value_and_gradients(lambda x: losses.margin(x, classes, alpha), common)  # noqa: B023
        want, (slope,) = value_and_gradients(lambda x: loop_margin(x, classes, alpha), common)  # noqa: B023
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(gradient, slope, rtol=1e-10, atol=1e-12)
        found.append(float(got))
    assert sum(value > 0 for value in found) >= 20  # the cases are not all empty
    assert sum(value == 0 for value in found) > 3


def loop_options(common, classes, alpha, pairs, mean):
    """The margin loss with its options: plain numbers, one anchor after the other."""
    samples = list(itertools.product(range(common.shape[0]), range(common.shape[1])))
    vectors = {sample: common[sample].tolist() for sample in samples}
    anchors = []
    for i in samples:
        terms = []
        for j, k in itertools.product(samples, repeat=2):
            if i == j or classes[i[0]] != classes[j[0]] or classes[i[0]] == classes[k[0]]:
                continue
            if pairs == "triples" and (i[1] == j[1] or i[1] != k[1]):
                continue
            size = float(alpha[i[0], k[0]]) if isinstance(alpha, torch.Tensor) else alpha
            near, far = (loop_cosine(vectors[i], vectors[other]) for other in (j, k))
            terms.append(max(0.0, size - near + far))
        if terms:
            anchors.append(terms)
    if not anchors:
        return 0.0
    if mean == "triples":
        return sum(map(sum, anchors)) / sum(map(len, anchors))
    return sum(sum(terms) / len(terms) for terms in anchors) / len(anchors)


@pytest.mark.parametrize("mean", ["triples", "anchors"])
@pytest.mark.parametrize("pairs", ["triples", "all"])
@pytest.mark.parametrize("size", ["constant", "labels"])
def test_margin_with_options_equals_a_loop(pairs, mean, size):
    found = []
    for common, classes, alpha in margin_cases():
        labels = classes / 5  # real numbers, equal or not
        if size == "labels":
            alpha = alpha * (labels[:, None] - labels).abs()
        value = losses.margin(common, labels, alpha, pairs, mean)
        expected = loop_options(common, labels, alpha, pairs, mean)
        assert float(value) == pytest.approx(expected, rel=1e-10, abs=1e-12)
        found.append(expected)
    assert sum(value > 0 for value in found) >= 20
    assert sum(value == 0 for value in found) > 3


def test_the_margin_goes_by_the_anchor_in_rows_and_by_the_negative_in_columns():
    """Where the matrix is not symmetric, as no difference of labels is."""
    common, labels, alpha = randn(5, 3, 4), torch.tensor([0.2, 0.2, -1, 0.4, -1]), randn(5, 5).abs()
    for pairs in ("triples", "all"):
        value = losses.margin(common, labels, alpha, pairs, "anchors")
        expected = loop_options(common, labels, alpha, pairs, "anchors")
        assert float(value) == pytest.approx(expected, rel=1e-10)
        turned = losses.margin(common, labels, alpha.T, pairs, "anchors")
        assert float(turned) != pytest.approx(expected, rel=1e-3)


def test_real_labels_are_of_one_class_only_if_they_are_exactly_equal():
    common = randn(3, 3, 4)
    near, equal = torch.tensor([0.6, 0.8, 2.0]), torch.tensor([0.6, 0.6, 2.0])
    by_class = losses.margin(common, losses.sentiment_class(near), 0.5, "all")
    assert torch.equal(by_class, losses.margin(common, losses.sentiment_class(equal), 0.5, "all"))
    assert not torch.isclose(
        losses.margin(common, near, 0.5, "all"), losses.margin(common, equal, 0.5, "all")
    )


def test_a_mean_over_anchors_gives_each_the_same_weight():
    """By hand, one modality: two clips of one class, three of another, all in two directions."""
    east, north = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
    common = torch.stack([east, east, north, north, north])[:, None]  # (B, 1, d)
    classes = torch.tensor([0, 1, 0, 1, 1])
    # alpha - cos(i, j) + cos(i, k) with alpha 1. Clip 0: one positive, at 0, three negatives at
    # 1, 0, 0: (2 + 1 + 1) / 3. Clip 1: two at 0; two at 1, 0: 1.5. Clip 2: one at 0; three at 0, 1,
    # 1: (1 + 2 + 2) / 3. Clips 3 and 4: at 0 and 1; at 0, 1: (1 + 2 + 0 + 1) / 4.
    anchors = [(4, 3), (6, 4), (5, 3), (4, 4), (4, 4)]
    by_anchor, by_triple = (
        float(losses.margin(common, classes, 1.0, "all", mean)) for mean in ("anchors", "triples")
    )
    assert by_anchor == pytest.approx(sum(total / n for total, n in anchors) / 5)
    assert by_triple == pytest.approx(sum(t for t, _ in anchors) / sum(n for _, n in anchors))


def test_an_anchor_without_a_positive_is_left_out_of_the_mean():
    """With one modality the last clip, the only one of its class, has none."""
    common, classes = randn(6, 1, 3), torch.tensor([0, 0, 0, 1, 1, 2])
    value = losses.margin(common, classes, 0.5, "all", "anchors")
    expected = loop_options(common, classes, 0.5, "all", "anchors")
    assert float(value) == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("mean", ["triples", "anchors"])
@pytest.mark.parametrize("pairs", ["triples", "all"])
@pytest.mark.parametrize(
    ("shape", "classes"),
    [((4, 3, 2), [1, 1, 1, 1]), ((1, 3, 2), [0]), ((4, 1, 2), [0, 1, 0, 2])],
    ids=["all labels equal", "one clip", "one modality"],
)
def test_without_triples_the_margin_loss_and_its_gradient_are_zero(shape, classes, pairs, mean):
    common, classes = randn(*shape), torch.tensor(classes)
    if pairs == "all" and shape[1] == 1:  # here one modality is enough
        classes = torch.tensor([0, 1, 2, 3])
    value, (gradient,) = value_and_gradients(
        lambda x: losses.margin(x, classes, 0.5, pairs, mean), common
    )
    assert float(value) == 0.0
    assert torch.equal(gradient, torch.zeros_like(gradient))


def test_the_margin_loss_shows_nan():
    """What counts for no triple stands at an infinity; that may not hide a NaN that counts."""
    common = randn(3, 3, 4)
    common[0, 0, 0] = math.nan
    for pairs in ("triples", "all"):
        assert losses.margin(common, torch.tensor([0, 0, 1]), 0.5, pairs).isnan()


def test_with_all_labels_different_the_positive_is_the_same_clip_elsewhere():
    east, north = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
    classes = torch.tensor([-1, 1])
    agree = torch.stack([torch.stack([east, east]), torch.stack([north, north])])  # (B, M, d)
    assert float(losses.margin(agree, classes, 0.25)) == 0.0  # positives at 1, negatives at 0
    assert float(losses.margin(agree, classes, 1.5)) == 0.5
    by_modality = agree.transpose(0, 1)  # positives at 0, negatives at 1
    assert float(losses.margin(by_modality, classes, 0.25)) == 1.25


def test_zero_vectors_are_defined():
    classes = torch.tensor([0, 0, 1])
    value, (gradient,) = value_and_gradients(
        lambda x: losses.margin(x, classes, 0.25), torch.zeros(3, 3, 4)
    )
    assert float(value) == 0.25
    assert torch.equal(gradient, torch.zeros(3, 3, 4))
    pair = torch.zeros(4), torch.ones(4)
    for x, y in (pair, pair[::-1], (pair[0], pair[0])):
        value, gradients = value_and_gradients(losses.cosine, x, y)
        assert float(value) == 0.0
        assert all(torch.equal(g, torch.zeros(4)) for g in gradients)


def test_cosine_does_not_depend_on_length_and_shows_nan():
    x, y = randn(5, 4, seed=1).float(), randn(5, 4, seed=2).float()
    for scale in (1e-12, 1e12):
        torch.testing.assert_close(losses.cosine(scale * x, y), losses.cosine(x, y))
    assert losses.cosine(torch.tensor([math.nan, 1.0]), torch.ones(2)).isnan()


@pytest.mark.parametrize(
    ("label", "expected"),
    [(-2.5, -2), (-1.5, -2), (-0.5, 0), (0.5, 0), (1.5, 2), (2.5, 2), (0.6, 1), (3.4, 3), (-9, -3)],
)
def test_sentiment_class_rounds_half_to_even_and_clips(label, expected):
    found = losses.sentiment_class(torch.tensor([label]))
    assert found.dtype == torch.int64
    assert found.tolist() == [expected]


# Eq. (5)


@pytest.mark.parametrize("variant", VARIANTS)
def test_orthogonality_equals_a_loop(variant):
    common, private, masks = sequences()
    expected = 0.0
    for c, p, mask in zip(common, private, masks, strict=True):
        values = [VARIANTS[variant](loop_cosine(u, v)) for u, v in steps_of(c, p, mask)]
        expected += sum(values) / len(values)
    found = losses.orthogonality(common, private, masks, variant)
    assert float(found) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("shape", [(2, 1, 2), (1, 2, 2)], ids=["two clips", "two steps"])
def test_the_cosine_runs_over_the_features(shape):
    """One step with orthogonal, one with equal parts: 0.5, but 0.35 over clips or over time."""
    common = torch.tensor([[1.0, 0.0], [1.0, 0.0]]).view(shape)
    private = torch.tensor([[0.0, 1.0], [1.0, 0.0]]).view(shape)
    assert float(losses.orthogonality([common], [private])) == 0.5


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("variant", VARIANTS)
def test_orthogonality_over_the_batch_equals_a_loop(variant, masked):
    common, private, masks = sequences(lengths=((3, 2), (5, 1), (1, 4)))
    masks[0] = padding_mask(torch.tensor([2, 1]), 3)  # a step that no clip has
    expected = 0.0
    for c, p, mask in zip(common, private, masks, strict=True):
        mask = mask if masked else torch.ones_like(mask)
        values = []
        for t, channel in itertools.product(range(c.shape[1]), range(c.shape[2])):
            if mask[:, t].any():
                x, y = ((f[:, t, channel] * mask[:, t]).tolist() for f in (c, p))
                values.append(VARIANTS[variant](loop_cosine(x, y)))
        expected += sum(values) / len(values)
    found = losses.orthogonality(common, private, masks if masked else None, variant, "batch")
    assert float(found) == pytest.approx(expected, rel=1e-9)


def test_over_the_batch_one_clip_alone_has_cosines_of_one_or_minus_one():
    """Whatever its features are: a batch of one has a single coordinate."""
    common, private = [randn(1, 4, 3)], [randn(1, 4, 3, seed=1)]
    signs = (common[0] * private[0]).sign()
    found = losses.orthogonality(common, private, axis="batch")
    torch.testing.assert_close(found, signs.mean())


def test_over_the_batch_orthogonal_features_are_not_seen():
    """Orthogonal in every step, and yet the cosine over the clips is far from zero."""
    common = [torch.tensor([[[1.0, 0.0, 1.0]], [[1.0, 0.0, 1.0]]])]
    private = [torch.tensor([[[1.0, 5.0, -1.0]], [[1.0, 5.0, -1.0]]])]
    assert float(losses.orthogonality(common, private)) == 0.0
    found = losses.orthogonality(common, private, None, "hinge", "batch")
    assert float(found) == pytest.approx(1 / 3)


def test_the_small_constant_in_the_cosines_over_the_batch_shows_at_small_features():
    """Squared lengths of 1e-12 double with it, so that a cosine of one is one half."""
    x = [torch.full((1, 1, 1), 1e-6, dtype=torch.float64)]
    assert float(losses.orthogonality(x, x, axis="batch")) == pytest.approx(0.5)
    assert float(losses.orthogonality(x, x)) == pytest.approx(1.0)


def test_the_variants_differ_where_they_should():
    x = [torch.tensor([[[1.0, 0.0]]])] * 3
    across = [torch.tensor([[[0.0, 1.0]]])] * 3
    opposite = [-features for features in x]
    values = {
        variant: [float(losses.orthogonality(x, y, None, variant)) for y in (x, across, opposite)]
        for variant in VARIANTS
    }
    assert values == {"signed": [3, 0, -3], "hinge": [3, 0, 0], "squared": [3, 0, 3]}
    assert float(losses.orthogonality(x, opposite)) == -3  # signed is the default


def test_an_unknown_variant_names_the_nearest():
    x = [torch.ones(1, 1, 2)] * 3
    with pytest.raises(ValueError, match="did you mean 'squared'"):
        losses.orthogonality(x, x, None, "sqared")


# Masks, for Eqs. (2), (3) and (5)

BY_MODALITY = (
    {"reconstruction": losses.reconstruction, "cycle": losses.cycle}
    | {
        variant: lambda xs, ys, masks, variant=variant: losses.orthogonality(xs, ys, masks, variant)
        for variant in VARIANTS
    }
    | {"batch": lambda xs, ys, masks: losses.orthogonality(xs, ys, masks, "signed", "batch")}
)


@pytest.mark.parametrize("garbage", [1e30, math.inf, math.nan])
@pytest.mark.parametrize("name", BY_MODALITY)
def test_masked_steps_change_neither_value_nor_gradient(name, garbage):
    xs, ys, masks = sequences()

    def loss(*tensors):
        return BY_MODALITY[name](tensors[:3], tensors[3:], masks)

    spoilt = [x.masked_fill(~m[:, :, None], garbage) for x, m in zip(xs + ys, masks * 2)]  # noqa: B905
    clean_value, clean = value_and_gradients(loss, *xs, *ys)
    value, gradients = value_and_gradients(loss, *spoilt)
    assert torch.equal(value, clean_value)
    assert all(g.any() for g in clean) or name == "hinge"  # which may be flat for a modality
    for gradient, expected, mask in zip(gradients, clean, masks * 2, strict=True):
        assert torch.equal(gradient, expected)
        assert not gradient[~mask].any()


def test_a_modality_without_a_valid_step_counts_nothing():
    xs, ys, masks = sequences()
    masks[1] = torch.zeros_like(masks[1])
    for loss in BY_MODALITY.values():
        others = loss(xs[::2], ys[::2], masks[::2])
        torch.testing.assert_close(loss(xs, ys, masks), others)


# Eq. (9) and the task loss


def test_distillation_equals_a_loop():
    edges, distances = randn(4, 3, 3).abs(), randn(4, 3, 3, seed=1).abs()
    per_clip = [
        sum(float(edges[b, i, j]) * float(distances[b, i, j]) for i in range(3) for j in range(3))
        for b in range(4)
    ]
    found = losses.distillation(edges, distances)
    assert float(found) == pytest.approx(sum(per_clip) / 4, rel=1e-12)


# The prior of the edges, and the second distillation

LANGUAGE, VISUAL, ACOUSTIC = range(3)


@pytest.mark.parametrize("kind", ["uniform", "released"])
@pytest.mark.parametrize("graph", ["homo", "hetero"])
def test_the_prior_is_a_distribution_over_the_edges(graph, kind):
    prior = losses.edge_prior(graph, kind)
    assert prior.dtype == torch.float32
    assert prior.shape == (3, 3)
    assert not prior.diagonal().any()
    assert float(prior.sum()) == pytest.approx(1)
    assert (prior[~torch.eye(3, dtype=torch.bool)] > 0).all()


@pytest.mark.parametrize("graph", ["homo", "hetero"])
def test_the_uniform_prior_is_the_same_for_all_edges(graph):
    prior = losses.edge_prior(graph, "uniform")
    assert prior[~torch.eye(3, dtype=torch.bool)].tolist() == pytest.approx([1 / 6] * 6)


@pytest.mark.parametrize(
    ("graph", "favoured"),
    [
        ("homo", {(LANGUAGE, VISUAL), (LANGUAGE, ACOUSTIC)}),
        ("hetero", {(LANGUAGE, VISUAL), (LANGUAGE, ACOUSTIC), (VISUAL, ACOUSTIC)}),
    ],
)
def test_the_released_prior_favours_the_published_edges(graph, favoured):
    prior = losses.edge_prior(graph, "released")
    total = len(favoured) * math.exp(4) + (6 - len(favoured))
    for i, j in itertools.permutations(range(3), 2):
        expected = (math.exp(4) if (i, j) in favoured else 1) / total
        assert float(prior[i, j]) == pytest.approx(expected, rel=1e-6)


def test_the_edge_regulariser_compares_the_mean_edges_of_a_batch():
    edges, prior = randn(4, 3, 3).abs(), randn(3, 3, seed=1).abs()
    expected = sum(
        (sum(float(edges[b, i, j]) for b in range(4)) / 4 - float(prior[i, j])) ** 2
        for i in range(3)
        for j in range(3)
    )
    found = losses.edge_regulariser(edges, prior)
    assert float(found) == pytest.approx(expected, rel=1e-12)
    # clips may differ from the prior as long as their mean does not
    spread = torch.stack([prior + 1, prior - 1])
    assert float(losses.edge_regulariser(spread, prior)) == pytest.approx(0, abs=1e-30)


def test_representation_equals_a_loop():
    features, edges = randn(3, 4, 5), randn(4, 3, 3, seed=1).abs()
    expected = 0.0
    for i, j in itertools.product(range(3), repeat=2):
        weight = sum(float(edges[b, i, j]) for b in range(4)) / 4
        alike = [
            max(0.0, loop_cosine(features[i, b].tolist(), features[j, b].tolist()))
            for b in range(4)
        ]
        expected += weight * sum(alike) / 4
    found = losses.representation(features, edges)
    assert float(found) == pytest.approx(expected, rel=1e-9)


def test_representation_moves_the_student_and_the_edges_and_not_the_teacher():
    features = randn(3, 4, 5)
    features[VISUAL] = features[LANGUAGE] + 0.1 * features[VISUAL]  # their cosines are positive
    edges = torch.zeros(4, 3, 3).double()
    edges[:, LANGUAGE, VISUAL] = 0.7
    _, (slope, weight) = value_and_gradients(losses.representation, features, edges)
    assert slope[VISUAL].any(dim=1).all()
    assert not slope[LANGUAGE].any()
    assert not slope[ACOUSTIC].any()
    assert weight[:, LANGUAGE, VISUAL].all()
    # a step against the gradient takes the student away from the teacher
    moved = features.clone()
    moved[VISUAL] -= 0.1 * slope[VISUAL]
    before, after = (losses.cosine(x[LANGUAGE], x[VISUAL]) for x in (features, moved))
    assert (after < before).all()


def test_the_task_loss_is_the_mean_absolute_error():
    label = torch.tensor([1.0, -2.0])
    assert float(losses.task(torch.tensor([0.0, 1.0]), label)) == 2.0
    assert float(losses.task(torch.tensor([[0.0, 1.0], [1.0, -2.0]]), label)) == 1.0


@pytest.mark.parametrize("shape", [(4, 1), (1, 4), (1,), ()])
def test_the_task_loss_refuses_labels_that_would_be_broadcast(shape):
    with pytest.raises(ValueError, match="one label a clip"):
        losses.task(torch.zeros(4), torch.zeros(shape))


# All of them


def mean_of_products(x, y):
    return losses.distillation(x.abs(), y.abs())


GRADCHECKED = {
    name: lambda x, y, loss=loss: loss([x, x], [y, 2 * y], [MASK, ~MASK])
    for name, loss in BY_MODALITY.items()
} | {
    "margin": lambda x, y: losses.margin(
        torch.cat([x, y]), torch.tensor([0, 1, 1, 0, 2, 1, 0, 0]), 0.7
    ),
    "margin of all pairs": lambda x, y: losses.margin(
        torch.cat([x, y]), torch.tensor([0, 1, 1, 0, 2, 1, 0, 0]), 0.7, "all", "anchors"
    ),
    "distillation": mean_of_products,
    "edge regulariser": lambda x, y: losses.edge_regulariser(x, y[0]),
    "task": lambda x, y: losses.task(x[:, :, 0], y[0, :, 0]),
}
MASK = torch.tensor([[True, True, False], [True, False, False]] * 2)


@pytest.mark.parametrize("name", GRADCHECKED)
def test_gradcheck(name):
    x, y = (randn(4, 3, 3, seed=seed).requires_grad_() for seed in (4, 5))
    assert torch.autograd.gradcheck(GRADCHECKED[name], (x, y))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", GRADCHECKED)
def test_half_precision_features_are_reduced_in_single_precision(name, dtype):
    x, y = (40 * randn(4, 3, 3, seed=seed).to(dtype) for seed in (4, 5))
    if name == "task":
        y = y.float()  # labels are never of half precision
    found = GRADCHECKED[name](x, y)
    assert found.dtype == torch.float32
    assert torch.equal(found, GRADCHECKED[name](x.float(), y.float()))


# Eqs. (6) and (11)

TINY = ModelConfig.preset("tiny", widths=(5, 4, 3), lengths=(4, 6, 5), dim=4)
LABEL = torch.tensor([0.4, -2.0, 0.2, 1.6, -2.4], dtype=torch.float64)


def forward(config=TINY, seed=0):
    """A model and its output for five clips, in double precision and without dropout."""
    torch.manual_seed(seed)
    model = DMD(config).double().eval()
    features = [
        randn(5, steps, width, seed=m)
        for m, (steps, width) in enumerate(zip(config.lengths, config.widths, strict=True))
    ]
    valid = torch.tensor([[4, 6, 5], [1, 1, 1], [2, 5, 3], [4, 2, 1], [3, 3, 3]])
    return model, model(Batch(*features, lengths=valid))


def gradients(config, loss_config, seed=0):
    """The gradient of the objective with respect to every parameter, by name."""
    model, output = forward(config, seed)
    objective(output, LABEL, loss_config).total.backward()
    return {name: x.grad for name, x in model.named_parameters() if x.grad is not None}


def test_every_term_is_its_equation_on_its_quantities():
    model, output = forward()
    weights = [*model.parameters()]
    found = objective(output, LABEL, LossConfig(alpha=0.3, orthogonality="hinge")).unweighted
    masks = output.masks
    vectors = output.homo.features.permute(1, 0, 2)
    expected = {
        "task": (output.prediction - LABEL).abs().mean(),
        "task_homo": sum((logit - LABEL).abs().mean() for logit in output.homo.logits),
        "task_hetero": sum((logit - LABEL).abs().mean() for logit in output.hetero.logits),
        "reconstruction": losses.reconstruction(output.shallow, output.reconstructed, masks),
        "cycle": losses.cycle(output.private, output.private_again, masks),
        "margin": losses.margin(vectors, torch.tensor([0, -2, 0, 2, -2]), 0.3),
        "orthogonality": losses.orthogonality(output.common, output.private, masks, "hinge"),
        "distil_homo": losses.distillation(output.homo.edges, output.homo.distances),
        "distil_hetero": losses.distillation(output.hetero.edges, output.hetero.distances),
    }
    assert list(found) == list(expected)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, msg=name)
        slopes = (
            torch.autograd.grad(x, weights, retain_graph=True, materialize_grads=True)
            for x in (found[name], value)
        )
        for slope, expected_slope in zip(*slopes, strict=True):
            torch.testing.assert_close(slope, expected_slope, msg=name)
        assert value.item() > 0, name  # no term is compared in a case where it is empty


def test_the_total_adds_up_as_equations_6_and_11_say():
    _, output = forward()
    config = LossConfig(lambda1=0.3, lambda2=0.7, gamma=0.11, unimodal=0.13)
    terms = objective(output, LABEL, config)
    t = {name: float(value.detach()) for name, value in terms.unweighted.items()}
    decoupling = t["reconstruction"] + t["cycle"] + 0.11 * (t["margin"] + t["orthogonality"])
    total = t["task"] + 0.3 * decoupling + 0.7 * (t["distil_homo"] + t["distil_hetero"])
    total += 0.13 * (t["task_homo"] + t["task_hetero"])
    assert float(terms.total.detach()) == pytest.approx(total, rel=1e-12)
    weighted = sum(float(value.detach()) for value in terms.weighted.values())
    assert weighted == pytest.approx(total, rel=1e-12)
    assert list(terms.weighted) == list(terms.unweighted)


def test_the_default_weights_are_those_of_the_paper():
    config = LossConfig()
    assert (config.lambda1, config.lambda2, config.gamma) == (0.1, 0.05, 0.1)


@pytest.mark.parametrize("name", ["reconstruction", "cycle", "margin", "orthogonality"])
def test_a_term_that_is_left_out_is_shown_and_has_no_weight(name):
    _, output = forward()
    full, less = (objective(output, LABEL, LossConfig(leave_out=x)) for x in ("none", name))
    assert {k: v.item() for k, v in full.unweighted.items()} == {
        k: v.item() for k, v in less.unweighted.items()
    }
    other = {k: v.item() for k, v in full.weighted.items()}
    assert {k: v.item() for k, v in less.weighted.items()} == {**other, name: 0.0}
    assert other[name] > 0


def test_gamma_zero_removes_margin_and_orthogonality():
    plain = gradients(TINY, LossConfig(gamma=0.0))
    other = gradients(TINY, LossConfig(gamma=0.0, alpha=0.9, orthogonality="squared"))
    assert all(torch.equal(plain[name], other[name]) for name in plain)
    used = gradients(TINY, LossConfig(gamma=0.1))
    assert not torch.equal(plain["decoupling.common_encoder.weight"],
                           used["decoupling.common_encoder.weight"])  # fmt: skip


def test_lambda1_zero_leaves_the_decoders_without_a_gradient():
    names = [f"decoupling.decoders.{m}.weight" for m in range(3)]
    plain, used = (gradients(TINY, LossConfig(lambda1=x)) for x in (0.0, 0.1))
    assert not any(plain[name].any() for name in names)
    assert all(used[name].any() for name in names)


def test_lambda2_zero_leaves_the_edges_without_a_gradient():
    names = ["homo.edge.weight", "hetero.edge.weight"]
    plain, used = (gradients(TINY, LossConfig(lambda2=x)) for x in (0.0, 0.05))
    assert not any(plain[name].any() for name in names)
    assert all(used[name].any() for name in names)


def test_without_unimodal_losses_only_distillation_trains_the_regressors():
    names = ["homo.regressor.weight", "hetero.regressor.weight"]
    plain = gradients(TINY, LossConfig(unimodal=0.0, lambda2=0.0))
    used = gradients(TINY, LossConfig(unimodal=1.0, lambda2=0.0))
    assert not any(plain[name].any() for name in names)
    assert all(used[name].any() for name in names)


def test_ablations_remove_terms_or_make_them_zero():
    names = {"reconstruction", "cycle", "margin", "orthogonality"}
    _, output = forward()
    everything = set(objective(output, LABEL, LossConfig()).unweighted)
    _, output = forward(replace(TINY, decoupling=False))
    assert everything - set(objective(output, LABEL, LossConfig()).unweighted) == names
    for name in ("homo", "hetero"):
        model, output = forward(replace(TINY, **{f"{name}_distillation": False}))
        terms = objective(output, LABEL, LossConfig())
        assert terms.unweighted[f"distil_{name}"].item() == 0.0
        terms.total.backward()
        assert all(torch.isfinite(x.grad).all() for x in model.parameters())


# The objective with its options

OPTIONS = {
    "lambda1": 0.3, "lambda2": 0.7, "gamma": 0.4, "alpha": 0.6, "unimodal": 0.5,
    "leave_out": "cycle", "orthogonality": "hinge", "orthogonality_axis": "batch",
    "margin_pairs": "all", "margin_class": "exact", "margin_size": "labels",
    "margin_mean": "anchors", "edge_prior": "uniform", "edge_regulariser": 2.0,
    "representation": 3.0,
}  # fmt: skip
RELEASED = replace(ModelConfig.preset("released", heads=2, edge_hidden=(3, 4), layers=1),
                   widths=TINY.widths, lengths=TINY.lengths, kernels=(3, 1, 3))  # fmt: skip


def test_every_option_of_the_losses_is_tried():
    assert set(OPTIONS) == set(LossConfig().to_dict())


@pytest.mark.parametrize("name", OPTIONS)
def test_every_option_of_the_losses_changes_a_gradient(name):
    needs = {"edge_prior": "released"} if name == "edge_regulariser" else {}
    before = LossConfig(**needs)
    assert getattr(before, name) != OPTIONS[name]
    plain, other = (gradients(TINY, c) for c in (before, before.replace(**{name: OPTIONS[name]})))
    assert plain.keys() == other.keys()
    assert any(not torch.equal(plain[key], other[key]) for key in plain)


@pytest.mark.parametrize("model", [TINY, RELEASED], ids=["paper", "released"])
def test_the_margin_term_is_as_configured(model):
    _, output = forward(model)
    vectors = output.margin_vectors.transpose(0, 1)
    label = LABEL.clone()
    label[2] = label[0]
    differences = (label[:, None] - label).abs()
    for config, expected in [
        ({"margin_class": "exact"}, losses.margin(vectors, label, 0.15)),
        ({"margin_size": "labels"},
         losses.margin(vectors, losses.sentiment_class(label), 0.15 * differences)),
        ({"margin_size": "labels", "margin_class": "exact", "margin_pairs": "all",
          "margin_mean": "anchors", "alpha": 0.4},
         losses.margin(vectors, label, 0.4 * differences, "all", "anchors")),
    ]:  # fmt: skip
        found = objective(output, label, LossConfig(**config)).unweighted["margin"]
        torch.testing.assert_close(found, expected)
        assert found > 0


@pytest.mark.parametrize("kind", ["uniform", "released"])
def test_a_prior_is_added_to_the_edges_of_every_clip(kind):
    _, output = forward()
    terms = objective(output, LABEL, LossConfig(edge_prior=kind, representation=2.0))
    for name in ("homo", "hetero"):
        graph, prior = getattr(output, name), losses.edge_prior(name, kind)
        expected = losses.distillation(graph.edges + prior, graph.distances)
        torch.testing.assert_close(terms.unweighted[f"distil_{name}"], expected)
    prior = losses.edge_prior("hetero", kind)
    expected = losses.representation(output.hetero.features, output.hetero.edges + prior)
    torch.testing.assert_close(terms.unweighted["representation"], expected)


def test_without_a_prior_the_second_distillation_takes_the_edges_alone():
    _, output = forward()
    terms = objective(output, LABEL, LossConfig(representation=2.0))
    expected = losses.representation(output.hetero.features, output.hetero.edges)
    torch.testing.assert_close(terms.unweighted["representation"], expected)


@pytest.mark.parametrize("config", [TINY, RELEASED], ids=["paper", "released"])
def test_the_released_objective_has_these_terms_and_weights(config):
    _, output = forward(config)
    loss = LossConfig.preset(
        "released", lambda1=0.3, lambda2=0.7, gamma=0.11, unimodal=0.13, edge_regulariser=2.0,
        representation=3.0,
    )  # fmt: skip
    terms = objective(output, LABEL, loss)
    weights = {
        "task": 1.0, "task_homo": 0.13, "task_hetero": 0.13, "task_common": 0.13,
        "reconstruction": 0.3, "cycle": 0.3, "margin": 0.3 * 0.11, "orthogonality": 0.3 * 0.11,
        "distil_homo": 0.7, "distil_hetero": 0.7, "edges_homo": 0.7 * 2, "edges_hetero": 0.7 * 2,
        "representation": 0.7 * 3,
    }  # fmt: skip
    if not config.common_head:
        del weights["task_common"]
    assert terms.unweighted.keys() == terms.weighted.keys() == weights.keys()
    for name, weight in weights.items():
        torch.testing.assert_close(terms.weighted[name], weight * terms.unweighted[name])
    torch.testing.assert_close(terms.total, sum(terms.weighted.values()))
    for name in ("homo", "hetero"):
        edges, prior = getattr(output, name).edges, losses.edge_prior(name, "released").double()
        expected = losses.edge_regulariser(edges, prior)
        torch.testing.assert_close(terms.unweighted[f"edges_{name}"], expected)
        assert expected > 0
    if config.common_head:
        expected = (output.common_prediction - LABEL).abs().mean()
        torch.testing.assert_close(terms.unweighted["task_common"], expected)


def test_the_regulariser_draws_the_edges_to_their_prior():
    edges = torch.randn(5, 6, generator=torch.Generator().manual_seed(0)).requires_grad_()
    prior = losses.edge_prior("hetero", "released")
    between = ~torch.eye(3, dtype=torch.bool)
    optimiser = torch.optim.Adam([edges], lr=0.2)
    for _ in range(100):
        optimiser.zero_grad()
        full = torch.zeros(5, 3, 3).masked_scatter(between, edges.softmax(dim=1))
        losses.edge_regulariser(full, prior).backward()
        optimiser.step()
    torch.testing.assert_close(full.mean(dim=0), prior, atol=0.02, rtol=0)


@pytest.mark.parametrize("config", [TINY, RELEASED], ids=["paper", "released"])
@pytest.mark.parametrize("name", ["homo", "hetero"])
def test_a_unit_that_does_not_distil_has_neither_prior_nor_regulariser(name, config):
    _, output = forward(replace(config, **{f"{name}_distillation": False}))
    terms = objective(output, LABEL, LossConfig.preset("released")).unweighted
    other = "hetero" if name == "homo" else "homo"
    for term in (f"distil_{name}", f"edges_{name}"):
        assert float(terms[term].detach()) == 0.0
    assert (float(terms["representation"].detach()) == 0.0) is (name == "hetero")
    for term in (f"distil_{other}", f"edges_{other}"):
        assert float(terms[term].detach()) > 0


def test_a_regulariser_without_a_prior_is_refused():
    with pytest.raises(ValueError, match="edge_regulariser needs an edge_prior") as caught:
        LossConfig(edge_regulariser=1.0)
    assert "\n" not in str(caught.value)
    LossConfig(edge_regulariser=1.0, edge_prior="uniform")
