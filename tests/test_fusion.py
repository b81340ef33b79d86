"""The fusion: gates that multiply or replace, a prediction to which every part counts."""

import pytest
import torch

from dmd.fusion import AdaptiveFusion, ResidualRegressor

WIDTHS = (6, 4, 3, 2)


def fusion(dropout=0.0, seed=0, **options):
    torch.manual_seed(seed)
    return AdaptiveFusion(WIDTHS, dropout, **options).double()


def parts(clips=3, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(clips, w, dtype=torch.float64, generator=generator) for w in WIDTHS]


def without_residual(model):
    """The same fusion with a residual network that adds nothing: the gated parts are visible."""
    with torch.no_grad():
        model.residual[-1].weight.zero_()
        model.residual[-1].bias.zero_()
    return model


def test_the_fused_features_are_the_parts_times_their_gates():
    model, xs = without_residual(fusion()), parts()
    _, fused = model(xs)
    gates = [
        1 / (1 + torch.exp(-(x @ gate.weight.T + gate.bias)))
        for x, gate in zip(xs, model.gates, strict=True)
    ]
    expected = torch.cat([x * g for x, g in zip(xs, gates, strict=True)], dim=1)
    torch.testing.assert_close(fused, expected)


def test_a_part_of_zeros_stays_zero_whatever_its_gate_says():
    """A gate that replaced the features instead of multiplying them would give one half here."""
    _, fused = without_residual(fusion())([0 * x for x in parts()])
    assert not fused.any()


def test_gates_may_replace_the_features():
    """Then a part is known by its gate alone: zeros become what the bias says."""
    for xs in (parts(), [0 * x for x in parts()]):
        model = without_residual(fusion(gates="replace"))
        _, fused = model(xs)
        gates = [
            1 / (1 + torch.exp(-(x @ gate.weight.T + gate.bias)))
            for x, gate in zip(xs, model.gates, strict=True)
        ]
        torch.testing.assert_close(fused, torch.cat(gates, dim=1))


def test_gates_that_replace_have_the_same_parameters_and_prediction_from_what_is_fused():
    model, plain = fusion(gates="replace"), fusion()
    assert model.state_dict().keys() == plain.state_dict().keys()
    prediction, fused = model(parts())
    torch.testing.assert_close(prediction, fused @ model.regressor.weight[0] + model.regressor.bias)
    assert not torch.allclose(fused, plain(parts())[1])
    assert (without_residual(model)(parts())[1] > 0).all()


def test_the_residual_network_adds_to_what_the_regressor_sees():
    model, xs = fusion(), parts()
    prediction, fused = model(xs)
    _, gated = without_residual(fusion())(xs)
    first, last = model.residual[0], model.residual[-1]
    added = (gated @ first.weight.T + first.bias).clamp_min(0) @ last.weight.T + last.bias
    torch.testing.assert_close(fused, gated + added)
    torch.testing.assert_close(prediction, fused @ model.regressor.weight[0] + model.regressor.bias)
    assert prediction.shape == (3,)


@pytest.mark.parametrize("gates", ["multiply", "replace"])
@pytest.mark.parametrize("part", range(len(WIDTHS)))
def test_each_part_matters_to_its_own_clip_only(part, gates):
    model, xs = fusion(gates=gates), parts()
    before, _ = model(xs)
    xs[part][1] += 1.0
    after, _ = model(xs)
    changed = ~torch.isclose(before, after)
    assert changed.tolist() == [False, True, False]


@pytest.mark.parametrize("gates", ["multiply", "replace"])
def test_every_parameter_gets_a_gradient(gates):
    model = fusion(gates=gates)
    model(parts())[0].sum().backward()
    assert all(x.grad.any() for x in model.parameters())


def test_dropout_acts_in_training_only():
    model, xs = fusion(dropout=0.5), parts()
    assert not torch.equal(model(xs)[0], model(xs)[0])
    model.eval()
    assert torch.equal(model(xs)[0], fusion()(xs)[0])


def test_a_missing_part_is_refused():
    with pytest.raises(ValueError, match=r"longer|shorter"):
        fusion()(parts()[:3])


@pytest.mark.parametrize("gates", ["multiply", "replace"])
def test_gradcheck(gates):
    model, xs = fusion(gates=gates), [x.requires_grad_() for x in parts(clips=2)]
    assert torch.autograd.gradcheck(lambda *xs: model(xs), xs)


# The residual network on its own


def residual(dropout=0.0, seed=0):
    torch.manual_seed(seed)
    return ResidualRegressor(4, 3, dropout).double()


def test_the_residual_regressor_is_written_out():
    model, (_, x, *_) = residual(), parts()
    prediction, refined, hidden = model(x)
    first, last = model.residual[0], model.residual[-1]
    expected = (x @ first.weight.T + first.bias).clamp_min(0)
    torch.testing.assert_close(hidden, expected)
    torch.testing.assert_close(refined, x + expected @ last.weight.T + last.bias)
    torch.testing.assert_close(
        prediction, refined @ model.regressor.weight[0] + model.regressor.bias
    )
    assert (prediction.shape, refined.shape, hidden.shape) == ((3,), (3, 4), (3, 3))


def test_the_inner_layer_comes_before_the_dropout():
    model, (_, x, *_) = residual(dropout=0.5), parts()
    hidden = [model(x)[2] for _ in range(2)]
    refined = [model(x)[1] for _ in range(2)]
    assert torch.equal(*hidden)
    assert not torch.equal(*refined)
    assert torch.equal(model.eval()(x)[1], residual()(x)[1])
