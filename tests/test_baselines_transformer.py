"""What is particular to MulT, and to MulT with a GD-Unit."""

import pytest
import torch
from torch.testing import assert_close

from dmd import Batch
from dmd.baselines import build
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


@pytest.mark.parametrize("name", ["mult", "mult_gd"])
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
