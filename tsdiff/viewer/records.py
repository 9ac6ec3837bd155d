"""Nodes as the page needs them to draw a tree: a few short fields each."""

from __future__ import annotations

from typing import Any, TypeAlias

from tsdiff.treesearch.savedtree import SavedNode, SavedTree
from tsdiff.viewer.plainjson import line, short, text

Record: TypeAlias = dict[str, Any]


def node_record(tree: SavedTree, node: SavedNode, spent: int | None, thumbnail: int | None) -> Record:
    """A node in short. `i` index, `p` parent, `l` level, `op` what made it, `s` scores by verifier, `n` NFE of the whole tree when it
    was made (null where that is not known), `d` draft, `f` why it failed (null if it did not), `g` which driver made it, `th` its
    thumbnail (null without one), `fin` whether it is a finished sample.
    """
    return {
        "i": node.index,
        "p": None if node.parent is None else node.parent.index,
        "l": node.level,
        "op": text(node.move.kind, 40),
        "s": {name: short(score) for name, score in scores(node).items()},
        "n": spent,
        "d": node.draft,
        "f": line(node.reason or "failed") if node.failed else None,
        "g": node.driver,
        "th": thumbnail,
        "fin": finished(tree, node),
    }


def finished(tree: SavedTree, node: SavedNode) -> bool:
    """Whether a node is a finished sample, as `SavedTree.finished` has it."""
    return node.level == tree.last and not node.draft and not node.failed


def scores(node: SavedNode) -> dict[str, float | None]:
    """Scores by verifier. Of a node that has none of its own, that of its last look-ahead ("VERIFIER@...")."""
    found: dict[str, float | None] = {}
    for key in sorted(node.values):
        name, at, _ = key.partition("@")
        score, own = node.values[key].score, node.score(name)
        if not at or (own is None and score is not None) or name not in found:
            found[name] = score
    return found
