"""What simulations of `mcts` cost: exact prices of single ones, and bounds on a whole search, whose shape values decide."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from itertools import accumulate

from tsdiff.policies.mcts_rules import Rules
from tsdiff.treesearch.ledger import Cost, Spend
from tsdiff.treesearch.protocols import Setting
from tsdiff.treesearch.schedule import Schedule, SolverInfo
from tsdiff.treesearch.statistics import children_allowed, halving_schedule


class Prices:
    """NFE of single simulations.

    Args:
      policy: the hyperparameters.
      schedule, solver: of the search.
    """

    def __init__(self, policy: Rules, schedule: Schedule, solver: SolverInfo) -> None:
        self.policy = policy
        self.schedule = schedule
        self.solver = solver
        self.stops = policy.stops(schedule)
        self.depth = len(self.stops) - 1

    def opening(self, depth: int, *, first: bool) -> int:
        """NFE of a simulation that opens a child, the `first` or a later one, of a place at `depth`."""
        policy, start, stop = self.policy, self.stops[depth], self.stops[depth + 1]
        to = self.schedule.last if policy.value == "rollout" else stop
        if depth == 0:
            nfe = self._denoise(0, to)
        elif first or policy.branch_by == "step":
            nfe = self._denoise(start, to) - 1  # the place has been evaluated before
        else:
            nfe = self._denoise(policy.back(start, self.schedule.last), to)
        return nfe if to == self.schedule.last else nfe + self._evaluation(stop)

    def completing(self, depth: int) -> int:
        """NFE of finishing a leaf at `depth`, which has been evaluated."""
        return self._denoise(self.stops[depth], self.schedule.last) - 1

    def reserve(self, simulations: int) -> int:
        """NFE that finishing the best leaves may need after so many simulations."""
        if self.policy.value == "rollout" or self.depth == 1:
            return 0
        return min(self.policy.finish, simulations) * self.completing(1)

    def _denoise(self, start: int, to: int) -> int:
        return self.schedule.span_cost(self.schedule.span(start, to), self.solver.stages)

    def _evaluation(self, level: int) -> int:
        """NFE of a child's value, its own evaluation included."""
        if self.policy.value == "x0":
            return 1
        solver = self.solver
        stages = solver.stages if solver.ode in ("", solver.name) else 1  # other deterministic counterparts have one stage
        return self.schedule.span_cost(self.schedule.span(level, self.schedule.last, self.policy.lookahead_steps), stages)


class Bill:
    """Bounds on what a search spends, as long as no node fails.

    How many first noises a search draws does not depend on values, and neither does which of the first visits to a
    place open children of it. Which places are visited does.
    """

    def __init__(self, policy: Rules, setting: Setting) -> None:
        self.policy = policy
        self.setting = setting
        self.prices = Prices(policy, setting.schedule, setting.solver)
        self.depth = self.prices.depth

    def cost(self) -> Cost:
        """Of the policy as it is."""
        policy = self.policy
        if policy.until_nfe is None:
            return self.bounds(policy.simulations)
        limit = policy.until_nfe
        least = largest(lambda simulations: self.bounds(simulations).upper.nfe <= limit, limit)
        most = largest(lambda simulations: self.bounds(simulations).lower.nfe <= limit, limit)
        lower, upper = self.bounds(least).lower, self.bounds(most).upper
        # A search ends before a simulation that does not fit, if it does not run out of children to open.
        dearest = max(spend.nfe for depth in range(self.depth) for spend in self._openings(depth))
        reached = min(self.bounds(most).lower.nfe, limit + 1 - dearest - self.prices.reserve(most + 1))
        spent = max(lower.nfe, reached)
        if policy.value != "rollout":
            upper += self.setting.scoring(most, final=True)  # what is left finishes more leaves
        return Cost(Spend(spent, lower.decodes, lower.verifier_calls), Spend(max(self.bounds(1).upper.nfe, limit), upper.decodes, upper.verifier_calls))

    def bounds(self, simulations: int) -> Cost:
        """Of so many simulations, or as many as there are children to open."""
        roots, others = self._at_root(simulations)
        lower = upper = self.setting.result() + self._opening(0, first=True) * roots
        if others:
            near = list(self._openings(1))
            far = [spend for depth in range(2, self.depth) for spend in self._openings(depth)]
            shares = self._deep(roots, others) if far else (0, 0)
            lower += _least(_least(near) * (others - deep) + _least(far) * deep for deep in shares)
            upper += _most(_most(near) * (others - deep) + _most(far) * deep for deep in shares)
        low, high = self._finishing(roots, others)
        lower += low
        upper += high
        return Cost(Spend(max(lower.nfe, self.setting.sample_cost), lower.decodes, lower.verifier_calls), upper)

    def _openings(self, depth: int) -> Iterable[Spend]:
        """What simulations that open a child of a place at `depth` may cost; a rollout brings the first child along."""
        firsts = (False,) if depth and self.policy.value == "rollout" else (True,) if depth == 0 else (True, False)
        return [self._opening(depth, first=first) for first in firsts]

    def _opening(self, depth: int, *, first: bool) -> Spend:
        spend, passed = Spend(nfe=self.prices.opening(depth, first=first)), self.depth - 1 - depth
        if self.policy.value == "rollout":
            spend += self.setting.scoring(1, final=True)
            return spend + self.setting.scoring(passed, final=False) if self.policy.with_prior else spend
        spend += self.setting.scoring(1, final=passed == 0)
        extra = self.policy.with_prior and self.policy.value == "lookahead" and passed
        return spend + self.setting.scoring(1, final=False) if extra else spend

    def _at_root(self, simulations: int) -> tuple[int, int]:
        """Simulations that draw a first noise, and the others; fewer where fixed numbers of children are used up."""
        policy, room = self.policy, self._room()
        if policy.selection == "gumbel":
            done, each = 0, 0
            phases = halving_schedule(policy.roots or 1, policy.simulations)
            for number, (considered, count) in enumerate(phases):
                endless = number == len(phases) - 1 and simulations > policy.simulations
                wanted = simulations - done if endless else min(count, simulations - done)
                taken = min(wanted, considered * (room - each))
                done += int(taken)
                each += count // considered
                if taken < count:
                    break
            roots = min(phases[0][0], simulations)
            return roots, done - roots
        if policy.width is not None:
            roots = min(simulations, policy.width)
            return roots, int(min(simulations, policy.width * room)) - roots
        if self.depth == 1:
            return simulations, 0
        roots = 0
        for done in range(simulations):
            if roots < children_allowed(done + 1, policy.widening, policy.exponent) or done == roots * room:
                roots += 1
        return roots, simulations - roots

    def _room(self) -> float:
        """Simulations that fit at and below one of the root's children, the one that opens it included."""
        branch, below = self.policy.branch, self.depth - 1
        if below == 0:
            return 1
        if branch is None:
            return math.inf
        return branch**below if self.policy.value == "rollout" else sum(branch**depth for depth in range(below + 1))

    def _deep(self, roots: int, others: int) -> tuple[int, int]:
        """How many at least and at most of the `others` simulations open children at depth 2 or deeper.

        The others visit the root's children, in unknown shares. Let the i-th child of such a place come gaps[i] visits
        after the one before. Most children open where visits are spread evenly, fewest where all meet in one place: gaps
        hardly ever shrink, and are bounded by ones that do not.
        """
        gaps = self._gaps(others)
        opened, left = 0, others
        for gap in reversed(list(accumulate(reversed(gaps), min))):
            more = min(roots, left // gap)
            opened, left = opened + more, left - more * gap
        fewest, left = 0, others - roots * (gaps[0] - 1) if gaps else 0
        for gap in accumulate([*gaps[1:], others], max):
            if left > 0:
                fewest, left = fewest + 1, left - gap
        return others - opened, others - fewest

    def _gaps(self, visits: int) -> list[int]:
        """The gaps between the children that open at a place at depth 1 in so many visits after the one that made it."""
        policy, gaps, waited = self.policy, [], 0
        first = int(policy.value == "rollout")
        for visit in range(2, visits + 2):
            waited += 1
            limit = children_allowed(visit, policy.widening, policy.exponent) if policy.branch is None else policy.branch
            if first + len(gaps) < limit:
                gaps.append(waited)
                waited = 0
        return gaps

    def _finishing(self, roots: int, others: int) -> tuple[Spend, Spend]:
        """Finishing the best leaves, where simulations do not finish samples."""
        policy = self.policy
        if policy.value == "rollout" or self.depth == 1:
            return Spend(), Spend()
        one = self.setting.scoring(1, final=True)
        # Each other simulation may turn one leaf into a sample; a race of several phases drops leaves.
        dropping = policy.selection == "gumbel" and others > 0
        fewest = 0 if dropping else min(policy.finish, max(0, roots - others))
        cheapest = self.prices.completing(self.depth - 1 if others else 1)
        most = min(policy.finish, roots + others)
        return (one + Spend(nfe=cheapest)) * fewest, (one + Spend(nfe=self.prices.completing(1))) * most


def largest(fits: Callable[[int], bool], most: int) -> int:
    """The largest number from 1 to `most` that fits, if all below it do; 1 in any case."""
    low, high = 1, most
    while low < high:
        middle = (low + high + 1) // 2
        if fits(middle):
            low = middle
        else:
            high = middle - 1
    return low


def _least(spends: Iterable[Spend]) -> Spend:
    """The smallest of every component; nothing for nothing."""
    several = list(spends)
    return Spend(*(min((getattr(spend, name) for spend in several), default=0) for name in ("nfe", "decodes", "verifier_calls")))


def _most(spends: Iterable[Spend]) -> Spend:
    """The largest of every component; nothing for nothing."""
    several = list(spends)
    return Spend(*(max((getattr(spend, name) for spend in several), default=0) for name in ("nfe", "decodes", "verifier_calls")))
