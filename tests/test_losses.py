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


@pytest.mark.parametrize(
    ("shape", "classes"),
    [((4, 3, 2), [1, 1, 1, 1]), ((1, 3, 2), [0]), ((4, 1, 2), [0, 1, 0, 2])],
    ids=["all labels equal", "one clip", "one modality"],
)
def test_without_triples_the_margin_loss_and_its_gradient_are_zero(shape, classes):
    common, classes = randn(*shape), torch.tensor(classes)
    value, (gradient,) = value_and_gradients(lambda x: losses.margin(x, classes, 0.5), common)
    assert float(value) == 0.0
    assert torch.equal(gradient, torch.zeros_like(gradient))


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

BY_MODALITY = {"reconstruction": losses.reconstruction, "cycle": losses.cycle} | {
    variant: lambda xs, ys, masks, variant=variant: losses.orthogonality(xs, ys, masks, variant)
    for variant in VARIANTS
}


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
    "distillation": mean_of_products,
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
