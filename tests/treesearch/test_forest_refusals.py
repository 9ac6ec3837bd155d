"""Many trees under one budget: what is refused, what fails and takes nobody with it, and what is said beforehand."""

from __future__ import annotations

import json

import pytest
from fakes import Hooked, Judge
from forests import PROMPTS, STEPS, Ask, Script, once, shared
from hypothesis import given
from hypothesis import strategies as st

from tsdiff.policies import BestOfN
from tsdiff.treesearch.engine import Limits
from tsdiff.treesearch.errors import BudgetExhausted, UsageError
from tsdiff.treesearch.protocols import Condition, Grant, Outcome
from tsdiff.treesearch.requests import Denoise, Draw, Score
from tsdiff.treesearch.search import prepare, search

# Refusals and failures ---------------------------------------------------------------------------------------------


def test_grants_that_leave_too_little_for_first_samples_are_refused_whole():
    def greedy(forest):
        first, *others = forest.trees
        with pytest.raises(BudgetExhausted, match="the grants come to 81 NFE, but 80 of 90 can be granted") as refused:
            yield [Grant(first, BestOfN(n=16), 81)]
        assert (refused.value.price, refused.value.remaining) == (81, 80)
        (outcome,) = yield [Grant(first, BestOfN(n=16), 80)]
        assert outcome.nfe == 80
        with pytest.raises(BudgetExhausted):
            yield [Grant(first, BestOfN(n=1), 5)]
        yield [Grant(tree, BestOfN(n=1), 5) for tree in others]
        assert forest.budget.remaining == 0

    assert [result.ledger.nfe for result in shared(greedy)] == [80, 5, 5]


def test_a_refusal_that_is_not_caught_ends_the_allocator_and_nobody_goes_without():
    def greedy(forest):
        yield [Grant(forest.trees[0], BestOfN(n=2), 10)]
        yield [Grant(forest.trees[0], BestOfN(n=2), 1000)]

    results = shared(greedy)
    assert [result.ledger.nfe for result in results] == [10, 5, 5]
    assert "1000 NFE" in results.forest.truncated


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda forest: [], "at least one Grant"),
        (lambda forest: None, "at least one Grant"),
        (lambda forest: [forest.trees[0]], "at least one Grant"),
        (lambda forest: [Grant(forest.trees[0], BestOfN(), 4)], "needs at least 5"),
        (lambda forest: [Grant(forest.trees[0], BestOfN(), 10), Grant(forest.trees[0], BestOfN(), 10)], "twice at once"),
        (lambda forest: [Grant(None, BestOfN(), 10)], "not a tree of this forest"),
    ],
)
def test_wrong_grants_are_told_to_the_allocator(wrong, message):
    def allocate(forest):
        with pytest.raises(UsageError, match=message):
            yield wrong(forest)
        yield [Grant(tree, BestOfN(n=1), 5) for tree in forest.trees]

    assert not shared(allocate).failures
    failures = shared(lambda forest: iter_once(wrong(forest))).failures
    assert len(failures) == 3
    assert all(message in failure.message for failure in failures)


def iter_once(grants):
    yield grants


def test_a_search_without_a_sample_keeps_what_one_costs():
    def draws(tree):
        yield Draw(2)

    def allocate(forest):
        first, *others = forest.trees
        (outcome,) = yield [Grant(first, Ask(draws), 30)]
        assert (outcome.nfe, outcome.scores) == (0, ())
        with pytest.raises(BudgetExhausted, match="10 are kept"):
            yield [Grant(others[0], BestOfN(n=17), 81)]
        yield [Grant(others[0], BestOfN(n=16), 80)]
        with pytest.raises(UsageError, match="needs at least 5"):
            yield [Grant(first, Ask(draws), 4)]

    assert [result.ledger.nfe for result in shared(allocate)] == [5, 80, 5]


def test_an_allocators_own_error_ends_its_forest():
    def broken(forest):
        yield [Grant(forest.trees[0], BestOfN(n=1), 5)]
        raise ZeroDivisionError("an allocator's bug")

    failures = shared(broken).failures
    assert [type(failure.error) for failure in failures] == [ZeroDivisionError] * 3
    assert all("generator of lists of grants" in failure.message for failure in shared(lambda forest: 3).failures)


def test_notes_of_allocators_are_strict_json():
    def note(forest):
        with pytest.raises(UsageError, match="strict JSON"):
            forest.note(best=float("nan"))
        forest.note(best=1.0)
        yield [Grant(tree, BestOfN(n=1), 5) for tree in forest.trees]

    assert shared(note).forest.notes == [{"best": 1.0}]


def test_a_search_that_fails_is_reported_and_left_alone():
    def bug(tree):
        yield Draw()
        if "(0, 0)" in tree.condition.prompt:
            raise RuntimeError("a policy's bug")
        (leaf,) = yield Denoise(tree.nodes, to=tree.schedule.last)
        yield Score(leaf)
        return leaf

    def allocate(forest):
        outcomes = yield [Grant(tree, Ask(bug), 20) for tree in forest.trees]
        assert [outcome.failed for outcome in outcomes] == [False, True, False]
        (again,) = yield [Grant(forest.trees[1], BestOfN(n=2), 10)]
        assert again == Outcome(0, (), failed=True)
        yield [Grant(tree, BestOfN(n=5), 25) for tree in forest.trees]

    results = shared(allocate, total=70)
    assert [result.prompt for result in results] == [PROMPTS[0], PROMPTS[2]]
    assert [failure.prompt for failure in results.failures] == [PROMPTS[1]]
    assert results.nfe == 60


def test_a_search_that_fails_before_it_starts_is_reported_too():
    class Mute(Hooked):
        def encode(self, conditions, *, guided):
            if conditions[0].prompt == PROMPTS[0]:
                raise RuntimeError("cannot encode")
            return super().encode(conditions, guided=guided)

    def allocate(forest):
        outcomes = yield [Grant(tree, BestOfN(n=1), 5) for tree in forest.trees]
        assert [(outcome.failed, outcome.nfe) for outcome in outcomes] == [(True, 0), (False, 5), (False, 5)]

    results = shared(allocate, model=Mute())
    assert [failure.message for failure in results.failures] == ["cannot encode"]
    assert len(results) == 2


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        (Ask(lambda tree: 3), "policy ask: search gave 3"),
        (Ask(lambda tree: iter_once(Draw(0.5))), "whole number"),
        (Ask(lambda tree: iter_once(3)), "policy ask yielded 3"),
    ],
)
def test_a_policys_mistakes_are_its_own(policy, message):
    (failure,) = shared(once_only_first(policy)).failures
    assert message in failure.message


def once_only_first(policy):
    def allocate(forest):
        yield [Grant(forest.trees[0], policy, 20)]

    return allocate


def test_a_wrong_answer_of_a_granted_policy_is_refused():
    def root(tree):
        (node,) = yield Draw()
        return node

    def allocate(forest):
        yield [Grant(tree, BestOfN(n=1), 5) for tree in forest.trees]
        yield [Grant(forest.trees[0], Ask(root), 5)]

    (failure,) = shared(allocate).failures
    assert "return a finished node" in failure.message


# Planning and files --------------------------------------------------------------------------------------------------

USAGE = {
    "both budgets": ("give one", {"policy": "beam", "nfe": 100, "total_nfe": 300}),
    "allocator with nfe": ("nfe=100 for each of 3 is total_nfe=300", {"policy": once(BestOfN(), 10), "nfe": 100}),
    "allocator without": ("at least 15", {"policy": once(BestOfN(), 10)}),
    "too small": ("the smallest total is 15", {"policy": once(BestOfN(), 10), "total_nfe": 14}),
    "too small for a policy": ("the smallest total is 15", {"policy": "best-of-n", "total_nfe": 14}),
    "too small for this policy": (r"total_nfe=15 is 5 for each of 3 searches", {"policy": "beam", "total_nfe": 15}),
    "no number": ("whole number", {"policy": "beam", "total_nfe": 99.5}),
    "target of a policy": ("spends its budget whatever it finds", {"policy": "beam", "target": 0.5}),
    "target": ("finite number", {"policy": once(BestOfN(), 10), "total_nfe": 90, "target": float("nan")}),
    "needs": ("deterministic", {"policy": Script(once(BestOfN(), 10).allocate, needs=frozenset({"stochastic"})), "total_nfe": 90, "eta": 0.0}),
}


@pytest.mark.parametrize("case", USAGE)
def test_usage_errors_come_before_weights_and_say_what_to_do(case):
    message, options = USAGE[case]
    with pytest.raises(UsageError, match=message):
        prepare(Hooked(), PROMPTS, verifiers=Judge(), **({"steps": STEPS, "eta": 1.0} | options))


@given(total=st.integers(15, 400))
def test_with_a_policy_a_total_is_an_equal_budget_for_each(total):
    plan = prepare(Hooked(), PROMPTS, policy="best-of-n", verifiers=Judge(), steps=STEPS, total_nfe=total)
    assert plan.nfe == total // 3
    assert plan.policy == BestOfN(n=total // 3 // STEPS)
    assert plan.to_json()["total_nfe"] == total
    assert plan.nfe_upper <= total + 3 * STEPS


def test_the_plan_of_an_allocator_is_the_total():
    plan = prepare(Hooked(), PROMPTS, policy=once(BestOfN(), 10), verifiers=Judge(), steps=STEPS, total_nfe=99, target=0)
    assert plan.nfe_upper == 99 + 3 * STEPS
    assert plan.nfe is None
    assert (plan.to_json()["total_nfe"], plan.to_json()["target"]) == (99, 0)


def test_the_index_tells_how_the_budget_was_shared(tmp_path):
    results = shared(once(BestOfN(n=2), 12), out=tmp_path, target=5.0)
    index = json.loads((results.path / "index.json").read_text())
    assert index["forest"] == results.forest.to_json()
    assert index["forest"]["grants"] == [[{"tree": i, "policy": "best-of-n", "nfe": 12, "spent": 10, "samples": 2, "best": result.score, "failed": False} for i, result in enumerate(results)]]
    assert (index["forest"]["total_nfe"], index["forest"]["nfe"], index["forest"]["reached"]) == (90, 30, 0)
    assert json.loads((shared(once(BestOfN(n=1), 5), out=tmp_path).path / "index.json").read_text())["forest"]["target"] is None


def test_prompts_and_seeds_are_trees_of_one_forest():
    results = shared(once(BestOfN(n=1), 5), seed=[0, 1])
    assert len(results.forest.trees) == 6
    assert [(result.prompt, result.seed) for result in results] == [(prompt, seed) for prompt in PROMPTS for seed in (0, 1)]


def test_one_prompt_gives_one_result():
    result = search(Hooked(), Condition(PROMPTS[0]), policy=once(BestOfN(n=2), 10), verifier=Judge(), steps=STEPS, total_nfe=20)
    assert result.ledger.nfe == 10
    assert Limits().deterministic is False
