"""Stages on a schedule, with numbers: where each begins and ends, how many children it makes, what they cost.

The numbers follow from the stages' own `branch` and `keep` (`as_said`), or from a budget and their shares (`shared_out`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from tsdiff.policies.stages import Stage
from tsdiff.treesearch.errors import UsageError
from tsdiff.treesearch.schedule import Schedule, SolverInfo


@dataclass(frozen=True)
class Round:
    """A stage on the levels of a schedule.

    Attributes:
      number: of the stage, from 1.
      start, stop: levels where children part and where they are valued.
      back: whether survivors are re-noised to get there; otherwise children part by the noise of their steps.
      children: how many are made, of all survivors together.
      keep: how many survive.
    """

    number: int
    stage: Stage
    start: int
    stop: int
    back: bool
    children: int = 1
    keep: int = 1

    @property
    def goes_on(self) -> bool:
        """Whether survivors just go on: one child each, without re-noising."""
        return not self.back and self.stage.branch == 1

    def prices(self, schedule: Schedule, solver: SolverInfo) -> tuple[int, int]:
        """NFE of a parent that has children, and of each child until it is valued."""
        denoised = schedule.span_cost(schedule.span(self.start, self.stop, self.stage.num_steps), solver.stages)
        if self.stop == schedule.last:
            valued = 0
        elif self.stage.lookahead:
            stages = solver.stages if solver.ode in ("", solver.name) else 1  # other deterministic counterparts have one stage
            valued = schedule.span_cost(schedule.span(self.stop, schedule.last, self.stage.lookahead), stages)
        else:
            valued = 1
        if self.back:
            return 0, denoised + valued
        # Children share their parent's prediction. Its own valuation has made that already, except at level 0.
        return int(self.start == 0), denoised - 1 + valued


def place(stages: Sequence[Stage], schedule: Schedule) -> list[Round]:
    """The stages on the nearest levels, each ending further than the one before.

    A stage that the schedule has no level for is left out: only its `keep` counts, for the stage before.
    """
    last = schedule.last
    placed: list[Round] = []
    share, level = 0.0, 0  # where survivors should stand, and do
    for number, stage in enumerate(stages, 1):
        start, stop = (nearest(part * last) for part in stage.levels)
        back = stage.levels[0] < share and level > 0
        share = stage.levels[1]
        if stage is not stages[-1]:
            stop = min(max(stop, 1), last - 1)
            if stop <= level:
                if placed:
                    placed[-1] = replace(placed[-1], keep=min(placed[-1].keep, stage.keep))
                continue
        placed.append(Round(number, stage, min(start, level - 1) if back else level, stop, back, keep=stage.keep))
        level = stop
    return placed


def as_said(stages: Sequence[Stage], width: int, schedule: Schedule) -> tuple[int, list[Round]]:
    """The number of first noises, and the rounds, by the stages' own branch and keep."""
    placed = place(stages, schedule)
    if placed[0].number > 1:  # a single step: the samples that the last stage would make, each from a noise of its own
        for stage in stages[:-1]:
            width = min(width * stage.branch, stage.keep)
        width *= stages[-1].branch
        return width, [replace(placed[0], children=width)]
    rounds: list[Round] = []
    parents = width
    for one in placed:
        children = parents * one.stage.branch
        parents = min(one.keep, children)
        rounds.append(replace(one, children=children, keep=parents))
    return width, rounds


def spends(width: int, rounds: Sequence[Round], schedule: Schedule, solver: SolverInfo) -> list[int]:
    """NFE of every round."""
    parents = [width, *(one.keep for one in rounds)]
    prices = [one.prices(schedule, solver) for one in rounds]
    return [count * parent + one.children * child for count, one, (parent, child) in zip(parents, rounds, prices, strict=False)]


def shared_out(stages: Sequence[Stage], width: int, nfe: int, schedule: Schedule, solver: SolverInfo) -> tuple[int, list[Round]]:
    """The number of first noises, and the rounds, such that each spends its share of `nfe`.

    `keep` is scaled with the number of first noises. A stage whose survivors just go on has no use for more children than
    survivors: its share decides how many there are.

    Raises:
      UsageError: if `nfe` does not pay for one child in every stage, with enough left at any time to finish a sample.
    """
    placed = place(stages, schedule)
    smallest = _needed(*_sized(placed, width, [1] * len(placed)), schedule, solver)
    if nfe < smallest:
        raise UsageError(f"hierarchical: a budget of {nfe} NFE is too small for {len(placed)} stages; one child in each needs {smallest} NFE")
    over, budget = 1, nfe
    while over > 0:
        first, rounds = _sized(placed, width, _counts(placed, budget, schedule, solver))
        over = _needed(first, rounds, schedule, solver) - nfe
        budget -= over
    return first, rounds


def _needed(width: int, rounds: Sequence[Round], schedule: Schedule, solver: SolverInfo) -> int:
    """The smallest limit under which all is granted: after each round it must pay for finishing a survivor, step by step."""
    spent, needed = 0, schedule.span_cost(schedule.span(0, schedule.last), solver.stages)
    for one, nfe in zip(rounds, spends(width, rounds, schedule, solver), strict=True):
        spent += nfe
        finish = schedule.span_cost(schedule.span(one.stop, schedule.last), solver.stages)
        needed = max(needed, spent + max(0, finish - 1))  # survivors have their prediction
    return needed


def _family(placed: Sequence[Round]) -> int:
    """Children of one first noise; they are counted together."""
    return placed[0].stage.branch if placed[0].number == 1 else 1


def _counts(placed: Sequence[Round], budget: int, schedule: Schedule, solver: SolverInfo) -> list[int]:
    """First noises, then children of the other rounds, at least one each, that spend `budget` at most.

    What a round cannot spend passes to the next ones, and what is left at the end goes to the last that has a use for it.
    """
    prices = [child for _, child in (one.prices(schedule, solver) for one in placed)]
    prices[0] = placed[0].prices(schedule, solver)[0] + _family(placed) * prices[0]
    shares = [one.stage.share for one in placed]
    counts = [1] * len(placed)
    left = max(0, budget - sum(prices))

    def grow(index: int, allowance: float) -> None:
        nonlocal left
        price = prices[index]
        if index and (placed[index].goes_on or price == 0):  # one last step from a scored parent costs nothing
            most = counts[index - 1] * (_family(placed) if index == 1 else 1) * placed[index].stage.branch - counts[index]
            more = min(most, int(min(allowance, left) // price)) if price else most
        else:
            more = int(min(allowance, left) // price)
        counts[index] += max(0, more)
        left -= max(0, more) * price

    for index, price in enumerate(prices):
        grow(index, (left + sum(prices[index:])) * shares[index] / sum(shares[index:]) - price)
    before = -1
    while left != before:
        before = left
        for index in reversed(range(len(placed))):
            grow(index, left)
    return counts


def _sized(placed: Sequence[Round], width: int, counts: Sequence[int]) -> tuple[int, list[Round]]:
    """The number of first noises, and the rounds, with these counts."""
    children = [counts[0] * _family(placed), *counts[1:]]
    rounds = []
    for index, (one, made) in enumerate(zip(placed, children, strict=True)):
        keep = 1
        if index + 1 < len(placed):
            wanted = children[index + 1] if placed[index + 1].goes_on else max(1, nearest(one.keep * counts[0] / width))
            keep = min(wanted, made, children[index + 1])
        rounds.append(replace(one, children=made, keep=keep))
    return counts[0], rounds


def nearest(number: float) -> int:
    """The nearest whole number, halves upwards."""
    return int(number + 0.5)


def deal(total: int, parents: int) -> list[int]:
    """`total` children dealt to the parents in turn, the first first."""
    return [total // parents + (number < total % parents) for number in range(parents)]
