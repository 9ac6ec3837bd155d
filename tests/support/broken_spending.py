"""Policies with one mistake each, in what they spend, how they end and what they are."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from sound_policies import Sound

from tsdiff.plugin import BudgetExhausted, Cost, Denoise, Draw, Release, Score, Spend, UsageError, parameter

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
"""The check that each fails."""
