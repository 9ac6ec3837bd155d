"""What all figures share: their look, their colours, and how they are written. The same data give the same bytes.

Figures are made to be printed at the width of a column or a page, on white. Colours are those of the viewer's page: scores
in cividis, which rises in brightness and looks the same to nearly all people; operations differ in dashes too.
"""

from __future__ import annotations

import io
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from tsdiff.treesearch.errors import SetupError, UsageError
from tsdiff.treesearch.runfolder import write_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Colormap
    from matplotlib.figure import Figure

COLUMN, PAGE = 3.5, 7.2
"""Widths in inches: of a column, and of a page of two."""

MINUS, NONE = "\u2212", "\u2013"

POINTS = 72.0
"""Points of an inch, in which type and marks are measured."""

DPI = 300

INK, QUIET, FAINT = "#1d2129", "#68707d", "#d5d9e0"

SERIES = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#000000")
"""Okabe and Ito's colours without yellow, which is too faint for lines on white."""

DASHES: tuple[Any, ...] = ("-", (0, (5, 2)), (0, (1, 1.5)), (0, (5, 1.5, 1, 1.5)), (0, (8, 2)), (0, (3, 1, 1, 1, 1, 1)), (0, (2, 1)))

MARKERS = ("o", "s", "^", "D", "v", "P", "X")


class Stroke(NamedTuple):
    """How the edges of an operation are drawn, and what it is called."""

    colour: str
    dash: Any
    label: str


OPERATIONS = {
    "denoise": Stroke("#7a8494", "-", "denoise"),
    "renoise": Stroke("#b3561f", (0, (3, 2)), "re-noise"),
    "mix": Stroke("#1d7a72", (0, (1, 1.6)), "mix"),
}


def stroke(operation: str) -> Stroke:
    """How the edges of an operation are drawn; all that have no own stroke share one."""
    return OPERATIONS.get(operation) or Stroke("#7b4fa3", (0, (6, 2, 1.5, 2)), operation)


LOOK: dict[str, Any] = {
    "font.family": "DejaVu Sans",  # comes with matplotlib, so that every machine has it
    "font.size": 7.0,
    "text.color": INK,
    "text.parse_math": False,  # a prompt may hold a $
    "axes.edgecolor": QUIET,
    "axes.labelcolor": INK,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 7.5,
    "axes.formatter.use_mathtext": False,
    "axes.unicode_minus": True,
    "xtick.color": QUIET,
    "ytick.color": QUIET,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "xtick.major.size": 2.5,
    "ytick.major.size": 2.5,
    "legend.frameon": False,
    "legend.fontsize": 6.5,
    "svg.fonttype": "path",
    "svg.hashsalt": "tsdiff",
    "pdf.fonttype": 42,
    "savefig.dpi": DPI,
    "figure.dpi": POINTS,
}

SUFFIXES = (".png", ".svg", ".pdf")

_METADATA: dict[str, dict[str, Any]] = {
    ".png": {"Software": "tsdiff"},
    ".svg": {"Date": None, "Creator": "tsdiff"},
    ".pdf": {"CreationDate": None, "Creator": "tsdiff", "Producer": None},
}


def require_matplotlib() -> None:
    """Raise a SetupError without matplotlib."""
    if find_spec("matplotlib") is None:
        raise SetupError("pictures need matplotlib, which is not installed; run: pip install 'tsdiff[plots]'")


@contextmanager
def drawing() -> Iterator[None]:
    """Within the block, figures have this module's look, whatever the user's own settings of matplotlib are.

    Raises:
      SetupError: without matplotlib.
    """
    require_matplotlib()
    import matplotlib

    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(LOOK)
        yield


def new_figure(width: float, height: float) -> Figure:
    """A figure of a size in inches. Call within `drawing`."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height))


def write_figure(figure: Figure, path: Path) -> None:
    """Write a figure in the format of the suffix, whole or not at all. Call within `drawing`.

    Raises:
      UsageError, SetupError: if it cannot be written.
    """
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise UsageError(f"{str(path)!r} ends in {suffix or 'no suffix'}; a figure is written as {', '.join(SUFFIXES)}")
    buffer = io.BytesIO()
    figure.savefig(buffer, format=suffix[1:], metadata=_METADATA[suffix])
    write_file(path, [buffer.getvalue()])


# Scores --------------------------------------------------------------------------------------------------------------


def score_colours() -> Colormap:
    """The scale of scores from 0 (the worst) to 1 (the best); its brightest end, which white would swallow, is left out."""
    from matplotlib import colormaps
    from matplotlib.colors import ListedColormap

    return ListedColormap(colormaps["cividis"]([0.97 * step / 255 for step in range(256)]), name="scores")


class Ranks:
    """Where a score stands among others: 0 for the worst, 1 for the best.

    By rank, not by value: scores of noisy estimates are often far below those of samples, and would take all the colours.
    """

    def __init__(self, scores: Sequence[float]) -> None:
        self.sorted = sorted(scores)

    def __call__(self, score: float) -> float:
        """The share of scores that are lower; 1 for the highest."""
        return 1.0 if len(self.sorted) < 2 else min(1.0, bisect_left(self.sorted, score) / (len(self.sorted) - 1))

    def at(self, share: float) -> float:
        """The score that stands at a share of the way from the worst to the best."""
        return self.sorted[round(share * (len(self.sorted) - 1))]


def add_score_bar(figure: Figure, box: tuple[float, float, float, float], ranks: Ranks, name: str) -> Axes:
    """A horizontal colour bar in a box (left, bottom, width, height) of the figure; its ticks say which scores stand where."""
    import numpy as np

    axes = figure.add_axes(box)
    axes.imshow(np.linspace(0.0, 1.0, 256)[None], aspect="auto", cmap=score_colours(), extent=(0.0, 1.0, 0.0, 1.0), interpolation="nearest")
    shares = [0.0, 0.5, 1.0] if len(ranks.sorted) > 2 else [0.0, 1.0] if len(ranks.sorted) > 1 else [1.0]
    axes.set(yticks=[], xticks=shares, xlim=(0.0, 1.0))
    axes.set_xticklabels(numbers([ranks.at(share) for share in shares]), fontsize=6.0)
    axes.tick_params(axis="x", length=2.0, pad=1.5)
    axes.set_title(f"{name}, by rank", fontsize=6.0, pad=2.5, loc="left", color=INK)
    axes.spines[:].set_visible(False)
    return axes


def number(value: float, digits: int = 3) -> str:
    """A number for people, with a true minus sign."""
    text = f"{value:,.0f}" if abs(value) >= 10**digits and abs(value) < 1e6 else f"{value:.{digits}g}"
    return text.replace("-", MINUS)


def numbers(values: Sequence[float]) -> list[str]:
    """Numbers for people, with as many digits as it takes to tell different ones apart."""
    for digits in (3, 4, 5, 6):
        texts = [number(value, digits) for value in values]
        if len(set(texts)) == len(set(values)):
            break
    return texts


# Axes of plots -------------------------------------------------------------------------------------------------------


def plot_axes(figure: Figure, x: str, y: str, *, left: float = 0.52, right: float = 0.12, top: float = 0.14, bottom: float = 0.4, whole: bool = False) -> Axes:
    """Axes with names and a faint grid, in margins of inches; the ticks of x are `whole` numbers if wanted."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    width, height = figure.get_size_inches()
    axes = figure.add_axes((left / width, bottom / height, 1.0 - (left + right) / width, 1.0 - (top + bottom) / height))
    axes.set(xlabel=x, ylabel=y)
    axes.grid(axis="y", color=FAINT, linewidth=0.5)
    axes.set_axisbelow(True)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=whole))
    axes.yaxis.set_major_locator(MaxNLocator(6))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(FuncFormatter(lambda value, _: number(value, 4)))
    return axes


def add_note(figure: Figure, text: str) -> None:
    """A small line at the lower right."""
    width, height = figure.get_size_inches()
    figure.text(1.0 - 0.06 / width, 0.04 / height, text, ha="right", va="bottom", fontsize=5.5, color=QUIET)


LEGEND_LINE = 0.135  # inches


def legend_room(labels: Sequence[str]) -> float:
    """Inches that a legend above the axes takes."""
    return 0.06 + LEGEND_LINE * -(-len(labels) // _legend_columns(labels))


def add_legend(axes: Axes, handles: Sequence[Any], labels: Sequence[str]) -> None:
    """A legend above the axes, where it hides nothing."""
    axes.legend(
        handles, labels, loc="lower left", bbox_to_anchor=(0.0, 1.0), ncols=_legend_columns(labels), handlelength=2.6, handletextpad=0.6, columnspacing=1.4,
        labelspacing=0.3, borderaxespad=0.2, borderpad=0.1,
    )  # fmt: skip


def _legend_columns(labels: Sequence[str]) -> int:
    return 2 if max(map(len, labels)) <= 24 else 1
