"""Search over paths: its levels, its price, the identities and the law it keeps, what survives, its fit to a budget."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from fake_driver import DETERMINISTIC, STOCHASTIC, TWO_STAGE, setting
from fakes import Hooked, Judge
from hypothesis import given, settings
from hypothesis import strategies as st
from policy_checks import JUDGES, SOLVERS, chance, check_fill, check_price, leaves, rank, run, sick, values

from tsdiff.plugin.conformance import PolicyConformance
from tsdiff.policies.beam import Beam
from tsdiff.policies.best_of_n import BestOfN
from tsdiff.policies.paths import Paths, nearest_level
from tsdiff.treesearch.errors import UsageError

MAIN = {"vp": "ddim", "ve": "euler", "flow": "flow-euler"}


@st.composite
def searches(draw):
    forward = draw(st.floats(0.01, 0.99))
    return Paths(
        width=draw(st.integers(1, 3)),
        branch=draw(st.integers(1, 3)),
        extra=draw(st.integers(0, 7)),
        sigma=draw(st.floats(0.01, 0.99)),
        forward=forward,
        backward=forward + draw(st.floats(0.1, 1.0)),
        num_steps=draw(st.none() | st.integers(1, 4)),
        max_children=draw(st.none() | st.integers(1, 2)),
    )


class TestConformance(PolicyConformance):
    @pytest.fixture
    def policy(self):
        return Paths(branch=2, extra=3, max_children=1)


def schedule_of(process, steps):
    model = Hooked(process)
    return model.schedule(model.solver(MAIN[process]), steps, None)


# Levels --------------------------------------------------------------------------------------------------------------


def test_rounds_by_hand():
    """Times 0.11, 0.08, 0.05, 0.02 and 0; each first goes back by 0.78. The grid's times are 1, 0.95, ..., 0."""
    schedule = setting(20).schedule
    assert Paths().rounds(schedule) == [(18, 2, 18), (18, 3, 19), (19, 3, 19), (19, 4, 20)]
    coarse = Paths(sigma=0.8, forward=0.1, backward=0.2).rounds(setting(10).schedule)
    assert coarse == [(2 + i, 1 + i, 3 + i) for i in range(8)], "0.8 - 8 * 0.1 is 0 in spite of rounding"
    assert Paths().rounds(setting(2).schedule) == [(1, 0, 1)] * 3 + [(1, 0, 2)]
    assert Paths().rounds(setting(1).schedule) == []


@given(policy=searches(), process=st.sampled_from(["vp", "ve", "flow"]), steps=st.integers(1, 40))
def test_rounds_go_back_and_come_forward_and_end_clean(policy, process, steps):
    rounds = policy.rounds(schedule_of(process, steps))
    if steps == 1:
        assert rounds == []
        return
    progress = policy.backward - policy.forward
    assert (len(rounds) - 1) * progress < policy.sigma <= len(rounds) * progress + 1e-9, "R = ceil(sigma / (db - df))"
    assert [stop for stop, _, _ in rounds[1:]] == [landing for _, _, landing in rounds[:-1]]
    assert rounds[-1][2] == steps
    assert all(0 <= back < stop <= landing for stop, back, landing in rounds)


@pytest.mark.parametrize("process", ["vp", "ve", "flow"])
def test_levels_have_the_signal_to_noise_ratio_of_the_flow_time(process):
    schedule = schedule_of(process, 2000)
    for (stop, back, _), time in zip(Paths().rounds(schedule), (0.11, 0.08, 0.05, 0.02), strict=True):
        for level, wanted in ((stop, time), (back, time + 0.78)):
            assert schedule.log_snr(level) == pytest.approx(2.0 * math.log((1.0 - wanted) / wanted), abs=0.1)


@given(time=st.floats(0.0, 1.6), process=st.sampled_from(["vp", "ve", "flow"]), steps=st.integers(1, 30))
def test_the_nearest_level_is_the_nearest(time, process, steps):
    schedule = schedule_of(process, steps)
    distances = [abs(1.0 / (1.0 + math.exp(min(snr, 700.0) / 2.0)) - time) for snr in schedule.log_snrs]
    assert distances[nearest_level(schedule, time)] == pytest.approx(min(distances), abs=1e-12)


# Cost ----------------------------------------------------------------------------------------------------------------


@settings(max_examples=20)
@given(policy=searches(), where=st.sampled_from(SOLVERS), steps=st.integers(1, 8), needs=JUDGES, scope=st.sampled_from(["row", "row", "set"]))
def test_cost_is_what_is_counted(policy, where, steps, needs, scope):
    check_price(policy, where, needs, scope, steps=steps)


def test_the_price_by_hand():
    # N S_a + N M sum(L + 1), the last round without the extra evaluation; see the levels above.
    assert Paths(width=2, branch=4).cost(setting(20)).upper.nfe == 2 * 18 + 2 * 4 * ((16 + 1) + (16 + 1) + (16 + 1) + 16)
    spend = Paths(width=2, branch=4, num_steps=5).cost(setting(20)).upper
    assert spend.nfe == 2 * 18 + 2 * 4 * (3 * (5 + 1) + 5)
    assert (spend.verifier_calls, spend.decodes) == (4 * 8, 4 * 8)
    assert Paths(width=2, branch=4, num_steps=5, extra=5).cost(setting(20)).upper.nfe == spend.nfe + 4 * 6 + 5, "the first round gets two"
    assert Paths(width=2, branch=4, num_steps=5).cost(setting(20, TWO_STAGE)).upper.nfe == 2 * 36 + 2 * 4 * (3 * (10 + 1) + 9)


# Identities ----------------------------------------------------------------------------------------------------------


@settings(max_examples=12)
@given(
    where=st.sampled_from(SOLVERS), width=st.integers(1, 3), branch=st.integers(1, 3), extra=st.integers(0, 4), seed=st.integers(0, 9),
    share=st.floats(0.05, 0.95), jump=st.floats(0.1, 0.9),
)  # fmt: skip
def test_a_single_round_is_a_beam_that_judges_finished_samples(where, width, branch, extra, seed, share, jump):
    """The same noise, so the same samples bit for bit; the beam's are made in two spans, these in one."""
    shape = {"width": width, "branch": branch, "extra": extra}
    paths = run(Paths(**shape, sigma=share, forward=jump, backward=jump + 1.0), where, seed=seed)
    ((stop, back, last),) = Paths(sigma=share, forward=jump, backward=jump + 1.0).rounds(paths.tree.schedule)
    beam = run(Beam(**shape, levels=(stop / last,), jump=(stop - back) / last, value="final"), where, seed=seed)
    assert values(leaves(paths)) == values(leaves(beam))
    assert paths.latent(paths.run.answer).equal(beam.latent(beam.run.answer))


@given(where=st.sampled_from(SOLVERS), width=st.integers(1, 4), seed=st.integers(0, 9))
@settings(max_examples=5)
def test_one_renoising_a_path_leaves_nothing_to_choose(where, width, seed):
    scored = run(Paths(width=width, branch=1), where, seed=seed)
    indifferent = run(Paths(width=width, branch=1), where, seed=seed, judge=Judge(value=lambda candidates: candidates.x0[:, 0] * 0.0))
    assert {leaf.path()[0] for leaf in leaves(scored)} == set(scored.tree.roots), "every path survives every round"
    ours, theirs = ({leaf.path()[0].index: grown.latent(leaf) for leaf in leaves(grown)} for grown in (scored, indifferent))
    assert all(ours[root].equal(theirs[root]) for root in range(width))


@pytest.mark.parametrize("process", ["vp", "ve", "flow"])
def test_without_selection_the_law_of_the_model_is_kept(process):
    """N = 300 unselected paths under exact transitions: re-noise loops at any level lead back to the data's law.

    Component counts by chi-square (8 degrees of freedom, one in 10,000), moments at 5 standard errors.
    """
    count = 300
    grown = run(Paths(width=count, branch=1, sigma=0.5, forward=0.3, backward=0.6), (process, "exact"), steps=5)
    ends = torch.stack([grown.latent(leaf) for leaf in leaves(grown)]).double()
    mixture = Hooked(process).mixture
    nearest = mixture.posterior(ends, 1.0, 0.01).log_weights.argmax(1)
    wanted = count * torch.tensor(mixture.weights, dtype=torch.float64)
    assert float(((torch.bincount(nearest, minlength=9) - wanted) ** 2 / wanted).sum()) < 31.8
    mean, covariance = mixture.moments()
    spread = np.sqrt(np.diag(covariance))
    assert np.all(np.abs(ends.numpy().mean(0) - mean) < 5.0 * spread / math.sqrt(count))
    inside = ends - torch.tensor(mixture.means, dtype=torch.float64)[nearest]
    assert float(inside.std()) == pytest.approx(0.2, abs=5.0 * 0.2 / math.sqrt(4 * count))


def test_a_single_step_is_best_of_n():
    paths, plain = run(Paths(width=5), steps=1), run(BestOfN(n=5), steps=1)
    assert values(leaves(paths)) == values(leaves(plain))
    assert paths.tree.ledger.to_json() == plain.tree.ledger.to_json()


# What survives -------------------------------------------------------------------------------------------------------


@settings(max_examples=18)
@given(policy=searches(), seed=st.integers(0, 99), nulls=st.sampled_from([0, 2, 5]), where=st.sampled_from([("vp", "ddim"), ("flow", "flow-ancestral")]))
def test_survivors_are_the_best_of_their_round(policy, seed, nulls, where):
    """Ties keep the oldest, nulls rank last, no path has more survivors than allowed, the best paths get the extra children."""
    grown = run(policy, where, judge=chance(nulls), seed=seed, steps=5)
    paths = [node for node in grown.nodes if node.parent in grown.tree.roots]
    rounds = policy.rounds(grown.tree.schedule)
    for number, (_, back, stop) in enumerate(rounds):
        children = [node for node in grown.nodes if node.parent is not None and node.parent.parent in paths and node.parent.move.kind == "renoise"]
        assert [(child.parent.level, child.level) for child in children] == [(back, stop)] * len(children)
        extra = policy.extra // len(rounds) + (number < policy.extra % len(rounds))
        families = Counter(child.parent.parent for child in children)
        assert [families[path] for path in paths] == [policy.branch + extra // len(paths) + (i < extra % len(paths)) for i in range(len(paths))]
        taken = Counter()
        paths = []
        for child in sorted(children, key=rank, reverse=True):
            if len(paths) < policy.width and (policy.max_children is None or taken[child.parent.parent] < policy.max_children):
                taken[child.parent.parent] += 1
                paths.append(child)
    assert not any(node.parent in paths for node in grown.nodes)
    if any(value is not None for value in values(leaves(grown))):
        assert grown.run.answer is max(leaves(grown), key=rank)


def test_null_scores_and_failed_nodes_stop_nothing():
    policy = Paths(width=2, branch=2, extra=1)
    grown = run(policy, judge=Judge(value=lambda candidates: candidates.x0[:, 0] * np.nan))
    assert len(leaves(grown)) == 4
    assert grown.run.answer.level == grown.tree.schedule.last
    failed = 0
    for seed in range(8):
        grown = run(policy, model=sick(1.5), seed=seed)
        failed += sum(node.failed for node in grown.nodes)
        assert grown.run.answer.score("judge") is not None
        assert not any(node.failed for node in grown.run.answer.path())
    assert failed > 8


@given(policy=searches(), seed=st.integers(0, 20))
@settings(max_examples=8)
def test_what_is_dropped_is_released(policy, seed):
    still = []

    class Watched:
        @staticmethod
        def search(tree):
            answer = yield from policy.search(tree)
            still.extend(node for node in tree.nodes if node.status == "open")
            return answer

    grown = run(Watched, judge=chance(0), seed=seed)
    assert len(still) <= policy.width + 1
    assert all(node.level == grown.tree.schedule.last for node in still)


# Budgets and parameters ----------------------------------------------------------------------------------------------


def test_a_budget_is_filled():
    check_fill(Paths())
    check_fill(Paths(width=1, sigma=0.8, forward=0.1, backward=0.2))


@given(policy=searches(), nfe=st.integers(0, 900), steps=st.integers(1, 24), solver=st.sampled_from([STOCHASTIC, DETERMINISTIC, TWO_STAGE]))
@settings(max_examples=45)
def test_fit_is_the_largest_that_fits(policy, nfe, steps, solver):
    where = setting(steps, solver)

    def price(**size):
        return replace(policy, **size).cost(where).upper.nfe

    if nfe < price(width=1, branch=1, extra=0, num_steps=1):
        with pytest.raises(UsageError, match=f"needs {price(width=1, branch=1, extra=0, num_steps=1)} NFE"):
            policy.fit(nfe, where)
        return
    fitted = policy.fit(nfe, where)
    assert fitted.cost(where).upper.nfe <= nfe
    assert replace(fitted, width=policy.width, branch=policy.branch, extra=policy.extra, num_steps=policy.num_steps) == policy
    if steps == 1:
        assert fitted.width == nfe // where.sample_cost
        return
    assert replace(fitted, extra=fitted.extra + 1).cost(where).upper.nfe > nfe
    assert replace(fitted, branch=fitted.branch + 1, extra=0).cost(where).upper.nfe > nfe
    if fitted.width < policy.width:
        assert price(width=fitted.width + 1, branch=2, extra=0) > nfe, "paths are only given up for a second child of each"
    if fitted.num_steps != policy.num_steps:
        assert price(width=1, branch=2, extra=0) > nfe, "steps are only given up where a single path is too dear"
    if fitted.branch == 1:
        assert price(width=1, branch=2, extra=0, num_steps=1) > nfe


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"width": 0}, "width is 0 but must be at least 1"),
        ({"branch": 0}, "branch is 0"),
        ({"extra": -1}, "extra is -1"),
        ({"sigma": 1.0}, "sigma is 1 but must be"),
        ({"forward": 0.0}, "forward is 0"),
        ({"num_steps": 0}, "num_steps is 0"),
        ({"max_children": 0}, "max_children is 0"),
        ({"forward": 0.5, "backward": 0.5}, "backward is 0.5 and forward is 0.5.*at least 0.001"),
        ({"forward": 0.5, "backward": 0.4}, "raise backward or lower forward"),
        ({"backward": math.nan}, "backward is nan"),
    ],
)
def test_wrong_parameters_are_refused(options, message):
    with pytest.raises(UsageError, match=message):
        Paths(**options)
