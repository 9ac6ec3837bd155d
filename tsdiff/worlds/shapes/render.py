"""Drawing scenes: a signed distance for every pixel, and an edge one pixel wide.

Square, triangle and star are one figure, a star polygon, folded onto a single edge by its mirror symmetries; a cross
is the union of two bars. A pixel's coverage is 1/2 minus its distance to the edge, cut to [0, 1]: exact for straight
edges parallel to the grid, and off by a few hundredths elsewhere.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from tsdiff.worlds.shapes.geometry import CANVAS, REACH, Scene, Shape, Thing

Array: TypeAlias = NDArray[np.float32]

# Points of each star polygon, and its inner radius over its outer one. A convex regular polygon has cos(pi / n).
_POLYGONS = {"square": (4, math.cos(math.pi / 4)), "triangle": (3, math.cos(math.pi / 3)), "star": (5, 0.45)}
# The angle of the first point: squares rest on a side, triangles and stars point upwards.
_UPRIGHT = {"circle": 0.0, "square": math.pi / 4, "triangle": -math.pi / 2, "star": -math.pi / 2, "cross": 0.0}
# A cross: half the width of a bar, over half its length.
_BAR = 0.36


def signed_distance(shape: Shape, x: Array, y: Array, radius: float) -> Array:
    """Distance of points to the edge of a shape at the origin, negative inside.

    Args:
      shape: its name; unrotated, so that a square's diagonals and a cross's bars lie along the axes' directions that
        `draw` turns upright.
      x, y: coordinates, any equal shapes.
      radius: the nominal radius.

    Returns:
      Distances, of the shape of `x`. Inside a cross they are bounds (never too deep by more than half a bar).
    """
    outer = radius * REACH[shape]
    if shape == "circle":
        return np.hypot(x, y) - np.float32(outer)
    if shape == "cross":
        across, along = np.abs(x), np.abs(y)
        bar = outer * _BAR / math.hypot(1.0, _BAR)  # the far corners lie on the circumcircle
        length = outer / math.hypot(1.0, _BAR)
        return np.minimum(_box(across, along, bar, length), _box(across, along, length, bar))
    points, ratio = _POLYGONS[shape]
    return _star_polygon(x, y, points, outer, outer * ratio)


def _box(across: Array, along: Array, half_width: float, half_length: float) -> Array:
    dx, dy = across - np.float32(half_width), along - np.float32(half_length)
    return np.hypot(np.maximum(dx, 0), np.maximum(dy, 0)) + np.minimum(np.maximum(dx, dy), 0)


def _star_polygon(x: Array, y: Array, points: int, outer: float, inner: float) -> Array:
    """The mirror planes cut the plane into 2n sectors with one edge each, from (outer, 0) to the inner corner."""
    sector = 2.0 * math.pi / points
    angle = np.arctan2(y, x)
    angle = np.abs(angle - sector * np.round(angle / sector))
    distance = np.hypot(x, y)
    px, py = distance * np.cos(angle) - np.float32(outer), distance * np.sin(angle)
    ex, ey = inner * math.cos(sector / 2) - outer, inner * math.sin(sector / 2)
    share = np.clip((px * ex + py * ey) / (ex * ex + ey * ey), 0, 1)
    gap = np.hypot(px - share * ex, py - share * ey)
    return np.where(ex * py - ey * px > 0, -gap, gap)  # inside is to the left of the edge


def draw(image: Array, thing: Thing) -> None:
    """Draw a thing into an image (H, W, 3) in place."""
    low_x, high_x = _window(thing.x, thing.reach, image.shape[1])
    low_y, high_y = _window(thing.y, thing.reach, image.shape[0])
    dx = np.arange(low_x, high_x, dtype=np.float32)[None, :] + np.float32(0.5 - thing.x)
    dy = np.arange(low_y, high_y, dtype=np.float32)[:, None] + np.float32(0.5 - thing.y)
    turn = thing.angle + _UPRIGHT[thing.shape]
    cos, sin = np.float32(math.cos(turn)), np.float32(math.sin(turn))
    distance = signed_distance(thing.shape, cos * dx + sin * dy, cos * dy - sin * dx, thing.radius)
    coverage = np.clip(np.float32(0.5) - distance, 0, 1)[..., None]
    patch = image[low_y:high_y, low_x:high_x]
    patch += coverage * (np.asarray(thing.rgb, dtype=np.float32) - patch)


def _window(centre: float, reach: float, size: int) -> tuple[int, int]:
    return max(0, math.floor(centre - reach - 1)), min(size, math.ceil(centre + reach + 1))


def render(scene: Scene) -> Array:
    """Draw a scene: float32 (64, 64, 3), RGB in [0, 1]."""
    image = np.full((CANVAS, CANVAS, 3), scene.background, dtype=np.float32)
    for thing in scene.things:
        draw(image, thing)
    return image


def render_batch(scenes: Sequence[Scene]) -> Array:
    """Draw scenes: float32 (B, 64, 64, 3), RGB in [0, 1]."""
    return np.stack([render(scene) for scene in scenes])
