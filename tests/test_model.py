"""DMD as a whole: its output, what padding and other clips may not do, switches, and learning."""

import itertools
from collections import Counter
from dataclasses import fields

import pytest
import torch

from dmd import DMD, MODALITIES, Batch, LossConfig, ModelConfig, objective
from dmd.batch import padding_mask
from dmd.model import last_valid, masked_mean

TINY = ModelConfig.preset("tiny", widths=(5, 4, 4), lengths=(9, 9, 9), dim=6, language_dropout=0.0,
                          output_dropout=0.0)  # fmt: skip
SWITCHES = ("decoupling", "homo_distillation", "crossmodal_attention", "hetero_distillation")
SEQUENCES = ("shallow", "common", "private", "reconstructed", "private_again")
LENGTHS = torch.tensor([[4, 6, 5], [1, 1, 1], [2, 5, 3]])


def build(seed=0, config=TINY, **changes):
    torch.manual_seed(seed)
    return DMD(config.replace(**changes)).double()


def clips(count=3, steps=(4, 6, 5), lengths=LENGTHS, config=TINY, seed=1):
    generator = torch.Generator().manual_seed(seed)
    features = [
        torch.randn(count, t, width, dtype=torch.float64, generator=generator)
        for t, width in zip(steps, config.widths, strict=True)
    ]
    label = torch.linspace(-2.4, 2.6, count, dtype=torch.float64)
    return Batch(*features, lengths=lengths, label=label)


def extended(batch, extra=3, garbage=float("nan")):
    """The same clips, each sequence longer by steps of garbage, and garbage where it was padded."""
    features = []
    for x, mask in zip(batch.features, batch.masks, strict=True):
        x = x.masked_fill(~mask[:, :, None], garbage)
        features.append(torch.cat([x, torch.full((len(x), extra, x.shape[2]), garbage).to(x)], 1))
    return Batch(*features, lengths=batch.lengths, label=batch.label)


def assert_same(found, expected, clip=None):
    """Two outputs agree at every valid step; or clip `clip` of one with the only one of another."""
    one = slice(None) if clip is None else slice(clip, clip + 1)
    torch.testing.assert_close(found.prediction, expected.prediction[one])
    torch.testing.assert_close(found.fused, expected.fused[one])
    for name in ("homo", "hetero"):
        f, e = getattr(found, name), getattr(expected, name)
        torch.testing.assert_close(f.logits, e.logits[:, one])
        torch.testing.assert_close(f.features, e.features[:, one])
        torch.testing.assert_close(f.edges, e.edges[one])
        torch.testing.assert_close(f.distances, e.distances[one])
    for name in SEQUENCES:
        for m in range(3):
            f, e = getattr(found, name)[m], getattr(expected, name)[m][one]
            mask = expected.masks[m][one]
            torch.testing.assert_close(f[found.masks[m]], e[mask])


# The contract


@pytest.mark.parametrize(
    ("count", "steps"),
    [(3, (4, 4, 4)), (3, (2, 9, 5)), (1, (4, 6, 5)), (1, (1, 1, 1)), (2, (1, 9, 1))],
    ids=["aligned", "unaligned", "one clip", "one clip of one step", "single steps"],
)
def test_the_output_has_the_stated_shapes(count, steps):
    dim = TINY.dim
    output = build()(clips(count, steps, lengths=None))
    assert {f.name for f in fields(output)} == {
        "prediction", "homo", "hetero", *SEQUENCES, "masks", "margin_vectors",
        "common_prediction", "parts", "fused"
    }  # fmt: skip
    assert output.prediction.shape == (count,)
    assert output.homo.features.shape == (3, count, dim)
    assert output.hetero.features.shape == (3, count, 2 * dim)
    assert output.fused.shape == (count, 3 * dim + 3 * 2 * dim)
    for graph in (output.homo, output.hetero):
        assert graph.logits.shape == (3, count)
        assert graph.edges.shape == graph.distances.shape == (count, 3, 3)
        torch.testing.assert_close(graph.edges.sum((1, 2)), torch.ones(count).double())
    for name in SEQUENCES:
        for m, modality in enumerate(MODALITIES):
            assert getattr(getattr(output, name), modality).shape == (count, steps[m], dim)
    for value in (output.prediction, output.homo.edges, output.hetero.edges, output.fused):
        assert torch.isfinite(value).all()


def test_the_parts_are_joined_as_figure_2_shows():
    """Decoupling, pooling, both graphs and the fusion, called one after the other by hand."""
    model, batch = build(), clips()
    output = model(batch)
    shallow = [
        encode(x, mask)
        for encode, x, mask in zip(model.shallow, batch.features, batch.masks, strict=True)
    ]
    parts = model.decoupling(shallow)
    for m in range(3):
        torch.testing.assert_close(output.shallow[m], shallow[m])
        for name in SEQUENCES[1:]:
            torch.testing.assert_close(getattr(output, name)[m], getattr(parts, name)[m])
    homo, hetero = [], []
    for m, target in enumerate(MODALITIES):
        others = [n for n in range(3) if n != m]
        joined = torch.cat(
            [
                model.crossmodal[f"{MODALITIES[n]}_to_{target}"](
                    parts.private[m], parts.private[n], batch.masks[n], batch.masks[m]
                )
                for n in others
            ],
            dim=2,
        )
        reinforced = model.memory[target](joined, source_mask=batch.masks[m])
        valid = [slice(0, int(length)) for length in batch.lengths[:, m]]
        homo.append(torch.stack([parts.common[m][b, v].mean(0) for b, v in enumerate(valid)]))
        hetero.append(torch.stack([reinforced[b, v].mean(0) for b, v in enumerate(valid)]))
    torch.testing.assert_close(output.homo.features, torch.stack(homo))
    torch.testing.assert_close(output.hetero.features, torch.stack(hetero))
    torch.testing.assert_close(output.homo.edges, model.homo(torch.stack(homo)).edges)
    torch.testing.assert_close(output.hetero.logits, model.hetero(torch.stack(hetero)).logits)
    prediction, _ = model.fusion([torch.cat(homo, dim=1), *hetero])
    torch.testing.assert_close(output.prediction, prediction)


def test_each_ordered_pair_of_modalities_has_its_encoder():
    pairs = {f"{s}_to_{t}" for s, t in itertools.permutations(MODALITIES, 2)}
    model = build()
    assert set(model.crossmodal) == pairs
    assert set(model.memory) == set(MODALITIES)


def test_attention_dropout_goes_by_the_source():
    model = build(attention_dropout=(0.1, 0.2, 0.3))
    for name, net in [*model.crossmodal.items(), *model.memory.items()]:
        rate = {"language": 0.1, "visual": 0.2, "acoustic": 0.3}[name.split("_to_")[0]]
        expected = rate if "_to_" in name else 0.1
        assert {layer.attention.dropout for layer in net.layers} == {expected}


def test_language_dropout_touches_language_only():
    model, batch = build(language_dropout=0.5), clips()
    first, second = model(batch), model(batch)
    assert not torch.equal(first.shallow.language, second.shallow.language)
    assert torch.equal(first.shallow.visual, second.shallow.visual)
    assert torch.equal(first.shallow.acoustic, second.shallow.acoustic)


# Pooling


def test_pooling_counts_valid_steps_only():
    x = torch.tensor([[[1.0], [2.0], [9.0]], [[4.0], [torch.nan], [torch.nan]]])
    mask = padding_mask(torch.tensor([3, 1]), 3)
    assert masked_mean(x, mask).tolist() == [[4.0], [4.0]]
    assert last_valid(x, mask).tolist() == [[9.0], [4.0]]
    assert last_valid(x, padding_mask(torch.tensor([2, 1]), 3)).tolist() == [[2.0], [4.0]]


@pytest.mark.parametrize("pooling", ["mean", "last"])
def test_the_vectors_of_the_graphs_are_pooled_as_configured(pooling):
    batch = clips()
    output = build(pooling=pooling)(batch)
    for m in range(3):
        for b in range(3):
            steps = output.common[m][b, : int(batch.lengths[b, m])]
            expected = steps.mean(0) if pooling == "mean" else steps[-1]
            torch.testing.assert_close(output.homo.features[m, b], expected)


# What must not matter

VARIATIONS = [{}, {"causal_mask": True}, {"pooling": "last"}, {"kernels": (4, 5, 1)}]


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize("garbage", [float("nan"), float("inf"), 1e30])
@pytest.mark.parametrize("changes", VARIATIONS, ids=str)
def test_padding_changes_nothing(changes, garbage):
    model, batch = build(**changes), clips()
    assert_same(model(extended(batch, garbage=garbage)), model(batch))


def test_padding_changes_no_gradient():
    def gradients(batch):
        model = build()
        objective(model(batch), batch.label, LossConfig()).total.backward()
        return {name: x.grad for name, x in model.named_parameters()}

    expected = gradients(clips())
    for name, gradient in gradients(extended(clips())).items():
        torch.testing.assert_close(gradient, expected[name], msg=name)


@pytest.mark.parametrize("changes", VARIATIONS[:3], ids=str)
def test_a_clip_does_not_depend_on_the_others(changes):
    model, batch = build(**changes), clips()
    together = model(batch)
    for b in range(3):
        assert_same(model(batch[[b]]), together, clip=b)
        trimmed = Batch(
            *(x[b : b + 1, : int(n)] for x, n in zip(batch.features, LENGTHS[b], strict=True))
        )
        assert_same(model(trimmed), together, clip=b)


def test_the_order_of_the_clips_is_the_order_of_the_output():
    model, batch = build(), clips()
    plain, turned = model(batch), model(batch[[2, 0, 1]])
    torch.testing.assert_close(turned.prediction, plain.prediction[[2, 0, 1]])
    torch.testing.assert_close(turned.homo.logits, plain.homo.logits[:, [2, 0, 1]])
    torch.testing.assert_close(turned.hetero.edges, plain.hetero.edges[[2, 0, 1]])


def test_evaluation_is_deterministic_and_training_is_not():
    model, batch = build(output_dropout=0.5, embedding_dropout=0.2).eval(), clips()
    assert torch.equal(model(batch).prediction, model(batch).prediction)
    model.train()
    assert not torch.equal(model(batch).prediction, model(batch).prediction)


# What must matter


def test_exchanging_two_modalities_changes_the_prediction():
    model, batch = build(), clips(lengths=None, steps=(4, 5, 5))
    exchanged = Batch(batch.language, batch.acoustic, batch.visual)
    assert (model(batch).prediction - model(exchanged).prediction).abs().min() > 1e-4


@pytest.mark.parametrize("modality", MODALITIES)
def test_every_valid_step_of_every_modality_matters(modality):
    model, batch = build(), clips()
    x = getattr(batch, modality).requires_grad_()
    model(batch).prediction.sum().backward()
    mask = getattr(batch.masks, modality)
    assert x.grad.any(dim=2)[mask].all()
    assert not x.grad[~mask].any()


@pytest.mark.parametrize("pooling", ["mean", "last"])
def test_the_causal_mask_changes_the_result_unless_there_is_one_step(pooling):
    batch = clips()
    free, causal = (build(causal_mask=c, pooling=pooling)(batch).prediction for c in (False, True))
    equal = torch.isclose(free, causal, rtol=1e-6)
    assert equal.tolist() == [False, True, False]  # clip 1 has a single step of each modality


def test_every_parameter_of_the_paper_preset_is_trained():
    """Save two that cancel in a softmax: the bias of g, and the bias of the attention keys."""
    torch.manual_seed(0)
    config = ModelConfig.preset("paper", lengths=(5, 7, 6))
    model = DMD(config).double()
    # an odd number: the signs of mean absolute errors can't cancel
    batch = clips(5, (5, 7, 6), lengths=None, config=config)
    objective(model(batch), batch.label, LossConfig()).total.backward()
    largest = max(float(x.grad.abs().max()) for x in model.parameters())
    for name, x in model.named_parameters():
        gradient = x.grad
        if name.endswith("key_value.bias"):
            keys, gradient = gradient.chunk(2)
            assert keys.abs().max() < 1e-10 * largest, name
        if name.endswith("edge.bias"):
            assert gradient.abs().max() < 1e-10 * largest, name
        else:
            assert gradient.any(), name


def test_gradcheck():
    model = build(stop_teacher_gradient=False, decoupling=True)
    batch = clips(2, (2, 2, 1), lengths=torch.tensor([[2, 1, 1], [1, 2, 1]]))

    def total(*features):
        return objective(model(Batch(*features, lengths=batch.lengths)), batch.label[:2],
                         LossConfig()).total  # fmt: skip

    assert torch.autograd.gradcheck(total, [x.clone().requires_grad_() for x in batch.features])


# Switches


def parameter_groups(model):
    """The first words of the parameters' names, as far as a switch can tell them apart."""
    names = (name.split(".") for name, _ in model.named_parameters())
    return Counter(".".join(n[:2]) if n[0] in ("homo", "hetero") else n[0] for n in names)


GONE = {
    "decoupling": {"decoupling"},
    "homo_distillation": {"homo.edge"},
    "crossmodal_attention": {"crossmodal", "memory"},
    "hetero_distillation": {"hetero.edge"},
}


@pytest.mark.parametrize("values", [*itertools.product([True, False], repeat=4)], ids=str)
def test_every_combination_of_switches_loses_its_parameters_and_trains(values):
    switches = dict(zip(SWITCHES, values, strict=True))
    model, batch = build(**switches), clips()
    gone = set().union(*(GONE[name] for name, on in switches.items() if not on))
    full = parameter_groups(build())
    assert parameter_groups(model) == Counter({k: n for k, n in full.items() if k not in gone})
    output = model(batch)
    objective(output, batch.label, LossConfig()).total.backward()
    assert all(torch.isfinite(x.grad).all() for x in model.parameters())
    assert bool(output.homo.edges.any()) == switches["homo_distillation"]
    assert bool(output.hetero.edges.any()) == switches["hetero_distillation"]
    assert (output.reconstructed is None) == (not switches["decoupling"])
    width = TINY.dim * (2 if switches["crossmodal_attention"] else 1)
    assert output.hetero.features.shape == (3, 3, width)


def test_a_switch_leaves_the_other_parameters_their_shapes():
    """Apart from the parts that become narrower without crossmodal attention."""
    full = build().state_dict()
    for name in ("decoupling", "homo_distillation", "hetero_distillation"):
        for key, value in build(**{name: False}).state_dict().items():
            assert value.shape == full[key].shape


def test_without_decoupling_the_shallow_features_stand_for_both_parts():
    output = build(decoupling=False)(clips())
    for m in range(3):
        assert torch.equal(output.common[m], output.shallow[m])
        assert torch.equal(output.private[m], output.shallow[m])
    assert output.private_again is None


def test_without_crossmodal_attention_the_private_features_are_pooled():
    output = build(crossmodal_attention=False)(clips())
    for m in range(3):
        expected = masked_mean(output.private[m], output.masks[m])
        torch.testing.assert_close(output.hetero.features[m], expected)


@pytest.mark.parametrize("stop", [True, False])
@pytest.mark.parametrize("name", ["homo", "hetero"])
def test_both_units_are_built_as_configured(name, stop):
    unit = getattr(build(stop_teacher_gradient=stop, edge_temperature=0.3), name)
    assert unit.stop_teacher_gradient is stop
    assert unit.edge_temperature == 0.3


# Bad input


def refused(model, batch):
    with pytest.raises(ValueError) as caught:
        model(batch)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(("m", "modality"), [*enumerate(MODALITIES)])
def test_clips_that_the_model_was_not_built_for_are_refused(m, modality):
    model, features = build(), list(clips(lengths=None).features)
    wide, long = features.copy(), features.copy()
    wide[m] = torch.zeros(3, 4, TINY.widths[m] + 1)
    long[m] = torch.zeros(3, TINY.lengths[m] + 1, TINY.widths[m])
    width = TINY.widths[m]
    assert refused(model, Batch(*wide)) == (
        f"the {modality} features are {width + 1} wide, but the model was built for {width}"
    )
    assert refused(model, Batch(*long)) == (
        f"the {modality} sequences have 10 steps, but the model was built for at most 9"
    )


def test_the_longest_clips_are_accepted():
    assert build()(clips(3, TINY.lengths, lengths=None)).prediction.shape == (3,)


# Learning, and weights that travel


def test_it_learns_sixteen_clips_by_heart():
    torch.manual_seed(0)
    model = DMD(TINY.replace(dim=8))
    data = clips(16, (4, 6, 5), lengths=None, config=TINY)
    data = Batch(*(x.float() for x in data.features), label=data.label.float())
    optimiser = torch.optim.Adam(model.parameters(), lr=5e-3)
    errors = []
    for _ in range(80):
        optimiser.zero_grad()
        terms = objective(model(data), data.label, LossConfig())
        terms.total.backward()
        optimiser.step()
        errors.append(terms.unweighted["task"].item())
    assert min(errors[-5:]) < 0.1 * errors[0]


def test_the_state_dict_carries_the_model():
    first, second, batch = build(seed=0), build(seed=1), clips()
    assert not torch.allclose(first(batch).prediction, second(batch).prediction)
    second.load_state_dict(first.state_dict())
    assert torch.equal(first(batch).prediction, second(batch).prediction)


def test_a_seed_gives_the_model():
    pairs = zip(build(seed=3).parameters(), build(seed=3).parameters(), strict=True)
    assert all(torch.equal(x, y) for x, y in pairs)


def test_single_and_double_precision_agree():
    batch = clips()
    single = Batch(*(x.float() for x in batch.features), lengths=batch.lengths)
    found = build().float()(single).prediction
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), build()(batch).prediction, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_terms_of_a_mixed_precision_pass_have_single_precision(dtype):
    batch = clips()
    single = Batch(*(x.float() for x in batch.features), lengths=batch.lengths)
    with torch.autocast("cpu", dtype):
        output = build().float()(single)
    terms = objective(output, batch.label.float(), LossConfig())
    assert {x.dtype for x in terms.unweighted.values()} == {torch.float32}
    exact = objective(build()(batch), batch.label, LossConfig()).total.float()
    torch.testing.assert_close(terms.total, exact, rtol=0.02, atol=0)


def test_features_of_another_precision_are_refused_in_one_sentence():
    with pytest.raises(ValueError, match=r"float64.*weights are torch\.float32"):
        build().float()(clips())
