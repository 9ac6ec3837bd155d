"""Search over paths: throw half-finished samples far back, in several ways at once, and keep what comes back best."""

from __future__ import annotations

import math
from bisect import bisect_right
from dataclasses import dataclass, replace
from typing import ClassVar

from tsdiff.policies.selection import dealt, let_go, survivors
from tsdiff.treesearch.errors import UsageError
from tsdiff.treesearch.ledger import Cost, Spend
from tsdiff.treesearch.parameters import check, parameter
from tsdiff.treesearch.protocols import Search, Setting, TreeView
from tsdiff.treesearch.requests import Denoise, Draw, Renoise, Score
from tsdiff.treesearch.schedule import Schedule

MIN_PROGRESS = 0.001
"""The least that a round may come forward; it bounds the number of rounds by 1000."""


@dataclass(frozen=True, kw_only=True)
class Paths:
    """Search over paths (Paths-N): N partly denoised samples, each sent back to high noise M times in every round.

        paths <- N first noises, denoised to noise level sigma
        while sigma > 0:
            children <- M fresh re-noisings of every path, up to level sigma + df
            denoise them to sigma <- max(sigma + df - db, 0), in at most L steps
            paths    <- the N children whose clean estimates score best
        the answer is the best of the last round's samples

    There are R = ceil(sigma / (db - df)) rounds. Noise levels are times t of a rectified flow (0 clean, 1 pure noise). On any
    other schedule t stands for the level of the same signal-to-noise ratio, sigma/alpha = t / (1 - t), and levels between
    two of the grid go to the nearer one. Children part at least one level before their path's own level.

    Null scores rank last, ties break by age, failed nodes never survive. With `max_children` no path has more survivors
    than that: the best N often descend from one. `extra` children are dealt to the rounds in turn and to the best paths in
    turn: how `fit` spends what is left of a budget.

    Source: Ma et al. 2025, "Inference-time scaling for diffusion models beyond scaling denoising steps"
    (arXiv 2501.09732), with sigma = 0.11, df = 0.78, db = 0.81 and N = 2 for text-to-image; M is its main axis of compute.
    Deviation: the last round ends in finished samples that are scored themselves, so no further random search follows.
    """

    name: ClassVar[str] = "paths"
    size_parameters: ClassVar[tuple[str, ...]] = ("width", "branch", "extra", "num_steps")

    width: int = parameter(2, low=1, symbol="N", help="paths that survive a round")
    branch: int = parameter(4, low=1, symbol="M", help="re-noisings of every path in a round")
    extra: int = parameter(0, low=0, help="re-noisings beyond that, in all; they go to the rounds and to the best paths in turn")
    sigma: float = parameter(0.11, above=0.0, below=1.0, symbol="sigma", help="noise level that the first leg ends at, as a flow's time")
    forward: float = parameter(0.78, above=0.0, below=1.0, symbol="df", help="how far a round goes back towards noise")
    backward: float = parameter(0.81, above=0.0, symbol="db", help="how far it comes forward again; more than `forward`")
    num_steps: int | None = parameter(None, low=1, symbol="L", help="evaluations of a backward leg at most; none takes every level")
    max_children: int | None = parameter(None, low=1, help="survivors of one path at most, for diversity; none is no limit")

    def __post_init__(self) -> None:
        check(self)
        if not self.backward - self.forward > MIN_PROGRESS - 1e-12:
            raise UsageError(
                f"{self.name}: backward is {self.backward:g} and forward is {self.forward:g}, but a round must come forward by at least "
                f"{MIN_PROGRESS:g} more than it goes back; raise backward or lower forward"
            )

    @property
    def needs(self) -> frozenset[str]:
        """Nothing: re-noising makes children differ with any solver."""
        return frozenset()

    def rounds(self, schedule: Schedule) -> list[tuple[int, int, int]]:
        """Every round as levels: (where its paths stand, where they are sent back to, where they land)."""
        last = schedule.last
        if last == 1:
            return []  # there is no level between noise and sample
        progress = self.backward - self.forward
        count = math.ceil(self.sigma / progress - 1e-9)
        times = [self.sigma - number * progress for number in range(count)]
        stops = [min(max(nearest_level(schedule, time), 1), last - 1) for time in times]
        backs = [min(nearest_level(schedule, time + self.forward), stop - 1) for time, stop in zip(times, stops, strict=True)]
        return list(zip(stops, backs, [*stops[1:], last], strict=True))

    def search(self, tree: TreeView) -> Search:
        """See the class. The values that decide are on the nodes; what is dropped is released at once."""
        rounds = self.rounds(tree.schedule)
        roots = yield Draw(self.width)
        paths = yield Denoise(roots, to=rounds[0][0] if rounds else tree.schedule.last)
        yield let_go(roots, keep=paths)
        if not rounds:
            yield Score(paths)
        for number, (_, back, stop) in enumerate(rounds):
            more = [place % len(paths) for place in range(dealt(self.extra, len(rounds), number))]
            parents = [place for place in range(len(paths)) for _ in range(self.branch)] + more
            starts = yield Renoise(paths, to=back, copies=self.branch)
            if more:
                starts = [*starts, *(yield Renoise([paths[place] for place in more], to=back))]
            children = yield Denoise(starts, to=stop, num_steps=self.num_steps)
            values = yield Score(children)
            survived = survivors(children, values, self.width, parents, self.max_children)
            yield let_go([*paths, *starts, *children], keep=[*survived, tree.best()])
            paths = survived
            if not paths:
                break
        return tree.best()

    def cost(self, setting: Setting) -> Cost:
        """Exact, as long as no node fails: a child costs its backward leg, and one evaluation for its clean estimate."""
        last, rounds = setting.schedule.last, self.rounds(setting.schedule)
        spend = setting.result() + Spend(nfe=self.width * setting.denoise_cost(0, rounds[0][0] if rounds else last))
        if not rounds:
            spend += setting.scoring(self.width, final=True)
        for number, (_, back, stop) in enumerate(rounds):
            children = self.width * self.branch + dealt(self.extra, len(rounds), number)
            spend += Spend(nfe=children * (setting.denoise_cost(back, stop, self.num_steps) + (stop < last)))
            spend += setting.scoring(children, final=stop == last)
        return Cost.exactly(spend)

    def fit(self, nfe: int, setting: Setting) -> Paths:
        """The most re-noisings M that `nfe` pays for, then `extra` ones for the rest, which is less than one plain sample.

        Where it does not pay for M = 2 (with one re-noising there is nothing to choose from), there are fewer paths, and
        where not even one path can be paid for, shorter backward legs.

        Raises:
          UsageError: if it does not even pay for one path, re-noised once a round, with legs of one step.
        """

        def priced(policy: Paths) -> int:
            return policy.cost(setting).upper.nfe

        longest = min(self.num_steps or setting.schedule.last, setting.schedule.last)
        plain = replace(self, branch=2, extra=0)
        shapes = [replace(plain, width=width) for width in range(self.width, 0, -1)]
        shapes += [replace(plain, width=1, branch=branch, num_steps=steps) for branch in (2, 1) for steps in range(longest, 0, -1)]
        fitting = next((shape for shape in shapes if priced(shape) <= nfe), None)
        if fitting is None:
            raise UsageError(
                f"{self.name}: a budget of {nfe} NFE is too small; width=1, branch=1, num_steps=1 needs {priced(shapes[-1])} NFE with "
                f"sigma={self.sigma:g}, forward={self.forward:g}, backward={self.backward:g}: raise the budget, or ask for fewer rounds"
            )
        if not self.rounds(setting.schedule):
            return replace(self, width=nfe // setting.sample_cost, extra=0)
        more = bisect_right(range(fitting.branch + 1, nfe), nfe, key=lambda branch: priced(replace(fitting, branch=branch)))
        fitting = replace(fitting, branch=fitting.branch + more)
        return replace(fitting, extra=bisect_right(range(1, nfe), nfe, key=lambda extra: priced(replace(fitting, extra=extra))))


def nearest_level(schedule: Schedule, time: float) -> int:
    """The level whose signal-to-noise ratio is nearest to that of a rectified flow at `time` (0 clean, 1 noise).

    Levels are compared as times sigma / (alpha + sigma), a function of the ratio alone that is finite at both ends.
    """
    return min(range(schedule.last + 1), key=lambda level: abs(schedule.sigma[level] / (schedule.alpha[level] + schedule.sigma[level]) - time))
