"""The tree of a search as a figure for print: leaves side by side, levels from noise to clean, colours by score."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tsdiff.treesearch.savedtree import SavedNode
from tsdiff.viewer.figures.images import Pictures, answer_path, score_of, thumbnail
from tsdiff.viewer.figures.layout import Layout, most_telling, place, stepped_aside
from tsdiff.viewer.figures.lettering import plain, points
from tsdiff.viewer.figures.paper import (
    COLUMN,
    FAINT,
    INK,
    PAGE,
    POINTS,
    QUIET,
    Ranks,
    add_note,
    add_score_bar,
    drawing,
    new_figure,
    number,
    score_colours,
    stroke,
    write_figure,
)
from tsdiff.viewer.records import finished

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from tsdiff.treesearch.saved import SavedRun

MOST_NODES = 2000
"""Nodes that a figure shows: with more, marks are finer than print."""

MOST_THUMBNAILS = 60
THUMBNAIL = 23.0  # side in points
THUMBNAIL_PIXELS = 96

LEFT, RIGHT, TOP, BOTTOM = 0.42, 0.47, 0.43, 0.55  # margins in inches
SPACING = 0.075  # of leaves, in inches, where there is room


@dataclass
class Sheet:
    """What is drawn, and where: inches, and points of the data."""

    run: SavedRun
    layout: Layout
    path: list[SavedNode]
    ranks: Ranks
    width: float
    height: float
    strip: float

    @property
    def spacing(self) -> float:
        """Of leaves, in points."""
        return ((self.width - LEFT - RIGHT) * POINTS - THUMBNAIL) / max(self.layout.width, 1.0)


def write_tree(run: SavedRun, path: Path) -> list[str]:
    """Write the tree of a search as a figure, .png, .svg or .pdf; returns what was left out.

    Raises:
      UsageError, SetupError: if it cannot be written, or matplotlib is missing.
    """
    with drawing():
        figure, notices = tree_figure(run)
        write_figure(figure, path)
    return notices


def tree_figure(run: SavedRun, *, most: int = MOST_NODES) -> tuple[Figure, list[str]]:
    """The figure, and a line for each thing that it leaves out. Call within `drawing`."""
    shown = most_telling(run, most)
    layout = stepped_aside(place(shown))
    pictures = Pictures(run)
    scores = [score for node in shown if (score := score_of(run, node)) is not None]
    strip = THUMBNAIL + 5.0 if any(finished(run.tree, node) for node in pictures.nodes()) else 0.0
    width = min(PAGE, max(COLUMN, LEFT + RIGHT + THUMBNAIL / POINTS + layout.width * SPACING))
    rows = len({node.level for node in shown})
    height = TOP + BOTTOM + strip / POINTS + min(4.0, max(1.5, 0.28 * rows))
    sheet = Sheet(run, layout, answer_path(run), Ranks(scores), width, height, strip)
    figure = new_figure(width, height)
    axes = _axes(figure, sheet)
    _draw_edges(axes, sheet)
    _draw_nodes(axes, sheet)
    _draw_thumbnails(axes, sheet, pictures)
    _write_head(figure, sheet)
    _add_key(figure, sheet)
    notices = pictures.damaged
    if len(shown) < len(run.nodes):
        notices = [f"{len(run.nodes) - len(shown):,} of {len(run.nodes):,} nodes are left out, those that the lowest scores came of: a figure shows {most:,}", *notices]
        add_note(figure, f"{len(shown):,} of {len(run.nodes):,} nodes")
    return figure, notices


# The plane -----------------------------------------------------------------------------------------------------------


def _axes(figure: Figure, sheet: Sheet) -> Axes:
    """Axes whose x is a place in the layout and whose y is a level; beside the levels stand their noise scales."""
    tree, layout = sheet.run.tree, sheet.layout
    wide, high = sheet.width - LEFT - RIGHT, sheet.height - TOP - BOTTOM
    axes = figure.add_axes((LEFT / sheet.width, BOTTOM / sheet.height, wide / sheet.width, high / sheet.height))
    levels = sorted({node.level for node in layout.nodes}) or [0]
    top, bottom = levels[0], max(levels[-1], levels[0] + 1)
    above, below = 7.0, 6.0 + sheet.strip
    step = (bottom - top) / (high * POINTS - above - below)  # levels a point
    axes.autoscale(False)
    axes.set_ylim(bottom + below * step, top - above * step)
    aside = THUMBNAIL / 2 / (wide * POINTS - THUMBNAIL) * max(layout.width, 1.0)
    middle, half = layout.width / 2, max(layout.width, 1.0) / 2 + aside
    axes.set_xlim(middle - half, middle + half)
    ticks = _spread(levels, 9.0 * step)
    axes.set(xticks=[], yticks=ticks, ylabel="level (0 is pure noise)")
    axes.yaxis.set_label_coords(-0.25 / wide, 0.5)
    axes.set_yticklabels([str(level) for level in ticks])
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0, labelsize=6.5)
    for level in ticks:
        axes.axhline(level, color=FAINT, linewidth=0.5, zorder=0)
    if tree.schedule is not None:
        scales = axes.twinx()
        scales.set_ylim(axes.get_ylim())
        scales.set(yticks=ticks, ylabel="noise scale \u03c3")
        scales.set_yticklabels([number(tree.schedule.sigma[level], 2) for level in ticks])
        scales.yaxis.set_label_coords(1.0 + 0.31 / wide, 0.5)
        scales.spines[:].set_visible(False)
        scales.tick_params(length=0, labelsize=6.5, labelcolor=QUIET)
        scales.yaxis.label.set_color(QUIET)
    return axes


def _spread(levels: Sequence[int], apart: float) -> list[int]:
    """As many of the levels as can be written, the first and the last among them."""
    found = [levels[0]]
    for level in levels[1:-1]:
        if level - found[-1] >= apart and levels[-1] - level >= apart:
            found.append(level)
    return found if len(levels) == 1 else [*found, levels[-1]]


# Edges and nodes -----------------------------------------------------------------------------------------------------


def _draw_edges(axes: Axes, sheet: Sheet) -> None:
    """A line for each move; the way to the answer over all others."""
    from matplotlib.collections import LineCollection

    across, path = sheet.layout.across, {node.index for node in sheet.path}
    fine = min(0.9, max(0.25, sheet.spacing / 8.0))
    groups: dict[tuple[str, bool], list[Any]] = {}
    for node in sheet.layout.nodes:
        if node.parent is not None:
            line = [(across[node.parent.index], node.parent.level), (across[node.index], node.level)]
            groups.setdefault((node.move.kind, node.index in path), []).append(line)
    for (kind, chosen), lines in sorted(groups.items()):
        look = stroke(kind)
        if chosen:
            axes.add_collection(LineCollection(lines, colors="white", linewidths=3.6, zorder=2.9, capstyle="round"))
            axes.add_collection(LineCollection(lines, colors=INK, linewidths=1.7, linestyles=[look.dash], zorder=3, gid=f"answer-{kind}"))
        else:
            axes.add_collection(LineCollection(lines, colors=look.colour, linewidths=fine, linestyles=[look.dash], alpha=0.8, zorder=1, gid=f"edges-{kind}"))


MARKS = {"finished": "o", "estimate": "o", "unscored": "o", "draft": "D", "failed": "x"}


def _kind(sheet: Sheet, node: SavedNode) -> str:
    if node.failed:
        return "failed"
    if node.draft:
        return "draft"
    if score_of(sheet.run, node) is None:
        return "unscored"
    return "finished" if finished(sheet.run.tree, node) else "estimate"


def _draw_nodes(axes: Axes, sheet: Sheet) -> None:
    """A mark for each node, and a ring around the answer."""
    colours, across = score_colours(), sheet.layout.across
    side = min(5.0, max(1.2, sheet.spacing * 0.8))
    groups: dict[str, list[SavedNode]] = {}
    for node in sheet.layout.nodes:
        groups.setdefault(_kind(sheet, node), []).append(node)
    for kind, nodes in sorted(groups.items()):
        size = side * {"finished": 1.0, "estimate": 0.85, "unscored": 0.5, "draft": 0.7, "failed": 0.8}[kind]
        found = [score_of(sheet.run, node) for node in nodes]
        fills = ["white" if score is None else colours(sheet.ranks(score)) for score in found]
        edges: Any = {"unscored": QUIET, "failed": QUIET, "draft": QUIET, "estimate": "none", "finished": INK}[kind]
        axes.scatter(
            [across[node.index] for node in nodes], [node.level for node in nodes], s=size**2, marker=MARKS[kind], zorder={"finished": 4.0, "unscored": 3.3}.get(kind, 3.6),
            linewidths=min(0.6, size / 5), gid=f"nodes-{kind}", clip_on=False, **({"c": [QUIET]} if kind == "failed" else {"c": fills, "edgecolors": edges}),
        )  # fmt: skip
    if sheet.path:
        answer = sheet.path[-1]
        fill = score_of(sheet.run, answer)
        axes.scatter([across[answer.index]], [answer.level], s=max(side * 1.35, 5.5) ** 2, c=["white" if fill is None else colours(sheet.ranks(fill))], edgecolors=INK, linewidths=1.4, zorder=5, gid="answer", clip_on=False)


# Thumbnails ----------------------------------------------------------------------------------------------------------


def _draw_thumbnails(axes: Axes, sheet: Sheet, pictures: Pictures) -> None:
    """Pictures of nodes, as many as have room: of finished samples below them, of others in their places."""
    answer = sheet.path[-1].index if sheet.path else -1
    path = {node.index for node in sheet.path}
    there = {node.index: tuple(axes.transData.transform((sheet.layout.across[node.index], node.level))) for node in sheet.layout.nodes}
    ranked = [node for node in pictures.nodes() if node.index in there]
    ranked.sort(key=lambda node: (node.index != answer, node.index not in path, -_standing(sheet, node), node.index))
    taken: list[tuple[float, float]] = []
    for node in ranked:
        if len(taken) >= MOST_THUMBNAILS:
            break
        x, y = there[node.index]
        last = finished(sheet.run.tree, node)
        centre = (x, y - THUMBNAIL / 2 - 6.0) if last else (x, y)
        marks = () if last else (place for index, place in there.items() if index != node.index)
        if _clear(centre, taken, THUMBNAIL + 1.5) and _clear(centre, marks, THUMBNAIL / 2 + 1.5) and (image := pictures.image(node)) is not None:
            taken.append(centre)
            _put(axes, centre, image, chosen=node.index in path)


def _standing(sheet: Sheet, node: SavedNode) -> float:
    score = score_of(sheet.run, node)
    return -1.0 if score is None else sheet.ranks(score)


def _clear(centre: tuple[float, float], others: Iterable[tuple[float, float]], apart: float) -> bool:
    return all(max(abs(centre[0] - x), abs(centre[1] - y)) >= apart for x, y in others)


def _put(axes: Axes, centre: tuple[float, float], image: Any, *, chosen: bool) -> None:
    """A picture around a point of the page, framed."""
    import numpy as np
    from matplotlib.patches import Rectangle

    small = thumbnail(image, THUMBNAIL_PIXELS)
    longest = max(small.size)
    wide, high = THUMBNAIL * small.width / longest, THUMBNAIL * small.height / longest
    inverse = axes.transData.inverted()
    left, low = inverse.transform((centre[0] - wide / 2, centre[1] - high / 2))
    right, top = inverse.transform((centre[0] + wide / 2, centre[1] + high / 2))
    shown = axes.imshow(np.asarray(small), extent=(left, right, low, top), aspect="auto", zorder=6, clip_on=False, interpolation="antialiased")
    shown.set_gid("thumbnail")
    axes.add_patch(Rectangle((left, low), right - left, top - low, fill=False, edgecolor=INK if chosen else QUIET, linewidth=1.3 if chosen else 0.5, zorder=6.1, clip_on=False))


# Text ----------------------------------------------------------------------------------------------------------------


def _write_head(figure: Figure, sheet: Sheet) -> None:
    """The prompt, and what was spent on it for which score."""
    run = sheet.run
    left, room = 0.08, (sheet.width - 0.16) * POINTS
    prompt = plain(run.prompt or "(no prompt)", 400)
    while points(prompt, 7.5, bold=True) > room:
        prompt = f"{prompt[:-2].rstrip()}…"
    figure.text(left / sheet.width, 1.0 - 0.07 / sheet.height, prompt, fontsize=7.5, fontweight="bold", va="top")
    score = "no sample yet" if run.score is None else f"{run.verifier} {number(run.score)}"
    first = "" if run.first_score is None else f"one sample {number(run.first_score)}"
    facts = [run.policy, f"{run.ledger['nfe']:,} NFE", score, first, f"{len(run.nodes):,} nodes", run.model]
    shown = [plain(fact, 60) for fact in facts if fact]
    while len(shown) > 1 and points(" · ".join(shown), 6.2) > room:
        shown.pop()
    figure.text(left / sheet.width, 1.0 - 0.215 / sheet.height, " · ".join(shown), fontsize=6.2, color=QUIET, va="top")


def _add_key(figure: Figure, sheet: Sheet) -> None:
    """The colours of scores at the left, edges and marks at the right."""
    from matplotlib.lines import Line2D

    bar = min(1.9, 0.33 * sheet.width)
    if sheet.ranks.sorted:
        box = (0.16 / sheet.width, 0.2 / sheet.height, bar / sheet.width, 0.09 / sheet.height)
        add_score_bar(figure, box, sheet.ranks, plain(sheet.run.verifier, 22))
    kinds = {node.move.kind for node in sheet.layout.nodes if node.parent is not None}
    marks = {_kind(sheet, node) for node in sheet.layout.nodes}
    entries = [Line2D([], [], color=INK, linewidth=1.7, label="way to the answer")] if sheet.path else []
    entries += [Line2D([], [], color=look.colour, linestyle=look.dash, linewidth=0.9, label=plain(look.label, 16)) for look in map(stroke, sorted(kinds))]
    for kind, label in (("finished", "finished sample"), ("estimate", "scored on the way"), ("unscored", "not scored"), ("draft", "look-ahead"), ("failed", "failed")):
        if kind in marks:
            fill = {"finished": "#b9a96d", "estimate": "#b9a96d"}.get(kind, "white")
            edge = {"finished": INK, "estimate": "none"}.get(kind, QUIET)
            entries.append(Line2D([], [], linestyle="none", marker=MARKS[kind], markersize=3.6, markerfacecolor=fill, markeredgecolor=edge, markeredgewidth=0.6, label=label))
    if entries:
        columns = 2 if sheet.width < 5.0 else min(4, len(entries))
        figure.legend(
            handles=entries, loc="center left", bbox_to_anchor=((0.16 + bar + 0.2) / sheet.width, 0.26 / sheet.height), ncols=columns,
            fontsize=5.8, handlelength=1.7, handletextpad=0.45, columnspacing=0.8, labelspacing=0.35, borderpad=0.0,
        )  # fmt: skip
