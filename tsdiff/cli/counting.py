"""How far a piece of work is that counts what it does: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tsdiff.cli.output import coloured, say

SECONDS_BETWEEN_LINES = 10.0

Callback = Callable[[int, int], None]


@contextmanager
def counting(quiet: bool, title: str) -> Iterator[Callback | None]:
    """A callback (done, total) that shows a bar on a terminal, a line now and then elsewhere, nothing with `quiet`."""
    if quiet:
        yield None
    elif sys.stderr.isatty() and os.environ.get("TERM") != "dumb":
        from rich.console import Console
        from rich.progress import Progress

        with Progress(console=Console(stderr=True, no_color=not coloured(sys.stderr)), transient=True) as bar:
            task = bar.add_task(title, total=None)
            yield lambda done, total: bar.update(task, completed=done, total=total)
    else:
        last = time.monotonic()

        def line(done: int, total: int) -> None:
            nonlocal last
            if time.monotonic() - last >= SECONDS_BETWEEN_LINES:
                last = time.monotonic()
                say("", f"{title}: {done:,} of {total:,} ({100 * done // total}%)")

        yield line
