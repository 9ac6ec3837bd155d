"""The prompt suites of the `shapes` world."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache

from tsdiff.treesearch.noise import derive
from tsdiff.treesearch.protocols import Condition
from tsdiff.worlds.shapes.grammar import KINDS
from tsdiff.worlds.shapes.scenes import every_prompt, is_held_out

PER_KIND = 20
"""Prompts of each kind in a suite."""

_POOL = 400  # of how many prompts a suite's are chosen, where a kind has more


@dataclass(frozen=True)
class ShapesSuite:
    """Twenty prompts of each kind, always the same, chosen so that words occur about equally often.

    Attributes:
      name: as registered.
      description: one line for people.
      held_out: whether the prompts name compositions that training never shows.
      model, verifier: references of the model to search and the verifier to search with.
    """

    name: str
    description: str
    held_out: bool
    model: str = "shapes"
    verifier: str = "shapes-oracle"

    def conditions(self) -> list[Condition]:
        """The prompts, kind by kind; `metadata["tag"]` is the kind, as GenEval calls it."""
        return [
            Condition(prompt=text, metadata={"tag": kind, "held_out": self.held_out})
            for kind in KINDS
            for text in _chosen(kind, self.held_out)
        ]


@cache
def _chosen(kind: str, held_out: bool) -> tuple[str, ...]:
    """The prompts of a kind; none where no prompt of the kind can be held out."""
    texts = [text for prompt in every_prompt(kind) if is_held_out(prompt) == held_out for text in prompt.phrasings]
    return _balanced(texts)


def _balanced(texts: Iterable[str]) -> tuple[str, ...]:
    """`PER_KIND` texts: each next one has the words used least so far, ties by a fixed hash."""
    pool = sorted(texts, key=lambda text: derive("suite", text))[:_POOL]
    used: Counter[str] = Counter()
    chosen: list[str] = []
    while pool and len(chosen) < PER_KIND:
        best = min(pool, key=lambda text: sum(used[word] for word in _words(text)))
        pool.remove(best)
        chosen.append(best)
        used.update(_words(best))
    return tuple(chosen)


def _words(text: str) -> list[str]:
    """What to balance: each word together with its place, so that order is balanced too. Articles do not matter."""
    words = [word for word in re.findall(r"\w+", text) if word not in ("a", "an", "and", "of")]
    return [*words, *(f"{place} {word}" for place, word in enumerate(words))]


seen = ShapesSuite("shapes/seen", "coloured shapes, nine kinds of prompts; every composition occurs in training", held_out=False)
unseen = ShapesSuite("shapes/unseen", "pairs of coloured shapes that training never shows together; four kinds of prompts", held_out=True)
