"""Which runs are viewed, by what names, and which of their files may be read.

A request names a run by an id, which is looked up among the runs that were found on disk. No path is ever made of what a
request says, so none can lead anywhere else. What lies in a run's folder may be hostile too: a file that leads out of it,
is no ordinary file, or is larger than any run has it, is not read.
"""

from __future__ import annotations

import os
import stat
import threading
import time
from pathlib import Path

from tsdiff.treesearch.errors import UsageError
from tsdiff.treesearch.findruns import run_folders
from tsdiff.treesearch.runfolder import BASELINE, INDEX, LATENTS, LOCK, PICTURES, RUN, TREE

JOURNAL, PREVIEWS, SEGMENTS, RESCORED = "journal.jsonl", "previews.pack", "latents", "rescored"

MEBI = 1 << 20
LIMITS = {RUN: 16 * MEBI, INDEX: 256 * MEBI, TREE: 512 * MEBI, BASELINE: 64 * MEBI, JOURNAL: 2048 * MEBI, **dict.fromkeys(PICTURES.values(), 64 * MEBI)}
"""Bytes that a file of a run may have to be shown: many times what the largest searches write."""

_FILES = (RUN, INDEX, TREE, BASELINE, JOURNAL, LATENTS, LOCK, PREVIEWS, *PICTURES.values())
_FOLDERS = (SEGMENTS, RESCORED)

class Folders:
    """The run folders in a folder, or that folder itself, by their ids.

    The id is the path below the folder that is viewed, with "/" between its parts; of a folder that is a run itself, its
    name. Bytes of a name that are no UTF-8 are written as %XX.

    Args:
      root: the folder that is viewed.

    Attributes:
      patience: seconds before the folder is searched for new runs again.

    Raises:
      UsageError: if it is none, or cannot be read.
    """

    patience = 2.0

    def __init__(self, root: Path) -> None:
        if not root.is_dir():
            names = f"; name its folder, {str(root.parent)!r}" if root.is_file() else "; `tsdiff list runs` shows the runs there are"
            raise UsageError(f"there is no folder {str(root)!r}{names}")
        self.root = root.resolve()
        self._lock = threading.Lock()
        self._known: dict[str, Path] = {}
        self._searched = -float("inf")
        self._took = 0.0

    def all(self) -> dict[str, Path]:
        """Run folders by id, in the order of their names, as they were `patience` seconds ago or later (in folders so large that
        looking takes long, ten times as long as that). Raises UsageError.
        """
        with self._lock:
            if time.monotonic() - self._searched >= max(self.patience, 10 * self._took):
                began = time.monotonic()
                self._known = self._found()
                self._searched = time.monotonic()
                self._took = (self._searched - began) * bool(self.patience)
            return self._known

    def path(self, name: str) -> Path:
        """The folder of an id. Raises KeyError if no run has it."""
        known = self._known
        if name not in known:
            known = self.all()
        return known[name]

    def name(self, path: Path) -> str | None:
        """The id of a folder; None if it is not among those viewed."""
        resolved = path.resolve()
        return next((name for name, folder in self.all().items() if folder == resolved), None)

    def _found(self) -> dict[str, Path]:
        found: dict[str, Path] = {}
        for path in run_folders(self.root):
            parts = path.relative_to(self.root).parts or (self.root.name or "run",)
            name = "/".join(map(_readable, parts))
            while name in found:  # a name with %XX in it beside one that is written so
                name += "~"
            found[name] = path
        return found


def _readable(part: str) -> str:
    return "".join(f"%{ord(one) - 0xDC00:02X}" if "\udc80" <= one <= "\udcff" else one for one in part)


def check(folder: Path) -> None:
    """See that reading a run stays in its folder and within bounds.

    Raises:
      UsageError: naming the first file that leads elsewhere, is no ordinary file, or is too large.
    """
    above = folder.parent / LOCK  # of a search of several runs
    if above.exists() and not above.is_file():
        raise UsageError(f"{LOCK} beside it is no ordinary file, so this run is not shown")
    for name in _FILES:
        ordinary(folder, folder / name, most=LIMITS.get(name))
    for name in _FOLDERS:
        if os.path.lexists(folder / name) and not inside(folder, folder / name).is_dir():
            raise UsageError(f"{name} is no folder, so this run is not shown")


def ordinary(folder: Path, path: Path, *, most: int | None = None) -> None:
    """See that a file of a run, if it is there, may be read. Raises UsageError if it leads out, is no file, or has more bytes."""
    try:
        about = os.lstat(path)
        if stat.S_ISLNK(about.st_mode):
            inside(folder, path)
            about = os.stat(path)
    except OSError:
        return  # not there: reading says so where it matters
    if not stat.S_ISREG(about.st_mode):
        raise UsageError(f"{path.name} is no ordinary file, so it is not read")
    if most is not None and about.st_size > most:
        raise UsageError(f"{path.name} has {about.st_size:,} bytes, and those of a run have {most:,} at most; it is not read")


def inside(folder: Path, path: Path) -> Path:
    """A path with all links followed. Raises UsageError if it leads out of the folder."""
    found = path.resolve()
    if not found.is_relative_to(folder.resolve()):
        raise UsageError(f"{path.name} leads out of the run's folder, so it is not read")
    return found


def stamp(path: Path) -> tuple[int, ...] | None:
    """What changes when a file does; None while there is none."""
    try:
        about = path.stat()
    except OSError:
        return None
    return about.st_mtime_ns, about.st_size, about.st_ino
