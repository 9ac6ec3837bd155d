"""Successive halving: begin many samples, give up the worse half at every round, finish the rest."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass, replace
from typing import ClassVar

from tsdiff.plugin import (
    Cost,
    Denoise,
    Draw,
    Node,
    Release,
    Schedule,
    Score,
    Search,
    Setting,
    Spend,
    TreeView,
    UsageError,
    check,
    parameter,
)


@dataclass(frozen=True, kw_only=True)
class SuccessiveHalving:
    """Best-of-n that stops looking at a sample as soon as it is in the worse half.

        samples <- n first noises
        for each of R rounds, at equal distances along the schedule:
            denoise the samples to the round's level, score their clean estimates
            samples <- the better half
        finish what is left; the answer is the best of it

    Good where early estimates rank samples as their ends do. Null scores rank last, ties break by age.

    Sources: sequential halving, Karnin, Koren & Somekh 2013; as successive halving of learning curves, Jamieson &
    Talwalkar 2016 (arXiv 1502.07943).
    """

    name: ClassVar[str] = "successive-halving"
    size_parameters: ClassVar[tuple[str, ...]] = ("n",)
    needs: ClassVar[frozenset[str]] = frozenset()  # any solver, any verifier

    n: int = parameter(8, low=1, symbol="n", help="samples to begin")
    rounds: int = parameter(2, low=0, symbol="R", help="how often the worse half is given up; fewer where there are too few steps")

    def __post_init__(self) -> None:
        check(self)

    def levels(self, schedule: Schedule) -> list[int]:
        """Where samples are compared: between noise and the clean end."""
        levels = {(2 * number * schedule.last + self.rounds + 1) // (2 * (self.rounds + 1)) for number in range(1, self.rounds + 1)}
        return sorted(levels - {0, schedule.last})

    def search(self, tree: TreeView) -> Search:
        """See the class. What is given up is released at once."""
        samples: list[Node] = yield Draw(self.n)
        for level in self.levels(tree.schedule):
            here: list[Node] = yield Denoise(samples, to=level)
            values: list[float | None] = yield Score(here)
            better = _better_half(here, values)
            yield Release([*samples, *(node for node in here if node not in better)])
            samples = better
        leaves = yield Denoise(samples, to=tree.schedule.last)
        yield Score(leaves)
        return tree.best()

    def cost(self, setting: Setting) -> Cost:
        """Exact, as long as no node fails. Scoring a sample pays for its prediction, which its next step uses again."""
        spend, samples, start, predicted = setting.result(), self.n, 0, 0
        for level in self.levels(setting.schedule):
            spend += samples * (Spend(nfe=setting.denoise_cost(start, level) - predicted + 1) + setting.scoring(1, final=False))
            samples, start, predicted = _half(samples), level, 1
        rest = setting.denoise_cost(start, setting.schedule.last) - predicted
        return Cost.exactly(spend + samples * (Spend(nfe=rest) + setting.scoring(1, final=True)))

    def fit(self, nfe: int, setting: Setting) -> SuccessiveHalving:
        """As many samples as `nfe` pays for.

        Raises:
          UsageError: if it does not pay for one.
        """

        def price(n: int) -> int:
            return replace(self, n=n).cost(setting).upper.nfe

        n = bisect_right(range(1, nfe + 1), nfe, key=price)
        if n < 1:
            raise UsageError(f"{self.name}: a budget of {nfe} NFE is too small; one sample in {self.rounds} rounds needs {price(1)}")
        return replace(self, n=n)


def _half(count: int) -> int:
    """One half, the larger one."""
    return (count + 1) // 2


def _better_half(nodes: list[Node], values: list[float | None]) -> list[Node]:
    """The nodes with the higher values, in the order of their making; failed ones never."""
    scored = [(-value if value is not None else float("inf"), node.index, node) for node, value in zip(nodes, values, strict=True) if not node.failed]
    kept = [node for _, _, node in sorted(scored, key=lambda entry: entry[:2])[: _half(len(nodes))]]
    return sorted(kept, key=lambda node: node.index)
