"""A search written down from the policy's side, and the policy asked again with nothing but the record."""

from __future__ import annotations

import dataclasses
from typing import Any

from tsdiff.plugin.conformance.watching import Refusal, Watch
from tsdiff.treesearch.errors import BudgetExhausted
from tsdiff.treesearch.node import Node
from tsdiff.treesearch.protocols import Policy, Search
from tsdiff.treesearch.tree import Tree


@dataclasses.dataclass
class Entry:
    """A request, what came of it, and how the tree had changed by then."""

    request: Any
    reply: Any = None
    refusal: Refusal | None = None
    spent: int = 0
    nodes: list[tuple[int, dict[str, Any]]] = dataclasses.field(default_factory=list)


class Record(Watch):
    """A search written down, in terms that a fresh process could read back.

    Attributes:
      entries: one for each request.
      answer: what the policy returned, in the same terms; None if it did not return.
    """

    def __init__(self) -> None:
        self.tree: Tree | None = None
        self.entries: list[Entry] = []
        self.answer: Any = None
        self._known: dict[int, dict[str, Any]] = {}

    def asks(self, tree: Tree, request: Any, search: Search) -> None:
        self.entries.append(Entry(plain(request)))

    def told(self, tree: Tree, reply: Any, refusal: Refusal | None) -> None:
        self.tree = tree
        if not self.entries:
            return
        entry = self.entries[-1]
        entry.reply, entry.refusal, entry.spent = plain(reply), refusal, tree.budget.spent
        for node in tree.nodes:
            facts = {name: getattr(node, name) for name in ("nfe", "status", "reason")} | {"values": dict(node.values)}
            if node.index not in self._known:
                origin = {name: getattr(node, name) for name in ("id", "stream", "move", "level", "draft")}
                parent = None if node.parent is None else node.parent.index
                entry.nodes.append((node.index, facts | origin | {"parent": parent, "note": dict(node.note)}))
            elif facts != self._known[node.index]:
                entry.nodes.append((node.index, facts))
            self._known[node.index] = facts

    def ended(self, tree: Tree, answer: Any) -> None:
        self.answer = plain(answer)

    def replay(self, policy: Policy) -> None:
        """Run the policy again on the record alone, and assert that it asks the same and returns the same."""
        assert self.tree is not None, "nothing was recorded"
        old = self.tree
        tree = Tree(old.schedule, old.solver, old.condition, seed=old.seed, verifier=old.verifier, nfe=old.budget.limit, line=old.line)
        search = policy.search(tree)
        reply: Any = None
        refusal: Refusal | None = None
        for number, entry in enumerate(self.entries):
            try:
                request = search.send(reply) if refusal is None else search.throw(refusal)
            except StopIteration as stop:
                raise AssertionError(f"request {number} was {entry.request}, but replayed the search ends with {stop.value}") from None
            assert plain(request) == entry.request, f"request {number} is another one when the search is replayed"
            _restore(tree, entry)
            reply, refusal = actual(entry.reply, tree), entry.refusal
        answer, ended = None, False
        try:
            request = search.send(reply) if refusal is None else search.throw(refusal)
        except StopIteration as stop:
            answer, ended = plain(stop.value), True
        except BudgetExhausted:
            ended = True
        assert ended, f"the search went on with {plain(request)} after its end when it was replayed"
        assert answer == self.answer, "the search returns something else when it is replayed"


def _restore(tree: Tree, entry: Entry) -> None:
    """Bring a tree to where the record has it after a request."""
    tree.budget.spent = entry.spent
    for index, facts in entry.nodes:
        if index == len(tree.nodes):
            parent = None if facts["parent"] is None else tree.nodes[facts["parent"]]
            node = Node(index, facts["id"], facts["stream"], parent, facts["move"], facts["level"], draft=facts["draft"], note=dict(facts["note"]))
            tree.nodes.append(node)
            if parent is None:
                tree.roots.append(node)
        node = tree.nodes[index]
        node.nfe, node.status, node.reason, node.values = facts["nfe"], facts["status"], facts["reason"], dict(facts["values"])


def plain(thing: Any) -> Any:
    """A request or reply without objects: nodes are {"node": index}, requests and noise recipes their fields."""
    if isinstance(thing, Node):
        return {"node": thing.index}
    if isinstance(thing, tuple):
        return tuple(plain(item) for item in thing)
    if isinstance(thing, list):
        return [plain(item) for item in thing]
    if dataclasses.is_dataclass(thing):
        return {"kind": type(thing).__name__} | {item.name: plain(getattr(thing, item.name)) for item in dataclasses.fields(thing)}
    return thing.item() if hasattr(thing, "item") else thing


def actual(thing: Any, tree: Tree) -> Any:
    """A reply with the nodes of a tree: the inverse of `plain`."""
    if isinstance(thing, dict):
        return tree.nodes[thing["node"]]
    if isinstance(thing, (tuple, list)):
        return type(thing)(actual(item, tree) for item in thing)
    return thing
