"""Statistics of studies: rank correlations, intervals, diversity of sets. Plain functions of numbers, all random ones seeded.

    rank correlations  spearman, kendall (ties share a rank); fisher_interval
    bootstrap          Interval, percentile_interval; bootstrap (any statistic of paired columns), mean_interval
                       resample_counts, crossed_counts for bootstraps written as matrix products
    shares             wilson_interval
    diversity          mean_distance, vendi_score (of features, one row a sample)

Percentile intervals (Efron 1979) are those of the resampled statistic itself: the share (1 - confidence) / 2 lies outside
on each side. Resample the units that were drawn independently: prompts, not samples of prompts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from tsdiff.treesearch.errors import UsageError

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

    Floats = NDArray[np.float64]

RESAMPLES = 2000
"""Resamples of a bootstrap, where a caller names no other number."""


@dataclass(frozen=True)
class Interval:
    """An estimate with the bounds of its confidence interval."""

    estimate: float
    low: float
    high: float

    def to_json(self) -> dict[str, float]:
        """Strict JSON."""
        return {"estimate": self.estimate, "low": self.low, "high": self.high}


# Rank correlations ---------------------------------------------------------------------------------------------------


def spearman(left: Sequence[float], right: Sequence[float]) -> float | None:
    """Spearman's rank correlation; equal values share the mean of their ranks. None where one side is constant or shorter than 2."""
    from scipy.stats import rankdata

    x, y = _pair(left, right)
    return None if _constant(x) or _constant(y) else float(np.clip(np.corrcoef(rankdata(x), rankdata(y))[0, 1], -1.0, 1.0))


def kendall(left: Sequence[float], right: Sequence[float]) -> float | None:
    """Kendall's tau-b, which corrects for ties. None where one side is constant or shorter than 2."""
    from scipy.stats import kendalltau

    x, y = _pair(left, right)
    return None if _constant(x) or _constant(y) else float(kendalltau(x, y).statistic)


def fisher_interval(correlation: float, count: int, confidence: float = 0.95, kind: Literal["pearson", "spearman"] = "pearson") -> Interval:
    """Interval of a correlation by Fisher's z transform: tanh(artanh r +- quantile * se), from `count` independent pairs.

    se = 1 / sqrt(n - 3) for Pearson (exact in the limit for jointly Gaussian pairs), sqrt((1 + r^2 / 2) / (n - 3)) for
    Spearman (Bonett & Wright 2000, "Sample size requirements for estimating Pearson, Kendall and Spearman correlations").

    Raises:
      UsageError: for fewer than 4 pairs, or a correlation outside [-1, 1].
    """
    if count < 4:
        raise UsageError(f"fisher_interval: {count} pairs are too few; give at least 4")
    if not -1.0 <= correlation <= 1.0:
        raise UsageError(f"fisher_interval: correlation is {correlation} but must lie in [-1, 1]")
    if abs(correlation) == 1.0:
        return Interval(correlation, correlation, correlation)
    spread = 1.0 if kind == "pearson" else math.sqrt(1.0 + correlation**2 / 2.0)
    reach = _quantile(confidence) * spread / math.sqrt(count - 3)
    return Interval(correlation, math.tanh(math.atanh(correlation) - reach), math.tanh(math.atanh(correlation) + reach))


def _pair(left: ArrayLike, right: ArrayLike) -> tuple[Floats, Floats]:
    x, y = np.asarray(left, dtype=np.float64), np.asarray(right, dtype=np.float64)
    if x.ndim != 1 or x.shape != y.shape:
        raise UsageError(f"a correlation needs two lists of equal length, not of shapes {x.shape} and {y.shape}")
    return x, y


def _constant(values: Floats) -> bool:
    return len(values) < 2 or bool((values == values[0]).all())


# Shares --------------------------------------------------------------------------------------------------------------


def wilson_interval(successes: int, trials: int, confidence: float = 0.95) -> Interval:
    """Interval of a probability from independent trials (Wilson 1927); sensible at 0 and 1, and for few trials.

    Raises:
      UsageError: without trials, or with more successes than trials.
    """
    if trials < 1 or not 0 <= successes <= trials:
        raise UsageError(f"wilson_interval: {successes} successes of {trials} trials; give at least one trial, and no more successes than trials")
    z2 = _quantile(confidence) ** 2
    share = successes / trials
    centre = (share + z2 / (2 * trials)) / (1 + z2 / trials)
    reach = math.sqrt(z2) / (1 + z2 / trials) * math.sqrt(share * (1 - share) / trials + z2 / (4 * trials**2))
    # Rounding must not part a bound from the 0 or 1 that it is exactly.
    return Interval(share, 0.0 if successes == 0 else centre - reach, 1.0 if successes == trials else centre + reach)


def _quantile(confidence: float) -> float:
    """The standard normal quantile that leaves (1 - confidence) / 2 above."""
    from scipy.special import ndtri

    return float(ndtri(0.5 + _checked(confidence) / 2))


def _checked(confidence: float) -> float:
    if not 0.0 < confidence < 1.0:
        raise UsageError(f"confidence is {confidence} but must lie between 0 and 1, e.g. 0.95")
    return confidence


# Bootstrap -----------------------------------------------------------------------------------------------------------


def percentile_interval(estimate: float, resampled: ArrayLike, confidence: float = 0.95) -> Interval:
    """The interval that holds the middle `confidence` of the resampled statistics; those that are not finite are left out."""
    numbers = np.asarray(resampled, dtype=np.float64)
    numbers = numbers[np.isfinite(numbers)]
    tail = (1.0 - _checked(confidence)) / 2
    if not len(numbers):
        raise UsageError("percentile_interval: no resampled statistic is finite")
    low, high = np.quantile(numbers, [tail, 1.0 - tail])
    return Interval(float(estimate), float(low), float(high))


def resample_counts(units: int, resamples: int = RESAMPLES, seed: int = 0) -> Floats:
    """How often each of `units` is drawn when as many are drawn with replacement -> (resamples, units); rows add up to `units`.

    A mean of resampled values x is then counts @ x / units, for all resamples at once.
    """
    if units < 1 or resamples < 1:
        raise UsageError(f"a bootstrap of {units} units and {resamples} resamples; each must be at least 1")
    rng = np.random.default_rng(seed)
    drawn = rng.integers(units, size=(resamples, units))
    return np.stack([np.bincount(row, minlength=units) for row in drawn]).astype(np.float64)


def crossed_counts(shape: Sequence[int], resamples: int = RESAMPLES, seed: int = 0) -> list[Floats]:
    """Counts of each of several crossed factors, (resamples, size) each: prompts and noises that all prompts share, say.

    The weight of a cell in a resample is the product of its factors' counts. A factor of one unit always counts once, so
    that the interval says nothing of other units. Variances of means are right where the factors' own effects matter, and
    too large, up to threefold for two factors, where cells vary on their own: conservative, never blind to a shared
    factor. The pigeonhole bootstrap: Owen 2007, "The pigeonhole bootstrap"; Owen & Eckles 2012, arXiv 1106.2125.
    """
    streams = np.random.default_rng(seed).integers(2**63, size=len(shape))
    return [resample_counts(size, resamples, int(stream)) for size, stream in zip(shape, streams, strict=True)]


def bootstrap(
    statistic: Callable[..., float], *columns: ArrayLike, confidence: float = 0.95, resamples: int = RESAMPLES, seed: int = 0
) -> Interval:
    """Percentile interval of any statistic of paired columns: units (first axis) are resampled together in all of them.

    Args:
      statistic: of as many arrays as there are columns; a resample for which it is NaN is left out.

    Raises:
      UsageError: if there are no columns, or they differ in length.
    """
    arrays = [np.asarray(column) for column in columns]
    lengths = {len(array) for array in arrays}
    if len(lengths) != 1:
        raise UsageError(f"bootstrap: columns have lengths {sorted(lengths)}; all need the same, one entry a unit")
    (units,) = lengths
    rng = np.random.default_rng(seed)
    drawn = rng.integers(units, size=(resamples, units)) if units else np.empty((0, 0), dtype=np.int64)
    return percentile_interval(statistic(*arrays), [statistic(*(array[row] for array in arrays)) for row in drawn], confidence)


def mean_interval(values: ArrayLike, confidence: float = 0.95, resamples: int = RESAMPLES, seed: int = 0) -> Interval:
    """Percentile interval of the mean of one number a unit; of differences of pairs, it is the interval of a paired comparison."""
    numbers = np.asarray(values, dtype=np.float64)
    if numbers.ndim != 1 or not len(numbers):
        raise UsageError(f"mean_interval: values have shape {numbers.shape}; give a list of one number a unit")
    return percentile_interval(numbers.mean(), resample_counts(len(numbers), resamples, seed) @ numbers / len(numbers), confidence)


# Diversity -----------------------------------------------------------------------------------------------------------


def mean_distance(features: ArrayLike) -> float | None:
    """Mean of 1 - cosine over all pairs of rows of features (n, d), in [0, 2]; None for fewer than two rows."""
    rows = _directions(features)
    count = len(rows)
    if count < 2:
        return None
    # |sum of rows|^2 = n + 2 * (sum of cosines over pairs)
    cosines = (float(np.square(rows.sum(axis=0)).sum()) - count) / (count * (count - 1))
    return min(max(1.0 - cosines, 0.0), 2.0)


def vendi_score(features: ArrayLike, order: float = 1.0) -> float:
    """The effective number of different rows of features (n, d), between 1 (all equal) and n (all orthogonal).

    exp of the entropy of the eigenvalues of K / n, K the rows' cosines; of order q the Renyi entropy, which stresses rare
    rows below 1 and common ones above; order infinity is 1 / largest eigenvalue.

    Source: Friedman & Dieng 2023, "The Vendi Score" (arXiv 2210.02410); orders from Pasarkar & Dieng 2023 (arXiv 2310.12952).

    Raises:
      UsageError: without rows, for a row of zeros or numbers that are not finite, or an order below 0.
    """
    rows = _directions(features)
    if not order >= 0.0:
        raise UsageError(f"vendi_score: order is {order} but must be at least 0")
    count = len(rows)
    # The smaller of the two matrices of inner products: both have the same eigenvalues but for zeros.
    matrix = rows @ rows.T if count <= rows.shape[1] else rows.T @ rows
    shares = np.linalg.eigvalsh(matrix / count)
    shares = shares[shares > 1e-12]
    shares = shares / shares.sum()
    if order == 1.0:
        return float(np.exp(-(shares * np.log(shares)).sum()))
    if math.isinf(order):
        return float(1.0 / shares.max())
    return float((shares**order).sum() ** (1.0 / (1.0 - order)))


def _directions(features: ArrayLike) -> Floats:
    """Rows of length 1."""
    rows = np.asarray(features, dtype=np.float64)
    if rows.ndim != 2 or not rows.size:
        raise UsageError(f"features have shape {rows.shape} but must be (n, d), with n and d at least 1")
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    if not np.isfinite(lengths).all() or not (lengths > 0.0).all():
        raise UsageError("features hold a row of zeros, or numbers that are not finite; such a row has no direction to compare")
    directions: Floats = rows / lengths
    return directions
