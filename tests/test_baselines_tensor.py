"""TFN, LMF and MFM: which products they see, and what MFM's further losses count."""

import itertools

import pytest
import test_baselines as every
import torch
from test_baselines import ALIGNED, UNALIGNED, WIDTHS, clips, model

from dmd.baselines import METHODS, build
from dmd.baselines.base import BatchNorm, UnimodalEmbeddings, mean_over_time
from dmd.baselines.memory_fusion import MemoryFusion
from dmd.baselines.mfm import Decoder, mmd
from dmd.batch import Batch

SIZES = (3, 2, 4)
tensor_methods = pytest.mark.parametrize("name", ["tfn", "lmf"])


def vectors(count=5, sizes=SIZES):
    rng = torch.Generator().manual_seed(7)
    return [torch.randn(count, size, generator=rng, dtype=torch.float64) for size in sizes]


def hollow(batch):
    """The features of a batch with "not a number" in the padding."""
    pairs = zip(batch.features, batch.masks, strict=True)
    return [x.masked_fill(~mask[:, :, None], torch.nan) for x, mask in pairs]


def test_the_outer_product_holds_single_double_and_triple_products():
    language, visual, acoustic = vectors()
    product = model("tfn").outer([language, visual, acoustic])
    assert product.shape == (5, 4, 3, 5)
    assert (product[:, 0, 0, 0] == 1).all()
    assert torch.equal(product[:, 1:, 0, 0], language)
    assert torch.equal(product[:, 0, 1:, 0], visual)
    assert torch.equal(product[:, 0, 0, 1:], acoustic)
    for n in range(5):
        v, a = visual[n], acoustic[n]
        torch.testing.assert_close(product[n, 1:, 1:, 0], torch.outer(language[n], v))
        torch.testing.assert_close(product[n, 1:, 0, 1:], torch.outer(language[n], a))
        torch.testing.assert_close(product[n, 0, 1:, 1:], torch.outer(v, a))
    for i, j, k in itertools.product(*map(range, SIZES)):
        expected = language[:, i] * visual[:, j] * acoustic[:, k]
        torch.testing.assert_close(product[:, 1 + i, 1 + j, 1 + k], expected)


def test_a_low_rank_form_of_full_rank_is_any_linear_map_of_the_outer_product():
    """A product of one entry of language and one of visual for each term of the sum."""
    rank = (1 + SIZES[0]) * (1 + SIZES[1])
    net = model("lmf", sizes=SIZES, rank=rank).double()
    rng = torch.Generator().manual_seed(8)
    weight = torch.randn(*(1 + size for size in SIZES), generator=rng, dtype=torch.float64)
    share = torch.rand(rank, generator=rng, dtype=torch.float64) + 0.5
    with torch.no_grad():
        net.factors[0].copy_(torch.eye(4).repeat_interleave(3, dim=0))
        net.factors[1].copy_(torch.eye(3).repeat(4, 1))
        net.factors[2].copy_(weight.flatten(0, 1) / share[:, None])
        net.sum.weight.copy_(share)
        net.sum.bias.fill_(0.7)
    x = vectors()
    expected = (model("tfn").outer(x) * weight).sum(dim=(1, 2, 3)) + 0.7
    torch.testing.assert_close(net.fuse(x), expected)


def test_a_low_rank_form_is_a_tensor_of_that_rank_in_each_vector_linear():
    net = model("lmf", sizes=SIZES, rank=2).double()
    x, (more,) = vectors(), vectors(sizes=(3,))
    terms = [[factor[r] for factor in net.factors] for r in range(2)]
    tensor = sum(
        share * torch.einsum("l,v,a->lva", *term)
        for share, term in zip(net.sum.weight[0], terms, strict=True)
    )
    expected = (model("tfn").outer(x) * tensor).sum(dim=(1, 2, 3)) + net.sum.bias
    torch.testing.assert_close(net.fuse(x), expected)
    middle = net.fuse([(x[0] + 3 * more) / 4, *x[1:]])
    torch.testing.assert_close(middle, (net.fuse(x) + 3 * net.fuse([more, *x[1:]])) / 4)


@tensor_methods
def test_without_the_other_modalities_a_modality_still_counts(name):
    """Without the constant 1 the product of a vector with zeros would say nothing of it."""
    net = model(name, sizes=SIZES, dropout=0.0).double().eval()
    zero = [torch.zeros_like(x) for x in vectors()]
    for m, x in enumerate(vectors()):
        alone = [x if n == m else zero[n] for n in range(3)]
        if name == "tfn":
            found, none = (net.outer(v).flatten(1) for v in (alone, zero))
            assert ((found - none).abs().sum(dim=1) > 0.1).all()
        else:
            assert ((net.fuse(alone) - net.fuse(zero)).abs() > 1e-6).all()


@tensor_methods
def test_only_language_has_an_order(name):
    net, batch = model(name).eval(), clips(name, full=True)
    expected = net(batch).prediction
    for m, features in enumerate(batch.features):
        turned = [x.flip(1) if n == m else x for n, x in enumerate(batch.features)]
        assert features.shape[1] > 1
        same = torch.isclose(net(Batch(*turned)).prediction, expected, rtol=1e-4, atol=1e-6)
        assert same.all() if m else not same.any()


def test_embeddings_are_those_of_the_valid_steps_in_the_order_language_visual_acoustic():
    torch.manual_seed(0)
    net = UnimodalEmbeddings((6, 5, 4), SIZES, hidden=7, dropout=0.0).eval()
    batch = clips("tfn")
    found = net(batch)
    assert [x.shape for x in found] == [(6, size) for size in SIZES]
    for n, (words, frames, sounds) in enumerate(batch.lengths.tolist()):
        _, (last, _) = net.lstm.cells(batch.language[n : n + 1, :words])
        visual = net.visual(batch.visual[n : n + 1, :frames].mean(dim=1))
        acoustic = net.acoustic(batch.acoustic[n : n + 1, :sounds].mean(dim=1))
        for x, expected in zip(found, (net.language(last[0]), visual, acoustic), strict=True):
            torch.testing.assert_close(x[n : n + 1], expected)


def test_means_are_normalised_over_the_batch_and_a_batch_of_one_trains():
    net = BatchNorm(3).train()
    x = torch.randn(8, 3) * 4 + 2
    torch.testing.assert_close(net(x).mean(dim=0), torch.zeros(3), rtol=0, atol=1e-5)
    torch.testing.assert_close(net(x).var(dim=0, correction=0), torch.ones(3), rtol=1e-3, atol=0)
    kept = net.running_mean.clone()
    alone = net(x[:1])
    assert torch.equal(net.running_mean, kept)
    torch.testing.assert_close(alone, net.eval()(x[:1]))
    for name in ("tfn", "lmf", "mfm"):
        batch = clips(name)[1:2]
        output = model(name).train()(batch)
        (output.prediction.sum() + sum(output.extra_losses.values())).backward()
        assert torch.isfinite(output.prediction).all()


def test_tfn_is_bounded_by_the_scale_of_the_labels_unless_told_otherwise():
    batch = clips("tfn")
    for bounded, largest in ((True, 3.0), (False, torch.inf)):
        net = model("tfn", bounded=bounded).eval()
        with torch.no_grad():
            net.head[-1].bias.fill_(100.0)
        assert (net(batch).prediction <= largest).all()
        assert (net(batch).prediction > 2.9).all()
    assert (net(batch).prediction > 90).all()


def test_mean_over_time_of_a_single_step_is_that_step():
    x, mask = torch.randn(2, 4, 3), torch.tensor([[True, False, False, False], [True] * 4])
    found = mean_over_time(x, mask)
    torch.testing.assert_close(found, torch.stack([x[0, 0], x[1].mean(dim=0)]))


def test_discrepancy_is_zero_for_equal_samples_and_grows_with_distance():
    rng = torch.Generator().manual_seed(2)
    x = torch.randn(40, 6, generator=rng)
    assert mmd(x, x) == 0
    assert mmd(x, x[torch.randperm(40, generator=rng)]) < 1e-6
    found = [float(mmd(x, x + shift)) for shift in (0.0, 0.25, 0.5, 1.0, 2.0, 4.0)]
    assert found == sorted(found) and found[1] > 0
    spread = [float(mmd(x, x * scale)) for scale in (1.0, 1.5, 2.0, 4.0)]  # the same mean
    assert spread == sorted(spread) and spread[1] > 0


def test_discrepancy_is_that_of_all_pairs():
    x, y = vectors(sizes=(3,))[0].float(), vectors(count=4, sizes=(3,))[0].float() + 0.5

    def mean(a, b):
        pairs = [float((-((p - q) ** 2).sum() / 3).exp()) for p in a for q in b]
        return sum(pairs) / len(pairs)

    expected = mean(x, x) + mean(y, y) - 2 * mean(x, y)
    assert float(mmd(x, y)) == pytest.approx(expected, rel=1e-4)
    torch.testing.assert_close(mmd(x, y), mmd(y, x))


def test_codes_like_normal_noise_cost_less_than_codes_elsewhere():
    torch.manual_seed(0)
    noise = torch.randn(200, 4)
    assert mmd(torch.randn(200, 4), noise) < 0.1 * mmd(torch.randn(200, 4) + 1, noise)
    assert mmd(torch.randn(200, 4), noise) < 0.1 * mmd(torch.zeros(200, 4), noise)


def test_reconstruction_is_a_mean_over_valid_steps_summed_over_modalities():
    net, batch = model("mfm"), clips("mfm")
    rebuilt = [torch.randn_like(x) for x in batch.features]
    expected = 0.0
    for x, y, valid in zip(rebuilt, batch.features, batch.lengths.T.tolist(), strict=True):
        errors = torch.cat([(a[:n] - b[:n]).flatten() for a, b, n in zip(x, y, valid, strict=True)])
        expected += errors.square().mean()
    torch.testing.assert_close(net.reconstruction(rebuilt, batch), expected)
    loud = hollow(batch)
    found = net.reconstruction(rebuilt, Batch(*loud, batch.lengths))
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("lengths", [ALIGNED, UNALIGNED])
def test_padding_enters_no_loss_and_no_gradient_of_mfm(lengths, monkeypatch):
    monkeypatch.setattr(METHODS["mfm"], "aligned_only", lengths == ALIGNED)
    batch, found = clips("mfm"), []
    loud = hollow(batch)
    for features in (batch.features, loud):
        net = model("mfm").train()
        torch.manual_seed(1)
        output = net(Batch(*features, batch.lengths))
        (output.prediction.sum() + sum(output.extra_losses.values())).backward()
        found.append([*output.extra_losses.values(), *(x.grad for x in net.parameters())])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


def test_a_decoder_is_the_loop_that_feeds_its_state_in_twice():
    torch.manual_seed(0)
    net, loop = Decoder(5, 3), torch.nn.LSTMCell(5, 5)
    with torch.no_grad():
        net.cells.weight_ih_l0.copy_(loop.weight_ih)
        net.cells.weight_hh_l0.copy_(loop.weight_ih + loop.weight_hh)
        net.cells.bias_ih_l0.copy_(loop.bias_ih)
        net.cells.bias_hh_l0.copy_(loop.bias_hh)
    x = torch.randn(2, 5)
    state, expected = loop(x), []
    for _ in range(4):
        expected.append(net.output(state[0]))
        state = loop(state[0], state)
    torch.testing.assert_close(net(x, 4), torch.stack(expected, dim=1))


def test_a_modality_is_rebuilt_from_its_own_factor_and_the_common_one():
    net, (steps, size) = model("mfm", factor=3), (UNALIGNED, 3)
    factors = [torch.randn(2, size) for _ in range(4)]
    before = net.decode(factors, steps)
    assert [x.shape for x in before] == [(2, n, d) for n, d in zip(steps, WIDTHS, strict=True)]
    for changed in range(4):
        moved = [x + (n == changed) for n, x in enumerate(factors)]
        same = [torch.equal(*x) for x in zip(before, net.decode(moved, steps), strict=True)]
        assert same == [m != changed and changed != 3 for m in range(3)]


@pytest.mark.parametrize("lengths", [ALIGNED, UNALIGNED])
def test_only_the_common_code_predicts_and_each_code_is_made_from_its_own(lengths, monkeypatch):
    monkeypatch.setattr(METHODS["mfm"], "aligned_only", lengths == ALIGNED)
    net, batch = model("mfm").train(), clips("mfm")
    net(batch).prediction.sum().backward()
    moved = {key.split(".")[0] for key, x in net.named_parameters() if x.grad is not None}
    assert moved == {"fusion", "codes", "factors", "head"}
    assert all(x.grad is None for m in range(3) for x in net.codes[m].parameters())
    assert all(x.grad is None for m in range(3) for x in net.factors[m].parameters())
    for changed in range(3):
        features = [x + (m == changed) for m, x in enumerate(batch.features)]
        pairs = zip(net.encode(batch), net.encode(Batch(*features, batch.lengths)), strict=True)
        assert [not torch.equal(*x) for x in pairs] == [m in (changed, 3) for m in range(4)]


def test_losses_of_mfm_carry_their_weights_and_exist_in_training_only():
    batch, found = clips("mfm"), []
    for weights in ((0.5, 1.0), (1.5, 0.25)):
        net = model("mfm", reconstruction_weight=weights[0], mmd_weight=weights[1]).train()
        torch.manual_seed(1)
        found.append(net(batch).extra_losses)
    torch.testing.assert_close(found[1]["reconstruction"], 3 * found[0]["reconstruction"])
    torch.testing.assert_close(found[1]["mmd"], found[0]["mmd"] / 4)
    state = torch.get_rng_state()
    assert net.eval()(batch).extra_losses == {}
    assert torch.equal(torch.get_rng_state(), state)  # no noise drawn


@pytest.mark.parametrize(
    "check",
    [
        every.test_padding_has_no_influence,
        every.test_every_valid_step_of_every_modality_counts,
        every.test_clips_do_not_see_each_other_and_their_order_is_theirs,
        every.test_every_parameter_gets_a_gradient,
        every.test_a_handful_of_clips_is_learnt_by_heart,
    ],
)
def test_mfm_with_a_memory_does_what_every_method_must(check, monkeypatch):
    monkeypatch.setattr(METHODS["mfm"], "aligned_only", True)
    assert isinstance(model("mfm").fusion, MemoryFusion)
    check("mfm")


def test_the_memory_is_for_lengths_that_are_equal():
    assert not isinstance(model("mfm").fusion, MemoryFusion)
    assert not isinstance(model("mfm", ALIGNED, encoder="lstm").fusion, MemoryFusion)
    assert isinstance(model("mfm", ALIGNED).fusion, MemoryFusion)
    with pytest.raises(ValueError, match=r"needs aligned clips: the lengths are \(5, 8, 7\)"):
        build("mfm", WIDTHS, UNALIGNED, encoder="memory")
    features = [torch.randn(2, t, d) for t, d in zip((5, 4, 5), WIDTHS, strict=True)]
    with pytest.raises(ValueError, match="needs aligned clips, with as many steps"):
        model("mfm", ALIGNED)(Batch(*features))


def test_memory_fusion_is_its_equations_step_by_step():
    torch.manual_seed(0)
    net = MemoryFusion(WIDTHS, hidden=3, memory=4, dropout=0.0).double()
    batch = [torch.randn(2, 5, d, dtype=torch.float64) for d in WIDTHS]
    found = net(batch, torch.tensor([[True] * 5, [True] * 3 + [False] * 2]))
    for clip, steps in enumerate((5, 3)):
        state = [(torch.zeros(1, 3).double(), torch.zeros(1, 3).double()) for _ in WIDTHS]
        memory = torch.zeros(1, 4).double()
        for t in range(steps):
            new = [
                lstm(x[clip : clip + 1, t], old)
                for lstm, x, old in zip(net.lstms, batch, state, strict=True)
            ]
            cells = torch.cat([c for _, c in state] + [c for _, c in new], dim=1)
            attended = torch.softmax(net.attention(cells), dim=1) * cells
            seen = torch.cat([attended, memory], dim=1)
            keep, write = net.keep(seen).sigmoid(), net.write(seen).sigmoid()
            memory = keep * memory + write * torch.tanh(net.proposal(attended))
            state = new
        expected = torch.cat([*(h for h, _ in state), memory], dim=1)
        torch.testing.assert_close(found[clip : clip + 1], expected)


def test_the_memory_reads_to_the_end_of_the_longest_modality_and_no_further():
    net = model("mfm", (9, 9, 9)).eval()
    assert isinstance(net.fusion, MemoryFusion)
    batch = Batch(*(torch.randn(3, 6, d) for d in WIDTHS), torch.tensor([[4, 6, 2]] * 3))
    expected = net(batch).prediction
    longer = [torch.nn.functional.pad(x, (0, 0, 0, 3), value=9.0) for x in batch.features]
    torch.testing.assert_close(net(Batch(*longer, batch.lengths)).prediction, expected)
    batch.visual[:, 5] += 1.0
    assert not torch.isclose(net(batch).prediction, expected).any()
