"""What a caption or a picture says about its things, as numbers: targets for heads that are trained along and thrown away.

Contrast and denoising alone learn which words and which shapes there are long before they learn what belongs to what and what
stands where: a model that knows the words only is a saddle of both losses, since neither tower gains from knowing relations
unless the other one does. A head that has to say it leads past that.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tsdiff.worlds.shapes.geometry import CANVAS, COLORS, SHAPES, Scene
from tsdiff.worlds.shapes.grammar import Prompt

PLACES = 2 * len(SHAPES)
"""Numbers for the place of each shape: x and y, in [-1, 1]."""

COVERED = len(SHAPES) + len(COLORS) * len(SHAPES)
"""Maps of what covers which part of a picture: one of each shape in any colour, then one of each coloured shape."""

THINGS = len(COLORS) * len(SHAPES)
"""Numbers for which coloured shapes there are, colours outermost."""


def places(scenes: Sequence[Scene], prompts: Sequence[Prompt | None]) -> tuple[Tensor, Tensor]:
    """Where each shape is, and whether that can be told: (B, 10) both.

    Args:
      scenes: what is drawn.
      prompts: of captions: places can be told where a relation is claimed. None of a picture: wherever a shape occurs once.
    """
    values, known = torch.zeros(len(scenes), PLACES), torch.zeros(len(scenes), PLACES)
    for row, (scene, prompt) in enumerate(zip(scenes, prompts, strict=True)):
        for number, shape in enumerate(SHAPES):
            found = [thing for thing in scene.things if thing.shape == shape]
            told = prompt is None or (bool(prompt.links) and any(group.shape == shape for group in prompt.groups))
            if len(found) == 1 and told:
                values[row, 2 * number : 2 * number + 2] = torch.tensor([found[0].x, found[0].y]) / (CANVAS / 2) - 1
                known[row, 2 * number : 2 * number + 2] = 1.0
    return values, known


def things(scenes: Sequence[Scene], prompts: Sequence[Prompt | None]) -> tuple[Tensor, Tensor]:
    """Which coloured shapes there are, and whether that can be told: (B, 40) both. A caption tells if it says all colours."""
    values, known = torch.zeros(len(scenes), THINGS), torch.zeros(len(scenes), THINGS)
    for row, (scene, prompt) in enumerate(zip(scenes, prompts, strict=True)):
        for thing in scene.things:
            values[row, COLORS.index(thing.color) * len(SHAPES) + SHAPES.index(thing.shape)] = 1.0
        known[row] = float(prompt is None or all(group.color is not None for group in prompt.groups))
    return values, known


def cover(scenes: Sequence[Scene], size: int) -> Tensor:
    """Which cells of a grid over the picture have their centre in a thing (in its nominal circle): (B, 45, size, size), 0 or 1."""
    centres = (torch.arange(size) + 0.5) * CANVAS / size
    maps = torch.zeros(len(scenes), COVERED, size, size)
    for row, scene in enumerate(scenes):
        for thing in scene.things:
            inside = ((centres - thing.x)[None, :] ** 2 + (centres - thing.y)[:, None] ** 2 <= thing.radius**2).float()
            shape = SHAPES.index(thing.shape)
            for channel in (shape, len(SHAPES) + COLORS.index(thing.color) * len(SHAPES) + shape):
                maps[row, channel] = torch.maximum(maps[row, channel], inside)
    return maps


def map_head(channels: int) -> nn.Conv2d:
    """What reads the maps, and x and y of the cell itself, from features (B, channels, H, W). It starts with how rare things are."""
    head = nn.Conv2d(channels, COVERED + 2, 1)
    nn.init.zeros_(head.weight)
    nn.init.constant_(head.bias, -5.0)
    nn.init.zeros_(head.bias[COVERED:])
    return head


def map_loss(answers: Tensor, scenes: Sequence[Scene]) -> Tensor:
    """Binary cross entropy of a cell, summed over the maps, and the squared error of where the cell is.

    A convolution knows where it is from the picture's edge alone, and learns to look there only if somebody asks.
    """
    size = answers.shape[-1]
    x = (torch.arange(size) + 0.5) * 2 / size - 1
    grid = torch.stack(torch.meshgrid(x, x, indexing="xy")).expand(len(scenes), 2, size, size)
    return COVERED * F.binary_cross_entropy_with_logits(answers[:, :COVERED], cover(scenes, size)) + F.mse_loss(answers[:, COVERED:], grid)


def places_loss(answers: Tensor, targets: tuple[Tensor, Tensor]) -> Tensor:
    """Mean squared error of the places that can be told."""
    values, known = targets
    return ((answers - values) ** 2 * known).sum() / known.sum().clamp(min=1.0)


def things_loss(answers: Tensor, targets: tuple[Tensor, Tensor]) -> Tensor:
    """Binary cross entropy of the presences that can be told, summed over a shape's colours."""
    values, known = targets
    losses = F.binary_cross_entropy_with_logits(answers, values, reduction="none") * known
    return len(COLORS) * losses.sum() / known.sum().clamp(min=1.0)
