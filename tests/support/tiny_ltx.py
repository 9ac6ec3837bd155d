"""LTX-Video pipelines with every part of the real one, small and random."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tiny_parts import assembled, t5, t5_tokenizer

SCHEDULER = {"use_dynamic_shifting": True, "base_shift": 0.95, "max_shift": 2.05, "base_image_seq_len": 16, "max_image_seq_len": 64, "shift_terminal": 0.1}


def tiny_ltx(folder: str | Path | None = None, *, seed: int = 0, scheduler_config: dict[str, Any] | None = None, transformer_config: dict[str, Any] | None = None, vae_config: dict[str, Any] | None = None, **replaced: Any) -> Any:
    """A tiny random `LTXPipeline` in eval mode; its video of 9 frames of 32 x 32 pixels has latents (8, 3, 8, 8).

    Args:
      folder: where to save it too.
      seed: of its weights.
      scheduler_config, transformer_config, vae_config: entries that replace those of the configs.
      replaced: components that replace the usual ones.
    """
    from diffusers import FlowMatchEulerDiscreteScheduler, LTXVideoTransformer3DModel

    config = {
        "in_channels": 8, "out_channels": 8, "num_attention_heads": 4, "attention_head_dim": 8, "cross_attention_dim": 32, "num_layers": 1, "caption_channels": 24,
    } | (transformer_config or {})  # fmt: skip
    parts = {
        "transformer": lambda: LTXVideoTransformer3DModel(**config),
        "vae": lambda: video_autoencoder(**(vae_config or {})),
        "text_encoder": lambda: t5(24),
        "tokenizer": t5_tokenizer,
        "scheduler": lambda: FlowMatchEulerDiscreteScheduler(**SCHEDULER | (scheduler_config or {})),
    }
    return assembled("LTXPipeline", parts, folder, seed, replaced)


def video_autoencoder(**config: Any) -> Any:
    """An autoencoder with factor 4 in space and time, whose latents are normalised channel by channel."""
    import torch
    from diffusers import AutoencoderKLLTXVideo

    usual = {
        "latent_channels": 8, "block_out_channels": (8,) * 4, "decoder_block_out_channels": (8,) * 4, "layers_per_block": (1,) * 5,
        "decoder_layers_per_block": (1,) * 5, "spatio_temporal_scaling": (True, True, False, False), "decoder_spatio_temporal_scaling": (True, True, False, False),
        "patch_size": 1, "scaling_factor": 0.7,
    }  # fmt: skip
    vae = AutoencoderKLLTXVideo(**usual | config)
    with torch.no_grad():
        vae.latents_mean.copy_(torch.linspace(-0.3, 0.4, 8))
        vae.latents_std.copy_(torch.linspace(0.5, 1.5, 8))
    return vae
