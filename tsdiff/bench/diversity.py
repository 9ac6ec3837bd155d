"""How different pictures are from each other: their features, by pixels or by a network that is named by a verifier."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from tsdiff.bench.answers import image_batches
from tsdiff.treesearch.errors import UsageError
from tsdiff.treesearch.references import resolve_verifier

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from PIL.Image import Image
    from torch import Tensor

Features: TypeAlias = "str | Callable[[Tensor], Tensor] | Any"
"""What pictures are compared by: "pixels", the reference of a verifier that has a feature network, or a function."""

SIDE = 16
"""Pixels of a side that pictures are shrunk to."""


def feature_function(features: Features, device: str) -> tuple[str, Callable[[Tensor], Tensor]]:
    """The name of a way to compare pictures, and the function from images (B, 3, H, W) in [0, 1] to features (B, d).

    Args:
      features: "pixels" for pictures shrunk to 16 x 16 by area, from -1 (black) to 1 (white): layout and colours, not
        content. Or the reference of a verifier, or an object, with `image_features(images)`, itself or in its `network`:
        any of clip, aesthetic, clip-zero-shot, dino-classifier, self-supervised and path-stability
        ("self-supervised:features=dino,model=FOLDER" takes a DINOv2 model without classes). Or a function of images.

    Raises:
      UsageError: for a reference or object without features.
    """
    if isinstance(features, str) and features == "pixels":
        return "pixels", _shrunk
    found: Any = resolve_verifier(features) if isinstance(features, str) else features
    name = str(getattr(found, "name", None) or getattr(found, "__name__", type(found).__name__))
    # A network may be there only once it is prepared, and nothing loads that cannot be used.
    if callable(found) or any(inspect.getattr_static(found, place, None) is not None for place in ("image_features", "network")):
        if hasattr(found, "prepare"):
            found.prepare(device)
        for owner in (found, getattr(found, "network", None)):
            if hasattr(owner, "image_features"):
                return name, owner.image_features  # type: ignore[union-attr]
        if callable(found):
            return name, found
    raise UsageError(f"{name} has no features of pictures; name a verifier with a feature network, e.g. clip:model=FOLDER or self-supervised:features=dino,model=FOLDER, or 'pixels'")


def features_of(pictures: Sequence[Image | Path], function: Callable[[Tensor], Tensor], device: str) -> NDArray[np.float64]:
    """Features (n, d) of pictures, a batch at a time."""
    import torch

    with torch.inference_mode():
        rows = [function(images.to(device)).detach().double().cpu().numpy().reshape(len(images), -1) for images in image_batches(pictures)]
    return np.concatenate(rows)


def _shrunk(images: Tensor) -> Tensor:
    import torch

    small = torch.nn.functional.interpolate(images.float(), size=(SIDE, SIDE), mode="area")
    return (2.0 * small - 1.0).flatten(1)
