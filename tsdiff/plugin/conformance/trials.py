"""How a policy is tried: searches for real and small, and the premises that tests of it rest on."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import pytest

from tsdiff.plugin.conformance.judges import NearOrigin
from tsdiff.plugin.conformance.laboratory import gaussian, global_seeds
from tsdiff.plugin.conformance.watching import Chance, Sight, Watch, Watched
from tsdiff.treesearch.ledger import Cost, Spend
from tsdiff.treesearch.plan import prepare
from tsdiff.treesearch.protocols import FINAL, Allocation, ForestView, Grant, Outcome, Setting
from tsdiff.treesearch.resolve import roles_of
from tsdiff.treesearch.tree import Tree

if TYPE_CHECKING:
    from tsdiff.treesearch.results import Result

Options = dict[str, Any]
Check = Callable[[Any, Any], None]


def given_that(*premises: str) -> Callable[[Check], Check]:
    """A test that is skipped, not failed, where a premise of its own does not hold. Premises cost nothing while it passes."""

    def decorate(check: Check) -> Check:
        @functools.wraps(check)
        def checked(self: Any, *positional: Any, **named: Any) -> None:
            (subject,) = (*positional, *named.values())
            try:
                check(self, subject)
            except (Exception, pytest.fail.Exception):
                for premise in premises:
                    getattr(self, premise)(subject)
                raise

        return checked

    return decorate


class Trials:
    """Searches that a policy is tried in.

    Attributes:
      model, prompt, steps: what is searched. None as a model takes `gaussian`, as a flow where the policy needs that.
      solver: None takes the model's default, or a stochastic one where the policy needs that.
      seed: of every search.
      examples: inputs tried by each property-based test.
      most_requests: of one search; what asks for more is taken to have no end.
    """

    model: Any = None
    prompt: str = "near (0, 0)"
    steps: int = 8
    solver: str | None = None
    seed: int = 3
    examples: int = 10
    most_requests: int = 5000

    @pytest.fixture
    def policy(self) -> Any:
        """The policy to test. Override it; a small configuration keeps the tests fast."""
        raise NotImplementedError(f"{type(self).__name__} must override the fixture `policy` and return a policy object")

    # Searching -------------------------------------------------------------------------------------------------------

    def search(self, policy: Any, *watches: Watch, verifier: Any = None, **options: Any) -> Any:
        """Run the policy for real, in `tsdiff.search`; the global generators are seeded alike each time."""
        import tsdiff

        with global_seeds(0):
            return tsdiff.search(policy=Watched(policy, self.most_requests, *watches), verifier=verifier or NearOrigin(), **self.usual(policy) | options)

    def search_twice(self, policy: Any, nfe: int) -> tuple[Any, list[Outcome]]:
        """Two searches of one tree, each under a budget of its own, and what came of each."""
        import tsdiff

        again = Again(Watched(policy, self.most_requests), nfe)
        with global_seeds(0):
            result = tsdiff.search(policy=again, verifier=NearOrigin(), total_nfe=2 * nfe, **self.usual(policy))
        return result, again.outcomes

    def setting(self, policy: Any, verifier: Any = None, **options: Any) -> Setting:
        """What the policy's cost depends on, as a search has it."""
        return prepare(policy=Watched(policy, self.most_requests), verifiers=verifier or NearOrigin(), **self.usual(policy) | options).setting

    def usual(self, policy: Any) -> Options:
        """The options of a search without anything special."""
        model = self.model or gaussian("flow" if "flow" in policy.needs else "vp")
        solver = self.solver or (self.stochastic_solver(policy) if "stochastic" in policy.needs else None)
        return {"model": model, "prompts": self.prompt, "seed": self.seed, "steps": self.steps, "solver": solver, "baseline": False}

    # Premises: each skips a test that has failed because of what another test is there to find ------------------------

    def ends(self, policy: Any, nfe: int | None = None) -> None:
        """A search without anything special, under a budget if there is one, ends without an error."""
        try:
            self.search(policy, nfe=nfe)
        except Exception as error:
            where = "answers_with_a_finished_sample" if nfe is None else "a_budget_is_never_exceeded_and_always_ends_in_a_sample"
            pytest.skip(f"{type(error).__name__} in a plain search; see test_{where}")

    def ends_early(self, policy: Any) -> None:
        """So does one under a budget that is too small for it."""
        self.ends(policy, nfe=self.short(policy))

    def repeats_alone(self, policy: Any) -> None:
        """Equal searches give equal trees."""
        if self.search(policy).tree.to_json() != self.search(policy).tree.to_json():
            pytest.skip("two equal searches differ; see test_is_deterministic")

    def repeats(self, policy: Any) -> None:
        """And they do so whatever the state of the global generators."""
        self.repeats_alone(policy)
        if self.search(policy).tree.to_json() != self.search(policy, Chance(1)).tree.to_json():
            pytest.skip("the result follows from a global generator; see test_uses_no_global_randomness")

    def honest(self, policy: Any) -> None:
        """A search costs what the policy says."""
        for options in self.situations(policy):
            if self.overspent(policy, options):
                pytest.skip("the cost is wrong; see test_spends_what_it_costs")

    def minds_its_own_business(self, policy: Any) -> None:
        """A search reads nothing that policies are not shown."""
        sight = Sight()
        self.search(policy, sight)
        if sight.outside:
            pytest.skip("the policy reads more than TreeView; see test_sees_neither_model_nor_tensor")

    def overspent(self, policy: Any, options: Options) -> list[str]:
        """What a search spends outside the bounds of its cost, in words."""
        ledger = self.search(policy, **options).ledger
        spent = Spend(ledger.nfe, ledger.decodes, sum(ledger.verifier_calls.values()))
        cost = policy.cost(self.setting(policy, **options))
        lines = []
        for name in ("nfe", "decodes", "verifier_calls"):
            low, value, high = getattr(cost.lower, name), getattr(spent, name), getattr(cost.upper, name)
            if not low <= value <= high:
                lines.append(f"{name}: spent {value}, but cost() says {low} to {high}")
        return lines

    def short(self, policy: Any) -> int:
        """A budget for about two thirds of a search."""
        setting = self.setting(policy)
        lower: int = policy.cost(setting).lower.nfe
        return max(setting.sample_cost, lower * 2 // 3)

    def finished(self, result: Result) -> None:
        """Assert that there is a finished sample, and an image of it where the model makes images."""
        assert result.node.level == result.tree.schedule.last, "the answer is not finished"
        assert not result.node.failed
        assert not result.node.draft
        assert result.node in result.tree.nodes
        assert result.image is not None or (self.model is not None and self.model.media is None), "there is no image"

    def same(self, one: Result, other: Result) -> None:
        """Assert that two searches took the same decisions; scores may differ in their last digits."""
        assert _shape(one.tree) == _shape(other.tree)
        assert one.node.index == other.node.index
        assert one.score == pytest.approx(other.score, rel=1e-5, abs=1e-5)

    def stochastic_solver(self, policy: Any) -> str | None:
        """A solver whose steps draw noise."""
        return "flow-ancestral" if "flow" in policy.needs else "ddim(eta=1)"

    def situations(self, policy: Any) -> Iterator[Options]:
        """Options of a search, in which cost and requests are tried."""
        seen = NearOrigin(name="near-origin-seen", needs=frozenset({"x0", "node_ids", "images"}))
        yield {}
        yield {"steps": 1}
        yield {"steps": 5, "verifier": [seen, NearOrigin()]}
        if self.model is None and self.solver is None:
            yield {"steps": 11, "verifier": [NearOrigin(), seen], "solver": self.stochastic_solver(policy)}
            if not {"stochastic", "flow"} & policy.needs:
                yield {"model": gaussian("ve"), "solver": "heun"}  # two evaluations a step
        if "absolute" not in policy.needs:
            yield {"verifier": [NearOrigin(scope="set"), seen]}
        if len(roles_of(policy)) > 1:
            yield {"verifier": {role: NearOrigin(name=f"near-origin-{role}") for role in roles_of(policy)} | {FINAL: seen}}


@dataclass(frozen=True)
class Again:
    """An allocator that has a policy search every tree twice.

    Attributes:
      nfe: of each grant.
      outcomes: what came of the grants, in order.
    """

    policy: Any
    nfe: int
    outcomes: list[Outcome] = field(default_factory=list)
    name: ClassVar[str] = "again"

    @property
    def needs(self) -> frozenset[str]:
        """The policy's."""
        return frozenset(self.policy.needs)

    @property
    def roles(self) -> tuple[str, ...]:
        """The policy's."""
        return roles_of(self.policy)

    def search(self, forest: ForestView) -> Allocation:
        """Twice the same grant."""
        for _ in range(2):
            self.outcomes.extend((yield [Grant(tree, self.policy, self.nfe) for tree in forest.trees]))

    def forecast(self, total_nfe: int, runs: int, setting: Setting) -> Cost:
        """At most everything."""
        return Cost(Spend(), Spend(nfe=total_nfe))


def _shape(tree: Tree) -> list[tuple[Any, ...]]:
    """A tree without its scores."""
    return [
        (node.id, node.move, node.level, None if node.parent is None else node.parent.index, node.status, node.draft, node.nfe, sorted(node.values))
        for node in tree.nodes
    ]
