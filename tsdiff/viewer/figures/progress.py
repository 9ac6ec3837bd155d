"""The best score so far against what it has cost: mean and 95 % interval over prompts or seeds, a curve for each search."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tsdiff.treesearch.errors import UsageError
from tsdiff.viewer.figures.layout import thinned
from tsdiff.viewer.figures.lettering import plain
from tsdiff.viewer.figures.paper import (
    COLUMN,
    DASHES,
    MARKERS,
    SERIES,
    add_legend,
    add_note,
    drawing,
    legend_room,
    new_figure,
    plot_axes,
    write_figure,
)
from tsdiff.viewer.figures.series import Curve, Series, averaged, in_series, steering
from tsdiff.viewer.records import finished
from tsdiff.viewer.spending import Spending

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from tsdiff.treesearch.saved import SavedRun

AXES = {"nfe": "network evaluations (NFE)", "rows": "network rows", "seconds": "seconds, spread over NFE"}

MOST_POINTS = 500


@dataclass(frozen=True)
class Steps:
    """The best score so far of one run: from x[i] on it is y[i], up to `end`, and stays so."""

    x: tuple[float, ...]
    y: tuple[float, ...]
    end: float

    def at(self, x: float) -> float | None:
        """The best score when so much was spent; None before the first."""
        place = bisect_right(self.x, x)
        return self.y[place - 1] if place else None


def steps(run: SavedRun, verifier: str, axis: str) -> Steps | None:
    """The best score so far of the finished samples of a run, from its journal; None where that cannot be told.

    Args:
      axis: "nfe", "rows", or "seconds": the wall time of a run that is done, spread evenly over its NFE, since a run does
        not keep the time of each step.
    """
    tree, spending = run.tree, Spending(run.path)
    spending.refresh()
    end = run.ledger["nfe"]
    if len(spending.made) != len(tree.nodes) or (axis == "seconds" and (run.seconds is None or not end)):
        return None
    place = {
        "nfe": float,
        "rows": lambda nfe: float(spending.rows[nfe]),
        "seconds": lambda nfe: (run.seconds or 0.0) * nfe / end,
    }[axis]
    x: list[float] = []
    y: list[float] = []
    for nfe, index, key, score in spending.scored:
        if key == verifier and index < len(tree.nodes) and finished(tree, tree.nodes[index]) and (not y or score > y[-1]):
            at = place(nfe)
            if x and x[-1] == at:  # of those that came at once, the best
                y[-1] = score
            else:
                x.append(at)
                y.append(score)
    last = {"nfe": float(end), "rows": float(run.ledger["rows"]), "seconds": run.seconds or 0.0}[axis]
    return Steps(tuple(x), tuple(y), last) if x else None


def progress(runs: Sequence[SavedRun], axis: str = "nfe", verifier: str | None = None) -> tuple[list[Curve], list[str]]:
    """A curve for each series, and a line for each thing that is left out.

    A curve begins where every run of it has its first sample, and goes on to the end of the longest: a search that has
    ended keeps its best.

    Raises:
      UsageError: if no run has anything to show, or as `steering` and `in_series` do.
    """
    name = steering(runs, verifier)
    told: dict[int, Steps] = {}
    notices = []
    for run in runs:
        found = steps(run, name, axis)
        if found is not None:
            told[id(run)] = found
        else:
            why = "its wall time is known when it is done" if axis == "seconds" and run.seconds is None else "no sample is scored, or its journal is not whole"
            notices.append(f"left out: {run.path} ({why})")
    kept = [run for run in runs if id(run) in told]
    if not kept:
        raise UsageError(f"none of {len(runs)} runs has a curve to show: {notices[0].removeprefix('left out: ')}")
    if any(run.relative for run in kept):
        notices.append("scores are relative to the samples of each search: they say how it ranked them, not how searches compare")
    return [_curve(series, [told[id(run)] for run in series.runs]) for series in in_series(kept)], notices


def _curve(series: Series, told: list[Steps]) -> Curve:
    start = max(one.x[0] for one in told)
    places = sorted({x for one in told for x in (*one.x, one.end) if x >= start})
    return averaged(series, thinned(places, MOST_POINTS), lambda run, x: told[run].at(x))


def write_progress(curves: Sequence[Curve], path: Path, axis: str, verifier: str) -> None:
    """Write the plot. Raises UsageError, SetupError if it cannot be written, or matplotlib is missing."""
    with drawing():
        write_figure(progress_figure(curves, axis, verifier), path)


def progress_figure(curves: Sequence[Curve], axis: str, verifier: str) -> Figure:
    """The plot. Call within `drawing`.

    A mark stands where a series ends. Those of one family, which differ in their budgets, are joined: what more budget brings.
    """
    families = list(dict.fromkeys(curve.family for curve in curves))
    labels = [caption(family, [curve for curve in curves if curve.family == family]) for family in families]
    room = legend_room(labels)
    figure = new_figure(COLUMN, 2.5 + room)
    axes = plot_axes(figure, AXES[axis], f"best score so far ({plain(verifier, 30)})", top=0.08 + room, bottom=0.5)
    handles = []
    for place, family in enumerate(families):
        colour, dash, marker = SERIES[place], DASHES[place], MARKERS[place]
        members = [curve for curve in curves if curve.family == family and curve.x]
        for curve in members:
            axes.fill_between(curve.x, curve.low, curve.high, step="post", color=colour, alpha=0.16, linewidth=0, zorder=1.5)
            axes.plot(curve.x, curve.mean, drawstyle="steps-post", color=colour, linestyle=dash, linewidth=1.2 if len(members) == 1 else 0.7, zorder=2, gid=f"curve-{place}")
        ends = sorted((curve.x[-1], curve.mean[-1], curve.low[-1], curve.high[-1]) for curve in members)
        x, mean, low, high = zip(*ends, strict=True)
        reach = [[middle - end for middle, end in zip(mean, low, strict=True)], [end - middle for middle, end in zip(mean, high, strict=True)]]
        handles.append(axes.errorbar(
            x, mean, yerr=reach, color=colour, linestyle=dash, linewidth=1.2, elinewidth=0.8, capsize=1.6, marker=marker, markersize=4.0, markeredgecolor="white",
            markeredgewidth=0.5, zorder=3, clip_on=False,
        ))  # fmt: skip
    axes.set_xlim(0.0, max(curve.x[-1] for curve in curves if curve.x) * 1.03)
    add_legend(axes, handles, labels)
    if any(curve.units > 1 for curve in curves):
        add_note(figure, "means with 95 % intervals")
    return figure


def caption(name: str, curves: Sequence[Curve]) -> str:
    """What a legend says of some curves: their name, and how many prompts or seeds they are means of."""
    counts, unit = sorted({curve.units for curve in curves}), curves[0].unit
    units = str(counts[0]) if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    return f"{plain(name, 48)} ({units} {unit if counts[-1] > 1 else unit[:-1]})"
