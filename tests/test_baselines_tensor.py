"""TFN, LMF and MFM: which products they see, and what MFM's further losses count."""

import itertools

import pytest
import torch
from test_baselines import clips, model

from dmd.baselines.base import BatchNorm, UnimodalEmbeddings, mean_over_time
from dmd.batch import Batch

SIZES = (3, 2, 4)
tensor_methods = pytest.mark.parametrize("name", ["tfn", "lmf"])


def vectors(count=5, sizes=SIZES):
    rng = torch.Generator().manual_seed(7)
    return [torch.randn(count, size, generator=rng, dtype=torch.float64) for size in sizes]


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
    for name in ("tfn", "lmf"):
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
