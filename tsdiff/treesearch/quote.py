"""The exact price of a request, before it is granted."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tsdiff.treesearch.node import Node
from tsdiff.treesearch.protocols import Sampler
from tsdiff.treesearch.run import Run


class Quote:
    """The price of a request, and what it would leave to finish a sample with.

    Attributes:
      nfe: guided evaluations, each missing prediction once.
    """

    def __init__(self, run: Run) -> None:
        self.run = run
        self.nfe = 0
        self._predicted: set[tuple[int, str | None]] = set()
        self._repeats: set[tuple[Any, ...]] = set()
        self._created: list[tuple[int, bool]] = []
        self._released: set[Node] = set()

    def predict(self, node: Node, model: str | None) -> None:
        """The node's prediction will be needed."""
        key = (node.index, model)
        if key not in self._predicted and not self.run.has_prediction(node, model):
            self._predicted.add(key)
            self.nfe += 1
            if model is None and not node.draft:
                self._created.append((node.level, True))

    def denoise(self, node: Node, levels: tuple[int, ...], sampler: Sampler, model: str | None, *, stops: Sequence[int], draft: bool) -> None:
        """One chain through `levels`, the node's own prediction shared."""
        self.predict(node, model)
        self.nfe += self.run.tree.schedule.span_cost(levels, sampler.solver.stages) - 1
        if not draft:
            # A stop on the way will have its prediction, for the chain goes on from it.
            self._created.extend((stop, stop != levels[-1] and model is None) for stop in stops)

    def once(self, memo: tuple[Any, ...]) -> bool:
        """Whether work that is done only once has not been done or quoted yet."""
        if memo in self.run.repeats or memo in self._repeats:
            return False
        self._repeats.add(memo)
        return True

    def create(self, level: int) -> None:
        """A new node that can be grown."""
        self._created.append((level, False))

    def release(self, nodes: Sequence[Node]) -> None:
        """Nodes that will not be live any more."""
        self._released.update(node for node in nodes if node.status == "open" and not node.draft)

    def reserve(self) -> int:
        """NFE of the cheapest way to finish a sample after the request; 0 once one is finished."""
        run = self.run
        last = run.tree.schedule.last
        if run.finished_leaf or any(level == last for level, _ in self._created):
            return 0
        leaving = [(node.level, run.has_prediction(node, None)) for node in self._released]
        for level, predicted in leaving:
            run.frontier.add(level, predicted, -1)
        try:
            cheapest = run.frontier.cheapest(run.completion_cost, self._created)
            return run.completion_cost[run.first_level] if cheapest is None else cheapest  # with nothing live, a new sample has to be drawn
        finally:
            for level, predicted in leaving:
                run.frontier.add(level, predicted)
