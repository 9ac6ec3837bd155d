"""Training data, drawn as it is needed: a step's batch depends on nothing but the seed and the step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from tsdiff.worlds.shapes.geometry import Scene
from tsdiff.worlds.shapes.render import render_batch
from tsdiff.worlds.shapes.scenes import WEIGHTS, training_example


@dataclass(frozen=True)
class Pictures:
    """A batch of captioned pictures.

    Attributes:
      captions: B texts.
      scenes: B scenes, what is in the pictures.
      pixels: (B, 3, 64, 64) float32 in [-1, 1], channels last in memory.
    """

    captions: tuple[str, ...]
    scenes: tuple[Scene, ...]
    pixels: torch.Tensor


def draw_pictures(seed: int, first: int, count: int, weights: Mapping[str, float] = WEIGHTS) -> Pictures:
    """Examples `first` to `first + count - 1` of a seed's endless training set; `weights` are the shares of the kinds."""
    captions, scenes = zip(*(training_example(seed, first + number, weights) for number in range(count)), strict=True)
    return Pictures(captions, scenes, to_pixels(scenes))


def to_pixels(scenes: tuple[Scene, ...]) -> torch.Tensor:
    """Draw scenes as a network sees them: (B, 3, 64, 64) float32 in [-1, 1]."""
    # A batch drawn as (B, 64, 64, 3) and permuted is already what PyTorch calls channels last.
    return torch.from_numpy(render_batch(scenes)).permute(0, 3, 1, 2) * 2 - 1
