"""Which runs belong together in a plot, what they are called there, and means over them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tsdiff.treesearch.errors import UsageError

if TYPE_CHECKING:
    from tsdiff.treesearch.saved import SavedRun

CONFIDENCE = 0.95

MOST_FAMILIES = 7
"""Of one plot: there are no more colours that everybody tells apart."""


@dataclass(frozen=True)
class Series:
    """Runs that differ in their prompts and seeds only.

    Attributes:
      family: the policy's name, with whatever tells it from others; series of one family differ in their budgets.
      budget: NFE; None for none.
      label: the family, with the budget where there are several.
      runs: in the order that they were given.
    """

    family: str
    budget: int | None
    label: str
    runs: tuple[SavedRun, ...]

    def units(self) -> list[list[int]]:
        """The runs by place, in groups that were drawn independently: prompts where there are several, else seeds."""
        by_prompt = len({run.prompt for run in self.runs}) > 1
        groups: dict[Any, list[int]] = {}
        for place, run in enumerate(self.runs):
            groups.setdefault(run.prompt if by_prompt else run.seed, []).append(place)
        return list(groups.values())

    @property
    def unit(self) -> str:
        """What an interval goes over: "prompts" or "seeds"."""
        return "prompts" if len({run.prompt for run in self.runs}) > 1 else "seeds"


@dataclass(frozen=True)
class Curve:
    """A mean with its interval.

    Attributes:
      family, label: of the series.
      units: how many prompts or seeds it is a mean of; `unit` is the word.
      x, mean: the points.
      low, high: the interval of the mean; equal to it where there is one unit.
    """

    family: str
    label: str
    units: int
    unit: str
    x: tuple[float, ...]
    mean: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]

    def to_json(self) -> dict[str, Any]:
        """Strict JSON."""
        return {"label": self.label, "units": self.units, "unit": self.unit, "x": list(self.x), "mean": list(self.mean), "low": list(self.low), "high": list(self.high)}


def interval(values: Sequence[float]) -> tuple[float, float, float]:
    """The mean of one number a unit, and the bounds of its 95 % interval: Student's t, which is exact for normal numbers."""
    count = len(values)
    mean = sum(values) / count
    if count < 2:
        return mean, mean, mean
    from scipy.special import stdtrit

    spread = (sum((value - mean) ** 2 for value in values) / (count - 1)) ** 0.5
    reach = float(stdtrit(count - 1, 0.5 + CONFIDENCE / 2)) * spread / count**0.5
    return mean, mean - reach, mean + reach


def steering(runs: Sequence[SavedRun], verifier: str | None) -> str:
    """The verifier whose scores are plotted: the one that steered all runs, or one that is named.

    Raises:
      UsageError: if runs were steered by different ones and none is named, or none of them was scored by it.
    """
    names = sorted({run.verifier for run in runs if run.verifier})
    if verifier is not None:
        known = sorted({key for run in runs for node in run.nodes for key in node.values})
        if verifier not in known:
            raise UsageError(f"no node has a score by {verifier!r}; there are scores by {', '.join(known) or 'nobody'}")
        return verifier
    if len(names) > 1:
        raise UsageError(f"the runs are steered by different verifiers ({', '.join(names)}), whose scores cannot be compared; name one with --verifier, or give the runs of one")
    if not names:
        raise UsageError("no run says which verifier steers it")
    return names[0]


def in_series(runs: Sequence[SavedRun]) -> list[Series]:
    """Runs by policy, and by whatever else they differ in but prompts and seeds; of one family, the smallest budget first.

    Raises:
      UsageError: if there are more than `MOST_FAMILIES`.
    """
    facts: dict[str, dict[str, Any]] = {}
    groups: dict[str, dict[int | None, list[SavedRun]]] = {}
    for run in runs:
        about = setting(run)
        key = json.dumps(about, sort_keys=True)
        facts[key] = about
        groups.setdefault(key, {}).setdefault(_budget(run), []).append(run)
    if len(groups) > MOST_FAMILIES:
        raise UsageError(f"the runs are of {len(groups)} different searches ({', '.join(sorted({run.policy for run in runs}))}); a plot shows {MOST_FAMILIES}: give fewer")
    found = []
    for family, budgets in zip(distinct(list(facts.values())), groups.values(), strict=True):
        for budget in sorted(budgets, key=lambda one: (one is not None, one or 0)):
            said = "" if len(budgets) == 1 else ", no budget" if budget is None else f", {budget:,} NFE"
            found.append(Series(family, budget, family + said, tuple(budgets[budget])))
    return found


def _budget(run: SavedRun) -> int | None:
    budget = run.options.get("nfe_budget")
    return budget if isinstance(budget, int) else None


def setting(run: SavedRun) -> dict[str, Any]:
    """What tells a run from another beside prompt, seed and budget, the most telling first.

    Parameters of a policy that were fitted to a budget are not told: the budget stands for them.
    """
    options, arguments = run.options, run.arguments
    policy, given = options.get("policy"), arguments.get("policy_options") or {}
    parameters = {name: value for name, value in policy.items() if name != "name"} if isinstance(policy, Mapping) else {}
    if _budget(run) is not None and isinstance(given, Mapping) and isinstance(arguments.get("policy", ""), str):
        parameters = {name: parameters.get(name, value) for name, value in given.items()}
    return {
        "policy": run.policy or "unknown policy",
        "model": run.model,
        "verifier": run.verifier,
        "solver": options.get("solver"),
        "steps": options.get("steps"),
        **parameters,
    }


def distinct(facts: Sequence[Mapping[str, Any]]) -> list[str]:
    """A label for each: the policy's name, and of the other facts as many as it takes to tell them apart."""
    labels = [str(about["policy"]) for about in facts]
    for name in dict.fromkeys(name for about in facts for name in about if name != "policy"):
        alike: dict[str, list[int]] = {}
        for place, label in enumerate(labels):
            alike.setdefault(label, []).append(place)
        for places in alike.values():
            values = [facts[place].get(name) for place in places]
            if len({json.dumps(value, sort_keys=True) for value in values}) > 1:
                for place, value in zip(places, values, strict=True):
                    labels[place] += f", {_said(name, value)}"
    return labels


def _said(name: str, value: Any) -> str:
    if name == "steps":
        return f"{value} steps"
    return str(value) if name in ("model", "verifier", "solver") else f"{name} {value}"


def averaged(series: Series, x: Sequence[float], value: Callable[[int, float], float | None]) -> Curve:
    """Means over units at each x, where every run of the series has a value; a unit of several runs counts as their mean."""
    units = series.units()
    found: list[tuple[float, float, float, float]] = []
    for at in x:
        numbers = [[value(place, at) for place in unit] for unit in units]
        if all(one is not None for unit in numbers for one in unit):
            found.append((at, *interval([sum(unit) / len(unit) for unit in numbers])))  # type: ignore[arg-type]
    columns: Iterable[tuple[float, ...]] = zip(*found, strict=True) if found else ((), (), (), ())
    return Curve(series.family, series.label, len(units), series.unit, *columns)
