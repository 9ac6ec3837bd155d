"""Adaptive compute: what it believes about prompts, how it deals, and the promises that hold whatever it meets."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import dataclass, field

import numpy as np
import pytest
from fake_driver import STOCHASTIC, TWO_STAGE, setting
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import integrate, stats

from tsdiff.policies import Beam, BestOfN
from tsdiff.policies.adaptive import Adaptive, Prompt, Tail, deal, least, moderated
from tsdiff.treesearch import registry
from tsdiff.treesearch.errors import UsageError
from tsdiff.treesearch.ledger import Budget
from tsdiff.treesearch.parameters import describe
from tsdiff.treesearch.protocols import Allocator, Outcome, Policy
from tsdiff.treesearch.search import search

PROMPTS = [f"near ({x}, {y})" for x, y in ((3, 2.4), (0, 0), (-2, 0.5))]


class FakeForest:
    """Prompts whose samples' scores come from a function of (prompt, number of the sample), at exact prices.

    Attributes:
      rounds: what was granted in each round, as (tree, policy, nfe).
      samples: how many samples each prompt has.
    """

    def __init__(self, prompts, total, score, *, where=None, target=None, fails=()):
        self.setting = where or setting(10)
        self.trees = [f"tree {i}" for i in range(prompts)]
        self.budget = Budget(total)
        self.target = target
        self.score = score
        self.fails = fails
        self.notes = []
        self.rounds = []
        self.samples = [0] * prompts
        self.best = [-math.inf] * prompts

    def note(self, **facts):
        json.dumps(facts, allow_nan=False)
        self.notes.append(facts)

    def run(self, allocator):
        allocation, reply = allocator.search(self), None
        while True:
            try:
                grants = allocation.send(reply)
            except StopIteration:
                return self
            places = [self.trees.index(grant.tree) for grant in grants]
            assert len(set(places)) == len(places) > 0
            assert sum(grant.nfe for grant in grants) <= self.budget.remaining
            self.rounds.append([(place, grant.policy, grant.nfe) for place, grant in zip(places, grants, strict=True)])
            reply = [self._outcome(place, grant) for place, grant in zip(places, grants, strict=True)]

    def _outcome(self, place, grant):
        cost = grant.policy.cost(self.setting).upper.nfe
        assert 0 < cost <= grant.nfe, "the policy is fitted to its grant"
        count = max(cost // self.setting.sample_cost, 1)
        scores = tuple(self.score(place, self.samples[place] + i) for i in range(count))
        self.samples[place] += count
        self.best[place] = max([self.best[place], *(one for one in scores if one is not None)])
        self.budget.spent += cost
        return Outcome(cost, scores, failed=place in self.fails)


def gaussian_scores(spreads, seed=0):
    """Scores N(0, spread^2), reproducible."""
    draws = np.random.default_rng(seed).normal(size=(len(spreads), 4000)) * np.array(spreads)[:, None]
    return lambda place, number: float(draws[place, number])


# What is believed ----------------------------------------------------------------------------------------------------


@given(st.lists(st.lists(st.floats(-50, 50), max_size=6), min_size=1, max_size=6), st.floats(0.0, 10.0))
def test_spreads_are_the_moderated_standard_deviations(samples, prior):
    several = [scores for scores in samples if len(scores) > 1]
    usual = np.mean([np.std(scores, ddof=1) for scores in several]) if several else 0.0
    for scores, spread in zip(samples, moderated(samples, prior), strict=True):
        own, dof = (np.var(scores, ddof=1), len(scores) - 1) if len(scores) > 1 else (0.0, 0)
        expected = (prior * usual**2 + dof * own) / (prior + dof) if prior + dof else usual**2
        assert spread == pytest.approx(math.sqrt(expected), rel=1e-6, abs=1e-6)


def test_without_a_prior_each_prompt_has_its_own_spread_and_with_a_large_one_all_have_the_mean():
    samples = [[0.0, 2.0], [0.0, 0.0, 0.0], [1.0, 2.0, 6.0], [4.0]]
    own = [math.sqrt(2.0), 0.0, math.sqrt(7.0)]
    assert moderated(samples, 0.0) == pytest.approx([*own, sum(own) / 3])
    assert moderated(samples, 1e12) == pytest.approx([sum(own) / 3] * 4)


finite = st.floats(-5.0, 5.0)
scales = st.floats(0.05, 5.0)
freedoms = st.floats(2.0, 100.0)


@settings(max_examples=40)
@given(best=finite, mean=finite, scale=scales, freedom=freedoms)
def test_the_first_gain_is_the_expected_improvement_of_students_law(best, mean, scale, freedom):
    law = stats.t(freedom, mean, scale)
    exact, error = integrate.quad(law.sf, best, np.inf)
    assert Tail.beyond(best, mean, scale, freedom, None).gain(1) == pytest.approx(exact, rel=1e-6, abs=10 * error + 1e-12)


@given(best=finite, mean=finite, scale=scales)
def test_with_many_samples_it_is_that_of_a_gaussian(best, mean, scale):
    z = (best - mean) / scale
    closed = scale * (stats.norm.pdf(z) - z * stats.norm.sf(z))
    assert Tail.beyond(best, mean, scale, 1e7, None).gain(1) == pytest.approx(closed, rel=1e-3, abs=1e-9)


@settings(max_examples=50)
@given(p=st.floats(1e-9, 1.0, exclude_max=True), b=st.floats(0.01, 10.0), room=st.one_of(st.just(math.inf), st.floats(0.0, 20.0)), j=st.integers(1, 200))
def test_gains_are_those_of_best_of_n_under_an_exponential_tail(p, b, room, j):
    """E[max of j] - E[max of j - 1] is the integral of F^(j-1) (1 - F) over the excess, up to the target."""

    def lost(y):
        return p * math.exp(-y / b)

    upper = min(room, 60.0 * b)
    exact, error = integrate.quad(lambda y: (1.0 - lost(y)) ** (j - 1) * lost(y), 0.0, upper, limit=200)
    assert Tail(p, b, room).gain(j) == pytest.approx(exact, rel=1e-6, abs=10 * error + 1e-9 * b * p)


def test_gains_stay_close_to_those_of_a_gaussian_and_never_below():
    """A Gaussian's excesses are lighter than exponential ones of the same mean, so its best-of-n gains less."""
    for z in (1.0, 2.0, 3.0):
        tail = Tail.beyond(z, 0.0, 1.0, 1e9, None)
        for n in (4, 16, 64):
            exact, _ = integrate.quad(lambda x, n=n: 1.0 - stats.norm.cdf(x) ** n, z, 12.0)
            ours = sum(tail.gain(j) for j in range(1, n + 1))
            assert exact <= ours * (1 + 1e-9) <= 1.2 * exact


@given(best=finite, mean=finite, scale=scales, freedom=freedoms, target=st.one_of(st.none(), st.floats(5.0, 9.0)))
def test_every_further_sample_adds_less(best, mean, scale, freedom, target):
    tail = Tail.beyond(best, mean, scale, freedom, target)
    gains = [tail.gain(j) for j in range(1, 40)]
    assert all(0.0 <= after <= before * (1 + 1e-9) for before, after in itertools.pairwise(gains))
    assert sum(gains) <= (math.inf if target is None else target - best) + 1e-9


def test_a_prompt_without_spread_or_far_from_its_best_gains_nothing():
    assert Tail.beyond(1.0, 1.0, 0.0, 5.0, None).gain(1) == 0.0
    assert Tail.beyond(1.0, 0.0, 1e-300, 1e6, None).gain(3) == 0.0
    assert Tail.beyond(1.0, 0.0, 1.0, 5.0, 1.0).gain(1) == 0.0, "there is no room below the target"


def test_a_prompt_learns_from_samples_and_keeps_the_best_of_all():
    prompt = Prompt(0)
    assert (prompt.mean, prompt.best, prompt.reached(0.0)) == (None, None, False)
    prompt.take(Outcome(10, (None, 1.0, 3.0)), sampled=True)
    prompt.take(Outcome(10, (7.0,)), sampled=False)
    assert (prompt.sampled, prompt.mean, prompt.best) == ([1.0, 3.0], 2.0, 7.0)
    assert prompt.reached(7.0)
    assert not prompt.reached(7.1)
    assert not prompt.reached(None)
    assert Prompt(1).tail(1.0, 2.0, None) == Tail.beyond(0.0, 0.0, math.sqrt(2.0), 2.0, None)


# How it deals --------------------------------------------------------------------------------------------------------


@given(st.lists(st.tuples(finite, scales), min_size=1, max_size=4), st.integers(0, 7), st.booleans())
def test_dealing_greedily_is_optimal(prompts, units, bounded):
    tails = [Tail.beyond(best, 0.0, scale, 5.0, 5.5 if bounded else None) for best, scale in prompts]

    def value(counts):
        return sum(tail.gain(j) for tail, count in zip(tails, counts, strict=True) for j in range(1, count + 1))

    dealt = deal(tails, units)
    assert sum(dealt) == units
    best = max(value(counts) for counts in itertools.product(range(units + 1), repeat=len(tails)) if sum(counts) == units)
    assert value(dealt) == pytest.approx(best, rel=1e-9, abs=1e-12)


@given(st.lists(st.floats(0.0, 3.0), min_size=1, max_size=8), st.integers(0, 60), st.integers(1, 9))
def test_a_prompt_gets_nothing_or_at_least_a_block(spreads, units, block):
    dealt = deal([Tail.beyond(0.0, 0.0, spread, 5.0, None) for spread in spreads], units, block)
    assert all(got == 0 or got >= block for got in dealt)
    assert sum(dealt) == (units if units >= block else 0)


@given(st.integers(1, 9), st.integers(0, 100))
def test_where_nothing_is_known_all_get_the_same(prompts, units):
    dealt = deal([Tail(0.0, 0.0)] * prompts, units)
    assert sum(dealt) == units
    assert max(dealt) - min(dealt) <= 1
    assert dealt == sorted(dealt, reverse=True), "what does not divide goes to the first"


def test_wide_prompts_get_more_and_narrow_ones_less():
    forest = FakeForest(4, 64 * 10 * 4, gaussian_scores([0.1, 0.1, 2.0, 2.0])).run(Adaptive())
    assert max(forest.samples[:2]) < 64
    assert sum(forest.samples[2:]) > 1.5 * sum(forest.samples[:2])
    assert sum(forest.samples) == 64 * 4


# The smallest budget of a policy -------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", [BestOfN(), Beam(), Beam(levels=(0.5,)), Beam(value="final"), Beam(levels=(), branch=1)])
@pytest.mark.parametrize("solver", [STOCHASTIC, TWO_STAGE])
def test_least_is_the_smallest_budget_that_can_be_fitted(policy, solver):
    where = setting(10, solver)
    found = least(policy, where)
    policy.fit(found, where)
    with pytest.raises(UsageError):
        policy.fit(found - 1, where)


def test_a_policy_that_no_budget_pays_for_says_so_itself():
    with pytest.raises(UsageError, match="never enough"):
        least(Insatiable(), setting(10))


# Promises ------------------------------------------------------------------------------------------------------------

policies = st.sampled_from([BestOfN(), Beam(), Beam(levels=(0.5,), branch=2)])
adaptives = st.builds(Adaptive, policy=policies, pilot=st.integers(0, 6), rounds=st.integers(1, 5), prior=st.floats(0.0, 8.0))
scorings = st.sampled_from(
    [
        lambda place, number: None,
        lambda place, number: 1.0,
        lambda place, number: float(place),
        lambda place, number: None if number % 2 else math.sin(number + place),
        lambda place, number: float(np.random.default_rng([place, number]).normal(0.0, 1.0 + place)),
        lambda place, number: None if place == 0 else float(np.random.default_rng([place, number]).integers(0, 3)),
    ]
)


@given(allocator=adaptives, prompts=st.integers(1, 7), samples=st.integers(0, 80), odd=st.integers(0, 9), score=scorings, target=st.sampled_from([None, 0.5, 2.0]), fails=st.booleans())
def test_the_total_is_never_exceeded_and_everybody_gets_a_sample(allocator, prompts, samples, odd, score, target, fails):
    where = setting(10)
    total = samples * where.sample_cost + odd
    forest = FakeForest(prompts, total, score, where=where, target=target, fails=(0,) if fails else ())
    try:
        cost = allocator.forecast(total, prompts, where)
    except UsageError as error:
        smallest = int(str(error).split("need at least ")[1].split(",")[0])
        assert total < smallest
        allocator.forecast(smallest, prompts, where)
        return
    forest.run(allocator)
    assert forest.budget.spent <= total
    assert {place for place, _, _ in forest.rounds[0]} == set(range(prompts)), "everybody is granted something at first"
    spent = [sum(policy.cost(where).upper.nfe for grants in forest.rounds for place, policy, _ in grants if place == one) for one in range(prompts)]
    assert sum(spent) == forest.budget.spent
    for nfe in spent:
        assert cost.lower.nfe <= nfe <= cost.upper.nfe
    if fails and allocator.pilot:
        assert all(place != 0 for grants in forest.rounds[1:] for place, _, _ in grants), "a failed search is left alone"


@given(prompts=st.integers(1, 6), samples=st.integers(2, 40), score=scorings)
def test_with_best_of_n_and_no_target_less_than_one_sample_is_left(prompts, samples, score):
    forest = FakeForest(prompts, prompts * samples * 10 + 7, score).run(Adaptive())
    assert forest.budget.remaining < 10


@given(target=st.floats(-1.0, 3.0), seed=st.integers(0, 50))
def test_prompts_that_reached_the_target_get_nothing_more(target, seed):
    forest = FakeForest(5, 5 * 10 * 20, gaussian_scores([1.0, 1.0, 2.0, 0.5, 1.0], seed), target=target)
    best = [-math.inf] * 5
    counts = [0] * 5
    forest.run(Adaptive())
    for grants in forest.rounds:
        for place, policy, _ in grants:
            assert best[place] < target
            for number in range(counts[place], counts[place] + policy.n):
                best[place] = max(best[place], forest.score(place, number))
            counts[place] += policy.n
    assert min(best) >= target or forest.budget.remaining < 10, "it goes on until all are there or nothing is left"


def test_a_target_that_all_reach_at_once_ends_it_after_the_pilot():
    forest = FakeForest(3, 3000, lambda place, number: 1.0, target=1.0).run(Adaptive(pilot=5))
    assert forest.samples == [5, 5, 5]
    assert len(forest.rounds) == 1


def test_the_pilot_takes_at_most_half_of_the_budget_but_two_where_it_can():
    where = setting(10)
    sizes = [Adaptive(pilot=6).pilot_size(samples * 40, 4, where) for samples in range(17)]
    assert sizes == [0, 1, 2, 2, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 6, 6, 6]
    assert Adaptive(pilot=0).pilot_size(4000, 4, where) == 0


def test_without_a_pilot_every_prompt_has_the_equal_share_at_once():
    forest = FakeForest(3, 1000, gaussian_scores([1.0, 5.0, 9.0])).run(Adaptive(pilot=0, policy=Beam()))
    (grants,) = forest.rounds
    assert [(place, nfe) for place, _, nfe in grants] == [(0, 333), (1, 333), (2, 333)]
    assert {policy for _, policy, _ in grants} == {Beam().fit(333, forest.setting)}


def test_one_prompt_gets_everything():
    forest = FakeForest(1, 500, gaussian_scores([1.0])).run(Adaptive())
    assert forest.samples == [50]


def test_rounds_are_equal_parts_of_the_rest():
    forest = FakeForest(4, 4 * 10 * 20, gaussian_scores([1.0, 2.0, 3.0, 4.0])).run(Adaptive(pilot=4, rounds=4))
    assert [sum(nfe for _, _, nfe in grants) for grants in forest.rounds] == [160, 160, 160, 160, 160]


def test_what_comes_back_is_dealt_again():
    """A policy that cannot use all of its grant leaves the rest to further rounds."""
    forest = FakeForest(2, 1000, gaussian_scores([1.0, 1.0])).run(Adaptive(policy=Beam(levels=(0.5,), value="final"), rounds=1))
    assert forest.budget.remaining < max(least(Beam(levels=(0.5,), value="final"), forest.setting), 10)
    assert forest.notes[0]["round"] == 1


def test_notes_tell_what_each_round_went_by():
    forest = FakeForest(2, 400, lambda place, number: None if place else float(number % 2)).run(Adaptive(rounds=1))
    first = forest.notes[0]["prompts"]
    assert [entry["mean"] for entry in first] == [0.5, None]
    assert [entry["best"] for entry in first] == [1.0, None]
    assert first[0]["spread"] == pytest.approx(math.sqrt(1 / 3)), "nobody else has a spread"
    assert sum(entry["samples_worth"] for entry in first) == 32


# Names and options ---------------------------------------------------------------------------------------------------


def test_it_wraps_any_policy_by_name_with_its_parameters_or_as_an_object():
    made = Adaptive.from_options({"policy": "beam", "policy.jump": "0.1", "policy.levels": "0.2,0.5", "rounds": "1"})
    assert made == Adaptive(policy=Beam(jump=0.1, levels=(0.2, 0.5)), rounds=1)
    assert Adaptive.from_options({}) == Adaptive(policy=BestOfN()) == Adaptive()
    assert Adaptive.from_options({"policy": Beam(width=2)}).policy == Beam(width=2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"policy": "beem"}, "did you mean 'beam'"),
        ({"policy": "adaptive"}, "searches one prompt"),
        ({"policy": 3}, "searches one prompt"),
        ({"policy": "beam", "policy.widht": "2"}, "did you mean 'width'"),
        ({"policy": Beam(), "policy.width": "2"}, "beside a policy object"),
        ({"pilto": "2"}, "did you mean 'pilot'"),
        ({"pilot": "-1"}, "at least 0"),
        ({"rounds": "0"}, "at least 1"),
    ],
)
def test_what_is_wrong_is_told(options, message):
    with pytest.raises(UsageError, match=message):
        Adaptive.from_options(options)


def test_it_is_an_allocator_and_no_policy_is_one():
    assert isinstance(Adaptive(), Allocator)
    assert not any(isinstance(policy, Allocator) for policy in (BestOfN(), Beam()))
    with pytest.raises(UsageError, match="searches one prompt"):
        Adaptive(policy=Adaptive())
    assert {row["name"] for row in describe(Adaptive)} == {"policy", "pilot", "rounds", "prior"}


def test_needs_are_those_of_the_policy_and_comparable_scores():
    assert Adaptive(policy=Beam(branch_by="step")).needs == {"stochastic", "absolute"}
    assert Adaptive(policy=BestOfN(), pilot=0).needs == frozenset()


class Insatiable:
    name = "insatiable"

    def fit(self, nfe, setting):
        raise UsageError("never enough")


@dataclass(frozen=True)
class WithRoles:
    name = "with-roles"
    roles = ("layout",)
    needs = frozenset()
    inner: Policy = field(default_factory=BestOfN)

    def fit(self, nfe, setting):
        return self


def test_roles_are_those_of_the_policy():
    assert Adaptive(policy=WithRoles()).roles == ("layout",)
    assert Adaptive().roles == ()


# Whole searches ------------------------------------------------------------------------------------------------------


def run(policy, prompts=PROMPTS, total=600, **options):
    results = search("gaussian", prompts, policy=policy, total_nfe=total, **({"steps": 6, "baseline": False, "deterministic": True} | options))
    assert not results.failures
    return results


def trees(results):
    return [json.dumps(result.tree.to_json()) for result in results]


@pytest.mark.parametrize("policy", [Beam(), BestOfN(), Beam(value="final", levels=(0.5,))])
def test_without_a_pilot_trees_are_those_of_the_policy_with_the_equal_share(policy):
    registry.policies.add("adaptive", Adaptive)
    shared = run(Adaptive(policy=policy, pilot=0))
    alone = search("gaussian", PROMPTS, policy=policy.fit(200, shared.forest.setting), nfe=200, steps=6, baseline=False, deterministic=True)
    assert trees(shared) == trees(alone)
    assert [result.score for result in shared] == [result.score for result in alone]
    uniform = search("gaussian", PROMPTS, policy=policy.name, total_nfe=600, steps=6, baseline=False, deterministic=True)
    assert [result.ledger.nfe for result in uniform] == [search_.ledger.nfe for search_ in run(Adaptive(policy=policy.name, pilot=0))]


def test_with_best_of_n_a_prompt_has_the_samples_of_best_of_n():
    shared = run(Adaptive(rounds=3))
    counts = [result.ledger.nfe // 6 for result in shared]
    assert sum(counts) == 100
    assert len(set(counts)) > 1
    for prompt, result, n in zip(PROMPTS, shared, counts, strict=True):
        alone = search("gaussian", prompt, policy=BestOfN(n=n), steps=6, baseline=False, deterministic=True)
        leaves = [[(node.stream, node.score("gaussian-target")) for node in one.tree.nodes if node.level == 6] for one in (result, alone)]
        assert leaves[0] == leaves[1]
        assert result.score == alone.score


def test_ledgers_add_up_and_the_total_holds():
    for total in (18, 29, 400):
        results = run(Adaptive(policy=Beam(), rounds=2), total=total, baseline=True)
        assert results.nfe == sum(result.ledger.nfe for result in results) == results.forest.to_json()["nfe"] <= total
        assert results.nfe == results.forest.spent
        assert all(result.image is not None for result in results)
        assert results.engine.rows == results.nfe + len(PROMPTS) * 6, "baselines are booked apart"
        for place, result in enumerate(results):
            granted = [entry for grants in results.forest.grants for entry in grants if entry["tree"] == place]
            assert sum(entry["spent"] for entry in granted) == result.ledger.nfe
            assert all(entry["spent"] <= entry["nfe"] for entry in granted)


def test_the_order_of_prompts_changes_no_byte():
    forwards, backwards = run(Adaptive()), run(Adaptive(), PROMPTS[::-1])
    assert trees(forwards) == trees(backwards)[::-1]


def test_a_target_saves_compute_and_stops_prompts():
    free, aimed = run(Adaptive(), total=1200), run(Adaptive(rounds=8), total=1200, target=-1.0)
    assert aimed.forest.reached == sum(result.score >= -1.0 for result in aimed)
    assert aimed.forest.reached >= sum(result.score >= -1.0 for result in free)
    for grants in aimed.forest.grants[1:]:
        for entry in grants:
            earlier = [e["best"] for round_ in aimed.forest.grants[: aimed.forest.grants.index(grants)] for e in round_ if e["tree"] == entry["tree"]]
            assert max(earlier) < -1.0
