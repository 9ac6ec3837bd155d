"""The durable part of one run folder: its journal and its segments, written in step.

Tensors go to the segments, then the group that knows their places goes to the journal; both are synced together, the
segments first. A group without a sync survives the end of the process at once; after a power cut, groups from the last
synced one on count only as far as their tensors are there.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Container, Generator, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tsdiff.treesearch.disk import LOCAL, Disk, told
from tsdiff.treesearch.errors import UsageError
from tsdiff.treesearch.journal import Group, Journal, JournalReader, Position
from tsdiff.treesearch.raw import Raw
from tsdiff.treesearch.segmentfile import DamagedRecord, Place, read, segment_numbers, segment_path
from tsdiff.treesearch.segments import SEGMENT_BYTES, Segments

if TYPE_CHECKING:
    from torch import Tensor

JOURNAL = "journal.jsonl"
SEGMENTS = "latents"
SYNC_SECONDS = 0.25
_LEAST_REST = 100.0  # between two syncs, in units of the time that one took
_AT_ONCE = 16 << 20  # bytes of tensors that are brought to the host together


class RunFile:
    """A run folder's journal and segments, open to append.

    Args:
      folder: of the run; it is there, and locked by the caller.
      about: what the run is; a journal that is there must say the same.
      disk: through which files are changed.
      sync_seconds: how long groups may wait for their sync, or 100 times as long as a sync takes if that is longer; 0
        syncs each.
      segment_bytes: size from which a new segment is begun.

    Raises:
      UsageError, SetupError: if the files belong to another run or a newer tsdiff, or cannot be read or written.
    """

    def __init__(
        self, folder: Path, about: Mapping[str, Any], *, disk: Disk = LOCAL, sync_seconds: float = SYNC_SECONDS, segment_bytes: int = SEGMENT_BYTES
    ) -> None:
        self.folder = folder
        self.segment_folder = folder / SEGMENTS
        self.users = 0
        self._swept = 0
        self._sync_seconds = sync_seconds
        self._segments: Segments | None = None
        self.tapes: dict[tuple[str, int], Tape] = {}
        self._journal = Journal.open(folder / JOURNAL, dict(about), disk=disk)
        dropped = self._journal.dropped
        self._repaired = str(dropped) if dropped is not None and dropped.damaged else None
        try:
            if self._journal.about != about:
                raise UsageError(f"{str(folder)!r} cannot be continued as another search: {different(self._journal.about, about)}")
            self._drop_unreadable()
            self.tapes, self.engine, end = _index(folder)
            self._segments = Segments.open(self.segment_folder, end=end, limit=segment_bytes, disk=disk)
        except BaseException:
            self.close()
            raise
        self._sync_due = time.monotonic() + sync_seconds

    @property
    def repaired(self) -> str | None:
        """What was damaged when the files were opened, and where it is kept now; None where nothing was, or a write had only not been finished."""
        return None if self._repaired is None else f"{str(self.folder / JOURNAL)!r}: {self._repaired}; {self._journal.aside} keeps them, and what they told is done again"

    def store(self, tensors: Sequence[tuple[str, Tensor]]) -> list[Place]:
        """Write tensors by key that the next `commit` will tell of; returns their places."""
        assert self._segments is not None
        places: list[Place] = []
        for part in _parts(tensors):
            raws = Raw.of_tensors([tensor for _, tensor in part])
            places += self._segments.append_all([(key, raw) for (key, _), raw in zip(part, raws, strict=True)])
        return places

    def commit(self, records: Sequence[dict[str, Any]], *, sync: bool = False) -> None:
        """Append a group, whole or not at all; with `sync`, or when one is due, it would survive a power cut too."""
        assert self._segments is not None
        begun = time.monotonic()
        sync = sync or begun >= self._sync_due
        if sync:
            self._segments.sync()
        last = records[-1] | {"segments": list(self._segments.end), "synced": sync}
        self._journal.commit([*records[:-1], last], sync=sync)
        if sync:
            now = time.monotonic()
            # A slow disk is synced less often, so that waiting for it stays a small share of the time.
            self._sync_due = now + (max(self._sync_seconds, _LEAST_REST * (now - begun)) if self._sync_seconds else 0.0)

    @property
    def full_segments(self) -> bool:
        """Whether a segment has been filled since `sweep` was called last."""
        assert self._segments is not None
        return self._segments.end[0] > self._swept

    def sweep(self, wanted: Container[int]) -> None:
        """Remove full segments of which nothing is wanted any more; what no longer wants them must have been committed."""
        assert self._segments is not None
        self._segments.sync()
        self._journal.sync()
        self._swept = self._segments.end[0]
        for number in segment_numbers(self.segment_folder):
            if number < self._swept and number not in wanted:
                self._segments.discard(number)

    def close(self) -> None:
        """Close the files; closing twice is fine."""
        self._journal.close()
        if self._segments is not None:
            self._segments.close()
        for tape in self.tapes.values():
            tape.close()

    def _drop_unreadable(self) -> None:
        """Take back the groups after the last synced one from the first on whose tensors are not there."""
        unsure: list[Group] = []
        for group in JournalReader(self.folder / JOURNAL):
            unsure.append(group)
            if group.records[-1]["synced"]:  # type: ignore[index, call-overload]
                unsure.clear()
        for group in unsure:
            if not all(_readable(self.segment_folder, record) for record in group.records):
                size = group.end.lines - len(group.records)
                before = next((other.end for other in JournalReader(self.folder / JOURNAL) if other.end.lines == size), None)
                start = JournalReader(self.folder / JOURNAL).start
                assert start is not None
                self._journal.cut(before or start)
                self._repaired = f"the tensors of group {group.number} are lost; it and what follows is left out"
                return


class Tape:
    """The records of one driver of a tree, read one by one from the journal.

    Args:
      folder: of the run.
      tree: its ledger line.
      after: where in the journal the driver's records begin; None for the first driver's.

    Attributes:
      count: records of requests that have not been read yet.
      driver: what the record that begins it says; None for the first driver, which needs none.
      answers: of pending verifiers, by (node, value key), that no completed request has taken up.
      end: what was written when the tree had ended; None if it had not.
    """

    def __init__(self, folder: Path, tree: str, driver: dict[str, Any] | None = None, *, after: Position | None = None) -> None:
        self.folder = folder
        self.driver = driver
        self.count = 0
        self.answers: dict[tuple[int, str], deque[dict[str, Any]]] = {}
        self.end: dict[str, Any] | None = None
        self._requests = self._read(tree, after)

    def add(self, record: Mapping[str, Any]) -> None:
        """The journal holds this record of the tree."""
        if "request" in record:
            self.count += 1
            if "refused" not in record:
                self.answers.clear()
        elif "answer" in record:
            answer = record["answer"]
            self.answers.setdefault((answer["node"], answer["key"]), deque()).append(answer["value"])
        else:
            self.end = record["end"]

    def next(self) -> tuple[dict[str, Any], str] | None:
        """The next request's record and where it is, for messages; None at the end."""
        if not self.count:
            self.close()
            return None
        self.count -= 1
        return next(self._requests)

    def close(self) -> None:
        """Read no more; closing twice is fine."""
        self._requests.close()

    def _read(self, tree: str, after: Position | None) -> Generator[tuple[dict[str, Any], str], None, None]:
        """The tree's requests after a position; those of the next driver come last, and are not asked for."""
        path = self.folder / JOURNAL
        for group in JournalReader(path, after=after):
            first = group.end.lines - len(group.records) + 1
            for line, record in enumerate(group.records, first):
                if isinstance(record, dict) and record["tree"] == tree and "request" in record:
                    yield record, f"line {line} of {str(path)!r}"


def _index(folder: Path) -> tuple[dict[tuple[str, int], Tape], dict[str, int], tuple[int, int]]:
    """The tape of each tree's ledger line and driver, the last state of the engine's counters, and where the segments end."""
    tapes: dict[tuple[str, int], Tape] = {}
    present: dict[str, int] = {}
    engine: dict[str, int] = {}
    end = (0, 0)
    before: Position | None = None
    for group in JournalReader(folder / JOURNAL):
        for record in group.records:
            assert isinstance(record, dict)
            tree = record["tree"]
            if "driver" in record:
                present[tree] = record["driver"]["number"]
                tapes[tree, present[tree]] = Tape(folder, tree, record["driver"], after=before)
            else:
                key = tree, present.get(tree, 0)
                if key not in tapes:
                    tapes[key] = Tape(folder, tree)
                tapes[key].add(record)
            engine = record.get("engine", engine)
            end = tuple(record.get("segments", end))
        before = group.end
    return tapes, engine, end


def _parts(tensors: Sequence[tuple[str, Tensor]]) -> Iterator[list[tuple[str, Tensor]]]:
    """The same in order, not too many bytes at a time."""
    part: list[tuple[str, Tensor]] = []
    size = 0
    for entry in tensors:
        if part and size + entry[1].nbytes > _AT_ONCE:
            yield part
            part, size = [], 0
        part.append(entry)
        size += entry[1].nbytes
    if part:
        yield part


def _readable(folder: Path, record: Any) -> bool:
    for effect in record.get("effects", ()):
        for place in effect.get("tensors", {}).values():
            try:
                read(folder, Place.from_json(place))
            except DamagedRecord:
                return False
    return True


def discard_segments(folder: Path, disk: Disk) -> None:
    """Remove a run folder's segments, if there are any. Raises SetupError if the disk fails."""
    segments = folder / SEGMENTS
    if not segments.is_dir():
        return
    try:
        for number in segment_numbers(segments):
            disk.remove(segment_path(segments, number))
        disk.sync_folder(segments)
        segments.rmdir()
        disk.sync_folder(folder)
    except OSError as error:
        raise told(error, segments) from error


def different(before: Any, now: Any, name: str = "") -> str:
    """What differs between two JSON values, in words; "" if nothing does."""
    if isinstance(before, dict) and isinstance(now, dict):
        names = [*before, *(key for key in now if key not in before)]
        return "; ".join(filter(None, (different(before.get(key), now.get(key), f"{name}.{key}" if name else str(key)) for key in names)))
    if before == now and type(before) is type(now):
        return ""
    return f"{name or 'it'} was {before!r} and is {now!r} now"
