"""The command line: `python -m dmd train | evaluate | predict | data`.

Bad input ends with one sentence on standard error and exit code 2; training that stops by itself
(a loss that is not finite) with 1, Ctrl-C with 130.
"""

import argparse
import io
import json
import sys
import warnings
from collections.abc import Container, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, NoReturn, get_args, get_type_hints

import numpy as np
import torch

from dmd import checkpoint
from dmd.batch import MODALITIES, Batch, PerModality
from dmd.config import LossConfig, ModelConfig, TrainConfig
from dmd.data import LOADERS, Splits, download, load, mmsa, summary
from dmd.metrics import evaluate
from dmd.model import DMD
from dmd.options import nearest
from dmd.trainer import Interrupted, NonFiniteLoss, Trainer, find_device, seed_everything


class Parser(argparse.ArgumentParser):
    """An argument parser whose complaints are one line, with the nearest option for a typo."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Refuse unknown options first: a required one may be missing only for its typo."""
        known = self._option_string_actions
        words = sys.argv[1:] if args is None else args
        options = [word.split("=")[0] for word in words if word.startswith("--")]
        for option in [] if self._subparsers else options:
            if option not in known:
                self.error(nearest(option, known, "option"))
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        """Print the complaint, or the help where a command is missing, and exit with code 2."""
        if message == "the following arguments are required: COMMAND":
            self.print_help(sys.stderr)
            self.exit(2)
        self.exit(2, f"{self.prog}: {one_line(message)}\n")


def one_line(message: object) -> str:
    """The text of an error or a warning without line breaks."""
    return " ".join(str(message).split())


def count(text: str) -> int:
    """A number of things on the command line: a whole number from 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1")
    return int(text)


def key_values(words: Sequence[str] | None, texts: Container[str] = ()) -> dict[str, Any]:
    """`["dim=32", "kernels=5,5,5", "device=cpu"]` -> values as JSON would hold them.

    The values of keys in `texts` stay as they are typed, even if they look like numbers.
    """
    values: dict[str, Any] = {}
    for word in words or ():
        key, equals, text = word.partition("=")
        if not equals:
            raise ValueError(f"expected KEY=VALUE, got {word!r}")
        values[key] = text
        if key not in texts:
            spelling = {"True": "true", "False": "false", "None": "null"}.get(text, text)
            if "," in text and not text.startswith(("[", "{")):
                spelling = f"[{text}]"
            with suppress(json.JSONDecodeError):
                values[key] = json.loads(spelling)
    return values


def load_data(words: Sequence[str]) -> Splits:
    """`NAME [KEY=VALUE ...]` -> the splits."""
    name, *options = words
    kinds = get_type_hints(LOADERS[name]) if name in LOADERS else {}
    texts = {key for key, kind in kinds.items() if str in (kind, *get_args(kind))}
    return load(name, **key_values(options, texts))


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
    config = TrainConfig.preset("paper", **{"loss": loss, **key_values(args.train), **given})
    overrides = key_values(args.model)
    # Complain before the data are read, which may take minutes.
    find_device(config.device)
    ModelConfig.preset(args.preset, **overrides)
    checkpoint.check_output(Path(args.output), args.resume)
    splits = load_data(args.data)
    sizes = {"widths": splits.widths, "lengths": splits.lengths, **overrides}
    seed_everything(config.seed)
    model = DMD(ModelConfig.preset(args.preset, **sizes))
    trainer = Trainer(model, config, output=args.output, progress=not args.quiet)
    history = trainer.fit(splits, resume=args.resume)
    if args.json:
        emit({"output": args.output, **asdict(history)}, as_json=True)
    else:
        print(f"best epoch {history.best_epoch}, saved in {args.output}; on the test split:")
        emit(history.test, as_json=False)


def evaluate_checkpoint(args: argparse.Namespace) -> None:
    """`dmd evaluate`: the metrics of a checkpoint on one split of a dataset."""
    device = find_device(args.device)
    model, meta = checkpoint.load_model(args.checkpoint)
    trained_on = meta.get("dataset", {})
    if args.data is not None:
        splits = load_data(args.data)
    elif trained_on.get("name") in LOADERS:
        splits = load(trained_on["name"], **trained_on["options"])
        if splits.fingerprint() != trained_on["fingerprint"]:
            warnings.warn("the data have changed since the model was trained", stacklevel=1)
    else:
        raise ValueError(f"{args.checkpoint} does not say where its data come from: give --data")
    split = getattr(splits, args.split)
    try:
        model.check(split.clips)
    except ValueError as error:
        raise ValueError(f"{args.checkpoint} does not fit these data: {error}") from error
    emit(evaluate(model.to(device), split), args.json)


def read_arrays(path: Path) -> dict[str, Any]:
    """The arrays of an npz file by name; OSError or ValueError with a sentence that names it."""
    try:
        with np.load(path, allow_pickle=False) as archive:
            return {name: archive[name] for name in archive.files}
    except OSError as error:
        raise OSError(f"can't read {path}: {error.strerror or error}") from error
    except Exception as error:  # zipfile, zlib and numpy each have their own for a broken file
        raise ValueError(
            f"{path} is not a readable npz file of plain arrays: numpy.savez writes one"
        ) from error


def read_clips(path: Path) -> Batch:
    """The clips in an npz file: `language`, `visual`, `acoustic` (clips, steps, width) and, if
    there are any, `lengths` (clips, 3) and `ids`.

    Raises OSError or ValueError with a sentence that names the file and the array.
    """
    arrays = read_arrays(path)
    known = (*MODALITIES, "lengths", "ids")
    try:
        for name in arrays:
            if name not in known:
                raise ValueError(nearest(name, known, "array"))
        for name in MODALITIES:
            if name not in arrays:
                raise ValueError(f"no array {name!r}: it needs {', '.join(MODALITIES)}")
            if arrays[name].dtype.kind not in "iuf":
                raise ValueError(f"{name} holds {arrays[name].dtype}, not numbers")
        if arrays.get("lengths", np.zeros(0, int)).dtype.kind not in "iu":
            raise ValueError(f"lengths holds {arrays['lengths'].dtype}, not integers")
        features = (torch.tensor(arrays[name].astype(float)).float() for name in MODALITIES)
        clips = Batch(
            *PerModality(*features),
            lengths=torch.tensor(arrays["lengths"].astype(int)) if "lengths" in arrays else None,
            ids=[str(x) for x in arrays["ids"].reshape(-1)] if "ids" in arrays else None,
        )
        if len(clips) == 0:
            raise ValueError("there are no clips in it")
        for name, x, mask in zip(MODALITIES, clips.features, clips.masks, strict=True):
            if not torch.isfinite(x[mask]).all():
                raise ValueError(f"{name} has NaN or inf: dmd.data.sanitise replaces them")
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return clips


def predict(args: argparse.Namespace) -> None:
    """`dmd predict`: predictions and the edges of both graphs for clips in an npz file."""
    device = find_device(args.device)
    model = checkpoint.load_model(args.checkpoint)[0].to(device)
    clips = read_clips(Path(args.input))
    try:
        model.check(clips)
    except ValueError as error:
        raise ValueError(f"{args.input} does not fit {args.checkpoint}: {error}") from error
    parts = []
    with torch.inference_mode():
        for index in torch.arange(len(clips)).split(args.batch_size):
            output = model(clips[index].to(device))
            parts.append((output.prediction, output.homo.edges, output.hetero.edges))
    joined = [torch.cat(part).float().cpu().numpy() for part in zip(*parts, strict=True)]
    names = ("prediction", "homo_edges", "hetero_edges")
    result: dict[str, Any] = dict(zip(names, joined, strict=True))
    if clips.ids is not None:
        result["ids"] = np.array(clips.ids)
    if args.output is not None:
        content = io.BytesIO()
        np.savez(content, **result)
        checkpoint.write_atomically(Path(args.output), content.getvalue())
    if args.json:
        print(checkpoint.to_json({name: x.tolist() for name, x in result.items()}))
    else:
        for label, score in zip(clips.ids or range(len(clips)), result["prediction"], strict=True):
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
    pairs: dict[str, Any] = {"nargs": "+", "metavar": "KEY=VALUE", "default": []}
    words: dict[str, Any] = {"nargs": "+", "metavar": ("NAME", "KEY=VALUE")}
    words["help"] = f"dataset ({', '.join(LOADERS)}), then its options as KEY=VALUE"
    dataset = {**words, "metavar": "DATASET"}  # a positional argument can't have two names

    def add(commands: Any, name: str, run: Any, device: bool = False, json: bool = True) -> Parser:
        command = commands.add_parser(name, help=run.__doc__, allow_abbrev=False)
        command.set_defaults(run=run)
        if device:
            command.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
        if json:
            command.add_argument("--json", action="store_true", help="print JSON")
        return command

    command = add(commands, "train", train)
    command.add_argument("--data", **words, required=True)
    command.add_argument("--output", required=True, help="folder for checkpoints and run.json")
    command.add_argument("--preset", default="paper", help="preset of the model configuration")
    command.add_argument("--model", **pairs, help="options of ModelConfig")
    command.add_argument("--loss", **pairs, help="options of LossConfig")
    command.add_argument("--train", **pairs, help="options of TrainConfig")
    command.add_argument("--epochs", type=int, help="the same as --train epochs=...")
    command.add_argument("--seed", type=int, help="the same as --train seed=...")
    command.add_argument("--device", help="the same as --train device=...")
    command.add_argument("--resume", action="store_true", help="go on from the last checkpoint")
    command.add_argument("--quiet", action="store_true", help="no progress")

    command = add(commands, "evaluate", evaluate_checkpoint, device=True)
    command.add_argument("checkpoint", help="checkpoint file or output folder of a run")
    command.add_argument("--data", **{**words, "help": "default: what the model was trained on"})
    command.add_argument("--split", choices=["train", "valid", "test"], default="test")

    command = add(commands, "predict", predict, device=True)
    command.add_argument("checkpoint", help="checkpoint file or output folder of a run")
    command.add_argument("input", help="npz file: language, visual, acoustic[, lengths, ids]")
    command.add_argument("--output", help="npz file for predictions and edges")
    command.add_argument("--batch-size", type=count, default=256)

    parser_data = commands.add_parser("data", help="fetch, inspect and export datasets")
    data = parser_data.add_subparsers(required=True, metavar="COMMAND", parser_class=Parser)
    command = add(data, "fetch", data_fetch, json=False)
    command.add_argument("name", choices=["mosi_utterances"])
    command.add_argument("--to", help="folder (default: data/downloads/NAME)")
    add(data, "inspect", data_inspect).add_argument("data", **dataset)
    command = add(data, "export", data_export, json=False)
    command.add_argument("data", **dataset)
    command.add_argument("--format", choices=["mmsa"], default="mmsa")
    command.add_argument("--output", required=True, help="file to write")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""

    def complain(message: object, *_: Any, **__: Any) -> None:
        print(f"dmd: {one_line(message)}", file=sys.stderr)

    args = make_parser().parse_args(argv)
    with warnings.catch_warnings():
        warnings.showwarning = complain
        try:
            args.run(args)
        except (ValueError, OSError) as error:
            complain(error)
            return 2
        except (MemoryError, torch.cuda.OutOfMemoryError):
            complain("not enough memory: try smaller lengths, widths or batches")
            return 2
        except NonFiniteLoss as error:
            complain(f"{error}: a lower learning rate may help; the last good checkpoint is kept")
            return 1
        except (Interrupted, KeyboardInterrupt) as error:
            complain(str(error) or "interrupted")
            return 130
    return 0
