"""The data law of the `gaussian` world: an isotropic Gaussian mixture, about which everything is known exactly.

For x = alpha * x0 + sigma * eps with x0 ~ sum_k w_k N(m_k, s_k^2 I) and eps ~ N(0, I):

    marginal         sum_k w_k N(alpha m_k, v_k I),  v_k = alpha^2 s_k^2 + sigma^2
    posterior of x0  sum_k g_k N(mu_k, nu_k I),      g_k ~ w_k N(x; alpha m_k, v_k I)
                     mu_k = m_k + alpha s_k^2 / v_k (x - alpha m_k),   nu_k = s_k^2 sigma^2 / v_k

so the exact denoiser E[x0 | x], the exact transition p(x_s | x_t) between any two levels, and the soft value
(1/lambda) log E[exp(lambda r(x0)) | x] of linear and quadratic rewards are closed forms. Scales are those of any process:
VP, VE (alpha = 1) or flow (alpha = 1 - t, sigma = t). Arithmetic is float64. Shapes: B = rows, K = components,
d = dimensions; `alpha` and `sigma` are numbers, or tensors (B,) with one entry per row.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

from tsdiff.treesearch.errors import UsageError
from tsdiff.worlds.gaussian.gaussians import Gaussians, Reward

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

    Scale: TypeAlias = float | Tensor


@dataclass(frozen=True)
class Mixture:
    """sum_k weights[k] * N(means[k], stds[k]^2 I).

    Attributes:
      weights: K numbers of at least 0, not all 0; stored so that they add up to 1.
      means: K points of d numbers each.
      stds: K positive standard deviations.

    Raises:
      UsageError: if the sizes differ or a number is out of range.
    """

    weights: tuple[float, ...]
    means: tuple[tuple[float, ...], ...]
    stds: tuple[float, ...]

    def __init__(self, weights: Sequence[float], means: Sequence[Sequence[float]], stds: Sequence[float]) -> None:
        weights = tuple(float(weight) for weight in weights)
        points = tuple(tuple(float(number) for number in mean) for mean in means)
        stds = tuple(float(std) for std in stds)
        if not len(weights) == len(points) == len(stds) >= 1:
            raise UsageError(
                f"Mixture: {len(weights)} weights, {len(points)} means and {len(stds)} stds; give one of each per component"
            )
        if len({len(point) for point in points}) != 1 or not points[0]:
            raise UsageError(
                f"Mixture: the means have {sorted({len(point) for point in points})} numbers; all need the same number, at least 1"
            )
        if not all(0.0 <= weight < math.inf for weight in weights) or not any(weights):
            raise UsageError(f"Mixture: weights are {weights} but must be finite, at least 0, and not all 0")
        if not all(0.0 < std < math.inf for std in stds):
            raise UsageError(f"Mixture: stds are {stds} but must be positive and finite")
        if not all(math.isfinite(number) for point in points for number in point):
            raise UsageError(f"Mixture: means are {points} but must be finite")
        total = math.fsum(weights)
        object.__setattr__(self, "weights", tuple(weight / total for weight in weights))
        object.__setattr__(self, "means", points)
        object.__setattr__(self, "stds", stds)

    @property
    def num_components(self) -> int:
        """K."""
        return len(self.weights)

    @property
    def dim(self) -> int:
        """d."""
        return len(self.means[0])

    def component(self, index: int) -> Mixture:
        """The law of one class: component `index` alone."""
        return Mixture((1.0,), (self.means[index],), (self.stds[index],))

    def log_weights(self, index: int | None = None) -> list[float]:
        """Log-weights (K) of the whole mixture, or of component `index` alone (-inf for the others)."""
        if index is None:
            return [math.log(weight) if weight > 0.0 else -math.inf for weight in self.weights]
        return [0.0 if k == index else -math.inf for k in range(self.num_components)]

    def moments(self, alpha: float = 1.0, sigma: float = 0.0) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Mean (d,) and covariance (d, d) of the marginal at a level; of the data itself by default."""
        import numpy as np

        weights, means, stds = np.array(self.weights), np.array(self.means), np.array(self.stds)
        mean = weights @ means
        spread = (weights[:, None] * (means - mean)).T @ (means - mean) + np.eye(self.dim) * (weights @ stds**2)
        return alpha * mean, alpha**2 * spread + sigma**2 * np.eye(self.dim)

    def sample(self, count: int, rng: np.random.Generator) -> NDArray[np.float64]:
        """Independent points (count, d) of the data law."""
        import numpy as np

        chosen = rng.choice(self.num_components, size=count, p=np.array(self.weights))
        noise = rng.standard_normal((count, self.dim))
        points: NDArray[np.float64] = np.array(self.means)[chosen] + np.array(self.stds)[chosen, None] * noise
        return points

    # Exact laws ------------------------------------------------------------------------------------------------------

    def marginal(self, x: Tensor, alpha: Scale, sigma: Scale, log_weights: Tensor | None = None) -> Gaussians:
        """The law of x at a level, one copy per row of `x` (B, d), whose values do not matter.

        Args:
          log_weights: (B, K) log-weights of each row's own law (a class); None takes the whole mixture.
        """
        means, stds = self._tensors(x)
        alpha, sigma = _column(alpha, x), _column(sigma, x)
        if log_weights is None:
            log_weights = means.new_tensor(self.log_weights()).expand(len(x), -1)
        variances = alpha**2 * stds**2 + sigma**2  # [B, K]
        return Gaussians(log_weights.to(means), alpha.unsqueeze(-1) * means, variances)

    def log_density(self, x: Tensor, alpha: Scale = 1.0, sigma: Scale = 0.0, log_weights: Tensor | None = None) -> Tensor:
        """log density (B,) of points (B, d) at a level; of clean points by default."""
        return self.marginal(x, alpha, sigma, log_weights).log_density(x.double())

    def posterior(self, x: Tensor, alpha: Scale, sigma: Scale, log_weights: Tensor | None = None) -> Gaussians:
        """p(x0 | x) for points x (B, d) at a level. At sigma 0 the variances are 0 and all means are x / alpha."""
        marginal = self.marginal(x, alpha, sigma, log_weights)
        means, stds = self._tensors(x)
        alpha, sigma = _column(alpha, x), _column(sigma, x)
        gain = alpha * stds**2 / marginal.variances  # [B, K]
        centres = means + gain.unsqueeze(-1) * (x.double().unsqueeze(1) - marginal.means)
        joint = marginal.joint_log_density(x.double())
        return Gaussians.normalized(joint, centres, stds**2 * sigma**2 / marginal.variances)

    def denoise(self, x: Tensor, alpha: Scale, sigma: Scale, log_weights: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The exact denoiser: E[x0 | x] and E[eps | x], each (B, d).

        eps is summed from its own closed form, so it keeps its digits where (x - alpha x0) / sigma would lose them:
        at sigma 0 it is 0 and x0 is x / alpha, at alpha 0 it is x / sigma and x0 the mean of the data.
        """
        marginal = self.marginal(x, alpha, sigma, log_weights)
        posterior = self.posterior(x, alpha, sigma, log_weights)
        shrink = _column(sigma, x) / marginal.variances  # [B, K]
        return posterior.mean(), posterior.average(shrink.unsqueeze(-1) * (x.double().unsqueeze(1) - marginal.means))

    def transition(
        self, x: Tensor, alpha: Scale, sigma: Scale, alpha_to: Scale, sigma_to: Scale, log_weights: Tensor | None = None
    ) -> Gaussians:
        """p(x_s | x_t), exact for any distance: from points x (B, d) at (alpha, sigma) to the cleaner (alpha_to, sigma_to).

        Given x0, x_s is Gaussian with mean alpha_s x0 + (r sigma_s^2 / sigma_t^2) (x_t - alpha_t x0) and variance
        sigma_s^2 q / sigma_t^2, where r = alpha_t / alpha_s and q = sigma_t^2 - r^2 sigma_s^2 (Ho et al. 2020,
        arXiv 2006.11239, eq. 6); x0 is then averaged over its posterior, component by component. Needs sigma > 0.
        """
        posterior = self.posterior(x, alpha, sigma, log_weights)
        alpha, sigma, alpha_to, sigma_to = (_column(scale, x) for scale in (alpha, sigma, alpha_to, sigma_to))
        ratio = alpha / alpha_to
        added = (sigma**2 - ratio**2 * sigma_to**2).clamp(min=0.0)  # negative by rounding where two levels coincide
        keep, pull = ratio * (sigma_to / sigma) ** 2, alpha_to * added / sigma**2  # of x_t and of x0, [B, 1]
        means = keep.unsqueeze(-1) * x.double().unsqueeze(1) + pull.unsqueeze(-1) * posterior.means
        return Gaussians(posterior.log_weights, means, (sigma_to / sigma) ** 2 * added + pull**2 * posterior.variances)

    # Values ----------------------------------------------------------------------------------------------------------

    def soft_value(
        self, x: Tensor, alpha: Scale, sigma: Scale, reward: Reward, temperature: float, log_weights: Tensor | None = None
    ) -> Tensor:
        """V(x) = (1/lambda) log E[exp(lambda r(x0)) | x] of points (B, d) at a level -> (B,); lambda 0 gives E[r(x0) | x].

        Args:
          temperature: lambda >= 0, the *inverse* temperature of the tilted law.
        """
        posterior = self.posterior(x, alpha, sigma, log_weights)
        if temperature == 0.0:
            return posterior.expectation(reward)
        return posterior.log_moment(reward, temperature) / temperature

    def tilted(self, reward: Reward, temperature: float) -> tuple[Mixture, float]:
        """The law proportional to p(x0) exp(lambda r(x0)), and log Z = log E[exp(lambda r(x0))]."""
        import torch

        law = self.marginal(torch.zeros(1, self.dim), 1.0, 0.0)
        tilted = law.tilted(reward, temperature)
        mixture = Mixture(tilted.log_weights[0].exp().tolist(), tilted.means[0].tolist(), tilted.variances[0].sqrt().tolist())
        return mixture, float(law.log_moment(reward, temperature))

    def _tensors(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Means (K, d) and stds (K) as float64 tensors on the device of `like` (B, d)."""
        import torch

        assert like.shape[1:] == (self.dim,), f"points of shape {tuple(like.shape)} for a mixture of dimension {self.dim}"
        options: dict[str, Any] = {"dtype": torch.float64, "device": like.device}
        return torch.tensor(self.means, **options), torch.tensor(self.stds, **options)


def _column(scale: Scale, like: Tensor) -> Tensor:
    """A scale as a float64 tensor (B, 1), or (1, 1) if it is the same for all rows."""
    import torch

    return torch.as_tensor(scale, dtype=torch.float64, device=like.device).reshape(-1, 1)
