"""Calibration: how a verifier's scores of plain samples are distributed, level by level.

A table turns a score into its place among those of plain samples at the same level: a quantile or a standard score. Both
mean the same at every level and for every verifier, so that they can be averaged, and backed up through a tree.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from tsdiff.treesearch.errors import UsageError
from tsdiff.treesearch.schedule import Schedule

if TYPE_CHECKING:
    from torch import Tensor

LEAST_SCORES = 2
"""Scores that a table needs at least."""


@dataclass(frozen=True)
class Table:
    """The distribution of n plain samples' scores under one verifier at one level.

    Args:
      scores: finite, in any order, at least `LEAST_SCORES`.
    """

    scores: tuple[float, ...]

    def __post_init__(self) -> None:
        if len(self.scores) < LEAST_SCORES or not all(map(math.isfinite, self.scores)):
            raise UsageError(f"a calibration table needs at least {LEAST_SCORES} finite scores, not {list(self.scores)[:4]}")
        object.__setattr__(self, "scores", tuple(sorted(self.scores)))

    @cached_property
    def mean(self) -> float:
        """Of the scores."""
        return math.fsum(self.scores) / len(self.scores)

    @cached_property
    def std(self) -> float:
        """Of the scores (the square root of the mean squared deviation)."""
        return math.sqrt(math.fsum((score - self.mean) ** 2 for score in self.scores) / len(self.scores))

    @property
    def unit(self) -> float:
        """What distances are measured in: the standard deviation, or 1 where all scores are equal but for rounding."""
        return self.std if self.std > 1e-12 * max(abs(self.scores[0]), abs(self.scores[-1])) else 1.0

    @cached_property
    def steps(self) -> tuple[list[float], list[float]]:
        """Different scores in ascending order, and of each the share of scores below it, ties counted as half below."""
        values, counts = np.unique(np.asarray(self.scores), return_counts=True)
        shares = (np.cumsum(counts) - 0.5 * counts) / len(self.scores)
        return values.tolist(), shares.tolist()

    def standard(self, scores: Tensor) -> Tensor:
        """Standard scores (B,): distance from the mean, in standard deviations."""
        return (scores - self.mean) / self.unit

    def quantile(self, scores: Tensor) -> Tensor:
        """Places (B,) among the plain samples, in (0, 1): the k-th of n samples itself is at (k - 1/2) / n.

        Linear in between. Beyond the lowest and the highest the rest of the probability falls off exponentially, by a
        factor e for each standard deviation, so that of two samples better than all plain ones the better is higher.
        """
        import torch

        values, shares = (scores.new_tensor(column) for column in self.steps)
        low = shares[0] * torch.exp(((scores - values[0]) / self.unit).clamp(max=0.0))
        high = 1.0 - (1.0 - shares[-1]) * torch.exp(((values[-1] - scores) / self.unit).clamp(max=0.0))
        right = torch.searchsorted(values, scores.detach().contiguous()).clamp(1, max(len(values) - 1, 1))
        if len(values) == 1:
            inner = shares[0] + 0.0 * scores
        else:
            left = right - 1
            share = (scores - values[left]) / (values[right] - values[left])
            inner = torch.minimum(shares[left] + share * (shares[right] - shares[left]), shares[right])
        return torch.where(scores < values[0], low, torch.where(scores > values[-1], high, inner))


def between(left: Table, right: Table, share: float) -> Table:
    """The table a share of the way from one level to another: the k-th score lies between the k-th scores of both."""
    count = max(len(left.scores), len(right.scores))
    places = (np.arange(count) + 0.5) / count

    def spread(table: Table) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
        own = (np.arange(len(table.scores)) + 0.5) / len(table.scores)
        return np.interp(places, own, np.asarray(table.scores))

    return Table(tuple(((1.0 - share) * spread(left) + share * spread(right)).tolist()))


class Tables:
    """A verifier's tables by level, those between two of them interpolated.

    Args:
      name: of the verifier.
      scores: of plain samples, by level; failed ones are left out, and levels with too few have no table.
    """

    def __init__(self, name: str, scores: Mapping[int, Sequence[float]]) -> None:
        self.name = name
        self._made = {level: Table(tuple(column)) for level, column in sorted(scores.items()) if len(column) >= LEAST_SCORES}
        self._between: dict[int, Table] = {}

    def at(self, level: int) -> Table | None:
        """The table of a level; None before the first level whose plain samples could be scored, and past the last."""
        if level in self._made or level in self._between:
            return self._made.get(level) or self._between[level]
        left = max((known for known in self._made if known < level), default=None)
        right = min((known for known in self._made if known > level), default=None)
        if left is None or right is None:
            return None
        self._between[level] = between(self._made[left], self._made[right], (level - left) / (right - left))
        return self._between[level]


class Calibration:
    """The tables of several verifiers on one schedule.

    Args:
      schedule: whose levels the tables belong to.
      scores: of plain samples, by verifier and level.
    """

    def __init__(self, schedule: Schedule, scores: Mapping[str, Mapping[int, Sequence[float]]]) -> None:
        self.key = schedule.key
        self.tables = [Tables(name, columns) for name, columns in scores.items()]

    def standard(self, scores: Tensor, levels: Sequence[int]) -> Tensor:
        """Standard scores (B, M) of scores (B, M); NaN where a level has no table."""
        return self._mapped(scores, levels, Table.standard)

    def quantile(self, scores: Tensor, levels: Sequence[int]) -> Tensor:
        """Quantiles (B, M) of scores (B, M); NaN where a level has no table."""
        return self._mapped(scores, levels, Table.quantile)

    def missing(self, level: int) -> list[str]:
        """The verifiers that have no table for a level."""
        return [tables.name for tables in self.tables if tables.at(level) is None]

    def _mapped(self, scores: Tensor, levels: Sequence[int], place: Callable[[Table, Tensor], Tensor]) -> Tensor:
        mapped = scores.new_full(scores.shape, math.nan)
        for level in dict.fromkeys(levels):
            rows = [row for row, own in enumerate(levels) if own == level]
            for column, tables in enumerate(self.tables):
                table = tables.at(level)
                if table is not None:
                    mapped[rows, column] = place(table, scores[rows, column])
        return mapped
