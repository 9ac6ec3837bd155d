"""What everything that shares a budget among prompts keeps to, as tests to inherit. See `tsdiff.plugin.conformance`."""

from __future__ import annotations

from dataclasses import is_dataclass
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import Phase, example, given, settings
from hypothesis import strategies as st

from tsdiff.plugin.conformance.judges import NearOrigin
from tsdiff.plugin.conformance.laboratory import gaussian, global_seeds, global_states, seed_globally
from tsdiff.plugin.conformance.policies import FAILING, KNOWN_NEEDS
from tsdiff.plugin.conformance.trials import given_that
from tsdiff.treesearch.errors import UsageError
from tsdiff.treesearch.plan import prepare
from tsdiff.treesearch.protocols import Allocation, Allocator, ForestView, Setting

if TYPE_CHECKING:
    from tsdiff.treesearch.results import Results


class Driven:
    """An allocator like the one it wraps, asked under other global random states each time if there is a seed."""

    def __init__(self, allocator: Allocator, seed: int | None = None) -> None:
        self.allocator = allocator
        self.seed = seed
        self.drawn: set[str] = set()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.allocator, name)

    def search(self, forest: ForestView) -> Allocation:
        """The allocator's own grants."""
        allocation = self.allocator.search(forest)
        reply: Any = None
        while True:
            if self.seed is not None:
                self.seed += 1
                seed_globally(self.seed)
            before = global_states()
            try:
                grants = allocation.send(reply)
            except StopIteration:
                return
            finally:
                self.drawn |= {name for name, state in global_states().items() if state != before[name]}
            reply = yield grants


class AllocatorConformance:
    """What everything that shares a budget keeps to.

    Attributes:
      prompts, steps, solver: what is searched, on the model `gaussian`.
      seed: of every search.
      samples: what the budget pays for, in samples of every prompt.
      examples: inputs tried by each property-based test.
    """

    prompts: tuple[str, ...] = ("near (0, 0)", "near (3, 2.4)", "near (-2, 0)")
    steps: int = 6
    solver: str | None = None
    seed: int = 3
    samples: int = 6
    examples: int = 10

    @pytest.fixture
    def allocator(self) -> Any:
        """The allocator to test. Override it."""
        raise NotImplementedError(f"{type(self).__name__} must override the fixture `allocator` and return an allocator object")

    def usual(self, allocator: Any, total: int | None = None) -> dict[str, Any]:
        """The options of a search."""
        flow = "flow" in allocator.needs
        model, solver = gaussian("flow" if flow else "vp"), self.solver
        if solver is None and "stochastic" in allocator.needs:
            solver = "flow-ancestral" if flow else "ddim(eta=1)"
        if total is None:
            info = model.solver(solver)
            one = model.schedule(info, self.steps, None).span_cost(tuple(range(self.steps + 1)), info.stages)
            total = len(self.prompts) * self.samples * one
        return {"model": model, "prompts": list(self.prompts), "total_nfe": total, "seed": self.seed, "steps": self.steps, "solver": solver, "baseline": False}

    def search(self, allocator: Any, *, seed_at: int | None = None, total: int | None = None, verifier: Any = None, **options: Any) -> Results:
        """Search for real, the global generators seeded alike."""
        import tsdiff

        driven = Driven(allocator, seed_at)
        with global_seeds(0):
            results: Any = tsdiff.search(policy=driven, verifier=verifier or NearOrigin(), **self.usual(allocator, total) | options)
        assert not results.failures, "every search ends in a sample"
        assert len(results) == len(self.prompts)
        for result in results:
            assert result.node.level == result.tree.schedule.last
            assert result.image is not None
        assert seed_at is None or not driven.drawn, "the allocator draws from global generators"
        return results  # type: ignore[no-any-return]

    def setting(self, allocator: Any) -> Setting:
        """What costs depend on."""
        return prepare(policy=allocator, verifiers=NearOrigin(), **self.usual(allocator)).setting

    def trees(self, results: Results) -> list[Any]:
        """All trees, as JSON."""
        return [result.tree.to_json() for result in results]

    def repeats(self, allocator: Any) -> None:
        """Premise of tests that compare searches: equal ones give equal trees."""
        if self.trees(self.search(allocator)) != self.trees(self.search(allocator)):
            pytest.skip("two equal searches differ; see test_is_deterministic")

    def shapes(self, results: Results) -> list[list[tuple[int, int]]]:
        """All trees, without scores."""
        return [[(node.id, node.level) for node in result.tree.nodes] for result in results]

    def test_is_a_frozen_dataclass_with_a_name(self, allocator: Any) -> None:
        """Its options cannot change while a search runs, and it can be named on the command line."""
        assert isinstance(allocator, Allocator)
        assert is_dataclass(allocator)
        assert type(allocator).__dataclass_params__.frozen
        assert allocator.name
        assert not set(allocator.name) & set(":=, \t\n")
        assert set(allocator.needs) <= KNOWN_NEEDS
        assert (type(allocator).__doc__ or "").strip(), "the docstring is what `tsdiff describe` shows"

    def test_spends_what_it_forecasts(self, allocator: Any) -> None:
        """Every search stays within the bounds told beforehand."""
        usual = self.usual(allocator)
        forecast = allocator.forecast(usual["total_nfe"], len(self.prompts), self.setting(allocator))
        for result in self.search(allocator):
            assert forecast.lower.nfe <= result.ledger.nfe <= forecast.upper.nfe
            assert forecast.lower.decodes <= result.ledger.decodes <= forecast.upper.decodes
            assert forecast.lower.verifier_calls <= sum(result.ledger.verifier_calls.values()) <= forecast.upper.verifier_calls

    def test_refuses_an_empty_budget(self, allocator: Any) -> None:
        """No NFE, no search: said clearly."""
        with pytest.raises(UsageError):
            allocator.forecast(0, len(self.prompts), self.setting(allocator))

    def test_the_budget_is_never_exceeded_and_every_search_ends_in_a_sample(self, allocator: Any) -> None:
        """Whatever the budget, from one sample of every prompt up."""
        one = self.setting(allocator).sample_cost
        least = self.least(allocator)

        @settings(max_examples=self.examples, deadline=None, derandomize=True, database=None, phases=(Phase.explicit, Phase.generate))
        @example(more=0, seed=0)
        @given(more=st.integers(0, 5 * one * len(self.prompts)), seed=st.integers(0, 1000))
        def holds(more: int, seed: int) -> None:
            results = self.search(allocator, total=least + more, seed=seed)
            assert sum(result.ledger.nfe for result in results) <= least + more

        holds()

    def least(self, allocator: Any) -> int:
        """The smallest budget that it accepts."""
        setting, runs = self.setting(allocator), len(self.prompts)
        totals = range(runs * setting.sample_cost, 8 * runs * self.samples * setting.sample_cost)
        for total in totals:
            try:
                allocator.forecast(total, runs, setting)
            except UsageError:
                continue
            return total
        raise AssertionError(f"{totals[-1]} NFE are refused for {runs} prompts, where one sample costs {setting.sample_cost}")

    def test_is_deterministic(self, allocator: Any) -> None:
        """Equal seeds give equal trees."""
        assert self.trees(self.search(allocator)) == self.trees(self.search(allocator))

    @given_that("repeats")
    def test_uses_no_global_randomness(self, allocator: Any) -> None:
        """The global generators neither change nor matter."""
        assert self.trees(self.search(allocator, seed_at=1)) == self.trees(self.search(allocator, seed_at=100))

    @given_that("repeats")
    def test_batches_change_nothing(self, allocator: Any) -> None:
        """How work is split into batches, and so which search is done first, changes no decision."""
        one, other = (self.search(allocator, verifier=NearOrigin(rounding=1e-9), max_batch=rows) for rows in (1, 64))
        assert self.shapes(one) == self.shapes(other)

    def test_works_with_null_scores_and_ties(self, allocator: Any) -> None:
        """Scores that fail or tell nothing never stop a search."""
        for verifier in (NearOrigin(ties=True), *(NearOrigin(every, failure) for every, failure in FAILING)):
            for result in self.search(allocator, verifier=verifier):
                assert (result.score is None) == (result.tree.best() is None)
