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
    """A generator like a policy's: complete the most promising node unless a sample is finished, then score what is not scored.

    With a verifier of scope "set", all finished nodes are scored again, as one set, for the answer.
    """
    tree = run.tree
    if not any(leaf.driver == tree.driver for leaf in run.finished()):
        promising = list(_promising(run)) or (yield Draw())  # where a policy has released all, a new sample is due
        for node in promising:
            try:
                (leaf,) = yield Denoise(node, to=tree.schedule.last)
            except BudgetExhausted:
                continue  # dearer than what is left; the next may be cheaper
            if not leaf.failed:
                break
    leaves = run.finished()
    unscored = leaves if run.steering.scope == "set" else [leaf for leaf in leaves if tree.verifier not in leaf.values]
    if run.steering.scope == "set":
        run.picture = None  # the best of the new set is found anew
    if unscored:
        yield Score(unscored)
    # A sample that no verifier could score is still a sample.
    return run.best() or next(iter(leaves), None)


def _promising(run: Run) -> Iterator[Node]:
    """Open nodes: by value at the most advanced level that has values, then by level; ties to the oldest."""
    keys = [run.tree.verifier, *sorted({key for node in run.nodes for key in node.values if key.startswith(f"{run.tree.verifier}@")})]

    def value(node: Node) -> float | None:
        return next((score for key in keys if (score := node.score(key)) is not None), None)

    nodes = [node for node in run.nodes if node.status == "open" and not node.draft and node.level < run.tree.schedule.last]
    valued = [(node.level, score, -node.index, node) for node in nodes if (score := value(node)) is not None]
    unvalued = [(node.level, -node.index, node) for node in nodes if value(node) is None]
    yield from (entry[-1] for entry in sorted(valued, key=lambda entry: entry[:3], reverse=True))
    yield from (entry[-1] for entry in sorted(unvalued, key=lambda entry: entry[:2], reverse=True))
