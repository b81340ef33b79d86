"""The graph distillation unit: Eqs. 7 and 8 against a loop over the pairs, and what flows where."""

import itertools
import math

import pytest
import torch

from dmd import GDUnit, losses

WIDTH, CLIPS = 4, 3


def unit(modalities=3, seed=0, **options):
    torch.manual_seed(seed)
    return GDUnit(WIDTH, modalities, **options).double()


def vectors(modalities=3, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(modalities, CLIPS, WIDTH, dtype=torch.float64, generator=generator)


def loop(unit, features, temperature=1.0):
    """Logits, edges and distances of one clip after another, in lists of plain numbers."""
    theta1, bias1 = unit.regressor.weight[0].tolist(), unit.regressor.bias.item()
    theta2, bias2 = unit.edge.weight[0].tolist(), unit.edge.bias.item()
    count = len(features)
    logits, edges, distances = [], [], []
    for b in range(features.shape[1]):
        x = features[:, b].tolist()
        f = [sum(w * a for w, a in zip(theta1, row, strict=True)) + bias1 for row in x]
        score = {}
        for i in range(count):
            for j in range(count):
                if i != j:
                    joined = [f[i], *x[i], f[j], *x[j]]
                    score[i, j] = sum(w * a for w, a in zip(theta2, joined, strict=True)) + bias2
        total = sum(math.exp(s / temperature) for s in score.values())
        weight = {pair: math.exp(s / temperature) / total for pair, s in score.items()}
        logits.append(f)
        edges.append([[weight.get((i, j), 0.0) for j in range(count)] for i in range(count)])
        distances.append([[abs(f[i] - f[j]) for j in range(count)] for i in range(count)])
    return (torch.tensor(x, dtype=torch.float64) for x in (logits, edges, distances))


@pytest.mark.parametrize("temperature", [1.0, 0.3])
@pytest.mark.parametrize("modalities", [2, 3, 5])
def test_the_unit_equals_a_loop_over_clips_and_pairs(modalities, temperature):
    features = vectors(modalities)
    gd = unit(modalities, edge_temperature=temperature)
    logits, edges, distances = loop(gd, features, temperature)
    output = gd(features)
    torch.testing.assert_close(output.logits, logits.T)
    torch.testing.assert_close(output.edges, edges)
    torch.testing.assert_close(output.distances, distances)
    assert output.features is features


@pytest.mark.parametrize("modalities", [2, 3, 5])
def test_the_edges_of_a_clip_sum_to_one_and_none_leads_home(modalities):
    edges = unit(modalities)(100 * vectors(modalities)).edges
    torch.testing.assert_close(edges.sum(dim=(1, 2)), torch.ones(CLIPS, dtype=torch.float64))
    assert not edges.diagonal(dim1=1, dim2=2).any()
    assert (edges >= 0).all()


def test_the_sum_to_one_is_over_all_edges_not_over_rows_or_columns():
    edges = unit()(vectors()).edges
    for axis in (1, 2):
        assert (edges.sum(dim=axis) < 0.99).all()


def test_an_edge_has_a_direction():
    edges = unit()(vectors()).edges
    assert not torch.allclose(edges, edges.transpose(1, 2))


@pytest.mark.parametrize("order", [[1, 0, 2], [2, 0, 1]])
def test_permuting_the_modalities_permutes_everything(order):
    gd, features = unit(), vectors()
    plain, permuted = gd(features), gd(features[order])
    torch.testing.assert_close(permuted.logits, plain.logits[order])
    torch.testing.assert_close(permuted.edges, plain.edges[:, order][:, :, order])
    torch.testing.assert_close(permuted.distances, plain.distances[:, order][:, :, order])


def test_clips_do_not_mix():
    gd, features = unit(), vectors()
    whole = gd(features)
    for b in range(CLIPS):
        alone = gd(features[:, b : b + 1])
        torch.testing.assert_close(alone.edges[0], whole.edges[b])
        torch.testing.assert_close(alone.distances[0], whole.distances[b])


def test_a_low_temperature_chooses_one_edge_and_a_high_one_none():
    features = vectors()
    sharp = unit(edge_temperature=1e-3)(features).edges.flatten(1)
    torch.testing.assert_close(sharp.amax(dim=1), torch.ones(CLIPS, dtype=torch.float64))
    flat = unit(edge_temperature=1e6)(features).edges
    torch.testing.assert_close(flat[:, 0, 1], torch.full((CLIPS,), 1 / 6, dtype=torch.float64))


# Gradients


def test_the_distillation_loss_trains_theta_1_and_theta_2():
    gd = unit()
    output = gd(vectors())
    losses.distillation(output.edges, output.distances).backward()
    assert gd.regressor.weight.grad.any()
    assert gd.edge.weight.grad.any()


@pytest.mark.parametrize("stop", [True, False])
def test_a_distance_moves_its_student_and_its_teacher_only_without_the_stop(stop):
    gd = unit(stop_teacher_gradient=stop)
    logits = vectors()[:, :, 0].clone().requires_grad_()
    distances = gd.distances(logits)
    for teacher in range(3):
        for student in range(3):
            if teacher != student:
                (slope,) = torch.autograd.grad(
                    distances[0, teacher, student], logits, retain_graph=True
                )
                sign = torch.sign(logits[student, 0] - logits[teacher, 0]).item()
                expected = torch.zeros(3, CLIPS, dtype=torch.float64)
                expected[student, 0] = sign
                expected[teacher, 0] = 0.0 if stop else -sign
                assert torch.equal(slope, expected)


def test_the_stop_changes_no_value():
    features = vectors()
    stopped, free = (unit(stop_teacher_gradient=stop)(features) for stop in (True, False))
    assert torch.equal(stopped.distances, free.distances)
    assert torch.equal(stopped.edges, free.edges)


def test_the_default_stops_the_teacher():
    assert unit().stop_teacher_gradient


def test_gradcheck():
    """Without the stop, whose gradient is not that of the values by design."""
    gd = unit(stop_teacher_gradient=False, edge_temperature=0.7)

    def parts(features, theta1, theta2):
        names = {"regressor.weight": theta1, "edge.weight": theta2}
        output = torch.func.functional_call(gd, names, (features,))
        return output.logits, output.edges, output.distances.triu(1), output.distances.tril(-1)

    inputs = (vectors(), gd.regressor.weight.detach(), gd.edge.weight.detach())
    assert torch.autograd.gradcheck(parts, [x.clone().requires_grad_() for x in inputs])


# Without distillation, and bad input


def test_without_distillation_the_regressor_remains():
    gd = unit(distil=False)
    assert {name for name, _ in gd.named_parameters()} == {"regressor.weight", "regressor.bias"}
    features = vectors()
    output = gd(features)
    assert torch.equal(output.edges, torch.zeros(CLIPS, 3, 3, dtype=torch.float64))
    expected = features @ gd.regressor.weight[0] + gd.regressor.bias
    torch.testing.assert_close(output.logits, expected)
    assert output.distances.any()


def test_the_layers_have_the_widths_of_equation_8():
    gd = GDUnit(7)
    assert (gd.regressor.in_features, gd.regressor.out_features) == (7, 1)
    assert (gd.edge.in_features, gd.edge.out_features) == (2 * (7 + 1), 1)


@pytest.mark.parametrize("shape", [(2, CLIPS, WIDTH), (CLIPS, WIDTH), (3, CLIPS, WIDTH + 1)])
def test_features_of_another_shape_are_refused(shape):
    with pytest.raises(ValueError, match=r"expected features of shape \(3, clips, 4\), got \("):
        unit()(torch.zeros(shape, dtype=torch.float64))


@pytest.mark.parametrize("modalities", [1, 0])
def test_a_graph_needs_two_modalities(modalities):
    with pytest.raises(ValueError, match="at least 2 modalities"):
        GDUnit(WIDTH, modalities)


def test_edge_weights_read_the_logits_that_they_are_given():
    features, model = vectors(), unit()
    output = model(features)
    assert torch.equal(model.edge_weights(features, output.logits), output.edges)
    one_moved = output.logits.clone()
    one_moved[0] += 1
    assert not torch.allclose(model.edge_weights(features, one_moved), output.edges)


# Logits from elsewhere


def test_a_unit_without_a_regressor_takes_the_logits_that_it_is_given():
    whole, features = unit(), vectors()
    expected = whole(features)
    bare = unit(regress=False)
    assert {name for name, _ in bare.named_parameters()} == {"edge.weight", "edge.bias"}
    bare.edge.load_state_dict(whole.edge.state_dict())
    found = bare(features, expected.logits)
    assert torch.equal(found.logits, expected.logits)
    assert torch.equal(found.edges, expected.edges)
    assert torch.equal(found.distances, expected.distances)


def test_without_regressor_and_edges_the_distances_remain():
    bare, logits = unit(regress=False, distil=False), vectors()[:, :, 0]
    assert not list(bare.parameters())
    output = bare(vectors(), logits)
    assert not output.edges.any()
    assert float(output.distances[1, 0, 2]) == abs(float(logits[0, 1] - logits[2, 1]))


@pytest.mark.parametrize("regress", [True, False])
def test_logits_and_regressor_exclude_each_other(regress):
    logits = vectors()[:, :, 0] if regress else None
    with pytest.raises(ValueError, match="logits go with a unit that has no regressor") as caught:
        unit(regress=regress)(vectors(), logits)
    assert "\n" not in str(caught.value)


# Hidden channels in g


HIDDEN = 5


def scores(gd, features):
    """log W: what the softmax read, up to one number a clip; (B, M, M), -inf on the diagonal."""
    return gd(features).edges.log() * gd.edge_temperature


@torch.no_grad()
def test_with_hidden_channels_the_unit_equals_a_loop():
    gd, features = unit(edge_hidden=HIDDEN, edge_temperature=0.7), vectors()
    assert gd.edge.in_features == 2 * (HIDDEN + HIDDEN)
    output = gd(features)
    for b in range(CLIPS):
        nodes = []
        for m in range(3):
            logit = features[m, b] @ gd.regressor.weight[0] + gd.regressor.bias
            from_logit = gd.edge_logit.weight[:, 0] * logit + gd.edge_logit.bias
            from_feature = gd.edge_feature.weight @ features[m, b] + gd.edge_feature.bias
            nodes.append(torch.cat([from_logit, from_feature]))
        weight = {
            (i, j): math.exp(
                float(gd.edge.weight[0] @ torch.cat([nodes[i], nodes[j]]) + gd.edge.bias) / 0.7
            )
            for i, j in itertools.permutations(range(3), 2)
        }
        for i, j in itertools.product(range(3), repeat=2):
            expected = weight.get((i, j), 0.0) / sum(weight.values())
            assert float(output.edges[b, i, j]) == pytest.approx(expected, rel=1e-9)


def around(score):
    """Along the edges of a circle of three, minus the same against the edges; (B,)."""
    return sum(score[:, i, (i + 1) % 3] - score[:, (i + 1) % 3, i] for i in range(3))


@pytest.mark.parametrize("hidden", [0, HIDDEN])
@torch.no_grad()
def test_the_score_of_an_edge_is_a_term_of_its_teacher_plus_one_of_its_student(hidden):
    """e_ij = p_i + q_j + const, with hidden channels as without: no pair interacts."""
    score = scores(unit(4, edge_hidden=hidden), vectors(4))
    mixed = score[:, 0, 2] - score[:, 0, 3] - score[:, 1, 2] + score[:, 1, 3]
    torch.testing.assert_close(mixed, torch.zeros_like(mixed), atol=1e-12, rtol=0)
    assert (score[:, 0, 2] - score[:, 0, 3]).abs().min() > 1e-4  # not since all are equal
    three = scores(unit(edge_hidden=hidden), vectors())
    torch.testing.assert_close(around(three), torch.zeros(CLIPS).double(), atol=1e-12, rtol=0)


@torch.no_grad()
def test_one_nonlinearity_after_the_pair_is_joined_makes_it_interact():
    """The tests of additivity can fail: the same unit, with a layer more."""
    gd = unit(edge_hidden=HIDDEN)
    width = gd.edge.in_features
    gd.edge = torch.nn.Sequential(torch.nn.Linear(width, width), torch.nn.ReLU(), gd.edge).double()
    assert around(scores(gd, vectors())).abs().min() > 1e-4


def test_hidden_channels_go_with_the_edges():
    names = {name for name, _ in unit(edge_hidden=HIDDEN, distil=False).named_parameters()}
    assert names == {"regressor.weight", "regressor.bias"}
    full = {name.split(".")[0] for name, _ in unit(edge_hidden=HIDDEN).named_parameters()}
    assert full == {"regressor", "edge", "edge_logit", "edge_feature"}


def test_the_distillation_loss_trains_the_hidden_channels():
    gd = unit(edge_hidden=HIDDEN)
    output = gd(vectors())
    losses.distillation(output.edges, output.distances).backward()
    for layer in (gd.edge, gd.edge_logit, gd.edge_feature):
        assert layer.weight.grad.any()
        # what is added to every score alike cancels in the softmax
        assert layer.bias.grad.abs().max() < 1e-12
