"""The journal gives back whole groups, whatever happens to its file."""

from __future__ import annotations

import errno
import json
import os
import random
import resource
import signal
import subprocess
import sys
import tempfile
from itertools import count
from pathlib import Path

import pytest
from faulty_disk import FaultyDisk, Killed, QuickDisk
from hypothesis import given, settings
from hypothesis import strategies as st

from tsdiff.treesearch import journal as module
from tsdiff.treesearch.errors import SetupError, UsageError
from tsdiff.treesearch.journal import Journal, JournalReader, Position
from tsdiff.treesearch.lines import read_line, write_first, write_group

QUICK = QuickDisk()
ABOUT = {"run": "Ünïcode", "seed": 3}
GROUPS = [
    [{"prompt": "a red ○ on a blue □"}],
    [{"request": "Draw", "nodes": [0, 1]}, {"note": "\ud800", "$float": float("nan")}, {"value": -0.0}],
    [{"answer": 0.1}],
    [{"left": 1}, {"left": 0}],
    [{"lines": "\n\u2028\r\n", "end": None}, {"x": [1.5, {"y": "z" * 90}]}],
]


def write(path: Path, groups=GROUPS, disk=QUICK) -> list[int]:
    """A journal with these groups; returns where the first line and each group end."""
    with Journal.open(path, ABOUT, disk=disk) as journal:
        return [journal.end.offset, *(journal.commit(group).offset for group in groups)]


def groups_of(path: Path):
    reader = JournalReader(path)
    return [repr(group.records) for group in reader], reader.tail


def as_read(groups):
    return [repr(group) for group in groups]


@pytest.fixture
def whole(tmp_path):
    path = tmp_path / "journal.jsonl"
    return path, write(path), path.read_bytes()


def test_groups_come_back(whole):
    path, ends, data = whole
    reader = JournalReader(path)
    groups = list(reader)
    assert reader.about == ABOUT
    assert reader.version == module.latest_version()
    assert reader.tail is None
    assert [repr(group.records) for group in groups] == as_read(GROUPS)
    assert [group.number for group in groups] == [1, 2, 3, 4, 5]
    assert [group.end.offset for group in groups] == ends[1:]
    assert groups[-1].end == Position(len(data), 1 + sum(map(len, GROUPS)), 5)


def test_every_line_is_strict_json(whole):
    def refuse(name):
        raise AssertionError(name)

    lines = whole[2].decode("utf-8").split("\n")
    assert lines.pop() == ""
    parsed = [json.loads(line, parse_constant=refuse) for line in lines]
    assert parsed[0]["journal"] == "tsdiff"
    assert [line["line"] for line in parsed[1:]] == list(range(1, len(parsed)))
    assert [line["left"] for line in parsed[1:]] == [0, 2, 1, 0, 0, 1, 0, 1, 0]


def test_any_prefix_opens(whole):
    path, ends, data = whole
    for size in reversed(range(len(data) + 1)):
        os.truncate(path, size)
        groups, tail = groups_of(path)
        assert groups == as_read(GROUPS[: sum(end <= size for end in ends[1:])])
        assert (tail is None) == (size in ends)
        assert tail is None or not tail.damaged
        assert path.stat().st_size == size, "reading changes nothing"


def test_any_prefix_continues(whole):
    path, ends, data = whole
    for size in sorted({*range(0, len(data), 7), *ends, *(end - 1 for end in ends), *(end + 1 for end in ends[:-1])}):
        os.truncate(path, size)
        with Journal.open(path, ABOUT, disk=QUICK) as journal:
            assert (journal.dropped is None) == (size in ends)
            assert journal.end.groups == sum(end <= size for end in ends[1:])
            for group in GROUPS[journal.end.groups :]:
                journal.commit(group)
        assert path.read_bytes() == data
    assert list(path.parent.iterdir()) == [path], "a torn tail is not worth keeping"


def test_every_flipped_bit_is_found(whole, tmp_path):
    _, ends, data = whole
    path = tmp_path / "flipped.jsonl"
    path.write_bytes(data)
    with path.open("r+b", buffering=0) as file:
        for place in range(len(data)):
            seal = data[place : place + 30].find(b"\n") >= 0  # the checksum and what closes the line
            for bit in range(8) if seal or place % 8 == 0 else [place % 8]:
                file.seek(place)
                file.write(bytes([data[place] ^ 1 << bit]))
                groups, tail = groups_of(path)
                kept = sum(end <= place for end in ends[1:])
                assert groups == as_read(GROUPS[:kept])
                assert tail is not None
                # Only a later group proves that this one was whole once.
                assert tail.damaged == (place < ends[-2])
                assert tail.size == len(data) - (ends[kept] if place >= ends[0] else 0)
            file.seek(place)
            file.write(data[place : place + 1])
    assert groups_of(path) == (as_read(GROUPS), None)


@settings(max_examples=60)
@given(st.data())
def test_no_mixture_of_lines_gives_anything_but_a_prefix(draw):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "journal.jsonl"
        ends = write(path)
        lines = path.read_bytes().splitlines(keepends=True)
        tail = list(range(1, len(lines)))
        for _ in range(draw.draw(st.integers(1, 3))):
            i, j = draw.draw(st.integers(0, len(tail))), draw.draw(st.integers(0, len(tail)))
            i, j = min(i, j), max(i, j)
            change = draw.draw(st.sampled_from(["repeat", "remove", "reverse", "move"]))
            if change == "repeat":
                tail = tail[:j] + tail[i:j] + tail[j:]
            elif change == "remove":
                tail = tail[:i] + tail[j:]
            elif change == "reverse":
                tail = tail[:i] + tail[i:j][::-1] + tail[j:]
            else:
                tail = tail[i:j] + tail[:i] + tail[j:]
        changed = b"".join(lines[i] for i in [0, *tail])
        path.write_bytes(changed)
        groups, left_out = groups_of(path)
        same = next((i for i, number in enumerate(tail) if number != i + 1), len(tail)) + 1  # lines that are in their place
        kept = sum(len(b"".join(lines[:same])) >= end for end in ends[1:])
        assert groups == as_read(GROUPS[:kept])
        assert (left_out is None) == (changed == b"".join(lines[: 1 + sum(len(group) for group in GROUPS[:kept])]))


@settings(max_examples=60)
@given(st.binary(min_size=1, max_size=200) | st.just(b"\n") | st.just(b"\0" * 100), st.integers(0, 5))
def test_garbage_after_the_end_is_left_out(garbage, kept):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "journal.jsonl"
        write(path, GROUPS[:kept])
        data = path.read_bytes()
        path.write_bytes(data + garbage)
        groups, tail = groups_of(path)
        assert groups == as_read(GROUPS[:kept])
        assert tail.size == len(garbage)
        with Journal.open(path, ABOUT, disk=QUICK) as journal:
            assert str(journal.dropped) == str(tail)
        assert path.read_bytes() == data


ANY_TEXT = st.text(st.characters(exclude_categories=()), max_size=30)


@settings(max_examples=60)
@given(st.lists(st.lists(st.dictionaries(ANY_TEXT, ANY_TEXT | st.floats(), max_size=3), min_size=1, max_size=4), max_size=5), st.dictionaries(ANY_TEXT, ANY_TEXT), st.data())
def test_any_words_survive_and_any_prefix_opens(groups, about, draw):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "journal.jsonl"
        with Journal.open(path, about, disk=QUICK) as journal:
            ends = [journal.commit(group).offset for group in groups]
        reader = JournalReader(path)
        assert [repr(group.records) for group in reader] == as_read(groups)
        assert reader.about == about
        data = path.read_bytes()
        size = draw.draw(st.integers(0, len(data)))
        path.write_bytes(data[:size])
        assert groups_of(path)[0] == as_read(groups[: sum(end <= size for end in ends)])


def test_damage_in_the_middle_is_kept_aside(whole):
    path, ends, data = whole
    broken = bytearray(data)
    broken[ends[1] + 5] ^= 1
    path.write_bytes(broken)
    with Journal.open(path, ABOUT, disk=QUICK) as journal:
        assert journal.dropped.damaged
        assert (journal.dropped.line, journal.dropped.later) == (3, 5)
        assert str(journal.dropped).startswith("line 3 is damaged (its checksum is wrong)")
        assert journal.aside == path.with_name("journal.jsonl.damaged-1")
        for group in GROUPS[1:]:
            journal.commit(group)
    assert path.read_bytes() == data
    assert journal.aside.read_bytes() == broken[ends[1] :]
    path.write_bytes(broken)
    with Journal.open(path, ABOUT, disk=QUICK) as journal:
        assert journal.aside == path.with_name("journal.jsonl.damaged-2")


def test_a_damaged_first_line_leaves_nothing_to_read_but_loses_nothing(whole):
    path, _, data = whole
    for broken in (b"[" + data[1:], data[:60] + b"X" + data[61:]):
        path.write_bytes(broken)
        groups, tail = groups_of(path)
        assert groups == []
        assert (tail.damaged, tail.line, tail.later) == (True, 1, 9)
        with Journal.open(path, {"new": 1}, disk=QUICK) as journal:
            assert journal.about == {"new": 1}
            assert journal.aside.read_bytes() == broken
        assert groups_of(path) == ([], None)


def test_a_journal_keeps_what_it_is_about(whole):
    path, _, data = whole
    with Journal.open(path, {"other": 1}, disk=QUICK) as journal:
        assert journal.about == ABOUT
    assert path.read_bytes() == data


def test_what_is_new_can_be_read_while_it_is_written(tmp_path):
    path = tmp_path / "journal.jsonl"
    with Journal.open(path, ABOUT, disk=QUICK) as journal:
        place = JournalReader(path).start
        for number, group in enumerate(GROUPS, 1):
            assert list(JournalReader(path, after=place)) == []
            journal.commit(group, sync=False)
            (new,) = JournalReader(path, after=place)
            assert (new.number, repr(new.records)) == (number, repr(group))
            place = new.end
        journal.sync()
        with path.open("ab") as other:  # a group on its way
            other.write(write_group(place.lines, place.groups + 1, [{}])[0][:-5])
        reader = JournalReader(path, after=place)
        assert list(reader) == []
        assert not reader.tail.damaged


def test_groups_can_be_taken_back(whole):
    path, ends, data = whole
    with Journal.open(path, ABOUT, disk=QUICK) as journal:
        journal.cut(journal.end)
        assert journal.aside is None
        journal.cut([group.end for group in JournalReader(path)][1])
        assert path.read_bytes() == data[: ends[2]]
        assert journal.aside.read_bytes() == data[ends[2] :]
        for group in GROUPS[2:]:
            journal.commit(group)
    assert path.read_bytes() == data


# What is refused ------------------------------------------------------------------------------------------------------


def test_a_newer_format_is_refused_in_one_line(tmp_path):
    path = tmp_path / "journal.jsonl"
    now = module.latest_version()
    path.write_bytes(write_first(now + 1, ABOUT) + b"lines that nobody knows yet\n")
    data = path.read_bytes()
    for opening in (JournalReader, lambda path: Journal.open(path, ABOUT)):
        with pytest.raises(UsageError, match=f"has format {now + 1}, but this tsdiff reads up to format {now}; install a newer tsdiff") as told:
            opening(path)
        assert "\n" not in str(told.value)
    assert path.read_bytes() == data
    path.write_bytes(data.replace(b":%d," % (now + 1), b":%d," % (now + 2)))  # not newer but damaged: the checksum decides
    assert JournalReader(path).version is None


@pytest.mark.parametrize("data", [b"hello", b"{}\n", b"\0" * 50, b'{"journal":"other","version":1}\n', bytes(range(256)) * 20])
def test_other_files_are_left_alone(tmp_path, data):
    path = tmp_path / "notes.txt"
    path.write_bytes(data)
    for opening in (JournalReader, lambda path: Journal.open(path, ABOUT)):
        with pytest.raises(UsageError, match="is not the journal of a run"):
            opening(path)
    assert path.read_bytes() == data


def test_bad_paths_are_told(tmp_path):
    with pytest.raises(UsageError, match=r"cannot read .*No such file"):
        JournalReader(tmp_path / "journal.jsonl")
    with pytest.raises(UsageError, match=r"cannot write .*No such file"):
        Journal.open(tmp_path / "gone" / "journal.jsonl", ABOUT)
    for opening in (JournalReader, lambda path: Journal.open(path, ABOUT)):
        with pytest.raises(UsageError, match=r"cannot read .*Is a directory"):
            opening(tmp_path)


def test_a_record_that_is_not_json_changes_nothing(whole):
    path, _, data = whole
    with Journal.open(path, ABOUT, disk=QUICK) as journal:
        with pytest.raises(UsageError, match="strict JSON"):
            journal.commit([{"fine": 1}, {"bad": object()}])
        assert path.read_bytes() == data
        journal.commit([{"fine": 1}])
    assert len(groups_of(path)[0]) == 6


def test_lines_have_a_longest(tmp_path, monkeypatch):
    path = tmp_path / "journal.jsonl"
    with Journal.open(path, ABOUT, disk=QUICK) as journal:
        journal.commit([{"x": "y" * 500}])
        monkeypatch.setattr("tsdiff.treesearch.lines.MAX_LINE", 400)
        monkeypatch.setattr(module, "MAX_LINE", 400)
        with pytest.raises(UsageError, match="too long for the journal; at most 400"):
            journal.commit([{"x": "y" * 400}])
    groups, tail = groups_of(path)
    assert (groups, tail.line) == ([], 2)


def test_a_read_only_folder_is_told(tmp_path):
    class ReadOnly(QuickDisk):
        def open(self, path):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    path = tmp_path / "journal.jsonl"
    with pytest.raises(UsageError, match=r"Read-only file system.*make it writable, or choose another folder"):
        Journal.open(path, ABOUT, disk=ReadOnly())
    write(path)
    with pytest.raises(UsageError, match=r"Read-only file system"):
        Journal.open(path, ABOUT, disk=ReadOnly())
    assert groups_of(path) == (as_read(GROUPS), None)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root can become somebody who may not write")
def test_a_folder_that_one_may_not_write_to_is_told():
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        path = Path(folder) / "journal.jsonl"
        write(path)
        path.chmod(0o644)
        os.seteuid(65534)
        try:
            assert groups_of(path) == (as_read(GROUPS), None)
            for name in ("journal.jsonl", "new.jsonl"):
                with pytest.raises(UsageError, match=r"Permission denied.*make it writable"):
                    Journal.open(path.with_name(name), ABOUT)
        finally:
            os.seteuid(0)


# Versions -------------------------------------------------------------------------------------------------------------


def test_an_older_format_is_read_and_brought_up_to_date(whole, monkeypatch):
    path, _, data = whole
    now = module.latest_version()
    monkeypatch.setattr(module, "UPGRADES", (*module.UPGRADES, lambda record: {"two": record}, lambda record: {"three": record}))
    newer = [[{"three": {"two": record}} for record in group] for group in GROUPS]
    reader = JournalReader(path)
    assert [repr(group.records) for group in reader] == as_read(newer)
    assert path.read_bytes() == data
    path.write_bytes(data + b"torn")
    with Journal.open(path, ABOUT, disk=QUICK) as journal:
        assert journal.aside.read_bytes() == data + b"torn"
        assert journal.aside.name == f"journal.jsonl.version-{now}-1"
        journal.commit([{"three": {"two": "new"}}])
    reader = JournalReader(path)
    assert [repr(group.records) for group in reader] == as_read([*newer, [{"three": {"two": "new"}}]])
    assert (reader.version, reader.about, reader.tail) == (now + 2, ABOUT, None)


# Faults ---------------------------------------------------------------------------------------------------------------


def work(path, disk, acknowledged):
    """Write what is missing of `GROUPS`."""
    with Journal.open(path, ABOUT, disk=disk) as journal:
        for group in GROUPS[journal.end.groups :]:
            journal.commit(group)
            acknowledged.append(group)


@pytest.mark.parametrize("fault", ["full", "killed", "power"])
@pytest.mark.parametrize("begun", [None, 150, 700], ids=["new", "torn at the start", "torn later"])
def test_a_fault_at_any_change_loses_no_group(tmp_path, whole, fault, begun):
    _, ends, data = whole
    for at in count():
        for seed in range(6 if fault == "power" else 1):
            path = tmp_path / f"{at}-{seed}" / "journal.jsonl"
            path.parent.mkdir()
            if begun is not None:
                path.write_bytes(data[:begun])
            before = 0 if begun is None else sum(end <= begun for end in ends[1:])
            disk, acknowledged, told = FaultyDisk(at, fault, seed=seed), [], ""
            try:
                work(path, disk, acknowledged)
            except (Killed, SetupError) as error:
                told = f"{type(error).__name__} {error}"
            assert told.startswith("" if not disk.failed else "SetupError no room to write" if fault == "full" else "Killed")
            assert "\n" not in told
            if path.exists():
                groups, tail = groups_of(path)
                assert groups == as_read(GROUPS[: len(groups)])
                assert len(groups) >= before + len(acknowledged), "what was acknowledged is there"
                assert tail is None or not tail.damaged, "no fault looks like damage"
            else:
                assert not acknowledged
                assert begun is None
            work(path, QUICK, [])
            assert path.read_bytes() == data
        if not disk.failed:
            break
    missing = 5 - before
    assert disk.log.count("write") == missing + (begun is None)
    assert disk.log.count("sync") == missing + 1 + (begun is None)


def test_after_a_fault_a_journal_takes_no_more(tmp_path):
    path = tmp_path / "journal.jsonl"
    write(path, [])
    disk = FaultyDisk(3, "full")  # it opens, syncs file and folder, then writes
    with Journal.open(path, ABOUT, disk=disk) as journal:
        data = path.read_bytes()
        with pytest.raises(SetupError, match="no room to write"):
            journal.commit(GROUPS[0])
        assert path.read_bytes() == data, "what was half written is taken back"
        for change in (lambda: journal.commit(GROUPS[0]), journal.sync, lambda: journal.cut(Position(0, 0, 0))):
            with pytest.raises(SetupError, match="open it again"):
                change()
    journal.close()


def test_a_full_disk_that_cannot_even_be_cut(tmp_path):
    class Stuck(FaultyDisk):
        def truncate(self, file, size):
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    path = tmp_path / "journal.jsonl"
    write(path, GROUPS[:1])
    with Journal.open(path, ABOUT, disk=Stuck(3, "full")) as journal, pytest.raises(SetupError, match="no room") as told:
        journal.commit(GROUPS[1])
    assert "Input/output error" in told.value.__cause__.__notes__[0]
    groups, tail = groups_of(path)
    assert groups == as_read(GROUPS[:1])
    assert not tail.damaged
    work(path, QUICK, [])
    assert groups_of(path) == (as_read(GROUPS), None)


# Real processes -------------------------------------------------------------------------------------------------------

WRITER = """
import sys
from pathlib import Path
from tsdiff.treesearch.errors import TsdiffError
from tsdiff.treesearch.journal import Journal
path, last = Path(sys.argv[1]), int(sys.argv[2])
if len(sys.argv) > 3:
    import resource
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[3]), int(sys.argv[3])))
try:
    with Journal.open(path, {"run": 1}) as journal:
        while journal.end.groups < last:
            number = journal.end.groups + 1
            journal.commit([{"group": number, "record": i, "text": "x" * (37 * number % 101)} for i in range(1 + number % 5)], sync=number % 3 == 0)
            print(number, flush=True)
except TsdiffError as error:
    sys.exit(f"{type(error).__name__}: {error}")
"""


def expected(number):
    return [{"group": number, "record": i, "text": "x" * (37 * number % 101)} for i in range(1 + number % 5)]


def start(path, last, *more):
    return subprocess.Popen([sys.executable, "-W", "error", "-c", WRITER, str(path), str(last), *map(str, more)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(path, last, *more):
    process = start(path, last, *more)
    out, err = process.communicate(timeout=60)
    return process.returncode, out.split(), err


def test_a_killed_process_loses_no_group(tmp_path):
    rng = random.Random(0)
    path = tmp_path / "journal.jsonl"
    seen = 0
    for _ in range(5):
        process = start(path, 10**9)
        for _ in range(rng.randint(1, 40)):
            seen = int(process.stdout.readline())
        # It goes on writing while we wait, so the kill hits it anywhere.
        for _ in range(rng.randint(0, 20_000)):
            pass
        process.send_signal(signal.SIGKILL)
        rest = process.communicate(timeout=60)[0].split("\n")[:-1]  # the last number may be torn too
        seen = max([seen, *(int(line) for line in rest)])
        reader = JournalReader(path)
        groups = [group.records for group in reader]
        assert len(groups) >= seen
        assert groups == [expected(number) for number in range(1, len(groups) + 1)]
        assert reader.tail is None or not reader.tail.damaged
        seen = len(groups)
    assert finish(path, seen + 3)[0] == 0
    undisturbed = tmp_path / "undisturbed.jsonl"
    with Journal.open(undisturbed, {"run": 1}, disk=QUICK) as journal:
        for number in range(1, seen + 4):
            journal.commit(expected(number))
    assert path.read_bytes() == undisturbed.read_bytes()


@pytest.mark.skipif(not hasattr(resource, "RLIMIT_FSIZE"), reason="the system has no limit on a file's size")
def test_a_full_disk_keeps_what_was_written(tmp_path):
    path = tmp_path / "journal.jsonl"
    for limit in (1500, 3000):
        status, acknowledged, err = finish(path, 10**9, limit)
        assert status == 1
        assert err.startswith("SetupError: no room to write")
        assert err.count("\n") == 1
        groups, tail = groups_of(path)
        assert groups == as_read(expected(number) for number in range(1, 1 + int(acknowledged[-1])))
        assert tail is None
        assert path.stat().st_size <= limit
    done = len(groups) + 2
    assert finish(path, done)[0] == 0
    assert len(groups_of(path)[0]) == done


# Lines ----------------------------------------------------------------------------------------------------------------


def test_a_line_has_one_spelling():
    (line,) = write_group(7, 3, [{"x": 1}])
    assert line == b'{"line":7,"group":3,"left":0,"record":{"x":1},"crc32":"%b"}\n' % line[-11:-3]
    assert read_line(line) == (7, 3, 0, {"x": 1})
    for other in (line.upper(), line.replace(b":1", b": 1"), line.rstrip(), line + b"\n", line.replace(b"\n", b"\r\n"), b" " + line):
        with pytest.raises(ValueError, match=r"checksum|cut short"):
            read_line(other)
    with pytest.raises(ValueError, match="no line of a journal"):
        read_line(write_first(1, {}))
