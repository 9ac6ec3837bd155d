"""The previews of a run: small pictures of its nodes, all in one file that only grows, `previews.pack`.

The records are those of segments (`tsdiff.treesearch.segmentfile`) with type 2 and segment number 0: the header names the
node, the payload is a picture file. A picture is good or bad by itself, and of those of one node the last counts,
so an index follows from the headers alone. Nothing depends on this file: without it a run is the same, only harder to
look at.
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tsdiff.treesearch.disk import LOCAL, Disk, taken_back, unread, write_whole
from tsdiff.treesearch.segmentfile import ALIGN, PREVIEW, DamagedRecord, Flaw, Header, header_at, next_record, payload_at, seal
from tsdiff.treesearch.strictjson import decode, encode

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from PIL.Image import Image
    from torch import Tensor

PREVIEWS = "previews.pack"

SIDE = 128
"""The longest side of a preview in pixels; smaller pictures stay as they are."""

CRISP_PIXELS = 64 * 64
CRISP_BYTES = 4096
"""Pictures of up to `CRISP_PIXELS` pixels that take no more than `CRISP_BYTES` without loss are kept without loss."""

QUALITY = 80
"""Of all others, as JPEG counts it."""

MEDIA_TYPES = ("image/webp", "image/jpeg")

_SEGMENT = 0


# Pictures ------------------------------------------------------------------------------------------------------------


def shrink(pixels: Tensor) -> Tensor:
    """Pixels (3, H, W) averaged down so that no side is longer than `SIDE`, on their device; a tensor of its own."""
    import torch

    height, width = pixels.shape[-2:]
    longest = max(height, width)
    if longest <= SIDE:
        return pixels.detach().clone()
    size = (max(1, round(height * SIDE / longest)), max(1, round(width * SIDE / longest)))
    return torch.nn.functional.interpolate(pixels.detach()[None].float(), size, mode="area")[0]


def quantize(pixels: Tensor) -> NDArray[np.uint8]:
    """Pixels (3, h, w) in [0, 1] as 8-bit (h, w, 3)."""
    import numpy as np

    array = np.nan_to_num(pixels.float().cpu().numpy(), nan=0.0).clip(0.0, 1.0)
    return np.ascontiguousarray(np.rint(array * np.float32(255.0)).astype(np.uint8).transpose(1, 2, 0))


def compress(pixels: NDArray[np.uint8]) -> tuple[bytes, str]:
    """8-bit pixels (h, w, 3) as a picture file, and its media type: exact WebP where that is small, as of plain shapes, else JPEG.

    A search makes many of them: lossy WebP would be a third smaller, and takes ten times as long.
    """
    from PIL import Image

    image = Image.fromarray(pixels)
    if image.width * image.height <= CRISP_PIXELS:
        exact = _file_of(image, "WEBP", lossless=True, quality=0, method=0)
        if len(exact) <= CRISP_BYTES:
            return exact, "image/webp"
    return _file_of(image, "JPEG", quality=QUALITY, subsampling=0), "image/jpeg"


def _file_of(image: Image, kind: str, **options: Any) -> bytes:
    import PIL.WebPImagePlugin  # noqa: F401 - else the first picture has Pillow import every format that it knows

    buffer = io.BytesIO()
    image.save(buffer, format=kind, **options)
    return buffer.getvalue()


# Reading -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Preview:
    """Where the picture of one node is.

    Attributes:
      path: of the file.
      offset, size: of its record there.
      tree: "search" or "baseline".
      node: its index.
      id: its id, 32 hexadecimal digits. Another than the tree's says that the picture is of a node that was lost in an
        interruption.
      media_type: "image/webp" or "image/jpeg".
      width, height: in pixels.
    """

    path: Path
    offset: int
    size: int
    tree: str
    node: int
    id: str
    media_type: str
    width: int
    height: int

    def read(self) -> bytes:
        """The picture file. Raises DamagedRecord if it has changed, UsageError if it cannot be read."""
        try:
            with FileIO(self.path) as file:
                header = header_at(file, self.path, _SEGMENT, self.offset)
                if header.size != self.size or _facts(header) != self.facts:
                    raise Flaw("another record is there")
                return bytes(payload_at(file, header))
        except (Flaw, FileNotFoundError) as error:
            why = "the file is gone" if isinstance(error, FileNotFoundError) else str(error)
            raise DamagedRecord(f"the preview of node {self.node} in {str(self.path)!r} is lost: {why}") from None
        except OSError as error:
            raise unread(error, self.path) from error

    def image(self) -> Image:
        """The picture in memory. Raises DamagedRecord, UsageError."""
        from PIL import Image

        data = self.read()
        try:
            with Image.open(io.BytesIO(data)) as opened:
                return opened.convert("RGB")
        except Exception as error:  # readers of broken files raise anything
            raise DamagedRecord(f"the preview of node {self.node} in {str(self.path)!r} is no picture: {error}") from None

    @property
    def facts(self) -> dict[str, Any]:
        """What the header of its record says."""
        return {name: getattr(self, name) for name in ("tree", "node", "id", "media_type", "width", "height")}


def _facts(header: Header) -> dict[str, Any]:
    """The facts of a preview's header. Raises Flaw if it has others."""
    try:
        facts: Any = decode(header.text)
    except ValueError as error:
        raise Flaw(f"its header makes no sense ({error})") from None
    kinds = {"tree": str, "node": int, "id": str, "media_type": str, "width": int, "height": int}
    if not isinstance(facts, dict) or {name: type(value) for name, value in facts.items()} != kinds:
        raise Flaw("its header makes no sense")
    if facts["media_type"] not in MEDIA_TYPES:  # what is shown in a browser must not choose its own
        raise Flaw(f"{facts['media_type']!r} is no type of a preview")
    return facts


class Previews(Mapping[tuple[str, int], Preview]):
    """The previews in a file by (tree, node index): `previews["search", 17].read()`. Pictures are read when asked for.

    Reading needs no lock and may be done while the run goes on: `refresh` takes up what has been added since.

    Args:
      path: of the file; without one there are no previews.

    Raises:
      UsageError: if it cannot be read, or was written by a newer tsdiff.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.end = 0
        self._known: dict[tuple[str, int], Preview] = {}
        self._file: tuple[int, int] | None = None
        self.refresh()

    def refresh(self) -> int:
        """Look for more; returns how many pictures were found. A file that has been replaced is read anew.

        Raises:
          UsageError: if it cannot be read, or was written by a newer tsdiff.
        """
        try:
            with FileIO(self.path) as file:
                status = os.fstat(file.fileno())
                if (status.st_dev, status.st_ino) != self._file or status.st_size < self.end:
                    self._known.clear()
                    self._file, self.end = (status.st_dev, status.st_ino), 0
                found = 0
                for preview in _scan(file, self.path, self.end, status.st_size):
                    self._known[preview.tree, preview.node] = preview
                    self.end = preview.offset + preview.size
                    found += 1
                return found
        except FileNotFoundError:
            self._known.clear()
            self._file, self.end = None, 0
            return 0
        except OSError as error:
            raise unread(error, self.path) from error

    def __getitem__(self, key: tuple[str, int]) -> Preview:
        return self._known[key]

    def __iter__(self) -> Iterator[tuple[str, int]]:
        return iter(self._known)

    def __len__(self) -> int:
        return len(self._known)


def read_previews(folder: str | Path) -> Previews:
    """The previews of a run folder; none if it has no such file. Raises UsageError if the file cannot be read."""
    return Previews(Path(folder) / PREVIEWS)


def _scan(file: FileIO, path: Path, offset: int, size: int) -> Iterator[Preview]:
    """Each whole preview from a byte offset on, by its header alone.

    Damage is passed over. What is cut short at the end of the file may be on its way.
    """
    while offset < size:
        try:
            header = header_at(file, path, _SEGMENT, offset)
            end = offset + header.size
            if end > size:
                return
            facts = _facts(header) if header.kind == PREVIEW else None
        except Flaw:
            offset = next_record(file, path, _SEGMENT, offset + ALIGN - offset % ALIGN, size)
            continue
        if facts is not None:
            yield Preview(path, offset, header.size, **facts)
        offset = end


# Writing -------------------------------------------------------------------------------------------------------------


class PreviewFile:
    """A file of previews that is open to append; what is torn at its end is cut off. One process at a time.

    Nothing is synced: a power cut may cost previews.

    Args:
      path: made if it is not there.
      disk: through which it is changed.

    Raises:
      OSError: if it cannot be read or written.
      UsageError: if it was written by a newer tsdiff.
    """

    def __init__(self, path: Path, disk: Disk = LOCAL) -> None:
        self.path = path
        self._disk = disk
        self._end = size = 0
        if path.exists():
            with FileIO(path) as file:
                size = os.fstat(file.fileno()).st_size
                for preview in _scan(file, path, 0, size):
                    self._end = preview.offset + preview.size
        self._file = disk.open(path)
        try:
            if size > self._end:
                disk.truncate(self._file, self._end)
        except OSError:
            self.close()
            raise

    def append(self, facts: Mapping[str, Any], picture: bytes) -> None:
        """Add a picture file, with the `Preview.facts` of its node. Raises OSError."""
        record = seal(PREVIEW, _SEGMENT, self._end, encode(dict(facts)), picture)
        with taken_back(self._disk, self._file, self._end):
            self._disk.write(self._file, self._end, record)
        self._end += len(record)

    def keep(self, wanted: Callable[[Preview], bool]) -> None:
        """Write the file anew without the pictures that are not wanted (any more), unless all are. Raises OSError."""
        previews = Previews(self.path)
        kept = [preview for preview in previews.values() if wanted(preview)]
        if len(kept) == len(previews):
            return
        self.close()
        write_whole(self._disk, self.path, _records(kept))
        self._end = self.path.stat().st_size
        self._file = self._disk.open(self.path)

    def close(self) -> None:
        """Close the file; closing twice is fine."""
        if self._file >= 0:
            self._disk.close(self._file)
            self._file = -1


def _records(previews: list[Preview]) -> Iterator[bytes]:
    """Records one after another; a picture that has been damaged is left out."""
    offset = 0
    for preview in previews:
        try:
            picture = preview.read()
        except DamagedRecord:
            continue
        record = seal(PREVIEW, _SEGMENT, offset, encode(preview.facts), picture)
        yield record
        offset += len(record)
