"""Every setting of the model, the objective and the training loop, as three dataclasses.

Each has the presets `paper`, the default, and `released`: every point where the published code
parts from the paper is an option with one value in either.
"""

from dataclasses import dataclass, field
from typing import Any, Literal, Self

from dmd.options import Config


@dataclass(frozen=True)
class ModelConfig(Config):
    """The model: its sizes, its dropout rates, and one named option for every choice.

    Triples are in the order language, visual, acoustic. The defaults are the `paper` preset;
    where the paper gives no value they are the ones published with its code for CMU-MOSI. In the
    last section the first value of each option is that of `paper`, the other that of `released`.

    Sizes
        widths: input features of each modality, D_L, D_V, D_A.
        lengths: the most time steps that a clip may have, T_L, T_V, T_A.
        dim: width d of every feature after the shallow encoder.
        heads, layers: of each crossmodal and self-attention encoder.
        kernels: width in steps of the shallow convolutions.
    Dropout rates, in training only
        language_dropout: of the language features as they come in.
        embedding_dropout: of the sequences that enter an encoder, with their position code.
        attention_dropout: of attention weights, by the modality of the source; the encoders that
            attend to themselves use that of language.
        output_dropout: inside the residual network that fuses the parts.
    Choices
        causal_mask: let step t of an attention query see only steps up to t of its keys, or up to
            t plus the difference where the two sequences of a clip differ in length.
        pooling: how a sequence becomes a vector, the `mean` over valid steps or the `last` one.
        stop_teacher_gradient: a distillation edge moves its student only (Eq. 7). The distance
            |f_i - f_j| is symmetric, so without this the direction of an edge means nothing.
        edge_temperature: the logits of the edges are divided by it before the softmax.
    Ablations (Table 3): each switch removes the part and its parameters
        decoupling: without it the shallow features stand for both parts (Eqs. 1-6 vanish).
        homo_distillation, hetero_distillation: without it the unit keeps its regressor f, which
            predicts from each modality alone, and has no edges.
        crossmodal_attention: without it the private features are pooled as they are (no Eq. 10).
    Where the released implementation parts from the paper (it also sets some choices above)
        mask_padding: padded steps count for nothing, or (false) each clip is filled up with zeros
            to `lengths`, and these count as steps.
        projection_padding: of the shallow convolutions; `same` keeps all steps, `valid` those
            whose window lies inside the sequence, kernel - 1 fewer.
        skip_equal_projection: no convolution where the width of a modality is `dim` already.
        position_at_zero: every step has a position code, or (false) only those whose first
            channel is not exactly zero.
        separate_values: keys and values of a source share one embedding dropout, or (true) not.
        memory_layers_min: the least layers of the encoder that joins what two sources answered.
        acoustic_first: language asks the visual modality first, or (true) the acoustic one, which
            decides what its channels mean.
        unimodal_heads: `linear` shares one regressor f among the nodes of a graph (Eq. 8);
            `residual` gives each its own network, which for the homogeneous graph reads all
            steps of the sequence side by side. Its hidden layer (homo) or what it hands to its
            regressor (hetero) is then the node's feature.
        edge_hidden: 0: g of Eq. 8 reads logits and features (homo, hetero); more: it reads linear
            maps of both to that many channels.
        margin_projection: Eq. 4 compares pooled common features, or (true) linear maps of all
            their steps side by side.
        private_projection: the like for the private features (true), which nothing reads.
        common_attention: the common sequences go through self-attention before the fusion (true).
        common_head: the joined common part makes a prediction of its own (true).
        gates: of the fusion; they `multiply` the features, or `replace` them.
    """

    widths: tuple[int, int, int] = (300, 20, 5)
    lengths: tuple[int, int, int] = (50, 50, 50)
    dim: int = 50
    heads: int = 10
    layers: int = 4
    kernels: tuple[int, int, int] = (5, 5, 5)
    language_dropout: float = 0.5
    embedding_dropout: float = 0.2
    attention_dropout: tuple[float, float, float] = (0.3, 0.0, 0.2)
    output_dropout: float = 0.5
    causal_mask: bool = False
    pooling: Literal["mean", "last"] = "mean"
    stop_teacher_gradient: bool = True
    edge_temperature: float = 1.0
    decoupling: bool = True
    homo_distillation: bool = True
    crossmodal_attention: bool = True
    hetero_distillation: bool = True
    mask_padding: bool = True
    projection_padding: Literal["same", "valid"] = "same"
    skip_equal_projection: bool = False
    position_at_zero: bool = True
    separate_values: bool = False
    memory_layers_min: int = 1
    acoustic_first: bool = False
    unimodal_heads: Literal["linear", "residual"] = "linear"
    edge_hidden: tuple[int, int] = (0, 0)
    margin_projection: bool = False
    private_projection: bool = False
    common_attention: bool = False
    common_head: bool = False
    gates: Literal["multiply", "replace"] = "multiply"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("widths", "lengths", "kernels"):
            value = getattr(self, name)
            self._require(
                min(value) > 0,
                f"{name} must be three positive integers (language, visual, acoustic), not {value}",
            )
        for name in ("heads", "dim", "layers", "memory_layers_min"):
            self._require(getattr(self, name) > 0, f"{name} must be positive")
        self._require(min(self.edge_hidden) >= 0, "edge_hidden must not be negative")
        self._require(
            min(self.steps) > 0,
            f"kernels={self.kernels} are longer than lengths={self.lengths}, which "
            "projection_padding='valid' does not allow",
        )
        self._require(
            self.dim % self.heads == 0,
            f"dim={self.dim} must be a multiple of heads={self.heads}",
        )
        self._require(self.edge_temperature > 0, "edge_temperature must be positive")
        self._require_probability(
            "language_dropout", "embedding_dropout", "attention_dropout", "output_dropout"
        )

    @property
    def steps(self) -> tuple[int, int, int]:
        """Steps that are left of the longest clip after the shallow convolutions, L, V, A."""
        sizes = zip(self.widths, self.lengths, self.kernels, strict=True)
        valid = self.projection_padding == "valid"
        language, visual, acoustic = (
            length - kernel + 1
            if valid and not (self.skip_equal_projection and width == self.dim)
            else length
            for width, length, kernel in sizes
        )
        return language, visual, acoustic

    @classmethod
    def presets(cls) -> dict[str, dict[str, Any]]:
        """`paper`; `tiny`, the same model small enough to train while one reads a page; the
        published code for CMU-MOSI, `released`, and for CMU-MOSEI, `released_mosei`.
        """
        tiny = {
            "widths": (32, 12, 8), "lengths": (12, 12, 12), "dim": 16, "heads": 2, "layers": 1,
            "kernels": (3, 3, 3), "language_dropout": 0.1, "embedding_dropout": 0.0,
            "attention_dropout": (0.0, 0.0, 0.0), "output_dropout": 0.1,
        }  # fmt: skip
        released = {
            "widths": (768, 20, 5), "causal_mask": True, "pooling": "last",
            "edge_temperature": 8.0, "mask_padding": False, "projection_padding": "valid",
            "skip_equal_projection": True, "position_at_zero": False, "separate_values": True,
            "memory_layers_min": 3, "acoustic_first": True, "unimodal_heads": "residual",
            "edge_hidden": (64, 32), "margin_projection": True, "private_projection": True,
            "common_attention": True, "common_head": True, "gates": "replace",
        }  # fmt: skip
        released_mosei = {
            **released, "widths": (768, 35, 74), "dim": 30, "heads": 6, "kernels": (5, 3, 1),
            "language_dropout": 0.3, "embedding_dropout": 0.0,
            "attention_dropout": (0.4, 0.0, 0.0),
        }  # fmt: skip
        return {
            "paper": {}, "tiny": tiny, "released": released, "released_mosei": released_mosei
        }  # fmt: skip

    @classmethod
    def preset(cls, name: str, /, **overrides: Any) -> Self:
        """The configuration called `name`, with single fields replaced.

        In the released presets `heads` alone sets `dim` too: a published head has 5 channels.
        Raises ValueError for an unknown preset or field, naming the nearest known one.
        """
        heads = overrides.get("heads")
        if name.startswith("released") and type(heads) is int:
            overrides = {"dim": 5 * heads, **overrides}
        return super().preset(name, **overrides)


@dataclass(frozen=True)
class LossConfig(Config):
    """The weights of the objective (Eqs. 6 and 11) and the choices inside its terms.

    lambda1, lambda2, gamma: as in the paper (Sec. 4, chosen there on validation data).
    alpha: the margin of Eq. 4; the paper does not print it, the published code uses 0.15.
    unimodal: weight of the task loss of each of the six unimodal heads. The paper names one
        task loss, but f of Eq. 8 has to be trained by something.
    leave_out: one term of Eq. 6 that gets no weight, for ablations.
    orthogonality: `signed` is Eq. 5 as printed (lowest at cosine -1), `hinge` and `squared`
        are lowest at orthogonal features.
    From here on the first value is that of `paper`, the other that of `released`:
    orthogonality_axis: the cosine of Eq. 5 runs over the `feature` axis, or over the `batch`.
    margin_pairs: a positive of Eq. 4 is in another modality and a negative in the same (`triples`),
        or both are in any (`all`).
    margin_class: clips are of one class if their labels are equal when `rounded`, or `exact`.
    margin_size: the margin is alpha, `constant`, or alpha times the difference of the two `labels`.
    margin_mean: over all `triples`, or first over those of each of the `anchors`.
    edge_prior: added to the edges of Eq. 9: `none`, the same for all (`uniform`), or the one that
        favours L->V and L->A, and in the heterogeneous graph V->A (`released`).
    edge_regulariser: weight, 0 or 10, of the squared distance of the mean edges from the prior,
        beside the distillation of both graphs.
    representation: weight, 0 or 10, of a second distillation in the heterogeneous graph, which
        moves the features of student and teacher to a cosine of at most zero.
    """

    lambda1: float = 0.1
    lambda2: float = 0.05
    gamma: float = 0.1
    alpha: float = 0.15
    unimodal: float = 1.0
    leave_out: Literal["none", "reconstruction", "cycle", "margin", "orthogonality"] = "none"
    orthogonality: Literal["signed", "hinge", "squared"] = "signed"
    orthogonality_axis: Literal["feature", "batch"] = "feature"
    margin_pairs: Literal["triples", "all"] = "triples"
    margin_class: Literal["rounded", "exact"] = "rounded"
    margin_size: Literal["constant", "labels"] = "constant"
    margin_mean: Literal["triples", "anchors"] = "triples"
    edge_prior: Literal["none", "uniform", "released"] = "none"
    edge_regulariser: float = 0.0
    representation: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, value in self.to_dict().items():
            if isinstance(value, float):
                self._require(value >= 0, f"{name} must not be negative")
        self._require(
            self.edge_regulariser == 0 or self.edge_prior != "none",
            "edge_regulariser needs an edge_prior to draw the edges to",
        )

    @classmethod
    def presets(cls) -> dict[str, dict[str, Any]]:
        """`paper`, and `released`: the losses of the published code."""
        released = {
            "orthogonality": "hinge", "orthogonality_axis": "batch", "margin_pairs": "all",
            "margin_class": "exact", "margin_size": "labels", "margin_mean": "anchors",
            "edge_prior": "released", "edge_regulariser": 10.0, "representation": 10.0,
        }  # fmt: skip
        return {"paper": {}, "released": released}


@dataclass(frozen=True)
class TrainConfig(Config):
    """The training loop.

    epochs, batch_size: 30 and 16 in the paper (Sec. 4); epochs may be None, until `patience` ends.
    learning_rate, weight_decay: of Adam; the published code uses 1e-4 and no decay.
    accumulate: batches whose gradients make one step.
    accumulate_by: the `mean` or the `sum` of their gradients.
    drop_incomplete: leave out the batches at the end of an epoch that are too few for a step.
    clip, clip_at: bound each gradient `value`, the `norm` of all, or nothing.
    clip_each_batch: bound what has accumulated after every batch, not once before the step.
    scheduler: `plateau` halves the rate when more than 5 epochs bring no better validation score,
        `cosine` lets it fall to zero over the epochs.
    patience: stop after that many epochs without a better validation score (None: never).
    select: the validation score that picks the epoch to keep; `mae` is lowest, others highest.
    test_each_epoch: every epoch's history has the scores on the test split; they choose nothing.
    device: `auto` takes cuda, else mps, else cpu.
    seed: of all that is random.
    precision: `bf16` and `fp16` run the forward pass in mixed precision.
    capture: on a CUDA device record the training step once and replay it (`dmd.fast`).
    margin_over: of processes that share each batch (torchrun). Eq. 4 compares all clips of a batch
        (`global`), as one process does, or those of each process (`rank`) among themselves: fewer
        triples, and the mean of these losses weighted by clips. All other terms are always those
        of the whole batch.
    loss: the weights of the objective.
    """

    epochs: int | None = 30
    batch_size: int = 16
    learning_rate: float = 1e-4
    weight_decay: float = 0.0
    accumulate: int = 1
    accumulate_by: Literal["mean", "sum"] = "mean"
    drop_incomplete: bool = False
    clip: Literal["none", "value", "norm"] = "norm"
    clip_at: float = 1.0
    clip_each_batch: bool = False
    scheduler: Literal["none", "plateau", "cosine"] = "plateau"
    patience: int | None = 10
    select: Literal["mae", "corr", "acc2_has0", "acc2_non0", "acc7"] = "mae"
    test_each_epoch: bool = False
    seed: int = 0
    device: str = "auto"
    precision: Literal["float32", "bf16", "fp16"] = "float32"
    capture: bool = False
    margin_over: Literal["global", "rank"] = "global"
    loss: LossConfig = field(default_factory=LossConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("batch_size", "accumulate", "learning_rate", "clip_at"):
            self._require(getattr(self, name) > 0, f"{name} must be positive")
        self._require(self.epochs is None or self.epochs > 0, "epochs must be positive")
        self._require(
            self.epochs is not None or (self.patience is not None and self.scheduler != "cosine"),
            "epochs=None needs a patience, and a scheduler other than 'cosine'",
        )
        self._require(
            self.precision != "fp16" or not self.clip_each_batch,
            "clip_each_batch can't bound the gradients of precision='fp16', which are scaled until "
            "the step: take 'bf16' or 'float32'",
        )
        self._require(self.weight_decay >= 0, "weight_decay must not be negative")
        self._require(0 <= self.seed < 2**32, f"seed must lie in [0, 2**32), not {self.seed}")
        self._require(self.patience is None or self.patience > 0, "patience must be positive")

    @classmethod
    def presets(cls) -> dict[str, dict[str, Any]]:
        """`paper`, and `released`: the training of the published code, which has one seed."""
        released = {
            "epochs": None, "accumulate": 10, "accumulate_by": "sum", "drop_incomplete": True,
            "clip": "value", "clip_at": 0.6, "clip_each_batch": True, "test_each_epoch": True,
            "seed": 1111, "loss": LossConfig.preset("released"),
        }  # fmt: skip
        return {"paper": {}, "released": released}
