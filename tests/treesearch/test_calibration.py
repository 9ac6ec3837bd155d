"""The batch size: the smallest that reaches 95 % of the best throughput."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tsdiff.treesearch import calibrate as module
from tsdiff.treesearch.calibrate import calibrate, is_out_of_memory


class Machine:
    """Takes scripted seconds for each batch."""

    def __init__(self, seconds, capacity=10**9):
        self.seconds = seconds
        self.capacity = capacity
        self.probed = []

    def probe(self, rows):
        if rows > self.capacity:
            raise torch.OutOfMemoryError("full")
        self.probed.append(rows)

    def time(self, probe, rows, device):
        probe(rows)
        return self.seconds(rows)


def chosen(machine, **options):
    original, module._seconds = module._seconds, machine.time
    try:
        return calibrate(machine.probe, device="cpu", **options)
    finally:
        module._seconds = original


def test_a_machine_that_works_in_parallel_gets_the_batch_that_fills_it():
    # Up to 32 rows for the price of one, then linear.
    assert chosen(Machine(lambda rows: 0.01 * max(1.0, rows / 32))) == 32


def test_a_machine_that_works_in_series_gets_one_row():
    machine = Machine(lambda rows: 0.01 * rows)
    assert chosen(machine) == 1


def test_overhead_is_spread_until_it_hardly_matters():
    # rate = n / (a + b n), best at 128: 1 / (a / 128 + b); 95 % of it is reached between 32 and 64 for a = 2 b.
    rates = {n: n / (0.002 + 0.001 * n) for n in (1, 2, 4, 8, 16, 32, 64, 128)}
    expected = min(n for n in rates if rates[n] >= 0.95 * max(rates.values()))
    assert chosen(Machine(lambda rows: 0.002 + 0.001 * rows)) == expected == 32


@given(st.lists(st.floats(0.001, 0.4), min_size=8, max_size=8))
def test_the_smallest_within_95_percent_of_the_best_measured(seconds):
    table = {2**i: value for i, value in enumerate(seconds)}
    machine = Machine(table.__getitem__)
    batch = chosen(machine)
    rates = {rows: rows / table[rows] for rows in set(machine.probed)}
    assert batch == min(rows for rows in rates if rates[rows] >= 0.95 * max(rates.values()))


@given(st.integers(1, 128))
def test_memory_bounds_the_batch(capacity):
    batch = chosen(Machine(lambda rows: 0.01, capacity))
    assert batch == max(2**i for i in range(8) if 2**i <= capacity)


def test_slow_calls_are_not_made_longer():
    machine = Machine(lambda rows: 0.6)
    chosen(machine)
    assert set(machine.probed) == {1}


def test_the_largest_batch_can_be_limited():
    machine = Machine(lambda rows: 0.01)
    assert chosen(machine, most_rows=16) == 16
    assert max(machine.probed) == 16


def test_falling_throughput_ends_the_measurement():
    machine = Machine(lambda rows: {1: 0.01, 2: 0.01, 4: 0.01, 8: 0.05}.get(rows, 1.0))
    assert chosen(machine) == 4
    assert max(machine.probed) == 8


def test_other_errors_are_raised():
    def probe(rows):
        raise ValueError("not memory")

    with pytest.raises(ValueError, match="not memory"):
        calibrate(probe, device="cpu")


def test_the_clock_measures_the_probe(monkeypatch):
    ticks = itertools.count()
    monkeypatch.setattr(module.time, "perf_counter", lambda: float(next(ticks)))
    assert module._seconds(lambda rows: None, 3, "cpu") == 1.0


@pytest.mark.parametrize(
    ("error", "answer"),
    [(torch.OutOfMemoryError("x"), True), (MemoryError(), True), (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), True), (RuntimeError("x"), False), (ValueError(), False)],
)
def test_what_is_out_of_memory(error, answer):
    assert is_out_of_memory(error) == answer
