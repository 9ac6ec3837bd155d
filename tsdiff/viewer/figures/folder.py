"""A run as a folder of ordinary files: images, figures, tables, and a text that says what is what."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from tsdiff.treesearch.disk import told
from tsdiff.treesearch.errors import UsageError
from tsdiff.treesearch.exports import csv_text, write_csv
from tsdiff.treesearch.runfolder import PICTURES, write_file
from tsdiff.treesearch.summary import COLUMNS
from tsdiff.viewer.figures.animation import write_animation
from tsdiff.viewer.figures.cards import write_page
from tsdiff.viewer.figures.images import Pictures, score_of
from tsdiff.viewer.figures.lettering import plain
from tsdiff.viewer.figures.paper import number, require_matplotlib
from tsdiff.viewer.figures.sheet import in_order, write_sheet
from tsdiff.viewer.figures.tree import write_tree

if TYPE_CHECKING:
    from tsdiff.treesearch.saved import SavedRun

MOST_PICTURES = 200
NODES = "nodes"


def write_folder(run: SavedRun, folder: Path) -> list[str]:
    """Write everything that can be seen of a run into a folder, which is made if it is not there; returns what was left out.

    Raises:
      UsageError, SetupError: if it cannot be written, or matplotlib is missing.
    """
    require_matplotlib()
    try:
        folder.mkdir(exist_ok=True)
    except OSError as error:
        raise told(error, folder) from error
    said: list[str] = []
    lines = [*_images(run, folder), *_tables(run, folder), *_figures(run, folder, said), *_nodes(run, folder, said)]
    width = max(len(name) for name, _ in lines)
    score = "-" if run.score is None else f"{plain(run.verifier)} {number(run.score)}"
    head = [plain(run.prompt or "(no prompt)"), f"{plain(run.policy)} on {plain(run.model)}, seed {run.seed}: {score}, {run.ledger['nfe']:,} NFE, {run.status}", ""]
    text = [*head, *(f"{name:{width}}  {what}" for name, what in lines)]
    if said:
        text += ["", "Left out:", *(f"- {line}" for line in said)]
    write_file(folder / "index.txt", ["\n".join([*text, ""]).encode()])
    return said


_Line = tuple[str, str]


def _images(run: SavedRun, folder: Path) -> list[_Line]:
    """Copies of the images as they are, with what they say of their making."""
    found = []
    for which, what in (("best", "the answer"), ("baseline", "a plain sample from the same seed")):
        try:
            run.image(which)
            data = (run.path / PICTURES[which]).read_bytes()
        except (UsageError, OSError):  # not made (yet), or damaged, which `damage` tells
            continue
        write_file(folder / PICTURES[which], [data])
        found.append((PICTURES[which], what))
    return found


def _tables(run: SavedRun, folder: Path) -> list[_Line]:
    facts = run.summary() | {"folder": str(run.path)}
    write_file(folder / "summary.csv", [csv_text(COLUMNS, [[facts[name] for name in COLUMNS]])])
    write_csv(run, folder / "nodes.csv")
    return [("summary.csv", "the result in a line"), ("nodes.csv", "the nodes of the tree, a line each")]


def _figures(run: SavedRun, folder: Path, said: list[str]) -> list[_Line]:
    """Figures that the run has something for."""
    wanted: list[tuple[str, Callable[[SavedRun, Path], list[str]], str]] = [
        ("tree.png", write_tree, "the tree, for print"),
        ("tree.svg", write_tree, "the same, as vectors"),
        ("sheet.png", write_sheet, "the pictures of the nodes, best first"),
        ("way.gif", write_animation, "the way from noise to the answer"),
    ]
    found = []
    for name, write, what in wanted:
        try:
            notices = write(run, folder / name)
        except UsageError as error:
            said.append(f"{name}: {error}")
            continue
        said += [f"{name}: {line}" for line in notices if f"tree.png: {line}" not in said]
        found.append((name, what))
    return found


def _nodes(run: SavedRun, folder: Path, said: list[str]) -> list[_Line]:
    """Pictures of nodes in files of their own, named by level and index."""
    pictures = Pictures(run)
    kept = in_order(run, pictures.nodes())
    if not kept:
        return []
    try:
        (folder / NODES).mkdir(exist_ok=True)
    except OSError as error:
        raise told(error, folder / NODES) from error
    lines = []
    for node in kept[:MOST_PICTURES]:
        if (image := pictures.image(node)) is not None:
            name = f"{NODES}/level-{node.level:03d}-node-{node.index:05d}.png"
            write_page(image, folder / name)
            score = score_of(run, node)
            lines.append((name, "not scored" if score is None else number(score)))
    if len(kept) > MOST_PICTURES:
        said.append(f"{NODES}/: {len(kept) - MOST_PICTURES:,} of {len(kept):,} pictures, those of the lowest scores")
    return lines
