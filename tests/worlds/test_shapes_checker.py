"""The checker of the shapes world and the verifier on it, against what was drawn."""

from __future__ import annotations

import subprocess
import sys
import tomllib
import warnings
from dataclasses import dataclass, replace
from importlib import import_module
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter

from tsdiff.plugin.conformance import ExampleCandidates, VerifierConformance
from tsdiff.treesearch.errors import UsageError
from tsdiff.treesearch.noise import derive, generator
from tsdiff.treesearch.protocols import Condition
from tsdiff.worlds.shapes.checker import WEIGHTS_FILE, look
from tsdiff.worlds.shapes.fit_checker import examples, fit
from tsdiff.worlds.shapes.geometry import COLORS, PALETTE, SHAPES
from tsdiff.worlds.shapes.grammar import KINDS, PromptWarning, read
from tsdiff.worlds.shapes.oracle import ShapesOracle
from tsdiff.worlds.shapes.render import render
from tsdiff.worlds.shapes.scenes import draw_prompt, draw_scene, near_misses
from tsdiff.worlds.shapes.spoil import malformed, psnr, spoil


@dataclass
class Batch:
    """Candidates with pictures and prompts."""

    images: torch.Tensor
    conditions: list[Condition]

    def __len__(self) -> int:
        return len(self.conditions)


def drawn(text: str, seed: int = 0) -> np.ndarray:
    """A picture (64, 64, 3) of a prompt."""
    return render(draw_scene(read(text).prompt, generator(seed), held_out=True))


def batch(pictures: list[np.ndarray], texts: list[str]) -> Batch:
    return Batch(torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2), [Condition(prompt=text) for text in texts])


# The checker ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("decibel", [None, 31.0])
def test_agrees_with_what_was_drawn(decibel: float | None) -> None:
    """A small fixed sample of benchmarks/shapes_checker.py, shown and near-miss pictures of each kind."""
    wrong = []
    count = 180
    for index in range(count):
        rng = generator(derive("checker test", index))
        prompt = draw_prompt(list(KINDS)[index // 2 % len(KINDS)], rng, held_out=True)
        misses = list(near_misses(prompt).values())
        shown = misses[int(rng.integers(len(misses)))] if index % 2 else prompt
        scene = draw_scene(shown, rng, held_out=True)
        picture = render(scene) if decibel is None else spoil(render(scene), rng, decibel)
        if prompt.judge(look(picture)).satisfied != (index % 2 == 0):
            wrong.append((prompt.text, shown.text))
    assert len(wrong) <= (1 if decibel is None else 4), wrong


def test_finds_places_to_a_fraction_of_a_pixel() -> None:
    scene = draw_scene(read("a red star, a blue circle and a green cross").prompt, generator(5), held_out=True)
    objects = {item.shape: item for item in look(render(scene))}
    for thing in scene.things:
        assert objects[thing.shape].color == thing.color
        assert objects[thing.shape].x == pytest.approx(thing.x, abs=0.3)
        assert objects[thing.shape].y == pytest.approx(thing.y, abs=0.3)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("color", COLORS)
def test_knows_every_coloured_shape(color: str, shape: str) -> None:
    article = "an" if color[0] == "o" else "a"
    (item,) = look(drawn(f"{article} {color} {shape}", seed=11))
    assert (item.color, item.shape) == (color, shape)


def test_empty_pictures_hold_nothing() -> None:
    assert look(np.full((64, 64, 3), 0.1)) == []
    noisy = 0.1 + 0.02 * generator(0).standard_normal((64, 64, 3))
    assert look(noisy) == []


def test_malformed_figures_are_seldom_taken_for_shapes() -> None:
    taken = [any(item.shape is not None for item in look(malformed(generator(derive("malformed", i))))) for i in range(100)]
    assert sum(taken) <= 12


@pytest.mark.parametrize("sigma", [0.0, 1.0, 2.0, 4.0])
def test_noise_is_no_shape(sigma: float) -> None:
    noise = gaussian_filter(generator(1).standard_normal((64, 64, 3)), (sigma, sigma, 0))
    assert all(item.shape is None for item in look(np.clip(0.5 + 0.4 * noise / noise.std(), 0.0, 1.0)) if item.area > 300)


def test_a_picture_full_of_one_figure_is_no_shape_and_dull_colours_are_none() -> None:
    picture = np.full((64, 64, 3), 0.1)
    picture[8:52, 8:52] = np.array(PALETTE["red"]) / 255.0
    (item,) = look(picture)
    assert (item.shape, item.color) == (None, "red")
    picture = np.full((64, 64, 3), 0.1)
    picture[20:40, 20:40] = 0.45
    (item,) = look(picture)
    assert (item.shape, item.color) == ("square", None)


def test_a_doubtful_shape_is_no_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    for chance, shape in ((0.48, None), (0.52, SHAPES[0])):
        answer = np.array([[chance, 1.0 - chance, 0.0, 0.0, 0.0, 0.0]]) if chance > 0.5 else np.array([[chance, 0.3, 0.22, 0.0, 0.0, 0.0]])
        monkeypatch.setattr("tsdiff.worlds.shapes.checker.network", lambda answer=answer: lambda features: answer)
        (item,) = look(drawn("a red star"))
        assert item.shape == shape


def test_two_colours_in_one_figure_have_no_colour() -> None:
    picture = np.full((64, 64, 3), 0.1)
    picture[20:40, 20:30] = (0.87, 0.16, 0.17)
    picture[20:40, 30:40] = (0.18, 0.33, 0.9)
    (item,) = look(picture)
    assert item.color is None


@pytest.mark.parametrize("picture", [np.zeros((32, 32, 3)), np.zeros((3, 64, 64)), np.full((64, 64, 3), np.nan)])
def test_wrong_pictures_are_refused(picture: np.ndarray) -> None:
    with pytest.raises(UsageError, match="the picture"):
        look(picture)


def test_weights_are_small_and_shipped() -> None:
    assert files("tsdiff.worlds.shapes").joinpath(WEIGHTS_FILE).stat().st_size < 1_000_000  # type: ignore[attr-defined]


def test_the_recipe_fits_and_repeats_itself() -> None:
    features, classes = examples(60, seed=3)
    first, again = (fit(features, classes, seed=3, epochs=15) for _ in range(2))
    assert np.array_equal(first.hidden, again.hidden)
    assert (first(features).argmax(axis=1) == classes).mean() > 0.9


def test_spoilt_pictures_have_the_wanted_ratio() -> None:
    ratios = [psnr(clean, spoil(clean, generator(i), 31.0)) for i, clean in enumerate(drawn("a red star and a blue circle", i) for i in range(20))]
    assert np.mean(ratios) == pytest.approx(31.0, abs=0.5)
    assert min(ratios) > 29.5


# The verifier --------------------------------------------------------------------------------------------------------


class TestShapesOracle(VerifierConformance):
    """What every verifier keeps to."""

    @pytest.fixture
    def verifier(self) -> ShapesOracle:
        return ShapesOracle()

    @pytest.fixture
    def candidates(self) -> ExampleCandidates:
        texts = ["a star", "two red circles and a green square", "a red star left of a blue circle", "three crosses", "a star"]
        images = torch.from_numpy(np.stack([drawn(text, i) for i, text in enumerate(texts[:4])] + [drawn("a circle")])).permute(0, 3, 1, 2)
        return replace(ExampleCandidates.random(texts), images=images.contiguous())


def test_scores_each_picture_by_its_own_prompt() -> None:
    texts = ["a red star left of a blue circle", "a red star left of a blue circle", "two stars"]
    pictures = [drawn(texts[0]), drawn("a blue star left of a red circle"), drawn("three stars")]
    scores = ShapesOracle().score(batch(pictures, texts))
    assert scores.values == [1.0, pytest.approx(4 / 6), pytest.approx(2 / 3)]
    assert scores.parts["satisfied"] == [1.0, 0.0, 0.0]
    assert scores.parts["star is red"][:2] == [1.0, 0.0]
    assert np.isnan(scores.parts["star is red"][2])
    assert scores.parts["nothing else"] == [1.0, 1.0, pytest.approx(2 / 3)]
    assert scores.parts["two stars"][2] == pytest.approx(2 / 3)


def test_a_batch_scores_like_its_rows_bit_for_bit() -> None:
    texts = list(KINDS.values())
    pictures = [spoil(drawn(text, i), generator(i), 25.0) for i, text in enumerate(texts)]
    together = ShapesOracle().score(batch(pictures, texts))
    for row, (picture, text) in enumerate(zip(pictures, texts, strict=True)):
        single = ShapesOracle().score(batch([picture], [text]))
        assert single.values == [together.values[row]]
        assert all(part == [together.parts[name][row]] for name, part in single.parts.items())


def test_a_bad_picture_fails_alone() -> None:
    pictures = [drawn("a star"), np.full((64, 64, 3), np.nan, dtype=np.float32)]
    scores = ShapesOracle().score(batch(pictures, ["a star", "a star"]))
    assert scores.values[0] == 1.0
    assert np.isnan(scores.values[1])
    assert list(scores.reasons) == [1]


def test_prompts_are_checked() -> None:
    oracle = ShapesOracle()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        oracle.check(Condition(prompt="an orange star"))
    with pytest.warns(PromptWarning, match="does not know 'dog'"):
        oracle.check(Condition(prompt="a star and a dog"))
    for prompt in ("", "a photo of a dog"):
        with pytest.raises(UsageError, match="nothing to judge"):
            oracle.check(Condition(prompt=prompt))


def test_other_sizes_are_refused() -> None:
    with pytest.raises(UsageError, match=r"\(64, 64, 3\)"):
        ShapesOracle().score(Batch(torch.zeros(1, 3, 32, 32), [Condition(prompt="a star")]))


# Packaging -----------------------------------------------------------------------------------------------------------


def test_entry_points_lead_to_this_world() -> None:
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())
    points = project["project"]["entry-points"]
    module, _, attribute = points["tsdiff.verifiers"]["shapes-oracle"].partition(":")
    assert getattr(import_module(module), attribute).name == "shapes-oracle"
    assert WEIGHTS_FILE in project["tool"]["setuptools"]["package-data"]["tsdiff.worlds.shapes"]


def test_the_world_is_imported_without_torch() -> None:
    modules = "geometry, render, grammar, facts, heldout, scenes, spoil, checker, oracle, suites"
    code = f"import sys; from tsdiff.worlds.shapes import {modules}; suites.seen.conditions(); assert 'torch' not in sys.modules and 'skimage' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
