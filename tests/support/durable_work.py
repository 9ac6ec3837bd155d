"""What a durable run does, in small: it locks its folder, stores tensors, commits where they are, and continues after anything."""

from __future__ import annotations

import hashlib
import math
from pathlib import Path

from tsdiff.treesearch.journal import Journal, JournalReader
from tsdiff.treesearch.lock import Lock
from tsdiff.treesearch.raw import ITEM_BYTES, Raw
from tsdiff.treesearch.segmentfile import Place, read
from tsdiff.treesearch.segments import Segments

STEPS = 5
SHAPES = [(2, 3), (), (0, 4), (17,), (4, 4), (1, 30)]
DTYPES = ["float32", "bfloat16", "float64", "uint8", "float16", "float32"]


def some(number: int) -> Raw:
    shape, dtype = SHAPES[number % 6], DTYPES[number % 6]
    data = hashlib.shake_128(number.to_bytes(4, "little")).digest(math.prod(shape) * ITEM_BYTES[dtype])
    return Raw(dtype, shape, memoryview(data))


def same(one: Raw, other: Raw) -> bool:
    return (one.dtype, one.shape, bytes(one.data)) == (other.dtype, other.shape, bytes(other.data))


def work(folder: Path, disk, acknowledged: list[int], *, steps: int = STEPS) -> None:
    """What is left of the work: for each step a group of tensors, then a group of records that knows their places."""
    with Lock(folder / "lock", disk=disk), Journal.open(folder / "journal.jsonl", {}, disk=disk) as journal:
        end = (0, 0)
        for group in JournalReader(folder / "journal.jsonl"):
            end = tuple(group.records[-1]["end"])
        with Segments.open(folder / "latents", end=end, limit=900, disk=disk) as segments:
            assert segments.damage == []
            for step in range(journal.end.groups, steps):
                places = [segments.append(f"{step}/{i}", some(step + i)) for i in range(3)]
                segments.sync()
                journal.commit([{"step": step, "places": [place.to_json() for place in places]}, {"end": list(segments.end)}])
                acknowledged.append(step)


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.suffix in (".jsonl", ".seg")}


def check(folder: Path) -> int:
    """Every tensor that the journal knows of is there; returns the groups."""
    groups = 0
    if (folder / "journal.jsonl").exists():
        reader = JournalReader(folder / "journal.jsonl")
        for groups, group in enumerate(reader, 1):
            record = group.records[0]
            assert record["step"] == groups - 1
            for i, place in enumerate(record["places"]):
                key, raw = read(folder / "latents", Place.from_json(place))
                assert key == f"{groups - 1}/{i}"
                assert same(raw, some(groups - 1 + i))
        assert reader.tail is None or not reader.tail.damaged
    return groups
