"""Levels: the noise scales that a tree's nodes live on, and what a policy may know about the solver.

Level 0 is pure noise, level T (`schedule.last`) the clean latent. A schedule is plain numbers: it belongs to one
(scheduler config, solver, number of steps, size), and the tensors behind it live in `tsdiff.diffusion`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property

from tsdiff.treesearch.errors import UsageError


@dataclass(frozen=True)
class SolverInfo:
    """What is known about a solver without any tensor.

    Attributes:
      name: "ddim", "euler-ancestral", ...
      kind: solvers of one kind share a schedule: "ddim", "euler", "dpm", "flow" or "exact".
      eta: share of the full posterior noise added at each step, 0 (none) to 1; for "flow-sde" the scale a.
      stochastic: whether a step draws noise, so that repeated steps from one node differ.
      stages: network evaluations a step (Heun 2; the last is omitted when the step ends at sigma 0).
      num_noise: noise tensors a step draws.
      ode: name of the deterministic solver of the same kind, used for look-ahead.
    """

    name: str
    kind: str
    eta: float = 0.0
    stochastic: bool = False
    stages: int = 1
    num_noise: int = 1
    ode: str = ""

    def __str__(self) -> str:
        return f"{self.name}(eta={self.eta:g})" if self.eta else self.name


@dataclass(frozen=True)
class Schedule:
    """Noise scales of the levels 0 (pure noise) .. T (clean), in the coordinates of the solver: VP, VE or flow.

    x_l = alpha[l] * x0 + sigma[l] * eps.

    Attributes:
      kind: solvers of this kind can run on it ("ddim", "euler", "dpm", "flow", "exact").
      key: names the tables behind it; equal keys mean equal tables.
      timesteps: what the network is told, for the levels 0 .. T-1.
      alpha, sigma: nominal scales, T + 1 entries each.
      arrival: (alpha, sigma) where a denoise step to the level really lands. It differs from the nominal scales where
        the scheduler's own rule for the previous timestep leaves the grid (DDIM with linspace spacing).
      init_noise_sigma: factor from unit noise to the latent of level 0.
    """

    kind: str
    key: str
    timesteps: tuple[float, ...]
    alpha: tuple[float, ...]
    sigma: tuple[float, ...]
    arrival: tuple[tuple[float, float], ...]
    init_noise_sigma: float

    def __post_init__(self) -> None:
        steps = len(self.timesteps)
        sizes = {len(self.alpha), len(self.sigma), len(self.arrival)}
        if steps < 1 or sizes != {steps + 1}:
            raise ValueError(f"a schedule of {steps} timesteps needs {steps + 1} levels in every table, not {sorted(sizes)}")

    @property
    def last(self) -> int:
        """T, the clean level."""
        return len(self.timesteps)

    def log_snr(self, level: int) -> float:
        """log(alpha^2 / sigma^2) of a level: comparable across VP, VE and flow; +inf where sigma is 0, -inf where alpha is 0."""
        alpha, sigma = self.alpha[level], self.sigma[level]
        if alpha <= 0.0:
            return -math.inf
        return math.inf if sigma <= 0.0 else 2.0 * (math.log(alpha) - math.log(sigma))

    def level_at(self, log_snr: float) -> int:
        """The first level at least as clean as `log_snr` (T if none is)."""
        return next((level for level in range(self.last) if self.log_snr(level) >= log_snr), self.last)

    def span(self, start: int, to: int, num_steps: int | None = None) -> tuple[int, ...]:
        """The levels that a denoise from `start` to `to` visits, both ends included.

        Args:
          start, to: levels, 0 <= start <= to <= T.
          num_steps: at most this many steps, spread evenly over the levels between; None takes every level.

        Raises:
          UsageError: if `to` lies before `start` or outside the schedule, or num_steps < 1.
        """
        if not 0 <= start <= to <= self.last:
            raise UsageError(f"cannot denoise from level {start} to level {to}; levels run from 0 to {self.last} and denoising goes up")
        if num_steps is not None and num_steps < 1:
            raise UsageError(f"num_steps is {num_steps} but must be at least 1")
        distance = to - start
        steps = distance if num_steps is None else min(num_steps, distance)
        if steps == 0:
            return (start,)
        # Integers only: round half up of i * distance / steps, strictly increasing because distance >= steps.
        return tuple(start + (2 * i * distance + steps) // (2 * steps) for i in range(steps + 1))

    def span_cost(self, levels: tuple[int, ...], stages: int = 1) -> int:
        """Network evaluations of a denoise through `levels`, the first node's own prediction included."""
        return sum(self.step_cost(level, stages) for level in levels[1:])

    def step_cost(self, to: int, stages: int = 1) -> int:
        """Network evaluations of one step that lands on level `to`; the corrector is omitted at sigma 0."""
        return 1 if self.sigma[to] <= 0.0 else stages

    def tail(self, start: int) -> Schedule:
        """The schedule from level `start` on, renumbered so that `start` becomes level 0 (searching from an image)."""
        if not 0 <= start < self.last:
            raise UsageError(f"cannot start at level {start} of {self.last}; use a strength that leaves at least one step")
        return replace(
            self,
            key=f"{self.key}+{start}" if start else self.key,
            timesteps=self.timesteps[start:],
            alpha=self.alpha[start:],
            sigma=self.sigma[start:],
            arrival=self.arrival[start:],
        )

    @cached_property
    def log_snrs(self) -> tuple[float, ...]:
        """`log_snr` of every level."""
        return tuple(self.log_snr(level) for level in range(self.last + 1))
