"""Disks for tests: one that does not wait for hardware, and one that fails at a chosen change."""

from __future__ import annotations

import errno
import os
import random
from pathlib import Path
from typing import Literal

from tsdiff.treesearch.disk import LocalDisk

BLOCK = 64  # bytes that reach the platter together: small, so that small files are torn in many ways


class Killed(BaseException):
    """The process is gone: whatever it tries after this raises again."""


class QuickDisk(LocalDisk):
    """The local disk without waiting for hardware; nothing here survives a real power cut."""

    def sync(self, file):
        pass

    def sync_folder(self, path):
        pass


class FaultyDisk:
    """The local disk, on which change number `at` fails.

    Changes are all methods but `close`. What happens then:

      "full"     it raises ENOSPC, a write after half of its bytes; so does every later write. Cutting still works.
      "killed"   nothing is done (of a write: half), the process is gone.
      "power"    as "killed", and of what was not synced only some blocks and names are on disk, chosen by `seed`.

    Attributes:
      failed: whether that has happened.
      log: names of the changes, in order.
    """

    def __init__(self, at: int, fault: Literal["full", "killed", "power"], *, seed: int = 0) -> None:
        self.at = at
        self.fault = fault
        self.failed = False
        self.log: list[str] = []
        self._disk = QuickDisk()
        self._random = random.Random(seed)
        self._open: dict[int, Path] = {}
        self._names: dict[Path, dict[str, int]] = {}  # by folder: name -> file, as seen now
        self._synced_names: dict[Path, dict[str, int]] = {}
        self._synced: dict[int, bytes] = {}  # by file
        self._gone: dict[int, bytes] = {}  # contents of files that have no name any more

    def open(self, path):
        self._change("open", lambda: None)
        new = not path.exists()
        self._look(path.parent)
        file = self._disk.open(path)
        self._open[file] = path
        if new:
            number = self._names[path.parent][path.name] = len(self._synced)
            self._synced[number] = b""
        return file

    def write(self, file, offset, data):
        half = bytes(data[: len(data) // 2])
        self._change("write", lambda: self._disk.write(file, offset, half))
        if self.failed and self.fault == "full":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self._disk.write(file, offset, data)

    def truncate(self, file, size):
        self._change("truncate", lambda: None)
        self._disk.truncate(file, size)

    def sync(self, file):
        self._change("sync", lambda: None)
        path = self._open[file]
        self._synced[self._names[path.parent][path.name]] = path.read_bytes()

    def close(self, file):
        if file in self._open:  # of a killed process everything is closed already
            del self._open[file]
            self._disk.close(file)

    def rename(self, source, target):
        self._change("rename", lambda: None)
        self._look(source.parent)
        names = self._names[source.parent]
        if target.name in names:
            self._gone[names[target.name]] = target.read_bytes()
        names[target.name] = names.pop(source.name)
        self._disk.rename(source, target)

    def remove(self, path):
        self._change("remove", lambda: None)
        self._look(path.parent)
        if path.name in self._names[path.parent]:  # not a file that somebody else has made since
            self._gone[self._names[path.parent].pop(path.name)] = path.read_bytes()
        self._disk.remove(path)

    def make_folder(self, path):
        self._change("make_folder", lambda: None)
        self._disk.make_folder(path)

    def sync_folder(self, path):
        self._change("sync_folder", lambda: None)
        self._look(path)
        self._synced_names[path] = dict(self._names[path])

    def _change(self, kind, half):
        if self.failed and self.fault != "full":
            raise Killed
        self.log.append(kind)
        if len(self.log) - 1 != self.at:
            return
        self.failed = True
        half()
        if self.fault == "full":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        for file in self._open:
            self._disk.close(file)
        self._open.clear()
        if self.fault == "power":
            self._cut_power()
        raise Killed

    def _look(self, folder):
        """Files that were there before are safe on disk."""
        if folder in self._names:
            return
        self._names[folder] = {}
        for path in sorted(folder.iterdir()):
            if path.is_file():
                self._names[folder][path.name] = len(self._synced)
                self._synced[len(self._synced)] = path.read_bytes()
        self._synced_names[folder] = dict(self._names[folder])

    def _cut_power(self):
        for folder, names in self._names.items():
            now = {number: (folder / name).read_bytes() for name, number in names.items()} | self._gone
            kept = names if self._random.random() < 0.5 else self._synced_names[folder]
            contents = {name: self._some(self._synced[number], now[number]) for name, number in kept.items()}
            for name in names:
                (folder / name).unlink()
            for name, data in contents.items():
                (folder / name).write_bytes(data)

    def _some(self, synced: bytes, now: bytes) -> bytes:
        """A file of which only some blocks have changed from what was synced last to what was written."""
        if synced == now:
            return now
        sizes = sorted((len(synced), len(now)))
        size = self._random.choice([*sizes, self._random.randint(*sizes)])
        blocks = []
        for start in range(0, size, BLOCK):
            old, new = (data[start : min(start + BLOCK, size)] for data in (synced, now))
            blocks.append((new if self._random.random() < 0.5 else old).ljust(min(BLOCK, size - start), b"\0"))
        return b"".join(blocks)
