"""Run folders for tests of the viewer, written as a search writes them, without one: any tree, picture and status in no time."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from faulty_disk import QuickDisk
from PIL import Image

from tsdiff.treesearch.journal import Journal
from tsdiff.treesearch.lock import Lock
from tsdiff.treesearch.previewfile import PREVIEWS, PreviewFile, compress
from tsdiff.treesearch.runfolder import write_image

QUICK = QuickDisk()
STEPS = 20
VERIFIER = "judge"


def schedule(steps: int = STEPS) -> dict[str, Any]:
    """A schedule from pure noise to clean."""
    sigma = [1 - level / steps for level in range(steps + 1)]
    return {"kind": "ddim", "key": "0" * 16, "timesteps": sigma[:-1], "alpha": [1 - one for one in sigma], "sigma": sigma}


def head(prompt: str = "a cat", seed: int = 1, steps: int = STEPS) -> dict[str, Any]:
    """What a tree is from its beginning."""
    return {
        "prompt": prompt, "negative_prompt": "", "class": None, "seed": seed, "line": "search", "verifier": VERIFIER, "solver": "ddim", "schedule": schedule(steps),
    }  # fmt: skip


def node(index: int, parent: int | None, level: int, *, kind: str = "denoise", score: float | None = None, salt: int = 0, **more: Any) -> dict[str, Any]:
    """A node as `tree.json` has it."""
    values = {} if score is None else {VERIFIER: {"score": score}}
    return {
        "index": index, "id": f"{index + 1 + (salt << 64):032x}", "stream": "1" * 32, "parent": parent, "move": {"kind": kind, "levels": [level], "copy": 0},
        "level": level, "nfe": int(parent is not None), "values": values, "status": "closed", "reason": None, "draft": False, "note": {},
    } | more  # fmt: skip


def grown(count: int, *, width: int = 8, steps: int = STEPS, seed: int = 0) -> list[dict[str, Any]]:
    """A tree of so many nodes: roots that are denoised, re-noised and denoised again, with scores at their ends."""
    numbers = random.Random(seed)
    nodes: list[dict[str, Any]] = []
    open_: list[int] = []
    for index in range(count):
        parent = None if index < width else open_[numbers.randrange(max(0, len(open_) - 4 * width), len(open_))]
        if parent is None:
            made = node(index, None, 0, kind="draw")
        elif nodes[parent]["level"] == steps:
            made = node(index, parent, numbers.randrange(2, steps - 1), kind="renoise")
        else:
            level = min(steps, nodes[parent]["level"] + numbers.choice((1, 2, 6)))
            made = node(index, parent, level, score=numbers.gauss(level / steps, 0.3) if level == steps or numbers.random() < 0.3 else None)
        nodes.append(made)
        open_.append(index)
    return nodes


def facts(status: str = "done", *, prompt: str = "a cat", seed: int = 1, nodes: Sequence[dict[str, Any]] = (), steps: int = STEPS, **more: Any) -> dict[str, Any]:
    """A `run.json`."""
    found: dict[str, Any] = {
        "format": 1,
        "status": status,
        "name": "run-0001",
        "prompt": prompt,
        "seed": seed,
        "arguments": {"model": "gaussian", "prompts": prompt, "seed": seed, "policy": "beam", "policy_options": {"width": 2}, "nfe": 50},
        "options": {
            "model": "gaussian", "policy": {"name": "beam", "width": 2}, "verifiers": [VERIFIER], "solver": "ddim", "steps": steps, "nfe_budget": 50,
            "cost": {"upper": {"nfe": 48}}, "environment": {"python": "3.11", "packages": {"tsdiff": "0.1.0"}},
        },
        "tree": head(prompt, seed, steps),
    }  # fmt: skip
    scored = [one for one in nodes if one["level"] == steps and one["values"]]
    best = max(scored, key=lambda one: one["values"][VERIFIER]["score"]) if scored else None
    if status == "done":
        found["result"] = {
            "verifier": VERIFIER, "node": (best or nodes[-1])["index"], "score": best and best["values"][VERIFIER]["score"], "image": None, "nodes": len(nodes),
            "nfe": sum(one["nfe"] for one in nodes), "rows": 1, "decodes": 0, "verifier_calls": {VERIFIER: len(scored)}, "seconds": 1.5,
            "failed_nodes": sum(one["status"] == "failed" for one in nodes), "truncated": None,
        }  # fmt: skip
    return found | more


def write_run(folder: Path, nodes: Sequence[dict[str, Any]], *, pictures: Iterable[int] = (), best_png: bool = False, **more: Any) -> Path:
    """A run that is done, without a journal."""
    folder.mkdir(parents=True, exist_ok=True)
    about = facts(nodes=nodes, **more)
    ledger = {"nfe": sum(one["nfe"] for one in nodes), "rows": 1, "encodes": 0, "decodes": 0, "verifier_calls": {VERIFIER: 1}}
    (folder / "run.json").write_text(json.dumps(about))
    (folder / "tree.json").write_text(json.dumps({"format": 1, **about["tree"], "ledger": ledger, "notes": [], "nodes": list(nodes)}))
    if best_png:
        write_image(folder / "best.png", Image.new("RGB", (48, 32), (10, 200, 30)), disk=QUICK)
    add_pictures(folder, ((index, nodes[index]["id"]) for index in pictures))
    return folder


def colour(index: int) -> tuple[int, int, int]:
    """The plain colour of a node's picture."""
    return (index * 37 % 200 + 20, index * 91 % 200 + 20, index * 53 % 200 + 20)


def add_pictures(folder: Path, nodes: Iterable[tuple[int, str]], *, tree: str = "search", size: tuple[int, int] = (32, 32)) -> None:
    """Previews, each of one colour."""
    file = PreviewFile(folder / PREVIEWS, QUICK)
    for index, name in nodes:
        picture, kind = compress(np.full((size[1], size[0], 3), colour(index), dtype=np.uint8))
        file.append({"tree": tree, "node": index, "id": name, "media_type": kind, "width": size[0], "height": size[1]}, picture)
    file.close()


class Going:
    """A run that goes on: its lock is held, and its journal is written group by group.

    Args:
      folder: made by it.
    """

    def __init__(self, folder: Path, **more: Any) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder
        self.about = facts("running", **more)
        self.write("running")
        self._stack = ExitStack()
        self._stack.enter_context(Lock(folder / "lock", disk=QUICK))
        self.journal = self._stack.enter_context(Journal.open(folder / "journal.jsonl", {}, disk=QUICK))
        self.nfe = 0

    def write(self, status: str, **more: Any) -> None:
        """Say in `run.json` how it stands."""
        (self.path / "run.json").write_text(json.dumps(self.about | {"status": status} | more))

    def add(self, *nodes: dict[str, Any], values: Iterable[tuple[int, float]] = (), nfe: int | None = None) -> None:
        """A request is complete: nodes that it made (their scores come with it), and scores of earlier ones."""
        self.nfe += len(nodes) if nfe is None else nfe
        scores = [*((one["index"], value["score"]) for one in nodes for value in one["values"].values()), *values]
        effects = [{"effect": "valued", "node": index, "key": VERIFIER, "value": {"score": score}} for index, score in scores]
        ledger = {"nfe": self.nfe, "rows": self.nfe, "encodes": 0, "decodes": 0, "verifier_calls": {VERIFIER: len(effects)}}
        made = [one | {"values": {}} for one in nodes]
        self.journal.commit([{"tree": "search", "request": {"kind": "Denoise"}, "price": self.nfe, "nodes": made, "effects": effects, "notes": [], "ledger": ledger, "engine": {}, "segments": [0, 0]}])

    def close(self) -> None:
        """Let go of the lock, as a killed process does."""
        self._stack.close()
