"""`shapes-features`: what distances between pictures of this world are measured in (FID, diversity)."""

from __future__ import annotations

from functools import cache
from importlib.resources import as_file, files
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
from torch import nn

from tsdiff.treesearch.errors import UsageError
from tsdiff.worlds.shapes.geometry import CANVAS, COLORS, SHAPES
from tsdiff.worlds.shapes.grammar import MOST_THINGS

if TYPE_CHECKING:
    from torch import Tensor

WIDTH = 64
"""Features of a picture."""

WEIGHTS_FILE = "models/shapes-features/model.safetensors"


class Features(nn.Module):
    """A convolutional classifier: which coloured shapes are there, and how many things in all.

    `features` is the layer before its answers, non-negative and (B, 64).
    """

    def __init__(self) -> None:
        super().__init__()
        widths = (3, 16, 32, 64, 96)
        self.body = nn.Sequential(*(part for pair in pairwise(widths) for part in _block(*pair)))
        self.penultimate = nn.Linear(widths[-1] * 2, WIDTH)
        self.things = nn.Linear(WIDTH, len(COLORS) * len(SHAPES))
        self.count = nn.Linear(WIDTH, MOST_THINGS)

    def features(self, images: Tensor) -> Tensor:
        """Features (B, 64) of images (B, 3, 64, 64) in [0, 1].

        Raises:
          UsageError: if the images have another shape.
        """
        if images.ndim != 4 or images.shape[1:] != (3, CANVAS, CANVAS):
            raise UsageError(f"images have shape {tuple(images.shape)} but the features of this world need (B, 3, {CANVAS}, {CANVAS})")
        maps = self.body(images * 2 - 1)
        pooled = torch.cat([maps.mean(dim=(2, 3)), maps.amax(dim=(2, 3))], dim=1)
        return torch.relu(self.penultimate(pooled))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Logits: presence of each coloured shape (B, 40), colours outermost, and the count less one (B, 4)."""
        features = self.features(images)
        return self.things(features), self.count(features)


def _block(before: int, after: int) -> tuple[nn.Module, ...]:
    return nn.Conv2d(before, after, 3, stride=2, padding=1), nn.GroupNorm(8, after), nn.SiLU(), nn.Conv2d(after, after, 3, padding=1), nn.SiLU()


@cache
def load_features() -> Features:
    """The trained network, on the CPU, in eval mode, without gradients. Loaded once."""
    from safetensors.torch import load_file

    model = Features()
    with as_file(files("tsdiff.worlds.shapes").joinpath(WEIGHTS_FILE)) as path:
        model.load_state_dict({name: value.float() for name, value in load_file(path).items()})
    return model.eval().requires_grad_(False)
