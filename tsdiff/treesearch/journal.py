"""The journal of a run: an append-only file of strict-JSON lines that survives whatever happens while it is written.

    {"journal":"tsdiff","version":2,"about":{...},"crc32":"89abcdef"}
    {"line":1,"group":1,"left":1,"record":{...},"crc32":"01234567"}
    {"line":2,"group":1,"left":0,"record":{...},"crc32":"12345678"}

Records are committed in groups: one write, one sync, all or nothing. `left` counts the lines of the group still to come,
so a group is whole when its last line has `left` 0. `crc32` is the checksum of its line (`tsdiff.treesearch.lines`). A file
is good up to the last whole group of intact lines that number on without a gap; what follows is left out, and told:

* torn: a write that was never finished. Its group was never acknowledged, so nothing is lost.
* damaged: a line that once was whole has changed. An intact line of a later group proves it (a group is begun when the
  one before it is on disk), and so does an intact line in a wrong place.

Reading changes nothing and needs no lock. Opening to append cuts off what follows the last whole group; damaged bytes
are kept in a file beside it first. The first line of every version has the form above, so a newer one can be told.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

from tsdiff.treesearch.disk import LOCAL, Disk, taken_back, told, unread, write_whole
from tsdiff.treesearch.errors import SetupError, UsageError
from tsdiff.treesearch.lines import FIRST, MAX_LINE, intact, read_first, read_line, write_first, write_group
from tsdiff.treesearch.node import Json


def _same(record: Json) -> Json:
    """Version 2 has one more kind of record, by which a tree goes on after its end; those of version 1 mean what they meant."""
    return record


UPGRADES: tuple[Callable[[Json], Json], ...] = (_same,)
"""Step i turns a record of format version i + 1 into one of version i + 2."""

_CHUNK = 1 << 20


def latest_version() -> int:
    """The format version that is written, and the newest that is read."""
    return len(UPGRADES) + 1


@dataclass(frozen=True)
class Position:
    """A place between two groups: bytes, lines (the first one included) and groups before it."""

    offset: int
    lines: int
    groups: int


@dataclass(frozen=True)
class Group:
    """A whole group.

    Attributes:
      number: from 1.
      records: at least one.
      end: where the next group begins.
    """

    number: int
    records: list[Json]
    end: Position


@dataclass(frozen=True)
class Tail:
    """What follows the last whole group and is left out.

    Attributes:
      damaged: something that once was whole has changed; otherwise a write was never finished.
      line: the first bad line, counted from 1.
      size: bytes left out.
      later: intact lines of later groups among them.
      why: what is wrong with the first bad line.
    """

    damaged: bool
    line: int
    size: int
    later: int
    why: str

    def __str__(self) -> str:
        if not self.damaged:
            return f"line {self.line} was never finished ({self.why}); the last {self.size} bytes are left out"
        return f"line {self.line} is damaged ({self.why}); the last {self.size} bytes are left out, with {self.later} intact lines of later groups"


class JournalReader:
    """Iterates over the whole groups of a journal, one at a time, also while another process appends to it.

    Attributes:
      version: the file's format version; None if its first line is damaged.
      about: what the first line says about the run; None if it is damaged.
      start: where the first group begins; None if the first line is damaged (then there are no groups).
      tail: what was left out after the last group; None before the end is reached, and if nothing was.

    Args:
      path: the file.
      after: begin here, at the `end` of a group that was read before, to see what is new.

    Raises:
      UsageError: if the file cannot be read, is no journal, or was written by a newer tsdiff.
    """

    def __init__(self, path: Path, *, after: Position | None = None) -> None:
        self.path = path
        self.version: int | None = None
        self.about: Json = None
        self.start: Position | None = None
        self.tail: Tail | None = None
        self._after = after
        self._wrong = ""
        try:
            with path.open("rb") as file:
                self._open(file)
        except OSError as error:
            raise unread(error, path) from error

    def __iter__(self) -> Iterator[Group]:
        self.tail = None
        try:
            with self.path.open("rb") as file:
                if self.start is None:
                    self.tail = self._broken_start(file)
                else:
                    yield from self._groups(file, self._after or self.start)
        except OSError as error:
            raise unread(error, self.path) from error

    def _open(self, file: BinaryIO) -> None:
        text = file.readline(MAX_LINE)
        try:
            version, about = read_first(text)
        except ValueError as error:
            self._wrong = str(error)
            if not (text.startswith(FIRST) or FIRST.startswith(text) or any(True for _ in intact(file))):
                raise UsageError(f"{str(self.path)!r} is not the journal of a run") from None
            return
        if version > latest_version():
            raise UsageError(f"{str(self.path)!r} has format {version}, but this tsdiff reads up to format {latest_version()}; install a newer tsdiff")
        self.version, self.about, self.start = version, about, Position(len(text), 1, 0)

    def _broken_start(self, file: BinaryIO) -> Tail:
        text = file.readline(MAX_LINE)
        later = sum(1 for _ in intact(file))
        return Tail(text.endswith(b"\n") or file.tell() > len(text), 1, file.tell(), later, self._wrong)

    def _groups(self, file: BinaryIO, end: Position) -> Iterator[Group]:
        file.seek(end.offset)
        records: list[Json] = []
        size = left = 0
        while text := file.readline(MAX_LINE):
            why, misplaced = "", False
            try:
                line = read_line(text)
            except ValueError as error:
                why = str(error)
            else:
                misplaced = (line.number, line.group) != (end.lines + len(records), end.groups + 1) or (records != [] and line.left != left - 1)
                why = f"it is line {line.number + 1} of group {line.group}, out of its place" if misplaced else ""
            if why:
                later = sum(1 for other in intact(file) if other.group > end.groups + 1)
                self.tail = Tail(misplaced or later > 0, end.lines + len(records) + 1, file.tell() - end.offset, later, why)
                return
            size, left = size + len(text), line.left
            records.append(self._upgraded(line.record))
            if left == 0:
                end = Position(end.offset + size, end.lines + len(records), end.groups + 1)
                yield Group(end.groups, records, end)
                records, size = [], 0
        if records:
            self.tail = Tail(False, end.lines + len(records) + 1, size, 0, f"{left} more lines of its group should follow")

    def _upgraded(self, record: Json) -> Json:
        assert self.version is not None
        for step in UPGRADES[self.version - 1 :]:
            record = step(record)
        return record


class Journal:
    """A journal that is open to append. One process at a time: hold the run's lock. Not for several threads at once.

    After an error it takes no more: what was committed is safe, and opening it again finds its end.

    Attributes:
      about: what the first line says about the run.
      end: where the next group will begin.
      dropped: what was left out when it was opened, if anything.
      aside: where damaged bytes, or a file of an older format, were kept; None if there were none.
    """

    def __init__(self, disk: Disk, path: Path, file: int, about: Json, end: Position, dropped: Tail | None, aside: Path | None) -> None:
        self.path = path
        self.about = about
        self.end = end
        self.dropped = dropped
        self.aside = aside
        self._disk = disk
        self._file = file
        self._usable = True

    @classmethod
    def open(cls, path: Path, about: Json, *, disk: Disk = LOCAL) -> Journal:
        """Open a journal to append, made if it is not there, cut to its last whole group if it is.

        Args:
          path: the file; its folder must exist.
          about: for the first line of a new file; a file that is there keeps its own.
          disk: through which files are changed.

        Raises:
          UsageError, SetupError: if it is no journal, is newer, or cannot be read or written.
        """
        try:
            reader = JournalReader(path) if path.exists() else None
            end = None if reader is None else reader.start
            for group in reader or ():
                end = group.end
            dropped = None if reader is None else reader.tail
            aside = None
            if reader is None or reader.version is None or end is None:
                if dropped is not None and dropped.damaged:
                    aside = _keep(disk, path, 0, "damaged")
                text = write_first(latest_version(), about)
                write_whole(disk, path, [text])
                end = Position(len(text), 1, 0)
            elif reader.version < latest_version():
                about = reader.about
                aside = _keep(disk, path, 0, f"version-{reader.version}")
                end = _rewrite(disk, path, reader)
            else:
                about = reader.about
                if dropped is not None and dropped.damaged:
                    aside = _keep(disk, path, end.offset, "damaged")
            file = disk.open(path)
            try:
                if path.stat().st_size > end.offset:
                    disk.truncate(file, end.offset)
                # What was there may not have been synced before its process was killed.
                disk.sync(file)
                disk.sync_folder(path.parent)
            except BaseException:
                disk.close(file)
                raise
        except OSError as error:
            raise told(error, path) from error
        return cls(disk, path, file, about, end, dropped, aside)

    def commit(self, records: Sequence[Json], *, sync: bool = True) -> Position:
        """Append a group, whole or not at all; returns where it ends.

        Args:
          records: at least one.
          sync: return when the group would survive a power cut. Without, it survives the end of this process at once,
            and a power cut from the next `sync` on; a power cut before may also leave it damaged instead of torn.

        Raises:
          UsageError: if a record cannot be written as strict JSON, or the file cannot be written any more.
          SetupError: if the disk is full or fails.
        """
        assert records, "a group has at least one record"
        data = b"".join(write_group(self.end.lines, self.end.groups + 1, records))
        with self._changing(), taken_back(self._disk, self._file, self.end.offset):
            self._disk.write(self._file, self.end.offset, data)
            if sync:
                self._disk.sync(self._file)
        self.end = Position(self.end.offset + len(data), self.end.lines + len(records), self.end.groups + 1)
        return self.end

    def sync(self) -> None:
        """Return when all groups would survive a power cut. Raises SetupError if the disk fails."""
        with self._changing():
            self._disk.sync(self._file)

    def cut(self, position: Position) -> None:
        """Take back the groups after a position (the data they point to is lost, say); they are kept in a file beside."""
        assert position.offset <= self.end.offset, "a journal is cut to what it has"
        if position != self.end:
            with self._changing():
                self.aside = _keep(self._disk, self.path, position.offset, "cut")
                self._disk.truncate(self._file, position.offset)
                self._disk.sync(self._file)
            self.end = position

    def close(self) -> None:
        """Close the file; closing twice is fine."""
        if self._file >= 0:
            file, self._file, self._usable = self._file, -1, False
            self._disk.close(file)

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    @contextmanager
    def _changing(self) -> Iterator[None]:
        """Change the file; if that fails in any way, take no more."""
        if not self._usable:
            raise SetupError(f"{str(self.path)!r} is closed, or an earlier write to it failed; open it again")
        self._usable = False
        try:
            yield
        except OSError as error:
            raise told(error, self.path) from error
        self._usable = True


def _keep(disk: Disk, path: Path, offset: int, word: str) -> Path:
    """Copy what follows a byte offset to a new file beside; returns its path."""
    number = 1
    while (target := path.with_name(f"{path.name}.{word}-{number}")).exists():
        number += 1
    with path.open("rb") as source:
        source.seek(offset)
        write_whole(disk, target, iter(lambda: source.read(_CHUNK), b""))
    return target


def _rewrite(disk: Disk, path: Path, reader: JournalReader) -> Position:
    """Replace a file of an older format by one of this format with the same groups; returns its end."""
    end = Position(0, 0, 0)

    def texts() -> Iterator[bytes]:
        nonlocal end
        text = write_first(latest_version(), reader.about)
        end = Position(len(text), 1, 0)
        yield text
        for group in reader:
            text = b"".join(write_group(end.lines, group.number, group.records))
            end = Position(end.offset + len(text), end.lines + len(group.records), group.number)
            yield text

    write_whole(disk, path, texts())
    return end
