"""Wall time by stage, without overlap."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager


class Stopwatch:
    """Books wall time on stages; a stage inside another is booked on its own only.

    Args:
      seconds: what to add to, by stage.
    """

    def __init__(self, seconds: dict[str, float]) -> None:
        self._seconds = seconds
        self._stages: list[str] = []
        self._since = 0.0

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        """Book the time spent inside on a stage."""
        self._book()
        self._stages.append(stage)
        try:
            yield
        finally:
            self._book()
            self._stages.pop()

    def _book(self) -> None:
        """Credit the current stage with the time since the last change."""
        now = time.perf_counter()
        if self._stages:
            self._seconds[self._stages[-1]] += now - self._since
        self._since = now
