"""The answers of many runs side by side: prompts against policies, say. Made of the images that the runs have kept.

A grid is bounded: it has pages, and only the images of one page are read.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tsdiff.treesearch.errors import UsageError, unknown_name
from tsdiff.viewer.figures.cards import Card, page
from tsdiff.viewer.figures.paper import NONE, number

if TYPE_CHECKING:
    from PIL.Image import Image

    from tsdiff.treesearch.saved import SavedRun

ROWS, COLUMNS = 12, 8
"""Of one page."""

SAMPLE = "one sample"


def _budget(run: SavedRun) -> Any:
    budget = run.options.get("nfe_budget")
    return budget if isinstance(budget, int) else run.summary()["nfe"]


AXES: dict[str, Callable[[SavedRun], Any]] = {
    "prompt": lambda run: run.prompt,
    "policy": lambda run: run.policy or None,
    "model": lambda run: run.model or None,
    "seed": lambda run: run.seed,
    "verifier": lambda run: run.verifier or None,
    "solver": lambda run: run.options.get("solver"),
    "nfe": _budget,
}
"""What rows and columns can be. "nfe" is the budget; what was spent, where there was none."""


@dataclass(frozen=True)
class Grid:
    """Runs in rows and columns.

    Attributes:
      rows, columns: names of the axes.
      down, across: their values, in the order of the runs; numbers in their own.
      cells: the runs by (row value, column value).
    """

    rows: str
    columns: str
    down: tuple[Any, ...]
    across: tuple[Any, ...]
    cells: dict[tuple[Any, Any], list[SavedRun]]

    @property
    def pages(self) -> int:
        """How many pages it has."""
        return math.ceil(len(self.down) / ROWS) * math.ceil(len(self.across) / COLUMNS)

    def part(self, number: int) -> tuple[range, range]:
        """The rows and columns of a page, counted from 1: first to the right, then down. Raises UsageError."""
        if not 1 <= number <= self.pages:
            raise UsageError(f"there is no page {number}; the grid has {self.pages} page{'s' * (self.pages != 1)}")
        row, column = divmod(number - 1, math.ceil(len(self.across) / COLUMNS))
        return range(row * ROWS, min(len(self.down), (row + 1) * ROWS)), range(column * COLUMNS, min(len(self.across), (column + 1) * COLUMNS))

    def best(self, row: int, column: int) -> SavedRun | None:
        """The run with the highest score of a cell, the first where they tie; None if there is none."""
        runs = self.cells.get((self.down[row], self.across[column]), [])
        return max(runs, key=_score, default=None)


def _score(run: SavedRun) -> float:
    score = run.summary()["score"]
    return -math.inf if score is None else float(score)


def arrange(runs: Sequence[SavedRun], rows: str, columns: str) -> Grid:
    """Runs in rows and columns.

    Raises:
      UsageError: if an axis is not known, both are the same, or a cell would compare scores of different verifiers.
    """
    for axis in (rows, columns):
        if axis not in AXES:
            raise unknown_name("axis of a grid", axis, AXES)
    if rows == columns:
        raise UsageError(f"rows and columns are both {rows!r}; choose another for one of them: {', '.join(AXES)}")
    cells: dict[tuple[Any, Any], list[SavedRun]] = {}
    for run in runs:
        cells.setdefault((AXES[rows](run), AXES[columns](run)), []).append(run)
    for (row, column), found in cells.items():
        names = sorted({run.verifier for run in found})
        if len(names) > 1:
            raise UsageError(f"the runs of {row!r} and {column!r} are steered by {', '.join(names)}, whose scores cannot be compared; make verifier an axis, or give the runs of one")
    down, across = (_values([key[place] for key in cells]) for place in (0, 1))
    return Grid(rows, columns, down, across, cells)


def _values(found: Sequence[Any]) -> tuple[Any, ...]:
    values = tuple(dict.fromkeys(found))
    if all(isinstance(value, int) for value in values):
        return tuple(sorted(values))
    return values


def draw(grid: Grid, which: int = 1, *, baseline: bool = False) -> tuple[Image, list[str]]:
    """A page of a grid as an image, and what it leaves out.

    Args:
      baseline: a first column of plain samples, each from the first run of its row that has one.

    Raises:
      UsageError: if there is no such page.
      SetupError: without matplotlib, whose font it needs.
    """
    down, across = grid.part(which)
    side = 256 if len(across) <= 2 else 192 if len(across) <= 5 else 144
    notices: list[str] = []
    cards = [[*([_sample(grid, row)] if baseline else []), *(_cell(grid, row, column, notices) for column in across)] for row in down]
    columns = [*([SAMPLE] if baseline else []), *(label(grid.columns, grid.across[column]) for column in across)]
    verifiers = sorted({run.verifier for found in grid.cells.values() for run in found})
    count = sum(map(len, grid.cells.values()))
    facts = f"{count:,} run{'s' * (count != 1)}, scores by {', '.join(verifiers[:4]) or 'nobody'}{' ...' if len(verifiers) > 4 else ''}"
    foot = ""
    if grid.pages > 1:
        foot = f"page {which} of {grid.pages}: rows {down[0] + 1} to {down[-1] + 1} of {len(grid.down)}, columns {across[0] + 1} to {across[-1] + 1} of {len(grid.across)}"
        notices.insert(0, f"{foot}; --page shows another")
    crowd = max(map(len, grid.cells.values()))
    if crowd > 1:
        notices.append(f"cells hold up to {crowd} runs, and show the one with the best score")
    return page(cards, side, f"{grid.rows} by {grid.columns}", facts, columns=columns, rows=[label(grid.rows, grid.down[row]) for row in down], foot=foot), notices


def label(axis: str, value: Any) -> str:
    """What stands at a row or column."""
    if value is None:
        return f"no {axis}"
    if axis == "nfe":
        return f"{value:,} NFE"
    return f"seed {value}" if axis == "seed" else str(value) or f"(no {axis})"


def _cell(grid: Grid, row: int, column: int, notices: list[str]) -> Card:
    run = grid.best(row, column)
    if run is None:
        return Card(None, missing="no run")
    score = run.summary()["score"]
    count = len(grid.cells[grid.down[row], grid.across[column]])
    aside = f"best of {count}" if count > 1 else ""
    caption = NONE if score is None else number(score, 4)
    try:
        return Card(run.image().convert("RGB"), caption, aside)
    except (UsageError, OSError) as error:
        if run.status == "done":
            notices.append(str(error))
        return Card(None, caption, aside, missing="no image" if run.status == "done" else run.status)


def _sample(grid: Grid, row: int) -> Card:
    """The plain sample of a row."""
    for column in grid.across:
        for run in grid.cells.get((grid.down[row], column), []):
            try:
                image = run.image("baseline").convert("RGB")
            except (UsageError, OSError):  # another run of the row may have one
                continue
            score = run.summary()["baseline"]
            return Card(image, NONE if score is None else number(score, 4))
    return Card(None, missing="no plain sample")
