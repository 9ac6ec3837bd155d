"""Videos: what stands for one where a picture is wanted, how one is held in memory, and the file that it becomes.

Decoded pixels are (3, H, W) of a picture and (F, 3, H, W) of a video of F frames. Verifiers of images see its key frames,
the first, the middle and the last, one after the other, and a video's score is the mean of theirs. Where one picture has
to stand for it (previews, the PNG of an answer, people who are asked), it is the middle one.

The file is an animated WebP, which browsers and image viewers play: exact where the video is small, else lossy.
"""

from __future__ import annotations

import io
import json
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from PIL.Image import Image
    from torch import Tensor

EXACT_PIXELS = 1 << 20
"""Videos of up to this many pixels, all frames together, are written without loss."""

QUALITY = 90
"""Of all others, as WebP counts it."""

MOST_RATE = 1000.0
"""Frames per second: files tell time in milliseconds."""


def is_video(pixels: Tensor) -> bool:
    """Whether decoded pixels are those of a video."""
    return pixels.dim() == 4


def key_frames(pixels: Tensor) -> Tensor:
    """The first, the middle and the last frame (K, 3, H, W) of a video (F, 3, H, W), each once; a picture as it is.

    The key frames of key frames are themselves. Memory of their own: a whole video is large.
    """
    if not is_video(pixels):
        return pixels
    count = pixels.shape[0]
    return pixels[sorted({0, count // 2, count - 1})]


def still(pixels: Tensor) -> Tensor:
    """The picture (3, H, W) that stands for decoded pixels: the middle one of a video, or of its key frames."""
    return pixels[pixels.shape[0] // 2] if is_video(pixels) else pixels


def held(pixels: Tensor) -> Tensor:
    """Decoded pixels as they are held until a tree has ended: of a video 8-bit numbers, a quarter of the memory."""
    return (pixels.clamp(0, 1) * 255).round().byte() if is_video(pixels) else pixels


_DESCRIPTION = 0x010E
"""Where EXIF keeps what a picture is."""


@dataclass(frozen=True, eq=False)
class Video:
    """Frames to be shown one after the other.

    Attributes:
      frames: 8-bit RGB, (F, H, W, 3).
      frame_rate: frames per second, above 0 and up to `MOST_RATE`.
    """

    frames: NDArray[np.uint8]
    frame_rate: float

    @classmethod
    def of(cls, pixels: Tensor, frame_rate: float) -> Video:
        """The video of `held` pixels (F, 3, H, W)."""
        return cls(pixels.permute(0, 2, 3, 1).contiguous().cpu().numpy(), frame_rate)

    @property
    def still(self) -> Image:
        """The frame that stands for the video."""
        return self.images()[len(self.frames) // 2]

    def images(self) -> list[Image]:
        """All frames."""
        from PIL import Image

        return [Image.fromarray(frame) for frame in self.frames]

    def file(self) -> bytes:
        """An animated WebP that plays again and again."""
        from PIL import Image

        exact = self.frames[..., 0].size <= EXACT_PIXELS
        how: dict[str, Any] = {"lossless": True, "quality": 0} if exact else {"quality": QUALITY}
        ends = _ends(len(self.frames), self.frame_rate)
        first, *rest = self.images()
        # A frame that equals the one before it only prolongs it, so that the file has to say how many there are.
        exif = Image.Exif()
        exif[_DESCRIPTION] = json.dumps({"frames": len(self.frames), "frame_rate": self.frame_rate})
        buffer = io.BytesIO()
        durations = [end - start for start, end in zip([0, *ends], ends, strict=False)]
        first.save(buffer, format="WEBP", save_all=True, append_images=rest, duration=durations, loop=0, method=0, exif=exif, **how)
        return buffer.getvalue()


def length(path: Path) -> tuple[int, float]:
    """How many frames a file that `Video.file` has made has, and how many a second. Raises OSError, ValueError for another."""
    from PIL import Image

    with Image.open(path) as opened:
        return _told(opened.getexif().get(_DESCRIPTION))


def read_video(path: Path) -> Video:
    """A file that `Video.file` has made.

    Raises:
      OSError, ValueError: if the file is another, or cannot be read.
    """
    import numpy as np
    from PIL import Image

    with Image.open(path) as opened:
        count, rate = _told(opened.getexif().get(_DESCRIPTION))
        stored, durations = [], []
        for index in range(getattr(opened, "n_frames", 1)):
            opened.seek(index)
            opened.load()
            stored.append(np.asarray(opened.convert("RGB")))
            durations.append(int(opened.info.get("duration", 0)))
    if len(stored) == 1:  # then no duration is written
        return Video(np.stack(stored * count), rate)
    ends, shown = _ends(count, rate), list(accumulate(durations))
    if shown[-1] != ends[-1]:
        raise ValueError(f"it plays {shown[-1]} ms, but {count} frames at {rate:g} a second take {ends[-1]}")
    return Video(np.stack([stored[int(np.searchsorted(shown, end))] for end in ends]), rate)


def _told(description: Any) -> tuple[int, float]:
    """How many frames there are, and how many a second."""
    try:
        facts = json.loads(description)
        count, rate = int(facts["frames"]), float(facts["frame_rate"])
    except (TypeError, ValueError, KeyError):
        raise ValueError("it is no video of a search") from None
    if count < 1 or not 0.0 < rate <= MOST_RATE:
        raise ValueError(f"it says that it has {count} frames at {rate:g} a second")
    return count, rate


def _ends(count: int, frame_rate: float) -> list[int]:
    """When each frame ends, in milliseconds."""
    return [round(1000 * (index + 1) / frame_rate) for index in range(count)]
