"""Reading a run folder, whatever state it is in, and reading on: `RunReader`.

A run that is done is read from `tree.json`. One that goes on, or was interrupted, killed or damaged, is read from its journal,
as far as that is whole; `refresh` later reads what has come since. What is damaged is remembered, and the rest is given.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tsdiff.treesearch.errors import SetupError, UsageError
from tsdiff.treesearch.journal import JournalReader, Position, Tail
from tsdiff.treesearch.lock import holder
from tsdiff.treesearch.runfacts import result_of
from tsdiff.treesearch.runfile import JOURNAL, SEGMENTS
from tsdiff.treesearch.runfolder import BASELINE, LATENTS, RUN, TREE, lock_path, read_json
from tsdiff.treesearch.savedtree import WRONG, SavedNode, SavedTree
from tsdiff.treesearch.segmentfile import segment_path

_TREES = {"search": TREE, "baseline": BASELINE}
_SEAL = len(b',"crc32":"00000000"}\n')
_PATIENCE = 3
"""How often a journal that is being written is read again where it looks damaged: a line may be seen half written."""


@dataclass(frozen=True)
class Update:
    """What `SavedRun.refresh` has found; false where nothing is new.

    Attributes:
      nodes: of each tree by its line ("search", "baseline"), those that are new or have changed, by index.
      status: the status has changed.
      restarted: what was read before is no longer there (the end of a journal was lost to a power cut, say); everything was read
        again, and nodes that were given out before are not part of the trees any more.
    """

    nodes: Mapping[str, tuple[SavedNode, ...]] = field(default_factory=dict)
    status: bool = False
    restarted: bool = False

    def __bool__(self) -> bool:
        return bool(self.nodes) or self.status or self.restarted


class RunReader:
    """What can be read of a run folder.

    Attributes:
      path: the folder.
      facts: what `run.json` says; what the journal says of the run, where that cannot be read.
      status: as of a `SavedRun`.
      place: up to where the journal was read; None where it was not.
      wrong: by file, what cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.facts: dict[str, Any] = {}
        self.status = ""
        self.place: Position | None = None
        self.wrong: dict[str, str] = {}
        self._known: tuple[int, ...] | None = None  # which run.json the facts are from
        self._trees: dict[str, SavedTree] | None = None
        self._from_files = False
        self._tail: Tail | None = None
        self._mark = b""  # the checksum of the line before `place`
        self._limit: int | None = None  # the last group that makes sense, where a later one does not
        self._ends: tuple[int, int] = (0, 0)  # where the journal says that the segments end
        self._read_facts()

    @property
    def trees(self) -> Mapping[str, SavedTree]:
        """All trees by their lines: "search", "baseline". Read now, if they have not been."""
        if self._trees is None:
            self.refresh()
        assert self._trees is not None
        return self._trees

    def damage(self) -> list[str]:
        """What is damaged of that which is read, a line each."""
        found = [*self.wrong.values()]
        trees = self.trees
        if self._tail is not None and (self._tail.damaged or self.status != "running"):
            found.append(f"{JOURNAL}: {self._tail}")
        if not self._from_files and self.status in ("interrupted", "killed") and any(tree.places for tree in trees.values()):
            found += self._short_segments()
        return found

    def refresh(self) -> Update:
        """Read what is new since last time. Costs as much as what is new; what was read before is not read again.

        Raises:
          UsageError: if nothing of the run can be read.
        """
        status = self.status
        restarted = self._read_facts() and self._from_files  # what was done has been begun again, to grow it further
        if restarted:
            self._trees = self.place = None
        if self._trees is None:
            whole = self.status == "done" or ((self.path / TREE).exists() and not (self.path / JOURNAL).exists())
            self._from_files = whole and self._read_files()
        touched: dict[str, set[int]] = {}
        if not self._from_files:
            restarted |= self._read_journal(touched)
        if self._trees is None or not (self.facts or self._from_files or self.place):
            raise UsageError(self._unreadable())
        trees = self._trees
        if restarted:
            touched = {line: set(range(len(tree.nodes))) for line, tree in trees.items()}
        nodes = {line: tuple(trees[line].nodes[index] for index in sorted(indices)) for line, indices in touched.items() if indices}
        return Update(nodes, status != self.status, restarted)

    def _read_facts(self) -> bool:
        """Read `run.json` if it has changed, and see who writes; whether it has changed."""
        changed = False
        while True:
            now = stamp(self.path / RUN)
            if now != self._known or not self.status:
                self._known, changed = now, True
                self.wrong.pop(RUN, None)
                try:
                    self.facts = read_json(self.path / RUN)
                except UsageError as error:  # what was known stays known
                    self.wrong[RUN] = str(error) if now else f"{RUN} is missing"
            word = self.facts.get("status")
            if word in ("done", "failed", "interrupted"):
                self.status = word
            elif "status" not in self.facts and (self.path / TREE).exists():
                self.status = "done"
            else:
                self.status = "running" if self._written() else "killed"
            if self.status != "killed" or stamp(self.path / RUN) == self._known:  # it may have ended in between
                return changed

    def _written(self) -> bool:
        try:
            return holder(lock_path(self.path)) is not None
        except (UsageError, SetupError):  # a file system without locks tells nothing, and reading needs none
            return True

    def _read_files(self) -> bool:
        """Read the trees of a run that is done; whether that of the search could be read."""
        trees = {}
        for line, name in _TREES.items():
            self.wrong.pop(name, None)
            if line != "search" and not (self.path / name).exists():
                continue
            try:
                trees[line] = SavedTree.from_json(read_json(self.path / name))
            except UsageError as error:
                self.wrong[name] = str(error) if (self.path / name).exists() else f"{name} is missing"
            except WRONG as error:
                self.wrong[name] = f"{str(self.path / name)!r} cannot be read ({type(error).__name__}: {error})"
        if "search" not in trees:
            return False
        self._trees = trees
        answer = result_of(self.facts).get("node")
        if type(answer) is int and 0 <= answer < len(trees["search"].nodes):
            trees["search"].answer = answer
        if "baseline" in trees and trees["baseline"].best is None:  # it has a sample, and no verifier could score it
            trees["baseline"].answer = next((node.index for node in trees["baseline"].finished), None)
        return True

    def _read_journal(self, touched: dict[str, set[int]]) -> bool:
        """Read the groups that are new; whether everything had to be read again."""
        path = self.path / JOURNAL
        restarted = self._trees is not None and self.place is not None and not self._goes_on(path)
        if self._trees is None or restarted:
            self._limit = None
            self._begin()
        for _ in range(_PATIENCE):
            try:
                sense = self._read_groups(path, touched)
            except UsageError as error:
                if self.wrong.get(JOURNAL) is None and (path.exists() or self.wrong):
                    self.wrong[JOURNAL] = str(error)
                break
            self.wrong.pop(JOURNAL, None)
            if not sense:  # the tree is half grown: make it again, up to where it is whole
                restarted = restarted or self.place is not None
                self._begin()
                touched.clear()
                self._read_groups(path, touched)
            if self._tail is None or not self._tail.damaged or self.status != "running":
                break
        if self._limit is not None:
            self.wrong[JOURNAL] = f"{JOURNAL}: group {self._limit + 1} makes no sense; it and what follows is left out"
        return restarted

    def _begin(self) -> None:
        """Forget what was read of the journal."""
        self.place, self._tail, self._mark = None, None, b""
        self._trees = {}
        self._tree("search")

    def _tree(self, line: str) -> SavedTree:
        assert self._trees is not None
        if line not in self._trees:
            steps = mapping(self.facts.get("options")).get("steps")
            try:
                tree = SavedTree(self._head(), line=line, last=steps if type(steps) is int else 0)
            except WRONG as error:
                self.wrong["schedule"] = f"{RUN}: its schedule makes no sense ({type(error).__name__}: {error})"
                tree = SavedTree({}, line=line, last=steps if type(steps) is int else 0)
            self._trees[line] = tree
        return self._trees[line]

    def _head(self) -> dict[str, Any]:
        """What a tree is from its beginning, from whatever says so."""
        verifiers = mapping(self.facts.get("options")).get("verifiers") or [""]
        known = {"prompt": self.facts.get("prompt"), "seed": self.facts.get("seed"), "solver": mapping(self.facts.get("options")).get("solver"), "verifier": verifiers[0]}
        return known | mapping(self.facts.get("tree"))

    def _read_groups(self, path: Path, touched: dict[str, set[int]]) -> bool:
        """Grow the trees by the groups after `place`; false where one makes no sense."""
        reader = JournalReader(path, after=self.place)
        if not self.facts and isinstance(reader.about, dict):  # run.json cannot be read
            self.facts = dict(reader.about)
            self._begin()
        self.place = self.place or reader.start
        try:
            for group in reader:
                if self._limit is not None and group.number > self._limit:
                    break
                try:
                    for record in group.records:
                        self._apply(record, touched)
                except WRONG:
                    self._limit = group.number - 1
                    return False
                self.place = group.end
            self._tail = reader.tail
        finally:
            self._mark = b"" if self.place is None else _seal(path, self.place)
        return True

    def _apply(self, record: Any, touched: dict[str, set[int]]) -> None:
        tree = self._tree(_line(record["tree"]))
        touched.setdefault(tree.line, set()).update(tree.apply(record))
        segment, offset = record.get("segments", self._ends)
        self._ends = int(segment), int(offset)

    def _goes_on(self, path: Path) -> bool:
        """Whether the journal still has what was read of it."""
        assert self.place is not None
        return _seal(path, self.place) == self._mark

    def _unreadable(self) -> str:
        why = self.wrong.get(JOURNAL) or self.wrong.get(RUN) or "it holds no file of a run"
        if self._tail is not None:
            why = f"{JOURNAL}: {self._tail}"
        return f"nothing of the run {str(self.path)!r} can be read: {why}"

    def _short_segments(self) -> list[str]:
        last, offset = self._ends
        folder, missing = self.path / SEGMENTS, []
        for number in sorted({place.segment for tree in self.trees.values() for place in tree.places.values()}):
            path = segment_path(folder, number)
            size = path.stat().st_size if path.exists() else -1
            if number == last and 0 <= size < offset:
                missing.append(f"{SEGMENTS}/{path.name} ends at byte {size}, where the journal knows of {offset}")
            elif number == last and size < offset and folder.is_dir() and not (self.path / LATENTS).exists():  # that has those of ended drivers
                missing.append(f"{SEGMENTS}/{path.name} is missing")
        return missing


def _seal(path: Path, place: Position) -> bytes:
    """The end of the line before a place of a journal, with its checksum."""
    try:
        with path.open("rb") as file:
            file.seek(place.offset - _SEAL)
            return file.read(_SEAL)
    except OSError:
        return b""


def _line(value: Any) -> str:
    if type(value) is not str:
        raise TypeError("a tree's name is text")
    return value


def stamp(path: Path) -> tuple[int, ...] | None:
    """What changes when a file does."""
    try:
        facts = path.stat()
    except OSError:
        return None
    return facts.st_mtime_ns, facts.st_size, facts.st_ino


def mapping(value: Any) -> dict[str, Any]:
    """A value that should be an object of JSON; an empty one, where it is not."""
    return value if isinstance(value, dict) else {}
