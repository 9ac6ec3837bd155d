"""Resampling: every scheme unbiased and complete, no offspring of the dead; weights and tempering in log space."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from tsdiff.treesearch.errors import UsageError
from tsdiff.treesearch.resampling import SCHEMES, ancestors, effective_size, log_mean_exp, normalise, offspring, temper

few = settings(max_examples=50)
schemes = st.sampled_from(sorted(SCHEMES))
finite = st.floats(-20.0, 20.0)
dead = st.just(-math.inf)
clouds = st.lists(finite | dead, min_size=1, max_size=9).filter(lambda logs: max(logs) > -math.inf)
counts_wanted = st.integers(1, 12)


class Constant:
    """A generator whose uniform numbers are all the same."""

    def __init__(self, value):
        self.value = value

    def random(self, size=None):
        return self.value if size is None else np.full(size, self.value)


class Coins:
    """A generator whose numbers are compared once each, `random() < p`: plays a script, and knows how likely it was."""

    def __init__(self, script):
        self.script = list(script)
        self.tosses = 0
        self.probability = 1.0

    def random(self):
        return self

    def __lt__(self, p):
        heads = self.script[self.tosses] if self.tosses < len(self.script) else True
        self.tosses += 1
        self.probability *= p if heads else 1.0 - p
        return heads


def scripts(length):
    return [[bool(number >> place & 1) for place in range(length)] for number in range(2**length)]


def expected(scheme, logs, count):
    """E[offspring] without sampling: the integral over one uniform number, or the sum over all coin tosses."""
    if scheme == "ssp":
        total, mass = np.zeros(len(logs)), 0.0
        for script in scripts(len(logs) - 1):
            coins = Coins(script)
            counts = offspring(logs, coins, scheme, count)
            share = coins.probability / 2 ** (len(logs) - 1 - coins.tosses)  # tosses that were not needed
            total, mass = total + share * counts, mass + share
        assert mass == pytest.approx(1.0)
        return total
    # The counts are constant between these numbers; draws are alike, so one number for all of them has the same mean.
    weights = np.exp(np.array(logs) - max(logs))
    weights /= weights.sum()
    remainders = count * weights - np.floor(count * weights + 1e-12)
    left = max(remainders.sum(), 1e-9)
    edges = sorted({0.0, 1.0, *np.cumsum(weights), *(np.cumsum(remainders) / left), *(np.cumsum(remainders) % 1.0)})
    edges = [edge for edge in edges if 0.0 <= edge <= 1.0]
    return sum((high - low) * offspring(logs, Constant((low + high) / 2), scheme, count) for low, high in pairwise(edges))


# Offspring ----------------------------------------------------------------------------------------------------------


@few
@given(scheme=schemes, logs=clouds, count=counts_wanted)
def test_every_scheme_is_unbiased_exactly(scheme, logs, count):
    np.testing.assert_allclose(expected(scheme, logs, count), count * normalise(logs), atol=1e-7)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_scheme_is_unbiased_with_a_real_generator(scheme):
    logs, repeats, rng = np.log([0.05, 0.3, 0.15, 0.5]), 4000, np.random.default_rng(7)
    total = sum(offspring(logs, rng, scheme, 6) for _ in range(repeats))
    # An offspring count of 6 draws varies at most as a binomial: std sqrt(6 / 4) each.
    np.testing.assert_allclose(total / repeats, 6 * np.exp(logs), atol=6 * math.sqrt(1.5 / repeats))


@few
@given(scheme=schemes, logs=clouds, count=counts_wanted, seed=st.integers(0, 999))
def test_always_as_many_as_wanted_and_none_of_the_dead(scheme, logs, count, seed):
    counts = offspring(logs, np.random.default_rng(seed), scheme, count)
    assert counts.sum() == count
    assert counts.min() >= 0
    assert not counts[np.isinf(logs)].any()
    assert len(ancestors(counts)) == count
    assert offspring(logs, np.random.default_rng(seed), scheme).sum() == len(logs), "N by default"


@few
@given(scheme=st.sampled_from(["systematic", "ssp"]), logs=clouds, count=counts_wanted, seed=st.integers(0, 999))
def test_floor_or_ceiling(scheme, logs, count, seed):
    counts, wanted = offspring(logs, np.random.default_rng(seed), scheme, count), count * normalise(logs)
    assert (counts >= np.floor(wanted - 1e-9)).all()
    assert (counts <= np.ceil(wanted + 1e-9)).all()


@few
@given(logs=clouds, count=counts_wanted, seed=st.integers(0, 999))
def test_residual_gives_at_least_the_floor(logs, count, seed):
    assert (offspring(logs, np.random.default_rng(seed), "residual", count) >= np.floor(count * normalise(logs) - 1e-9)).all()


@few
@given(scheme=st.sampled_from(["residual", "systematic", "ssp"]), size=st.integers(1, 60), level=finite, u=st.floats(0.0, 1.0, exclude_max=True), times=st.integers(1, 3))
def test_equal_weights_stay_as_they_are(scheme, size, level, u, times):
    counts = offspring([level] * size, Constant(u), scheme, times * size)
    assert counts.tolist() == [times] * size, "also where N times 1/N is not 1 in floats, and at u = 0"


@pytest.mark.parametrize("u", [0.0, 0.5, 1.0 - 2.0**-53])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_ends_of_the_unit_interval_choose_living_particles(scheme, u):
    logs = [-math.inf, 0.0, -math.inf, -0.3, -700.0, -math.inf]
    counts = offspring(logs, Constant(u), scheme, 5)
    assert counts.sum() == 5
    assert not counts[np.isinf(logs)].any()


@few
@given(logs=st.lists(finite, min_size=1, max_size=9), u=st.floats(0.0, 1.0, exclude_max=True))
def test_systematic_is_evenly_spaced_points_through_the_distribution_function(logs, u):
    cumulative, points = np.cumsum(normalise(logs)), (u + np.arange(len(logs))) / len(logs)
    assume(np.abs(cumulative[:, None] - points).min() > 1e-9)  # at a tie either neighbour is right
    places = np.searchsorted(cumulative, points)
    assert offspring(logs, Constant(u), "systematic").tolist() == np.bincount(places, minlength=len(logs)).tolist()


def test_multinomial_loses_a_third_of_equal_particles():
    rng, size = np.random.default_rng(3), 1000
    survivors = np.count_nonzero(offspring([0.0] * size, rng, "multinomial"))
    assert survivors == pytest.approx(size * (1.0 - (1.0 - 1.0 / size) ** size), abs=60)


def test_one_particle_with_all_the_weight_has_all_offspring():
    for scheme in SCHEMES:
        assert offspring([-900.0, 0.0, -math.inf], np.random.default_rng(0), scheme, 7).tolist() == [0, 7, 0]


def test_ancestors_are_in_the_order_of_the_particles():
    assert ancestors(np.array([0, 2, 0, 1])) == [1, 1, 3]


# Weights ------------------------------------------------------------------------------------------------------------


@few
@given(logs=clouds, shift=st.floats(-500.0, 500.0))
def test_weights_add_up_to_one_and_do_not_feel_a_shift(logs, shift):
    weights = normalise(logs)
    assert weights.sum() == pytest.approx(1.0)
    np.testing.assert_allclose(normalise(np.array(logs) + shift), weights, rtol=1e-9, atol=1e-300)
    assert log_mean_exp(np.array(logs) + shift) == pytest.approx(log_mean_exp(logs) + shift)


@few
@given(logs=clouds)
def test_the_mean_is_the_mean(logs):
    assert log_mean_exp(logs) == pytest.approx(math.log(math.fsum(math.exp(log) for log in logs) / len(logs)))


def test_large_numbers_do_not_overflow():
    assert log_mean_exp([5000.0, 5000.0]) == 5000.0
    assert log_mean_exp([-9000.0, -math.inf]) == pytest.approx(-9000.0 - math.log(2.0))
    assert log_mean_exp([-math.inf, -math.inf]) == -math.inf
    assert normalise([5000.0, 5000.0]).tolist() == [0.5, 0.5]


@few
@given(logs=clouds)
def test_effective_size_is_between_one_and_the_living(logs):
    assert 1.0 - 1e-12 <= effective_size(logs) <= np.isfinite(logs).sum() + 1e-9


@few
@given(size=st.integers(1, 200), level=finite)
def test_effective_size_of_equal_weights_is_exact(size, level):
    assert effective_size([level] * size) == size


def test_effective_size_by_hand():
    assert effective_size(np.log([0.5, 0.25, 0.25])) == pytest.approx(1.0 / (0.25 + 2 * 0.0625))


@pytest.mark.parametrize("function", [normalise, effective_size, log_mean_exp, lambda logs: offspring(logs, np.random.default_rng(0))])
@pytest.mark.parametrize(
    ("logs", "message"),
    [([0.0, math.nan], "log weight 1 is nan"), ([math.inf, 0.0], "log weight 0 is inf"), ([], "at least one particle"), ([[0.0]], "shape")],
)
def test_what_is_no_log_weight_is_refused(function, logs, message):
    with pytest.raises(UsageError, match=message):
        function(logs)


@pytest.mark.parametrize("function", [normalise, effective_size, lambda logs: offspring(logs, np.random.default_rng(0))])
def test_a_population_of_dead_particles_is_refused(function):
    with pytest.raises(UsageError, match="all 2 log weights are -inf"):
        function([-math.inf, -math.inf])


def test_unknown_schemes_and_empty_generations_are_refused():
    with pytest.raises(UsageError, match="systematic"):
        offspring([0.0], np.random.default_rng(0), "systematik")
    with pytest.raises(UsageError, match="count is 0"):
        offspring([0.0], np.random.default_rng(0), count=0)


# Tempering ----------------------------------------------------------------------------------------------------------


@few
@given(direction=st.lists(finite, min_size=1, max_size=9), share=st.floats(0.05, 1.0))
def test_tempering_goes_as_far_as_the_effective_size_allows(direction, share):
    """From equal weights the size falls with the exponent, so the crossing is the only one."""
    base, slope, target = np.zeros(len(direction)), np.array(direction), share * len(direction)
    exponent = temper(base, slope, target)
    assert effective_size(exponent * slope) >= target
    assert exponent == 1.0 or effective_size(min(1.0, exponent + 1e-6) * slope) < target + 1e-6


@few
@given(base=clouds, seed=st.integers(0, 99), low=st.floats(0.0, 1.0), target=st.floats(0.0, 10.0))
def test_tempering_stays_in_its_range(base, seed, low, target):
    slope = np.random.default_rng(seed).normal(size=len(base))
    exponent = temper(base, slope, target, low=low)
    assert low <= exponent <= 1.0
    assert exponent == low or effective_size(np.array(base) + exponent * slope) >= target


def test_tempering_by_hand():
    # Weights 1 : e^-2b have the effective size (1 + e^-2b)^2 / (1 + e^-4b): 1.5^2 / 1.25 = 1.8 where e^-2b = 1/2.
    assert temper([0.0, 0.0], [0.0, -2.0], 1.8) == pytest.approx(math.log(2.0) / 2.0, abs=1e-8)
    assert temper([0.0, 0.0], [0.0, -2.0], 1.8, high=0.25) == 0.25
    assert temper([0.0, -5.0], [0.0, -2.0], 1.8, low=0.1) == 0.1
    with pytest.raises(UsageError, match="finite"):
        temper([0.0, 0.0], [0.0, -math.inf], 1.8)
