"""The published forward pass and its losses, written down plainly, to hold `dmd.released` against.

It works on the three state dicts by their published keys, in evaluation mode and in the floating
point type of the weights. It is slow on purpose: a loop wherever the facts are stated one by one
(heads, edges, anchors, pairs). It imports nothing from `dmd`.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F

LETTERS = "lva"  # language, visual, acoustic: the order of every list here
HOMO_PRIOR = (0, 0, 1, 0, 1, 0)  # of the edges in the order of EDGES
HETERO_PRIOR = (0, 0, 1, 0, 1, 1)
EDGES = [(target, source) for target in LETTERS for source in LETTERS if source != target]
# Whom a modality asks, in the order in which the answers are joined.
SOURCES = {"l": "av", "v": "la", "a": "lv"}


@dataclass(frozen=True)
class Sizes:
    """The sizes of one instance; triples in the order language, visual, acoustic."""

    widths: tuple[int, int, int]
    lengths: tuple[int, int, int]
    kernels: tuple[int, int, int]
    dim: int
    heads: int
    layers: int

    @property
    def steps(self):
        """Steps that the projection leaves, by letter."""
        return {
            m: length if width == self.dim else length - kernel + 1
            for m, width, length, kernel in zip(
                LETTERS, self.widths, self.lengths, self.kernels, strict=True
            )
        }


# --- Random weights ------------------------------------------------------------------------------


def random_state(sizes, seed, dtype=torch.float64):
    """Random weights -> (dmd, homo, hetero): three state dicts by the published keys."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    def weight(*shape):  # of an expected output size of about 1
        return normal(*shape) / math.sqrt(math.prod(shape[1:]))

    def linear(state, name, inputs, outputs):
        state[f"{name}.weight"] = weight(outputs, inputs)
        state[f"{name}.bias"] = 0.1 * normal(outputs)

    def norm(state, name, width):
        state[f"{name}.weight"] = 1 + 0.1 * normal(width)
        state[f"{name}.bias"] = 0.1 * normal(width)

    def encoder(state, name, width, layers):
        state[f"{name}.version"] = torch.tensor([2.0])
        state[f"{name}.embed_positions._float_tensor"] = torch.randn(1, generator=generator)
        for k in range(layers):
            layer = f"{name}.layers.{k}"
            state[f"{layer}.self_attn.in_proj_weight"] = weight(3 * width, width)
            state[f"{layer}.self_attn.in_proj_bias"] = 0.1 * normal(3 * width)
            linear(state, f"{layer}.self_attn.out_proj", width, width)
            linear(state, f"{layer}.fc1", width, 4 * width)
            linear(state, f"{layer}.fc2", 4 * width, width)
            norm(state, f"{layer}.layer_norms.0", width)
            norm(state, f"{layer}.layer_norms.1", width)
        norm(state, f"{name}.layer_norm", width)

    d = sizes.dim
    dmd = {}
    dmd["encoder_c.weight"] = weight(d, d, 1)
    for m, width, kernel in zip(LETTERS, sizes.widths, sizes.kernels, strict=True):
        flat = d * sizes.steps[m]
        dmd[f"proj_{m}.weight"] = weight(d, width, kernel)  # present even where it is skipped
        dmd[f"encoder_s_{m}.weight"] = weight(d, d, 1)
        dmd[f"decoder_{m}.weight"] = weight(d, 2 * d, 1)
        linear(dmd, f"proj_cosine_{m}", flat, d)
        linear(dmd, f"align_c_{m}", flat, d)
        encoder(dmd, f"self_attentions_c_{m}", d, sizes.layers)
        for source in SOURCES[m]:
            encoder(dmd, f"trans_{m}_with_{source}", d, sizes.layers)
        encoder(dmd, f"trans_{m}_mem", 2 * d, max(sizes.layers, 3))
        linear(dmd, f"proj1_{m}_low", flat, d)
        linear(dmd, f"proj2_{m}_low", d, flat)
        linear(dmd, f"out_layer_{m}_low", flat, 1)
        linear(dmd, f"proj1_{m}_high", 2 * d, 2 * d)
        linear(dmd, f"proj2_{m}_high", 2 * d, 2 * d)
        linear(dmd, f"out_layer_{m}_high", 2 * d, 1)
        linear(dmd, f"weight_{m}", 2 * d, 2 * d)
    linear(dmd, "proj1_c", 3 * d, 3 * d)
    linear(dmd, "proj2_c", 3 * d, 3 * d)
    linear(dmd, "out_layer_c", 3 * d, 1)
    linear(dmd, "weight_c", 3 * d, 3 * d)
    linear(dmd, "proj1", 9 * d, 9 * d)
    linear(dmd, "proj2", 9 * d, 9 * d)
    linear(dmd, "out_layer", 9 * d, 1)

    def kernel(hidden, width):
        state = {}
        linear(state, "W_logit", 1, hidden)
        linear(state, "W_repr", width, hidden)
        linear(state, "W_edge", 4 * hidden, 1)
        return state

    return dmd, kernel(64, d), kernel(32, 2 * d)


# --- The forward pass ----------------------------------------------------------------------------


def linear(state, name, x):
    return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]


def norm(state, name, x):
    return F.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"])


def per_step(weight, x):
    """A convolution of kernel 1, weight (out, in, 1), on (B, T, in)."""
    return x @ weight[:, :, 0].T


def position_code(x):
    """(B, T, E) -> the code of each step, zero where the first channel is."""
    clips, steps, width = x.shape
    half = width // 2
    frequency = torch.exp(torch.arange(half, dtype=torch.float32) * -(math.log(10000) / (half - 1)))
    code = torch.zeros(clips, steps, width, dtype=torch.float32)  # an odd last channel stays zero
    for b in range(clips):
        for t in range(steps):
            if x[b, t, 0] != 0:
                angle = (t + 1) * frequency
                code[b, t, :half] = angle.sin()
                code[b, t, half : 2 * half] = angle.cos()
    return code.to(x.dtype)


def attention(state, name, query, source, heads, mask):
    """Multi-head attention of `query` (B, Tq, E) to `source` (B, Tk, E)."""
    width = query.shape[-1]
    weights = state[f"{name}.in_proj_weight"].split(width)
    biases = state[f"{name}.in_proj_bias"].split(width)
    q, k, v = (
        x @ weight.T + bias
        for x, weight, bias in zip((query, source, source), weights, biases, strict=True)
    )
    size = width // heads
    answers = []
    for h in range(heads):
        part = slice(h * size, (h + 1) * size)
        scores = size**-0.5 * q[..., part] @ k[..., part].transpose(1, 2)
        if mask:
            steps_q, steps_k = scores.shape[1:]
            for i in range(steps_q):
                for j in range(steps_k):
                    if j > i + abs(steps_k - steps_q):
                        scores[:, i, j] = -math.inf
        answers.append(scores.softmax(-1) @ v[..., part])
    return linear(state, f"{name}.out_proj", torch.cat(answers, -1))


def encoder(state, name, query, source, heads, mask):
    """(B, Tq, E) attends to (B, Tk, E), or with `source` None to itself."""
    root = math.sqrt(query.shape[-1])
    x = root * query + position_code(query)
    y = None if source is None else root * source + position_code(source)
    k = 0
    while f"{name}.layers.{k}.fc1.weight" in state:
        layer = f"{name}.layers.{k}"
        normal = norm(state, f"{layer}.layer_norms.0", x)
        other = normal if y is None else norm(state, f"{layer}.layer_norms.0", y)
        x = x + attention(state, f"{layer}.self_attn", normal, other, heads, mask)
        normal = norm(state, f"{layer}.layer_norms.1", x)
        x = x + linear(state, f"{layer}.fc2", linear(state, f"{layer}.fc1", normal).relu())
        k += 1
    return norm(state, f"{name}.layer_norm", x)


def residual(state, first, second, x):
    return linear(state, second, linear(state, first, x).relu()) + x


def edges(state, logits, features):
    """Logits and features by letter -> weights (B, 6) of the edges in the order of EDGES."""
    z = {
        m: torch.cat(
            [linear(state, "W_logit", logits[m]), linear(state, "W_repr", features[m])], -1
        )
        for m in LETTERS
    }
    scores = [linear(state, "W_edge", torch.cat([z[j], z[i]], -1)) for j, i in EDGES]
    return (torch.cat(scores, -1) / 8).softmax(-1)


def outputs(state, homo, hetero, text, audio, vision, heads, mask):
    """Inputs (B, T_m, D_m) -> every output by its published name, and both edge matrices (6, B)."""
    inputs = {"l": text, "v": vision, "a": audio}
    d = state["encoder_c.weight"].shape[0]
    out, private, common = {}, {}, {}
    for m in LETTERS:
        x = inputs[m].transpose(1, 2)
        if inputs[m].shape[-1] != d:
            x = F.conv1d(x, state[f"proj_{m}.weight"])
        x = x.transpose(1, 2)
        s = private[m] = per_step(state[f"encoder_s_{m}.weight"], x)
        c = common[m] = per_step(state["encoder_c.weight"], x)
        recon = per_step(state[f"decoder_{m}.weight"], torch.cat([s, c], -1))
        again = per_step(state[f"encoder_s_{m}.weight"], recon)
        out[f"origin_{m}"] = x.transpose(1, 2)
        out[f"s_{m}"], out[f"c_{m}"] = s.transpose(0, 1), c.transpose(0, 1)
        out[f"recon_{m}"], out[f"s_{m}_r"] = recon.transpose(1, 2), again.transpose(1, 2)
        out[f"c_{m}_sim"] = linear(state, f"align_c_{m}", c.transpose(1, 2).flatten(1))
        out[f"proj_s_{m}"] = linear(state, f"proj_cosine_{m}", s.flatten(1))

        h = c.flatten(1)
        r = out[f"repr_{m}_homo"] = linear(state, f"proj1_{m}_low", h).relu()
        out[f"logits_{m}_homo"] = linear(
            state, f"out_layer_{m}_low", linear(state, f"proj2_{m}_low", r) + h
        )

    c_f = torch.cat(
        [
            encoder(state, f"self_attentions_c_{m}", common[m], None, heads, mask)[:, -1]
            for m in LETTERS
        ],
        -1,
    )
    out["logits_c"] = linear(state, "out_layer_c", residual(state, "proj1_c", "proj2_c", c_f))

    gates = []
    for m in LETTERS:
        asked = [
            encoder(state, f"trans_{m}_with_{i}", private[m], private[i], heads, mask)
            for i in SOURCES[m]
        ]
        joined = encoder(state, f"trans_{m}_mem", torch.cat(asked, -1), None, heads, mask)
        h = out[f"last_h_{m}"] = joined[:, -1]
        out[f"repr_{m}_hetero"] = residual(state, f"proj1_{m}_high", f"proj2_{m}_high", h)
        out[f"logits_{m}_hetero"] = linear(state, f"out_layer_{m}_high", out[f"repr_{m}_hetero"])
        gates.append(linear(state, f"weight_{m}", h).sigmoid())
    gates.append(linear(state, "weight_c", c_f).sigmoid())
    out["output_logit"] = linear(
        state, "out_layer", residual(state, "proj1", "proj2", torch.cat(gates, -1))
    )

    for kernel, name in ((homo, "homo"), (hetero, "hetero")):
        out[f"edges_{name}"] = edges(
            kernel,
            {m: out[f"logits_{m}_{name}"] for m in LETTERS},
            {m: out[f"repr_{m}_{name}"] for m in LETTERS},
        ).T
    return out


# --- The losses ----------------------------------------------------------------------------------


def prior(scores, dtype):
    wide = (torch.tensor(scores, dtype=torch.float64) / 0.25).softmax(0)
    return wide.to(torch.float32).to(dtype)


def cosine(x, y, axis):
    """The cosine of a cosine embedding loss, which adds 1e-12 to each squared length."""
    xx, yy = (x * x).sum(axis) + 1e-12, (y * y).sum(axis) + 1e-12
    return (x * y).sum(axis) / (xx * yy).sqrt()


def margin(vectors, labels):
    """Vectors (N, d) and their labels (N,) -> mean over the anchors that have both kinds."""
    unit = [x / x.norm() for x in vectors]
    anchors = []
    for i in range(len(unit)):
        others = [k for k in range(len(unit)) if k != i]
        positives = [k for k in others if labels[k] == labels[i]]
        negatives = [k for k in others if labels[k] != labels[i]]
        pairs = [
            (0.15 * (labels[i] - labels[n]).abs() - unit[i] @ unit[p] + unit[i] @ unit[n]).clamp(
                min=0
            )
            for p in positives
            for n in negatives
        ]
        if pairs:
            anchors.append(torch.stack(pairs).mean())
    return torch.stack(anchors).mean() if anchors else vectors.sum() * 0


def losses(out, labels):
    """What `outputs` gives, and labels (B, 1) -> every loss by its published name."""
    loss = {}
    predictions = [out["output_logit"], out["logits_c"]]
    predictions += [out[f"logits_{m}_{part}"] for m in LETTERS for part in ("homo", "hetero")]
    loss["task"] = sum((y - labels).abs().mean() for y in predictions)
    loss["rec"] = sum(((out[f"origin_{m}"] - out[f"recon_{m}"]) ** 2).mean() for m in LETTERS)
    loss["cyc"] = sum(
        ((out[f"s_{m}"].permute(1, 2, 0) - out[f"s_{m}_r"]) ** 2).mean() for m in LETTERS
    )

    vectors = [out[f"c_{m}_sim"][b] for b in range(len(labels)) for m in LETTERS]
    loss["margin"] = margin(
        torch.stack(vectors), torch.stack([labels[b, 0] for b in range(len(labels)) for _ in "lva"])
    )
    # Axis 1 of (T, B, d): the batch.
    loss["ort"] = sum(cosine(out[f"s_{m}"], out[f"c_{m}"], 1).clamp(min=0).mean() for m in LETTERS)

    for name, scores in (("homo", HOMO_PRIOR), ("hetero", HETERO_PRIOR)):
        w, p = out[f"edges_{name}"], prior(scores, labels.dtype)
        regulariser = logit = representation = 0
        for e, (j, i) in enumerate(EDGES):
            weight = w[e] + p[e]  # (B,)
            regulariser = regulariser + (w[e] - p[e]).mean() ** 2
            student, teacher = out[f"logits_{j}_{name}"], out[f"logits_{i}_{name}"].detach()
            logit = logit + ((student - teacher).abs()[:, 0] * weight).mean()
            student, teacher = out[f"repr_{j}_{name}"], out[f"repr_{i}_{name}"].detach()
            if name == "homo":
                distance = (student - teacher).abs().sum(-1)
                representation = representation + (distance * weight).mean()
            else:
                distance = cosine(student, teacher, -1).clamp(min=0).mean()
                representation = representation + distance * weight.mean()
        loss[f"{name}_reg"] = 10 * regulariser
        loss[f"{name}_logit"] = logit
        loss[f"{name}_repr"] = 10 * representation

    loss["total"] = (
        loss["task"]
        + 0.05 * (loss["homo_logit"] + loss["homo_reg"])
        + 0.05 * (loss["hetero_logit"] + loss["hetero_repr"] + loss["hetero_reg"])
        + 0.1 * (loss["rec"] + loss["cyc"] + 0.1 * (loss["margin"] + loss["ort"]))
    )
    return loss
