"""Pictures of two-dimensional samples: the data's density as a heat map, the sample as a bright dot."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

from tsdiff.worlds.gaussian.mixture import Mixture

if TYPE_CHECKING:
    from torch import Tensor

# Colours from no density to the highest, evenly spaced: night blue, indigo, magenta, amber, cream.
PALETTE = ((0.04, 0.05, 0.12), (0.16, 0.14, 0.38), (0.55, 0.20, 0.50), (0.93, 0.50, 0.32), (1.00, 0.88, 0.62))
DOT_COLOR = (0.35, 1.00, 0.95)
MARGIN = 4.0  # standard deviations of air around the outermost modes
DOT_RADIUS, HALO_RADIUS = 0.022, 0.055  # as shares of the picture's side


def limits(mixture: Mixture) -> tuple[tuple[float, float], float]:
    """Centre (x, y) and half side of the square that shows every mode with its margin."""
    low = [min(mean[axis] - MARGIN * std for mean, std in zip(mixture.means, mixture.stds, strict=True)) for axis in (0, 1)]
    high = [max(mean[axis] + MARGIN * std for mean, std in zip(mixture.means, mixture.stds, strict=True)) for axis in (0, 1)]
    centre = ((low[0] + high[0]) / 2.0, (low[1] + high[1]) / 2.0)
    return centre, max(high[0] - low[0], high[1] - low[1]) / 2.0


def _grid(pixels: int) -> tuple[Tensor, Tensor]:
    """Pixel centres in [-1, 1], each (H, W): x to the right, y upwards."""
    import torch

    axis = (torch.arange(pixels, dtype=torch.float64) + 0.5) / pixels * 2.0 - 1.0
    up, right = torch.meshgrid(-axis, axis, indexing="ij")
    return right, up


@lru_cache(maxsize=8)
def density_map(mixture: Mixture, pixels: int) -> Tensor:
    """The density of clean points as an RGB picture (3, H, W), float32 in [0, 1], on the CPU."""
    import torch

    centre, half = limits(mixture)
    right, up = _grid(pixels)
    points = torch.stack((centre[0] + half * right, centre[1] + half * up), dim=-1).reshape(-1, 2)
    density = mixture.log_density(points).exp().reshape(pixels, pixels)
    # A power below 1 keeps rare modes visible beside common ones.
    position = (density / density.max()) ** 0.35 * (len(PALETTE) - 1)
    below = position.long().clamp(max=len(PALETTE) - 2)
    share = (position - below).unsqueeze(-1)
    colors = torch.tensor(PALETTE, dtype=torch.float64)
    picture = (1.0 - share) * colors[below] + share * colors[below + 1]  # [H, W, 3]
    return picture.permute(2, 0, 1).float()


def draw(mixture: Mixture, points: Tensor, pixels: int) -> Tensor:
    """Pictures (B, 3, H, W) of points (B, 2); a point outside the square is drawn on its border."""
    centre, half = limits(mixture)
    base = density_map(mixture, pixels).to(points.device)
    right, up = (axis.float().to(points.device) for axis in _grid(pixels))
    place = ((points.float() - points.new_tensor(centre)) / half).clamp(-1.0, 1.0)
    across = ((right[0] - place[:, :1]) / 2.0) ** 2  # [B, W], squared distances as shares of the side
    along = ((up[:, 0] - place[:, 1:]) / 2.0) ** 2  # [B, H]
    distance = (across.unsqueeze(1) + along.unsqueeze(2)).sqrt().unsqueeze(1)  # [B, 1, H, W]
    falloff = (-along / HALO_RADIUS**2).exp().unsqueeze(2) * (-across / HALO_RADIUS**2).exp().unsqueeze(1)
    dot = ((DOT_RADIUS - distance) * pixels + 0.5).clamp(0.0, 1.0)  # edge one pixel wide
    rim = ((1.7 * DOT_RADIUS - distance) * pixels + 0.5).clamp(0.0, 1.0)
    color = base.new_tensor(DOT_COLOR).view(1, 3, 1, 1)
    picture = base + 0.55 * falloff.unsqueeze(1) * (color - base)
    picture = picture * (1.0 - 0.75 * rim)  # a dark rim parts the dot from bright modes
    return (picture + dot * (1.0 - picture)).clamp(0.0, 1.0)
