"""Verifiers of the `gaussian` world: a reward, the exact log-density, and the exact value of any latent.

The quadratic reward -|x0 - y|^2 / (2 rho^2) has the point y named by the prompt "near (x, y)".
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from tsdiff.treesearch.errors import UsageError
from tsdiff.treesearch.parameters import check, parameter
from tsdiff.treesearch.protocols import Candidates, Condition, Need, Scores
from tsdiff.worlds.gaussian.gaussians import Quadratic
from tsdiff.worlds.gaussian.mixture import Mixture
from tsdiff.worlds.gaussian.presets import DEFAULT_PRESET, EXAMPLE_PROMPT, class_index, parse_target, preset

if TYPE_CHECKING:
    from torch import Tensor


class _Analytic:
    """What the verifiers of this world have in common: rows scored one by one from formulas, at once."""

    scope: ClassVar[Literal["row", "set"]] = "row"
    latency: ClassVar[Literal["immediate", "pending"]] = "immediate"
    judges: ClassVar[Literal["any", "final"]] = "any"
    differentiable: ClassVar[bool] = True

    def prepare(self, device: str) -> None:
        """Nothing to load."""


def _resolve(mixture: Mixture | str) -> Mixture:
    return mixture if isinstance(mixture, Mixture) else preset(mixture).mixture


def _targets(conditions: Sequence[Condition], points: Tensor) -> Tensor:
    """The points (B, d) that the prompts name, as float64."""
    named = [parse_target(condition.prompt, points.shape[-1]) for condition in conditions]
    return points.double().new_tensor(named)


def _log_weights(given: Mixture | str, conditions: Sequence[Condition], points: Tensor) -> Tensor:
    """Log-weights (B, K) of each row's own law: the class's component where a condition has a class."""
    mixture = _resolve(given)
    return points.double().new_tensor([mixture.log_weights(_class(given, condition)) for condition in conditions])


def _class(given: Mixture | str, condition: Condition) -> int | None:
    names = preset(given).class_names if isinstance(given, str) else ()
    return class_index(condition.class_label, _resolve(given).num_components, names)


@dataclass(frozen=True, kw_only=True)
class Target(_Analytic):
    """Closeness of the clean estimate to the prompt's point y: -|x0 - y|^2 / (2 rho^2), at most 0."""

    name: ClassVar[str] = "gaussian-target"
    needs: ClassVar[frozenset[Need]] = frozenset({"x0", "conditions"})

    rho: float = parameter(0.5, above=0.0, symbol="rho", help="distance at which the score is -1/2")

    def __post_init__(self) -> None:
        check(self)

    def check(self, condition: Condition) -> None:
        """Raise UsageError if the prompt names no point."""
        _check_target(self.name, condition)

    def score(self, candidates: Candidates) -> Scores:
        """Score clean estimates (B, d); the part "distance" is |x0 - y|."""
        x0 = candidates.x0.double()
        values = Quadratic(_targets(candidates.conditions, x0), self.rho)(x0)
        return Scores(values, parts={"distance": (-2.0 * self.rho**2 * values.detach()).clamp(min=0.0).sqrt()})


@dataclass(frozen=True, kw_only=True)
class LogDensity(_Analytic):
    """log p(x0) of the clean estimate under the data law, or under its class's component if the condition has a class.

    Estimates from noisy levels lie between the modes, where the density is low: on them this is not a likelihood.
    """

    name: ClassVar[str] = "gaussian-log-density"
    needs: ClassVar[frozenset[Need]] = frozenset({"x0", "conditions"})

    mixture: Mixture | str = parameter(DEFAULT_PRESET, help="the data law: a Mixture, or a preset's name")  # noqa: RUF009 (a field)

    def __post_init__(self) -> None:
        check(self)
        _resolve(self.mixture)

    def check(self, condition: Condition) -> None:
        """Raise UsageError if the condition's class is none of the mixture's."""
        _class(self.mixture, condition)

    def score(self, candidates: Candidates) -> Scores:
        """Score clean estimates (B, d)."""
        mixture, x0 = _resolve(self.mixture), candidates.x0
        return Scores(mixture.log_density(x0, log_weights=_log_weights(self.mixture, candidates.conditions, x0)))


@dataclass(frozen=True, kw_only=True)
class SoftValue(_Analytic):
    """The exact soft value of a latent at its own level, for the reward of `Target`.

    V(x) = (1/lambda) log E[exp(lambda r(x0)) | x]: what an ideal value estimate would say (Li et al. 2024,
    arXiv 2408.08252), where a score of the clean estimate E[x0 | x] is off by the Jensen gap. At level T both are the
    reward.
    """

    name: ClassVar[str] = "gaussian-value"
    needs: ClassVar[frozenset[Need]] = frozenset({"latents", "levels", "conditions"})

    mixture: Mixture | str = parameter(DEFAULT_PRESET, help="the data law: a Mixture, or a preset's name")  # noqa: RUF009 (a field)
    rho: float = parameter(0.5, above=0.0, symbol="rho", help="distance at which the reward is -1/2")
    temperature: float = parameter(1.0, low=0.0, symbol="lambda", help="inverse temperature; 0 is the expected reward")

    def __post_init__(self) -> None:
        check(self)
        _resolve(self.mixture)

    def check(self, condition: Condition) -> None:
        """Raise UsageError if the prompt names no point, or the condition's class is none of the mixture's."""
        _check_target(self.name, condition, _resolve(self.mixture).dim)
        _class(self.mixture, condition)

    def score(self, candidates: Candidates) -> Scores:
        """Score latents (B, d) at the nominal scales of their levels."""
        mixture, x = _resolve(self.mixture), candidates.latents
        scales = [(s.alpha[level], s.sigma[level]) for s, level in zip(candidates.schedules, candidates.levels, strict=True)]
        alpha, sigma = x.double().new_tensor(scales).unbind(-1)
        reward = Quadratic(_targets(candidates.conditions, x).unsqueeze(1), self.rho)  # (B, 1, d) against (B, K, d)
        weights = _log_weights(self.mixture, candidates.conditions, x)
        return Scores(mixture.soft_value(x, alpha, sigma, reward, self.temperature, weights))


def _check_target(name: str, condition: Condition, dim: int | None = None) -> None:
    if not condition.prompt:
        raise UsageError(f'{name} needs a prompt that names a point, for example "{EXAMPLE_PROMPT}"')
    parse_target(condition.prompt, dim)
