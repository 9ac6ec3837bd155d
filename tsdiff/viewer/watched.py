"""One run as the page sees it: its tree in short records, what of them is new since last time, thumbnails and running costs."""

from __future__ import annotations

import secrets
import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tsdiff.treesearch.errors import TsdiffError, UsageError
from tsdiff.treesearch.previewfile import Preview, Previews, read_previews
from tsdiff.treesearch.rescored import Rescored
from tsdiff.treesearch.saved import SavedRun
from tsdiff.viewer.folders import MEBI, RESCORED, check, ordinary, stamp
from tsdiff.viewer.plainjson import line, number, short, text
from tsdiff.viewer.records import Record, node_record
from tsdiff.viewer.spending import Spending


@dataclass(frozen=True)
class Changes:
    """What is new in a tree.

    Attributes:
      token: say this next time.
      restarted: what was told before is void; `records` are all there are.
      records: new and changed nodes, by index.
    """

    token: str
    restarted: bool
    records: Sequence[Record]


class Watched:
    """A run that is looked at. For several threads: hold `lock` around everything else.

    Args:
      path: the run's folder.

    Raises:
      UsageError: if nothing of it can be read, or what can be read leads out of the folder.

    Attributes:
      run: as it is on disk, after the last `refresh`.
      records: its nodes in short, by index.
      thumbnails: which node each thumbnail is of. Numbers are never given twice, so this only grows.
      spending: when things happened.
      rescored: what other verifiers said later, by name.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.lock = threading.RLock()
        self.run = read(path)
        self.records: list[Record] = []
        self.thumbnails: list[int] = []
        self.spending = Spending(path)
        self.rescored: dict[str, Rescored] = {}
        self._ids: list[int] = []
        self._changed: list[int] = []  # the version in which each record last changed
        self._version = 0
        self._nonce = secrets.token_hex(4)
        self._numbers: dict[int, int] = {}  # of each node's thumbnail
        self._previews: Previews | None = None
        self._seen = (0, 0)  # previews and nodes when thumbnails were given numbers
        self._damage: dict[str, str] = {}
        self._stamp: tuple[Any, ...] | None = None
        self._begin()

    # Looking --------------------------------------------------------------------------------------------------------

    @property
    def version(self) -> tuple[str, int]:
        """Differs whenever any record does."""
        return self._nonce, self._version

    @property
    def damage(self) -> list[str]:
        """What is damaged or missing, a line each."""
        return [line(one) for one in (*self.run.damage, *self._damage.values())]

    def changes(self, since: str | None) -> Changes:
        """What is new since a token was given out; everything without one, or with one that is not known (any more)."""
        nonce, _, version = (since or "").partition(".")
        token = f"{self._nonce}.{self._version}"
        if nonce != self._nonce or not (version.isascii() and version.isdecimal() and len(version) < 16) or int(version) > self._version:
            return Changes(token, bool(since), self.records)
        known = int(version)
        return Changes(token, False, [record for record, changed in zip(self.records, self._changed, strict=True) if changed > known] if known < self._version else ())

    def preview(self, index: int, tree: str = "search") -> Preview | None:
        """The small picture of a node, if there is one and it is that node's."""
        found = None if self._previews is None else self._previews.get((tree, index))
        saved = self.run.trees.get(tree)
        if found is None or saved is None or not 0 <= index < len(saved.nodes) or found.id != f"{saved.nodes[index].id:032x}":
            return None
        return found

    # Following ------------------------------------------------------------------------------------------------------

    def refresh(self) -> None:
        """Read what is new. Raises UsageError if nothing of the run can be read any more."""
        check(self.path)
        try:
            update = self.run.refresh()
        except TsdiffError:
            raise
        except Exception as error:
            raise _broken(self.path, error) from error
        if update.restarted or len(self.run.nodes) < len(self.records):
            self._begin()
            return
        nodes = range(len(self.run.nodes))
        touched = {node.index for node in update.nodes.get("search", ())} | set(nodes[len(self.records) :])
        if update or self.run.status == "running":
            touched.update(nodes[self.spending.refresh() :])
        touched |= self._look_at_pictures() | self._look_at_rescored()
        self._write(index for index in touched if index in nodes)

    def _begin(self) -> None:
        """Make every record again. Where the tree is the one that was told before, what did not change stays told."""
        ids = [node.id for node in self.run.nodes]
        if self._ids != ids[: len(self._ids)]:
            self.records, self._changed, self._ids, self._numbers, self.thumbnails = [], [], [], {}, []
            self._nonce = secrets.token_hex(4)
        self.spending.restart()
        self.spending.refresh()
        self._seen, self._stamp = (0, 0), None
        self._look_at_pictures()
        self._look_at_rescored()
        self._write(range(len(ids)))

    def _write(self, indices: Iterable[int]) -> None:
        """Make records, and count what has changed."""
        tree, made, version = self.run.tree, self.spending.made, self._version + 1
        for index in sorted(indices):
            node = tree.nodes[index]
            thumbnail = self._numbers.get(index) if self.preview(index) is not None else None
            record = node_record(tree, node, made[index] if index < len(made) else None, thumbnail)
            for name, rescored in self.rescored.items():
                if index in rescored.values:
                    record["s"].setdefault(text(name), short(number(rescored.values[index].score)))
            if index < len(self.records):
                if record == self.records[index]:
                    continue
                self.records[index], self._changed[index] = record, version
            else:
                self.records.append(record)
                self._changed.append(version)
                self._ids.append(node.id)
            self._version = version

    def _look_at_pictures(self) -> set[int]:
        """Number new thumbnails; the nodes whose picture may have come or gone."""
        try:
            if self._previews is None:
                self._previews = read_previews(self.path)
                found = len(self._previews)
            else:
                found = self._previews.refresh()
        except UsageError as error:
            self._damage["previews"] = line(error)
            return set()
        now = (len(self._previews), len(self.run.nodes))
        if not found and now == self._seen:
            return set()
        self._seen = now
        there = [index for tree, index in self._previews if tree == "search" and self.preview(index) is not None]
        for index in there:
            if index not in self._numbers:
                self._numbers[index] = len(self.thumbnails)
                self.thumbnails.append(index)
        return set(self._numbers)

    def _look_at_rescored(self) -> set[int]:
        """Read what other verifiers said later, if that has changed; the nodes that they may have scored."""
        folder = self.path / RESCORED
        now = stamp(folder)
        if now == self._stamp:
            return set()
        self._stamp = now
        before = self.rescored
        try:
            for path in folder.glob("*.json") if now else ():
                ordinary(self.path, path, most=64 * MEBI)
            self.rescored = self.run.rescored if now else {}
            self._damage.pop("rescored", None)
        except Exception as error:
            self.rescored = {}
            self._damage["rescored"] = line(error if isinstance(error, TsdiffError) else f"{RESCORED}: {type(error).__name__}: {error}")
        return {index for one in (*before.values(), *self.rescored.values()) for index in one.values if index >= 0}


def read(path: Path) -> SavedRun:
    """A run that may be damaged or hostile. Raises UsageError if nothing of it can be read, or its files lead elsewhere."""
    check(path)
    try:
        run = SavedRun(path)
        run.refresh()
    except TsdiffError:
        raise
    except Exception as error:
        raise _broken(path, error) from error
    return run


def _broken(path: Path, error: Exception) -> UsageError:
    """What is told of a run whose files make no sense at all."""
    return UsageError(line(f"the run {path.name!r} cannot be read ({type(error).__name__}: {error})"))
