"""RAVEN, MCTN and Graph-MFN: what sets each apart."""

import pytest
import torch
from test_baselines import ALIGNED, UNALIGNED, WIDTHS, clips
from torch.nn.functional import mse_loss

from dmd import Batch
from dmd.baselines import build
from dmd.baselines.graph_mfn import EDGES, GROUPS, SOURCES
from dmd.baselines.raven import frames_of_words

PARTS = range(3)


def model(name, lengths=None, **options):
    torch.manual_seed(0)
    lengths = lengths or (ALIGNED if name == "graph_mfn" else UNALIGNED)
    return build(name, WIDTHS, lengths, **options)


def changed(batch, m, x):
    features = list(batch.features)
    features[m] = x
    return Batch(*features, batch.lengths, batch.label)


def loss_of(net, batch):
    output = net(batch)
    return (output.prediction - batch.label).square().mean() + sum(output.extra_losses.values())


# RAVEN


@pytest.mark.parametrize("limit", [0.2, 0.5])
def test_raven_never_shifts_a_word_beyond_its_limit_and_no_further_than_asked(limit):
    net, batch = model("raven", limit=limit).eval(), clips("raven")
    word = batch.language.norm(dim=2)
    small = net.shifts(batch)
    with torch.no_grad():
        net.shift.weight *= 1e3
        net.shift.bias *= 1e3
    # Far too long: cut to the limit, in the same direction.
    torch.testing.assert_close(net.shifts(batch).norm(dim=2), limit * word)
    with torch.no_grad():
        net.shift.weight *= 1e-5
        net.shift.bias *= 1e-5
    # Short enough: left as it is, linear in what the last layer says.
    short = net.shifts(batch)
    assert (short.norm(dim=2) < 0.1 * limit * word).all()
    with torch.no_grad():
        net.shift.weight *= 2
        net.shift.bias *= 2
    torch.testing.assert_close(net.shifts(batch), 2 * short)
    assert (small.norm(dim=2) <= limit * word * (1 + 1e-5)).all()
    cosine = torch.nn.functional.cosine_similarity(small, short, dim=2)
    torch.testing.assert_close(cosine, torch.ones_like(cosine))


def test_raven_without_signs_and_biases_reads_the_words_as_they_are():
    """What is learned without input moves a word even then: biases and the opening frame."""
    net, batch = model("raven").eval(), clips("raven")
    still = changed(
        changed(batch, 1, torch.zeros_like(batch.visual)), 2, torch.zeros_like(batch.acoustic)
    )
    assert net.shifts(still).any()
    for key, x in net.named_parameters():
        nonverbal = key.split(".")[0] in ("embed", "lstms", "shift")
        if key == "start" or ("bias" in key and nonverbal):
            torch.nn.init.zeros_(x)
    assert not net.shifts(still).any()
    _, last = net.words(batch.language, batch.masks[0])
    assert torch.equal(net(still).prediction, net.head(last).squeeze(1))
    assert not torch.equal(net(batch).prediction, net(still).prediction)
    loss_of(net, still).backward()
    assert all(x.grad is None or x.grad.isfinite().all() for x in net.parameters())


def test_raven_passes_over_a_word_whose_vector_is_zero():
    net, batch = model("raven").eval(), clips("raven")
    batch.language[:, 0] = 0
    assert not net.shifts(batch)[:, 0].any() and net.shifts(batch)[:, 1].any()


@pytest.mark.parametrize("lengths", [ALIGNED, UNALIGNED])
def test_raven_learns_in_its_nonverbal_branches_too(lengths):
    """The public code cuts them off: they stay as they were drawn."""
    net = model("raven", lengths=lengths, dropout=0.0)
    batch = clips("raven" if lengths == UNALIGNED else "graph_mfn")
    loss_of(net, batch).backward()
    for key, x in net.named_parameters():
        assert x.grad is not None and x.grad.any(), key
    visual, acoustic = (x.clone().requires_grad_() for x in (batch.visual, batch.acoustic))
    net(changed(changed(batch, 1, visual), 2, acoustic)).prediction.sum().backward()
    for x, mask in zip((visual, acoustic), batch.masks[1:], strict=True):
        assert torch.equal(x.grad.abs().sum(dim=2) > 0, mask)  # all valid frames, no other


def test_raven_gives_each_word_its_share_of_the_frames():
    first, last = frames_of_words(torch.tensor([3, 4, 5, 1]), torch.tensor([7, 2, 5, 4]), 5)
    assert first[0, :3].tolist() == [0, 2, 4] and last[0, :3].tolist() == [2, 4, 6]
    assert first[1, :4].tolist() == last[1, :4].tolist() == [0, 0, 1, 1]
    assert first[2].tolist() == last[2].tolist() == [0, 1, 2, 3, 4]  # aligned: its own frame
    assert first[3, 0] == 0 and last[3, 0] == 3  # one word has them all
    assert (last < torch.tensor([7, 2, 5, 4])[:, None]).all()


def test_raven_moves_a_word_by_its_own_frames():
    net = model("raven", lengths=ALIGNED).eval()
    features = [torch.randn(2, 5, width) for width in WIDTHS]
    for m in (1, 2):
        x = features[m].clone().requires_grad_()
        parts = [*features]
        parts[m] = x
        shifts = net.shifts(Batch(*parts))
        for word in range(5):
            (grad,) = torch.autograd.grad(shifts[:, word].sum(), x, retain_graph=True)
            seen = [bool(g) for g in grad.abs().sum(dim=(0, 2))]
            assert seen == [other == word for other in range(5)]


def test_raven_reads_the_frames_of_each_word_as_a_clip_of_its_own():
    net, batch = model("raven").eval(), clips("raven")
    words, masks = batch.masks[0], batch.masks
    for m in (0, 1):
        x, mask = batch.features[m + 1], masks[m + 1]
        found = net.frames(m, x, mask, words)
        first, last = frames_of_words(words.sum(dim=1), mask.sum(dim=1), 5)
        for clip, word in words.nonzero().tolist():
            own = x[clip : clip + 1, first[clip, word] : last[clip, word] + 1]
            start = net.start[m].expand(1, 1, -1)
            _, state = net.lstms[m].cells(torch.cat([start, net.embed[m](own)], dim=1))
            torch.testing.assert_close(found[clip, word], state[0][0, 0])


def test_raven_weighs_each_modality_by_its_own_gate():
    net, batch = model("raven").eval(), clips("raven")
    for m, other in ((1, 2), (2, 1)):
        net = model("raven").eval()
        with torch.no_grad():  # shut the gate of the other
            net.gates[other - 1].bias.fill_(-1e4)
        before = net.shifts(batch)
        loud = changed(batch, other, batch.features[other] + 1)
        torch.testing.assert_close(net.shifts(loud), before)
        assert not torch.allclose(
            net.shifts(changed(batch, m, batch.features[m] + 1)), before, atol=1e-5
        )


# MCTN


def test_mctn_needs_language_alone_once_trained():
    net, batch = model("mctn").eval(), clips("mctn")
    expected = net(batch).prediction
    for noise in (0.0, 1e6, float("nan")):
        features = [batch.language, *(torch.full_like(x, noise) for x in batch.features[1:])]
        lengths = torch.stack([batch.lengths[:, 0], *torch.ones(2, 6, dtype=torch.long)], dim=1)
        output = net(Batch(*features, lengths))
        assert torch.equal(output.prediction, expected)
        assert output.extra_losses == {}
    louder = net(changed(batch, 0, batch.language + 1)).prediction
    assert ((louder - expected).abs() > 1e-6).all()


def test_mctn_translates_there_and_back_and_on_with_the_weights_given():
    batch = clips("mctn")
    weights = {"visual_weight": 0.1, "cycle_weight": 0.1, "acoustic_weight": 0.1}
    names = ("to_visual", "back_to_language", "to_acoustic")
    one = model("mctn", **weights).train()(batch).extra_losses
    assert set(one) == set(names)
    for option, name in zip(weights, names, strict=True):
        twice = model("mctn", **{**weights, option: 0.2}).train()(batch).extra_losses
        for other in names:
            factor = 2 if other == name else 1
            torch.testing.assert_close(twice[other], factor * one[other])


@pytest.mark.parametrize(
    ("name", "target"), [("to_visual", 1), ("back_to_language", 0), ("to_acoustic", 2)]
)
def test_mctn_compares_a_translation_with_its_own_modality_at_valid_steps(name, target):
    """With the last layers at zero what is written is zero: the error is that of the target."""
    net, batch = model("mctn").train(), clips("mctn")
    for translator in (net.first, net.second):
        torch.nn.init.zeros_(translator.write.weight)
        torch.nn.init.zeros_(translator.write.bias)
    loud = [x.clone() for x in batch.features]
    for x, mask in zip(loud, batch.masks, strict=True):
        x[~mask] = 1e3
    found = net(Batch(*loud, batch.lengths)).extra_losses[name]
    valid = batch.features[target][batch.masks[target]]
    torch.testing.assert_close(found, 0.1 * mse_loss(torch.zeros_like(valid), valid))


def test_mctn_reads_the_translated_face_on_its_way_back():
    """The cycle starts from what was written, at the valid steps of the face, not from the face."""
    net, batch = model("mctn").train(), clips("mctn")
    visual = batch.visual.clone().requires_grad_()
    terms = net(changed(batch, 1, visual)).extra_losses
    (grad,) = torch.autograd.grad(
        terms["back_to_language"], visual, retain_graph=True, allow_unused=True
    )
    assert grad is None
    inputs, reader = [], net.first.reader
    hook = reader.register_forward_hook(lambda _, given, __: inputs.append(given))
    net(batch)
    hook.remove()
    (language, words), (seen, face) = inputs
    torch.testing.assert_close(language, net.fill(batch.language))
    assert torch.equal(words, batch.masks[0]) and torch.equal(face, batch.masks[1])
    assert seen.requires_grad and seen.shape == (6, 8, 6)
    assert not seen[:, :, 5:].any()  # the face has five channels, words have six
    states = net.first.encode(language, words)
    torch.testing.assert_close(seen[:, :, :5], net.first.decode(states, words, 8)[:, :, :5])


def test_mctn_learns_from_the_translations_what_the_score_reads():
    net, batch = model("mctn", dropout=0.0).train(), clips("mctn")
    for name in ("to_visual", "back_to_language", "to_acoustic"):
        net.zero_grad()
        net(batch).extra_losses[name].backward()
        assert net.first.reader.cells.weight_ih_l0.grad.any(), name
        second = net.second.reader.cells.weight_ih_l0.grad
        assert (second is not None and bool(second.any())) == (name == "to_acoustic")


def test_mctn_attends_to_valid_states_only():
    net = model("mctn")
    states = torch.randn(2, 4, 32)
    mask = torch.tensor([[True] * 4, [True, True, False, False]])
    expected = net.second.decode(states[1:, :2], mask[1:, :2], 3)
    torch.testing.assert_close(net.second.decode(states, mask, 3)[1:], expected)


# Graph-MFN


def singles_of(net, seed=1):
    rng = torch.Generator().manual_seed(seed)
    return [torch.rand(2, 3, 32, generator=rng).requires_grad_() for _ in PARTS]


def test_graph_mfn_feeds_each_group_by_the_smaller_groups_in_it():
    assert GROUPS == ("L", "V", "A", "LV", "LA", "VA", "LVA")
    assert SOURCES["LA"] == ["L", "A"] and SOURCES["all"] == [*GROUPS]
    assert SOURCES["LVA"] == ["L", "V", "A", "LV", "LA", "VA"]
    assert len(EDGES) == len(set(EDGES)) == 19


def test_graph_mfn_shows_a_group_exactly_its_own_modalities():
    """With the efficacies held: they are drawn from all three."""
    net = model("graph_mfn").eval()
    singles = singles_of(net)
    held = {edge: x.detach() for edge, x in net.efficacies(singles).items()}
    for name, x in net.vertices(singles, held).items():
        grads = torch.autograd.grad(x.sum(), singles, retain_graph=True, allow_unused=True)
        seen = "".join(
            m for m, g in zip("LVA", grads, strict=True) if g is not None and bool(g.any())
        )
        assert seen == ("LVA" if name == "all" else name)


def test_graph_mfn_shuts_an_edge_whose_efficacy_is_zero():
    net = model("graph_mfn").eval()
    singles = singles_of(net)
    ones = {edge: torch.ones(2, 3, 1) for edge in EDGES}
    expected = net.vertices(singles, ones)
    for source, vertex in EDGES:
        found = net.vertices(singles, {**ones, (source, vertex): torch.zeros(2, 3, 1)})
        larger = {name for name, parts in SOURCES.items() if vertex in parts}
        moved = {name for name in found if not torch.equal(found[name], expected[name])}
        assert moved == {vertex} | larger


def test_graph_mfn_draws_efficacies_between_0_and_1_from_all_three_at_each_step():
    net = model("graph_mfn").eval()
    singles = singles_of(net)
    efficacies = net.efficacies(singles)
    assert list(efficacies) == EDGES
    for x in efficacies.values():
        assert x.shape == (2, 3, 1) and (x > 0).all() and (x < 1).all()
        grads = torch.autograd.grad(x[:, 1].sum(), singles, retain_graph=True)
        for grad in grads:
            assert grad[:, 1].any() and not grad[:, ::2].any()  # of that step alone


def test_graph_mfn_hands_every_network_of_the_graph_to_the_optimiser():
    """The public code keeps the networks of the groups in a plain dict, out of its sight."""
    net, batch = model("graph_mfn", dropout=0.0), clips("graph_mfn")
    assert set(net.groups) == set(SOURCES)
    known = {id(x) for x in net.parameters()}
    before = {name: [x.clone() for x in part.parameters()] for name, part in net.groups.items()}
    optimiser = torch.optim.SGD(net.parameters(), lr=0.1)
    rows = net.efficacy[3].weight
    loss_of(net, batch).backward()
    assert rows.shape[0] == 19 and (rows.grad.abs().sum(dim=1) > 0).all()  # one row an efficacy
    optimiser.step()
    for name, part in net.groups.items():
        for x, old in zip(part.parameters(), before[name], strict=True):
            assert id(x) in known and not torch.equal(x, old), name


def test_graph_mfn_builds_a_vertex_from_this_step_and_the_one_before():
    net, batch = model("graph_mfn").eval(), clips("graph_mfn", full=True)
    given = []
    hooks = [x.register_forward_hook(lambda _, x, __: given.append(x[0])) for x in net.singles]
    net(batch)
    for hook in hooks:
        hook.remove()
    for m, x in enumerate(given):
        states, _ = net.lstms[m](batch.features[m], torch.ones(6, 5, dtype=torch.bool))
        assert not x[:, 0, :32].any()
        torch.testing.assert_close(x[:, 1:, :32], states[:, :-1])
        torch.testing.assert_close(x[:, :, 32:], states)


def test_graph_mfn_keeps_and_writes_as_its_gates_say():
    net = model("graph_mfn").eval()
    graph, mask = torch.randn(2, 3, 32), torch.tensor([[True] * 3, [True, True, False]])
    content = net.content(graph).tanh()
    last = net.gates[3]
    torch.nn.init.zeros_(last.weight)
    with torch.no_grad():
        last.bias[:32] = 1e4  # keep all
        last.bias[32:] = -1e4  # write nothing
    assert not net.remember(graph, mask).any()
    torch.nn.init.constant_(last.bias, 1e4)  # keep and write all: the sum over valid steps
    expected = torch.stack([content[0].sum(dim=0), content[1, :2].sum(dim=0)])
    torch.testing.assert_close(net.remember(graph, mask), expected)
    with torch.no_grad():
        last.bias[:32] = -1e4  # keep nothing: the last valid step
    expected = torch.stack([content[0, 2], content[1, 1]])
    torch.testing.assert_close(net.remember(graph, mask), expected)
