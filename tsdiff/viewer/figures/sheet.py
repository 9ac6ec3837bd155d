"""A contact sheet: the pictures that a run has kept of its nodes, finished samples first, the best first."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

from tsdiff.treesearch.errors import UsageError
from tsdiff.treesearch.savedtree import SavedNode
from tsdiff.viewer.figures.cards import Card, page, write_page
from tsdiff.viewer.figures.images import Pictures, score_of
from tsdiff.viewer.figures.paper import NONE, number
from tsdiff.viewer.records import finished

if TYPE_CHECKING:
    from PIL.Image import Image

    from tsdiff.treesearch.saved import SavedRun

MOST = 200
SIDE = 128
ACROSS = 10


def write_sheet(run: SavedRun, path: Path) -> list[str]:
    """Write the contact sheet; returns what was left out.

    Raises:
      UsageError: if no picture was kept.
      SetupError: without matplotlib, whose font it needs.
    """
    image, notices = sheet(run)
    write_page(image, path)
    return notices


def sheet(run: SavedRun, *, most: int = MOST) -> tuple[Image, list[str]]:
    """The contact sheet, and what was left out. Raises as `write_sheet`."""
    pictures = Pictures(run)
    kept = in_order(run, pictures.nodes())
    if not kept:
        raise UsageError(f"{str(run.path)!r} has kept no picture; pictures are kept of nodes that a verifier has looked at (--previews)")
    cards = [_card(run, node, pictures) for node in kept[:most]]
    if all(card.image is None for card in cards):
        raise UsageError(f"no picture of {str(run.path)!r} can be read: {pictures.damaged[0]}")
    across = min(ACROSS, max(3, math.ceil(math.sqrt(1.6 * len(cards)))))
    rows = [cards[start : start + across] for start in range(0, len(cards), across)]
    notices = list(pictures.damaged)
    if len(kept) > most:
        notices.append(f"{len(kept) - most:,} of {len(kept):,} pictures are left out, those of the lowest scores: a contact sheet has {most}")
    facts = f"{run.policy} · {run.model} · {run.ledger['nfe']:,} NFE · scores by {run.verifier or 'nobody'}"
    foot = f"{len(cards):,} of {len(run.nodes):,} nodes: finished samples, then those on the way; the best first, the answer framed"
    return page(rows, SIDE, run.prompt or "(no prompt)", facts, foot=foot), notices


def in_order(run: SavedRun, nodes: list[SavedNode]) -> list[SavedNode]:
    """The answer, the other finished samples, the others: each by their scores, the best first."""
    answer = run.best

    def rank(node: SavedNode) -> tuple[bool, bool, float, int]:
        score = score_of(run, node)
        return node is not answer, not finished(run.tree, node), math.inf if score is None else -score, node.index

    return sorted(nodes, key=rank)


def _card(run: SavedRun, node: SavedNode, pictures: Pictures) -> Card:
    score = score_of(run, node)
    place = f"{node.index}" if finished(run.tree, node) else f"{node.index} · level {node.level}"
    return Card(pictures.image(node), NONE if score is None else number(score, 4), place, "damaged", chosen=node is run.best)
