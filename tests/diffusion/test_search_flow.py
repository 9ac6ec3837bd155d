"""Searching flow models, the whole way: guidance and image-to-image mean what they mean in diffusers' pipelines."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers.pipelines.stable_diffusion_3 import pipeline_stable_diffusion_3_img2img as img2img
from flow_reference import inject, swapped
from PIL import Image
from tiny_flux import tiny_flux
from tiny_sd3 import tiny_sd3
from torch.nn.functional import pixel_unshuffle

import tsdiff
from tsdiff.policies import BestOfN
from tsdiff.treesearch.errors import UsageError
from tsdiff.treesearch.noise import derive, initial_noise, normals

CLOSE = {"rtol": 0.0, "atol": 1e-4}
SHORT = {"max_sequence_length": 24}
SIZE = {"height": 16, "width": 16}


def searched(pipe: Any, **options: Any) -> Any:
    return tsdiff.search(pipe, "two cats", policy=BestOfN(n=1), verifier="luminance", seed=3, baseline=False, **SIZE, **options)


@pytest.mark.parametrize(("options", "rows"), [({}, 1), ({"guidance_scale": 9.0}, 1), ({"true_cfg_scale": 4.0, "negative_prompt": "blurry"}, 2)], ids=["usual", "told", "true"])
def test_guidance_of_flux_is_that_of_its_pipeline(options: dict[str, Any], rows: int) -> None:
    pipe = tiny_flux()
    result = searched(pipe, steps=4, condition_extra=SHORT, **options)
    noise = torch.from_numpy(initial_noise(derive(3, "draw", 0), (4, 8, 8)))[None]
    theirs = swapped(pipe)(
        "two cats", latents=pixel_unshuffle(noise, 2).flatten(2).transpose(1, 2), num_inference_steps=4, output_type="latent", **SIZE, **SHORT, **options
    ).images
    torch.testing.assert_close(pixel_unshuffle(result.latents[result.node.index][None], 2).flatten(2).transpose(1, 2), theirs, **CLOSE)
    assert result.ledger.rows == rows * result.ledger.nfe


def test_there_is_one_kind_of_guidance_where_the_network_is_not_told_the_scale() -> None:
    for pipe in (tiny_flux(told=False), tiny_sd3()):
        with pytest.raises(UsageError, match=r"true_cfg_scale is 2 but .* give guidance_scale"):
            searched(pipe, true_cfg_scale=2.0)


@pytest.mark.parametrize("strength", [0.5, 0.6, 1.0])
def test_an_initial_image_is_remade_as_far_as_the_pipeline_remakes_it(strength: float, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe, image = tiny_sd3(), Image.new("RGB", (16, 16), (200, 40, 90))
    result = searched(pipe, steps=5, init_image=image, strength=strength, guidance_scale=4.0)
    noises = [torch.from_numpy(normals(derive(3, "encode"), 256).reshape(1, 4, 8, 8)), torch.from_numpy(initial_noise(derive(3, "draw", 0), (4, 8, 8)))[None]]
    inject(monkeypatch, img2img, noises)
    theirs = swapped(pipe, name_of_class="StableDiffusion3Img2ImgPipeline")(
        "two cats", image=image, strength=strength, num_inference_steps=5, guidance_scale=4.0, output_type="latent", **SIZE
    ).images
    torch.testing.assert_close(result.latents[result.node.index][None], theirs, **CLOSE)
