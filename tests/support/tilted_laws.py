"""What a sampler that starts from pure noise and follows the exact transitions must end in: integrals over its first latent.

The laws tests of SMC and SVDD search a mixture in one dimension with the solver `exact`, for a quadratic reward whose
point lies near the rarer mode. A VP schedule ends in almost pure noise only, while searches begin in pure noise, so the
law of plain samples differs slightly from the mixture: everything is integrated over the true first latent.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import tsdiff
from tsdiff.treesearch.protocols import Candidates, Condition, Scores
from tsdiff.worlds.gaussian.gaussians import Gaussians, Quadratic
from tsdiff.worlds.gaussian.mixture import Mixture
from tsdiff.worlds.gaussian.model import GaussianModel
from tsdiff.worlds.gaussian.verifiers import SoftValue, Target

RIGHT = 0.4  # the saddle between the modes
POINT, RHO, LAMBDA = 1.2, 1.0, 1.0
TWO = Mixture([0.75, 0.25], [(-1.0,), (1.5,)], [0.5, 0.3])
GRID = torch.linspace(-9.0, 9.0, 1001, dtype=torch.float64).unsqueeze(1)
REWARD = Quadratic((POINT,), RHO)

VALUE = SoftValue(mixture=TWO, rho=RHO, temperature=LAMBDA)  # exact at every level
ESTIMATE = Target(rho=RHO)  # of the clean estimate: biased before the end


class Place:
    """A second verifier that writes down where finished samples lie."""

    name = "place"
    needs = frozenset({"x0"})
    scope = "row"
    latency = "immediate"
    judges = "any"
    differentiable = False

    def prepare(self, device: str) -> None:
        """Nothing to load."""

    def check(self, condition: Condition) -> None:
        """Any condition will do."""

    def score(self, candidates: Candidates) -> Scores:
        """The coordinate."""
        return Scores(candidates.x0[:, 0])


def search(
    policy: Any, process: str, seeds: Sequence[int], *, steps: int, verifier: Any = VALUE, mixture: Mixture = TWO, point: float = POINT
) -> list[Any]:
    """Searches of one policy under many seeds, side by side."""
    model = GaussianModel(mixture, process)  # type: ignore[arg-type]
    results = tsdiff.search(
        model, f"near ({point})", policy=policy, verifier=[verifier, Place()], seed=list(seeds), steps=steps, solver="exact", baseline=False
    )
    assert not results.failures
    return list(results)


@dataclass(frozen=True)
class Law:
    """A law of finished samples: E[x], P(x > RIGHT), and its normaliser Z where it is a tilted one."""

    mean: float
    right: float
    normaliser: float = 1.0


def summary(laws: Gaussians, weights: Tensor) -> Law:
    """The law of a point whose mixture is row b of `laws` with probability proportional to `weights[b]`."""
    share = weights / weights.sum()
    beyond = (laws.log_weights.exp() * torch.special.ndtr((laws.means[..., 0] - RIGHT) / laws.variances.sqrt())).sum(1)
    return Law(float(share @ laws.mean()[:, 0]), float(share @ beyond), float(weights.sum()))


def scales(process: str, steps: int, level: int) -> tuple[float, float]:
    """Signal and noise of a level."""
    model = GaussianModel(TWO, process)  # type: ignore[arg-type]
    schedule = model.schedule(model.solver("exact"), steps, None)
    return schedule.alpha[level], schedule.sigma[level]


def first(process: str, steps: int) -> tuple[tuple[float, float], Tensor]:
    """The scales of level 0, and the probabilities of the first latent on the grid."""
    density = torch.exp(-0.5 * GRID[:, 0] ** 2)
    return scales(process, steps, 0), density / density.sum()


def tilted(process: str, steps: int, strength: float = LAMBDA) -> Law:
    """Plain samples weighted by exp(strength * reward)."""
    start, probability = first(process, steps)
    posterior = TWO.posterior(GRID, *start)
    return summary(posterior.tilted(REWARD, strength), probability * posterior.log_moment(REWARD, strength).exp())


def tilted_but_for_the_last_step(process: str, steps: int, strength: float = LAMBDA, mixture: Mixture = TWO, reward: Quadratic = REWARD) -> Law:
    """The latent of the last but one level weighted by its exact value, and one plain step from there."""
    start, probability = first(process, steps)
    level = scales(process, steps, steps - 1)
    moves = mixture.transition(GRID, *start, *level)
    # [first latent, component, place]: the density of every place of the grid, from every first latent
    spread = moves.variances.unsqueeze(-1)
    density = moves.log_weights.exp().unsqueeze(-1) * torch.exp(-0.5 * (GRID[:, 0] - moves.means) ** 2 / spread) / spread.sqrt()
    reached = probability @ density.sum(1)
    reached /= reached.sum()
    posterior = mixture.posterior(GRID, *level)
    return summary(posterior, reached * posterior.log_moment(reward, strength).exp())
