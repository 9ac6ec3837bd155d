"""A Stable Diffusion 3 pipeline with every part of the real one, small and random."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tiny_parts import assembled, autoencoder, clip_tokenizer, clip_with_projection, t5, t5_tokenizer

SHIFT = 3.0


def tiny_sd3(folder: str | Path | None = None, *, seed: int = 0, scheduler_config: dict[str, Any] | None = None, transformer_config: dict[str, Any] | None = None, **replaced: Any) -> Any:
    """A tiny random `StableDiffusion3Pipeline` in eval mode.

    Latents are (4, 8, 8) at its own size of 16 x 16 pixels, which it has positions for up to 32 of; patches are 2 x 2.

    Args:
      folder: where to save it too.
      seed: of its weights.
      scheduler_config, transformer_config: entries that replace those of the configs.
      replaced: components that replace the usual ones.
    """
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel

    config = {
        "sample_size": 8, "patch_size": 2, "in_channels": 4, "out_channels": 4, "num_layers": 2, "attention_head_dim": 8, "num_attention_heads": 4,
        "joint_attention_dim": 48, "caption_projection_dim": 32, "pooled_projection_dim": 40, "pos_embed_max_size": 8, "qk_norm": "rms_norm",
        "dual_attention_layers": (0,),
    } | (transformer_config or {})  # fmt: skip
    parts = {
        "transformer": lambda: SD3Transformer2DModel(**config),
        "vae": lambda: autoencoder(4),
        "text_encoder": lambda: clip_with_projection(16, 16),
        "tokenizer": clip_tokenizer,
        "text_encoder_2": lambda: clip_with_projection(24, 24),
        "tokenizer_2": clip_tokenizer,
        "text_encoder_3": lambda: t5(48),
        "tokenizer_3": t5_tokenizer,
        "scheduler": lambda: FlowMatchEulerDiscreteScheduler(**{"shift": SHIFT} | (scheduler_config or {})),
    }
    return assembled("StableDiffusion3Pipeline", parts, folder, seed, replaced)
