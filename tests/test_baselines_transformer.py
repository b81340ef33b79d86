"""What is particular to MulT, to MulT with a GD-Unit, and to MISA."""

import pytest
import torch
from torch.testing import assert_close

from dmd import Batch
from dmd.baselines import build
from dmd.baselines.misa import central_moment_discrepancy, difference
from dmd.model import PAIRS

WIDTHS, ALIGNED, UNALIGNED = (6, 5, 4), (5, 5, 5), (5, 8, 7)
LENGTHS = torch.tensor([[5, 8, 7], [3, 2, 6], [4, 5, 1], [1, 7, 4]])
LABEL = torch.tensor([-2.0, -0.4, 0.6, 3.0])


def model(name, lengths=UNALIGNED, **options):
    torch.manual_seed(0)
    return build(name, WIDTHS, lengths, **options).eval()


def clips(steps=UNALIGNED, lengths=LENGTHS, label=LABEL):
    rng = torch.Generator().manual_seed(1)
    features = [torch.randn(4, t, d, generator=rng) for t, d in zip(steps, WIDTHS, strict=True)]
    return Batch(*features, lengths, label)


def with_step_changed(batch, modality, step):
    """The batch with another vector at one step of one modality; step: an index a clip or one."""
    features = [x.clone() for x in batch.features]
    features[modality][torch.arange(len(batch)), step] += 1.0
    return Batch(*features, batch.lengths, batch.label)


def silence(encoders):
    """Attention that answers nothing: what remains is the way of the target."""
    for layer in encoders.layers:
        for x in layer.attention.output.parameters():
            torch.nn.init.zeros_(x)


# MulT


def test_each_crossmodal_encoder_reads_exactly_its_two_modalities():
    net, batch = model("mult"), clips()
    answers = net.answers(batch.features, batch.masks)
    assert [*answers] == PAIRS and len(answers) == 6
    for (_, target), x in answers.items():
        assert x.shape == (4, UNALIGNED[target], 30)
    for m in range(3):
        changed = with_step_changed(batch, m, 0)
        for pair, x in net.answers(changed.features, changed.masks).items():
            valid = batch.masks[pair[1]]
            moved = (x - answers[pair])[valid].abs().max() > 1e-6
            assert bool(moved) == (m in pair), (m, pair)


def test_the_target_asks_and_the_source_answers():
    """Without an answer only the target is left, also where the lengths agree."""
    net, batch = model("mult", ALIGNED), clips(ALIGNED, None)
    silence(net.crossmodal)
    answers, states = net.answers(batch.features, batch.masks), net.states(batch)
    for m in range(3):
        changed = with_step_changed(batch, m, 0)
        for pair, x in net.answers(changed.features, changed.masks).items():
            assert torch.equal(x, answers[pair]) == (m != pair[1]), (m, pair)
        for target, x in enumerate(net.states(changed)):
            assert torch.equal(x, states[target]) == (m != target), (m, target)


def test_a_state_is_that_of_the_last_valid_step():
    """Without any attention no other step has a way to it."""
    net, batch = model("mult", kernels=(1, 1, 1)), clips()
    silence(net.crossmodal)
    silence(net.memory)
    states = net.states(batch)
    for m in range(3):
        last = LENGTHS[:, m] - 1
        moved = (net.states(with_step_changed(batch, m, last)) - states)[m].abs().amax(dim=1)
        assert (moved > 1e-4).all()
        before = (last - 1).clamp(min=0)
        moved = (net.states(with_step_changed(batch, m, before)) - states)[m].abs().amax(dim=1)
        assert torch.equal(moved > 1e-4, last == 0)  # a single step is also the last


def test_with_attention_a_state_depends_on_every_modality():
    net, batch = model("mult"), clips()
    states = net.states(batch)
    for m in range(3):
        moved = (net.states(with_step_changed(batch, m, 0)) - states).abs().amax(dim=2)
        assert (moved > 1e-6).all(), m


def test_a_causal_encoder_does_not_look_ahead():
    for causal in (True, False):
        net = model("mult", ALIGNED, causal=causal, kernels=(1, 1, 1))
        batch = clips(ALIGNED, None)
        answers = net.answers(batch.features, batch.masks)
        changed = with_step_changed(batch, 1, 3)
        for pair, x in net.answers(changed.features, changed.masks).items():
            if 1 in pair:
                # all steps ask a source, but a changed target is only itself
                looks_ahead = not causal and pair[0] == 1
                same = torch.allclose(x[:, :3], answers[pair][:, :3], atol=1e-6)
                assert same == (not looks_ahead), (pair, causal)
                assert not torch.allclose(x[:, 3], answers[pair][:, 3], atol=1e-6)


def test_the_encoders_on_top_are_at_least_three_layers_deep():
    assert [len(model("mult", layers=n).memory.layers) for n in (1, 3, 4)] == [3, 3, 4]
    assert len(model("mult", layers=1).crossmodal.layers) == 1


@pytest.mark.parametrize("name", ["mult", "mult_gd", "misa"])
def test_heads_that_do_not_divide_the_width_are_one_sentence(name):
    with pytest.raises(ValueError, match="heads=7 must divide dim=30"):
        build(name, WIDTHS, UNALIGNED, dim=30, heads=7)


# MulT with a GD-Unit


def test_the_unit_leaves_the_prediction_to_mult():
    plain, net, batch = model("mult"), model("mult_gd", distillation=0.0, unimodal=0.0), clips()
    with torch.no_grad():  # weights that differ from those of any seed
        for x in plain.parameters():
            x.mul_(1.1)
    missing, unexpected = net.load_state_dict(plain.state_dict(), strict=False)
    assert unexpected == [] and {key.split(".")[0] for key in missing} == {"unit"}
    outputs = [x(batch) for x in (plain, net)]
    assert torch.equal(outputs[0].prediction, outputs[1].prediction)
    for output in outputs:  # with no weight the unit does not change what is learned either
        error = (output.prediction - LABEL).abs().mean()
        (error + sum(output.extra_losses.values())).backward()
    for key, x in plain.named_parameters():
        assert_close(net.get_parameter(key).grad, x.grad, msg=key)


def test_edges_sum_to_one_and_nobody_teaches_itself():
    edges = model("mult_gd").graph(clips()).edges
    assert edges.shape == (4, 3, 3) and (edges >= 0).all()
    assert_close(edges.sum(dim=(1, 2)), torch.ones(4))
    assert (edges.diagonal(dim1=1, dim2=2) == 0).all()


def test_a_distance_moves_the_student_and_not_the_teacher():
    net, batch = model("mult_gd"), clips()
    for i, j in PAIRS:
        graph = net.graph(batch)
        (gradient,) = torch.autograd.grad(graph.distances[:, i, j].sum(), graph.features)
        moved = gradient.abs().sum(dim=(1, 2)) > 0
        assert [n for n in range(3) if moved[n]] == [j]


def test_the_unit_reads_the_states_that_mult_predicts_from():
    net, batch = model("mult_gd"), clips()
    graph = net.graph(batch)
    assert_close(graph.features, net.states(batch))
    assert graph.features.shape == (3, 4, 60)
    assert_close(net(batch).prediction, net.predict(graph.features))


def test_the_losses_by_hand_and_their_weights():
    net, batch = model("mult_gd"), clips()
    with torch.no_grad():
        net.unit.edge.weight.mul_(20)  # edges that differ
        graph = net.graph(batch)
        distil = unimodal = 0.0
        for b in range(4):
            for i, j in PAIRS:
                distil += graph.edges[b, i, j] * (graph.logits[i, b] - graph.logits[j, b]).abs() / 4
            for m in range(3):
                unimodal += (graph.logits[m, b] - LABEL[b]).abs() / 4
        losses = net(batch).extra_losses
        assert_close(losses, {"distillation": 0.05 * distil, "unimodal": unimodal})
        net.weights = {"distillation": 2.0, "unimodal": 0.5}
        losses = net(batch).extra_losses
        assert_close(losses, {"distillation": 2 * distil, "unimodal": 0.5 * unimodal})
        without = net(clips(label=None)).extra_losses
    assert [*without] == ["distillation"]


def test_the_regressor_of_the_unit_learns_without_distillation():
    net, batch = model("mult_gd", distillation=0.0), clips()
    output = net(batch)
    sum(output.extra_losses.values()).backward()
    assert net.unit.regressor.weight.grad.abs().sum() > 0
    assert net.unit.edge.weight.grad.abs().sum() == 0
    assert net.crossmodal.norm.weight.grad.abs().sum() > 0  # as a task loss of DMD's heads does


# MISA

# Signs over four clips: mean zero, and orthogonal to each other.
FIRST, SECOND = torch.tensor([1.0, 1, -1, -1]), torch.tensor([1.0, -1, 1, -1])


def outer(signs, direction):
    """A vector a clip: the direction or its opposite, (4, 3)."""
    return signs[:, None] * torch.tensor(direction)


def test_the_difference_loss_is_zero_for_representations_orthogonal_over_the_clips():
    x, y = outer(FIRST, [1.0, 2, 3]), outer(SECOND, [1.0, 2, 3])
    assert difference(x, y) == 0
    assert difference(x + 5, 3 * y - 1) == pytest.approx(0, abs=1e-12)  # centred first
    # At right angles clip by clip is something else: channels of both go together.
    x, y = outer(FIRST, [1.0, 0, 0]), outer(FIRST, [0.0, 1, 0])
    assert difference(x, y) == pytest.approx(4**2 / 9)


def test_the_difference_loss_by_hand():
    rng = torch.Generator().manual_seed(0)
    x, y = torch.randn(2, 6, 3, dtype=torch.float64, generator=rng)
    total, (a, b) = 0.0, (z - z.mean(dim=0) for z in (x, y))
    for i in range(3):
        for j in range(3):
            terms = [a[n, i] / a[n].norm() * b[n, j] / b[n].norm() for n in range(6)]
            total += float(sum(terms)) ** 2 / 9
    assert difference(x, y).item() == pytest.approx(total)
    assert difference(7 * x + 1, y).item() == pytest.approx(total)


def test_the_discrepancy_is_zero_for_equal_samples_with_a_finite_gradient():
    x = torch.rand(6, 3, generator=torch.Generator().manual_seed(0)).requires_grad_()
    loss = central_moment_discrepancy(x, x.detach())
    loss.backward()
    assert loss == 0 and torch.isfinite(x.grad).all()
    # samples of a distribution have no order
    assert central_moment_discrepancy(x, x[[3, 1, 5, 0, 2, 4]]).item() == pytest.approx(0, abs=1e-6)


def test_the_discrepancy_by_hand():
    wide, narrow = torch.tensor([[0.1], [0.9]]), torch.tensor([[0.4], [0.6]])
    # means and odd moments agree; the second moments are 0.16 and 0.01, the fourth their squares
    expected = (0.16 - 0.01) + (0.16**2 - 0.01**2)
    assert central_moment_discrepancy(wide, narrow) == pytest.approx(expected)
    assert central_moment_discrepancy(wide, narrow, 3) == pytest.approx(0.15)
    assert central_moment_discrepancy(wide, narrow, 1) == pytest.approx(0, abs=1e-7)
    # two channels: the length of the vector of gaps, not their sum
    two = [torch.cat([x, x], dim=1) for x in (wide, narrow)]
    assert central_moment_discrepancy(*two) == pytest.approx(expected * 2**0.5)
    skewed, mirrored = torch.tensor([[0.2], [0.2], [0.8]]), torch.tensor([[0.6], [0.6], [0.0]])
    third = 2 * abs(2 * (-0.2) ** 3 + 0.4**3) / 3
    assert central_moment_discrepancy(skewed, mirrored, 3) == pytest.approx(third)


def test_one_shared_encoder_and_a_private_one_each():
    net = model("misa")
    same = torch.rand(1, 4, 64).expand(3, -1, -1)
    shared, private = net.split(same)
    assert_close(shared[0], shared[1])
    assert_close(shared[0], shared[2])
    for m, n in ((0, 1), (0, 2), (1, 2)):
        assert (private[m] - private[n]).abs().max() > 1e-3
    assert shared.min() > 0 and shared.max() < 1  # where the moments are compared


def test_every_pair_has_its_loss_and_no_other():
    """Each time one pair of representations goes together, all others are orthogonal or still."""
    net = model("misa", dim=2, heads=1)
    still = torch.full((3, 4, 2), 0.5)
    down = torch.tensor([0.2, 0.1])

    def swinging(*modalities, signs=FIRST):
        x = still.clone()
        x[[*modalities]] += signs[:, None] * down
        return x

    def loss(name, shared, private):
        return float(net.losses(still, shared, private)[name])

    for m in range(3):
        assert loss("difference", swinging(m), still) == pytest.approx(0, abs=1e-9)
        assert loss("difference", swinging(m), swinging(m)) > 1
        for n in range(m):
            assert loss("difference", still, swinging(m, n)) > 1
            # the shared part of one and the private one of another may go together
            assert loss("difference", swinging(m), swinging(n)) == pytest.approx(0, abs=1e-9)
        assert loss("difference", swinging(m), swinging(m, signs=SECOND)) < 1e-9
        apart = 2 * central_moment_discrepancy(swinging(m)[m], still[m]) / 3  # two of three pairs
        assert loss("similarity", swinging(m), still) == pytest.approx(apart.item())
        assert apart > 0.01
        assert loss("similarity", still, swinging(m)) == 0
    assert loss("similarity", swinging(0, 1, 2), still) == 0


def test_a_decoder_rebuilds_the_vector_from_the_sum_of_its_parts():
    net = model("misa")
    shared, private = net.split(torch.rand(3, 4, 64))
    vectors = torch.stack([net.decoders[m](shared[m] + private[m]) for m in range(3)])
    assert net.losses(vectors, shared, private)["reconstruction"] < 1e-12
    for m in range(3):
        moved = vectors.clone()
        moved[m] += 1.0
        loss = net.losses(moved, shared, private)["reconstruction"]
        assert loss.item() == pytest.approx(1 / 3, rel=1e-4)


def test_losses_have_the_weights_of_the_options():
    options = {"difference": 2.0, "similarity": 3.0, "reconstruction": 5.0}
    net, batch = model("misa", **options), clips()
    vectors = net.vectors(batch)
    plain = net.losses(vectors, *net.split(vectors))
    weighted = {name: options[name] * x for name, x in plain.items()}
    assert_close(net(batch).extra_losses, weighted)
    defaults = {"difference": 0.3, "similarity": 1.0, "reconstruction": 1.0}
    expected = {name: defaults[name] * x for name, x in plain.items()}
    assert_close(model("misa")(batch).extra_losses, expected)


def test_a_vector_is_that_of_its_modality():
    net, batch = model("misa"), clips()
    vectors = net.vectors(batch)
    for m in range(3):
        moved = net.vectors(with_step_changed(batch, m, 0)) - vectors
        assert [n for n in range(3) if moved[n].abs().max() > 1e-6] == [m]


def test_the_prediction_reads_every_part():
    net, batch = model("misa"), clips()
    vectors = net.vectors(batch)
    shared, private = (x.detach().requires_grad_() for x in net.split(vectors))
    net.split = lambda _: (shared, private)
    net(batch).prediction.sum().backward()
    for x in (shared, private):
        assert (x.grad.abs().sum(dim=2) > 0).all()  # of each modality and clip


def test_a_batch_of_one_clip_has_finite_gradients():
    net = model("misa").train()
    output = net(clips()[:1])
    (output.prediction.sum() + sum(output.extra_losses.values())).backward()
    assert all(torch.isfinite(x.grad).all() for x in net.parameters())
