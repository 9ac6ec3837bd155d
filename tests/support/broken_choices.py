"""Policies with one mistake each, in what they go by and what they touch."""

from __future__ import annotations

import random
import time
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import torch
from sound_policies import Sound, Varied

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
    parameter,
)
from tsdiff.plugin.conformance import gaussian

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


MADE_FOR = {
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
}
"""The check that each fails."""
