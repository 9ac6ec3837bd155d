"""Where the tensors of a run are kept on disk: append-only segments, `00000.seg`, `00001.seg`, ... in one folder.

A new segment is begun when the next record would make the last one larger than a limit (`tsdiff.treesearch.segmentfile`
has the records). Write tensors, `sync`, and only then commit to the journal the places that they got and where the
segments end: so every place in the journal can be read, and opening with that end takes back what no journal knows of.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

from tsdiff.treesearch.disk import LOCAL, Disk, taken_back, told
from tsdiff.treesearch.errors import SetupError
from tsdiff.treesearch.raw import Raw
from tsdiff.treesearch.segmentfile import Damage, Place, scan_segment, segment_numbers, segment_path, write_record

SEGMENT_BYTES = 256 << 20
_WRITE_BYTES = 1 << 20


class Segments:
    """A folder of segments that is open to append. One process at a time: hold the run's lock. Not for several threads at once.

    After an error it takes no more: what was synced is safe, and opening it again finds its end.

    Attributes:
      end: the last segment and the byte where the next record begins, if it fits; for the journal.
      damage: what was found wrong when it was opened. Torn bytes at the end have been cut off.
    """

    def __init__(self, folder: Path, disk: Disk, limit: int, end: tuple[int, int], damage: list[Damage]) -> None:
        self.folder = folder
        self.end = end
        self.damage = damage
        self._disk = disk
        self._limit = limit
        self._file = -1
        self._unsynced = False
        self._usable = True

    @classmethod
    def open(cls, folder: Path, *, end: tuple[int, int] | None = None, limit: int = SEGMENT_BYTES, disk: Disk = LOCAL) -> Segments:
        """Open a folder to append, made if it is not there.

        Args:
          folder: of the segments; its parent must exist.
          end: where the journal says that they end, (0, 0) before the first; what follows is removed. None reads the
            last segment to find its last good record, for segments that have no journal.
          limit: size in bytes from which a new segment is begun; a larger record has one to itself.
          disk: through which files are changed.

        Raises:
          UsageError, SetupError: if the folder is newer, or cannot be read or written.
        """
        damage: list[Damage] = []
        try:
            disk.make_folder(folder)
            disk.sync_folder(folder.parent)
            end = _found_end(folder, damage) if end is None else _told_end(folder, end, damage)
            for number in segment_numbers(folder):
                if number > end[0]:
                    disk.remove(segment_path(folder, number))
            disk.sync_folder(folder)  # new names may not have been synced before their process was killed
            segments = cls(folder, disk, limit, end, damage)
            try:
                if segment_path(folder, end[0]).exists():
                    segments._begin(end)
                    segments._unsynced = True  # nor its last records
            except BaseException:
                segments.close()
                raise
        except OSError as error:
            raise told(error, folder) from error
        return segments

    def append(self, key: str, raw: Raw) -> Place:
        """Write a tensor; it survives the end of this process at once, a power cut only after `sync`.

        Raises:
          SetupError: if the disk is full or fails.
        """
        return self.append_all([(key, raw)])[0]

    def append_all(self, tensors: Sequence[tuple[str, Raw]]) -> list[Place]:
        """Write many tensors, as one after another but with few writes; returns their places. Raises as `append`."""
        self._require_usable()
        places: list[Place] = []
        segment, offset = self.end
        waiting: list[bytes] = []
        for key, raw in tensors:
            data = write_record(segment, offset, key, raw)
            if offset and offset + len(data) > self._limit:
                data = write_record(segment + 1, 0, key, raw)
                self._write(waiting)
                self._turn(segment + 1)
                waiting, (segment, offset) = [], self.end
            elif offset - self.end[1] > _WRITE_BYTES:
                self._write(waiting)
                waiting = []
            waiting.append(data)
            places.append(Place(segment, offset, len(data)))
            offset += len(data)
        self._write(waiting)
        return places

    def sync(self) -> None:
        """Return when all tensors would survive a power cut. Raises SetupError if the disk fails."""
        self._require_usable()
        if self._unsynced:
            with self._changing(self.end[0]):
                self._disk.sync(self._file)
            self._unsynced = False

    def discard(self, segment: int) -> None:
        """Remove a segment of which nothing is wanted any more; not the last, which is being written."""
        assert segment < self.end[0], "the last segment is still written to"
        try:
            self._disk.remove(segment_path(self.folder, segment))
        except OSError as error:
            raise told(error, segment_path(self.folder, segment)) from error

    def close(self) -> None:
        """Close the last segment; closing twice is fine."""
        self._usable = False
        if self._file >= 0:
            file, self._file = self._file, -1
            self._disk.close(file)

    def __enter__(self) -> Segments:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _require_usable(self) -> None:
        if not self._usable:
            raise SetupError(f"{str(self.folder)!r} is closed, or an earlier write to it failed; open it again")

    def _write(self, records: Sequence[bytes]) -> None:
        """Write records at the end of the last segment."""
        if not records:
            return
        segment, offset = self.end
        data = b"".join(records)
        with self._changing(segment):
            if self._file < 0:
                self._begin((segment, offset))
            self._unsynced = True
            with taken_back(self._disk, self._file, offset):
                self._disk.write(self._file, offset, data)
        self.end = (segment, offset + len(data))

    def _turn(self, segment: int) -> None:
        """Go on in a new segment."""
        with self._changing(segment):
            self._close_segment()
        self._unsynced = False
        self.end = (segment, 0)

    @contextmanager
    def _changing(self, segment: int) -> Iterator[None]:
        """Change a segment; if that fails in any way, take no more."""
        self._usable = False
        try:
            yield
        except OSError as error:
            raise told(error, segment_path(self.folder, segment)) from error
        self._usable = True

    def _begin(self, end: tuple[int, int]) -> None:
        """Open the segment to write to, cut to where its next record begins."""
        segment, offset = end
        path = segment_path(self.folder, segment)
        new = not path.exists()
        self._file = self._disk.open(path)
        if new:
            self._disk.sync_folder(self.folder)
        elif path.stat().st_size > offset:
            self._disk.truncate(self._file, offset)

    def _close_segment(self) -> None:
        if self._file >= 0:
            self._disk.sync(self._file)
            file, self._file = self._file, -1
            self._disk.close(file)


def _found_end(folder: Path, damage: list[Damage]) -> tuple[int, int]:
    """Where the last good record of a folder ends."""
    last = max(segment_numbers(folder), default=0)
    offset = 0
    for found in scan_segment(folder, last) if segment_path(folder, last).exists() else ():
        if isinstance(found, Damage):
            damage.append(found)
            offset = found.offset if found.torn else found.offset + found.size
        else:
            offset = found.place.offset + found.place.size
    return last, offset


def _told_end(folder: Path, end: tuple[int, int], damage: list[Damage]) -> tuple[int, int]:
    """Where the journal says that a folder ends; a new segment, if less than that is there."""
    segment, offset = end
    path = segment_path(folder, segment)
    size = path.stat().st_size if path.exists() else 0
    if size >= offset:
        return end
    damage.append(Damage(segment, size, offset - size, False, "the file ends before what the journal knows of"))
    return segment + 1, 0
