"""The command line: `python -m dmd train | evaluate | predict | data | released | study | bench`.

Bad input ends with one sentence on standard error and exit code 2; training that stops by itself
(a loss that is not finite) with 1, Ctrl-C with 130.
"""

import argparse
import sys
import warnings
from collections.abc import Sequence
from typing import Any, NoReturn

from dmd import commands, distributed
from dmd.baselines import METHODS
from dmd.bench import out_of_memory
from dmd.config import ModelConfig
from dmd.data import LOADERS
from dmd.options import nearest
from dmd.steps import VARIANTS
from dmd.studies import SCALES, STUDIES
from dmd.tables import FORMATS
from dmd.trainer import Interrupted, NonFiniteLoss


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
        distributed.defer_to_main()
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


def make_parser() -> Parser:
    """The whole command line."""
    parser = Parser(prog="python -m dmd", description=__doc__, allow_abbrev=False)
    top = parser.add_subparsers(required=True, metavar="COMMAND", parser_class=Parser)
    pairs: dict[str, Any] = {"nargs": "+", "metavar": "KEY=VALUE", "default": []}
    words: dict[str, Any] = {"nargs": "+", "metavar": ("NAME", "KEY=VALUE")}
    words["help"] = f"dataset ({', '.join(LOADERS)}), then its options as KEY=VALUE"
    presets = f"preset of model, loss and training ({', '.join(ModelConfig.presets())})"
    dataset = {**words, "metavar": "DATASET"}  # a positional argument can't have two names

    def add(group: Any, name: str, run: Any, device: bool = False, json: bool = True) -> Parser:
        command = group.add_parser(name, help=run.__doc__, allow_abbrev=False)
        command.set_defaults(run=run)
        if device:
            command.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
        if json:
            command.add_argument("--json", action="store_true", help="print JSON")
        return command

    command = add(top, "train", commands.train)
    command.add_argument("--data", **words, required=True)
    command.add_argument("--output", required=True, help="folder for checkpoints and run.json")
    command.add_argument("--preset", default="paper", help=presets)
    methods = f"a method instead of DMD ({', '.join(METHODS)}); options of it, or of ModelConfig"
    command.add_argument("--model", **{**pairs, "metavar": "NAME | KEY=VALUE"}, help=methods)
    command.add_argument("--loss", **pairs, help="options of LossConfig")
    command.add_argument("--train", **pairs, help="options of TrainConfig")
    command.add_argument("--epochs", type=int, help="the same as --train epochs=...")
    command.add_argument("--seed", type=int, help="the same as --train seed=...")
    command.add_argument("--device", help="the same as --train device=...")
    command.add_argument("--resume", action="store_true", help="go on from the last checkpoint")
    command.add_argument("--quiet", action="store_true", help="no progress")

    command = add(top, "evaluate", commands.evaluate_checkpoint, device=True)
    command.add_argument("checkpoint", help="checkpoint file or output folder of a run")
    command.add_argument("--data", **{**words, "help": "default: what the model was trained on"})
    command.add_argument("--split", choices=["train", "valid", "test"], default="test")

    command = add(top, "predict", commands.predict, device=True)
    command.add_argument("checkpoint", help="checkpoint file or output folder of a run")
    command.add_argument("input", help="npz file: language, visual, acoustic[, lengths, ids]")
    command.add_argument("--output", help="npz file for predictions and edges")
    command.add_argument("--batch-size", type=count, default=256)

    parser_data = top.add_parser("data", help="fetch, inspect and export datasets")
    data = parser_data.add_subparsers(required=True, metavar="COMMAND", parser_class=Parser)
    command = add(data, "fetch", commands.data_fetch, json=False)
    command.add_argument("name", choices=["mosi_utterances"])
    command.add_argument("--to", help="folder (default: data/downloads/NAME)")
    add(data, "inspect", commands.data_inspect).add_argument("data", **dataset)
    command = add(data, "export", commands.data_export, json=False)
    command.add_argument("data", **dataset)
    command.add_argument("--format", choices=["mmsa"], default="mmsa")
    command.add_argument("--output", required=True, help="file to write")

    parser_released = top.add_parser("released", help="checkpoints of the published code")
    group = parser_released.add_subparsers(required=True, metavar="COMMAND", parser_class=Parser)
    command = add(group, "convert", commands.released_convert)
    command.add_argument("checkpoint", help="published checkpoint (.pth) of the main model")
    command.add_argument("output", help="folder for best.safetensors")
    command.add_argument("--homo", metavar="FILE", help="weights of the homogeneous kernel")
    command.add_argument("--hetero", metavar="FILE", help="weights of the heterogeneous kernel")
    command.add_argument("--model", **pairs, help="what the weights do not tell: heads=...")

    command = add(top, "study", commands.study)
    study_help = f"one of {', '.join(STUDIES)}, or the record of one (JSON) to print"
    command.add_argument("name", metavar="STUDY", help=study_help)
    command.add_argument("--settings", nargs="+", metavar="NAME", help="data: synthetic and others")
    command.add_argument("--data", **words | {"help": "a dataset of your own instead of settings"})
    command.add_argument("--rows", nargs="+", metavar="ROW", help="only these rows")
    command.add_argument("--scale", default="study", help=f"one of {', '.join(SCALES)}")
    command.add_argument("--seeds", type=count, default=5, help="how many of each row: 5")
    command.add_argument("--first-seed", type=count, default=0, help="others than 0, 1, 2, ...")
    command.add_argument("--output", help="folder for the cells: runs/studies/SCALE")
    command.add_argument("--jobs", type=count, default=1, help="processes, one thread each")
    command.add_argument("--ray", metavar="ADDRESS", help="a Ray cluster, or `local`")
    command.add_argument("--format", choices=FORMATS, default="text")

    command = add(top, "bench", commands.bench_step, device=True)
    command.add_argument("--preset", default="paper", help="preset of model, loss and training")
    command.add_argument("--model", **pairs, help="options of ModelConfig")
    command.add_argument("--batch-size", type=count, default=16)
    command.add_argument("--steps", type=count, default=20, help="timed, of each variant")
    known = ", ".join([*ModelConfig.presets(), *VARIANTS])
    command.add_argument("--variants", nargs="+", metavar="NAME", help=f"of {known}")
    command.add_argument("--scaling", action="store_true", help="also by clips and by length")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""

    def tell(message: object, *_: Any, **__: Any) -> None:
        if distributed.is_main():
            print(f"dmd: {one_line(message)}", file=sys.stderr)

    def complain(message: object) -> None:
        distributed.defer_to_main()
        rank = "" if distributed.is_main() else f"process {distributed.rank()}: "
        print(f"dmd: {rank}{one_line(message)}", file=sys.stderr)

    args = make_parser().parse_args(argv)
    with warnings.catch_warnings():
        warnings.showwarning = tell
        try:
            if distributed.world_size() > 1 and args.run is not commands.train:
                raise ValueError("only train takes several processes: call it without torchrun")
            args.run(args)
        except (ValueError, OSError) as error:
            complain(error)
            return 2
        except (MemoryError, RuntimeError) as error:
            if not out_of_memory(error):
                raise
            complain("not enough memory: try smaller lengths, widths or batches")
            return 2
        except NonFiniteLoss as error:
            complain(f"{error}: a lower learning rate may help; the last good checkpoint is kept")
            return 1
        except (Interrupted, KeyboardInterrupt) as error:
            tell(str(error) or "interrupted")
            return 130
    return 0
