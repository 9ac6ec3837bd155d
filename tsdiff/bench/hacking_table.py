"""Tables behind a hacking report: the scores of one policy's answers by prompt, seed and budget, and what they come to."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from tsdiff.bench.answers import Sample, Search
from tsdiff.bench.diversity import features_of
from tsdiff.bench.statistics import Interval, crossed_counts, mean_distance, mean_interval, percentile_interval, vendi_score
from tsdiff.treesearch.errors import UsageError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]

ENOUGH = 8
"""Prompts, or seeds, from which a warning is given: percentile intervals of fewer are too narrow to rely on."""

SEARCHED, HELD_OUT, ORACLE = "searched", "held_out", "oracle"


@dataclass(frozen=True)
class HackingPoint:
    """One budget.

    Attributes:
      budget: NFE of a search; within runs, of k samples.
      nfe: what searches spent of it, on average.
      searches: how many are behind the numbers.
      scores: mean of the answers' scores by role: "searched", "held_out" and, where there is one, "oracle".
      intervals: of these means, and of "distance" and "vendi" over prompts; a mean of a single unit has none.
      index: hacking index, (held-out gain / std) / (searched gain / std) over the first point, std that of plain samples of
        one prompt. Where both are jointly Gaussian it is their correlation at every budget; falling means
        over-optimisation, negative hacking. None at the first point, and without two plain samples of a prompt.
      distance: mean of 1 - cosine between the answers of one prompt under different seeds, over prompts; None with fewer
        than two pictures of a prompt.
      vendi: their effective number, likewise.
      pictures: of a prompt, for the two.
    """

    budget: float
    nfe: float
    searches: int
    scores: dict[str, float]
    intervals: dict[str, Interval]
    index: float | None
    distance: float | None
    vendi: float | None
    pictures: int

    def to_json(self) -> dict[str, Any]:
        """Strict JSON."""
        plain = {name: getattr(self, name) for name in ("budget", "nfe", "searches", "scores", "index", "distance", "vendi", "pictures")}
        return plain | {"intervals": {what: interval.to_json() for what, interval in self.intervals.items()}}


@dataclass(frozen=True)
class HackingCurve:
    """One policy over budgets.

    Attributes:
      policy: its name.
      prompts, seeds: how many are at every budget.
      points: by budget.
      peak: the budget with the highest held-out mean.
      warning: what went wrong in one line, or None.
    """

    policy: str
    prompts: int
    seeds: int
    points: tuple[HackingPoint, ...]
    warning: str | None

    @property
    def at_peak(self) -> HackingPoint:
        """The point with the highest held-out mean; the first of equals."""
        return max(self.points, key=lambda point: point.scores[HELD_OUT])

    @property
    def peak(self) -> float:
        """The budget with the highest held-out mean; the first of equals."""
        return self.at_peak.budget


class Table:
    """The scores of one policy's answers: role -> (prompts, seeds, budgets), complete or left out."""

    def __init__(self, searches: Sequence[Search], verifiers: dict[str, str], within: bool, notices: list[str], device: str) -> None:
        self.names = verifiers
        self.within = within
        self.notices = notices
        self.device = device
        cells = _within_runs(searches, verifiers) if within else _across_runs(searches, notices)
        self.budgets = sorted({budget for places in cells.values() for budget in places})
        whole = {place: points for place, points in cells.items() if len(points) == len(self.budgets) and all(_has(one, verifiers) for one in points.values())}
        if len(whole) < len(cells):
            notices.append(f"{len(cells) - len(whole)} of {len(cells)} prompts and seeds lack a budget or a score, and were left out")
        if not whole:
            raise UsageError(f"no prompt and seed of policy {searches[0].policy} has scores of {', '.join(verifiers.values())} at every budget ({', '.join(f'{b:g}' for b in self.budgets)})")
        self.prompts = sorted({place[0] for place in whole})
        self.seeds = sorted({place[1] for place in whole})
        self.cells = whole
        shape = (len(self.prompts), len(self.seeds), len(self.budgets))
        self.scores: dict[str, Floats] = {role: np.full(shape, math.nan) for role in verifiers}
        for (prompt, seed), points in whole.items():
            row = self.prompts.index(prompt), self.seeds.index(seed)
            for place, budget in enumerate(self.budgets):
                for role, name in verifiers.items():
                    self.scores[role][*row, place] = points[budget].scores[name]
        self.spreads = _spreads(searches, verifiers, within)

    def curve(self, policy: str, confidence: float, resamples: int, seed: int, function: Any) -> HackingCurve:
        """The whole curve."""
        prompts, seeds, budgets = len(self.prompts), len(self.seeds), len(self.budgets)
        weights = None
        if prompts > 1 or seeds > 1:
            rows, columns = crossed_counts((prompts, seeds), resamples, seed)
            there = np.isfinite(self.scores[SEARCHED][:, :, 0])
            weights = (rows[:, :, None] * columns[:, None, :] * there).reshape(resamples, -1)
            weights = weights[weights.sum(axis=1) > 0.0]
        else:
            self.notices.append("one prompt and one seed: there is nothing to resample, so there are no intervals")

        def interval(values: Floats, level: float) -> Interval | None:
            if weights is None:
                return None
            means = weights @ np.nan_to_num(values).reshape(-1) / weights.sum(axis=1)
            return percentile_interval(float(np.nanmean(values)), means, level)

        points = []
        for place, budget in enumerate(self.budgets):
            answers = [points[budget] for points in self.cells.values()]
            means = {role: float(np.nanmean(table[:, :, place])) for role, table in self.scores.items()}
            intervals = {role: one for role in self.names if (one := interval(self.scores[role][:, :, place], confidence)) is not None}
            diversity, pictures = self._diversity(budget, function)
            for what, values in diversity.items():
                if len(values) > 1:
                    intervals[what] = mean_interval(values, confidence, resamples, seed)
            distance, vendi = (float(np.mean(values)) if values else None for values in diversity.values())
            nfe = float(np.mean([one.nfe for one in answers]))
            points.append(HackingPoint(budget, nfe, len(answers), means, intervals, self._index(place), distance, vendi, pictures))
        warning = None
        if budgets > 1:
            if max(prompts, seeds) >= ENOUGH:
                warning = self._warning(policy, interval, 1.0 - (1.0 - confidence) / (budgets - 1))
            else:
                self.notices.append(f"{prompts} prompts and {seeds} seeds are too few to warn of hacking; at least {ENOUGH} of either are needed")
        return HackingCurve(policy, prompts, seeds, tuple(points), warning)

    def _warning(self, policy: str, interval: Any, level: float) -> str | None:
        """From the budget of the largest loss to the last one, if the search gains and the held-out score falls for sure."""
        worst: tuple[float, str] | None = None
        last = len(self.budgets) - 1
        for place in range(last):
            gain, loss = (interval(self.scores[role][:, :, last] - self.scores[role][:, :, place], level) for role in (SEARCHED, HELD_OUT))
            if gain.low > 0.0 and loss.high < 0.0 and (worst is None or loss.estimate < worst[0]):
                text = (
                    f"policy {policy} hacks {self.names[SEARCHED]}: from {self.budgets[place]:g} to {self.budgets[last]:g} NFE it rises by {gain.estimate:.4g} [{gain.low:.4g}, {gain.high:.4g}] "
                    f"while the held-out {self.names[HELD_OUT]} falls by {-loss.estimate:.4g} [{-loss.high:.4g}, {-loss.low:.4g}]"
                )
                worst = (loss.estimate, text)
        return None if worst is None else worst[1]

    def _index(self, place: int) -> float | None:
        if self.spreads is None or place == 0:
            return None
        searched, held_out = (float(np.nanmean(self.scores[role][:, :, place] - self.scores[role][:, :, 0])) / self.spreads[role] for role in (SEARCHED, HELD_OUT))
        return held_out / searched if searched > 0.0 else None

    def _diversity(self, budget: float, function: Any) -> tuple[dict[str, list[float]], int]:
        """Distance and Vendi score of each prompt's answers, and of how many; prompts must have equally many."""
        found: dict[str, list[float]] = {"distance": [], "vendi": []}
        counts = set()
        for prompt in self.prompts:
            pictures = [points[budget].picture for (label, _), points in sorted(self.cells.items()) if label == prompt]
            known = [picture for picture in pictures if picture is not None]
            if len(known) < 2:
                continue
            features = features_of(known, function, self.device)
            distance = mean_distance(features)
            assert distance is not None
            found["distance"].append(distance)
            found["vendi"].append(vendi_score(features))
            counts.add(len(known))
        if len(counts) == 1:
            return found, counts.pop()
        why = "no prompt has pictures of two answers (seeds)" if not counts else "prompts have pictures of different numbers of answers"
        self.notices.append(f"no diversity {'of best-of-k on the way' if self.within else f'at {budget:g} NFE'}: {why}")
        return {"distance": [], "vendi": []}, 0


_Cells = dict[tuple[str, int], dict[float, Sample]]


def _label(search: Search) -> str:
    return search.condition.label


def _has(sample: Sample, verifiers: dict[str, str]) -> bool:
    return all(name in sample.scores for name in verifiers.values())


def _across_runs(searches: Sequence[Search], notices: list[str]) -> _Cells:
    """Answers at the budgets of their runs, and baselines at theirs where every search has one."""
    cells: _Cells = {}
    for one in searches:
        points = cells.setdefault((_label(one), one.seed), {})
        if one.budget in points:
            raise UsageError(f"two runs of policy {one.policy} have the same prompt {_label(one)!r}, seed {one.seed} and budget {one.budget} NFE; report on one of them")
        points[one.budget] = one.answer
    if all(one.plain is not None for one in searches):
        for one in searches:
            assert one.plain is not None
            cells[_label(one), one.seed].setdefault(one.plain.nfe, one.plain)
    else:
        notices.append("some runs have no baseline, so that budgets begin with the smallest of a run")
    return cells


def _within_runs(searches: Sequence[Search], verifiers: dict[str, str]) -> _Cells:
    """Expected answers of best-of-k, for k = 1, 2, 4, ... and the number of samples that all runs have."""
    for one in searches:
        if not one.samples:
            raise UsageError(f"{one.source}: policy {one.policy} did not make independent samples, so there is no best-of-k within it; leave `within` out")
    scored = [[sample for sample in one.samples if _has(sample, verifiers)] for one in searches]
    most, least = min((len(samples), place) for place, samples in enumerate(scored))
    if most < 2:
        raise UsageError(f"{searches[least].source} has fewer than two samples that {' and '.join(verifiers.values())} have scored")
    counts = sorted({*(2**power for power in range(most.bit_length())), most})
    cells: _Cells = {}
    for one, samples in zip(searches, (few[:most] for few in scored), strict=True):
        place = (_label(one), one.seed)
        if place in cells:
            raise UsageError(f"two runs of policy {one.policy} have the same prompt {place[0]!r} and seed {place[1]}; report on one of them")
        each = float(np.mean([sample.nfe for sample in samples]))
        searched = [sample.scores[verifiers[SEARCHED]] for sample in samples]
        cells[place] = {}
        for k in counts:
            scores = {name: best_of_k(searched, [sample.scores[name] for sample in samples], k) for name in verifiers.values()}
            picture = one.plain.picture if k == 1 and one.plain else one.answer.picture if k == len(one.samples) else None
            cells[place][k * each] = Sample(round(k * each), scores, picture)
    return cells


def best_of_k(searched: Sequence[float], other: Sequence[float], k: int) -> float:
    """The expected `other` score of the sample with the highest `searched` score among k of the n samples.

    The mean over all subsets of size k, in closed form: the sample of rank i from below wins C(i - 1, k - 1) of the C(n, k)
    subsets; equal scores share their wins. An unbiased estimate of best-of-k.

    Raises:
      UsageError: if k is not between 1 and n.
    """
    from scipy.special import gammaln

    n = len(searched)
    if not 1 <= k <= n:
        raise UsageError(f"best_of_k: k is {k} but must lie between 1 and {n}, the number of samples")
    order = np.argsort(searched, kind="stable")
    ranks = np.arange(k, n + 1)
    log_shares = gammaln(ranks) - gammaln(ranks - k + 1) - gammaln(k) - (gammaln(n + 1) - gammaln(k + 1) - gammaln(n - k + 1))
    shares = np.concatenate([np.zeros(k - 1), np.exp(log_shares)])
    sorted_scores, values = np.asarray(searched, dtype=float)[order], np.asarray(other, dtype=float)[order]
    _, groups = np.unique(sorted_scores, return_inverse=True)
    sizes = np.bincount(groups)
    return float((np.bincount(groups, shares) * (np.bincount(groups, values) / sizes)).sum() / shares.sum())


def _spreads(searches: Sequence[Search], verifiers: dict[str, str], within: bool) -> dict[str, float] | None:
    """Standard deviation of plain samples of one prompt by role, pooled over prompts; None without two of a prompt."""
    samples: dict[str, dict[int, list[Sample]]] = {}
    for one in searches:
        own = one.samples if within else (one.plain,) if one.plain else ()
        samples.setdefault(_label(one), {})[one.seed] = [sample for sample in own if _has(sample, verifiers)]  # a seed's baseline is the same in all its runs
    spreads = {}
    for role, name in verifiers.items():
        squares = freedom = 0.0
        for seeds in samples.values():
            scores = [sample.scores[name] for few in seeds.values() for sample in few]
            if len(scores) > 1:
                squares += float(np.var(scores)) * len(scores)
                freedom += len(scores) - 1
        if not freedom or not squares > 0.0:
            return None
        spreads[role] = math.sqrt(squares / freedom)
    return spreads
