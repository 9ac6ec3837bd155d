"""Predictivity: how early a verifier's score of the clean estimate tells which sample will be the best.

Plain samples of every prompt go through all levels; the verifier scores the clean estimate at each, and the finished
sample. Of each level the curve has the rank correlation of the two scores over the samples of *one* prompt, averaged over
prompts: differences between prompts (some are easy) are of no use to a search, and are left out. Where the correlation is
high, branching and pruning pay.

Predictions that are made to score a level are those of the next step, so a curve costs no more than its plain samples.

Intervals resample prompts and samples together (`statistics.crossed_counts`): the i-th sample of every prompt starts from
the same noise, so that prompts alone are no independent units. They are wider than need be where prompts make different
things of the same noise.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from tsdiff.bench.plots import new_figure
from tsdiff.bench.statistics import RESAMPLES, Interval, crossed_counts, kendall, percentile_interval
from tsdiff.treesearch.errors import SearchFailed, UsageError
from tsdiff.treesearch.ledger import Cost, Spend
from tsdiff.treesearch.parameters import check, parameter
from tsdiff.treesearch.plan import Plan, prepare
from tsdiff.treesearch.protocols import Condition, Search, Setting, TreeView
from tsdiff.treesearch.requests import Denoise, Draw, Release, Score

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from tsdiff.treesearch.references import VerifierLike
    from tsdiff.treesearch.results import Results
    from tsdiff.treesearch.search import Progress

    Floats = NDArray[np.float64]

FEW = 8
"""Samples of a prompt below which intervals are too narrow to rely on, and a notice says so."""

THRESHOLD = 0.5
"""The correlation from which branching is said to pay, where a caller names no other: a rule of thumb."""


@dataclass(frozen=True, kw_only=True)
class ScoredSamples:
    """The requests behind a curve: n plain samples, their clean estimates scored on the way."""

    name: ClassVar[str] = "predict-curve"
    needs: ClassVar[frozenset[str]] = frozenset()
    size_parameters: ClassVar[tuple[str, ...]] = ("samples",)

    samples: int = parameter(16, low=3, symbol="n", help="samples of each prompt")
    levels: int = parameter(0, low=0, help="at how many levels they are scored, evenly spread, the last among them; 0 is all")

    def __post_init__(self) -> None:
        check(self)
        if self.levels == 1:
            raise UsageError("levels is 1, the last alone; give at least 2, or 0 for all")

    def at(self, last: int) -> tuple[int, ...]:
        """The levels, of a schedule that ends at `last`."""
        steps = last if self.levels == 0 else min(self.levels - 1, last)
        return tuple((2 * i * last + steps) // (2 * steps) for i in range(steps + 1))

    def search(self, tree: TreeView) -> Search:
        """Every sample through every level; nothing is chosen."""
        nodes = yield Draw(self.samples)
        for level in self.at(tree.schedule.last):
            if level > 0:
                grown = yield Denoise(nodes, to=level)
                yield Release(nodes)
                nodes = grown
            yield Score(nodes)
        return tree.best()

    def cost(self, setting: Setting) -> Cost:
        """The samples; each is scored once at every level."""
        on_the_way = setting.scoring(self.samples, final=False) * (len(self.at(setting.schedule.last)) - 1)
        return Cost.exactly(Spend(nfe=self.samples * setting.sample_cost) + on_the_way + setting.scoring(self.samples, final=True) + setting.result())

    def fit(self, nfe: int, setting: Setting) -> ScoredSamples:
        """Never asked for: a curve has the number of samples that it was given."""
        return self


@dataclass(frozen=True)
class LevelPoint:
    """One level of a curve.

    Attributes:
      level: of the schedule, 0 pure noise, T clean.
      noise: sigma/alpha of the level; None at pure noise of alpha 0.
      nfe: evaluations of one sample up to and including the prediction that is scored.
      correlation: mean within-prompt Spearman correlation with its interval; None if no prompt has one.
      kendall: mean within-prompt Kendall's tau-b.
      kept: share of best-of-n's gain that choosing by this level's score keeps: (chosen - mean) / (best - mean) of the
        final scores, summed over prompts; 1 picks the best every time, 0 is chance. None where all final scores are equal.
      prompts: how many prompts have a correlation: not all scores at the level, or in the end, were equal or missing.
    """

    level: int
    noise: float | None
    nfe: int
    correlation: Interval | None
    kendall: float | None
    kept: float | None
    prompts: int


@dataclass(frozen=True)
class PredictCurve:
    """Scores at each level against final scores.

    Attributes:
      model, solver: what sampled.
      verifier: whose score of the clean estimates is judged.
      against: whose score of the finished samples is to be predicted; the same unless another was named.
      prompts: labels, P of them.
      levels: L levels, the last is T.
      noise: sigma/alpha of each level.
      costs: NFE of one sample up to each level's score.
      scores: (P, n, L) of the clean estimates; NaN where scoring failed.
      finals: (P, n) of the finished samples.
      nfe, decodes, verifier_calls: spent in all.
      failures: prompts whose sampling failed, with the reason; they are in none of the numbers.
      notices: lines for the user.
      confidence, threshold, resamples, seed: of the intervals, and of `branch_level`.
    """

    model: str
    solver: str
    verifier: str
    against: str
    prompts: tuple[str, ...]
    levels: tuple[int, ...]
    noise: tuple[float, ...]
    costs: tuple[int, ...]
    scores: Floats
    finals: Floats
    nfe: int
    decodes: int
    verifier_calls: int
    failures: tuple[tuple[str, str], ...] = ()
    notices: tuple[str, ...] = ()
    confidence: float = 0.95
    threshold: float = THRESHOLD
    resamples: int = RESAMPLES
    seed: int = 0

    @cached_property
    def by_prompt(self) -> Floats:
        """Spearman correlations (P, L); NaN where one is not defined."""
        whole = np.ones((1, self.finals.shape[1]))
        return np.stack([_correlations(scores, finals, whole)[0] for scores, finals in zip(self.scores, self.finals, strict=True)])

    @cached_property
    def points(self) -> tuple[LevelPoint, ...]:
        """The curve, level by level."""
        prompts, samples = self.finals.shape
        prompt_counts, sample_counts = crossed_counts((prompts, samples), self.resamples, self.seed)
        resampled = np.stack([_correlations(s, f, sample_counts) for s, f in zip(self.scores, self.finals, strict=True)], axis=1)  # (R, P, L)
        means = _average(resampled, prompt_counts[:, :, None], axis=1)  # (R, L)
        points = []
        for place, level in enumerate(self.levels):
            own = self.by_prompt[:, place]
            defined = int(np.isfinite(own).sum())
            interval = percentile_interval(float(np.nanmean(own)), means[:, place], self.confidence) if defined else None
            noise = self.noise[place]
            points.append(LevelPoint(
                level, noise if math.isfinite(noise) else None, self.costs[place], interval, self._kendall(place), self._kept(place), defined,
            ))
        return tuple(points)

    @property
    def branch_level(self) -> int | None:
        """The first level on the way whose lower bound exceeds the threshold; None if none does."""
        passed = (point for point in self.points[:-1] if point.correlation is not None and point.correlation.low > self.threshold)
        return next((point.level for point in passed), None)

    def _kendall(self, place: int) -> float | None:
        taus = []
        for scores, finals in zip(self.scores[:, :, place], self.finals, strict=True):
            both = np.isfinite(scores) & np.isfinite(finals)
            tau = kendall(scores[both], finals[both])
            taus += [] if tau is None else [tau]
        return float(np.mean(taus)) if taus else None

    def _kept(self, place: int) -> float | None:
        chosen = best = 0.0
        for scores, finals in zip(self.scores[:, :, place], self.finals, strict=True):
            both = np.isfinite(scores) & np.isfinite(finals)
            if both.any():
                early, late = scores[both], finals[both]
                chosen += late[early == early.max()].mean() - late.mean()  # equal scores: one of them by lot
                best += late.max() - late.mean()
        return float(chosen / best) if best > 0.0 else None

    def to_json(self) -> dict[str, Any]:
        """Strict JSON."""
        return {
            "model": self.model,
            "solver": self.solver,
            "verifier": self.verifier,
            "against": self.against,
            "prompts": list(self.prompts),
            "samples": self.finals.shape[1],
            "seed": self.seed,
            "confidence": self.confidence,
            "threshold": self.threshold,
            "resamples": self.resamples,
            "branch_level": self.branch_level,
            "nfe": self.nfe,
            "decodes": self.decodes,
            "verifier_calls": self.verifier_calls,
            "levels": [
                {
                    "level": point.level,
                    "noise": point.noise,
                    "nfe": point.nfe,
                    "spearman": None if point.correlation is None else point.correlation.to_json(),
                    "kendall": point.kendall,
                    "kept": point.kept,
                    "prompts": point.prompts,
                    "by_prompt": [float(one) if math.isfinite(one) else None for one in own],
                }
                for point, own in zip(self.points, self.by_prompt.T, strict=True)
            ],
            "failures": [{"prompt": prompt, "error": error} for prompt, error in self.failures],
        }

    def plot(self, path: str | Path) -> Path:
        """Draw the curve into a file (.png, .pdf or .svg): the mean with its interval, each prompt's own behind it.

        Raises:
          SetupError: without matplotlib.
        """
        shown = [point for point in self.points if point.correlation is not None]
        places = [point.level for point in shown]
        middles, lows, highs = zip(*((i.estimate, i.low, i.high) for point in shown if (i := point.correlation)), strict=True) if shown else ((), (), ())
        with new_figure(path) as figure:
            axes = figure.subplots()
            axes.fill_between(places, lows, highs, color="C0", alpha=0.2, linewidth=0, label=f"{self.confidence:.0%} interval", zorder=1)
            for number, own in enumerate(self.by_prompt if len(self.prompts) > 1 else ()):
                faint = {"color": "0.35", "linewidth": 0.8, "alpha": max(0.1, 0.7 / math.sqrt(len(self.prompts))), "zorder": 2}
                axes.plot(self.levels, own, label=None if number else "each prompt", **faint)
            mean = "the prompt" if len(self.prompts) == 1 else f"mean of {len(self.prompts)} prompts"
            axes.plot(places, middles, color="C0", marker="o", markersize=3.5, label=mean, zorder=3)
            axes.axhline(self.threshold, color="C3", linestyle="--", linewidth=1.0, label=f"threshold {self.threshold:g}")
            if self.branch_level is not None:
                axes.axvline(self.branch_level, color="C2", linewidth=1.2, label=f"branching pays from level {self.branch_level}")
            axes.set_xlabel("level (0 is noise)")
            final = "final score" if self.against == self.verifier else f"final {self.against}"
            axes.set_ylabel(f"within-prompt Spearman with the {final}")
            axes.set_ylim(min(-0.1, *lows, *(own for own in self.by_prompt.ravel() if math.isfinite(own))) - 0.05, 1.05)
            axes.set_xlim(self.levels[0], self.levels[-1])
            axes.xaxis.get_major_locator().set_params(integer=True)
            axes.set_title(f"{self.verifier} on the way: {self.model}, {self.solver}, {self.finals.shape[1]} samples a prompt", fontsize=10)
            axes.grid(alpha=0.3)
            axes.legend(loc="lower right", fontsize=8)
        return Path(path)


def curve_plan(
    model: Any, prompts: str | Condition | Sequence[str | Condition] | None, *, verifier: VerifierLike, against: VerifierLike | None = None,
    samples: int = 16, levels: int = 0, **options: Any,
) -> Plan:  # fmt: skip
    """Resolve and check a curve without loading weights; see `predict_curve`.

    Raises:
      UsageError, SetupError: for whatever cannot be done as asked.
    """
    policy = ScoredSamples(samples=samples, levels=levels)
    plan = prepare(model, prompts, policy=policy, verifiers=verifier if against is None else (verifier, against), baseline=False, **options)
    if len(plan.verifiers) != (1 if against is None else 2):
        raise UsageError(f"{len(plan.verifiers)} verifiers were given; a curve has one, and one more as `against` at most")
    judge = plan.verifiers[0]
    if judge.judges == "final":
        raise UsageError(f"verifier {judge.name} judges finished samples only, so it has no score at the levels before; choose one that judges any level")
    if len(plan.seeds) > 1:
        raise UsageError(f"{len(plan.seeds)} seeds were given; a curve has one, and as many samples of it as you like")
    seen: set[str] = set()
    for condition in plan.conditions:
        key = json.dumps([condition.prompt, condition.negative_prompt, condition.class_label, dict(condition.metadata)], sort_keys=True)
        if key in seen and not condition.tensors and not condition.extra:
            raise UsageError(f"prompt {condition.label!r} is given twice; both would have the same samples: name each prompt once")
        seen.add(key)
    return plan


def measure(
    plan: Plan, *, confidence: float = 0.95, threshold: float = THRESHOLD, resamples: int = RESAMPLES, callback: Callable[[Progress], None] | None = None
) -> PredictCurve:
    """Carry out a plan of `curve_plan`; see `predict_curve`."""
    from tsdiff.treesearch.search import execute

    if not 0.0 < confidence < 1.0:
        raise UsageError(f"confidence is {confidence} but must lie between 0 and 1, e.g. 0.95")
    if not -1.0 <= threshold < 1.0:
        raise UsageError(f"threshold is {threshold} but must lie in [-1, 1): it is a correlation")
    results = execute(plan, callback=callback)
    if not results.results:
        raise SearchFailed(f"no prompt could be sampled: {results.failures[0].message}") from results.failures[0].error
    policy = plan.policy
    assert isinstance(policy, ScoredSamples)
    few = () if policy.samples >= FEW else (f"{policy.samples} samples of each prompt are few: the intervals are too narrow to rely on; take at least {FEW}",)
    levels, schedule = policy.at(plan.schedule.last), plan.schedule
    judge, other = plan.verifiers[0].name, plan.verifiers[-1].name
    scores, finals = _tables(results, policy.samples, levels, judge, other)
    return PredictCurve(
        model=plan.model.name,
        solver=f"{plan.solver}, {schedule.last} steps",
        verifier=judge,
        against=other,
        prompts=tuple(result.prompt for result in results),
        levels=levels,
        noise=tuple(schedule.sigma[level] / schedule.alpha[level] if schedule.alpha[level] > 0.0 else math.inf for level in levels),
        costs=tuple(plan.setting.denoise_cost(0, level) + (level < schedule.last) for level in levels),
        scores=scores,
        finals=finals,
        nfe=results.nfe,
        decodes=sum(result.ledger.decodes for result in results),
        verifier_calls=sum(sum(result.ledger.verifier_calls.values()) for result in results),
        failures=tuple((failure.prompt, failure.message) for failure in results.failures),
        notices=(*results.notices, *few),
        confidence=confidence,
        threshold=threshold,
        resamples=resamples,
        seed=plan.seeds[0],
    )


def predict_curve(
    model: Any = None,
    prompts: str | Condition | Sequence[str | Condition] | None = None,
    *,
    verifier: VerifierLike,
    against: VerifierLike | None = None,
    samples: int = 16,
    levels: int = 0,
    confidence: float = 0.95,
    threshold: float = THRESHOLD,
    resamples: int = RESAMPLES,
    callback: Callable[[Progress], None] | None = None,
    **options: Any,
) -> PredictCurve:
    """How early a verifier tells which of a prompt's samples will be the best.

    Args:
      model, prompts: as for `tsdiff.search`.
      verifier: scores the clean estimates on the way; it must judge any level.
      against: scores the finished samples, if not the same verifier: is a cheap one enough on the way?
      samples: n, of each prompt, at least 3.
      levels: at how many levels they are scored, evenly spread, the last among them; 0 is all. More cost no network
        evaluations, but decodes and verifier calls.
      confidence: of the intervals.
      threshold: branching is said to pay from the first level whose interval lies above it.
      resamples: of the bootstrap.
      callback: called with a `Progress` after every batch.
      **options: of `tsdiff.search`: `steps`, `solver`, `eta`, `guidance_scale`, `seed`, `device`, ...

    Raises:
      UsageError: for whatever cannot be done as asked, before any weights load.
      SearchFailed: if no prompt could be sampled.
    """
    plan = curve_plan(model, prompts, verifier=verifier, against=against, samples=samples, levels=levels, **options)
    return measure(plan, confidence=confidence, threshold=threshold, resamples=resamples, callback=callback)


def _tables(results: Results, samples: int, levels: Sequence[int], judge: str, other: str) -> tuple[Floats, Floats]:
    """Scores (P, n, L) at the levels and (P, n) in the end; NaN where one is missing."""
    scores = np.full((len(results), samples, len(levels)), math.nan)
    finals = np.full((len(results), samples), math.nan)
    places = {level: place for place, level in enumerate(levels)}
    for p, result in enumerate(results):
        rows = {root.index: i for i, root in enumerate(result.tree.roots)}
        for node in result.tree.nodes:
            i, score = rows[node.path()[0].index], node.score(judge)
            if score is not None and node.level in places:
                scores[p, i, places[node.level]] = score
            if node.level == levels[-1] and (final := node.score(other)) is not None:
                finals[p, i] = final
    return scores, finals


def _correlations(scores: Floats, finals: Floats, counts: Floats) -> Floats:
    """Spearman correlations (R, L) of scores (n, L) with finals (n,), the i-th pair taken counts[r, i] times; NaN if undefined.

    Among resampled pairs the mean rank of one is the number of smaller ones and half that of equal ones (itself too), up
    to a constant: a product of the counts with a matrix of comparisons.
    """
    columns = []
    for column in scores.T:
        known = np.isfinite(column) & np.isfinite(finals)
        weights, early, late = counts[:, known], column[known], finals[known]
        ranks = [weights @ ((x[:, None] < x[None, :]) + 0.5 * (x[:, None] == x[None, :])) for x in (early, late)]
        total = weights.sum(axis=1, keepdims=True)
        with np.errstate(invalid="ignore", divide="ignore"):  # no pair, or equal scores: NaN
            left, right = (rank - (weights * rank).sum(axis=1, keepdims=True) / total for rank in ranks)
            spread = np.sqrt((weights * left**2).sum(axis=1) * (weights * right**2).sum(axis=1))
            columns.append(np.where(spread > 1e-9, np.clip((weights * left * right).sum(axis=1) / spread, -1.0, 1.0), math.nan))
    return np.stack(columns, axis=1)


def _average(values: Floats, weights: Floats, axis: int) -> Floats:
    """Weighted means of the values that are not NaN; NaN where there is none."""
    known = np.isfinite(values)
    with np.errstate(invalid="ignore", divide="ignore"):
        mean: Floats = np.where(known, values * weights, 0.0).sum(axis=axis) / (known * weights).sum(axis=axis)
    return mean
