"""Saved runs as commands are given them: run folders, and folders of those."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tsdiff.cli.output import say
from tsdiff.treesearch.errors import UsageError

if TYPE_CHECKING:
    from tsdiff.treesearch.saved import SavedRun


def read_runs(paths: Sequence[Path]) -> list[SavedRun]:
    """All runs in some folders, each once, in the order of the folders and of their names; one that cannot be read is a warning.

    Raises:
      UsageError: if a folder is not there, or none of them holds a run that can be read.
    """
    from tsdiff.treesearch.findruns import run_folders
    from tsdiff.treesearch.saved import load_run

    runs: dict[Path, SavedRun] = {}
    for folder in dict.fromkeys(found for path in paths for found in run_folders(path)):
        if folder.resolve() in runs:
            continue
        try:
            runs[folder.resolve()] = load_run(folder)
        except UsageError as error:
            say("warning", f"left out: {error}")
    if not runs:
        named = ", ".join(repr(str(path)) for path in paths)
        raise UsageError(f"there is no run to show in {named}; `tsdiff list runs` shows those there are")
    return list(runs.values())


def check_out(out: Path, suffixes: Sequence[str], *, force: bool) -> None:
    """Raise a UsageError if a picture cannot be written there."""
    if out.suffix.lower() not in suffixes:
        raise UsageError(f"{str(out)!r} ends in {out.suffix or 'no suffix'}; known are {', '.join(suffixes)}")
    if not out.absolute().parent.is_dir():
        raise UsageError(f"there is no folder {str(out.parent)!r} to write {out.name!r} into; make it first")
    if out.is_dir():
        raise UsageError(f"{str(out)!r} is a folder; name a file in it")
    if out.exists() and not force:
        raise UsageError(f"{str(out)!r} is there already; choose another name, or replace it with --force")
