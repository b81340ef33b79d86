"""The command line: `python -m dmd train | evaluate | predict | data`.

Bad input ends with one sentence on standard error and exit code 2; training that stops by itself
(a loss that is not finite) with 1, Ctrl-C with 130.
"""

import argparse
import io
import json
import sys
import warnings
import zipfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import numpy as np
import torch

from dmd import checkpoint
from dmd.batch import MODALITIES, Batch
from dmd.config import Config, LossConfig, ModelConfig, TrainConfig, nearest
from dmd.data import Splits, download, load, mmsa, summary
from dmd.metrics import evaluate
from dmd.model import DMD
from dmd.trainer import Interrupted, NonFiniteLoss, Trainer, find_device, seed_everything

C = TypeVar("C", bound=Config)
SPLITS = ("train", "valid", "test")


class Parser(argparse.ArgumentParser):
    """An argument parser whose complaints are one line, with the nearest option for a typo."""

    def error(self, message: str) -> NoReturn:
        """Print the complaint and exit with code 2."""
        if message.startswith("unrecognized arguments: -"):
            options = [s for action in self._actions for s in action.option_strings]
            message = nearest(message.split()[2].split("=")[0], options, "option")
        self.exit(2, f"{self.prog}: {message}\n")


def key_values(words: Sequence[str] | None) -> dict[str, Any]:
    """`["dim=32", "kernels=5,5,5", "root=some/folder"]` -> values as JSON would hold them."""
    values: dict[str, Any] = {}
    for word in words or ():
        key, equals, text = word.partition("=")
        if not equals:
            raise ValueError(f"expected KEY=VALUE, got {word!r}")
        if "," in text and not text.startswith("["):
            text = f"[{text}]"
        try:
            values[key] = json.loads(
                {"True": "true", "False": "false", "None": "null"}.get(text, text)
            )
        except json.JSONDecodeError:
            values[key] = word.partition("=")[2]
    return values


def load_data(words: Sequence[str]) -> Splits:
    """`NAME [KEY=VALUE ...]` -> the splits."""
    return load(words[0], **key_values(words[1:]))


def emit(result: dict[str, Any], as_json: bool) -> None:
    """Print a result for people, or for machines."""
    if as_json:
        print(checkpoint.to_json(result))
    else:
        for name, value in result.items():
            print(f"{name:<12}{value:.4f}" if isinstance(value, float) else f"{name:<12}{value}")


def train(args: argparse.Namespace) -> None:
    """`dmd train`: train on a dataset into an output folder."""
    shortcuts = {"epochs": args.epochs, "seed": args.seed, "device": args.device}
    given = {key: value for key, value in shortcuts.items() if value is not None}
    loss = LossConfig.preset("paper", **key_values(args.loss))
    config = TrainConfig.preset("paper", loss=loss, **{**key_values(args.train), **given})
    find_device(config.device)
    overrides = key_values(args.model)
    ModelConfig.preset(args.preset, **overrides)  # complain before the data are read
    splits = load_data(args.data)
    sizes = {"widths": splits.widths, "lengths": splits.lengths}
    seed_everything(config.seed)
    model = DMD(ModelConfig.preset(args.preset, **{**sizes, **overrides}))
    trainer = Trainer(model, config, output=args.output, progress=not args.quiet)
    history = trainer.fit(splits, resume=args.resume)
    if args.json:
        emit({"output": args.output, **asdict(history)}, as_json=True)
    else:
        print(f"best epoch {history.best_epoch}, saved in {args.output}; on the test split:")
        emit(history.test, as_json=False)


def evaluate_checkpoint(args: argparse.Namespace) -> None:
    """`dmd evaluate`: the metrics of a checkpoint on one split of a dataset."""
    model, meta = checkpoint.load_model(args.checkpoint)
    if args.data is None:
        splits = load(meta["dataset"]["name"], **meta["dataset"]["options"])
    else:
        splits = load_data(args.data)
    split = getattr(splits, args.split)
    model.check(split[:1])
    device = find_device(args.device or "auto")
    emit(evaluate(model.to(device), split), args.json)


def read_clips(path: Path) -> Batch:
    """An npz file with `language`, `visual`, `acoustic` (clips, steps, width) and, if there are
    any, `lengths` (clips, 3) and `ids` -> a batch. ValueError that names the file and the field."""
    known = (*MODALITIES, "lengths", "ids")
    try:
        with np.load(path, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
    except FileNotFoundError:
        raise FileNotFoundError(f"there is no file {path}") from None
    except (ValueError, zipfile.BadZipFile, EOFError, AttributeError, TypeError) as error:
        raise ValueError(f"{path} is not a readable npz file of plain arrays: {error}") from error
    for name in arrays:
        if name not in known:
            raise ValueError(f"{path}: " + nearest(name, known, "array"))
    for name in MODALITIES:
        if name not in arrays:
            raise ValueError(f"{path} has no array {name!r}: it needs {', '.join(MODALITIES)}")
        if not np.issubdtype(arrays[name].dtype, np.number) or np.iscomplexobj(arrays[name]):
            raise ValueError(f"{path}: {name} holds {arrays[name].dtype}, not numbers")
    try:
        features = [torch.tensor(arrays[name], dtype=torch.float32) for name in MODALITIES]
        lengths = torch.tensor(arrays["lengths"]) if "lengths" in arrays else None
        ids = [str(x) for x in np.atleast_1d(arrays["ids"])] if "ids" in arrays else None
        clips = Batch(*features, lengths=lengths, ids=ids)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: {error}") from error
    if len(clips) == 0:
        raise ValueError(f"{path} holds no clips")
    for name, x, mask in zip(MODALITIES, clips.features, clips.masks, strict=True):
        if not torch.isfinite(x[mask]).all():
            raise ValueError(f"{path}: {name} has NaN or inf; replace them before predicting")
    return clips


def predict(args: argparse.Namespace) -> None:
    """`dmd predict`: predictions and the edges of both graphs for clips in an npz file."""
    model, _ = checkpoint.load_model(args.checkpoint)
    clips = read_clips(Path(args.input))
    model.check(clips)
    device = find_device(args.device or "auto")
    model.to(device)
    parts = []
    with torch.inference_mode():
        for index in torch.arange(len(clips)).split(args.batch_size):
            output = model(clips[index].to(device))
            parts.append((output.prediction, output.homo.edges, output.hetero.edges))
    names = ("prediction", "homo_edges", "hetero_edges")
    result = {
        name: torch.cat(part).float().cpu().numpy()
        for name, part in zip(names, zip(*parts, strict=True), strict=True)
    }
    if clips.ids is not None:
        result["ids"] = np.array(clips.ids)
    if args.output is not None:
        content = io.BytesIO()
        np.savez(content, **result)
        try:
            checkpoint.write_atomically(Path(args.output), content.getvalue())
        except OSError as error:
            raise OSError(f"can't write {args.output}: {error.strerror}") from error
    if args.json:
        print(checkpoint.to_json({name: x.tolist() for name, x in result.items()}))
    else:
        labels = clips.ids or range(len(clips))
        for label, score in zip(labels, result["prediction"], strict=True):
            print(f"{label}\t{score:+.3f}")


def data_fetch(args: argparse.Namespace) -> None:
    """`dmd data fetch`: download a dataset."""
    print(download.fetch(args.name, to=args.to))


def data_inspect(args: argparse.Namespace) -> None:
    """`dmd data inspect`: what is in a dataset."""
    splits = load_data(args.data)
    print(checkpoint.to_json(summary.describe(splits)) if args.json else summary.table(splits))


def data_export(args: argparse.Namespace) -> None:
    """`dmd data export`: write a dataset as a file that other frameworks read."""
    mmsa.export(load_data(args.data), Path(args.output))
    print(args.output)


def make_parser() -> Parser:
    """The whole command line."""
    parser = Parser(prog="python -m dmd", description=__doc__, allow_abbrev=False)
    commands = parser.add_subparsers(required=True, metavar="COMMAND", parser_class=Parser)
    data_words = {"nargs": "+", "metavar": ("NAME", "KEY=VALUE")}
    pairs = {"nargs": "+", "metavar": "KEY=VALUE", "default": []}

    def add(commands: Any, name: str, run: Any, device: bool = False, json: bool = True) -> Parser:
        command = commands.add_parser(name, help=run.__doc__, allow_abbrev=False)
        command.set_defaults(run=run)
        if device:
            command.add_argument("--device", help="auto, cpu, cuda, cuda:1, mps")
        if json:
            command.add_argument("--json", action="store_true", help="print JSON")
        return command

    command = add(commands, "train", train, device=True)
    command.add_argument("--data", **data_words, required=True, help="dataset and its options")
    command.add_argument("--output", required=True, help="folder for checkpoints and run.json")
    command.add_argument("--preset", default="paper", help="preset of the model configuration")
    command.add_argument("--model", **pairs, help="options of ModelConfig")
    command.add_argument("--loss", **pairs, help="options of LossConfig")
    command.add_argument("--train", **pairs, help="options of TrainConfig")
    command.add_argument("--epochs", type=int)
    command.add_argument("--seed", type=int)
    command.add_argument("--resume", action="store_true", help="go on from the last checkpoint")
    command.add_argument("--quiet", action="store_true", help="no progress")

    command = add(commands, "evaluate", evaluate_checkpoint, device=True)
    command.add_argument("checkpoint", help="checkpoint file or output folder of a run")
    command.add_argument("--data", **data_words, help="default: what the model was trained on")
    command.add_argument("--split", choices=SPLITS, default="test")

    command = add(commands, "predict", predict, device=True)
    command.add_argument("checkpoint", help="checkpoint file or output folder of a run")
    command.add_argument("input", help="npz file: language, visual, acoustic[, lengths, ids]")
    command.add_argument("--output", help="npz file for predictions and edges")
    command.add_argument("--batch-size", type=int, default=256)

    parser_data = commands.add_parser("data", help="fetch, inspect and export datasets")
    data = parser_data.add_subparsers(required=True, metavar="COMMAND", parser_class=Parser)
    command = add(data, "fetch", data_fetch, json=False)
    command.add_argument("name", choices=["mosi_utterances"])
    command.add_argument("--to", help="folder (default: data/downloads/NAME)")
    command = add(data, "inspect", data_inspect)
    command.add_argument("data", **data_words)
    command = add(data, "export", data_export, json=False)
    command.add_argument("data", **data_words)
    command.add_argument("--format", choices=["mmsa"], default="mmsa")
    command.add_argument("--output", required=True)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    warnings.showwarning = lambda message, *_, **__: print(f"dmd: {message}", file=sys.stderr)
    args = make_parser().parse_args(argv)
    try:
        args.run(args)
    except (ValueError, OSError) as error:
        print(f"dmd: {error}", file=sys.stderr)
        return 2
    except NonFiniteLoss as error:
        print(f"dmd: {error}; the last good checkpoint is kept", file=sys.stderr)
        return 1
    except (Interrupted, KeyboardInterrupt) as error:
        print(f"dmd: {error or 'interrupted'}", file=sys.stderr)
        return 130
    return 0
