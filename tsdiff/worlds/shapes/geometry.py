"""What a picture of the shapes world holds: coloured shapes on dark grey, and where they are.

Lengths are pixels of the 64 x 64 canvas; x grows to the right, y downwards, and pixel (row i, column j) has its centre
at (j + 1/2, i + 1/2). Every shape has a rotational symmetry, so its centre is its centre of mass.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

CANVAS = 64
"""Height and width of a picture."""

Shape: TypeAlias = str
Color: TypeAlias = str
Item: TypeAlias = tuple[Color, Shape]
"""A coloured shape, e.g. ("red", "star")."""

SHAPES: tuple[Shape, ...] = ("circle", "square", "triangle", "star", "cross")

PALETTE: dict[Color, tuple[int, int, int]] = {
    "red": (222, 40, 44),
    "green": (44, 168, 62),
    "blue": (46, 84, 228),
    "yellow": (240, 218, 48),
    "purple": (150, 58, 196),
    "orange": (242, 134, 30),
    "cyan": (58, 206, 220),
    "white": (236, 236, 236),
}
"""The pure colours, 8-bit RGB; drawn ones scatter around them."""

COLORS: tuple[Color, ...] = tuple(PALETTE)

Relation = Literal["left of", "right of", "above", "below"]
RELATIONS: tuple[Relation, ...] = ("left of", "right of", "above", "below")
OPPOSITE: dict[Relation, Relation] = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}

DRAWN_CLEARANCE = 4.0
"""Smallest `clearance` of a relation that a picture is drawn for."""

SEEN_CLEARANCE = 2.0
"""Smallest `clearance` at which a relation counts as seen: half of what is drawn, so that no drawing is ambiguous."""

# Circumradius of each shape with the nominal radius 1. They are chosen so that all look about equally large.
REACH: dict[Shape, float] = {"circle": 1.0, "square": 1.25, "triangle": 1.35, "star": 1.35, "cross": 1.2}


@dataclass(frozen=True)
class Thing:
    """One drawn shape.

    Attributes:
      shape, color: their names.
      x, y: its centre of mass, pixels.
      radius: its nominal radius, pixels (a circle's own).
      angle: rotation, radians.
      rgb: the colour it is drawn in, each channel in [0, 1].
    """

    shape: Shape
    color: Color
    x: float
    y: float
    radius: float
    angle: float
    rgb: tuple[float, float, float]

    @property
    def item(self) -> Item:
        """Colour and shape."""
        return self.color, self.shape

    @property
    def reach(self) -> float:
        """Radius of the smallest circle around the centre that holds it."""
        return self.radius * REACH[self.shape]


@dataclass(frozen=True)
class Scene:
    """A picture before it is drawn: its things, and the grey of the background in [0, 1]."""

    things: tuple[Thing, ...]
    background: float


def clearance(relation: Relation, first: tuple[float, float], second: tuple[float, float]) -> float:
    """How clearly `first` (x, y) stands in a relation to `second`: distance along its axis minus offset across it.

    Positive only within the quarter plane of that side; at most one of the four relations has a positive clearance.
    """
    dx, dy = second[0] - first[0], second[1] - first[1]
    along, across = {"left of": (dx, dy), "right of": (-dx, dy), "above": (dy, dx), "below": (-dy, dx)}[relation]
    return along - abs(across)
