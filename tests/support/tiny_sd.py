"""A Stable Diffusion pipeline with every part of the real one, small and random."""

from __future__ import annotations

import string
from pathlib import Path
from typing import Any

from tsdiff.diffusion.quiet import quiet_libraries
from tsdiff.treesearch.imports import prepare_torchvision

prepare_torchvision()  # so that tests may import diffusers after this module

SCHEDULER = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "timestep_spacing": "leading",
    "steps_offset": 1,
    "clip_sample": False,
    "set_alpha_to_one": False,
}


def tiny_stable_diffusion(folder: str | Path | None = None, *, seed: int = 0, **overrides: Any) -> Any:
    """A tiny random `StableDiffusionPipeline` in eval mode.

    Latents are (4, 8, 8), images (3, 16, 16), embeddings (77, 32); the VAE's factor is 2.

    Args:
      folder: where to save it too; None keeps it in memory.
      seed: of its weights.
      overrides: components that replace the usual ones, e.g. `text_encoder=None, tokenizer=None`; and `unet_config`,
        `vae_config`: entries that replace those of the configs.
    """
    with quiet_libraries():
        import torch
        from diffusers import DDIMScheduler, StableDiffusionPipeline

        state = torch.get_rng_state()
        torch.manual_seed(seed)
        try:
            parts: dict[str, Any] = {
                "unet": _unet(**overrides.pop("unet_config", {})),
                "vae": _vae(**overrides.pop("vae_config", {})),
                "text_encoder": _text_encoder(),
                "tokenizer": tiny_clip_tokenizer(),
                "scheduler": DDIMScheduler(**SCHEDULER),
                "safety_checker": None,
                "feature_extractor": None,
                "requires_safety_checker": False,
            }
            pipe = StableDiffusionPipeline(**(parts | overrides))
        finally:
            torch.set_rng_state(state)
        for part in pipe.components.values():
            if isinstance(part, torch.nn.Module):
                part.eval()
        pipe.set_progress_bar_config(disable=True)
        if folder is not None:
            pipe.save_pretrained(folder)
        return pipe


def _unet(**config: Any) -> Any:
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        **{
            "sample_size": 8,
            "in_channels": 4,
            "out_channels": 4,
            "layers_per_block": 1,
            "block_out_channels": (32, 64),
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
            "cross_attention_dim": 32,
            "attention_head_dim": 2,
            "norm_num_groups": 8,
        }
        | config
    )


def _vae(**config: Any) -> Any:
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        **{
            "in_channels": 3,
            "out_channels": 3,
            "latent_channels": 4,
            "block_out_channels": (8, 16),
            "layers_per_block": 1,
            "norm_num_groups": 8,
            "down_block_types": ("DownEncoderBlock2D", "DownEncoderBlock2D"),
            "up_block_types": ("UpDecoderBlock2D", "UpDecoderBlock2D"),
            "sample_size": 16,
            "scaling_factor": 0.18215,
        }
        | config
    )


def _text_encoder() -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel

    config = CLIPTextConfig(
        vocab_size=len(_vocabulary()),
        hidden_size=32,
        intermediate_size=37,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=77,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    return CLIPTextModel(config)


def _vocabulary() -> dict[str, int]:
    letters = string.ascii_lowercase + string.digits + ",.!?'-"
    tokens = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{letter}</w>" for letter in letters)]
    return {token: index for index, token in enumerate(tokens)}


def tiny_clip_tokenizer() -> Any:
    """A CLIP tokenizer without merges: one token for each character."""
    from transformers import CLIPTokenizer

    return CLIPTokenizer(vocab=_vocabulary(), merges=[], model_max_length=77)
