"""Where the nodes of a tree stand in a figure, and which of them are left out of one that is too large to print."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, TypeVar

from tsdiff.treesearch.savedtree import SavedNode
from tsdiff.viewer.figures.images import answer_path, score_of

if TYPE_CHECKING:
    from tsdiff.treesearch.saved import SavedRun

T = TypeVar("T")

ASIDE = 0.36
COUSINS = 1.7
"""Distance of leaves of different parents, where that of siblings is 1."""


@dataclass(frozen=True)
class Layout:
    """Nodes and their places.

    Attributes:
      nodes: those that are shown, by index.
      across: place of each, by index, in distances of siblings.
      width: of all of them.
    """

    nodes: list[SavedNode]
    across: dict[int, float]
    width: float


def place(nodes: Sequence[SavedNode]) -> Layout:
    """Leaves side by side in the order of the tree, every other node over the middle of its children.

    The leaves below a node stand together, so that no branch crosses another, however levels go up and down on the way.

    Args:
      nodes: by index; with a node, its parent is among them.
    """
    shown = {node.index for node in nodes}
    children = {node.index: [child.index for child in node.children if child.index in shown] for node in nodes}
    parents = {node.index: None if node.parent is None else node.parent.index for node in nodes}
    across: dict[int, float] = {}
    waiting = [node.index for node in reversed(nodes) if node.parent is None]
    last: int | None = None
    while waiting:
        index = waiting.pop()
        if children[index]:
            waiting += reversed(children[index])
            continue
        across[index] = 0.0 if last is None else across[last] + (1.0 if parents[last] == parents[index] is not None else COUSINS)
        last = index
    for node in reversed(nodes):  # children come after their parents
        if below := children[node.index]:
            across[node.index] = (across[below[0]] + across[below[-1]]) / 2.0
    return Layout(list(nodes), across, 0.0 if last is None else across[last])


def stepped_aside(layout: Layout) -> Layout:
    """The same, where nodes that go back to a noisier level, with all that comes of them, stand a little aside.

    The way forth again would else cover the way there. Those that have gone back twice stand as before.
    """
    turned: dict[int, bool] = {}
    for node in layout.nodes:  # parents come first
        back = node.parent is not None and node.level < node.parent.level
        turned[node.index] = back != (node.parent is not None and turned[node.parent.index])
    return replace(layout, across={index: x + ASIDE * turned[index] for index, x in layout.across.items()})


def most_telling(run: SavedRun, most: int) -> list[SavedNode]:
    """At most so many nodes of a run's search, by index: the way to the answer, then whatever the best scores came of.

    With a node, its parent is among them.
    """
    nodes = run.nodes
    if len(nodes) <= most:
        return list(nodes)
    reach = [-math.inf] * len(nodes)
    for node in reversed(nodes):
        score = score_of(run, node)
        reach[node.index] = max(reach[node.index], -math.inf if score is None else score)
        if node.parent is not None:
            reach[node.parent.index] = max(reach[node.parent.index], reach[node.index])
    path = {node.index for node in answer_path(run)}
    ranked = sorted(nodes, key=lambda node: (node.index not in path, -reach[node.index], node.index))
    return sorted(ranked[:most], key=lambda node: node.index)


def thinned(items: Sequence[T], most: int) -> list[T]:
    """At most so many items, evenly spread, the first and the last among them."""
    if len(items) <= most:
        return list(items)
    return [items[round(number * (len(items) - 1) / (most - 1))] for number in range(most)]
