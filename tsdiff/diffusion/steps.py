"""One step of every solver, as a pure function of a latent, two levels, a raw output, a history and noise.

A step is a handful of coefficients that depend on the levels alone, and elementwise arithmetic on the latents.
Coefficients are computed once for each pair of levels, as float32 scalars in the order of operations of diffusers'
schedulers, so that a step is bit-equal to theirs. They are never computed as vectors over a batch: vectorised
exponentials differ in the last bit with a row's position. What touches the latents is addition, subtraction,
multiplication, division and selection only; a row's result therefore depends on nothing but that row.

Notation: x latent, m raw output, x0 clean estimate, e noise estimate, z fresh noise. A column is a float32 tensor
(B, 1, ..., 1) with a coefficient of each row.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tsdiff.diffusion.tables import Tables
from tsdiff.treesearch.errors import UsageError
from tsdiff.treesearch.schedule import SolverInfo


@dataclass(frozen=True)
class Batch:
    """The rows of one step.

    Attributes:
      x, output, x0: latents, raw outputs and clean estimates, (B, ...).
      prediction: what the raw output is: "epsilon", "v_prediction", "sample" or "flow".
      alpha, sigma: columns of the current level.
      columns: the solver's coefficients.
      noise: unit noise (B, ...), or None.
      previous: the clean estimate of the step before (B, ...), or None where no row has one.
    """

    x: Tensor
    output: Tensor
    x0: Tensor
    prediction: str
    alpha: Tensor
    sigma: Tensor
    columns: Sequence[Tensor]
    noise: Tensor | None
    previous: Tensor | None = None


@dataclass(frozen=True)
class Step:
    """A solver's arithmetic.

    Attributes:
      coefficients: (tables, solver, level, to, level of the history or -1) -> float32 values.
      apply: the latents that they lead to.
    """

    coefficients: Callable[[Tables, SolverInfo, int, int, int], tuple[float, ...]]
    apply: Callable[[Batch], Tensor]


# Predictions ---------------------------------------------------------------------------------------------------------


def clean_estimate(
    prediction: str, x: Tensor, output: Tensor, alpha: Tensor, sigma: Tensor, norm: Tensor, *, ve: bool
) -> Tensor:
    """E[x0 | x] from a raw output, all (B, ...), with columns of the level's scales."""
    if prediction == "sample":
        return output
    if prediction == "flow":
        return x - sigma * output
    if prediction == "epsilon":
        return (x - sigma * output) / alpha
    if ve:  # the network saw x / norm, and v belongs to that
        return output * (-sigma / norm) + x / (sigma * sigma + 1.0)
    return alpha * x - sigma * output


def noise_estimate(batch: Batch) -> Tensor:
    """E[eps | x], from the output and not from a clipped x0."""
    if batch.prediction == "epsilon":
        return batch.output
    if batch.prediction == "v_prediction":
        return batch.alpha * batch.output + batch.sigma * batch.x
    if batch.prediction == "flow":
        return batch.x + batch.alpha * batch.output
    return (batch.x - batch.alpha * batch.output) / batch.sigma


def _velocity(batch: Batch) -> Tensor:
    return batch.output if batch.prediction == "flow" else (batch.x - batch.x0) / batch.sigma


# Coefficients --------------------------------------------------------------------------------------------------------


def _scalar(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float32)


def _root(value: Tensor) -> Tensor:
    """Square root; rounding can leave a variance just below zero."""
    return value.clamp(min=0.0) ** 0.5


def _floats(*values: Tensor | float) -> tuple[float, ...]:
    return tuple(float(value) for value in values)


def _ddim(tables: Tables, solver: SolverInfo, level: int, to: int, history: int) -> tuple[float, ...]:
    abar, end = _scalar(tables.grid[level]), _scalar(tables.end(level, to))
    variance = (1 - end) / (1 - abar) * (1 - abar / end)
    std = solver.eta * _root(variance)
    return _floats(end**0.5, _root(1 - end - std**2), std)


def _ddpm(tables: Tables, solver: SolverInfo, level: int, to: int, history: int) -> tuple[float, ...]:
    abar, end = _scalar(tables.grid[level]), _scalar(tables.end(level, to))
    ratio = abar / end
    beta = 1 - ratio
    of_x0 = end**0.5 * beta / (1 - abar)
    of_x = ratio**0.5 * (1 - end) / (1 - abar)
    if tables.schedule.timesteps[level] <= 0:
        return _floats(of_x0, of_x, 0.0)
    variance = ((1 - end) / (1 - abar) * beta).clamp(min=1e-20)  # diffusers' floor: a trace of noise even on the last step
    if tables.variance == "fixed_small":
        std = variance**0.5
    elif tables.variance == "fixed_small_log":
        std = torch.exp(0.5 * torch.log(variance))
    elif tables.variance == "fixed_large":
        std = _root(beta)
    else:
        raise UsageError(f"solver 'ddpm': variance_type={tables.variance!r} is not supported; choose ddim")
    return _floats(of_x0, of_x, std)


def _lcm(tables: Tables, solver: SolverInfo, level: int, to: int, history: int) -> tuple[float, ...]:
    """Weights of x0 and x in the consistency function, which is x itself at time 0 (data scale 0.5); then alpha and z's."""
    end = _scalar(tables.end(level, to))
    time = _scalar(tables.schedule.timesteps[level]) * tables.time_scaling
    return _floats(time / (time**2 + 0.25) ** 0.5, 0.25 / (time**2 + 0.25), end**0.5, (1 - end) ** 0.5)


def _euler(tables: Tables, solver: SolverInfo, level: int, to: int, history: int) -> tuple[float, ...]:
    return _floats(_scalar(tables.end(level, to)) - _scalar(tables.grid[level]))


def _euler_ancestral(tables: Tables, solver: SolverInfo, level: int, to: int, history: int) -> tuple[float, ...]:
    start, end = _scalar(tables.grid[level]), _scalar(tables.end(level, to))
    up = _root(end**2 * (start**2 - end**2) / start**2)
    down = _root(end**2 - up**2)
    return _floats(down - start, up)


def _dpm(tables: Tables, solver: SolverInfo, level: int, to: int, history: int) -> tuple[float, ...]:
    """Weights of x, x0, the divided difference, its scale 1 / r, and z."""

    def half_log_snr(at: int) -> tuple[Tensor, Tensor, Tensor]:
        alpha, sigma = _scalar(tables.scales[at].alpha), _scalar(tables.scales[at].sigma)
        return alpha, sigma, torch.log(alpha) - torch.log(sigma)  # +inf at sigma 0: the exponentials below are then 0

    _, sigma, now = half_log_snr(level)
    alpha_end, sigma_end, end = half_log_snr(to)
    h = end - now
    if solver.stochastic:
        of_x = sigma_end / sigma * torch.exp(-h)
        of_x0 = alpha_end * (1 - torch.exp(-2.0 * h))
        std = sigma_end * torch.sqrt(1.0 - torch.exp(-2.0 * h))
    else:
        of_x = sigma_end / sigma
        of_x0 = -(alpha_end * (torch.exp(-h) - 1.0))
        std = _scalar(0.0)
    first_order = history < 0 or (to == tables.schedule.last and tables.first_order_last)
    before = now if first_order else half_log_snr(history)[2]
    if first_order or before == now:
        return _floats(of_x, of_x0, 0.0, 0.0, std)
    inverse_ratio = 1.0 / ((now - before) / h)
    if tables.second_order == "midpoint":
        of_difference = 0.5 * of_x0
    elif solver.stochastic:
        of_difference = alpha_end * ((1.0 - torch.exp(-2.0 * h)) / (-2.0 * h) + 1.0)
    else:
        of_difference = alpha_end * ((torch.exp(-h) - 1.0) / h + 1.0)
    return _floats(of_x, of_x0, of_difference, inverse_ratio, std)


def _flow_ancestral(tables: Tables, solver: SolverInfo, level: int, to: int, history: int) -> tuple[float, ...]:
    """tau = eta s sqrt(1 - SNR_t / SNR_s), the posterior's standard deviation; there is no twin in diffusers, so float64."""
    t, s = tables.grid[level], tables.end(level, to)
    ratio = s * (1.0 - t) / (t * (1.0 - s)) if s < t else 1.0
    tau = solver.eta * s * math.sqrt(max(0.0, 1.0 - ratio**2))
    return 1.0 - s, math.sqrt(max(0.0, s**2 - tau**2)), tau


def _flow_sde(tables: Tables, solver: SolverInfo, level: int, to: int, history: int) -> tuple[float, ...]:
    """Weights of the velocity, the noise estimate and z.

    g(t) = a sqrt(t / (1 - t)) has a pole at t = 1: there, and on steps over several levels, which may be long beside the
    distance to it, g is taken where the step ends. The step to level T is the plain Euler step: g is 0.
    """
    t, s = tables.grid[level], tables.end(level, to)
    step = t - s
    if to == tables.schedule.last:
        return -step, 0.0, 0.0
    at = s if t >= 1.0 or to > level + 1 else t
    g = solver.eta * math.sqrt(at / (1.0 - at))
    return -step, -step * g**2 / (2.0 * t), g * math.sqrt(step)


# Steps ---------------------------------------------------------------------------------------------------------------


def _with_noise(mean: Tensor, std: Tensor, noise: Tensor | None) -> Tensor:
    return mean if noise is None else mean + std * noise


def _to_estimates(batch: Batch) -> Tensor:
    of_x0, of_noise, std = batch.columns
    return _with_noise(of_x0 * batch.x0 + of_noise * noise_estimate(batch), std, batch.noise)


def _to_posterior(batch: Batch) -> Tensor:
    of_x0, of_x, std = batch.columns
    return _with_noise(of_x0 * batch.x0 + of_x * batch.x, std, batch.noise)


def _to_consistency(batch: Batch) -> Tensor:
    of_x0, of_x, alpha, std = batch.columns
    return _with_noise(alpha * (of_x0 * batch.x0 + of_x * batch.x), std, batch.noise)


def _along_derivative(batch: Batch) -> Tensor:
    moved = batch.x + derivative(batch.x, batch.x0, batch.sigma) * batch.columns[0]
    return moved if batch.noise is None else moved + batch.noise * batch.columns[1]


def _multistep(batch: Batch) -> Tensor:
    of_x, of_x0, of_difference, inverse_ratio, std = batch.columns
    first = of_x * batch.x + of_x0 * batch.x0
    if batch.previous is None:
        return _with_noise(first, std, batch.noise)
    second = first + of_difference * (inverse_ratio * (batch.x0 - batch.previous))
    return _with_noise(torch.where(inverse_ratio > 0.0, second, first), std, batch.noise)


def _along_velocity(batch: Batch) -> Tensor:
    moved = batch.x + batch.columns[0] * _velocity(batch)
    if batch.noise is None:
        return moved
    return moved + batch.columns[1] * noise_estimate(batch) + batch.columns[2] * batch.noise


def derivative(x: Tensor, x0: Tensor, sigma: Tensor) -> Tensor:
    """dx / dsigma in VE scaling."""
    return (x - x0) / sigma


STEPS: dict[str, Step] = {
    "ddim": Step(_ddim, _to_estimates),
    "ddpm": Step(_ddpm, _to_posterior),
    "lcm": Step(_lcm, _to_consistency),
    "euler": Step(_euler, _along_derivative),
    "euler-ancestral": Step(_euler_ancestral, _along_derivative),
    "heun": Step(_euler, _along_derivative),  # its predictor; the corrector is in the sampler
    "dpm++2m": Step(_dpm, _multistep),
    "dpm++2m-sde": Step(_dpm, _multistep),
    "flow-euler": Step(_euler, _along_velocity),
    "flow-ancestral": Step(_flow_ancestral, _to_estimates),
    "flow-sde": Step(_flow_sde, _along_velocity),
}
"""The arithmetic of every solver of `tsdiff.diffusion.solvers.SOLVERS`."""


def forward_kernel(source: tuple[float, float], target: tuple[float, float]) -> tuple[float, float]:
    """(ratio, std) of x_t = ratio * x_s + std * z from scales (alpha, sigma) up to noisier ones.

    Exact for the process: two hops have the mean and variance of one. A variance that rounding leaves below zero is 0.
    """
    ratio = target[0] / source[0]
    return ratio, math.sqrt(max(0.0, target[1] ** 2 - (ratio * source[1]) ** 2))
