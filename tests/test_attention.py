"""Crossmodal attention: Eq. 10 head by head, what masks hide, and what positions add."""

import itertools
import math

import pytest
import torch

from dmd.attention import (
    CrossmodalEncoder,
    LayerNorm,
    Linear,
    MultiheadAttention,
    sinusoidal_positions,
    visible_keys,
)
from dmd.batch import padding_mask

DIM, HEADS, CLIPS, QUERIES, KEYS = 6, 2, 2, 3, 5
# Of three encoders; the first is also that of one.
LENGTHS = torch.tensor([[2, 5], [4, 1], [5, 3]])
MASKS = torch.stack([padding_mask(lengths, KEYS) for lengths in LENGTHS])
MASK = MASKS[0]
QUERY_MASKS = torch.stack(
    [padding_mask(x, QUERIES) for x in torch.tensor([[3, 2], [1, 3], [2, 2]])]
)


def randn(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=torch.float64, generator=generator)


def attention(count=1, seed=0, dropout=0.0):
    torch.manual_seed(seed)
    return MultiheadAttention(DIM, HEADS, [dropout] * count).double()


def attending(causal=False):
    """A single attention that takes what an encoder takes: sequences and masks without an axis."""
    model = attention()

    def run(*arguments):
        target, source, *masks = (x[None] for x in arguments)
        return model(target, source, visible_keys(target, source, *masks, causal=causal))[0]

    return run


def encoder(layers=2, seed=0, **options):
    torch.manual_seed(seed)
    return CrossmodalEncoder(DIM, HEADS, layers, **options).double()


def pair(queries=QUERIES, keys=KEYS, clips=CLIPS, count=()):
    """Target and source; `count`: one pair for each of so many encoders."""
    return randn(*count, clips, queries, DIM, seed=1), randn(*count, clips, keys, DIM, seed=2)


def linear(module, n, x):
    """The n-th linear map, of x (..., inputs)."""
    return x @ module.weight[n] + module.bias[n, 0]


def loop(model, n, target, source, sees):
    """Eq. (10) of encoder n, one clip, head and query at a time; `sees(b, t, k)`: which keys count.

    target (B, T_q, dim), source (B, T_k, dim) -> (B, T_q, dim), weights (B, heads, T_q, T_k).
    """
    head = DIM // model.heads
    joined = torch.zeros_like(target)
    weights = torch.zeros(len(target), model.heads, target.shape[1], source.shape[1]).double()
    query = linear(model.query, n, target)
    key, value = linear(model.key_value, n, source).split(DIM, dim=2)
    for b, h, t in itertools.product(range(len(target)), range(model.heads), range(QUERIES)):
        columns = slice(h * head, (h + 1) * head)
        keys = [k for k in range(source.shape[1]) if sees(b, t, k)]
        score = [float(query[b, t, columns] @ key[b, k, columns]) / math.sqrt(head) for k in keys]
        total = sum(math.exp(s) for s in score)
        for k, s in zip(keys, score, strict=True):
            weights[b, h, t, k] = math.exp(s) / total
            joined[b, t, columns] += weights[b, h, t, k] * value[b, k, columns]
    return linear(model.output, n, joined), weights


# Whether there is a causal mask, the masks of source and target, and what these come to: query t
# of clip b sees key k. The shift is by the lengths of the clip and not by those of the padding.
CASES = {
    "plain": (False, None, None, lambda n, b, t, k: True),
    "masked": (False, MASKS, None, lambda n, b, t, k: k < LENGTHS[n, b]),
    "causal": (True, None, None, lambda n, b, t, k: k <= t + KEYS - QUERIES),
    "causal, masked": (
        True, MASKS, QUERY_MASKS,
        lambda n, b, t, k: (
            k < LENGTHS[n, b] and k <= t + abs(int(LENGTHS[n, b]) - int(QUERY_MASKS[n, b].sum()))
        ),
    ),
}  # fmt: skip


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_attention_equals_equation_10_head_by_head(case, count):
    causal, *masks, sees = CASES[case]
    model, (target, source) = attention(count), pair(count=(count,))
    masks = [None if mask is None else mask[:count] for mask in masks]
    visible = visible_keys(target, source, *masks, causal)
    output, weights = model(target, source, visible), model.weights(target, source, visible)
    for n in range(count):
        expected = loop(model, n, target[n], source[n], lambda b, t, k, n=n: sees(n, b, t, k))
        torch.testing.assert_close(output[n], expected[0])
        torch.testing.assert_close(weights[n], expected[1])


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("masks", [None, MASKS], ids=["full", "masked"])
def test_the_weights_of_a_query_sum_to_one(masks, causal):
    pairs = pair(count=(3,))
    weights = attention(3).weights(*pairs, visible_keys(*pairs, masks, causal=causal))
    torch.testing.assert_close(weights.sum(dim=4), torch.ones(3, CLIPS, HEADS, QUERIES).double())
    assert (weights >= 0).all()


def test_the_mask_gives_padded_keys_a_weight_of_exactly_zero():
    pairs = pair(count=(3,))
    weights = attention(3).weights(*pairs, visible_keys(*pairs, MASKS))
    hidden = (~MASKS)[:, :, None, None, :].expand_as(weights)
    assert not weights[hidden].any()
    assert weights[~hidden].all()


@pytest.mark.parametrize("build", [attending, encoder])
def test_masked_source_steps_have_no_influence_and_no_gradient(build):
    model, (target, source) = build(), pair()
    other = torch.where(MASK[:, :, None], source, 1e3 * randn(CLIPS, KEYS, DIM, seed=7))
    source.requires_grad_()
    output = model(target, source, MASK)
    assert torch.equal(output, model(target, other, MASK))
    (output * randn(*output.shape, seed=8)).sum().backward()  # of a norm the squares are constant
    assert not source.grad[~MASK].any()
    assert source.grad[MASK].abs().max() > 1e-3


@pytest.mark.parametrize("build", [attending, encoder])
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
    visible = visible_keys(*pair(queries, keys, count=(1,)), causal=True)
    shift = abs(queries - keys)
    expected = [[key <= query + shift for key in range(keys)] for query in range(queries)]
    assert visible[0, 0, 0].tolist() == expected


def test_without_masks_every_key_is_visible():
    assert visible_keys(*pair(count=(1,))) is None


# Positions


def test_attention_alone_does_not_see_the_order_of_the_source():
    model, (target, source) = attending(), pair()
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


@pytest.mark.parametrize("count", [1, 3])
@torch.no_grad()
def test_given_values_take_the_place_of_the_source_in_v_only(count):
    model, (target, source) = attention(count), pair(count=(count,))
    values = randn(count, CLIPS, KEYS, DIM, seed=3)
    visible = visible_keys(target, source, MASKS[:count])
    weights = model.weights(target, source, visible)
    found = model(target, source, visible, values=values)
    for n in range(count):
        value = linear(model.key_value, n, values[n])[..., DIM:]
        mixed = weights[n] @ value.unflatten(2, (HEADS, -1)).transpose(1, 2)
        expected = linear(model.output, n, mixed.transpose(1, 2).flatten(2))
        torch.testing.assert_close(found[n], expected)
    same = model(target, source, values=source)
    torch.testing.assert_close(same, model(target, source))


def seen_by_the_first_layer(model, target, source):
    """Keys and values as the first layer of a single encoder gets them, not yet normalised."""
    seen = []
    model.layers[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs))
    model(target, source)
    ((_, keys, _, _, values),) = seen
    return keys[0], (keys if values is None else values)[0]


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


@torch.no_grad()
def test_the_encoder_is_its_layers_written_out():
    """Pre-norm residual layers; the source is embedded once and never updated."""
    model, (target, source) = encoder(), pair()

    def norm(module, x):
        centred = x - x.mean(2, keepdim=True)
        deviation = (centred.square().mean(2, keepdim=True) + 1e-5).sqrt()
        return centred / deviation * module.weight[0, 0, 0] + module.bias[0, 0, 0]

    for module in model.modules():
        if isinstance(module, LayerNorm):
            module.weight.uniform_(0.5, 1.5)
            module.bias.uniform_(-0.5, 0.5)
    x, y = model.embed(target), model.embed(source)
    for layer in model.layers:
        queries, keys = norm(layer.attention_norm, x), norm(layer.attention_norm, y)
        x = x + loop(layer.attention, 0, queries, keys, lambda b, t, k: bool(MASK[b, k]))[0]
        hidden = linear(layer.expand, 0, norm(layer.feedforward_norm, x)).clamp_min(0)
        x = x + linear(layer.contract, 0, hidden)
    torch.testing.assert_close(model(target, source, MASK), norm(model.norm, x))


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


# Encoders side by side


def stirred(count, **options):
    """Encoders whose norms differ as well; fresh ones are all alike."""
    model = encoder(attention_dropout=[0.0] * count, **options)
    with torch.no_grad():
        for x in model.parameters():
            x.add_(0.1 * torch.randn_like(x))
    return model


def alone(model, n, **options):
    """An encoder that has the weights of the n-th of `model`."""
    one = encoder(**options)
    one.load_state_dict({key: x[n : n + 1] for key, x in model.state_dict().items()})
    return one


def answers(model, target, source, masks, target_masks=None, **members):
    """Output, and gradients of the sequences and of all weights, of a sum in which all differ."""
    sequences = [x.clone().requires_grad_() for x in (target, source) if x is not None]
    model.zero_grad()
    source = sequences[1] if len(sequences) > 1 else None
    output = model(sequences[0], source, masks, target_masks, **members)
    output.sin().sum().backward()
    return output.detach(), [x.grad for x in (*sequences, *model.parameters())]


SIDE_BY_SIDE = {
    "plain": ({}, False, False),
    "masked": ({}, True, False),
    "causal": ({"causal": True}, False, False),
    "causal, masked": ({"causal": True}, True, False),
    "to itself": ({}, False, True),
    "to itself, masked": ({"causal": True}, True, True),
    "no position at zero": ({"position_at_zero": False}, True, False),
}


@pytest.mark.parametrize("case", SIDE_BY_SIDE)
@pytest.mark.parametrize(("queries", "keys"), [(3, 5), (5, 3), (4, 4)])
def test_encoders_side_by_side_equal_each_alone(case, queries, keys):
    options, masked, itself = SIDE_BY_SIDE[case]
    model = stirred(3, **options)
    target, source = pair(queries, keys, count=(3,))
    source[:, 0, 1] = 0.0
    masks = [None, None]
    if masked:
        lengths = LENGTHS.clamp_max(min(queries, keys))
        masks = [torch.stack([padding_mask(x, t) for x in lengths]) for t in (keys, queries)]
    if itself:
        source, masks = None, [masks[1], None]
    output, gradients = answers(model, target, source, *masks)
    assert output.shape == target.shape
    for n in range(3):
        own, *of_n = (None if x is None else x[n] for x in (source, *masks))
        expected, slopes = answers(alone(model, n, **options), target[n], own, *of_n)
        torch.testing.assert_close(output[n], expected)
        of_sequences = 1 if itself else 2
        slopes[:of_sequences] = [x[None] for x in slopes[:of_sequences]]
        assert len(slopes) == len(gradients)
        for whole, slope in zip(gradients, slopes, strict=True):
            torch.testing.assert_close(whole[n : n + 1], slope)
    assert not torch.allclose(output[0], output[1])


@pytest.mark.parametrize("members", [slice(0, 1), slice(1, 3), slice(2, 3)])
def test_members_run_as_they_do_among_all(members):
    model, (target, source) = stirred(3, causal=True), pair(count=(3,))
    whole, every = answers(model, target, source, MASKS, QUERY_MASKS)
    part, own = answers(
        model, target[members], source[members], MASKS[members], QUERY_MASKS[members],
        members=members,
    )  # fmt: skip
    torch.testing.assert_close(part, whole[members])
    for k, (one, all_) in enumerate(zip(own, every, strict=True)):
        if k < 2:
            torch.testing.assert_close(one, all_[members])
        else:
            expected = torch.zeros_like(all_)
            expected[members] = all_[members]
            torch.testing.assert_close(one, expected)


def test_a_single_encoder_takes_its_arguments_with_or_without_the_axis():
    model, (target, source) = encoder(causal=True), pair(count=(1,))
    found = model(target[0], source[0], MASKS[0], QUERY_MASKS[0])
    assert torch.equal(found, model(target, source, MASKS[:1], QUERY_MASKS[:1])[0])
    itself = model(source[0], source_mask=MASKS[0])
    assert torch.equal(itself, model(source, source_mask=MASKS[:1])[0])


def test_layers_begin_as_those_of_pytorch_do_and_each_differs():
    torch.manual_seed(0)
    maps, norm = Linear(3, 50, 40), LayerNorm(3, 50)
    like = torch.nn.Linear(50, 40)
    bound = 50**-0.5
    for n in range(3):
        assert maps.weight[n].numel() == like.weight.numel()
        assert maps.bias[n].numel() == like.bias.numel()
        for x in (maps.weight[n], maps.bias[n], like.weight, like.bias):
            assert 0.9 * bound < x.abs().max() <= bound
        assert maps.weight[n].mean().abs() < 0.05 * bound
        assert norm.weight[n].eq(1).all() and norm.bias[n].eq(0).all()
    assert not torch.equal(maps.weight[0], maps.weight[1])
    assert norm.weight.numel() == norm.bias.numel() == 3 * 50


# Attention dropout of each encoder


def shown(rates, members=slice(None), clips=200, seed=0):
    """The weights of one head after dropout, (n, clips, 6, 6): uniform but for what is dropped.

    Queries are zero, step k of the source is the k-th unit vector and is its own value.
    """
    torch.manual_seed(seed)
    model = MultiheadAttention(DIM, 1, rates).double()
    unit = torch.eye(DIM).double()
    with torch.no_grad():
        for x in model.parameters():
            x.zero_()
        model.key_value.weight[:, :, DIM:] = unit
        model.output.weight[:] = unit
    source = unit.expand(len(rates[members]), clips, DIM, DIM)
    return model(source, source, members=members)


RATES = (0.25, 0.25, 0.75, 0.0, 0.25)


@pytest.mark.parametrize("members", [slice(None), slice(1, 4), slice(3, 4), slice(2, 3)])
def test_each_encoder_drops_its_own_share_of_weights(members):
    weights = shown(RATES, members) * DIM
    rates = RATES[members]
    assert len(weights) == len(rates)
    for own, rate in zip(weights, rates, strict=True):
        kept = own != 0
        spread = math.sqrt(rate * (1 - rate) / own.numel())
        assert abs(1 - float(kept.double().mean()) - rate) <= 5 * spread
        torch.testing.assert_close(own[kept], torch.full_like(own[kept], 1 / (1 - rate)))


def test_encoders_of_one_rate_draw_apart():
    weights = shown((0.5, 0.5))
    assert not torch.equal(weights[0] != 0, weights[1] != 0)


# Positions are kept


def test_positions_first_asked_for_in_inference_serve_training():
    sinusoidal_positions.cache_clear()
    model, (target, source) = encoder(), pair()
    with torch.inference_mode():
        expected = model(target, source)
    kept = sinusoidal_positions(KEYS, DIM, dtype=source.dtype, device=source.device)
    assert not kept.is_inference()
    found = answers(model, target, source, None)[0]
    torch.testing.assert_close(found, expected.clone())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_positions_have_the_type_that_is_asked_for(dtype):
    codes = sinusoidal_positions(KEYS, DIM, dtype)
    assert codes.dtype == dtype
    assert torch.equal(codes, sinusoidal_positions(KEYS, DIM).to(dtype))
