"""Datasets and models so small that a training run takes a fraction of a second."""

import torch

from dmd import DMD, Batch, ModelConfig, PerModality, TrainConfig, seed_everything
from dmd.data import Dataset, Splits

torch.set_num_threads(1)  # more would only wait for each other
WIDTHS, LENGTHS = (4, 3, 2), (5, 4, 3)


def dataset(name, count, seed, full=False):
    """Clips whose label can be learned: it is the mean of the first language feature."""
    rng = torch.Generator().manual_seed(seed)
    features = [
        torch.randn(count, t, d, generator=rng) for t, d in zip(LENGTHS, WIDTHS, strict=True)
    ]
    label = features[0][:, :, 0].mean(dim=1).clamp(-3, 3)
    lengths = torch.stack([torch.randint(1, t + 1, (count,), generator=rng) for t in LENGTHS], 1)
    clips = Batch(*features, None if full else lengths, label, [f"{name}{n}" for n in range(count)])
    names = PerModality(*([f"f{n}" for n in range(width)] for width in WIDTHS))
    return Dataset(name, clips, names)


def splits(train=14, valid=8, test=9, seed=0, full=False, **more):
    return Splits(
        dataset("train", train, seed, full),
        dataset("valid", valid, seed + 1, full),
        dataset("test", test, seed + 2, full),
        **more,
    )


def model(seed=0, **more):
    seed_everything(seed)
    sizes = {"widths": WIDTHS, "lengths": LENGTHS, "dim": 4, "heads": 2}
    return DMD(ModelConfig.preset("tiny", **{**sizes, **more}))


def config(**more):
    return TrainConfig(
        **{"epochs": 3, "batch_size": 4, "learning_rate": 1e-2, "device": "cpu", **more}
    )


def same(a, b):
    """Whether two mappings hold bitwise the same tensors under the same names."""
    return a.keys() == b.keys() and all(
        a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a
    )


def without_times(rows):
    return [{key: x for key, x in row.items() if key != "seconds"} for row in rows]
