"""The solvers by name: what is known about them without any tensor.

The arithmetic is in `tsdiff.diffusion.steps`; this module imports no torch, so that solvers can be listed and checked
at once.

| name | steps | source |
| --- | --- | --- |
| ddim(eta) | DDIM; eta 1 has the DDPM posterior variance | Song et al. 2020, arXiv 2010.02502 |
| ddpm | ancestral sampling | Ho et al. 2020, arXiv 2006.11239 |
| euler, heun | first and second order in VE scaling | Karras et al. 2022, arXiv 2206.00364 |
| euler-ancestral | Euler to a lower sigma, then noise | Crowson, k-diffusion |
| lcm | to the clean estimate, then fresh noise; for distilled models | Luo et al. 2023, arXiv 2310.04378 |
| dpm++2m, dpm++2m-sde | DPM-Solver++ multistep and its SDE variant | Lu et al. 2022, arXiv 2211.01095 |
| flow-euler | Euler on the velocity | Liu et al. 2022, arXiv 2209.03003 |
| flow-ancestral(eta) | posterior variance on the linear path | as DDIM with eta |
| flow-sde(eta) | Euler-Maruyama of the SDE with the flow's marginals, eta is its scale a | Liu et al. 2025, arXiv 2505.05470 |
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import replace

from tsdiff.treesearch.errors import UsageError, unknown_name
from tsdiff.treesearch.schedule import SolverInfo

SOLVERS: dict[str, SolverInfo] = {
    info.name: info
    for info in (
        SolverInfo("ddim", "ddim", ode="ddim"),
        SolverInfo("ddpm", "ddim", stochastic=True, ode="ddim"),
        SolverInfo("lcm", "ddim", stochastic=True, ode="ddim"),
        SolverInfo("euler", "euler", ode="euler"),
        SolverInfo("euler-ancestral", "euler", stochastic=True, ode="euler"),
        SolverInfo("heun", "euler", stages=2, ode="heun"),
        SolverInfo("dpm++2m", "dpm", ode="dpm++2m"),
        SolverInfo("dpm++2m-sde", "dpm", stochastic=True, ode="dpm++2m"),
        SolverInfo("flow-euler", "flow", ode="flow-euler"),
        SolverInfo("flow-ancestral", "flow", eta=1.0, stochastic=True, ode="flow-euler"),
        SolverInfo("flow-sde", "flow", eta=0.7, stochastic=True, ode="flow-euler"),
    )
}
"""Every solver with its default eta."""

# Least and greatest eta. A flow solver without noise is flow-euler, by that name; above sqrt(2) one step of flow-sde
# can take out more noise than there is.
_ETA: dict[str, tuple[float, float]] = {"ddim": (0.0, 1.0), "flow-ancestral": (1e-3, 1.0), "flow-sde": (1e-3, 1.4)}

_CALL = re.compile(r"^\s*(?P<name>[^()\s]+)\s*(?:\(\s*(?:eta\s*=\s*)?(?P<eta>[^()=\s]+)\s*\)\s*)?$")


def solver_info(
    name: str | None, eta: float | None, allowed: tuple[str, ...], solvers: Mapping[str, SolverInfo] = SOLVERS
) -> SolverInfo:
    """A solver by name.

    Args:
      name: e.g. "ddim" or "ddim(eta=0.5)"; None takes the first of `allowed`.
      eta: share of noise, where the name does not give it; None takes the solver's default.
      allowed: names the model supports, its default first.
      solvers: the solvers there are; a model with one of its own passes `SOLVERS | {"its-name": ...}`.

    Raises:
      UsageError: for an unknown or unsupported name, an eta out of range, or an eta for a solver that takes none.

    >>> solver_info("ddim(eta=0.5)", None, ("ddpm", "ddim")).stochastic
    True
    """
    base, eta = _parse(allowed[0] if name is None else name, eta)
    if base not in allowed:
        if base in solvers:
            raise UsageError(f"solver {base!r} does not fit this model; it takes: {', '.join(allowed)}.")
        raise unknown_name("solver", base, allowed)
    info = solvers[base]
    if eta is None:
        return info
    if base not in _ETA:
        takers = [taker for taker in allowed if taker in _ETA]
        advice = f"choose a solver that takes it ({', '.join(takers)}) or leave it out" if takers else "leave it out"
        raise UsageError(f"solver {base!r} takes no eta, but eta is {eta:g}; {advice}.")
    low, high = _ETA[base]
    if not low <= eta <= high:
        advice = "" if eta != 0.0 else "; without noise this solver is flow-euler"
        raise UsageError(f"eta is {eta:g} but must lie in [{low:g}, {high:g}] for solver {base!r}{advice}.")
    return replace(info, eta=eta, stochastic=eta > 0.0)


def _parse(text: str, eta: float | None) -> tuple[str, float | None]:
    match = _CALL.match(text)
    if match is None:
        raise UsageError(f"cannot read solver {text!r}; write a name, or a name and eta like 'ddim(eta=0.5)'.")
    if match["eta"] is None:
        return match["name"], eta
    try:
        own = float(match["eta"])
    except ValueError:
        own = math.nan
    if not math.isfinite(own):
        raise UsageError(f"cannot read the eta of solver {text!r}; write a number, like 'ddim(eta=0.5)'.")
    if eta is not None and eta != own:
        raise UsageError(f"solver {text!r} and eta {eta:g} disagree; give eta once.")
    return match["name"], own
