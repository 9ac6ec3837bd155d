"""FLUX.1 (dev) to the tests of all families."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from damages import configured, indexed
from diffusers.pipelines.flux import pipeline_flux_img2img as image_to_image
from family import PROMPTS, Call, Family, Refused
from flow_reference import NAMES, made
from tiny_flux import tiny_flux
from torch import Tensor
from torch.nn.functional import pixel_shuffle, pixel_unshuffle

from tsdiff.treesearch.protocols import Condition

TWIN = "FluxImg2ImgPipeline"


def packed(latents: Tensor) -> Tensor:
    """(..., C, h, w) as the sequence of patches that pipelines take and give."""
    return pixel_unshuffle(latents, 2).flatten(-2).transpose(-1, -2)


def unpacked(tokens: Tensor, size: tuple[int, ...]) -> Tensor:
    """The sequence of an image of (height, width) pixels as latents (B, C, h, w)."""
    height, width = (side // 4 for side in size[:2])
    return pixel_shuffle(tokens.transpose(1, 2).unflatten(2, (height, width)), 2)


def reference(pipe: Any, call: Call, patch: pytest.MonkeyPatch) -> Any:
    """See `Family`. The image-to-image class would tell another guidance scale."""
    output = made(pipe, call, patch, pack=packed, twin=(TWIN, image_to_image), scale="true_cfg_scale", guidance_scale=3.5).images
    return unpacked(output, call.size) if call.output == "latent" else output


FLUX = Family(
    name="flux",
    make=tiny_flux,
    reference=reference,
    conditions=[Condition(prompt, negative_prompt="blurry", extra={"max_sequence_length": 24}) for prompt in PROMPTS],
    size=(16, 24),
    latent=(4, 8, 12),
    other_size=(32, 24),
    own_size=(256, 256),  # 128 latent pixels
    multiple=4,
    solvers=NAMES,
    branching="flow-ancestral",
    defaults=(28, 1.0),
    guided_by="true_cfg_scale",
    twin=TWIN,
    twin_solvers=("flow-euler",),
    embeddings={"prompt_embeds": (30, 48), "pooled_prompt_embeds": (16,)},
    long=(
        Condition("a" * 90, extra={"max_sequence_length": 24}),
        [
            "15 tokens longer than the 77 that CLIP reads; its last 15 tokens are dropped there",
            "68 tokens longer than the 24 that T5 reads; its last 68 tokens are dropped there",
        ],
    ),
    refused={
        "guidance without a negative prompt": Refused(Condition("a"), "leads away from a negative prompt, and there is none; .* usually 3.5", guided=(True,)),
        "told scale": Refused(Condition("a", "b", extra={"guidance_scale": "3"}), "must be a number of at least 0"),
        "length": Refused(Condition("a", "b", extra={"max_sequence_length": 600}), "between 1 and 512"),
        "clip_skip": Refused(Condition("a", "b", extra={"clip_skip": 1}), "unknown option of a FLUX.1 condition 'clip_skip'"),
        "lengths": Refused(
            Condition("a", "b", tensors={"prompt_embeds": torch.zeros(3, 48), "pooled_prompt_embeds": torch.zeros(16)}), "3 tokens and the negative prompt's 512", guided=(True,)
        ),
    },
    damages={
        "a transformer of Stable Diffusion 3": indexed("SD3Transformer2DModel, which is not supported", transformer=["diffusers", "SD3Transformer2DModel"]),
        "a fill model": configured("transformer", "takes 96 channels but patches .* have 16", in_channels=96),
        "other text width": configured("text_encoder_2", "do not belong together", d_model=32),
        "other pooled width": configured("text_encoder", "do not belong together", hidden_size=32),
    },
    strangers=["FluxInpaintPipeline"],
)
