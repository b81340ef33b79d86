"""The shallow encoders and the decoupling: Eqs. 1 to 3 wired as the paper has it."""

import warnings

import pytest
import torch

from dmd.batch import MODALITIES, padding_mask
from dmd.decoupling import Decoupling, ShallowEncoder, shorten

DIM = 4
STEPS = (3, 5, 2)
PARTS = ("common", "private", "reconstructed", "private_again")


def randn(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=torch.float64, generator=generator)


def decoupling(seed=0):
    torch.manual_seed(seed)
    return Decoupling(DIM).double()


def shallow_features():
    return [randn(2, steps, DIM, seed=m) for m, steps in enumerate(STEPS)]


# The shallow encoders


def encoder(width=3, kernel=3, seed=0, **options):
    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch remarks on the cost of even kernels
        return ShallowEncoder(width, DIM, kernel, **options).double()


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize("steps", [1, 2, 7])
@pytest.mark.parametrize("kernel", [1, 2, 3, 4, 5])
def test_the_convolution_keeps_the_number_of_steps(kernel, steps):
    x, mask = randn(2, steps, 3), torch.ones(2, steps, dtype=torch.bool)
    assert encoder(kernel=kernel)(x, mask).shape == (2, steps, DIM)


@pytest.mark.parametrize("kernel", [1, 3, 5])
def test_the_convolution_equals_a_loop_over_neighbours(kernel):
    net, x = encoder(kernel=kernel), randn(1, 6, 3)
    found = net(x, torch.ones(1, 6, dtype=torch.bool))[0]
    weight = net.convolution.weight  # (dim, width, kernel)
    for t in range(6):
        expected = torch.zeros(DIM, dtype=torch.float64)
        for k in range(kernel):
            if 0 <= (neighbour := t + k - kernel // 2) < 6:
                expected += weight[:, :, k] @ x[0, neighbour]
        torch.testing.assert_close(found[t], expected)


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize("garbage", [1e30, float("inf"), float("nan")])
@pytest.mark.parametrize("kernel", [1, 4, 5])
def test_padding_has_no_influence_and_stays_zero(kernel, garbage):
    net, lengths = encoder(kernel=kernel), torch.tensor([2, 5])
    mask = padding_mask(lengths, 5)
    x = randn(2, 5, 3).masked_fill(~mask[:, :, None], garbage).requires_grad_()
    found = net(x, mask)
    torch.testing.assert_close(found[:1, :2], net(x[:1, :2], mask[:1, :2]))
    assert not found[~mask].any()
    found.square().sum().backward()
    assert torch.isfinite(x.grad).all()
    assert not x.grad[~mask].any()
    assert torch.isfinite(net.convolution.weight.grad).all()


def test_a_padded_step_does_not_leak_out_of_the_kernel():
    """Zero where padded, although the kernel at a padded step still sees valid ones."""
    mask = padding_mask(torch.tensor([2]), 5)
    assert encoder(kernel=5)(randn(1, 5, 3), mask)[0, :2].all()
    assert not encoder(kernel=5)(randn(1, 5, 3), mask)[0, 2:].any()


# Without padding under the kernel


@pytest.mark.parametrize("kernel", [1, 2, 3, 5])
def test_a_valid_step_is_a_window_that_lies_inside_the_sequence(kernel):
    net, x = encoder(kernel=kernel, padding="valid"), randn(2, 6, 3)
    found = net(x, torch.ones(2, 6, dtype=torch.bool))
    assert found.shape == (2, 6 - kernel + 1, DIM)
    assert net.lost == kernel - 1
    weight = net.convolution.weight  # (dim, width, kernel)
    for t in range(found.shape[1]):
        expected = sum(x[:, t + k] @ weight[:, :, k].T for k in range(kernel))
        torch.testing.assert_close(found[:, t], expected)


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize("kernel", [1, 3, 4, 5])
def test_valid_padding_keeps_the_inner_steps_of_same_padding(kernel):
    x, mask = randn(2, 6, 3), torch.ones(2, 6, dtype=torch.bool)
    same, valid = (encoder(kernel=kernel, padding=p)(x, mask) for p in ("same", "valid"))
    before = (kernel - 1) // 2  # steps of the window before the one that it stands for
    torch.testing.assert_close(valid, same[:, before : before + 6 - kernel + 1])


@pytest.mark.parametrize("garbage", [1e30, float("inf"), float("nan")])
@pytest.mark.parametrize("kernel", [1, 3, 4])
def test_of_a_padded_clip_the_windows_inside_it_remain_and_at_least_one(kernel, garbage):
    net, lengths = encoder(kernel=kernel, padding="valid"), torch.tensor([6, 5, 2, 1])
    mask = padding_mask(lengths, 6)
    x = randn(4, 6, 3).masked_fill(~mask[:, :, None], garbage).requires_grad_()
    found, rest = net(x, mask), shorten(mask, net.lost)
    assert rest.sum(dim=1).tolist() == [max(int(n) - kernel + 1, 1) for n in lengths]
    assert torch.equal(rest, padding_mask(rest.sum(dim=1), 6 - kernel + 1))  # the first ones
    assert not found[~rest].any()
    clean = torch.where(mask[:, :, None], x.detach(), 0)
    for b, t in rest.nonzero().tolist():
        expected = (clean[b, t : t + kernel].T * net.convolution.weight).sum(dim=(1, 2))
        torch.testing.assert_close(found[b, t], expected)
    found.square().sum().backward()
    assert torch.isfinite(x.grad).all()
    assert not x.grad[~mask].any()


@pytest.mark.parametrize(
    ("lost", "expected"),
    [(0, [3, 1, 5]), (1, [2, 1, 4]), (3, [1, 1, 2]), (4, [1, 1, 1])],
)
def test_shorten_takes_steps_from_every_clip_and_leaves_one(lost, expected):
    mask = shorten(padding_mask(torch.tensor([3, 1, 5]), 5), lost)
    assert torch.equal(mask, padding_mask(torch.tensor(expected), 5 - lost))


@pytest.mark.parametrize("padding", ["same", "valid"])
def test_features_of_the_right_width_are_left_as_they_are_if_so_configured(padding):
    mask = padding_mask(torch.tensor([2, 5]), 5)
    x = randn(2, 5, DIM)
    net = encoder(width=DIM, padding=padding, skip_equal=True)
    assert net.lost == 0
    assert torch.equal(net(x, mask), x * mask[:, :, None])
    other = encoder(width=DIM, padding=padding, skip_equal=False)
    assert other.lost == (2 if padding == "valid" else 0)
    assert not torch.allclose(other(x, mask)[:, :3], x[:, :3])


def test_features_of_another_width_are_not_skipped():
    x, mask = randn(2, 5, 3), torch.ones(2, 5, dtype=torch.bool)
    plain, skipping = (encoder(skip_equal=skip)(x, mask) for skip in (False, True))
    assert torch.equal(plain, skipping)


# Eqs. (1) to (3)


def test_the_parts_are_those_of_the_equations():
    model, xs = decoupling(), shallow_features()
    parts = model(xs)
    for m, x in enumerate(xs):
        shared, private = model.common_encoder.weight, model.private_encoders[m].weight
        common, exclusive = x @ shared.T, x @ private.T
        rebuilt = torch.cat([common, exclusive], dim=2) @ model.decoders[m].weight.T
        torch.testing.assert_close(parts.common[m], common)
        torch.testing.assert_close(parts.private[m], exclusive)
        torch.testing.assert_close(parts.reconstructed[m], rebuilt)
        torch.testing.assert_close(parts.private_again[m], rebuilt @ private.T)


def test_the_common_encoder_is_shared_and_the_private_ones_are_not():
    x = randn(2, 3, DIM)
    parts = decoupling()([x, x, x])
    assert torch.equal(parts.common.language, parts.common.visual)
    assert torch.equal(parts.common.language, parts.common.acoustic)
    for name in PARTS[1:]:
        language, visual, acoustic = getattr(parts, name)
        assert not torch.allclose(language, visual)
        assert not torch.allclose(visual, acoustic)
        assert not torch.allclose(language, acoustic)


@pytest.mark.parametrize("m", range(3))
def test_each_network_reaches_its_own_quantities_only(m):
    def nonzero(part, modality):
        model = decoupling()
        getattr(model(shallow_features()), part)[modality].square().sum().backward()
        return {name for name, x in model.named_parameters() if x.grad is not None}

    shared, private = "common_encoder.weight", f"private_encoders.{m}.weight"
    decoder = f"decoders.{m}.weight"
    assert nonzero("common", m) == {shared}
    assert nonzero("private", m) == {private}
    assert nonzero("reconstructed", m) == {shared, private, decoder}
    assert nonzero("private_again", m) == {shared, private, decoder}


def test_zero_steps_stay_zero_in_every_part():
    xs = shallow_features()
    masks = [padding_mask(torch.tensor([1, 2]), steps) for steps in STEPS]
    parts = decoupling()([x.masked_fill(~m[:, :, None], 0) for x, m in zip(xs, masks, strict=True)])
    for name in PARTS:
        for x, mask in zip(getattr(parts, name), masks, strict=True):
            assert not x[~mask].any()
            assert x[mask].all()


def test_steps_do_not_mix():
    xs = shallow_features()
    whole = decoupling()(xs)
    alone = decoupling()([x[:, 1:2] for x in xs])
    for name in PARTS:
        for all_steps, one in zip(getattr(whole, name), getattr(alone, name), strict=True):
            torch.testing.assert_close(all_steps[:, 1:2], one)


def test_every_modality_is_needed():
    with pytest.raises(ValueError, match=r"longer|shorter"):
        decoupling()(shallow_features()[: len(MODALITIES) - 1])
