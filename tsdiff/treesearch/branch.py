"""A tree as the policy of a later driver sees it: a new search that begins where the driver does.

Its schedule is the tail of the tree's from the level that the driver's first nodes stand at, which is level 0 to the
policy; `Draw` gives it re-noised copies of the driver's node. It sees its own nodes and its own budget alone. So every
policy works from a saved node as it does from noise, and costs what its cost on the shorter schedule says.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from tsdiff.treesearch.errors import BudgetExhausted, UsageError
from tsdiff.treesearch.ledger import Budget
from tsdiff.treesearch.node import Json, Move, Node, Status, Value
from tsdiff.treesearch.protocols import Condition, Policy, Search
from tsdiff.treesearch.requests import Denoise, Gather, Perturb, Release, Renoise, Request, Score
from tsdiff.treesearch.run import Run
from tsdiff.treesearch.schedule import Schedule, SolverInfo
from tsdiff.treesearch.tree import best_node

if TYPE_CHECKING:
    import numpy as np


class Seen(Node):
    """A node as a later driver's policy sees it: the levels count from where the driver begins, and its first nodes are roots.

    Attributes:
      node: the tree's own.
    """

    __slots__ = ("node",)

    def __init__(self, node: Node, parent: Seen | None, start: int) -> None:
        self.node = node
        self.index, self.id, self.stream = node.index, node.id, node.stream
        self.parent = parent
        levels = tuple(level - start for level in node.move.levels)
        self.move = Move("draw", (0,), noise=node.move.noise) if parent is None else replace(node.move, levels=levels)
        self.level = node.level - start
        self.draft, self.driver = node.draft, node.driver

    # What changes as the tree grows is the tree's.

    @property
    def nfe(self) -> int:  # type: ignore[override]
        """As the tree's."""
        return self.node.nfe

    @property
    def values(self) -> Mapping[str, Value]:  # type: ignore[override]
        """As the tree's."""
        return self.node.values

    @property
    def note(self) -> Mapping[str, Json]:  # type: ignore[override]
        """As the tree's."""
        return self.node.note

    @property
    def status(self) -> Status:  # type: ignore[override]
        """As the tree's."""
        return self.node.status

    @property
    def reason(self) -> str | None:  # type: ignore[override]
        """As the tree's."""
        return self.node.reason


class Branch:
    """A tree as the policy of a later driver sees it; a `TreeView`.

    Args:
      run: of the tree; it has a `launch`.
    """

    def __init__(self, run: Run) -> None:
        assert run.launch is not None
        self.run = run
        self.start = run.launch.level
        self.schedule: Schedule = run.tree.schedule.tail(self.start)
        self._seen: dict[Node, Seen] = {}

    @property
    def solver(self) -> SolverInfo:
        """What steps through the levels."""
        return self.run.tree.solver

    @property
    def condition(self) -> Condition:
        """What the samples are conditioned on."""
        return self.run.tree.condition

    @property
    def budget(self) -> Budget:
        """Of this driver alone."""
        return self.run.tree.budget

    @property
    def nodes(self) -> Sequence[Node]:
        """The driver's own nodes."""
        return [self._see(node) for node in self.run.nodes]

    def best(self, verifier: str | None = None) -> Node | None:
        """The driver's own finished node with the highest score (ties: the oldest); None while there is none."""
        key = self.run.tree.verifier if verifier is None else verifier
        best = best_node(self.run.nodes, self.run.tree.schedule.last, key)
        return None if best is None else self._see(best)

    def rng(self, *purpose: int | str) -> np.random.Generator:
        """A random generator of the policy's own; the same stateful object for the same purpose."""
        return self.run.tree.rng(*purpose)

    def note(self, node: Node | None = None, **facts: Json) -> None:
        """Write facts on a node, or on the tree."""
        self.run.tree.note(None if node is None else self._own("note", node), **facts)

    def grow(self, policy: Policy) -> Search:
        """A policy's requests in the tree's own terms, and their replies in the policy's."""
        search = policy.search(self)
        if not hasattr(search, "send"):
            raise UsageError(f"policy {policy.name}: search gave {search!r} but must be a generator of requests")
        reply: Any = None
        refusal: BudgetExhausted | UsageError | None = None
        while True:
            try:
                request = search.send(reply) if refusal is None else search.throw(refusal)
            except StopIteration as stop:
                return self._own("the answer", stop.value) if isinstance(stop.value, Node) else stop.value
            reply, refusal = None, None
            try:
                reply = self._reply((yield self._request(request)))
            except (BudgetExhausted, UsageError) as refused:
                refusal = refused

    # Between the policy's terms and the tree's

    def _see(self, node: Node) -> Seen:
        if node not in self._seen:
            parent = node.parent
            own = node.index >= self.run.first_node and parent is not None and (parent.index >= self.run.first_node or self._stands_for_first(parent))
            self._seen[node] = Seen(node, self._see(parent) if own and parent is not None else None, self.start)
        return self._seen[node]

    def _stands_for_first(self, node: Node) -> bool:
        """Whether `Draw` gives the driver's node itself."""
        assert self.run.launch is not None
        return node is self.run.launch.node and node.level == self.start

    def _own(self, what: str, node: Node) -> Node:
        if not isinstance(node, Seen) or self._seen.get(node.node) is not node:
            raise UsageError(f"{what}: {node!r} belongs to another tree")
        return node.node

    def _request(self, request: Any) -> Request:
        """A request with the tree's own nodes and levels."""
        kind = type(request)
        if kind is Gather:
            return Gather(*(self._request(part) for part in request.requests))
        if kind not in (Denoise, Renoise, Perturb, Score, Release):
            return request  # type: ignore[no-any-return]  # Draw means the same; the engine refuses what it does not know
        moved: dict[str, Any] = {"nodes": tuple(self._own(kind.__name__, node) for node in request.group)}
        if kind is Denoise:
            moved["to"] = tuple(self._level(kind, level) for level in request.targets) if isinstance(request.to, tuple) else self._level(kind, request.to)
            moved["via"] = tuple(self._level(kind, level) for level in request.via)
        elif kind is Renoise:
            moved["to"] = self._level(kind, request.to)
        return replace(request, **moved)  # type: ignore[no-any-return]

    def _level(self, kind: type[Any], level: int) -> int:
        if level < 0:
            raise UsageError(f"{kind.__name__}: level {level} does not exist; levels run from 0 to {self.schedule.last}")
        return level + self.start

    def _reply(self, reply: Any) -> Any:
        """A reply with nodes as the policy sees them."""
        if isinstance(reply, (list, tuple)):
            return type(reply)(self._reply(part) for part in reply)
        return self._see(reply) if isinstance(reply, Node) else reply
