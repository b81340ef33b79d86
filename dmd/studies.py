"""The paper's tables as studies: which rows and settings each has, and how a study is run.

Protocol, the same for every row: the epoch with the lowest validation MAE is kept; the learning
rate is the one of a small grid whose run with seed 0 has the lowest validation MAE; then as many
seeds as asked for run with it. The test split chooses nothing.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dmd import data
from dmd.baselines import METHODS
from dmd.cells import Cell, run
from dmd.config import LossConfig, ModelConfig, TrainConfig
from dmd.differences import DIFFERENCES, switched
from dmd.options import nearest


@dataclass(frozen=True)
class Row:
    """A row of a table: what is trained."""

    name: str
    method: str = "dmd"
    model: Mapping[str, Any] | None = None
    loss: Mapping[str, Any] | None = None
    train: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Scale:
    """How large a study is: data, DMD's sizes, budget, learning rates, the other methods' sizes."""

    settings: Mapping[str, tuple[str, Mapping[str, Any]]]
    model: Mapping[str, Any]
    train: Mapping[str, Any]
    grid: tuple[float, ...]
    sizes: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


NARROW = {"size": "mosi", "widths": [32, 12, 8]}
TRANSFORMER = {"dim": 14, "heads": 2, "layers": 1, "embedding_dropout": 0.1}
# Sizes that give every method about as many weights as DMD has in the scale `study`: 110,809.
SIZES: dict[str, dict[str, Any]] = {
    "ef_lstm": {"hidden": 128},
    "lf_lstm": {"hidden": 80},
    "tfn": {"sizes": [16, 8, 8]},
    "lmf": {"sizes": [48, 24, 24], "hidden": 128, "rank": 16},
    "mfm": {"hidden": 24, "memory": 32, "code": 24, "factor": 24},
    "raven": {"hidden": 112, "cell": 48},
    "mctn": {"hidden": 42},
    "mult": TRANSFORMER,
    "mult_gd": TRANSFORMER,
    "graph_mfn": {"hidden": 48, "node": 40, "memory": 48, "inner": 40},
    "misa": {"dim": 30, "hidden": 24},
    "pmr": {"dim": 22, "heads": 2, "embedding_dropout": 0.1},
    "mica": TRANSFORMER,
    "fdmer": {"dim": 30, "heads": 2},
}
# The published files, where MMSA's folders were put below $DMD_DATA.
FILES = {
    f"{name}{suffix}": ("mmsa", {"path": f"$DMD_DATA/{name.upper()}/Processed/{form}_50.pkl"})
    for name in ("mosi", "mosei")
    for suffix, form in (("", "aligned"), ("_unaligned", "unaligned"))
}
SCALES = {
    # Minutes a row on two cores: as many clips as CMU-MOSI, but few features, steps and epochs.
    "study": Scale(
        {
            "synthetic": ("synthetic", {**NARROW, "lengths": [12, 12, 12]}),
            "unaligned": ("synthetic", {**NARROW, "aligned": False, "lengths": [12, 30, 24]}),
            "larger": (
                "synthetic", {**NARROW, "lengths": [12, 12, 12], "clips": [5136, 916, 2744]},
            ),
            "mosi_utterances": ("mosi_utterances", {"context": 4, "valid_share": 0.05}),
            **FILES,
        },
        {
            "dim": 16, "heads": 2, "layers": 1, "kernels": [3, 3, 3], "language_dropout": 0.1,
            "embedding_dropout": 0.1, "attention_dropout": [0.1, 0.0, 0.1], "output_dropout": 0.1,
        },
        {"epochs": 10, "batch_size": 32, "scheduler": "none"},
        (3e-4, 1e-3, 3e-3, 1e-2),
        SIZES,
    ),
    # The sizes and the budget of the paper, for a GPU.
    "full": Scale(
        {
            "synthetic": ("synthetic", {"size": "mosi"}),
            "unaligned": ("synthetic", {"size": "mosi", "aligned": False}),
            "synthetic_mosei": ("synthetic", {"size": "mosei"}),
            "mosi_utterances": ("mosi_utterances", {"context": 10, "valid_share": 0.05}),
            **FILES,
        },
        {}, {}, (1e-4, 5e-4, 1e-3),
    ),
}  # fmt: skip
NO_GRAPHS = {"homo_distillation": False, "hetero_distillation": False}
BARE = {**NO_GRAPHS, "decoupling": False, "crossmodal_attention": False}
METHOD_ROWS = [Row("dmd"), *(Row(name, name) for name in METHODS)]


def option_rows() -> list[Row]:
    """DMD under the paper's options, and with each point of `dmd.differences` switched."""
    base = {"model": ModelConfig(), "loss": LossConfig(), "train": TrainConfig()}
    rows = [Row("dmd")]
    for point in DIFFERENCES:
        if point.name in ("seed", "test_each_epoch"):  # no other model, no other scores
            continue
        changed: dict[str, Any] = {}
        for part, config in switched(point, **base).items():
            old = base[part].to_dict()
            changed[part] = {k: v for k, v in config.to_dict().items() if v != old[k]}
        changed["train"].pop("loss", None)
        rows.append(Row(point.name, **changed))
    return rows


STUDIES: dict[str, Callable[[], list[Row]]] = {
    "table1": lambda: METHOD_ROWS,
    "table2": lambda: METHOD_ROWS,  # the paper's second dataset: run it with --data
    "table3": lambda: [  # Sec. 4.2: parts added one by one
        Row("dmd"),
        Row("nothing", model=BARE),
        Row("decoupling", model={**BARE, "decoupling": True}),
        Row("decoupling_homo", model={**BARE, "decoupling": True, "homo_distillation": True}),
        Row(
            "decoupling_homo_attention",
            model={"hetero_distillation": False},
        ),
        Row(
            "decoupling_homo_hetero",
            model={"crossmodal_attention": False},
        ),
    ],
    "table4": lambda: [  # accuracy of each modality alone: read `heads_homo` of the cells
        Row("dmd"),
        Row("no_decoupling", model={"decoupling": False}),
        Row("no_homo", model={"homo_distillation": False}),
        Row("no_hetero", model={"hetero_distillation": False}),
    ],
    "table5": lambda: [Row("dmd"), Row("mult", "mult"), Row("mult_gd", "mult_gd")],
    "seeds": lambda: [Row("dmd")],
    "options": option_rows,
}


def find(kind: str, name: str, known: Mapping[str, Any]) -> Any:
    """The entry called `name`, or a ValueError that names the nearest."""
    if name not in known:
        raise ValueError(nearest(name, known, kind))
    return known[name]


def maker(
    setting: str, dataset: tuple[str, Mapping[str, Any]], scale: Scale
) -> Callable[[Row, int, float], Cell]:
    """A function that makes the cell of a row, a seed and a learning rate."""

    def make(row: Row, seed: int, rate: float) -> Cell:
        own = scale.model if row.method == "dmd" else scale.sizes.get(row.method, {})
        return Cell(
            setting,
            dataset[0],
            row.name,
            seed,
            rate,
            row.method,
            dataset[1],
            {**own, **(row.model or {})},
            row.loss or {},
            {**scale.train, **(row.train or {})},
        )

    return make


def run_setting(
    rows: Sequence[Row],
    setting: str,
    dataset: tuple[str, Mapping[str, Any]],
    scale: Scale,
    folder: Path,
    seeds: Sequence[int] = range(5),
    **how: Any,
) -> tuple[dict[str, list[dict[str, Any]]], dict[str, dict[str, float | None]]]:
    """Train all cells of one setting, tuning first.

    Two mappings: row -> its results, seed by seed; row -> learning rate -> validation MAE of the
    run with seed 0 (None: its loss was not finite), by which the rate was chosen.
    how: `jobs`, `ray`, `tell` of `dmd.cells.run`. Methods that need aligned clips have no cells
    where the clips are not.
    """
    # Read before anything is trained, so that a missing file is one sentence at once.
    aligned = len(set(data.load(dataset[0], **dataset[1]).lengths)) == 1
    rows = [r for r in rows if aligned or r.method == "dmd" or not METHODS[r.method].aligned_only]
    make = maker(setting, dataset, scale)
    grid = [make(row, 0, rate) for row in rows for rate in scale.grid]
    tuned = run(grid, folder, **how)
    tuning: dict[str, dict[str, float | None]] = {row.name: {} for row in rows}
    best: dict[str, float] = {}
    for found in tuned:
        error = None if "failed" in found else found["valid"]["mae"]
        tuning[found["row"]][f"{found['learning_rate']:g}"] = error
    for name, tried in tuning.items():
        finite = {rate: error for rate, error in tried.items() if error is not None}
        if not finite:
            raise ValueError(f"{name} does not train at any of {scale.grid}: its loss is NaN")
        best[name] = float(min(finite, key=finite.__getitem__))
    chosen = [make(row, seed, best[row.name]) for seed in seeds for row in rows]
    results = run(chosen, folder, **how)
    return {row.name: [x for x in results if x["row"] == row.name] for row in rows}, tuning
