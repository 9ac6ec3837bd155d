"""Mistakes in sharing out a budget fail the check that is made for them, and no other."""

from __future__ import annotations

import inspect
import random
from dataclasses import dataclass, replace
from typing import ClassVar

import pytest

from tsdiff.plugin import Cost, Spend, UsageError, parameter
from tsdiff.plugin.conformance import AllocatorConformance
from tsdiff.policies import BestOfN
from tsdiff.treesearch.protocols import Grant


@dataclass(frozen=True, kw_only=True)
class Sound:
    """Half of the samples for everybody, the rest for the prompt that is best so far."""

    name: ClassVar[str] = "test-sound"
    needs: ClassVar[frozenset[str]] = frozenset()

    share: float = parameter(0.5, above=0.0, high=1.0, help="of the budget for everybody")

    def search(self, forest):
        unit, runs = forest.setting.sample_cost, len(forest.trees)
        each = max(1, int(self.share * forest.budget.limit) // (unit * runs))
        outcomes = yield [Grant(tree, BestOfN(n=each), each * unit) for tree in forest.trees]
        rest = forest.budget.remaining // unit
        if rest:
            place = self.choose([[score for score in outcome.scores if score is not None] for outcome in outcomes])
            yield [Grant(forest.trees[place], BestOfN(n=rest), rest * unit)]

    def choose(self, scores):
        """Which prompt gets the rest."""
        best = [max(some, default=-1e9) for some in scores]
        return best.index(max(best))

    def forecast(self, total_nfe, runs, setting):
        if total_nfe < runs * setting.sample_cost:
            raise UsageError(f"{total_nfe} NFE are too few for {runs} prompts; the smallest total is {runs * setting.sample_cost}")
        most = total_nfe // setting.sample_cost
        return Cost(self.price(1, setting), self.price(most, setting))

    @staticmethod
    def price(samples, setting):
        return samples * (Spend(nfe=setting.sample_cost) + setting.scoring(1, final=True)) + setting.result()


class TossesACoin(Sound):
    """Python's own generator."""

    def choose(self, scores):
        return random.randrange(len(scores))


class Alternates(Sound):
    """Keeps a count from search to search."""

    count: ClassVar[int] = 0

    def choose(self, scores):
        Alternates.count += 1
        return Alternates.count % len(scores)


class TrustsTheLastDigits(Sound):
    """Decides by digits that rounding changes."""

    def choose(self, scores):
        return int(abs(sum(some[0] for some in scores if some)) * 1e11) % len(scores)


class NeedsNumbers(Sound):
    """Expects a score of every sample."""

    def choose(self, scores):
        return max(range(len(scores)), key=lambda place: max(scores[place]))


class ForecastsTheShareOnly(Sound):
    """Forgets that one of them may get more."""

    def forecast(self, total_nfe, runs, setting):
        forecast = Sound.forecast(self, total_nfe, runs, setting)
        return replace(forecast, upper=self.price(max(1, total_nfe // (2 * runs * setting.sample_cost)), setting))


class PromisesNothing(Sound):
    """Has a forecast for no budget at all."""

    def forecast(self, total_nfe, runs, setting):
        return Cost(self.price(1, setting), self.price(max(1, total_nfe // setting.sample_cost), setting))


class CountsOnARemainder(Sound):
    """Divides by what is left."""

    def search(self, forest):
        unit, runs = forest.setting.sample_cost, len(forest.trees)
        outcomes = yield [Grant(tree, BestOfN(n=1), unit) for tree in forest.trees]
        rest = forest.budget.remaining // unit
        assert 1 / rest
        yield [Grant(forest.trees[self.choose([list(outcome.scores) for outcome in outcomes]) % runs], BestOfN(n=rest), rest * unit)]

    def choose(self, scores):
        return 0


@dataclass(kw_only=True)
class Changeable:
    """Options that change while a search runs."""

    name: ClassVar[str] = "test-changeable"
    needs: ClassVar[frozenset[str]] = frozenset()

    share: float = parameter(0.5, above=0.0, high=1.0, help="of the budget for everybody")

    search = Sound.search
    choose = Sound.choose
    forecast = Sound.forecast
    price = staticmethod(Sound.price)


MADE_FOR = {
    Changeable: "is_a_frozen_dataclass_with_a_name",
    TossesACoin: "uses_no_global_randomness",
    Alternates: "is_deterministic",
    TrustsTheLastDigits: "batches_change_nothing",
    NeedsNumbers: "works_with_null_scores_and_ties",
    ForecastsTheShareOnly: "spends_what_it_forecasts",
    PromisesNothing: "refuses_an_empty_budget",
    CountsOnARemainder: "the_budget_is_never_exceeded_and_every_search_ends_in_a_sample",
}


class Checks(AllocatorConformance):
    """Its tests are called by hand."""

    __test__ = False
    steps = 4
    examples = 4


CHECKS = [name.removeprefix("test_") for name, _ in inspect.getmembers(Checks, inspect.isfunction) if name.startswith("test_")]


def failures(kind):
    """Names of the checks that an allocator fails."""
    failed = set()
    for name in CHECKS:
        try:
            getattr(Checks(), f"test_{name}")(kind())
        except pytest.skip.Exception:
            continue
        except (Exception, pytest.fail.Exception):
            failed.add(name)
    return failed


def test_a_sound_allocator_fails_none():
    assert failures(Sound) == set()


@pytest.mark.parametrize("kind", MADE_FOR, ids=lambda kind: kind.__name__)
def test_a_mistake_fails_its_check_and_no_other(kind):
    assert failures(kind) == {MADE_FOR[kind]}


def test_every_check_is_there_for_a_mistake():
    assert set(CHECKS) == set(MADE_FOR.values())
