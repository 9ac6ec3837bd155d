"""Tree statistics: their limits, bounds, laws and exact schedules."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tsdiff.treesearch.errors import UsageError
from tsdiff.treesearch.noise import generator
from tsdiff.treesearch.statistics import (
    Bounds,
    boltzmann,
    children_allowed,
    gumbel_top,
    gumbel_value,
    gumbels,
    halving_schedule,
    improved_policy,
    least_served,
    max_backup,
    mean_backup,
    pick,
    puct,
    soft_backup,
    uct,
    with_virtual_loss,
)

finite = st.floats(-1e6, 1e6)
missing = st.sampled_from([None, math.nan, math.inf, -math.inf])
counts = st.integers(1, 1000)
weights = st.lists(st.floats(0.0, 10.0), min_size=1, max_size=8).filter(any)


# Normalisation ------------------------------------------------------------------------------------------------------


@given(values=st.lists(finite | missing, max_size=20), asked=st.floats(allow_nan=True) | st.none())
def test_normalised_values_lie_between_0_and_1(values, asked):
    bounds = Bounds()
    for value in values:
        bounds.add(value)
    assert 0.0 <= bounds(asked) <= 1.0


@given(values=st.lists(finite, min_size=2, max_size=20))
def test_the_extremes_become_0_and_1_and_order_is_kept(values):
    bounds = Bounds()
    for value in values:
        bounds.add(value)
    if min(values) == max(values):
        assert {bounds(value) for value in values} == {0.5}
        return
    assert (bounds(min(values)), bounds(max(values))) == (0.0, 1.0)
    ordered = [bounds(value) for value in sorted(values)]
    assert ordered == sorted(ordered)


@given(values=st.lists(finite | missing, max_size=20))
def test_bounds_say_when_they_move(values):
    bounds = Bounds()
    for value in values:
        before = (bounds.low, bounds.high)
        assert bounds.add(value) == ((bounds.low, bounds.high) != before)
    known = [value for value in values if value is not None and math.isfinite(value)]
    assert (bounds.low, bounds.high) == (min(known, default=math.inf), max(known, default=-math.inf))
    assert bounds(None) == bounds(math.nan) == 0.0, "a missing value is the worst"


@given(low=finite, width=st.floats(1e-3, 1e6), scale=st.floats(1e-3, 1e3), shift=finite, share=st.floats(0, 1))
def test_normalisation_forgets_the_verifiers_scale(low, width, scale, shift, share):
    one, other = Bounds(), Bounds()
    for value in (low, low + width):
        one.add(value)
        other.add(scale * value + shift)
    value = low + share * width
    assert other(scale * value + shift) == pytest.approx(one(value), abs=1e-3)


def test_the_largest_floats_do_not_overflow():
    bounds = Bounds()
    for value in (-1.7e308, 1.7e308):
        bounds.add(value)
    assert (bounds(-1.7e308), bounds(0.0), bounds(1.7e308)) == (0.0, 0.5, 1.0)
    assert 0.0 < bounds.scale(1.0) < 1e-300


@given(values=st.lists(st.floats(-100, 100), min_size=2, max_size=6), weight=st.floats(0, 20))
def test_a_weight_means_the_same_on_raw_and_normalised_values(values, weight):
    bounds = Bounds()
    for value in values:
        bounds.add(value)
    raw = boltzmann(values, bounds.scale(weight))
    normalised = boltzmann([bounds(value) for value in values], weight)
    assert raw == pytest.approx(normalised, rel=1e-6, abs=1e-12)


# Selection ----------------------------------------------------------------------------------------------------------


def test_uct_by_hand():
    assert uct(0.5, 4, 100, c=1.0) == pytest.approx(0.5 + math.sqrt(math.log(100) / 4))
    assert uct(0.5, 4, 100) == pytest.approx(0.5 + math.sqrt(2 * math.log(100) / 4)), "UCB1 as its authors print it"
    assert uct(0.3, 1, 1) == 0.3, "no exploration after the only visit"
    assert uct(-1.0, 0, 10) == math.inf, "the unvisited come first"


@given(value=st.floats(0, 1), visits=counts, parent=counts, c=st.floats(0, 3))
def test_uct_explores_less_with_visits_and_more_with_the_parents(value, visits, parent, c):
    assert uct(value, visits, parent, c) >= uct(value, visits + 1, parent, c) >= value
    assert uct(value, visits, parent + 1, c) >= uct(value, visits, parent, c)
    assert uct(value, visits, parent, 0.0) == value


def test_puct_by_hand():
    assert puct(0.25, 0.5, 3, 16) == pytest.approx(0.25 + (1.25 + math.log((16 + 19653) / 19652)) * 0.5 * 4 / 4)
    assert puct(0.25, 0.0, 0, 16) == 0.25, "no prior, no exploration"


@given(prior=st.floats(0.01, 1), visits=counts, parent=counts)
def test_puct_explores_in_proportion_to_the_prior(prior, visits, parent):
    assert puct(0, prior, visits, parent) == pytest.approx(prior * puct(0, 1, visits, parent))
    assert puct(0, prior, visits, parent) > puct(0, prior, visits + 1, parent)


@given(values=st.lists(st.floats(-700, 700), min_size=1, max_size=8), weight=st.floats(0, 1e6), shift=finite)
def test_boltzmann_is_a_law_that_shifts_do_not_change(values, weight, shift):
    law = boltzmann(values, weight)
    assert math.fsum(law) == pytest.approx(1.0)
    assert all(0.0 <= p <= 1.0 for p in law)
    assert boltzmann(values, 0.0) == pytest.approx([1 / len(values)] * len(values))
    assert max(law) == law[values.index(max(values))]
    if weight <= 1.0:
        assert boltzmann([value + shift for value in values], weight) == pytest.approx(law, rel=1e-6, abs=1e-9)


def test_boltzmann_by_hand():
    assert boltzmann([0.0, math.log(3.0)], 1.0) == pytest.approx([0.25, 0.75])
    assert boltzmann([1e6, 0.0], 1e6) == [1.0, 0.0], "no overflow"


@given(law=weights, seed=st.integers(0, 99))
def test_pick_never_chooses_probability_0_and_draws_one_number(law, seed):
    rng, twin = generator(seed), generator(seed)
    assert law[pick(law, rng)] > 0.0
    twin.random()
    assert rng.random() == twin.random()


def test_pick_follows_the_law_exactly():
    class Grid:
        """A generator whose uniform numbers are given."""

        def __init__(self, number):
            self.random = lambda: number

    law = [0.25, 0.0, 0.5, 0.25]
    chosen = [pick(law, Grid((k + 0.5) / 100)) for k in range(100)]
    assert [chosen.count(place) for place in range(4)] == [25, 0, 50, 25]
    assert pick(law, Grid(1.0 - 2.0**-53)) == 3
    assert pick([0.1] * 3 + [0.0], Grid(1.0)) == 2, "rounding at the end never reaches what has no probability"
    with pytest.raises(UsageError, match="above 0"):
        pick([0.0, 0.0], Grid(0.5))


# Gumbel -------------------------------------------------------------------------------------------------------------


def test_gumbel_top_k_draws_without_replacement_in_order():
    """P(i, j) = p_i p_j / (1 - p_i), each frequency within five standard errors of it."""
    law, draws = [0.1, 0.2, 0.3, 0.4], 20_000
    rng = generator(7)
    seen: dict[tuple[int, ...], int] = {}
    for _ in range(draws):
        scores = [g + math.log(p) for g, p in zip(gumbels(4, rng), law, strict=True)]
        pair = tuple(gumbel_top(scores, 2))
        seen[pair] = seen.get(pair, 0) + 1
    for i, j in itertools.permutations(range(4), 2):
        p = law[i] * law[j] / (1.0 - law[i])
        assert abs(seen[i, j] / draws - p) < 5 * math.sqrt(p * (1 - p) / draws)


def test_gumbels_have_eulers_mean():
    numbers = gumbels(20_000, generator(3))
    spread = math.pi / math.sqrt(6)
    assert abs(sum(numbers) / len(numbers) - 0.5772156649) < 5 * spread / math.sqrt(len(numbers))


def test_top_places_and_ties():
    assert gumbel_top([1.0, 3.0, 2.0, 3.0], 3) == [1, 3, 2]
    assert gumbel_top([1.0], 5) == [0]


def test_halving_schedules_by_hand():
    assert halving_schedule(8, 16) == [(8, 8), (4, 4), (2, 4)]
    assert halving_schedule(16, 64) == [(16, 16), (8, 16), (4, 16), (2, 16)]
    assert halving_schedule(4, 100) == [(4, 48), (2, 52)]
    assert halving_schedule(5, 30) == [(5, 10), (3, 9), (2, 11)]
    assert halving_schedule(8, 10) == [(8, 8), (4, 2)], "ragged at the end"
    assert halving_schedule(8, 3) == [(3, 3)], "fewer simulations than candidates"
    assert halving_schedule(1, 7) == [(1, 7)]
    assert halving_schedule(2, 7) == [(2, 7)]


@given(candidates=st.integers(1, 64), simulations=st.integers(1, 500))
def test_halving_spends_the_budget_exactly(candidates, simulations):
    schedule = halving_schedule(candidates, simulations)
    considered = [count for count, _ in schedule]
    assert sum(count for _, count in schedule) == simulations
    assert considered[0] == min(candidates, simulations)
    assert all(later == max(2, (earlier + 1) // 2) for earlier, later in itertools.pairwise(considered))
    assert all(count % in_race == 0 for in_race, count in schedule[:-1]), "all candidates of a phase are served alike"
    phases = max(1, math.ceil(math.log2(considered[0])))
    assert len(schedule) <= phases
    if simulations >= phases * considered[0]:
        assert len(schedule) == phases
        assert min(considered) <= 2, "the race is run to its end"
        for in_race, count in schedule[:-1]:
            assert Fraction(simulations, phases) - in_race < count <= Fraction(simulations, phases)


@pytest.mark.parametrize(("candidates", "simulations"), [(0, 4), (4, 0)])
def test_nothing_to_halve_is_refused(candidates, simulations):
    with pytest.raises(UsageError, match="at least 1"):
        halving_schedule(candidates, simulations)


def test_the_improved_policy_by_hand():
    logits, values, visits = [0.0, math.log(2.0)], [0.1, 0.3], [3, 1]
    scores = [logit + (50 + 3) * 0.1 * value for logit, value in zip(logits, values, strict=True)]
    assert [gumbel_value(value, 3) for value in values] == pytest.approx([0.53, 1.59])
    assert improved_policy(logits, values, visits) == pytest.approx(boltzmann(scores, 1.0))
    assert improved_policy(logits, [0.5, 0.5], visits) == pytest.approx([1 / 3, 2 / 3]), "equal values leave the prior"


@given(law=st.lists(st.floats(0.01, 1.0), min_size=2, max_size=6))
def test_serving_the_least_served_follows_the_probabilities(law):
    law = [p / sum(law) for p in law]
    visits = [0.0] * len(law)
    for _ in range(400):
        visits[least_served(law, visits)] += 1
    assert all(abs(count / 400 - p) <= len(law) / 400 for count, p in zip(visits, law, strict=True))


# Widening -----------------------------------------------------------------------------------------------------------


def test_widening_by_hand():
    assert children_allowed(1) == 2.0
    assert children_allowed(10) == pytest.approx(2 * 10**0.8)
    assert children_allowed(1, c=0.1) == 1.0, "the first child may always open"


@given(c=st.floats(0.1, 4.0), a=st.floats(0.05, 1.0), visits=st.integers(2, 400))
def test_children_grow_as_a_power_of_visits(c, a, visits):
    children = 0
    for visit in range(1, visits + 1):
        children += children < children_allowed(visit, c, a)
        assert 1 <= children <= min(visit, math.ceil(children_allowed(visit, c, a)))
    if c >= 1.0 and a == 1.0:
        assert children == visits


# Back-up ------------------------------------------------------------------------------------------------------------

values = st.lists(finite | st.none(), min_size=1, max_size=8)


@given(values=values, weight=st.floats(0, 1e4))
def test_the_soft_value_lies_between_mean_and_maximum(values, weight):
    soft = soft_backup(values, weight)
    if all(value is None for value in values):
        assert soft is mean_backup(values) is max_backup(values) is None
        return
    known = [value for value in values if value is not None]
    slack = 1e-8 * (1 + max(map(abs, known)))
    assert mean_backup(values) - slack <= soft <= max_backup(values) + slack
    assert soft_backup(values, 2 * weight) >= soft - slack, "and grows with lambda"


@given(values=values.filter(lambda values: values != [None] * len(values)))
def test_the_limits_of_the_soft_value(values):
    assert soft_backup(values, math.inf) == max_backup(values)
    assert soft_backup(values, 0.0) == pytest.approx(mean_backup(values), rel=1e-12, abs=1e-9)
    assert soft_backup(values, 1e-300) == pytest.approx(mean_backup(values), rel=1e-12, abs=1e-9)


@given(values=st.lists(st.floats(-5, 5), min_size=1, max_size=8), weight=st.floats(1e-3, 20))
def test_the_soft_value_is_a_log_mean_exp(values, weight):
    plain = math.log(math.fsum(math.exp(weight * value) for value in values) / len(values)) / weight
    assert soft_backup(values, weight) == pytest.approx(plain, abs=1e-9)


@given(values=st.lists(st.floats(-5, 5), min_size=1, max_size=8), shift=finite, weight=st.floats(0, 20))
def test_the_soft_value_shifts_with_its_values(values, shift, weight):
    moved = soft_backup([value + shift for value in values], weight)
    assert moved == pytest.approx(soft_backup(values, weight) + shift, abs=1e-6)


@given(value=finite, count=st.integers(1, 5), weight=st.floats(0, 1e6))
def test_equal_children_are_worth_what_they_are(value, count, weight):
    assert soft_backup([value] * count, weight) == pytest.approx(value)
    assert max_backup([value] * count) == value
    assert mean_backup([value] * count) == pytest.approx(value)


def test_backups_by_hand():
    assert soft_backup([0.0, 1e6], 1e3) == pytest.approx(1e6 - math.log(2) / 1e3), "no overflow"
    assert soft_backup([0.0, math.log(3.0)], 1.0) == pytest.approx(math.log(2.0))
    assert mean_backup([1.0, 4.0], [3, 1]) == 1.75
    assert mean_backup([1.0, None, 4.0], [1, 100, 1]) == 2.5, "what is missing weighs nothing"
    assert mean_backup([1.0, 4.0], [0, 1]) == 4.0
    assert mean_backup([1.0], [0]) is None
    assert max_backup([math.nan, None, -3.0]) == -3.0
    assert soft_backup([math.nan, math.inf, -3.0], 2.0) == -3.0
    with pytest.raises(UsageError, match="weight is -1"):
        soft_backup([1.0], -1.0)


# Parallel -----------------------------------------------------------------------------------------------------------


@given(value=st.floats(0, 1), visits=st.integers(0, 50), unobserved=st.integers(0, 50))
def test_a_virtual_loss_is_the_mean_with_zeros(value, visits, unobserved):
    assert with_virtual_loss(value, visits, 0) == value
    if visits + unobserved:
        expected = mean_backup([value, 0.0], [visits, unobserved])
        assert with_virtual_loss(value, visits, unobserved) == pytest.approx(expected)
