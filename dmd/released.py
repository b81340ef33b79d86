"""The implementation that the paper's authors published: its checkpoints, outputs and losses.

The model is `DMD` under the preset `released`; here names are translated. Published names say `s`
for private, `c` for common, `low` for homogeneous and `high` for heterogeneous heads.
"""

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dmd.batch import Batch
from dmd.config import LossConfig, ModelConfig
from dmd.losses import distillation, edge_prior, objective
from dmd.model import DMD, Output
from dmd.published_keys import LETTERS, Part, published

SIZES = ("dim", "layers", "kernels", "widths", "lengths")


def load(path: str | Path) -> dict[str, Tensor]:
    """The state dict in a published checkpoint (`.pth`), for `from_state`; no code in it is run.

    Raises FileNotFoundError, and ValueError for a file that is not a plain dictionary of tensors.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no checkpoint {path}")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # zipfile, pickle and torch each have their own for a broken file
        raise ValueError(
            f"{path} is damaged, or holds more than tensors; nothing in it was run: save the "
            "model's state_dict()"
        ) from error
    names = isinstance(state, dict) and all(isinstance(key, str) for key in state)
    if not names or not all(isinstance(x, Tensor) for x in state.values()):
        raise ValueError(f"{path} holds no state dict: save the model's state_dict()")
    return state


def to_state(model: DMD, part: Part = "dmd") -> dict[str, Tensor]:
    """The weights of a released model by their published keys: the inverse of `from_state`.

    part: `dmd`, the main model, which is all that the published code saves; or one of the two
    distillation kernels, `homo` and `hetero`.
    Raises ValueError for a model of another structure.
    """
    _require_released(model.config)
    own = {k: x.detach().clone() for k, x in model.state_dict().items()}
    state = published(own, part)
    if part == "dmd":
        encoders = [k.removesuffix("layer_norm.weight") for k in state if ".layer_norm.weight" in k]
        for encoder in encoders:
            state[f"{encoder}version"] = torch.tensor([2.0])
            state[f"{encoder}embed_positions._float_tensor"] = torch.zeros(1)
    return state


def from_state(
    state: Mapping[str, Any],
    *,
    homo: Mapping[str, Any] | None = None,
    hetero: Mapping[str, Any] | None = None,
    config: ModelConfig | None = None,
) -> DMD:
    """A model in evaluation mode, under the preset `released`, with the published weights.

    state: the main model's state dict, tensors or arrays by their published keys; homo, hetero:
    those of the kernels, which no published checkpoint has. Without them the edges are those of a
    fresh model; no prediction depends on them.
    config: a `released` preset, for the number of heads, the causal mask and the dropout, which
    the shapes of the weights do not tell; without it they are the published ones for CMU-MOSI, or
    CMU-MOSEI where d is 30. The sizes are taken from the shapes; one that `config` sets to
    anything but its preset value has to agree.
    Raises ValueError, with a sentence that names the key, for weights that do not fit.
    """
    main = _tensors(state, "dmd")
    config = _configure(main, config)
    model = DMD(config).to(next(iter(main.values())).dtype)
    own = model.state_dict()
    # Every published weight is a rearrangement of ours. Where each element goes is found by
    # rearranging the elements' numbers; following them backwards fills in our weights.
    sizes = [x.numel() for x in own.values()]
    number = torch.arange(sum(sizes)).split(sizes)
    numbers = {k: n.view_as(x) for (k, x), n in zip(own.items(), number, strict=True)}
    flat = torch.cat([x.flatten() for x in own.values()])
    given: dict[Part, Mapping[str, Any] | None] = {"dmd": main, "homo": homo, "hetero": hetero}
    for part, weights in given.items():
        if weights is None:
            continue
        places = published(numbers, part)
        tensors = _tensors(weights, part)
        for key in tensors.keys() - places.keys():
            raise ValueError(f"{part}: the weight {key!r} has no place in the released model")
        for key, place in places.items():
            if key not in tensors:
                raise ValueError(f"{part}: the weight {key!r} is missing")
            if tensors[key].shape != place.shape:
                raise ValueError(
                    f"{part}: {key!r} has shape {tuple(tensors[key].shape)}, but the other weights "
                    f"ask for {tuple(place.shape)}"
                )
            flat[place] = tensors[key].to(flat)
    model.load_state_dict({k: flat[place] for k, place in numbers.items()})
    return model.eval()


def _tensors(state: Mapping[str, Any], part: str) -> dict[str, Tensor]:
    """The weights of a state dict as tensors, without the text encoder and what is no weight."""
    if any(key.startswith("text_model.") for key in state):
        warnings.warn(
            "the text encoder in the checkpoint (text_model) is left out: the model takes the "
            "features that it makes",
            stacklevel=3,
        )
    tensors = {
        key: torch.as_tensor(x)
        for key, x in state.items()
        if not key.endswith((".version", "._float_tensor")) and not key.startswith("text_model.")
    }
    for key, x in tensors.items():
        if not x.is_floating_point() or x.layout != torch.strided or x.is_meta:
            raise ValueError(f"{part}: {key!r} is no plain tensor of floating-point numbers")
    return tensors


def _require_released(config: ModelConfig) -> None:
    """Refuse a model whose structure is not that of the published code."""
    for name, value in ModelConfig.preset("released").to_dict().items():
        free = name in (*SIZES, "heads", "causal_mask") or name.endswith("_dropout")
        if not free and getattr(config, name) != value:
            raise ValueError(
                f"{name}={getattr(config, name)!r}, but the released model has {value!r}: start "
                "from ModelConfig.preset('released')"
            )


def _configure(state: Mapping[str, Tensor], given: ModelConfig | None) -> ModelConfig:
    """The configuration of a state dict: sizes from its shapes, the rest from `given`."""
    sizes = _sizes(state)
    if given is None:
        name = "released_mosei" if sizes["dim"] == 30 else "released"
        given = ModelConfig.preset(name)
        if sizes["dim"] % given.heads:
            raise ValueError(
                f"the published model has {given.heads} heads, which can't share d = "
                f"{sizes['dim']} channels: say how many there are, heads=..."
            )
    else:
        _require_released(given)
        preset = ModelConfig.preset("released", heads=given.heads)
        for name, size in sizes.items():
            if getattr(given, name) not in (size, getattr(preset, name)):
                raise ValueError(
                    f"the config says {name}={getattr(given, name)}, but the weights {size}"
                )
    return given.replace(**sizes)


def _sizes(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """What the shapes of the published weights tell of the configuration."""
    for m in LETTERS:
        for key, rank in ((f"proj_{m}.weight", 3), (f"align_c_{m}.weight", 2)):
            if key not in state:
                raise ValueError(f"dmd: the weight {key!r} is missing")
            shape = tuple(state[key].shape)
            if len(shape) != rank or 0 in shape:
                raise ValueError(f"dmd: {key!r} has shape {shape}, not {rank} sizes above zero")
    (dim, *_), widths, kernels = zip(
        *(state[f"proj_{m}.weight"].shape for m in LETTERS), strict=True
    )
    steps = [state[f"align_c_{m}.weight"].shape[1] // dim for m in LETTERS]
    sizes = zip(steps, widths, kernels, strict=True)
    layers = {k.split(".")[2] for k in state if k.startswith("trans_l_with_a.layers.")}
    return {
        "dim": dim,
        "layers": len(layers),
        "kernels": kernels,
        "widths": widths,
        "lengths": tuple(t + (k - 1 if width != dim else 0) for t, width, k in sizes),
    }


def _forward(model: DMD, text: Any, audio: Any, vision: Any) -> Output:
    _require_released(model.config)
    language, acoustic, visual = (torch.as_tensor(x) for x in (text, audio, vision))
    output: Output = model(Batch(language=language, visual=visual, acoustic=acoustic))
    return output


def outputs(model: DMD, text: Any, audio: Any, vision: Any) -> dict[str, Tensor]:
    """What the published forward pass returns, by its names and in its shapes.

    text, audio, vision: (B, T_m, D_m), tensors or arrays, in the published order. Sequences are
    (T', B, d) for `s_*` and `c_*`, (B, d, T') for `origin_*`, `recon_*` and `s_*_r`; edges are
    (6, B), in the order l<-v, l<-a, v<-l, v<-a, a<-l, a<-v; logits (B, 1).
    """
    output = _forward(model, text, audio, vision)
    found: dict[str, Tensor] = {}
    assert output.reconstructed is not None and output.private_again is not None
    assert output.common_prediction is not None
    for m, letter in enumerate(LETTERS):
        private = output.private[m]
        projection = model.private_projection[m]
        found |= {
            f"origin_{letter}": output.shallow[m].transpose(1, 2),
            f"s_{letter}": private.transpose(0, 1),
            f"c_{letter}": output.common[m].transpose(0, 1),
            f"recon_{letter}": output.reconstructed[m].transpose(1, 2),
            f"s_{letter}_r": output.private_again[m].transpose(1, 2),
            f"c_{letter}_sim": output.margin_vectors[m],
            f"proj_s_{letter}": projection(private.flatten(1)),
            f"last_h_{letter}": output.parts[m + 1],
        }
        for name, graph in (("homo", output.homo), ("hetero", output.hetero)):
            found[f"logits_{letter}_{name}"] = graph.logits[m][:, None]
            found[f"repr_{letter}_{name}"] = graph.features[m]
    for name, graph in (("homo", output.homo), ("hetero", output.hetero)):
        pairs = [(i, j) for j in range(3) for i in range(3) if i != j]
        found[f"edges_{name}"] = torch.stack([graph.edges[:, i, j] for i, j in pairs])
    found["logits_c"] = output.common_prediction[:, None]
    found["output_logit"] = output.prediction[:, None]
    return found


def losses(model: DMD, text: Any, audio: Any, vision: Any, labels: Any) -> dict[str, Tensor]:
    """The terms of the published loss by name, and their weighted sum `total`; all scalars.

    text, audio, vision: as in `outputs`; labels: (B,) or (B, 1). `homo_repr` is computed there and
    left out of the total.
    """
    output = _forward(model, text, audio, vision)
    config = LossConfig.preset("released")
    label = torch.as_tensor(labels).flatten().to(output.prediction)
    objective_terms = objective(output, label, config)
    terms = objective_terms.unweighted
    homo = output.homo
    gaps = (homo.features.detach()[:, None] - homo.features[None]).abs().sum(dim=3)  # (3, 3, B)
    edges = homo.edges + edge_prior("homo", "released").to(homo.edges)
    return {
        "task": sum((terms[k] for k in terms if k.startswith("task")), torch.zeros(())),
        "rec": terms["reconstruction"],
        "cyc": terms["cycle"],
        "margin": terms["margin"],
        "ort": terms["orthogonality"],
        "homo_reg": config.edge_regulariser * terms["edges_homo"],
        "homo_logit": terms["distil_homo"],
        "homo_repr": config.representation * distillation(edges, gaps.permute(2, 0, 1)),
        "hetero_reg": config.edge_regulariser * terms["edges_hetero"],
        "hetero_logit": terms["distil_hetero"],
        "hetero_repr": config.representation * terms["representation"],
        "total": objective_terms.total,
    }
