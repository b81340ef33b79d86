"""Configurations: to JSON and back, presets, and the sentence for everything that is wrong."""

import dataclasses
import inspect
import json
import math
import re

import pytest
import torch

from dmd import DMD, Batch, LossConfig, ModelConfig, TrainConfig

CONFIGS = [ModelConfig, LossConfig, TrainConfig]
CHANGED = {
    ModelConfig: {"widths": (7, 8, 9), "dim": 20, "pooling": "last", "decoupling": False},
    LossConfig: {"lambda1": 0.25, "orthogonality": "hinge"},
    TrainConfig: {"patience": None, "seed": 7, "loss": LossConfig(gamma=0.5), "clip": "value"},
}


def options(kind):
    return [f.name for f in dataclasses.fields(kind)]


# To JSON and back


@pytest.mark.parametrize("kind", CONFIGS)
def test_json_round_trip(kind):
    for config in (kind(), kind(**CHANGED[kind])):
        again = kind.from_json(config.to_json())
        assert again == config
        assert hash(again) == hash(config)
        assert json.loads(config.to_json()) == json.loads(json.dumps(config.to_dict()))
    assert kind(**CHANGED[kind]) != kind()


@pytest.mark.parametrize("kind", CONFIGS)
def test_left_out_options_keep_their_defaults(kind):
    assert kind.from_dict({}) == kind() == kind.preset("paper")
    name, value = next(iter(CHANGED[kind].items()))
    assert kind.from_dict({name: value}) == dataclasses.replace(kind(), **{name: value})


def test_json_lists_become_tuples_and_nested_options_configurations():
    config = ModelConfig.from_json('{"widths": [4, 5, 6], "embedding_dropout": 0}')
    assert config.widths == (4, 5, 6)
    assert isinstance(config.embedding_dropout, float)
    assert ModelConfig(widths=[4, 5, 6]) == ModelConfig(widths=(4, 5, 6))
    assert TrainConfig(loss={"gamma": 1}) == TrainConfig(loss=LossConfig(gamma=1.0))


@pytest.mark.parametrize("text", ["[1]", "3", "null", '"dim"', "{", ""])
def test_json_that_is_no_configuration_is_one_sentence(text):
    with pytest.raises(ValueError, match=r"^[^\n]+$"):
        ModelConfig.from_json(text)


def test_replace_changes_only_what_it_is_told_and_checks_it():
    config = TrainConfig(seed=3)
    assert config.replace(epochs=2) == TrainConfig(seed=3, epochs=2)
    assert config == TrainConfig(seed=3)
    with pytest.raises(ValueError, match="did you mean 'epochs'"):
        config.replace(epoch=2)
    with pytest.raises(ValueError, match="epochs must be positive"):
        config.replace(epochs=0)


@pytest.mark.parametrize("kind", CONFIGS)
def test_configurations_do_not_change(kind):
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(kind(), options(kind)[0], 1)


# Presets


def test_presets():
    assert ModelConfig.preset("paper") == ModelConfig()
    tiny = ModelConfig.preset("tiny", dim=8, heads=4)
    assert (tiny.dim, tiny.heads, tiny.widths) == (8, 4, ModelConfig.preset("tiny").widths)
    for name in ModelConfig.presets():
        assert ModelConfig.from_json(ModelConfig.preset(name).to_json()) == ModelConfig.preset(name)


@pytest.mark.parametrize("kind", CONFIGS)
def test_every_configuration_has_both_presets_and_they_travel(kind):
    assert {"paper", "released"} <= kind.presets().keys()
    for name in kind.presets():
        config = kind.preset(name)
        assert kind.from_json(config.to_json()) == config
        assert (config == kind()) is (name == "paper")


def test_the_released_training_brings_the_released_losses():
    assert TrainConfig.preset("released").loss == LossConfig.preset("released")
    assert TrainConfig.preset("paper").loss == LossConfig.preset("paper")


@pytest.mark.parametrize("name", ["released", "released_mosei"])
def test_a_published_head_has_five_channels(name):
    config = ModelConfig.preset(name)
    assert config.dim == 5 * config.heads
    assert ModelConfig.preset(name, heads=3) == config.replace(heads=3, dim=15)
    assert ModelConfig.preset(name, heads=3, dim=30) == config.replace(heads=3, dim=30)
    assert ModelConfig.preset("paper", heads=5).dim == ModelConfig().dim
    with pytest.raises(ValueError, match="heads='3' is not of type int"):
        ModelConfig.preset(name, heads="3")
    with pytest.raises(ValueError, match="heads must be positive"):
        ModelConfig.preset(name, heads=0)


def test_the_steps_are_what_the_convolutions_leave():
    sizes = {"widths": (6, 5, 4), "dim": 6, "heads": 1, "lengths": (9, 8, 7), "kernels": (3, 1, 5)}
    assert ModelConfig(**sizes).steps == (9, 8, 7)
    assert ModelConfig(**sizes, projection_padding="valid").steps == (7, 8, 3)
    skipping = ModelConfig(**sizes, projection_padding="valid", skip_equal_projection=True)
    assert skipping.steps == (9, 8, 3)


def test_a_kernel_longer_than_its_sequence_is_refused_where_it_would_leave_no_step():
    sizes = {"widths": (6, 5, 4), "dim": 6, "heads": 1, "lengths": (9, 3, 7), "kernels": (3, 4, 5)}
    ModelConfig(**sizes)
    ModelConfig(**{**sizes, "kernels": (3, 3, 7)}, projection_padding="valid")
    with pytest.raises(ValueError, match="longer than lengths=") as caught:
        ModelConfig(**sizes, projection_padding="valid")
    assert "\n" not in str(caught.value)
    one_skipped = {**sizes, "widths": (5, 6, 4)}  # the visual features are as wide as the model
    ModelConfig(**one_skipped, projection_padding="valid", skip_equal_projection=True)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: ModelConfig.preset("papr"), "unknown preset 'papr': did you mean 'paper'?"),
        (lambda: ModelConfig.preset("tiny", dims=3), "unknown ModelConfig option 'dims': did you "
         "mean 'dim'?"),
        (lambda: TrainConfig.from_dict({"learningrate": 1.0}), "did you mean 'learning_rate'?"),
        (lambda: TrainConfig.from_dict({"loss": {"gama": 1.0}}), "LossConfig option 'gama'"),
        (lambda: ModelConfig.preset("xyzzy"), "unknown preset 'xyzzy': known are paper, released"),
    ],
)  # fmt: skip
def test_an_unknown_name_is_told_the_nearest(build, message):
    with pytest.raises(ValueError) as caught:
        build()
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


# Types and values, given by name, from JSON, or in a preset

WRONG_TYPES = [
    (ModelConfig, {"dim": True}),
    (ModelConfig, {"dim": 50.0}),
    (ModelConfig, {"dim": "50"}),
    (ModelConfig, {"causal_mask": 1}),
    (ModelConfig, {"causal_mask": "no"}),
    (ModelConfig, {"widths": (1, 2)}),
    (ModelConfig, {"widths": (1, 2, 3, 4)}),
    (ModelConfig, {"widths": 3}),
    (ModelConfig, {"widths": (1, 2, 3.0)}),
    (ModelConfig, {"widths": (1, 2, True)}),
    (ModelConfig, {"attention_dropout": 0.1}),
    (ModelConfig, {"language_dropout": True}),
    (ModelConfig, {"language_dropout": None}),
    (LossConfig, {"alpha": "0.15"}),
    (TrainConfig, {"patience": 2.5}),
    (TrainConfig, {"seed": None}),
    (TrainConfig, {"device": 0}),
]


@pytest.mark.parametrize(("kind", "values"), WRONG_TYPES, ids=str)
def test_a_wrong_type_is_refused_by_name(kind, values):
    (name,) = values
    for build in (lambda: kind(**values), lambda: kind.from_dict(values),
                  lambda: kind.preset("paper", **values)):  # fmt: skip
        with pytest.raises(ValueError, match=rf"{name}=.* is not of type") as caught:
            build()
        assert "\n" not in str(caught.value)


def test_a_loss_that_is_no_configuration_is_refused():
    with pytest.raises(ValueError, match="LossConfig: expected its options by name, not 3"):
        TrainConfig(loss=3)


WRONG_VALUES = [
    (ModelConfig, {"widths": (0, 1, 1)}, "widths must be three positive integers"),
    (ModelConfig, {"lengths": (1, -1, 1)}, "lengths must be three positive integers"),
    (ModelConfig, {"kernels": (1, 1, 0)}, "kernels must be three positive integers"),
    (ModelConfig, {"dim": 0}, "dim must be positive"),
    (ModelConfig, {"heads": -1}, "heads must be positive"),
    (ModelConfig, {"layers": 0}, "layers must be positive"),
    (ModelConfig, {"dim": 15, "heads": 4}, "dim=15 must be a multiple of heads=4"),
    (ModelConfig, {"memory_layers_min": 0}, "memory_layers_min must be positive"),
    (ModelConfig, {"edge_hidden": (3, -1)}, "edge_hidden must not be negative"),
    (ModelConfig, {"projection_padding": "vald"}, "did you mean 'valid'?"),
    (ModelConfig, {"unimodal_heads": "liner"}, "did you mean 'linear'?"),
    (ModelConfig, {"gates": "replce"}, "did you mean 'replace'?"),
    (ModelConfig, {"edge_temperature": 0.0}, "edge_temperature must be positive"),
    (ModelConfig, {"edge_temperature": math.inf}, "edge_temperature must be finite"),
    (ModelConfig, {"language_dropout": 1.0}, "language_dropout must lie in [0, 1), not 1.0"),
    (ModelConfig, {"embedding_dropout": -0.1}, "embedding_dropout must lie in [0, 1)"),
    (ModelConfig, {"attention_dropout": (0.0, 0.0, 2.0)}, "attention_dropout must lie in [0, 1)"),
    (ModelConfig, {"output_dropout": math.nan}, "output_dropout must be finite"),
    (ModelConfig, {"pooling": "men"}, "pooling: unknown value 'men': did you mean 'mean'?"),
    (LossConfig, {"orthogonality": "sqare"}, "did you mean 'squared'?"),
    *((LossConfig, {name: -0.1}, f"{name} must not be negative")
      for name in ("lambda1", "lambda2", "gamma", "alpha", "unimodal", "edge_regulariser",
                   "representation")),
    (LossConfig, {"edge_regulariser": 1.0}, "edge_regulariser needs an edge_prior"),
    (LossConfig, {"orthogonality_axis": "bach"}, "did you mean 'batch'?"),
    (LossConfig, {"margin_pairs": "al"}, "did you mean 'all'?"),
    (LossConfig, {"margin_class": "exct"}, "did you mean 'exact'?"),
    (LossConfig, {"margin_size": "label"}, "did you mean 'labels'?"),
    (LossConfig, {"margin_mean": "anchor"}, "did you mean 'anchors'?"),
    (LossConfig, {"edge_prior": "unifrm"}, "did you mean 'uniform'?"),
    (LossConfig, {"gamma": math.nan}, "gamma must be finite"),
    *((TrainConfig, {name: 0}, f"{name} must be positive")
      for name in ("epochs", "batch_size", "accumulate", "learning_rate", "clip_at", "patience")),
    (TrainConfig, {"weight_decay": -1.0}, "weight_decay must not be negative"),
    (TrainConfig, {"precision": "fp61"}, "did you mean 'fp16'?"),
    (TrainConfig, {"select": "mea"}, "did you mean 'mae'?"),
    (TrainConfig, {"scheduler": "cosin"}, "did you mean 'cosine'?"),
    (TrainConfig, {"clip": "nrm"}, "did you mean 'norm'?"),
    (TrainConfig, {"margin_over": "ranks"}, "did you mean 'rank'?"),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "values", "message"), WRONG_VALUES, ids=str)
def test_a_wrong_value_is_refused_in_one_sentence(kind, values, message):
    for build in (lambda: kind(**values), lambda: kind.from_dict(values)):
        with pytest.raises(ValueError) as caught:
            build()
        assert message in str(caught.value)
        assert "\n" not in str(caught.value)


def test_values_at_the_edge_are_accepted():
    ModelConfig(dim=1, heads=1, layers=1, widths=(1, 1, 1), lengths=(1, 1, 1), kernels=(1, 1, 1))
    ModelConfig(language_dropout=0.0, attention_dropout=(0.0, 0.0, 0.999))
    LossConfig(lambda1=0, lambda2=0, gamma=0, alpha=0, unimodal=0)
    TrainConfig(patience=None, weight_decay=0)


# Every option is documented, and every option of the model does something


@pytest.mark.parametrize("kind", CONFIGS)
def test_every_option_is_documented(kind):
    _, text = inspect.getdoc(kind).split("\n", maxsplit=1)
    described = ", ".join(re.findall(r"^ *([\w, ]+):", text, re.MULTILINE)).split(", ")
    assert sorted(described) == sorted(options(kind))


TINY = ModelConfig.preset("tiny", widths=(4, 4, 4), lengths=(3, 4, 5), dim=4, language_dropout=0.0,
                          output_dropout=0.0, embedding_dropout=0.2)  # fmt: skip
OTHER = {
    "widths": (4, 5, 4), "lengths": (3, 4, 4), "dim": 6, "heads": 4, "layers": 2,
    "kernels": (3, 1, 3), "language_dropout": 0.5, "embedding_dropout": 0.5,
    "attention_dropout": (0.0, 0.0, 0.5), "output_dropout": 0.5, "causal_mask": True,
    "pooling": "last", "stop_teacher_gradient": False, "edge_temperature": 0.1,
    "decoupling": False, "homo_distillation": False, "crossmodal_attention": False,
    "hetero_distillation": False, "mask_padding": False, "projection_padding": "valid",
    "skip_equal_projection": True, "position_at_zero": False, "separate_values": True,
    "memory_layers_min": 2, "acoustic_first": True, "unimodal_heads": "residual",
    "edge_hidden": (3, 5), "margin_projection": True, "private_projection": True,
    "common_attention": True, "common_head": True, "gates": "replace",
}  # fmt: skip


def behaviour(config):
    """What one training pass shows: shapes, values and gradients, or the refusal of the clips."""
    torch.manual_seed(0)
    model = DMD(config)
    torch.manual_seed(1)
    language, visual, acoustic = (torch.randn(2, steps, 4) for steps in (3, 4, 5))
    acoustic[0] = 0
    lengths = torch.tensor([[3, 4, 5], [2, 4, 3]])
    try:
        output = model(Batch(language, visual, acoustic, lengths=lengths))
    except ValueError as error:
        return str(error)
    (output.prediction.sum() + output.homo.distances.sum()).backward()
    shown = {name: x.grad for name, x in model.named_parameters()}
    return shown | {"prediction": output.prediction, "edges": output.hetero.edges}


def same(x, y):
    if isinstance(x, str) or isinstance(y, str) or x.keys() != y.keys():
        return x == y if isinstance(x, str) else False
    return all(
        (x[k] is None and y[k] is None)
        or (x[k] is not None and y[k] is not None and torch.equal(x[k], y[k]))
        for k in x
    )


def test_the_comparison_finds_equal_models_equal():
    assert same(behaviour(TINY), behaviour(TINY))


def test_every_option_of_the_model_is_tried():
    assert set(OTHER) == set(options(ModelConfig))


@pytest.mark.parametrize("name", OTHER)
def test_every_option_of_the_model_changes_something(name):
    assert getattr(TINY, name) != OTHER[name]
    assert not same(behaviour(TINY), behaviour(TINY.replace(**{name: OTHER[name]})))
