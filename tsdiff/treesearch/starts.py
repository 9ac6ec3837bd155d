"""Where sampling starts: the first noise, the initial image, and the levels below it."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tsdiff.treesearch.errors import UsageError
from tsdiff.treesearch.noise import Given, Recipe, Torch
from tsdiff.treesearch.protocols import Size
from tsdiff.treesearch.schedule import Schedule

if TYPE_CHECKING:
    from torch import Tensor


def first_noise(initial_noise: str, latents: Tensor | None, shape: tuple[int, ...], seeds: Sequence[int]) -> tuple[Recipe | None, Tensor | None]:
    """The recipe of root 0 and the caller's own noise."""
    if initial_noise not in ("portable", "torch"):
        raise UsageError(f"initial_noise is {initial_noise!r} but must be 'portable' or 'torch'")
    if latents is None:
        return (Torch(-1) if initial_noise == "torch" else None), None  # the seed is filled in for each run
    if initial_noise == "torch":
        raise UsageError("latents and initial_noise='torch' both say what the first noise is; give one")
    if len(seeds) > 1:
        raise UsageError(f"latents are one first noise but there are {len(seeds)} seeds; give one seed")
    own = latents.detach().float().cpu()
    if own.dim() == len(shape) + 1 and own.shape[0] == 1:
        own = own[0]
    if tuple(own.shape) != tuple(shape):
        raise UsageError(f"latents have shape {tuple(latents.shape)} but this model and size need {tuple(shape)} (unit-variance noise, as pipelines take)")
    return Given(hashlib.sha256(own.contiguous().numpy().tobytes()).hexdigest()), own.contiguous()


def initial_image(source: Any, size: Size) -> Any:
    """An initial image as a PIL image of the search's size."""
    from PIL import Image, UnidentifiedImageError

    if isinstance(source, (str, Path)):
        try:
            with Image.open(source) as opened:
                image = opened.convert("RGB")
        except FileNotFoundError:
            raise UsageError(f"the initial image {str(source)!r} does not exist") from None
        except (UnidentifiedImageError, OSError) as error:
            raise UsageError(f"the initial image {str(source)!r} cannot be read: {error}") from None
    elif isinstance(source, Image.Image):
        image = source.convert("RGB")
    else:
        raise UsageError(f"init_image is {type(source).__name__} but must be a file name or a PIL image")
    if size is not None and image.size != (size[1], size[0]):
        image = image.resize((size[1], size[0]), Image.Resampling.LANCZOS)
    return image


def tail_of(schedule: Schedule, init_image: Any, strength: float | None) -> Schedule:
    """The levels below the starting noise of an initial image, as image-to-image pipelines choose it."""
    if init_image is None:
        if strength is not None:
            raise UsageError("strength was given without an initial image; give both or none")
        return schedule
    strength = 0.8 if strength is None else strength
    if not 0.0 < strength <= 1.0:
        raise UsageError(f"strength is {strength:g} but must lie in (0, 1]")
    # Image-to-image pipelines of flow models round towards remaking more, those of diffusion models towards less.
    remade = schedule.last * strength
    start = int(schedule.last - remade) if schedule.kind == "flow" else schedule.last - min(int(remade), schedule.last)
    if start == schedule.last:
        raise UsageError(f"strength {strength:g} leaves none of {schedule.last} steps; use at least {1 / schedule.last:g}")
    return schedule.tail(start)
