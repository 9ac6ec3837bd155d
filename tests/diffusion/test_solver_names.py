"""Solver names, and the tables that belong to them."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tsdiff.diffusion.solvers import SOLVERS, solver_info
from tsdiff.diffusion.steps import STEPS
from tsdiff.diffusion.tables import plain_tables, scheduler_tables
from tsdiff.treesearch.errors import UsageError

ALL = tuple(SOLVERS)
LINEAR = {"beta_schedule": "linear", "clip_sample": False}


def test_every_solver_has_a_step_and_a_deterministic_twin_of_its_kind() -> None:
    assert set(STEPS) == set(SOLVERS)
    for info in SOLVERS.values():
        twin = SOLVERS[info.ode]
        assert twin.kind == info.kind
        assert not twin.stochastic


def test_names_are_read() -> None:
    assert solver_info(None, None, ("ddpm", "ddim")).name == "ddpm"
    assert not solver_info("ddim", None, ALL).stochastic
    half = solver_info("ddim(eta=0.5)", None, ALL)
    assert (half.eta, half.stochastic, half.ode) == (0.5, True, "ddim")
    assert (
        solver_info("ddim", 0.5, ALL)
        == solver_info(" ddim( 0.5 ) ", None, ALL)
        == solver_info("ddim(eta=0.5)", 0.5, ALL)
        == half
    )
    assert solver_info("flow-ancestral", None, ALL).eta == 1.0
    assert solver_info("flow-sde", None, ALL).eta == 0.7


@pytest.mark.parametrize("name", ALL)
def test_the_printed_name_is_read_back(name: str) -> None:
    assert solver_info(str(SOLVERS[name]), None, ALL) == SOLVERS[name]


@pytest.mark.parametrize(
    ("name", "eta", "allowed", "words"),
    [
        ("dimm", None, ("ddim", "ddpm"), "did you mean"),
        ("flow-euler", None, ("ddim", "ddpm"), "does not fit this model"),
        ("ddim", 1.5, ALL, r"\[0, 1\]"),
        ("ddim(eta=-0.1)", None, ALL, r"\[0, 1\]"),
        ("flow-sde(eta=0)", None, ALL, "flow-euler"),
        ("euler", 0.5, ALL, "takes no eta"),
        ("ddim(eta=0.5)", 0.6, ALL, "disagree"),
        ("ddim(eta=nan)", None, ALL, "write a number"),
        ("ddim(eta=", None, ALL, "cannot read"),
    ],
)
def test_wrong_names(name: str, eta: float | None, allowed: tuple[str, ...], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        solver_info(name, eta, allowed)


def test_a_model_may_bring_a_solver() -> None:
    from tsdiff.treesearch.schedule import SolverInfo

    exact = SolverInfo("exact", "exact", stochastic=True, num_noise=2, ode="exact")
    assert solver_info("exact", None, ("ddim", "exact"), SOLVERS | {"exact": exact}) is exact


def test_solvers_and_tables_import_no_torch() -> None:
    code = (
        "import sys; from tsdiff.diffusion.solvers import SOLVERS; from tsdiff.diffusion.tables import plain_tables;"
        "plain_tables('vp', SOLVERS['ddim'], 10); sys.exit('torch' in sys.modules or 'diffusers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# Scheduler tables ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "cls", "solver", "steps", "words"),
    [
        (LINEAR, None, "ddim", 0, "at least 1"),
        (LINEAR, None, "ddim", 1001, "at most 1000"),
        (LINEAR, None, "dpm++2m", 1000, "ask for fewer steps"),
        ({**LINEAR, "steps_offset": 1, "timestep_spacing": "leading"}, None, "ddim", 1000, "ask for fewer steps"),
        ({**LINEAR, "steps_offset": 1, "timestep_spacing": "leading"}, None, "euler", 1000, "ask for fewer steps"),
        ({**LINEAR, "thresholding": True}, None, "ddim", 10, "thresholding"),
        ({**LINEAR, "thresholding": True}, None, "dpm++2m", 10, "thresholding"),
        ({**LINEAR, "variance_type": "learned_range"}, None, "ddpm", 10, "learned_range"),
        ({**LINEAR, "variance_type": "fixed_large_log"}, None, "ddpm", 10, "fixed_large_log"),
        ({**LINEAR, "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}, None, "ddim", 10, "zero SNR"),
        ({"shift": 3.0}, "FlowMatchEulerDiscreteScheduler", "ddim", 10, "flow-"),
        (LINEAR, "PNDMScheduler", "flow-euler", 10, "flow models"),
        ({**LINEAR, "use_flow_sigmas": True}, None, "ddim", 10, "use_flow_sigmas"),
        ({"invert_sigmas": True}, "FlowMatchEulerDiscreteScheduler", "flow-euler", 10, "invert_sigmas"),
    ],
)
def test_what_is_not_supported_is_refused(config: dict[str, Any], cls: str | None, solver: str, steps: int, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        scheduler_tables(config, cls, SOLVERS[solver], steps)


def test_keys_name_tables() -> None:
    """Equal inputs have equal keys; a solver that shares tables shares the key; anything that changes a table changes it."""

    def key(name: str, steps: int = 10, **more: Any) -> str:
        return scheduler_tables({**LINEAR, **more}, None, solver_info(name, None, ALL), steps).schedule.key

    assert key("ddim") == key("ddim(eta=0.5)")
    assert key("dpm++2m") == key("dpm++2m-sde")
    assert (
        len({key("ddim"), key("ddpm"), key("euler"), key("heun"), key("dpm++2m"), key("ddim", 11), key("ddim", beta_end=0.01)})
        == 7
    )


def test_the_config_is_swapped_like_a_pipeline_does_and_never_changed() -> None:
    """Options of another class are dropped, its unset defaults do not leak, betas and offset stay."""
    from diffusers import DDIMScheduler, PNDMScheduler

    own = PNDMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, steps_offset=1, skip_prk_steps=True)
    config = dict(own.config)
    before = dict(config)
    tables = scheduler_tables(config, None, SOLVERS["ddim"], 20)
    want = DDIMScheduler.from_config(own.config)
    want.set_timesteps(20)
    assert config == before
    assert list(tables.schedule.timesteps) == want.timesteps.tolist()
    assert tables.grid[:-1] == tuple(want.alphas_cumprod[want.timesteps].tolist())
    assert (tables.clip is not None) == want.config.clip_sample


def test_ends_of_the_grids() -> None:
    stable = {**LINEAR, "set_alpha_to_one": False}
    ddim, ddpm = (scheduler_tables(stable, None, SOLVERS[name], 20).schedule for name in ("ddim", "ddpm"))
    assert ddim.sigma[-1] == pytest.approx(0.01, rel=1e-3)  # sqrt(beta_0): alpha never reaches 1
    assert (ddpm.alpha[-1], ddpm.sigma[-1]) == (1.0, 0.0)
    assert scheduler_tables(stable, None, SOLVERS["heun"], 20).schedule.sigma[-1] == 0.0
    assert scheduler_tables({**LINEAR, "final_sigmas_type": "sigma_min"}, None, SOLVERS["dpm++2m"], 20).schedule.sigma[-1] > 0.0


# Plain tables --------------------------------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(process=st.sampled_from(["vp", "vp-dpm", "ve", "flow"]), steps=st.integers(1, 1500))
def test_plain_tables(process: str, steps: int) -> None:
    """Any number of levels, each cleaner than the one before; the network is told what it needs to know the scales."""
    name = {"vp": "ddim", "vp-dpm": "dpm++2m", "ve": "euler", "flow": "flow-euler"}[process]
    schedule = plain_tables(process.split("-")[0], SOLVERS[name], steps).schedule  # type: ignore[arg-type]
    assert schedule.last == steps
    assert (schedule.alpha[-1], schedule.sigma[-1]) == (1.0, 0.0)
    assert all(a < b for a, b in zip(schedule.log_snrs[:-1], schedule.log_snrs[1:], strict=True))
    told, alpha, sigma = (np.array(row) for row in (schedule.timesteps, schedule.alpha[:-1], schedule.sigma[:-1]))
    if process == "flow":
        assert np.allclose(alpha, 1.0 - told, atol=1e-7)
        assert np.allclose(sigma, told, atol=1e-7)
    else:
        assert np.allclose(sigma, told * alpha, rtol=1e-6)
    if process.startswith("vp"):
        assert np.allclose(alpha**2 + sigma**2, 1.0, atol=1e-6)


def test_plain_vp_meets_the_discrete_schedule() -> None:
    """With 1000 steps level l is timestep 999 - l of the 1000 betas."""
    alphas = np.cumprod(1.0 - np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2)
    assert np.allclose(plain_tables("vp", SOLVERS["ddim"], 1000).grid[:-1], alphas[::-1], rtol=1e-6)


def test_plain_tables_refuse_a_solver_of_another_process() -> None:
    with pytest.raises(UsageError, match="does not fit"):
        plain_tables("ve", SOLVERS["ddim"], 4)
