"""Verifiers of your own: a class that reads clean latents, registered by name, and a plain function of images.

The class steers the search; the function only judges the finished sample, as every further verifier does.

    python examples/custom_verifier.py
"""

from dataclasses import dataclass
from typing import ClassVar

import tsdiff
from tsdiff.plugin import Scores, check, parameter, register_verifier


@register_verifier
@dataclass(frozen=True, kw_only=True)
class Ring:
    """Closeness of a point to a circle around the origin: minus the squared distance, at most 0."""

    name: ClassVar[str] = "ring"
    needs: ClassVar[frozenset[str]] = frozenset({"x0"})  # nothing is decoded for it
    scope: ClassVar[str] = "row"  # a score depends on its own row alone
    latency: ClassVar[str] = "immediate"
    judges: ClassVar[str] = "any"  # clean estimates of any level, not finished samples only
    differentiable: ClassVar[bool] = True

    radius: float = parameter(3.0, above=0.0, help="of the circle")

    def __post_init__(self):
        check(self)

    def prepare(self, device):
        """Called once, when all options are checked: load weights here."""

    def check(self, condition):
        """Any prompt will do; raise UsageError for one that cannot be judged."""

    def score(self, candidates):
        """Score a batch: one number for each row, higher is better; parts are optional and kept with the score."""
        radii = candidates.x0.norm(dim=-1)  # [B]
        return Scores(-((radii - self.radius) ** 2), parts={"radius": radii})


def brightness(images, prompts):
    """Images (B, 3, H, W) in [0, 1] and B prompts -> B scores."""
    return images.mean(dim=(1, 2, 3))


def main():
    """Points of the mixture that lie on a circle where the data is thin."""
    result = tsdiff.search("gaussian", verifier=["ring:radius=2.8", brightness], policy="beam", nfe=400)
    for name in ("ring", "brightness"):
        value = result.scores[name]
        parts = "".join(f", {part} {number:.3f}" for part, number in (value.parts or {}).items())
        print(f"{name:10} {value.score:8.5f}{parts}")
    print(f"one sample {result.first_score:8.5f}")


if __name__ == "__main__":
    main()
