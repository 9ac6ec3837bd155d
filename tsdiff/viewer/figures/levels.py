"""Scores by level: what verifiers say of nodes on the way, from noise to clean."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
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
from tsdiff.viewer.figures.progress import caption
from tsdiff.viewer.figures.series import Curve, Series, averaged, in_series, steering
from tsdiff.viewer.records import scores

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from tsdiff.treesearch.saved import SavedRun

MOST_DOTS = 5000


Dots = list[tuple[float, float]]


def levels(runs: Sequence[SavedRun], verifier: str | None = None) -> tuple[list[Curve], list[Dots], list[str]]:
    """For each series a curve of mean scores by level, its nodes as (level, score), and a line for each thing left out.

    Levels are the schedule's where all runs have as many of them, else shares of the way, 0 to 1. A level belongs to a curve
    if every run of the series has a score there.

    Raises:
      UsageError: if no run has a score, or as `steering` and `in_series` do.
    """
    name = steering(runs, verifier)
    scale = {id(run): 1.0 / max(run.tree.last, 1) if in_shares(runs) else 1.0 for run in runs}
    told = {id(run): [(node.level * scale[id(run)], score) for node in run.nodes if (score := scores(node).get(name)) is not None] for run in runs}
    kept = [run for run in runs if told[id(run)]]
    notices = [f"left out: {run.path} (none of its nodes has a score by {name})" for run in runs if not told[id(run)]]
    if not kept:
        raise UsageError(f"none of {len(runs)} runs has a node with a score by {name!r}")
    if any(run.relative for run in kept):
        notices.append("scores are relative to the samples of each search: they say how it ranked them, not how searches compare")
    groups = in_series(kept)
    curves = [_curve(series, [told[id(run)] for run in series.runs]) for series in groups]
    dots = [[dot for run in series.runs for dot in told[id(run)]] for series in groups]
    count = sum(map(len, dots))
    if count > MOST_DOTS:
        dots = [thinned(group, max(2, MOST_DOTS * len(group) // count)) for group in dots]
        notices.append(f"{count - sum(map(len, dots)):,} of {count:,} dots are left out, evenly; means are of all")
    return curves, dots, notices


def in_shares(runs: Sequence[SavedRun]) -> bool:
    """Whether levels are shares of the way, since the runs do not have equally many."""
    return len({run.tree.last for run in runs}) > 1


def _curve(series: Series, told: list[Dots]) -> Curve:
    means: list[dict[float, float]] = []
    for dots in told:
        groups: dict[float, list[float]] = {}
        for level, score in dots:
            groups.setdefault(level, []).append(score)
        means.append({level: sum(found) / len(found) for level, found in groups.items()})
    return averaged(series, sorted({level for found in means for level in found}), lambda run, level: means[run].get(level))


def write_levels(curves: Sequence[Curve], dots: Sequence[Dots], path: Path, verifier: str, *, shares: bool) -> None:
    """Write the plot. Raises UsageError, SetupError if it cannot be written, or matplotlib is missing."""
    with drawing():
        write_figure(levels_figure(curves, dots, verifier, shares=shares), path)


def levels_figure(curves: Sequence[Curve], dots: Sequence[Dots], verifier: str, *, shares: bool) -> Figure:
    """The plot. Call within `drawing`."""
    labels = [caption(curve.label, [curve]) for curve in curves]
    room = legend_room(labels)
    figure = new_figure(COLUMN, 2.5 + room)
    axes = plot_axes(figure, "share of the way to clean" if shares else "level (0 is pure noise)", f"score ({plain(verifier, 30)})", top=0.08 + room, whole=not shares, bottom=0.5)
    handles = []
    widths = sorted({level for group in dots for level, _ in group})
    gap = min((after - before for before, after in pairwise(widths)), default=1.0)
    for place, (curve, group) in enumerate(zip(curves, dots, strict=True)):
        shift = gap * 0.16 * (place - (len(curves) - 1) / 2)  # side by side, so that none hides another
        colour = SERIES[place]
        axes.scatter([level + shift for level, _ in group], [score for _, score in group], s=3.5, color=colour, alpha=0.3, linewidths=0, gid=f"dots-{place}")
        reach = [[mean - low for mean, low in zip(curve.mean, curve.low, strict=True)], [high - mean for mean, high in zip(curve.mean, curve.high, strict=True)]]
        handles.append(axes.errorbar(
            [level + shift for level in curve.x], curve.mean, yerr=reach, color=colour, linestyle=DASHES[place], linewidth=1.2, elinewidth=0.9, capsize=1.6,
            marker=MARKERS[place], markersize=3.2, markeredgecolor="white", markeredgewidth=0.4,
        ))  # fmt: skip
    add_legend(axes, handles, labels)
    if any(curve.units > 1 for curve in curves):
        add_note(figure, "means with 95 % intervals")
    return figure
