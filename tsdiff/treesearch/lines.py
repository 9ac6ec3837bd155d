"""The lines of a journal: how one is written, and what makes it intact.

    {"journal":"tsdiff","version":2,"about":{...},"crc32":"89abcdef"}
    {"line":1,"group":1,"left":0,"record":{...},"crc32":"01234567"}

A line has exactly one right spelling. `crc32` is the CRC-32 of all bytes before `,"crc32"` in eight lower-case digits, so
a line can be checked before it is understood, and any single flipped bit shows.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterator, Sequence
from typing import BinaryIO, NamedTuple

from tsdiff.treesearch.errors import UsageError
from tsdiff.treesearch.node import Json
from tsdiff.treesearch.strictjson import decode, encode

MAX_LINE = 64 << 20
"""Longest line in bytes: a bound on the memory that reading a broken file takes."""

FIRST = b'{"journal":"tsdiff","version":'
"""How the first line begins, in every version."""

_HEAD = re.compile(re.escape(FIRST) + rb'(\d+),"about":')
_LINE = re.compile(rb'\{"line":(\d+),"group":(\d+),"left":(\d+),"record":')
_SEAL = len(b',"crc32":"00000000"}\n')


class Line(NamedTuple):
    """A line after the first: its number, its group's number, how many lines of its group follow, its record."""

    number: int
    group: int
    left: int
    record: Json


def write_first(version: int, about: Json) -> bytes:
    """The first line of a journal."""
    return _sealed(b'%b%d,"about":%b' % (FIRST, version, encode(about)))


def read_first(text: bytes) -> tuple[int, Json]:
    """Version and `about` of a first line. Raises ValueError with what is wrong."""
    body = _unsealed(text)
    match = _HEAD.match(text)
    if match is None:
        raise ValueError("it is no first line of a journal")
    return int(match[1]), decode(body[match.end() :])


def write_group(number: int, group: int, records: Sequence[Json]) -> list[bytes]:
    """The lines of a group that begins at line `number`. Raises UsageError if a record cannot be written."""
    texts = []
    for i, record in enumerate(records):
        text = _sealed(b'{"line":%d,"group":%d,"left":%d,"record":%b' % (number + i, group, len(records) - 1 - i, encode(record)))
        if len(text) > MAX_LINE:
            raise UsageError(f"a record of {len(text)} bytes is too long for the journal; at most {MAX_LINE} are allowed")
        texts.append(text)
    return texts


def read_line(text: bytes) -> Line:
    """An intact line. Raises ValueError with what is wrong."""
    body = _unsealed(text)
    match = _LINE.match(text)
    if match is None:
        raise ValueError("it is no line of a journal")
    return Line(int(match[1]), int(match[2]), int(match[3]), decode(body[match.end() :]))


def intact(file: BinaryIO) -> Iterator[Line]:
    """The intact lines from here on; afterwards the file stands at its end."""
    while text := file.readline(MAX_LINE):
        try:
            yield read_line(text)
        except ValueError:
            continue


def _sealed(body: bytes) -> bytes:
    return b'%b,"crc32":"%08x"}\n' % (body, zlib.crc32(body))


def _unsealed(text: bytes) -> bytes:
    """The bytes that a line's checksum covers. Raises ValueError if it does not match."""
    body = text[:-_SEAL]
    if text != _sealed(body):
        raise ValueError("its checksum is wrong" if text.endswith(b"\n") else "it is cut short")
    return body
