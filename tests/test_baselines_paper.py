"""Properties of the methods that are built after their papers: PMR, MICA and FDMER."""

import pytest
import torch
from test_baselines import clips, model
from torch import nn

from dmd import Batch

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
