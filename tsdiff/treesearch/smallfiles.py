"""Small files by which processes talk to each other: written as a whole, found soon, and read with distrust.

Whoever reads them did not write them, so nothing that lies in such a folder may do harm: links are not followed, what is no
ordinary file is not opened, and no more than a few bytes are read.
"""

from __future__ import annotations

import os
import stat
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tsdiff.treesearch.disk import Disk, told, write_whole
from tsdiff.treesearch.errors import UsageError
from tsdiff.treesearch.strictjson import decode, encode

MOST_BYTES = 1 << 16
"""Of a small file. A prompt may be long."""

SETTLING = 2.0
"""Seconds in which a folder that has changed is looked through again: file systems tell the time in steps."""

_FLAGS = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)


def write_small(path: Path, data: Mapping[str, Any], disk: Disk) -> None:
    """Write an object as a file, whole or not at all. Its folder is made if it is not there, within one that is.

    Raises:
      UsageError, SetupError: if it cannot be written.
    """
    write_bytes(path, encode(dict(data)) + b"\n", disk)


def write_bytes(path: Path, data: bytes, disk: Disk) -> None:
    """The same with any bytes."""
    try:
        disk.make_folder(path.parent)
        if not is_folder(path.parent):
            raise UsageError(f"{str(path.parent)!r} is a link, and nothing is written through it; remove it")
        write_whole(disk, path, [data])
    except OSError as error:
        raise told(error, path) from error


def read_small(path: Path) -> dict[str, Any]:
    """A file of one strict JSON object.

    Raises:
      FileNotFoundError: if there is none.
      ValueError: if it is anything else; the message says what.
    """
    try:
        file = os.open(path, _FLAGS)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise ValueError(f"it cannot be opened ({error.strerror})") from None
    try:
        if not stat.S_ISREG(os.fstat(file).st_mode):
            raise ValueError("it is no ordinary file")
        text = b""
        while len(text) <= MOST_BYTES and (piece := os.read(file, MOST_BYTES + 1 - len(text))):
            text += piece
    except OSError as error:
        raise ValueError(f"it cannot be read ({error.strerror})") from None
    finally:
        os.close(file)
    if len(text) > MOST_BYTES:
        raise ValueError(f"it has more than {MOST_BYTES:,} bytes")
    data = decode(text)
    if not isinstance(data, dict):
        raise ValueError("it holds no JSON object")
    return data


def is_folder(path: Path) -> bool:
    """Whether a path is a folder itself, and no link to one."""
    try:
        return stat.S_ISDIR(os.lstat(path).st_mode)
    except (OSError, ValueError):
        return False


def names_in(folder: Path) -> list[str]:
    """The names in a folder, sorted; none where there is no such folder."""
    try:
        return sorted(os.listdir(folder)) if is_folder(folder) else []
    except OSError:
        return []


class Changes:
    """Tells whether the names in a folder may have changed since it was asked last, by one look at the folder itself.

    Args:
      folder: it need not be there.
      clock: tells seconds.
    """

    def __init__(self, folder: Path, clock: Callable[[], float] = time.monotonic) -> None:
        self._folder = folder
        self._clock = clock
        self._seen: int | None = None
        self._settled = 0.0

    def look(self) -> bool:
        """Whether to look through the folder now."""
        try:
            about = os.lstat(self._folder)
        except OSError:
            self._seen = None
            return False
        now = self._clock()
        if about.st_mtime_ns != self._seen:
            self._seen, self._settled = about.st_mtime_ns, now + SETTLING
            return True
        return now < self._settled
