"""What the processes do that tests/test_distributed.py starts: WHAT, in FOLDER."""

import hashlib
import os
import signal
import sys
from pathlib import Path

import tiny_runs as tiny
import torch

from dmd import DMD, ModelConfig, TrainConfig, Trainer, checkpoint, cli, distributed, trainer
from dmd.data import Dataset

STILL = {"language_dropout": 0.0, "output_dropout": 0.0}
# 13 clips in batches of 4: shares of two clips, and a last batch that has one for two processes
CASES = {
    "paper": ({}, {}),
    "full": ({}, {"batch_size": 5}),
    "accumulated": ({"pooling": "last"}, {"accumulate": 2, "clip_at": 0.05}),
    "unused": ({"decoupling": False, "margin_projection": True}, {}),
    "rank": ({}, {"margin_over": "rank", "epochs": 1, "batch_size": 13, "clip": "none"}),
    "dropout": ({"language_dropout": 0.5}, {"epochs": 1}),
    "patience": ({}, {"epochs": 9, "patience": 1, "learning_rate": 0.03}),
}


def command(folder, *more, epochs=3):
    """The command line of a training on real sizes without dropout, three steps an epoch."""
    return [
        "train", "--data", "synthetic", "--preset", "tiny", "--output", str(folder), "--json",
        "--quiet", "--model", *(f"{key}={value}" for key, value in STILL.items()),
        "--train", "device=cpu", "batch_size=107", f"epochs={epochs}", *more,
    ]  # fmt: skip


def released():
    """The model and the configuration of the published code, small, without dropout."""
    torch.manual_seed(0)
    sizes = {"widths": tiny.WIDTHS, "lengths": tiny.LENGTHS, "dim": 4, "heads": 2, "layers": 1}
    still = {"embedding_dropout": 0.0, "attention_dropout": (0.0, 0.0, 0.0), **STILL}
    small = {"kernels": (3, 2, 1), "edge_hidden": (3, 4)}
    model = DMD(ModelConfig.preset("released", **sizes, **still, **small))
    options = {"epochs": 2, "patience": None, "accumulate": 2, "batch_size": 3, "device": "cpu"}
    return model, TrainConfig.preset("released", **options)


def case(name):
    """Model, configuration and data of a case."""
    data = tiny.splits(train=13, full=name == "full")
    if name == "released":
        return *released(), data
    model, options = CASES[name]
    return tiny.model(**{**STILL, **model}), tiny.config(**options), data


def run(name, folder=None):
    """Train one case: history, the clips of each batch here, gradients, dropout, weights."""
    model, config, data = case(name)
    clips, gradients, random = [], [], []
    get, step, train = Dataset.__getitem__, torch.optim.Adam.step, Trainer._train_step

    def spy_get(self, index):
        if self.name == "train":
            clips.append(index.tolist())
        return get(self, index)

    def spy_step(self, *args, **kwargs):
        (weights,) = self.param_groups[0]["params"]
        gradients.append(weights.grad.clone())
        return step(self, *args, **kwargs)

    def spy_train(self, *args):
        random.append(hashlib.sha256(torch.get_rng_state().numpy().tobytes()).hexdigest())
        return train(self, *args)

    Dataset.__getitem__, torch.optim.Adam.step = spy_get, spy_step
    Trainer._train_step = spy_train
    try:
        history = Trainer(model, config, folder).fit(data)
    finally:
        Dataset.__getitem__, torch.optim.Adam.step = get, step
        Trainer._train_step = train
    return {
        "epochs": tiny.without_times(history.epochs), "test": history.test,
        "best": history.best_epoch, "clips": clips, "gradients": gradients, "random": random,
        "weights": model.state_dict(),
    }  # fmt: skip


def forbidden(*_, **__):
    raise AssertionError("only the main process does this")


def compare(folder):
    """Every case, on each rank; then a killed run goes on. Only the main rank scores and writes."""
    if not distributed.is_main():
        trainer.evaluate = trainer.evaluate_with_edges = forbidden
        checkpoint.write_atomically = forbidden
    found = {name: run(name, folder / "out" / name) for name in [*CASES, "released"]}
    try:
        Trainer(tiny.model(), tiny.config(batch_size=1)).fit(tiny.splits())
    except ValueError as error:
        found["refusal"] = str(error)
    torch.save(found, folder / f"rank{distributed.rank()}.pt")
    cli.main(command(folder / "killed", "--resume"))


def killed(folder):
    """The last rank dies in the middle of the second epoch."""
    step, count = Trainer._train_step, 0

    def train_step(self, *args):
        nonlocal count
        count += 1
        if count == 5 and distributed.rank() == distributed.world_size() - 1:
            os.kill(os.getpid(), signal.SIGKILL)
        step(self, *args)

    Trainer._train_step = train_step
    return cli.main(command(folder / "killed"))


if __name__ == "__main__":
    sys.exit({"compare": compare, "killed": killed}[sys.argv[1]](Path(sys.argv[2])))
