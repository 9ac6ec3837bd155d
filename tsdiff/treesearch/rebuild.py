"""A tree from its journal alone: no policy is run, no model is loaded, no tensor is read.

What a driver did is known once it has ended; one that was interrupted is left to whoever continues it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tsdiff.treesearch.errors import UsageError
from tsdiff.treesearch.journal import JournalReader
from tsdiff.treesearch.node import Move, Node, Value
from tsdiff.treesearch.records import restore
from tsdiff.treesearch.runfile import JOURNAL
from tsdiff.treesearch.tree import Tree, supersedes


@dataclass(frozen=True)
class Ended:
    """A driver that has ended.

    Attributes:
      facts: what the record that began it says; empty for the first.
      answer: the node that it answered with, None if it failed.
      truncated: why it was stopped early, if it was.
      error: why it failed, if it did.
    """

    facts: Mapping[str, Any]
    answer: Node | None
    truncated: str | None
    error: str | None


@dataclass
class Rebuilt:
    """A tree as its ended drivers left it.

    Attributes:
      tree: the tree; no node is open.
      drivers: in order; the first is the search itself.
      arrived: of nodes by index, whether a denoise step landed there.
      history: of nodes by index, the level of the solver's history that belonged to them; -1 for none.
      more: whether the journal goes on after what was rebuilt.
      tail: what was left out of the journal because it is torn or damaged, in words; "" if nothing was.
    """

    tree: Tree
    drivers: list[Ended] = field(default_factory=list)
    arrived: dict[int, bool] = field(default_factory=dict)
    history: dict[int, int] = field(default_factory=dict)
    more: bool = False
    tail: str = ""

    def best(self) -> Node | None:
        """The best of the drivers' answers by the verifier that steers the run (ties: the earliest); None if none has one.

        Where scores are relative to a set, the driver that has ranked all samples last has the last word.
        """
        best: Node | None = None
        for driver in self.drivers:
            answer = driver.answer
            if answer is not None and supersedes(answer, best, self.tree.verifier, joint=bool(driver.facts.get("joint"))):
                best = answer
        return best

    def apply(self, record: Mapping[str, Any]) -> None:
        """Do again what one completed request did, or what an end says."""
        # `SavedTree.apply` goes through the same records for readers, who may meet a damaged journal of a run that goes on: it
        # checks every value, takes answers as they arrive, and tells which nodes changed. Here the records are those of ended
        # drivers, and the tree will be grown: it keeps its leaders, and what solvers need of a node to continue it.
        tree = self.tree
        for made in record.get("nodes", ()):
            self._add(made)
        for effect in record.get("effects", ()):
            self._change(effect)
        for index, facts in record.get("notes", ()):
            tree.note(None if index is None else tree.nodes[index], **facts)
        if "ledger" in record:
            restore(tree.ledger, record["ledger"])

    def end(self, facts: Mapping[str, Any], end: Mapping[str, Any]) -> None:
        """A driver has ended: nothing of the tree is open any more."""
        tree = self.tree
        for node in tree.nodes:
            if node.status == "open":
                node.status = "closed"
        restore(tree.ledger, end["ledger"])
        answer = None if end["answer"] is None else tree.nodes[end["answer"]]
        self.drivers.append(Ended(facts, answer, end["truncated"], end["error"]))

    def _add(self, made: Mapping[str, Any]) -> None:
        tree = self.tree
        parent = None if made["parent"] is None else tree.nodes[made["parent"]]
        node = Node(
            made["index"],
            int(made["id"], 16),
            int(made["stream"], 16),
            parent,
            Move.from_json(made["move"]),
            made["level"],
            draft=made["draft"],
            driver=tree.driver,
        )
        if "note" in made:
            node.note = made["note"]
        assert node.index == len(tree.nodes), "nodes are recorded in order"
        tree.nodes.append(node)
        if parent is None:
            tree.roots.append(node)

    def _change(self, effect: Mapping[str, Any]) -> None:
        if effect.get("node") is None:
            return
        node = self.tree.nodes[effect["node"]]
        node.nfe = effect.get("nfe", node.nfe)
        kind = effect["effect"]
        if kind == "settled":
            self.arrived[node.index], self.history[node.index] = effect["arrived"], effect["history"]
        elif kind == "failed":
            self.tree.give_up(node, effect["reason"])
        elif kind == "closed" and node.status == "open":
            node.status = "closed"
        elif kind == "valued":
            self.tree.give_value(node, effect["key"], Value(**effect["value"]))


def rebuild(folder: Path, tree: Tree, most: int | None = None) -> Rebuilt:
    """What a run folder's journal says of a tree, as far as its drivers have ended.

    Args:
      folder: of the run.
      tree: new, of that run; it is filled.
      most: so many drivers at most; None for all.

    Raises:
      UsageError: if there is no journal, or it cannot be read.
    """
    path = folder / JOURNAL
    if not path.exists():
        raise UsageError(f"{str(folder)!r} has no {JOURNAL}: it was saved without a record of how it grew")
    rebuilt = Rebuilt(tree)
    reader = JournalReader(path)
    ended = sum("end" in record for record in _records(reader, tree.line))
    ended = ended if most is None else min(ended, most)
    rebuilt.tail = "" if reader.tail is None else str(reader.tail)
    facts: Mapping[str, Any] = {}
    for record in _records(JournalReader(path), tree.line):
        if len(rebuilt.drivers) == ended:
            rebuilt.more = True
            break
        if "driver" in record:
            facts = record["driver"]
            tree.driver = facts["number"]
        elif "refused" not in record:
            rebuilt.apply(record)
            if "end" in record:
                rebuilt.end(facts, record["end"])
    return rebuilt


def _records(reader: JournalReader, line: str) -> Iterator[dict[str, Any]]:
    """The records of one tree, in order."""
    for group in reader:
        for record in group.records:
            assert isinstance(record, dict)
            if record["tree"] == line:
                yield record
