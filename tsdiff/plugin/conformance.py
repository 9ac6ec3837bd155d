"""Tests that every policy and verifier should pass: subclass, override a fixture, inherit the tests.

    from tsdiff.plugin.conformance import PolicyConformance

    class TestMyPolicy(PolicyConformance):
        @pytest.fixture
        def policy(self):
            return MyPolicy(width=2)

Policies are run for real, by `tsdiff.search` on the analytic model `gaussian`, in a second or so and without weights.
Needs pytest; torch is imported when a test runs.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import pytest

from tsdiff.treesearch.errors import UsageError
from tsdiff.treesearch.ledger import Spend
from tsdiff.treesearch.parameters import build
from tsdiff.treesearch.protocols import Candidates, Condition, LoadOptions, PendingVerifier, Scores, Setting
from tsdiff.treesearch.registry import models, policies, verifiers
from tsdiff.treesearch.schedule import Schedule

if TYPE_CHECKING:
    from torch import Tensor

    from tsdiff.treesearch.results import Result

Options = dict[str, Any]
KNOWN_NEEDS = {"stochastic", "gradient", "flow", "absolute"}


@dataclass(frozen=True)
class NearOrigin:
    """Minus the distance of the clean estimate to the origin: a verifier for any model's latents.

    Attributes:
      fail_every: every n-th score fails, counted by what is scored and not by the batch; 0 for none, 1 for all.
    """

    fail_every: int = 0
    name: str = "near-origin"
    needs: frozenset[str] = frozenset({"x0", "node_ids"})
    scope: Literal["row"] = "row"
    latency: Literal["immediate"] = "immediate"
    judges: Literal["any"] = "any"
    differentiable: bool = False

    def prepare(self, device: str) -> None:
        """There are no weights."""

    def check(self, condition: Condition) -> None:
        """Any condition will do."""

    def score(self, candidates: Candidates) -> Scores:
        """Minus the Euclidean norm of each x0; NaN for the rows that are to fail."""
        values = [-float(x0.double().norm()) for x0 in candidates.x0]
        failing = [self.fail_every > 0 and int(node_id, 16) % self.fail_every == 0 for node_id in candidates.node_ids]
        return Scores([float("nan") if fails else value for value, fails in zip(values, failing, strict=True)])


def gaussian(process: Literal["vp", "ve", "flow"]) -> Any:
    """The analytic model with variance-preserving, variance-exploding or flow levels."""
    return models.load("gaussian")(f"gaussian:process={process}", LoadOptions())


class PolicyConformance:
    """What every policy keeps to.

    Attributes:
      model, prompt, steps: what is searched. None as a model takes `gaussian`, as a flow where the policy needs that.
      solver: None takes the model's default, or a stochastic one where the policy needs that.
      seed: of every search.
    """

    model: Any = None
    prompt: str = "near (0, 0)"
    steps: int = 8
    solver: str | None = None
    seed: int = 3

    @pytest.fixture
    def policy(self) -> Any:
        """The policy to test. Override it; a small configuration keeps the tests fast."""
        raise NotImplementedError(f"{type(self).__name__} must override the fixture `policy` and return a policy object")

    @pytest.fixture
    def wrong_options(self, policy: Any) -> list[Options]:
        """Options that the policy must refuse. By default each bounded parameter just outside its range."""
        return [{item.name: value} for item in fields(policy) for value in _outside(item.metadata)]

    def search(self, policy: Any, *, fail_every: int = 0, nfe: int | None = None) -> Result:
        """Run the policy for real."""
        import tsdiff

        flow = "flow" in policy.needs
        model = gaussian("flow" if flow else "vp") if self.model is None else self.model
        solver = self.solver
        if solver is None and "stochastic" in policy.needs:
            solver = "flow-ancestral" if flow else "ddim(eta=1)"
        return tsdiff.search(  # type: ignore[return-value]
            model, self.prompt, policy=policy, verifier=NearOrigin(fail_every), nfe=nfe, seed=self.seed, steps=self.steps, solver=solver, baseline=False
        )

    def setting(self, result: Result) -> Setting:
        """What the policy's cost depends on, as the search had it."""
        return Setting(result.tree.schedule, result.tree.solver, NearOrigin(), (), result.image is not None)

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

    def test_refuses_wrong_options(self, policy: Any, wrong_options: list[Options]) -> None:
        """A wrong option is a UsageError at once, not a surprise later."""
        for options in wrong_options:
            with pytest.raises(UsageError):
                replace(policy, **options)
        with pytest.raises(UsageError, match="unknown parameter"):
            build(type(policy), {"no-such-option": 1})

    def test_registered_under_its_own_name(self, policy: Any) -> None:
        """If its name is taken by a registered policy, that is this one."""
        if policy.name in policies:
            assert policies.load(policy.name) is type(policy)

    # What it does ----------------------------------------------------------------------------------------------------

    def test_answers_with_a_finished_sample_of_its_tree(self, policy: Any) -> None:
        """The answer is real: finished, scored, in the tree."""
        result = self.search(policy)
        assert result.node.level == result.tree.schedule.last
        assert not result.node.failed
        assert not result.node.draft
        assert result.node in result.tree.nodes
        assert result.score is not None

    def test_is_deterministic(self, policy: Any) -> None:
        """Equal seeds give equal trees, node for node and value for value."""
        assert self.search(policy).tree.to_json() == self.search(policy).tree.to_json()

    def test_cost_bounds_hold_what_is_spent(self, policy: Any) -> None:
        """The price shown beforehand is the price."""
        result = self.search(policy)
        cost = policy.cost(self.setting(result))
        ledger = result.ledger
        spent = Spend(ledger.nfe, ledger.decodes, sum(ledger.verifier_calls.values()))
        for name in ("nfe", "decodes", "verifier_calls"):
            low, value, high = getattr(cost.lower, name), getattr(spent, name), getattr(cost.upper, name)
            assert low <= value <= high, f"{name}: spent {value}, but cost() says {low} to {high}"

    def test_every_evaluation_is_booked_on_a_node(self, policy: Any) -> None:
        """The nodes' NFE add up to the ledger's."""
        result = self.search(policy)
        assert sum(node.nfe for node in result.tree.nodes) == result.ledger.nfe

    # Budgets ---------------------------------------------------------------------------------------------------------

    def test_fit_spends_at_most_its_budget(self, policy: Any) -> None:
        """`fit` stays within the budget and is honest about it; fitted searches run to their end."""
        setting = self.setting(self.search(policy))
        full = policy.cost(setting).upper.nfe
        for nfe in sorted({full // 2, full, full + 1, 2 * full, 3 * full + 1}):
            try:
                fitted = policy.fit(nfe, setting)
            except UsageError:
                assert nfe < full, f"the policy itself costs {full} NFE and so fits {nfe}"
                continue
            assert fitted.cost(setting).upper.nfe <= nfe
            assert self.search(fitted, nfe=nfe).truncated is None, "a policy that fits its budget is never cut short"

    def test_fit_refuses_an_empty_budget(self, policy: Any) -> None:
        """No NFE, no search: said clearly."""
        with pytest.raises(UsageError):
            policy.fit(0, self.setting(self.search(policy)))

    def test_a_budget_is_never_exceeded_and_always_ends_in_a_sample(self, policy: Any) -> None:
        """Whatever the cap, from one plain sample up."""
        setting = self.setting(self.search(policy))
        one, full = setting.sample_cost, policy.cost(setting).upper.nfe
        for nfe in sorted({one, one + 1, 2 * one, (one + full) // 2, max(one, full - 1)}):
            result = self.search(policy, nfe=nfe)
            assert result.ledger.nfe <= nfe
            assert result.node.level == result.tree.schedule.last

    # Failures --------------------------------------------------------------------------------------------------------

    @pytest.mark.parametrize("fail_every", [2, 1])
    def test_works_with_null_scores(self, policy: Any, fail_every: int) -> None:
        """Scores that fail, some or all, never stop a search; a scored sample is preferred where there is one."""
        result = self.search(policy, fail_every=fail_every)
        assert result.node.level == result.tree.schedule.last
        best = result.tree.best()
        assert result.score == (None if best is None else best.score(result.tree.verifier))


@dataclass
class ExampleCandidates:
    """Candidates made of random pictures and latents.

    Shapes: images (B, 3, H, W) in [0, 1]; x0 and latents (B, ...).
    """

    images: Tensor
    x0: Tensor
    latents: Tensor
    levels: list[int]
    schedules: list[Schedule]
    conditions: list[Condition]
    node_ids: list[str]
    ancestors: Tensor = field(repr=False)

    @staticmethod
    def random(prompts: Sequence[str], *, size: tuple[int, int] = (64, 48), latent_shape: tuple[int, ...] = (4, 8, 6), seed: int = 0) -> ExampleCandidates:
        """One finished sample for each prompt."""
        import torch

        generator = torch.Generator().manual_seed(seed)
        count = len(prompts)
        images = torch.rand((count, 3, *size), generator=generator)
        x0 = torch.randn((count, *latent_shape), generator=generator)
        ancestors = torch.randn((count, *latent_shape), generator=generator)
        schedule = Schedule("ddim", "example", (1.0,), (0.0, 1.0), (1.0, 0.0), ((0.0, 1.0), (1.0, 0.0)), 1.0)
        ids = [f"{index:032x}" for index in range(count)]
        return ExampleCandidates(images, x0, x0, [1] * count, [schedule] * count, [Condition(prompt) for prompt in prompts], ids, ancestors)

    def take(self, rows: Sequence[int]) -> ExampleCandidates:
        """Some of the rows, in the order asked for."""
        index = list(rows)
        tensors = [tensor[index] for tensor in (self.images, self.x0, self.latents)]
        lists: list[Any] = [[column[row] for row in index] for column in (self.levels, self.schedules, self.conditions, self.node_ids)]
        return ExampleCandidates(*tensors, *lists, self.ancestors[index])

    def ancestor_x0(self, ratio: float) -> Tensor:
        """(B, ...), the same for every ratio."""
        return self.ancestors

    def __len__(self) -> int:
        return len(self.node_ids)


class VerifierConformance:
    """What every verifier keeps to.

    Attributes:
      tolerance: how far, relative to the largest score, a row may differ between batches; 0 asks for equal bits.
    """

    tolerance: float = 1e-4

    @pytest.fixture
    def verifier(self) -> Any:
        """The verifier to test, weights not yet loaded. Override it."""
        raise NotImplementedError(f"{type(self).__name__} must override the fixture `verifier` and return a verifier")

    @pytest.fixture
    def candidates(self) -> ExampleCandidates:
        """At least three samples that the verifier can score. Override it where it asks for special prompts or latents."""
        return ExampleCandidates.random(["a red cube", "two dogs on a lawn", "", "a star left of a circle", "near (0, 0)"])

    @pytest.fixture
    def prepared(self, verifier: Any) -> Any:
        """The verifier with its weights loaded."""
        verifier.prepare("cpu")
        return verifier

    def scores(self, verifier: Any, candidates: ExampleCandidates) -> list[float]:
        """Its scores as floats."""
        answer = verifier.score(candidates)
        assert isinstance(answer, Scores)
        assert all(len(part) == len(candidates) for part in answer.parts.values()), "every part has one number for each row"
        return [float(value) for value in answer.values]

    def same(self, left: Sequence[float], right: Sequence[float]) -> None:
        """Assert that two lists of scores agree within the tolerance, failures included."""
        scale = max((abs(value) for value in left if value == value), default=1.0)
        assert list(left) == pytest.approx(list(right), rel=0.0, abs=self.tolerance * scale, nan_ok=True)

    def test_declares_what_it_is(self, verifier: Any) -> None:
        """The engine understands what it reads and how it answers."""
        assert isinstance(verifier.name, str)
        assert verifier.name
        assert verifier.needs, "a verifier reads something"
        known = {"images", "x0", "latents", "levels", "conditions", "node_ids"}
        assert all(need in known or need.startswith("ancestor_x0@") for need in verifier.needs), verifier.needs
        assert verifier.scope in ("row", "set")
        assert verifier.latency in ("immediate", "pending")
        assert verifier.judges in ("any", "final")
        assert isinstance(verifier.differentiable, bool)
        assert verifier.latency == "immediate" or isinstance(verifier, PendingVerifier), "a pending verifier has `ask`"

    def test_registered_under_its_own_name(self, verifier: Any) -> None:
        """If its name is taken by a registered verifier, that is this one."""
        if verifier.name in verifiers:
            assert isinstance(verifier, verifiers.load(verifier.name))

    def test_checks_conditions_without_weights(self, verifier: Any, candidates: ExampleCandidates) -> None:
        """A condition is accepted or refused before anything loads."""
        for condition in candidates.conditions:
            assert verifier.check(condition) is None

    def test_one_finite_score_for_each_row(self, prepared: Any, candidates: ExampleCandidates) -> None:
        """B rows in, B scores out."""
        scores = self.scores(prepared, candidates)
        assert len(scores) == len(candidates)
        assert all(abs(score) < float("inf") for score in scores), "these candidates can be scored"

    def test_repeats_itself(self, prepared: Any, candidates: ExampleCandidates) -> None:
        """The same candidates score the same twice."""
        assert self.scores(prepared, candidates) == self.scores(prepared, candidates)

    def test_leaves_the_candidates_alone(self, prepared: Any, candidates: ExampleCandidates) -> None:
        """Nothing it is given is changed in place."""
        import torch

        before = [tensor.clone() for tensor in (candidates.images, candidates.x0, candidates.latents)]
        self.scores(prepared, candidates)
        after = (candidates.images, candidates.x0, candidates.latents)
        assert all(torch.equal(old, new) for old, new in zip(before, after, strict=True))

    def test_order_does_not_matter(self, prepared: Any, candidates: ExampleCandidates) -> None:
        """Permuted rows get permuted scores."""
        order = list(reversed(range(len(candidates))))
        scores = self.scores(prepared, candidates)
        self.same([scores[row] for row in order], self.scores(prepared, candidates.take(order)))

    def test_a_batch_scores_like_its_rows(self, prepared: Any, candidates: ExampleCandidates) -> None:
        """Of scope "row": a row's score does not depend on its neighbours."""
        if prepared.scope == "set":
            pytest.skip("scores of a set depend on the set")
        singles = [self.scores(prepared, candidates.take([row]))[0] for row in range(len(candidates))]
        self.same(self.scores(prepared, candidates), singles)


def _outside(metadata: Any) -> list[float]:
    """Values just outside a parameter's range."""
    values = []
    for bound, distance in (("low", -1), ("high", 1), ("above", 0), ("below", 0)):
        if bound in metadata:
            values.append(metadata[bound] + distance)
    return values
