"""Stable Diffusion 1.x and 2.x to the tests of all families."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from damages import configured, edit
from family import PROMPTS, Call, Family, Refused
from sd_reference import SCHEDULERS, made
from tiny_sd import tiny_stable_diffusion

from tsdiff.treesearch.protocols import Condition

TWIN = "StableDiffusionImg2ImgPipeline"


def reference(pipe: Any, call: Call, patch: pytest.MonkeyPatch) -> Any:
    """See `Family`."""
    rescale = {} if call.image is not None else {"guidance_rescale": call.rescale}
    return made(pipe, call, patch, twin=TWIN, **rescale)


def as_image_to_image(folder: Path) -> None:
    """Saved by the other pipeline class."""
    edit(folder / "model_index.json", _class_name=TWIN)


SD = Family(
    name="sd",
    make=tiny_stable_diffusion,
    reference=reference,
    network="unet",
    conditions=[Condition(prompt, negative_prompt="blurry") for prompt in (*PROMPTS, "")],
    other_size=(24, 16),
    multiple=2,
    solvers=tuple(SCHEDULERS),
    branching="ddpm",
    defaults=(20, 7.5),
    guidances=("off", "on", "rescaled"),
    twin=TWIN,
    twin_solvers=("ddim", "euler", "dpm++2m"),
    embeddings={"prompt_embeds": (20, 32)},
    long=(Condition("a" * 80), ["5 tokens longer than the 77 that the text encoder reads; its last 5 tokens are dropped"]),
    refused={
        "misspelt option": Refused(Condition(extra={"clipskip": 1}), "clip_skip"),
        "misspelt tensor": Refused(Condition(tensors={"prompt_embedding": torch.zeros(77, 32)}), "prompt_embeds"),
        "batch of embeddings": Refused(Condition(tensors={"prompt_embeds": torch.zeros(2, 77, 32)}), r"\(1, tokens, 32\)"),
        "clip_skip": Refused(Condition(extra={"clip_skip": 2}), "between 0 and 1"),
        "clip_skip as text": Refused(Condition(extra={"clip_skip": "1"}), "between 0 and 1"),
        "attention": Refused(Condition(extra={"cross_attention_kwargs": 0.5}), "dictionary"),
        "image": Refused(Condition(extra={"ip_adapter_image": torch.zeros(3, 8, 8)}), "load_ip_adapter"),
        "image twice": Refused(Condition(extra={"ip_adapter_image": 1, "ip_adapter_image_embeds": []}), "leave out one"),
        "lengths": Refused(Condition("a", tensors={"prompt_embeds": torch.zeros(3, 32)}), "3 tokens and the negative prompt's 77", guided=(True,)),
    },
    damages={
        "inpainting": configured("unet", "inpainting UNet with 9", in_channels=9),
        "SDXL unet": configured("unet", "SDXL", addition_embed_type="text_time"),
        "other text width": configured("text_encoder", "do not belong together", hidden_size=24),
    },
    strangers=["StableDiffusionInpaintPipeline"],
    saved_as={"by its image-to-image class": as_image_to_image},
)
