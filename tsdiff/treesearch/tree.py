"""A search tree: its nodes, what it may spend and has spent, and what a policy may see and ask of it.

The engine grows it; a policy reads it (`TreeView`). It holds no tensor.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, TypeVar

from tsdiff.treesearch.errors import UsageError
from tsdiff.treesearch.ledger import Budget, TreeLedger
from tsdiff.treesearch.node import Json, Move, Node, Value
from tsdiff.treesearch.noise import derive, generator
from tsdiff.treesearch.protocols import Condition
from tsdiff.treesearch.schedule import Schedule, SolverInfo

if TYPE_CHECKING:
    import networkx as nx
    import numpy as np

AnyNode = TypeVar("AnyNode", bound=Node)


def best_node(nodes: Iterable[AnyNode], last: int, key: str) -> AnyNode | None:
    """The finished node (of level `last`) with the highest score under a value key; ties go to the first; None if there is none."""
    best: AnyNode | None = None
    highest = -math.inf
    for node in nodes:
        if node.level == last and not node.draft and not node.failed:
            score = node.score(key)
            if score is not None and score > highest:
                best, highest = node, score
    return best


def supersedes(answer: Node, known: Node | None, key: str, *, joint: bool) -> bool:
    """Whether the answer of a tree's later driver takes the place of the best one of those before it (ties: the earlier stays).

    A driver that has ranked all samples again (`joint`) has the last word.
    """
    if known is None or joint:
        return True
    score, held = answer.score(key), known.score(key)
    return score is not None and (held is None or score > held)


_STRICT = json.JSONEncoder(allow_nan=False).encode


class Tree:
    """One search of one prompt or class under one seed.

    Args:
      schedule, solver: the levels and what steps through them.
      condition: what the samples are conditioned on.
      seed: where all noise comes from.
      verifier: name of the verifier that steers; `best()` goes by it.
      nfe: limit on network evaluations, None for none.
      line: the ledger line this tree is booked on: "search" or "baseline".

    Attributes:
      driver: who grows it now: 0 is its search; whatever goes on from a saved tree is a later driver, whose streams, ids
        and generators are its own, so that they follow from its number and not from what others have done.
    """

    def __init__(
        self,
        schedule: Schedule,
        solver: SolverInfo,
        condition: Condition,
        *,
        seed: int,
        verifier: str,
        nfe: int | None = None,
        line: str = "search",
    ) -> None:
        self.schedule = schedule
        self.solver = solver
        self.condition = condition
        self.seed = seed
        self.verifier = verifier
        self.line = line
        self.driver = 0
        self.budget = Budget(nfe)
        self.ledger = TreeLedger()
        self.nodes: list[Node] = []
        self.roots: list[Node] = []
        self.notes: list[dict[str, Json]] = []
        self.heard: list[tuple[Node | None, dict[str, Json]]] | None = None  # notes as they come, where somebody writes them down
        self.children: dict[int, dict[tuple[Any, ...], int]] = {}  # of open nodes: how many they have had, by kind of move
        self._generators: dict[int, np.random.Generator] = {}
        self._leaders: dict[str, Node | None] = {}  # the best finished node by value key, of those keys that `give_value` knows
        self._unsure: set[str] = set()  # keys whose leader has to be looked for again

    def best(self, verifier: str | None = None) -> Node | None:
        """The finished node with the highest score (ties: the oldest); None while there is none."""
        key = self.verifier if verifier is None else verifier
        if key not in self._leaders:
            return best_node(self.nodes, self.schedule.last, key)
        if key in self._unsure:
            self._leaders[key] = best_node(self.nodes, self.schedule.last, key)
            self._unsure.discard(key)
        return self._leaders[key]

    def _leads(self, node: Node, best: Node | None, key: str) -> bool:
        """Whether a node is a finished one with a higher score than the best so far (ties: the older)."""
        score = node.score(key)
        if score is None or node.level != self.schedule.last or node.draft or node.failed:
            return False
        held = None if best is None else best.score(key)
        return best is None or held is None or (score, -node.index) > (held, -best.index)

    def give_value(self, node: Node, key: str, value: Value) -> None:
        """Give a node a verifier's value; a second one under the same key replaces the first."""
        if key in node.values:
            self._unsure.add(key)
        node.values = {**node.values, key: value}
        best = self._leaders.setdefault(key, None)
        if self._leads(node, best, key):
            self._leaders[key] = node

    def give_up(self, node: Node, reason: str) -> None:
        """A node has failed."""
        node.status = "failed"
        node.reason = reason
        self._unsure.update(key for key, best in self._leaders.items() if best is node)

    def rng(self, *purpose: int | str) -> np.random.Generator:
        """A random generator of the policy's own; the same stateful object for the same purpose."""
        key = derive(self.seed, "rng", *(("driver", self.driver) if self.driver else ()), *purpose)
        if key not in self._generators:
            self._generators[key] = generator(key)
        return self._generators[key]

    def note(self, node: Node | None = None, **facts: Json) -> None:
        """Write facts on a node, or on the tree (in order). Raises UsageError if they are not strict JSON."""
        try:
            _STRICT(facts)
        except (TypeError, ValueError) as error:
            raise UsageError(f"note: {facts!r} is not strict JSON ({error}); write plain, finite numbers, text, lists and dictionaries") from None
        if self.heard is not None:
            self.heard.append((node, facts))
        if node is not None:
            node.note = {**node.note, **facts}
        else:
            self.notes.append(facts)

    def add_root(self, move: Move, level: int = 0) -> Node:
        """A new root; the i-th has stream H(seed, "draw", i) whatever its noise recipe."""
        stream = derive(self.seed, "draw", len(self.roots))
        node = Node(len(self.nodes), derive(stream, "root", move.kind), stream, None, move, level, driver=self.driver)
        self.nodes.append(node)
        self.roots.append(node)
        return node

    def add_child(self, parent: Node, move: Move, stream: int, *path: int | str) -> Node:
        """A new child; `path` tells it apart from its siblings and makes its id."""
        own = () if parent.driver == self.driver else ("driver", self.driver)
        node = Node(len(self.nodes), derive(parent.id, move.kind, *move.levels, *own, *path), stream, parent, move, move.levels[-1], driver=self.driver)
        self.nodes.append(node)
        return node

    def stream(self, node: Node) -> int:
        """The stream that a node's children derive theirs from: its own, salted where another driver made it."""
        return node.stream if node.driver == self.driver else derive(node.stream, "driver", self.driver)

    def next_child(self, node: Node, *kind: Any) -> int:
        """Count up and return the number of earlier children of a kind."""
        counts = self.children.setdefault(node.index, {})
        number = counts.get(kind, 0)
        counts[kind] = number + 1
        return number

    def count_children(self, node: Node, number: int, *kind: Any) -> None:
        """At least so many children of a kind are there."""
        counts = self.children.setdefault(node.index, {})
        counts[kind] = max(counts.get(kind, 0), number)

    def to_networkx(self) -> nx.DiGraph[int]:
        """The tree as a networkx DiGraph: nodes by index, with the attributes of `Node.to_json`."""
        import networkx as nx

        graph: nx.DiGraph[int] = nx.DiGraph()
        for node in self.nodes:
            graph.add_node(node.index, **node.to_json())
            if node.parent is not None:
                graph.add_edge(node.parent.index, node.index, kind=node.move.kind)
        return graph

    def head(self) -> dict[str, Any]:
        """What the tree is from its beginning, as strict JSON."""
        return {
            "prompt": self.condition.prompt,
            "negative_prompt": self.condition.negative_prompt,
            "class": self.condition.class_label,
            "seed": self.seed,
            "line": self.line,
            "verifier": self.verifier,
            "solver": str(self.solver),
            "schedule": {
                "kind": self.schedule.kind,
                "key": self.schedule.key,
                "timesteps": list(self.schedule.timesteps),
                "alpha": list(self.schedule.alpha),
                "sigma": list(self.schedule.sigma),
            },
        }

    def to_json(self) -> dict[str, Any]:
        """The tree as strict JSON; seconds, padding and probes are not part of it."""
        return self.facts() | {"nodes": [node.to_json() for node in self.nodes]}

    def facts(self) -> dict[str, Any]:
        """What `to_json` says beside the nodes."""
        return {
            "format": 1,
            **self.head(),
            "ledger": self.ledger.to_json(),
            "notes": self.notes,
        }
