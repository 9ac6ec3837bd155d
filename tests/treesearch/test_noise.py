"""Noise: the generator against its published vector, the law of every stream, and the geometry of every recipe."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from tsdiff.treesearch.errors import UsageError
from tsdiff.treesearch.noise import (
    Fresh,
    Given,
    Mix,
    Rotate,
    Slerp,
    Torch,
    derive,
    generator,
    initial_noise,
    move_noise,
    normals,
    philox_words,
    realize,
    recipe_from_json,
    recipe_to_json,
    roots_of,
    step_noise,
)

SHAPE = (3, 8, 8)
STREAM = st.integers(0, 2**128 - 1)
PATH = st.lists(st.one_of(STREAM, st.integers(0, 3), st.text(max_size=4)), max_size=4)
COUNT = math.prod(SHAPE)


def roots(count: int, seed: int = 0) -> dict[int, np.ndarray]:
    return {i: initial_noise(derive(seed, "draw", i), SHAPE) for i in range(count)}


def make(recipe, seed: int = 0, count: int = 4):
    return realize(recipe, seed=seed, shape=SHAPE, roots=roots(count, seed)).astype(np.float64)


# The generator -------------------------------------------------------------------------------------------------------


def test_philox_gives_the_published_vector():
    # Random123's kat_vectors: philox4x64-10, counter 0, key 0. numpy increments first, so the counter starts at -1.
    words = np.random.Philox(key=0, counter=2**256 - 1).random_raw(4)
    assert [f"{word:016x}" for word in words] == ["16554d9eca36314c", "db20fe9d672d0fdc", "d7e772cee186176b", "7e68b68aec7ba23b"]


def test_words_are_the_blocks_1_2_3():
    words = np.concatenate([np.random.Philox(key=7, counter=block).random_raw(4) for block in range(3)])
    assert np.array_equal(philox_words(7, 12), words)


def test_normals_are_box_mullers_of_the_words():
    words = philox_words(11, 3)
    expected = []
    for word in words.tolist():
        radius = math.sqrt(-2.0 * math.log(((word >> 32) + 0.5) / 2**32))
        angle = 2.0 * math.pi * ((word & 0xFFFFFFFF) + 0.5) / 2**32
        expected += [radius * math.cos(angle), radius * math.sin(angle)]
    assert normals(11, 6).dtype == np.float32
    assert np.allclose(normals(11, 6), expected, rtol=2e-7, atol=1e-7)


@given(STREAM, st.integers(1, 40), st.integers(1, 40))
def test_a_shorter_draw_is_a_prefix(key, count, more):
    assert np.array_equal(normals(key, count), normals(key, count + more)[:count])


@pytest.mark.parametrize(
    "draw",
    [
        lambda stream, n: initial_noise(stream, (n,)),
        lambda stream, n: step_noise(stream, 7, (n // 2,), 2).reshape(-1),
        lambda stream, n: move_noise(stream, (n,)),
    ],
    ids=["initial", "step", "move"],
)
def test_every_stream_is_standard_normal(draw):
    numbers = np.stack([draw(derive(5, "draw", i), 40_000) for i in range(5)]).astype(np.float64)
    count = numbers.size
    # Four standard errors of the first four moments of N(0, 1) each.
    for power, moment, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs((numbers**power).mean() - moment) < 4.0 * math.sqrt(variance / count)
    assert stats.kstest(numbers.reshape(-1), "norm").pvalue > 1e-3
    # Streams, and neighbours within a stream, are uncorrelated: |r| < 4 / sqrt(n).
    assert np.abs(np.corrcoef(numbers) - np.eye(5)).max() < 4.0 / math.sqrt(40_000)
    assert abs(np.corrcoef(numbers[:, 1:].reshape(-1), numbers[:, :-1].reshape(-1))[0, 1]) < 4.0 / math.sqrt(count)


def test_no_number_exceeds_what_32_bits_can_say():
    bound = math.sqrt(-2.0 * math.log(0.5 / 2**32))
    assert bound < 6.78
    assert np.abs(normals(3, 100_000)).max() <= bound


# Streams -------------------------------------------------------------------------------------------------------------


@given(PATH, PATH)
def test_streams_differ_where_their_paths_differ(one, other):
    assert (derive(*one) == derive(*other)) == (one == other)


def test_paths_are_not_run_together():
    assert len({derive(1, 23), derive(12, 3), derive(123), derive("1", 23), derive("ab", "c"), derive("a", "bc"), derive("abc"), derive(1), derive("1"), derive()}) == 10


@pytest.mark.parametrize("bad", [-1, 2**128])
def test_numbers_out_of_range_are_refused(bad):
    with pytest.raises(UsageError, match="from 0 to"):
        derive("draw", bad)


@given(STREAM, st.integers(0, 100), st.integers(0, 100))
def test_levels_and_purposes_have_noise_of_their_own(stream, level, other):
    here = step_noise(stream, level, (8,))
    assert np.array_equal(here, step_noise(stream, other, (8,))) == (level == other)
    for noise in (initial_noise(stream, (8,)), move_noise(stream, (8,))):
        assert not np.array_equal(here[0], noise)


def test_several_noises_of_a_step_continue_the_first():
    both = step_noise(9, 4, SHAPE, 2)
    assert both.shape == (2, *SHAPE)
    assert np.array_equal(both[:1], step_noise(9, 4, SHAPE))
    assert not np.array_equal(both[0], both[1])


def test_a_policys_generator_repeats():
    assert generator(derive(0, "rng", "x")).integers(0, 1000, 5).tolist() == generator(derive(0, "rng", "x")).integers(0, 1000, 5).tolist()


# Recipes -------------------------------------------------------------------------------------------------------------


def cosine(a, b) -> float:
    return float((a * b).sum() / (np.linalg.norm(a) * np.linalg.norm(b)))


def test_fresh_is_the_roots_own_noise():
    assert np.array_equal(make(Fresh(2)), roots(3)[2])


@given(st.floats(-1.0, 1.0), st.integers(0, 3), st.integers(0, 50))
def test_rotate_keeps_the_norm_and_has_the_cosine(wanted, base, index):
    rotated, root = make(Rotate(base, wanted, index)), make(Fresh(base))
    assert math.isclose(np.linalg.norm(rotated), np.linalg.norm(root), rel_tol=1e-6)
    assert abs(cosine(rotated, root) - wanted) < 1e-6


def test_neighbours_point_in_independent_directions():
    away = [make(Rotate(0, 0.0, index)) for index in range(2)]
    assert abs(cosine(*away)) < 5.0 / math.sqrt(COUNT)
    assert np.array_equal(make(Rotate(0, 0.3, 1)), make(Rotate(0, 0.3, 1)))


@given(st.floats(0.0, 2.0 * math.pi), st.integers(0, 20))
def test_mix_is_the_weighted_sum(angle, index):
    a, b = math.cos(angle), math.sin(angle)
    mixed = make(Mix({0: a}, fresh=(index, b)))
    new = make(Mix({}, fresh=(index, 1.0)))
    assert np.allclose(mixed, a * make(Fresh(0)) + b * new, atol=1e-5)
    assert np.allclose(make(Mix({0: a, 3: b})), a * make(Fresh(0)) + b * make(Fresh(3)), atol=1e-5)


def test_mix_stays_standard_normal():
    shape = (40_000,)
    own = {0: initial_noise(derive(0, "draw", 0), shape), 1: initial_noise(derive(0, "draw", 1), shape)}
    mixed = realize(Mix({0: 0.6, 1: 0.48}, fresh=(5, 0.64)), seed=0, shape=shape, roots=own)
    assert abs(float(mixed.var()) - 1.0) < 4.0 * math.sqrt(2.0 / 40_000)
    assert stats.kstest(mixed, "norm").pvalue > 1e-3


@pytest.mark.parametrize("weights", [{0: 0.5, 1: 0.5}, {0: 1.1}, {}, {0: float("nan")}])
def test_mix_refuses_weights_that_change_the_variance(weights):
    with pytest.raises(UsageError, match="squared weights"):
        Mix(weights)


@given(st.floats(0.0, 1.0))
def test_slerp_follows_the_great_circle(t):
    a, b, between = make(Fresh(0)), make(Fresh(1)), make(Slerp(0, 1, t))
    angle = math.acos(cosine(a, b))
    # Rounding to float32 leaves 1e-7 in the cosine, which near 1 is sqrt(2e-7) in the angle: compare chords.
    assert abs(cosine(a, between) - math.cos(t * angle)) < 1e-6
    assert abs(cosine(b, between) - math.cos((1.0 - t) * angle)) < 1e-6
    assert math.isclose(np.linalg.norm(between), (1.0 - t) * np.linalg.norm(a) + t * np.linalg.norm(b), rel_tol=1e-6)


def test_slerp_begins_and_ends_at_its_roots():
    assert np.allclose(make(Slerp(2, 3, 0.0)), make(Fresh(2)), atol=1e-6)
    assert np.allclose(make(Slerp(2, 3, 1.0)), make(Fresh(3)), atol=1e-6)
    assert np.allclose(make(Slerp(1, 1, 0.4)), make(Fresh(1)), atol=1e-6)


@pytest.mark.parametrize("seed", [0, 1234, 2**63 - 1])
def test_torch_is_what_a_pipeline_draws(seed):
    drawn = torch.randn((1, *SHAPE), generator=torch.Generator().manual_seed(seed))[0]
    assert np.array_equal(realize(Torch(seed), seed=99, shape=SHAPE, roots={}), drawn.numpy())


def test_given_is_handed_through():
    own = np.ones(SHAPE, dtype=np.float32)
    assert np.array_equal(realize(Given("ab"), seed=0, shape=SHAPE, roots={}, given=own), own)


@pytest.mark.parametrize("make_recipe", [lambda: Rotate(0, 1.01, 0), lambda: Rotate(0, float("nan"), 0), lambda: Slerp(0, 1, -0.1), lambda: Slerp(0, 1, 1.5)])
def test_parameters_out_of_range_are_refused(make_recipe):
    with pytest.raises(UsageError, match="must lie in"):
        make_recipe()


UNIT = st.floats(0.0, 1.0)
INDEX = st.integers(0, 1000)
RECIPES = st.one_of(
    st.builds(Fresh, INDEX),
    st.builds(Rotate, INDEX, st.floats(-1.0, 1.0), INDEX),
    st.builds(lambda angle, a, b: Mix({a: math.cos(angle)}, fresh=(b, math.sin(angle))), st.floats(0.0, 7.0), INDEX, INDEX),
    st.builds(lambda angle, a, b: Mix(((a, math.cos(angle)), (b, math.sin(angle)))), st.floats(0.0, 7.0), INDEX, INDEX),
    st.builds(Slerp, INDEX, INDEX, UNIT),
    st.builds(Given, st.text("0123456789abcdef", min_size=64, max_size=64)),
    st.builds(Torch, st.integers(0, 2**63 - 1)),
)


@given(RECIPES)
def test_recipes_survive_json(recipe):
    text = json.dumps(recipe_to_json(recipe), allow_nan=False)
    assert recipe_from_json(json.loads(text)) == recipe


def test_recipes_name_their_roots():
    assert roots_of(Fresh(3)) == roots_of(Given("a")) == roots_of(Torch(0)) == ()
    assert roots_of(Rotate(3, 0.5, 9)) == (3,)
    assert roots_of(Mix({1: 0.6, 2: 0.8})) == (1, 2)
    assert roots_of(Slerp(4, 5, 0.5)) == (4, 5)
