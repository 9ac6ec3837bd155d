"""Weighted particles: normalising, effective sample size, resampling, tempering. All of it from log weights.

N particles with log weights w_k stand for the law sum_k W_k delta(x_k), W_k = exp(w_k) / sum_j exp(w_j). A log weight of
-inf is a dead particle; NaN and +inf are refused, and so is a population of dead ones.

Resampling replaces weights by numbers of offspring n_k with E[n_k] = M W_k and sum_k n_k = M, for every scheme:

| scheme | how | n_k |
| --- | --- | --- |
| multinomial | M independent draws | anything; with equal weights a third of the particles is lost |
| residual | floor(M W_k) each, the rest by independent draws from the remainders | at least the floor |
| systematic | one uniform number u; the points u, 1 + u, 2 + u, ... through the cumulative M W_k | floor or ceiling |
| ssp | the remainders rounded in pairs, at random, each keeping its mean | floor or ceiling |

The last two leave equal weights alone. Systematic resampling depends on the order of the particles and its variance may
not fall with M; SSP, the Srinivasan sampling process, has neither fault. Sources: Douc, Cappe & Moulines 2005
(arXiv cs/0507025); Gerber, Chopin & Whiteley 2019 (arXiv 1707.01845).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, TypeAlias

import numpy as np
from numpy.random import Generator
from numpy.typing import ArrayLike, NDArray

from tsdiff.treesearch.errors import UsageError, unknown_name

Scheme: TypeAlias = Literal["multinomial", "residual", "systematic", "ssp"]
Floats: TypeAlias = NDArray[np.float64]
Counts: TypeAlias = NDArray[np.int64]

# An expected number of offspring this close to a whole number is that number: N times 1/N need not be 1 in floats.
WHOLE = 1e-12


# Weights -------------------------------------------------------------------------------------------------------------


def normalise(log_weights: ArrayLike) -> Floats:
    """Weights (N,) that add up to 1, from log weights (N,).

    Raises:
      UsageError: if there is none, one is NaN or +inf, or all are -inf.
    """
    unit = _relative(log_weights)
    weights: Floats = unit / unit.sum()
    return weights


def effective_size(log_weights: ArrayLike) -> float:
    """Kish's effective sample size 1 / sum_k W_k^2: from 1 (one particle has all the weight) to exactly N (equal weights).

    Raises:
      UsageError: as `normalise`.
    """
    unit = _relative(log_weights)
    return float(unit.sum() ** 2 / (unit**2).sum())


def log_mean_exp(log_weights: ArrayLike) -> float:
    """log((1/N) sum_k exp(w_k)) without overflow; -inf if all are -inf.

    Raises:
      UsageError: if there is none, or one is NaN or +inf.
    """
    logs = _checked(log_weights)
    peak = float(logs.max())
    return peak if peak == -math.inf else peak + math.log(float(np.exp(logs - peak).mean()))


def temper(base: ArrayLike, direction: ArrayLike, target: float, *, low: float = 0.0, high: float = 1.0) -> float:
    """The largest exponent b in [low, high] for which the particles with log weights base + b * direction stay enough.

    Found by bisection, on the supposition that their effective size falls with b (it does where `base` is constant).

    Args:
      base, direction: (N,); `direction` is finite.
      target: the effective size to keep, in particles.

    Returns:
      `high` if the effective size is at least `target` there, `low` if it is not even at `low`, and otherwise an
      exponent that still has the size while one a billionth of the range larger has not.
    """
    logs, slope = _checked(base), np.asarray(direction, dtype=np.float64)
    if not np.isfinite(slope).all():
        raise UsageError("the direction of tempering must be finite; leave out particles without a score")

    def enough(exponent: float) -> bool:
        return effective_size(logs + exponent * slope) >= target

    if enough(high):
        return high
    if not enough(low):
        return low
    width = 1e-9 * (high - low)
    while high - low > width:
        middle = 0.5 * (low + high)
        low, high = (middle, high) if enough(middle) else (low, middle)
    return low


# Offspring -----------------------------------------------------------------------------------------------------------


def offspring(log_weights: ArrayLike, rng: Generator, scheme: Scheme = "ssp", count: int | None = None) -> Counts:
    """Numbers of offspring (N,) of particles with log weights (N,): E[n_k] = count * W_k, and `count` in all.

    A dead particle has none, whatever the rounding.

    Args:
      count: offspring wanted, at least 1; None takes N.

    Raises:
      UsageError: for an unknown scheme, a count below 1, and as `normalise`.
    """
    if scheme not in SCHEMES:
        raise unknown_name("resampling scheme", scheme, SCHEMES)
    weights = normalise(log_weights)
    wanted = len(weights) if count is None else count
    if wanted < 1:
        raise UsageError(f"count is {wanted} but resampling makes at least 1 offspring")
    alive = np.flatnonzero(weights > 0.0)
    counts = np.zeros(len(weights), dtype=np.int64)
    counts[alive] = SCHEMES[scheme](weights[alive], wanted, rng)
    return counts


def ancestors(counts: Counts) -> list[int]:
    """The parent of each offspring, in the order of the particles."""
    parents: list[int] = np.repeat(np.arange(len(counts)), counts).tolist()
    return parents


def _multinomial(weights: Floats, count: int, rng: Generator) -> Counts:
    return _draws(weights, count, rng)


def _residual(weights: Floats, count: int, rng: Generator) -> Counts:
    counts, open_, remainders, left = _whole_parts(weights, count)
    if left:
        counts[open_] += _draws(remainders, left, rng)
    return counts


def _systematic(weights: Floats, count: int, rng: Generator) -> Counts:
    # Whole parts shift the grid of points by whole numbers, so they can be set aside first; then nothing is lost to rounding.
    counts, open_, remainders, left = _whole_parts(weights, count)
    if left:
        edges = np.minimum(np.cumsum(remainders), left)
        edges[-1] = left
        below = np.ceil(edges - rng.random()).astype(np.int64)  # points i + u below each edge
        counts[open_] += np.diff(below, prepend=0)
    return counts


def _ssp(weights: Floats, count: int, rng: Generator) -> Counts:
    counts, open_, remainders, left = _whole_parts(weights, count)
    if not left:
        return counts
    holder, held = open_[0], float(remainders[0])  # the particle whose remainder is still open, and the remainder
    for rival, other in zip(open_[1:].tolist(), remainders[1:].tolist(), strict=True):
        up, down = min(other, 1.0 - held), min(held, 1.0 - other)
        if rng.random() < down / (up + down):  # mass `up` goes from the rival to the holder
            if other <= 1.0 - held:  # the rival is left with nothing
                held += up
                continue
            counts[holder] += 1
            left -= 1
            holder, held = rival, other - up
        elif held <= 1.0 - other:  # the holder gives all it has
            holder, held = rival, other + down
        else:  # the rival is full
            counts[rival] += 1
            left -= 1
            held -= down
    counts[holder] += left  # 0 or 1: what is open last makes the total right
    return counts


SCHEMES: dict[str, Callable[[Floats, int, Generator], Counts]] = {
    "multinomial": _multinomial,
    "residual": _residual,
    "systematic": _systematic,
    "ssp": _ssp,
}


def _draws(weights: Floats, count: int, rng: Generator) -> Counts:
    """Independent draws by the inverse distribution function; `weights` are positive and need not add up to 1."""
    edges = np.cumsum(weights)
    places = np.searchsorted(edges, rng.random(count) * edges[-1], side="right")
    return np.bincount(np.minimum(places, len(weights) - 1), minlength=len(weights)).astype(np.int64)


def _whole_parts(weights: Floats, count: int) -> tuple[Counts, NDArray[np.intp], Floats, int]:
    """Floors of the expected offspring, the particles with a remainder, their remainders, and how many are left to give."""
    expected = weights * count
    nearest = np.rint(expected)
    expected = np.where(np.abs(expected - nearest) < WHOLE, nearest, expected)
    counts = np.floor(expected).astype(np.int64)
    open_ = np.flatnonzero(expected > counts)
    return counts, open_, expected[open_] - counts[open_], count - int(counts.sum())


def _checked(log_weights: ArrayLike) -> Floats:
    logs = np.asarray(log_weights, dtype=np.float64)
    if logs.ndim != 1 or not len(logs):
        raise UsageError(f"log weights have shape {logs.shape} but must be one number for each of at least one particle")
    if np.isnan(logs).any() or (logs == math.inf).any():
        raise UsageError(f"log weight {int(np.flatnonzero(~(logs < math.inf))[0])} is {logs[~(logs < math.inf)][0]} but must be a number below +inf")
    return logs


def _relative(log_weights: ArrayLike) -> Floats:
    """Weights as multiples of the largest."""
    logs = _checked(log_weights)
    peak = logs.max()
    if peak == -math.inf:
        raise UsageError(f"all {len(logs)} log weights are -inf: no particle is left to choose")
    unit: Floats = np.exp(logs - peak)
    return unit
