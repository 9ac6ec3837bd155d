"""Beam search: its price, the identities it obeys, what survives, its fit to a budget."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict, replace

import pytest
from fake_driver import DETERMINISTIC, STOCHASTIC, TWO_STAGE, FakeDriver, setting
from hypothesis import given, settings
from hypothesis import strategies as st
from policy_checks import JUDGES, SOLVERS, check_fill, check_price, leaves, run, values

from tsdiff.policies import Beam, BestOfN
from tsdiff.treesearch.errors import UsageError
from tsdiff.treesearch.parameters import build
from tsdiff.treesearch.requests import Denoise, Release, Score

shares = st.floats(0.01, 0.99)


@st.composite
def beams(draw, branch_by=None):
    return Beam(
        width=draw(st.integers(1, 4)),
        branch=draw(st.integers(1, 4)),
        extra=draw(st.just(0) | st.integers(1, 9)),
        levels=tuple(draw(st.lists(shares, max_size=4))),
        jump=draw(st.floats(0.01, 1.0)),
        branch_by=branch_by or draw(st.sampled_from(["renoise", "step"])),
        value=draw(st.sampled_from(["x0", "lookahead", "final"])),
        lookahead_steps=draw(st.integers(1, 8)),
        max_children=draw(st.none() | st.integers(1, 3)),
    )


def solver_for(policy, wanted):
    return STOCHASTIC if "stochastic" in policy.needs else wanted


@given(policy=beams(), steps=st.integers(1, 24), solver=st.sampled_from([STOCHASTIC, DETERMINISTIC, TWO_STAGE]), others=st.integers(0, 1))
def test_cost_is_what_is_counted(policy, steps, solver, others):
    where = setting(steps, solver_for(policy, solver), others)
    driver = FakeDriver(where)
    answer = driver.run(policy)
    assert policy.cost(where).exact
    assert policy.cost(where).upper == driver.spend
    assert sum(node.nfe for node in driver.tree.nodes) == driver.nfe
    assert answer is driver.tree.best()
    assert answer.level == steps


@settings(max_examples=18)
@given(policy=beams(), where=st.sampled_from(SOLVERS), steps=st.integers(1, 8), needs=JUDGES)
def test_the_engine_counts_the_same(policy, where, steps, needs):
    if "stochastic" in policy.needs and where[1] in ("ddim", "dpm++2m", "heun", "flow-euler"):
        policy = replace(policy, branch_by="renoise")
    check_price(policy, where, needs, steps=steps)


def test_the_price_of_the_default_beam_by_hand():
    # Renoise at levels 4, 8, 12, 16 of 20, four levels back: a beam node walks 4 + 3 + 3 + 3 levels between the stops
    # (the first steps of the last three are already predicted), each of 4 children walks 4 levels and is predicted
    # once, and the finish takes 4 steps of which the first is predicted.
    per_beam_node = (4 + 3 + 3 + 3) + 4 * 4 * (4 + 1) + 3
    assert Beam().cost(setting(20)).upper.nfe == 4 * per_beam_node
    # Stepping from the previous stop: copies share the first of their four evaluations, and after the first stop it has
    # been made already.
    per_beam_node = (1 + 4 * 3 + 4) + 3 * (4 * 3 + 4) + 3
    assert Beam(branch_by="step").cost(setting(20)).upper.nfe == 4 * per_beam_node
    # An extra child at a branch level: four levels and its own prediction.
    assert Beam(extra=7).cost(setting(20)).upper.nfe == Beam().cost(setting(20)).upper.nfe + 7 * 5
    # Look-ahead in 6 steps, of which the first is that prediction: 5 more for a child, 3 more at level 16 with 4 to go.
    lookahead = Beam(width=1, branch=1, value="lookahead").cost(setting(20)).upper.nfe
    assert lookahead == Beam(width=1, branch=1).cost(setting(20)).upper.nfe + 3 * 5 + 3

    # Full completions: 8 levels to the first stop, each child 4 + 12, then 4 + 4 from a node that a completion has passed.
    assert Beam(width=1, branch=2, levels=(0.4, 0.8), value="final").cost(setting(20)).upper.nfe == 8 + 2 * (4 + 12) + 2 * (4 + 4)


def test_scores_of_drafts_are_the_steering_verifiers_alone():
    where = setting(10, others=2)
    spend = Beam(width=1, branch=2, levels=(0.5,), value="lookahead").cost(where).upper
    assert (spend.verifier_calls, spend.decodes) == (2 + 3, 3)
    spend = Beam(width=1, branch=2, levels=(0.5,), value="final").cost(where).upper
    assert (spend.verifier_calls, spend.decodes) == (2 * 3, 2)


# Identities ---------------------------------------------------------------------------------------------------------


@given(width=st.integers(1, 6), levels=st.lists(shares, max_size=4), jump=st.floats(0.01, 1.0), seed=st.integers(0, 99))
def test_one_child_a_node_by_steps_is_independent_chains(width, levels, jump, seed):
    beam, chains = FakeDriver(setting(12), seed=seed), FakeDriver(setting(12), seed=seed)
    answer = beam.run(Beam(width=width, branch=1, levels=tuple(levels), jump=jump, branch_by="step"))
    expected = chains.run(BestOfN(n=width))
    assert answer.score("value") == expected.score("value"), "bit for bit: the noise follows the stream, not the split"
    assert beam.nfe == chains.nfe, "predictions made for scoring are used again"


@settings(max_examples=8)
@given(where=st.sampled_from(SOLVERS), width=st.integers(1, 4), seed=st.integers(0, 9), value=st.sampled_from(["x0", "lookahead", "final"]))
def test_one_child_a_node_is_best_of_width_bit_for_bit(where, width, seed, value):
    """By steps of any solver: stopping, scoring and going on changes no latent."""
    beam = run(Beam(width=width, branch=1, branch_by="step", value=value), where, seed=seed)
    chains = run(BestOfN(n=width), where, seed=seed)
    assert beam.latent(beam.run.answer).equal(chains.latent(chains.run.answer))
    assert set(values(leaves(beam))) == set(values(leaves(chains)))


@settings(max_examples=8)
@given(where=st.sampled_from([("vp", "ddim"), ("ve", "heun"), ("flow", "flow-euler")]), width=st.integers(1, 3), limit=st.none() | st.integers(1, 2), seed=st.integers(0, 9))
def test_a_whole_look_ahead_on_a_deterministic_solver_is_the_completion(where, width, limit, seed):
    policy = Beam(width=width, branch=3, levels=(0.3, 0.7), max_children=limit, lookahead_steps=99, value="lookahead")
    ahead, final = run(policy, where, seed=seed), run(replace(policy, value="final"), where, seed=seed)
    level = policy.stops(final.tree.schedule)[-1][1]
    completions = [leaf for leaf in leaves(final) if leaf.parent.level == level and leaf.parent.parent.move.kind == "renoise"]
    assert {leaf.parent.id for leaf in leaves(ahead)} <= {leaf.parent.id for leaf in completions}, "the same children survived before"
    assert max(values(leaves(ahead))) == max(values(completions))


@pytest.mark.parametrize("by", ["renoise", "step"])
def test_survivors_go_on_along_their_completions(by):
    """What a child was valued by is what it goes on with: its value is never lost, and nothing is made twice."""
    where = ("flow", "flow-ancestral")
    grown = run(Beam(width=2, branch=2, levels=(0.4, 0.8), value="final", branch_by=by), where, steps=10)
    stops = Beam(levels=(0.4, 0.8), branch_by=by).stops(grown.tree.schedule)
    ahead = stops[1][1] if by == "renoise" else stops[1][0]
    first = [leaf for leaf in leaves(grown) if leaf.parent.level == ahead and leaf.parent.parent.level == stops[0][1]]
    assert len(first) == 4
    beam = sorted(first, key=lambda leaf: -leaf.score("judge"))[:2]
    grown_on = {node.parent for node in grown.nodes if node.parent is not None and node.level < grown.tree.schedule.last and node.parent.level == ahead}
    assert grown_on == {leaf.parent for leaf in beam}
    assert sum(node.level == grown.tree.schedule.last for node in grown.nodes) == 8, "no completion is made but for a value"


def test_no_branch_levels_is_best_of_width():
    beam, chains = FakeDriver(setting(12)), FakeDriver(setting(12))
    assert beam.run(Beam(width=5, levels=())).score("value") == chains.run(BestOfN(n=5)).score("value")
    assert beam.spend == chains.spend
    one_step = setting(1)
    assert Beam(width=5).stops(one_step.schedule) == [], "a single step leaves no level to branch at"


@given(seed=st.integers(0, 99))
def test_a_beam_of_one_is_greedy(seed):
    """Width 1 keeps the best child at every stop (SVDD with argmax)."""
    driver = FakeDriver(setting(12), seed=seed)
    driver.run(Beam(width=1, branch=3, levels=(0.25, 0.5, 0.75), jump=0.25, branch_by="step"))
    scored = [request.group for request in driver.requests if isinstance(request, Score)]
    denoised = [request.group for request in driver.requests if isinstance(request, Denoise)]
    for children in scored[:-1]:
        best = max(children, key=lambda node: (node.score("value"), -node.index))
        later = [group for group in denoised if any(node in children for node in group)]
        assert set().union(*later) == {best}


# What survives ------------------------------------------------------------------------------------------------------


@given(policy=beams(), seed=st.integers(0, 99))
def test_survivors_are_the_best_and_keep_to_the_family_limit(policy, seed):
    policy = replace(policy, value="x0")
    driver = FakeDriver(setting(12, solver_for(policy, DETERMINISTIC)), seed=seed)
    driver.run(policy)
    groups = [request.group for request in driver.requests if isinstance(request, Score)][:-1]
    for number, children in enumerate(groups):
        used = [
            node for node in children if any(isinstance(request, Denoise) and node in request.group for request in driver.requests)
        ]
        assert len(used) == policy.width
        if policy.max_children is not None:
            assert max(Counter(family(policy, node) for node in used).values()) <= policy.max_children
        else:
            dropped = [node.score("value") for node in children if node not in used]
            assert max(dropped, default=-1e9) <= min(node.score("value") for node in used)
        extra = policy.extra // len(groups) + (number < policy.extra % len(groups))
        sizes = sorted(Counter(family(policy, node) for node in children).values(), reverse=True)
        assert sizes == [policy.branch + extra // policy.width + (i < extra % policy.width) for i in range(policy.width)]


def family(policy, child):
    """The beam node that a child descends from, or what it becomes on the way to where its children part."""
    return child.parent.parent if policy.branch_by == "renoise" else child.parent


def test_the_best_parents_get_the_extra_children():
    driver = FakeDriver(setting(12))
    driver.run(Beam(width=3, branch=2, extra=5, levels=(0.3, 0.6)))
    first, second, _ = [request.group for request in driver.requests if isinstance(request, Score)]
    assert (len(first), len(second)) == (3 * 2 + 3, 3 * 2 + 2), "dealt to the levels in turn, the noisiest first"
    beam = sorted(first, key=lambda node: -node.score("value"))[:3]
    counts = Counter(child.parent.parent.parent for child in second)
    assert [counts[node] for node in beam] == [3, 3, 2]


def test_max_children_one_keeps_every_parent():
    policy = Beam(width=3, branch=3, max_children=1)
    driver = FakeDriver(setting(10))
    driver.run(policy)
    assert {leaf.path()[0].index for leaf in driver.leaves()} == {0, 1, 2}, "every first noise has a descendant"


def test_ties_keep_the_oldest():
    driver = FakeDriver(setting(10), value=lambda latent: 0.0)
    policy = Beam(width=2, branch=3, levels=(0.5,))
    answer = driver.run(policy)
    children = next(request.group for request in driver.requests if isinstance(request, Score))
    assert [leaf.parent for leaf in driver.leaves()] == list(children[:2])
    assert answer is driver.leaves()[0]


@given(policy=beams(), share=st.integers(2, 5))
def test_null_scores_rank_last(policy, share):
    policy = replace(policy, value="x0", max_children=None)
    calls = Counter()

    def value(latent):
        calls["n"] += 1
        return None if calls["n"] % share else 1.0

    driver = FakeDriver(setting(12, solver_for(policy, DETERMINISTIC)), value=value)
    driver.run(policy)
    for request in [request for request in driver.requests if isinstance(request, Score)][:-1]:
        used = [node for node in request.group if any(isinstance(r, Denoise) and node in r.group for r in driver.requests)]
        valued = [node for node in request.group if node.score("value") is not None]
        assert set(used) <= set(valued) or set(valued) <= set(used)


@pytest.mark.parametrize("value", ["x0", "lookahead", "final"])
def test_nothing_but_null_scores_still_finishes(value):
    driver = FakeDriver(setting(10), value=lambda latent: None)
    assert driver.run(Beam(width=2, branch=2, value=value)) is None
    assert driver.leaves(), "finished samples are there, unscored"


@given(policy=beams(), seed=st.integers(0, 20))
def test_failed_nodes_never_survive(policy, seed):
    fails = lambda node: node.move.kind == "denoise" and (node.index * 7 + seed) % 4 == 0  # noqa: E731
    where = setting(12, solver_for(policy, DETERMINISTIC))
    driver = FakeDriver(where, fails=fails)
    answer = driver.run(policy)
    assert answer is driver.tree.best()
    assert answer is None or not any(node.failed for node in answer.path())
    assert driver.nfe <= policy.cost(where).upper.nfe, "failures only make a search cheaper"


def test_all_failing_ends_without_an_answer():
    driver = FakeDriver(setting(10), fails=lambda node: node.move.kind == "denoise")
    assert driver.run(Beam(width=2, branch=2)) is None


@given(policy=beams())
def test_what_is_dropped_is_released_and_never_used_again(policy):
    driver = FakeDriver(setting(12, solver_for(policy, DETERMINISTIC)))
    answer = driver.run(policy)  # the driver refuses released nodes
    assert answer.status == "open"
    opened = [node for node in driver.tree.nodes if node.status == "open" and not node.draft]
    # the last beam, the last leaves and the first noises of a beam that never branched
    assert len(opened) <= 3 * policy.width + (policy.value == "final")
    assert not any(isinstance(request, Release) and answer in request.group for request in driver.requests)


# Budgets and parameters ---------------------------------------------------------------------------------------------


@settings(max_examples=45)
@given(policy=beams(), steps=st.integers(1, 24), nfe=st.integers(0, 900), solver=st.sampled_from([STOCHASTIC, DETERMINISTIC, TWO_STAGE]))
def test_fit_is_the_largest_that_fits(policy, steps, nfe, solver):
    where = setting(steps, solver_for(policy, solver))

    def price(width, branch, extra=0):
        return replace(policy, width=width, branch=branch, extra=extra).cost(where).upper.nfe

    if price(1, 1) > nfe:
        with pytest.raises(UsageError, match=f"needs {price(1, 1)} NFE"):
            policy.fit(nfe, where)
        return
    fitted = policy.fit(nfe, where)
    assert price(fitted.width, fitted.branch, fitted.extra) <= nfe
    assert price(fitted.width + 1, fitted.branch) > nfe
    assert nfe - fitted.cost(where).upper.nfe < where.sample_cost, "a child, or a beam without levels, costs a sample at most"
    if policy.stops(where.schedule) and (policy.branch_by == "renoise" or where.solver.stochastic):
        assert price(fitted.width, fitted.branch, fitted.extra + 1) > nfe
    else:
        assert fitted.extra == 0
    if fitted.branch < policy.branch:
        assert fitted.width == 1
        assert price(1, fitted.branch + 1) > nfe
    assert replace(fitted, width=policy.width, branch=policy.branch, extra=policy.extra) == policy, "nothing else is changed"


@pytest.mark.parametrize(
    "policy",
    [Beam(), Beam(value="lookahead"), Beam(value="final"), Beam(branch_by="step", branch=2, levels=(0.1, 0.3, 0.5, 0.7, 0.9)), Beam(jump=1.0), Beam(levels=())],
    ids=["default", "lookahead", "final", "steps", "far", "no levels"],
)
def test_a_budget_is_filled(policy):
    check_fill(policy)


@given(policy=beams(), steps=st.integers(1, 40))
def test_stops_are_ordered_and_inside_the_schedule(policy, steps):
    stops = policy.stops(setting(steps).schedule)
    levels = [level for _, level in stops]
    assert levels == sorted(set(levels))
    assert all(1 <= level <= steps - 1 for level in levels)
    assert all(0 <= start < level for start, level in stops)
    if policy.branch_by == "step":
        assert all(start >= before for (start, _), before in zip(stops, [0, *levels], strict=False))


def test_stops_by_hand():
    schedule = setting(20).schedule
    assert Beam().stops(schedule) == [(0, 4), (4, 8), (8, 12), (12, 16)]
    assert Beam(levels=(0.5, 0.6), jump=0.3).stops(schedule) == [(4, 10), (6, 12)]
    assert Beam(levels=(0.5, 0.6), jump=0.3, branch_by="step").stops(schedule) == [(4, 10), (10, 12)]
    assert Beam(levels=(0.5,), jump=1.0).stops(schedule) == [(0, 10)]
    assert Beam(levels=(0.001, 0.999), jump=0.001).stops(schedule) == [(0, 1), (18, 19)]


def test_only_branching_steps_need_a_stochastic_solver():
    assert Beam().needs == frozenset()
    assert Beam(branch_by="step").needs == {"stochastic"}
    assert Beam(branch_by="step", branch=1).needs == frozenset()
    assert Beam(branch_by="step", branch=1, extra=1).needs == {"stochastic"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"width": 0}, "width is 0 but must be at least 1"),
        ({"branch": 0}, "branch is 0"),
        ({"extra": -1}, "extra is -1"),
        ({"levels": (0.5, 1.0)}, "levels is 1 but must be"),
        ({"levels": (0.0,)}, "levels is 0 but must be"),
        ({"jump": 0.0}, "jump is 0"),
        ({"jump": 1.5}, "jump is 1.5"),
        ({"branch_by": "magic"}, "'renoise', 'step'"),
        ({"value": "x1"}, "'x0', 'lookahead', 'final'"),
        ({"lookahead_steps": 0}, "lookahead_steps is 0"),
        ({"max_children": 0}, "max_children is 0"),
    ],
)
def test_wrong_parameters_are_refused(options, message):
    with pytest.raises(UsageError, match=message):
        Beam(**options)


@given(policy=beams())
def test_options_survive_json_and_the_command_line(policy):
    options = json.loads(json.dumps(asdict(policy)))
    assert build(Beam, options) == policy
    if policy.levels:
        typed = {key: ",".join(map(str, value)) if isinstance(value, list) else str(value) for key, value in options.items()}
        assert build(Beam, typed) == policy
