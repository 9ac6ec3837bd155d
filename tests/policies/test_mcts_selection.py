"""Where a Monte Carlo tree search goes next: every selection rule in a tree by its formula, and a search by clean estimates by its pseudo-code."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
from fake_driver import DETERMINISTIC, FakeDriver, setting
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from tsdiff.plugin.conformance import PolicyConformance
from tsdiff.policies.mcts import MCTS
from tsdiff.policies.mcts_tree import Place, SearchTree
from tsdiff.treesearch.node import Node
from tsdiff.treesearch.requests import Denoise, Draw, Gather, Renoise, Score

LAMBDA = 5.0


@dataclass(eq=False)
class Latent:
    """What a search tree sees of a node."""

    index: int
    failed: bool = False
    status: str = "open"


def tree_of(policy: MCTS, children: list[tuple[float, float, int]], *, depth: int = 4, seed: int = 0) -> tuple[SearchTree, Place]:
    """A search tree with one full place at depth 1, whose children have these values, cheap scores and visits."""
    tree = SearchTree(policy, depth, np.random.default_rng(seed))
    parent = tree.open(tree.root)
    tree.observe(parent, [Latent(0)], children[0][0], {})
    for value, cheap, visits in children:
        child = tree.open(parent)
        node = Latent(len(parent.children))
        tree.observe(child, [node], value, {node: cheap})
        for above in child.path():
            above.visits += visits - 1
    return tree, parent


def scaled(number: float, all_: list[float]) -> float:
    """Min-max normalised."""
    return (number - min(all_)) / (max(all_) - min(all_))


@st.composite
def families(draw):
    several = draw(st.lists(st.tuples(st.floats(-9, 9), st.floats(-9, 9), st.integers(1, 30)), min_size=2, max_size=6))
    assume(all(len({round(child[place], 3) for child in several}) == len(several) for place in (0, 1)))
    return several


def decide(policy: MCTS, children: list[tuple[float, float, int]]) -> int:
    """Which child a simulation goes on to."""
    tree, parent = tree_of(replace(policy, backup="max"), children)
    return tree._choose(parent, parent.children).number


def best(scores: list[float]) -> int:
    """The place of the highest, which is well above the others."""
    first, second = sorted(scores, reverse=True)[:2]
    assume(first - second > 1e-6)
    return scores.index(first)


@settings(max_examples=40)
@given(children=families(), c=st.floats(0.0, 3.0))
def test_puct_weighs_values_against_a_prior_of_clean_estimates(children, c):
    """Q + (c + ln((N + 19653) / 19652)) P sqrt(N) / (1 + n), P the softmax of normalised estimates."""
    values, cheap, visits = (list(column) for column in zip(*children, strict=True))
    total = 1 + sum(visits)  # the parent's own simulation too
    weights = [math.exp(LAMBDA * scaled(one, cheap)) for one in cheap]
    rate = c + math.log((total + 19653) / 19652)
    scores = [scaled(v, values) + rate * w / sum(weights) * math.sqrt(total) / (1 + n) for v, w, n in zip(values, weights, visits, strict=True)]
    assert decide(MCTS(selection="puct", exploration=c, inverse_temperature=LAMBDA), children) == best(scores)
    even = [scaled(v, values) + rate / len(values) * math.sqrt(total) / (1 + n) for v, n in zip(values, visits, strict=True)]
    assert decide(MCTS(selection="puct", exploration=c, prior="uniform"), children) == best(even)


@settings(max_examples=40)
@given(children=families())
def test_below_the_root_gumbel_serves_whoever_has_too_few_visits(children):
    """The largest pi' - n / (1 + sum n), pi' the softmax of log P + (c_visit + max n) c_scale Q."""
    values, cheap, visits = (list(column) for column in zip(*children, strict=True))
    logits = [LAMBDA * scaled(p, cheap) + (50 + max(visits)) * 0.1 * scaled(v, values) for v, p in zip(values, cheap, strict=True)]
    weights = [math.exp(logit - max(logits)) for logit in logits]
    scores = [w / sum(weights) - n / (1 + sum(visits)) for w, n in zip(weights, visits, strict=True)]
    assert decide(MCTS(selection="gumbel", inverse_temperature=LAMBDA), children) == best(scores)


@settings(max_examples=40)
@given(children=families(), flying=st.integers(0, 4))
def test_uct_counts_what_is_in_flight_with_or_without_a_loss(children, flying):
    """Unobserved counts enter the bonus alone; a virtual loss takes its share of the value, too."""
    values, _, visits = (list(column) for column in zip(*children, strict=True))
    for parallel in ("unobserved", "virtual-loss"):
        tree, parent = tree_of(MCTS(parallel=parallel), children)
        chosen = parent.children[values.index(max(values))]
        for above in chosen.path():
            above.unobserved += flying
        total = 1 + sum(visits) + flying
        scores = []
        for child, value, n in zip(parent.children, values, visits, strict=True):
            q, more = scaled(value, values), flying if child is chosen else 0
            scores.append(q * (n / (n + more) if parallel == "virtual-loss" else 1.0) + math.sqrt(2.0 * math.log(total) / (n + more)))
        assert tree._choose(parent, parent.children).number == best(scores)


def test_boltzmann_chooses_in_proportion():
    """exp(lambda Q), within 4 standard errors of 4000 choices."""
    tree, parent = tree_of(MCTS(selection="boltzmann", inverse_temperature=2.0), [(-3.0, 0.0, 1), (0.0, 0.0, 9), (3.0, 0.0, 2)])
    weights = np.exp(2.0 * np.array([0.0, 0.5, 1.0]))
    law = weights / weights.sum()
    shares = np.bincount([tree._choose(parent, parent.children).number for _ in range(4000)], minlength=3) / 4000
    assert (np.abs(shares - law) < 4.0 * np.sqrt(law * (1.0 - law) / 4000)).all()


@settings(max_examples=40)
@given(children=families(), seed=st.integers(0, 99))
def test_halving_keeps_the_highest_of_gumbel_prior_and_value(children, seed):
    """After the first phase the better half by g + log P + sigma(Q) stays in the race."""
    assume(len(children) > 2)
    policy = MCTS(selection="gumbel", width=len(children), simulations=8 * len(children), inverse_temperature=LAMBDA)
    tree = SearchTree(policy, 4, np.random.default_rng(seed))
    noise = -np.log(-np.log(np.random.default_rng(seed).random(len(children))))
    values, cheap, _ = (list(column) for column in zip(*children, strict=True))
    for number, (value, estimate, _) in enumerate(children):
        child = tree.open(tree.root)
        node = Latent(number)
        tree.observe(child, [node], value, {node: estimate})
    assert tree.halving is not None
    tree.halving.left = 0
    racing = {place.number for place in tree.halving.considered(tree.root.children)}
    scores = [g + LAMBDA * scaled(p, cheap) + (50 + 1) * 0.1 * scaled(v, values) for g, v, p in zip(noise, values, cheap, strict=True)]
    stay = (len(children) + 1) // 2
    ranked = sorted(range(len(children)), key=lambda place: -scores[place])
    assume(scores[ranked[stay - 1]] - scores[ranked[stay]] > 1e-6)
    assert racing == set(ranked[:stay])


# A whole search by estimates ----------------------------------------------------------------------------------------


class Driver(FakeDriver):
    """Takes gathered requests apart."""

    def _price(self, request: Any) -> int:
        return max((super(Driver, self)._price(part) for part in request.requests), default=0) if isinstance(request, Gather) else super()._price(request)

    def _gather(self, request: Gather) -> tuple[Any, ...]:
        return tuple(getattr(self, f"_{type(part).__name__.lower()}")(part) for part in request.requests)


class ByEstimates:
    """The pseudo-code of `MCTS` by clean estimates and re-noising, one simulation after the other."""

    def __init__(self, policy: MCTS) -> None:
        self.policy = policy

    def search(self, tree: Any) -> Any:
        policy, last = self.policy, tree.schedule.last
        stops = policy.stops(tree.schedule)
        nodes: dict[tuple[int, ...], Node] = {}
        own: dict[tuple[int, ...], float] = {}
        visits: dict[tuple[int, ...], int] = {(): 0}

        def children(place: tuple[int, ...]) -> list[tuple[int, ...]]:
            return [other for other in nodes if other[:-1] == place]

        def worth(place: tuple[int, ...]) -> float:
            """Of the best child; a place without any is worth its own estimate."""
            return max((worth(child) for child in children(place)), default=own.get(place, 0.0))

        def preference(place: tuple[int, ...]) -> float:
            low, high = min(own.values()), max(own.values())
            value = (worth(place) - low) / (high - low) if high > low else 0.5
            return value + math.sqrt(2 * math.log(visits[place[:-1]]) / visits[place])

        for _ in range(policy.simulations):
            place: tuple[int, ...] = ()
            while len(place) < len(stops) - 2 and len(children(place)) >= max(1.0, policy.widening * (visits[place] + 1) ** policy.exponent):
                place = max(children(place), key=preference)
            number = len(children(place))
            if not place:
                (start,) = yield Draw(1)
            elif number == 0:
                start = nodes[place]
            else:
                (start,) = yield Renoise(nodes[place], to=max(0, stops[len(place)] - round(policy.jump * last)))
            child = (*place, number)
            (nodes[child],) = yield Denoise(start, to=stops[len(child)])
            (own[child],) = yield Score(nodes[child])
            for depth in range(len(child) + 1):
                visits[child[:depth]] = visits.get(child[:depth], 0) + 1
        leaves = [place for place in nodes if len(place) < len(stops) - 1 and not children(place)]
        leaves.sort(key=lambda place: (-own[place], nodes[place].index))
        samples = yield Denoise([nodes[place] for place in leaves[: policy.finish]], to=last)
        yield Score(samples)
        return tree.best()


@settings(max_examples=30)
@given(
    simulations=st.integers(1, 40), widening=st.floats(0.5, 1.5), exponent=st.floats(0.3, 0.7), jump=st.sampled_from([0.1, 0.2, 0.5]), finish=st.integers(1, 5),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_clean_estimates_and_renoised_children_are_the_sequential_pseudo_code(simulations, widening, exponent, jump, finish, seed):
    policy = MCTS(simulations=simulations, widening=widening, exponent=exponent, jump=jump, finish=finish, in_flight=1, levels=(0.3, 0.6))
    where = setting(10, DETERMINISTIC)
    fast, slow = Driver(where, seed=seed), Driver(where, seed=seed)
    answer, expected = fast.run(policy), slow.run(ByEstimates(policy))
    assert [leaf.score("value") for leaf in fast.leaves()] == [leaf.score("value") for leaf in slow.leaves()], "the same simulations in the same order"
    assert answer.id == expected.id
    assert fast.nfe == slow.nfe


NARROW = {"simulations": 12, "widening": 1.0, "exponent": 0.5}
OTHERWISE = {
    "gumbel": MCTS(**NARROW, width=4, selection="gumbel", value="rollout"),
    "puct": MCTS(**NARROW, selection="puct", value="lookahead", lookahead_steps=2, backup="soft", parallel="virtual-loss"),
}


class TestConformance(PolicyConformance):
    examples = 2

    @pytest.fixture(params=OTHERWISE)
    def policy(self, request):
        return OTHERWISE[request.param]
