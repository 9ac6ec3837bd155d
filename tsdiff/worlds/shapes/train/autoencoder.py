"""The autoencoder: 64x64 pictures to 16x16 latents of 4 channels, the layout of Stable Diffusion's."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from tsdiff.worlds.shapes.train.loop import Training
from tsdiff.worlds.shapes.train.pictures import draw_pictures

KL_WEIGHT = 1e-3
"""Weight of the divergence from the standard normal, per latent element. It keeps latents near unit spread."""


@dataclass(frozen=True)
class Autoencoder:
    """`AutoencoderKL` (Rombach et al. 2022, arXiv 2112.10752) without the adversarial and perceptual losses.

    Absolute plus squared error: flat areas and crisp edges, and nothing in this world has a texture to invent.
    """

    name: str = "autoencoder"
    training: Training = field(default_factory=lambda: Training(steps=2200, batch=32, rate=2e-3, warmup=100, cooldown=0.6, average=0.995))

    def build(self) -> nn.Module:
        from tsdiff.treesearch.imports import prepare_torchvision

        prepare_torchvision()
        from diffusers import AutoencoderKL

        model = AutoencoderKL(
            in_channels=3,
            out_channels=3,
            latent_channels=4,
            block_out_channels=(16, 32, 48),
            layers_per_block=1,
            norm_num_groups=8,
            down_block_types=("DownEncoderBlock2D",) * 3,
            up_block_types=("UpDecoderBlock2D",) * 3,
            mid_block_add_attention=False,
            sample_size=64,
            scaling_factor=1.0,
        )
        return model.to(memory_format=torch.channels_last)

    def loss(self, model: Any, step: int, noise: torch.Generator) -> torch.Tensor:
        plan = self.training
        pixels = draw_pictures(plan.seed, step * plan.batch, plan.batch).pixels
        posterior = model.encode(pixels).latent_dist
        decoded = model.decode(posterior.sample(generator=noise)).sample
        error = F.l1_loss(decoded, pixels) + F.mse_loss(decoded, pixels)
        return error + KL_WEIGHT * posterior.kl().mean() / posterior.mean[0].numel()

    def export(self, model: Any, folder: Path) -> None:
        """Write the folder of an `AutoencoderKL`; its scaling factor makes the latents' standard deviation 1."""
        with torch.inference_mode():
            pixels = draw_pictures(self.training.seed + 1, 0, 512).pixels
            deviation = torch.cat([model.encode(part).latent_dist.mean for part in pixels.split(64)]).std().item()
        model.register_to_config(scaling_factor=1.0 / deviation)
        model.save_pretrained(folder)
