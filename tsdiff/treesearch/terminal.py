"""The terminal is one: whoever draws on it lets go of it while somebody else asks a question there."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

_lock = threading.RLock()
_drawings: list[tuple[Callable[[], None], Callable[[], None]]] = []


@contextmanager
def drawn(stop: Callable[[], None], start: Callable[[], None]) -> Iterator[None]:
    """Say that something is drawn on the terminal again and again, a progress bar for example, until the block ends.

    Args:
      stop: takes the drawing off the terminal; called from any thread.
      start: puts it back.
    """
    drawing = (stop, start)
    with _lock:
        _drawings.append(drawing)
    try:
        yield
    finally:
        with _lock:
            _drawings.remove(drawing)


@contextmanager
def undisturbed() -> Iterator[None]:
    """The terminal to oneself: what is drawn on it is gone until the block ends."""
    with _lock:
        stopped = list(_drawings)
        for stop, _ in stopped:
            stop()
    try:
        yield
    finally:
        with _lock:
            for drawing in stopped:
                if drawing in _drawings:  # it may have ended meanwhile
                    drawing[1]()
