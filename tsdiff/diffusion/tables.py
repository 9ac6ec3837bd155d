"""The numbers behind a schedule: noise scales and the few scheduler options that a step depends on.

`scheduler_tables` lets diffusers build a scheduler from a pipeline's config, copies its tables and throws it away, so
grids follow the installed diffusers and no scheduler's hidden counter is ever used. `plain_tables` builds grids for
analytic models without diffusers or torch.

A grid holds one float32 value a level; what it means is the `family`:

| family | grid value | alpha | sigma | latents of |
| --- | --- | --- | --- | --- |
| abar | cumulative alpha | sqrt(abar) | sqrt(1 - abar) | ddim, ddpm, lcm |
| ve | s | 1 | s | euler, euler-ancestral, heun |
| ratio | s | 1 / sqrt(s^2 + 1) | s / sqrt(s^2 + 1) | dpm++ |
| flow | s | 1 - s | s | flow-* (and dpm++ on flow sigmas) |
"""

from __future__ import annotations

import hashlib
import inspect
import json
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np

from tsdiff.treesearch.errors import UsageError
from tsdiff.treesearch.imports import prepare_torchvision
from tsdiff.treesearch.schedule import Schedule, SolverInfo

Family: TypeAlias = Literal["abar", "ve", "ratio", "flow"]


class Scales(NamedTuple):
    """Scales of one level, float32 values: x = alpha * x0 + sigma * eps, and the network sees x / norm."""

    alpha: float
    sigma: float
    norm: float


def level_scales(family: Family, value: Any) -> Scales:
    """The scales of a grid value: a float32 number, of numpy or (bit-equal to diffusers) a 0-dimensional tensor.

    The two can differ in the last bit: torch's float32 square root on a CPU is not always correctly rounded.
    """
    norm = (value**2 + 1) ** 0.5
    if family == "abar":
        return Scales(float(value**0.5), float((1 - value) ** 0.5), 1.0)
    if family == "ve":
        return Scales(1.0, float(value), float(norm))
    if family == "ratio":
        return Scales(float(1 / norm), float(value * (1 / norm)), 1.0)
    return Scales(float(1 - value), float(value), 1.0)


@dataclass(frozen=True)
class Tables:
    """A schedule and all that a solver's step needs to know. Plain values: hashable, equal by value, no tensors.

    Attributes:
      schedule: what the tree sees.
      family: what the grid's values mean.
      grid: T + 1 nominal values.
      landing: T + 1 values on which a step from the level before lands.
      scales: T + 1 nominal scales.
      num_steps: steps of the full grid, also in a tail: some solver options depend on it.
      clip: bound on |x0|, or None.
      variance: DDPM's choice of variance, as in diffusers.
      second_order: the flavour of DPM-Solver++'s second order, "midpoint" or "heun".
      time_scaling: how fast the consistency function of lcm turns away from x with the timestep.
      first_order_last: whether DPM-Solver++ takes the step to level T at first order.
    """

    schedule: Schedule
    family: Family
    grid: tuple[float, ...]
    landing: tuple[float, ...]
    scales: tuple[Scales, ...]
    num_steps: int
    clip: float | None = None
    variance: str = "fixed_small"
    second_order: str = "midpoint"
    first_order_last: bool = True
    time_scaling: float = 10.0

    def end(self, level: int, to: int) -> float:
        """The grid value on which a step lands: the scheduler's own rule for neighbours, the grid for longer steps."""
        return self.landing[to] if to == level + 1 else self.grid[to]

    def tail(self, start: int) -> Tables:
        """The tables from level `start` on, renumbered: searching from an image. Raises UsageError if no step is left."""
        schedule = self.schedule.tail(start)
        return replace(
            self, schedule=schedule, grid=self.grid[start:], landing=self.landing[start:], scales=self.scales[start:]
        )


def _tables(
    kind: str,
    family: Family,
    grid: Sequence[Any],
    timesteps: Sequence[float],
    origin: Any,
    *,
    landing: Sequence[Any] | None = None,
    init: float = 1.0,
    **options: Any,
) -> Tables:
    """Tables with their schedule, from float32 numbers. `origin`, strict JSON, says what they were made from."""
    nominal = tuple(level_scales(family, value) for value in grid)
    landed = nominal if landing is None else tuple(level_scales(family, value) for value in landing)
    values = tuple(float(value) for value in grid)
    schedule = Schedule(
        kind=kind,
        key=hashlib.sha256(json.dumps([family, origin], sort_keys=True).encode()).hexdigest()[:16],
        timesteps=tuple(float(timestep) for timestep in timesteps),
        alpha=tuple(scales.alpha for scales in nominal),
        sigma=tuple(scales.sigma for scales in nominal),
        arrival=tuple((scales.alpha, scales.sigma) for scales in landed),
        init_noise_sigma=init,
    )
    ends = values if landing is None else tuple(float(value) for value in landing)
    return Tables(schedule, family, values, ends, nominal, num_steps=len(timesteps), **options)


# From a pipeline's scheduler -----------------------------------------------------------------------------------------

_SCHEDULERS = {
    "ddim": "DDIMScheduler",
    "ddpm": "DDPMScheduler",
    "lcm": "LCMScheduler",
    "euler": "EulerDiscreteScheduler",
    "euler-ancestral": "EulerAncestralDiscreteScheduler",
    "heun": "HeunDiscreteScheduler",
    "dpm++2m": "DPMSolverMultistepScheduler",
    "dpm++2m-sde": "DPMSolverMultistepScheduler",
    "flow-euler": "FlowMatchEulerDiscreteScheduler",
    "flow-ancestral": "FlowMatchEulerDiscreteScheduler",
    "flow-sde": "FlowMatchEulerDiscreteScheduler",
}


def scheduler_tables(
    scheduler_config: Mapping[str, Any],
    scheduler_class: str | None,
    solver: SolverInfo,
    num_steps: int,
    *,
    sigmas: Sequence[float] | None = None,
    mu: float | None = None,
) -> Tables:
    """The tables of a solver on a pipeline's scheduler config: same betas, prediction type, spacing and offset.

    Args:
      scheduler_config: `dict(pipe.scheduler.config)` or the contents of `scheduler_config.json`; never changed.
      scheduler_class: class name of the pipeline's own scheduler, where the config does not say.
      solver: any of `tsdiff.diffusion.solvers.SOLVERS`.
      num_steps: T.
      sigmas, mu: what the pipeline hands to `set_timesteps` of a flow scheduler.

    Raises:
      UsageError: if the number of steps does not fit the training grid, the solver is of another family than the
        scheduler, or the config asks for something that is not supported.
    """
    config = dict(scheduler_config)
    if scheduler_class is not None:
        config.setdefault("_class_name", scheduler_class)
    _check_family(config, solver)
    if num_steps < 1:
        raise UsageError(f"the number of steps is {num_steps} but must be at least 1")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "__array__ implementation", DeprecationWarning)  # numpy's, of diffusers' code
        scheduler = _scheduler(config, solver)
        trained = int(scheduler.config.num_train_timesteps)
        if num_steps > trained:
            raise UsageError(
                f"the number of steps is {num_steps} but the model was trained on {trained} timesteps; ask for at most {trained}"
            )
        distilled = int(scheduler.config.get("original_inference_steps", trained))
        if num_steps > distilled:
            raise UsageError(f"the number of steps is {num_steps} but solver {solver.name!r} has the {distilled} timesteps of a model's distillation; ask for at most {distilled}")
        if solver.kind == "flow":
            scheduler.set_timesteps(num_steps, sigmas=None if sigmas is None else list(sigmas), mu=mu)
        elif sigmas is not None or mu is not None:
            raise ValueError(f"sigmas and mu are for flow solvers, not for {solver.name}")
        else:
            scheduler.set_timesteps(num_steps)
    # Not a hash of the numbers: their last bits differ between machines, and a run must be found again on another one.
    options = {name: value for name, value in scheduler.config.items() if not name.startswith("_") and name != "algorithm_type"}
    origin = json.loads(json.dumps([type(scheduler).__name__, options, num_steps, sigmas, mu], default=list))
    tables = _abar_tables(scheduler, solver, origin) if solver.kind == "ddim" else _sigma_tables(scheduler, solver, origin)
    _check_grid(tables, num_steps, trained)
    return tables


def _check_family(config: Mapping[str, Any], solver: SolverInfo) -> None:
    own = str(config.get("_class_name", ""))
    is_flow = own.startswith("FlowMatch")
    if own and is_flow != (solver.kind == "flow"):
        advice = "choose a flow-* solver" if is_flow else "flow-* solvers are for flow models; choose ddim, euler or dpm++2m"
        raise UsageError(f"solver {solver.name!r} does not fit the scheduler {own}; {advice}.")
    if config.get("use_flow_sigmas") and solver.kind != "dpm":
        raise UsageError(
            f"solver {solver.name!r} does not fit a scheduler with use_flow_sigmas; choose dpm++2m or dpm++2m-sde."
        )


def _scheduler(config: dict[str, Any], solver: SolverInfo) -> Any:
    """The diffusers scheduler behind a solver, as `Scheduler.from_config(pipe.scheduler.config)` makes it."""
    prepare_torchvision()
    import diffusers

    cls = getattr(diffusers, _SCHEDULERS[solver.name])
    # from_config warns of every key that the class does not know; those are dropped here, its private ones are kept.
    known = set(inspect.signature(cls.__init__).parameters)
    config = {key: value for key, value in config.items() if key in known or key.startswith("_")}
    if solver.kind == "dpm":
        config["_use_default_values"] = [
            key for key in config.get("_use_default_values", []) if key not in ("algorithm_type", "solver_order")
        ]
        config |= {"algorithm_type": "sde-dpmsolver++" if solver.stochastic else "dpmsolver++", "solver_order": 2}
    scheduler = cls.from_config(config)
    _check_options(scheduler, solver)
    return scheduler


def _check_options(scheduler: Any, solver: SolverInfo) -> None:
    options = scheduler.config
    if options.get("thresholding"):
        raise UsageError(
            f"solver {solver.name!r}: dynamic thresholding (thresholding=True in the scheduler's config) is not supported"
        )
    if options.get("invert_sigmas"):
        raise UsageError(f"solver {solver.name!r}: invert_sigmas=True in the scheduler's config is not supported")
    variance = options.get("variance_type")
    refused = ("learned", "learned_range") if solver.kind == "dpm" else ("learned", "learned_range", "fixed_large_log")
    if variance in refused:
        raise UsageError(
            f"solver {solver.name!r}: variance_type={variance!r} of the scheduler's config is not supported; choose ddim"
        )


def _abar_tables(scheduler: Any, solver: SolverInfo, origin: Any) -> Tables:
    options = scheduler.config
    abar = scheduler.alphas_cumprod
    steps = [int(step) for step in scheduler.timesteps]
    if max(steps) >= len(abar):
        raise UsageError(
            f"{len(steps)} steps reach timestep {max(steps)} but the model was trained on {len(abar)}; ask for fewer steps"
        )
    nominal = [abar[step] for step in steps]
    if solver.name == "ddim":
        final = scheduler.final_alpha_cumprod
        stride = options.num_train_timesteps // scheduler.num_inference_steps
        grid = [*nominal, final]
        landing = [nominal[0], *(abar[step - stride] if step >= stride else final for step in steps)]
    else:
        grid = landing = [*nominal, abar.new_ones(())]
    if grid[0] <= 0.0 and options.prediction_type == "epsilon":
        raise UsageError(
            "the first level has zero SNR (rescale_betas_zero_snr), where an epsilon prediction says nothing of x0; use leading spacing"
        )
    clip = float(options.clip_sample_range) if options.clip_sample else None
    variance = str(options.get("variance_type") or "fixed_small")
    more = {"time_scaling": float(options.timestep_scaling)} if solver.name == "lcm" else {}
    return _tables(solver.kind, "abar", grid, steps, origin, landing=landing, clip=clip, variance=variance, **more)


def _sigma_tables(scheduler: Any, solver: SolverInfo, origin: Any) -> Tables:
    options = scheduler.config
    # Heun's tables hold every level but the first and the last twice: for its predictor and its corrector.
    timesteps = scheduler.timesteps[:: solver.stages].tolist()
    grid = list(scheduler.sigmas)
    if solver.stages == 2:
        grid = [*grid[:-1:2], grid[-1]]
    grid = grid[: len(timesteps) + 1]
    if solver.kind == "flow":
        return _tables(solver.kind, "flow", grid, timesteps, origin)
    if solver.kind == "euler":
        clip = float(options.clip_sample_range) if options.get("clip_sample") else None
        return _tables(solver.kind, "ve", grid, timesteps, origin, init=float(scheduler.init_noise_sigma), clip=clip)
    first = options.euler_at_final or options.final_sigmas_type == "zero" or (options.lower_order_final and len(timesteps) < 15)
    family: Family = "flow" if options.use_flow_sigmas else "ratio"
    return _tables(
        solver.kind, family, grid, timesteps, origin, second_order=str(options.solver_type), first_order_last=bool(first)
    )


def _check_grid(tables: Tables, num_steps: int, trained: int) -> None:
    if any(math.isnan(value) for value in tables.grid):
        raise UsageError(f"{num_steps} steps leave a level without a noise scale under this scheduler's config; ask for more steps")
    snrs = tables.schedule.log_snrs
    falls = any(later <= earlier for earlier, later in pairwise(snrs[:-1])) or snrs[-1] < snrs[-2]
    beyond = tables.family != "flow" and max(tables.schedule.timesteps) > trained - 1
    if falls or beyond:
        why = (
            f"reach timestep {max(tables.schedule.timesteps):g} of {trained}"
            if beyond
            else "put several levels on one timestep"
        )
        raise UsageError(f"{num_steps} steps {why} with this scheduler's spacing; ask for fewer steps")


# For analytic models -------------------------------------------------------------------------------------------------

_PLAIN_KINDS = {"vp": ("ddim", "dpm"), "ve": ("euler",), "flow": ("flow",)}
_SIGMA_MIN, _SIGMA_MAX, _RHO = 0.002, 80.0, 7.0


def plain_tables(process: Literal["vp", "ve", "flow"], solver: SolverInfo, num_steps: int) -> Tables:
    """Tables for an analytic model, of any number of steps; level T is exactly clean (alpha 1, sigma 0).

    * vp: the 1000 scaled-linear betas of Stable Diffusion (0.00085 to 0.012), log abar interpolated linearly at
      1000 * (1 - l / T) for level l, 1000 being the last timestep and 0 clean data.
    * ve: sigma from 80 to 0.002 by the rule of Karras et al. 2022 (arXiv 2206.00364) with rho 7, then 0.
    * flow: t from 1 to 0 in equal steps.

    The network is told sigma / alpha for vp and ve, and sees VP-scaled latents in both (`TableSampler.evaluate` divides
    VE latents by sqrt(sigma^2 + 1)), so alpha = 1 / sqrt(1 + ratio^2) in either; for flow it is told t and sees x.

    Raises:
      UsageError: if the solver's kind does not fit the process (kind "exact" fits all), or num_steps < 1.
    """
    if solver.kind not in (*_PLAIN_KINDS[process], "exact"):
        raise UsageError(
            f"solver {solver.name!r} does not fit the {process} process; it takes solvers of kind {' or '.join(_PLAIN_KINDS[process])}."
        )
    if num_steps < 1:
        raise UsageError(f"the number of steps is {num_steps} but must be at least 1")
    if process == "flow":
        return _plain(solver, "flow", np.linspace(1.0, 0.0, num_steps + 1))
    if process == "ve":
        ramp = np.linspace(_SIGMA_MAX ** (1 / _RHO), _SIGMA_MIN ** (1 / _RHO), num_steps)
        return _plain(solver, "ve", np.append(ramp**_RHO, 0.0), init=_SIGMA_MAX)
    log_alphas = np.log1p(-(np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2))
    times = 1000.0 * np.linspace(1.0, 0.0, num_steps + 1)
    log_abar = np.interp(times, np.arange(1001), np.concatenate([[0.0], np.cumsum(log_alphas)]))
    if solver.kind == "dpm":
        return _plain(solver, "ratio", np.sqrt(np.expm1(-log_abar)))
    return _plain(solver, "abar", np.exp(log_abar))


def _plain(solver: SolverInfo, family: Family, values: np.ndarray, *, init: float = 1.0) -> Tables:
    grid = list(values.astype(np.float32))
    told = [float(value) for value in grid[:-1]]
    if family == "abar":
        told = [scales.sigma / scales.alpha for scales in (level_scales(family, value) for value in grid[:-1])]
    return _tables(solver.kind, family, grid, told, ["plain", solver.kind, len(told)], init=init)
