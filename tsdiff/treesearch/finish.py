"""What the engine does when a policy's budget is exhausted: finish the best sample that still fits."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from tsdiff.treesearch.errors import BudgetExhausted
from tsdiff.treesearch.node import Node
from tsdiff.treesearch.protocols import Search
from tsdiff.treesearch.requests import Denoise, Draw, Score

if TYPE_CHECKING:
    from tsdiff.treesearch.run import Run


def finish(run: Run) -> Search:
    """A generator like a policy's: score what is finished, else complete the most promising node.

    With a verifier of scope "set", all finished nodes are scored again, as one set, for the answer.
    """
    tree = run.tree
    leaves = _finished(run)
    unscored = leaves if run.steering.scope == "set" else [leaf for leaf in leaves if tree.verifier not in leaf.values]
    if run.steering.scope == "set":
        run.picture = None  # the best of the new set is found anew
    if unscored:
        yield Score(unscored)
    if tree.best() is None and not leaves:
        promising = list(_promising(run)) or (yield Draw())  # where a policy has released all, a new sample is due
        for node in promising:
            try:
                (leaf,) = yield Denoise(node, to=tree.schedule.last)
            except BudgetExhausted:
                continue  # dearer than what is left; the next may be cheaper
            if leaf.failed:
                continue
            yield Score(leaf)
            break
    # A sample that no verifier could score is still a sample.
    return tree.best() or next(iter(_finished(run)), None)


def _finished(run: Run) -> list[Node]:
    """Finished samples; a released one may still become the answer."""
    return [node for node in run.tree.nodes if node.level == run.tree.schedule.last and not node.failed and not node.draft]


def _promising(run: Run) -> Iterator[Node]:
    """Open nodes: by value at the most advanced level that has values, then by level; ties to the oldest."""
    keys = [run.tree.verifier, *sorted({key for node in run.tree.nodes for key in node.values if key.startswith(f"{run.tree.verifier}@")})]

    def value(node: Node) -> float | None:
        return next((score for key in keys if (score := node.score(key)) is not None), None)

    nodes = [node for node in run.tree.nodes if node.status == "open" and not node.draft and node.level < run.tree.schedule.last]
    valued = [(node.level, score, -node.index, node) for node in nodes if (score := value(node)) is not None]
    unvalued = [(node.level, -node.index, node) for node in nodes if value(node) is None]
    yield from (entry[-1] for entry in sorted(valued, key=lambda entry: entry[:3], reverse=True))
    yield from (entry[-1] for entry in sorted(unvalued, key=lambda entry: entry[:2], reverse=True))
