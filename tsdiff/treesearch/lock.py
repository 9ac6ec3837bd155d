"""One writer for each run: a lock of the operating system on a file, which goes when its process does, however it ends.

The file is never removed (a lock on a file that somebody else removes protects nothing), and what it says, the holder's
process and machine, matters only while it is locked. Readers of a run do not look at it.
"""

from __future__ import annotations

import errno
import json
import os
import platform
import sys
import time
import weakref
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from tsdiff.treesearch.disk import LOCAL, Disk, told
from tsdiff.treesearch.errors import SetupError, UsageError

PATIENCE = 0.2
"""Seconds that a lock is tried for: longer than anyone takes to look who holds it."""

_HELD = (errno.EACCES, errno.EAGAIN, errno.EWOULDBLOCK, errno.EDEADLK)


@dataclass(frozen=True)
class Holder:
    """Who holds a lock: a process of a machine; 0 and "" where that is not known yet."""

    pid: int
    host: str

    def __str__(self) -> str:
        if not self.pid:
            return "another process"
        return f"process {self.pid}" + ("" if self.host in ("", platform.node()) else f" on {self.host}")


class Busy(UsageError):
    """Somebody else writes the run."""


class Lock:
    """A lock on a file, held until `close` or the end of the process. Forked children do not hold it.

    Args:
      path: the file, made if it is not there; its folder must exist.
      disk: through which the file is changed.

    Raises:
      Busy: if it is held already, by this process or another.
      UsageError: if the file cannot be written.
      SetupError: if the file system has no locks, or no room for the file.
    """

    def __init__(self, path: Path, *, disk: Disk = LOCAL) -> None:
        self.path = path
        self._disk = disk
        self._file = -1
        try:
            self._file = disk.open(path)
            _living.add(self)
            self._acquire()
            text = json.dumps({"pid": os.getpid(), "host": platform.node()}).encode() + b"\n"
            disk.truncate(self._file, 0)
            disk.write(self._file, 0, text)
        except OSError as error:
            self.close()
            raise told(error, path) from error
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Give the lock back; closing twice is fine."""
        if self._file >= 0:
            file, self._file = self._file, -1
            self._disk.close(file)

    def __enter__(self) -> Lock:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _acquire(self) -> None:
        deadline = time.monotonic() + PATIENCE
        while not _try(self._file):
            if time.monotonic() >= deadline:
                raise Busy(f"{str(self.path.parent)!r} is being written by {_read(self.path)}; wait until it is done, or stop it first")
            time.sleep(0.01)


def holder(path: Path) -> Holder | None:
    """Who holds the lock of a file; None if nobody does. Changes nothing.

    Raises:
      UsageError, SetupError: if the file cannot be read, or the file system has no locks.
    """
    try:
        file = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UsageError(f"cannot read {str(path)!r} ({error.strerror}); check its permissions") from error
    try:
        return None if _try(file, shared=True) else _read(path)
    finally:
        os.close(file)


def _read(path: Path) -> Holder:
    try:
        data = json.loads(path.read_bytes())
        return Holder(int(data["pid"]), str(data["host"]))
    except (OSError, ValueError, TypeError, KeyError):  # held, but its holder has not written it yet
        return Holder(0, "")


def _try(file: int, *, shared: bool = False) -> bool:
    """Lock an open file, which lasts until it is closed; whether that worked. Shared is enough to see if anyone holds it."""
    try:
        if sys.platform == "win32":
            import msvcrt

            os.lseek(file, 1 << 30, os.SEEK_SET)  # far from the text, since others cannot read what is locked
            msvcrt.locking(file, msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _HELD:
            return False
        raise SetupError(f"the file system cannot lock files ({error.strerror}); put the run on another one") from error
    return True


_living: weakref.WeakSet[Lock] = weakref.WeakSet()


def _close_in_child() -> None:
    """A forked child shares its parent's locks: without this, one that outlives its parent would go on holding them."""
    for lock in list(_living):
        if lock._file >= 0:
            os.close(lock._file)
            lock._file = -1


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_close_in_child)
