"""Where saved runs are: the run folders in a folder, and the one that a path names."""

from __future__ import annotations

import os
from pathlib import Path

from tsdiff.treesearch.errors import UsageError
from tsdiff.treesearch.runfile import JOURNAL
from tsdiff.treesearch.runfolder import RUN, TREE


def run_folders(folder: Path) -> list[Path]:
    """The run folders in a folder (or that folder itself) and the folders in it, in the order of their names.

    Raises:
      UsageError: if there is no such folder, or it cannot be read.
    """
    if not folder.is_dir():
        raise UsageError(f"there is no folder {str(folder)!r}")
    found: list[Path] = []

    def fail(error: OSError) -> None:
        raise UsageError(f"cannot read {error.filename!r} ({error.strerror}); check its permissions") from None

    for parent, names, _ in os.walk(folder, onerror=fail):
        names.sort()
        if _is_run(Path(parent)):
            found.append(Path(parent))
            names.clear()
    return found


def run_folder(path: Path) -> Path:
    """The run folder that a path names: the path itself, or the only one in it.

    Raises:
      UsageError: if it is no run, or holds several.
    """
    if not path.is_dir():
        names = f"; name its folder, {str(path.parent)!r}" if path.is_file() else "; `tsdiff list runs` shows those there are"
        raise UsageError(f"{str(path)!r} is not the folder of a run{names}")
    if _is_run(path):
        return path
    within = run_folders(path)
    if not within:
        raise UsageError(f"{str(path)!r} is not the folder of a run, and holds none")
    if len(within) > 1:
        raise UsageError(f"{str(path)!r} holds {len(within)} runs; name one of them, such as {str(within[0])!r} (load_runs and `tsdiff list runs` give all)")
    return within[0]


def _is_run(folder: Path) -> bool:
    return any((folder / name).exists() for name in (RUN, JOURNAL, TREE))
