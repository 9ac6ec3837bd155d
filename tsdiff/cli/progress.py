"""Progress of a search, counted in network evaluations: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from tsdiff.cli.output import coloured, number, say
from tsdiff.treesearch.terminal import drawn

if TYPE_CHECKING:
    from tsdiff.treesearch.search import Progress

Callback = Callable[["Progress"], None]

SECONDS_BETWEEN_LINES = 10.0


@contextmanager
def progress(*, quiet: bool, loading: str) -> Iterator[Callback | None]:
    """A callback that shows progress on stderr; None with `quiet`.

    Args:
      loading: what is shown until the first evaluation, e.g. "loading gaussian".
    """
    if quiet:
        yield None
    elif sys.stderr.isatty() and os.environ.get("TERM") != "dumb":
        with _bar(loading) as update:
            yield update
    else:
        yield lines(time.monotonic)


def lines(clock: Callable[[], float]) -> Callback:
    """A callback that prints one line at most every `SECONDS_BETWEEN_LINES`, none for a search shorter than that."""
    last = clock()

    def update(state: Progress) -> None:
        nonlocal last
        if clock() - last >= SECONDS_BETWEEN_LINES:
            last = clock()
            share = f" ({100 * state.nfe // state.nfe_total}%)" if state.nfe_total else ""
            say("", f"{state.nfe:,} of {state.nfe_total:,} NFE{share}, {state.runs_done} of {state.runs_total} runs{_best(state)}")

    return update


@contextmanager
def _bar(loading: str) -> Iterator[Callback]:
    from rich import progress as rich_progress
    from rich.console import Console

    console = Console(stderr=True, no_color=not coloured(sys.stderr), markup=False, emoji=False, highlight=False)
    columns = (
        rich_progress.TextColumn("{task.description}", markup=False),
        rich_progress.BarColumn(bar_width=None),
        rich_progress.TextColumn("{task.fields[count]}"),
        rich_progress.TimeRemainingColumn(),
    )
    with rich_progress.Progress(*columns, console=console, transient=True) as bar, drawn(bar.stop, bar.start):
        task = bar.add_task(loading, total=None, count="")

        def update(state: Progress) -> None:
            total = max(state.nfe_total, state.nfe)
            bar.update(
                task,
                description=f"{state.runs_done}/{state.runs_total} runs{_best(state)}",
                completed=state.nfe,
                total=total,
                count=f"{state.nfe:,}/{total:,} NFE",
            )

        yield update


def _best(state: Progress) -> str:
    return "" if state.best_score is None else f", best {number(state.best_score)}"
