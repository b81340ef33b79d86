"""Properties of the methods that are built after their papers: PMR, MICA and FDMER."""

import copy

import pytest
import torch
from test_baselines import clips, model
from torch import nn

from dmd import Batch
from dmd.baselines.fdmer import dependence, reverse_gradient
from dmd.baselines.mica import correlated, marginal

ALL, OTHERS = (0, 1, 2), [(m, p) for m in range(3) for p in range(3) if m != p]


def changed(batch, m, by=1.0):
    """The batch with other features in modality m."""
    features = [x.clone() for x in batch.features]
    features[m] += by
    return Batch(*features, batch.lengths, batch.label)


def closed(units):
    """Filters of PMR that let nothing pass."""
    for unit in units:
        nn.init.zeros_(unit.filter.weight)
        nn.init.constant_(unit.filter.bias, -1e4)


def message_parts(message, batch):
    return message.split([x.shape[1] for x in batch.features], dim=1)


def vectors(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# PMR


def test_the_first_message_is_the_steps_of_language_then_visual_then_acoustic():
    net, batch = model("pmr").eval(), clips("pmr", full=True)
    before = message_parts(net.exchange(batch)[1][0], batch)
    for m in ALL:
        after = message_parts(net.exchange(changed(batch, m))[1][0], batch)
        moved = [not torch.equal(x, y) for x, y in zip(before, after, strict=True)]
        assert moved == [p == m for p in ALL]


@pytest.mark.parametrize(("m", "part"), OTHERS)
def test_the_hub_takes_from_every_modality(m, part):
    """Its steps of one modality change with another, also where modalities learn nothing of it."""
    net, batch = model("pmr", layers=1).eval(), clips("pmr", full=True)
    closed(net.layers[0].to_modality)
    before = message_parts(net.exchange(batch)[1][1], batch)[part]
    after = message_parts(net.exchange(changed(batch, m))[1][1], batch)[part]
    assert (after - before).abs().amax(dim=2).min() > 1e-5


@pytest.mark.parametrize(("m", "target"), OTHERS)
def test_the_hub_gives_to_every_modality(m, target):
    net, batch = model("pmr", layers=1).eval(), clips("pmr", full=True)
    before, after = (net.exchange(x)[0][target] for x in (batch, changed(batch, m)))
    assert (after - before).abs().amax(dim=2).min() > 1e-5
    closed(net.layers[0].to_modality)
    before, after = (net.exchange(x)[0][target] for x in (batch, changed(batch, m)))
    assert torch.equal(before, after)


def test_closed_filters_leave_the_message_as_it_is_and_weights_are_shares():
    net, batch = model("pmr").eval(), clips("pmr", full=True)
    _, messages, weights = net.exchange(batch)
    for shares in weights:
        torch.testing.assert_close(shares.sum(dim=0), torch.ones(6, 20))
        assert shares.std(dim=0).max() > 0
    assert not torch.allclose(messages[0], messages[1])
    for layer in net.layers:
        closed(layer.to_message)
    for message in net.exchange(batch)[1]:
        torch.testing.assert_close(message, messages[0])


def test_the_message_is_made_of_features_that_it_has_just_reinforced():
    net, batch = model("pmr", layers=1).eval(), clips("pmr", full=True)
    fresh = net.exchange(batch)[1][1]
    closed(net.layers[0].to_modality)
    assert not torch.allclose(net.exchange(batch)[1][1], fresh, atol=1e-4)


def test_a_padded_step_of_the_message_is_seen_by_nobody():
    net = model("pmr", layers=1).eval()
    features, message, valid = torch.randn(6, 5, 30), torch.randn(6, 20, 30), torch.ones(6, 20) > 0
    valid[:, 3] = False
    loud = message.clone()
    loud[:, 3] = 1e3
    unit = net.layers[0].to_modality[0]
    assert torch.equal(unit(features, message, valid), unit(features, loud, valid))
    assert not torch.allclose(unit(features, message, ~valid), unit(features, message, valid))


# FDMER


def adversarial_gradients(reversal):
    """Gradients of the adversarial loss alone, with the same weights for each `reversal`."""
    net = model("fdmer", reversal=reversal).eval()  # no dropout
    net(clips("fdmer")).extra_losses["adversarial"].backward()
    return {key: x.grad for key, x in net.named_parameters() if x.grad is not None}


def test_reversal_keeps_the_value_and_turns_the_gradient():
    x = torch.randn(4, 3, requires_grad=True)
    y = reverse_gradient(x, 2.0)
    torch.testing.assert_close(y, x)
    (gradient,) = torch.autograd.grad((y * torch.arange(3.0)).sum(), x)
    torch.testing.assert_close(gradient, -2.0 * torch.arange(3.0).expand(4, 3))


def test_the_reversed_gradient_reaches_the_common_encoder_and_nobody_else():
    plain, turned, double = (adversarial_gradients(strength) for strength in (-1.0, 1.0, 2.0))
    signs = {"common_encoder": -1, "discriminator": 1, "private_encoders": 1}
    assert not plain.keys() & {"head.0.weight", "score.0.weight"}
    for part, sign in signs.items():
        keys = [key for key in plain if key.startswith(part)]
        assert keys
        for key in keys:
            assert plain[key].any()
            torch.testing.assert_close(turned[key], sign * plain[key])
            factor = 2 if part == "common_encoder" else 1
            torch.testing.assert_close(double[key], factor * turned[key])


@pytest.mark.parametrize(
    ("part", "helps"), [("discriminator", 1), ("private_encoders", 1), ("common_encoder", -1)]
)
def test_a_step_of_the_optimiser_helps_or_misleads_the_discriminator(part, helps):
    net, batch = model("fdmer").eval(), clips("fdmer")
    before = net(batch).extra_losses["adversarial"]
    before.backward()
    with torch.no_grad():
        for x in getattr(net, part).parameters():
            x -= x.grad
    after = net(batch).extra_losses["adversarial"]
    assert helps * (before - after) > 1e-6


def test_the_discriminator_is_asked_for_the_right_names():
    net = model("fdmer", dim=4, heads=2)
    net.discriminator = nn.Linear(4, 3, bias=False)
    net.discriminator.weight = nn.Parameter(20 * torch.eye(3, 4))
    told = torch.eye(3, 4)[:, None].expand(3, 5, 4)  # modality m shows channel m
    assert net.discrimination(told, told) < 1e-6
    for wrong in (told.roll(1, dims=0), told[[0, 2, 1]]):
        assert net.discrimination(wrong, told) > 1
        assert net.discrimination(told, wrong) > 1


def test_dependence_is_zero_for_a_constant_and_sees_what_is_not_linear():
    rng = torch.Generator().manual_seed(0)
    x, y = torch.randn(2, 400, 3, generator=rng)
    constant = torch.ones(400, 3)
    assert dependence(x, constant) == pytest.approx(0, abs=1e-6)
    # Uncorrelated with x, whose sign it does not know, and yet a function of it.
    function = torch.stack([x[:, 0] ** 2, x[:, 1] ** 2, constant[:, 0]], dim=1)
    assert dependence(x, function) > 2 * dependence(x, y)
    torch.testing.assert_close(dependence(x, function), dependence(function, x))
    order = torch.randperm(400, generator=rng)
    torch.testing.assert_close(dependence(x[order], x[order]), dependence(x, x))
    assert dependence(x[order], x) < dependence(x, x) / 10  # clip for clip
    assert dependence(x[:1], y[:1]) == 0  # the last batch may hold one clip


def test_dependence_is_the_trace_of_centred_kernels():
    x, y = vectors(5, 3), vectors(5, 2, seed=1)
    kernels = []
    for z in (x, y):
        unit = z / z.norm(dim=1, keepdim=True)
        kernels.append((-(unit[:, None] - unit).square().sum(dim=2) / 2).exp())
    centre = torch.eye(5) - 1 / 5
    expected = torch.trace(kernels[0] @ centre @ kernels[1] @ centre) / 25
    torch.testing.assert_close(dependence(x, y), expected)


def test_disparity_is_between_private_and_common_and_between_private_vectors(monkeypatch):
    net, batch = model("fdmer").eval(), clips("fdmer")
    rng = torch.Generator().manual_seed(0)
    common, private = torch.randn(2, 3, 6, 40, generator=rng)

    def losses(common, private):
        monkeypatch.setattr(net, "split", lambda vectors: (common, private))
        return net(batch).extra_losses

    everywhere = common[:1].expand(3, -1, -1)
    assert losses(everywhere, private)["consistency"] == pytest.approx(0, abs=1e-6)
    assert losses(common, private)["consistency"] > 0.05  # 0.1 for vectors at right angles
    assert losses(3 * common, private)["consistency"] == pytest.approx(
        losses(common, private)["consistency"].item()
    )
    flat = torch.ones(3, 6, 40)
    assert losses(common, flat)["disparity"] == pytest.approx(0, abs=1e-6)
    one = flat.clone()
    one[1] = private[1]  # depends on its own common vector, and on nothing else
    assert losses(private, one)["disparity"] > 1e-4
    two = one.clone()
    two[2] = private[1]  # two private vectors that say the same
    assert losses(flat, one)["disparity"] == pytest.approx(0, abs=1e-6)
    assert losses(flat, two)["disparity"] > 1e-4


def test_each_of_the_six_vectors_counts_and_the_weights_depend_on_the_clip():
    net = model("fdmer").eval()
    rng = torch.Generator().manual_seed(0)
    vectors = torch.randn(6, 5, 40, generator=rng)
    fused, weights = net.fuse(*vectors.split(3))
    torch.testing.assert_close(weights.sum(dim=1), torch.ones(5))
    assert weights.std(dim=0).min() > 0
    for k in range(6):
        other = vectors.clone()
        other[k] += torch.randn(40, generator=rng)
        assert ((net.fuse(*other.split(3))[0] - fused).abs().amax(dim=1) > 1e-3).all()


def test_an_adversary_hides_the_modality_from_common_vectors():
    """Told apart in one pass by one optimiser: hidden with the reversal, plain without it."""
    start, batch = model("fdmer"), clips("fdmer", count=12)
    found = {}
    for reversal in (1.0, -1.0):
        net = copy.deepcopy(start).eval()
        net.reversal = reversal
        optimiser = torch.optim.Adam(net.parameters(), lr=3e-3)
        for _ in range(60):
            optimiser.zero_grad()
            net(batch).extra_losses["adversarial"].backward()
            optimiser.step()
        common, private = net.split(net.vectors(batch))
        guesses = [net.discriminator(x).softmax(dim=2) for x in (common, private)]
        found[reversal] = [torch.stack([x[m, :, m] for m in ALL]).mean().item() for x in guesses]
    assert found[-1.0][0] > 0.8 and found[1.0][0] < 0.5
    assert min(found[1.0][1], found[-1.0][1]) > 0.8  # private vectors tell it in either case


# MICA


def test_the_marginal_loss_is_zero_for_equal_distributions_whatever_the_order():
    query, valid = vectors(2, 4, 6, 5), torch.ones(2, 4, 6, dtype=torch.bool)
    assert marginal(query, query, valid, valid).max() < 1e-10
    order = torch.randperm(24, generator=torch.Generator().manual_seed(0))
    key = query.flatten(1, 2)[:, order].unflatten(1, (4, 6))  # other clips, other times
    assert marginal(query, key, valid, valid).max() < 1e-10
    twice = torch.cat([query, key], dim=2)  # as distributions equal, but not as many
    long = torch.ones(2, 4, 12, dtype=torch.bool)
    assert marginal(query, twice, valid, long).max() < 1e-10


def test_the_marginal_loss_sees_the_mean_and_the_spread_but_not_the_scale():
    query, valid = vectors(1, 400, 6, 5), torch.ones(1, 400, 6, dtype=torch.bool)
    other = vectors(1, 400, 6, 5, seed=1)
    chance = marginal(query, other, valid, valid)
    assert marginal(query, other + 0.5 * torch.eye(5)[0], valid, valid) > 10 * chance
    assert marginal(query, other * torch.tensor([3.0, 1, 1, 1, 1]), valid, valid) > 3 * chance
    torch.testing.assert_close(marginal(query, 9 * other, valid, valid), chance)
    # Encoder for encoder: the second pair is not compared with the first.
    both = torch.cat([query, query + 1]), torch.cat([query, query - 1])
    found = marginal(*both, valid.expand(2, -1, -1), valid.expand(2, -1, -1))
    assert found[0] < 1e-10 < found[1]


def test_padded_steps_belong_to_no_distribution():
    query, key, valid = vectors(1, 3, 6, 5), vectors(1, 3, 6, 5, seed=1), torch.ones(1, 3, 6) > 0
    expected = marginal(query[:, :, :4], key, valid[:, :, :4], valid)
    valid_query = valid.clone()
    valid_query[:, :, 4:] = False
    torch.testing.assert_close(marginal(query, key, valid_query, valid), expected)
    torch.testing.assert_close(marginal(key, query, valid, valid_query), expected)


def test_chosen_pairs_are_drawn_together_and_no_others():
    query, key = vectors(2, 3, 4, 5).requires_grad_(), vectors(2, 3, 6, 5, seed=1)
    chosen = torch.zeros(2, 3, 4, 6, dtype=torch.bool)
    assert torch.equal(correlated(query, key, chosen), torch.zeros(2))
    chosen[0, 1, 2, 5] = True
    found = correlated(query, key, chosen)
    expected = 1 - torch.cosine_similarity(query[0, 1, 2], key[0, 1, 5], dim=0)
    torch.testing.assert_close(found, torch.stack([expected, torch.zeros(())]))
    (gradient,) = torch.autograd.grad(found.sum(), query)
    assert gradient[0, 1, 2].any()
    gradient[0, 1, 2] = 0
    assert not gradient.any()
    assert correlated(key, 3 * key, torch.eye(6).expand(2, 3, 6, 6) > 0).max() < 1e-6


@pytest.mark.parametrize("lengths", [(5, 5, 5), (5, 8, 7)])
@pytest.mark.parametrize("causal", [False, True])
def test_with_the_same_weights_mica_predicts_what_mult_predicts(lengths, causal):
    mica = model("mica", lengths=lengths, causal=causal).eval()
    mult = model("mult", lengths=lengths, causal=causal).eval()
    mult.load_state_dict(mica.state_dict())
    batch = clips("mica")
    features = [x[:, :n] for x, n in zip(batch.features, lengths, strict=True)]
    batch = Batch(*features, batch.lengths.minimum(torch.tensor(lengths)))
    torch.testing.assert_close(mica(batch).prediction, mult(batch).prediction)


def test_alignment_uses_the_queries_and_keys_of_the_attention():
    """Equal ones give no loss: the same features on both sides, one map for query and key."""
    net = model("mica").eval()
    layer = net.crossmodal.layers[0]
    x, valid = vectors(6, 4, 7, 30), torch.ones(6, 4, 7, dtype=torch.bool)
    arguments = layer, x, x, valid[:, :, None, None, :], (valid, valid)
    assert net.alignment(*arguments)[0].min() > 1e-3
    with torch.no_grad():
        layer.attention.key_value.weight[:, :, :30] = layer.attention.query.weight
        layer.attention.key_value.bias[:, :, :30] = layer.attention.query.bias
    assert net.alignment(*arguments)[0].max() < 1e-10


def test_confident_pairs_are_those_that_attend_most_and_lie_closest():
    net, batch = model("mica", correlated=1.0).eval(), clips("mica")
    found = []
    for net.confidence in (0.0, 1.2, 100.0):
        found.append(net(batch).extra_losses["correlated"].item())
    assert found[0] > found[1] > found[2] == 0
    # Without a preference every pair has just the weight of all others, however many there are.
    for layer in net.crossmodal.layers:
        nn.init.zeros_(layer.attention.query.weight)
        nn.init.zeros_(layer.attention.query.bias)
    for net.confidence, some in ((0.99, True), (1.01, False)):
        assert (net(batch).extra_losses["correlated"] > 0) == some


def test_the_losses_do_not_see_padding():
    net, batch = model("mica").eval(), clips("mica")
    expected = net(batch).extra_losses
    loud = [x.clone() for x in batch.features]
    for x, valid in zip(loud, batch.lengths.T, strict=True):
        x[torch.arange(x.shape[1]) >= valid[:, None]] = 1e3
    found = net(Batch(*loud, batch.lengths)).extra_losses
    rest = batch[1:]
    longest = rest.lengths.amax(dim=0)
    trimmed = [x[:, :n] for x, n in zip(rest.features, longest, strict=True)]
    for name in ("marginal", "correlated"):
        torch.testing.assert_close(found[name], expected[name])
        torch.testing.assert_close(
            net(Batch(*trimmed, rest.lengths)).extra_losses[name], net(rest).extra_losses[name]
        )
