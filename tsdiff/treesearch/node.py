"""Nodes and moves: the small records that a search tree is made of. Latents live in the store, never here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal, TypeAlias

from tsdiff.treesearch.noise import Recipe, recipe_from_json, recipe_to_json

Json: TypeAlias = bool | int | float | str | list[Any] | dict[str, Any] | None
MoveKind: TypeAlias = Literal["draw", "start", "denoise", "renoise", "perturb"]
Status: TypeAlias = Literal["open", "closed", "failed"]

_NOTHING: Mapping[str, Any] = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class Move:
    """The edge that made a node.

    Attributes:
      kind: what was done.
      levels: the levels visited, from the parent's (or the root's) level to the node's.
      copy: which of several equal moves from one parent (part of the node's identity).
      noise: the recipe, where the noise is not that of the node's stream.
      solver, model: overrides of the tree's own, for denoise moves.
      scale: the strength of a perturb or start move.
      source: what a renoise or start began from: "latent", "x0", "image" or "node".
    """

    kind: MoveKind
    levels: tuple[int, ...]
    copy: int = 0
    noise: Recipe | None = None
    solver: str | None = None
    model: str | None = None
    scale: float | None = None
    source: str | None = None

    def to_json(self) -> dict[str, Any]:
        """Strict JSON without the attributes that are None."""
        data: dict[str, Any] = {"kind": self.kind, "levels": list(self.levels), "copy": self.copy}
        if self.noise is not None:
            data["noise"] = recipe_to_json(self.noise)
        for name in ("solver", "model", "scale", "source"):
            if getattr(self, name) is not None:
                data[name] = getattr(self, name)
        return data

    @staticmethod
    def from_json(data: dict[str, Any]) -> Move:
        """The inverse of `to_json`."""
        fields = dict(data) | {"levels": tuple(data["levels"])}
        if "noise" in fields:
            fields["noise"] = recipe_from_json(fields["noise"])
        return Move(**fields)


@dataclass(frozen=True, slots=True)
class Value:
    """A verifier's score of a node; higher is better.

    Attributes:
      score: finite, or None where scoring failed.
      parts: named components, e.g. one per atomic fact of a prompt.
      reason: why `score` is None.
    """

    score: float | None
    parts: dict[str, float] | None = None
    reason: str | None = None

    def to_json(self) -> dict[str, Any]:
        """Strict JSON without the attributes that are None, except the score."""
        data: dict[str, Any] = {"score": self.score}
        if self.parts is not None:
            data["parts"] = self.parts
        if self.reason is not None:
            data["reason"] = self.reason
        return data


@dataclass(slots=True, eq=False)
class Node:
    """One latent at one level.

    Attributes:
      index: order of creation in its tree; the node's hash, and what ties break by.
      id: 128-bit hash of the node's place in the tree (parent, move, copy); equal runs have equal ids.
      stream: where its noise comes from, see `tsdiff.treesearch.noise`.
      parent: None for roots.
      move: the edge that made it.
      level: 0 (pure noise) .. T (clean).
      nfe: guided network evaluations spent on it: its own prediction and the interior of the span that made it.
      values: scores by "verifier", or "verifier@lookahead6".
      status: "open" (may still be grown), "closed" (released, or its tree ended) or "failed".
      reason: why it failed.
      draft: made only to look ahead: counted and shown, never an answer.
      note: what the policy wrote on it, strict JSON.
      driver: which of the tree's drivers made it, 0 for the search itself.

    `values` and `note` are for reading; they are replaced, never changed.
    """

    index: int
    id: int
    stream: int
    parent: Node | None
    move: Move
    level: int
    nfe: int = 0
    values: Mapping[str, Value] = field(default_factory=lambda: _NOTHING)  # one for all: most nodes of a large tree have none
    status: Status = "open"
    reason: str | None = None
    draft: bool = False
    note: Mapping[str, Json] = field(default_factory=lambda: _NOTHING)
    driver: int = 0

    def __hash__(self) -> int:
        return self.index

    def __repr__(self) -> str:
        return f"Node({self.index}, {self.move.kind}, level {self.level}, {self.status})"

    @property
    def failed(self) -> bool:
        """Whether the node has no usable latent."""
        return self.status == "failed"

    def score(self, key: str) -> float | None:
        """The score under a value key, or None."""
        value = self.values.get(key)
        return None if value is None else value.score

    def path(self) -> list[Node]:
        """The nodes from the root to this one."""
        nodes = [self]
        while nodes[-1].parent is not None:
            nodes.append(nodes[-1].parent)
        return nodes[::-1]

    def to_json(self) -> dict[str, Any]:
        """The node as strict JSON; 128-bit numbers are 32 hexadecimal digits, the parent is its index, driver 0 is left out."""
        data: dict[str, Any] = {
            "index": self.index,
            "id": f"{self.id:032x}",
            "stream": f"{self.stream:032x}",
            "parent": None if self.parent is None else self.parent.index,
            "move": self.move.to_json(),
            "level": self.level,
            "nfe": self.nfe,
            "values": {key: self.values[key].to_json() for key in sorted(self.values)},  # not in order of arrival
            "status": self.status,
            "reason": self.reason,
            "draft": self.draft,
            "note": dict(self.note),
        }
        return data | {"driver": self.driver} if self.driver else data
