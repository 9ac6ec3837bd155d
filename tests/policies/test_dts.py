"""Diffusion tree sampling and search: the tree that grows, what is backed up and read off, prices, budgets, bad scores."""

from __future__ import annotations

import json
import math
from collections import Counter
from dataclasses import asdict, replace

import pytest
import torch
from fake_driver import FakeDriver, setting
from fakes import PROMPT, Hooked, Judge, grow, sample
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from policy_checks import leaves, run, sick, values

import tsdiff
from tsdiff.plugin.conformance import PolicyConformance
from tsdiff.policies import BestOfN
from tsdiff.policies.dts import DTS, DTSStar
from tsdiff.treesearch.errors import BudgetExhausted, UsageError
from tsdiff.treesearch.node import Move
from tsdiff.treesearch.noise import derive, step_noise
from tsdiff.treesearch.parameters import build
from tsdiff.treesearch.requests import Draw, Gather

EXACT = ("vp", "exact")
NARROW = {"widening": 1.0, "exponent": 0.5}
shares = st.floats(0.01, 0.99)


@st.composite
def policies(draw, kinds=(DTS, DTSStar), most=24):
    kind = draw(st.sampled_from(kinds))
    options = {
        "simulations": draw(st.integers(1, most)),
        "levels": tuple(draw(st.lists(shares, max_size=3))),
        "widening": draw(st.sampled_from([1.0, 1.5, 2.0])),
        "exponent": draw(st.sampled_from([0.1, 0.5, 0.8])),
        "inverse_temperature": draw(st.sampled_from([0.0, 0.5, 3.0, 200.0])),
        "in_flight": draw(st.sampled_from([1, 1, 3, 8])),
    }
    if kind is DTS:
        return DTS(**options, read_out=draw(st.sampled_from(["weights", "descent"])))
    return DTSStar(**options, backup=draw(st.sampled_from(["soft", "max"])), exploration=draw(st.sampled_from([0.0, 1.0])))


class Driver(FakeDriver):
    """Also carries out what these policies ask for: groups in flight, named branches, nodes on the way, a budget that is kept."""

    def _spend(self, node, nfe):
        super()._spend(node, nfe)
        self.tree.budget.spent = self.nfe

    def _price(self, request):
        if not isinstance(request, Gather):
            return super()._price(request)
        before, total = set(self.predicted), 0
        for part in request.requests:
            total += super()._price(part)
            self.predicted.update(part.group)  # a start that two parts share is predicted once
        self.predicted = before
        return total

    def _gather(self, request):
        return tuple(self._denoise(part) for part in request.requests)

    def _denoise(self, request):
        (node,), number = request.group, request.noise.index
        stream = node.stream if number == 0 else derive(node.stream, "denoise", node.level, number)
        for stop in (*request.via, request.to):
            levels = self.tree.schedule.span(node.level, stop)
            child = self.tree.add_child(node, Move("denoise", levels, copy=number), stream, stop, number)
            if not node.failed:
                self._predict(node)
                latent = self.latents[node.index]
                for level in levels[1:]:
                    latent = 0.95 * latent + 0.3 * step_noise(stream, level, latent.shape)[0]
                self._spend(child, len(levels) - 2)
                self._new(child, latent)
            else:
                child.status = "failed"
            node, number = child, 0
        return [node]


class Grown:
    """A finished tree as a family: children by parent (None for those of the root), visits and values as noted."""

    def __init__(self, policy, steps=6, **options):
        self.driver = Driver(setting(steps), **options)
        self.answer = self.driver.run(policy)
        self.nodes = self.driver.tree.nodes
        self.children = {}
        for node in self.nodes:
            self.children.setdefault(node.parent, []).append(node)
        self.facts = {key: value for note in self.driver.tree.notes for key, value in note.items()}
        self.leaves = self.driver.leaves()

    @property
    def inner(self):
        """Everything that has children, the root first."""
        return [(node, self.children[node]) for node in (None, *self.nodes) if node in self.children]

    def visits(self, node):
        return self.facts["simulations"] if node is None else node.note["visits"]

    def value(self, node):
        return self.facts["value"] if node is None else node.note["value"]


# Identities ----------------------------------------------------------------------------------------------------------


@given(kind=st.sampled_from([DTS, DTSStar]), levels=st.lists(shares, max_size=4), steps=st.integers(1, 12), seed=st.integers(0, 99))
@settings(max_examples=15)
def test_one_simulation_is_one_plain_sample_bit_for_bit(kind, levels, steps, seed):
    policy = kind(simulations=1, levels=tuple(levels))
    one = run(policy, ("vp", "ddim(eta=1)"), seed=seed, steps=steps)
    plain = grow(sample, solver="ddim(eta=1)", seeds=[seed], steps=steps)
    assert torch.equal(one.latent(one.run.answer), plain.latent(plain.run.answer))
    assert one.tree.ledger.nfe == plain.tree.ledger.nfe == steps


@given(kind=st.sampled_from([DTS, DTSStar]), n=st.integers(1, 12), in_flight=st.integers(1, 5), seed=st.integers(0, 99))
@settings(max_examples=10)
def test_unlimited_widening_is_best_of_n(kind, n, in_flight, seed):
    tree = run(kind(simulations=n, widening=1e9, in_flight=in_flight), EXACT, seed=seed)  # on the engine: bit for bit
    chains = run(BestOfN(n=n), EXACT, seed=seed)
    assert values(leaves(tree)) == values(leaves(chains))
    assert torch.equal(tree.latent(tree.run.answer), chains.latent(chains.run.answer))
    assert tree.tree.ledger.nfe == chains.tree.ledger.nfe


def test_the_published_width_begins_with_36_independent_samples():
    # 2 n^0.8 > n - 1 for n up to 36: until then the root opens a child every time.
    assert DTS().widths(36, 6) == [(36, 36)] * 6
    assert DTS().widths(37, 6)[0] == (36, 36)
    assert DTS().widths(64, 2)[0] == (56, 56), "ceil(2 * 64^0.8)"


@given(policy=policies(), more=st.integers(1, 12), seed=st.integers(0, 20))
@settings(max_examples=40)
def test_more_simulations_go_on_with_the_same_tree(policy, more, seed):
    policy = replace(policy, in_flight=1)
    few, many = Grown(policy, seed=seed), Grown(replace(policy, simulations=policy.simulations + more), seed=seed)
    assert [node.id for node in few.nodes] == [node.id for node in many.nodes][: len(few.nodes)]
    assert many.answer.score("value") >= few.answer.score("value")


@given(policy=policies(), seed=st.integers(0, 20))
@settings(max_examples=8)
def test_the_driver_of_these_tests_grows_the_engine_s_trees(policy, seed):
    """Where scores do not matter, the same nodes with the same streams at the same price."""
    policy = replace(policy, inverse_temperature=0.0) if isinstance(policy, DTS) else replace(policy, exploration=0.0)
    flat = Grown(policy, seed=seed, value=lambda latent: 0.0)
    grown = run(policy, EXACT, seed=seed, judge=Judge(value=lambda candidates: torch.zeros(len(candidates))))
    assert [(node.level, node.stream, node.nfe) for node in flat.nodes] == [(node.level, node.stream, node.nfe) for node in grown.nodes]
    assert flat.driver.spend.nfe == grown.tree.ledger.nfe


# The tree ------------------------------------------------------------------------------------------------------------


@given(policy=policies(), seed=st.integers(0, 99))
def test_counts_and_widths(policy, seed):
    """Every simulation is counted once at each depth, and m of them give a node as many children as the rule says."""
    tree = Grown(policy, seed=seed)
    assert tree.facts["simulations"] == policy.simulations
    for node, children in tree.inner:
        assert sum(tree.visits(child) for child in children) == tree.visits(node)
        count = 0
        for n in range(1, tree.visits(node) + 1):
            # A node in the middle of a rollout gets its first child with it.
            count += count < policy.widening * n**policy.exponent
        assert len(children) == count
    for node in tree.nodes:
        assert (node.level == 6) == (node not in tree.children)


@given(policy=policies(), seed=st.integers(0, 99))
def test_back_up_is_brute_force_over_the_tree(policy, seed):
    """Values as noted, against the definition: recomputed from the scores of finished samples alone."""
    tree = Grown(policy, seed=seed)
    weight = policy.inverse_temperature

    def value(node):
        if node not in tree.children:
            return node.score("value")
        below = torch.tensor([value(child) for child in tree.children[node]], dtype=torch.float64)
        if isinstance(policy, DTSStar) and policy.backup == "max":
            return float(below.max())
        return float(below.mean() if weight == 0.0 else (torch.logsumexp(weight * below, 0) - math.log(len(below))) / weight)

    for node in (None, *tree.nodes):
        assert tree.value(node) == pytest.approx(value(node), abs=1e-12)


@given(policy=policies(), steps=st.integers(2, 9), seed=st.integers(0, 99))
@settings(max_examples=8)
def test_no_two_samples_are_the_same(policy, steps, seed):
    """Children of one node have noises of their own, also where the first came with a rollout; the last step never parts."""
    grown = run(policy, ("vp", "ddim(eta=1)"), seed=seed, steps=steps)
    assert len({tuple(grown.latent(leaf).tolist()) for leaf in leaves(grown)}) == len(leaves(grown))
    assert {node.level for node in grown.nodes} == set(policy.stops(grown.tree.schedule))


@given(policy=policies(), seed=st.integers(0, 99))
@settings(max_examples=40)
def test_finished_samples_that_lost_are_released_and_nothing_else(policy, seed):
    tree = Grown(policy, seed=seed)  # the driver refuses released nodes
    assert {node for node in tree.nodes if node.status == "closed"} == set(tree.leaves) - {tree.answer}


def test_stops_by_hand():
    schedule = setting(50).schedule
    assert DTS().stops(schedule) == [0, 10, 20, 30, 40, 50], "50, 40, 30, 20 and 10 of 50 steps to go"
    assert DTS(levels=()).stops(schedule) == [0, 50]
    assert DTS(levels=(0.001, 0.999)).stops(schedule) == [0, 1, 48, 50]
    assert [DTS().stops(setting(steps).schedule) for steps in (1, 2, 3)] == [[0, 1], [0, 2], [0, 1, 3]]


# Choosing ------------------------------------------------------------------------------------------------------------


@given(seed=st.integers(0, 99))
@settings(max_examples=40)
def test_dts_star_without_exploration_follows_the_best_sample(seed):
    """Max back-up and c = 0: every simulation leaves the tree on the path of the best sample before it."""
    tree = Grown(DTSStar(simulations=20, exploration=0.0, backup="max", **NARROW), seed=seed)
    for leaf in tree.leaves[1:]:
        before = [other for other in tree.leaves if other.index < leaf.index]
        best = max(before, key=lambda other: (other.score("value"), -other.index))
        shared = [node for node in leaf.path() if node in best.path()]
        parted = leaf.path()[len(shared)]
        assert all(node.index >= parted.index for node in leaf.path()[len(shared) :])
        assert parted.parent is (shared[-1] if shared else None)
    assert tree.facts["greedy"] == tree.answer.index


def test_exploration_spreads_visits():
    """With a large constant all children of a node are visited alike; with none, one gets most."""

    def spread(exploration):
        tree = Grown(DTSStar(simulations=60, exploration=exploration, backup="max", **NARROW), seed=5)
        visits = [tree.visits(node) for node in tree.children[None]]
        assert len(visits) == 8
        return max(visits) / sum(visits)

    assert spread(1000.0) < 0.2
    assert spread(0.0) > 0.6


@given(seed=st.integers(0, 99))
@settings(max_examples=40)
def test_the_greedy_read_out_descends_by_values(seed):
    tree = Grown(DTSStar(simulations=25, **NARROW), seed=seed)
    node = None
    while node in tree.children:
        node = max(tree.children[node], key=lambda child: (tree.value(child), -child.index))
    assert tree.facts["greedy"] == node.index


def test_ties_go_to_the_oldest():
    tree = Grown(DTSStar(simulations=12, exploration=0.0, **NARROW), value=lambda latent: 0.0)
    assert tree.answer is tree.leaves[0]
    first = tree.children[None][0]
    assert tree.visits(first) == 12 - len(tree.children[None]) + 1, "everything but the other openings of the root"


# What DTS reads off --------------------------------------------------------------------------------------------------


@given(policy=policies(kinds=[DTS]), seed=st.integers(0, 99))
@settings(max_examples=40)
def test_draws_are_finished_samples_with_their_probabilities(policy, seed):
    tree = Grown(policy, seed=seed)
    law = {leaf.index: leaf.note["probability"] for leaf in tree.leaves}
    assert sum(law.values()) == pytest.approx(1.0)
    assert len(tree.facts["draws"]) == policy.draws
    assert all(law[draw["node"]] == draw["probability"] > 0.0 for draw in tree.facts["draws"])
    assert all(("probability" in node.note) == (node in tree.leaves) for node in tree.nodes)


def test_draws_have_the_frequencies_that_they_say():
    count = 20_000
    tree = Grown(DTS(simulations=12, draws=count, inverse_temperature=0.5, **NARROW))
    drawn = Counter(draw["node"] for draw in tree.facts["draws"])
    for leaf in tree.leaves:
        p = leaf.note["probability"]
        assert drawn[leaf.index] / count == pytest.approx(p, abs=5.0 * math.sqrt(p * (1.0 - p) / count))


@given(seed=st.integers(0, 99), weight=st.sampled_from([0.0, 0.7, 4.0]))
@settings(max_examples=40)
def test_descent_is_the_product_of_the_choices(seed, weight):
    tree = Grown(DTS(simulations=20, inverse_temperature=weight, read_out="descent", **NARROW), seed=seed)
    for leaf in tree.leaves:
        probability = 1.0
        for node in leaf.path():
            values = torch.tensor([tree.value(sibling) for sibling in tree.children[node.parent]], dtype=torch.float64)
            probability *= float(torch.softmax(weight * values, 0)[tree.children[node.parent].index(node)])
        assert leaf.note["probability"] == pytest.approx(probability, rel=1e-9)
    assert tree.facts["log_normalizer"] == pytest.approx(weight * tree.value(None))


@given(seed=st.integers(0, 99), weight=st.sampled_from([0.0, 0.7, 4.0]))
@settings(max_examples=40)
def test_weights_divide_the_choices_out(seed, weight):
    """From the smaller trees alone: exp(lambda score), over the product of (children * probability of the one chosen)."""
    policy = DTS(simulations=18, widening=1.0, exponent=0.85, levels=(0.5,), inverse_temperature=weight)
    tree = Grown(policy, seed=seed)
    assume(len(tree.leaves) == policy.simulations)  # a simulation that ended at a finished sample left no trace to check
    log_weights = []
    for count, leaf in enumerate(tree.leaves):
        known = {node for other in tree.leaves[:count] for node in other.path()}
        log_weight = weight * leaf.score("value")
        for node in leaf.path():
            if node not in known:
                break
            siblings = [child for child in tree.children[node.parent] if child in known]
            values = torch.tensor([backed_up(child, tree, known, weight) for child in siblings], dtype=torch.float64)
            log_weight -= float(torch.log_softmax(weight * values, 0)[siblings.index(node)]) + math.log(len(siblings))
        log_weights.append(log_weight)
    expected = torch.softmax(torch.tensor(log_weights, dtype=torch.float64), 0)
    assert [leaf.note["probability"] for leaf in tree.leaves] == pytest.approx(expected.tolist(), rel=1e-9)
    assert tree.facts["log_normalizer"] == pytest.approx(float(torch.logsumexp(torch.tensor(log_weights, dtype=torch.float64), 0)) - math.log(len(log_weights)), abs=1e-9)


def backed_up(node, tree, known, weight):
    """A value in the tree as it was when only `known` nodes existed."""
    if node not in tree.children:
        return node.score("value")
    below = torch.tensor([backed_up(child, tree, known, weight) for child in tree.children[node] if child in known], dtype=torch.float64)
    return float(below.mean() if weight == 0.0 else (torch.logsumexp(weight * below, 0) - math.log(len(below))) / weight)


# Prices and budgets --------------------------------------------------------------------------------------------------


@given(policy=policies(most=60), steps=st.integers(1, 12), until=st.none() | st.integers(1, 200))
def test_cost_bounds_what_is_spent(policy, steps, until):
    policy = replace(policy, until_nfe=until)
    tree = Grown(policy, steps)
    spent, cost = tree.driver.spend, policy.cost(setting(steps))
    assert cost.lower.nfe <= spent.nfe <= cost.upper.nfe
    assert cost.lower.verifier_calls <= spent.verifier_calls == len(tree.leaves) <= cost.upper.verifier_calls
    assert cost.lower.decodes <= spent.decodes <= cost.upper.decodes
    assert sum(node.nfe for node in tree.nodes) == spent.nfe
    if until is not None:
        assert spent.nfe <= max(until, steps)
    depth = len(policy.stops(setting(steps).schedule))
    counted = [sum(len(node.path()) == level for node in tree.nodes) for level in range(1, depth + 1)]
    for count, (low, high) in zip(counted, policy.widths(tree.facts["simulations"], depth), strict=True):
        assert low <= count <= high


@given(policy=policies(), steps=st.integers(1, 12))
@settings(max_examples=8)
def test_rows_are_the_steps_left_where_simulations_branch_off(policy, steps):
    """At most M S (and exactly that while the root takes them all); a node that branches again is not predicted again."""
    model = Hooked("vp")
    grown = run(policy, EXACT, model=model, steps=steps)
    children = Counter(node.parent for node in grown.nodes)
    # The first child of a node came with the rollout that made the node.
    branched = sum((count - 1) * (steps - node.level - 1) for node, count in children.items() if node is not None)
    assert model.seen == grown.tree.ledger.nfe == children[None] * steps + branched <= policy.simulations * steps


def test_the_bounds_by_hand():
    """Three simulations, C = 1, alpha = 0.5, one branch level at 6 of 10: the third goes below one of two first noises."""
    # widths: root 2; then 3 or... the noise that it passes has 2 children, or it is 1 visit short: ceil(sqrt 2) = 2.
    policy, where = DTS(simulations=3, levels=(0.6,), **NARROW), setting(10)
    assert policy.widths(3, 3) == [(2, 2), (3, 3), (3, 3)]
    assert policy.cost(where).lower.nfe == policy.cost(where).upper.nfe == 10 + 10 + 9, "the shared first prediction once"
    # Ten: the root has 4 children. Least: 1, 1, 1 and 7 simulations with 1, 1, 1 and 3 children, of which 1, 1, 1, 1, 1 and 5.
    assert [low for low, _ in policy.widths(10, 3)] == [4, 6, 8]
    assert policy.cost(where).exact
    assert not replace(policy, simulations=10).cost(where).exact


@pytest.mark.parametrize("kind", [DTS, DTSStar])
@pytest.mark.parametrize("steps", [7, 20])
@pytest.mark.parametrize("shape", [{}, NARROW])
def test_a_fitted_search_fills_its_budget(kind, steps, shape):
    for multiple in (16, 23):
        nfe = multiple * steps
        fitted = kind(in_flight=4, **shape).fit(nfe, setting(steps))
        assert fitted.cost(setting(steps)).upper.nfe <= nfe
        spent = Grown(fitted, steps, limit=nfe).driver.nfe
        assert 0.9 * nfe <= spent <= nfe


def test_a_budget_below_one_sample_is_refused():
    with pytest.raises(UsageError, match=r"dts: a budget of 19 NFE is too small; .* needs 20 NFE"):
        DTS().fit(19, setting(20))
    assert DTSStar().fit(20, setting(20)).cost(setting(20)).upper.nfe == 20


@given(policy=policies(), cap=st.integers(6, 80))
@settings(max_examples=10)
def test_a_cap_ends_the_search_without_cutting_a_sample_short(policy, cap):
    grown = run(policy, EXACT, nfe=cap)
    assert grown.tree.ledger.nfe <= cap
    assert None not in values(leaves(grown))
    assert grown.run.truncated is None
    if grown.tree.notes[0]["simulations"] < policy.simulations:
        assert grown.tree.ledger.nfe > cap - 6, "the next one did not fit, and none costs more than a sample"


def test_a_refusal_ends_the_search_with_what_there_is():
    """Time that is over is a refusal, too."""
    policy = DTS(simulations=8)
    search = policy.search(Driver(setting(6)).tree)
    assert isinstance(search.send(None), Draw)
    with pytest.raises(BudgetExhausted):  # no sample yet: the engine has to finish one
        search.throw(BudgetExhausted("time is over", price=6, remaining=None))
    driver = Driver(setting(6))
    search, reply = policy.search(driver.tree), None
    while not isinstance(request := search.send(reply), Gather) or len(driver.leaves()) < 2:
        reply = getattr(driver, f"_{type(request).__name__.lower()}")(request)
    with pytest.raises(StopIteration) as stop:
        search.throw(BudgetExhausted("time is over", price=6, remaining=None))
    assert stop.value.value is driver.tree.best()
    assert len(driver.leaves()) == 2
    assert driver.tree.notes[0]["simulations"] == 2
    assert driver.tree.notes[-1]["draws"]


# Bad scores, failures, refusals ---------------------------------------------------------------------------------------


@given(policy=policies(), every=st.integers(1, 4), seed=st.integers(0, 20))
def test_null_scores_are_left_out(policy, every, seed):
    tree = Grown(policy, seed=seed, value=lambda latent: None if int(1e4 * latent[0]) % every == 0 else float(latent[1]))
    scored = [leaf for leaf in tree.leaves if leaf.score("value") is not None]
    assert tree.facts["simulations"] == policy.simulations
    assert tree.answer is tree.driver.tree.best()
    if isinstance(policy, DTS):
        assert {draw["node"] for draw in tree.facts["draws"]} <= {leaf.index for leaf in scored}
        assert sum(leaf.note.get("probability", 0.0) for leaf in scored) == pytest.approx(1.0 if scored else 0.0)
    for node, children in tree.inner:
        assert (tree.value(node) is None) == all(tree.value(child) is None for child in children)
    if not scored:
        assert tree.facts.get("greedy") is None
        assert tree.facts.get("log_normalizer") is None
    json.dumps(tree.driver.tree.to_json(), allow_nan=False)


@given(policy=policies(), every=st.integers(2, 5), seed=st.integers(0, 20))
def test_failed_nodes_are_passed_by(policy, every, seed):
    tree = Grown(policy, seed=seed, fails=lambda node: node.move.kind == "denoise" and (7 * node.index + seed) % every == 0)
    assert tree.facts["simulations"] == policy.simulations
    assert tree.driver.nfe <= policy.cost(setting(6)).upper.nfe, "failures only make a search cheaper"
    assert tree.answer is None or not any(node.failed for node in tree.answer.path())
    for draw in tree.facts.get("draws", []):
        assert not any(node.failed for node in tree.nodes[draw["node"]].path())
    for node in tree.nodes:
        assert not node.failed or all(child.failed for child in tree.children.get(node, [])), "nothing is grown from a failed node"


@pytest.mark.parametrize("kind", [DTS, DTSStar])
def test_a_model_that_breaks_on_the_way_fails_nodes_only(kind):
    grown = grow(kind(simulations=16, in_flight=3, **NARROW).search, model=sick(0.7), solver="ddim(eta=1)", ok=False)
    assert any(node.failed for node in grown.nodes)
    assert not any(node.failed for node in grown.run.answer.path())
    assert grown.tree.notes[0]["simulations"] == 16


@pytest.mark.parametrize("kind", [DTS, DTSStar])
def test_a_deterministic_solver_is_refused_by_name(kind):
    with pytest.raises(UsageError, match=f"policy {kind.name} .* but solver ddim is deterministic; choose a stochastic one .*takes --eta\\)$"):
        tsdiff.search("gaussian", PROMPT, policy=kind(), verifier="gaussian-target", solver="ddim")
    assert kind().needs == kind(levels=()).needs == {"absolute", "stochastic"}, "first noises branch, too"


def test_scores_that_only_rank_are_refused():
    judge = Judge(scope="set", value=lambda candidates: candidates.x0[:, 0].argsort().argsort().float())
    with pytest.raises(UsageError, match="dts compares scores across sets, but verifier judge"):
        tsdiff.search("gaussian", PROMPT, policy=DTS(), verifier=judge, solver="exact")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"simulations": 0}, "simulations is 0 but must be at least 1"),
        ({"until_nfe": 0}, "until_nfe is 0"),
        ({"levels": (0.5, 1.0)}, "levels is 1 but must be"),
        ({"widening": 0.9}, "widening is 0.9 but must be at least 1"),
        ({"exponent": 0.0}, "exponent is 0 "),
        ({"exponent": 1.1}, "exponent is 1.1"),
        ({"inverse_temperature": -1.0}, "inverse_temperature is -1"),
        ({"inverse_temperature": math.inf}, "inverse_temperature is inf"),
        ({"in_flight": 0}, "in_flight is 0"),
        ({"draws": -1}, "draws is -1"),
        ({"read_out": "best"}, "'weights', 'descent'"),
    ],
)
def test_wrong_parameters_are_refused(options, message):
    with pytest.raises(UsageError, match=message):
        DTS(**options)
    if not {"draws", "read_out"} & set(options):
        with pytest.raises(UsageError, match=message):
            DTSStar(**options)


def test_wrong_parameters_of_dts_star_are_refused():
    with pytest.raises(UsageError, match="exploration is -1"):
        DTSStar(exploration=-1.0)
    with pytest.raises(UsageError, match="'soft', 'max'"):
        DTSStar(backup="mean")


@given(policy=policies())
def test_options_survive_json_and_the_command_line(policy):
    options = json.loads(json.dumps(asdict(policy)))
    assert build(type(policy), options) == policy
    if policy.levels:
        typed = {key: ",".join(map(str, value)) if isinstance(value, list) else str(value) for key, value in options.items()}
        assert build(type(policy), typed) == policy


class TestConformance(PolicyConformance):
    """A narrow tree with several simulations in flight."""

    examples = 2

    @pytest.fixture(params=[DTS(**NARROW, simulations=10, in_flight=4, read_out="descent"), DTSStar(**NARROW, simulations=10, in_flight=3, backup="max")], ids=lambda policy: policy.name)
    def policy(self, request):
        return request.param
