"""Picture files as pixels, by rules that do not depend on the file's format.

Every mode becomes RGB in [0, 1]: grayscale has three equal channels, palettes are looked up, transparency is laid over
white, 16-bit grayscale is divided by 65535, floating point must lie in [0, 1] already. Pictures stand upright as their
EXIF orientation says. Of several frames the first counts. Nothing is resized: a picture of more than `MOST_PIXELS` is
refused before it is decoded.

`read_metadata` gives what a picture says of how it was made.
"""

from __future__ import annotations

import glob
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tsdiff.treesearch.errors import TsdiffError, UsageError
from tsdiff.treesearch.strictjson import decode

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from PIL.Image import Image
    from torch import Tensor

MOST_PIXELS = 1 << 25
"""About 33.5 million, 8192 x 4096 for example: 400 MB as numbers."""

MOST_BYTES = 1 << 29
"""Of a file whose texts are read: no picture of `MOST_PIXELS` is larger."""

METADATA_FORMAT = 1
"""Of the "tsdiff" text, as far as it can be read."""

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".pnm")
"""What counts as a picture in a folder; a file that is named itself may have any."""


class PictureError(TsdiffError):
    """A file that cannot be used as a picture; the message names it and says why.

    Attributes:
      name: the file, or what was to be found.
    """

    def __init__(self, name: str | Path, reason: str) -> None:
        super().__init__(f"{name}: {reason}")
        self.name = str(name)


def find_pictures(names: Iterable[str]) -> Iterator[Path | PictureError]:
    """The files that names stand for, each once: files, folders (their pictures, sorted), patterns like "out/**/*.png".

    A name that stands for nothing gives an error in its place.
    """
    seen: set[Path] = set()
    for name in names:
        for found in _named(name):
            if isinstance(found, PictureError):
                yield found
            elif found.absolute() not in seen:
                seen.add(found.absolute())
                yield found


def _named(name: str) -> Iterator[Path | PictureError]:
    path = Path(name)
    try:
        if path.is_dir():
            inside = sorted(file for file in path.iterdir() if file.suffix.lower() in SUFFIXES and file.is_file())
            none = PictureError(name, f"the folder holds no pictures ({', '.join(SUFFIXES[:4])} and so on); name another, or files")
            yield from inside or (none,)
        elif not path.exists() and glob.has_magic(name):
            matches = sorted(Path(match) for match in glob.glob(name, recursive=True))
            files = [match for match in matches if match.is_file()]
            none = PictureError(name, "no file matches this pattern; check it, ** stands for folders of any depth")
            yield from files or (none,)
        else:
            yield path
    except (OSError, ValueError) as error:  # no right to look, a name that is too long, a NUL in it
        yield PictureError(name, f"cannot be looked for ({_why(error)})")


def read_picture(path: Path) -> Tensor:
    """A file's pixels: float32 (3, H, W) in [0, 1].

    Raises:
      PictureError: naming the file and why it cannot be used.
    """
    import numpy as np
    import torch
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        if not path.is_file():  # a pipe would be waited for
            raise PictureError(path, "not a file" if path.exists() else "there is no such file; check the name")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of metadata that is damaged or very large pictures: the rules here decide
            with Image.open(path) as opened:
                if opened.width * opened.height > MOST_PIXELS:
                    raise PictureError(path, f"{opened.width} x {opened.height} is more than {MOST_PIXELS:,} pixels; make the picture smaller first")
                opened.load()
                pixels = _numbers(path, ImageOps.exif_transpose(opened))
    except PictureError:
        raise
    except UnidentifiedImageError:
        raise PictureError(path, "not a picture that can be read; PNG, JPEG, WebP, TIFF and the like can") from None
    except Image.DecompressionBombError:
        raise PictureError(path, f"more than {MOST_PIXELS:,} pixels; make the picture smaller first") from None
    except Exception as error:  # readers of damaged files raise anything
        raise PictureError(path, f"cannot be read ({_why(error)}); is the file whole?") from error
    return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))


def _numbers(path: Path, image: Image) -> NDArray[np.float32]:
    """Float32 (H, W, 3) in [0, 1]."""
    import numpy as np
    from PIL import Image

    if image.mode == "F" or image.mode.startswith("I"):
        numbers = np.asarray(image, dtype=np.float32) / np.float32(1.0 if image.mode == "F" else 65535.0)
        if not (np.isfinite(numbers).all() and numbers.min() >= 0.0 and numbers.max() <= 1.0):
            rule = "floating point pictures must lie in [0, 1]" if image.mode == "F" else "whole numbers must lie between 0 and 65535"
            raise PictureError(path, f"holds values outside the range; {rule}")
        return np.repeat(numbers[:, :, None], 3, axis=2)
    if image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        seen = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", seen.size, "white"), seen)
    return np.asarray(image.convert("RGB"), dtype=np.float32) / np.float32(255.0)


def _why(error: Exception) -> str:
    return str(getattr(error, "strerror", None) or error or type(error).__name__)


def read_metadata(path: str | Path) -> dict[str, Any] | None:
    """What a picture says of how it was made.

    Returns:
      "parameters": the text that many image tools write, None if there is none; "tsdiff": the record of the search that
      found the picture (`docs/run-format.md`), None if there is none. None if the picture has neither.

    Raises:
      UsageError: if the file is no picture, cannot be read, is damaged, or holds texts that are too long.
    """
    path = Path(path)
    texts = _texts(path)
    parameters, record = texts.get("parameters"), texts.get("tsdiff")
    if parameters is None and record is None:
        return None
    facts: Any = None
    if record is not None:
        try:
            facts = decode(record.encode())
        except (ValueError, UnicodeError) as error:
            raise UsageError(f"{str(path)!r} holds a damaged record of its search ({error}); the picture itself may be fine") from None
        if not isinstance(facts, dict) or not isinstance(facts.get("format"), int):
            raise UsageError(f"{str(path)!r} holds a damaged record of its search (it names no format); the picture itself may be fine")
        if facts["format"] > METADATA_FORMAT:
            raise UsageError(f"{str(path)!r} holds a record of format {facts['format']}, but this tsdiff reads up to format {METADATA_FORMAT}; install a newer tsdiff")
    return {"parameters": parameters, "tsdiff": facts}


def _texts(path: Path) -> dict[str, str]:
    """The texts of a picture file by keyword; of two with one keyword the last counts. Raises UsageError."""
    from PIL import Image, UnidentifiedImageError

    try:
        if not path.is_file():  # a pipe would be waited for
            raise UsageError(f"{str(path)!r} is not a file" if path.exists() else f"{str(path)!r} does not exist; check the name")
        if path.stat().st_size > MOST_BYTES:
            raise UsageError(f"{str(path)!r} has more than {MOST_BYTES:,} bytes, too many for a picture")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of other metadata that is damaged, or very large pictures
            with Image.open(path) as opened:
                texts = _known(opened)
                if not texts and opened.format == "PNG" and opened.width * opened.height <= MOST_PIXELS:
                    opened.load()  # texts may stand behind the pixels
                    texts = _known(opened)
                return texts
    except UsageError:
        raise
    except UnidentifiedImageError:
        raise UsageError(f"{str(path)!r} is not a picture that can be read; PNG files of a search carry their history") from None
    except Exception as error:  # readers of damaged files raise anything
        raise UsageError(f"{str(path)!r} cannot be read ({_why(error)}); is the file whole?") from None


def _known(image: Image) -> dict[str, str]:
    return {name: str(image.info[name]) for name in ("parameters", "tsdiff") if isinstance(image.info.get(name), str)}
