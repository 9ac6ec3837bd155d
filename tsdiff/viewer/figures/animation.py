"""The way from noise to the answer as an animation: a frame for each node of the path, what is known of it below."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING

from tsdiff.treesearch.errors import UsageError
from tsdiff.treesearch.runfolder import write_file
from tsdiff.treesearch.savedtree import SavedNode
from tsdiff.viewer.figures.images import Pictures, answer_path, score_of, thumbnail
from tsdiff.viewer.figures.layout import thinned
from tsdiff.viewer.figures.lettering import fitted, font, plain
from tsdiff.viewer.figures.paper import FAINT, INK, QUIET, number, stroke

if TYPE_CHECKING:
    from PIL.Image import Image
    from PIL.ImageDraw import ImageDraw

    from tsdiff.treesearch.saved import SavedRun

MOST_FRAMES = 200

SIDE = 384
"""The longer side of the picture in pixels; previews have at most 128, and grow."""

HELD, LAST = 450, 2400
"""Milliseconds that a frame, and the last one, is shown."""

_EDGE, _FOOT = 16, 74


def write_animation(run: SavedRun, path: Path) -> list[str]:
    """Write the way to the answer as .gif or .webp, which plays for ever; returns what was left out.

    Raises:
      UsageError: if there is no answer yet, or no picture was kept of any node on the way.
      SetupError: without matplotlib, whose font it needs.
    """
    images, notices = frames(run)
    durations = [HELD] * (len(images) - 1) + [LAST]
    buffer = io.BytesIO()
    if path.suffix.lower() == ".gif":
        first, *rest = map(_in_few_colours, images)
        first.save(buffer, format="GIF", save_all=True, append_images=rest, duration=durations, loop=0, optimize=False, disposal=1)
    else:
        first, *rest = images
        first.save(buffer, format="WEBP", save_all=True, append_images=rest, duration=durations, loop=0, quality=88, method=4, minimize_size=False)
    write_file(path, [buffer.getvalue()])
    return notices


def _in_few_colours(image: Image) -> Image:
    """An image in the 255 colours of a GIF, chosen so that rare ones are not lost."""
    from PIL.Image import Dither, Quantize

    palette = image.quantize(255, method=Quantize.MAXCOVERAGE, dither=Dither.NONE)
    return image.quantize(palette=palette, dither=Dither.FLOYDSTEINBERG)


def frames(run: SavedRun, *, most: int = MOST_FRAMES) -> tuple[list[Image], list[str]]:
    """The frames, and what was left out. Raises as `write_animation`."""
    way = answer_path(run)
    if not way:
        raise UsageError(f"{str(run.path)!r} has no finished sample yet, so there is no way to show")
    pictures = Pictures(run)
    costs = run.tree.path_costs()
    shown = thinned(way, most)
    loaded = {node.index: thumbnail(image, SIDE) for node in shown if (image := pictures.image(node)) is not None}
    if not loaded:
        raise UsageError(f"{str(run.path)!r} has kept no picture of the nodes on the way to its answer; pictures are kept of nodes that a verifier has looked at (--previews)")
    size = next(iter(loaded.values())).size
    notices = list(pictures.damaged)
    if len(shown) < len(way):
        notices.append(f"{len(way) - len(shown)} of {len(way)} nodes on the way are left out: an animation has {most} frames")
    blank = sum(node.index not in loaded for node in shown)
    if blank:
        notices.append(f"{blank} of {len(shown)} frames have no picture: pictures are kept of nodes that a verifier has looked at")
    made, last = [], None
    for node in shown:
        last = loaded.get(node.index, last)
        made.append(_frame(run, way, node, last, size, costs[node.index], faded=node.index not in loaded))
    return made, notices


def _frame(run: SavedRun, way: list[SavedNode], node: SavedNode, image: Image | None, size: tuple[int, int], cost: int, *, faded: bool) -> Image:
    """A picture over facts and a line of time; of a node without a picture the one before, faded."""
    from PIL import Image, ImageDraw

    wide, high = size
    frame = Image.new("RGB", (max(wide, 240) + 2 * _EDGE, high + _EDGE + _FOOT), "white")
    pen = ImageDraw.Draw(frame)
    left = (frame.width - wide) // 2
    if image is None:
        pen.rectangle((left, _EDGE, left + wide - 1, _EDGE + high - 1), fill="#eef0f3")
    else:
        shown = Image.blend(image, Image.new("RGB", image.size, "white"), 0.72) if faded else image
        frame.paste(shown, ((frame.width - image.width) // 2, _EDGE + (high - image.height) // 2))
    if faded:
        pen.text((frame.width / 2, _EDGE + high / 2), "no picture of this step", font=font(13), fill=INK, anchor="mm")
    room, top = frame.width - 2 * _EDGE, _EDGE + high + 10
    score = score_of(run, node)
    value = "" if score is None else number(score)
    operation = stroke(node.move.kind).label if node.parent is not None else "first noise"
    noise = "" if node.sigma is None else f", \u03c3 {number(node.sigma, 2)}"
    pen.text((_EDGE, top), fitted(plain(f"level {node.level} of {run.tree.last}{noise}"), font(14, bold=True), room - 90), font=font(14, bold=True), fill=INK)
    pen.text((frame.width - _EDGE, top), value, font=font(14, bold=True), fill=INK, anchor="ra")
    pen.text((_EDGE, top + 21), fitted(plain(f"{operation} · {cost:,} NFE on the way"), font(11), room), font=font(11), fill=QUIET)
    _draw_time(pen, way, way.index(node), _EDGE, top + 50, room)
    return frame


def _draw_time(pen: ImageDraw, way: list[SavedNode], at: int, left: float, top: float, room: float) -> None:
    """A dot for each node of the way, filled up to where the frame is; re-noising goes back, which its colour tells."""
    step = room / max(1, len(way) - 1)
    places = [left + step * stop for stop in range(len(way))]
    pen.line((left, top, left + room, top), fill=FAINT, width=3)
    for step_to in range(1, at + 1):
        pen.line((places[step_to - 1], top, places[step_to], top), fill=stroke(way[step_to].move.kind).colour, width=3)
    if step >= 7.0:
        for stop, place in enumerate(places):
            pen.ellipse((place - 3, top - 3, place + 3, top + 3), fill=INK if stop <= at else FAINT)
    pen.ellipse((places[at] - 6, top - 6, places[at] + 6, top + 6), fill=INK)
