"""Figures on disk, without a display. matplotlib is optional (`tsdiff[plots]`) and imported only when a plot is asked for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from tsdiff.treesearch.errors import SetupError, UsageError

SUFFIXES = (".png", ".pdf", ".svg")


def check_plot(path: str | Path) -> Path:
    """Whether a figure can be written there: called before the work whose result it shows.

    Raises:
      UsageError: for a name that says no format, or a folder that does not exist.
      SetupError: without matplotlib.
    """
    path = Path(path)
    if path.suffix.lower() not in SUFFIXES:
        raise UsageError(f"plot {str(path)!r} must end in {', '.join(SUFFIXES)}")
    if not path.absolute().parent.is_dir():
        raise UsageError(f"plot {str(path)!r}: the folder {str(path.parent)!r} does not exist; make it first")
    if find_spec("matplotlib") is None:
        raise SetupError("plots need matplotlib, which is not installed; run: pip install 'tsdiff[plots]'")
    return path


@contextmanager
def new_figure(path: str | Path, size: tuple[float, float] = (7.0, 4.4)) -> Iterator[Any]:
    """A matplotlib figure to draw on, of a size in inches; it is written when the block ends, whole or not at all.

    Raises:
      UsageError, SetupError: as `check_plot`.
    """
    path = check_plot(path)
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, dpi=150, layout="constrained")
    yield figure
    temporary = path.with_name(path.name + ".part")
    figure.savefig(temporary, format=path.suffix[1:].lower())
    temporary.replace(path)
