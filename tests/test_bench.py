"""The bench: formula against counter, plain against package, counts, series, and what it prints."""

import copy
import dataclasses
import json
import math
import os

import pytest
import torch
from torch import Tensor

from dmd import (
    DMD,
    Batch,
    LossConfig,
    ModelConfig,
    bench,
    cli,
    flops,
    kernels,
    losses,
    plain,
    steps,
)
from dmd.model import PAIRS

torch.set_num_threads(1)  # more would only wait for each other
SMALL = {"widths": (7, 5, 3), "lengths": (9, 9, 9), "dim": 8, "heads": 2, "layers": 2}
UNEQUAL = {**SMALL, "lengths": (9, 12, 7), "kernels": (3, 5, 1)}
NO_DROPOUT = {
    "language_dropout": 0.0, "embedding_dropout": 0.0, "attention_dropout": (0.0, 0.0, 0.0),
    "output_dropout": 0.0,
}  # fmt: skip
MODELS = {
    "paper": ("paper", SMALL),
    "unequal lengths": ("paper", UNEQUAL),
    "released": ("released", SMALL),
    "released, unequal lengths": ("released", UNEQUAL),
    "no convolution of width dim": ("released", {**SMALL, "widths": (8, 5, 8)}),
    "no decoupling": ("paper", {**SMALL, "decoupling": False}),
    "no attention": ("paper", {**SMALL, "crossmodal_attention": False}),
    "no homo": ("paper", {**SMALL, "homo_distillation": False}),
    "no hetero": ("released", {**SMALL, "hetero_distillation": False}),
}


def case(preset, overrides, variant=None, clips=4):
    variant = variant or preset
    return steps.make_cases(preset, overrides, clips, "cpu", [variant])[variant]


def gradients_of_clips(config, clips=4):
    """What the formula counts and no one computes: the gradients of the clips themselves."""
    bare = [  # these features go to their two encoders as they are
        steps
        for width, steps in zip(config.widths, config.steps, strict=True)
        if config.skip_equal_projection and width == config.dim
    ]
    encoders = sum(flops.linear(clips * n, config.dim, 2 * config.dim) for n in bare)
    return flops.convolutions(config, clips) + encoders


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_the_formula_is_what_the_counter_sees_of_plain_steps(model):
    plainly = case(*model, "plain")
    counted = bench.counted_flops(plainly.step())
    assert counted == flops.step_flops(plainly.model, 4) - gradients_of_clips(plainly.model)


@pytest.mark.parametrize("kept", [0, 1 << 62], ids=["computed again", "kept"])
@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_the_package_makes_more_products_by_what_its_docstring_says(model, kept, monkeypatch):
    monkeypatch.setattr(kernels, "KEPT", kept)
    package = case(*model)
    config, n = package.model, package.model.steps
    again = keys = 0
    if config.crossmodal_attention:
        pairs = [(n[target], n[source]) for source, target in PAIRS]
        deep = max(config.layers, config.memory_layers_min)
        again = config.layers * sum(flops.linear(4 * q, config.dim, k) for q, k in pairs)
        again += deep * sum(flops.linear(4 * q, 2 * config.dim, q) for q in n)
        if config.separate_values:  # K of the values and V of the keys, which no one reads
            keys = config.layers * sum(
                2 * flops.linear(4 * k, config.dim, config.dim) for _, k in pairs
            )
    if config.common_attention:
        again += config.layers * sum(flops.linear(4 * q, config.dim, q) for q in n)
    plainly = flops.step_flops(config, 4) - gradients_of_clips(config)
    again = 0 if kept else again
    assert bench.counted_flops(package.step()) == plainly + again + 3 * keys


def test_the_formula_by_hand():
    config = ModelConfig(widths=(3, 3, 3), lengths=(2, 2, 2), dim=4, heads=2, layers=1)
    parts = flops.forward_flops(config, clips=1)
    assert parts["convolutions"] == 3 * (2 * 2 * 5 * 3 * 4)  # 3 x (2 steps, window 5 x 3, 4 out)
    # a step: Q, K, V, output 4 x 16, network 2 x 64; two products of 2 keys x 4
    assert parts["crossmodal"] == 6 * 2 * (2 * (4 * 16 + 2 * 64) + 2 * (2 * 2 * 4))


def test_most_of_the_step_grows_with_the_number_of_clips():
    one, many = (flops.forward_flops(ModelConfig(), n) for n in (1, 10))
    cosines = [flops.linear(3 * n, 50, 3 * n) for n in (1, 10)]  # between all clips
    assert many.pop("decoupling") - cosines[1] == 10 * (one.pop("decoupling") - cosines[0])
    assert many == {name: 10 * x for name, x in one.items()}


def padded_clips(config, dtype=torch.float64):
    rng = torch.Generator().manual_seed(1)
    lengths = torch.stack([torch.randint(1, n + 1, (6,), generator=rng) for n in config.lengths], 1)
    lengths[0] = torch.tensor(config.lengths)
    clips = steps.random_clips(config, 6)
    features = [x.to(dtype) for x in clips.features]
    label = torch.tensor([-2.6, -2.6, 0.2, 0.4, 1.0, 3.0], dtype=dtype)  # classes with two and one
    return {True: Batch(*features, lengths, label), False: Batch(*features, label=label)}


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize("padded", [True, False], ids=["padded", "full"])
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "all keys"])
def test_plain_and_package_are_one_function(model, padded, causal):
    preset, sizes = model
    config = ModelConfig.preset(preset, **{**sizes, **NO_DROPOUT, "causal_mask": causal})
    loss = LossConfig.preset(preset)
    torch.manual_seed(0)
    package = DMD(config).double().train()
    for weight in package.parameters():  # norms and biases at their first values would hide much
        weight.data.add_(torch.randn_like(weight), alpha=0.1)
    plainly = plain.PlainDMD.of(package)
    clips = padded_clips(config)[padded]

    total = losses.objective(package(clips), clips.label, loss).total
    same = plain.objective(plainly(clips), clips.label, loss)
    torch.testing.assert_close(same, total, rtol=1e-12, atol=0)

    total.backward()
    same.backward()
    of_package = copy.deepcopy(package)  # its gradients, put where a plain model has them
    for weight, source in zip(of_package.parameters(), package.parameters(), strict=True):
        weight.data = torch.zeros_like(weight) if source.grad is None else source.grad.clone()
    expected = dict(plain.PlainDMD.of(of_package).named_parameters())
    found = {name: x.grad for name, x in plainly.named_parameters()}
    assert expected.keys() == found.keys()
    scale = max(float(x.detach().abs().max()) for x in expected.values())
    for name, grad in found.items():
        grad = torch.zeros_like(expected[name]) if grad is None else grad
        torch.testing.assert_close(grad, expected[name].data, rtol=1e-9, atol=1e-12 * scale)


@pytest.mark.parametrize("preset", ["paper", "released"])
def test_plain_and_package_train_the_same(preset):
    package, plainly = (
        case(preset, {**SMALL, **NO_DROPOUT}, v, clips=8).step() for v in (preset, "plain")
    )
    ours, theirs = ([float(step()) for _ in range(10)] for step in (package, plainly))
    assert ours == pytest.approx(theirs, rel=1e-4)
    assert ours[9] < ours[0]  # it does train


def test_mixed_precision_is_near_but_not_the_same():
    losses_ = {
        v: float(case("paper", {**SMALL, **NO_DROPOUT}, v).step()()) for v in ("paper", "bf16")
    }
    assert losses_["bf16"] != losses_["paper"]
    assert losses_["bf16"] == pytest.approx(losses_["paper"], rel=0.05)


@pytest.fixture(scope="module")
def counts():
    """Operations of a step at the sizes of CMU-MOSI, aligned, 16 clips."""
    sizes = {"widths": (300, 20, 5), "lengths": (50, 50, 50)}
    found = {}
    for name, each in steps.make_cases("paper", sizes, 16, "cpu").items():
        step = each.step()
        step()
        found[name] = bench.operations(step)
        if name == "paper":
            assert bench.operations(step) == found[name]
    return found


def test_operations_of_a_step(counts):
    assert counts["paper"] < 8_000
    assert counts["released"] < 25_000


def test_the_yardstick_is_slow_but_no_caricature(counts):
    # 78,309: the published code, counted in the same way at the same sizes
    assert 5 * counts["paper"] < counts["plain"] < 78_309


def test_operations_are_the_profilers_own():
    x = torch.ones(3)
    assert bench.operations(lambda: x.add_(x)) == 1
    assert bench.operations(lambda: [x.add_(x), x.add_(x), x.relu()]) == 4  # relu is nested


@pytest.mark.parametrize("power", [0.0, 1.0, 1.7])
def test_the_exponent_of_a_power(power):
    sizes = [1, 4, 16, 50]
    assert bench.exponent(sizes, [3 * n**power for n in sizes]) == pytest.approx(power, abs=1e-9)
    wobbly = [3 * n**power * x for n, x in zip(sizes, (1.01, 0.99, 0.99, 1.01), strict=True)]
    assert bench.exponent(sizes, wobbly) == pytest.approx(power, abs=0.02)


def test_one_point_has_no_exponent():
    assert bench.exponent([5], [1.0]) is None
    assert bench.exponent([], []) is None


# What stands in for a step; in modules' own names, so that another process finds them.
MEGABYTES = 200


def hoard(model, train):
    held = []

    def step():
        held[:] = [torch.ones(MEGABYTES * 250_000)]
        return held[0][0]

    return step


def die(model, train):
    os._exit(9)


def swapped(make):
    return dataclasses.replace(case("paper", SMALL), make=make)


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="the peak is read from /proc")
def test_peak_memory_is_that_of_the_case_alone():
    mine = torch.ones(3 * MEGABYTES * 250_000)  # what this process holds hides nothing
    times, memory = bench.alone(swapped(hoard), 2)
    del mine
    assert len(times) == 2 and min(times) > 0
    assert 1 <= memory / (MEGABYTES * 1e6) < 2.5  # the second array is made beside the first


def test_a_process_that_the_system_ends_ran_out_of_memory():
    with pytest.raises(MemoryError):
        bench.alone(swapped(die), 1)


def fake(answers):
    """Stands in for `bench.alone`: seconds a step, or an error, by the number of clips."""

    def alone(case, rounds, limit):
        answer = answers[case.train.batch_size]
        if isinstance(answer, Exception):
            raise answer
        return ([] if answer > limit else [answer] * rounds), 1000 * case.train.batch_size

    return alone


def by_clips(*sizes):
    return {n: case("paper", SMALL, clips=n) for n in sizes}


def test_a_series_gives_clips_a_second_and_the_exponent(monkeypatch):
    monkeypatch.setattr(bench, "alone", fake({1: 1.0, 4: 4.0, 16: 16.0}))
    found = bench.series(by_clips(1, 4, 16))
    assert [p["size"] for p in found["points"]] == [1, 4, 16]
    assert [p["clips_per_second"] for p in found["points"]] == [1.0, 1.0, 1.0]
    assert found["exponent"] == pytest.approx(1)
    assert found["stopped"] is None


@pytest.mark.parametrize(
    ("answer", "sentence"),
    [
        (40.0, "stopped at 4: a step takes longer than 30 s"),
        (MemoryError(), "stopped at 4: memory ran out"),
        (
            RuntimeError("DefaultCPUAllocator: can't allocate memory"),
            "stopped at 4: memory ran out",
        ),
    ],
)
def test_a_series_ends_with_a_sentence(monkeypatch, answer, sentence):
    monkeypatch.setattr(bench, "alone", fake({1: 1.0, 4: answer, 16: 1.0}))
    found = bench.series(by_clips(1, 4, 16))
    assert [p["size"] for p in found["points"]] == [1]
    assert (found["stopped"], found["exponent"]) == (sentence, None)


def test_a_series_does_not_begin_what_will_not_fit(monkeypatch):
    monkeypatch.setattr(bench, "alone", fake({1: 1.0, 4: 1.0, 16: AssertionError("begun")}))
    monkeypatch.setattr(bench, "free_memory", lambda device: 15_999)
    assert bench.series(by_clips(1, 4, 16))["stopped"].startswith("stopped before 16: it would")


def test_other_errors_are_not_taken_for_a_lack_of_memory(monkeypatch):
    monkeypatch.setattr(bench, "alone", fake({1: RuntimeError("shapes do not fit")}))
    with pytest.raises(RuntimeError, match="shapes"):
        bench.series(by_clips(1))


def test_a_real_step_that_is_too_slow_gives_no_times():
    assert bench.alone(case("paper", SMALL), 3, limit=0.0)[0] == []


def test_variants_run_in_turn(monkeypatch):
    log = []

    def make(name):
        return lambda model, train: lambda: log.append(name)

    monkeypatch.setattr(bench, "alone", lambda case, steps: ([], None))
    monkeypatch.setattr(bench, "machine_limits", lambda device: {"matmul_flops": 1e9})
    bench.compare({name: swapped(make(name)) for name in "ab"}, rounds=3)
    assert "".join(log).endswith("abababab"[2:])
    assert log.count("a") == log.count("b") > 4  # and both were warmed up


def test_variants_have_one_size_and_their_own_recipe():
    cases = steps.make_cases("paper", {"layers": 2, "widths": (8, 6, 4)}, 5, "cpu")
    assert list(cases) == ["paper", "released", "plain", "bf16"]
    for each in cases.values():
        model = each.model
        assert (model.layers, model.widths, model.lengths) == (2, (8, 6, 4), (50, 50, 50))
        assert each.train.batch_size == 5
    assert cases["released"].model.gates == "replace"
    assert cases["released"].train.loss == LossConfig.preset("released")
    assert cases["plain"].model == cases["paper"].model
    assert cases["plain"].train == cases["paper"].train


@pytest.fixture
def words(monkeypatch):
    """A bench of two variants of a tiny model; the machine's limits are made up."""
    made_up = {"matmul_flops": 1e9, "copy_bytes": 1e9, "launch_seconds": 1e-6}
    monkeypatch.setattr(bench, "machine_limits", lambda device: made_up)
    return ["bench", "--preset", "tiny", "--device", "cpu", "--steps", "2", "--batch-size", "3",
            "--variants", "tiny", "plain", "--model", "dim=4", "lengths=5,4,3"]  # fmt: skip


def test_json_has_everything(words, monkeypatch, capsys):
    monkeypatch.setattr(bench, "BATCHES", (1, 2))
    monkeypatch.setattr(bench, "LENGTHS", (6,))
    assert cli.main([*words, "--scaling", "--json"]) == 0
    out = capsys.readouterr().out
    found = json.loads(out, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert list(found["variants"]) == ["tiny", "plain"]
    assert (found["preset"], found["batch_size"], found["device"]) == ("tiny", 3, "cpu")
    assert found["model_config"]["lengths"] == [5, 4, 3]
    assert found["provenance"]["torch"] == torch.__version__
    assert found["provenance"]["seconds"] > 0
    assert found["machine"]["matmul_flops"] == 1e9
    weights = sum(x.numel() for x in DMD(ModelConfig.from_dict(found["model_config"])).parameters())
    for row in found["variants"].values():
        assert row.keys() == {key for key, _, _ in bench.COLUMNS.values()}
        assert row["parameters"] == weights
        assert row["clips_per_second"] == pytest.approx(3 / row["seconds"])
        assert row["floor_ratio"] == pytest.approx(row["seconds"] / (row["flops"] / 1e9))
        assert all(x is not None and x >= 0 for x in row.values())
    assert [p["size"] for p in found["scaling"]["clips"]["points"]] == [1, 2]
    assert math.isfinite(found["scaling"]["clips"]["exponent"])
    assert [p["size"] for p in found["scaling"]["length"]["points"]] == [6]

    found["scaling"]["length"]["stopped"] = "stopped for tea"
    text = bench.table(found)
    for part in (*found["variants"], *bench.COLUMNS, "to the power", "stopped for tea"):
        assert part in text


def test_the_table_is_printed_and_progress_is_not(words, monkeypatch, capsys):
    monkeypatch.setattr(bench, "alone", lambda case, steps: ([], None))
    assert cli.main(words) == 0
    out, error = capsys.readouterr()
    assert "clips/s" in out and "round" not in out
    assert "round 2/2" in error
    assert [line.split()[8] for line in out.splitlines()[-2:]] == ["-", "-"]  # memory: unknown


def test_the_limits_of_the_machine_are_plausible():
    limits = bench.machine_limits(torch.device("cpu"))
    assert 1e8 < limits["matmul_flops"] < 1e15
    assert 1e8 < limits["copy_bytes"] < 1e14
    assert 1e-8 < limits["launch_seconds"] < 1e-2


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["--variants", "plane"], "unknown variant 'plane': did you mean 'plain'"),
        (["--preset", "papier"], "unknown preset 'papier': did you mean 'paper'"),
        (["--model", "depth=3"], "unknown ModelConfig option 'depth'"),
        (["--model", "heads=7"], "must be a multiple of heads=7"),
        (["--device", "abacus"], "device 'abacus' is not available"),
        (["--batch-size", "0"], "'0' is not a whole number from 1"),
        (["--steps", "few"], "'few' is not a whole number from 1"),
        (["--batchsize", "3"], "did you mean '--batch-size'"),
    ],
)
def test_bad_words_are_refused_with_one_sentence(words, part, capsys):
    try:
        code = cli.main(["bench", *words])
    except SystemExit as stop:
        code = stop.code
    out, error = capsys.readouterr()
    assert (code, out) == (2, "")
    assert error.count("\n") == 1 and part in error


def test_the_step_is_a_tensor_and_its_clips_are_seeded():
    config = ModelConfig(**SMALL)
    one, same, other = (steps.random_clips(config, 3, seed) for seed in (0, 0, 1))
    assert torch.equal(one.visual, same.visual) and torch.equal(one.label, same.label)
    assert not torch.equal(one.visual, other.visual)
    assert isinstance(case("paper", SMALL).step()(), Tensor)


def test_compiling_is_asked_for_by_name_and_only_then_done(monkeypatch):
    done = []
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "")  # set back at the end
    monkeypatch.setattr(DMD, "compile", lambda model: done.append(model))
    usual = steps.make_cases("tiny", device="cpu")
    assert "compiled" not in usual
    usual["tiny"].step()
    assert not done
    loss = steps.make_cases("tiny", device="cpu", variants=["compiled"])["compiled"].step()
    assert len(done) == 1
    assert torch.isfinite(loss())
