"""DMD as a whole: its output, what padding and other clips may not do, switches, and learning."""

import itertools
from collections import Counter
from dataclasses import fields

import pytest
import torch

from dmd import DMD, MODALITIES, Batch, LossConfig, ModelConfig, objective
from dmd.attention import CrossmodalEncoder
from dmd.batch import padding_mask
from dmd.model import PAIRS, last_valid, masked_mean, side_by_side

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


def member(encoders, n, target, source=None, source_mask=None, target_mask=None):
    """What the n-th of the encoders that run side by side answers, called on its own."""
    given = (None if x is None else x[None] for x in (target, source, source_mask, target_mask))
    return encoders(*given, members=slice(n, n + 1))[0]


def shares(name, gradient):
    """The gradient of a parameter; of encoders side by side, that of each."""
    several = name.split(".")[0] in ("crossmodal", "memory", "common_attention")
    return gradient.unbind() if several else [gradient]


def assert_same(found, expected, clip=None):
    """Two outputs agree at every valid step; or clip `clip` of one with the only one of another."""
    one = slice(None) if clip is None else slice(clip, clip + 1)
    torch.testing.assert_close(found.prediction, expected.prediction[one])
    torch.testing.assert_close(found.fused, expected.fused[one])
    torch.testing.assert_close(found.margin_vectors, expected.margin_vectors[:, one])
    for f, e in zip(found.parts, expected.parts, strict=True):
        torch.testing.assert_close(f, e[one])
    assert (found.common_prediction is None) == (expected.common_prediction is None)
    if expected.common_prediction is not None:
        torch.testing.assert_close(found.common_prediction, expected.common_prediction[one])
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
        "prediction", "homo", "hetero", *SEQUENCES, "masks", "padded",
        "margin_vectors", "common_prediction", "parts", "fused"
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
    for m in range(3):
        others = [n for n in range(3) if n != m]
        joined = torch.cat(
            [
                member(
                    model.crossmodal,
                    PAIRS.index((n, m)),
                    parts.private[m],
                    parts.private[n],
                    batch.masks[n],
                    batch.masks[m],
                )
                for n in others
            ],
            dim=2,
        )
        reinforced = member(model.memory, m, joined, source_mask=batch.masks[m])
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
    assert [*itertools.permutations(range(3), 2)] == PAIRS
    model = build(common_attention=True)
    for encoders, count in ((model.crossmodal, 6), (model.memory, 3), (model.common_attention, 3)):
        assert {len(x) for x in encoders.parameters()} == {count}


def test_attention_dropout_goes_by_the_source():
    model = build(attention_dropout=(0.1, 0.2, 0.3), common_attention=True)
    expected = {
        model.crossmodal: (0.1, 0.1, 0.2, 0.2, 0.3, 0.3),  # L to V, L to A, V to L, ...
        model.memory: (0.1, 0.1, 0.1),
        model.common_attention: (0.1, 0.2, 0.3),
    }
    for encoders, rates in expected.items():
        assert {layer.attention.dropout for layer in encoders.layers} == {rates}


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


@pytest.mark.parametrize("steps", [(4, 6, 5), (5, 5, 5)], ids=["unaligned", "aligned"])
@pytest.mark.parametrize("changes", [*VARIATIONS, "released"], ids=str)
@pytest.mark.filterwarnings("ignore:Using padding='same'")
def test_lengths_that_are_full_are_as_good_as_none(changes, steps):
    """To the last bit, in outputs and gradients."""
    outcomes = []
    for lengths in (None, torch.tensor([steps] * 3)):
        model = build(**changes) if changes != "released" else released()
        batch = clips(3, steps, lengths=None)
        batch = Batch(*batch.features, lengths=lengths, label=batch.label)
        output = model(batch)
        objective(output, batch.label, LossConfig()).total.backward()
        gradients = [x.grad for x in model.parameters() if x.grad is not None]
        outcomes.append([output.prediction, output.fused, output.hetero.features, *gradients])
    for none, full in zip(*outcomes, strict=True):
        assert torch.equal(none, full)


@pytest.mark.parametrize("changes", [*VARIATIONS, "released"], ids=str)
@pytest.mark.filterwarnings("ignore:Using padding='same'")
def test_masks_that_hide_nothing_change_nothing(changes):
    """A batch that is said to be padded, and is not, has masks all the same."""
    model, batch = build(**changes) if changes != "released" else released(), clips(lengths=None)
    masked = Batch(*batch.features, lengths=batch.lengths, label=batch.label, padded=True)
    assert not batch.padded
    assert_same(model(masked), model(batch))
    losses = [objective(model(b), b.label, LossConfig()).total for b in (masked, batch)]
    torch.testing.assert_close(*losses)


def test_the_output_says_whether_a_step_is_padded():
    full, padded = clips(3, (5, 5, 5), lengths=None), clips()
    longest = clips(3, TINY.lengths, lengths=None)
    filled = {"unimodal_heads": "residual"}  # all clips are filled up to the longest
    for changes, batch, expected in (
        ({}, full, False), ({}, padded, True), ({}, longest, False),
        (filled, full, True), (filled, padded, True), (filled, longest, False),
        ({"mask_padding": False}, padded, False), (filled | {"mask_padding": False}, full, False),
    ):  # fmt: skip
        output = build(**changes)(batch)
        assert output.padded is expected
        assert output.padded is not all(mask.all() for mask in output.masks)


# Side by side


def one_after_the_other(encoders, features, targets, sources, masks):
    """What `side_by_side` computes, each encoder called on its own."""
    masks = masks or [None] * 3
    found = []
    for n, target in enumerate(targets):
        if sources is None:
            found.append(member(encoders, n, features[target], None, masks[target]))
        else:
            s = sources[n]
            found.append(
                member(encoders, n, features[target], features[s], masks[s], masks[target])
            )
    return found


STEPS = {"aligned": (5, 5, 5), "unaligned": (5, 3, 4), "two of one length": (5, 3, 5)}


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("pairs", [True, False], ids=["pairs", "each to itself"])
def test_all_at_once_is_one_after_the_other(pairs, masked, steps):
    torch.manual_seed(0)
    sources, targets = zip(*PAIRS, strict=True) if pairs else (None, range(3))
    encoders = CrossmodalEncoder(6, 2, 2, 0.0, [0.0] * len(targets), causal=True).double()
    features = [torch.randn(2, t, 6).double().requires_grad_() for t in STEPS[steps]]
    lengths = torch.tensor([[2, 3, 5], [5, 1, 1]])
    masks = None
    if masked:
        masks = [
            padding_mask(x.clamp_max(t), t) for x, t in zip(lengths.T, STEPS[steps], strict=True)
        ]
    calls, outcomes = [], []
    encoders.register_forward_pre_hook(lambda _, inputs: calls.append(len(inputs[0])))
    for run in (side_by_side, one_after_the_other):
        encoders.zero_grad()
        for x in features:
            x.grad = None
        found = run(encoders, features, targets, sources, masks)
        assert [x.shape for x in found] == [features[t].shape for t in targets]
        sum((n + 1) * x.sin().sum() for n, x in enumerate(found)).backward()
        outcomes.append([*found, *(x.grad for x in [*features, *encoders.parameters()])])
    n = len(targets)
    assert calls == ([n] if steps == "aligned" else [1] * n) + [1] * n
    for at_once, in_turn in zip(*outcomes, strict=True):
        torch.testing.assert_close(at_once, in_turn)


@pytest.mark.parametrize("changes", [{}, {"common_attention": True, "causal_mask": True}], ids=str)
@pytest.mark.parametrize("lengths", [None, LENGTHS.clamp_max(5)], ids=["full", "padded"])
def test_the_model_is_the_same_with_its_encoders_one_after_the_other(lengths, changes, monkeypatch):
    batch, outcomes = clips(3, (5, 5, 5), lengths), []
    for run in (side_by_side, one_after_the_other):
        monkeypatch.setattr("dmd.model.side_by_side", run)
        model = build(**changes)
        output = model(batch)
        objective(output, batch.label, LossConfig()).total.backward()
        outcomes.append((output, [x.grad for x in model.parameters()]))
    assert_same(outcomes[0][0], outcomes[1][0])
    for at_once, in_turn in zip(outcomes[0][1], outcomes[1][1], strict=True):
        torch.testing.assert_close(at_once, in_turn)


def test_aligned_clips_need_three_calls_of_encoders():
    model, calls = build(common_attention=True), []
    for encoders in (model.crossmodal, model.memory, model.common_attention):
        encoders.register_forward_pre_hook(lambda _, inputs: calls.append(len(inputs[0])))
    model(clips(3, (5, 5, 5), lengths=None))
    assert calls == [6, 3, 3]


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
            keys, gradient = gradient.chunk(2, dim=-1)
            assert keys.abs().max() < 1e-10 * largest, name
        if name.endswith("edge.bias"):
            assert gradient.abs().max() < 1e-10 * largest, name
        else:
            assert all(x.any() for x in shares(name, gradient)), name


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


# Options of the released implementation, each alone on top of the paper's model

OPTIONS = {
    "mask_padding": False, "projection_padding": "valid", "skip_equal_projection": True,
    "position_at_zero": False, "separate_values": True, "memory_layers_min": 3,
    "acoustic_first": True, "unimodal_heads": "residual", "edge_hidden": (3, 4),
    "margin_projection": True, "private_projection": True, "common_attention": True,
    "common_head": True, "gates": "replace",
}  # fmt: skip
SIZES = {
    "widths": TINY.widths, "lengths": (9, 8, 7), "layers": 1, "kernels": (3, 1, 5),
    "language_dropout": 0.0, "embedding_dropout": 0.0, "attention_dropout": (0.0, 0.0, 0.0),
    "output_dropout": 0.0,
}  # fmt: skip
RELEASED = ModelConfig.preset("released", heads=2, edge_hidden=(3, 4), **SIZES)
ALONE = [{name: value} for name, value in OPTIONS.items()]


def released(seed=0, **changes):
    return build(seed, RELEASED, **changes)


def with_weights_of(other, **changes):
    """A model of another configuration whose weights have the same names and shapes."""
    model = DMD(other.config.replace(**changes)).double()
    model.load_state_dict(other.state_dict())
    return model


def test_every_difference_of_the_released_preset_is_tried():
    """Those that the tests above try in their own right stand in `VARIATIONS` and elsewhere."""
    paper, published = ModelConfig().to_dict(), ModelConfig.preset("released").to_dict()
    differ = {name for name, value in paper.items() if published[name] != value}
    tried_above = {"widths", "causal_mask", "pooling", "edge_temperature"}
    assert differ - tried_above == set(OPTIONS)
    assert all(getattr(TINY, name) != value for name, value in OPTIONS.items())


@pytest.mark.parametrize("changes", [*ALONE, None], ids=str)
def test_padding_and_other_clips_change_nothing_under_any_option(changes):
    """Neither what stands in padded steps nor how many of them a batch has; nor batch mates."""
    model = released() if changes is None else build(**changes)
    batch = clips()  # unaligned, padded, and clip 1 has a single step of each modality
    plain = model(batch)
    assert torch.isfinite(plain.prediction).all()
    assert_same(model(extended(batch, extra=2)), plain)
    for b in range(3):
        assert_same(model(batch[[b]]), plain, clip=b)
        trimmed = Batch(
            *(x[b : b + 1, : int(n)] for x, n in zip(batch.features, LENGTHS[b], strict=True))
        )
        assert_same(model(trimmed), plain, clip=b)


@pytest.mark.parametrize("changes", [*ALONE, None], ids=str)
def test_padding_changes_no_gradient_under_any_option(changes):
    """Nor does garbage in it reach one."""

    def gradients(batch):
        model = released() if changes is None else build(**changes)
        objective(model(batch), batch.label, LossConfig()).total.backward()
        return {n: x.grad for n, x in model.named_parameters() if x.grad is not None}

    expected, found = gradients(clips()), gradients(extended(clips(), extra=2))
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], msg=name)


def zeros_at_the_end(batch, extra):
    """The same clips, each sequence longer by valid steps of zeros."""
    features = [
        torch.nn.functional.pad(x.masked_fill(~mask[:, :, None], 0), (0, 0, 0, extra))
        for x, mask in zip(batch.features, batch.masks, strict=True)
    ]
    return Batch(*features, lengths=batch.lengths + extra, label=batch.label)


@pytest.mark.parametrize("causal", [False, True])
def test_without_a_mask_padding_is_zeros_that_count(causal):
    """A clip is then the same with or without zeros at its end, but their number matters."""
    model, batch = build(mask_padding=False, causal_mask=causal), clips()
    assert_same(model(zeros_at_the_end(batch, 2)), model(batch))
    longer = with_weights_of(model, lengths=(10, 10, 10))
    assert (longer(batch).prediction - model(batch).prediction).abs().min() > 1e-4

    masked = with_weights_of(model, mask_padding=True)
    assert (masked(batch).prediction - model(batch).prediction).abs().min() > 1e-4
    zeros = masked(zeros_at_the_end(batch, 2))
    assert (zeros.prediction - masked(batch).prediction).abs().min() > 1e-4
    assert_same(with_weights_of(masked, lengths=(10, 10, 10))(batch), masked(batch))


def test_without_a_mask_the_last_step_of_a_short_clip_is_padding():
    output = build(mask_padding=False, pooling="last", kernels=(3, 3, 3))(clips())
    assert all(mask.all() for mask in output.masks)
    assert [mask.shape[1] for mask in output.masks] == [*TINY.lengths]
    assert not output.homo.features.any()  # the common features of a step of zeros are zero
    filled = build(pooling="last")(clips())
    assert filled.homo.features.any(dim=2).all()


@pytest.mark.parametrize("mask", [True, False])
def test_valid_padding_leaves_as_many_steps_as_the_configuration_says(mask):
    kernels, lengths = (3, 1, 5), (9, 8, 7)
    model = build(projection_padding="valid", mask_padding=mask, kernels=kernels, lengths=lengths)
    output = model(clips())
    assert model.config.steps == (7, 8, 3)
    for m in range(3):
        for name in SEQUENCES:
            assert getattr(output, name)[m].shape == (3, model.config.steps[m], TINY.dim)
        valid = [
            max(int(n) - kernels[m] + 1, 1) if mask else model.config.steps[m]
            for n in LENGTHS[:, m]
        ]
        assert torch.equal(
            output.masks[m], padding_mask(torch.tensor(valid), output.masks[m].shape[1])
        )


def test_a_modality_of_the_width_of_the_model_is_skipped_if_so_configured():
    config = TINY.replace(widths=(5, 6, 4), skip_equal_projection=True, projection_padding="valid")
    assert config.steps == (7, 9, 7)
    batch = clips(config=config)
    output = build(config=config)(batch)
    clean = batch.visual.masked_fill(~batch.masks.visual[:, :, None], 0)
    assert torch.equal(output.shallow.visual[:, :6], clean)
    assert [x.shape[1] for x in output.shallow] == [7, 9, 7]


def test_acoustic_first_exchanges_the_halves_of_the_answer_to_language_only():
    seen = []
    for first in (False, True):
        model = build(acoustic_first=first)
        model.memory.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
        model(clips(steps=(5, 5, 5), lengths=None))
    plain, turned = seen
    assert torch.equal(turned[0], torch.cat(plain[0].chunk(2, 2)[::-1], 2))
    assert torch.equal(turned[1:], plain[1:])
    assert not torch.equal(turned[0], plain[0])


def test_memory_layers_min_deepens_the_joining_encoders_only():
    for layers, least, expected in ((1, 3, 3), (2, 1, 2), (2, 2, 2)):
        model = build(layers=layers, memory_layers_min=least, common_attention=True)
        assert len(model.memory.layers) == expected
        assert len(model.crossmodal.layers) == len(model.common_attention.layers) == layers


@pytest.mark.parametrize("name", ["position_at_zero", "separate_values"])
def test_every_encoder_is_built_as_configured(name):
    model = build(common_attention=True, **{name: OPTIONS[name]})
    encoders = [model.crossmodal, model.memory, model.common_attention]
    assert {getattr(encoder, name) for encoder in encoders} == {OPTIONS[name]}


def padded(x, steps):
    return torch.nn.functional.pad(x, (0, 0, 0, steps - x.shape[1]))


def test_residual_heads_read_all_steps_of_the_homogeneous_graph():
    model, batch = build(unimodal_heads="residual", lengths=(9, 8, 7)), clips()
    output = model(batch)
    plain = with_common_parts(model)(batch)
    assert output.homo.features.shape == (3, 3, TINY.dim)
    assert output.hetero.features.shape == (3, 3, 2 * TINY.dim)
    for m in range(3):
        steps = model.config.lengths[m]
        head = model.homo_heads[m]
        first, last = head.residual[0], head.residual[-1]
        x = torch.stack(  # time by time: the channels of step 0, then those of step 1, ...
            [torch.cat([*clip]) for clip in padded(plain.common[m], steps)]
        )
        hidden = (x @ first.weight.T + first.bias).clamp_min(0)
        refined = x + hidden @ last.weight.T + last.bias
        logit = refined @ head.regressor.weight[0] + head.regressor.bias
        torch.testing.assert_close(output.homo.features[m], hidden)
        torch.testing.assert_close(output.homo.logits[m], logit)

        head, x = model.hetero_heads[m], output.parts[m + 1]
        first, last = head.residual[0], head.residual[-1]
        refined = x + (x @ first.weight.T + first.bias).clamp_min(0) @ last.weight.T + last.bias
        logit = refined @ head.regressor.weight[0] + head.regressor.bias
        torch.testing.assert_close(output.hetero.features[m], refined)
        torch.testing.assert_close(output.hetero.logits[m], logit)
    for graph in ("homo", "hetero"):
        unit, found = getattr(model, graph), getattr(output, graph)
        assert unit.regressor is None
        torch.testing.assert_close(found.edges, unit.edge_weights(found.features, found.logits))


def with_common_parts(model):
    """The paper's model with the same shallow encoders and decoupling."""
    plain = build(lengths=model.config.lengths)
    names = ("shallow.", "decoupling.")
    state = {k: x for k, x in model.state_dict().items() if k.startswith(names)}
    plain.load_state_dict(plain.state_dict() | state)
    return plain


def test_the_margin_projection_reads_all_steps_channel_by_channel():
    model, batch = build(margin_projection=True), clips()
    output, plain = model(batch), with_common_parts(model)(batch)
    assert torch.equal(plain.margin_vectors, plain.homo.features)
    torch.testing.assert_close(output.homo.features, plain.homo.features)
    for m in range(3):
        linear = model.margin_projection[m]
        weight = linear.weight.unflatten(1, (TINY.dim, TINY.lengths[m]))  # (d out, d, T)
        x = padded(plain.common[m], TINY.lengths[m])
        expected = torch.einsum("oct,btc->bo", weight, x) + linear.bias
        torch.testing.assert_close(output.margin_vectors[m], expected)


def test_the_margin_loss_compares_the_projected_vectors():
    model, batch = build(margin_projection=True), clips()
    model.zero_grad()
    terms = objective(model(batch), batch.label, LossConfig(lambda2=0.0, unimodal=0.0, gamma=1.0))
    assert terms.unweighted["margin"] > 0
    terms.total.backward()
    assert all(linear.weight.grad.any() for linear in model.margin_projection)


def test_nothing_reads_the_private_projection():
    model, batch = build(private_projection=True), clips()
    plain = build()
    extra = model.state_dict().keys() - plain.state_dict().keys()
    assert {name.split(".")[0] for name in extra} == {"private_projection"}
    plain.load_state_dict({k: x for k, x in model.state_dict().items() if k not in extra})
    assert_same(model(batch), plain(batch))
    for m, linear in enumerate(model.private_projection):
        assert linear.weight.shape == (TINY.dim, TINY.lengths[m] * TINY.dim)
    objective(model(batch), batch.label, LossConfig()).total.backward()
    assert all(x.grad is None for x in model.private_projection.parameters())


@pytest.mark.parametrize("pooling", ["mean", "last"])
def test_common_attention_changes_what_is_fused_and_not_the_graph(pooling):
    model, batch = build(common_attention=True, pooling=pooling), clips()
    output = model(batch)
    pooled = []
    for m in range(3):
        x, mask = output.common[m], output.masks[m]
        attended = member(model.common_attention, m, x, source_mask=mask)
        pooled.append((masked_mean if pooling == "mean" else last_valid)(attended, mask))
        raw = (masked_mean if pooling == "mean" else last_valid)(x, mask)
        torch.testing.assert_close(output.homo.features[m], raw)
    torch.testing.assert_close(output.parts[0], torch.cat(pooled, dim=1))
    torch.testing.assert_close(output.margin_vectors, output.homo.features)
    torch.testing.assert_close(output.prediction, model.fusion(output.parts)[0])


@pytest.mark.parametrize("attention", [False, True])
def test_the_common_head_predicts_from_the_joined_common_part(attention):
    model, batch = build(common_head=True, common_attention=attention), clips()
    output = model(batch)
    x, head = output.parts[0], model.common_head
    assert x.shape == (3, 3 * TINY.dim)
    first, last = head.residual[0], head.residual[-1]
    refined = x + (x @ first.weight.T + first.bias).clamp_min(0) @ last.weight.T + last.bias
    expected = refined @ head.regressor.weight[0] + head.regressor.bias
    torch.testing.assert_close(output.common_prediction, expected)
    assert build()(batch).common_prediction is None


def test_gates_may_replace_what_is_fused():
    model, batch = build(gates="replace"), clips()
    with torch.no_grad():
        model.fusion.residual[-1].weight.zero_()
        model.fusion.residual[-1].bias.zero_()
    output = model(batch)
    expected = [g(x).sigmoid() for g, x in zip(model.fusion.gates, output.parts, strict=True)]
    torch.testing.assert_close(output.fused, torch.cat(expected, dim=1))


def test_both_units_have_the_hidden_channels_of_their_graph():
    model = build(edge_hidden=(3, 4))
    assert [unit.edge.in_features for unit in (model.homo, model.hetero)] == [4 * 3, 4 * 4]
    mixed = build(edge_hidden=(0, 4))
    assert [unit.edge.in_features for unit in (mixed.homo, mixed.hetero)] == [2 * 7, 4 * 4]


# All of them


@pytest.mark.parametrize("values", [*itertools.product([True, False], repeat=4)], ids=str)
def test_every_combination_of_switches_trains_under_the_released_presets(values):
    switches = dict(zip(SWITCHES, values, strict=True))
    model, batch = released(**switches), clips()
    gone = set().union(*(GONE[name] for name, on in switches.items() if not on))
    for graph in ("homo", "hetero"):
        if not switches[f"{graph}_distillation"]:
            gone |= {f"{graph}.edge_logit", f"{graph}.edge_feature"}
    full = parameter_groups(released())
    assert parameter_groups(model) == Counter({k: n for k, n in full.items() if k not in gone})
    output = model(batch)
    terms = objective(output, batch.label, LossConfig.preset("released"))
    terms.total.backward()
    assert torch.isfinite(terms.total)
    assert all(torch.isfinite(x.grad).all() for x in model.parameters() if x.grad is not None)
    assert bool(output.homo.edges.any()) == switches["homo_distillation"]
    assert bool(output.hetero.edges.any()) == switches["hetero_distillation"]
    assert (output.reconstructed is None) == (not switches["decoupling"])


@pytest.mark.parametrize("preset", ["released", "released_mosei"])
def test_every_parameter_of_the_released_presets_is_trained(preset):
    """Save those that nothing reads, and the terms that a softmax cancels: every bias of g, which
    is linear, and that of the attention keys.
    """
    torch.manual_seed(0)
    widths = (8, ModelConfig.preset(preset).dim, 5)  # the visual features skip their convolution
    config = ModelConfig.preset(preset, widths=widths, lengths=(6, 8, 7), layers=2)
    model = DMD(config).double()
    batch = clips(5, (6, 8, 7), lengths=None, config=config)
    batch.label = batch.label.round()  # so that there are clips of one class, and of others
    batch.label[1] = batch.label[0]
    objective(model(batch), batch.label, LossConfig.preset("released")).total.backward()
    largest = max(float(x.grad.abs().max()) for x in model.parameters() if x.grad is not None)
    unread = {n for n, x in model.named_parameters() if x.grad is None}
    assert unread == {"shallow.1.convolution.weight"} | {
        f"private_projection.{m}.{kind}" for m in range(3) for kind in ("weight", "bias")
    }
    for name, x in model.named_parameters():
        gradient = x.grad
        if name.endswith("key_value.bias"):
            keys, gradient = gradient.chunk(2, dim=-1)
            assert keys.abs().max() < 1e-10 * largest, name
        if name.split(".")[-2].startswith("edge") and name.endswith("bias"):
            assert gradient.abs().max() < 1e-10 * largest, name
        elif name not in unread:
            assert all(x.any() for x in shares(name, gradient)), name


def test_the_order_of_the_clips_is_that_of_the_output_under_the_released_preset():
    model, batch = released(), clips()
    plain = model(batch)
    for b, clip in enumerate([2, 0, 1]):
        assert_same(model(batch[[2, 0, 1]][[b]]), plain, clip=clip)
        assert_same(model(batch[[clip]]), model(batch[[2, 0, 1]]), clip=b)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_released_terms_of_a_mixed_precision_pass_have_single_precision(dtype):
    batch = clips()
    single = Batch(*(x.float() for x in batch.features), lengths=batch.lengths)
    with torch.autocast("cpu", dtype):
        output = released().float()(single)
    config = LossConfig.preset("released")
    terms = objective(output, batch.label.float(), config)
    assert {x.dtype for x in terms.unweighted.values()} == {torch.float32}
    exact = objective(released()(batch), batch.label, config).total.float()
    torch.testing.assert_close(terms.total, exact, rtol=0.02, atol=0)


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
