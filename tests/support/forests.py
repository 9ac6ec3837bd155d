"""Allocators and policies made of functions, for tests of many trees under one budget."""

from __future__ import annotations

import json
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any

from fakes import Hooked, Judge

from tsdiff.treesearch.ledger import Cost, Spend
from tsdiff.treesearch.protocols import Grant
from tsdiff.treesearch.results import Result, Results
from tsdiff.treesearch.search import execute, prepare

PROMPTS = [f"near ({x}, {y})" for x, y in ((3, 2.4), (0, 0), (1, -2))]
STEPS = 5


@dataclass(frozen=True)
class Script:
    """An allocator made of a function of the forest."""

    allocate: Callable[[Any], Generator[Any, Any, None]]
    needs: frozenset[str] = frozenset()

    name = "script"

    def search(self, forest: Any) -> Any:
        return self.allocate(forest)

    def forecast(self, total_nfe: int, runs: int, setting: Any) -> Cost:
        return Cost(Spend(), Spend(total_nfe))


@dataclass(frozen=True)
class Ask:
    """A policy made of a function of the tree."""

    ask: Callable[[Any], Generator[Any, Any, Any]]
    name = "ask"

    def search(self, tree: Any) -> Any:
        return self.ask(tree)


def once(policy: Any, nfe: int) -> Script:
    """Grants every tree one search, and asserts what came of it."""

    def allocate(forest: Any) -> Any:
        outcomes = yield [Grant(tree, policy, nfe) for tree in forest.trees]
        for tree, outcome in zip(forest.trees, outcomes, strict=True):
            assert outcome.nfe == tree.budget.spent

    return Script(allocate)


def shared(allocate: Any, total: int = 90, prompts: Any = PROMPTS, model: Any = None, verifier: Any = None, **options: Any) -> Results:
    """The results of searches that share a budget as a function says."""
    allocator = allocate if isinstance(allocate, Script) else Script(allocate)
    options = {"steps": STEPS, "baseline": False, "eta": 1.0} | options
    return execute(prepare(model or Hooked(), prompts, policy=allocator, verifiers=verifier or Judge(), total_nfe=total, **options))


def bytes_of(result: Result) -> str:
    """All that is written down of a tree."""
    return json.dumps(result.tree.to_json(), sort_keys=True)
