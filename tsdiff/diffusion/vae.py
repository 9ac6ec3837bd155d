"""Between images and latents: the autoencoders of latent diffusion, without changing the module that was handed over."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tsdiff.diffusion.source import unwrapped

if TYPE_CHECKING:
    import torch
    from torch import Tensor


def decode(vae: Any, latents: Tensor, device: torch.device) -> Tensor:
    """Images (B, 3, H, W), float32 in [0, 1], of clean latents (B, C, h, w)."""
    import torch

    with torch.no_grad():
        scaled = latents.to(device=device, dtype=torch.float32) / vae.config.scaling_factor + _shift(vae)
        images: Tensor = vae.decode(scaled.to(vae.dtype), return_dict=False)[0]
        return (images.float() / 2 + 0.5).clamp(0, 1)


def encode(vae: Any, images: Tensor, noise: Tensor, device: torch.device) -> Tensor:
    """Clean latents (B, C, h, w), float32, of images (B, 3, H, W) in [0, 1].

    A sampling encoder gives mean + std * `noise` (B, C, h, w), as image-to-image pipelines do; a deterministic one
    ignores `noise`.
    """
    import torch

    with torch.no_grad():
        encoded = vae.encode((2.0 * images.float() - 1.0).to(device=device, dtype=vae.dtype))
        if hasattr(encoded, "latent_dist"):
            posterior = encoded.latent_dist
            latents: Tensor = posterior.mean.float() + posterior.std.float() * noise.to(device=device, dtype=torch.float32)
        else:
            latents = encoded.latents.float()
        clean: Tensor = (latents - _shift(vae)) * vae.config.scaling_factor
        return clean


def _shift(vae: Any) -> float:
    """The mean that an autoencoder's latents are freed from before they are scaled."""
    return vae.config.get("shift_factor") or 0.0


def needs_upcast(vae: Any) -> bool:
    """Whether a float16 autoencoder overflows, as its own config says.

    `force_upcast` counts only where the config sets it: the class's default is True, which the published Stable
    Diffusion pipelines never heeded.
    """
    import torch

    config = vae.config
    said = config.get("force_upcast", False) and "force_upcast" not in config.get("_use_default_values", ())
    return bool(said) and vae.dtype == torch.float16


def upcast(vae: Any) -> Any:
    """A float32 copy of an autoencoder beside the original: converting back and forth would change the caller's module."""
    import torch

    original = unwrapped(vae)
    copy = type(original).from_config(original.config)
    copy.load_state_dict(original.state_dict())
    for name, value in vars(original).items():
        if name.startswith(("use_slicing", "use_tiling", "tile_")):
            setattr(copy, name, value)
    laid_out = any(weight.dim() == 4 and not weight.is_contiguous() for weight in original.parameters())
    copy.to(memory_format=torch.channels_last if laid_out else torch.preserve_format)
    return copy.to(device=original.device, dtype=torch.float32).eval()
