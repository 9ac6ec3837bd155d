"""Verifiers to try policies with: scores that fail, tie, are ranks, or differ in their last bits from batch to batch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from tsdiff.treesearch.protocols import Candidates, Condition, Scores


@dataclass(frozen=True)
class NearOrigin:
    """Minus the distance of the clean estimate to the origin: a verifier for any model's latents.

    Attributes:
      fail_every: every n-th score fails, counted by what is scored and not by the batch; 0 for none, 1 for all.
      failure: what a failing row gives: not a number, an infinity, or an exception.
      ties: every score is 0.
      rounding: relative size of an error that depends on a row's place in its batch, as rounding errors do.
      scope: "row", or "set" for ranks among what is scored together.
      needs: "images" too costs decodes.
    """

    fail_every: int = 0
    failure: Literal["nan", "infinity", "error"] = "nan"
    ties: bool = False
    rounding: float = 0.0
    scope: Literal["row", "set"] = "row"
    name: str = "near-origin"
    needs: frozenset[str] = frozenset({"x0", "node_ids"})
    latency: Literal["immediate"] = "immediate"
    judges: Literal["any"] = "any"
    differentiable: bool = False

    def prepare(self, device: str) -> None:
        """There are no weights."""

    def check(self, condition: Condition) -> None:
        """Any condition will do."""

    def score(self, candidates: Candidates) -> Scores:
        """Minus the Euclidean norm of each x0.

        Raises:
          ArithmeticError: if a row is to fail by an error.
        """
        values = [0.0 if self.ties else -float(x0.double().norm()) for x0 in candidates.x0]
        if self.scope == "set":
            ranked = sorted(values)
            values = [float(ranked.index(value)) for value in values]
        count = len(values)
        values = [value * (1.0 + self.rounding * ((place + count) % 5 - 2)) for place, value in enumerate(values)]
        failing = [self.fail_every > 0 and int(node_id, 16) % self.fail_every == 0 for node_id in candidates.node_ids]
        if self.failure == "error" and any(failing):
            raise ArithmeticError("this verifier fails on purpose")
        spoiled = float("nan") if self.failure == "nan" else float("inf")
        return Scores([spoiled if fails else value for value, fails in zip(values, failing, strict=True)])
