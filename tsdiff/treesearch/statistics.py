"""Statistics of tree search: which child to visit, when to open a new one, what a parent is worth.

Plain functions of numbers, for policies of any kind. Values are scores, higher is better; None (or a number that is not
finite) is a value that is missing. Rules that mix values with counts, temperatures or exploration constants expect
values in [0, 1]: `Bounds` maps a tree's scores there, whatever the verifier's scale.

    selection    uct, puct, boltzmann, and gumbel_top, halving_schedule, improved_policy, least_served for Gumbel search
    widening     children_allowed
    back-up      mean_backup, max_backup, soft_backup
    parallel     with_virtual_loss; for unobserved counts (WU-UCT) add them to the visits that `uct` is given

Visits of children are n, of their parent N; ties go to the first.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from tsdiff.treesearch.errors import UsageError

if TYPE_CHECKING:
    import numpy as np


class Bounds:
    """Running min-max normalisation of one tree's values (as in MuZero, Schrittwieser et al. 2020, arXiv 1911.08265).

    Attributes:
      low, high: the smallest and largest value seen, inf and -inf before the first.
    """

    def __init__(self) -> None:
        self.low = math.inf
        self.high = -math.inf

    def add(self, value: float | None) -> bool:
        """Take a value into account (missing ones are not); returns whether the bounds have moved."""
        if value is None or not math.isfinite(value) or self.low <= value <= self.high:
            return False
        self.low, self.high = min(self.low, value), max(self.high, value)
        return True

    def __call__(self, value: float | None) -> float:
        """A value in [0, 1], clipped; 0 where it is missing, 1/2 while all values seen are equal."""
        if value is None or not math.isfinite(value):
            return 0.0
        if not self.low < self.high:
            return 0.5
        # Halves first: the distance of two finite numbers may not be finite.
        return min(1.0, max(0.0, (value / 2 - self.low / 2) / (self.high / 2 - self.low / 2)))

    def scale(self, weight: float) -> float:
        """The inverse temperature on raw values that `weight` on normalised ones amounts to; 0 while all are equal."""
        distance = self.high / 2 - self.low / 2
        return weight / 2 / distance if distance > 0.0 else 0.0


# Selection -----------------------------------------------------------------------------------------------------------


def uct(value: float, visits: float, parent_visits: float, c: float = math.sqrt(2.0)) -> float:
    """UCB1 for trees: Q + c sqrt(ln N / n); infinite where n = 0, so that the unvisited come first.

    c = sqrt(2) belongs to values in [0, 1]. With unobserved visits of simulations in flight added to both counts, and
    to nothing else, this is WU-UCT (Liu et al. 2020, arXiv 1810.11755).

    Source: Kocsis & Szepesvari 2006, "Bandit based Monte-Carlo planning".
    """
    if visits <= 0.0:
        return math.inf
    return value + c * math.sqrt(math.log(max(parent_visits, 1.0)) / visits)


def puct(value: float, prior: float, visits: float, parent_visits: float, c: float = 1.25, base: float = 19652.0) -> float:
    """PUCT: Q + (c + ln((N + base + 1) / base)) P sqrt(N) / (1 + n), with the constants of MuZero.

    Source: Silver et al. 2017 (arXiv 1712.01815); Schrittwieser et al. 2020 (arXiv 1911.08265).
    """
    return value + (c + math.log((parent_visits + base + 1.0) / base)) * prior * math.sqrt(parent_visits) / (1.0 + visits)


def boltzmann(values: Sequence[float], weight: float) -> list[float]:
    """Probabilities proportional to exp(weight * value); uniform at weight 0. Large weights do not overflow."""
    highest = max(values)
    shares = [math.exp(weight * (value - highest)) for value in values]
    total = math.fsum(shares)
    return [share / total for share in shares]


def pick(probabilities: Sequence[float], rng: np.random.Generator) -> int:
    """A random index with these probabilities; one uniform number is drawn, and probability 0 is never chosen."""
    threshold = rng.random() * math.fsum(probabilities)
    reached, chosen = 0.0, -1
    for index, probability in enumerate(probabilities):
        if probability > 0.0:
            chosen, reached = index, reached + probability
            if reached > threshold:
                break
    if chosen < 0:
        raise UsageError("pick: no probability is above 0; give at least one")
    return chosen


def gumbels(count: int, rng: np.random.Generator) -> list[float]:
    """Standard Gumbel numbers, -ln(-ln u)."""
    return [-math.log(-math.log(max(float(u), 1e-300))) for u in rng.random(count)]


def gumbel_top(scores: Sequence[float], count: int) -> list[int]:
    """The places of the `count` highest scores, highest first; ties to the first.

    With scores = gumbels + log-probabilities these are `count` draws without replacement, in order (Gumbel-top-k, Kool
    et al. 2019, arXiv 1903.06059).
    """
    return sorted(range(len(scores)), key=lambda place: (-scores[place], place))[:count]


def halving_schedule(candidates: int, simulations: int) -> list[tuple[int, int]]:
    """Sequential halving as phases (candidates still considered, simulations of the phase); simulations add up exactly.

    With m candidates there are ceil(log2 m) phases. Each gives every candidate that it considers
    max(1, floor(simulations / (phases * considered))) visits, and half of them (rounded up, at least two) go on; the
    last gets what is left. A budget below m considers only as many candidates as there are simulations.

    Source: Karnin, Koren & Somekh 2013, "Almost optimal exploration in multi-armed bandits"; for trees Danihelka et al.
    2022, "Policy improvement by planning with Gumbel".

    Raises:
      UsageError: if either number is below 1.
    """
    if candidates < 1 or simulations < 1:
        raise UsageError(f"halving_schedule: {candidates} candidates and {simulations} simulations, but each must be at least 1")
    considered = min(candidates, simulations)
    phases = max(1, (considered - 1).bit_length())
    left = simulations
    schedule = []
    while left > 0:
        visits = considered * max(1, simulations // (phases * considered))
        count = left if considered <= 2 else min(left, visits)
        schedule.append((considered, count))
        left -= count
        considered = max(2, (considered + 1) // 2)
    return schedule


def gumbel_value(value: float, most_visits: float, c_visit: float = 50.0, c_scale: float = 0.1) -> float:
    """sigma(q) = (c_visit + max n) c_scale q: values weigh more, the more visits stand behind them."""
    return (c_visit + most_visits) * c_scale * value


def improved_policy(logits: Sequence[float], values: Sequence[float], visits: Sequence[float], c_visit: float = 50.0, c_scale: float = 0.1) -> list[float]:
    """pi' = softmax(logits + sigma(q)) over the children of one node (Danihelka et al. 2022)."""
    most = max(visits)
    return boltzmann([logit + gumbel_value(value, most, c_visit, c_scale) for logit, value in zip(logits, values, strict=True)], 1.0)


def least_served(probabilities: Sequence[float], visits: Sequence[float]) -> int:
    """The child with the largest pi'(a) - n(a) / (1 + sum n): visits come to follow the probabilities (Danihelka et al. 2022)."""
    total = 1.0 + sum(visits)
    deficits = [probability - count / total for probability, count in zip(probabilities, visits, strict=True)]
    return deficits.index(max(deficits))


# Widening ------------------------------------------------------------------------------------------------------------


def children_allowed(visits: float, c: float = 2.0, a: float = 0.8) -> float:
    """Progressive widening: a node may open a new child while it has fewer than max(1, C N^a).

    Args:
      visits: N, counted from 1 for a new node.
      c: C > 0.
      a: in (0, 1]; small makes deep, narrow trees, 1 with C >= 1 only ever opens new children.

    Source: Coulom 2007, "Computing Elo ratings of move patterns"; for continuous actions Couetoux et al. 2011. C = 2,
    a = 0.8 are those of Jain et al. 2025 (arXiv 2506.20701) for images.
    """
    allowed: float = c * visits**a
    return max(1.0, allowed)


# Back-up -------------------------------------------------------------------------------------------------------------


def _known(values: Sequence[float | None]) -> list[float]:
    return [value for value in values if value is not None and math.isfinite(value)]


def max_backup(values: Sequence[float | None]) -> float | None:
    """The highest value; None if all are missing."""
    return max(_known(values), default=None)


def mean_backup(values: Sequence[float | None], weights: Sequence[float] | None = None) -> float | None:
    """The mean of the values that are there, weighted if `weights` (e.g. visits) are given; None if none is there."""
    if weights is None:
        weights = [1.0] * len(values)
    pairs = [(value, weight) for value, weight in zip(values, weights, strict=True) if weight > 0.0 and _known([value])]
    total = math.fsum(weight for _, weight in pairs)
    if not pairs:
        return None
    return math.fsum(value * (weight / total) for value, weight in pairs if value is not None)


def soft_backup(values: Sequence[float | None], weight: float) -> float | None:
    """(1/lambda) ln mean exp(lambda v), lambda = `weight`: the mean at 0, the maximum at infinity; None if all are missing.

    Children that are iid draws from the model are averaged uniformly, however unevenly they were visited: this is then
    the Monte Carlo estimate of the soft value (Jain et al. 2025, arXiv 2506.20701). Nothing overflows: the maximum is
    taken out first.

    Raises:
      UsageError: if `weight` is negative or NaN.
    """
    known = _known(values)
    if not weight >= 0.0:
        raise UsageError(f"soft_backup: weight is {weight} but must be at least 0")
    if not known:
        return None
    highest = max(known)
    if math.isinf(weight):
        return highest
    losses = [weight * (value - highest) for value in known]
    if not min(losses) < -1e-9:  # the limit, to within a billionth of the values' range; a tiny weight is no divisor
        return math.fsum(value / len(known) for value in known)
    # expm1 and log1p: exact also where all values are close.
    return highest + math.log1p(math.fsum(math.expm1(loss) for loss in losses) / len(known)) / weight


# Parallel simulations ------------------------------------------------------------------------------------------------


def with_virtual_loss(value: float, visits: float, unobserved: float) -> float:
    """The mean value (in [0, 1]) if each simulation in flight had come back with 0."""
    return value * (visits / (visits + unobserved)) if unobserved else value
