"""Crossmodal attention: Eq. 10 head by head, what masks hide, and what positions add."""

import itertools
import math

import pytest
import torch

from dmd.attention import CrossmodalEncoder, MultiheadAttention, sinusoidal_positions
from dmd.batch import padding_mask

DIM, HEADS, CLIPS, QUERIES, KEYS = 6, 2, 2, 3, 5
MASK = padding_mask(torch.tensor([2, 5]), KEYS)


def randn(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=torch.float64, generator=generator)


def attention(seed=0, **options):
    torch.manual_seed(seed)
    return MultiheadAttention(DIM, HEADS, **options).double()


def encoder(layers=2, seed=0, **options):
    torch.manual_seed(seed)
    return CrossmodalEncoder(DIM, HEADS, layers, **options).double()


def pair(queries=QUERIES, keys=KEYS, clips=CLIPS):
    return randn(clips, queries, DIM, seed=1), randn(clips, keys, DIM, seed=2)


def loop(model, target, source, sees):
    """Eq. (10), one clip, head and query at a time; `sees(b, t, k)` says which keys count."""
    head = DIM // model.heads
    joined = torch.zeros_like(target)
    weights = torch.zeros(len(target), model.heads, target.shape[1], source.shape[1]).double()
    (p_key, p_value), (b_key, b_value) = (
        x.chunk(2) for x in (model.key_value.weight, model.key_value.bias)
    )
    for b, h, t in itertools.product(range(len(target)), range(model.heads), range(QUERIES)):
        columns = slice(h * head, (h + 1) * head)
        query = (model.query.weight @ target[b, t] + model.query.bias)[columns]
        keys = [k for k in range(source.shape[1]) if sees(b, t, k)]
        score = [
            float(query @ (p_key @ source[b, k] + b_key)[columns]) / math.sqrt(head) for k in keys
        ]
        total = sum(math.exp(s) for s in score)
        for k, s in zip(keys, score, strict=True):
            weights[b, h, t, k] = math.exp(s) / total
            value = (p_value @ source[b, k] + b_value)[columns]
            joined[b, t, columns] += weights[b, h, t, k] * value
    return joined @ model.output.weight.T + model.output.bias, weights


CASES = {
    "plain": ({}, None, lambda b, t, k: True),
    "masked": ({}, MASK, lambda b, t, k: bool(MASK[b, k])),
    "causal": ({"causal": True}, None, lambda b, t, k: k <= t + KEYS - QUERIES),
}


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_attention_equals_equation_10_head_by_head(case):
    options, mask, sees = CASES[case]
    model, (target, source) = attention(**options), pair()
    output, weights = loop(model, target, source, sees)
    torch.testing.assert_close(model(target, source, mask), output)
    torch.testing.assert_close(model.weights(target, source, mask), weights)


@torch.no_grad()
def test_causal_and_masked_attention_shifts_by_the_lengths_of_the_clip():
    """Not by those of the padding: clip 0 has 3 queries and 2 keys, clip 1 has 2 and 5."""
    model, (target, source) = attention(causal=True), pair()
    queries = padding_mask(torch.tensor([3, 2]), QUERIES)

    def sees(b, t, k):
        return bool(MASK[b, k]) and k <= t + (1, 3)[b]

    output, weights = loop(model, target, source, sees)
    torch.testing.assert_close(model(target, source, MASK, queries), output)
    torch.testing.assert_close(model.weights(target, source, MASK, queries), weights)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("mask", [None, MASK], ids=["full", "masked"])
def test_the_weights_of_a_query_sum_to_one(mask, causal):
    weights = attention(causal=causal).weights(*pair(), mask)
    torch.testing.assert_close(weights.sum(dim=3), torch.ones(CLIPS, HEADS, QUERIES).double())
    assert (weights >= 0).all()


def test_the_mask_gives_padded_keys_a_weight_of_exactly_zero():
    weights = attention().weights(*pair(), MASK)
    hidden = (~MASK)[:, None, None, :].expand_as(weights)
    assert not weights[hidden].any()
    assert weights[~hidden].all()


@pytest.mark.parametrize("build", [attention, encoder])
def test_masked_source_steps_have_no_influence_and_no_gradient(build):
    model, (target, source) = build(), pair()
    other = torch.where(MASK[:, :, None], source, 1e3 * randn(CLIPS, KEYS, DIM, seed=7))
    source.requires_grad_()
    output = model(target, source, MASK)
    assert torch.equal(output, model(target, other, MASK))
    output.square().sum().backward()
    assert not source.grad[~MASK].any()
    assert source.grad[MASK].any()


@pytest.mark.parametrize("build", [attention, encoder])
def test_padding_the_source_changes_nothing(build):
    model, (target, source) = build(), pair()
    padded = torch.cat([source, 50 * randn(CLIPS, 4, DIM, seed=8)], dim=1)
    mask = torch.cat([MASK, torch.zeros(CLIPS, 4, dtype=torch.bool)], dim=1)
    torch.testing.assert_close(model(target, padded, mask), model(target, source, MASK))


@pytest.mark.parametrize("causal", [False, True])
def test_padding_the_target_changes_nothing_at_its_valid_steps(causal):
    model, (target, source) = encoder(causal=causal), pair()
    mask = padding_mask(torch.tensor([1, 3]), QUERIES)
    padded = torch.cat([target, randn(CLIPS, 4, DIM, seed=9)], dim=1)
    longer = padding_mask(torch.tensor([1, 3]), QUERIES + 4)
    expected = model(target, source, MASK, mask)[mask]
    torch.testing.assert_close(model(padded, source, MASK, longer)[longer], expected)


@pytest.mark.parametrize("causal", [False, True])
def test_padding_a_sequence_that_attends_to_itself_changes_nothing(causal):
    model, (_, x) = encoder(causal=causal), pair()
    padded = torch.cat([x, randn(CLIPS, 4, DIM, seed=9)], dim=1)
    longer = torch.cat([MASK, torch.zeros(CLIPS, 4, dtype=torch.bool)], dim=1)
    expected = model(x, source_mask=MASK)[MASK]
    torch.testing.assert_close(model(padded, source_mask=longer)[longer], expected)


def test_a_causal_encoder_does_not_look_ahead():
    for causal in (False, True):
        model, (x, _) = encoder(causal=causal), pair(queries=4)
        before = model(x)
        x[:, 2, 0] += 1.0
        after = model(x)
        changed = (~torch.isclose(before, after)).any(dim=2)
        assert changed.tolist() == [[not causal, not causal, True, True]] * CLIPS


@pytest.mark.parametrize(("queries", "keys"), [(3, 5), (5, 3), (4, 4)])
def test_the_causal_mask_shifts_by_the_difference_of_the_lengths(queries, keys):
    visible = attention(causal=True).visible(*pair(queries, keys))
    shift = abs(queries - keys)
    expected = [[key <= query + shift for key in range(keys)] for query in range(queries)]
    assert visible[0, 0].tolist() == expected


def test_without_masks_every_key_is_visible():
    assert attention().visible(*pair()) is None


# Positions


def test_attention_alone_does_not_see_the_order_of_the_source():
    model, (target, source) = attention(), pair()
    order = torch.tensor([3, 0, 4, 1, 2])
    torch.testing.assert_close(model(target, source[:, order]), model(target, source))
    masked = model(target, source[:, order], MASK[:, order])
    torch.testing.assert_close(masked, model(target, source, MASK))


def test_the_encoder_sees_the_order_of_the_source():
    model, (target, source) = encoder(), pair()
    order = torch.tensor([3, 0, 4, 1, 2])
    assert not torch.allclose(model(target, source[:, order]), model(target, source), atol=1e-3)


def test_positions_by_hand():
    codes = sinusoidal_positions(2, 4)
    expected = [
        [math.sin(t * f) for f in (1, 1e-4)] + [math.cos(t * f) for f in (1, 1e-4)] for t in (1, 2)
    ]
    torch.testing.assert_close(codes, torch.tensor(expected))


@pytest.mark.parametrize("dim", [1, 2, 5, 8])
def test_positions_of_any_width_are_sines_then_cosines(dim):
    steps, half = 7, dim // 2
    codes = sinusoidal_positions(steps, dim)
    assert codes.shape == (steps, dim)
    ratio = 10_000 ** (-1 / max(half - 1, 1))
    for t in range(steps):
        angle = [(t + 1) * ratio**i for i in range(half)]
        expected = [*map(math.sin, angle), *map(math.cos, angle), *[0.0] * (dim % 2)]
        torch.testing.assert_close(codes[t], torch.tensor(expected), atol=1e-5, rtol=0)


def test_the_embedding_scales_the_features_and_adds_the_positions():
    model, (x, _) = encoder(), pair()
    expected = math.sqrt(DIM) * x + sinusoidal_positions(QUERIES, DIM)
    torch.testing.assert_close(model.embed(x), expected)


@pytest.mark.parametrize("always", [True, False])
def test_a_step_whose_first_channel_is_zero_has_a_position_if_so_configured(always):
    model, (_, x) = encoder(position_at_zero=always), pair()
    x[0, 1] = 0.0  # a step of zeros, as padding is
    x[1, 3, 0] = 0.0  # one whose first channel happens to be zero
    x[1, 4, 1:] = 0.0  # and one of which only the first channel is not
    found = model.embed(x) - math.sqrt(DIM) * x
    for b, t in itertools.product(range(CLIPS), range(KEYS)):
        code = sinusoidal_positions(KEYS, DIM)[t].double()
        expected = code if always or (b, t) not in [(0, 1), (1, 3)] else 0 * code
        torch.testing.assert_close(found[b, t], expected)


def test_positions_are_the_default_everywhere():
    assert encoder().embed(torch.zeros(1, 2, DIM).double()).any()


# Values that are embedded on their own


@torch.no_grad()
def test_given_values_take_the_place_of_the_source_in_v_only():
    model, (target, source) = attention(), pair()
    values = randn(CLIPS, KEYS, DIM, seed=3)
    weights = model.weights(target, source, MASK)
    rows, bias = model.key_value.weight[DIM:], model.key_value.bias[DIM:]
    mixed = weights @ model.split(values @ rows.T + bias)
    joined = mixed.transpose(1, 2).flatten(2)
    expected = joined @ model.output.weight.T + model.output.bias
    torch.testing.assert_close(model(target, source, MASK, values=values), expected)
    torch.testing.assert_close(model(target, source, values=source), model(target, source))


def seen_by_the_first_layer(model, target, source):
    """Keys and values as the attention of the first layer gets them, before they are normalised."""
    seen = []
    model.layers[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs))
    model(target, source)
    ((_, keys, _, _, values),) = seen
    return keys, keys if values is None else values


@pytest.mark.parametrize("separate", [True, False])
def test_separate_values_are_the_same_features_under_another_dropout(separate):
    model = encoder(embedding_dropout=0.5, separate_values=separate)
    target, source = pair()
    keys, values = seen_by_the_first_layer(model, target, source)
    whole = encoder().embed(source)
    for found in (keys, values):
        kept = found != 0
        assert 0 < kept.sum() < kept.numel()
        torch.testing.assert_close(found[kept], 2 * whole[kept])
    assert torch.equal(keys != 0, values != 0) is not separate


def test_every_layer_reads_the_separate_values():
    target, source = pair()
    model = encoder(layers=2, embedding_dropout=0.5, separate_values=True)
    seen = []
    for layer in model.layers:
        layer.attention.register_forward_pre_hook(lambda _, inputs: seen.append(inputs))
    model(target, source)
    assert len(seen) == 2
    for _, keys, _, _, values in seen:
        assert not torch.equal(keys, values)


def test_separate_values_change_nothing_in_evaluation_nor_where_nothing_is_dropped():
    target, source = pair()
    plain = encoder()(target, source, MASK)
    without_dropout = encoder(separate_values=True)
    torch.testing.assert_close(without_dropout(target, source, MASK), plain)
    evaluated = encoder(separate_values=True, embedding_dropout=0.5).eval()
    torch.testing.assert_close(evaluated(target, source, MASK), plain)


@pytest.mark.parametrize("separate", [True, False])
def test_masked_source_steps_have_no_influence_on_separate_values(separate):
    target, source = pair()
    model = encoder(embedding_dropout=0.5, separate_values=separate)
    other = torch.where(MASK[:, :, None], source, 1e3 * randn(CLIPS, KEYS, DIM, seed=7))
    found = []
    for x in (source, other):
        torch.manual_seed(5)
        found.append(model(target, x, MASK))
    assert torch.equal(*found)


# The encoder


def test_the_encoder_is_its_layers_written_out():
    """Pre-norm residual layers; the source is embedded once and never updated."""
    model, (target, source) = encoder(), pair()
    x, y = model.embed(target), model.embed(source)
    for layer in model.layers:
        norm = layer.attention_norm
        x = x + layer.attention(norm(x), norm(y), MASK)
        x = x + layer.feedforward(layer.feedforward_norm(x))
    torch.testing.assert_close(model(target, source, MASK), model.norm(x))


def test_self_attention_is_attention_to_itself():
    """In one layer; in a deeper encoder the source of a pair stays as it was embedded."""
    model, (_, x) = encoder(layers=1), pair()
    torch.testing.assert_close(model(x, source_mask=MASK), model(x, x, MASK))
    deep = encoder(layers=2)
    assert not torch.allclose(deep(x, source_mask=MASK), deep(x, x, MASK), atol=1e-3)


@pytest.mark.parametrize(("clips", "queries", "keys"), [(1, 3, 5), (2, 1, 5), (2, 3, 1), (1, 1, 1)])
@pytest.mark.parametrize("causal", [False, True])
def test_one_clip_and_one_step_work(clips, queries, keys, causal):
    target, source = pair(queries, keys, clips)
    output = encoder(causal=causal)(target, source)
    assert output.shape == (clips, queries, DIM)
    assert torch.isfinite(output).all()


def test_clips_do_not_mix():
    model, (target, source) = encoder(), pair()
    whole = model(target, source, MASK)
    for b in range(CLIPS):
        one = slice(b, b + 1)
        torch.testing.assert_close(model(target[one], source[one], MASK[one]), whole[one])


@pytest.mark.parametrize("option", ["embedding_dropout", "attention_dropout"])
def test_dropout_acts_in_training_only(option):
    model, (target, source) = encoder(**{option: 0.5}), pair()
    assert not torch.allclose(model(target, source), model(target, source))
    model.eval()
    torch.testing.assert_close(model(target, source), encoder()(target, source))


def test_every_parameter_gets_a_gradient():
    model, (target, source) = encoder(), pair()
    model(target, source, MASK)[:, :, :2].square().sum().backward()
    assert all(x.grad.any() for x in model.parameters())


def test_gradcheck():
    model = encoder(layers=1)
    target, source = (x.requires_grad_() for x in pair(2, 3))
    mask = padding_mask(torch.tensor([2, 3]), 3)
    assert torch.autograd.gradcheck(lambda x, y: model(x, y, mask), (target, source))
