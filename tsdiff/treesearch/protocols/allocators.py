"""What shares one budget among many searches: `Allocator`, and the forest of trees that it sees."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, TypeAlias, runtime_checkable

from tsdiff.treesearch.ledger import Cost
from tsdiff.treesearch.node import Json
from tsdiff.treesearch.protocols.policies import Policy, TreeView
from tsdiff.treesearch.protocols.setting import Setting

if TYPE_CHECKING:
    from tsdiff.treesearch.ledger import Budget


@dataclass(frozen=True, eq=False)
class Grant:
    """Search a tree with a policy, for at most this many NFE.

    The policy sees the tree as if it were new: its own nodes, first noises that no earlier grant has used, and a budget
    of `nfe`. The samples of all grants compete for the tree's answer.

    Attributes:
      tree: one of the forest's trees.
      policy: what searches, fitted to `nfe` beforehand (`Policy.fit`).
      nfe: at least 1; while the tree has no finished sample, it has to pay for one.
    """

    tree: TreeView
    policy: Policy
    nfe: int


@dataclass(frozen=True)
class Outcome:
    """What came of a grant.

    Attributes:
      nfe: what was spent of it; the rest is back in the forest's budget.
      scores: of the samples that it finished, in the order of their making; None where scoring failed.
      failed: the tree has ended with an error; further grants to it come back like this one, at no cost.
    """

    nfe: int
    scores: tuple[float | None, ...] = ()
    failed: bool = False


class ForestView(Protocol):
    """What an allocator sees: every tree of the search, and the one budget that they share.

    Attributes:
      trees: one for each prompt and seed, prompt-major.
      setting: what costs depend on, the same for all trees.
      budget: of all trees together; `spent` counts what their requests were granted.
      target: a score that is good enough: a tree whose best sample reaches it stops at once, in the middle of a policy
        too. None for none.
    """

    @property
    def trees(self) -> Sequence[TreeView]: ...
    @property
    def setting(self) -> Setting: ...
    @property
    def budget(self) -> Budget: ...
    @property
    def target(self) -> float | None: ...

    def note(self, **facts: Json) -> None:
        """Write down why something was decided, as strict JSON."""
        ...


Allocation: TypeAlias = Generator[Sequence[Grant], list[Outcome], None]


@runtime_checkable
class Allocator(Protocol):
    """Shares one budget among many searches: stands above policies, and is named like one.

    A frozen dataclass of hyperparameters. It may have a class method `from_options(options)` that makes one from typed
    or textual values, where its fields alone do not say how; and `roles`, as policies have.

    Attributes:
      name: as registered.
      needs: as a policy's: what the policies that it grants need, and "absolute" where it compares scores.
    """

    @property
    def name(self) -> str: ...
    @property
    def needs(self) -> frozenset[str]: ...

    def search(self, forest: ForestView) -> Allocation:
        """Yield grants, to different trees, that are searched at once; receive what came of them, in order.

        The outcomes come when all of these searches are done, so that decisions do not depend on which was first. The
        list is granted whole or refused whole: `BudgetExhausted` is thrown if it would leave too little to finish one
        sample of every tree that has none. Return to end: each tree answers with the best sample of its grants, and one
        that was never granted anything makes a plain sample.
        """
        ...

    def forecast(self, total_nfe: int, runs: int, setting: Setting) -> Cost:
        """Bounds on what one of `runs` searches spends of `total_nfe`. Raises UsageError naming the smallest total."""
        ...
