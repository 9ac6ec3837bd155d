"""The weights that ship: what they are, that they load strictly and silently, and that they do what their card says."""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib
from importlib import import_module
from pathlib import Path

import pytest
import torch
from scipy.stats import binom

import tsdiff
from tsdiff.treesearch.imports import prepare_torchvision
from tsdiff.treesearch.noise import derive, generator
from tsdiff.treesearch.pictures import judges_of, score_pictures
from tsdiff.treesearch.protocols import Condition
from tsdiff.worlds.shapes.checker import look
from tsdiff.worlds.shapes.features import load_features
from tsdiff.worlds.shapes.grammar import KINDS, MOST_THINGS
from tsdiff.worlds.shapes.model import MODELS, ShapesOutline
from tsdiff.worlds.shapes.render import render
from tsdiff.worlds.shapes.scenes import draw_prompt, draw_scene, near_misses, training_example
from tsdiff.worlds.shapes.suites import seen, unseen
from tsdiff.worlds.shapes.train.features import labels

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "docs" / "results"
CHANCE = 1e-6
"""How improbable an outcome must be under the card's own lower bounds before a test says that the card is wrong."""

prepare_torchvision()


def card(name: str) -> dict:
    return json.loads((RESULTS / f"{name}.json").read_text())


def agrees(right: int, total: int, low: float, high: float) -> bool:
    """Whether a count is credible for some probability in the card's interval."""
    return binom.cdf(right, total, low) > CHANCE and binom.sf(right - 1, total, high) > CHANCE


def network_line(name: str) -> dict:
    return next(line for line in card("shapes_speed")["models"] if line["name"] == name)


# What ships ----------------------------------------------------------------------------------------------------------


def test_the_weights_are_small_and_safe():
    files = [path for path in MODELS.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 40e6
    assert {path.suffix for path in files} <= {".safetensors", ".json", ".md", ".txt", ".png"}


def test_entry_points_and_files_belong_together():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    points = project["project"]["entry-points"]
    for group, name in (("models", "shapes"), ("models", "shapes-small"), ("verifiers", "shapes-clip"), ("suites", "shapes/seen"), ("suites", "shapes/unseen")):
        module, _, attribute = points[f"tsdiff.{group}"][name].partition(":")
        assert hasattr(import_module(module), attribute), name
    patterns = project["tool"]["setuptools"]["package-data"]["tsdiff.worlds.shapes"]
    world = MODELS.parent
    packed = {path for pattern in patterns for path in world.glob(pattern)}
    assert {path for path in MODELS.rglob("*") if path.is_file()} <= packed


@pytest.mark.parametrize("name", ["shapes", "shapes-small"])
def test_a_model_is_an_ordinary_pipeline_folder(name):
    """diffusers loads it by itself, and what the card says of its size is so."""
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(MODELS / name, local_files_only=True, torch_dtype=torch.float32)
    assert sum(value.numel() for value in pipeline.unet.parameters()) == network_line(name)["parameters"]
    assert {value.dtype for value in pipeline.unet.parameters()} == {torch.float32}


def test_the_small_model_needs_a_third_of_the_compute_at_most():
    assert network_line("shapes-small")["gflops"] <= network_line("shapes")["gflops"] / 3


# What the models do --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["shapes", "shapes-small"])
def test_samples_obey_prompts_as_often_as_the_card_says(name):
    """Two prompts of each easy kind and one of each other, one sample each."""
    line = next(line for line in card("shapes_samples")["lines"] if line["model"] == name and line["steps"] == 20 and line["guidance"] == ShapesOutline.default_guidance_scale)
    suite = [condition for condition in seen.conditions() if condition.metadata["tag"] in ("single_object", "colors")][::2]
    results = tsdiff.search(name, suite, policy="best-of-n", policy_options={"n": 1}, verifier="shapes-oracle", baseline=False, seed=100)
    right = sum(int(result.node.values["shapes-oracle"].parts["satisfied"]) for result in results)
    easy = [line["kinds"][kind] for kind in ("single_object", "colors")]
    assert agrees(right, len(results), min(kind["low"] for kind in easy), max(kind["high"] for kind in easy))


def test_search_helps_where_one_sample_fails():
    """Under the oracle the best of eight is at least as good as the first for every prompt, and better for some."""
    hard = [condition for condition in unseen.conditions() if condition.metadata["tag"] == "color_position"][:4]
    results = tsdiff.search("shapes", hard, policy="best-of-n", policy_options={"n": 8}, verifier="shapes-oracle", seed=0)
    scores = [(result.first_score, result.score) for result in results]
    assert all(first <= best for first, best in scores)
    assert sum(best for _, best in scores) > sum(first for first, _ in scores)


def test_the_checker_agrees_with_the_truth_through_the_autoencoder():
    from diffusers import AutoencoderKL

    vae = AutoencoderKL.from_pretrained(MODELS / "shapes" / "vae", local_files_only=True).eval()
    prompts, pictures, truths = [], [], []
    for index in range(180):
        rng = generator(derive("autoencoder test", index))
        prompt = draw_prompt(list(KINDS)[index % len(KINDS)], rng, held_out=True)
        shown = prompt if index % 2 else sorted(near_misses(prompt).items())[0][1]
        prompts.append(prompt)
        truths.append(shown is prompt)
        pictures.append(torch.from_numpy(render(draw_scene(shown, rng, held_out=True))).permute(2, 0, 1))
    with torch.no_grad():
        decoded = vae.decode(vae.encode(torch.stack(pictures) * 2 - 1).latent_dist.mean).sample
    images = (decoded / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()
    right = sum(prompt.judge(look(image)).satisfied == truth for prompt, image, truth in zip(prompts, images, truths, strict=True))
    known = card("shapes_checker")["states"]["autoencoder"]["agreement"]["overall"]
    assert known["share"] >= 0.98
    assert agrees(right, len(prompts), known["low"], known["high"])


# What the verifiers do -----------------------------------------------------------------------------------------------


def test_the_clip_tells_near_misses_as_well_as_the_card_says():
    (judge,) = judges_of(["shapes-clip"])
    judge.prepare("cpu")
    pictures, conditions = [], []
    for index in range(90):
        rng = generator(derive("clip test", index))
        prompt = draw_prompt(list(KINDS)[index % len(KINDS)], rng, held_out=True)
        misses = [miss for miss in near_misses(prompt).values() if miss.total <= MOST_THINGS and len(miss.groups) <= (2 if miss.links else 3)]
        picture = torch.from_numpy(render(draw_scene(prompt, rng, held_out=True))).permute(2, 0, 1)
        for text in (prompt.text, misses[index % len(misses)].text):
            pictures.append(picture)
            conditions.append(Condition(text))
    answers = score_pictures([judge], pictures, conditions, device="cpu", rows=64)
    scores = [answer["shapes-clip"].score for answer in answers]
    right = sum(own > other for own, other in zip(scores[::2], scores[1::2], strict=True))
    pairs = card("shapes_clip")["tables"]["captions, pairs"]
    assert agrees(right, 90, min(entry["low"] for entry in pairs.values()), max(entry["high"] for entry in pairs.values()))


def test_features_know_what_is_drawn():
    """Fresh drawings: the 40 presences and the count are right far above chance (half of the counts are 1 or 2)."""
    scenes = [training_example(derive("features test"), index)[1] for index in range(64)]
    pictures = torch.stack([torch.from_numpy(render(scene)).permute(2, 0, 1) for scene in scenes])
    truth, number = labels(scenes)
    things, count = load_features()(pictures)
    assert ((things > 0) == (truth > 0)).float().mean() > 0.98
    assert (count.argmax(1) == number).float().mean() > 0.9
    assert load_features().features(pictures).shape == (64, 64)


# The command line ----------------------------------------------------------------------------------------------------


def run(*arguments: str, cwd: Path, path: Path | None = None) -> subprocess.CompletedProcess[str]:
    environment = {"PATH": "/usr/bin:/bin", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "HOME": str(cwd)} | ({} if path is None else {"PYTHONPATH": str(path)})
    return subprocess.run([sys.executable, "-m", "tsdiff", *arguments], cwd=cwd, env=environment, capture_output=True, text=True, check=False)


def test_a_search_says_nothing_that_is_not_ours(tmp_path):
    """No warning, progress bar or notice of a library, on a terminal or not."""
    done = run("search", "a red star", "--model", "shapes", "--policy", "best-of-n", "--policy-option", "n=2", "--steps", "2", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    said = [line for line in done.stderr.splitlines() if line]
    assert said[0].startswith("no verifier was given: using 'shapes-clip' and 'shapes-oracle'")
    assert len(said) == 2, said  # the other says what is searched and what it costs
    assert "shapes-oracle" in done.stdout


def test_words_that_the_world_does_not_have_are_warned_of_once(tmp_path):
    done = run("search", "a photo of a cat", "--model", "shapes", "--policy", "best-of-n", "--policy-option", "n=1", "--steps", "2", "--no-baseline", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("the shapes world does not know 'photo', 'cat'") == 2  # the warning, and why the oracle is left out
    assert "'shapes-oracle' is left out" in done.stderr


def test_without_this_world_the_rest_works(tmp_path):
    """A copy of the package without the folder lists, describes and searches what is left."""
    import shutil

    package = tmp_path / "site" / "tsdiff"
    shutil.copytree(ROOT / "tsdiff", package, ignore=shutil.ignore_patterns("__pycache__", "shapes"))
    assert not (package / "worlds" / "shapes").exists()
    listed = run("list", cwd=tmp_path, path=package.parent)
    assert listed.returncode == 0, listed.stderr
    assert "gaussian-target" in listed.stdout
    done = run("search", "--model", "gaussian", "--policy", "best-of-n", "--policy-option", "n=2", cwd=tmp_path, path=package.parent)
    assert done.returncode == 0, done.stderr
    gone = run("search", "a star", cwd=tmp_path, path=package.parent)
    assert gone.returncode == 2
    assert "shapes" in gone.stderr
