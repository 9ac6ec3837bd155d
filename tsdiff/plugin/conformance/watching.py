"""Watching policies from their own side: what they are shown, ask for, are told, hold and touch."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping, Sequence, Set
from typing import Any

from tsdiff.plugin.conformance.laboratory import global_states, seed_globally
from tsdiff.treesearch.errors import BudgetExhausted, UsageError
from tsdiff.treesearch.node import Node
from tsdiff.treesearch.protocols import Policy, Search, TreeView
from tsdiff.treesearch.requests import Start
from tsdiff.treesearch.run import flatten
from tsdiff.treesearch.tree import Tree

Refusal = BudgetExhausted | UsageError


class Endless(AssertionError):
    """A policy that goes on asking."""


class Interruption(BaseException):
    """Stands for a key press or a kill: nothing on the way may catch it."""


class Watch:
    """Sees a search from the policy's side. Override what is of interest."""

    def view(self, tree: Tree) -> Any:
        """What the policy is given as its tree."""
        return tree

    def asks(self, tree: Tree, request: Any, search: Search) -> None:
        """The policy has yielded a request and is suspended."""

    def told(self, tree: Tree, reply: Any, refusal: Refusal | None) -> None:
        """The policy is about to go on, with a reply or a refusal."""

    def ended(self, tree: Tree, answer: Any) -> None:
        """The policy has returned."""


class Watched:
    """A policy like the one it wraps, watched while it searches.

    Args:
      policy: the policy.
      most_requests: a search that asks for more is taken to have no end.
      watches: what looks on.
    """

    def __init__(self, policy: Policy, most_requests: int, *watches: Watch) -> None:
        self.policy = policy
        self.most_requests = most_requests
        self.watches = watches

    def __getattr__(self, name: str) -> Any:
        return getattr(self.policy, name)

    def search(self, tree: Any) -> Generator[Any, Any, Any]:
        """The policy's own, request by request."""
        shown: Any = tree
        for watch in self.watches:
            shown = watch.view(shown)
        search = self.policy.search(shown)
        assert hasattr(search, "send"), f"search gave {search!r} but must be a generator of requests"
        reply: Any = None
        refusal: Refusal | None = None
        try:
            for _ in range(self.most_requests):
                for watch in self.watches:
                    watch.told(tree, reply, refusal)
                try:
                    request = search.send(reply) if refusal is None else search.throw(refusal)
                except StopIteration as stop:
                    for watch in self.watches:
                        watch.ended(tree, stop.value)
                    return stop.value
                for watch in self.watches:
                    watch.asks(tree, request, search)
                reply, refusal = None, None
                try:
                    reply = yield request
                except (BudgetExhausted, UsageError) as refused:
                    refusal = refused
        finally:
            search.close()
        raise Endless(f"the search has made {self.most_requests} requests without an end; the last was {request!r}")


# What a policy may see and touch -------------------------------------------------------------------------------------


class View:
    """A tree with the names of `TreeView` only. Remembers what else it was asked for."""

    names = frozenset(name for name in vars(TreeView) if not name.startswith("_"))

    def __init__(self, tree: Any, outside: list[str]) -> None:
        object.__setattr__(self, "_View__hidden", (tree, outside))

    def __getattr__(self, name: str) -> Any:
        tree, outside = object.__getattribute__(self, "_View__hidden")
        if name not in self.names:
            outside.append(name)
        return getattr(tree, name)

    def __setattr__(self, name: str, value: Any) -> None:
        object.__getattribute__(self, "_View__hidden")[1].append(name)
        raise AttributeError(f"a policy cannot set {name} of its tree")


class Sight(Watch):
    """What a policy reads of its tree beyond `TreeView`, and what tensors and models it holds on to.

    Attributes:
      outside: names that `TreeView` does not have.
      held: variables with a tensor or a model in them.
    """

    def __init__(self) -> None:
        self.outside: list[str] = []
        self.held: list[str] = []

    def view(self, tree: Tree) -> Any:
        return View(tree, self.outside)

    def asks(self, tree: Tree, request: Any, search: Search) -> None:
        generator: Any = search
        while generator is not None and getattr(generator, "gi_frame", None) is not None:
            for name, value in generator.gi_frame.f_locals.items():
                self.held += [f"{name}: {type(found).__name__}" for found in _machinery(value)]
            generator = generator.gi_yieldfrom


def _machinery(value: Any, depth: int = 4, seen: set[int] | None = None) -> Iterator[Any]:
    """Tensors and models within reach of a value."""
    import torch

    seen = set() if seen is None else seen
    if id(value) in seen or isinstance(value, (View, Node, type, str, bytes, int, float)):
        return
    seen.add(id(value))
    if isinstance(value, (torch.Tensor, torch.nn.Module)) or (callable(getattr(value, "forward", None)) and callable(getattr(value, "decode", None))):
        yield value
    elif depth:
        if isinstance(value, Mapping):
            inner: Any = value.values()
        elif isinstance(value, (Sequence, Set)):
            inner = value
        else:
            inner = getattr(value, "__dict__", {}).values()
        for item in list(inner):
            yield from _machinery(item, depth - 1, seen)


class Touch(Watch):
    """What a policy changes of its tree, notes aside.

    Attributes:
      changes: a line for each.
    """

    def __init__(self) -> None:
        self.changes: list[str] = []
        self.before: dict[str, Any] = {}

    def told(self, tree: Tree, reply: Any, refusal: Refusal | None) -> None:
        self.before = self._facts(tree)

    def asks(self, tree: Tree, request: Any, search: Search) -> None:
        self._compare(tree)

    def ended(self, tree: Tree, answer: Any) -> None:
        self._compare(tree)

    def _compare(self, tree: Tree) -> None:
        after = self._facts(tree)
        self.changes += [f"{name} was {self.before.get(name)} and is {after.get(name)}" for name in {**self.before, **after} if self.before.get(name) != after.get(name)]

    @staticmethod
    def _facts(tree: Tree) -> dict[str, Any]:
        facts: dict[str, Any] = {
            "the budget": (tree.budget.limit, tree.budget.spent),
            "the ledger": tree.ledger.to_json(),
            "the prompt's metadata": repr(tree.condition.metadata),
            "the list of nodes": [id(node) for node in tree.nodes],
        }
        for node in tree.nodes:
            values = [(key, value.score, dict(value.parts or {}), value.reason) for key, value in node.values.items()]
            place = (node.index, node.id, node.stream, node.move, node.level, None if node.parent is None else node.parent.index)
            facts[f"node {place[0]}"] = (place, node.nfe, node.status, node.reason, node.draft, values)
        return facts


class Refusals(Watch):
    """What a policy was refused.

    Attributes:
      mistakes: requests that can never be granted, in words.
    """

    def __init__(self) -> None:
        self.mistakes: list[str] = []

    def told(self, tree: Tree, reply: Any, refusal: Refusal | None) -> None:
        if isinstance(refusal, UsageError):
            self.mistakes.append(str(refusal))


class Holdings(Watch):
    """Finished samples that a policy lets lie: open at its end, though it has not used them for long.

    Attributes:
      idle: indices of these nodes; the answer is not among them.
    """

    long = 10
    """Requests."""

    def __init__(self) -> None:
        self.requests = 0
        self.used: dict[Node, int] = {}
        self.idle: list[int] = []

    def asks(self, tree: Tree, request: Any, search: Search) -> None:
        self.requests += 1
        for part in flatten(request):
            used = (part.source,) if isinstance(part, Start) else getattr(part, "group", ())
            self.used.update({node: self.requests for node in used if isinstance(node, Node)})

    def told(self, tree: Tree, reply: Any, refusal: Refusal | None) -> None:
        self.used |= {node: self.requests for node in tree.nodes if node not in self.used}

    def ended(self, tree: Tree, answer: Any) -> None:
        finished = [node for node in tree.nodes if node.level == tree.schedule.last and node.status == "open" and not node.draft]
        self.idle = [node.index for node in finished if node is not answer and self.requests - self.used[node] > self.long]


class Chance(Watch):
    """What a policy draws from the global generators, which are in another state each time it goes on.

    Attributes:
      drawn: names of the generators that it used.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.drawn: set[str] = set()
        self.before: dict[str, str] = {}

    def told(self, tree: Tree, reply: Any, refusal: Refusal | None) -> None:
        self.seed += 1
        seed_globally(self.seed)
        self.before = global_states()

    def asks(self, tree: Tree, request: Any, search: Search) -> None:
        self._compare()

    def ended(self, tree: Tree, answer: Any) -> None:
        self._compare()

    def _compare(self) -> None:
        self.drawn |= {name for name, state in global_states().items() if state != self.before[name]}


class Interrupter(Watch):
    """Ends a search from outside, in place of its n-th request (counted from 1)."""

    def __init__(self, number: int) -> None:
        self.left = number

    def asks(self, tree: Tree, request: Any, search: Search) -> None:
        self.left -= 1
        if not self.left:
            raise Interruption
