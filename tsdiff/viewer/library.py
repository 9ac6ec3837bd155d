"""The runs that are viewed: found when asked for, read when looked at, forgotten when others are."""

from __future__ import annotations

import gzip
import threading
import time
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tsdiff.treesearch.errors import TsdiffError, UsageError
from tsdiff.treesearch.runfolder import RUN, TREE
from tsdiff.treesearch.saved import SavedRun
from tsdiff.viewer.documents import summary_document, tree_document, unreadable_document
from tsdiff.viewer.folders import JOURNAL, MEBI, Folders, check, stamp
from tsdiff.viewer.pictures import Atlas
from tsdiff.viewer.plainjson import dump, line
from tsdiff.viewer.watched import Watched

KEPT = 16
"""Runs whose trees are kept in memory of those that are looked at, and as many of those that go on."""

QUICK_BYTES = 16 * MEBI
QUICK_SECONDS = 1.0
"""For the list, the tree of an unfinished run is read if its journal has no more bytes, as long as the list takes no longer."""

SQUEEZED = 1400
"""Documents of more bytes than this, about a network packet, are compressed."""


class Document:
    """JSON, and the same compressed where that is worth it."""

    def __init__(self, data: Any) -> None:
        self.plain = dump(data)
        self.squeezed = gzip.compress(self.plain, 5, mtime=0) if len(self.plain) > SQUEEZED else None


class Shown:
    """A run, and what was made of it for the page."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.lock = threading.RLock()
        self.atlas = Atlas()
        self._watched: Watched | None = None
        self._whole: tuple[Any, Document] | None = None

    @contextmanager
    def now(self) -> Iterator[Watched]:
        """The run as it is now; others wait meanwhile. Raises UsageError if it cannot be read."""
        with self.lock:
            if self._watched is None:
                self._watched = Watched(self.path)
            else:
                self._watched.refresh()
            with self._watched.lock:
                yield self._watched

    def tree(self, since: str | None) -> Document:
        """What is new in the tree since a token was given out, all of it without one."""
        with self.now() as watched:
            changes = watched.changes(since)
            if changes.records is not watched.records:
                return Document(tree_document(watched, changes))
            best = watched.run.best
            key = (watched.version, changes.restarted, watched.run.status, best and best.index, watched.run.ledger["nfe"])
            if self._whole is None or self._whole[0] != key:
                self._whole = key, Document(tree_document(watched, changes))
            return self._whole[1]


class Library:
    """The runs of a folder. May be asked by several threads.

    Args:
      folders: which they are.
    """

    def __init__(self, folders: Folders) -> None:
        self.folders = folders
        self._lock = threading.Lock()
        self._shown: OrderedDict[str, Shown] = OrderedDict()
        self._summaries: dict[str, tuple[Any, dict[str, Any]]] = {}
        self._listing = threading.Lock()
        self._going: OrderedDict[str, SavedRun] = OrderedDict()  # read for the list, to read on from there

    def run(self, name: str) -> Shown:
        """A run by its id. Raises KeyError if there is none."""
        path = self.folders.path(name)
        with self._lock:
            shown = self._shown.get(name)
            if shown is None or shown.path != path:
                shown = self._shown[name] = Shown(path)
            self._shown.move_to_end(name)
            while len(self._shown) > KEPT:
                self._shown.popitem(last=False)
            return shown

    def summaries(self) -> list[dict[str, Any]]:
        """Every run in a line, in the order of their ids' folders. Raises UsageError if the folder cannot be read."""
        deadline = time.monotonic() + QUICK_SECONDS
        return [self._summary(name, path, deadline) for name, path in self.folders.all().items()]

    def _summary(self, name: str, path: Path, deadline: float) -> dict[str, Any]:
        key = (path, *(stamp(path / file) for file in (RUN, JOURNAL, TREE)))
        known = self._summaries.get(name)
        if known is not None and known[0] == key:
            return known[1]
        settled = True
        try:
            check(path)
            run = SavedRun(path)
            if run.status == "done" and run.result:
                made = summary_document(name, run)
            else:
                made, settled = self._unfinished(name, run, key[2], deadline)
        except TsdiffError as error:
            made = unreadable_document(name, error)
        except Exception as error:  # whatever a hostile file makes its reader do
            made = unreadable_document(name, f"{type(error).__name__}: {line(error)}")
        if settled:
            self._summaries[name] = key, made
        return made

    def _unfinished(self, name: str, run: SavedRun, journal: tuple[int, ...] | None, deadline: float) -> tuple[dict[str, Any], bool]:
        """The line of a run whose file says no result yet; and whether it stays as long as the files do."""
        with self._lock:
            shown = self._shown.get(name)
        if shown is not None and shown.path == run.path:
            with shown.now() as watched:
                return summary_document(name, watched.run, watched.damage), False
        size = journal[1] if journal is not None else 0
        if size > QUICK_BYTES or time.monotonic() > deadline:
            return summary_document(name, run), False
        with self._listing:
            going = self._going.pop(name, None)
            if going is None or going.path != run.path:
                going = run
            going.refresh()
            made = summary_document(name, going, [line(one) for one in going.damage])
            if going.status in ("running", "killed"):
                self._going[name] = going
                while len(self._going) > KEPT:
                    self._going.popitem(last=False)
            return made, going.status not in ("running", "killed")


def missing(name: str) -> UsageError:
    """What is told of a run that is not there."""
    return UsageError(f"there is no run {line(name)[:200]!r} in the folder that is viewed")
