"""Schedules of flow pipelines are those of diffusers, whatever shifts them; what is not supported is said."""

from __future__ import annotations

from typing import Any

import diffusers
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tsdiff.diffusion.flow_plan import FLOW_SOLVERS, FlowPlan
from tsdiff.treesearch.errors import UsageError

NATIVE = "FlowMatchEulerDiscreteScheduler"
DYNAMIC = {"use_dynamic_shifting": True, "shift": 3.0}


def plan_of(config: dict[str, Any], class_name: str = NATIVE, *, strict: bool = False, even_sigmas: bool = False) -> FlowPlan:
    return FlowPlan("model", class_name, config, strict=strict, even_sigmas=even_sigmas)


@pytest.mark.parametrize("even", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {"shift": 3.0},
        {"shift": 1.0},
        DYNAMIC,
        DYNAMIC | {"time_shift_type": "linear"},
        DYNAMIC | {"shift_terminal": 0.1},
        {"shift": 3.0, "use_karras_sigmas": True},
        {"shift": 3.0, "use_exponential_sigmas": True},
        DYNAMIC | {"use_beta_sigmas": True},
    ],
    ids=lambda options: "-".join(options),
)
def test_levels_are_those_of_diffusers_to_the_last_bit(options: dict[str, Any], even: bool) -> None:
    config = dict(diffusers.FlowMatchEulerDiscreteScheduler(**options).config)
    plan = plan_of(config, even_sigmas=even)
    mu = {"mu": plan.shift(1024)} if "use_dynamic_shifting" in options else {}
    for steps in (4, 28):
        theirs = diffusers.FlowMatchEulerDiscreteScheduler.from_config(config)
        theirs.set_timesteps(steps, sigmas=np.linspace(1.0, 1 / steps, steps) if even else None, **mu)
        schedule = plan.schedule(plan.solver(None, None), steps, 1024)
        assert schedule.sigma == tuple(theirs.sigmas.tolist())
        assert schedule.timesteps == tuple(theirs.timesteps.tolist())


def test_a_constant_shift_is_applied_twice_where_the_scheduler_chooses_the_range() -> None:
    once, twice = (plan_of({"shift": 3.0}, even_sigmas=even) for even in (True, False))
    last = {plan: plan.schedule(plan.solver(None, None), 28, None).sigma[-2] for plan in (once, twice)}
    shifted = lambda sigma: 3.0 * sigma / (1.0 + 2.0 * sigma)  # noqa: E731
    assert last[once] == pytest.approx(shifted(1 / 28), rel=1e-6)
    assert last[twice] == pytest.approx(shifted(shifted(1 / 1000)), rel=1e-6)


@settings(max_examples=12)
@given(tokens=st.integers(16, 1 << 13), steps=st.integers(2, 60))
def test_larger_images_have_noisier_levels(tokens: int, steps: int) -> None:
    plan = plan_of(DYNAMIC)
    small, large = (plan.schedule(plan.solver(None, None), steps, count) for count in (tokens, 2 * tokens))
    assert small.key != large.key
    assert all(a < b for a, b in zip(small.sigma[1:-1], large.sigma[1:-1], strict=True))
    assert (large.sigma[0], large.sigma[-1]) == (1.0, 0.0)


def test_the_shift_is_the_line_through_two_sizes() -> None:
    plan = plan_of(DYNAMIC | {"base_shift": 0.5, "max_shift": 1.15, "base_image_seq_len": 256, "max_image_seq_len": 4096})
    assert plan.shift(256) == pytest.approx(0.5)
    assert plan.shift(4096) == pytest.approx(1.15)
    assert plan_of({"shift": 3.0}).shift(4096) is None


def test_without_dynamic_shifting_all_sizes_share_a_schedule() -> None:
    plan = plan_of({"shift": 3.0})
    solver = plan.solver(None, None)
    assert plan.schedule(solver, 10, 16) is plan.schedule(solver, 10, 4096) is plan.schedule(solver, 10, None)


def test_flow_solvers_share_a_schedule_and_the_pipelines_own_is_first() -> None:
    plan = plan_of(DYNAMIC)
    assert plan.solvers == FLOW_SOLVERS
    assert plan.solver(None, None).name == "flow-euler"
    assert plan.prediction_type == "flow"
    assert len({plan.schedule(plan.solver(name, None), 10, 64).key for name in FLOW_SOLVERS}) == 1
    schedule = plan.schedule(plan.solver("flow-sde", None), 10, 64)
    tail = schedule.tail(4)
    assert plan.tables(tail).schedule == tail
    with pytest.raises(UsageError, match="does not fit this model"):
        plan.solver("ddim", None)


@pytest.mark.parametrize(
    ("class_name", "config", "shift"),
    [
        ("FlowMatchHeunDiscreteScheduler", {"shift": 3.0}, 3.0),
        (NATIVE, {"shift": 3.0, "stochastic_sampling": True}, 3.0),
        ("UniPCMultistepScheduler", {"use_flow_sigmas": True, "flow_shift": 5.0, "prediction_type": "flow_prediction"}, 5.0),
    ],
)
def test_a_scheduler_without_a_solver_is_replaced_with_one_line(class_name: str, config: dict[str, Any], shift: float) -> None:
    plan = plan_of(config, class_name)
    (notice,) = plan.notices
    assert class_name in notice
    assert "flow-euler" in notice
    solver = plan.solver(None, None)
    assert plan.schedule(solver, 10, None).sigma == plan_of({"shift": shift}).schedule(solver, 10, None).sigma
    with pytest.raises(UsageError, match=f"{class_name}.*strict_scheduler forbids"):
        plan_of(config, class_name, strict=True)


def test_the_own_scheduler_is_not_replaced_silently_or_otherwise() -> None:
    assert plan_of({"shift": 3.0}, strict=True).notices == ()


@pytest.mark.parametrize("class_name", ["DDIMScheduler", "EulerDiscreteScheduler", "UniPCMultistepScheduler"])
def test_a_scheduler_of_diffusion_models_is_refused(class_name: str) -> None:
    with pytest.raises(UsageError, match=f"{class_name}, is not for flow models"):
        plan_of({"beta_start": 0.0001}, class_name)


def test_what_cannot_be_built_is_said() -> None:
    with pytest.raises(UsageError, match=r"does not say how \(base_image_seq_len"):
        plan_of(DYNAMIC | {"max_shift": None})
    plan = plan_of({"invert_sigmas": True})
    with pytest.raises(UsageError, match="invert_sigmas"):
        plan.schedule(plan.solver(None, None), 10, None)
    plan = plan_of(DYNAMIC | {"shift_terminal": 0.1}, even_sigmas=True)
    with pytest.raises(UsageError, match="1 steps leave a level without a noise scale"):
        plan.schedule(plan.solver(None, None), 1, 64)  # one level cannot both begin and end the range
    plan = plan_of({"shift": 3.0})
    for steps in (0, 1001):
        with pytest.raises(UsageError, match="between 1 and 1000"):
            plan.schedule(plan.solver(None, None), steps, None)
