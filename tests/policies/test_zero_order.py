"""Zero-order search: its price, the pivot's rule, the geometry of both neighbourhoods, restarts, its fit to a budget."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from fake_driver import DETERMINISTIC, STOCHASTIC, TWO_STAGE, setting
from fakes import Judge, grow
from hypothesis import given, settings
from hypothesis import strategies as st
from policy_checks import JUDGES, SOLVERS, chance, check_fill, check_price, leaves, run, sick, values
from scipy import stats

from tsdiff.plugin.conformance import PolicyConformance
from tsdiff.policies.best_of_n import BestOfN
from tsdiff.policies.zero_order import ZeroOrder
from tsdiff.treesearch.errors import UsageError
from tsdiff.treesearch.noise import Fresh, Mix, Rotate
from tsdiff.worlds.gaussian.mixture import Mixture
from tsdiff.worlds.gaussian.model import GaussianModel

searches = st.builds(
    ZeroOrder,
    neighbours=st.integers(1, 4),
    rounds=st.integers(0, 6),
    extra=st.integers(0, 3),
    neighbourhood=st.sampled_from(["spherical", "pcn"]),
    cosine=st.floats(0.0, 1.0),
    patience=st.none() | st.integers(1, 3),
)


class TestConformance(PolicyConformance):
    @pytest.fixture
    def policy(self):
        return ZeroOrder(rounds=2, neighbours=3, extra=2, patience=1)


# Cost ----------------------------------------------------------------------------------------------------------------


@settings(max_examples=18)
@given(policy=searches, where=st.sampled_from(SOLVERS), steps=st.integers(1, 6), needs=JUDGES, scope=st.sampled_from(["row", "row", "set"]))
def test_cost_is_what_is_counted(policy, where, steps, needs, scope):
    check_price(policy, where, needs, scope, steps=steps)


def test_the_price_by_hand():
    spend = ZeroOrder(rounds=5, neighbours=4).cost(setting(20)).upper
    assert (spend.nfe, spend.verifier_calls, spend.decodes) == ((1 + 5 * 4) * 20, 1 + 5 * 4, 1 + 5 * 4), "(1 + R N) S, with a kept pivot"
    assert ZeroOrder(rounds=5, neighbours=4, extra=2).cost(setting(20, TWO_STAGE)).upper.nfe == (1 + 5 * 4 + 2) * 39


# Identities ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", SOLVERS, ids="-".join)
def test_no_rounds_are_one_plain_sample(where):
    none, plain = run(ZeroOrder(rounds=0), where), run(BestOfN(n=1), where)
    assert none.latent(none.run.answer).equal(plain.latent(plain.run.answer))
    assert none.tree.ledger.nfe == plain.tree.ledger.nfe


@given(seed=st.integers(0, 99), rounds=st.integers(0, 5), more=st.integers(1, 4), neighbourhood=st.sampled_from(["spherical", "pcn"]))
@settings(max_examples=8)
def test_more_rounds_only_add_samples(seed, rounds, more, neighbourhood):
    policy = ZeroOrder(rounds=rounds, neighbourhood=neighbourhood, patience=1)
    few, many = run(policy, seed=seed), run(replace(policy, rounds=rounds + more), seed=seed)
    ragged = run(replace(policy, extra=1), seed=seed)
    assert values(leaves(few)) == values(leaves(many))[: len(leaves(few))]
    assert values(leaves(ragged))[:-1] == values(leaves(few))
    assert many.run.answer.score("judge") >= few.run.answer.score("judge")


@pytest.mark.parametrize("neighbourhood", ["spherical", "pcn"])
def test_a_cosine_of_one_stays_where_it_is(neighbourhood):
    grown = run(ZeroOrder(cosine=1.0, patience=None, neighbourhood=neighbourhood))
    assert np.ptp(values(leaves(grown))) < 1e-4
    grown = run(ZeroOrder(cosine=1.0, patience=None), ("vp", "exact"))
    assert np.ptp(values(leaves(grown))) > 0.1, "a stochastic solver's own noise is new for every sample"


def test_restarts_draw_the_first_noises_of_best_of_n():
    """Equal scores fail every round: with patience 1 every other round is random search, on the same noises as best-of-n."""
    indifferent = Judge(value=lambda candidates: candidates.x0[:, 0] * 0.0)
    grown, plain = run(ZeroOrder(rounds=4, neighbours=3, patience=1), judge=indifferent), run(BestOfN(n=7))
    recipes = [root.move.noise for root in grown.tree.roots]
    assert [type(recipe) for recipe in recipes] == [Fresh] + ([Rotate] * 3 + [Fresh] * 3) * 2
    fresh = [root for root in grown.tree.roots if isinstance(root.move.noise, Fresh)]
    for root, other in zip(fresh, plain.tree.roots, strict=True):
        assert grown.latent(root).equal(plain.latent(other))
    assert [recipe.base for recipe in recipes[7:10]] == [4] * 3, "the oldest of the new noises is the pivot"
    assert [note["restart"] for note in grown.tree.notes] == [False, True, False, True]
    assert grown.run.answer is leaves(grown)[0], "a tie keeps the oldest"
    never = run(ZeroOrder(rounds=4, neighbours=3, patience=None), judge=indifferent)
    assert {root.move.noise.base for root in never.tree.roots[1:]} == {0}


# The pivot -----------------------------------------------------------------------------------------------------------


@settings(max_examples=20)
@given(policy=searches, seed=st.integers(0, 999), where=st.sampled_from([("vp", "ddim"), ("flow", "flow-ancestral")]), nulls=st.sampled_from([0, 2, 5]))
def test_every_round_surrounds_the_pivot_that_the_scores_call_for(policy, seed, where, nulls):
    """Followed by hand, from the scores on the tree: ties, nulls, restarts."""
    grown = run(policy, where, judge=chance(nulls), seed=seed, steps=2)
    scores, roots = values(leaves(grown)), grown.tree.roots
    assert [leaf.path()[0] for leaf in leaves(grown)] == roots
    pivot, failed, drawn, at = 0, 0, 1, 1
    for size, note in zip(policy.round_sizes, grown.tree.notes, strict=True):
        places = range(at, at + size)
        recipes = [roots[place].move.noise for place in places]
        restart = policy.patience is not None and failed >= policy.patience
        if restart:
            assert recipes == [Fresh(drawn + i) for i in range(size)]
            drawn += size
        elif policy.neighbourhood == "spherical":
            assert recipes == [Rotate(pivot, policy.cosine, place) for place in places]
        else:
            assert recipes == [Mix({pivot: policy.cosine}, fresh=(place, math.sqrt(1.0 - policy.cosine**2))) for place in places]
        valued = [place for place in places if scores[place] is not None]
        best = max(valued, key=lambda place: (scores[place], -place), default=at)
        if restart or (valued and (scores[pivot] is None or scores[best] > scores[pivot])):
            pivot, failed = best, 0
        else:
            failed += 1
        assert note["pivot"] == leaves(grown)[pivot].index
        assert (note["restart"], note["score"]) == (restart, scores[pivot])
        at += size
    assert at == len(roots) == policy.num_samples
    if any(score is not None for score in scores):
        assert grown.run.answer is leaves(grown)[max(range(at), key=lambda i: (-1.0 if scores[i] is None else scores[i], -i))]


@given(seed=st.integers(0, 20), where=st.sampled_from([("vp", "ddim"), ("flow", "flow-euler")]))
@settings(max_examples=5)
def test_without_restarts_the_pivot_only_climbs(seed, where):
    grown = run(ZeroOrder(rounds=12, patience=None), where, seed=seed)
    climbed = [leaves(grown)[0].score("judge"), *(note["score"] for note in grown.tree.notes)]
    assert climbed == sorted(climbed)
    assert climbed[-1] == grown.run.answer.score("judge")


def test_null_scores_and_failed_samples_stop_nothing():
    policy = ZeroOrder(rounds=4, neighbours=3, patience=1)
    grown = run(policy, judge=Judge(value=lambda candidates: candidates.x0[:, 0] * np.nan))
    assert len(leaves(grown)) == 13
    assert grown.run.answer.level == grown.tree.schedule.last, "a sample that could not be scored is still a sample"
    failed = 0
    for seed in range(8):
        grown = run(policy, model=sick(), seed=seed)
        failed += sum(leaf.failed for leaf in leaves(grown))
        assert grown.run.answer.score("judge") is not None
        assert grown.tree.ledger.nfe <= policy.cost(setting(6, DETERMINISTIC)).upper.nfe
    assert failed > 8


@given(policy=searches, seed=st.integers(0, 20))
@settings(max_examples=10)
def test_all_but_pivot_and_best_are_released(policy, seed):
    most = []

    def watched(tree):
        steps, reply = policy.search(tree), None
        while True:
            try:
                request = steps.send(reply)
            except StopIteration as stop:
                return stop.value
            most.append(sum(node.status == "open" for node in tree.nodes))
            reply = yield request

    run(type("Watched", (), {"search": staticmethod(watched)}), judge=chance(0), seed=seed, steps=2)
    assert max(most) <= 2 + 2 * max(policy.round_sizes, default=1)


# Neighbourhoods ------------------------------------------------------------------------------------------------------

DIMENSIONS = 4_000
WIDE = {process: GaussianModel(Mixture([1.0], [(0.0,) * DIMENSIONS], [1.0]), process) for process in ("vp", "flow")}


def wandering(process, **options):
    """The noises (float64) and recipes of a search whose scores know nothing of the noise: the pivot moves at random."""
    policy = ZeroOrder(rounds=25, patience=None, **options)
    judge = chance(nulls=0, levels=10**6)
    grown = grow(policy.search, model=WIDE[process], verifiers=[judge], steps=1)
    recipes = [root.move.noise for root in grown.tree.roots]
    return [grown.latent(root).double().numpy() for root in grown.tree.roots], recipes


def cosine(a, b):
    return float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)))


@pytest.mark.parametrize("process", ["vp", "flow"])
def test_spherical_neighbours_keep_norm_and_cosine_exactly_over_many_moves(process):
    noises, recipes = wandering(process, cosine=0.95)
    bases = [recipe.base for recipe in recipes[1:]]
    assert len(set(bases)) > 3, "pivots that were rotated themselves are rotated again"
    for noise, base in zip(noises[1:], bases, strict=True):
        assert np.linalg.norm(noise) == pytest.approx(np.linalg.norm(noises[0]), rel=1e-6)
        assert cosine(noise, noises[base]) == pytest.approx(0.95, abs=1e-6)


@pytest.mark.parametrize("process", ["vp", "flow"])
def test_pcn_neighbours_stay_standard_normal_over_many_moves(process):
    """Moments and the whole law, at 5 standard errors of 4,000 numbers; the cosine is rho on average."""
    noises, recipes = wandering(process, neighbourhood="pcn", cosine=0.8)
    bases = [recipe.weights[0][0] for recipe in recipes[1:]]
    assert len(set(bases)) > 3
    for noise, base in zip(noises[1:], bases, strict=True):
        assert abs(noise.mean()) < 5.0 / math.sqrt(DIMENSIONS)
        assert abs(noise.var() - 1.0) < 5.0 * math.sqrt(2.0 / DIMENSIONS)
        assert abs(cosine(noise, noises[base]) - 0.8) < 5.0 / math.sqrt(DIMENSIONS)
    assert stats.kstest(noises[-1], "norm").pvalue > 1e-3


# Budgets and parameters ----------------------------------------------------------------------------------------------


def test_a_budget_is_filled():
    check_fill(ZeroOrder(), least=1.0)
    check_fill(ZeroOrder(neighbours=5), least=1.0)


@given(policy=searches, nfe=st.integers(0, 900), steps=st.integers(1, 30), solver=st.sampled_from([STOCHASTIC, DETERMINISTIC, TWO_STAGE]))
def test_fit_is_the_largest_that_fits(policy, nfe, steps, solver):
    where = setting(steps, solver)
    if nfe < where.sample_cost:
        with pytest.raises(UsageError, match=f"at least {where.sample_cost} NFE"):
            policy.fit(nfe, where)
        return
    fitted = policy.fit(nfe, where)
    assert fitted.num_samples == nfe // where.sample_cost
    assert fitted.extra < policy.neighbours
    assert replace(fitted, rounds=policy.rounds, extra=policy.extra) == policy, "nothing else is changed"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"neighbours": 0}, "neighbours is 0 but must be at least 1"),
        ({"rounds": -1}, "rounds is -1"),
        ({"extra": -1}, "extra is -1"),
        ({"cosine": 1.1}, "cosine is 1.1 but must be at least 0 and at most 1"),
        ({"patience": 0}, "patience is 0"),
        ({"neighbourhood": "near"}, "'spherical', 'pcn'"),
    ],
)
def test_wrong_parameters_are_refused(options, message):
    with pytest.raises(UsageError, match=message):
        ZeroOrder(**options)
