"""Many trees under one budget: an allocator decides which are searched next, with which policy and for how much.

    allocator yields grants -> every granted tree searches, the others wait -> outcomes, when all are done -> allocator

A tree's grants are successive searches of one tree: each policy sees a tree of its own (`Scope`), whose first noises no
earlier grant has drawn, and the best sample of all of them is the answer. So a sample made early, to find out how hard
a prompt is, is never lost. The first grant draws what a search without a forest draws, and grows the same tree.

To the engine a forest is nothing special: each tree is driven by a generator that passes on its policy's requests and,
between grants, waits for the allocator with a request that costs nothing (`Await`).
"""

from __future__ import annotations

import json
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from tsdiff.treesearch.errors import BudgetExhausted, UsageError
from tsdiff.treesearch.ledger import Budget
from tsdiff.treesearch.node import Json, Node
from tsdiff.treesearch.noise import Fresh, Mix, Recipe, Rotate, Slerp
from tsdiff.treesearch.protocols import Allocation, Allocator, Condition, Grant, Outcome, Policy, Search, Setting, TreeView
from tsdiff.treesearch.requests import Draw, Gather, Release, Request, Score
from tsdiff.treesearch.run import Group, Run, flatten
from tsdiff.treesearch.schedule import Schedule, SolverInfo
from tsdiff.treesearch.tree import Tree

if TYPE_CHECKING:
    import numpy as np

    from tsdiff.treesearch.growth import Growth
    from tsdiff.treesearch.quote import Quote


# One tree ------------------------------------------------------------------------------------------------------------


class Scope:
    """A tree as the policy of one grant sees it: its own nodes, its own budget, noises that nobody has used.

    Args:
      tree: the tree.
      number: how many grants the tree had before.
      nfe: the grant's budget.
    """

    def __init__(self, tree: Tree, number: int, nfe: int) -> None:
        self.tree = tree
        self.number = number
        self.budget = Budget(nfe)
        self._before = tree.budget.spent
        self._nodes = len(tree.nodes)
        self._roots = len(tree.roots)
        self.ceiling = tree.budget.limit = self._before + nfe

    @property
    def schedule(self) -> Schedule:
        """The tree's levels."""
        return self.tree.schedule

    @property
    def solver(self) -> SolverInfo:
        """What steps through them."""
        return self.tree.solver

    @property
    def condition(self) -> Condition:
        """What the samples are conditioned on."""
        return self.tree.condition

    @property
    def nodes(self) -> Sequence[Node]:
        """The nodes of this grant."""
        return self.tree.nodes[self._nodes :] if self._nodes else self.tree.nodes

    def finished(self) -> list[Node]:
        """The samples of this grant, in order."""
        return [node for node in self.nodes if node.level == self.schedule.last and not node.draft and not node.failed]

    def best(self, verifier: str | None = None) -> Node | None:
        """The sample of this grant with the highest score (ties: the oldest); None while there is none."""
        key = self.tree.verifier if verifier is None else verifier
        scored = [(score, -node.index, node) for node in self.finished() if (score := node.score(key)) is not None]
        return max(scored, key=lambda entry: entry[:2])[-1] if scored else None

    def rng(self, *purpose: int | str) -> np.random.Generator:
        """A random generator of the policy's own, another one for each grant."""
        return self.tree.rng(*(("grant", self.number, *purpose) if self.number else purpose))

    def note(self, node: Node | None = None, **facts: Json) -> None:
        """Write facts on a node, or on the tree."""
        self.tree.note(node, **facts)

    def grow(self, policy: Policy, target: float | None) -> Search:
        """The policy's requests until it returns, or until one of its samples reaches the target."""
        search = policy.search(self)
        if not hasattr(search, "send"):
            raise UsageError(f"policy {policy.name}: search gave {search!r} but must be a generator of requests")
        reply: Any = None
        refusal: BudgetExhausted | UsageError | None = None
        while True:
            try:
                request = search.send(reply) if refusal is None else search.throw(refusal)
            except StopIteration as stop:
                answer: Node | None = stop.value
                return answer
            reply, refusal = None, None
            try:
                reply = yield self._own(request)
            except (BudgetExhausted, UsageError) as refused:
                refusal = refused
            self.budget.spent = self.tree.budget.spent - self._before
            if target is not None and refusal is None and self._reached(request, target):
                search.close()
                return self.best()

    def _own(self, request: Request) -> Request:
        """The request with the policy's root numbers, which begin at its own first root, as those of the tree."""
        if self._roots == 0:
            return request
        if isinstance(request, Gather):
            return Gather(*(self._own(part) for part in request.requests))
        if isinstance(request, Draw) and request.noise is not None:
            noise = request.noise
            return replace(request, noise=[_later(one, self._roots) for one in noise] if isinstance(noise, Sequence) else _later(noise, self._roots))
        return request

    def _reached(self, request: Request, target: float) -> bool:
        scored = [node for part in flatten(request) if isinstance(part, Score) for node in part.group if node.level == self.schedule.last and not node.draft]
        return any((score := node.score(self.tree.verifier)) is not None and score >= target for node in scored)


def _later(recipe: Recipe, by: int) -> Recipe:
    """A recipe whose indices count from a later root. Numbers of directions move too, so that no grant repeats one."""
    if isinstance(recipe, Fresh):
        return Fresh(recipe.index + by)
    if isinstance(recipe, Rotate):
        return Rotate(recipe.base + by, recipe.cosine, recipe.index + by)
    if isinstance(recipe, Mix):
        return Mix([(index + by, weight) for index, weight in recipe.weights], None if recipe.fresh is None else (recipe.fresh[0] + by, recipe.fresh[1]))
    if isinstance(recipe, Slerp):
        return Slerp(recipe.a + by, recipe.b + by, recipe.t)
    return recipe


@dataclass(eq=False)
class _Seat:
    """A tree's place in the forest.

    Attributes:
      grants: how many it has begun.
      grant: the one that it is to search or is searching; None while it waits for the allocator.
      before: NFE that the tree had spent when it got the grant.
      outcome: of the last grant, until all outcomes are there.
      parked: the group of its `Await`, while it waits.
      ended: whether the tree has ended.
    """

    run: Run
    grants: int = 0
    grant: Grant | None = None
    before: int = 0
    outcome: Outcome | None = None
    parked: Group | None = None
    ended: bool = False


@dataclass(frozen=True, eq=False)
class Await:
    """What a tree of a forest asks for between grants -> its next `Grant`, None when there will be no more."""

    forest: Forest
    seat: _Seat


class AwaitHandler:
    """Waiting costs nothing."""

    def check(self, run: Run, request: Await) -> None:
        """Only a forest makes such a request."""

    def price(self, quote: Quote, request: Await) -> None:
        """It is free."""

    def begin(self, growth: Growth, group: Group, request: Await) -> None:
        group.add()
        request.forest.park(request.seat, group)


# All trees -----------------------------------------------------------------------------------------------------------


class Forest:
    """The trees of one search, their common budget, and the allocator that shares it out.

    The total is never exceeded, and every tree can always finish a sample: what that takes for the trees that have none
    yet is kept back from every grant.

    Args:
      allocator: decides.
      setting: what costs depend on.
      total_nfe: limit on the network evaluations of all trees together, baselines not included.
      target: trees stop as soon as a sample of theirs scores this much; None lets all go on.

    Attributes:
      budget: of all trees together.
      grants: the rounds of grants and what came of them, strict JSON; trees are numbered in order.
      notes: what the allocator wrote down.
      truncated: why the allocator was stopped early, if it was.
    """

    def __init__(self, allocator: Allocator, setting: Setting, total_nfe: int, target: float | None = None) -> None:
        self.allocator = allocator
        self.setting = setting
        self.target = target
        self.budget = Budget(total_nfe)
        self.trees: list[Tree] = []
        self.grants: list[list[dict[str, Json]]] = []
        self.notes: list[dict[str, Json]] = []
        self.truncated: str | None = None
        self._seats: list[_Seat] = []
        self._place: dict[int, int] = {}
        self._granted: list[_Seat] = []
        self._pending = 0  # of them, those whose outcome is not there yet
        self._allocation: Allocation | None = None
        self._over = False
        self._error: BaseException | None = None

    # What the allocator sees beside the attributes

    def note(self, **facts: Json) -> None:
        """Write down why something was decided. Raises UsageError if it is not strict JSON."""
        try:
            json.dumps(facts, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise UsageError(f"note: {facts!r} is not strict JSON ({error}); write plain, finite numbers, text, lists and dictionaries") from None
        self.notes.append(facts)

    # What the search and the engine see

    def add(self, run: Run) -> None:
        """Make a run, created with `forest.drive` as its policy, part of the forest; all before the engine starts."""
        run.tree.budget.limit = 0
        self._place[id(run.tree)] = len(self.trees)
        self.trees.append(run.tree)
        self._seats.append(_Seat(run))

    def drive(self, tree: TreeView) -> Search:
        """What grows a tree, in place of a policy: the policies of its grants, one after the other."""
        if self._allocation is None:
            allocation = self.allocator.search(self)
            if not hasattr(allocation, "send"):
                raise UsageError(f"allocator {self.allocator.name}: search gave {allocation!r} but must be a generator of lists of grants")
            self._allocation = allocation
            self._advance(None)
        return self._drive(self._seats[self._place[id(tree)]])

    def park(self, seat: _Seat, group: Group) -> None:
        """A tree waits for the allocator."""
        seat.parked = group
        self._wake(seat)

    def ended(self, run: Run) -> None:
        """A tree has ended, in whatever way; call it when the engine says so."""
        seat = self._seats[self._place[id(run.tree)]]
        seat.ended = True
        if seat.grant is not None:
            self._report(seat, Outcome(run.tree.budget.spent - seat.before, failed=True))

    @property
    def spent(self) -> int:
        """NFE granted to the requests of all trees."""
        return sum(tree.budget.spent for tree in self.trees)

    def to_json(self) -> dict[str, Any]:
        """How the budget was shared, as strict JSON."""
        return {
            "total_nfe": self.budget.limit,
            "nfe": sum(tree.ledger.nfe for tree in self.trees),
            "target": self.target,
            "reached": self.reached,
            "truncated": self.truncated,
            "grants": self.grants,
            "notes": self.notes,
        }

    @property
    def reached(self) -> int | None:
        """How many trees have a sample that reaches the target; None without a target."""
        if self.target is None:
            return None
        scores = [best.score(tree.verifier) for tree in self.trees if (best := tree.best()) is not None]
        return sum(score is not None and score >= self.target for score in scores)

    # One tree's grants

    def _drive(self, seat: _Seat) -> Generator[Any, Any, Node | None]:
        run, tree = seat.run, seat.run.tree
        answer: Node | None = None
        while (grant := (yield Await(self, seat))) is not None:
            scope = Scope(tree, seat.grants, grant.nfe)
            seat.grants += 1
            answer = yield from self._search(run, scope, grant)
            if seat.grants > 1:
                answer = tree.best()
            if run.finished_leaf:
                tree.budget.limit = tree.budget.spent
                yield Release(list(_spent_nodes(tree, answer)))
            else:  # what a first sample takes stays with the tree
                tree.budget.limit = min(scope.ceiling, tree.budget.spent + self.setting.sample_cost)
            scores = tuple(node.score(tree.verifier) for node in scope.finished())
            self._report(seat, Outcome(scope.budget.spent, scores))
        if self._error is not None:
            raise self._error
        return answer

    def _search(self, run: Run, scope: Scope, grant: Grant) -> Search:
        """The samples of one grant; the policy's own answer, where it has one."""
        run.name = f"policy {grant.policy.name}"
        try:
            answer = yield from scope.grow(grant.policy, self.target)
        except BudgetExhausted as exhausted:
            run.truncated = str(exhausted)
            return None  # the engine finishes a sample in the end, if no grant did
        if answer is not None:
            run.require_answer(answer)
        return answer

    # The allocator

    def _report(self, seat: _Seat, outcome: Outcome) -> None:
        """A grant is done; when all are, the allocator goes on."""
        seat.grant, seat.outcome = None, outcome
        self._pending -= 1
        if self._pending == 0:
            self._advance(self._collect())

    def _collect(self) -> list[Outcome]:
        outcomes: list[Outcome] = []
        for seat, record in zip(self._granted, self.grants[-1], strict=True):
            assert seat.outcome is not None
            best = max((score for score in seat.outcome.scores if score is not None), default=None)
            record |= {"spent": seat.outcome.nfe, "samples": len(seat.outcome.scores), "best": best, "failed": seat.outcome.failed}
            outcomes.append(seat.outcome)
            seat.outcome = None
        return outcomes

    def _advance(self, outcomes: list[Outcome] | None) -> None:
        """Let the allocator decide until some tree has work to do, or there is nothing left to decide."""
        assert self._allocation is not None
        reply: Any = outcomes
        refusal: BudgetExhausted | UsageError | None = None
        while not self._over:
            self.budget.spent = self.spent
            try:
                grants = self._allocation.send(reply) if refusal is None else self._allocation.throw(refusal)
            except StopIteration:
                self._over = True
                break
            except BudgetExhausted as exhausted:
                self.truncated = str(exhausted)
                self._over = True
                break
            except Exception as mistake:  # the allocator's own error ends its forest, as a policy's ends its tree
                self._error = mistake
                self._over = True
                break
            reply, refusal = None, None
            try:
                self._grant(grants)
            except (BudgetExhausted, UsageError) as refused:
                refusal = refused
                continue
            if self._pending:
                break
            reply = self._collect()
        for seat in self._seats:
            if self._over and not seat.ended and seat.grants == 0:
                seat.run.tree.budget.limit = self.setting.sample_cost
            self._wake(seat)

    def _wake(self, seat: _Seat) -> None:
        """Hand a waiting tree its grant, or tell it that there will be no more."""
        if seat.parked is not None and (seat.grant is not None or self._over):
            group, grant = seat.parked, seat.grant
            seat.parked = None
            group.reply = lambda: grant
            group.done()

    def _grant(self, grants: Any) -> None:
        """Check a list of grants and hand them to their seats, whole or not at all."""
        seats = self._checked(grants)
        price = sum(grant.nfe for seat, grant in zip(seats, grants, strict=True) if not seat.ended)
        granted = set(seats)
        reserve = sum(self._held(seat) for seat in self._seats if seat not in granted)
        assert self.budget.limit is not None
        remaining = self.budget.limit - self.spent - reserve
        if price > remaining:
            raise BudgetExhausted(
                f"the grants come to {price} NFE, but {remaining} of {self.budget.limit} can be granted ({reserve} are kept for the first samples of other trees)",
                price=price,
                remaining=remaining,
            )
        self._granted = seats
        self._pending = sum(not seat.ended for seat in seats)
        self.grants.append([{"tree": self._place[id(grant.tree)], "policy": grant.policy.name, "nfe": grant.nfe} for grant in grants])
        for seat, grant in zip(seats, grants, strict=True):
            if seat.ended:
                seat.outcome = Outcome(0, failed=True)
            else:
                seat.grant, seat.before = grant, seat.run.tree.budget.spent

    def _checked(self, grants: Any) -> list[_Seat]:
        """The seats of grants that can be made. Raises UsageError."""
        name = f"allocator {self.allocator.name}"
        if not isinstance(grants, Sequence) or not grants or not all(isinstance(grant, Grant) for grant in grants):
            raise UsageError(f"{name} yielded {grants!r}; yield a list of at least one Grant, and return to end")
        seats: dict[_Seat, None] = {}
        for grant in grants:
            if id(grant.tree) not in self._place:
                raise UsageError(f"{name}: {grant.tree!r} is not a tree of this forest")
            seat = self._seats[self._place[id(grant.tree)]]
            least = 1 if seat.run.finished_leaf or seat.ended else self.setting.sample_cost
            if seat in seats:
                raise UsageError(f"{name} granted tree {self._place[id(grant.tree)]} twice at once; a tree has one search at a time")
            if grant.nfe < least:
                raise UsageError(f"{name} granted {grant.nfe} NFE to tree {self._place[id(grant.tree)]}, which needs at least {least}")
            seats[seat] = None
        return list(seats)

    def _held(self, seat: _Seat) -> int:
        """NFE that are kept for a tree's first sample."""
        if seat.ended or seat.run.finished_leaf:
            return 0
        budget = seat.run.tree.budget
        return self.setting.sample_cost if seat.grants == 0 else (budget.limit or 0) - budget.spent


def _spent_nodes(tree: Tree, answer: Node | None) -> Iterator[Node]:
    """Open nodes that no later grant will grow: all but those on the way to what may be the answer."""
    finished = [node for node in tree.nodes if node.level == tree.schedule.last and not node.draft and not node.failed]
    unscored = [node for node in finished if tree.verifier not in node.values]
    answers = [node for node in (answer, tree.best(), *unscored) if node is not None] or finished[:1]
    kept = {node for one in answers for node in one.path()}
    return (node for node in tree.nodes if node.status == "open" and not node.draft and node not in kept)
