"""The published implementation: recorded numbers, a plain reference, checkpoints, bad files."""

import copy
import itertools
import json
import os
import pickle
from pathlib import Path

import numpy
import pytest
import released_reference as reference
import torch
from released_reference import Sizes

from dmd import DMD, ModelConfig, losses, released
from dmd.model import PAIRS

PARTS = ("dmd", "homo", "hetero")
CONSTANTS = (".version", "._float_tensor")
SMALL = Sizes((9, 7, 5), (8, 7, 6), (3, 1, 5), dim=6, heads=3, layers=1)


def weights(state):
    return {key: x for key, x in state.items() if not key.endswith(CONSTANTS)}


def build(states, heads, mask, **overrides):
    config = ModelConfig.preset("released", heads=heads, causal_mask=mask, **overrides)
    return released.from_state(states[0], homo=states[1], hetero=states[2], config=config)


def inputs(sizes, clips, *, seed=0, padded=False, dtype=torch.float64):
    """Text, audio, vision (B, T_m, D_m); `padded`: zeros after a length of each clip's own."""
    generator = torch.Generator().manual_seed(seed)
    made = {}
    for name, width, steps in zip(
        ("text", "vision", "audio"), sizes.widths, sizes.lengths, strict=True
    ):
        x = torch.randn(clips, steps, width, generator=generator, dtype=torch.float64)
        if padded:
            lengths = torch.randint(1, steps, (clips,), generator=generator)
            for clip, length in zip(x, lengths, strict=True):
                clip[length:] = 0
        made[name] = x.to(dtype)
    return made


def assert_agree(got, expected, tolerance):
    """The same names and shapes, values equal relative to the largest of each."""
    assert got.keys() == expected.keys()
    for name, want in expected.items():
        found, want = torch.as_tensor(got[name]).detach(), torch.as_tensor(want).detach()
        assert found.shape == want.shape, name
        error = float((found - want).abs().max())
        assert error <= tolerance * float(want.abs().max()), f"{name}: off by {error}"


def one_sentence(error, *parts):
    text = str(error.value)
    assert "\n" not in text and all(str(part) in text for part in parts), text


# --- The recorded case ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def recorded():
    """The recorded case, entries by kind: state/dmd, state/homo, state/hetero, in, out, loss."""
    path = Path(os.environ.get("DMD_DATA", "absent"), "..", "golden", "released_small.npz")
    if not path.is_file():
        pytest.skip("the recorded case lies beside the data: set DMD_DATA to their folder")
    with numpy.load(path) as file:
        entries = {key: file[key] for key in file.files}
    kinds = {}
    for key, x in entries.items():
        kind, name = key.removeprefix("state/").split("/")
        kinds.setdefault(kind, {})[name] = x
    kinds["meta"] = json.loads(str(entries["meta/json"]))
    return kinds


def test_the_recorded_outputs_and_losses_come_out(recorded):
    meta, given = recorded["meta"], dict(recorded["in"])
    labels = given.pop("labels")
    model = build([recorded[part] for part in PARTS], meta["heads"], meta["attn_mask"])
    assert_agree(released.outputs(model, **given), recorded["out"], 1e-5)
    assert_agree(released.losses(model, **given, labels=labels), recorded["loss"], 1e-5)


def test_the_reference_is_held_to_the_recorded_case_too(recorded):
    meta = recorded["meta"]
    states = [{k: torch.tensor(x) for k, x in recorded[part].items()} for part in PARTS]
    given = {k: torch.tensor(x) for k, x in recorded["in"].items()}
    labels = given.pop("labels")
    out = reference.outputs(*states, **given, heads=meta["heads"], mask=meta["attn_mask"])
    assert_agree(out, recorded["out"], 1e-5)
    assert_agree(reference.losses(out, labels), recorded["loss"], 1e-5)


def test_random_states_have_the_keys_and_shapes_of_the_recorded_one(recorded):
    sizes = Sizes((20, 7, 5), (12, 12, 12), (5, 5, 5), dim=12, heads=3, layers=2)
    for part, made in zip(PARTS, reference.random_state(sizes, 0), strict=True):
        shapes = {key: x.shape for key, x in recorded[part].items()}
        assert {key: tuple(x.shape) for key, x in made.items()} == shapes


# --- The reference -------------------------------------------------------------------------------

TIES = (1.0, -0.4, 1.0, 0.0, -0.4, 1.0)
DIFFERENT = (-3.0, -1.2, 0.0, 0.6, 1.8, 3.0)
# Name: sizes (L, V, A), causal mask, labels, padded.
CASES = {
    "mixed kernels": (SMALL, True, TIES, False),
    "no mask": (SMALL, False, TIES, False),
    "right-padded": (SMALL, True, TIES, True),
    "right-padded, no mask": (SMALL, False, DIFFERENT, True),
    "long against short": (
        Sizes((4, 6, 3), (15, 4, 9), (1, 3, 5), dim=8, heads=2, layers=2), True, DIFFERENT, False
    ),
    "four layers": (
        Sizes((5, 4, 3), (6, 7, 8), (5, 5, 5), dim=10, heads=5, layers=4), True, TIES, False
    ),
    "odd d": (Sizes((4, 3, 5), (7, 6, 5), (5, 3, 1), dim=9, heads=3, layers=1), True, TIES, True),
    "odd d, no mask": (
        Sizes((4, 3, 5), (5, 6, 7), (3, 3, 3), dim=5, heads=1, layers=2), False, TIES, False
    ),
    "text as wide as d": (
        Sizes((6, 7, 5), (8, 7, 6), (1, 3, 5), dim=6, heads=2, layers=1), True, TIES, False
    ),
    "vision as wide as d, of a kernel": (
        Sizes((4, 6, 5), (8, 7, 6), (3, 5, 1), dim=6, heads=2, layers=1), True, TIES, False
    ),
    "one step": (Sizes((4, 3, 5), (5, 3, 1), (5, 3, 1), dim=6, heads=2, layers=1), True, TIES, 0),
    "all labels equal": (SMALL, True, (0.6,) * 4, False),
    "two clips": (SMALL, True, (0.6, -1.0), False),
    "one clip": (SMALL, True, (0.6,), False),
    "one clip, padded": (SMALL, False, (0.6,), True),
    "labels nearly equal": (SMALL, True, (0.6, 0.6 + 1e-9, -1.0), False),
}  # fmt: skip


def states_of(sizes, seed=0, dtype=torch.float64):
    return reference.random_state(sizes, seed, dtype)


@pytest.mark.parametrize("name", CASES)
def test_outputs_losses_and_gradients_agree_with_the_reference(name):
    sizes, mask, labels, padded = CASES[name]
    states = states_of(sizes, seed=len(name))
    given = inputs(sizes, len(labels), seed=len(name), padded=padded)
    labels = torch.tensor(labels, dtype=torch.float64)[:, None]
    model = build(states, sizes.heads, mask)
    assert (model.config.widths, model.config.lengths) == (sizes.widths, sizes.lengths)

    for part in states:
        for x in weights(part).values():
            x.requires_grad_()
    out = reference.outputs(*states, **given, heads=sizes.heads, mask=mask)
    expected = reference.losses(out, labels)
    found = released.losses(model, **given, labels=labels)
    assert_agree(released.outputs(model, **given), out, 1e-10)
    assert_agree(found, expected, 1e-10)

    for loss in (found, expected):  # homo_repr is no part of the total, but has a gradient
        (loss["total"] + loss["homo_repr"]).backward()
    assert all(p.grad is None for p in model.private_projection.parameters())
    slope = copy.deepcopy(model)  # to_state moves numbers about, so it moves a gradient as well
    with torch.no_grad():
        for p, own in zip(slope.parameters(), model.parameters(), strict=True):
            p.copy_(torch.zeros_like(own) if own.grad is None else own.grad)
    for part, state in zip(PARTS, states, strict=True):
        got, wanted = released.to_state(slope, part), weights(state)
        for key, x in wanted.items():
            want = torch.zeros_like(x) if x.grad is None else x.grad
            # Gradients that cancel exactly, of a key's bias, say, are rounding errors in both.
            assert (got[key] - want).abs().max() <= 1e-10 * max(1, want.abs().max()), key


def test_a_first_channel_of_zero_takes_the_position_code_away_in_both():
    states, given = states_of(SMALL), inputs(SMALL, 3)
    for key in ("encoder_s_v.weight", "encoder_c.weight"):
        states[0][key][0] = 0
    out = released.outputs(build(states, 3, True), **given)
    assert (out["s_v"][..., 0] == 0).all() and (out["s_v"] != 0).any()
    assert_agree(out, reference.outputs(*states, **given, heads=3, mask=True), 1e-10)


def test_short_clips_are_filled_up_with_zeros_that_count_as_steps():
    model, given = build(states_of(SMALL), 3, True), inputs(SMALL, 3)
    short = {name: x[:, :-2] for name, x in given.items()}
    for x in given.values():
        x[:, -2:] = 0
    full = released.outputs(model, **given)
    assert_agree(released.outputs(model, **short), full, 0)


def test_single_precision_stays_near_the_reference():
    single = states_of(SMALL, dtype=torch.float32)
    double = [{k: x.double() for k, x in part.items()} for part in single]
    given = inputs(SMALL, 6, dtype=torch.float32)
    labels = torch.tensor(TIES)[:, None]
    wide = {k: x.double() for k, x in given.items()}
    out = reference.outputs(*double, **wide, heads=3, mask=True)
    model = build(single, 3, True)
    assert next(model.parameters()).dtype == torch.float32
    assert_agree(released.outputs(model, **given), out, 1e-5)
    expected = reference.losses(out, labels.double())
    assert_agree(released.losses(model, **given, labels=labels), expected, 1e-5)


def test_arrays_and_flat_labels_are_as_good_as_tensors():
    model = build(states_of(SMALL), 3, True)
    given, labels = inputs(SMALL, 6), torch.tensor(TIES, dtype=torch.float64)
    arrays = {name: x.numpy() for name, x in given.items()}
    assert_agree(released.outputs(model, **arrays), released.outputs(model, **given), 0)
    found = released.losses(model, **arrays, labels=labels.numpy())
    assert_agree(found, released.losses(model, **given, labels=labels[:, None]), 0)


# --- Gradients -----------------------------------------------------------------------------------


def test_the_total_moves_every_weight_that_is_read():
    # Of a flat hidden unit, or of what a softmax cancels, the gradient is zero all the same.
    cancels = ("key_value.bias", "edge.bias", "edge_logit.bias", "edge_feature.bias")
    model = build(states_of(SMALL), 3, True)
    labels = torch.tensor(TIES, dtype=torch.float64)
    released.losses(model, **inputs(SMALL, 6), labels=labels)["total"].backward()
    for name, p in model.named_parameters():
        if name.startswith("private_projection."):
            assert p.grad is None, name
        elif not name.endswith(cancels):
            several = name.split(".")[0] in ("crossmodal", "memory", "common_attention")
            for gradient in p.grad if several else [p.grad]:  # of each encoder
                assert gradient.abs().max() > 1e-8, name


def test_the_second_distillation_moves_students_only():
    features = torch.rand(3, 4, 6, dtype=torch.float64).requires_grad_()  # cosines above zero
    edges = torch.zeros(4, 3, 3, dtype=torch.float64)
    edges[:, 0, 2] = 1  # language teaches acoustic
    losses.representation(features, edges).backward()
    assert (features.grad[:2] == 0).all() and (features.grad[2] != 0).any()


# --- There and back ------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["tensors", "arrays"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_to_state_is_the_inverse_of_from_state(kind, dtype):
    states = states_of(Sizes((9, 6, 5), (8, 7, 6), (3, 1, 5), dim=6, heads=3, layers=2), 1, dtype)
    given = states
    if kind == "arrays":
        given = [{key: x.numpy() for key, x in state.items()} for state in states]
    model = build(given, 3, False)
    assert not model.training
    for part, state in zip(PARTS, states, strict=True):
        back = released.to_state(model, part)
        assert back.keys() == state.keys()
        for key, x in state.items():
            assert back[key].shape == x.shape
            assert key.endswith(CONSTANTS) or torch.equal(back[key], x), key
    assert released.to_state(model).keys() == states[0].keys()


def test_a_fresh_model_goes_there_and_back(tmp_path):
    config = ModelConfig.preset(
        "released", widths=(9, 7, 5), lengths=(8, 7, 6), heads=2, layers=1, kernels=(3, 1, 5)
    )
    model = DMD(config)
    torch.save(released.to_state(model), tmp_path / "fresh.pth")
    again = released.from_state(
        released.load(tmp_path / "fresh.pth"),
        homo=released.to_state(model, "homo"),
        hetero=released.to_state(model, "hetero"),
        config=config,
    )
    assert again.config == config
    for (name, x), y in zip(model.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(x, y), name


def test_what_to_state_gives_is_a_copy():
    model = build(states_of(SMALL), 3, True)
    before = copy.deepcopy(model.state_dict())
    for part in PARTS:
        for x in released.to_state(model, part).values():
            x.zero_()
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())


def test_without_the_kernels_the_predictions_are_the_same():
    states, given = states_of(SMALL), inputs(SMALL, 3)
    config = ModelConfig.preset("released", heads=3)
    full = released.outputs(build(states, 3, True), **given)
    found = released.outputs(released.from_state(states[0], config=config), **given)
    for name in full:
        assert torch.equal(found[name], full[name]) != name.startswith("edges_"), name


def test_the_model_has_the_published_number_of_parameters():
    model = DMD(ModelConfig.preset("released", widths=(300, 20, 5)))
    count = sum(x.numel() for x in weights(released.to_state(model)).values())
    assert f"{count / 1e6:.2f}" == "4.63"


# --- The configuration ---------------------------------------------------------------------------


def test_without_a_config_the_published_heads_and_dropouts_are_taken():
    def sizes(dim):
        return Sizes((4, 3, 5), (3, 4, 5), (1, 3, 5), dim=dim, heads=1, layers=2)

    for dim, preset in ((50, "released"), (30, "released_mosei")):
        config = released.from_state(states_of(sizes(dim), dtype=torch.float32)[0]).config
        expected = ModelConfig.preset(
            preset, widths=(4, 3, 5), lengths=(3, 4, 5), kernels=(1, 3, 5), layers=2
        )
        assert config == expected and config.dim == dim
    assert expected.heads == 6 and expected.attention_dropout == (0.4, 0.0, 0.0)
    with pytest.raises(ValueError) as error:
        released.from_state(states_of(sizes(12))[0])
    one_sentence(error, "10 heads", "d = 12")


@pytest.mark.parametrize("mask", [True, False])
def test_a_config_without_the_sizes_that_shapes_tell_is_enough(mask):
    sizes = Sizes((9, 7, 5), (8, 7, 6), (3, 1, 5), dim=12, heads=3, layers=2)
    config = ModelConfig.preset(
        "released", widths=(9, 7, 5), lengths=(8, 7, 6), heads=3, causal_mask=mask
    )
    found = released.from_state(states_of(sizes)[0], config=config).config
    assert (found.dim, found.layers, found.kernels) == (12, 2, (3, 1, 5))
    assert (found.heads, found.causal_mask) == (3, mask)


def test_attention_dropout_goes_by_the_source():
    rates = dict(zip("lva", (0.1, 0.2, 0.3), strict=True))
    config = ModelConfig.preset("released", heads=3, attention_dropout=tuple(rates.values()))
    model = released.from_state(states_of(SMALL)[0], config=config)
    crossmodal = dict(zip(PAIRS, model.crossmodal.layers[0].attention.dropout, strict=True))
    assert crossmodal == {(s, t): rates["lva"[s]] for s, t in itertools.permutations(range(3), 2)}
    assert model.common_attention.layers[0].attention.dropout == tuple(rates.values())
    assert model.memory.layers[0].attention.dropout == (rates["l"],) * 3
    for encoders in (model.crossmodal, model.memory, model.common_attention):
        assert len({layer.attention.dropout for layer in encoders.layers}) == 1


def test_dropout_is_the_users_to_choose():
    config = ModelConfig.preset("released", heads=3, output_dropout=0.1)
    assert released.from_state(states_of(SMALL)[0], config=config).config.output_dropout == 0.1


@pytest.mark.parametrize(
    "given",
    [
        {"widths": (9, 7, 6)},
        {"lengths": (8, 7, 7)},
        {"kernels": (3, 3, 5)},
        {"layers": 3},
        {"dim": 9},
        {"heads": 4},
    ],
    ids=lambda given: next(iter(given)),
)
def test_a_config_of_other_sizes_is_refused(given):
    config = ModelConfig.preset("released", **{"heads": 3, **given})
    with pytest.raises(ValueError) as error:
        released.from_state(states_of(SMALL)[0], config=config)
    one_sentence(error, next(iter(given)))


def test_a_model_of_another_preset_is_refused_everywhere():
    other = ModelConfig.preset("tiny")
    for use in (
        lambda: released.from_state(states_of(SMALL)[0], config=other),
        lambda: released.to_state(DMD(other)),
        lambda: released.outputs(DMD(other), **inputs(SMALL, 2)),
        lambda: released.losses(DMD(other), **inputs(SMALL, 2), labels=torch.zeros(2)),
    ):
        with pytest.raises(ValueError) as error:
            use()
        one_sentence(error, "ModelConfig.preset('released')")


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize(
    "fault", ["missing", "unknown", "wrong shape", "no dimensions", "integers"]
)
def test_every_key_is_asked_for_by_name(part, fault):
    # of the main model also keys from whose shapes the sizes are taken
    keys = {
        "dmd": ["proj1_v_low.bias", "proj_v.weight", "align_c_a.weight", "out_layer.weight"],
        "homo": ["W_repr.weight"],
        "hetero": ["W_edge.bias"],
    }
    for key in keys[part]:
        states = dict(zip(PARTS, states_of(SMALL), strict=True))
        state = states[part]
        if fault == "missing":
            del state[key]
        elif fault == "unknown":
            key = f"{key}_2"
            state[key] = torch.zeros(1)
        elif fault == "wrong shape":
            state[key] = torch.cat([state[key], state[key]])
        elif fault == "integers":
            state[key] = state[key].long()
        else:
            state[key] = torch.tensor(1.0)
        with pytest.raises(ValueError) as error:
            build(list(states.values()), 3, True)
        one_sentence(error, repr(key))


def test_every_single_weight_is_needed():
    states = states_of(SMALL)
    for part, state in zip(PARTS, states, strict=True):
        for key in weights(state):
            broken = [{k: x for k, x in s.items() if s is not state or k != key} for s in states]
            with pytest.raises(ValueError) as error:
                build(broken, 3, True)
            one_sentence(error, f"{part}: ", repr(key), "missing")


def test_the_text_encoder_is_left_out_with_a_warning():
    states = states_of(SMALL)
    encoder = {"text_model.embeddings.weight": torch.zeros(5, 2)}
    with pytest.warns(UserWarning, match="text_model"):
        model = build([{**encoder, **states[0]}, *states[1:]], 3, True)
    assert_agree(weights(released.to_state(model)), weights(states[0]), 0)


# --- Files ---------------------------------------------------------------------------------------


def test_a_saved_state_dict_comes_back(tmp_path):
    state, path = states_of(SMALL)[0], tmp_path / "model.pth"
    for legacy in (False, True):
        torch.save(state, path, _use_new_zipfile_serialization=not legacy)
        found = released.load(path)
        assert found.keys() == state.keys()
        assert all(torch.equal(x, state[key]) for key, x in found.items())
        assert released.load(str(path)).keys() == state.keys()


class Payload:
    """What unpickling would execute: it makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_a_hostile_file_runs_nothing(tmp_path):
    mark, path = tmp_path / "ran", tmp_path / "hostile.pth"
    hostile = {"proj_l.weight": torch.zeros(2), "version": Payload(mark)}
    for legacy in (False, True):
        torch.save(hostile, path, _use_new_zipfile_serialization=not legacy)
        with pytest.raises(ValueError) as error:
            released.load(path)
        one_sentence(error, path, "nothing in it was run")
        assert not mark.exists()
    path.write_bytes(pickle.dumps(Payload(mark), protocol=2))
    with pytest.raises(ValueError):
        released.load(path)
    assert not mark.exists()
    pickle.loads(path.read_bytes())  # the trap is a real one
    assert mark.exists()


def test_a_broken_file_gets_one_sentence(tmp_path):
    path = tmp_path / "model.pth"
    torch.save(states_of(SMALL)[0], path)
    whole = path.read_bytes()
    broken = {
        "empty": b"",
        "text": b"this is no checkpoint\n",
        "half": whole[: len(whole) // 2],
        "start": whole[:100],
        "end": whole[100:],
        "zeros": bytes(1000),
    }
    for name, content in broken.items():
        path = tmp_path / f"{name}.pth"
        path.write_bytes(content)
        with pytest.raises(ValueError) as error:
            released.load(path)
        one_sentence(error, path)


def test_what_is_no_file_gets_one_sentence(tmp_path):
    for path in (tmp_path, tmp_path / "absent.pth"):
        with pytest.raises(OSError) as error:
            released.load(path)
        one_sentence(error, path)


@pytest.mark.parametrize(
    "content",
    [[torch.zeros(2)], {"epoch": 3, "state": {"a": torch.zeros(2)}}, torch.zeros(2), "text",
     {0: torch.zeros(2)}],
    ids=["list", "nested", "tensor", "string", "numbered"],
)  # fmt: skip
def test_what_is_no_state_dict_gets_one_sentence(tmp_path, content):
    path = tmp_path / "other.pth"
    torch.save(content, path)
    with pytest.raises(ValueError) as error:
        released.load(path)
    one_sentence(error, path, "state_dict()")
