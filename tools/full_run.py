"""The full run: the paper's presets on synthetic clips of CMU-MOSI's size, all thirty epochs.

    python tools/full_run.py    train (about ten minutes on two cores), write the record

Writes data/results/full_run.json, from a checkout without uncommitted changes.
"""

import argparse
import json
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from dmd import checkpoint, data
from dmd.config import ModelConfig, TrainConfig
from dmd.device import find_device, seed_everything
from dmd.model import DMD
from dmd.trainer import Trainer

RECORD = Path(__file__).resolve().parent.parent / "data" / "results" / "full_run.json"
# Nothing stops the training early, so that all epochs are there to be looked at.
TRAIN: dict[str, Any] = {"patience": None}


def train(
    size: str = "mosi", model: str = "paper", progress: bool = True, **options: Any
) -> dict[str, Any]:
    """The record of one run, without its provenance.

    size: of the synthetic clips; model: a preset; options: of the training, beside TRAIN.
    """
    splits = data.load("synthetic", size=size)
    config = TrainConfig.preset("paper", **{**TRAIN, **options})
    device = find_device(config.device)
    seed_everything(config.seed)
    sizes = {"widths": splits.widths, "lengths": splits.lengths}
    network = DMD(ModelConfig.preset(model, **sizes))
    trainer = Trainer(network, config, progress=progress)
    began = time.perf_counter()
    history = trainer.fit(splits)
    seconds = time.perf_counter() - began
    middle = splits.train.label.median()
    return {
        "what": "One training run of the whole model on synthetic clips; the history has a row an "
        "epoch, `constant` is the mean absolute error of the training labels' median.",
        "configuration": {
            "data": {"name": splits.name, **splits.options},
            "model": network.config.to_dict(),
            "train": config.to_dict(),
        },
        "clips": {split.name: len(split) for split in splits},
        "parameters": sum(x.numel() for x in network.parameters()),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "constant": {s.name: float((s.label - middle).abs().mean()) for s in splits},
        "seconds": round(seconds, 1),
        "history": asdict(history),
    }


def main() -> None:
    """Train, and write the record."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--device", default="auto")
    parser.add_argument("--allow-changes", action="store_true", help="for trying out: print only")
    args = parser.parse_args()
    provenance = checkpoint.provenance()
    provenance["command"] = " ".join(["python tools/full_run.py", *sys.argv[1:]])
    if "-" in provenance["commit"] and not args.allow_changes:
        sys.exit("commit the changes first: a record names the commit that made it")
    result = train(device=args.device)
    result["provenance"] = {**provenance, "seconds": result["seconds"]}
    if args.allow_changes:
        print(json.dumps(result, indent=2))
    else:
        checkpoint.write_json(RECORD, result)


if __name__ == "__main__":
    main()
