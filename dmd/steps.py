"""The training steps that `dmd.bench` compares, each as a function without arguments.

A step gathers nothing and saves nothing: its clips, random numbers, lie on the device.
"""

import atexit
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from dmd import fast, plain
from dmd.batch import Batch
from dmd.config import ModelConfig, TrainConfig
from dmd.device import find_device, seed_everything
from dmd.model import DMD
from dmd.optimisation import bound_gradients, flatten, loss_terms, make_optimiser, update
from dmd.options import nearest

Step = Callable[[], Tensor]  # one training step; gives the loss


def random_clips(config: ModelConfig, count: int, seed: int = 0) -> Batch:
    """Clips of full length with features from a normal distribution and labels like MOSI's."""
    rng = torch.Generator().manual_seed(seed)
    sizes = zip(config.lengths, config.widths, strict=True)
    language, visual, acoustic = (
        torch.randn(count, steps, width, generator=rng) for steps, width in sizes
    )
    label = torch.randint(-15, 16, (count,), generator=rng) / 5
    return Batch(language, visual, acoustic, label=label)


def package_step(config: ModelConfig, train: TrainConfig, compiled: bool = False) -> Step:
    """A step as `dmd.Trainer` does it, without accumulation; its model compiled where asked for."""
    device = find_device(train.device)
    seed_everything(train.seed)
    model = DMD(config).to(device).train()
    flat = flatten(model)
    if compiled:
        folder = tempfile.mkdtemp()  # what lies compiled elsewhere would not be compiled again
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        model.compile()
    optimiser = make_optimiser(flat, train)
    clips = random_clips(config, train.batch_size).to(device)
    terms = partial(loss_terms, model, train)

    def step(batch: Batch) -> dict[str, Tensor]:
        return update(batch, terms, flat, optimiser, train)

    run = fast.capture(step, train, device) or step
    return lambda: run(clips)["total"].detach()


def captured_step(config: ModelConfig, train: TrainConfig) -> Step:
    """The package's step, recorded once and replayed (`dmd.fast`); on a CUDA device only."""
    return package_step(config, train.replace(capture=True))


def bf16_step(config: ModelConfig, train: TrainConfig) -> Step:
    """The package's step in mixed precision."""
    return package_step(config, train.replace(precision="bf16"))


def compiled_step(config: ModelConfig, train: TrainConfig) -> Step:
    """The package's step with the model passed through `torch.compile`: a minute for the first."""
    return package_step(config, train, compiled=True)


def plain_step(config: ModelConfig, train: TrainConfig) -> Step:
    """The same step with the model of `dmd.plain`, its weights each a parameter of their own.

    The optimiser is as PyTorch chooses it: a loop over the weights on a processor.
    """
    device = find_device(train.device)
    seed_everything(train.seed)
    model = plain.PlainDMD.of(DMD(config)).to(device).train()
    weights = list(model.parameters())
    optimiser = torch.optim.Adam(weights, lr=train.learning_rate)
    clips = random_clips(config, train.batch_size).to(device)

    def step() -> Tensor:
        assert clips.label is not None
        optimiser.zero_grad()
        total = plain.objective(model(clips), clips.label, train.loss)
        total.backward()
        bound_gradients(weights, train)
        optimiser.step()
        return total.detach()

    return step


# A variant is the name of a preset, as the package runs it, or one of these.
VARIANTS: dict[str, Callable[[ModelConfig, TrainConfig], Step]] = {
    "plain": plain_step,
    "bf16": bf16_step,
    "captured": captured_step,
    "compiled": compiled_step,
}


@dataclass(frozen=True)
class Case:
    """One thing to measure: how a step is made, of which model, and how it is trained."""

    make: Callable[[ModelConfig, TrainConfig], Step]
    model: ModelConfig
    train: TrainConfig

    def step(self) -> Step:
        """A new model with its optimiser and clips, as a function that trains it once."""
        return self.make(self.model, self.train)


def make_cases(
    preset: str,
    overrides: Mapping[str, Any] | None = None,
    batch_size: int = 16,
    device: str = "auto",
    variants: Sequence[str] | None = None,
) -> dict[str, Case]:
    """The variants by name: `preset` as the package runs it, and what stands beside it.

    Other presets take the sizes of `preset` (widths, lengths, dim, heads, layers, kernels), so that
    the same work is compared. Raises ValueError for unknown names and for what does not fit.
    """
    presets = ModelConfig.presets()
    base = ModelConfig.preset(preset, **(overrides or {}))
    sizes = {
        name: getattr(base, name)
        for name in ("widths", "lengths", "dim", "heads", "layers", "kernels")
    }
    found = find_device(device)
    obstacle = fast.obstacle(TrainConfig(), found)
    unusual = {"compiled"} if obstacle is None else {"compiled", "captured"}  # compiling takes long
    usual = [name for name in VARIANTS if name not in unusual]
    cases = {}
    for name in variants or dict.fromkeys([preset, "released", *usual]):
        if name not in {*presets, *VARIANTS}:
            raise ValueError(nearest(name, [*presets, *VARIANTS], "variant"))
        if name == "captured" and obstacle is not None:
            raise ValueError(f"variant 'captured': {obstacle}")
        own = name if name in presets else preset
        model = base if own == preset else ModelConfig.preset(own, **{**(overrides or {}), **sizes})
        recipe = "released" if own.startswith("released") else "paper"
        train = TrainConfig.preset(recipe, batch_size=batch_size, device=str(found))
        cases[name] = Case(VARIANTS.get(name, package_step), model, train)
    return cases
