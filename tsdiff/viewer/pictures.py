"""Pictures of nodes, as bytes for a browser; and thumbnails, many in one picture.

What a browser is told about a picture never comes from a file's name or from what a file says: the first bytes decide, and
only kinds of pictures that run no script are passed on.
"""

from __future__ import annotations

import io
import threading
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tsdiff.treesearch.errors import UsageError
from tsdiff.treesearch.previewfile import Preview
from tsdiff.treesearch.runfolder import PICTURES
from tsdiff.viewer.documents import is_answer
from tsdiff.viewer.folders import LIMITS, ordinary, stamp
from tsdiff.viewer.watched import Watched

if TYPE_CHECKING:
    from PIL.Image import Image

ROWS = COLUMNS = 16
CELLS = ROWS * COLUMNS
"""Thumbnails on a page of the atlas."""

SIZES = (32, 64)
"""Sides of a thumbnail that can be asked for."""

KEPT = 64
"""Pages that are kept, about 100 kB each."""

_PIXELS = 1 << 22  # of a preview; those that searches write have 128 x 128
_QUALITY = 82


@dataclass(frozen=True)
class Picture:
    """A picture file.

    Attributes:
      data: its bytes.
      media_type: "image/png", "image/jpeg" or "image/webp".
      tag: differs when the picture does.
    """

    data: bytes
    media_type: str
    tag: str


def media_type(data: bytes) -> str:
    """What kind of picture some bytes are. Raises UsageError if they are none that is passed on."""
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return "image/png"
    if data.startswith(b"\xff\xd8\xff"):
        return "image/jpeg"
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "image/webp"
    raise UsageError("this file is no PNG, JPEG or WebP picture")


def file_picture(folder: Path, path: Path) -> Picture:
    """A picture file of a run. Raises UsageError if there is none, it leads out of the folder, or it is no picture."""
    ordinary(folder, path, most=LIMITS[PICTURES["best"]])
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UsageError(f"{path.name} cannot be read ({error.strerror})") from None
    return Picture(data, media_type(data), "-".join(map(str, stamp(path) or ())))


def node_picture(watched: Watched, index: int) -> Picture:
    """The picture of a node of the search: the image where it is the answer, else its preview. Raises UsageError without one."""
    watched.run.tree.at(index)
    if is_answer(watched.run, index) and (watched.path / PICTURES["best"]).is_file():
        return file_picture(watched.path, watched.path / PICTURES["best"])
    preview = watched.preview(index)
    if preview is None:
        raise UsageError(f"no picture of node {index} was kept")
    return _small(preview)


def baseline_picture(watched: Watched) -> Picture:
    """The picture of the plain sample. Raises UsageError without one."""
    path, tree = watched.path / PICTURES["baseline"], watched.run.baseline
    if path.is_file():
        return file_picture(watched.path, path)
    preview = None if tree is None or tree.best is None else watched.preview(tree.best.index, "baseline")
    if preview is None:
        raise UsageError("no picture of the plain sample was kept")
    return _small(preview)


def _small(preview: Preview) -> Picture:
    data = preview.read()
    return Picture(data, media_type(data), f"{preview.id}-{preview.offset}")


def thumbnail(preview: Preview, size: int) -> Image:
    """A preview as a square with transparent margins. Raises UsageError or OSError if it is no picture of a sensible size."""
    from PIL import Image as pil

    with pil.open(io.BytesIO(preview.read()), formats=("WEBP", "JPEG")) as opened:
        if opened.width * opened.height > _PIXELS:
            raise UsageError(f"the preview of node {preview.node} has {opened.width} x {opened.height} pixels; it is not shown")
        opened.draft("RGB", (size, size))
        image = opened.convert("RGB")
    image.thumbnail((size, size), pil.Resampling.BOX)
    whole = pil.new("RGBA", (size, size))
    whole.paste(image, ((size - image.width) // 2, (size - image.height) // 2))
    return whole


class Atlas:
    """The thumbnails of one run, `CELLS` on a page, row by row. May be asked by several threads; one page is made at a time."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._pages: OrderedDict[tuple[int, int], Picture] = OrderedDict()
        self._last: tuple[tuple[int, int], Image, dict[int, str]] | None = None  # what grows in a run that goes on

    def page(self, watched: Watched, number: int, size: int) -> Picture:
        """A page as WebP. What is no picture (any more) is left blank.

        Raises:
          UsageError: if there is no such page or size.
        """
        if size not in SIZES:
            raise UsageError(f"size is {size} but must be one of {', '.join(map(str, SIZES))}")
        with watched.lock:
            nodes = watched.thumbnails[number * CELLS : (number + 1) * CELLS]
            previews = {cell: preview for cell, node in enumerate(nodes) if (preview := watched.preview(node)) is not None}
            tag = f"{watched.version[0]}-{number}-{size}-{hash(tuple((cell, one.offset, one.id) for cell, one in previews.items())) & 0xFFFFFFFFFFFF:x}"
        if not nodes:
            raise UsageError(f"there is no page {number} of thumbnails; there are {-(-len(watched.thumbnails) // CELLS)}")
        with self._lock:
            known = self._pages.get((number, size))
            if known is None or known.tag != tag:
                known = self._pages[number, size] = Picture(self._draw((number, size), previews), "image/webp", tag)
            self._pages.move_to_end((number, size))
            while len(self._pages) > KEPT:
                self._pages.popitem(last=False)
            return known

    def _draw(self, key: tuple[int, int], previews: dict[int, Preview]) -> bytes:
        from PIL import Image as pil

        size = key[1]
        if self._last is not None and self._last[0] == key:
            _, page, drawn = self._last
        else:
            page, drawn = pil.new("RGBA", (COLUMNS * size, ROWS * size)), {}
        blank = pil.new("RGBA", (size, size))
        for cell in sorted(previews.keys() | drawn.keys()):
            preview = previews.get(cell)
            now = "" if preview is None else f"{preview.id}-{preview.offset}"
            if drawn.get(cell, "") == now:
                continue
            drawn[cell] = now
            try:
                square = blank if preview is None else thumbnail(preview, size)
            except Exception:  # what reads broken pictures raises anything; the node is shown without
                square = blank
            page.paste(square, (cell % COLUMNS * size, cell // COLUMNS * size))
        self._last = key, page, drawn
        buffer = io.BytesIO()
        page.save(buffer, format="WEBP", quality=_QUALITY, method=0)
        return buffer.getvalue()
