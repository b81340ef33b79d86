"""Linear probes: how much of a known factor can be read from a feature by a straight line."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from dmd.batch import MODALITIES
from dmd.data.dataset import Dataset, Splits
from dmd.metrics import collect
from dmd.model import masked_mean

PENALTIES = (1.0, 10.0, 100.0, 1000.0)


def linear_probe(x: Tensor, y: Tensor, penalty: float = 10.0) -> Callable[[Tensor], Tensor]:
    """Ridge regression from x (N, D) to y (N, K); returns the fitted map (n, D) -> (n, K).

    Features are standardised, so that the penalty on squared weights means the same for all; it is
    counted in clips. A feature that does not vary has no weight.
    """
    centre, spread = x.mean(dim=0), x.std(dim=0).clamp_min(1e-6)
    scaled, mean = (x - centre) / spread, y.mean(dim=0)
    gram = scaled.T @ scaled + penalty * torch.eye(x.shape[1]).to(x)
    weight = torch.linalg.solve(gram, scaled.T @ (y - mean))
    return lambda new: (new - centre) / spread @ weight + mean


def r_squared(guess: Tensor, truth: Tensor) -> Tensor:
    """The share of the variance of truth (N, K) that a guess (N, K) explains, (K,).

    1 for a perfect guess, 0 for one no better than the mean, negative for a worse one.
    """
    return 1 - (truth - guess).square().sum(dim=0) / (truth - truth.mean(dim=0)).square().sum(dim=0)


def explained(features: list[Tensor], factors: list[Tensor]) -> float:
    """R^2 on the test split, averaged over K factors; 0 where the probe does worse than the mean.

    features: (N, D) of the training, validation and test split; factors: (N, K) of the same. The
    probe is fitted on the first, its penalty chosen on the second, and it is scored on the third.
    """
    x, x_valid, x_test = (part.double() for part in features)
    y, y_valid, y_test = (part.double() for part in factors)
    probes = [linear_probe(x, y, penalty) for penalty in PENALTIES]
    best = max(probes, key=lambda probe: float(r_squared(probe(x_valid), y_valid).mean()))
    return float(r_squared(best(x_test), y_test).clamp_min(0).mean())


def pooled_parts(model: nn.Module, split: Dataset) -> dict[str, Tensor]:
    """Masked means over time of the decoupled features: `common` and `private`, (3, N, d) each."""

    def read(output: Any) -> list[Tensor]:
        return [
            torch.stack([masked_mean(*pair) for pair in zip(features, output.masks, strict=True)])
            for features in (output.common, output.private)
        ]

    parts = zip(*collect(read, model, split), strict=True)
    return dict(zip(("common", "private"), (torch.cat(x, dim=1) for x in parts), strict=True))


def leakage(model: nn.Module, splits: Splits) -> dict[str, dict[str, list[float]]]:
    """Which known factors can be read from which part: `[part][factors]`, by modality.

    part: `common` or `private`, pooled over time. factors: `shared`, the sentiment and arousal
    that all modalities show; `own`, the private factors of the modality itself; `other`, those of
    the two others, which no encoder ever saw. The numbers are those of `explained`. Decoupling as
    promised has a high `shared` and a low `own` in the common part, and the reverse in the private
    one. Raises ValueError where the data do not come with their truth.
    """
    if any("shared" not in split.truth for split in splits):
        raise ValueError(
            f"the factors of {splits.name!r} are not known: leakage is measured on 'synthetic'"
        )
    parts = [pooled_parts(model, split) for split in splits]
    found: dict[str, dict[str, list[float]]] = {}
    for part in ("common", "private"):
        found[part] = {"shared": [], "own": [], "other": []}
        for m, name in enumerate(MODALITIES):
            others = [f"private_{other}" for other in MODALITIES if other != name]
            factors = {"shared": ["shared"], "own": [f"private_{name}"], "other": others}
            features = [x[part][m].cpu() for x in parts]
            for kind, keys in factors.items():
                values = [torch.cat([split.truth[k] for k in keys], dim=1) for split in splits]
                found[part][kind].append(explained(features, values))
    return found
