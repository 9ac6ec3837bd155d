"""What a CLIP model does to pixels before it looks at them, for whole batches of tensors and with gradients.

Shapes: B images, H x W pixels as given, h x w as the network takes them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from tsdiff.treesearch.errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor

OPENAI_MEAN = (0.48145466, 0.4578275, 0.40821073)
OPENAI_STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class Preprocessing:
    """Resize, cut out the middle, normalise.

    Pillow's 8-bit pictures, which the reference pipelines pass through, are followed within 2/255 a pixel: the filter is
    the same (antialiased, a = -0.5 where cubic), overshoot is cut off, but nothing is rounded. Since version 13 Pillow
    resizes some shapes downwards first, which moves single pixels beside hard edges by up to 10/255.

    Attributes:
      size: (h, w).
      mean, std: of each channel.
      interpolation: the filter.
      resize: "shortest" side to the size and cut, "longest" side to the size and pad, or "squash" both.
      edge: length of the shortest side after resizing; None for the size itself.
      fill: what is padded with, in [0, 1].
      floor: whether an odd rest is cut unevenly to the top left always (transformers), or rounded to even (torchvision).
    """

    size: tuple[int, int]
    mean: tuple[float, float, float] = OPENAI_MEAN
    std: tuple[float, float, float] = OPENAI_STD
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"
    resize: Literal["shortest", "longest", "squash"] = "shortest"
    edge: int | None = None
    fill: float = 0.0
    floor: bool = False

    def __call__(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [0, 1] as the network takes them: float32 (B, 3, h, w)."""
        import torch

        images = images.float()  # half precision has too few digits for a resize
        height, width = self._resized(*images.shape[-2:])
        # Across, then down, as torchvision and Pillow do: overshoot is cut off after either.
        for size in ((images.shape[-2], width), (height, width)):
            if size != tuple(images.shape[-2:]):
                images = torch.nn.functional.interpolate(images, size, mode=self.interpolation, align_corners=False, antialias=True)
                images = images.clamp(0.0, 1.0)
        images = self._cut(images)
        mean, std = (torch.tensor(numbers, device=images.device)[:, None, None] for numbers in (self.mean, self.std))
        return (images - mean) / std

    def _resized(self, height: int, width: int) -> tuple[int, int]:
        """Height and width after the resize."""
        if self.resize == "squash":
            return self.size
        if self.edge is not None or (self.resize == "shortest" and self.size[0] == self.size[1]):
            edge = self.size[0] if self.edge is None else self.edge
            long = int(edge * max(height, width) / min(height, width))
            return (edge, long) if height <= width else (long, edge)
        ratios = height / self.size[0], width / self.size[1]
        ratio = max(ratios) if self.resize == "longest" else min(ratios)
        return round(height / ratio), round(width / ratio)

    def _cut(self, images: Tensor) -> Tensor:
        """The middle, padded where the images are smaller."""
        import torch

        missing = [max(0, wanted - have) for wanted, have in zip(self.size, images.shape[-2:], strict=True)]
        if any(missing):
            (top, left), (bottom, right) = [gap // 2 for gap in missing], [(gap + 1) // 2 for gap in missing]
            images = torch.nn.functional.pad(images, (left, right, top, bottom), value=self.fill)
        spare = [(have - wanted) / 2.0 for wanted, have in zip(self.size, images.shape[-2:], strict=True)]
        top, left = [int(gap) if self.floor else round(gap) for gap in spare]
        return images[..., top : top + self.size[0], left : left + self.size[1]]


def from_open_clip(config: Mapping[str, Any], size: int | tuple[int, int], where: str) -> Preprocessing:
    """Read open_clip's `preprocess_cfg`; what it leaves open has open_clip's defaults, which are OpenAI's.

    Args:
      config: any of mean, std, interpolation, resize_mode, fill_color; other keys say nothing about inference.
      size: of the image tower.
      where: the file, for messages.

    Raises:
      UsageError: for values that open_clip would not know either.
    """
    interpolation, resize = config.get("interpolation") or "bicubic", config.get("resize_mode") or "shortest"
    # "random" speaks of training: open_clip then resizes bicubically for inference.
    if interpolation not in ("bicubic", "bilinear", "random") or resize not in ("shortest", "longest", "squash"):
        raise UsageError(
            f"{where}: preprocess_cfg has interpolation {interpolation!r} and resize_mode {resize!r}, but must have bicubic or bilinear, "
            "and shortest, longest or squash"
        )
    return Preprocessing(
        _pair(size),
        _triple(config.get("mean") or OPENAI_MEAN, where),
        _triple(config.get("std") or OPENAI_STD, where),
        interpolation="bilinear" if interpolation == "bilinear" else "bicubic",
        resize=resize,
        fill=float(config.get("fill_color") or 0) / 255.0,
    )


def from_transformers(config: Mapping[str, Any], size: int | tuple[int, int], where: str) -> Preprocessing:
    """Read what an image processor of transformers says about itself (`to_dict`).

    Args:
      config: with do_resize, size, resample, do_center_crop, crop_size, do_normalize, image_mean, image_std.
      size: of the image tower.
      where: the file, for messages.

    Raises:
      UsageError: for steps that are not those of CLIP and SigLIP, or images of another size than the tower's.
    """
    wanted = _pair(size)
    asked, crop = dict(config.get("size") or {}), dict(config.get("crop_size") or {})
    resample = config.get("resample", 3)
    if not config.get("do_resize", True) or not config.get("do_normalize", True) or int(resample) not in (2, 3):
        raise UsageError(f"{where}: images must be resized (resample 2 or 3) and normalised; no other preprocessing is known here")
    cropped = bool(config.get("do_center_crop"))
    edge = asked.get("shortest_edge")
    if edge is None:
        result = (crop if cropped else asked).get("height"), (crop if cropped else asked).get("width")
        squashed = asked.get("height"), asked.get("width")
        resizes = squashed == wanted  # to another size first, and then cut: no model does
    else:
        result = (crop.get("height"), crop.get("width")) if cropped else (None, None)
        resizes = True
    if result != wanted or not resizes:
        raise UsageError(f"{where}: makes images of size {asked}, cut to {crop or 'nothing'}, but the model takes {wanted[0]} x {wanted[1]} pixels")
    return Preprocessing(
        wanted,
        _triple(config["image_mean"], where),
        _triple(config["image_std"], where),
        interpolation="bilinear" if int(resample) == 2 else "bicubic",
        resize="squash" if edge is None else "shortest",
        edge=edge,
        floor=True,
    )


def _pair(size: Any) -> tuple[int, int]:
    return (int(size), int(size)) if isinstance(size, int) else (int(size[0]), int(size[1]))


def _triple(numbers: Any, where: str) -> tuple[float, float, float]:
    values = [float(number) for number in numbers] if isinstance(numbers, (list, tuple)) else [float(numbers)] * 3
    if len(values) != 3 or not all(math.isfinite(value) for value in values):
        raise UsageError(f"{where}: {numbers!r} must be one number for each of three channels")
    return values[0], values[1], values[2]
