"""How much contrast an image has."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from tsdiff.plugin import Candidates, Condition, Scores


@dataclass(frozen=True)
class RmsContrast:
    """Standard deviation of the luma (Rec. 709 weights) of an image: 0 for a plain one, at most 0.5.

    Source: root-mean-square contrast, Peli 1990, "Contrast in complex images".
    """

    name: ClassVar[str] = "rms-contrast"
    needs: ClassVar[frozenset[str]] = frozenset({"images"})
    scope: ClassVar[Literal["row", "set"]] = "row"  # a score depends on its own row alone
    latency: ClassVar[Literal["immediate", "pending"]] = "immediate"
    judges: ClassVar[Literal["any", "final"]] = "any"  # clean estimates of any level, not finished samples only
    differentiable: ClassVar[bool] = True

    def prepare(self, device: str) -> None:
        """There are no weights to load."""

    def check(self, condition: Condition) -> None:
        """Any prompt will do."""

    def score(self, candidates: Candidates) -> Scores:
        """One number in [0, 0.5] for each image (B, 3, H, W) in [0, 1]; `brightness` is the mean luma."""
        red, green, blue = candidates.images.unbind(1)
        luma = 0.2126 * red + 0.7152 * green + 0.0722 * blue  # (B, H, W)
        return Scores(luma.flatten(1).std(1, correction=0), parts={"brightness": luma.flatten(1).mean(1)})
