"""Trees that were written down: made again from `tree.json`, or record by record from a journal, with nothing running.

A `SavedNode` is a `Node` that also knows its children and how noisy it is. What a tree says does not depend on where it was
read: the same search gives the same tree from either.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

from tsdiff.treesearch.errors import UsageError
from tsdiff.treesearch.node import Json, Move, Node, Value
from tsdiff.treesearch.protocols import Condition
from tsdiff.treesearch.schedule import Schedule
from tsdiff.treesearch.segmentfile import Place
from tsdiff.treesearch.tree import best_node, supersedes

if TYPE_CHECKING:
    import networkx as nx

WRONG = (KeyError, IndexError, TypeError, ValueError, AttributeError, OverflowError)
"""What reading raises where JSON is not what it should be."""


@dataclass(slots=True, eq=False)
class SavedNode(Node):
    """A node of a saved tree.

    Attributes:
      children: in the order of their making.
      alpha, sigma: signal and noise scale of its level; None where the schedule is not known.
    """

    children: list[SavedNode] = field(default_factory=list)
    alpha: float | None = None
    sigma: float | None = None

    def __repr__(self) -> str:
        return f"SavedNode({self.index}, {self.move.kind}, level {self.level}, {self.status})"


class SavedTree:
    """A tree as far as it was written down.

    Args:
      head: what it is from its beginning, as in `tree.json`; `schedule` may be missing.
      line: "search" or "baseline".
      last: the clean level, where the schedule is not known.

    Attributes:
      nodes: by index.
      verifier: what steers, and `best()` goes by; "" where that is not known.
      solver: its name.
      schedule: levels and their scales; where steps really land is not kept. None where it is not known.
      ledger: what it has spent, as in `tree.json`.
      notes: what the policy wrote on the tree.
      requests, refused: how many were granted and completed, and how many were not granted. Only a journal says so.
      ended: nothing will be added by the policy that grew it.
      driver: who grows it, or grew it last: 0 is the search, later ones are expansions.
      answer: index of the node that the search gave, or a better one of an expansion; None where there is none, or where it
        is not known.
      truncated, error: why the policy was stopped early, and what ended it.
      places: of the latents that a journal knows of, by node.
    """

    def __init__(self, head: Mapping[str, Any], *, line: str = "search", last: int = 0) -> None:
        self.head = {name: head.get(name) for name in ("prompt", "negative_prompt", "class", "seed")} | {"line": line}
        self.head |= {name: head.get(name) for name in ("verifier", "solver", "schedule")}
        self.line = line
        if head.get("seed") is not None:
            _of(int, head["seed"])
        self.schedule = None if head.get("schedule") is None else _schedule(head["schedule"])
        self.verifier: str = _text(head.get("verifier") or "")
        self.solver: str = _text(head.get("solver") or "")
        self.prompt: str = _text(head.get("prompt") or "")
        self.last = last if self.schedule is None else self.schedule.last
        self.nodes: list[SavedNode] = []
        self.ledger: dict[str, Any] = {"nfe": 0, "rows": 0, "encodes": 0, "decodes": 0, "verifier_calls": {}}
        self.notes: list[dict[str, Json]] = []
        self.requests = self.refused = 0
        self.ended = False
        self.driver = 0
        self.answer: int | None = None
        self.truncated: str | None = None
        self.error: str | None = None
        self.places: dict[int, Place] = {}
        self._launch: dict[str, Any] = {}
        self._moves: dict[tuple[Any, ...], Move] = {}

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> SavedTree:
        """The tree of a `tree.json`. Raises one of `WRONG` if it is none."""
        tree = SavedTree(_of(dict, data) | {"schedule": _of(dict, data["schedule"])}, line=_text(data["line"]))
        tree.ledger = _ledger(data["ledger"])
        tree.notes = _of(list, data["notes"])
        tree.ended = True
        for item in data["nodes"]:
            node = tree._add(item)
            _state(node, item["nfe"], item["status"], item["reason"])
            if item["values"]:
                node.values = {sys.intern(key): _value(value) for key, value in item["values"].items()}
        return tree

    def to_json(self) -> dict[str, Any]:
        """As `tree.json`, whatever it was read from."""
        return {"format": 1, **self.head, "ledger": self.ledger, "notes": self.notes, "nodes": [node.to_json() for node in self.nodes]}

    def apply(self, record: Mapping[str, Any]) -> set[int]:
        """Do what a record of a journal says; returns the indices of the nodes that it made or changed.

        Raises:
          One of `WRONG`, if it makes no sense; the tree is of no use then.
        """
        # `Rebuilt.apply` goes through the same records to grow the tree on. Here nothing is trusted, and what changed is told: a
        # viewer asks for every group of a journal that is being written, or was damaged.
        if "driver" in record:  # the tree is grown on from one of its nodes
            self._launch = _of(dict, record["driver"])
            self.driver, self.ended = _of(int, self._launch["number"]), False
            return set()
        if "refused" in record:
            self.refused += 1
            return set()
        if "answer" in record:  # before the request that asked is complete, so its node may not be there yet
            answer = record["answer"]
            return {answer["node"]} if self._value(answer["node"], answer["key"], answer["value"]) else set()
        touched: set[int] = set()
        if "end" in record:
            touched = self._end(record["end"])
        elif "request" in record:
            self.requests += 1
            touched = {self._add(item).index for item in record["nodes"]}
            touched |= {self._effect(effect) for effect in record["effects"]} - {-1}
            self.ledger = _ledger(record["ledger"])
        for index, facts in record.get("notes", ()):
            if index is None:
                self.notes.append(_of(dict, facts))
            else:
                node = self.at(index)
                node.note = {**node.note, **_of(dict, facts)}
                touched.add(index)
        return touched

    # Looking ----------------------------------------------------------------------------------------------------

    @property
    def condition(self) -> Condition:
        """What the samples are conditioned on, as far as it is kept: no tensors, no metadata."""
        return Condition(self.prompt, self.head["negative_prompt"] or "", self.head["class"])

    @property
    def seed(self) -> int | None:
        """The seed of all noise; None where it is not known."""
        seed: int | None = self.head["seed"]
        return seed

    @property
    def roots(self) -> list[SavedNode]:
        """The nodes without a parent."""
        return [node for node in self.nodes if node.parent is None]

    @property
    def finished(self) -> list[SavedNode]:
        """The finished samples; drafts and failed nodes are none."""
        return [node for node in self.nodes if node.level == self.last and not node.draft and not node.failed]

    @property
    def best(self) -> SavedNode | None:
        """The answer, if the search gave one, else the finished node with the highest score so far, else None."""
        return self.nodes[self.answer] if self.answer is not None else best_node(self.nodes, self.last, self.verifier)

    @property
    def score(self) -> float | None:
        """What the steering verifier says of the best node."""
        best = self.best
        return None if best is None else best.score(self.verifier)

    def at(self, index: int) -> SavedNode:
        """The node of an index. Raises UsageError, naming those there are."""
        if type(index) is not int or not 0 <= index < len(self.nodes):
            there = f"its nodes are 0 to {len(self.nodes) - 1}" if self.nodes else "it has no nodes yet"
            raise UsageError(f"there is no node {index!r} in the {self.line} tree; {there}")
        return self.nodes[index]

    def path(self, node: SavedNode | int) -> list[SavedNode]:
        """The nodes from the root to a node."""
        return cast("list[SavedNode]", (self.at(node) if isinstance(node, int) else node).path())

    def path_costs(self) -> list[int]:
        """For each node, the NFE of the nodes from the root to it."""
        costs: list[int] = []
        for node in self.nodes:
            costs.append(node.nfe + (0 if node.parent is None else costs[node.parent.index]))
        return costs

    def best_below(self) -> list[float | None]:
        """For each node, the highest score among the finished samples that came of it, itself included."""
        found: list[float | None] = [None] * len(self.nodes)
        for node in reversed(self.nodes):  # children come after their parents
            own = node.score(self.verifier) if node.level == self.last and not node.draft and not node.failed else None
            known = found[node.index]
            found[node.index] = highest = own if known is None or (own is not None and own > known) else known
            if node.parent is not None and highest is not None:
                above = found[node.parent.index]
                if above is None or highest > above:
                    found[node.parent.index] = highest
        return found

    def to_networkx(self) -> nx.DiGraph[int]:
        """The tree as a networkx DiGraph: nodes by index, attributes that are plain numbers, text and truth values."""
        from tsdiff.treesearch.exports import graph

        return graph(self)

    # Growing ----------------------------------------------------------------------------------------------------

    def _add(self, data: Mapping[str, Any]) -> SavedNode:
        """A node without its values."""
        index, level, parent = len(self.nodes), data["level"], data["parent"]
        if data["index"] != index:
            raise ValueError(f"node {data['index']!r} stands where node {index} should")
        if type(level) is not int or not 0 <= level <= max(self.last, 0 if self.schedule else level):
            raise ValueError(f"node {index} is of level {level!r}")
        above = None if parent is None else self.at(parent)
        schedule = self.schedule
        node = SavedNode(
            index, int(data["id"], 16), int(data["stream"], 16), above, self._move(data["move"]), level, draft=_of(bool, data["draft"]), driver=_of(int, data.get("driver", self.driver)),
            alpha=None if schedule is None else schedule.alpha[level], sigma=None if schedule is None else schedule.sigma[level],
        )  # fmt: skip
        if data.get("note"):
            node.note = _of(dict, data["note"])
        if above is not None:
            if node.stream == above.stream:
                node.stream = above.stream  # one number in memory for a whole path
            above.children.append(node)
        self.nodes.append(node)
        return node

    def _move(self, data: Mapping[str, Any]) -> Move:
        if len(data) > 3:
            return _read_move(data)
        key = (data["kind"], tuple(data["levels"]), data["copy"])
        if key not in self._moves:  # most moves are alike
            self._moves[key] = _read_move(data)
        return self._moves[key]

    def _effect(self, effect: Mapping[str, Any]) -> int:
        """Change a node as `tsdiff.treesearch.run.Run.repeat` does; returns its index, -1 for none."""
        kind = effect["effect"]
        if kind == "blamed":
            return -1
        node = self.at(effect["node"])
        if "nfe" in effect:
            node.nfe = _of(int, effect["nfe"])
        if kind == "settled":
            place = effect.get("tensors", {}).get("latent")
            if place is not None:
                self.places[node.index] = Place.from_json([_of(int, number) for number in place])
        elif kind == "failed":
            _state(node, node.nfe, "failed", effect["reason"])
        elif kind == "closed":
            node.status = "closed" if node.status == "open" else node.status
        elif kind == "valued":
            self._value(node.index, effect["key"], effect["value"])
        return node.index

    def _value(self, index: int, key: str, value: Mapping[str, Any]) -> bool:
        if not 0 <= index < len(self.nodes):
            return False
        node = self.nodes[index]
        node.values = {**node.values, sys.intern(key): _value(value)}
        return True

    def _end(self, end: Mapping[str, Any]) -> set[int]:
        answer, known = None if end["answer"] is None else self.at(end["answer"]), None if self.answer is None else self.nodes[self.answer]
        if answer is not None and supersedes(answer, known, self.verifier, joint=bool(self._launch.get("joint"))):
            self.answer = answer.index
        self.truncated, self.error, self.ledger, self.ended = end["truncated"], end["error"], _ledger(end["ledger"]), True
        closed = {node.index for node in self.nodes if node.status == "open"}
        for index in closed:
            self.nodes[index].status = "closed"
        return closed


def _state(node: SavedNode, nfe: Any, status: Any, reason: Any) -> None:
    if status not in ("open", "closed", "failed"):
        raise ValueError(f"node {node.index} is {status!r}")
    node.nfe, node.status, node.reason = _of(int, nfe), status, None if reason is None else _text(reason)


def _read_move(data: Mapping[str, Any]) -> Move:
    move = Move.from_json(dict(data))
    _text(move.kind)
    for level in move.levels:
        _of(int, level)
    return move


def _value(data: Mapping[str, Any]) -> Value:
    score, parts, reason = data["score"], data.get("parts"), data.get("reason")
    return Value(
        None if score is None else _number(score),
        None if parts is None else {_text(name): _number(part) for name, part in parts.items()},
        None if reason is None else _text(reason),
    )


def _number(value: Any) -> float:
    if type(value) not in (int, float) or not math.isfinite(value):
        raise ValueError(f"{value!r} is no finite number")
    return float(value)


def _schedule(data: Mapping[str, Any]) -> Schedule:
    alpha, sigma = (tuple(map(float, data[name])) for name in ("alpha", "sigma"))
    return Schedule(data["kind"], data["key"], tuple(map(float, data["timesteps"])), alpha, sigma, tuple(zip(alpha, sigma, strict=True)), 1.0)


def _ledger(data: Mapping[str, Any]) -> dict[str, Any]:
    for name in ("nfe", "rows", "decodes"):
        _of(int, data[name])
    for count in data["verifier_calls"].values():
        _of(int, count)
    return dict(data)


def _text(value: Any) -> str:
    return cast(str, _of(str, value))


def _of(kind: type, value: Any) -> Any:
    if type(value) is not kind:
        raise TypeError(f"{str(value)[:40]!r} is no {kind.__name__}")
    return value


def calls(ledger: Mapping[str, Any]) -> int:
    """Images that verifiers have scored, of all verifiers together."""
    counts: Sequence[int] = list(ledger["verifier_calls"].values())
    return sum(counts)
