"""The paths of points in the plane over the density that they are samples of: what a search of a mixture looks like."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tsdiff.treesearch.errors import UsageError
from tsdiff.treesearch.savedtree import SavedNode
from tsdiff.viewer.figures.images import answer_path, score_of
from tsdiff.viewer.figures.layout import most_telling
from tsdiff.viewer.figures.lettering import plain, points
from tsdiff.viewer.figures.paper import (
    COLUMN,
    FAINT,
    INK,
    PAGE,
    POINTS,
    QUIET,
    Ranks,
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
    import numpy as np
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from numpy.typing import NDArray

    from tsdiff.treesearch.saved import SavedRun

MOST_RUNS = 6
MOST_NODES = 4000
GRID = 220
AIR = 4.0
"""Standard deviations around the outermost modes that are shown."""


@dataclass(frozen=True)
class Mixture:
    """sum_k weights[k] N(means[k], stds[k]^2 I) in the plane, as a run's model tells of it."""

    weights: NDArray[np.float64]
    means: NDArray[np.float64]
    stds: NDArray[np.float64]

    @staticmethod
    def of(run: SavedRun) -> Mixture | None:
        """What a run says of its model's density; None if it says nothing, or nothing that makes sense."""
        import numpy as np

        facts = run.facts.get("model_facts")
        told = facts.get("mixture") if isinstance(facts, Mapping) else None
        try:
            weights, means, stds = (np.asarray(told[name], dtype=np.float64) for name in ("weights", "means", "stds"))  # type: ignore[index]
        except (TypeError, KeyError, ValueError):
            return None
        if weights.ndim != 1 or not len(weights) or means.shape != (len(weights), 2) or stds.shape != weights.shape:
            return None
        if not all(np.isfinite(one).all() for one in (weights, means, stds)) or (stds <= 0).any() or (weights < 0).any():
            return None
        return Mixture(weights, means, stds)

    def density(self, x: NDArray[np.float64], y: NDArray[np.float64]) -> NDArray[np.float64]:
        """At the points of a grid, (len(y), len(x))."""
        import numpy as np

        total = np.zeros((len(y), len(x)))
        for weight, (across, up), std in zip(self.weights, self.means, self.stds, strict=True):
            square = (x[None, :] - across) ** 2 + (y[:, None] - up) ** 2
            total += weight / (2.0 * math.pi * std**2) * np.exp(-square / (2.0 * std**2))
        return total

    def view(self) -> tuple[float, float, float]:
        """Centre and half side of the square that shows all of it."""
        low, high = (self.means - AIR * self.stds[:, None]).min(axis=0), (self.means + AIR * self.stds[:, None]).max(axis=0)
        centre = (low + high) / 2.0
        return float(centre[0]), float(centre[1]), float((high - low).max() / 2.0)


def paths_of(run: SavedRun, nodes: Sequence[SavedNode]) -> dict[int, tuple[float, float]]:
    """Places in the plane of nodes that have kept their latents, by index.

    Where noise makes latents grow (variance exploding), they are shrunk to the scale that a network sees them at.

    Raises:
      UsageError: if the run has kept none, or they are no points of the plane.
    """
    found: dict[int, tuple[float, float]] = {}
    for node, latent in run.latents(nodes):
        if tuple(latent.shape) != (2,):
            raise UsageError(f"the samples of {str(run.path)!r} have the shape {tuple(latent.shape)}, and only points of the plane, (2,), have paths to draw")
        scale = 1.0 if node.alpha is None or node.sigma is None else max(1.0, math.hypot(node.alpha, node.sigma))
        x, y = (float(value) / scale for value in latent.tolist())
        if math.isfinite(x) and math.isfinite(y):
            found[node.index] = (x, y)
    if not found:
        raise UsageError(f"{str(run.path)!r} has kept no latents, so there are no paths to draw; search with --keep all")
    return found


def write_trajectories(runs: Sequence[SavedRun], path: Path) -> list[str]:
    """Write the plot, a panel for each run; returns what was left out.

    Raises:
      UsageError, SetupError: as `paths_of`; or it cannot be written, or matplotlib is missing.
    """
    with drawing():
        figure, notices = trajectories_figure(runs)
        write_figure(figure, path)
    return notices


def trajectories_figure(runs: Sequence[SavedRun]) -> tuple[Figure, list[str]]:
    """The plot, and what it leaves out. Call within `drawing`."""
    notices = []
    shown = list(runs[:MOST_RUNS])
    if len(runs) > MOST_RUNS:
        notices.append(f"{len(runs) - MOST_RUNS} of {len(runs)} runs are left out: a plot of paths has {MOST_RUNS} panels; name those that you want")
    across = 1 if len(shown) == 1 else 2 if len(shown) in (2, 4) else 3
    down = math.ceil(len(shown) / across)
    width = COLUMN if across == 1 else PAGE
    side, gap, head, foot = (width - 0.16 - 0.14 * (across - 1)) / across, 0.14, 0.36, 0.58
    height = down * (side + head) + foot + 0.04
    figure = new_figure(width, height)
    nodes = [most_telling(run, MOST_NODES) for run in shown]
    ranks = Ranks([score for run, some in zip(shown, nodes, strict=True) for node in some if finished(run.tree, node) and (score := score_of(run, node)) is not None])
    kinds: set[str] = set()
    for place, (run, some) in enumerate(zip(shown, nodes, strict=True)):
        left = 0.08 + place % across * (side + gap)
        top = height - 0.04 - place // across * (side + head)
        axes = figure.add_axes((left / width, (top - head - side) / height, side / width, side / height))
        mixture = Mixture.of(run)
        if mixture is None:
            notices.append(f"{run.path} does not say what its density is, so only its paths are drawn")
        if len(some) < len(run.nodes):
            notices.append(f"{len(run.nodes) - len(some):,} of {len(run.nodes):,} nodes of {run.path} are left out, those that the lowest scores came of")
        kinds |= _draw_run(axes, run, some, ranks, mixture)
        _write_head(figure, run, left / width, (top - 0.05) / height, (top - 0.19) / height, side * POINTS)
    _add_key(figure, ranks, kinds, shown[0].verifier)
    return figure, notices


def _draw_run(axes: Axes, run: SavedRun, nodes: list[SavedNode], ranks: Ranks, mixture: Mixture | None) -> set[str]:
    """One panel; returns the operations that are on it."""
    import numpy as np
    from matplotlib.collections import LineCollection
    from matplotlib.colors import LinearSegmentedColormap

    places = paths_of(run, nodes)
    centre_x, centre_y, half = mixture.view() if mixture is not None else _around(list(places.values()))
    axes.set(xlim=(centre_x - half, centre_x + half), ylim=(centre_y - half, centre_y + half), xticks=[], yticks=[], aspect="equal")
    axes.spines[:].set_visible(True)
    axes.spines[:].set_color(FAINT)
    if mixture is not None:
        x, y = (np.linspace(centre - half, centre + half, GRID) for centre in (centre_x, centre_y))
        density = mixture.density(x, y)
        pale = LinearSegmentedColormap.from_list("pale", ["#ffffff", "#e3ebf4", "#bcd0e6", "#8fb0d4"])
        share = (density / density.max()) ** 0.35  # a power below 1 keeps rare modes visible beside common ones
        axes.imshow(share, origin="lower", extent=(centre_x - half, centre_x + half, centre_y - half, centre_y + half), cmap=pale, zorder=0, interpolation="bilinear")
    path = [node for node in answer_path(run) if node.index in places]
    chosen = {node.index for node in path}
    lines: dict[str, list[Any]] = {}
    for node in nodes:
        if node.parent is not None and node.index in places and node.parent.index in places and node.index not in chosen:
            lines.setdefault(node.move.kind, []).append([places[node.parent.index], places[node.index]])
    count = sum(map(len, lines.values()))
    for kind, found in sorted(lines.items()):
        look = stroke(kind)
        axes.add_collection(LineCollection(found, colors=look.colour, linestyles=[look.dash], linewidths=0.7 if count < 400 else 0.4, alpha=0.75 if count < 400 else 0.45, zorder=2, gid=f"edges-{kind}"))
    ends = [node for node in nodes if finished(run.tree, node) and node.index in places]
    starts = [places[node.index] for node in nodes if node.parent is None and node.index in places]
    if starts:
        axes.scatter(*np.array(starts).T, s=5, color=QUIET, linewidths=0, zorder=3, gid="starts")
    colours = score_colours()
    if ends:
        fills = ["white" if (score := score_of(run, node)) is None else colours(ranks(score)) for node in ends]
        axes.scatter(*np.array([places[node.index] for node in ends]).T, s=16, c=fills, edgecolors=INK, linewidths=0.5, zorder=4, gid="samples")
    for before, after in pairwise(path):
        pair = np.array([places[before.index], places[after.index]]).T
        axes.plot(*pair, color="white", linewidth=3.2, solid_capstyle="round", zorder=5)
        axes.plot(*pair, color=INK, linewidth=1.5, linestyle=stroke(after.move.kind).dash, zorder=6)
    if path:
        score = score_of(run, path[-1])
        axes.scatter(*places[path[-1].index], s=44, c=["white" if score is None else colours(ranks(score))], edgecolors=INK, linewidths=1.4, zorder=7, gid="answer")
    return set(lines) | {node.move.kind for node in path[1:]}


def _around(places: list[tuple[float, float]]) -> tuple[float, float, float]:
    x, y = zip(*places, strict=True)
    half = max(max(x) - min(x), max(y) - min(y), 1e-6) * 0.55
    return (min(x) + max(x)) / 2, (min(y) + max(y)) / 2, half


def _write_head(figure: Figure, run: SavedRun, left: float, upper: float, lower: float, room: float) -> None:
    title, score = plain(run.policy or "unknown policy"), "no sample yet" if run.score is None else f"score {number(run.score)}"
    facts = [score, f"{run.ledger['nfe']:,} NFE", str(run.options.get("solver") or ""), plain(run.prompt, 60)]
    shown = [plain(fact) for fact in facts if fact]
    while len(shown) > 1 and points(" · ".join(shown), 6.0) > room:
        shown.pop()
    figure.text(left, upper, title, fontsize=7.5, fontweight="bold", va="top")
    figure.text(left, lower, " · ".join(shown), fontsize=6.0, color=QUIET, va="top")


def _add_key(figure: Figure, ranks: Ranks, kinds: set[str], verifier: str) -> None:
    from matplotlib.lines import Line2D

    width, height = figure.get_size_inches()
    bar = min(1.9, 0.33 * width)
    if ranks.sorted:
        add_score_bar(figure, (0.16 / width, 0.2 / height, bar / width, 0.09 / height), ranks, plain(verifier, 22))
    entries = [Line2D([], [], color=INK, linewidth=1.5, label="way to the answer")]
    entries += [Line2D([], [], color=look.colour, linestyle=look.dash, linewidth=0.9, label=plain(look.label, 16)) for look in map(stroke, sorted(kinds))]
    entries.append(Line2D([], [], linestyle="none", marker="o", markersize=2.2, color=QUIET, markeredgewidth=0, label="first noise"))
    entries.append(Line2D([], [], linestyle="none", marker="o", markersize=4, markerfacecolor="#b9a96d", markeredgecolor=INK, markeredgewidth=0.5, label="finished sample"))
    figure.legend(
        handles=entries, loc="center left", bbox_to_anchor=((0.16 + bar + 0.2) / width, 0.26 / height), ncols=2 if width < 5 else len(entries), fontsize=5.8, handlelength=1.7,
        handletextpad=0.45, columnspacing=0.8, labelspacing=0.35, borderpad=0.0,
    )  # fmt: skip
