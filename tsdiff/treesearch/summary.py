"""`summary.csv`: the runs of a search as a table, a line each, derived from their folders."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tsdiff.treesearch.disk import LOCAL, Disk
from tsdiff.treesearch.exports import csv_text
from tsdiff.treesearch.runfolder import SUMMARY, write_file
from tsdiff.treesearch.saved import SavedRun

COLUMNS = ("prompt", "seed", "policy", "model", "verifier", "score", "baseline", "nfe", "rows", "decodes", "calls", "seconds", "status", "folder")


def write_summary(folder: Path, runs: Sequence[Path], *, disk: Disk = LOCAL) -> None:
    """Write the table of some runs into a folder that holds them; those that never began are left out.

    Raises:
      UsageError, SetupError: if it cannot be written.
    """
    rows = []
    for path in runs:
        if path.is_dir():
            facts = SavedRun(path).summary() | {"folder": path.relative_to(folder).as_posix()}
            rows.append([facts[name] for name in COLUMNS])
    text, path = csv_text(COLUMNS, rows), folder / SUMMARY
    if not path.exists() or path.read_bytes() != text:  # what is done stays as it is
        write_file(path, [text], disk=disk)
