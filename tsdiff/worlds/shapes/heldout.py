"""Compositions that training never shows: pairs of coloured shapes that never meet in one training picture.

With colours and shapes numbered as in `COLORS` and `SHAPES`, colour i of shape j is kept apart from colour i + 3 of
shape j + 1 and from colour i + 2 of shape j + 2 (counting round: modulo 8 and 5). That is 80 of the 560 pairs that
differ in colour and shape; every coloured shape has 4 forbidden partners of 28, every two shapes have 8, and every
coloured shape, colour and shape is common in training. The rule holds for whole pictures of two or more things,
named in their caption or not.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import combinations

from tsdiff.worlds.shapes.geometry import COLORS, SHAPES, Item

_STEPS = ((3, 1), (2, 2))

HELD_OUT: frozenset[frozenset[Item]] = frozenset(
    frozenset({(COLORS[i], SHAPES[j]), (COLORS[(i + color) % len(COLORS)], SHAPES[(j + shape) % len(SHAPES)])})
    for i in range(len(COLORS))
    for j in range(len(SHAPES))
    for color, shape in _STEPS
)
"""The unordered pairs of coloured shapes."""


def holds_held_out(items: Iterable[Item]) -> bool:
    """Whether any two of the coloured shapes are a held-out pair."""
    return any(frozenset(pair) in HELD_OUT for pair in combinations(items, 2))
