"""Properties of schedules: spans, levels by SNR, tails."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tsdiff.treesearch.errors import UsageError
from tsdiff.treesearch.schedule import Schedule


@st.composite
def schedules(draw: st.DrawFn) -> Schedule:
    """VP schedules with SNRs that never fall (equal ones occur), clean or nearly clean at the end."""
    steps = draw(st.integers(1, 60))
    gaps = draw(st.lists(st.sampled_from([0.0, 0.1, 1.0]), min_size=steps, max_size=steps))
    log_snr, levels = -6.0, []
    for gap in [0.0, *gaps]:
        log_snr += gap
        levels.append(log_snr)
    alpha = [1.0 / math.sqrt(1.0 + math.exp(-level)) for level in levels]
    sigma = [1.0 / math.sqrt(1.0 + math.exp(level)) for level in levels]
    if draw(st.booleans()):
        alpha[-1], sigma[-1] = 1.0, 0.0
    scales = tuple(zip(alpha, sigma, strict=True))
    return Schedule("ddim", "key", tuple(float(steps - i) for i in range(steps)), tuple(alpha), tuple(sigma), scales, 1.0)


@given(schedules(), st.data())
def test_span(schedule: Schedule, data: st.DataObject) -> None:
    start = data.draw(st.integers(0, schedule.last))
    to = data.draw(st.integers(start, schedule.last))
    num_steps = data.draw(st.none() | st.integers(1, 80))
    levels = schedule.span(start, to, num_steps)
    assert levels[0] == start
    assert levels[-1] == to
    assert all(a < b for a, b in pairwise(levels))
    wanted = to - start if num_steps is None else min(num_steps, to - start)
    assert len(levels) - 1 == wanted
    gaps = [b - a for a, b in pairwise(levels)]
    assert not gaps or max(gaps) - min(gaps) <= 1  # evenly spread


@given(schedules(), st.lists(st.floats(-20.0, 60.0), min_size=2, max_size=2).map(sorted))
def test_level_at_is_monotone_and_first(schedule: Schedule, snrs: list[float]) -> None:
    low, high = (schedule.level_at(snr) for snr in snrs)
    assert low <= high
    for snr, level in zip(snrs, (low, high), strict=True):
        assert all(schedule.log_snr(before) < snr for before in range(level))
        assert level == schedule.last or schedule.log_snr(level) >= snr


@given(schedules())
def test_level_at_finds_levels(schedule: Schedule) -> None:
    for level in range(schedule.last + 1):
        found = schedule.level_at(schedule.log_snr(level))
        assert found <= level
        assert found == schedule.last or schedule.log_snr(found) == pytest.approx(schedule.log_snr(level))


@given(schedules(), st.data())
def test_tail(schedule: Schedule, data: st.DataObject) -> None:
    start = data.draw(st.integers(0, schedule.last - 1))
    tail = schedule.tail(start)
    assert tail.last == schedule.last - start
    assert [tail.log_snr(level) for level in range(tail.last + 1)] == list(schedule.log_snrs[start:])
    assert tail.timesteps == schedule.timesteps[start:]
    assert (tail.key == schedule.key) == (start == 0)


@given(schedules(), st.data())
def test_costs(schedule: Schedule, data: st.DataObject) -> None:
    """Heun omits the corrector where it would divide by sigma 0, and nowhere else."""
    levels = schedule.span(data.draw(st.integers(0, schedule.last)), schedule.last)
    clean = schedule.sigma[schedule.last] == 0.0 and len(levels) > 1
    assert schedule.span_cost(levels) == len(levels) - 1
    assert schedule.span_cost(levels, stages=2) == 2 * (len(levels) - 1) - clean


def test_wrong_requests() -> None:
    schedule = Schedule("ddim", "key", (2.0, 1.0), (0.1, 0.5, 1.0), (1.0, 0.8, 0.0), ((0.1, 1.0), (0.5, 0.8), (1.0, 0.0)), 1.0)
    for start, to in [(1, 0), (-1, 1), (0, 3)]:
        with pytest.raises(UsageError, match="levels run from 0 to 2"):
            schedule.span(start, to)
    with pytest.raises(UsageError, match="at least 1"):
        schedule.span(0, 2, 0)
    with pytest.raises(UsageError, match="at least one step"):
        schedule.tail(2)
    with pytest.raises(ValueError, match="3 levels"):
        Schedule("ddim", "key", (2.0, 1.0), (0.1, 0.5), (1.0, 0.8, 0.0), ((1.0, 0.0),) * 3, 1.0)
