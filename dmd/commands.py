"""What the commands do: each takes the parsed words of its command line, and prints its result.

Bad input raises ValueError or OSError with one sentence, which `dmd.cli` prints.
"""

import argparse
import io
import json
import shlex
import warnings
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from types import NoneType
from typing import Any, get_args, get_type_hints

import numpy as np
import torch

from dmd import bench, checkpoint, distributed, released, studies, tables
from dmd.baselines import METHODS, Baseline, build
from dmd.config import LossConfig, ModelConfig, TrainConfig
from dmd.data import LOADERS, Splits, download, load, mmsa, summary
from dmd.data.clips import read_clips
from dmd.device import find_device, seed_everything
from dmd.metrics import evaluate
from dmd.model import DMD
from dmd.options import nearest
from dmd.trainer import Trainer


def key_values(words: Sequence[str], kinds: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """`["dim=32", "kernels=5,5,5", "device=cpu"]` -> values as JSON would hold them.

    kinds: the types of keys, where known. A text stays as it is typed, even if it looks like a
    number; `none` is None where None is allowed, elsewhere it may be one of the named values.
    """
    values: dict[str, Any] = {}
    for word in words:
        key, equals, text = word.partition("=")
        if not equals:
            raise ValueError(f"expected KEY=VALUE, got {word!r}")
        values[key] = text
        kind = (kinds or {}).get(key)
        if str not in (kind, *get_args(kind)):
            spelling = {"True": "true", "False": "false", "None": "null"}.get(text, text)
            if text == "none" and NoneType in get_args(kind):
                spelling = "null"
            if "," in text and not text.startswith(("[", "{")):
                spelling = f"[{text}]"
            with suppress(json.JSONDecodeError):
                values[key] = json.loads(spelling)
    return values


def load_data(words: Sequence[str]) -> Splits:
    """`NAME [KEY=VALUE ...]` -> the splits."""
    name, *options = words
    kinds = get_type_hints(LOADERS[name]) if name in LOADERS else {}
    return load(name, **key_values(options, kinds))


def emit(result: dict[str, Any], as_json: bool) -> None:
    """Print a result for people, or for machines."""
    if as_json:
        print(checkpoint.to_json(result))
    else:
        for name, value in result.items():
            print(f"{name:<12}{value:.4f}" if isinstance(value, float) else f"{name:<12}{value}")


def model_words(words: Sequence[str]) -> tuple[str | None, Sequence[str]]:
    """The method that `--model` names, None for DMD, and its options KEY=VALUE."""
    if not words or "=" in words[0]:
        return None, words
    name, *pairs = words
    if name == "dmd":
        return None, pairs
    if name not in METHODS:
        raise ValueError(nearest(name, ["dmd", *METHODS], "model"))
    return name, pairs


def train(args: argparse.Namespace) -> None:
    """`dmd train`: train on a dataset into an output folder."""
    recipe = "released" if args.preset.startswith("released") else "paper"
    shortcuts = {"epochs": args.epochs, "seed": args.seed, "device": args.device}
    given = {key: value for key, value in shortcuts.items() if value is not None}
    loss = LossConfig.preset(recipe, **key_values(args.loss))
    options = key_values(args.train, get_type_hints(TrainConfig))
    config = TrainConfig.preset(recipe, **{"loss": loss, **options, **given})
    method, pairs = model_words(args.model)
    overrides = key_values(pairs, get_type_hints(METHODS[method].__init__) if method else None)
    # Complain before the data are read, which may take minutes.
    distributed.own_device(config.device)
    if method is None:
        ModelConfig.preset(args.preset, **overrides)
    elif distributed.world_size() > 1:
        raise ValueError(f"only DMD trains on several processes: train {method} without torchrun")
    checkpoint.check_output(Path(args.output), args.resume)
    splits = load_data(args.data)
    sizes = {"widths": splits.widths, "lengths": splits.lengths, **overrides}
    seed_everything(config.seed)
    if method is None:
        model: DMD | Baseline = DMD(ModelConfig.preset(args.preset, **sizes))
    else:
        model = build(method, **sizes)
    trainer = Trainer(model, config, output=args.output, progress=not args.quiet)
    history = trainer.fit(splits, resume=args.resume)
    if not distributed.is_main():
        return
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


def predict(args: argparse.Namespace) -> None:
    """`dmd predict`: predictions, and DMD's edges of both graphs, for clips in an npz file."""
    device = find_device(args.device)
    model = checkpoint.load_model(args.checkpoint)[0].to(device)
    clips = read_clips(Path(args.input))
    try:
        model.check(clips)
    except ValueError as error:
        raise ValueError(f"{args.input} does not fit {args.checkpoint}: {error}") from error
    graphs = ("homo", "hetero") if isinstance(model, DMD) else ()
    parts = []
    with torch.inference_mode():
        for index in torch.arange(len(clips)).split(args.batch_size):
            output = model(clips[index].to(device))
            edges = [getattr(output, name).edges for name in graphs]
            parts.append((output.prediction, *edges))
    joined = [torch.cat(part).float().cpu().numpy() for part in zip(*parts, strict=True)]
    names = ("prediction", *(f"{name}_edges" for name in graphs))
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


def released_convert(args: argparse.Namespace) -> None:
    """`dmd released convert`: a published checkpoint as one that the other commands take."""
    config = ModelConfig.preset("released", **key_values(args.model)) if args.model else None
    folder = Path(args.output)
    checkpoint.check_output(folder, resume=False)
    files = {"dmd": args.checkpoint, "homo": args.homo, "hetero": args.hetero}
    states = {part: released.load(file) for part, file in files.items() if file is not None}
    seed_everything(0)  # for the kernels of the graphs that no file gives
    try:
        model = released.from_state(states.pop("dmd"), **states, config=config)
    except ValueError as error:
        raise ValueError(f"{args.checkpoint} can't be converted: {error}") from error
    path = folder / "best.safetensors"
    meta = {
        "model_config": model.config.to_dict(),
        "converted_from": files,
        "provenance": checkpoint.provenance(),
    }
    checkpoint.save(path, checkpoint.put("model", model.state_dict()), meta)
    names = (*released.SIZES, "heads", "causal_mask")
    result = {"output": str(path), **{name: getattr(model.config, name) for name in names}}
    emit({**result, "converted_from": files} if args.json else result, args.json)
    untrained = [name for name in ("homo", "hetero") if files[name] is None]
    if untrained and not args.json:
        print(f"edges of {' and '.join(untrained)}: at random, no prediction depends on them")


def bench_step(args: argparse.Namespace) -> None:
    """`dmd bench`: how fast a training step is, and how far from what the machine can do."""
    result = bench.run(
        args.preset,
        key_values(args.model),
        args.batch_size,
        args.steps,
        args.device,
        args.variants,
        args.scaling,
    )
    print(checkpoint.to_json(result) if args.json else bench.table(result))


def study(args: argparse.Namespace) -> None:
    """`dmd study`: train the cells of one of the paper's tables and print it, or print a record."""
    if args.name.endswith(".json"):
        record = tables.read(args.name)
        print(checkpoint.to_json(record) if args.json else tables.FORMATS[args.format](record))
        return
    rows = studies.find("study", args.name, studies.STUDIES)()
    scale = studies.find("scale", args.scale, studies.SCALES)
    if args.rows:
        names = {row.name: row for row in rows}
        rows = [studies.find("row", name, names) for name in args.rows]
    if args.data:
        name, *pairs = args.data
        kinds = get_type_hints(LOADERS[name]) if name in LOADERS else {}
        settings = {name: (name, key_values(pairs, kinds))}
    else:
        chosen = args.settings or ["synthetic"]
        settings = {x: studies.find("setting", x, scale.settings) for x in chosen}
    folder = Path(args.output or Path("runs", "studies", args.scale))
    how = {"jobs": args.jobs, "ray": args.ray}
    seeds = range(args.first_seed, args.first_seed + args.seeds)
    found = []
    for setting, dataset in settings.items():
        results, tuning = studies.run_setting(rows, setting, dataset, scale, folder, seeds, **how)
        configuration = {
            "data": {"name": dataset[0], **dataset[1]},
            "model": dict(scale.model),
            "train": dict(scale.train),
            "learning_rates": list(scale.grid),
            "sizes": {name: dict(sizes) for name, sizes in scale.sizes.items()},
            "scale": args.scale,
            "tuning": tuning,
        }
        where = ["--data", *args.data] if args.data else ["--settings", setting]
        command = f"python -m dmd study {args.name} --scale {args.scale} {shlex.join(where)}"
        command += f" --rows {' '.join(args.rows)}" if args.rows else ""
        command += f" --seeds {args.seeds}" if args.seeds != 5 else ""
        command += f" --first-seed {args.first_seed}" if args.first_seed else ""
        record = tables.record(args.name, setting, configuration, results, command)
        checkpoint.write_json(folder / f"{args.name}_{setting}.json", record)
        found.append(record)
        if not args.json:
            print(f"\n{setting}: {len(record['rows'])} rows, {args.seeds} seeds")
            print(tables.FORMATS[args.format](record))
    if args.json:
        print(checkpoint.to_json(found))
