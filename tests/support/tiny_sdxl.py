"""A Stable Diffusion XL pipeline with every part of the real one, small and random."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tiny_parts import assembled, autoencoder, clip, clip_tokenizer, clip_with_projection
from tiny_sd import SCHEDULER

POOLED, TIME_WIDTH = 20, 8


def tiny_sdxl(folder: str | Path | None = None, *, seed: int = 0, scheduler_config: dict[str, Any] | None = None, unet_config: dict[str, Any] | None = None, vae_config: dict[str, Any] | None = None, **replaced: Any) -> Any:
    """A tiny random `StableDiffusionXLPipeline` in eval mode.

    Latents are (4, 8, 8), images (3, 16, 16), embeddings (77, 40) and (20,); the VAE's factor is 2.

    Args:
      folder: where to save it too.
      seed: of the weights.
      scheduler_config, unet_config, vae_config: entries that replace those of the configs.
      replaced: components and settings that replace the usual ones.
    """
    from diffusers import EulerDiscreteScheduler, UNet2DConditionModel

    config = {
        "sample_size": 8, "in_channels": 4, "out_channels": 4, "layers_per_block": 1, "block_out_channels": (32, 64),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"), "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 2), "attention_head_dim": (2, 4), "use_linear_projection": True, "norm_num_groups": 8,
        "cross_attention_dim": 40, "addition_embed_type": "text_time", "addition_time_embed_dim": TIME_WIDTH,
        "projection_class_embeddings_input_dim": 6 * TIME_WIDTH + POOLED,
    } | (unet_config or {})  # fmt: skip
    parts = {
        "unet": lambda: UNet2DConditionModel(**config),
        "vae": lambda: autoencoder(4, **{"scaling_factor": 0.13025, "shift_factor": None} | (vae_config or {})),
        "text_encoder": lambda: clip(16),
        "tokenizer": clip_tokenizer,
        "text_encoder_2": lambda: clip_with_projection(24, POOLED),
        "tokenizer_2": clip_tokenizer,
        # From a config, because the published one has entries for other schedulers, too.
        "scheduler": lambda: EulerDiscreteScheduler.from_config(SCHEDULER | (scheduler_config or {})),
        "force_zeros_for_empty_prompt": lambda: True,
        "add_watermarker": lambda: False,
    }
    return assembled("StableDiffusionXLPipeline", parts, folder, seed, replaced)
