"""How many rows a network call should have: the smallest batch within 95 % of the best throughput."""

from __future__ import annotations

import time
from collections.abc import Callable

GOOD_ENOUGH = 0.95
MOST_ROWS = 128
SLOW_SECONDS = 0.5


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error means that a batch did not fit in device or host memory."""
    import torch

    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "DefaultCPUAllocator: can't allocate memory" in str(error)


def calibrate(probe: Callable[[int], None], *, device: str, most_rows: int = MOST_ROWS) -> int:
    """Measure batches of 1, 2, 4, ... rows until throughput stops growing, memory runs out, or a call gets slow.

    Args:
      probe: runs the network on so many rows.
      device: where it runs; its queue is drained around every measurement.
      most_rows: the largest batch to try.

    Returns:
      The smallest measured batch whose rows per second reach 95 % of the best measured.
    """
    rates: dict[int, float] = {}
    rows = 1
    probe(1)  # the first call allocates, picks kernels, compiles
    while rows <= most_rows:
        try:
            seconds = min(_seconds(probe, rows, device) for _ in range(2))
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            break
        rates[rows] = rows / seconds
        best_before = max((rate for size, rate in rates.items() if size < rows), default=0.0)
        if seconds > SLOW_SECONDS or (len(rates) > 2 and rates[rows] < best_before / GOOD_ENOUGH):
            break
        rows *= 2
    best = max(rates.values(), default=1.0)
    return min((size for size, rate in rates.items() if rate >= GOOD_ENOUGH * best), default=1)


def _seconds(probe: Callable[[int], None], rows: int, device: str) -> float:
    _wait(device)
    started = time.perf_counter()
    probe(rows)
    _wait(device)
    return time.perf_counter() - started


def _wait(device: str) -> None:
    if device.startswith("cuda"):
        import torch

        torch.cuda.synchronize(device)
