"""Samples of every family equal those of diffusers' own pipelines, whatever shares the batch."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from families import FAMILIES
from family import Family, Shelf, other_class, ours

import tsdiff
from tsdiff.diffusion.loading import load_model
from tsdiff.policies import BestOfN
from tsdiff.treesearch.errors import UsageError

# Of numpy, about how diffusers itself computes sigmas.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

TRAJECTORIES = [(name, solver, guidance) for name, one in FAMILIES.items() for solver in one.solvers for guidance in one.guidances]
FROM_IMAGES = [(name, solver) for name, one in FAMILIES.items() for solver in one.twin_solvers]


@pytest.mark.parametrize(("family", "solver", "guidance"), TRAJECTORIES, indirect=["family"])
def test_a_trajectory_equals_the_pipelines_in_one_batch_of_mixed_levels(
    shelf: Shelf, family: Family, solver: str, guidance: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    call = family.call(solver=solver, guidance=guidance, noise=True)
    family.require_equal(ours(shelf.model(family), call, stagger=2), family.reference(shelf.pipe(family), call, monkeypatch))


@pytest.mark.parametrize("family", [name for name, one in FAMILIES.items() if one.other_size is not None], indirect=True)
def test_sizes_other_than_the_usual(shelf: Shelf, family: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    """They may have other levels, positions and sizes that a network is told."""
    model = shelf.model(family)
    call = family.call(size=family.other_size, guidance="on", noise=True, latent=model.latent_shape(family.other_size))
    family.require_equal(ours(model, call), family.reference(shelf.pipe(family), call, monkeypatch))


def test_rows_of_a_mixed_batch_equal_rows_run_alone(shelf: Shelf, family: Family) -> None:
    for solver in (family.solvers[0], family.branching):
        call = family.call(solver=solver, guidance="on", noise=True, conditions=family.conditions[:2])
        together = ours(shelf.model(family), call, stagger=2)
        for row, condition in enumerate(call.conditions):
            alone = family.call(solver=solver, guidance="on", noise=call.noise[:, row : row + 1], conditions=[condition])
            family.require_equal(ours(shelf.model(family), alone), together[row : row + 1])


def test_decoded_pictures_equal_the_pipelines(shelf: Shelf, family: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    call = {"steps": 2, "guidance": "on", "noise": True}
    clean, pictures = (family.reference(shelf.pipe(family), family.call(**call, output=output), patch) for output, patch in _patched(monkeypatch, "latent", "pt"))
    media = shelf.model(family).decode(clean)
    assert (media.kind, media.pixels.dtype) == ("video" if family.video else "image", torch.float32)
    torch.testing.assert_close(media.pixels, pictures, rtol=0, atol=family.close)
    assert pictures.std() > 0.01


def _patched(monkeypatch: pytest.MonkeyPatch, *outputs: str) -> Any:
    for output in outputs:
        with monkeypatch.context() as patch:
            yield output, patch


def test_users_meet_their_own_picture_first(shelf: Shelf, family: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    call = family.call(conditions=family.conditions[:1], steps=3, guidance="on", seed=7, output="pil")
    result = tsdiff.search(
        shelf.searched(family), call.conditions[0], policy=BestOfN(n=1), verifier="luminance", steps=call.steps, seed=call.seed,
        initial_noise="torch", baseline=False, **call.sides, **family.guided(call.scale),
    )  # fmt: skip
    (theirs,) = family.reference(shelf.pipe(family), call, monkeypatch)
    mine, other = (np.stack([np.asarray(frame, dtype=int) for frame in frames]) for frames in (result.frames, theirs if family.video else [theirs]))
    assert mine.shape == other.shape
    assert np.abs(mine - other).max() <= 1  # rounding to 8 bits
    assert other.std() > 2


# From images ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "solver"), FROM_IMAGES, indirect=["family"])
def test_starting_from_an_image_equals_image_to_image(shelf: Shelf, family: Family, solver: str, monkeypatch: pytest.MonkeyPatch) -> None:
    images = torch.rand((len(family.conditions), 3, *family.size), generator=torch.Generator().manual_seed(1))
    call = family.call(solver=solver, guidance="on", noise=True, image=images)
    family.require_equal(ours(shelf.model(family), call), family.reference(shelf.pipe(family), call, monkeypatch))


@pytest.mark.parametrize("family", [name for name, one in FAMILIES.items() if one.twin is not None], indirect=True)
def test_the_image_to_image_class_is_the_same_model(shelf: Shelf, family: Family) -> None:
    model = load_model(other_class(shelf.pipe(family), str(family.twin)))
    assert model.fingerprint == shelf.model(family).fingerprint
    assert model.solvers == shelf.model(family).solvers


def test_images_are_encoded_to_latents_and_videos_do_not_start_from_them(shelf: Shelf, family: Family) -> None:
    model, noise = shelf.model(family), torch.zeros((2, *family.latent))
    images = torch.rand((2, 3, *family.size[:2]), generator=torch.Generator().manual_seed(1))
    if family.video:
        with pytest.raises(UsageError, match="cannot start from an image"):
            model.encode_images(images, noise)
        return
    latents = model.encode_images(images, noise)
    assert (tuple(latents.shape), latents.dtype) == (tuple(noise.shape), torch.float32)
    assert not torch.equal(latents[0], latents[1])
    vae = model.pipeline.vae
    with torch.no_grad():
        mean = vae.encode(2 * images - 1).latent_dist.mean
    torch.testing.assert_close(latents, (mean - (vae.config.get("shift_factor") or 0.0)) * vae.config.scaling_factor, rtol=0, atol=1e-5)
