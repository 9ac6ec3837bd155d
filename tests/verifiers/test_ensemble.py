"""Ensembles: the mathematics of every rule, what becomes of failed scores, and what the engine makes of them."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from fakes import PROMPT, Hooked, Judge, Jury, closeness
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.stats import rankdata

from tsdiff.plugin.conformance import ExampleCandidates, VerifierConformance
from tsdiff.policies.best_of_n import BestOfN
from tsdiff.policies.dts import DTS
from tsdiff.policies.mcts import MCTS
from tsdiff.policies.smc import SMC
from tsdiff.policies.svdd import SVDD
from tsdiff.treesearch import registry
from tsdiff.treesearch.errors import TsdiffWarning, UsageError
from tsdiff.treesearch.protocols import Scores
from tsdiff.treesearch.references import resolve_verifier
from tsdiff.treesearch.registry import split_elements, split_options
from tsdiff.treesearch.search import execute, prepare, search
from tsdiff.verifiers.ensemble import Ensemble
from tsdiff.verifiers.ensemble_rules import (
    Minimum,
    Pareto,
    Quantile,
    Rank,
    Weighted,
    ZScore,
    average_ranks,
    crowding,
    fronts,
    make_rule,
)
from tsdiff.verifiers.programmatic import Luminance, Sharpness, TargetColor

STEPS = 4


@pytest.fixture(autouse=True)
def registered():
    """The verifier under its name, whether or not the installed package lists it."""
    registry.verifiers.add("ensemble", Ensemble)


def combine(rule, table):
    """A rule's scores of a table (N, M)."""
    return rule.combine(torch.as_tensor(np.asarray(table, dtype=float)), [0] * len(table), None).numpy()


TIED = st.integers(-4, 4).map(float)


def tables(values=TIED, most=9, members=(1, 4)):
    """Tables (N, M) with many ties."""
    shape = st.tuples(st.integers(2, most), st.integers(*members))
    return shape.flatmap(lambda size: arrays(float, size, elements=values))


# Rank averages -------------------------------------------------------------------------------------------------------


@given(column=st.lists(st.one_of(st.integers(-3, 3).map(float), st.floats(-1e3, 1e3)), min_size=1, max_size=12))
def test_ranks_with_ties_are_those_of_scipy(column):
    assert average_ranks(np.asarray(column)) == pytest.approx(rankdata(-np.asarray(column), method="average"))


@given(table=tables(), seed=st.integers(0, 99))
def test_the_rank_average_is_the_share_of_candidates_beaten(table, seed):
    weights = np.random.default_rng(seed).integers(1, 5, table.shape[1]).astype(float)
    mean = np.average(np.stack([rankdata(-column) for column in table.T]), axis=0, weights=weights)
    expected = (len(table) - mean) / (len(table) - 1)
    got = combine(Rank(weights=tuple(weights)), table)
    assert got == pytest.approx(expected, abs=2e-6)
    order = np.argsort(-got, kind="stable")
    assert (np.diff(np.round(expected[order], 5)) <= 0).all(), "what sets ties apart never changes the order"


@given(table=tables(st.floats(-5, 5, width=16)))
def test_ranks_do_not_see_scales(table):
    stretched = np.stack([np.exp(column) * (j + 1) for j, column in enumerate(table.T)], axis=1)
    assert combine(Rank(), table) == pytest.approx(combine(Rank(), stretched), abs=2e-9)


def test_a_tie_of_ranks_goes_to_the_better_standard_scores():
    # Ranks (1, 2) against (2, 1), while the third is far behind: the second loses little where it is second.
    scores = combine(Rank(), [[1.0, 0.0], [0.9, 1.0], [-9.0, -9.0]])
    assert scores[1] > scores[0] > scores[2]
    assert scores[1] - scores[0] < 1e-8
    equal = combine(Rank(), [[1.0, 0.0], [0.0, 1.0]])
    assert equal[0] == equal[1], "what is equal stays equal, and goes to the older"


def test_one_candidate_beats_all_others():
    assert combine(Rank(), [[3.0, -1.0]]).tolist() == [1.0]
    assert combine(Pareto(), [[3.0, -1.0]]).tolist() == [0.0]


# Pareto fronts -------------------------------------------------------------------------------------------------------


def peel(table):
    """Fronts by the definition, one candidate at a time."""
    front, left, number = {}, set(range(len(table))), 0
    while left:
        best = {i for i in left if not any(all(table[k] >= table[i]) and any(table[k] > table[i]) for k in left)}
        front |= dict.fromkeys(best, number)
        left -= best
        number += 1
    return [front[i] for i in range(len(table))]


@given(table=tables())
def test_fronts_are_those_of_the_definition(table):
    assert fronts(table).tolist() == peel(table)


@given(table=tables(), seed=st.integers(0, 99))
def test_pareto_scores_order_by_front_and_do_not_depend_on_the_order(table, seed):
    scores = combine(Pareto(), table)
    assert np.ceil(-scores - 1e-12).astype(int).tolist() == fronts(table).tolist(), "a front is at most 1/2 wide"
    order = np.random.default_rng(seed).permutation(len(table))
    assert combine(Pareto(), table[order]) == pytest.approx(scores[order])


def test_crowding_is_that_of_a_worked_example():
    front = np.array([[0.0, 10.0], [1.0, 8.0], [4.0, 5.0], [10.0, 0.0]])
    assert crowding(front) == pytest.approx([math.inf, 4 / 10 + 5 / 10, 9 / 10 + 8 / 10, math.inf])
    scores = combine(Pareto(), front)
    assert scores[0] == scores[3] == 0.5 > scores[2] > scores[1] > 0.0


def test_many_members_are_warned_of():
    with pytest.warns(TsdiffWarning, match="with 4 members hardly any candidate is dominated"):
        Ensemble(members=tuple(Judge(name) for name in "abcd"), rule="pareto")


# Computing rules -----------------------------------------------------------------------------------------------------


@given(table=tables(st.floats(-100, 100, width=16)))
def test_sums_means_and_minima_are_those_of_numpy(table):
    weights = tuple(float(j + 1) for j in range(table.shape[1]))
    assert combine(Weighted(), table) == pytest.approx(table.sum(1), abs=1e-9)
    assert combine(Weighted(weights=weights), table) == pytest.approx(table @ weights, abs=1e-9)
    spread = table.std(0)
    z = (table - table.mean(0)) / np.where(spread > 1e-9, spread, np.inf)
    assert combine(ZScore(over="set", weights=weights), table) == pytest.approx(np.average(z, axis=1, weights=weights), abs=1e-5)
    assert combine(Minimum(over="set"), table) == pytest.approx(z.min(1), abs=1e-5)


@given(table=tables(st.floats(-3, 3)))
def test_a_soft_minimum_lies_between_the_minimum_and_the_mean(table):
    lowest, mean = combine(Minimum(over="set"), table), combine(ZScore(over="set"), table)
    before = mean
    for sharpness in (1e-6, 0.5, 3.0, 50.0):
        soft = combine(Minimum(over="set", sharpness=sharpness), table)
        assert (soft <= before + 1e-5).all(), "sharper is lower"
        assert (soft >= lowest - 1e-9).all()
        before = soft
    assert combine(Minimum(over="set", sharpness=1e-6), table) == pytest.approx(mean, abs=1e-4)
    assert before == pytest.approx(lowest, abs=math.log(table.shape[1]) / 50.0 + 1e-9)


def test_averaging_independent_errors_gains_what_theory_says():
    """Best of N by the mean of k proxies g + s e gains m_N / sqrt(1 + s^2 / k) of the true g; m_8 = 1.4236."""
    rng, trials, count, noise = np.random.default_rng(0), 3000, 8, 1.5
    for members in (1, 4):
        gold = rng.standard_normal((trials, count))
        proxies = gold[..., None] + noise * rng.standard_normal((trials, count, members))
        rule = Weighted()
        gains = [gold[i, int(combine(rule, proxies[i]).argmax())] for i in range(trials)]
        error = np.std(gains) / math.sqrt(trials)
        assert abs(np.mean(gains) - 1.4236 / math.sqrt(1 + noise**2 / members)) < 5 * error


def test_one_huge_error_decides_a_sum_but_no_rank_and_no_minimum():
    good = [[1.0, 1.0, 1.0]]
    plain = [[0.1 * i, -0.1 * i, 0.05 * i] for i in range(-3, 4)]
    hacked = [[1e6, -0.5, -0.5]]
    table = good + plain + hacked
    assert combine(Weighted(), table).argmax() == len(table) - 1
    assert combine(Rank(), table).argmax() == 0
    assert combine(Minimum(over="set"), table).argmax() == 0


# Failed scores -------------------------------------------------------------------------------------------------------


class Few(ExampleCandidates):
    """Candidates by number: their clean estimate is the number itself."""

    @staticmethod
    def of(count):
        candidates = ExampleCandidates.random([""] * count)
        candidates.x0 = torch.arange(float(count))[:, None]
        return candidates


def scripted(name, *scores, **options):
    """A verifier that scores candidate i with scores[i]; an exception is raised."""

    def value(candidates):
        given = [scores[int(number)] for number in candidates.x0[:, 0]]
        for one in given:
            if isinstance(one, Exception):
                raise one
        return torch.tensor(given)

    return Judge(name, value, **options)


@pytest.mark.parametrize("rule", ["rank", "pareto"])
def test_where_scores_are_compared_a_failed_one_is_last_and_says_so(rule):
    nan = math.nan
    verdict = Ensemble(members=(scripted("a", 3.0, 2.0, nan), scripted("b", 1.0, 2.0, 3.0)), rule=rule).score(Few.of(3))
    alone = Ensemble(members=(scripted("a", 3.0, 2.0, -99.0), scripted("b", 1.0, 2.0, 3.0)), rule=rule).score(Few.of(3))
    assert verdict.values.isfinite().all()
    assert verdict.values.tolist() == pytest.approx(alone.values.tolist(), abs=1e-8 if rule == "rank" else 1.0)
    assert verdict.reasons == {2: "a: no finite score"}
    assert verdict.parts["a"].isnan().tolist() == [False, False, True]


@pytest.mark.parametrize("rule", ["weighted", "zscore:over=set", "minimum:over=set", "minimum:over=set,sharpness=2"])
def test_where_scores_are_computed_with_a_failed_one_leaves_none(rule):
    verdict = Ensemble(members=(scripted("a", 3.0, math.inf, 1.0), scripted("b", 1.0, 2.0, 3.0)), rule=rule).score(Few.of(3))
    assert verdict.values.isnan().tolist() == [False, True, False]
    assert verdict.reasons == {1: "a: no finite score"}
    assert verdict.parts["b"].tolist() == [1.0, 2.0, 3.0], "what the others said stays"


def test_a_member_that_scores_nobody_leaves_the_set_without_scores():
    verdict = Ensemble(members=(scripted("a", math.nan, math.nan), scripted("b", 1.0, 2.0))).score(Few.of(2))
    assert verdict.values.isnan().all()
    assert verdict.reasons == {0: "a: no finite score", 1: "a: no finite score"}


def test_one_bad_row_does_not_spoil_a_set():
    verdict = Ensemble(members=(scripted("a", 3.0, RuntimeError("a broken picture"), 1.0), scripted("b", 1.0, 2.0, 3.0))).score(Few.of(3))
    assert verdict.reasons == {1: "a: RuntimeError: a broken picture"}
    assert verdict.values.isfinite().all()


def test_a_large_set_is_given_to_members_in_parts():
    judge = scripted("a", *map(float, range(40)))
    verdict = Ensemble(members=(judge, scripted("b", *map(float, range(40)))), rule="rank").score(Few.of(40))
    assert [len(ids) for ids, _ in judge.batches] == [16, 16, 8]
    assert verdict.values.tolist() == pytest.approx([i / 39 for i in range(40)])


def test_a_member_of_wrong_length_is_told():
    with pytest.raises(UsageError, match=r"verifier a gave scores of shape \(1,\) for 3 candidates"):
        Ensemble(members=(Judge("a", lambda candidates: torch.zeros(1)), Judge("b")), rule="weighted").score(Few.of(3))


# Being a verifier ----------------------------------------------------------------------------------------------------


class TestWeightedKeepsToTheProtocol(VerifierConformance):
    @pytest.fixture
    def verifier(self):
        return Ensemble(members=(Luminance(), Sharpness(), TargetColor(color="navy")), rule="weighted:weights=2,0.1,-1")


class TestRankKeepsToTheProtocol(VerifierConformance):
    @pytest.fixture
    def verifier(self):
        return Ensemble(members=(Luminance(), Sharpness()))


class TestQuantileKeepsToTheProtocol(VerifierConformance):
    tolerance = 1e-5

    @pytest.fixture
    def verifier(self, candidates):
        made = Ensemble(members=(Luminance(), Sharpness()), rule="quantile:combine_by=geometric")
        scores = {member.name: {1: member.score(ExampleCandidates.random([""] * 9, seed=5)).values.tolist()} for member in made.members}
        made.calibrate(candidates.schedules[0], scores)
        return made


@pytest.mark.parametrize("rule", ["weighted:weights=2,-1", "zscore", "quantile", "minimum:sharpness=3"])
def test_gradients_flow_where_they_can(rule):
    members = (Judge("a", lambda c: c.x0.square().sum(1)), Judge("b", lambda c: c.x0.sin().sum(1)))
    for member in members:
        member.differentiable = True
    ensemble = Ensemble(members=members, rule=rule)
    assert ensemble.differentiable
    candidates = ExampleCandidates.random([""] * 4, latent_shape=(3,))
    if ensemble.pool is not None:
        ensemble.calibrate(candidates.schedules[0], {"a": {1: [0.0, 1.0, 2.5, 9.0]}, "b": {1: [-1.0, 0.2, 0.3]}})

    def values(x0):
        candidates.x0 = x0
        return ensemble.score(candidates).values

    assert torch.autograd.gradcheck(values, candidates.x0.double().requires_grad_())
    assert not Ensemble(members=members, rule="rank").differentiable


def test_it_is_what_its_members_make_it():
    a, b = Judge("a", needs=["x0"]), Judge("b", needs=["images", "conditions"], judges="final")
    assert Ensemble(members=(a, b), rule="weighted").needs == {"x0", "images", "conditions"}
    assert Ensemble(members=(a, b), rule="weighted").judges == "final"
    assert Ensemble(members=(a, b), rule="weighted").scope == "row"
    assert Ensemble(members=(a, Judge("c", scope="set")), rule="weighted").scope == "set"
    assert Ensemble(members=(a, Jury("c")), rule="weighted").latency == "pending"
    assert Ensemble(members=(a, b), rule="quantile").pool.levels == 1, "only finished samples need a table"
    assert {rule: Ensemble(members=(a, b), rule=rule).scope for rule in ("rank", "pareto", "zscore", "minimum", "quantile", "zscore:over=set")} == {
        "rank": "set", "pareto": "set", "zscore": "row", "minimum": "row", "quantile": "row", "zscore:over=set": "set",
    }  # fmt: skip
    assert Ensemble(members=(a, b)).name == "rank(a+b)"
    assert hash(Ensemble(members=(a, b))) == hash(Ensemble(members=(a, b)))


# References ----------------------------------------------------------------------------------------------------------


def test_brackets_hold_a_reference_with_options_of_its_own():
    text = "rule=weighted,weights=2,1,members=[gaussian-target:rho=2,x=[y]],[gaussian-log-density],luminance,name=both"
    assert split_options(text) == {
        "rule": "weighted", "weights": "2,1", "members": "[gaussian-target:rho=2,x=[y]],[gaussian-log-density],luminance", "name": "both",
    }  # fmt: skip
    assert split_elements("[gaussian-target:rho=2,x=[y]],[b] , luminance") == ["gaussian-target:rho=2,x=[y]", "b", "luminance"]
    assert split_options("model=/a[1]/b,c=2") == {"model": "/a[1]/b", "c": "2"}
    with pytest.raises(UsageError, match="opens a bracket that it does not close"):
        split_options("a=[b,c")


def test_an_ensemble_is_a_reference():
    made = resolve_verifier("ensemble:rule=weighted,weights=2,1,members=[gaussian-target:rho=2],gaussian-log-density,name=both")
    assert made == Ensemble(members=("gaussian-target:rho=2", "gaussian-log-density"), rule=Weighted(weights=(2.0, 1.0)), name="both")
    nested = resolve_verifier("ensemble:members=[ensemble:rule=weighted,members=gaussian-target,gaussian-log-density,name=sum],[gaussian-value]")
    assert [member.name for member in nested.members] == ["sum", "gaussian-value"]
    assert make_rule("quantile:combine_by=minimum,samples=8") == Quantile(combine_by="minimum", samples=8)


MISTAKES = {
    "unknown rule": ({"rule": "rnak"}, "unknown ensemble rule 'rnak'; did you mean 'rank'"),
    "unknown parameter": ({"rule": "rank:wieghts=1,2"}, "did you mean 'weights'"),
    "no rule": ({"rule": 3}, "must be one of rank"),
    "weights": ({"rule": "rank:weights=1"}, "1 weights were given for 2 members"),
    "negative": ({"rule": "rank:weights=1,-1"}, "at least 0"),
    "nothing": ({"rule": "zscore:weights=0,0"}, "weights are all 0"),
    "useless weights": ({"rule": "quantile:combine_by=minimum,weights=1,2"}, "which has none"),
    "one": ({"members": (Judge("a"),)}, "needs at least two"),
    "twice": ({"members": (Judge("a"), Judge("a"))}, "two members are called 'a'"),
    "name": ({"name": "a b"}, "must not contain"),
    "set": ({"rule": "quantile", "members": (Judge("a"), Judge("ranks", scope="set"))}, "member ranks scores whole sets.*rule rank"),
    "pending": ({"rule": "zscore", "members": (Judge("a"), Jury("person"))}, "member person answers later"),
    "calibrated twice": ({"members": (Judge("c"), Ensemble(members=(Judge("a"), Judge("b")), rule="quantile"))}, "only the outermost verifier may"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_told(name):
    options, match = MISTAKES[name]
    with pytest.raises(UsageError, match=match):
        Ensemble(**{"members": (Judge("a"), Judge("b"))} | options)


def test_scores_without_a_table_are_refused():
    with pytest.raises(UsageError, match="none were scored yet; a search makes its table first"):
        Ensemble(members=(Judge("a"), Judge("b")), rule="quantile").score(Few.of(2))


# In a search ---------------------------------------------------------------------------------------------------------


def leftness(candidates):
    return -candidates.x0[:, 0]


def pair():
    return [Judge("close", closeness), Judge("left", leftness)]


def leaves(result):
    return [node for node in result.tree.nodes if node.level == STEPS]


def test_the_answer_is_the_best_mean_rank_of_all_samples():
    result = search(Hooked(), PROMPT, policy=BestOfN(n=9), verifier=pair(), ensemble="rank", steps=STEPS)
    name = "rank(close+left)"
    assert result.tree.verifier == name
    table = np.array([[leaf.values[name].parts[member] for member in ("close", "left")] for leaf in leaves(result)])
    mean = np.mean([rankdata(-column) for column in table.T], axis=0)
    assert mean[leaves(result).index(result.node)] == mean.min()
    assert [leaf.score(name) for leaf in leaves(result)] == pytest.approx((9 - mean) / 8, abs=1e-6)
    assert result.first_score is None, "a rank of another set is no measure"
    assert set(result.parts) == {"close", "left"}
    assert result.parts["close"][1] == result.baseline.parts["close"][0], "but members' scores are"
    assert result.to_json()["relative"] is True


def test_a_weighted_ensemble_of_one_weight_searches_as_its_member_does():
    alone = search(Hooked(), PROMPT, policy="beam", policy_options={"width": 2}, verifier=Judge("close", closeness), steps=STEPS)
    both = search(Hooked(), PROMPT, policy="beam", policy_options={"width": 2}, verifier=pair(), ensemble="weighted:weights=1,0", steps=STEPS)
    assert [node.id for node in alone.tree.nodes] == [node.id for node in both.tree.nodes]
    assert both.score == pytest.approx(alone.score, abs=1e-6)


@pytest.mark.parametrize("rule", ["rank", "pareto", "zscore:over=set", "weighted"])
def test_costs_are_known_beforehand(rule):
    judges = [Judge("close", closeness), Judge("dark", lambda c: -c.images.flatten(1).mean(1), needs=["images"])]
    plan = prepare(Hooked(), PROMPT, policy=BestOfN(n=5), verifiers=judges, ensemble=rule, steps=STEPS, baseline=False)
    result = execute(plan)[0]
    spent = result.ledger
    assert (plan.cost.upper.nfe, plan.cost.upper.decodes, plan.cost.upper.verifier_calls) == (spent.nfe, spent.decodes, sum(spent.verifier_calls.values()))


@pytest.mark.parametrize("policy", [SMC(), MCTS(), DTS(), SVDD(temperature=0.5)], ids=lambda policy: policy.name)
@pytest.mark.parametrize("rule", ["rank", "pareto", "minimum:over=set"])
def test_ranks_are_refused_by_name_where_scores_are_backed_up_or_weigh_particles(policy, rule):
    with pytest.raises(UsageError, match=rf"policy {policy.name} compares scores across sets, but verifier {rule.partition(':')[0]}\(close\+left\) scores relative"):
        prepare(Hooked(), PROMPT, policy=policy, verifiers=pair(), ensemble=rule, steps=STEPS, solver="ddim", eta=1.0)


def test_a_target_is_refused_where_no_number_is_good_enough():
    with pytest.raises(UsageError, match=r"rank\(close\+left\) scores relative to each set, so that no number is good enough"):
        prepare(Hooked(), PROMPT, policy="adaptive", policy_options={"pilot": 0}, verifiers=pair(), ensemble="rank", steps=STEPS, total_nfe=100, target=0.5)


def test_verifiers_with_roles_stay_out_of_it():
    plan = prepare(Hooked(), PROMPT, policy="beam", verifiers=["gaussian-target", "gaussian-log-density", "final=gaussian-value"], ensemble="weighted", steps=STEPS)
    assert [judge.name for judge in plan.verifiers] == ["gaussian-value", "weighted(gaussian-target+gaussian-log-density)"]
    with pytest.raises(UsageError, match="but 1 were given without a role; give at least two"):
        prepare(Hooked(), PROMPT, policy="beam", verifiers=["gaussian-target", "final=gaussian-value"], ensemble="weighted", steps=STEPS)


@pytest.mark.parametrize("rule", ["rank", "weighted"])
def test_people_may_be_members(rule):
    jury = Jury("person", leftness)
    result = search(Hooked(), PROMPT, policy=BestOfN(n=6), verifier=[Judge("close", closeness), jury], ensemble=rule, steps=STEPS)
    for thread in jury.threads:
        thread.join()
    same = search(Hooked(), PROMPT, policy=BestOfN(n=6), verifier=[Judge("close", closeness), Judge("person", leftness)], ensemble=rule, steps=STEPS)
    assert result.tree.to_json()["nodes"] == same.tree.to_json()["nodes"], "as if they had answered at once, parts included"


def test_a_member_that_judges_final_samples_only_is_asked_for_nothing_else():
    judges = [Judge("close", closeness), Judge("left", leftness, judges="final")]
    result = search(Hooked(), PROMPT, policy=BestOfN(n=3), verifier=judges, ensemble="rank", steps=STEPS)
    assert {level for _, levels in judges[1].batches for level in levels} == {STEPS}
    assert result.score is not None


def test_a_failed_member_leaves_its_node_with_what_the_others_said():
    judges = [Judge("close", closeness), Judge("picky", lambda c: torch.where(c.x0[:, 0] > 0, c.x0[:, 0], torch.nan))]
    result = search(Hooked(), PROMPT, policy=BestOfN(n=8), verifier=judges, ensemble="weighted", steps=STEPS)
    failed = [leaf.values["weighted(close+picky)"] for leaf in leaves(result) if leaf.score("weighted(close+picky)") is None]
    assert failed, "some of eight samples lie on the left"
    assert all(set(value.parts) == {"close"} and value.reason == "picky: no finite score" for value in failed)
    assert result.score is not None


def test_parts_of_members_are_kept_under_their_names():
    class Parted(Judge):
        def score(self, candidates):
            return Scores(closeness(candidates), {"sub": leftness(candidates)})

    result = search(Hooked(), PROMPT, policy=BestOfN(n=2), verifier=[Parted("close"), Judge("left", leftness)], ensemble="rank", steps=STEPS)
    assert set(result.parts) == {"close", "left", "close/sub"}
