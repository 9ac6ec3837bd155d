"""Small random parts that the tiny pipelines of several families share, and how to put a pipeline together."""

from __future__ import annotations

import string
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tiny_sd import tiny_clip_tokenizer

from tsdiff.diffusion.quiet import quiet_libraries


def assembled(pipeline_class: str, parts: dict[str, Callable[[], Any]], folder: str | Path | None, seed: int, replaced: dict[str, Any]) -> Any:
    """A pipeline in eval mode; saved to `folder` too, if there is one.

    Args:
      pipeline_class: of diffusers.
      parts: makes the usual components.
      folder: None keeps it in memory.
      seed: of the weights.
      replaced: components to use instead.
    """
    with quiet_libraries():
        import diffusers
        import torch

        state = torch.get_rng_state()
        torch.manual_seed(seed)
        try:
            components = {name: replaced[name] if name in replaced else make() for name, make in parts.items()}
            for name, part in components.items():
                if isinstance(part, torch.nn.Module) and name not in replaced:
                    _stir(part)
        finally:
            torch.set_rng_state(state)
        pipe = getattr(diffusers, pipeline_class)(**components)
        for part in pipe.components.values():
            if isinstance(part, torch.nn.Module):
                part.eval()
        pipe.set_progress_bar_config(disable=True)
        if folder is not None:
            pipe.save_pretrained(folder)
        return pipe


def _stir(module: Any) -> None:
    """Weights that begin at zero (gates, last projections) would leave conditions and timesteps without effect."""
    import torch

    with torch.no_grad():
        for parameter in module.parameters():
            if not parameter.any():
                parameter.normal_(std=0.05)


def clip_with_projection(width: int, projection: int) -> Any:
    """A CLIP text encoder whose pooled output is projected."""
    from transformers import CLIPTextModelWithProjection

    return CLIPTextModelWithProjection(_clip_config(width, projection_dim=projection))


def clip(width: int) -> Any:
    """A CLIP text encoder."""
    from transformers import CLIPTextModel

    return CLIPTextModel(_clip_config(width))


def _clip_config(width: int, **more: Any) -> Any:
    from transformers import CLIPTextConfig

    return CLIPTextConfig(
        vocab_size=len(tiny_clip_tokenizer()), hidden_size=width, intermediate_size=37, num_hidden_layers=3, num_attention_heads=4,
        max_position_embeddings=77, bos_token_id=0, eos_token_id=1, pad_token_id=1, **more,
    )  # fmt: skip


def clip_tokenizer() -> Any:
    """One token for each character."""
    return tiny_clip_tokenizer()


def t5(width: int) -> Any:
    """A T5 encoder."""
    from transformers import T5Config, T5EncoderModel

    return T5EncoderModel(T5Config(vocab_size=64, d_model=width, d_kv=8, d_ff=37, num_layers=2, num_heads=4, dropout_rate=0.0))


def t5_tokenizer() -> Any:
    """A unigram tokenizer: one token for each character."""
    from transformers import T5Tokenizer

    pieces = ["<pad>", "</s>", "<unk>", "\u2581", *string.ascii_lowercase, *string.digits]
    return T5Tokenizer(vocab=[(piece, -1.0) for piece in pieces], extra_ids=0, model_max_length=512)


def autoencoder(channels: int, **config: Any) -> Any:
    """An autoencoder with factor 2 whose latents are scaled and shifted."""
    from diffusers import AutoencoderKL

    usual = {
        "in_channels": 3, "out_channels": 3, "latent_channels": channels, "block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 8,
        "down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2, "sample_size": 16,
        "scaling_factor": 1.5305, "shift_factor": 0.0609,
    }  # fmt: skip
    return AutoencoderKL(**usual | config)
