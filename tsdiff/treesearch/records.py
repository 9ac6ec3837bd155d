"""What a run's journal says, record by record, and how it becomes requests, effects and ledgers again.

    {"tree":"search","request":{...},"price":12,"nodes":[...],"effects":[...],"notes":[...],"ledger":{...},...}    a completed request
    {"tree":"search","request":{...},"refused":"BudgetExhausted","why":"...","price":12,"remaining":8}             one not granted
    {"tree":"search","answer":{"node":3,"key":"person","value":{...}}}                                             a pending verifier's
    {"tree":"search","end":{"answer":7,...}}                                                                       a driver of a tree has ended
    {"tree":"search","driver":{"number":1,"node":12,...}}                                                          a later one begins
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tsdiff.treesearch.errors import BudgetExhausted, TsdiffError, UsageError
from tsdiff.treesearch.ledger import TreeLedger
from tsdiff.treesearch.node import Node
from tsdiff.treesearch.noise import Recipe, recipe_to_json
from tsdiff.treesearch.requests import Gather
from tsdiff.treesearch.run import Effect
from tsdiff.treesearch.segmentfile import DamagedRecord, Place, read
from tsdiff.treesearch.store import Stored

if TYPE_CHECKING:
    from torch import Tensor


class Diverged(UsageError):
    """A policy asks something else than it did before the interruption."""


UNREPEATABLE = (Diverged, DamagedRecord)
"""Why a run cannot go on although nothing is wrong with the search itself: its files stay as they are."""


def request_to_json(request: Any) -> Any:
    """A request as strict JSON that is equal for equal requests: its kind, and every parameter that is not the default.

    Nodes are their indices. What is no request at all is told by its `repr`, for the record of its refusal.
    """
    if isinstance(request, Gather):
        return {"kind": "Gather", "requests": [request_to_json(part) for part in request.requests]}
    if not dataclasses.is_dataclass(request) or isinstance(request, type):
        return {"kind": None, "text": repr(request)}
    fields = {item.name: getattr(request, item.name) for item in dataclasses.fields(request) if not _is_default(request, item)}
    return {"kind": type(request).__name__} | {name: _plain(value) for name, value in fields.items()}


def _is_default(request: Any, item: dataclasses.Field[Any]) -> bool:
    value = getattr(request, item.name)
    return type(value) is type(item.default) and value == item.default


def _plain(value: Any) -> Any:
    if isinstance(value, Node):
        return value.index
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return float(value)
    if isinstance(value, Recipe):
        return recipe_to_json(value)
    return value.item() if hasattr(value, "item") else repr(value)


def node_to_json(node: Node) -> dict[str, Any]:
    """What a node is from its beginning, as strict JSON; a note only where its move left one."""
    data = {
        "index": node.index,
        "id": f"{node.id:032x}",
        "stream": f"{node.stream:032x}",
        "parent": None if node.parent is None else node.parent.index,
        "move": node.move.to_json(),
        "level": node.level,
        "draft": node.draft,
    }
    return data | {"note": dict(node.note)} if node.note else data


@dataclass(frozen=True)
class Refusal:
    """A request that was not granted, and the error that its policy saw."""

    error: TsdiffError

    @staticmethod
    def to_json(error: Exception) -> dict[str, Any]:
        """Strict JSON."""
        facts: dict[str, Any] = {"refused": type(error).__name__, "why": str(error)}
        if isinstance(error, BudgetExhausted):
            facts |= {"price": error.price, "remaining": error.remaining}
        return facts

    @staticmethod
    def from_json(record: Mapping[str, Any]) -> Refusal:
        """The inverse of `to_json`."""
        if record["refused"] == BudgetExhausted.__name__:
            return Refusal(BudgetExhausted(record["why"], price=record["price"], remaining=record["remaining"]))
        return Refusal(UsageError(record["why"]))


@dataclass(frozen=True)
class Recorded:
    """A completed request as it was written down.

    Attributes:
      record: its line of the journal.
      where: for messages.
      folder: of the segments.
    """

    record: Mapping[str, Any]
    where: str
    folder: Path

    @property
    def price(self) -> int:
        """NFE that were granted."""
        price: int = self.record["price"]
        return price

    def require(self, made: Sequence[Node]) -> None:
        """Raise `Diverged` unless these are the nodes that the request made."""
        ids = [f"{node.id:032x}" for node in made]
        known = [node["id"] for node in self.record["nodes"]]
        if ids != known:
            first = next((i for i, (one, other) in enumerate(zip(ids, known, strict=False)) if one != other), min(len(ids), len(known)))
            raise Diverged(
                f"{self.where} made {len(known)} nodes, and making them again gives {len(ids)}, different from the {first + 1}. on; continue it with the tsdiff that began it"
            )

    def effects(self, nodes: Sequence[Node]) -> Iterator[Effect]:
        """What its work changed, in order; tensors are read when they are asked for."""
        for effect in self.record["effects"]:
            facts = dict(effect)
            kind, index, places = facts.pop("effect"), facts.pop("node", None), facts.pop("tensors", {})
            yield Effect(kind, None if index is None else nodes[index], facts, InSegments(self.folder, {name: Place.from_json(place) for name, place in places.items()}))

    def restore(self, ledger: TreeLedger) -> None:
        """Set a tree's ledger to what it was when the request was complete."""
        restore(ledger, self.record["ledger"])


def restore(ledger: TreeLedger, counts: Mapping[str, Any]) -> None:
    """Set a ledger to what `to_json` gave."""
    for name, count in counts.items():
        setattr(ledger, name, Counter(count) if isinstance(count, dict) else count)


def effect_to_json(effect: Effect, places: Mapping[str, Place]) -> dict[str, Any]:
    """An effect as strict JSON, with the places of the tensors that were kept."""
    data: dict[str, Any] = {"effect": effect.kind}
    if effect.node is not None:
        data["node"] = effect.node.index
    data |= effect.facts
    if places:
        data["tensors"] = {name: place.to_json() for name, place in places.items()}
    return data


class InSegments(Stored):
    """Tensors that are in the segments of a folder, for a store; a tree may have as many of these as nodes."""

    __slots__ = ("_names", "folder", "places")

    def __init__(self, folder: Path, places: Mapping[str, Place]) -> None:
        self.folder = folder
        self.places = tuple(places.values())
        self._names = _shared(tuple(places))

    def __len__(self) -> int:
        return len(self.places)

    def read(self) -> dict[str, Tensor]:
        return {name: read(self.folder, place)[1].tensor() for name, place in zip(self._names, self.places, strict=True)}


@cache
def _shared(names: tuple[str, ...]) -> tuple[str, ...]:
    """One object for equal names, of which there are few."""
    return names
