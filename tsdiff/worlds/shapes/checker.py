"""Looking at pictures: which shapes of which colours are where.

Segmentation and region measurements are scikit-image's. What differs from the background is cut into connected regions;
a region's colour is the palette's nearest to its interior (CIELAB), its shape is told by a small fitted network
(`fit_checker`) from its soft outline and a few measurements. It was fitted on drawings alone, clean and spoilt, and on
malformed figures that are none of the shapes.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from importlib.resources import as_file, files
from typing import TYPE_CHECKING

import numpy as np

from tsdiff.treesearch.errors import UsageError
from tsdiff.worlds.shapes.geometry import CANVAS, COLORS, PALETTE, SHAPES, Color, Shape

if TYPE_CHECKING:
    from numpy.typing import NDArray

CONTRAST = 0.18
"""How far a pixel of a thing is from the background, at least, in one of its channels."""

MIN_AREA = 20
"""Pixels of the smallest region that counts; a drawn thing has 70 or more, specks of a decoder fewer."""

CROP = 20
"""Side of the outline that the network sees."""

MEASUREMENTS = ("area", "extent", "solidity", "eccentricity")

MIN_CONFIDENCE = 0.5
"""Probability of a shape below which it cannot be told."""

MAX_SIDE = 42
"""Longest side, in pixels, of a region that can be a shape; a drawn thing has at most 37."""

MAX_COLOR_DISTANCE = 38.0
"""Distance from the nearest colour of the palette (CIE 1976, in CIELAB) beyond which a colour is none of them."""

COLOR_SHARE = 0.6
"""Share of a region's interior that must be nearest to one colour; below it the colour cannot be told."""

WEIGHTS_FILE = "checker.safetensors"

CLASSES: tuple[Shape | None, ...] = (*SHAPES, None)
"""What the network tells apart; None is a figure that is no shape of this world."""


@dataclass(frozen=True)
class Seen:
    """An object that the checker found.

    Attributes:
      shape, color: their names, None where they cannot be told.
      x, y: centre of mass, pixels from the top left corner.
      area: pixels.
    """

    shape: Shape | None
    color: Color | None
    x: float
    y: float
    area: float


@dataclass(frozen=True)
class Region:
    """A connected region, measured.

    Attributes:
      features: outline (CROP * CROP) and `MEASUREMENTS`, float32.
      color, x, y, area: as in `Seen`.
      side: longer side of its bounding box, pixels.
    """

    features: NDArray[np.float32]
    color: Color | None
    x: float
    y: float
    area: float
    side: int


def look(image: NDArray[np.floating]) -> list[Seen]:
    """Find the objects in a picture (64, 64, 3), RGB in [0, 1], ordered from top to bottom.

    Raises:
      UsageError: if the picture has another size or holds numbers that are not finite.
    """
    found = regions(image)
    if not found:
        return []
    chances = network()(np.stack([region.features for region in found]))
    seen = []
    for region, chance in zip(found, chances, strict=True):
        winner = int(chance.argmax())
        shape = CLASSES[winner] if chance[winner] >= MIN_CONFIDENCE and region.side <= MAX_SIDE else None
        seen.append(Seen(shape, region.color, region.x, region.y, region.area))
    return seen


def regions(image: NDArray[np.floating]) -> list[Region]:
    """Cut a picture into regions and measure them; arguments and errors as in `look`."""
    from skimage.color import rgb2lab
    from skimage.measure import label, regionprops

    if image.shape != (CANVAS, CANVAS, 3):
        raise UsageError(f"the picture has shape {image.shape} but must be ({CANVAS}, {CANVAS}, 3): height, width, RGB")
    picture = np.clip(image.astype(np.float64), 0.0, 1.0)
    if not np.isfinite(picture).all():
        raise UsageError("the picture holds numbers that are not finite")
    background = np.median(picture, axis=(0, 1))
    contrast = np.abs(picture - background).max(axis=2)
    labels = label(contrast > CONTRAST, connectivity=1)
    lab = rgb2lab(picture)
    found = []
    for props in regionprops(labels):
        if props.area < MIN_AREA:
            continue
        mine = labels == props.label
        peak = float(np.quantile(contrast[mine], 0.8))
        # Other regions are blacked out; this one keeps the soft rim that lies outside of its label.
        soft = np.where(mine | (labels == 0), np.clip(contrast / peak, 0.0, 1.0), 0.0)
        soft[soft < 0.5 * CONTRAST / peak] = 0.0
        top, left, bottom, right = props.bbox
        longest = max(bottom - top, right - left)
        side = longest + 4.0
        outline = _crop(soft, (top + bottom) / 2, (left + right) / 2, side)
        weights = np.where(mine, soft, 0.0)
        rows, columns = np.nonzero(mine)
        mass = weights[rows, columns]
        y, x = float((rows + 0.5) @ mass / mass.sum()), float((columns + 0.5) @ mass / mass.sum())
        measured = np.array([props.area / side**2, props.extent, props.solidity, props.eccentricity])
        features = np.concatenate([outline.ravel(), measured]).astype(np.float32)
        found.append(Region(features, _color(lab[mine & (soft > 0.85)]), x, y, float(props.area), longest))
    return found


def _crop(plane: NDArray[np.float64], y: float, x: float, side: float) -> NDArray[np.float64]:
    """A square of a plane around (x, y), resampled to CROP x CROP; outside of the plane there is nothing."""
    from scipy.ndimage import map_coordinates

    steps = (np.arange(CROP) + 0.5) / CROP * side - side / 2 - 0.5
    grid = np.meshgrid(y + steps, x + steps, indexing="ij")
    outline: NDArray[np.float64] = map_coordinates(plane, grid, order=1, mode="constant")
    return outline


@cache
def _palette_lab() -> NDArray[np.float64]:
    from skimage.color import rgb2lab

    lab: NDArray[np.float64] = rgb2lab(np.array(list(PALETTE.values())) / 255.0)
    return lab


def _color(interior: NDArray[np.float64]) -> Color | None:
    """The palette's colour nearest to the median of a region's interior (n, 3), if it is near and most of the interior agrees."""
    palette = _palette_lab()
    nearest = ((interior[:, None] - palette) ** 2).sum(axis=2).argmin(axis=1)
    distances = np.sqrt(((np.median(interior, axis=0) - palette) ** 2).sum(axis=1))
    winner = int(distances.argmin())
    return COLORS[winner] if distances[winner] <= MAX_COLOR_DISTANCE and (nearest == winner).mean() >= COLOR_SHARE else None


@dataclass(frozen=True, eq=False)
class Network:
    """The fitted network: one hidden layer of rectified units on standardised features."""

    mean: NDArray[np.float64]
    scale: NDArray[np.float64]
    hidden: NDArray[np.float64]
    hidden_bias: NDArray[np.float64]
    out: NDArray[np.float64]
    out_bias: NDArray[np.float64]

    def __call__(self, features: NDArray[np.float32]) -> NDArray[np.float64]:
        """Probabilities (n, classes) of `CLASSES` from features (n, f).

        Rows go through one at a time, so that a row's answer is the same, bit for bit, in any company.
        """
        return np.stack([self._row(row) for row in features])

    def _row(self, features: NDArray[np.float32]) -> NDArray[np.float64]:
        inner = np.maximum(((features - self.mean) / self.scale) @ self.hidden + self.hidden_bias, 0.0)
        logits = inner @ self.out + self.out_bias
        odds = np.exp(logits - logits.max())
        chances: NDArray[np.float64] = odds / odds.sum()
        return chances


@cache
def network() -> Network:
    """The fitted network that ships with the package."""
    from safetensors.numpy import load_file

    with as_file(files("tsdiff.worlds.shapes").joinpath(WEIGHTS_FILE)) as path:
        arrays = load_file(path)
    return Network(**{name: array.astype(np.float64) for name, array in arrays.items()})
