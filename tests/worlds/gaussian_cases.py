"""What the tests of the gaussian world share: random mixtures and levels, and one-dimensional integration."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import torch
from hypothesis import strategies as st
from torch import Tensor

from tsdiff.worlds.gaussian.mixture import Mixture

GRID = torch.linspace(-25.0, 25.0, 40001, dtype=torch.float64)


def integrate(values: Tensor, grid: Tensor = GRID) -> Tensor:
    """Integral over the last axis. On a fine even grid the trapezoid is exact to rounding for smooth decaying functions."""
    return torch.trapezoid(values, grid, dim=-1)


def normal(x: Tensor, mean: Tensor | float, std: float) -> Tensor:
    """Density of N(mean, std^2)."""
    return (-0.5 * ((x - mean) / std) ** 2).exp() / (std * math.sqrt(2.0 * math.pi))


def on_grid(function: Callable[[Tensor], Tensor]) -> Tensor:
    """A function of points (B, 1) on the grid."""
    return function(GRID.unsqueeze(-1))


@st.composite
def mixtures(draw: st.DrawFn, dim: int = 1) -> Mixture:
    """Up to three components, none too narrow for the grid."""
    count = draw(st.integers(1, 3))
    weights = draw(st.lists(st.floats(0.05, 1.0), min_size=count, max_size=count))
    coordinate = st.floats(-3.0, 3.0)
    means = draw(st.lists(st.tuples(*[coordinate] * dim), min_size=count, max_size=count))
    stds = draw(st.lists(st.floats(0.2, 1.5), min_size=count, max_size=count))
    return Mixture(weights, means, stds)


def scales(process: str, noise: float) -> tuple[float, float]:
    """(alpha, sigma) of a process at a noise level in [0, 1]; VE runs up to sigma 3."""
    if process == "vp":
        return math.cos(noise * math.pi / 2.0), math.sin(noise * math.pi / 2.0)
    return (1.0, 3.0 * noise) if process == "ve" else (1.0 - noise, noise)


PROCESSES = st.sampled_from(["vp", "ve", "flow"])


@st.composite
def level_chains(draw: st.DrawFn, count: int) -> list[tuple[float, float]]:
    """`count` levels of one process, from noisy to clean and well apart."""
    process = draw(PROCESSES)
    noises = draw(st.lists(st.floats(0.08, 0.95), min_size=count, max_size=count).filter(_apart))
    return [scales(process, noise) for noise in sorted(noises, reverse=True)]


def _apart(noises: list[float]) -> bool:
    ordered = sorted(noises)
    return all(high - low > 0.08 for low, high in itertools.pairwise(ordered))
