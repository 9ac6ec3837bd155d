"""Monte Carlo tree search: its price, what it equals in special cases, bandits that it solves, budgets, failures."""

from __future__ import annotations

import json
import math
from collections import Counter
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import pytest
from fake_driver import DETERMINISTIC, STOCHASTIC, TWO_STAGE, FakeDriver, setting
from fakes import Hooked, Judge, check_books, grow
from hypothesis import given, settings
from hypothesis import strategies as st

from tsdiff.policies import BestOfN
from tsdiff.policies.mcts import MCTS
from tsdiff.treesearch.errors import UsageError
from tsdiff.treesearch.node import Node
from tsdiff.treesearch.noise import Fresh, derive
from tsdiff.treesearch.parameters import build
from tsdiff.treesearch.protocols import Setting
from tsdiff.treesearch.requests import Denoise, Draw, Gather, Score

VALUES, SELECTIONS, BACKUPS = ["x0", "lookahead", "rollout"], ["uct", "puct", "boltzmann", "gumbel"], ["max", "mean", "soft"]
shares = st.floats(0.01, 0.99)


class Driver(FakeDriver):
    """The driver with what this policy asks for beside: gathered requests and named branches."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.named: set[tuple[Node, int]] = set()

    def _price(self, request: Any) -> int:
        if not isinstance(request, Gather):
            return super()._price(request)
        before, total = set(self.predicted), 0
        for part in request.requests:
            total += super()._price(part)
            if isinstance(part, Denoise | Score):
                self.predicted |= {node for node in part.group if not node.failed and node.level < self.tree.schedule.last}
        self.predicted = before
        return total

    def _gather(self, request: Gather) -> tuple[Any, ...]:
        return tuple(getattr(self, f"_{type(part).__name__.lower()}")(part) for part in request.requests)

    def _denoise(self, request: Denoise) -> list[Node]:
        if not isinstance(request.noise, Fresh):
            return super()._denoise(request)
        assert self.setting.solver.stochastic
        return [self._branch(node, to, request.via, request.noise.index) for node, to in zip(request.group, request.targets, strict=True)]

    def _branch(self, node: Node, to: int, via: Any, index: int) -> Node:
        assert (node, index) not in self.named, "a branch is made once"
        self.named.add((node, index))
        self.tree.children.setdefault(node.index, {})[("denoise",)] = index  # what the driver hands out next
        (child,) = super()._denoise(Denoise(node, to, via=via))
        return child

    @property
    def waves(self) -> list[int]:
        """How many simulations were carried out together, wave by wave."""
        gathers = [request.requests for request in self.requests if isinstance(request, Gather)]
        return [sum(len(part.group) for part in parts) for parts in gathers if all(isinstance(part, Denoise) for part in parts)]

    def samples(self) -> list[Any]:
        """The scores of finished samples, in order of creation."""
        return [leaf.score("value") for leaf in self.leaves()]

    def root_of(self, latent: np.ndarray) -> int:
        """Which first noise a latent comes from."""
        node = next(self.tree.nodes[index] for index, own in self.latents.items() if own is latent)
        return self.tree.roots.index(node.path()[0])


@st.composite
def searches(draw, **given_options):
    options = {
        "simulations": draw(st.integers(1, 40)),
        "width": draw(st.none() | st.integers(1, 8)),
        "branch": draw(st.none() | st.integers(1, 4)),
        "widening": draw(st.floats(0.2, 3.0)),
        "exponent": draw(st.floats(0.1, 1.0)),
        "levels": tuple(draw(st.lists(shares, max_size=4))),
        "jump": draw(st.floats(0.01, 1.0)),
        "branch_by": draw(st.sampled_from(["renoise", "step"])),
        "value": draw(st.sampled_from(VALUES)),
        "lookahead_steps": draw(st.integers(1, 8)),
        "finish": draw(st.integers(1, 5)),
        "selection": draw(st.sampled_from(SELECTIONS)),
        "prior": draw(st.sampled_from(["x0", "uniform"])),
        "backup": draw(st.sampled_from(BACKUPS)),
        "in_flight": draw(st.integers(1, 9)),
        "parallel": draw(st.sampled_from(["unobserved", "virtual-loss"])),
    }
    return MCTS(**(options | given_options))


def solver_for(policy, wanted):
    return STOCHASTIC if "stochastic" in policy.needs else wanted


# The price ----------------------------------------------------------------------------------------------------------


@settings(max_examples=100)
@given(policy=searches(), steps=st.integers(1, 24), solver=st.sampled_from([STOCHASTIC, DETERMINISTIC, TWO_STAGE]), seed=st.integers(0, 9))
def test_the_cost_holds_what_is_counted(policy, steps, solver, seed):
    where = setting(steps, solver_for(policy, solver), others=1)
    driver = Driver(where, seed=seed)
    answer = driver.run(policy)
    cost, spend = policy.cost(where), driver.spend
    for name in ("nfe", "decodes", "verifier_calls"):
        assert getattr(cost.lower, name) <= getattr(spend, name) <= getattr(cost.upper, name), name
    assert sum(node.nfe for node in driver.tree.nodes) == driver.nfe
    assert answer is driver.tree.best()
    assert answer.level == steps


@settings(max_examples=15)
@given(policy=searches(value="rollout", branch=None, widening=2.0, exponent=0.8, width=None, selection="uct"), steps=st.integers(1, 24))
def test_the_cost_is_exact_while_values_decide_nothing(policy, steps):
    """Up to 35 simulations the default widening only ever opens first noises; none goes deeper than their children."""
    where = setting(steps)
    driver = Driver(where)
    driver.run(replace(policy, simulations=min(policy.simulations, 35)))
    assert replace(policy, simulations=min(policy.simulations, 35)).cost(where).exact
    assert driver.nfe == min(policy.simulations, 35) * steps
    deeper = replace(policy, simulations=40, levels=(0.5,))
    assert deeper.cost(where).exact, "one branch level has one price"
    driver = Driver(where)
    driver.run(deeper)
    assert driver.spend == deeper.cost(where).upper


def test_prices_by_hand():
    where = setting(20)  # branch levels 4, 8, 12, 16
    assert MCTS(simulations=1).stops(where.schedule) == (0, 4, 8, 12, 16, 20)
    assert MCTS(simulations=1).cost(where).upper.nfe == 20, "one candidate, finished"
    # Four candidates of 4 + 1 evaluations, each finished for 15 more; then only candidates.
    assert MCTS(simulations=4).cost(where).upper.nfe == 4 * 20
    assert MCTS(simulations=10).cost(where).upper.nfe == 10 * 5 + 4 * 15
    assert MCTS(simulations=3, value="rollout").cost(where).upper.nfe == 3 * 20
    # A second child of a first noise: back from 4 to 0 and down again; by steps its parent's evaluation is shared.
    two = MCTS(simulations=2, width=1, value="rollout")
    assert two.cost(where).upper.nfe == 20 + 20
    assert replace(two, branch_by="step").cost(where).upper.nfe == 20 + 15
    look = MCTS(simulations=1, value="lookahead", lookahead_steps=6)
    assert look.cost(where).upper.nfe == 4 + 6 + 15, "the look-ahead's first evaluation is used again"


@settings(max_examples=20)
@given(policy=searches(value="rollout", selection="puct"), steps=st.integers(2, 16))
def test_a_prior_costs_verifier_calls_but_no_evaluations(policy, steps):
    where = setting(steps, solver_for(policy, DETERMINISTIC))
    with_prior, without = Driver(where), Driver(where)
    with_prior.run(replace(policy, prior="x0", width=None, widening=50.0))
    without.run(replace(policy, prior="uniform", width=None, widening=50.0))
    assert with_prior.nfe == without.nfe
    stops = len(policy.stops(where.schedule)) - 2
    assert with_prior.calls["value"] == without.calls["value"] * (1 + stops)


# What it equals -----------------------------------------------------------------------------------------------------


@settings(max_examples=40)
@given(policy=searches(), steps=st.integers(1, 16), solver=st.sampled_from([STOCHASTIC, DETERMINISTIC, TWO_STAGE]), seed=st.integers(0, 99))
def test_one_simulation_is_one_sample(policy, steps, solver, seed):
    where = setting(steps, solver_for(policy, solver))
    one, plain = Driver(where, seed=seed), FakeDriver(where, seed=seed)
    answer, expected = one.run(replace(policy, simulations=1)), plain.run(BestOfN(n=1))
    assert answer.score("value") == expected.score("value"), "bit for bit"
    if policy.value != "lookahead":
        assert one.nfe == plain.nfe


@settings(max_examples=20)
@given(policy=searches(value="rollout", width=None, selection="uct"), seed=st.integers(0, 99), solver=st.sampled_from([STOCHASTIC, DETERMINISTIC]))
def test_unlimited_widening_is_best_of_n(policy, seed, solver):
    where = setting(10, solver_for(policy, solver))
    tree, chains = Driver(where, seed=seed), FakeDriver(where, seed=seed)
    tree.run(replace(policy, widening=1000.0))
    chains.run(BestOfN(n=policy.simulations))
    assert tree.samples() == [leaf.score("value") for leaf in chains.leaves()]
    assert tree.spend == chains.spend


@settings(max_examples=20)
@given(policy=searches(levels=(), width=None), seed=st.integers(0, 9))
def test_without_branch_levels_it_is_best_of_n(policy, seed):
    where = setting(8, solver_for(policy, DETERMINISTIC))
    policy = replace(policy, width=policy.simulations)
    tree, chains = Driver(where, seed=seed), FakeDriver(where, seed=seed)
    tree.run(policy)
    chains.run(BestOfN(n=policy.simulations))
    assert tree.samples() == [leaf.score("value") for leaf in chains.leaves()]
    assert tree.spend == chains.spend


class Sequential:
    """The pseudo-code of the class's docstring, one simulation after the other: UCT by steps with rollouts.

    Places are tuples of child numbers; () is the root.
    """

    def __init__(self, policy: MCTS) -> None:
        self.policy = policy

    def search(self, tree: Any) -> Any:
        policy, stops = self.policy, self.policy.stops(tree.schedule)
        nodes: dict[tuple[int, ...], Node] = {}
        returns: dict[tuple[int, ...], list[float]] = {(): []}

        def children(place: tuple[int, ...]) -> list[tuple[int, ...]]:
            return [other for other in nodes if other[:-1] == place]

        def worth(place: tuple[int, ...]) -> float:
            below = [worth(child) for child in children(place)]
            if policy.backup == "mean" or not below:
                return sum(returns[place]) / len(returns[place])
            if policy.backup == "max":
                return max(below)
            low, high = min(returns[()]), max(returns[()])
            rate = policy.inverse_temperature / (high - low) if high > low else 0.0
            if rate == 0.0:
                return sum(below) / len(below)
            return math.log(sum(math.exp(rate * (v - high)) for v in below) / len(below)) / rate + high

        def preference(place: tuple[int, ...]) -> float:
            low, high = min(returns[()]), max(returns[()])
            value = (worth(place) - low) / (high - low) if high > low else 0.5
            return value + math.sqrt(2 * math.log(len(returns[place[:-1]])) / len(returns[place]))

        for _ in range(policy.simulations):
            place: tuple[int, ...] = ()
            while len(place) < len(stops) - 2 and len(children(place)) >= max(1.0, policy.widening * (len(returns[place]) + 1) ** policy.exponent):
                place = max(children(place), key=preference)
            number = len(children(place))
            start = nodes[place] if place else (yield Draw(1))[0]
            named = Fresh(number) if place else None
            (leaf,) = yield Gather(Denoise(start, to=stops[-1], via=stops[len(place) + 1 : -1], noise=named))
            (score,) = yield Score(leaf)
            path = leaf[0].path()
            for node in path[path.index(start) + 1 :]:
                place = (*place, number)
                number = 0
                nodes[place], returns[place] = node, []
            for depth in range(len(place) + 1):
                returns[place[:depth]].append(score)
        return tree.best()


@settings(max_examples=30)
@given(
    simulations=st.integers(1, 40), widening=st.floats(0.5, 1.5), exponent=st.floats(0.3, 0.7), backup=st.sampled_from(BACKUPS), seed=st.integers(0, 99)
)
def test_one_in_flight_is_the_sequential_pseudo_code(simulations, widening, exponent, backup, seed):
    policy = MCTS(
        simulations=simulations, widening=widening, exponent=exponent, backup=backup, branch_by="step", value="rollout", in_flight=1, levels=(0.3, 0.6)
    )
    fast, slow = Driver(setting(10), seed=seed), Driver(setting(10), seed=seed)
    answer, expected = fast.run(policy), slow.run(Sequential(policy))
    assert fast.samples() == slow.samples(), "the same simulations in the same order"
    assert answer.id == expected.id
    assert fast.nfe == slow.nfe


@settings(max_examples=20)
@given(policy=searches(value="rollout", in_flight=1).filter(lambda policy: policy.selection != "gumbel"), more=st.integers(1, 10), seed=st.integers(0, 9))
def test_more_simulations_go_on_where_fewer_end(policy, more, seed):
    where = setting(8, solver_for(policy, DETERMINISTIC))
    few, many = Driver(where, seed=seed), Driver(where, seed=seed)
    worse, better = few.run(policy), many.run(replace(policy, simulations=policy.simulations + more))
    assert many.samples()[: len(few.samples())] == few.samples()
    assert better.score("value") >= worse.score("value"), "so that the answer never gets worse"


@settings(max_examples=20)
@given(policy=searches(widening=2.0), seed=st.integers(0, 9))
def test_searches_repeat_themselves(policy, seed):
    where = setting(8, solver_for(policy, DETERMINISTIC))
    one, two = Driver(where, seed=seed), Driver(where, seed=seed)
    assert one.run(policy).id == two.run(policy).id
    assert one.tree.to_json() == two.tree.to_json()


# Bandits ------------------------------------------------------------------------------------------------------------


def play(policy, means, seed=0, noise=0.1):
    """First noises as arms: pulling one gives its mean and a little noise. Returns the pulls of each arm."""
    driver = Driver(setting(8), seed=seed)

    def pull(latent):
        arm = driver.root_of(latent)
        digits = derive("pull", int(latent.astype(np.float64).view(np.uint64)[0]))
        return means[arm] + noise * (2 * (digits % 1000) / 1000 - 1)

    driver.value = pull
    driver.run(policy)
    return [Counter(driver.tree.roots.index(leaf.path()[0]) for leaf in driver.leaves())[arm] for arm in range(len(means))]


@pytest.mark.parametrize("in_flight", [1, 8])
@pytest.mark.parametrize(
    "options",
    [
        {"backup": "mean"},
        {"backup": "max"},
        {"backup": "mean", "parallel": "virtual-loss"},
        {"backup": "mean", "selection": "puct", "prior": "uniform"},
        {"backup": "soft", "selection": "boltzmann", "inverse_temperature": 8.0},
        {"backup": "mean", "selection": "gumbel", "c_scale": 1.0},
    ],
    ids=str,
)
def test_the_best_arm_of_a_bandit_is_found(options, in_flight):
    means = [0.1, 0.5, 0.9, 0.3]
    policy = MCTS(simulations=200, width=4, levels=(0.5,), branch_by="step", value="rollout", in_flight=in_flight, **options)
    pulls = play(policy, means)
    assert sum(pulls) == 200
    assert pulls[2] == max(pulls)
    assert pulls[2] >= 75, pulls


def test_uct_pulls_bad_arms_no_more_than_its_bound():
    """UCB1 plays an arm that is worse by D at most 8 ln n / D^2 + 1 + pi^2 / 3 times on average (Auer et al. 2002)."""
    means, n = [0.0, 1.0], 400
    pulls = [play(MCTS(simulations=n, width=2, levels=(0.5,), branch_by="step", value="rollout", backup="mean", in_flight=1), means, seed) for seed in range(3)]
    assert all(1 <= bad <= 8 * math.log(n) + 1 + math.pi**2 / 3 for bad, _ in pulls)


def test_gumbel_serves_candidates_as_sequential_halving_says():
    policy = MCTS(simulations=16, width=8, selection="gumbel", levels=(0.5,), branch_by="step", value="rollout")
    assert sorted(play(policy, [k / 8 for k in range(8)])) == [1, 1, 1, 1, 2, 2, 4, 4]
    assert play(replace(policy, c_scale=1000.0), [k / 8 for k in range(8)], noise=0.0) == [1, 1, 1, 1, 2, 2, 4, 4], "large weights rank by value alone"


# Simulations in flight ----------------------------------------------------------------------------------------------


@settings(max_examples=20)
@given(policy=searches(selection="uct", branch=None, widening=2.0, exponent=0.8))
def test_waves_are_full_but_for_the_last(policy):
    """With the default widening a place always has room for the next simulation; the last round is ragged."""
    driver = Driver(setting(10, solver_for(policy, DETERMINISTIC)))
    driver.run(replace(policy, width=None))
    full, rest = divmod(policy.simulations, policy.in_flight)
    assert driver.waves == [policy.in_flight] * full + [rest] * (rest > 0)


@pytest.mark.parametrize("parallel", ["unobserved", "virtual-loss"])
def test_a_wave_spreads_over_equal_arms(parallel):
    policy = MCTS(simulations=8, width=4, levels=(0.5,), branch_by="step", value="rollout", in_flight=4, parallel=parallel)
    assert play(policy, [0.5] * 4, noise=0.0) == [2, 2, 2, 2]


# Budgets ------------------------------------------------------------------------------------------------------------


@settings(max_examples=40)
@given(policy=searches(), steps=st.integers(1, 20), nfe=st.integers(0, 500))
def test_fit_is_certain_to_fit(policy, steps, nfe):
    where = setting(steps)
    least = replace(policy, simulations=1).cost(where).upper.nfe
    if nfe < least:
        with pytest.raises(UsageError, match=f"needs {least} NFE"):
            policy.fit(nfe, where)
        return
    fitted = policy.fit(nfe, where)
    assert fitted.cost(where).upper.nfe <= nfe
    planned = replace(fitted, until_nfe=None)
    assert planned.cost(where).upper.nfe <= nfe
    more = replace(planned, simulations=planned.simulations + 1).cost(where).upper.nfe
    assert more > nfe or more == planned.cost(where).upper.nfe, "the most that is certain to fit, or all that there is to open"
    driver = Driver(where, limit=nfe)
    driver.run(fitted)
    cost = fitted.cost(where)
    for name in ("nfe", "decodes", "verifier_calls"):
        assert getattr(cost.lower, name) <= getattr(driver.spend, name) <= getattr(cost.upper, name), name


@pytest.mark.parametrize("value", VALUES)
@pytest.mark.parametrize(("selection", "branch_by"), [("uct", "renoise"), ("boltzmann", "step"), ("gumbel", "renoise")])
@pytest.mark.parametrize("steps", [7, 10, 20, 50])
def test_budgets_of_16_samples_and_more_are_filled(value, selection, branch_by, steps):
    where = setting(steps)
    for multiple in (16, 17, 31, 64) if steps == 10 else (16, 33):
        nfe = multiple * where.sample_cost
        driver = Driver(where)
        driver.run(MCTS(value=value, selection=selection, branch_by=branch_by, widening=1.0, exponent=0.5).fit(nfe, where))
        assert 0.9 * nfe <= driver.nfe <= nfe


@settings(max_examples=60)
@given(policy=searches(), steps=st.integers(1, 12), extra=st.integers(0, 200))
def test_a_cap_is_kept_and_ends_in_a_sample(policy, steps, extra):
    where = setting(steps, solver_for(policy, TWO_STAGE))
    limit = replace(policy, simulations=1).cost(where).upper.nfe + extra
    driver = Driver(where, limit=limit)
    assert driver.run(policy) in driver.leaves()
    assert driver.nfe <= limit


@settings(max_examples=30)
@given(policy=searches(), until=st.integers(1, 300))
def test_until_nfe_goes_on_past_the_planned_simulations(policy, until):
    where = setting(10, solver_for(policy, DETERMINISTIC))
    policy = replace(policy, width=None, branch=None, selection="uct", until_nfe=until)
    driver = Driver(where)
    driver.run(policy)
    cost = policy.cost(where)
    assert cost.lower.nfe <= driver.nfe <= cost.upper.nfe == max(until, replace(policy, simulations=1, until_nfe=None).cost(where).upper.nfe)
    assert driver.nfe >= until - 2 * where.sample_cost - 10 * (policy.value != "rollout") * policy.finish


# Scores and failures ------------------------------------------------------------------------------------------------


@settings(max_examples=60)
@given(policy=searches(), share=st.integers(1, 5), poison=st.sampled_from([None, math.nan]))
def test_scores_that_fail_stop_nothing(policy, share, poison):
    calls = Counter()

    def value(latent):
        calls["n"] += 1
        return poison if calls["n"] % share == 0 else float(latent[0])

    driver = Driver(setting(8, solver_for(policy, DETERMINISTIC)), value=value)
    driver.run(policy)
    assert driver.leaves()
    assert driver.waves
    assert driver.nfe <= policy.cost(driver.setting).upper.nfe


@settings(max_examples=60)
@given(policy=searches(), seed=st.integers(0, 20), share=st.integers(2, 6))
def test_failed_nodes_are_not_visited_again(policy, seed, share):
    fails = lambda node: node.move.kind != "draw" and (node.index * 7 + seed) % share == 0  # noqa: E731
    driver = Driver(setting(8, solver_for(policy, DETERMINISTIC)), fails=fails)
    answer = driver.run(policy)
    assert answer is driver.tree.best()
    assert answer is None or not any(node.failed for node in answer.path())
    for request in driver.requests:
        for part in request.requests if isinstance(request, Gather) else ():
            if isinstance(part, Denoise):
                assert not any(node.failed and node.move.kind == "denoise" for node in part.group)


@pytest.mark.parametrize("value", VALUES)
def test_all_failing_ends_without_an_answer(value):
    driver = Driver(setting(8), fails=lambda node: node.move.kind == "denoise")
    assert driver.run(MCTS(value=value, width=3, simulations=10)) is None


@pytest.mark.parametrize("selection", SELECTIONS)
def test_ties_keep_the_oldest(selection):
    driver = Driver(setting(8), value=lambda latent: 0.25)
    answer = driver.run(MCTS(selection=selection, value="rollout", branch=2, width=2, simulations=12))
    assert answer is driver.leaves()[0]
    assert len(driver.leaves()) == 12


@settings(max_examples=40)
@given(policy=searches(simulations=24))
def test_finished_samples_that_are_not_the_best_are_released(policy):
    driver = Driver(setting(8, solver_for(policy, DETERMINISTIC)))
    answer = driver.run(policy)  # the driver refuses released nodes
    assert answer.status == "open"
    if policy.value == "rollout":
        assert [leaf for leaf in driver.leaves() if leaf.status == "open"] == [answer]
        assert not any(node.status == "open" and node.move.kind in ("draw", "renoise") for node in driver.tree.nodes)


# The engine ---------------------------------------------------------------------------------------------------------

WORLDS = [("vp", "ddim", "renoise"), ("vp", "exact", "step"), ("vp", "ddim(eta=1)", "step"), ("ve", "euler-ancestral", "step"), ("ve", "heun", "renoise"),
          ("flow", "flow-euler", "renoise"), ("flow", "flow-ancestral", "step")]  # fmt: skip


@pytest.mark.parametrize("value", VALUES)
@pytest.mark.parametrize(("process", "solver", "branch_by"), WORLDS, ids=lambda word: str(word))
def test_real_searches_spend_what_they_cost(process, solver, branch_by, value):
    policy = MCTS(simulations=14, value=value, branch_by=branch_by, widening=1.0, exponent=0.6, selection="puct", lookahead_steps=2, in_flight=4)
    judge = Judge()
    grown = grow(policy.search, model=Hooked(process), solver=solver, steps=8, verifiers=[judge])
    check_books(grown)
    where = Setting(grown.tree.schedule, grown.tree.solver, judge, (), False)
    cost = policy.cost(where)
    assert cost.lower.nfe <= grown.tree.ledger.nfe <= cost.upper.nfe
    assert cost.lower.verifier_calls <= grown.tree.ledger.verifier_calls["judge"] <= cost.upper.verifier_calls
    assert grown.run.answer is grown.tree.best()
    leaves = [grown.latent(node) for node in grown.nodes if node.level == 8 and not node.draft]
    assert len({tuple(leaf.tolist()) for leaf in leaves}) == len(leaves), "no two simulations make the same sample"


def test_waves_share_batches():
    calls = {}
    for in_flight in (1, 8):
        model = Hooked()
        grow(MCTS(simulations=32, value="rollout", in_flight=in_flight).search, model=model)
        assert model.seen == 32 * 6
        calls[in_flight] = model.calls
    assert calls[1] == [1] * 32 * 6
    assert calls[8] == [8] * 4 * 6


# Parameters ---------------------------------------------------------------------------------------------------------


def test_needs():
    assert MCTS().needs == {"absolute"}
    assert MCTS(branch_by="step").needs == {"absolute", "stochastic"}


@given(policy=searches(), steps=st.integers(1, 40))
def test_stops_rise_from_noise_to_clean(policy, steps):
    stops = policy.stops(setting(steps).schedule)
    assert stops[0] == 0
    assert stops[-1] == steps
    assert list(stops) == sorted(set(stops))
    assert all(policy.back(level, steps) < level for level in stops[1:])
    if policy.branch_by == "step":
        assert all(stop <= steps - 2 for stop in stops[1:-1]), "the last step alone may draw no noise"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"simulations": 0}, "simulations is 0 but must be at least 1"),
        ({"until_nfe": 0}, "until_nfe is 0"),
        ({"width": 0}, "width is 0"),
        ({"branch": 0}, "branch is 0"),
        ({"widening": 0.0}, "widening is 0"),
        ({"exponent": 1.5}, "exponent is 1.5"),
        ({"levels": (0.5, 1.0)}, "levels is 1 but must be"),
        ({"jump": 0.0}, "jump is 0"),
        ({"branch_by": "magic"}, "'renoise', 'step'"),
        ({"value": "final"}, "'x0', 'lookahead', 'rollout'"),
        ({"finish": 0}, "finish is 0"),
        ({"selection": "best"}, "'uct', 'puct', 'boltzmann', 'gumbel'"),
        ({"exploration": -1.0}, "exploration is -1"),
        ({"inverse_temperature": -1.0}, "inverse_temperature is -1"),
        ({"backup": "sum"}, "'max', 'mean', 'soft'"),
        ({"in_flight": 0}, "in_flight is 0"),
        ({"parallel": "none"}, "'unobserved', 'virtual-loss'"),
    ],
)
def test_wrong_parameters_are_refused(options, message):
    with pytest.raises(UsageError, match=message):
        MCTS(**options)


@given(policy=searches())
def test_options_survive_json_and_the_command_line(policy):
    options = json.loads(json.dumps(asdict(policy)))
    assert build(MCTS, options) == policy
    if policy.levels:
        typed = {key: ",".join(map(str, value)) if isinstance(value, list) else str(value) for key, value in options.items()}
        assert build(MCTS, typed) == policy
