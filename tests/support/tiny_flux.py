"""FLUX.1 pipelines with every part of the real ones, small and random."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tiny_parts import assembled, autoencoder, clip, clip_tokenizer, t5, t5_tokenizer

DEV = {"shift": 3.0, "use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 1.15, "base_image_seq_len": 16, "max_image_seq_len": 64}
SCHNELL = {"shift": 1.0, "use_dynamic_shifting": False}


def tiny_flux(folder: str | Path | None = None, *, told: bool = True, seed: int = 0, scheduler_config: dict[str, Any] | None = None, transformer_config: dict[str, Any] | None = None, **replaced: Any) -> Any:
    """A tiny random `FluxPipeline` in eval mode; its image of 16 x 16 pixels has latents (4, 8, 8) and 16 patches.

    Args:
      folder: where to save it too.
      told: whether the network is told a guidance scale (dev), or not (schnell).
      seed: of its weights.
      scheduler_config, transformer_config: entries that replace those of the configs.
      replaced: components that replace the usual ones.
    """
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel

    config = {
        "in_channels": 16, "num_layers": 1, "num_single_layers": 1, "attention_head_dim": 8, "num_attention_heads": 4, "joint_attention_dim": 48,
        "pooled_projection_dim": 16, "guidance_embeds": told, "axes_dims_rope": (2, 2, 4),
    } | (transformer_config or {})  # fmt: skip
    parts = {
        "transformer": lambda: FluxTransformer2DModel(**config),
        "vae": lambda: autoencoder(4, scaling_factor=0.3611, shift_factor=0.1159),
        "text_encoder": lambda: clip(16),
        "tokenizer": clip_tokenizer,
        "text_encoder_2": lambda: t5(48),
        "tokenizer_2": t5_tokenizer,
        "scheduler": lambda: FlowMatchEulerDiscreteScheduler(**(DEV if told else SCHNELL) | (scheduler_config or {})),
    }
    return assembled("FluxPipeline", parts, folder, seed, replaced)
