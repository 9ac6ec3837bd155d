"""Pictures of the shapes world: drawn right, drawn apart, and never of held-out compositions in training."""

from __future__ import annotations

import ast
import math
from collections import Counter
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tsdiff
from tsdiff.treesearch.errors import UsageError
from tsdiff.treesearch.noise import generator
from tsdiff.worlds.shapes.geometry import CANVAS, COLORS, DRAWN_CLEARANCE, RELATIONS, SHAPES, Scene, Thing, clearance
from tsdiff.worlds.shapes.grammar import KINDS, Prompt, read
from tsdiff.worlds.shapes.heldout import HELD_OUT, holds_held_out
from tsdiff.worlds.shapes.render import render, render_batch, signed_distance
from tsdiff.worlds.shapes.scenes import (
    GAP,
    MARGIN,
    WEIGHTS,
    draw_scene,
    every_prompt,
    is_held_out,
    near_misses,
    training_example,
)
from tsdiff.worlds.shapes.suites import seen, unseen

ANY_PROMPT = st.sampled_from(sorted(KINDS)).flatmap(lambda kind: st.sampled_from(every_prompt(kind)))
SEEDS = st.integers(0, 2**32)


def alone(shape: str, radius: float = 9.0, angle: float = 0.1, x: float = 31.3, y: float = 30.8) -> np.ndarray:
    """Coverage (64, 64) of one white thing on black."""
    return render(Scene((Thing(shape, "white", x, y, radius, angle, (1.0, 1.0, 1.0)),), 0.0))[..., 0]


@pytest.mark.parametrize("shape", SHAPES)
def test_centre_of_mass_is_the_centre(shape: str) -> None:
    cover = alone(shape)
    rows, columns = np.mgrid[:CANVAS, :CANVAS] + 0.5
    assert (cover * columns).sum() / cover.sum() == pytest.approx(31.3, abs=0.05)
    assert (cover * rows).sum() / cover.sum() == pytest.approx(30.8, abs=0.05)


@pytest.mark.parametrize(
    ("shape", "area"),
    [
        ("circle", math.pi),
        ("square", 2 * 1.25**2),
        ("triangle", 3 * math.sqrt(3) / 4 * 1.35**2),
        ("star", 5 * 1.35**2 * 0.45 * math.sin(math.pi / 5)),
        ("cross", (8 * 0.36 - 4 * 0.36**2) * 1.2**2 / (1 + 0.36**2)),
    ],
)
def test_areas_are_those_of_geometry(shape: str, area: float) -> None:
    assert alone(shape, radius=10.0).sum() == pytest.approx(100 * area, rel=0.01)


@given(st.sampled_from(SHAPES), st.floats(5.0, 14.0), SEEDS)
def test_distances_are_never_longer_than_the_way(shape: str, radius: float, seed: int) -> None:
    """A signed distance changes by no more than the way between two points, and nothing lies beyond the reach."""
    rng = np.random.default_rng(seed)
    points = rng.uniform(-20, 20, (2, 2, 50)).astype(np.float32)
    first, second = (signed_distance(shape, x, y, radius) for x, y in points)
    way = np.hypot(*(points[0] - points[1]))
    assert (np.abs(first - second) <= way + 1e-3).all()
    far = signed_distance(shape, *(points[0] / np.hypot(*points[0]) * radius * 1.36), radius)
    assert (far > 0).all()


@settings(max_examples=150)
@given(ANY_PROMPT, SEEDS)
def test_scenes_satisfy_their_prompt(prompt: Prompt, seed: int) -> None:
    scene = draw_scene(prompt, generator(seed), held_out=True)
    assert prompt.judge(scene.things).satisfied
    assert len(scene.things) == prompt.total
    for thing in scene.things:
        assert min(thing.x, thing.y) - thing.reach + 1e-9 >= MARGIN
        assert max(thing.x, thing.y) + thing.reach <= CANVAS - MARGIN + 1e-9
    for a, b in combinations(scene.things, 2):
        assert math.hypot(a.x - b.x, a.y - b.y) >= a.reach + b.reach + GAP
    for link in prompt.links:
        a, b = scene.things
        assert clearance(link.relation, (a.x, a.y), (b.x, b.y)) >= DRAWN_CLEARANCE
    image = render(scene)
    assert image.dtype == np.float32
    assert image.shape == (CANVAS, CANVAS, 3)
    assert 0.0 <= image.min() <= image.max() <= 1.0
    masks = [render(Scene((thing,), -1.0))[..., 0] > -1.0 for thing in scene.things]
    assert sum(mask.astype(int) for mask in masks).max() <= 1  # not even their soft edges meet


@settings(max_examples=60)
@given(ANY_PROMPT, SEEDS)
def test_pictures_of_near_misses_miss_the_prompt(prompt: Prompt, seed: int) -> None:
    for other in near_misses(prompt).values():
        scene = draw_scene(other, generator(seed), held_out=True)
        assert other.judge(scene.things).satisfied
        assert not prompt.judge(scene.things).satisfied


@given(st.tuples(st.floats(0, 64), st.floats(0, 64)), st.tuples(st.floats(0, 64), st.floats(0, 64)))
def test_at_most_one_relation_is_clear(first: tuple[float, float], second: tuple[float, float]) -> None:
    assert sum(clearance(relation, first, second) > 0 for relation in RELATIONS) <= 1


# Held-out compositions -----------------------------------------------------------------------------------------------


def test_held_out_pairs_are_balanced() -> None:
    assert len(HELD_OUT) == 80
    partners = Counter(item for pair in HELD_OUT for item in pair)
    assert set(partners.values()) == {4}
    assert len(partners) == len(COLORS) * len(SHAPES)
    assert set(Counter(frozenset(shape for _, shape in pair) for pair in HELD_OUT).values()) == {8}
    assert all(len({color for color, _ in pair}) == len({shape for _, shape in pair}) == 2 for pair in HELD_OUT)


@settings(max_examples=300)
@given(SEEDS, SEEDS)
def test_training_never_shows_held_out_pairs(seed: int, index: int) -> None:
    caption, scene = training_example(seed, index)
    assert 1 <= len(scene.things) <= 4
    assert not any(frozenset({a.item, b.item}) in HELD_OUT for a, b in combinations(scene.things, 2))
    reading = read(caption)
    assert reading.complete
    assert reading.prompt.judge(scene.things).satisfied


def test_uncoloured_prompts_would_show_held_out_pairs_if_they_might() -> None:
    prompt = read("a star and a circle").prompt
    free = [draw_scene(prompt, generator(i), held_out=True) for i in range(300)]
    assert any(holds_held_out(thing.item for thing in scene.things) for scene in free)
    kept = [draw_scene(prompt, generator(i)) for i in range(300)]
    assert not any(holds_held_out(thing.item for thing in scene.things) for scene in kept)


def test_held_out_prompts_need_permission() -> None:
    prompt = next(prompt for prompt in every_prompt("color_attr") if is_held_out(prompt))
    with pytest.raises(UsageError, match="held-out pair"):
        draw_scene(prompt, generator(0))


# Training examples ---------------------------------------------------------------------------------------------------


def test_examples_depend_on_seed_and_index_alone() -> None:
    first = [training_example(7, index) for index in range(20)]
    again = [training_example(7, index) for index in reversed(range(20))][::-1]
    assert first == again
    assert first != [training_example(8, index) for index in range(20)]
    scenes = [scene for _, scene in first]
    assert np.array_equal(render_batch(scenes), np.stack([render(scene) for scene in scenes]))


def test_kinds_occur_by_their_weights() -> None:
    count = 2000
    kinds = Counter(read(training_example(1, index)[0]).prompt.kind for index in range(count))
    for kind, weight in WEIGHTS.items():
        assert kinds[kind] == pytest.approx(count * weight, abs=5 * math.sqrt(count * weight))
    assert {read(training_example(1, index, {"position": 1.0})[0]).prompt.kind for index in range(20)} == {"position"}


@pytest.mark.parametrize("weights", [{}, {"position": 0.0}, {"position": -1.0, "colors": 2.0}, {"places": 1.0}])
def test_wrong_weights_are_refused(weights: dict[str, float]) -> None:
    with pytest.raises(UsageError, match="weights are"):
        training_example(0, 0, weights)


@pytest.mark.parametrize(("text", "match"), [("nine circles", "1 to 6 things"), ("", "1 to 6 things")])
def test_impossible_scenes_are_refused(text: str, match: str) -> None:
    with pytest.raises(UsageError, match=match):
        draw_scene(read(text).prompt, generator(0))


def test_contradicting_relations_are_refused() -> None:
    prompt = read("a star left of a circle").prompt
    twice = Prompt(prompt.groups, (*prompt.links, *read("a star right of a circle").prompt.links))
    with pytest.raises(UsageError, match="contradict"):
        draw_scene(twice, generator(0))


# Suites --------------------------------------------------------------------------------------------------------------


def test_suites_are_stratified_and_disjoint() -> None:
    for suite, kinds in ((seen, list(KINDS)), (unseen, ["color_attr", "color_position", "color_count", "three_objects"])):
        conditions = suite.conditions()
        assert [condition.prompt for condition in conditions] == [condition.prompt for condition in suite.conditions()]
        assert Counter(condition.metadata["tag"] for condition in conditions) == dict.fromkeys(kinds, 20)
        assert len({condition.prompt for condition in conditions}) == len(conditions)
        for condition in conditions:
            prompt = read(condition.prompt).prompt
            assert prompt.kind == condition.metadata["tag"]
            assert is_held_out(prompt) == suite.held_out == condition.metadata["held_out"]


@pytest.mark.parametrize("suite", [seen, unseen], ids=lambda suite: suite.name)
def test_suites_are_balanced(suite: object) -> None:
    for tag in {condition.metadata["tag"] for condition in suite.conditions()}:  # type: ignore[attr-defined]
        prompts = [read(c.prompt).prompt for c in suite.conditions() if c.metadata["tag"] == tag]  # type: ignore[attr-defined]
        shapes = Counter(group.shape for prompt in prompts for group in prompt.groups)
        assert set(shapes) == set(SHAPES)
        assert max(shapes.values()) - min(shapes.values()) <= 4
        if any(group.color for prompt in prompts for group in prompt.groups):
            assert {group.color for prompt in prompts for group in prompt.groups} == set(COLORS)
        if prompts[0].links:
            assert set(Counter(prompt.links[0].relation for prompt in prompts).values()) <= {4, 5, 6}


# The house -----------------------------------------------------------------------------------------------------------


def test_nothing_else_imports_this_world() -> None:
    root = Path(tsdiff.__file__).parent
    importers = []
    for path in root.rglob("*.py"):
        if path.is_relative_to(root / "worlds" / "shapes"):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            importers += [path.name for name in names if name.startswith("tsdiff.worlds.shapes")]
    assert importers == []
