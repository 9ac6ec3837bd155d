"""Recorded runs for tests: `record` is `fakes.grow` with run folders, one for each search."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fakes import Grown, grow
from faulty_disk import QuickDisk

from tsdiff.treesearch.disk import Disk
from tsdiff.treesearch.engine import Limits
from tsdiff.treesearch.recorder import FileRecorder
from tsdiff.treesearch.runfile import JOURNAL

QUICK = QuickDisk()


def record(folder: Path, *searches: Any, disk: Disk = QUICK, sync_seconds: float = 0.0, segment_bytes: int = 1 << 20, **options: Any) -> Grown:
    """Run searches, recorded in `folder/0`, `folder/1`, ...; what is there is repeated."""
    options.setdefault("limits", Limits(deterministic=True, network=4))
    numbers: dict[int, int] = {}

    def place(run: Any) -> Path:
        path = folder / str(numbers.setdefault(id(run), len(numbers)))
        path.mkdir(parents=True, exist_ok=True)
        return path

    recorder = FileRecorder(place, lambda run: {"seed": run.tree.seed}, sync_seconds=sync_seconds, disk=disk, segment_bytes=segment_bytes)
    try:
        return grow(*searches, recorder=recorder, **options)
    finally:
        recorder.close()


def recorded_bytes(grown: Grown) -> list[Any]:
    """Trees, budgets and latents: what an interruption must not change."""
    return [
        (json.dumps(run.tree.to_json()), run.tree.budget.spent, run.answer and run.answer.index, repr(run.error), {i: latent.numpy().tobytes() for i, latent in latents.items()})
        for run, latents in zip(grown.runs, grown.latents, strict=True)
    ]


@dataclass
class Folders:
    """Recorded runs on disk."""

    path: Path

    def cut(self, to: Path, journal: bytes) -> Path:
        """A copy in which the first run has another journal."""
        shutil.copytree(self.path, to)
        (to / "0" / JOURNAL).write_bytes(journal)
        return to
