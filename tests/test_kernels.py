"""The forms of attention: the plain formula, its gradients, dropout, and memory."""

import itertools
import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dmd import kernels
from dmd.kernels import ChunkedAttention, attend

EVER = 1 << 62


@pytest.fixture(autouse=True, params=[0, EVER], ids=["computed_again", "kept"])
def kept_weights(request, monkeypatch):
    """Every test holds where the backward pass computes the weights again and where it does not."""
    monkeypatch.setattr(kernels, "KEPT", request.param)
    return request.param > 0


def randn(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=torch.float64, generator=generator)


def qkv(clips, heads, queries, keys, width):
    """Queries, keys and values (N, H, T, width), the columns of heads cut out of rows of steps."""
    return [
        randn(clips, steps, heads, width, seed=seed).transpose(1, 2)
        for seed, steps in enumerate((queries, keys, keys))
    ]


def plain(query, key, value, visible=None):
    """softmax(Q K^T / sqrt(width)) V, as it is written."""
    score = query @ key.transpose(2, 3) / math.sqrt(query.shape[3])
    if visible is not None:
        score = score.masked_fill(~visible, -math.inf)
    return score.softmax(dim=3) @ value


def visible(kind, clips, queries, keys):
    """None, or what differs from clip to clip: a length, or what a query may see as well."""
    if kind == "all":
        return None
    lengths = 1 + (torch.arange(clips) * 3 + 1) % keys
    seen = (torch.arange(keys) < lengths[:, None])[:, None, None, :]
    if kind == "lengths":
        return seen
    return seen & (torch.arange(keys) <= torch.arange(queries)[:, None])


def with_gradients(run, tensors):
    """The result of `run` on the tensors, and their gradients under a sum in which all differ."""
    leaves = [x.clone().requires_grad_() for x in tensors]
    result = run(*leaves)
    (result * randn(*result.shape, seed=9)).sum().backward()
    return [result.detach(), *(x.grad for x in leaves)]


def assert_equal(found, expected, tolerance=1e-12):
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=tolerance, atol=tolerance)


# The formula

SIZES = [(5, 3, 4, 7, 5), (5, 3, 7, 4, 10), (2, 2, 6, 6, 16), (1, 1, 1, 1, 5), (3, 2, 1, 9, 5)]
ANY_WAY = {"chunked": EVER, "PyTorch": 0}


@pytest.mark.parametrize("way", ANY_WAY)
@pytest.mark.parametrize("kind", ["all", "lengths", "causal"])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_both_ways_equal_the_plain_formula(sizes, kind, way, monkeypatch):
    monkeypatch.setattr(kernels, "LONG", ANY_WAY[way])
    clips, _, queries, keys, _ = sizes
    seen, tensors = visible(kind, clips, queries, keys), qkv(*sizes)
    found = with_gradients(lambda *x: attend(*x, seen, 0.0), tensors)
    assert_equal(found, with_gradients(lambda *x: plain(*x, seen), tensors))


@pytest.mark.parametrize("kind", ["all", "lengths", "causal"])
@pytest.mark.parametrize("steps", [(150, 120), (90, 200), (128, 128), (127, 129)])
def test_long_sequences_equal_the_plain_formula(steps, kind):
    """On both sides of the length at which the way changes."""
    seen, tensors = visible(kind, 2, *steps), qkv(2, 2, *steps, 5)
    found = with_gradients(lambda *x: attend(*x, seen, 0.0), tensors)
    assert_equal(found, with_gradients(lambda *x: plain(*x, seen), tensors))


@pytest.mark.parametrize("kind", ["all", "lengths", "causal"])
@pytest.mark.parametrize("clips", [0.01, 1, 2, 2.9, 3, 6, 7, 100])
def test_the_size_of_a_chunk_changes_nothing(clips, kind, monkeypatch):
    """Of six clips: chunks of less than one, sizes that divide and do not, more than all."""
    seen, tensors = visible(kind, 6, 4, 5), qkv(6, 3, 4, 5, 10)
    monkeypatch.setattr(kernels, "CHUNK", int(clips * 3 * 4 * 5))
    found = with_gradients(lambda *x: attend(*x, seen, 0.0), tensors)
    assert_equal(found, with_gradients(lambda *x: plain(*x, seen), tensors))


@pytest.mark.parametrize("way", ANY_WAY)
def test_a_mask_that_hides_nothing_changes_nothing(way, monkeypatch):
    monkeypatch.setattr(kernels, "LONG", ANY_WAY[way])
    tensors = qkv(3, 2, 4, 6, 5)
    for shape in ((3, 1, 1, 6), (3, 1, 4, 6)):
        seen = torch.ones(shape, dtype=torch.bool)
        found, none = (
            with_gradients(lambda *x, m=m: attend(*x, m, 0.0), tensors) for m in (seen, None)
        )
        assert_equal(found, none, 1e-15 if way == "chunked" else 1e-12)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_hidden_keys_have_no_influence_and_no_gradient(dropout):
    seen, (query, key, value) = visible("lengths", 4, 3, 6), qkv(4, 2, 3, 6, 5)
    hidden = ~seen.expand(4, 2, 1, 6)[:, :, 0]
    assert hidden.any()

    def run(*tensors):
        torch.manual_seed(0)
        return attend(*tensors, seen, dropout)

    result, _, *gradients = with_gradients(run, (query, key, value))
    for x in gradients:
        assert not x[hidden].any()
    other = [x.masked_fill(hidden[..., None], 1e3) for x in (key, value)]
    assert torch.equal(run(query, *other), result)


def test_a_gradient_that_nobody_wants_is_left_out():
    tensors = qkv(2, 2, 3, 4, 5)
    full = with_gradients(lambda *x: attend(*x, None, 0.0), tensors)
    for wanted in range(3):
        leaves = [x.clone().requires_grad_(i == wanted) for i, x in enumerate(tensors)]
        result = attend(*leaves, None, 0.0)
        (result * randn(*result.shape, seed=9)).sum().backward()
        assert [x.grad is not None for x in leaves] == [i == wanted for i in range(3)]
        assert_equal([leaves[wanted].grad], [full[1 + wanted]])


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_no_clips_are_no_error(dropout):
    found = with_gradients(lambda *x: attend(*x, None, dropout), qkv(0, 2, 3, 4, 5))
    assert [x.shape for x in found] == [(0, 2, t, 5) for t in (3, 3, 4, 4)]


def test_single_precision_is_near():
    tensors, seen = qkv(3, 2, 20, 30, 5), visible("lengths", 3, 20, 30)
    exact = with_gradients(lambda *x: attend(*x, seen, 0.0), tensors)
    leaves = [x.float().requires_grad_() for x in tensors]
    result = attend(*leaves, seen, 0.0)
    (result * randn(*result.shape, seed=9)).sum().backward()
    found = [result.detach(), *(x.grad for x in leaves)]
    assert {x.dtype for x in found} == {torch.float32}
    assert_equal([x.double() for x in found], exact, 1e-5)


# Which way is taken


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("queries", "keys"), [(127, 129), (128, 128)])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_short_or_dropped_weights_of_whole_precision_are_worked_on_here(
    dropout, queries, keys, dtype, monkeypatch
):
    theirs, calls = torch.nn.functional.scaled_dot_product_attention, []

    def spy(*args, **options):
        calls.append(args[0].dtype)
        return theirs(*args, **options)

    monkeypatch.setattr(kernels.F, "scaled_dot_product_attention", spy)
    tensors = [x.to(dtype) for x in qkv(1, 2, queries, keys, 5)]
    result = attend(*tensors, None, dropout)
    half = dtype in (torch.bfloat16, torch.float16)
    long = queries * keys >= kernels.LONG
    assert calls == ([dtype] if half or (long and not dropout) else [])
    assert result.dtype == dtype
    if half and not dropout:
        expected = plain(*(x.double() for x in tensors))
        torch.testing.assert_close(result.double(), expected, rtol=0.02, atol=0.01)


# Gradients by finite differences


@pytest.mark.parametrize("chunk", [1, 2 * 2 * 3 * 4, 1 << 20])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("kind", ["all", "lengths", "causal"])
def test_gradcheck(kind, dropout, chunk, monkeypatch):
    """With dropout too: the backward pass uses the draws of the forward pass, chunk by chunk."""
    monkeypatch.setattr(kernels, "CHUNK", chunk)
    clips, heads, queries, keys = 3, 2, 3, 4
    rows = [
        randn(clips * heads, t, 5, seed=i).requires_grad_()
        for i, t in enumerate((queries, keys, keys))
    ]
    seen = visible(kind, clips, queries, keys)
    bias = None
    if seen is not None:
        bias = torch.zeros(seen.shape, dtype=torch.float64).masked_fill(~seen, -math.inf)

    def run(query, key, value):
        torch.manual_seed(3)
        return ChunkedAttention.apply(query, key, value, bias, heads, dropout)

    assert torch.autograd.gradcheck(run, rows)


def test_the_draws_of_another_pass_do_not_reach_the_backward_pass():
    tensors = qkv(3, 2, 4, 5, 5)

    def gradients(disturbed):
        torch.manual_seed(0)
        leaves = [x.clone().requires_grad_() for x in tensors]
        result = attend(*leaves, None, 0.5)
        if disturbed:
            torch.rand(7)
            attend(*tensors, None, 0.5)
        state = torch.get_rng_state()
        result.sum().backward()
        assert torch.equal(torch.get_rng_state(), state)
        return [x.grad for x in leaves]

    for x, y in zip(gradients(False), gradients(True), strict=True):
        assert torch.equal(x, y)


# Dropout


def shown(dropout, clips=64, heads=4, steps=64, seed=0):
    """Weights after dropout, in units of their value before: (N, H, steps, steps), all equal to 1.

    Queries and keys are zero, and the value of step k is the k-th unit vector.
    """
    torch.manual_seed(seed)
    zero = torch.zeros(clips, heads, steps, steps, dtype=torch.float64)
    value = torch.eye(steps, dtype=torch.float64).expand_as(zero)
    return attend(zero, zero, value, None, dropout) * steps


@pytest.mark.parametrize("share", [1 / 256, 0.1, 0.2, 0.3, 0.5, 0.9])
def test_the_share_of_dropped_weights(share):
    """Rounded to a multiple of 1/256, at every place of a word of eight bytes."""
    rounded = round(256 * share) / 256
    weights = shown(share)
    kept = weights != 0
    expected = torch.full_like(weights[kept], 1 / (1 - rounded))
    torch.testing.assert_close(weights[kept], expected, rtol=1e-12, atol=0)
    for places in (kept.flatten()[None], kept.reshape(-1, 8).T):
        spread = math.sqrt(rounded * (1 - rounded) / places.shape[1])
        dropped = 1 - places.double().mean(dim=1)
        assert (dropped - rounded).abs().max() <= 5 * spread


def test_the_mean_is_the_result_without_dropout():
    count = 20_000
    query, key, value = (x.expand(count, -1, -1, -1) for x in qkv(1, 2, 3, 4, 5))
    seen = torch.tensor([True, True, True, False]).expand(count, 1, 1, 4)
    torch.manual_seed(0)
    draws = attend(query, key, value, seen, 0.3)
    expected = plain(query[:1], key[:1], value[:1], seen[:1])[0]
    error = draws.std(dim=0) / math.sqrt(count)
    assert ((draws.mean(dim=0) - expected).abs() <= 5 * error).all()
    assert error.max() < 0.02 and error.min() > 0


@pytest.mark.parametrize("share", [0.997, 0.999, 0.999999])
def test_the_largest_shares_leave_some_weights(share):
    weights = shown(share)
    assert 0 < (weights != 0).double().mean() < 0.006
    torch.testing.assert_close(weights.max(), torch.tensor(256.0).double())


def test_the_seed_decides():
    assert torch.equal(shown(0.5, clips=2, seed=1), shown(0.5, clips=2, seed=1))
    assert not torch.equal(shown(0.5, clips=2, seed=1), shown(0.5, clips=2, seed=2))
    tensors = qkv(2, 2, 8, 8, 5)
    torch.manual_seed(1)
    assert not torch.equal(attend(*tensors, None, 0.5), attend(*tensors, None, 0.5))


@pytest.mark.parametrize("chunk", [1, 3 * 4 * 64 * 64, 1 << 40])
def test_clips_heads_and_queries_draw_apart(chunk, monkeypatch):
    """Any two agree as often as independent draws do, in one chunk or in several."""
    monkeypatch.setattr(kernels, "CHUNK", chunk)
    share, steps = 0.25, 64
    kept = shown(share, clips=8, steps=steps) != 0
    agree = share**2 + (1 - share) ** 2
    for axis in (0, 1, 2):
        sets = kept.movedim(axis, 0).flatten(1)
        spread = math.sqrt(agree * (1 - agree) / sets.shape[1])
        for one, other in itertools.combinations(sets[:8], 2):
            assert abs(float((one == other).double().mean()) - agree) <= 6 * spread


def test_without_dropout_nothing_is_drawn():
    assert torch.equal(shown(0.0), torch.ones(64, 4, 64, 64).double())
    state = torch.get_rng_state()
    attend(*qkv(2, 2, 3, 4, 5), None, 0.0)
    assert torch.equal(torch.get_rng_state(), state)


# Memory


class Sizes(TorchDispatchMode):
    """The numbers of the largest tensor that any operation gives."""

    def __init__(self):
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        tensors = result if isinstance(result, tuple | list) else [result]
        sizes = [x.untyped_storage().nbytes() // 8 for x in tensors if torch.is_tensor(x)]
        self.largest = max(self.largest, *sizes, 0)
        return result


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("kind", ["all", "lengths"])
def test_what_is_kept_for_the_backward_pass_grows_with_the_steps_only(kind, dropout, monkeypatch):
    """From the number of weights on that is kept: 2 clips, 2 heads, 30 steps each."""
    monkeypatch.setattr(kernels, "KEPT", 2 * 2 * 30 * 30 - 1)

    def kept(steps):
        numbers = []
        leaves = [x.clone().requires_grad_() for x in qkv(2, 2, steps, steps, 5)]
        hooks = torch.autograd.graph.saved_tensors_hooks(
            lambda x: numbers.append(x.numel()) or x, lambda x: x
        )
        with hooks:
            result = attend(*leaves, visible(kind, 2, steps, steps), dropout)
        node = result.grad_fn
        while "Chunked" not in type(node).__name__:
            node = node.next_functions[0][0]
        held = [x for x in vars(node).values() if torch.is_tensor(x)]
        assert held == []  # past the hooks
        return sum(numbers)

    assert kept(120) == 4 * kept(30) > 0
    few, weights = kept(30), 2 * 2 * 30 * 30
    monkeypatch.setattr(kernels, "KEPT", weights)
    assert kept(30) == few + 2 * weights  # before and after dropout


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("chunk", [1, EVER])
def test_weights_that_are_kept_are_those_that_are_computed_again(chunk, dropout, monkeypatch):
    monkeypatch.setattr(kernels, "CHUNK", chunk)
    found = []
    for few in (0, EVER):
        monkeypatch.setattr(kernels, "KEPT", few)
        torch.manual_seed(0)
        found.append(with_gradients(lambda *x: attend(*x, None, dropout), qkv(3, 2, 4, 5, 5)))
    assert_equal(*found, 0.0)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_no_more_weights_than_a_chunk_exist_at_a_time(dropout, monkeypatch):
    clips, heads, steps, width = 12, 2, 40, 5
    one, whole = heads * steps * steps, clips * heads * steps * width
    leaves = [x.clone().requires_grad_() for x in qkv(clips, heads, steps, steps, width)]
    for chunk in (one, 3 * one, clips * one):
        monkeypatch.setattr(kernels, "CHUNK", chunk)
        for way in ("forward", "backward"):
            with Sizes() as sizes:
                if way == "forward":
                    result = attend(*leaves, None, dropout).sum()
                else:
                    result.backward()
            assert max(chunk, whole) * 0.99 <= sizes.largest <= max(chunk, whole), way
