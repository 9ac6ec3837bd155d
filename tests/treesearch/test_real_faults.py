"""Real processes that are killed with signal 9, real limits on the size of files, real folders that may not be written to."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import real_faults

DRILL_KILLS = int(os.environ.get("TSDIFF_DRILL_KILLS", "1000"))
SEED = int(os.environ.get("TSDIFF_DRILL_SEED", "0"))

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs processes that can be forked")


def run(*words: str, timeout: float = 900.0) -> Any:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(real_faults.__file__).parent), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run([sys.executable, real_faults.__file__, *words], capture_output=True, text=True, timeout=timeout, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def kill(wanted: dict[str, int], *, seed: int = 0, timeout: float = 900.0) -> dict[str, Any]:
    report: dict[str, Any] = run("kills", "--kills", json.dumps(wanted), "--seed", str(seed), timeout=timeout)
    assert {case: one["kills"] for case, one in report.items()} == wanted
    assert all(one["searches"] >= 1 for one in report.values())
    return report


def test_a_search_that_is_killed_at_any_moment_ends_in_the_same_bytes():
    report = kill({"beam": 2, "smc": 1, "adaptive": 1})
    assert sum(one["outcomes"]["searching"] + one["outcomes"]["searching, torn"] for one in report.values()) > 0


@pytest.mark.parametrize("case", ["stable-diffusion", "shapes"])
def test_a_search_with_a_network_that_is_killed_too(case):
    kill({case: 1})


@pytest.mark.drill
def test_a_thousand_kills(capsys):
    """TSDIFF_DRILL_KILLS=50 makes fewer, TSDIFF_DRILL_SEED=1 others."""
    cases = [*real_faults.GAUSSIAN, "stable-diffusion", "shapes"]
    share, more = divmod(DRILL_KILLS, len(cases))
    wanted = {case: number for place, case in enumerate(cases) if (number := share + (place < more))}
    with capsys.disabled():
        print("\n\n" + table_row("", COLUMNS) + "\n| --- |" + " ---: |" * len(COLUMNS))
        total = dict.fromkeys(COLUMNS, 0)
        for case, number in wanted.items():
            one = kill({case: number}, seed=SEED, timeout=60.0 * number + 600.0)[case]
            counts = {name: one.get(name, one["outcomes"].get(name)) for name in COLUMNS}
            total = {name: total[name] + counts[name] for name in COLUMNS}
            print(table_row(case, counts.values()), flush=True)
        print(table_row("all", total.values()))


COLUMNS = ("kills", "searches", "lost rows", *real_faults.OUTCOMES)
"""Where the kills have hit; every search that was killed has ended in the bytes of one that was not."""


def table_row(name: str, cells: Iterable[object]) -> str:
    return f"| {name} | {' | '.join(map(str, cells))} |"


def test_where_files_cannot_grow_a_search_stops_with_one_line_and_goes_on_later():
    report = run("full")
    assert len(report) == 4
    for share, one in report.items():
        assert one["status"] == 2, (share, one)
        (line,) = one["error"].splitlines()
        assert "no room to write" in line, share
        assert "free some space, then resume" in line
        if one["groups"] is not None or "resumed" in one:
            assert (one["resumed"], one["identical"]) == (0, True), share
    assert sum("resumed" in one for one in report.values()) >= 3
    assert len({one["groups"] for one in report.values()}) >= 3, "the limits hit at different moments"


def test_in_a_folder_that_may_not_be_written_to_a_search_stops_with_one_line():
    report = run("readonly")
    assert report.pop("unchanged")
    for what, one in report.items():
        assert one["status"] == 2, (what, one)
        (line,) = one["error"].splitlines()
        assert "Permission denied" in line
        assert "choose another" in line or "make it writable" in line
