"""Batches of isotropic Gaussian mixtures, and rewards whose exponential has a closed-form mean under them.

Everything that is known exactly about the `gaussian` world is such a mixture: the data law, its noised marginals, the
posterior of the clean point, the transition to a cleaner level. Shapes: B = rows, K = components, d = dimensions.

Sums run in index order (`ordered_sum`), so that a row's bits never depend on the rows beside it.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from torch import Tensor


def ordered_sum(terms: Tensor, dim: int) -> Tensor:
    """Sum along an axis in index order, whatever the shape of the rest (a library's reduction may regroup it)."""
    return reduce(operator.add, terms.unbind(dim))


def log_sum_exp(terms: Tensor) -> Tensor:
    """log of the sum of exponentials along the last axis; entries of -inf count as nothing, unless all are."""
    peak = terms.detach().amax(-1)
    return peak + ordered_sum((terms - peak.unsqueeze(-1)).exp(), -1).log()


class Reward(Protocol):
    """A reward r(x0) with E[exp(scale * r(x0))] known for x0 ~ N(mean, variance I)."""

    def __call__(self, x0: Tensor) -> Tensor:
        """r of points (..., d) -> (...)."""
        ...

    def expectation(self, means: Tensor, variances: Tensor) -> Tensor:
        """E[r] for means (..., d) and variances (...) -> (...)."""
        ...

    def log_moment(self, scale: float, means: Tensor, variances: Tensor) -> Tensor:
        """log E[exp(scale * r)] -> (...)."""
        ...

    def tilt(self, scale: float, means: Tensor, variances: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and variance of the Gaussian proportional to N(x0; mean, variance I) * exp(scale * r(x0))."""
        ...


@dataclass(frozen=True)
class Linear:
    """r(x0) = direction . x0, `direction` of d numbers."""

    direction: tuple[float, ...]

    def _direction(self, like: Tensor) -> Tensor:
        return like.new_tensor(self.direction)

    def __call__(self, x0: Tensor) -> Tensor:
        return ordered_sum(x0 * self._direction(x0), -1)

    def expectation(self, means: Tensor, variances: Tensor) -> Tensor:
        return self(means)

    def log_moment(self, scale: float, means: Tensor, variances: Tensor) -> Tensor:
        return scale * self(means) + 0.5 * scale**2 * variances * math.fsum(a * a for a in self.direction)

    def tilt(self, scale: float, means: Tensor, variances: Tensor) -> tuple[Tensor, Tensor]:
        return means + scale * variances.unsqueeze(-1) * self._direction(means), variances


@dataclass(frozen=True, eq=False)
class Quadratic:
    """r(x0) = -|x0 - target|^2 / (2 width^2).

    Attributes:
      target: d numbers; or a tensor that broadcasts against the points, e.g. (B, d) for points (B, d).
      width: the distance (rho in the formulas) at which the reward is -1/2.
    """

    target: Sequence[float] | Tensor
    width: float

    def _target(self, like: Tensor) -> Tensor:
        return like.new_tensor(self.target) if isinstance(self.target, Sequence) else self.target.to(like)

    def _squared_distance(self, x0: Tensor) -> Tensor:
        return ordered_sum((x0 - self._target(x0)) ** 2, -1)

    def __call__(self, x0: Tensor) -> Tensor:
        return -self._squared_distance(x0) / (2.0 * self.width**2)

    def expectation(self, means: Tensor, variances: Tensor) -> Tensor:
        return self(means) - means.shape[-1] * variances / (2.0 * self.width**2)

    def log_moment(self, scale: float, means: Tensor, variances: Tensor) -> Tensor:
        growth = 1.0 + scale / self.width**2 * variances
        return scale * self(means) / growth - 0.5 * means.shape[-1] * growth.log()

    def tilt(self, scale: float, means: Tensor, variances: Tensor) -> tuple[Tensor, Tensor]:
        pull = scale / self.width**2 * variances
        growth = 1.0 + pull
        return (means + pull.unsqueeze(-1) * self._target(means)) / growth.unsqueeze(-1), variances / growth


@dataclass(frozen=True, eq=False)
class Gaussians:
    """One mixture sum_k w_k N(mean_k, variance_k I) per row.

    Attributes:
      log_weights: (B, K), normalised; -inf for components that a row does not have.
      means: (B, K, d).
      variances: (B, K), positive.
    """

    log_weights: Tensor
    means: Tensor
    variances: Tensor

    @staticmethod
    def normalized(log_weights: Tensor, means: Tensor, variances: Tensor) -> Gaussians:
        """A mixture of components with any log-weights, which are made to add up to 1."""
        return Gaussians(log_weights - log_sum_exp(log_weights).unsqueeze(-1), means, variances)

    def average(self, values: Tensor) -> Tensor:
        """Weighted sum over components of values (B, K, d) -> (B, d)."""
        return ordered_sum(self.log_weights.exp().unsqueeze(-1) * values, 1)

    def mean(self) -> Tensor:
        """(B, d)."""
        return self.average(self.means)

    def joint_log_density(self, points: Tensor) -> Tensor:
        """log w_k + log N(points; mean_k, variance_k I) of points (B, d) -> (B, K)."""
        squared = ordered_sum((points.unsqueeze(1) - self.means) ** 2, -1)
        log_normal = -0.5 * (squared / self.variances + self.means.shape[-1] * (2.0 * math.pi * self.variances).log())
        return self.log_weights + log_normal

    def log_density(self, points: Tensor) -> Tensor:
        """log density of points (B, d) -> (B,)."""
        return log_sum_exp(self.joint_log_density(points))

    def expectation(self, reward: Reward) -> Tensor:
        """E[r] -> (B,)."""
        return ordered_sum(self.log_weights.exp() * reward.expectation(self.means, self.variances), -1)

    def log_moment(self, reward: Reward, scale: float) -> Tensor:
        """log E[exp(scale * r)] -> (B,)."""
        return log_sum_exp(self.log_weights + reward.log_moment(scale, self.means, self.variances))

    def tilted(self, reward: Reward, scale: float) -> Gaussians:
        """The mixtures proportional to density * exp(scale * r)."""
        means, variances = reward.tilt(scale, self.means, self.variances)
        return Gaussians.normalized(self.log_weights + reward.log_moment(scale, self.means, self.variances), means, variances)

    def pick(self, uniforms: Tensor) -> tuple[Tensor, Tensor]:
        """Mean (B, d) and variance (B,) of the component that each uniform number (B,) in [0, 1) selects by weight."""
        cumulative = self.log_weights.exp().cumsum(-1)
        cumulative = cumulative / cumulative[:, -1:]
        index = (uniforms.unsqueeze(-1) >= cumulative).sum(-1)  # [B]
        rows = index.new_tensor(range(len(index)))
        return self.means[rows, index], self.variances[rows, index]
