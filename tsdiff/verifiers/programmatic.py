"""Verifiers that are a formula: no weights, known answers, instant. The natural ones to try a search with.

Shapes: B rows, C = 3 channels (RGB in [0, 1]), H x W pixels. Every row is reduced on its own, in float32 and from a
contiguous copy, so that a row's score is the same number, bit for bit, in any batch.
"""

from __future__ import annotations

import io
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from tsdiff.treesearch.errors import UsageError
from tsdiff.treesearch.parameters import check, parameter
from tsdiff.treesearch.protocols import Candidates, Condition, Scores
from tsdiff.verifiers.neural import answered, sighted

if TYPE_CHECKING:
    from torch import Tensor

# Rec. 709 luma weights of R, G and B.
_LUMA = (0.2126, 0.7152, 0.0722)


@dataclass(frozen=True, kw_only=True)
class _Formula(ABC):
    """A score computed from one image's pixels alone."""

    needs: ClassVar[frozenset[str]] = frozenset({"images"})
    scope: ClassVar[Literal["row"]] = "row"
    latency: ClassVar[Literal["immediate"]] = "immediate"
    judges: ClassVar[Literal["any"]] = "any"
    differentiable: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check(self)

    def prepare(self, device: str) -> None:  # noqa: B027 - nothing to do, for every formula
        """There are no weights to load."""

    def check(self, condition: Condition) -> None:  # noqa: B027
        """Any condition will do: only pixels are read."""

    def score(self, candidates: Candidates) -> Scores:
        """Score every row on its own; values are a float32 tensor (B,) where `_brought` has the images.

        An image whose pixels are not all finite fails alone.
        """
        import torch

        images, finite = sighted(candidates.images)
        return answered(torch.stack([self.value(image.float().contiguous()) for image in self._brought(images).unbind()]), finite)

    def _brought(self, images: Tensor) -> Tensor:
        """A batch of images (B, 3, H, W) where it is computed with: where it is."""
        return images

    @abstractmethod
    def value(self, image: Tensor) -> Tensor:
        """The score of one image (3, H, W): a scalar tensor."""


@dataclass(frozen=True, kw_only=True)
class Luminance(_Formula):
    """Mean brightness, in [0, 1]: 0.2126 R + 0.7152 G + 0.0722 B (ITU-R BT.709) over all pixels."""

    name: ClassVar[str] = "luminance"

    def value(self, image: Tensor) -> Tensor:
        """Mean luma."""
        return _luma(image).mean()


class _File(_Formula, ABC):
    """A score of the file that a library on the CPU makes of an image."""

    differentiable: ClassVar[bool] = False

    def _brought(self, images: Tensor) -> Tensor:
        """On the CPU, the whole batch in one transfer."""
        return images.detach().cpu()


@dataclass(frozen=True, kw_only=True)
class JpegSize(_File):
    """Size of the image as a JPEG file, in kB (1000 bytes): higher is busier.

    The "incompressibility" reward of DDPO, Black et al. 2023 (arXiv 2305.13301). The last digits depend on the JPEG
    library's version.
    """

    name: ClassVar[str] = "jpeg-size"

    quality: int = parameter(95, low=1, high=100, help="JPEG quality; DDPO uses 95")

    def value(self, image: Tensor) -> Tensor:
        """Kilobytes."""
        return image.new_tensor(_jpeg_bytes(image, self.quality) / 1000.0)


@dataclass(frozen=True, kw_only=True)
class JpegCompressibility(_File):
    """Minus the size of the image as a JPEG file, in kB (1000 bytes): higher is plainer.

    The "compressibility" reward of DDPO, Black et al. 2023 (arXiv 2305.13301).
    """

    name: ClassVar[str] = "jpeg-compressibility"

    quality: int = parameter(95, low=1, high=100, help="JPEG quality; DDPO uses 95")

    def value(self, image: Tensor) -> Tensor:
        """Minus the kilobytes."""
        return image.new_tensor(-_jpeg_bytes(image, self.quality) / 1000.0)


@dataclass(frozen=True, kw_only=True)
class TargetColor(_Formula):
    """Closeness to one colour, in [-1, 0]: minus the mean squared difference over pixels and channels.

    Raises:
      UsageError: if the colour is neither a CSS name nor #rrggbb.
    """

    name: ClassVar[str] = "target-color"

    color: str = parameter("red", help="a CSS colour name, or #rrggbb")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.rgb  # noqa: B018 - a wrong colour is refused here, not at the first score

    @property
    def rgb(self) -> tuple[float, float, float]:
        """The colour's channels, in [0, 1]."""
        from PIL import ImageColor

        try:
            red, green, blue = ImageColor.getrgb(self.color)
        except (ValueError, TypeError, AttributeError):  # an unknown name, a colour with alpha, not a text
            raise UsageError(f"{self.name}: color is {self.color!r} but must be a CSS colour name such as 'navy', or '#rrggbb'") from None
        return red / 255.0, green / 255.0, blue / 255.0

    def value(self, image: Tensor) -> Tensor:
        """Minus the mean squared difference."""
        return -(image - image.new_tensor(self.rgb)[:, None, None]).square().mean()


@dataclass(frozen=True, kw_only=True)
class TotalVariation(_Formula):
    """Smoothness, in [-2, 0]: minus the mean absolute difference of horizontal neighbours, and of vertical ones.

    0 is a constant image; higher is smoother. The anisotropic form of Rudin, Osher & Fatemi 1992, "Nonlinear total
    variation based noise removal algorithms", as a mean, so that sizes compare.
    """

    name: ClassVar[str] = "total-variation"

    def value(self, image: Tensor) -> Tensor:
        """Minus the mean total variation."""
        across, down = image.diff(dim=2).abs(), image.diff(dim=1).abs()
        return -(across.sum() / max(across.numel(), 1) + down.sum() / max(down.numel(), 1))


@dataclass(frozen=True, kw_only=True)
class Sharpness(_Formula):
    """Variance of the Laplacian of the luma: 0 for a constant image, higher is sharper (or noisier).

    The five-point Laplacian, with borders repeated outwards. Source: the focus measure of Pech-Pacheco et al. 2000,
    "Diatom autofocusing in brightfield microscopy: a comparative study".
    """

    name: ClassVar[str] = "sharpness"

    def value(self, image: Tensor) -> Tensor:
        """Population variance over pixels."""
        luma = _luma(image)
        laplacian = _second_difference(luma, 0) + _second_difference(luma, 1)
        return laplacian.var(unbiased=False)


def _luma(image: Tensor) -> Tensor:
    red, green, blue = image.unbind()
    return _LUMA[0] * red + _LUMA[1] * green + _LUMA[2] * blue  # (H, W)


def _second_difference(plane: Tensor, dim: int) -> Tensor:
    """x[i-1] - 2 x[i] + x[i+1] with repeated borders: the difference across a border is 0."""
    first, last = plane.narrow(dim, 0, 1), plane.narrow(dim, plane.shape[dim] - 1, 1)
    return plane.diff(n=2, dim=dim, prepend=first, append=last)


def _jpeg_bytes(image: Tensor, quality: int) -> int:
    """Bytes of an image (3, H, W), rounded to 8 bits, as a JPEG file."""
    import torch
    from PIL import Image

    pixels = (image.detach().clamp(0.0, 1.0) * 255.0).round().to(torch.uint8).permute(1, 2, 0).cpu().numpy()
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="JPEG", quality=quality)
    return buffer.tell()
