"""Rules that make one score of several: s_ij is the score of candidate i of N under member j of M, higher is better.

    rank, pareto                scope "set": places among the candidates of one request; no number outlives its set
    weighted                    scope "row": the scores themselves
    zscore, minimum, quantile   scope "row": places among plain samples of the same level (see `ensemble_tables`);
                                zscore and minimum also among the candidates of one request (over=set)

A failed score is NaN. Rules that compare put it last; rules that compute with it have no number for that row.
"""

from __future__ import annotations

import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np

from tsdiff.treesearch.errors import UsageError, unknown_name
from tsdiff.treesearch.parameters import build, check, parameter
from tsdiff.treesearch.registry import split_options, split_reference
from tsdiff.verifiers.ensemble_tables import Calibration

if TYPE_CHECKING:
    from torch import Tensor

    Array = np.ndarray[Any, np.dtype[np.float64]]


@dataclass(frozen=True, kw_only=True)
class Rule(ABC):
    """How members' scores become one.

    Attributes:
      name: as typed.
      differentiable: whether gradients flow from the members' scores.
    """

    name: ClassVar[str]
    differentiable: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check(self)
        weights = getattr(self, "weights", ())
        if weights and not any(weights):
            raise UsageError(f"{self.name}: weights are all 0; give at least one that is not")

    @property
    def scope(self) -> Literal["row", "set"]:
        """Whether a candidate's score depends on the other candidates."""
        return "row"

    @property
    def calibrated(self) -> bool:
        """Whether scores are compared with those of plain samples."""
        return False

    @property
    def num_weights(self) -> int:
        """How many members the weights are for, 0 for any number."""
        return len(getattr(self, "weights", ()))

    @abstractmethod
    def combine(self, scores: Tensor, levels: Sequence[int], calibration: Calibration | None) -> Tensor:
        """Scores (N,) of members' scores (N, M), float64 on the CPU; NaN where there is none."""


def _weights_field(what: str) -> Any:
    return parameter((), low=0.0, help=f"of the members, in their order; {what}; none given are equal")


@dataclass(frozen=True, kw_only=True)
class _Placed(Rule):
    """A rule that may compare with plain samples."""

    samples: int = parameter(32, low=2, help="plain samples to compare with, of all prompts together")
    levels: int = parameter(8, low=0, help="levels at which they are scored, evenly spread, T among them; 0 is all; tables are interpolated in between")


def _mean(scores: Tensor, weights: Sequence[float]) -> Tensor:
    """Weighted mean over members (N,)."""
    if not weights:
        return scores.mean(1)
    column = scores.new_tensor(list(weights))
    return (scores * column).sum(1) / column.sum()


# Among the candidates of one set -------------------------------------------------------------------------------------


def average_ranks(scores: Array) -> Array:
    """Ranks (N,), 1 for the highest; equal scores share the mean of their ranks, failed ones the last."""
    _, group, counts = np.unique(-np.where(np.isnan(scores), -np.inf, scores), return_inverse=True, return_counts=True)
    ranks: Array = (np.cumsum(counts) - (counts - 1) / 2.0)[group]
    return ranks


def standard_in_set(scores: Tensor) -> Tensor:
    """Standard scores (N, M) among the candidates that have one; 0 where all of them are equal but for rounding."""
    import torch

    known = ~scores.isnan()
    count = known.sum(0).clamp(min=1)
    filled = torch.where(known, scores, torch.zeros_like(scores))
    centred = scores - filled.sum(0) / count
    spread = (torch.where(known, centred, torch.zeros_like(scores)).square().sum(0) / count).sqrt()
    constant = spread.detach() <= 1e-12 * filled.detach().abs().amax(0)
    return torch.where(constant, 0.0 * scores, centred / torch.where(constant, torch.ones_like(spread), spread))


TIE = 1e-9
"""How far apart tied candidates are set at most, so that the better standard scores come first."""


def break_ties(values: Array, second: Array) -> Array:
    """Values (N,), those that are equal set apart by less than `TIE`: the higher `second`, the less is taken away."""
    apart = values.copy()
    for value in np.unique(values):
        tied = np.flatnonzero(values == value)
        _, order = np.unique(-second[tied], return_inverse=True)
        apart[tied] -= TIE * order / len(tied)
    return apart


@dataclass(frozen=True, kw_only=True)
class Rank(Rule):
    """The mean rank under the members, as a share of candidates beaten: 1 for the best by all, 0 for the worst by all.

    R_i = sum_j w_j r_ij / sum_j w_j, score (N - R_i) / (N - 1), ties in r sharing their mean rank; N = 1 scores 1. Equal
    R_i are set apart by less than 1e-9, higher standard scores first. The "verifier ensemble" of Ma et al. 2025
    (arXiv 2501.09732); a Borda count.
    """

    name: ClassVar[str] = "rank"

    weights: tuple[float, ...] = _weights_field("how much each rank counts")

    @property
    def scope(self) -> Literal["row", "set"]:
        """Ranks are among the candidates of one request."""
        return "set"

    def combine(self, scores: Tensor, levels: Sequence[int], calibration: Calibration | None) -> Tensor:
        """Shares beaten (N,)."""
        table = scores.detach().numpy()
        if len(table) == 1:
            return scores.new_ones(1)
        weights = np.asarray(self.weights or [1.0] * table.shape[1])
        # Rounded, so that sums of the same ranks in another order are the same number.
        mean = np.round(np.stack([average_ranks(column) for column in table.T], axis=1) @ weights / weights.sum(), 6)
        utility = (len(table) - mean) / (len(table) - 1)
        standard = np.nan_to_num(standard_in_set(scores.detach()).numpy(), nan=-1e9) @ weights
        return scores.new_tensor(break_ties(utility, np.round(standard, 9)))


def fronts(scores: Array) -> Array:
    """The non-dominated front (N,) of each candidate: 0 for those that none dominates, 1 once these are taken away, ...

    i dominates k if s_ij >= s_kj for all members j and s_ij > s_kj for one.
    """
    as_good = (scores[:, None, :] >= scores[None, :, :]).all(2)
    dominates = as_good & ~as_good.T
    front = np.full(len(scores), -1)
    number = 0
    while (front < 0).any():
        left = front < 0
        front[left & ~dominates[left].any(0)] = number
        number += 1
    return front


def crowding(scores: Array) -> Array:
    """Crowding distance (N,) within one front: over members, the gap between the next lower and the next higher score.

    Gaps are shares of the front's range; the lowest and the highest have an infinite one. Equal candidates have equal
    distances, so that the order of candidates does not matter.
    """
    distance = np.zeros(len(scores))
    for column in scores.T:
        values, group = np.unique(column, return_inverse=True)
        if len(values) > 1:
            gaps = np.full(len(values), np.inf)
            gaps[1:-1] = (values[2:] - values[:-2]) / (values[-1] - values[0])
            distance += gaps[group]
    return distance


@dataclass(frozen=True, kw_only=True)
class Pareto(Rule):
    """Non-dominated sorting: minus the number of the candidate's front, and within a front the less crowded first.

    Score = -front + d / (2 (1 + d)), d the crowding distance: in [0, 1/2] for those that no other candidate beats under
    every member. Deb et al. 2002, "A fast and elitist multiobjective genetic algorithm: NSGA-II". With four members or
    more hardly anybody is dominated, and the crowding decides: use two or three.
    """

    name: ClassVar[str] = "pareto"

    @property
    def scope(self) -> Literal["row", "set"]:
        """Dominance is among the candidates of one request."""
        return "set"

    def combine(self, scores: Tensor, levels: Sequence[int], calibration: Calibration | None) -> Tensor:
        """Minus the front, plus at most one half (N,)."""
        known = scores.detach().numpy()
        # A failed score is beaten by every other: by one that is lower than all, and finite so that gaps are.
        lowest = np.nanmin(np.where(np.isnan(known).all(0), 0.0, known), axis=0)
        highest = np.nanmax(np.where(np.isnan(known).all(0), 0.0, known), axis=0)
        table = np.where(np.isnan(known), lowest - np.maximum(highest - lowest, 1.0), known)
        front = fronts(table)
        values = -front.astype(float)
        for number in range(int(front.max()) + 1):
            members = np.flatnonzero(front == number)
            distance = crowding(table[members])
            with np.errstate(invalid="ignore"):
                values[members] += np.where(np.isinf(distance), 0.5, 0.5 * distance / (1.0 + distance))
        return scores.new_tensor(values)


# Row by row ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Weighted(Rule):
    """The weighted sum of the scores themselves, sum_j w_j s_ij: for scores whose scales are known.

    The rewards of ReNO (Eyring et al. 2024, arXiv 2406.04312) have weights 5, 1, 0.05 and 0.01. Weights may be negative.
    """

    name: ClassVar[str] = "weighted"
    differentiable: ClassVar[bool] = True

    weights: tuple[float, ...] = parameter((), help="of the members, in their order; none given are 1")

    def combine(self, scores: Tensor, levels: Sequence[int], calibration: Calibration | None) -> Tensor:
        """Sums (N,)."""
        return scores.sum(1) if not self.weights else (scores * scores.new_tensor(list(self.weights))).sum(1)


@dataclass(frozen=True, kw_only=True)
class _Standard(_Placed):
    """A rule on standard scores."""

    differentiable: ClassVar[bool] = True

    over: Literal["base", "set"] = parameter("base", help="standard scores among plain samples of the same level, or among the candidates of one request")

    @property
    def scope(self) -> Literal["row", "set"]:
        """ "row" among plain samples."""
        return "row" if self.over == "base" else "set"

    @property
    def calibrated(self) -> bool:
        """Among plain samples."""
        return self.over == "base"

    def standard(self, scores: Tensor, levels: Sequence[int], calibration: Calibration | None) -> Tensor:
        """z (N, M)."""
        return standard_in_set(scores) if calibration is None else calibration.standard(scores, levels)


@dataclass(frozen=True, kw_only=True)
class ZScore(_Standard):
    """The weighted mean of standard scores z_ij = (s_ij - m_j) / sd_j, m and sd those of plain samples at that level.

    Scale-free, but one huge error of one member may decide (see `rank`, `minimum`).
    """

    name: ClassVar[str] = "zscore"

    weights: tuple[float, ...] = _weights_field("how much each standard score counts")

    def combine(self, scores: Tensor, levels: Sequence[int], calibration: Calibration | None) -> Tensor:
        """Means (N,)."""
        return _mean(self.standard(scores, levels, calibration), self.weights)


@dataclass(frozen=True, kw_only=True)
class Minimum(_Standard):
    """The worst standard score, min_j z_ij: a candidate is as good as its weakest side.

    With a sharpness b the soft minimum -(1/b) ln(mean_j exp(-b z_ij)): the mean as b goes to 0, the minimum as it grows.
    """

    name: ClassVar[str] = "minimum"

    sharpness: float | None = parameter(None, above=0.0, symbol="b", help="of a soft minimum, 1 to 10; none is the minimum itself")

    def combine(self, scores: Tensor, levels: Sequence[int], calibration: Calibration | None) -> Tensor:
        """Minima (N,)."""
        z = self.standard(scores, levels, calibration)
        if self.sharpness is None:
            return z.amin(1)  # NaN, if any is
        return -((-self.sharpness * z).logsumexp(1) - math.log(z.shape[1])) / self.sharpness


@dataclass(frozen=True, kw_only=True)
class Quantile(_Placed):
    """The mean place among plain samples, u_ij = F_j(s_ij) in (0, 1), F_j their distribution at that level.

    A number that means the same at every level, in every set and for every member: for policies that back scores up or
    weight particles by them. 1/2 is as good as a typical plain sample; above the best of them it still grows.
    """

    name: ClassVar[str] = "quantile"
    differentiable: ClassVar[bool] = True

    combine_by: Literal["mean", "geometric", "minimum"] = parameter("mean", help="how the members' places become one")
    weights: tuple[float, ...] = _weights_field("how much each place counts (not for combine_by=minimum)")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.weights and self.combine_by == "minimum":
            raise UsageError("quantile: weights were given for combine_by=minimum, which has none; leave them out")

    @property
    def calibrated(self) -> bool:
        """Always."""
        return True

    def combine(self, scores: Tensor, levels: Sequence[int], calibration: Calibration | None) -> Tensor:
        """Places (N,)."""
        assert calibration is not None
        places = calibration.quantile(scores, levels)
        match self.combine_by:
            case "minimum":
                return places.amin(1)
            case "geometric":
                return _mean(places.log(), self.weights).exp()
        return _mean(places, self.weights)


RULES: Mapping[str, type[Rule]] = {rule.name: rule for rule in (Rank, ZScore, Weighted, Minimum, Quantile, Pareto)}


def make_rule(rule: str | Rule, options: Mapping[str, str] | None = None) -> Rule:
    """A rule from "rank" or "weighted:weights=2,1", or from a name and parameters; a rule is passed on.

    Raises:
      UsageError: for an unknown rule or parameter, or a value out of range.
    """
    if isinstance(rule, Rule):
        return rule
    if not isinstance(rule, str):
        raise UsageError(f"ensemble rule {rule!r} must be one of {', '.join(RULES)}, with its parameters after a colon")
    name, rest = split_reference(rule)
    if name not in RULES:
        raise unknown_name("ensemble rule", name, RULES, "`tsdiff describe ensemble` explains them.")
    given = split_options(rest) | dict(options or {})
    known = [item.name for item in dataclasses.fields(RULES[name])]
    for key in given:
        if key not in known:
            raise unknown_name(f"parameter of the ensemble rule {name}", key, known, "`tsdiff describe ensemble` explains them.")
    return build(RULES[name], given)
