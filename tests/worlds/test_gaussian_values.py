"""Soft values and tilted laws against numerical integration and their own identities."""

from __future__ import annotations

import math

import pytest
import torch
from gaussian_cases import GRID, integrate, level_chains, mixtures, normal, on_grid
from hypothesis import given, settings
from hypothesis import strategies as st

from tsdiff.worlds.gaussian.gaussians import Linear, Quadratic, Reward
from tsdiff.worlds.gaussian.mixture import Mixture

X = torch.tensor([[-1.5], [0.0], [0.4], [2.0]], dtype=torch.float64)
rewards = st.one_of(
    st.builds(lambda a: Linear((a,)), st.floats(-2.0, 2.0)),
    st.builds(lambda y, width: Quadratic((y,), width), st.floats(-3.0, 3.0), st.floats(0.3, 3.0)),
)
temperatures = st.floats(0.05, 3.0)


@settings(max_examples=40, deadline=None)
@given(mixtures(), level_chains(1), rewards, temperatures)
def test_soft_value_is_the_integral(mixture: Mixture, levels: list[tuple[float, float]], reward: Reward, lam: float) -> None:
    """Computed from the prior and the likelihood alone, so independently of the posterior's formulas."""
    alpha, sigma = levels[0]
    joint = on_grid(lambda x0: mixture.log_density(x0)).exp() * normal(X, alpha * GRID, sigma)
    seen = integrate(joint) > 1e-7
    gain = (lam * reward(GRID.unsqueeze(-1))).exp()
    expected = (integrate(joint * gain) / integrate(joint)).log() / lam
    value = mixture.soft_value(X, alpha, sigma, reward, lam)
    torch.testing.assert_close(value[seen], expected[seen], rtol=1e-6, atol=1e-6)


@settings(max_examples=25, deadline=None)
@given(mixtures(), level_chains(2), rewards, temperatures)
def test_soft_value_is_a_fixed_point_of_the_transition(
    mixture: Mixture, levels: list[tuple[float, float]], reward: Reward, lam: float
) -> None:
    """V_t(x) = (1/lambda) log E[exp(lambda V_s(x_s)) | x_t = x]."""
    noisy, clean = levels
    later = on_grid(lambda x: mixture.soft_value(x, *clean, reward, lam))
    density = torch.stack([on_grid(mixture.transition(x.unsqueeze(0), *noisy, *clean).log_density).exp() for x in X])
    peak = later.max()
    expected = peak + integrate(density * (lam * (later - peak)).exp()).log() / lam
    torch.testing.assert_close(mixture.soft_value(X, *noisy, reward, lam), expected, rtol=1e-6, atol=1e-6)


@settings(max_examples=30, deadline=None)
@given(mixtures(), level_chains(1), rewards)
def test_soft_value_at_lambda_zero_is_the_expected_reward(
    mixture: Mixture, levels: list[tuple[float, float]], reward: Reward
) -> None:
    expected = mixture.soft_value(X, *levels[0], reward, 0.0)
    small = mixture.soft_value(X, *levels[0], reward, 1e-5)
    torch.testing.assert_close(small, expected, rtol=1e-3, atol=1e-2)  # differs by lambda/2 times a variance
    assert (small >= expected - 1e-9).all()  # Jensen


@settings(max_examples=30, deadline=None)
@given(level_chains(1), st.floats(-2.0, 2.0), st.floats(0.2, 1.5), temperatures)
def test_posterior_mean_value_misses_exactly_the_jensen_gap(
    levels: list[tuple[float, float]], a: float, std: float, lam: float
) -> None:
    """One component, linear reward: V - a . E[x0 | x] = (lambda / 2) |a|^2 nu."""
    (alpha, sigma), mixture = levels[0], Mixture([1.0], [(0.7,)], [std])
    mean, _ = mixture.denoise(X, alpha, sigma)
    gap = mixture.soft_value(X, alpha, sigma, Linear((a,)), lam) - a * mean[:, 0]
    nu = std**2 * sigma**2 / (alpha**2 * std**2 + sigma**2)
    torch.testing.assert_close(gap, torch.full_like(gap, 0.5 * lam * a**2 * nu), rtol=1e-9, atol=1e-10)


@settings(max_examples=40, deadline=None)
@given(mixtures(), rewards, temperatures)
def test_tilted_law_and_its_normaliser(mixture: Mixture, reward: Reward, lam: float) -> None:
    prior = on_grid(lambda x0: mixture.log_density(x0))
    tilt = (prior + lam * reward(GRID.unsqueeze(-1))).exp()
    tilted, log_z = mixture.tilted(reward, lam)
    assert log_z == pytest.approx(math.log(float(integrate(tilt))), rel=1e-8, abs=1e-8)
    density = on_grid(lambda x0: tilted.log_density(x0)).exp()
    torch.testing.assert_close(density, tilt / math.exp(log_z), rtol=1e-7, atol=1e-9)


@settings(max_examples=20, deadline=None)
@given(mixtures(), rewards, temperatures)
def test_value_of_pure_noise_is_log_z_and_of_a_clean_point_the_reward(mixture: Mixture, reward: Reward, lam: float) -> None:
    noise = mixture.soft_value(X, 0.0, 1.0, reward, lam)
    torch.testing.assert_close(noise, torch.full_like(noise, mixture.tilted(reward, lam)[1] / lam), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(mixture.soft_value(X, 1.0, 0.0, reward, lam), reward(X), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("reward", [Linear((0.5, -1.0)), Quadratic((1.0, 2.0), 0.7)])
def test_moments_in_the_plane_match_sampling(reward: Reward) -> None:
    """The formulas' dependence on the dimension, which one-dimensional integrals cannot see."""
    mean, std, lam, count = torch.tensor([0.3, 0.8], dtype=torch.float64), 0.6, 0.8, 200_000
    x0 = mean + std * torch.randn(count, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    variance = torch.tensor(std**2, dtype=torch.float64)
    gains, plain = (lam * reward(x0)).exp(), reward(x0)
    error = 5.0 * float(gains.std()) / math.sqrt(count)
    assert float(reward.log_moment(lam, mean, variance).exp()) == pytest.approx(float(gains.mean()), abs=error)
    assert float(reward.expectation(mean, variance)) == pytest.approx(
        float(plain.mean()), abs=5.0 * float(plain.std()) / math.sqrt(count)
    )
    centre, spread = reward.tilt(lam, mean, variance)
    weighted = (gains.unsqueeze(-1) * x0).mean(0) / gains.mean()
    torch.testing.assert_close(centre, weighted, rtol=0.0, atol=0.02)
    variances = (gains.unsqueeze(-1) * (x0 - weighted) ** 2).mean(0) / gains.mean()
    torch.testing.assert_close(variances, spread.expand(2), rtol=0.05, atol=0.0)
