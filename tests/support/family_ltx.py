"""LTX-Video to the tests of all families."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from damages import configured, indexed
from family import PROMPTS, Call, Family, Refused
from flow_reference import NAMES, made
from tiny_ltx import tiny_ltx
from torch import Tensor

from tsdiff.treesearch.protocols import Condition


def packed(latents: Tensor) -> Tensor:
    """(..., C, f, h, w) as the sequence that the pipeline takes and gives."""
    return latents.flatten(-3).transpose(-1, -2)


def unpacked(tokens: Tensor, size: tuple[int, ...]) -> Tensor:
    """The sequence of a video of (height, width, frames) as latents (B, C, f, h, w)."""
    height, width, frames = size
    return tokens.transpose(1, 2).unflatten(2, ((frames - 1) // 4 + 1, height // 4, width // 4))


def reference(pipe: Any, call: Call, patch: pytest.MonkeyPatch) -> Any:
    """See `Family`."""
    output = made(pipe, call, patch, pack=packed, frames="num_frames").frames
    return unpacked(output, call.size) if call.output == "latent" else output


def masked(mask: Tensor) -> Condition:
    """Embeddings of 6 tokens with a mask."""
    return Condition(tensors={"prompt_embeds": torch.zeros(6, 24), "prompt_attention_mask": mask})


LTX = Family(
    name="ltx",
    make=tiny_ltx,
    reference=reference,
    conditions=[Condition(prompt, negative_prompt="blurry", extra={"max_sequence_length": 40}) for prompt in PROMPTS],
    size=(32, 64, 5),
    latent=(8, 2, 8, 16),
    other_size=(64, 32, 9),
    own_size=(512, 704, 161),
    multiple=4,
    solvers=NAMES,
    branching="flow-ancestral",
    defaults=(50, 3.0),
    close=1e-5,
    embeddings={"prompt_embeds": (30, 24), "prompt_attention_mask": (30,)},
    masked=True,
    long=(
        Condition("a" * 20, extra={"max_sequence_length": 12}),
        ["10 tokens longer than the 12 that T5 reads; its last 10 tokens are dropped there"],
    ),
    refused={
        "misspelt option": Refused(Condition("a", extra={"framerate": 25}), "did you mean 'frame_rate'"),
        "rate": Refused(Condition("a", extra={"frame_rate": 0}), "above 0 and up to 1000"),
        "length": Refused(Condition("a", extra={"max_sequence_length": 600}), "between 1 and 512"),
        "decode": Refused(Condition("a", extra={"decode_timestep": 0.05}), "videos are decoded at timestep 0"),
        "mask's length": Refused(masked(torch.ones(5)), "prompt_attention_mask has 5 tokens but prompt_embeds has 6"),
        "mask's numbers": Refused(masked(torch.full((6,), 0.5)), "must hold 1 for tokens and 0 for padding"),
        "all hidden": Refused(masked(torch.zeros(6)), "with a token at least"),
    },
    damages={
        "a transformer of Wan": indexed("WanTransformer3DModel, which is not supported", transformer=["diffusers", "WanTransformer3DModel"]),
        "an autoencoder of images": indexed("AutoencoderKL, which is not supported", vae=["diffusers", "AutoencoderKL"]),
        "other channels": configured("transformer", "takes 16 channels but its autoencoder makes 8", in_channels=16),
        "patches": configured("transformer", "reads patches of 2 pixels and 1 frames", patch_size=2),
        "other text width": configured("text_encoder", "do not belong together", d_model=32),
    },
    strangers=["LTXImageToVideoPipeline"],
)
