"""Searches in folders, and what becomes of folders, for tests of saved runs."""

from __future__ import annotations

import csv
import io
import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from faulty_disk import QuickDisk

from tsdiff.treesearch.journal import JournalReader
from tsdiff.treesearch.saved import SavedRun, load_run
from tsdiff.treesearch.savedtree import SavedTree
from tsdiff.treesearch.search import execute, prepare

QUICK = QuickDisk()
PROMPT = "near (3, 2.4)"
POLICIES = {
    "best-of-n": {"nfe": 24},
    "beam": {"nfe": 60, "policy_options": {"value": "lookahead"}},
    "mcts": {"nfe": 60},
    "dts": {"nfe": 40, "solver": "ddpm"},
    "smc": {"nfe": 40, "solver": "ddpm"},
    "zero-order": {"nfe": 40},
}


def search(out: Path, policy: str = "beam", prompts: Any = PROMPT, *, stop: Any = lambda: False, **options: Any) -> Any:
    options = {"deterministic": True, "steps": 4, "max_batch": 4} | POLICIES.get(policy, {}) | options
    return execute(prepare("gaussian", prompts, policy=policy, out=out, **options), disk=QUICK, sync_seconds=0.0, stop=stop)


def interrupted(out: Path, policy: str = "beam", batches: int = 8, **options: Any) -> Path:
    """The folder of a search that was stopped after so many batches."""
    left = iter(range(batches))
    with pytest.raises(KeyboardInterrupt):
        search(out, policy, stop=lambda: next(left, None) is None, **options)
    return next(out.glob("run-*"))


def finished_beam(out: Path) -> SimpleNamespace:
    """A finished run's folder, its journal's bytes, and where each group ends."""
    (found,) = search(out, "beam")
    data = (found.path / "journal.jsonl").read_bytes()
    reader = JournalReader(found.path / "journal.jsonl")
    return SimpleNamespace(path=found.path, data=data, ends=[reader.start.offset, *(group.end.offset for group in reader)], result=found)


def running_place(out: Path, beam: SimpleNamespace) -> Path:
    """A folder that says it is running, for journals to be put into."""
    folder = out / "run"
    folder.mkdir()
    facts = json.loads((beam.path / "run.json").read_text()) | {"status": "running"}
    (folder / "run.json").write_text(json.dumps(facts))
    return folder


def edit(path: Path, change: Any) -> None:
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


def as_killed(folder: Path, to: Path) -> Path:
    """A copy as if the process had been killed before it wrote what derives from the journal."""
    shutil.copytree(folder, to)
    for name in ("tree.json", "baseline.json", "best.png", "baseline.png", "summary.csv", "latents.safetensors"):
        (to / name).unlink()
    edit(to / "run.json", lambda facts: (facts.update(status="running"), facts.pop("result")))
    return to


def opened(folder: Path, data: bytes) -> SavedRun:
    (folder / "journal.jsonl").write_bytes(data)
    return load_run(folder)


def rows_of(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(path.read_text(encoding="utf-8"), newline="")))


def same_tree(one: SavedTree, other: SavedTree) -> bool:
    return json.dumps(one.to_json()) == json.dumps(other.to_json())
