"""PixArt-Sigma to the tests of all families."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from damages import configured, edit, indexed
from family import PROMPTS, Call, Family, Refused
from sd_reference import SCHEDULERS, made
from tiny_dit import tiny_pixart
from torch import Tensor

from tsdiff.treesearch.protocols import Condition

OWN = "dpm++2m"


def reference(pipe: Any, call: Call, patch: pytest.MonkeyPatch) -> Any:
    """See `Family`."""
    negative = {"negative_prompt": None} if call.conditions[0].tensors else {}
    return made(pipe, call, patch, use_resolution_binning=False, **negative)


def as_published(folder: Path) -> None:
    """Under the name of a class that diffusers has since split up."""
    edit(folder / "model_index.json", transformer=["diffusers", "Transformer2DModel"])
    edit(folder / "transformer/config.json", _class_name="Transformer2DModel")


def wrong(**tensors: Tensor) -> Condition:
    """Embeddings of 6 tokens, the last two of padding, with others in their place."""
    return Condition(tensors={"prompt_embeds": torch.zeros(6, 24), "prompt_attention_mask": torch.tensor([1.0] * 4 + [0.0] * 2)} | tensors)


PIXART = Family(
    name="pixart",
    make=tiny_pixart,
    reference=reference,
    conditions=[Condition(prompt, negative_prompt="blurry", extra={"max_sequence_length": 40}) for prompt in ("A Red cube on a blue sphere", PROMPTS[1])],
    other_size=(24, 32),
    multiple=4,
    solvers=(OWN, *(name for name in SCHEDULERS if name != OWN)),
    branching="dpm++2m-sde",
    defaults=(20, 4.5),
    wide=True,
    embeddings={"prompt_embeds": (30, 24), "prompt_attention_mask": (30,)},
    masked=True,
    long=(
        Condition("a" * 20, extra={"max_sequence_length": 12, "clean_caption": False}),
        ["10 tokens longer than the 12 that T5 reads; its last 10 tokens are dropped there"],
    ),
    refused={
        "misspelt option": Refused(Condition("a", extra={"clean_captions": True}), "did you mean 'clean_caption'"),
        "binning": Refused(Condition("a", extra={"use_resolution_binning": True}), "images have the size that is asked for"),
        "length": Refused(Condition("a", extra={"max_sequence_length": 0}), "between 1 and 512"),
        "clean_caption": Refused(Condition("a", extra={"clean_caption": 1}), "must be true or false"),
        "mask's length": Refused(wrong(prompt_attention_mask=torch.ones(5)), "prompt_attention_mask has 5 tokens but prompt_embeds has 6"),
        "mask's numbers": Refused(wrong(prompt_attention_mask=torch.full((6,), 0.5)), "must hold 1 for tokens and 0 for padding"),
        "all hidden": Refused(wrong(prompt_attention_mask=torch.zeros(6)), "with a token at least"),
    },
    damages={
        "a transformer of DiT": indexed("DiTTransformer2DModel, which is not supported", transformer=["diffusers", "DiTTransformer2DModel"]),
        "another norm": configured("transformer", "none of PixArt's .*ada_norm_zero", norm_type="ada_norm_zero"),
        "other channels": configured("transformer", "takes 8 channels but its autoencoder makes 4", in_channels=8),
        "other text width": configured("text_encoder", "do not belong together", d_model=32),
    },
    saved_as={"as the published models were": as_published},
)
