"""What an autoencoder does to a picture, without one: blur, ripples, noise and 8-bit rounding, at a chosen PSNR.

The checker is fitted and measured on spoilt drawings so that it can be trusted on decoded ones. Malformed figures, none
of which is a shape of the world, teach it what not to accept.
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from tsdiff.worlds.shapes.geometry import CANVAS, SHAPES, Shape, Thing
from tsdiff.worlds.shapes.render import draw
from tsdiff.worlds.shapes.scenes import BACKGROUNDS, TILT

if TYPE_CHECKING:
    from numpy.random import Generator
    from numpy.typing import NDArray


def psnr(image: NDArray[np.floating], other: NDArray[np.floating]) -> float:
    """Peak signal-to-noise ratio of two pictures with values in [0, 1], in decibel."""
    return -10.0 * math.log10(max(float(((image - other) ** 2).mean()), 1e-12))


def spoil(image: NDArray[np.float32], rng: Generator, decibel: float) -> NDArray[np.float32]:
    """Spoil a picture (H, W, 3) down to a PSNR of about `decibel`, before rounding to 8 bits.

    Blurs by up to 0.9 pixels, compresses as JPEG at times, then adds noise, part of it correlated over 1 to 3 pixels;
    the whole difference is scaled to the wanted size.
    """
    from scipy.ndimage import gaussian_filter

    sigma = rng.uniform(0.3, 0.9)
    changed = gaussian_filter(image, (sigma, sigma, 0))
    if rng.random() < 0.3:
        changed = _jpeg(changed, int(rng.integers(60, 96)))
    change = changed - image
    white = rng.standard_normal(image.shape)
    ripples = gaussian_filter(rng.standard_normal(image.shape), (*rng.uniform(1.0, 3.0, 2), 0))
    noise = rng.uniform(0.3, 1.0) * white + rng.uniform(0.3, 1.5) * ripples / ripples.std()
    wanted = 10.0 ** (-decibel / 10.0)
    room = wanted - (change**2).mean()
    if room > 0.2 * wanted:
        change = change + noise * math.sqrt(room / (noise**2).mean())
    else:  # the blur alone is nearly too much: less of it, and some noise
        change = change * math.sqrt(0.8 * wanted / (change**2).mean()) + noise * math.sqrt(0.2 * wanted / (noise**2).mean())
    result: NDArray[np.float32] = (np.round(np.clip(image + change, 0.0, 1.0) * 255.0) / 255.0).astype(np.float32)
    return result


def _jpeg(image: NDArray[np.float32], quality: int) -> NDArray[np.float32]:
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(np.round(np.clip(image, 0, 1) * 255).astype(np.uint8)).save(buffer, format="JPEG", quality=quality)
    return np.asarray(Image.open(buffer), dtype=np.float32) / np.float32(255.0)


def _stain(rng: Generator) -> NDArray[np.float32]:
    from scipy.ndimage import gaussian_filter
    from skimage.measure import label

    while True:
        height = gaussian_filter(rng.standard_normal((CANVAS, CANVAS)), rng.uniform(2.0, 6.0))
        height = height / height.std() - rng.uniform(0.0, 0.8)
        labels = label(height > 0, connectivity=1)
        mine = labels == np.bincount(labels[labels > 0]).argmax()
        if mine.mean() > 0.1:
            cover: NDArray[np.float32] = (mine * np.clip(height * 4.0, 0.0, 1.0)).astype(np.float32)
            return cover


def malformed(rng: Generator) -> NDArray[np.float32]:
    """A picture (64, 64, 3) of one figure that is no shape of this world: shapes grown together, half a shape, a blob, or a stain."""
    image = np.full((CANVAS, CANVAS, 3), rng.uniform(*BACKGROUNDS), dtype=np.float32)
    rgb = np.array(rng.uniform(0.1, 0.9, 3))
    rgb[int(rng.integers(3))] = rng.uniform(0.7, 0.95)  # every colour of the palette has one strong channel
    radius = float(rng.uniform(6.0, 11.0))
    x, y = rng.uniform(22.0, 42.0, 2)

    def thing(x: float, y: float, radius: float, shapes: Sequence[Shape] = SHAPES) -> Thing:
        shape = shapes[int(rng.integers(len(shapes)))]
        return Thing(shape, "", x, y, radius, float(rng.uniform(-TILT, TILT)), (float(rgb[0]), float(rgb[1]), float(rgb[2])))

    form = rng.random()
    if form < 0.45:  # grown together
        angle, distance = rng.uniform(0, 2 * math.pi), radius * rng.uniform(1.0, 1.7)
        draw(image, thing(float(x), float(y), radius))
        draw(image, thing(float(x + distance * math.cos(angle)), float(y + distance * math.sin(angle)), radius * float(rng.uniform(0.7, 1.0))))
    elif form < 0.7:  # cut in two along a line near the centre (a square or triangle might leave a triangle)
        whole = image.copy()
        draw(whole, thing(float(x), float(y), radius, ("circle", "star", "cross")))
        angle = rng.uniform(0, 2 * math.pi)
        rows, columns = np.mgrid[:CANVAS, :CANVAS] + 0.5
        side = (columns - x) * math.cos(angle) + (rows - y) * math.sin(angle) + rng.uniform(-0.15, 0.25) * radius
        image += np.clip(side + 0.5, 0, 1)[..., None].astype(np.float32) * (whole - image)
    elif form < 0.85:  # the largest stain of smooth noise, on a tenth of the picture or more
        image += _stain(rng)[..., None] * (rgb.astype(np.float32) - image)
    else:  # a blob with a wavy edge
        rows, columns = np.mgrid[:CANVAS, :CANVAS] + 0.5
        angle = np.arctan2(rows - y, columns - x)
        edge = np.full_like(angle, radius)
        for waves in (2, 3, 4, 5):
            edge += radius * rng.uniform(0.1, 0.3) * np.cos(waves * angle + rng.uniform(0, 2 * math.pi))
        cover = np.clip(edge - np.hypot(columns - x, rows - y) + 0.5, 0, 1)[..., None].astype(np.float32)
        image += cover * (rgb.astype(np.float32) - image)
    return image
