"""Making pictures: prompts of every kind, and scenes that satisfy a prompt.

What a prompt does not say is drawn at random: colours, sizes, places, rotations. What it says always holds in the
scene, and there is nothing else in it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import cache
from itertools import combinations, permutations, product
from typing import TYPE_CHECKING

import numpy as np

from tsdiff.treesearch.errors import UsageError
from tsdiff.treesearch.noise import derive, generator
from tsdiff.worlds.shapes.facts import Group, Link
from tsdiff.worlds.shapes.geometry import (
    CANVAS,
    COLORS,
    DRAWN_CLEARANCE,
    PALETTE,
    REACH,
    RELATIONS,
    SHAPES,
    Color,
    Item,
    Scene,
    Shape,
    Thing,
    clearance,
)
from tsdiff.worlds.shapes.grammar import KINDS, Prompt
from tsdiff.worlds.shapes.heldout import holds_held_out

if TYPE_CHECKING:
    from numpy.random import Generator
    from numpy.typing import NDArray

MARGIN = 2.0
"""Pixels between a thing and the border of the canvas, at least."""

GAP = 3.5
"""Pixels between the circles around two things, at least: what keeps them apart when an autoencoder blurs them."""

TILT = math.radians(12.0)
"""Largest rotation."""

BACKGROUNDS = (0.04, 0.24)
"""Darkest and lightest grey of a background."""

# Smallest and largest nominal radius by the number of things in the picture; the last holds for more.
_RADII = ((8.0, 13.0), (7.0, 11.0), (6.5, 9.5), (6.5, 8.5), (6.0, 7.0))

WEIGHTS: dict[str, float] = {
    "single_object": 0.05,
    "colors": 0.06,
    "two_object": 0.10,
    "counting": 0.15,
    "position": 0.18,
    "color_attr": 0.12,
    "color_position": 0.17,
    "color_count": 0.10,
    "three_objects": 0.07,
}
"""Shares of the kinds in training: more where more must be learned."""


# Prompts -------------------------------------------------------------------------------------------------------------


def every_prompt(kind: str) -> tuple[Prompt, ...]:
    """All prompts of a kind, held-out ones too, always in the same order. In coloured kinds all colours differ.

    Raises:
      UsageError: if there is no such kind.
    """
    if kind not in KINDS:
        raise UsageError(f"kind of prompt is {kind!r} but must be one of {', '.join(KINDS)}")
    return _every_prompt(kind)


@cache
def _every_prompt(kind: str) -> tuple[Prompt, ...]:
    pairs = list(permutations(SHAPES, 2))
    links = [(Link(0, relation, 1),) for relation in RELATIONS]
    if kind == "single_object":
        return tuple(Prompt((Group(shape),)) for shape in SHAPES)
    if kind == "colors":
        return tuple(Prompt((Group(shape, color),)) for color in COLORS for shape in SHAPES)
    if kind == "two_object":
        return tuple(Prompt((Group(a), Group(b))) for a, b in pairs)
    if kind == "counting":
        return tuple(Prompt((Group(shape, count=count),)) for count in (2, 3, 4) for shape in SHAPES)
    if kind == "position":
        return tuple(Prompt((Group(a), Group(b)), link) for (a, b), link in product(pairs, links))
    if kind == "three_objects":
        return tuple(
            Prompt(tuple(map(Group, shapes, colors))) for shapes, colors in product(permutations(SHAPES, 3), permutations(COLORS, 3))
        )
    colored = [((a, p), (b, q)) for (a, b), (p, q) in product(pairs, permutations(COLORS, 2))]
    if kind == "color_attr":
        return tuple(Prompt((Group(*one), Group(*two))) for one, two in colored)
    if kind == "color_position":
        return tuple(Prompt((Group(*one), Group(*two)), link) for (one, two), link in product(colored, links))
    return tuple(Prompt((Group(*one, count), Group(*two))) for (one, two), count in product(colored, (2, 3)))


def named_items(prompt: Prompt) -> list[Item]:
    """The coloured shapes that a prompt names with their colour."""
    return [(group.color, group.shape) for group in prompt.groups if group.color is not None]


def is_held_out(prompt: Prompt) -> bool:
    """Whether a prompt names a held-out pair, so that no training picture can satisfy it."""
    return holds_held_out(named_items(prompt))


def draw_prompt(kind: str, rng: Generator, *, held_out: bool = False) -> Prompt:
    """A random prompt of a kind, uniform over those that name no held-out pair (or over all, with `held_out`)."""
    prompts = every_prompt(kind)
    while True:
        prompt = prompts[int(rng.integers(len(prompts)))]
        if held_out or not is_held_out(prompt):
            return prompt


# Scenes --------------------------------------------------------------------------------------------------------------


def draw_scene(prompt: Prompt, rng: Generator, *, held_out: bool = False) -> Scene:
    """A random scene that satisfies a prompt, with nothing else in it.

    Args:
      prompt: what it must show, at most 6 things.
      rng: source of randomness.
      held_out: whether held-out pairs may meet in it. Training never sets this.

    Raises:
      UsageError: if the prompt names nothing, too much, relations that no picture can satisfy, or a held-out pair
        although `held_out` is False.
    """
    if not 0 < prompt.total <= 6:
        raise UsageError(f"a scene shows 1 to 6 things but {prompt.groups!r} are {prompt.total}")
    if not held_out and is_held_out(prompt):
        raise UsageError(f"{prompt.text!r} names a held-out pair, which training pictures never show; draw it with held_out=True")
    items = _draw_items(prompt, rng, held_out)
    low, high = _RADII[min(len(items), len(_RADII)) - 1]
    radii = rng.uniform(low, high, len(items))
    places = _draw_places(prompt, [radius * REACH[shape] for radius, (_, shape) in zip(radii, items, strict=True)], rng)
    angles = rng.uniform(-TILT, TILT, len(items))
    tints = _draw_tints([color for color, _ in items], rng)
    things = [
        Thing(shape, color, float(x), float(y), float(radius), float(angle), tint)
        for (color, shape), (x, y), radius, angle, tint in zip(items, places, radii, angles, tints, strict=True)
    ]
    return Scene(tuple(things), float(rng.uniform(*BACKGROUNDS)))


def _draw_items(prompt: Prompt, rng: Generator, held_out: bool) -> list[Item]:
    """Coloured shapes in the groups' order. Several things of one free colour share it in half of the scenes."""
    while True:
        items: list[Item] = []
        for group in prompt.groups:
            alike = group.color is not None or rng.random() < 0.5
            colors = [group.color or COLORS[int(rng.integers(len(COLORS)))]] * group.count
            if not alike:
                colors = [COLORS[int(i)] for i in rng.integers(len(COLORS), size=group.count)]
            items += [(color, group.shape) for color in colors]
        if held_out or not holds_held_out(items):
            return items


def _draw_places(prompt: Prompt, reaches: Sequence[float], rng: Generator) -> NDArray[np.float64]:
    """Centres (n, 2) in the groups' order: inside the canvas, apart from each other, relations clear."""
    reach = np.asarray(reaches)[:, None]
    pairs = list(combinations(range(len(reaches)), 2))
    starts = np.cumsum([0, *(group.count for group in prompt.groups)])
    linked = [
        (link.relation, a, b)
        for link in prompt.links
        for a, b in product(*(range(starts[number], starts[number + 1]) for number in (link.first, link.second)))
    ]
    for attempt in range(200):
        tries = 16 << min(attempt, 6)
        places = rng.uniform(MARGIN + reach, CANVAS - MARGIN - reach, size=(tries, len(reaches), 2))
        good = np.ones(tries, dtype=bool)
        for a, b in pairs:
            offset = places[:, a] - places[:, b]
            good &= (offset**2).sum(axis=1) >= (reaches[a] + reaches[b] + GAP) ** 2
        for number in np.flatnonzero(good):
            centres = places[number]
            if all(clearance(relation, tuple(centres[a]), tuple(centres[b])) >= DRAWN_CLEARANCE for relation, a, b in linked):
                return centres
    raise UsageError(f"no place was found for {prompt.groups!r} with {prompt.links!r}; the canvas is too small, or the relations contradict each other")


def _draw_tints(colors: Sequence[Color], rng: Generator) -> list[tuple[float, float, float]]:
    """The colours to draw in: the palette's, up to 12 % darker or 5 % lighter, plus a little of any hue."""
    pure = np.array([PALETTE[color] for color in colors]) / 255.0
    scattered = pure * rng.uniform(0.88, 1.05, (len(colors), 1)) + rng.uniform(-0.03, 0.03, pure.shape)
    return [(float(r), float(g), float(b)) for r, g, b in np.clip(scattered, 0.0, 1.0)]


def training_example(seed: int, index: int, weights: Mapping[str, float] = WEIGHTS) -> tuple[str, Scene]:
    """Example number `index` of a seed's endless training set: a caption, and a scene that satisfies it.

    Args:
      seed, index: at least 0; they alone decide the example.
      weights: share of each kind; kinds that are missing do not occur.

    Raises:
      UsageError: if a kind is unknown, a share negative, or all are 0.
    """
    unknown = [kind for kind in weights if kind not in KINDS]
    if unknown or not weights or min(weights.values()) < 0 or sum(weights.values()) <= 0:
        raise UsageError(f"weights are {dict(weights)!r} but must give shares of at least 0, not all 0, to kinds out of {', '.join(KINDS)}")
    rng = generator(derive(seed, "shapes", index))
    mark = rng.random() * sum(weights.values())
    kind = list(weights)[-1]
    for kind, weight in weights.items():  # noqa: B007 - the kind where the mark falls is used below
        mark -= weight
        if mark < 0:
            break
    prompt = draw_prompt(kind, rng)
    wordings = prompt.phrasings
    return wordings[int(rng.integers(len(wordings)))], draw_scene(prompt, rng)


# Near misses ---------------------------------------------------------------------------------------------------------


def near_misses(prompt: Prompt) -> dict[str, Prompt]:
    """Prompts that differ from one in a single respect, by the name of that respect; no picture satisfies both.

    "swapped colors", "swapped relation", "wrong relation", "wrong count", "extra object", "wrong color", "wrong shape" and
    "missing object": those that apply. They are made without chance, so that test sets built on them are fixed.
    """
    groups, misses = prompt.groups, {}
    number = derive(prompt.text)  # an arbitrary but fixed choice among equals

    def other(options: Sequence[str], taken: set[str | None]) -> str:
        free = [option for option in options if option not in taken]
        return free[number % len(free)]

    if len(groups) >= 2 and all(group.color for group in groups[:2]):
        first, second, *rest = groups
        swapped = (Group(first.shape, second.color, first.count), Group(second.shape, first.color, second.count), *rest)
        misses["swapped colors"] = Prompt(swapped, prompt.links)
    if prompt.links:
        link = prompt.links[0]
        misses["swapped relation"] = Prompt((groups[link.second], groups[link.first]), (Link(0, link.relation, 1),))
        across = [relation for relation in RELATIONS if relation in (("above", "below") if link.relation in ("left of", "right of") else ("left of", "right of"))]
        misses["wrong relation"] = Prompt(groups, (Link(0, across[number % 2], 1),))
    first, *rest = groups
    step = 1 if first.count == 1 or number % 2 else -1
    misses["wrong count"] = Prompt((Group(first.shape, first.color, first.count + step), *rest), prompt.links)
    shape: Shape = other(SHAPES, {group.shape for group in groups})
    if groups[0].color is not None:
        color: Color = other(COLORS, {group.color for group in groups})
        misses["wrong color"] = Prompt((Group(first.shape, color, first.count), *rest), prompt.links)
        extra = Group(shape, color)
    else:
        extra = Group(shape)
    misses["wrong shape"] = Prompt((Group(shape, first.color, first.count), *rest), prompt.links)
    misses["extra object"] = Prompt((*groups, extra), prompt.links)
    if rest:
        misses["missing object"] = Prompt(tuple(rest))
    return misses
