"""What the chapters show: figures with alternative text, sliders, tables and computed sentences.

Only chapters import this module; it is the one place of the package that needs matplotlib and
IPython. Every picture is white behind, so that it can be read in light and in dark pages.
"""

import base64
import html
import io
import json
import math
import os
import sys
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
from cycler import cycler
from IPython import get_ipython
from IPython.display import HTML, Markdown, display
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from dmd.batch import MODALITIES, PerModality

Value = TypeVar("Value")

# Blue, vermilion and bluish green of Okabe and Ito's palette: told apart by readers with any of
# the common kinds of colour blindness, and dark enough for lines on white.
COLOURS = PerModality("#0072B2", "#D55E00", "#009E73")

SHORTEST_ALT = 40  # characters; below that a text names a figure instead of saying what it shows
CSS_PIXELS = 96  # of an inch, on the page
FRAME_DPI = 110  # of slider frames, which travel with the page many at a time


def setup() -> None:
    """Set matplotlib's defaults for the book; seaborn takes them over. Call once a chapter."""
    mpl.rcParams.update(
        {
            "figure.figsize": (6.2, 3.5),
            "figure.dpi": 150,
            "savefig.dpi": 150,
            "figure.constrained_layout.use": True,
            "figure.facecolor": "white",
            "savefig.facecolor": "white",
            "font.size": 11,
            "axes.titlesize": 12,
            "axes.prop_cycle": cycler(color=[*COLOURS, "#CC79A7", "#56B4E9", "#E69F00"]),
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.grid": True,
            "axes.axisbelow": True,
            "grid.color": "#DDDDDD",
            "image.cmap": "cividis",
            "legend.frameon": False,
            "lines.linewidth": 2,
        }
    )


def _checked_alt(alt: str) -> str:
    """The alternative text on one line, or ValueError where it can't say what a figure shows."""
    text = " ".join(alt.split())
    if len(text) < SHORTEST_ALT:
        raise ValueError(
            f"alt={text!r} is too short: say in at least {SHORTEST_ALT} characters what the "
            "figure shows, for a reader who can't see it"
        )
    return text


def _png(figure: Figure, dpi: float, colours: int | None = None) -> str:
    """The figure as a PNG data URL; `colours` bounds its palette, which makes it small."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi, facecolor="white")
    plt.close(figure)
    if colours is not None:
        image = Image.open(buffer).convert("RGB").quantize(colours, dither=Image.Dither.NONE)
        buffer = io.BytesIO()
        image.save(buffer, format="png", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def _img(source: str, alt: str, inches: float) -> str:
    """An `<img>` as wide as the figure, or as the page where that is narrower."""
    return (
        f'<img src="{source}" alt="{html.escape(alt)}" width="{round(inches * CSS_PIXELS)}" '
        'style="max-width:100%;height:auto;background:#fff">'
    )


def show(figure: Figure, alt: str) -> None:
    """Display a figure with its alternative text, and close it.

    alt: what the figure shows, in words: the axes, and what there is to see.
    Raises ValueError where alt is too short to say that.
    """
    text = _checked_alt(alt)
    inches = float(figure.get_figwidth())
    source = _png(figure, dpi=float(mpl.rcParams["figure.dpi"]))
    display(HTML(f'<figure class="dmd-figure">{_img(source, text, inches)}</figure>'))


# Runs when the slider moves. It finds everything from the slider itself, so that any number of
# sliders live on a page and nothing has to happen when the page loads.
_ON_INPUT = (
    "const box = this.closest('.dmd-slider');"
    "const frame = JSON.parse(box.dataset.frames)[this.value];"
    "const image = box.querySelector('img');"
    "image.src = frame.src; image.alt = frame.alt;"
    "box.querySelector('output').value = frame.value;"
    "this.setAttribute('aria-valuetext', frame.value);"
)


def slider(
    draw: Callable[[Value], Figure],
    values: Sequence[Value],
    label: str,
    alt: Callable[[Value], str],
) -> None:
    """Display a figure that changes with a slider, with or without a kernel.

    Every frame is drawn now and travels with the page, so keep to about ten values and give all
    frames the same axis limits.

    draw: value -> figure. values: the positions of the slider, in order. label: what it sets.
    alt: value -> what the frame shows, see `show`.
    Raises ValueError for fewer than two values, an empty label, or texts that are too short or
    do not change with the value.
    """
    if len(values) < 2:
        raise ValueError(f"a slider needs at least two values, not {len(values)}")
    if not label.strip():
        raise ValueError("a slider needs a label that says what it sets")
    texts = [_checked_alt(alt(value)) for value in values]
    if len(set(texts)) == 1:
        raise ValueError("alt gives the same text for every value: say what differs")
    inches, frames = 0.0, []
    for value, text in zip(values, texts, strict=True):
        figure = draw(value)
        inches = float(figure.get_figwidth())
        source = _png(figure, FRAME_DPI, colours=64)
        frames.append({"src": source, "alt": text, "value": _written(value)})
    name = f"slider-{uuid.uuid4().hex}"
    first = frames[0]
    display(
        HTML(
            f'<figure class="dmd-figure dmd-slider" '
            f'data-frames="{html.escape(json.dumps(frames))}">'
            f'<div><label for="{name}">{html.escape(label)}</label> '
            f'<input type="range" id="{name}" min="0" max="{len(frames) - 1}" step="1" value="0" '
            f'autocomplete="off" aria-valuetext="{html.escape(first["value"])}" '
            f'oninput="{html.escape(_ON_INPUT)}"> '
            f'<output for="{name}" aria-live="off">{html.escape(first["value"])}</output></div>'
            f"{_img(first['src'], first['alt'], inches)}</figure>"
        )
    )


def _front_end() -> bool:
    """Whether a person sits in front of this kernel, in JupyterLab, VS Code or Colab.

    A build of the book and a test run have a kernel too, but nothing to move a widget with.
    Each of the three leaves a trace: Jupyter's server names the session, VS Code the notebook,
    Colab its module.
    """
    shell = get_ipython()
    in_code = shell is not None and "__vsc_ipynb_file__" in shell.user_ns
    return in_code or "JPY_SESSION_NAME" in os.environ or "google.colab" in sys.modules


def live(function: Callable[..., Any], **controls: Any) -> None:
    """Run `function` on live data whenever a widget moves, where there is somebody to move it.

    The controls are those of `ipywidgets.interact`. In the built book, where a widget would move
    nothing, one sentence says where the live version runs.
    """
    if not _front_end():
        say(
            "*Run this chapter in JupyterLab, VS Code or Colab, and controls appear here that "
            "compute the figure anew.*"
        )
        return
    from ipywidgets import interact  # only here: importing it starts the widget machinery

    interact(function, **controls)


def say(markdown: str) -> None:
    """Display computed text as Markdown, so that no number in the prose is typed."""
    display(Markdown(markdown))


def record(name: str) -> dict[str, Any] | None:
    """The recorded result data/results/NAME.json of the book's repository, where it is at hand.

    None, and one sentence that says so, where it is not beside this notebook (as in Colab).
    """
    for up in ("..", "."):
        file = Path(up, "data", "results", f"{name}.json")
        if file.is_file():
            found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
            return found
    say(
        f"*The record `data/results/{name}.json` is not beside this notebook; it lies in the "
        "repository of the book. What it shows is left out here.*"
    )
    return None


def _written(value: object) -> str:
    """A value as a reader wants it: floats with three significant digits, all else as it is."""
    if isinstance(value, float | np.floating):
        number = float(value)
        return f"{number:.3g}" if math.isfinite(number) else str(number)
    return str(value)


def table(rows: Sequence[Mapping[str, object]], caption: str) -> None:
    """Display computed values as a table with a caption.

    rows: one mapping from column name to value a row, all with the same columns. Floats are
    written with three significant digits; pass text to choose otherwise.
    Raises ValueError for no rows, an empty caption, or rows whose columns differ.
    """
    if not rows:
        raise ValueError("a table needs at least one row")
    if not caption.strip():
        raise ValueError("a table needs a caption that says what it shows")
    columns = list(rows[0])
    for number, row in enumerate(rows):
        if list(row) != columns:
            raise ValueError(f"row {number} has the columns {list(row)}, but row 0 has {columns}")

    def line(cells: Sequence[str]) -> str:
        # A bar or a line break inside a cell would end it.
        return "| " + " | ".join(" ".join(c.replace("|", "\\|").split()) for c in cells) + " |"

    numeric = [all(isinstance(row[c], int | float | np.number) for row in rows) for c in columns]
    rule = line(["---:" if right else "---" for right in numeric])
    body = [line([_written(row[c]) for c in columns]) for row in rows]
    say("\n".join([f"*{caption.strip()}*", "", line(columns), rule, *body]))


def heatmap(
    axes: Axes,
    matrix: Any,
    row_names: Sequence[str],
    column_names: Sequence[str],
    low: float | None = None,
    high: float | None = None,
    digits: int = 2,
) -> None:
    """Draw a matrix (rows, columns) as coloured cells with their values written in them.

    low, high: the values at the two ends of the colours (None: those of the matrix).
    Raises ValueError where the names do not fit the matrix.
    """
    cells = np.asarray(matrix, dtype=float)
    if cells.shape != (len(row_names), len(column_names)):
        raise ValueError(
            f"the matrix has shape {cells.shape}, but there are {len(row_names)} row names and "
            f"{len(column_names)} column names"
        )
    low = float(cells.min()) if low is None else low
    high = float(cells.max()) if high is None else high
    axes.imshow(cells, cmap="cividis", vmin=low, vmax=high)
    axes.set_xticks(range(len(column_names)), column_names)
    axes.set_yticks(range(len(row_names)), row_names)
    axes.grid(False)
    for row, column in np.ndindex(cells.shape):
        value = float(cells[row, column])
        # cividis runs from dark to light: the ink is chosen against the cell it stands on.
        ink = "white" if value < (low + high) / 2 else "black"
        axes.text(column, row, f"{value:.{digits}f}", ha="center", va="center", color=ink)


def graph(axes: Axes, edges: Any) -> None:
    """Draw a distillation graph: one node a modality, an arrow i -> j as wide as edges[i, j].

    edges: (3, 3) weights in the order L, V, A; the diagonal is not drawn.
    """
    weights = np.asarray(edges, dtype=float)
    if weights.shape != (3, 3):
        raise ValueError(f"edges: expected shape (3, 3), got {weights.shape}")
    places = [(0.0, 1.0), (-0.87, -0.5), (0.87, -0.5)]
    for i, j in [(i, j) for i in range(3) for j in range(3) if i != j]:
        start, end = np.array(places[i]), np.array(places[j])
        arrow = {
            "arrowstyle": "-|>", "shrinkA": 24, "shrinkB": 24, "color": COLOURS[i],
            "linewidth": 0.3 + 10 * weights[i, j], "connectionstyle": "arc3,rad=0.18",
        }  # fmt: skip
        axes.annotate("", xy=tuple(end), xytext=tuple(start), arrowprops=arrow)
        across = np.array([(end - start)[1], -(end - start)[0]])
        x, y = start + 0.5 * (end - start) + 0.19 * across
        axes.text(x, y, f"{weights[i, j]:.2f}", ha="center", va="center", fontsize=9)
    for place, name, colour in zip(places, MODALITIES, COLOURS, strict=True):
        axes.scatter(*place, s=1400, color=colour, zorder=3)
        axes.text(*place, name[0].upper(), color="white", ha="center", va="center", zorder=4)
    axes.set(xlim=(-1.5, 1.5), ylim=(-1.1, 1.45), aspect="equal")
    axes.axis("off")
