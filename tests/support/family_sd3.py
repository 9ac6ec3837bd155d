"""Stable Diffusion 3 to the tests of all families."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from damages import configured, indexed
from diffusers.pipelines.stable_diffusion_3 import pipeline_stable_diffusion_3_img2img as image_to_image
from family import PROMPTS, Call, Family, Refused
from flow_reference import NAMES, made
from tiny_sd3 import tiny_sd3

from tsdiff.treesearch.protocols import Condition

TWIN = "StableDiffusion3Img2ImgPipeline"


def reference(pipe: Any, call: Call, patch: pytest.MonkeyPatch) -> Any:
    """See `Family`."""
    return made(pipe, call, patch, twin=(TWIN, image_to_image)).images


def pooled(**tensors: torch.Tensor) -> Condition:
    """A condition of embeddings, of 3 tokens."""
    return Condition(tensors={"prompt_embeds": torch.zeros(3, 48), "pooled_prompt_embeds": torch.zeros(40)} | tensors)


SD3 = Family(
    name="sd3",
    make=tiny_sd3,
    reference=reference,
    conditions=[Condition(prompt, negative_prompt="blurry", extra={"max_sequence_length": 40}) for prompt in PROMPTS],
    other_size=(24, 32),
    multiple=4,
    solvers=NAMES,
    branching="flow-sde",
    defaults=(28, 7.0),
    twin=TWIN,
    twin_solvers=("flow-euler",),
    embeddings={"prompt_embeds": (30, 48), "pooled_prompt_embeds": (40,)},
    optional=("text_encoder_3",),
    long=(
        Condition("a" * 90),
        [f"15 tokens longer than the 77 that {reader} reads; its last 15 tokens are dropped there" for reader in ("CLIP", "the second CLIP")],
    ),
    refused={
        "misspelt option": Refused(Condition("a", extra={"clip_skp": 1}), "did you mean 'clip_skip'"),
        "skipped layers": Refused(Condition("a", extra={"skip_guidance_layers": [1]}), "third network row"),
        "clip_skip": Refused(Condition("a", extra={"clip_skip": 3}), "between 0 and 2"),
        "length": Refused(Condition("a", extra={"max_sequence_length": 513}), "between 1 and 512"),
        "prompt_2": Refused(Condition("a", extra={"prompt_2": ["a"]}), "must be a text"),
        "misspelt tensor": Refused(Condition("a", tensors={"prompt_embed": torch.zeros(3, 48)}), "did you mean 'prompt_embeds'"),
        "pooled shape": Refused(pooled(pooled_prompt_embeds=torch.zeros(2, 40)), r"must be \(40,\) or \(1, 40\)"),
        "lengths": Refused(pooled(), "3 tokens and the negative prompt's 333", guided=(True,)),
    },
    damages={
        "a transformer of FLUX.1": indexed("FluxTransformer2DModel, which is not supported", transformer=["diffusers", "FluxTransformer2DModel"]),
        "other channels": configured("transformer", "takes 8 channels but its autoencoder makes 4", in_channels=8),
        "other text width": configured("text_encoder_3", "do not belong together", d_model=32),
        "other pooled width": configured("text_encoder", "do not belong together", projection_dim=20),
    },
    strangers=["StableDiffusion3InpaintPipeline"],
)
