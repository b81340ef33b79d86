"""The fusion: gates that multiply, and a prediction to which every part counts."""

import pytest
import torch

from dmd.fusion import AdaptiveFusion

WIDTHS = (6, 4, 3, 2)


def fusion(dropout=0.0, seed=0):
    torch.manual_seed(seed)
    return AdaptiveFusion(WIDTHS, dropout).double()


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


def test_the_residual_network_adds_to_what_the_regressor_sees():
    model, xs = fusion(), parts()
    prediction, fused = model(xs)
    _, gated = without_residual(fusion())(xs)
    first, last = model.residual[0], model.residual[-1]
    added = (gated @ first.weight.T + first.bias).clamp_min(0) @ last.weight.T + last.bias
    torch.testing.assert_close(fused, gated + added)
    torch.testing.assert_close(prediction, fused @ model.regressor.weight[0] + model.regressor.bias)
    assert prediction.shape == (3,)


@pytest.mark.parametrize("part", range(len(WIDTHS)))
def test_each_part_matters_to_its_own_clip_only(part):
    model, xs = fusion(), parts()
    before, _ = model(xs)
    xs[part][1] += 1.0
    after, _ = model(xs)
    changed = ~torch.isclose(before, after)
    assert changed.tolist() == [False, True, False]


def test_every_parameter_gets_a_gradient():
    model = fusion()
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


def test_gradcheck():
    model, xs = fusion(), [x.requires_grad_() for x in parts(clips=2)]
    assert torch.autograd.gradcheck(lambda *xs: model(xs), xs)
