"""Budgets: never exceeded, always a finished sample, refusals change nothing, and what the engine finishes with."""

from __future__ import annotations

import time

import pytest
import torch
from fakes import PROMPT, Hooked, Judge, RandomSearch, check_books, grow, sample, snapshot
from hypothesis import given, settings
from hypothesis import strategies as st

from tsdiff.policies.beam import Beam
from tsdiff.policies.best_of_n import BestOfN
from tsdiff.treesearch.engine import Limits
from tsdiff.treesearch.errors import BudgetExhausted, SearchFailed, UsageError
from tsdiff.treesearch.requests import Denoise, Draw, Gather, Release, Renoise, Score
from tsdiff.treesearch.search import execute, prepare

LAST = 6


@settings(max_examples=120)
@given(seed=st.integers(0, 10**6), extra=st.integers(0, 40), solver=st.sampled_from(["ddim", "ddim(eta=1)", "dpm++2m"]), release=st.sampled_from([0.0, 0.2, 0.5]))
def test_a_budget_is_never_exceeded_and_there_is_always_an_answer(seed, extra, solver, release):
    search = RandomSearch(seed, rounds=12, catch=0.6, release=release)
    grown = grow(search, nfe=LAST + extra, solver=solver, steps=LAST)
    check_books(grown)
    assert grown.tree.ledger.nfe <= LAST + extra
    answer = grown.run.answer
    assert answer.level == LAST
    assert not answer.draft
    assert answer.index in grown.latents[0]


@settings(max_examples=40)
@given(seed=st.integers(0, 10**6), extra=st.integers(0, 40))
def test_two_stage_budgets_hold_too(seed, extra):
    search = RandomSearch(seed, rounds=12, solvers=(("euler", False), ("euler-ancestral", True)))
    sample_cost = 2 * LAST - 1
    grown = grow(search, model=Hooked("ve"), nfe=sample_cost + extra, solver="heun", steps=LAST)
    check_books(grown)
    assert grown.run.answer.level == LAST


@pytest.mark.parametrize("nfe", [LAST, LAST + 1, 20, 47])
@pytest.mark.parametrize("policy", [BestOfN(n=12), Beam(), Beam(value="final"), Beam(value="lookahead")], ids=["best-of-n", "x0", "final", "lookahead"])
def test_policies_live_within_any_budget(policy, nfe):
    model = Hooked()
    (result,) = execute(prepare(model, PROMPT, policy=policy, verifiers=[Judge()], nfe=nfe, steps=LAST, baseline=False))
    assert result.ledger.nfe <= nfe
    assert result.score is not None
    assert result.truncated is not None or isinstance(policy, BestOfN)
    if isinstance(policy, BestOfN):
        assert result.ledger.nfe == nfe // LAST * LAST


def test_the_price_and_what_is_left_are_told():
    def search(tree):
        roots = yield Draw(2)
        with pytest.raises(BudgetExhausted) as refused:
            yield Denoise(roots, to=LAST - 1)
        assert (refused.value.price, refused.value.remaining) == (2 * (LAST - 1), 2 * LAST - 3)
        return (yield from sample_of(tree, roots[0]))

    grow(search, nfe=2 * LAST - 3)


def sample_of(tree, node):
    leaves = yield Denoise(node, to=LAST)
    yield Score(leaves)
    return tree.best()


def test_a_request_is_granted_up_to_the_last_evaluation():
    """Two to level 4 cost 8 and one completion 2: 10 is enough, 9 is not."""

    def search(tree):
        roots = yield Draw(2)
        try:
            nodes = yield Denoise(roots, to=4)
        except BudgetExhausted:
            return (yield from sample_of(tree, roots[0]))
        tree.note(granted=True)
        return (yield from sample_of(tree, nodes[0]))

    assert grow(search, nfe=10).tree.notes == [{"granted": True}]
    assert grow(search, nfe=9).tree.notes == []


def test_a_kept_prediction_makes_the_completion_cheaper():
    """Scoring a node at level 4 costs its prediction, which its completion needs anyway."""

    def search(tree):
        nodes = yield Denoise((yield Draw()), to=4)
        yield Score(nodes)
        return (yield from sample_of(tree, nodes[0]))

    grown = grow(search, nfe=LAST)
    assert grown.run.truncated is None
    assert grown.tree.budget.remaining == 0


def test_a_gather_is_granted_whole_or_not_at_all():
    def search(tree):
        roots = yield Draw(2)
        before = snapshot(tree)
        with pytest.raises(BudgetExhausted):
            yield Gather(Denoise(roots[0], to=2), Draw(3), Denoise(roots[1], to=LAST))
        assert snapshot(tree) == before
        return (yield from sample_of(tree, roots[0]))

    check_books(grow(search, nfe=LAST + 1))


def test_releasing_the_last_hope_is_refused():
    def search(tree):
        nodes = yield Denoise((yield Draw()), to=3)
        with pytest.raises(BudgetExhausted):
            yield Release([*nodes, tree.nodes[0]])
        yield Release(tree.nodes[0])
        return (yield from sample_of(tree, nodes[0]))

    check_books(grow(search, nfe=LAST))


def test_after_a_finished_sample_the_rest_may_be_spent():
    def search(tree):
        roots = yield Draw(2)
        yield Denoise(roots[0], to=LAST)
        yield Denoise(roots[1], to=4)
        return None

    grown = grow(search, nfe=LAST + 4)
    assert grown.tree.budget.remaining == 0
    assert grown.run.answer.path()[0] is grown.nodes[0]
    assert grown.run.answer.score("judge") is not None


def test_a_finished_sample_counts_when_it_was_released():
    def search(tree):
        roots = yield Draw(2)
        leaves = yield Denoise(roots[0], to=LAST)
        yield Score(leaves)
        yield Release(leaves)
        yield Denoise(roots[1], to=4)
        return tree.best()

    grown = grow(search, nfe=LAST + 4)
    assert grown.tree.budget.remaining == 0
    assert grown.run.truncated is None


# What the engine finishes --------------------------------------------------------------------------------------------


def forever(tree):
    """A policy that never stops asking for the same two nodes' growth."""
    roots = yield Draw(3)
    while True:
        roots = yield Renoise((yield Denoise(roots, to=4)), to=2)


def test_uncaught_the_engine_finishes_and_says_so():
    grown = grow(forever, nfe=60)
    assert grown.run.answer.level == LAST
    assert "60" in grown.run.truncated
    check_books(grown)


def test_the_best_finished_sample_is_the_answer():
    def search(tree):
        leaves = yield Denoise((yield Draw(3)), to=LAST)
        yield Score(leaves[:2])
        yield Denoise((yield Draw(9)), to=3)
        raise AssertionError("this was not to be granted")

    grown = grow(search, nfe=3 * LAST + 5)
    leaves = [node for node in grown.nodes if node.level == LAST]
    assert grown.run.answer is max(leaves, key=lambda node: node.score("judge"))
    assert all(leaf.score("judge") is not None for leaf in leaves)


@pytest.mark.parametrize("better", [0, 1])
def test_the_highest_valued_of_the_most_advanced_valued_level_is_finished(better):
    def value(candidates):
        return torch.tensor([float(node == wanted[0]) if level == 3 else 100.0 for node, level in zip(candidates.node_ids, candidates.levels, strict=True)])

    wanted = []

    def search(tree):
        roots = yield Draw(3)
        nodes = yield Denoise(roots[:2], to=3)
        wanted.append(f"{nodes[better].id:032x}")
        yield Score([*nodes, roots[2]])
        deeper = yield Denoise(roots[2], to=4)
        assert deeper
        yield Denoise(roots[2], to=LAST, copies=50)

    grown = grow(search, nfe=40, eta=1.0, verifiers=[Judge(value=value)])
    assert grown.run.answer.path()[1].index == 3 + better


def test_equal_values_go_to_the_oldest():
    def search(tree):
        nodes = yield Denoise((yield Draw(3)), to=3)
        yield Score(nodes[::-1])
        return None

    def leaves(tree):
        ends = yield Denoise((yield Draw(3)), to=LAST)
        yield Score(ends[::-1])
        return tree.best()

    even = Judge(value=lambda candidates: torch.zeros(len(candidates)))
    assert grow(search, verifiers=[even]).run.answer.path()[0].index == 0
    assert grow(leaves, verifiers=[even]).run.answer.index == 3


def test_a_look_ahead_is_no_finished_sample():
    """After 2 + 4 NFE there is a draft at the last level, but completing a sample still costs 3 (one prediction is kept)."""

    def search(tree):
        nodes = yield Denoise((yield Draw()), to=2)
        yield Score(nodes, at="lookahead", num_steps=4)
        with pytest.raises(BudgetExhausted):
            yield Score((yield Renoise(nodes, to=0)))
        return (yield from sample_of(tree, nodes[0]))

    grown = grow(search, nfe=2 + 4 + 3)
    check_books(grown)
    assert grown.tree.budget.remaining == 0


def test_what_does_not_fit_is_passed_over():
    """The valued node is at level 1 and too dear; the node at level 5 has no value but fits."""

    def search(tree):
        roots = yield Draw(2)
        yield Denoise(roots[0], to=5)
        low = yield Denoise(roots[1], to=1)
        yield Score(low)
        yield Denoise(low, to=LAST)

    grown = grow(search, nfe=5 + 2 + 1)
    assert [node.level for node in grown.run.answer.path()] == [0, 5, LAST]


def test_without_values_the_most_advanced_and_oldest_is_finished():
    def search(tree):
        roots = yield Draw(3)
        yield Denoise(roots, to=[2, 4, 4])
        return None

    grown = grow(search, nfe=20)
    assert grown.run.answer.path()[0] is grown.nodes[1]


@pytest.mark.parametrize("search", [lambda tree: iter_nothing(), lambda tree: release_all(tree), lambda tree: release_a_leaf(tree)], ids=["nothing", "released", "leaf"])
@pytest.mark.parametrize("nfe", [None, 2 * LAST])
def test_a_policy_that_leaves_nothing_still_gets_a_sample(search, nfe):
    grown = grow(search, nfe=nfe)
    check_books(grown)
    assert grown.run.answer.level == LAST
    assert grown.run.answer.score("judge") is not None


def iter_nothing():
    yield from ()


def release_all(tree):
    nodes = yield Draw(2)
    yield Release([*nodes, *(yield Denoise(nodes[0], to=2))])


def release_a_leaf(tree):
    leaves = yield Denoise((yield Draw()), to=LAST)
    yield Release(leaves)


# Bounds --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("solver", "process", "smallest"), [("ddim", "vp", 7), ("heun", "ve", 13)])
def test_less_than_a_sample_is_a_usage_error(solver, process, smallest):
    with pytest.raises(UsageError, match=f"smallest budget is {smallest}"):
        prepare(Hooked(process), PROMPT, verifiers=[Judge()], steps=7, solver=solver, nfe=smallest - 1)
    plan = prepare(Hooked(process), PROMPT, verifiers=[Judge()], steps=7, solver=solver, nfe=smallest, policy="best-of-n")
    assert execute(plan)[0].ledger.nfe == smallest


def test_a_named_policy_fills_the_budget():
    for policy in ("beam", "best-of-n"):
        plan = prepare(Hooked(), PROMPT, verifiers=[Judge()], policy=policy, nfe=500, steps=10)
        assert 400 < plan.cost.upper.nfe <= 500
        (result,) = execute(plan)
        assert result.truncated is None
        assert result.ledger.nfe == plan.cost.upper.nfe


def test_seconds_stop_granting_but_finish_what_is_there():
    slow = Hooked()
    slow.fault = lambda latents, timesteps: time.sleep(0.01)
    grown = grow(forever, sample, model=slow, limits=Limits(seconds=0.05))
    check_books(grown)
    assert grown.runs[0].answer.level == LAST
    assert "seconds" in grown.runs[0].truncated
    assert grown.runs[0].tree.budget.limit is None


def test_after_the_seconds_only_free_requests_are_granted():
    def search(tree):
        roots = yield Draw(2)
        with pytest.raises(BudgetExhausted) as refused:
            yield Denoise(roots, to=2)
        assert refused.value.remaining is None
        yield Renoise(roots, to=0, copies=2)
        tree.note(free=True)
        raise refused.value

    grown = grow(search, limits=Limits(seconds=1e-9))
    assert grown.tree.notes == [{"free": True}]
    assert grown.run.answer.level == LAST


def test_a_failed_completion_with_nothing_left_ends_the_search():
    broken = Hooked()
    broken.spoil = lambda latents, timesteps, outputs: outputs * float("nan") if broken.seen > 4 else outputs
    grown = grow(sample, model=broken, nfe=LAST, ok=False)
    check_books(grown)
    assert isinstance(grown.run.error, SearchFailed)
    assert "nodes [1" in str(grown.run.error)
