"""One picture of how policies spend the same budget: every path of their search trees over a mixture's density.

    python examples/mixture_trajectories.py [FOLDER]        writes mixture_trajectories.png there (default: runs)

Points of the plane are denoised, so a tree can be drawn as it is: a node's latent is a place. The paths come from the
run folders alone (`tree.json` and `latents.safetensors`). Needs matplotlib.
"""

from __future__ import annotations

import itertools
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.lines import Line2D
from safetensors.numpy import load_file

import tsdiff
from tsdiff.plugin import Denoise
from tsdiff.policies import Beam, BestOfN
from tsdiff.worlds.gaussian.presets import preset

NFE = 400
SEED = 0
TARGET = (3.0, 2.4)  # the centre of the rare mode: one sample in fifty falls there
VIEW = (-2.9, 4.0)

# Okabe and Ito's palette, which stays distinct under the common kinds of colour blindness.
SKY, ORANGE, YELLOW = "#56B4E9", "#E69F00", "#F0E442"
PAPER, INK, QUIET = "#0B1020", "#F2F4FA", "#9AA5C0"
DENSITY = LinearSegmentedColormap.from_list("night", [PAPER, "#141D3D", "#243263", "#40518F"])
STYLE: dict[str, tuple[str, Any]] = {"denoise": (SKY, "-"), "renoise": (ORANGE, (0, (3, 2)))}  # kind of move -> colour, line


@dataclass(frozen=True)
class StepByStep:
    """Another policy, with every level on the way kept as a node: same noise, same cost, more to look at."""

    inner: Any

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def search(self, tree):
        """Pass requests and replies on; only `via`, the levels that become nodes, is added."""
        requests, reply = self.inner.search(tree), None
        while True:
            try:
                request = requests.send(reply)
            except StopIteration as stop:
                return stop.value
            if isinstance(request, Denoise):
                first, to = request.group[0].level, request.to
                request = Denoise(request.nodes, to, copies=request.copies, via=range(first + 1, to))
            reply = yield request


PANELS = {
    "one sample": (BestOfN(n=1), "ddim"),
    "best of 20": (BestOfN(n=20), "ddim"),
    "beam, branching by re-noising": (Beam(width=4, branch=4), "ddim"),
    "beam, branching by stochastic steps": (Beam(width=4, branch=6, branch_by="step"), "ddim(eta=1)"),
}


def main() -> None:
    """Search, draw, save."""
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "runs")
    figure, axes = plt.subplots(2, 2, figsize=(10, 11), facecolor=PAPER)
    for axis, (title, (policy, solver)) in zip(axes.flat, PANELS.items(), strict=True):
        result = tsdiff.search(
            "gaussian", f"near {TARGET}", policy=StepByStep(policy), solver=solver, nfe=NFE, seed=SEED, baseline=False, out=folder
        )
        distance = result.scores["gaussian-target"].parts["distance"]
        caption = f"{result.ledger.nfe} NFE · {solver} · score {result.score:.3f} · {distance:.2f} from the target"
        axis.set_title(title, color=INK, fontsize=13, loc="left", pad=20, fontweight="bold")
        axis.text(0.0, 1.02, caption, transform=axis.transAxes, color=QUIET, fontsize=10)
        draw_tree(axis, result.path)
    add_legend(figure)
    path = folder / "mixture_trajectories.png"
    figure.savefig(path, dpi=100, facecolor=PAPER)
    print(path)


def draw_tree(axis: Any, run: Path) -> None:
    """One saved tree over the density of the data."""
    nodes = json.loads((run / "tree.json").read_text())["nodes"]
    places = {int(name.partition("/")[2]): latent for name, latent in load_file(run / "latents.safetensors").items()}
    answer = json.loads((run / "run.json").read_text())["result"]["node"]
    last = nodes[answer]["level"]
    winning = path_to(nodes, answer)
    finished = {index for node in nodes if node["level"] == last for index in path_to(nodes, node["index"])}
    draw_density(axis)

    for node in nodes:
        if node["parent"] is None or node["index"] in winning:
            continue
        color, line = STYLE[node["move"]["kind"]]
        pruned = node["index"] not in finished
        strength = node["level"] / last  # noisy beginnings recede, clean ends stand out
        axis.plot(
            *np.array([places[node["parent"]], places[node["index"]]]).T,
            color=color,
            linestyle=line,
            linewidth=0.6 if pruned else 1.0,
            alpha=(0.25 + 0.35 * strength) if pruned else (0.4 + 0.6 * strength),
            zorder=2 if pruned else 3,
        )
    starts = [places[node["index"]] for node in nodes if node["parent"] is None]
    ends = [places[node["index"]] for node in nodes if node["level"] == last]
    axis.scatter(*np.array(starts).T, s=13, color=QUIET, linewidths=0, zorder=4)
    axis.scatter(*np.array(ends).T, s=22, color=SKY, edgecolors=PAPER, linewidths=0.6, zorder=5)

    line = np.array([places[index] for index in winning])
    axis.plot(*line.T, color=PAPER, alpha=0.8, linewidth=4.6, solid_joinstyle="round", zorder=6)
    for kind, steps in itertools.groupby(range(1, len(winning)), key=lambda step: nodes[winning[step]]["move"]["kind"]):
        covered = list(steps)
        axis.plot(*line[covered[0] - 1 : covered[-1] + 1].T, color=YELLOW, linestyle=STYLE[kind][1], linewidth=2.2, solid_joinstyle="round", zorder=7)
    axis.scatter(*places[winning[0]], s=34, color=YELLOW, edgecolors=PAPER, linewidths=1.0, zorder=8)
    axis.scatter(*places[answer], s=80, color=YELLOW, edgecolors=PAPER, linewidths=1.2, zorder=8)
    axis.scatter(*TARGET, s=340, facecolors="none", edgecolors=INK, linewidths=1.5, zorder=9)
    for spine in axis.spines.values():
        spine.set_color("#2A3560")
    axis.set(xlim=VIEW, ylim=VIEW, xticks=[], yticks=[], aspect="equal")


def path_to(nodes: list[dict[str, Any]], index: int) -> list[int]:
    """Indices of the nodes from the root to a node."""
    path = [index]
    while nodes[path[-1]]["parent"] is not None:
        path.append(nodes[path[-1]]["parent"])
    return path[::-1]


def draw_density(axis: Any) -> None:
    """The density of the data; a power below 1 keeps the rare mode visible beside the common ones."""
    line = torch.linspace(*VIEW, 240, dtype=torch.float64)
    x, y = torch.meshgrid(line, line, indexing="xy")
    density = preset("rare-mode").mixture.log_density(torch.stack((x, y), dim=-1).reshape(-1, 2)).exp().reshape(240, 240)
    axis.contourf(line, line, (density / density.max()) ** 0.35, levels=12, cmap=DENSITY, zorder=0)


def add_legend(figure: Any) -> None:
    """Title, margins and the legend."""
    entries = [
        Line2D([], [], color=YELLOW, linewidth=2.2, label="path of the answer"),
        Line2D([], [], color=SKY, linewidth=1.2, label="denoise"),
        Line2D([], [], color=ORANGE, linewidth=1.2, linestyle=STYLE["renoise"][1], label="re-noise"),
        Line2D([], [], color=SKY, linewidth=0.6, alpha=0.7, label="pruned"),
        Line2D([], [], color=QUIET, marker="o", markersize=4, linestyle="none", label="first noise"),
        Line2D([], [], color=SKY, marker="o", markersize=5, linestyle="none", label="finished"),
        Line2D([], [], color=INK, marker="o", markersize=11, markerfacecolor="none", linestyle="none", label="target"),
    ]
    figure.subplots_adjust(left=0.025, right=0.975, top=0.895, bottom=0.05, wspace=0.03, hspace=0.13)
    title = f"One sample, and three ways to spend {NFE} network evaluations (NFE) on a rare mode"
    figure.text(0.025, 0.962, title, color=INK, fontsize=15)
    figure.legend(handles=entries, loc="lower center", ncols=len(entries), frameon=False, labelcolor=INK, fontsize=10)


if __name__ == "__main__":
    main()
