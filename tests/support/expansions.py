"""Searches in folders for tests of expansions, and a policy that makes every kind of move."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from faulty_disk import QuickDisk
from safetensors.torch import load_file
from torch import Tensor

from tsdiff.treesearch.expand import carry_out
from tsdiff.treesearch.expansion import Asked, planned_expansion
from tsdiff.treesearch.ledger import Cost, Spend
from tsdiff.treesearch.noise import Mix, Rotate, Slerp
from tsdiff.treesearch.rebuild import rebuild
from tsdiff.treesearch.requests import Denoise, Draw, Perturb, Release, Renoise, Score
from tsdiff.treesearch.results import Result
from tsdiff.treesearch.search import execute, prepare
from tsdiff.treesearch.tree import Tree

PROMPT = "near (3, 2.4)"
QUICK = QuickDisk()
DERIVED = ("tree.json", "baseline.json", "latents.safetensors", "best.png", "baseline.png")


@dataclass(frozen=True, kw_only=True)
class AllMoves:
    """Paths of every kind of move, whose middles are released: what they need is computed again, or not at all."""

    name: ClassVar[str] = "all-moves"
    size_parameters: ClassVar[tuple[str, ...]] = ()
    needs: ClassVar[frozenset[str]] = frozenset()

    def search(self, tree: Any) -> Any:
        last = tree.schedule.last
        roots = yield Draw(2)
        roots += yield Draw(3, [Rotate(0, 0.9, 7), Mix({0: 0.6}, fresh=(3, 0.8)), Slerp(0, 1, 0.25)])
        middle = yield Denoise(roots, to=3)
        far = yield Denoise(middle[:2], to=last - 1, via=[4])
        back = yield Renoise(far, to=2, copies=2)
        clean = yield Renoise(middle[2:], to=1, source="x0")
        moved = yield Perturb(middle[:1], scale=0.5)
        again = yield Denoise([*back, *clean, *moved], to=4)
        yield Score(again, at="lookahead", num_steps=1)
        leaves = yield Denoise(again, to=last)
        yield Score(leaves)
        yield Release([*roots, *middle, *far, *back, *clean, *moved, *again, *leaves[1:]])
        return tree.best()

    def cost(self, setting: Any) -> Cost:
        return Cost.exactly(Spend())

    def fit(self, nfe: int, setting: Any) -> AllMoves:
        return self


def begin(out: Path, prompts: Any = PROMPT, *, model: Any = "gaussian", disk: Any = QUICK, **options: Any) -> Path:
    """Search, recorded in `out/run-0001`."""
    options = {"deterministic": True, "steps": 6, "max_batch": 4, "policy": "best-of-n"} | options
    if options["policy"] == "best-of-n":
        options.setdefault("policy_options", {"n": 2})
    results = execute(prepare(model, prompts, out=out, **options), disk=disk, sync_seconds=0.0)
    if results.failures:
        raise results.failures[0].error
    return out / "run-0001"


def expand(folder: Path, node: Any = "best", *, disk: Any = QUICK, stop: Any = lambda: False, model: Any = None, **how: Any) -> Result:
    """Expand a run through a disk that does not wait."""
    changeable = {name: how.pop(name) for name in ("max_batch", "memory_limit", "seconds") if name in how}
    given = {"model": model, "policy": how.get("policy"), "verifier": how.get("verifiers"), **changeable}
    with planned_expansion(folder, Asked(node, **how), disk=disk, **given) as expansion:
        return carry_out(expansion, disk=disk, sync_seconds=0.0, stop=stop)


def go_on(folder: Path, disk: Any = QUICK, **given: Any) -> Result:
    """Continue an expansion that was interrupted."""
    with planned_expansion(folder, None, disk=disk, **given) as expansion:
        return carry_out(expansion, disk=disk, sync_seconds=0.0)


def derived(folder: Path) -> dict[str, bytes]:
    """The files that an interruption must not change."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.name in DERIVED}


def latents(folder: Path) -> dict[int, Tensor]:
    """The latents that a run has kept."""
    return {int(name.removeprefix("node/")): tensor for name, tensor in load_file(folder / "latents.safetensors").items()}


def tree_of(folder: Path) -> dict[str, Any]:
    """What a run's `tree.json` says."""
    return json.loads((folder / "tree.json").read_text())


def empty_tree(**options: Any) -> Tree:
    """A tree of a run before anything has grown."""
    plan = prepare("gaussian", PROMPT, **{"steps": 6} | options)
    return Tree(plan.schedule, plan.solver, plan.conditions[0], seed=plan.seeds[0], verifier=plan.verifiers[0].name)


def rebuilt_as(folder: Path, **options: Any) -> bool:
    """Whether a journal alone gives the tree that was written."""
    tree = empty_tree(**options)
    rebuilt = rebuild(folder, tree)
    result = json.loads((folder / "run.json").read_text())["result"]
    return json.loads(json.dumps(tree.to_json())) == tree_of(folder) and rebuilt.best().index == result["node"] and not rebuilt.tail
