"""UNets that are told their guidance scale: latent consistency models, distilled together with guidance.

Luo et al. 2023 (arXiv 2310.04378), after Meng et al. 2022 (arXiv 2210.03142). The scale enters as an embedding beside the
timestep, so an evaluation is one row; the pipelines of diffusers do not guide such a network again.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tsdiff.treesearch.errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor

TOLD = "timestep_cond"
"""The row tensor with the embedding."""


def refuse_guidance(name: str, told_scale: float | None) -> None:
    """Raise UsageError if a network is told its guidance scale, on being asked to guide it."""
    if told_scale is not None:
        raise UsageError(f"{name!r} was distilled with guidance: its network is told a scale (guidance_scale, usually {told_scale:g}), and guiding it again is not supported; leave out true_cfg_scale")


def scale_embedding(pipeline: Any, scale: float, width: int, device: str) -> Tensor:
    """What the UNet is told of a guidance scale, (width,)."""
    import torch

    embedded: Tensor = pipeline.get_guidance_scale_embedding(torch.tensor([float(scale) - 1.0]), embedding_dim=width)[0]
    return embedded.to(device)
