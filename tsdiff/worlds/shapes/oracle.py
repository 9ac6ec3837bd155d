"""The verifier of the `shapes` world: does a picture show what its prompt says, fact by fact?"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

from tsdiff.treesearch.errors import UsageError
from tsdiff.treesearch.parameters import check
from tsdiff.treesearch.protocols import Candidates, Condition, Need, Scores
from tsdiff.worlds.shapes.facts import Verdict
from tsdiff.worlds.shapes.grammar import KINDS, explain, read, warn


@dataclass(frozen=True, kw_only=True)
class ShapesOracle:
    """The share of the prompt's atomic facts that a picture bears out, in [0, 1]; 1 exactly if it bears out all.

    Facts are the existence or number of each group of objects, its colour, relations, and that there is nothing else;
    some hold in part (two circles of three, a relation missed by a few pixels). Each is a part of the score by its own
    name, and the part "satisfied" is 1 or 0. Pictures are 64 x 64 and judged by `checker.look`, which was fitted on
    drawings alone. Words that the world does not have are warned of and left out.
    """

    name: ClassVar[str] = "shapes-oracle"
    needs: ClassVar[frozenset[Need]] = frozenset({"images", "conditions"})
    scope: ClassVar[Literal["row", "set"]] = "row"
    latency: ClassVar[Literal["immediate", "pending"]] = "immediate"
    judges: ClassVar[Literal["any", "final"]] = "any"
    differentiable: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check(self)

    def prepare(self, device: str) -> None:
        """Load the checker; it works on the CPU, whatever the device."""
        from tsdiff.worlds.shapes.checker import network

        network()

    def check(self, condition: Condition) -> None:
        """Warn of words that the world does not have.

        Raises:
          UsageError: if the prompt names no shape, so that there is nothing to judge.
        """
        if not read(condition.prompt).prompt.groups:
            reason = explain(condition.prompt) if condition.prompt else f"the prompt is empty; say for example {KINDS['color_position']!r}"
            raise UsageError(f"{self.name} has nothing to judge: {reason}")
        warn(condition.prompt)

    def score(self, candidates: Candidates) -> Scores:
        """Score pictures (B, 3, 64, 64).

        Parts hold NaN in rows whose prompt does not claim that fact. A row whose pixels are not finite fails alone.

        Raises:
          UsageError: if the pictures have another size.
        """
        from tsdiff.worlds.shapes.checker import look

        pictures = candidates.images.detach().float().cpu().permute(0, 2, 3, 1).contiguous().numpy()
        verdicts: list[Verdict | None] = []
        reasons: dict[int, str] = {}
        for row, (picture, condition) in enumerate(zip(pictures, candidates.conditions, strict=True)):
            if math.isfinite(float(picture.sum(dtype="float64"))):
                verdicts.append(read(condition.prompt).prompt.judge(look(picture)))
            else:
                verdicts.append(None)
                reasons[row] = "the picture holds numbers that are not finite"
        nan = float("nan")
        names = dict.fromkeys(name for verdict in verdicts if verdict for name in verdict.parts)
        parts = {name: [verdict.parts.get(name, nan) if verdict else nan for verdict in verdicts] for name in names}
        parts["satisfied"] = [float(verdict.satisfied) if verdict else nan for verdict in verdicts]
        return Scores([verdict.score if verdict else nan for verdict in verdicts], parts=parts, reasons=reasons)
