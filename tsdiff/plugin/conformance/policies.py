"""What every policy keeps to, as tests to inherit. See `tsdiff.plugin.conformance`."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import fields, is_dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import pytest
from hypothesis import Phase, example, given, settings
from hypothesis import strategies as st

from tsdiff.plugin.conformance.judges import NearOrigin
from tsdiff.plugin.conformance.laboratory import gaussian, global_seeds, observed, wide_gaussian
from tsdiff.plugin.conformance.replaying import Record
from tsdiff.plugin.conformance.trials import Options, Trials, given_that
from tsdiff.plugin.conformance.watching import Chance, Holdings, Interrupter, Interruption, Refusals, Sight, Touch
from tsdiff.treesearch.errors import SearchFailed, UsageError
from tsdiff.treesearch.parameters import build
from tsdiff.treesearch.registry import policies

if TYPE_CHECKING:
    from tsdiff.treesearch.results import Results

KNOWN_NEEDS = {"stochastic", "gradient", "flow", "absolute"}
FAILING: tuple[tuple[int, Literal["nan", "infinity", "error"]], ...] = ((1, "nan"), (2, "nan"), (3, "infinity"), (2, "error"))
FILLED = 0.9
"""Share of a budget of 16 samples and more that a fitted policy spends, where its cost is known beforehand."""


class PolicyConformance(Trials):
    """What every policy keeps to.

    One mistake fails one test: a test that rests on what another one asserts is skipped where that does not hold.
    The attributes of `Trials` say what is searched, and how.
    """

    def wrong_options(self, policy: Any) -> list[Options]:
        """Options that the policy must refuse. By default each bounded parameter just outside its range."""
        return [{item.name: value} for item in fields(policy) for value in _outside(item.metadata)]

    # What it is ------------------------------------------------------------------------------------------------------

    def test_is_a_frozen_dataclass_with_a_name(self, policy: Any) -> None:
        """Options cannot change while a search runs, and the policy can be named on the command line."""
        assert is_dataclass(policy), "a policy is a dataclass of its hyperparameters"
        assert type(policy).__dataclass_params__.frozen, "declare it with @dataclass(frozen=True)"
        assert isinstance(policy.name, str)
        assert policy.name
        assert not set(policy.name) & set(":=, \t\n"), "the command line needs these characters"
        assert (type(policy).__doc__ or "").strip(), "the docstring is what `tsdiff describe` shows"

    def test_declares_known_needs_and_size_parameters(self, policy: Any) -> None:
        """The engine understands what it needs; its size parameters exist."""
        assert set(policy.needs) <= KNOWN_NEEDS
        assert set(policy.size_parameters) <= {item.name for item in fields(policy)}

    def test_options_survive_json(self, policy: Any) -> None:
        """A run's record is enough to make the policy again."""
        options = json.loads(json.dumps(dataclasses.asdict(policy), allow_nan=False))
        assert build(type(policy), options) == policy

    def test_refuses_wrong_options(self, policy: Any) -> None:
        """A wrong option is a UsageError at once, not a surprise later."""
        for options in self.wrong_options(policy):
            with pytest.raises(UsageError):
                replace(policy, **options)
        with pytest.raises(UsageError, match="unknown parameter"):
            build(type(policy), {"no-such-option": 1})

    def test_registered_under_its_own_name(self, policy: Any) -> None:
        """If its name is taken by a registered policy, that is this one."""
        if policy.name in policies:
            assert policies.load(policy.name) is type(policy)

    # What it does ----------------------------------------------------------------------------------------------------

    def test_answers_with_a_finished_sample(self, policy: Any) -> None:
        """The search ends, and its answer is real: finished, scored, in the tree."""
        result = self.search(policy)
        self.finished(result)
        assert result.score is not None

    @given_that("ends", "ends_early")
    def test_asks_only_for_what_can_be_granted(self, policy: Any) -> None:
        """No request is a mistake: none on a node that was released, none that the solver or the schedule cannot do."""
        for options in ({}, {"steps": 1}, {"nfe": self.short(policy)}):
            refusals = Refusals()
            self.search(policy, refusals, **options)
            assert not refusals.mistakes, options

    @given_that("ends")
    def test_releases_what_it_drops(self, policy: Any) -> None:
        """Memory follows open nodes, so a finished sample that has lost is released; it can still become the answer."""
        holdings = Holdings()
        self.search(policy, holdings)
        assert not holdings.idle, f"finished, not the answer, not used in the last {holdings.long} requests, and not released"

    @given_that("ends")
    def test_changes_nothing_but_its_notes(self, policy: Any) -> None:
        """Nodes, values, budget and ledger are the engine's: a policy reads them."""
        touch = Touch()
        self.search(policy, touch)
        assert not touch.changes

    @given_that("ends")
    def test_sees_neither_model_nor_tensor(self, policy: Any) -> None:
        """A policy lives on `TreeView` and replies; it holds no tensor and no model, and evaluates none by itself."""
        sight = Sight()
        with observed(self.model or gaussian("vp")) as network:
            result = self.search(policy, sight)
        assert not sight.outside, "TreeView has no such names"
        assert not sight.held, "variables of the search hold tensors or models"
        assert network.rows == result.ledger.rows, "the network was evaluated behind the engine's back"

    @given_that("ends")
    def test_evaluates_nothing_twice(self, policy: Any) -> None:
        """No latent goes through the network again at the same level: what is known is used.

        Look-ahead is the engine's own: where its short schedule takes the same steps, it may repeat them.
        """
        model, options = self.model, {}
        if model is None:
            model = wide_gaussian("flow" if "flow" in policy.needs else "vp")
            options = {"model": model, "prompts": ""}
        with observed(model) as network:
            result = self.search(policy, max_batch=1, **options)  # alone in its batch, a row has the same bits again
        drafts = sum(node.nfe for node in result.tree.nodes if node.draft)
        assert network.repeated <= drafts, f"{network.repeated} of {network.rows} rows had been evaluated before"

    # What its results follow from ------------------------------------------------------------------------------------

    @given_that("ends")
    def test_is_deterministic(self, policy: Any) -> None:
        """Equal seeds give equal trees, node for node and value for value."""
        assert self.search(policy).tree.to_json() == self.search(policy).tree.to_json()

    @given_that("ends", "repeats_alone")
    def test_uses_no_global_randomness(self, policy: Any) -> None:
        """All randomness comes from `tree.rng`: the global generators neither change nor matter."""
        chance = Chance(1)
        result = self.search(policy, chance)
        assert not chance.drawn, "the search draws from global generators"
        assert result.tree.to_json() == self.search(policy).tree.to_json(), "the result follows from the state of a global generator"

    @given_that("ends", "repeats")
    def test_neighbours_and_their_order_change_nothing(self, policy: Any) -> None:
        """A tree is the same alone, beside others, and whichever of them starts first: searches share nothing."""
        seeds = [self.seed, self.seed + 1]
        alone = {seed: self.search(policy, seed=seed) for seed in seeds}
        for order in (seeds, seeds[::-1]):
            together: Results = self.search(policy, seed=order)
            assert not together.failures
            for result in together:
                self.same(result, alone[result.seed])

    @given_that("ends", "repeats")
    def test_batches_change_nothing(self, policy: Any) -> None:
        """How work is split into batches changes scores in their last digits, and no decision."""
        one, other = (self.search(policy, verifier=NearOrigin(rounding=1e-9), max_batch=rows) for rows in (1, 64))
        self.same(one, other)

    @given_that("ends", "ends_early", "repeats")
    def test_replays_from_its_record(self, policy: Any) -> None:
        """Asked again with the recorded replies, a search makes the same requests, also after an interruption."""
        for nfe in (None, self.short(policy)):
            record = Record()
            self.search(policy, record, nfe=nfe)
            with pytest.raises(Interruption):
                self.search(policy, Interrupter(len(record.entries) // 2 + 1), nfe=nfe)
            with global_seeds(0):
                record.replay(policy)

    @given_that("ends", "honest", "repeats", "minds_its_own_business")
    def test_works_as_a_later_search_of_its_tree(self, policy: Any) -> None:
        """Where one budget is shared, a tree is searched again: there are nodes and roots before the policy's own."""
        cost = policy.cost(self.setting(policy))
        result, (first, second) = self.search_twice(policy, cost.upper.nfe)
        self.finished(result)
        assert first.scores
        assert second.scores
        assert not second.failed
        assert cost.lower.nfe <= second.nfe <= cost.upper.nfe

    # Cost ------------------------------------------------------------------------------------------------------------

    @given_that("ends")
    def test_spends_what_it_costs(self, policy: Any) -> None:
        """The price shown beforehand is the price, with any number of steps, solver and verifiers."""
        for options in self.situations(policy):
            assert not self.overspent(policy, options), options

    @given_that("ends", "honest")
    def test_fit_spends_at_most_its_budget(self, policy: Any) -> None:
        """`fit` stays within the budget and changes size parameters only; fitted searches run to their end."""
        setting = self.setting(policy)
        full = policy.cost(setting).upper.nfe
        for nfe in (full // 2, full, 2 * full + 1):
            try:
                fitted = policy.fit(nfe, setting)
            except UsageError:
                assert nfe < full, f"the policy itself costs {full} NFE and so fits {nfe}"
                continue
            assert fitted.cost(setting).upper.nfe <= nfe
            size = {item.name: getattr(policy, item.name) for item in fields(policy) if item.name in policy.size_parameters}
            assert replace(fitted, **size) == policy, "more than the size was changed"
            assert self.search(fitted, nfe=nfe).truncated is None, "a policy that fits its budget is never cut short"

    @given_that("ends")
    def test_fit_refuses_an_empty_budget(self, policy: Any) -> None:
        """No NFE, no search: said clearly."""
        with pytest.raises(UsageError):
            policy.fit(0, self.setting(policy))

    @given_that("ends", "honest")
    def test_fit_fills_its_budget(self, policy: Any) -> None:
        """Of 16 samples' compute and more, 90 % is spent: comparisons at equal compute are fair."""
        if not policy.size_parameters:
            pytest.skip("this policy has one size")
        for options in self.situations(policy):
            if options.get("steps") == 1:
                continue
            setting = self.setting(policy, **options)
            for samples in (16, 17, 20, 25, 31, 32, 41, 50, 64):
                budget = samples * setting.sample_cost
                cost = policy.fit(budget, setting).cost(setting)
                assert not cost.exact or cost.upper.nfe >= FILLED * budget, f"{cost.upper.nfe} of {budget} NFE ({samples} samples), {options}"

    @given_that("ends", "honest")
    def test_a_budget_is_never_exceeded_and_always_ends_in_a_sample(self, policy: Any) -> None:
        """Whatever the budget, from one node up: what is granted fits, and there is a finished image."""

        @settings(max_examples=self.examples, deadline=None, derandomize=True, database=None, phases=(Phase.explicit, Phase.generate))
        @example(steps=1, share=0.0, seed=0)
        @example(steps=self.steps, share=0.0, seed=0)
        @given(steps=st.integers(1, 10), share=st.floats(0.0, 1.1), seed=st.integers(0, 1000))
        def holds(steps: int, share: float, seed: int) -> None:
            setting = self.setting(policy, steps=steps)
            nfe = max(setting.sample_cost, int(share * policy.cost(setting).upper.nfe))
            result = self.search(policy, steps=steps, nfe=nfe, seed=seed)
            self.finished(result)
            assert result.ledger.nfe == result.tree.budget.spent <= nfe
            assert sum(node.nfe for node in result.tree.nodes) == result.ledger.nfe

        holds()

    # Failures --------------------------------------------------------------------------------------------------------

    @given_that("ends")
    def test_works_with_null_scores(self, policy: Any) -> None:
        """Scores that fail, some or all, never stop a search; a scored sample is preferred where there is one."""
        for fail_every, failure in FAILING:
            result = self.search(policy, verifier=NearOrigin(fail_every, failure))
            self.finished(result)
            assert (result.score is None) == (result.tree.best() is None)

    @given_that("ends")
    def test_ties_go_to_the_oldest(self, policy: Any) -> None:
        """Where all scores are equal, the search ends, with the sample that was made first."""
        result = self.search(policy, verifier=NearOrigin(ties=True))
        self.finished(result)
        assert result.node is result.tree.best()

    @given_that("ends")
    def test_works_with_failed_nodes(self, policy: Any) -> None:
        """A latent that turns out not to be finite fails its node; the search goes on with the others."""
        for fail, salt in ((0.05, 0), (0.1, 1), (0.2, 0), (1.0, 0)):
            record = Record()
            with observed(self.model or gaussian("vp"), fail, salt):
                try:
                    self.finished(self.search(policy, record))
                except SearchFailed:
                    assert record.tree is not None
                    last = record.tree.schedule.last
                    assert all(node.failed for node in record.tree.nodes if node.level == last and not node.draft), "a finished sample was there"


def _outside(metadata: Any) -> list[float]:
    """Values just outside a parameter's range."""
    values = []
    for bound, distance in (("low", -1), ("high", 1), ("above", 0), ("below", 0)):
        if bound in metadata:
            values.append(metadata[bound] + distance)
    return values
