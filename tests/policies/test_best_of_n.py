"""Best-of-N: its answer, its price, its fit to a budget."""

from __future__ import annotations

import pytest
from fake_driver import DETERMINISTIC, STOCHASTIC, TWO_STAGE, FakeDriver, setting
from hypothesis import given, settings
from hypothesis import strategies as st
from policy_checks import JUDGES, SOLVERS, check_fill, check_price, leaves, run, sick

from tsdiff.policies import BestOfN
from tsdiff.treesearch.errors import BudgetExhausted, UsageError
from tsdiff.treesearch.parameters import build

solvers = st.sampled_from([STOCHASTIC, DETERMINISTIC, TWO_STAGE])


@given(n=st.integers(1, 12), steps=st.integers(1, 30), solver=solvers, others=st.integers(0, 2), media=st.booleans(), images=st.booleans())
def test_cost_is_what_is_counted(n, steps, solver, others, media, images):
    where = setting(steps, solver, others, frozenset({"images"} if images else {"x0"}), media)
    driver = FakeDriver(where)
    policy = BestOfN(n=n)
    answer = driver.run(policy)
    assert policy.cost(where).exact
    assert policy.cost(where).upper == driver.spend
    assert sum(node.nfe for node in driver.tree.nodes) == driver.nfe
    assert answer is max(driver.leaves(), key=lambda leaf: (leaf.score("value"), -leaf.index))


@settings(max_examples=20)
@given(n=st.integers(1, 5), where=st.sampled_from(SOLVERS), steps=st.integers(1, 6), needs=JUDGES, scope=st.sampled_from(["row", "set"]))
def test_the_engine_counts_the_same(n, where, steps, needs, scope):
    check_price(BestOfN(n=n), where, needs, scope, steps=steps)


def test_the_price_of_one_sample_is_one_evaluation_a_step():
    assert BestOfN(n=3).cost(setting(20)).upper.nfe == 3 * 20
    assert BestOfN(n=3).cost(setting(20, TWO_STAGE)).upper.nfe == 3 * (2 * 20 - 1), "the corrector at sigma 0 is omitted"


@given(n=st.integers(1, 8), more=st.integers(1, 8))
def test_more_samples_never_make_the_answer_worse(n, more):
    few, many = FakeDriver(setting(6), seed=n), FakeDriver(setting(6), seed=n)
    worse, better = few.run(BestOfN(n=n)), many.run(BestOfN(n=n + more))
    assert better.score("value") >= worse.score("value")
    assert [leaf.score("value") for leaf in few.leaves()] == [leaf.score("value") for leaf in many.leaves()][:n]


@given(nfe=st.integers(0, 300), steps=st.integers(1, 30), solver=solvers)
def test_fit_is_the_largest_that_fits(nfe, steps, solver):
    where = setting(steps, solver)
    if nfe < where.sample_cost:
        with pytest.raises(UsageError, match=f"at least {where.sample_cost} NFE"):
            BestOfN().fit(nfe, where)
        return
    fitted = BestOfN().fit(nfe, where)
    assert fitted.cost(where).upper.nfe <= nfe < BestOfN(n=fitted.n + 1).cost(where).upper.nfe


def test_a_budget_is_filled():
    check_fill(BestOfN(), least=1.0)


def test_a_cap_below_n_samples_yields_the_samples_it_pays_for():
    driver = FakeDriver(setting(10), limit=35)
    answer = driver.run(BestOfN(n=8))
    assert driver.nfe == 30
    assert len(driver.leaves()) == 3
    assert answer in driver.leaves()


def test_a_cap_below_one_sample_is_passed_on():
    with pytest.raises(BudgetExhausted):
        FakeDriver(setting(10), limit=9).run(BestOfN(n=8))


def test_ties_go_to_the_oldest_and_null_scores_never_win():
    driver = FakeDriver(setting(5), value=lambda latent: 1.0)
    assert driver.run(BestOfN(n=4)) is driver.leaves()[0]
    driver = FakeDriver(setting(5), value=lambda latent: None)
    assert driver.run(BestOfN(n=4)) is None


def test_failed_samples_never_win_and_keep_their_roots():
    failed = 0
    for seed in range(6):
        grown = run(BestOfN(n=6), model=sick(), seed=seed)
        failed += sum(leaf.failed for leaf in leaves(grown))
        scored = [leaf for leaf in leaves(grown) if not leaf.failed]
        assert grown.run.answer is max(scored, key=lambda leaf: (leaf.score("judge"), -leaf.index))
    assert failed > 6
    driver = FakeDriver(setting(6), fails=lambda node: node.index in (5, 6))
    driver.run(BestOfN(n=4))
    best = driver.tree.best().parent
    statuses = ["open" if root.index in (1, 2) or root is best else "closed" for root in driver.tree.roots]
    assert [node.status for node in driver.tree.roots] == statuses, "a root whose sample failed can be tried again, and the answer's path stays"
    assert statuses.count("closed") == 1


def test_wrong_parameters_are_refused():
    with pytest.raises(UsageError, match="n is 0 but must be at least 1"):
        BestOfN(n=0)
    assert build(BestOfN, {"n": "16"}) == BestOfN(n=16)
