"""The prompt suite of the `gaussian` world."""

from __future__ import annotations

import math
from dataclasses import dataclass

from tsdiff.treesearch.protocols import Condition
from tsdiff.worlds.gaussian.presets import preset, prompt_near


@dataclass(frozen=True)
class RareModeSuite:
    """Twenty points to come near to: every mode's centre, the rare one first, then points 1 and 2 stds away from them.

    Attributes:
      name: as registered.
      description: one line for people.
      model, verifier: references of the model to search and the verifier to search with.
    """

    name: str = "gaussian/rare-mode"
    description: str = "find a given mode of a two-dimensional mixture; one sample in fifty comes from the rare one"
    model: str = "gaussian"
    verifier: str = "gaussian-target"

    def conditions(self) -> list[Condition]:
        """The prompts, always the same; `metadata["mode"]` is the class name of the nearest mode."""
        rare = preset("rare-mode")
        modes = [rare.good, *(k for k in range(rare.mixture.num_components) if k != rare.good)]
        conditions = []
        for number in range(20):
            mode = modes[number % len(modes)]
            radius = number // len(modes) * rare.mixture.stds[mode]
            angle = number * math.pi * (3.0 - math.sqrt(5.0))  # the golden angle: directions without a pattern
            x, y = rare.mixture.means[mode]
            point = (round(x + radius * math.cos(angle), 3), round(y + radius * math.sin(angle), 3))
            conditions.append(Condition(prompt=prompt_near(point), metadata={"mode": rare.class_names[mode]}))
        return conditions


rare_mode = RareModeSuite()
