"""A run has one writer, and a dead one does not keep others out."""

from __future__ import annotations

import errno
import os
import platform
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from faulty_disk import FaultyDisk, Killed, QuickDisk

from tsdiff.treesearch.errors import SetupError, UsageError
from tsdiff.treesearch.journal import Journal, JournalReader
from tsdiff.treesearch.lock import Holder, Lock, holder

HOLD = """
import os, sys, time
from pathlib import Path
from tsdiff.treesearch.lock import Lock
lock = Lock(Path(sys.argv[1]))
child = os.fork() if len(sys.argv) > 2 else None
if child != 0:
    print(child, flush=True)
time.sleep(60)
"""

TRY = """
import sys
from pathlib import Path
from tsdiff.treesearch.errors import TsdiffError
from tsdiff.treesearch.lock import Lock
try:
    Lock(Path(sys.argv[1]))
except TsdiffError as error:
    sys.exit(f"{type(error).__name__}: {error}")
"""


def hold(path: Path, *more: str) -> tuple[subprocess.Popen, str]:
    process = subprocess.Popen([sys.executable, "-W", "error", "-c", HOLD, str(path), *more], stdout=subprocess.PIPE, text=True)
    return process, process.stdout.readline().strip()


def attempt(path: Path) -> str:
    done = subprocess.run([sys.executable, "-W", "error", "-c", TRY, str(path)], stderr=subprocess.PIPE, text=True, timeout=60, check=False)
    assert done.returncode == bool(done.stderr)
    return done.stderr


def test_a_second_writer_is_told_who_the_first_is(tmp_path):
    path = tmp_path / "lock"
    with Lock(path):
        told = attempt(path)
        assert told == f"Busy: {str(tmp_path)!r} is being written by process {os.getpid()}; wait until it is done, or stop it first\n"
        with pytest.raises(UsageError, match=f"by process {os.getpid()};"):
            Lock(path)
        assert holder(path) == Holder(os.getpid(), platform.node())
        assert holder(path) is not None, "looking changes nothing"
    assert attempt(path) == ""
    assert holder(path) is None
    with Lock(path) as lock:
        lock.close()
        Lock(path).close()


def test_a_killed_process_leaves_no_lock(tmp_path):
    path = tmp_path / "lock"
    for _ in range(2):
        process, _ = hold(path)
        try:
            assert holder(path) == Holder(process.pid, platform.node())
            with pytest.raises(UsageError, match=f"by process {process.pid};"):
                Lock(path)
        finally:
            process.send_signal(signal.SIGKILL)
            process.communicate(timeout=60)
        assert holder(path) is None
        Lock(path).close()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the system does not fork")
def test_a_child_that_outlives_its_parent_does_not_hold_the_lock(tmp_path):
    path = tmp_path / "lock"
    process, child = hold(path, "fork")
    try:
        with pytest.raises(UsageError, match=f"by process {process.pid};"):
            Lock(path)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait(timeout=60)
    os.kill(int(child), 0)  # it is alive
    try:
        Lock(path).close()
    finally:
        os.kill(int(child), signal.SIGKILL)
        process.stdout.close()


def test_readers_are_not_kept_out(tmp_path):
    journal = tmp_path / "journal.jsonl"
    process, _ = hold(tmp_path / "lock")
    try:
        with Journal.open(journal, {}, disk=QuickDisk()) as writer:
            writer.commit([{"x": 1}])
            assert [group.records for group in JournalReader(journal)] == [[{"x": 1}]]
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate(timeout=60)


def test_looking_never_keeps_a_writer_out(tmp_path):
    path = tmp_path / "lock"
    code = "import sys\nfrom pathlib import Path\nfrom tsdiff.treesearch.lock import holder\nprint(flush=True)\nwhile True: holder(Path(sys.argv[1]))"
    Lock(path).close()
    looking = subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE, text=True)
    try:
        looking.stdout.readline()
        for _ in range(50):
            Lock(path).close()
    finally:
        looking.send_signal(signal.SIGKILL)
        looking.communicate(timeout=60)


def test_a_holder_may_be_unknown_or_elsewhere(tmp_path):
    path = tmp_path / "lock"
    with Lock(path):
        for text in ("", "{", "[]", '{"pid": "x", "host": "y"}'):
            path.write_text(text)
            with pytest.raises(UsageError, match="by another process;"):
                Lock(path)
        path.write_text('{"pid": 7, "host": "elsewhere"}')
        with pytest.raises(UsageError, match="by process 7 on elsewhere;"):
            Lock(path)
    assert holder(tmp_path / "none") is None


def test_trouble_with_the_file_is_told(tmp_path, monkeypatch):
    with pytest.raises(UsageError, match=r"cannot write .*No such file"):
        Lock(tmp_path / "gone" / "lock")
    with pytest.raises(UsageError, match=r"cannot write .*Is a directory"):
        Lock(tmp_path)
    for at in range(3):  # open, truncate, write
        for fault, error in (("full", SetupError), ("killed", Killed)):
            with pytest.raises(error):
                Lock(tmp_path / "lock", disk=FaultyDisk(at, fault))
            Lock(tmp_path / "lock").close()

    def no_locks(file, how):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("fcntl.flock", no_locks)
    with pytest.raises(SetupError, match=r"the file system cannot lock files .*; put the run on another one"):
        Lock(tmp_path / "lock")
    with pytest.raises(SetupError, match="cannot lock files"):
        holder(tmp_path / "lock")
