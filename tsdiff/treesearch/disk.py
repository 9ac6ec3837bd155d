"""Every change that a run's files undergo goes through one small object, so that tests can make each one fail.

A `Disk` raises OSError as the operating system does; `told` turns such an error into one line that says what to do.
"""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol, TypeAlias

from tsdiff.treesearch.errors import SetupError, TsdiffError, UsageError

Bytes: TypeAlias = bytes | bytearray | memoryview

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_FORBIDDEN = (errno.EACCES, errno.EPERM, errno.EROFS)


class Disk(Protocol):
    """What the files of a run need of an operating system. Files are open descriptors; all methods raise OSError."""

    def open(self, path: Path) -> int:
        """Open a file for reading and writing, made if it is not there."""
        ...

    def write(self, file: int, offset: int, data: Bytes) -> None:
        """Write all of `data` at a byte offset; after an error any part of it may be there."""
        ...

    def truncate(self, file: int, size: int) -> None:
        """Cut a file to `size` bytes."""
        ...

    def sync(self, file: int) -> None:
        """Return when everything written to the file would survive a power cut."""
        ...

    def close(self, file: int) -> None:
        """Close a file; what was not synced may still be lost."""
        ...

    def rename(self, source: Path, target: Path) -> None:
        """Rename a file in its folder, in one step, replacing `target` if it is there."""
        ...

    def remove(self, path: Path) -> None:
        """Remove a file."""
        ...

    def make_folder(self, path: Path) -> None:
        """Make a folder; one that is there already is fine."""
        ...

    def sync_folder(self, path: Path) -> None:
        """Return when the names in a folder (new, renamed, removed files) would survive a power cut."""
        ...


class LocalDisk:
    """The `Disk` of this machine."""

    def open(self, path: Path) -> int:
        return os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0), 0o666)

    def write(self, file: int, offset: int, data: Bytes) -> None:
        os.lseek(file, offset, os.SEEK_SET)
        rest = memoryview(data)
        while len(rest):
            rest = rest[os.write(file, rest) :]

    def truncate(self, file: int, size: int) -> None:
        os.ftruncate(file, size)

    def sync(self, file: int) -> None:
        if hasattr(os, "fdatasync"):
            os.fdatasync(file)
        else:
            os.fsync(file)

    def close(self, file: int) -> None:
        os.close(file)

    def rename(self, source: Path, target: Path) -> None:
        os.replace(source, target)

    def remove(self, path: Path) -> None:
        os.remove(path)

    def make_folder(self, path: Path) -> None:
        path.mkdir(exist_ok=True)

    def sync_folder(self, path: Path) -> None:
        if sys.platform != "win32":  # where folders cannot be opened, and names need no help
            folder = os.open(path, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)


LOCAL = LocalDisk()


def write_whole(disk: Disk, path: Path, pieces: Iterable[Bytes]) -> None:
    """Write a file that is there as a whole or not at all, whenever the power fails. Raises OSError."""
    part = path.with_name(path.name + ".part")
    file = disk.open(part)
    try:
        disk.truncate(file, 0)
        size = 0
        for piece in pieces:
            disk.write(file, size, piece)
            size += len(piece)
        disk.sync(file)
    finally:
        disk.close(file)
    disk.rename(part, path)
    disk.sync_folder(path.parent)


@contextmanager
def taken_back(disk: Disk, file: int, size: int) -> Iterator[None]:
    """Cut a file back to `size` if writing beyond fails: a courtesy to readers and to a full disk, recovery would do the same."""
    try:
        yield
    except OSError as error:
        try:
            disk.truncate(file, size)
        except OSError as another:
            error.add_note(f"what was half written could not be taken back: {another}")
        raise


def told(error: OSError, path: Path) -> TsdiffError:
    """An error of the operating system as one line: which file could not be written, why, and what to do."""
    why = error.strerror or str(error)
    if error.errno in _FULL:
        return SetupError(f"no room to write {str(path)!r} ({why}); what was written before is kept: free some space, then resume")
    if error.errno in _FORBIDDEN:
        return UsageError(f"cannot write {str(path)!r} ({why}); make it writable, or choose another folder")
    if isinstance(error, (FileNotFoundError, NotADirectoryError, IsADirectoryError)):
        return UsageError(f"cannot write {str(path)!r} ({why}); check the folder's name")
    return SetupError(f"cannot write {str(path)!r} ({why}); what was written before is kept: check the disk, then resume")


def unread(error: OSError, path: Path) -> UsageError:
    """An error of the operating system as one line: which file could not be read, and why."""
    return UsageError(f"cannot read {str(path)!r} ({error.strerror or error}); check its name and permissions")
