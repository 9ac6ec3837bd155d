"""A saved tree as lines of text: the best samples and how they came about; all else is counted, not shown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tsdiff.treesearch.savedtree import SavedNode, SavedTree

MOST = 12


@dataclass(frozen=True)
class Line:
    """A stretch of a tree that is shown without any branch.

    Attributes:
      guides: the strokes that lead to it from its parent.
      nodes: from its first node to its last, at least one.
      hidden: nodes that branch off there and are not shown, with all that came of them.
      best: it is on the path to the best sample.
    """

    guides: str
    nodes: Sequence[SavedNode]
    hidden: int
    best: bool


@dataclass(frozen=True)
class Shown:
    """What is shown of a tree.

    Attributes:
      lines: top to bottom.
      nodes: how many nodes are shown.
      ends, all_ends: how many ends of paths are shown, and how many there are.
    """

    lines: list[Line]
    nodes: int
    ends: int
    all_ends: int


def lay_out(tree: SavedTree, *, most: int | None = None, depth: int | None = None) -> Shown:
    """The paths to the best ends of a tree, with what they have in common shown once; the best come first.

    An end is a node that was not grown further.

    Args:
      most: ends to show: the answer, then finished samples by score, then others, by the scores of their estimates. None for
        `MOST`, and no others where there is a finished one.
      depth: moves from the root to show at most; None for all.
    """
    best = tree.best
    ends = [node for node in tree.nodes if node is not best and not node.draft and all(child.draft for child in node.children)]
    ends = ([] if best is None else [best]) + sorted(ends, key=lambda end: _rank(tree, end))
    chosen = ends[: MOST if most is None else most]
    if most is None and not _unfinished(tree, chosen):
        chosen = [end for end in chosen if not _unfinished(tree, [end])]
    order: dict[int, int] = {}  # of the nodes that are shown, the place of the best end that came of them
    for place, end in enumerate(chosen):
        for node in tree.path(end)[: None if depth is None else depth + 1]:
            order.setdefault(node.index, place)
    return Shown(_lines(tree, order, set() if best is None else {node.index for node in tree.path(best)}), len(order), len(chosen), len(ends))


def _unfinished(tree: SavedTree, ends: Sequence[SavedNode]) -> bool:
    """Whether none of some ends is a finished sample."""
    return not any(end.level == tree.last and not end.failed for end in ends)


def _rank(tree: SavedTree, end: SavedNode) -> tuple[bool, bool, bool, float, int]:
    score = end.score(tree.verifier)
    return end.level != tree.last, end.failed, score is None, -(score or 0.0), end.index


def _lines(tree: SavedTree, order: Mapping[int, int], on_best: set[int]) -> list[Line]:
    """The lines of the nodes that are shown; of siblings, those with the lower order come first."""
    sizes = [1] * len(tree.nodes)  # of what came of each node, itself included
    for node in reversed(tree.nodes):
        if node.parent is not None:
            sizes[node.parent.index] += sizes[node.index]

    def in_order(nodes: Sequence[SavedNode]) -> list[SavedNode]:
        return sorted((node for node in nodes if node.index in order), key=lambda node: order[node.index])

    lines: list[Line] = []
    todo = [(node, "", "") for node in reversed(in_order(tree.roots))]  # a node, its guides, those of what is below it
    while todo:
        node, guides, below = todo.pop()
        nodes, hidden = [node], 0
        while True:
            children = in_order(nodes[-1].children)
            hidden += sum(sizes[child.index] for child in nodes[-1].children if child.index not in order)
            if len(children) != 1:
                break
            nodes.append(children[0])
        lines.append(Line(guides, nodes, hidden, nodes[-1].index in on_best))
        for i, child in reversed(list(enumerate(children))):
            last = i == len(children) - 1
            todo.append((child, below + ("└ " if last else "├ "), below + ("  " if last else "│ ")))
    return lines


def chain_text(nodes: Sequence[SavedNode]) -> str:
    """The nodes of a line: "7", "0 > 7", "0 … 31"."""
    first, last = nodes[0].index, nodes[-1].index
    if len(nodes) == 1:
        return str(first)
    return f"{first} {'>' if len(nodes) == 2 else '…'} {last}"


def level_text(nodes: Sequence[SavedNode]) -> str:
    """The levels from where a line begins (its parent's level, if it has one) to where it ends."""
    begin = nodes[0] if nodes[0].parent is None else nodes[0].parent
    return str(begin.level) if begin is nodes[-1] else f"{begin.level} → {nodes[-1].level}"


def remark(nodes: Sequence[SavedNode]) -> str:
    """What is out of the ordinary on a line: moves that are neither draws nor denoising, and what failed."""
    kinds: dict[str, int] = {}
    for node in nodes:
        if node.move.kind not in ("draw", "denoise"):
            kinds[node.move.kind] = kinds.get(node.move.kind, 0) + 1
    said = [kind if count == 1 else f"{kind} {count}x" for kind, count in kinds.items()]
    if nodes[-1].failed:
        said.append(f"failed: {nodes[-1].reason}")
    return ", ".join(said)


def score_text(node: SavedNode, tree: SavedTree) -> str:
    """A score; with a tilde where it is that of an estimate, made on the way."""
    score = node.score(tree.verifier)
    if score is None:
        ahead = [value.score for key, value in sorted(node.values.items()) if key.startswith(f"{tree.verifier}@") and value.score is not None]
        score = ahead[-1] if ahead else None
    if score is None:
        return "-"
    return f"{'' if node.level == tree.last else '~'}{score:.4g}"
