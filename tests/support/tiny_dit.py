"""Pipelines of DiT and PixArt with every part of the real ones, small and random."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tiny_parts import assembled, autoencoder, t5, t5_tokenizer

BETAS = {"beta_start": 0.0001, "beta_end": 0.02, "beta_schedule": "linear"}


def tiny_dit(folder: str | Path | None = None, *, seed: int = 0, scheduler_config: dict[str, Any] | None = None, transformer_config: dict[str, Any] | None = None, **replaced: Any) -> Any:
    """A tiny random `DiTPipeline` in eval mode: 1000 classes, latents (4, 8, 8), images of 16 x 16 pixels.

    Args:
      folder: where to save it too.
      seed: of its weights.
      scheduler_config, transformer_config: entries that replace those of the configs.
      replaced: components that replace the usual ones.
    """
    from diffusers import DDIMScheduler, DiTTransformer2DModel

    config = {
        "num_attention_heads": 2, "attention_head_dim": 16, "in_channels": 4, "out_channels": 8, "num_layers": 2, "sample_size": 8, "patch_size": 2,
        "num_embeds_ada_norm": 1000,
    } | (transformer_config or {})  # fmt: skip
    parts = {
        "transformer": lambda: DiTTransformer2DModel(**config),
        "vae": tiny_vae,
        "scheduler": lambda: DDIMScheduler(**BETAS | {"clip_sample": False} | (scheduler_config or {})),
    }
    return assembled("DiTPipeline", parts, folder, seed, replaced)


def tiny_vae(**config: Any) -> Any:
    """An autoencoder with factor 2 whose latents are scaled alone."""
    return autoencoder(4, **{"scaling_factor": 0.18215, "shift_factor": None} | config)


def tiny_pixart(folder: str | Path | None = None, *, alpha: bool = False, seed: int = 0, scheduler_config: dict[str, Any] | None = None, transformer_config: dict[str, Any] | None = None, **replaced: Any) -> Any:
    """A tiny random `PixArtSigmaPipeline`, or `PixArtAlphaPipeline`, in eval mode; its latents are (4, 8, 8) for 16 x 16 pixels.

    Args:
      folder: where to save it too.
      alpha: as PixArt-alpha's of 1024 pixels, which is told the size of the image and was trained on latents 128 wide.
      seed: of its weights.
      scheduler_config, transformer_config: entries that replace those of the configs.
      replaced: components that replace the usual ones.
    """
    from diffusers import DPMSolverMultistepScheduler, PixArtTransformer2DModel

    config = {
        "num_attention_heads": 2, "attention_head_dim": 18, "in_channels": 4, "out_channels": 8, "num_layers": 2, "cross_attention_dim": 36,
        "caption_channels": 24, "sample_size": 128 if alpha else 8, "patch_size": 2, "use_additional_conditions": None if alpha else False,
    } | (transformer_config or {})  # fmt: skip
    parts = {
        "tokenizer": t5_tokenizer,
        "text_encoder": lambda: t5(24),
        "vae": tiny_vae,
        "transformer": lambda: PixArtTransformer2DModel(**config),
        "scheduler": lambda: DPMSolverMultistepScheduler(**BETAS | (scheduler_config or {})),
    }
    return assembled("PixArtAlphaPipeline" if alpha else "PixArtSigmaPipeline", parts, folder, seed, replaced)
