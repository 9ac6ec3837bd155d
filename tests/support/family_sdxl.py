"""Stable Diffusion XL to the tests of all families."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from damages import configured, edit, indexed
from family import PROMPTS, Call, Family, Refused
from sd_reference import SCHEDULERS, made
from tiny_sdxl import POOLED, TIME_WIDTH, tiny_sdxl

from tsdiff.treesearch.protocols import Condition

TWIN = "StableDiffusionXLImg2ImgPipeline"
OWN = "euler"


def reference(pipe: Any, call: Call, patch: pytest.MonkeyPatch) -> Any:
    """See `Family`."""
    return made(pipe, call, patch, twin=TWIN, guidance_rescale=call.rescale)


def as_image_to_image(folder: Path) -> None:
    """Saved by the other pipeline class, which has a setting more."""
    edit(folder / "model_index.json", _class_name=TWIN, requires_aesthetics_score=False)


def pooled(**tensors: torch.Tensor) -> Condition:
    """A condition of embeddings, of 3 tokens."""
    return Condition(tensors={"prompt_embeds": torch.zeros(3, 40), "pooled_prompt_embeds": torch.zeros(POOLED)} | tensors, negative_prompt="b")


def told(**extra: Any) -> Condition:
    """A condition with options."""
    return Condition("a", extra=extra)


SDXL = Family(
    name="sdxl",
    make=tiny_sdxl,
    reference=reference,
    network="unet",
    conditions=[Condition(prompt, negative_prompt="blurry") for prompt in PROMPTS],
    other_size=(16, 24),
    multiple=2,
    solvers=(OWN, *(name for name in SCHEDULERS if name != OWN)),
    branching="euler-ancestral",
    defaults=(30, 5.0),
    guidances=("off", "rescaled"),
    twin=TWIN,
    twin_solvers=("euler", "ddim", "dpm++2m"),
    embeddings={"prompt_embeds": (30, 40), "pooled_prompt_embeds": (POOLED,)},
    bare={"force_zeros_for_empty_prompt": False},
    long=(
        Condition("a" * 90, extra={"prompt_2": "b" * 80}),
        [
            "15 tokens longer than the 77 that CLIP reads; its last 15 tokens are dropped there",
            "5 tokens longer than the 77 that the second CLIP reads; its last 5 tokens are dropped there",
        ],
    ),
    refused={
        "misspelt option": Refused(told(clip_skp=1), "did you mean 'clip_skip'"),
        "aesthetic score": Refused(told(aesthetic_score=6.0), "only a refiner reads it"),
        "negative aesthetic score": Refused(told(negative_aesthetic_score=2.5), "only a refiner reads it"),
        "ensemble of experts": Refused(told(denoising_end=0.8), "refiners are not supported"),
        "attention": Refused(told(cross_attention_kwargs={"scale": 0.5}), "adapters have the scale"),
        "clip_skip": Refused(told(clip_skip=3), "between 0 and 2"),
        "prompt_2": Refused(told(prompt_2=["a"]), "must be a text"),
        "three sides": Refused(told(original_size=(8, 8, 8)), r"original_size is \(8, 8, 8\) but must be two whole numbers of pixels"),
        "negative side": Refused(told(crops_coords_top_left=(-1, 0)), "two whole numbers"),
        "half of a negative size": Refused(told(negative_target_size=(8, 8)), "given without negative_original_size"),
        "negative crops alone": Refused(told(negative_crops_coords_top_left=(0, 0)), "without negative_original_size and negative_target_size"),
        "misspelt tensor": Refused(Condition("a", tensors={"prompt_embed": torch.zeros(3, 40)}), "did you mean 'prompt_embeds'"),
        "lengths": Refused(pooled(), "3 tokens and the negative prompt's 77", guided=(True,)),
        "image": Refused(told(ip_adapter_image=torch.zeros(3, 8, 8)), "load_ip_adapter"),
    },
    damages={
        "EDM scheduler": indexed("EDMEulerScheduler, scales what the network reads", scheduler=["diffusers", "EDMEulerScheduler"]),
        "inpainting": configured("unet", "an inpainting UNet", in_channels=9),
        "plain unet": configured("unet", "none of Stable Diffusion XL", addition_embed_type=None),
        "class embedding": configured("unet", "wants a class embedding", class_embed_type="timestep"),
        "projected text": configured("unet", "projects its text embeddings", encoder_hid_dim_type="text_proj"),
        "refiner": configured("unet", "is a refiner", projection_class_embeddings_input_dim=5 * TIME_WIDTH + POOLED),
        "refiner by its settings": indexed("is a refiner", _class_name=TWIN, requires_aesthetics_score=True),
        "other pooled width": configured("text_encoder_2", "do not belong together", projection_dim=24),
        "other text width": configured("text_encoder", "make embeddings of width 48 but its UNet takes 40", hidden_size=24),
        "shifted channels": configured("vae", "latents_mean", latents_mean=[0.0] * 4, latents_std=[1.0] * 4),
    },
    strangers=["StableDiffusionXLInpaintPipeline"],
    saved_as={"by its image-to-image class": as_image_to_image},
)
