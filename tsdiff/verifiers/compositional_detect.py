"""Facts scored by what a detector has found, by GenEval's rules (Ghosh, Hajishirzi & Schmidt 2023, arXiv 2310.11513).

Whole facts score 1 if they hold; numbers and colours score in part, so that a search is told which way is better. A
picture satisfies GenEval exactly if all of its facts score 1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from tsdiff.treesearch.errors import UsageError
from tsdiff.verifiers.compositional_facts import COLORS, Fact

THRESHOLD = 0.3
COUNTING_THRESHOLD = 0.9
MOST_OBJECTS = 16
POSITION_THRESHOLD = 0.1
RELATIONS = ("left of", "right of", "above", "below")


@dataclass(frozen=True)
class Detection:
    """An object that a detector has found.

    Attributes:
      label: its class, in the singular.
      score: the detector's confidence, 0 to 1.
      box: left, top, right, bottom; y grows downward.
      color: its colour, None where it was not told.
    """

    label: str
    score: float
    box: tuple[float, float, float, float]
    color: str | None = None


def require_detectable(name: str, fact: Fact) -> None:
    """Raise UsageError for a fact that objects, colours and boxes cannot settle."""
    if fact.kind == "question" or (fact.kind == "attribute" and fact.attribute not in COLORS) or (fact.kind == "relation" and fact.relation not in RELATIONS):
        raise UsageError(f"{name}: a detector cannot judge {fact.name!r}; it tells objects, their number, colours and {', '.join(RELATIONS)}: use a question verifier")


def related(a: Detection, b: Detection) -> set[str]:
    """How one object stands to another, by the centres of their boxes: none, one or two of `RELATIONS`.

    The offset of the centres is shrunk, on each axis, by a tenth of the boxes' summed extents (not below 0), and divided
    by the length of the unshrunk offset; more than one half counts.
    """
    offset = [(a.box[i] + a.box[i + 2] - b.box[i] - b.box[i + 2]) / 2.0 for i in (0, 1)]
    extent = [a.box[i + 2] - a.box[i] + b.box[i + 2] - b.box[i] for i in (0, 1)]
    shrunk = [math.copysign(max(abs(o) - POSITION_THRESHOLD * e, 0.0), o) for o, e in zip(offset, extent, strict=True)]
    length = math.hypot(*offset)
    if max(map(abs, shrunk)) < 1e-3:
        return set()
    dx, dy = (part / length for part in shrunk)
    return {name for name, holds in zip(RELATIONS, (dx < -0.5, dx > 0.5, dy < -0.5, dy > 0.5), strict=True) if holds}


def score_facts(facts: Sequence[Fact], detections: Sequence[Detection]) -> list[float]:
    """Each fact's score in [0, 1]; 1 only if it holds. Where numbers are claimed only sure objects count."""
    counting = any(fact.kind in ("count", "absent") for fact in facts)
    least = COUNTING_THRESHOLD if counting else THRESHOLD

    def found(noun: str) -> list[Detection]:
        kept = [one for one in detections if one.label == noun and one.score > least]
        return sorted(kept, key=lambda one: -one.score)[:MOST_OBJECTS]

    return [_score(fact, found(fact.noun), found(fact.other)) for fact in facts]


def _score(fact: Fact, objects: Sequence[Detection], others: Sequence[Detection]) -> float:
    match fact.kind:
        case "object":
            return float(len(objects) >= 1)
        case "count":
            return 1.0 - abs(len(objects) - fact.count) / max(len(objects), fact.count)
        case "absent":
            return float(len(objects) < fact.count)
        case "attribute":
            wanted = "gray" if fact.attribute == "grey" else fact.attribute
            return min(1.0, sum(one.color is not None and one.color.replace("grey", "gray") == wanted for one in objects) / fact.count)
    group, targets = objects[: fact.count], others[: fact.other_count]
    if len(group) < fact.count or len(targets) < fact.other_count:
        return 0.0
    pairs = [(one, target) for one in group for target in targets if one is not target]
    return sum(fact.relation in related(one, target) for one, target in pairs) / len(pairs) if pairs else 0.0
