"""The exact laws of a Gaussian mixture against numerical integration, and against each other."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from gaussian_cases import GRID, integrate, level_chains, mixtures, normal, on_grid
from hypothesis import given, settings
from hypothesis import strategies as st

from tsdiff.treesearch.errors import UsageError
from tsdiff.worlds.gaussian.gaussians import Gaussians, log_sum_exp
from tsdiff.worlds.gaussian.mixture import Mixture

points = st.lists(st.floats(-4.0, 4.0), min_size=1, max_size=4)


def column(numbers: list[float]) -> torch.Tensor:
    return torch.tensor(numbers, dtype=torch.float64).unsqueeze(-1)


@settings(max_examples=40, deadline=None)
@given(mixtures(), level_chains(1), points)
def test_posterior_density_and_mean_are_bayes_rule_integrated(
    mixture: Mixture, levels: list[tuple[float, float]], xs: list[float]
) -> None:
    (alpha, sigma), x = levels[0], column(xs)
    prior = on_grid(lambda x0: mixture.log_density(x0)).exp()
    joint = prior * normal(x, alpha * GRID, sigma)  # [B, grid]
    evidence = integrate(joint)
    torch.testing.assert_close(mixture.log_density(x, alpha, sigma).exp(), evidence, rtol=1e-8, atol=1e-12)
    mean, eps = mixture.denoise(x, alpha, sigma)
    far = evidence < 1e-8  # nothing to divide by on the grid
    expected = integrate(joint * GRID) / evidence
    torch.testing.assert_close(mean[~far, 0], expected[~far], rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(alpha * mean + sigma * eps, x, rtol=1e-12, atol=1e-12)


@settings(max_examples=40, deadline=None)
@given(mixtures(dim=3), level_chains(1), st.integers(0, 2**32 - 1))
def test_noise_estimate_is_the_score_of_the_marginal(mixture: Mixture, levels: list[tuple[float, float]], seed: int) -> None:
    """Tweedie's formula: E[eps | x] = -sigma * grad log p(x)."""
    alpha, sigma = levels[0]
    x = (torch.randn(5, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 3.0).requires_grad_()
    (score,) = torch.autograd.grad(mixture.log_density(x, alpha, sigma).sum(), x)
    _, eps = mixture.denoise(x.detach(), alpha, sigma)
    torch.testing.assert_close(eps, -sigma * score, rtol=1e-9, atol=1e-9)


@settings(max_examples=25, deadline=None)
@given(mixtures(), level_chains(3), st.floats(-3.0, 3.0))
def test_two_transitions_in_a_row_are_one(mixture: Mixture, levels: list[tuple[float, float]], start: float) -> None:
    """Chapman-Kolmogorov, with the integral over the level between done numerically."""
    noisy, middle, clean = levels
    x = column([start])
    to_middle = on_grid(mixture.transition(x, *noisy, *middle).log_density).exp()
    ends = column([-2.0, -0.5, 0.0, 0.7, 1.9])
    from_middle = mixture.transition(GRID.unsqueeze(-1), *middle, *clean)  # one law per grid point
    two_hops = torch.stack([integrate(to_middle * from_middle.log_density(end.expand(len(GRID), 1)).exp()) for end in ends])
    one_hop = mixture.transition(x, *noisy, *clean).log_density(ends).exp()
    torch.testing.assert_close(two_hops, one_hop, rtol=1e-6, atol=1e-9)


@settings(max_examples=25, deadline=None)
@given(mixtures(), level_chains(2))
def test_transition_carries_one_marginal_to_the_next(mixture: Mixture, levels: list[tuple[float, float]]) -> None:
    noisy, clean = levels
    start = on_grid(lambda x: mixture.log_density(x, *noisy)).exp()
    laws = mixture.transition(GRID.unsqueeze(-1), *noisy, *clean)
    ends = column([-2.0, -0.5, 0.0, 0.7, 1.9])
    arrived = torch.stack([integrate(start * laws.log_density(end.expand(len(GRID), 1)).exp()) for end in ends])
    torch.testing.assert_close(arrived, mixture.log_density(ends, *clean).exp(), rtol=1e-6, atol=1e-9)


def test_transition_to_the_clean_end_is_the_posterior() -> None:
    mixture = Mixture([0.3, 0.7], [(0.0, 1.0), (2.0, -1.0)], [0.4, 0.9])
    x = torch.tensor([[0.3, 0.1], [2.0, 2.0]], dtype=torch.float64)
    end, posterior = mixture.transition(x, 0.6, 0.8, 1.0, 0.0), mixture.posterior(x, 0.6, 0.8)
    torch.testing.assert_close(end.means, posterior.means)
    torch.testing.assert_close(end.variances, posterior.variances)
    torch.testing.assert_close(end.log_weights, posterior.log_weights)


def test_transition_to_the_same_level_stays() -> None:
    mixture = Mixture([0.3, 0.7], [(0.0,), (2.0,)], [0.4, 0.9])
    x = column([0.3, -1.2])
    stay = mixture.transition(x, 0.6, 0.8, 0.6, 0.8)
    torch.testing.assert_close(stay.mean(), x, rtol=1e-12, atol=1e-12)
    assert stay.variances.abs().max() < 1e-15


def test_ends_of_the_process_are_finite_and_exact() -> None:
    mixture = Mixture([0.3, 0.7], [(0.0,), (2.0,)], [0.4, 0.9])
    x = column([0.3, -1.2, 4.0])
    clean, no_noise = mixture.denoise(x, 0.8, 0.0)
    torch.testing.assert_close(clean, x / 0.8, rtol=1e-14, atol=1e-14)
    assert torch.equal(no_noise, torch.zeros_like(x))
    mean, eps = mixture.denoise(x, 0.0, 2.0)
    torch.testing.assert_close(mean, torch.full_like(x, 1.4), rtol=1e-14, atol=0.0)
    torch.testing.assert_close(eps, x / 2.0, rtol=1e-14, atol=0.0)


@settings(max_examples=30, deadline=None)
@given(mixtures(dim=2), level_chains(1), st.integers(0, 2))
def test_a_class_is_its_component_alone(mixture: Mixture, levels: list[tuple[float, float]], number: int) -> None:
    index = number % mixture.num_components
    x = torch.tensor([[0.2, -1.0], [3.0, 0.5]], dtype=torch.float64)
    weights = torch.tensor([mixture.log_weights(index)] * 2, dtype=torch.float64)
    restricted = mixture.denoise(x, *levels[0], weights)
    alone = mixture.component(index).denoise(x, *levels[0])
    for one, other in zip(restricted, alone, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@settings(max_examples=20, deadline=None)
@given(mixtures(), level_chains(1))
def test_moments_are_those_of_the_density(mixture: Mixture, levels: list[tuple[float, float]]) -> None:
    density = on_grid(lambda x: mixture.log_density(x, *levels[0])).exp()
    mean, covariance = mixture.moments(*levels[0])
    assert float(integrate(density)) == pytest.approx(1.0, abs=1e-6)
    assert float(integrate(density * GRID)) == pytest.approx(mean[0], abs=1e-5)
    assert float(integrate(density * (GRID - mean[0]) ** 2)) == pytest.approx(covariance[0, 0], rel=1e-4)


def test_samples_have_the_mixture_s_moments() -> None:
    mixture = Mixture([1.0, 3.0], [(-1.0, 0.0), (1.5, 2.0)], [0.5, 0.3])
    count = 100_000
    sample = mixture.sample(count, np.random.default_rng(3))
    mean, covariance = mixture.moments()
    # Five standard errors: of a mean sqrt(var / n), of a covariance at most sqrt(3) of a Gaussian's.
    assert np.all(np.abs(sample.mean(0) - mean) < 5.0 * np.sqrt(np.diag(covariance) / count))
    bound = 5.0 * math.sqrt(6.0 / count) * np.sqrt(np.outer(np.diag(covariance), np.diag(covariance)))
    assert np.all(np.abs(np.cov(sample.T) - covariance) < bound)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.floats(-50.0, 50.0), min_size=1, max_size=6), st.integers(0, 5))
def test_log_sum_exp_ignores_minus_infinity(terms: list[float], place: int) -> None:
    padded = [*terms[:place], -math.inf, *terms[place:]]
    value = float(log_sum_exp(torch.tensor(padded, dtype=torch.float64)))
    assert value == pytest.approx(math.log(math.fsum(math.exp(term) for term in terms)), abs=1e-12)


def test_pick_follows_the_weights_and_never_an_absent_component() -> None:
    weights = torch.tensor([[0.2, 0.0, 0.8, 0.0]], dtype=torch.float64)
    uniforms = torch.tensor([0.0, 0.19, 0.21, 0.999999999999], dtype=torch.float64)
    law = Gaussians(weights.log().expand(4, 4), torch.arange(4.0).view(1, 4, 1).expand(4, 4, 1), torch.ones(4, 4))
    means, _ = law.pick(uniforms)
    assert means[:, 0].tolist() == [0.0, 0.0, 2.0, 2.0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([1.0], [(0.0,)], [0.0]), "stds are"),
        (([-1.0, 2.0], [(0.0,), (1.0,)], [1.0, 1.0]), "weights are"),
        (([0.0], [(0.0,)], [1.0]), "not all 0"),
        (([1.0, 1.0], [(0.0,)], [1.0]), "2 weights, 1 means"),
        (([1.0, 1.0], [(0.0,), (1.0, 2.0)], [1.0, 1.0]), "same number"),
        (([1.0], [(math.nan,)], [1.0]), "finite"),
    ],
)
def test_impossible_mixtures_are_refused(
    arguments: tuple[list[float], list[tuple[float, ...]], list[float]], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        Mixture(*arguments)
