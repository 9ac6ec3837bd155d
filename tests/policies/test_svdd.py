"""SVDD: its price, the identities it obeys, who is chosen and how likely, its fit to a budget."""

from __future__ import annotations

import json
import math
from collections import Counter
from dataclasses import asdict, replace

import numpy as np
import pytest
from fake_driver import STOCHASTIC, FakeDriver, setting
from hypothesis import given, settings
from hypothesis import strategies as st
from policy_checks import check_fill

from tsdiff.plugin.conformance import PolicyConformance
from tsdiff.policies.beam import Beam
from tsdiff.policies.best_of_n import BestOfN
from tsdiff.policies.svdd import SVDD
from tsdiff.treesearch.errors import BudgetExhausted, UsageError
from tsdiff.treesearch.parameters import build
from tsdiff.treesearch.requests import Denoise, Score

few = settings(max_examples=40)
chains = st.builds(SVDD, candidates=st.integers(1, 5), temperature=st.just(0.0) | st.floats(0.01, 5.0))


class TestConformance(PolicyConformance):
    examples = 6

    @pytest.fixture
    def policy(self):
        return SVDD(candidates=3, temperature=0.5)


def scored(driver):
    """The candidates of each step."""
    return [request.group for request in driver.requests if isinstance(request, Score)][:-1]


def chosen(driver):
    """What each step but the first started from."""
    return [request.group[0] for request in driver.requests if isinstance(request, Denoise)][1:]


# Cost ---------------------------------------------------------------------------------------------------------------


@few
@given(policy=chains, steps=st.integers(1, 16), others=st.integers(0, 1), stages=st.integers(1, 2))
def test_cost_is_what_is_counted(policy, steps, others, stages):
    where = setting(steps, replace(STOCHASTIC, stages=stages), others)
    driver = FakeDriver(where)
    answer = driver.run(policy)
    assert policy.cost(where).exact
    assert policy.cost(where).upper == driver.spend
    assert sum(node.nfe for node in driver.tree.nodes) == driver.nfe
    assert answer is driver.tree.best() is driver.leaves()[0]


def test_the_price_by_hand():
    spend = SVDD().cost(setting(50)).upper
    assert spend.nfe == 1 + 20 * 49, "1 + M (S - 1): the winner's evaluation is the next step's"
    assert spend.verifier_calls == spend.decodes == 20 * 49 + 1, "every candidate, and the sample"
    assert SVDD().cost(setting(1)).upper.nfe == 1


# Identities ---------------------------------------------------------------------------------------------------------


@few
@given(seed=st.integers(0, 99), temperature=st.just(0.0) | st.floats(0.01, 5.0))
def test_one_candidate_is_one_plain_sample(seed, temperature):
    chain, plain = FakeDriver(setting(9), seed=seed), FakeDriver(setting(9), seed=seed)
    assert chain.run(SVDD(candidates=1, temperature=temperature)).score("value") == plain.run(BestOfN(n=1)).score("value")
    assert chain.nfe == plain.nfe


@few
@given(seed=st.integers(0, 99), candidates=st.integers(1, 5), steps=st.integers(2, 9))
def test_the_hard_choice_is_a_beam_of_one_that_branches_at_every_step(seed, candidates, steps):
    chain, beam = FakeDriver(setting(steps), seed=seed), FakeDriver(setting(steps), seed=seed)
    greedy = Beam(width=1, branch=candidates, levels=tuple(level / steps for level in range(1, steps)), jump=1.0 / steps, branch_by="step")
    assert chain.run(SVDD(candidates=candidates)).score("value") == beam.run(greedy).score("value")
    assert chain.spend == beam.spend


@few
@given(seed=st.integers(0, 99))
def test_the_soft_choice_freezes_to_the_hard_one(seed):
    cold, hard = FakeDriver(setting(9), seed=seed), FakeDriver(setting(9), seed=seed)
    assert cold.run(SVDD(candidates=4, temperature=1e-9)).score("value") == hard.run(SVDD(candidates=4)).score("value")


# Who is chosen ------------------------------------------------------------------------------------------------------


@few
@given(seed=st.integers(0, 99), candidates=st.integers(2, 6))
def test_the_hard_choice_is_the_best(seed, candidates):
    driver = FakeDriver(setting(9), seed=seed, value=lambda latent: float(np.round(latent.sum())))  # with ties
    driver.run(SVDD(candidates=candidates))
    for children, winner in zip(scored(driver), chosen(driver), strict=True):
        assert winner is max(children, key=lambda node: (node.score("value"), -node.index))


@pytest.mark.parametrize("temperature", [0.1, 0.4])
def test_the_soft_choice_is_as_likely_as_its_value_says(temperature):
    """Sum over steps of what was chosen minus its probability: a martingale, so its variance is known."""
    excess, variance, mistaken = 0.0, 0.0, 0.0
    for seed in range(100):
        driver = FakeDriver(setting(5), seed=seed)
        driver.run(SVDD(candidates=4, temperature=temperature))
        for children, winner in zip(scored(driver), chosen(driver), strict=True):
            values = np.array([node.score("value") for node in children])
            probability = np.exp((values - values.max()) / temperature)
            probability /= probability.sum()
            excess += winner.score("value") - probability @ values
            variance += probability @ values**2 - (probability @ values) ** 2
            mistaken += winner.score("value") - values.mean()
    assert abs(excess) < 4.0 * math.sqrt(variance)
    assert abs(mistaken) > 8.0 * math.sqrt(variance), "far from choosing blindly"


@few
@given(policy=chains, seed=st.integers(0, 99))
def test_null_scores_are_chosen_only_where_there_is_no_other(policy, seed):
    calls = Counter()

    def value(latent):
        calls["n"] += 1
        return 1.0 if calls["n"] % 3 == 0 else None

    driver = FakeDriver(setting(9), seed=seed, value=value)
    driver.run(policy)
    for children, winner in zip(scored(driver), chosen(driver), strict=True):
        if any(node.score("value") is not None for node in children):
            assert winner.score("value") is not None
        else:
            assert winner is children[0]


@few
@given(policy=chains, seed=st.integers(0, 40))
def test_failed_candidates_are_never_chosen(policy, seed):
    driver = FakeDriver(setting(9), fails=lambda node: node.move.kind == "denoise" and (node.index * 7 + seed) % 4 == 0)
    answer = driver.run(policy)
    assert answer is driver.tree.best()
    assert not any(node.failed for node in chosen(driver))
    assert driver.nfe <= policy.cost(setting(9)).upper.nfe


def test_all_failing_ends_without_an_answer():
    driver = FakeDriver(setting(9), fails=lambda node: node.move.kind == "denoise")
    assert driver.run(SVDD()) is None


@few
@given(policy=chains)
def test_what_is_not_chosen_is_released(policy):
    driver = FakeDriver(setting(9))
    answer = driver.run(policy)  # the driver refuses released nodes
    assert [node for node in driver.tree.nodes if node.status == "open"] == [answer]


# Budgets, needs and parameters --------------------------------------------------------------------------------------


@few
@given(policy=chains, steps=st.integers(1, 24), nfe=st.integers(0, 500))
def test_fit_is_the_largest_that_fits(policy, steps, nfe):
    where = setting(steps)
    if nfe < where.sample_cost:
        with pytest.raises(UsageError, match=f"needs {where.sample_cost} NFE"):
            policy.fit(nfe, where)
        return
    fitted = policy.fit(nfe, where)
    more = replace(fitted, candidates=fitted.candidates + 1)
    assert fitted.cost(where).upper.nfe <= nfe
    assert steps == 1 or more.cost(where).upper.nfe > nfe, "with a single step there is nothing to choose"
    assert replace(fitted, candidates=policy.candidates) == policy, "nothing else is changed"


def test_fit_fills_budgets():
    check_fill(SVDD())


@few
@given(limit=st.integers(9, 60))
def test_a_cap_draws_as_many_candidates_as_can_be_finished(limit):
    driver = FakeDriver(setting(9), limit=limit)
    driver.run(SVDD(candidates=5))
    assert driver.nfe == 1 + 8 * min(5, (limit - 1) // 8)
    assert driver.leaves()


def test_a_cap_below_one_sample_is_passed_on():
    with pytest.raises(BudgetExhausted):
        FakeDriver(setting(9), limit=8).run(SVDD())


def test_only_choices_need_steps_that_differ_and_only_probabilities_scores_that_compare():
    assert SVDD().needs == {"stochastic"}
    assert SVDD(temperature=0.1).needs == {"stochastic", "absolute"}
    assert SVDD(candidates=1).needs == frozenset()


@pytest.mark.parametrize(
    ("options", "message"),
    [({"candidates": 0}, "candidates is 0 but must be at least 1"), ({"temperature": -0.1}, "temperature is -0.1"), ({"temperature": math.inf}, "temperature is inf")],
)
def test_wrong_parameters_are_refused(options, message):
    with pytest.raises(UsageError, match=message):
        SVDD(**options)


@few
@given(policy=chains)
def test_options_survive_json_and_the_command_line(policy):
    options = json.loads(json.dumps(asdict(policy), allow_nan=False))
    assert build(SVDD, options) == policy
    assert build(SVDD, {key: str(value) for key, value in options.items()}) == policy
