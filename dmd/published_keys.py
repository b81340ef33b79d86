"""The weights of `DMD` by the keys of the published state dicts: names and order of channels.

Published names say l, v, a for the modalities, `s` for private, `c` for common, `low` for
homogeneous and `high` for heterogeneous heads.
"""

from collections.abc import Iterator, Mapping
from typing import Literal

import torch
from torch import Tensor

from dmd.batch import PerModality
from dmd.model import PAIRS

LETTERS = PerModality("l", "v", "a")
Part = Literal["dmd", "homo", "hetero"]


def published(own: Mapping[str, Tensor], part: Part) -> dict[str, Tensor]:
    """The published state dict of a part, each weight a rearrangement of those of `DMD`.

    own: the state dict of a model under the preset `released`; part: the main model `dmd`, or the
    distillation kernel of one of the two graphs.
    """
    return dict(_main(own) if part == "dmd" else _kernel(own, part))


def _linear(theirs: str, ours: str, own: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    for kind in ("weight", "bias"):
        yield f"{theirs}.{kind}", own[f"{ours}.{kind}"]


def _encoder(
    theirs: str, ours: str, n: int, own: Mapping[str, Tensor]
) -> Iterator[tuple[str, Tensor]]:
    """The encoder number n of those that run side by side under the name `ours`."""

    def both(theirs: str, *ours: str) -> Iterator[tuple[str, Tensor]]:
        weight = torch.cat([own[f"{name}.weight"][n] for name in ours], dim=-1)
        bias = torch.cat([own[f"{name}.bias"][n] for name in ours], dim=-1)
        yield f"{theirs}weight", weight.flatten() if weight.dim() == 3 else weight.T
        yield f"{theirs}bias", bias.flatten()

    layer = 0
    while f"{ours}.layers.{layer}.expand.weight" in own:
        to, at = f"{theirs}.layers.{layer}", f"{ours}.layers.{layer}"
        packed = [f"{at}.attention.{name}" for name in ("query", "key_value")]
        yield from both(f"{to}.self_attn.in_proj_", *packed)
        yield from both(f"{to}.self_attn.out_proj.", f"{at}.attention.output")
        yield from both(f"{to}.fc1.", f"{at}.expand")
        yield from both(f"{to}.fc2.", f"{at}.contract")
        yield from both(f"{to}.layer_norms.0.", f"{at}.attention_norm")
        yield from both(f"{to}.layer_norms.1.", f"{at}.feedforward_norm")
        layer += 1
    yield from both(f"{theirs}.layer_norm.", f"{ours}.norm")


def _main(own: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """The main model's weights by their published keys, from those of `DMD`."""
    yield "encoder_c.weight", own["decoupling.common_encoder.weight"][:, :, None]
    for n, (source, target) in enumerate(PAIRS):
        name = f"trans_{LETTERS[target]}_with_{LETTERS[source]}"
        yield from _encoder(name, "crossmodal", n, own)
    for m, letter in enumerate(LETTERS):
        yield f"proj_{letter}.weight", own[f"shallow.{m}.convolution.weight"]
        encoder = own[f"decoupling.private_encoders.{m}.weight"]
        yield f"encoder_s_{letter}.weight", encoder[:, :, None]
        common, private = own[f"decoupling.decoders.{m}.weight"].chunk(2, dim=1)
        yield f"decoder_{letter}.weight", torch.cat([private, common], dim=1)[:, :, None]
        yield from _linear(f"proj_cosine_{letter}", f"private_projection.{m}", own)
        yield from _linear(f"align_c_{letter}", f"margin_projection.{m}", own)
        yield from _encoder(f"self_attentions_c_{letter}", "common_attention", m, own)
        yield from _encoder(f"trans_{letter}_mem", "memory", m, own)
        for theirs, ours in (("low", f"homo_heads.{m}"), ("high", f"hetero_heads.{m}")):
            yield from _linear(f"proj1_{letter}_{theirs}", f"{ours}.residual.0", own)
            yield from _linear(f"proj2_{letter}_{theirs}", f"{ours}.residual.3", own)
            yield from _linear(f"out_layer_{letter}_{theirs}", f"{ours}.regressor", own)
        yield from _linear(f"weight_{letter}", f"fusion.gates.{m + 1}", own)
    yield from _linear("weight_c", "fusion.gates.0", own)
    yield from _linear("proj1_c", "common_head.residual.0", own)
    yield from _linear("proj2_c", "common_head.residual.3", own)
    yield from _linear("out_layer_c", "common_head.regressor", own)
    # Ours joins [common, l, v, a], theirs [l, v, a, common].
    width = len(own["fusion.gates.0.bias"])
    yield "proj1.weight", own["fusion.residual.0.weight"].roll(-width, dims=1)
    yield "proj1.bias", own["fusion.residual.0.bias"]
    yield "proj2.weight", own["fusion.residual.3.weight"].roll(-width, dims=0)
    yield "proj2.bias", own["fusion.residual.3.bias"].roll(-width)
    yield "out_layer.weight", own["fusion.regressor.weight"].roll(-width, dims=1)
    yield "out_layer.bias", own["fusion.regressor.bias"]


def _kernel(own: Mapping[str, Tensor], graph: str) -> Iterator[tuple[str, Tensor]]:
    """A distillation kernel's weights by their published keys."""
    yield from _linear("W_logit", f"{graph}.edge_logit", own)
    yield from _linear("W_repr", f"{graph}.edge_feature", own)
    teacher, student = own[f"{graph}.edge.weight"].chunk(2, dim=1)
    yield "W_edge.weight", torch.cat([student, teacher], dim=1)
    yield "W_edge.bias", own[f"{graph}.edge.bias"]
