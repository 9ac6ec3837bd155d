"""The classifier whose features serve distances between pictures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from tsdiff.worlds.shapes.features import Features
from tsdiff.worlds.shapes.geometry import COLORS, SHAPES, Scene
from tsdiff.worlds.shapes.train.loop import Training
from tsdiff.worlds.shapes.train.pictures import draw_pictures


@dataclass(frozen=True)
class Classifier:
    """Presence of the 40 coloured shapes (binary cross entropy) and the number of things (cross entropy)."""

    name: str = "shapes-features"
    training: Training = field(default_factory=lambda: Training(steps=4000, batch=64, rate=2e-3, average=0.998))

    def build(self) -> nn.Module:
        return Features()

    def loss(self, model: Any, step: int, noise: torch.Generator) -> torch.Tensor:
        plan = self.training
        pictures = draw_pictures(plan.seed, step * plan.batch, plan.batch)
        # Decoded pictures are a little blurred and noisy; so are some of these.
        strength = 0.06 * torch.rand((plan.batch, 1, 1, 1), generator=noise)
        images = (pictures.pixels + 1) / 2 + strength * torch.randn(pictures.pixels.shape, generator=noise)
        things, count = model(images.clamp(0, 1))
        truth, number = labels(pictures.scenes)
        return len(SHAPES) * F.binary_cross_entropy_with_logits(things, truth) + F.cross_entropy(count, number)

    def export(self, model: Any, folder: Path) -> None:
        from safetensors.torch import save_file

        folder.mkdir(parents=True, exist_ok=True)
        save_file({name: value.half().contiguous() for name, value in model.state_dict().items()}, folder / "model.safetensors")


def labels(scenes: Sequence[Scene]) -> tuple[torch.Tensor, torch.Tensor]:
    """Presence (B, 40) of coloured shapes, colours outermost, and the number of things less one (B,)."""
    present = torch.zeros(len(scenes), len(COLORS) * len(SHAPES))
    for row, scene in enumerate(scenes):
        for thing in scene.things:
            present[row, COLORS.index(thing.color) * len(SHAPES) + SHAPES.index(thing.shape)] = 1.0
    return present, torch.tensor([len(scene.things) - 1 for scene in scenes])
