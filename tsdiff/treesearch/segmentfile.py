"""A file of tensors: records one after another, each checked when it is read and found again by its place.

Records of other types have the same shape, with other facts in their header (`tsdiff.treesearch.previewfile`).

A record begins at a multiple of 64 bytes and is, with numbers little-endian:

    bytes   what
    4       "TSDR"
    2, 2    format version 1, type 1 (a tensor; 2 is a preview; records of other types are passed over)
    4, 8    segment and byte offset that it was written at, so that a record in a wrong place shows
    4, 8    H and P, the bytes of header and payload
    H       {"key":"...","dtype":"float32","shape":[4,64,64]}, then spaces
    4       CRC-32 of all bytes of the record before; what follows begins at a multiple of 64 bytes
    P       the elements, row-major, little-endian
    4       CRC-32 of all bytes of the record before
    0..63   zeros, up to a multiple of 64 bytes
"""

from __future__ import annotations

import re
import struct
import zlib
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from io import BytesIO, FileIO
from pathlib import Path
from typing import Any

from tsdiff.treesearch.disk import Bytes, unread
from tsdiff.treesearch.errors import UsageError
from tsdiff.treesearch.raw import Raw
from tsdiff.treesearch.strictjson import decode, encode

VERSION = 1
TENSOR, PREVIEW = 1, 2
ALIGN = 64

_MAGIC = b"TSDR"
_FIXED = struct.Struct("<4sHHIQIQ")
_CRC = struct.Struct("<I")
_NAME = re.compile(r"(\d{5,})\.seg")
_MAX_HEADER = 1 << 20
_CHUNK = 1 << 20


@dataclass(frozen=True, order=True, slots=True)
class Place:
    """Where a record is: its segment, and its first byte and size in that file."""

    segment: int
    offset: int
    size: int

    def to_json(self) -> list[int]:
        """As strict JSON."""
        return [self.segment, self.offset, self.size]

    @staticmethod
    def from_json(data: list[int]) -> Place:
        """The inverse of `to_json`."""
        segment, offset, size = data
        return Place(segment, offset, size)


@dataclass(frozen=True)
class Entry:
    """A tensor that a scan has found."""

    place: Place
    key: str
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Damage:
    """Bytes of a segment that are no record.

    Attributes:
      torn: nothing good follows in the segment, as after a write that was never finished.
    """

    segment: int
    offset: int
    size: int
    torn: bool
    why: str

    def __str__(self) -> str:
        return f"segment {self.segment}: {self.size} bytes from byte {self.offset} on are {'torn' if self.torn else 'damaged'} ({self.why})"


class DamagedRecord(UsageError):
    """A tensor that was stored cannot be read any more."""


def segment_path(folder: Path, number: int) -> Path:
    """The file of a segment."""
    return folder / f"{number:05d}.seg"


def segment_numbers(folder: Path) -> list[int]:
    """The segments that are there, in order."""
    return sorted(int(match[1]) for entry in folder.iterdir() if (match := _NAME.fullmatch(entry.name)))


def write_record(segment: int, offset: int, key: str, raw: Raw) -> bytes:
    """The bytes of a record that will stand at a byte offset of a segment."""
    text = b'{"key":%b%b' % (encode(key), _form(raw.dtype, raw.shape))
    if len(text) > _MAX_HEADER - ALIGN:
        raise UsageError(f"a key of {len(key)} characters is too long to store a tensor under")
    return seal(TENSOR, segment, offset, text, raw.data)


def seal(kind: int, segment: int, offset: int, text: bytes, data: Bytes) -> bytes:
    """The bytes of a record of any type, with header text and payload, that will stand at a byte offset of a segment."""
    size = memoryview(data).nbytes
    text += b" " * (-(_FIXED.size + len(text) + _CRC.size) % ALIGN)
    head = _FIXED.pack(_MAGIC, VERSION, kind, segment, offset, len(text), size) + text
    head += _CRC.pack(zlib.crc32(head))
    check = _CRC.pack(zlib.crc32(data, zlib.crc32(head)))
    return b"".join((head, data, check, b"\0" * (-(size + _CRC.size) % ALIGN)))


@lru_cache(maxsize=64)
def _form(dtype: str, shape: tuple[int, ...]) -> bytes:
    """What follows the key in a header's text: a run has few types and shapes."""
    return b',"dtype":%b,"shape":%b}' % (encode(dtype), encode(list(shape)))


def read(folder: Path, place: Place) -> tuple[str, Raw]:
    """Key and contents of the tensor at a place.

    Raises:
      DamagedRecord: if it is not there, or has changed since it was written.
      UsageError: if the file cannot be read, or was written by a newer tsdiff.
    """
    path = segment_path(folder, place.segment)
    try:
        with path.open("rb") as file:
            file.seek(place.offset)
            record = BytesIO(file.read(place.size))
        header = header_at(record, path, place.segment, place.offset, base=place.offset)
        if header.kind != TENSOR:
            raise Flaw("the record there is no tensor")
        if header.size != place.size:
            raise Flaw(f"it has {header.size} bytes instead of {place.size}")
        return header.key, Raw(header.dtype, header.shape, payload_at(record, header))
    except Flaw as flaw:
        raise DamagedRecord(f"the tensor at byte {place.offset} of {str(path)!r} is lost: {flaw}") from None
    except FileNotFoundError:
        raise DamagedRecord(f"the tensor at byte {place.offset} of {str(path)!r} is lost: the file is gone") from None
    except OSError as error:
        raise unread(error, path) from error


def scan(folder: Path, *, verify: bool = True) -> Iterator[Entry | Damage]:
    """All that a folder of segments holds, in order; of equal keys the last counts. What is damaged is passed over.

    Args:
      folder: of the segments.
      verify: check payloads too, which reads every byte; otherwise headers alone.

    Raises:
      UsageError: if the folder cannot be read, or was written by a newer tsdiff.
    """
    try:
        for number in segment_numbers(folder):
            yield from scan_segment(folder, number, verify=verify)
    except OSError as error:
        raise unread(error, folder) from error


def scan_segment(folder: Path, number: int, *, verify: bool = True) -> Iterator[Entry | Damage]:
    """All that one segment holds, in order. Raises OSError, or UsageError if it was written by a newer tsdiff."""
    path = segment_path(folder, number)
    with FileIO(path) as file:
        size = file.seek(0, 2)
        offset = 0
        while offset < size:
            after: int | None = None
            try:
                header = header_at(file, path, number, offset)
                if offset + header.size > size:
                    after = size
                    raise Flaw("it is cut short")
                after = offset + header.size
                if verify:
                    payload_at(file, header)
                if header.kind == TENSOR:
                    yield Entry(Place(number, offset, header.size), header.key, header.dtype, header.shape)
            except Flaw as flaw:
                if after is None:
                    after = next_record(file, path, number, offset + ALIGN, size)
                yield Damage(number, offset, after - offset, after == size, str(flaw))
            offset = after


class Flaw(Exception):
    """What is wrong with a record."""


@dataclass(frozen=True, slots=True)
class Header:
    """The facts of a record's header.

    Attributes:
      kind: its type.
      key, dtype, shape: of a tensor.
      text: the header text of any other type.
      payload: bytes of the payload.
      size: bytes of the whole record.
      crc: checksum of all bytes before the payload.
    """

    kind: int
    key: str
    dtype: str
    shape: tuple[int, ...]
    payload: int
    size: int
    crc: int
    text: bytes = b""


def header_at(file: FileIO | BytesIO, path: Path, segment: int, offset: int, *, base: int = 0) -> Header:
    """The header at a byte offset of a segment, of which `file` holds what follows `base`; afterwards it stands at the payload.

    Raises Flaw.
    """
    file.seek(offset - base)
    fixed = _exactly(file, _FIXED.size)
    magic, version, kind, of_segment, at_offset, length, payload = _FIXED.unpack(fixed)
    if magic != _MAGIC or length > _MAX_HEADER:
        raise Flaw("no record begins there")
    head = fixed + _exactly(file, length + _CRC.size)
    if _CRC.unpack(head[-_CRC.size :])[0] != zlib.crc32(head[: -_CRC.size]):
        raise Flaw("the checksum of its header is wrong")
    if version > VERSION:
        raise UsageError(f"{str(path)!r} has format {version}, but this tsdiff reads up to format {VERSION}; install a newer tsdiff")
    if (of_segment, at_offset) != (segment, offset):
        raise Flaw("the record there belongs to another place")
    size = len(head) + payload + _CRC.size
    size += -size % ALIGN
    if kind != TENSOR:
        return Header(kind, "", "", (), payload, size, zlib.crc32(head), bytes(head[_FIXED.size : -_CRC.size]))
    try:
        facts: Any = decode(bytes(head[_FIXED.size : -_CRC.size]))
        return Header(kind, str(facts["key"]), str(facts["dtype"]), tuple(facts["shape"]), payload, size, zlib.crc32(head))
    except (ValueError, KeyError, TypeError) as error:
        raise Flaw(f"its header makes no sense ({error})") from None


def payload_at(file: FileIO | BytesIO, header: Header) -> memoryview:
    """The payload that follows a header. Raises Flaw."""
    data = _exactly(file, header.payload + _CRC.size)
    payload = memoryview(data)[: header.payload]
    if _CRC.unpack(data[header.payload :])[0] != zlib.crc32(payload, header.crc):
        raise Flaw("its checksum is wrong")
    return payload


def _exactly(file: FileIO | BytesIO, size: int) -> bytearray:
    data = bytearray(size)
    rest = memoryview(data)
    while len(rest):
        count = file.readinto(rest)
        if not count:
            raise Flaw("it is cut short")
        rest = rest[count:]
    return data


def next_record(file: FileIO, path: Path, number: int, start: int, size: int) -> int:
    """Where the next record with an intact header begins, from a multiple of 64 bytes on; the file's size if none does."""
    for base in range(start, size, _CHUNK):
        file.seek(base)
        data = file.read(_CHUNK)
        found = data.find(_MAGIC)
        while found >= 0:
            if found % ALIGN == 0:
                with suppress(Flaw):  # bytes that only look like a record
                    header_at(file, path, number, base + found)
                    return base + found
            found = data.find(_MAGIC, found + 1)
    return size
