"""Search algorithms: `Policy`, and the tree that it sees."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

from tsdiff.treesearch.ledger import Cost
from tsdiff.treesearch.node import Json, Node
from tsdiff.treesearch.protocols.conditions import Condition
from tsdiff.treesearch.protocols.setting import Setting
from tsdiff.treesearch.requests import Request
from tsdiff.treesearch.schedule import Schedule, SolverInfo

if TYPE_CHECKING:
    import numpy as np

    from tsdiff.treesearch.ledger import Budget

FINAL = "final"
"""The verifier role that every policy knows: the one that steers the answer."""


class TreeView(Protocol):
    """What a policy sees of its tree: never a model, a device, a clock or a tensor."""

    @property
    def schedule(self) -> Schedule: ...
    @property
    def solver(self) -> SolverInfo: ...
    @property
    def condition(self) -> Condition: ...
    @property
    def budget(self) -> Budget: ...
    @property
    def nodes(self) -> Sequence[Node]: ...

    def best(self, verifier: str | None = None) -> Node | None:
        """The finished node with the highest score (ties: the oldest); None while there is none."""
        ...

    def rng(self, *purpose: int | str) -> np.random.Generator:
        """A random generator of the policy's own; the same stateful object for the same purpose."""
        ...

    def note(self, node: Node | None = None, **facts: Json) -> None:
        """Write facts on a node, or on the tree."""
        ...


Search: TypeAlias = Generator[Request, Any, Node | None]


class Policy(Protocol):
    """A search algorithm: a frozen dataclass of hyperparameters (`tsdiff.treesearch.parameters`) with a generator.

    Attributes:
      name: as registered.
      needs: of "stochastic" (solver), "gradient", "flow" (schedule), "absolute" (scores comparable across sets).
      size_parameters: names of the parameters that set how much is spent; when the caller sets none of them and gives
        a budget, `fit` chooses them.
      roles: optional; names for verifiers that the policy scores with (`Score(nodes, verifier="layout")`), so that the
        caller can say which (`--verifier layout=NAME`). Every policy knows "final", the one that steers, which also
        stands in where a role is not given.
    """

    @property
    def name(self) -> str: ...
    @property
    def size_parameters(self) -> tuple[str, ...]: ...
    @property
    def needs(self) -> frozenset[str]: ...

    def search(self, tree: TreeView) -> Search:
        """Yield requests, receive replies, return the answer: a finished node, normally `tree.best()`."""
        ...

    def cost(self, setting: Setting) -> Cost:
        """What one search spends, its answer's decode included."""
        ...

    def fit(self, nfe: int, setting: Setting) -> Policy:
        """The largest configuration that spends at most `nfe`. Raises UsageError naming the smallest budget."""
        ...
