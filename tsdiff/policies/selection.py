"""What policies that keep the best few share: who survives, what is let go, how a remainder is dealt out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence

from tsdiff.treesearch.node import Node
from tsdiff.treesearch.requests import Release


def best_first(nodes: Sequence[Node], values: Sequence[float | None]) -> list[int]:
    """The places of `nodes`, the highest value first. Null scores rank last, ties break by age; failed nodes are left out."""
    places = (place for place, node in enumerate(nodes) if not node.failed)
    return sorted(places, key=lambda place: (-value if (value := values[place]) is not None else float("inf"), nodes[place].index))


def survivors(
    nodes: Sequence[Node], values: Sequence[float | None], count: int, families: Sequence[Hashable] = (), per_family: int | None = None
) -> list[Node]:
    """The `count` best nodes, best first, at most `per_family` of one family (`families` names each node's)."""
    taken: Counter[Hashable] = Counter()
    chosen: list[Node] = []
    for place in best_first(nodes, values):
        if len(chosen) == count:
            break
        if per_family is not None:
            if taken[families[place]] == per_family:
                continue
            taken[families[place]] += 1
        chosen.append(nodes[place])
    return chosen


def let_go(nodes: Sequence[Node], keep: Sequence[Node | None]) -> Release:
    """The request that releases what is still open of `nodes`, once each, except `keep`."""
    return Release([node for node in dict.fromkeys(nodes) if node not in keep and node.status == "open"])


def dealt(extra: int, rounds: int, number: int) -> int:
    """How many of `extra` further candidates round `number` (from 0) gets when all rounds get them in turn, the first first."""
    return extra // rounds + (number < extra % rounds) if rounds else 0
