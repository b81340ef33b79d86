"""What every method to compare with must do: masks, order, gradients, learning, and storing."""

import inspect

import pytest
import tiny_runs as tiny
import torch

import dmd
from dmd import Batch
from dmd.baselines import METHODS, NAMES, build

WIDTHS, ALIGNED, UNALIGNED = (6, 5, 4), (5, 5, 5), (5, 8, 7)
every_method = pytest.mark.parametrize("name", NAMES)


def lengths_of(name):
    return ALIGNED if METHODS[name].aligned_only else UNALIGNED


def model(name, lengths=None, **options):
    torch.manual_seed(0)
    return build(name, WIDTHS, lengths or lengths_of(name), **options)


def clips(name, count=6, seed=1, full=False):
    """Clips with padding; the aligned ones have as many steps in all modalities."""
    rng = torch.Generator().manual_seed(seed)
    steps = lengths_of(name)
    features = [torch.randn(count, t, d, generator=rng) for t, d in zip(steps, WIDTHS, strict=True)]
    valid = torch.stack([torch.randint(2, t + 1, (count,), generator=rng) for t in steps], dim=1)
    if METHODS[name].aligned_only:
        valid = valid[:, :1].expand(-1, 3).contiguous()
    valid[0] = torch.tensor(steps)  # one clip fills its steps
    label = torch.linspace(-2, 2, count)
    return Batch(*features, None if full else valid, label, [f"clip{n}" for n in range(count)])


@every_method
def test_the_name_is_documented_with_source_and_adaptations(name):
    text = inspect.getdoc(METHODS[name])
    assert "Faithful:" in text or "after the paper" in text
    assert "Adapted:" in text or "Inferred:" in text
    for option in METHODS[name].options():
        assert f"{option}:" in text or f"{option}," in text, option


@every_method
def test_a_prediction_a_clip_and_extra_losses_that_are_finite_scalars(name):
    output = model(name).train()(clips(name))
    assert output.prediction.shape == (6,)
    for value in output.extra_losses.values():
        assert value.shape == () and torch.isfinite(value) and value >= 0


@every_method
def test_padding_has_no_influence(name):
    """Neither what stands in it, nor how much of it there is."""
    net, batch = model(name).eval(), clips(name)
    expected = net(batch).prediction
    loud = [x.clone() for x in batch.features]
    for x, valid in zip(loud, batch.lengths.T, strict=True):
        x[torch.arange(x.shape[1]) >= valid[:, None]] = 1e3
    found = net(Batch(*loud, batch.lengths)).prediction
    torch.testing.assert_close(found, expected)
    longest = batch.lengths[1:].amax(dim=0)
    rest = [x[1:, :n] for x, n in zip(batch.features, longest, strict=True)]
    if METHODS[name].aligned_only:
        rest = [x[1:, : longest.max()] for x in batch.features]
    found = net(Batch(*rest, batch.lengths[1:])).prediction
    torch.testing.assert_close(found, expected[1:], rtol=1e-4, atol=1e-5)


@every_method
def test_every_valid_step_of_every_modality_counts(name):
    if name == "mctn":
        pytest.skip("MCTN reads language only once it is trained")
    net, batch = model(name).eval(), clips(name)
    expected = net(batch).prediction
    for m in range(3):
        features = [x.clone() for x in batch.features]
        features[m][:, 0] += 1.0
        changed = (net(Batch(*features, batch.lengths)).prediction - expected).abs()
        assert (changed > 1e-7).all(), m


@every_method
def test_clips_do_not_see_each_other_and_their_order_is_theirs(name):
    net, batch = model(name).eval(), clips(name)
    expected = net(batch).prediction
    order = torch.tensor([3, 1, 5, 0, 2, 4])
    torch.testing.assert_close(net(batch[order]).prediction, expected[order], rtol=1e-4, atol=1e-5)
    alone = torch.cat([net(batch[n : n + 1]).prediction for n in range(6)])
    torch.testing.assert_close(alone, expected, rtol=1e-4, atol=1e-5)


@every_method
def test_every_parameter_gets_a_gradient(name):
    """Public code of Graph-MFN hides some from its optimiser, that of RAVEN cuts a branch off."""
    net, batch = model(name).train(), clips(name, count=12)
    seen = {key: False for key, _ in net.named_parameters()}
    for seed in range(3):  # dropout and ReLU may silence one for a batch
        torch.manual_seed(seed)
        net.zero_grad()
        output = net(batch)
        loss = (output.prediction - batch.label).abs().mean()
        (loss + sum(output.extra_losses.values())).backward()
        for key, x in net.named_parameters():
            seen[key] |= x.grad is not None and bool(x.grad.any())
    assert [key for key, has in seen.items() if not has] == []


@every_method
def test_the_same_seed_gives_the_same_model_and_dropout_is_off_in_evaluation(name):
    batch = clips(name)
    one, other = model(name).eval(), model(name).eval()
    assert torch.equal(one(batch).prediction, other(batch).prediction)
    assert torch.equal(one(batch).prediction, one(batch).prediction)


@every_method
def test_a_handful_of_clips_is_learnt_by_heart(name):
    dropouts = {key: 0.0 for key in METHODS[name].options() if "dropout" in key}
    net, batch = model(name, **dropouts).train(), clips(name, count=8, seed=3)
    optimiser = torch.optim.Adam(net.parameters(), lr=5e-3)
    for _ in range(400):
        optimiser.zero_grad()
        output = net(batch)
        error = (output.prediction - batch.label).abs().mean()
        if error < 0.15:
            break
        (error + sum(output.extra_losses.values())).backward()
        optimiser.step()
    assert error < 0.15  # a constant has 1.1


@every_method
def test_training_saving_and_loading(name, tmp_path):
    splits = tiny.splits()
    if METHODS[name].aligned_only:
        splits = dmd.data.load("synthetic")
    torch.manual_seed(0)
    net = build(name, splits.widths, splits.lengths)
    config = tiny.config(epochs=1, batch_size=64)
    history = dmd.Trainer(net, config, output=tmp_path / "run").fit(splits)
    assert history.epochs[0]["edges"] == {}
    loaded, meta = dmd.load_model(tmp_path / "run")
    assert meta["model_config"]["method"] == name
    assert dmd.evaluate(loaded, splits.test) == pytest.approx(history.test)


def test_an_unknown_name_or_option_is_told_the_nearest():
    with pytest.raises(ValueError, match="did you mean 'lf_lstm'"):
        build("lf_lstn", WIDTHS, ALIGNED)
    with pytest.raises(ValueError, match="did you mean 'hidden'"):
        build("lf_lstm", WIDTHS, ALIGNED, hiden=3)
    with pytest.raises(ValueError, match="dropout='a lot'"):
        build("lf_lstm", WIDTHS, ALIGNED, dropout="a lot")


@every_method
def test_sizes_that_do_not_fit_are_one_sentence(name):
    if METHODS[name].aligned_only:
        with pytest.raises(ValueError, match="needs aligned clips"):
            build(name, WIDTHS, UNALIGNED)
    batch = clips(name)
    narrow = Batch(batch.language[:, :, 1:], batch.visual, batch.acoustic, batch.lengths)
    with pytest.raises(ValueError, match="language features are 5 wide"):
        model(name)(narrow)
