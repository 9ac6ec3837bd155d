"""Ctrl-C: the first one lets the batch finish and what it gave be written down, the second stops at once."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from tsdiff.cli.output import say


@contextmanager
def first_finishes_the_batch() -> Iterator[Callable[[], bool]]:
    """Whether somebody has asked to stop, for `execute(stop=...)`."""
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():  # signals belong to the main thread
        yield asked.is_set
        return

    def handle(number: int, frame: FrameType | None) -> None:
        asked.set()
        signal.signal(signal.SIGINT, before)
        say("", "finishing the batch; once more stops at once")

    before = signal.signal(signal.SIGINT, handle)
    try:
        yield asked.is_set
    finally:
        signal.signal(signal.SIGINT, before)
