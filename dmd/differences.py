"""Every point where the published code parts from the paper, as one list made of options.

The values come from the presets `paper` and `released`; the list only adds what the paper says,
what the code does, and what that is good for.
"""

from dataclasses import dataclass
from typing import Any

from dmd.config import LossConfig, ModelConfig, TrainConfig
from dmd.options import Config

KINDS: dict[str, type[Config]] = {"model": ModelConfig, "loss": LossConfig, "train": TrainConfig}
# What differs by the dataset that a preset is for, not by paper and code; `loss` has its own rows.
NOT_LISTED = ("widths", "loss")


@dataclass(frozen=True)
class Difference:
    """One point: the configuration (`model`, `loss` or `train`) and the options that make it.

    paper, code: what the paper says (or where it is silent, what the `paper` preset does), and
    what the published code does. good_for: what can be said for the code's choice.
    """

    kind: str
    options: tuple[str, ...]
    paper: str
    code: str
    good_for: str

    @property
    def name(self) -> str:
        """The first option, which names the row."""
        return self.options[0]

    def values(self, preset: str) -> dict[str, Any]:
        """The options with the values that they have in `paper` or `released`."""
        config = KINDS[self.kind].preset(preset)
        return {option: getattr(config, option) for option in self.options}


def options_that_differ(kind: str) -> list[str]:
    """The options of a configuration that have another value in `released` than in `paper`."""
    paper, released = (KINDS[kind].preset(name) for name in ("paper", "released"))
    return [
        name
        for name in paper.to_dict()
        if name not in NOT_LISTED and getattr(paper, name) != getattr(released, name)
    ]


def _model(*row: str) -> Difference:
    return Difference("model", tuple(row[0].split()), *row[1:])


def _loss(*row: str) -> Difference:
    return Difference("loss", tuple(row[0].split()), *row[1:])


def _train(*row: str) -> Difference:
    return Difference("train", tuple(row[0].split()), *row[1:])


DIFFERENCES = (
    _model(
        "mask_padding",
        "Silent. Padding is masked everywhere.",
        "Nothing is masked: zeros that fill up a clip are steps like any other.",
        "One code path, and the number of zeros tells the model how long a clip is.",
    ),
    _model(
        "projection_padding",
        "The shallow convolution keeps the number of steps (Sec. 3.1).",
        "It has no padding and loses kernel - 1 steps.",
        "No window mixes data with zeros at the ends.",
    ),
    _model(
        "skip_equal_projection",
        "Each modality has its convolution (Sec. 3.1).",
        "A modality that is d wide already has none.",
        "Saves a layer where only the width was to be changed.",
    ),
    _model(
        "position_at_zero",
        "Silent. Every step has a position code.",
        "A step whose first channel is exactly zero has none.",
        "Makes all-zero steps recognisable, in place of a mask.",
    ),
    _model(
        "causal_mask",
        "A query sees all keys (Eq. 10).",
        "Query i sees keys up to i plus the difference of the lengths.",
        "Forbids matches far in the future; streaming would need it.",
    ),
    _model(
        "separate_values",
        "Silent. A source is embedded once.",
        "Keys and values are embedded apart, each with its own dropout.",
        "A little more noise to regularise with.",
    ),
    _model(
        "pooling",
        "Silent. A sequence becomes a vector by its mean over valid steps.",
        "The last step is taken, padded or not.",
        "With self-attention the last step can gather all it needs.",
    ),
    _model(
        "memory_layers_min",
        "Silent. The encoders that join two sources are as deep as the others.",
        "They have at least three layers.",
        "They carry the heterogeneous features alone, so depth may pay there.",
    ),
    _model(
        "acoustic_first",
        "Silent. What the two sources answered is joined in the order L, V, A.",
        "For language the acoustic answer comes before the visual one.",
        "Nothing; it has to be known in order to load a checkpoint.",
    ),
    _model(
        "unimodal_heads",
        "One FC layer f regresses the logits of all nodes of a graph (Eq. 8).",
        "Each modality has a residual network; the homogeneous one reads all steps side by side.",
        "Stronger heads make better teachers, at the price of a fixed length.",
    ),
    _model(
        "common_attention",
        "The vanilla decoupled features are fused (Sec. 3.2).",
        "The common sequences go through self-attention encoders first.",
        "The common path gets as much depth as the private one.",
    ),
    _model(
        "common_head",
        "One task loss (Eq. 11).",
        "The joined common part has a prediction and a task loss of its own.",
        "A direct training signal for the common path.",
    ),
    _model(
        "gates",
        "Features are fused with an adaptive weight learned from each (Sec. 3.2).",
        "The sigmoid of a linear map replaces the features; nothing is multiplied.",
        "A bounded input to the last network.",
    ),
    _model(
        "edge_hidden",
        "g is one FC layer on logits and features (Eq. 8).",
        "Linear maps of both come first; in all, g is linear as before.",
        "Logit and features enter at the same scale, and the edge layer stays small.",
    ),
    _model(
        "edge_temperature",
        "W is normalised by a softmax (Sec. 3.2).",
        "The softmax is taken of an eighth of the scores.",
        "Edges stay near uniform at first, so no teacher is cut off early.",
    ),
    _model(
        "margin_projection",
        "Eq. 4 compares the common features themselves.",
        "It compares linear maps of all their steps, one for each modality.",
        "The features need not be alike themselves, only in a projection.",
    ),
    _model(
        "private_projection",
        "Nothing of the kind.",
        "The private features are projected, and no loss reads the result.",
        "Nothing; its weights are in every checkpoint.",
    ),
    _loss(
        "margin_pairs",
        "Positive: another modality. Negative: the same modality (Eq. 4).",
        "Positives and negatives are taken from all modalities.",
        "More pairs; but a positive of the same modality says nothing about modalities.",
    ),
    _loss(
        "margin_class",
        "c[i] is the class label; `paper` rounds the scores.",
        "Clips are of one class only if their scores are exactly equal.",
        "No threshold to choose.",
    ),
    _loss(
        "margin_size",
        "alpha is a constant (Eq. 4).",
        "alpha is multiplied by the difference of the two labels.",
        "Opposite sentiments are pushed further apart than neighbours.",
    ),
    _loss(
        "margin_mean",
        "The mean runs over all triples (Eq. 4).",
        "It runs over the triples of each anchor, then over anchors.",
        "Frequent labels do not outvote rare ones.",
    ),
    _loss(
        "orthogonality",
        "The cosine itself is minimised (Eq. 5), down to -1.",
        "Only positive cosines cost: max(0, cos).",
        "Stops at a right angle, which is what the text asks for.",
    ),
    _loss(
        "orthogonality_axis",
        "The cosine of two feature vectors (Eq. 5).",
        "The cosine runs over the clips of the batch, for each step and channel.",
        "Bounds how far the same channel of both parts varies together.",
    ),
    _loss(
        "edge_prior edge_regulariser",
        "Edges are learned (Eqs. 8, 9); no prior is mentioned.",
        "A fixed prior is added to the edges, and their mean is drawn towards it.",
        "Keeps the edges from collapsing onto the pair that agrees already.",
    ),
    _loss(
        "representation",
        "Distillation moves logits (Eqs. 7, 9).",
        "In HeteroGD features are distilled too, with a loss that pushes them apart.",
        "Keeps heterogeneous features heterogeneous.",
    ),
    _train(
        "epochs",
        "30 epochs (Sec. 4).",
        "Until ten epochs bring no better validation loss.",
        "Adapts to the data.",
    ),
    _train(
        "accumulate accumulate_by drop_incomplete",
        "Batches of 16 (Sec. 4).",
        "Gradients of ten batches are summed for one step; an incomplete group is dropped.",
        "Steps of 160 clips in the memory of 16.",
    ),
    _train(
        "clip clip_at clip_each_batch",
        "Silent. The norm of the gradient is bounded by 1.",
        "Each value is bounded by 0.6, after every batch of a group.",
        "Cheap, and local to a parameter; but it turns the gradient.",
    ),
    _train(
        "test_each_epoch",
        "Silent. The test split is used once.",
        "It is evaluated in every epoch.",
        "One sees it all; nobody should choose by it.",
    ),
    _train(
        "seed",
        "Silent. Any seed.",
        "One seed, 1111.",
        "Repeatable; but one run has no spread.",
    ),
)


def switched(difference: Difference, **bases: Config) -> dict[str, Config]:
    """Configurations in which one difference takes the released values and nothing else does.

    bases: `model`, `loss` and `train` configurations to start from.
    """
    changed = bases[difference.kind].replace(**difference.values("released"))
    return {**bases, difference.kind: changed}
