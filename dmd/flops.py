"""The floating-point operations of a training step, by formula.

A product of matrices (R, I) and (I, O) is 2 R I O operations, a multiplication and an addition
each. Only products count: linear maps, convolutions, and attention. What is done number by number
(norms, activations, dropout, losses, the optimiser) is small beside them.
"""

from collections.abc import Iterable

from dmd.config import ModelConfig
from dmd.model import PAIRS


def linear(rows: int, inputs: int, outputs: int) -> int:
    """A linear map of `rows` vectors, or any product of matrices (rows, inputs, outputs)."""
    return 2 * rows * inputs * outputs


def encoder(clips: int, queries: int, keys: int, dim: int, layers: int) -> int:
    """A crossmodal encoder (Eq. 10) for targets of `queries` steps and sources of `keys` steps."""
    target, source = clips * queries, clips * keys
    projections = 2 * linear(target, dim, dim) + 2 * linear(source, dim, dim)  # P_q, out; P_k, P_v
    products = 2 * linear(target, dim, keys)  # Q K^T and weights V, of all heads together
    network = linear(target, dim, 4 * dim) + linear(target, 4 * dim, dim)
    return layers * (projections + products + network)


def residual(clips: int, width: int, hidden: int) -> int:
    """A residual network and the regressor behind it."""
    return linear(clips, width, hidden) + linear(clips, hidden, width) + linear(clips, width, 1)


def graph(clips: int, width: int, regress: bool, distil: bool, hidden: int) -> int:
    """A graph distillation unit (Eq. 8): f on three nodes and g on nine pairs of nodes."""
    node = 2 * hidden if hidden else width + 1
    total = linear(3 * clips, width, 1) if regress else 0
    if distil:
        total += linear(9 * clips, 2 * node, 1)
        total += linear(3 * clips, 1, hidden) + linear(3 * clips, width, hidden)
    return total


def convolutions(config: ModelConfig, clips: int) -> int:
    """The shallow convolutions; padding with zeros is multiplied too."""
    sizes = zip(config.widths, config.steps, config.kernels, strict=True)
    return sum(
        linear(clips * steps, kernel * width, config.dim)
        for width, steps, kernel in sizes
        if not (config.skip_equal_projection and width == config.dim)
    )


def forward_flops(config: ModelConfig, clips: int) -> dict[str, int]:
    """The forward pass and the losses for `clips` clips of full length, part by part."""
    dim, steps = config.dim, config.steps
    flat = [n * dim for n in steps]
    private = 2 * dim if config.crossmodal_attention else dim
    parts = dict.fromkeys(
        ("convolutions", "decoupling", "crossmodal", "memory", "common", "graphs", "fusion"), 0
    )
    parts["convolutions"] = convolutions(config, clips)
    if config.decoupling:  # the common encoder, the private one twice, a decoder of twice the width
        parts["decoupling"] = linear(clips * sum(steps), dim, 5 * dim)
        parts["decoupling"] += linear(3 * clips, dim, 3 * clips)  # the cosines of Eq. (4)
    if config.margin_projection:
        parts["decoupling"] += sum(linear(clips, width, dim) for width in flat)

    def selves(width: int, layers: int) -> int:
        return sum(encoder(clips, n, n, width, layers) for n in steps)

    if config.crossmodal_attention:
        parts["crossmodal"] = sum(
            encoder(clips, steps[target], steps[source], dim, config.layers)
            for source, target in PAIRS
        )
        parts["memory"] = selves(2 * dim, max(config.layers, config.memory_layers_min))
    if config.common_attention:
        parts["common"] = selves(dim, config.layers)

    regress = config.unimodal_heads == "linear"
    homo, hetero = config.edge_hidden
    parts["graphs"] = graph(clips, dim, regress, config.homo_distillation, homo)
    parts["graphs"] += graph(clips, private, regress, config.hetero_distillation, hetero)
    if not regress:
        parts["graphs"] += sum(residual(clips, width, dim) for width in flat)
        parts["graphs"] += 3 * residual(clips, private, private)
    if config.common_head:
        parts["fusion"] += residual(clips, 3 * dim, 3 * dim)
    parts["fusion"] += _gates_and_fusion(clips, [3 * dim, private, private, private])
    return parts


def _gates_and_fusion(clips: int, widths: Iterable[int]) -> int:
    widths = list(widths)
    gates = sum(linear(clips, width, width) for width in widths)
    return gates + residual(clips, sum(widths), sum(widths))


def step_flops(config: ModelConfig, clips: int) -> int:
    """A training step: three times the forward pass.

    The backward pass of a product is two products of the same size, one for the gradient of
    either factor.
    """
    return 3 * sum(forward_flops(config, clips).values())
