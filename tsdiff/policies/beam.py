"""Beam search over partly denoised samples: branch, score, keep the best few, go on."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Generator
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

from tsdiff.policies.selection import dealt, let_go, survivors
from tsdiff.treesearch.errors import UsageError
from tsdiff.treesearch.ledger import Cost, Spend
from tsdiff.treesearch.node import Node
from tsdiff.treesearch.parameters import check, parameter
from tsdiff.treesearch.protocols import Search, Setting, TreeView
from tsdiff.treesearch.requests import Denoise, Draw, Renoise, Request, Score
from tsdiff.treesearch.schedule import Schedule


@dataclass(frozen=True, kw_only=True)
class Beam:
    """Beam search with width B and branch K at a few levels of the schedule.

        beam <- B first noises
        for each branch level l:
            children <- K different continuations of every beam node, ending at l
            beam     <- the B children of highest value
        finish the beam; the answer is its best sample

    Continuations are made in one of two ways. "renoise" denoises the beam to l, adds fresh noise back to level
    l - jump (the forward kernel, which keeps the model's law) and denoises again: any solver will do. "step" stops the
    beam at l - jump and denoises from there with K independent noises: needs a stochastic solver.

    A child's value is the score of its clean estimate ("x0"), of a short deterministic look-ahead ("lookahead"), or of
    its own full completion ("final"), which survivors go on along. A child is scored from its own prediction, which the next
    denoise uses again.
    Null scores rank last, ties break by age, failed nodes never survive. With `max_children` no parent has more survivors
    than that, so that one lucky parent cannot take the whole beam.

    `extra` children are dealt to the branch levels in turn, beginning with the noisiest, and there to the best parents in
    turn: how `fit` spends what is left of a budget after whole beams.

    Sources: diffusion latent beam search with look-ahead, Oshima et al. 2025 (arXiv 2501.19252), whose steps branch at
    every level with eta = 1; re-noising as in the search over paths of Ma et al. 2025 (arXiv 2501.09732). Deviation:
    siblings that differ by one small step score alike, so branching happens at few, coarse levels.
    """

    name: ClassVar[str] = "beam"
    size_parameters: ClassVar[tuple[str, ...]] = ("width", "branch", "extra")

    width: int = parameter(4, low=1, symbol="B", help="nodes that survive a branch level")
    branch: int = parameter(4, low=1, symbol="K", help="children of every beam node")
    extra: int = parameter(0, low=0, help="children beyond that, in all; they go to the branch levels and to the best parents in turn")
    levels: tuple[float, ...] = parameter((0.2, 0.4, 0.6, 0.8), above=0.0, below=1.0, help="branch levels, as shares of the schedule from noise (0) to clean (1)")
    jump: float = parameter(0.2, above=0.0, high=1.0, help="how far before a branch level its children part, as a share of the schedule; at least one level")
    branch_by: Literal["renoise", "step"] = parameter("renoise", help="children part by fresh noise from the forward kernel, or by the noise of stochastic steps")
    value: Literal["x0", "lookahead", "final"] = parameter("x0", help="what is scored: the clean estimate, a short deterministic look-ahead, or the full completion")
    lookahead_steps: int = parameter(6, low=1, symbol="T'", help="steps of the look-ahead")
    max_children: int | None = parameter(None, low=1, help="survivors of one parent at most, for diversity; none is no limit")

    def __post_init__(self) -> None:
        check(self)

    @property
    def needs(self) -> frozenset[str]:
        """A stochastic solver, where it is the steps that make children differ."""
        return frozenset({"stochastic"} if self.branch_by == "step" and (self.branch > 1 or self.extra) else ())

    def stops(self, schedule: Schedule) -> list[tuple[int, int]]:
        """The branch levels, in order, each as (level where its children part, branch level)."""
        last = schedule.last
        distance = max(1, _nearest(self.jump * last))
        levels = sorted({min(max(_nearest(share * last), 1), last - 1) for share in self.levels} if last > 1 else ())
        # A step cannot go back to before the previous branch level; re-noising can.
        floors = [0, *levels] if self.branch_by == "step" else [0] * len(levels)
        return [(max(level - distance, floor), level) for level, floor in zip(levels, floors, strict=False)]

    def search(self, tree: TreeView) -> Search:
        """See the class. The values that decide are on the nodes; what is dropped is released at once."""
        last = tree.schedule.last
        stops = self.stops(tree.schedule)
        leaves: list[Node] = []
        beam = yield Draw(self.width)
        for number, (start, level) in enumerate(stops):
            seen = list(beam)
            more = [place % len(beam) for place in range(dealt(self.extra, len(stops), number))]
            parents = [place for place in range(len(beam)) for _ in range(self.branch)] + more
            if self.branch_by == "renoise":
                ends = yield Denoise(beam, to=level)
                starts = yield Renoise(ends, to=start, copies=self.branch)
                if more:
                    starts = [*starts, *(yield Renoise([ends[place] for place in more], to=start))]
                children = yield Denoise(starts, to=level)
                seen += ends
            else:
                starts = yield Denoise(beam, to=start)
                children = yield Denoise([starts[place] for place in parents], to=level)
            ahead = self._lead(stops[number + 1]) if number + 1 < len(stops) else last
            nodes, values, completions = yield from self._evaluate(children, ahead, last)
            beam = survivors(nodes, values, self.width, parents, self.max_children)
            leaves += completions
            yield let_go(seen + starts + children + nodes + leaves, keep=[*beam, tree.best()])
            if not beam:
                return tree.best()
        if not leaves:  # otherwise the survivors' completions are there, scored
            leaves = yield Denoise(beam, to=last)
            yield Score(leaves)
        return tree.best()

    def _lead(self, stop: tuple[int, int]) -> int:
        """The level that the beam walks to before children part from it."""
        start, level = stop
        return level if self.branch_by == "renoise" else start

    def _evaluate(self, children: list[Node], ahead: int, last: int) -> Generator[Request, Any, tuple[list[Node], list[float | None], list[Node]]]:
        """What the beam can go on with, its values, and the finished samples that were made to find them.

        A completion passes the level `ahead` where the beam goes next, and so its survivors stand there already.
        """
        if self.value == "final":
            between = children[0].level < ahead < last
            leaves = yield Denoise(children, to=last, via=[ahead] if between else [])
            values = yield Score(leaves)
            return [leaf.parent for leaf in leaves] if between else children, values, leaves
        if self.value == "lookahead":
            values = yield Score(children, at="lookahead", num_steps=self.lookahead_steps)
        else:
            values = yield Score(children)
        return children, values, []

    def cost(self, setting: Setting) -> Cost:
        """Exact, as long as no node fails: a node's prediction is paid once, by whichever request needs it first."""
        spend = setting.result()
        stops = self.stops(setting.schedule)
        # Whether the beam nodes have been predicted already: first noises have not, scored children have.
        level, predicted = 0, 0
        for number, (start, stop) in enumerate(stops):
            children = self.width * self.branch + dealt(self.extra, len(stops), number)
            if self.branch_by == "renoise":
                lead = setting.denoise_cost(level, stop) - predicted if level < stop else 0
                child = setting.denoise_cost(start, stop)
            else:
                lead = setting.denoise_cost(level, start) - predicted + 1  # all children share the first prediction
                child = setting.denoise_cost(start, stop) - 1
            spend += Spend(nfe=self.width * lead) + children * (Spend(nfe=child) + self._evaluation_cost(stop, setting))
            level, predicted = stop, 1
            if self.value == "final" and number + 1 < len(stops):
                level = self._lead(stops[number + 1])  # on the way of the completion
        if self.value != "final" or level == 0:
            spend += Spend(nfe=self.width * (setting.denoise_cost(level, setting.schedule.last) - predicted))
            spend += setting.scoring(self.width, final=True)
        return Cost.exactly(spend)

    def _evaluation_cost(self, level: int, setting: Setting) -> Spend:
        """What it takes to find one child's value."""
        last = setting.schedule.last
        if self.value == "final":
            return Spend(nfe=setting.denoise_cost(level, last)) + setting.scoring(1, final=True)
        scoring = setting.scoring(1, final=False)
        if self.value == "x0":
            return Spend(nfe=1) + scoring
        solver = setting.solver
        stages = solver.stages if solver.ode in ("", solver.name) else 1  # other deterministic counterparts have one stage
        levels = setting.schedule.span(level, last, self.lookahead_steps)
        return Spend(nfe=setting.schedule.span_cost(levels, stages)) + scoring

    def fit(self, nfe: int, setting: Setting) -> Beam:
        """The widest beam that `nfe` pays for, then `extra` children for the rest; if it pays for none, one node with fewer children.

        A child costs at most one plain sample, so less than that is left over.

        Raises:
          UsageError: if it does not even pay for a beam of one with one child.
        """

        def price(width: int, branch: int, extra: int = 0) -> int:
            return replace(self, width=width, branch=branch, extra=extra).cost(setting).upper.nfe

        if nfe < price(1, 1):
            raise UsageError(
                f"{self.name}: a budget of {nfe} NFE is too small; width=1, branch=1 needs {price(1, 1)} NFE with levels={self.levels}, "
                f"jump={self.jump:g}, value={self.value}: raise the budget, or ask for fewer branch levels"
            )
        width = max(1, nfe // price(1, self.branch))  # every node of the beam costs the same
        branch = 1 + bisect_right(range(2, self.branch + 1), nfe, key=lambda branch: price(1, branch))
        parting = self.stops(setting.schedule) and (self.branch_by == "renoise" or setting.solver.stochastic)
        extra = bisect_right(range(1, nfe), nfe, key=lambda extra: price(width, branch, extra)) if parting else 0
        return replace(self, width=width, branch=branch, extra=extra)


def _nearest(number: float) -> int:
    return int(number + 0.5)
