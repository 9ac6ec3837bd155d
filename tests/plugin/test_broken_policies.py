"""Every mistake fails the one check that is made for it, and no other."""

from __future__ import annotations

import inspect
import itertools
import random
import time
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import pytest
import torch

from tsdiff.plugin import (
    BudgetExhausted,
    Condition,
    Cost,
    Denoise,
    Draw,
    Fresh,
    Release,
    Score,
    Spend,
    UsageError,
    Value,
    build,
    check,
    parameter,
)
from tsdiff.plugin.conformance import PolicyConformance, gaussian


@dataclass(frozen=True, kw_only=True)
class Sound:
    """Best of n, with nothing wrong."""

    name: ClassVar[str] = "test-sound"
    size_parameters: ClassVar[tuple[str, ...]] = ("n",)
    needs: ClassVar[frozenset[str]] = frozenset()

    n: int = parameter(2, low=1, help="samples")

    def __post_init__(self):
        check(self)

    def search(self, tree):
        leaves = yield from self.sample(tree, self.n)
        return tree.best() or next((leaf for leaf in leaves if not leaf.failed), None)

    def sample(self, tree, count):
        """Some finished, scored samples."""
        leaves = yield Denoise((yield Draw(count)), to=tree.schedule.last)
        yield Score(leaves)
        return leaves

    def cost(self, setting):
        return Cost.exactly(Spend(nfe=self.n * setting.sample_cost) + setting.scoring(self.n, final=True) + setting.result())

    def fit(self, nfe, setting):
        if nfe < setting.sample_cost:
            raise UsageError(f"a budget of {nfe} NFE is too small; the smallest is {setting.sample_cost}")
        return replace(self, n=nfe // setting.sample_cost)


class Varied(Sound):
    """Two samples, and as many more as its `choose` says."""

    most: ClassVar[int] = 1

    def search(self, tree):
        leaves = yield from self.sample(tree, 2)
        if more := self.choose(tree, leaves):
            yield from self.sample(tree, int(more))
        return tree.best() or next((leaf for leaf in leaves if not leaf.failed), None)

    def choose(self, tree, leaves):
        """At most `most`."""
        raise NotImplementedError

    def cost(self, setting):
        fewest, most = (Sound.cost(replace(self, n=n), setting).upper for n in (2, 2 + self.most))
        return Cost(fewest, most)

    def fit(self, nfe, setting):
        price = self.cost(setting).upper.nfe
        if nfe < price:
            raise UsageError(f"a budget of {nfe} NFE is too small; the smallest is {price}")
        return self


# What its results follow from ----------------------------------------------------------------------------------------


class PythonsChance(Varied):
    """Python's own generator."""

    def choose(self, tree, leaves):
        return random.random() < 0.5


class NumpysChance(Varied):
    """Numpy's global generator."""

    def choose(self, tree, leaves):
        return np.random.rand() < 0.5  # noqa: NPY002 - that is the mistake


class TorchsChance(Varied):
    """Torch's default generator."""

    def choose(self, tree, leaves):
        return bool(torch.rand(()) < 0.5)


class DrawsForNothing(Sound):
    """The result is the same, and yet the caller's own random numbers are others now."""

    def search(self, tree):
        random.random()
        return (yield from super().search(tree))


class ReadsAGlobalState(Varied):
    """Nothing is drawn, and yet the result follows from a global generator."""

    most = 6

    def choose(self, tree, leaves):
        return random.getstate()[1][1] % 7


class Alternates(Varied):
    """Keeps a count from search to search."""

    count: ClassVar[int] = 0

    def choose(self, tree, leaves):
        Alternates.count += 1
        return Alternates.count % 2 == 0


class WritesTheTime(Sound):
    """A clock in the tree."""

    def search(self, tree):
        tree.note(began=time.perf_counter())
        return (yield from super().search(tree))


class CountsItsNeighbours(Varied):
    """Searches that run at the same time know of each other."""

    running: ClassVar[int] = 0

    def search(self, tree):
        CountsItsNeighbours.running += 1
        try:
            return (yield from super().search(tree))
        finally:
            CountsItsNeighbours.running -= 1

    def choose(self, tree, leaves):
        return CountsItsNeighbours.running > 1


class FollowsTheOneBefore(Varied):
    """A search depends on whether the one that started before it had the same first score."""

    latest: ClassVar[float | None] = None

    def choose(self, tree, leaves):
        score, before = leaves[0].score("near-origin"), FollowsTheOneBefore.latest
        FollowsTheOneBefore.latest = score
        return None not in (score, before) and abs(score - before) > 1e-3


class TrustsTheLastDigits(Varied):
    """Decides by digits that rounding changes."""

    most = 6

    def choose(self, tree, leaves):
        score = leaves[0].score("near-origin")
        return 0 if score is None else int(abs(score) * 1e11) % 7


class LeavesThingsBehind(Varied):
    """What an interrupted search leaves behind changes the one that takes up its work."""

    begun: ClassVar[set[int]] = set()

    def search(self, tree):
        key = int(tree.rng("key").integers(1 << 62))
        again = key in self.begun
        self.begun.add(key)
        try:
            answer = yield from super().search(tree)
            if again:
                yield from self.sample(tree, 1)
        except BudgetExhausted:
            self.begun.discard(key)
            raise
        self.begun.discard(key)
        return answer

    def choose(self, tree, leaves):
        return 0


# What it sees, touches and asks for ----------------------------------------------------------------------------------


class ReadsTheSeed(Varied):
    """The seed is none of its business: `tree.rng` is."""

    def choose(self, tree, leaves):
        return tree.seed % 2 == 0


class KeepsAModel(Sound):
    """Loads a model of its own."""

    def search(self, tree):
        model = gaussian("vp")
        leaves = yield from super().search(tree)
        assert model.media
        return leaves


class KeepsATensor(Sound):
    """Does its sums in torch."""

    def search(self, tree):
        weights = {"of samples": [torch.ones(3)]}
        leaves = yield from super().search(tree)
        assert weights
        return leaves


class EvaluatesByItself(Sound):
    """A prediction behind the engine's back costs nothing, says the ledger."""

    def search(self, tree):
        self.peek()
        return (yield from super().search(tree))

    @staticmethod
    def peek():
        model = gaussian("vp")
        (encoded,) = model.encode([Condition()], guided=False)
        model.forward(torch.zeros(1, 2), torch.ones(1), encoded.rows)


class ChangesValues(Sound):
    """Writes its own scores on nodes."""

    def search(self, tree):
        leaves = yield from self.sample(tree, self.n)
        for leaf in leaves:
            if leaf.score("near-origin") is not None:
                leaf.values["near-origin"] = Value(leaf.score("near-origin") + 1.0)
        return tree.best() or next((leaf for leaf in leaves if not leaf.failed), None)


class ClosesNodesItself(Sound):
    """Does the engine's work."""

    def search(self, tree):
        leaves = yield from self.sample(tree, self.n)
        tree.nodes[0].status = "closed"
        yield Release(leaves)
        return tree.best() or next((leaf for leaf in leaves if not leaf.failed), None)


class GrowsWhatItReleased(Sound):
    """A refused request is a mistake, also where it is caught."""

    def search(self, tree):
        roots = yield Draw(self.n)
        leaves = yield Denoise(roots, to=tree.schedule.last)
        yield Score(leaves)
        yield Release(roots)
        try:
            yield Denoise(roots[0], to=tree.schedule.last)
        except UsageError:
            tree.note(mistake=True)
        return tree.best() or next((leaf for leaf in leaves if not leaf.failed), None)


@dataclass(frozen=True, kw_only=True)
class Hoards(Sound):
    """Keeps every sample that it ever made."""

    n: int = parameter(5, low=1, help="samples, one after the other")

    def sample(self, tree, count):
        leaves = []
        for _ in range(count):
            leaves += yield Denoise((yield Draw()), to=tree.schedule.last)
            yield Score(leaves[-1])
        return leaves


class GoesTheSameWayTwice(Sound):
    """Stops half way, and yet starts from the noise again."""

    def search(self, tree):
        roots = yield Draw(self.n)
        yield Denoise(roots, to=tree.schedule.last // 2)
        leaves = yield Denoise(roots, to=tree.schedule.last)
        yield Score(leaves)
        return tree.best() or next((leaf for leaf in leaves if not leaf.failed), None)

    def cost(self, setting):
        half = setting.denoise_cost(0, setting.schedule.last // 2)
        return Cost.exactly(Sound.cost(self, setting).upper + Spend(nfe=self.n * max(0, half - 1)))

    def fit(self, nfe, setting):
        price = replace(self, n=1).cost(setting).upper.nfe
        if nfe < price:
            raise UsageError(f"a budget of {nfe} NFE is too small; the smallest is {price}")
        return replace(self, n=nfe // price)


class DrawsOneNoiseTwice(Sound):
    """All samples are the first one."""

    def sample(self, tree, count):
        leaves = yield Denoise((yield Draw(count, Fresh(0))), to=tree.schedule.last)
        yield Score(leaves)
        return leaves


class CountsFromNought(Sound):
    """Looks nodes up by their index, as if it were the first to search the tree."""

    def search(self, tree):
        leaves = yield from self.sample(tree, self.n)
        alive = [tree.nodes[leaf.index] for leaf in leaves if not leaf.failed]
        return tree.best() or next(iter(alive), None)


# Cost and budgets ----------------------------------------------------------------------------------------------------


class AsksTooMuch(Sound):
    """Says that it costs more than it does."""

    def cost(self, setting):
        return Cost.exactly(Sound.cost(self, setting).upper + Spend(nfe=1))


class HidesASample(Sound):
    """Spends more than it says."""

    def search(self, tree):
        return (yield from replace(self, n=self.n + 1).honest(tree))

    def honest(self, tree):
        return (yield from Sound.search(self, tree))


class ForgetsOtherVerifiers(Sound):
    """Finished samples are scored by all verifiers."""

    def cost(self, setting):
        return Sound.cost(self, replace(setting, others=()))


class IgnoresItsBudget(Sound):
    """One sample too many."""

    def fit(self, nfe, setting):
        if nfe < setting.sample_cost:
            raise UsageError("too small")
        return replace(self, n=nfe // setting.sample_cost + 1)


class FitsNothing(Sound):
    """Promises to search with no budget at all."""

    def fit(self, nfe, setting):
        return replace(self, n=max(1, nfe // setting.sample_cost))


class LeavesHalf(Sound):
    """Half of the budget is not used."""

    def fit(self, nfe, setting):
        return replace(Sound.fit(self, nfe, setting), n=max(1, nfe // setting.sample_cost // 2))


@dataclass(frozen=True, kw_only=True)
class FitsWhatItMustNot(Sound):
    """Changes an option that the caller may have chosen."""

    patience: int = parameter(3, low=1, help="nothing")

    def fit(self, nfe, setting):
        return replace(Sound.fit(self, nfe, setting), patience=1)


class InsistsOnMore(Sound):
    """Asks again and again for what it was refused."""

    def search(self, tree):
        roots = yield Draw(self.n)
        leaves = []
        while not leaves:
            try:
                leaves = yield Denoise(roots, to=tree.schedule.last)
            except BudgetExhausted:
                continue
        yield Score(leaves)
        return tree.best() or next((leaf for leaf in leaves if not leaf.failed), None)


class GivesUp(Sound):
    """Takes a refusal for an error of its own."""

    def search(self, tree):
        try:
            return (yield from super().search(tree))
        except BudgetExhausted as refusal:
            raise RuntimeError("no money") from refusal


# Endings and failures ------------------------------------------------------------------------------------------------


class NeverEnds(Sound):
    """Asks for nothing, for ever."""

    def search(self, tree):
        while True:
            yield Release([])


class ReturnsSomethingUnfinished(Sound):
    """Noise for an answer."""

    def search(self, tree):
        roots = yield Draw(self.n)
        leaves = yield Denoise(roots, to=tree.schedule.last)
        yield Score(leaves)
        return roots[0]


class NeedsNumbers(Sound):
    """Compares scores without a thought for those that are null."""

    def search(self, tree):
        leaves = yield from self.sample(tree, self.n)
        alive = [leaf for leaf in leaves if not leaf.failed]
        return max(alive, key=lambda leaf: (0.0 + leaf.score(next(iter(leaf.values))), -leaf.index), default=None)


class WaitsForAScore(Sound):
    """Goes on until something is scored: for ever, where nothing can be."""

    def search(self, tree):
        leaves = yield from self.sample(tree, self.n)
        while tree.best() is None and any(not leaf.failed for leaf in leaves):
            yield Score(leaves)
        return tree.best()


class TakesTheNewest(Sound):
    """Breaks ties by the youngest."""

    def search(self, tree):
        leaves = yield from self.sample(tree, self.n)
        scored = [leaf for leaf in leaves if leaf.values and leaf.score(next(iter(leaf.values))) is not None]
        rest = [leaf for leaf in leaves if not leaf.failed]
        return max(scored, key=lambda leaf: (leaf.score(next(iter(leaf.values))), leaf.index), default=rest[0] if rest else None)


class ClimbsForEver(Sound):
    """Goes on until one sample is better than another: for ever, where all are equal."""

    def search(self, tree):
        leaves = yield from self.sample(tree, self.n)
        scores = {leaf.score(next(iter(leaf.values), "")) for leaf in leaves}
        while len(scores) == 1 and None not in scores and self.n > 1:
            yield Release([])
        return tree.best() or next((leaf for leaf in leaves if not leaf.failed), None)


class TrustsLatents(Sound):
    """Thinks that no node ever fails."""

    def search(self, tree):
        leaves = yield from self.sample(tree, self.n)
        assert all(leaf.reason is None for leaf in leaves)
        return tree.best() or leaves[0]


# What it is ----------------------------------------------------------------------------------------------------------


@dataclass(kw_only=True)
class Changeable:
    """Options that change while a search runs."""

    name: ClassVar[str] = "test-changeable"
    size_parameters: ClassVar[tuple[str, ...]] = ("n",)
    needs: ClassVar[frozenset[str]] = frozenset()

    n: int = parameter(2, low=1, help="samples")

    __post_init__ = Sound.__post_init__
    search = Sound.search
    sample = Sound.sample
    fit = Sound.fit
    cost = Sound.cost


class NeedsTheUnknown(Sound):
    """Names a size that it does not have."""

    size_parameters: ClassVar[tuple[str, ...]] = ("n", "m")


@dataclass(frozen=True, kw_only=True)
class ForgetsItsOptions(Sound):
    """Holds what JSON cannot."""

    levels: frozenset[float] = frozenset()


@dataclass(frozen=True, kw_only=True)
class ChecksNothing(Sound):
    """Takes any option."""

    def __post_init__(self):
        pass


@dataclass(frozen=True, kw_only=True)
class TakesAName(Sound):
    """Another policy's name."""

    name: ClassVar[str] = "best-of-n"


MADE_FOR = {
    Changeable: "is_a_frozen_dataclass_with_a_name",
    NeedsTheUnknown: "declares_known_needs_and_size_parameters",
    ForgetsItsOptions: "options_survive_json",
    ChecksNothing: "refuses_wrong_options",
    TakesAName: "registered_under_its_own_name",
    NeverEnds: "answers_with_a_finished_sample",
    ReturnsSomethingUnfinished: "answers_with_a_finished_sample",
    GrowsWhatItReleased: "asks_only_for_what_can_be_granted",
    Hoards: "releases_what_it_drops",
    ChangesValues: "changes_nothing_but_its_notes",
    ClosesNodesItself: "changes_nothing_but_its_notes",
    ReadsTheSeed: "sees_neither_model_nor_tensor",
    KeepsAModel: "sees_neither_model_nor_tensor",
    KeepsATensor: "sees_neither_model_nor_tensor",
    EvaluatesByItself: "sees_neither_model_nor_tensor",
    GoesTheSameWayTwice: "evaluates_nothing_twice",
    DrawsOneNoiseTwice: "evaluates_nothing_twice",
    Alternates: "is_deterministic",
    WritesTheTime: "is_deterministic",
    PythonsChance: "uses_no_global_randomness",
    NumpysChance: "uses_no_global_randomness",
    TorchsChance: "uses_no_global_randomness",
    DrawsForNothing: "uses_no_global_randomness",
    ReadsAGlobalState: "uses_no_global_randomness",
    CountsItsNeighbours: "neighbours_and_their_order_change_nothing",
    FollowsTheOneBefore: "neighbours_and_their_order_change_nothing",
    TrustsTheLastDigits: "batches_change_nothing",
    LeavesThingsBehind: "replays_from_its_record",
    CountsFromNought: "works_as_a_later_search_of_its_tree",
    AsksTooMuch: "spends_what_it_costs",
    HidesASample: "spends_what_it_costs",
    ForgetsOtherVerifiers: "spends_what_it_costs",
    IgnoresItsBudget: "fit_spends_at_most_its_budget",
    FitsWhatItMustNot: "fit_spends_at_most_its_budget",
    FitsNothing: "fit_refuses_an_empty_budget",
    LeavesHalf: "fit_fills_its_budget",
    InsistsOnMore: "a_budget_is_never_exceeded_and_always_ends_in_a_sample",
    GivesUp: "a_budget_is_never_exceeded_and_always_ends_in_a_sample",
    NeedsNumbers: "works_with_null_scores",
    WaitsForAScore: "works_with_null_scores",
    TakesTheNewest: "ties_go_to_the_oldest",
    ClimbsForEver: "ties_go_to_the_oldest",
    TrustsLatents: "works_with_failed_nodes",
}


class Checks(PolicyConformance):
    """Its tests are called by hand."""

    __test__ = False
    steps = 4
    examples = 3
    most_requests = 100

    def situations(self, policy):
        """Three of them: the built-in policies are tried in all."""
        return itertools.islice(super().situations(policy), 3)


CHECKS = [name.removeprefix("test_") for name, _ in inspect.getmembers(Checks, inspect.isfunction) if name.startswith("test_")]


def failures(kind):
    """Names of the checks that a policy fails."""
    failed = set()
    for name in CHECKS:
        kind.count = kind.running = 0
        kind.latest = None
        kind.begun = set()
        try:
            getattr(Checks(), f"test_{name}")(kind())
        except pytest.skip.Exception:
            continue
        except (Exception, pytest.fail.Exception):
            failed.add(name)
    return failed


def test_a_sound_policy_fails_none():
    assert failures(Sound) == set()


@pytest.mark.parametrize("kind", MADE_FOR, ids=lambda kind: kind.__name__)
def test_a_mistake_fails_its_check_and_no_other(kind):
    assert failures(kind) == {MADE_FOR[kind]}


def test_every_check_is_there_for_a_mistake():
    assert set(CHECKS) == set(MADE_FOR.values())


def test_the_broken_are_otherwise_sound():
    for kind in MADE_FOR:
        assert kind().search
        assert kind is ChecksNothing or build(kind, {"n": "3"}).n == 3
