"""Ready-made mixtures, and the prompts that this world understands."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from tsdiff.treesearch.errors import UsageError, unknown_name
from tsdiff.worlds.gaussian.mixture import Mixture

DEFAULT_PRESET = "rare-mode"
EXAMPLE_PROMPT = "near (3, 2.4)"


@dataclass(frozen=True)
class Preset:
    """A mixture with names for its components (the classes) and the component that a search should find."""

    mixture: Mixture
    class_names: tuple[str, ...]
    good: int


def _rare_mode() -> Preset:
    """Eight equal modes on a ring of radius 2, and a ninth outside it that one sample in fifty comes from."""
    angles = [2.0 * math.pi * k / 8 for k in range(8)]
    ring = [(round(2.0 * math.cos(angle), 6), round(2.0 * math.sin(angle), 6)) for angle in angles]
    mixture = Mixture([0.98 / 8] * 8 + [0.02], [*ring, (3.0, 2.4)], [0.2] * 9)
    return Preset(mixture, (*(f"ring{k}" for k in range(8)), "rare"), good=8)


def _two_modes() -> Preset:
    """One dimension, a common and a less common mode: small enough to check on paper. Has no pictures."""
    return Preset(Mixture([0.75, 0.25], [(-1.0,), (1.5,)], [0.5, 0.3]), ("left", "right"), good=1)


PRESETS = {"rare-mode": _rare_mode(), "two-modes": _two_modes()}


def preset(name: str) -> Preset:
    """A preset by name. Raises UsageError naming the nearest."""
    if name not in PRESETS:
        raise unknown_name("preset of the gaussian world", name, PRESETS)
    return PRESETS[name]


def class_index(label: int | str | None, num_classes: int, names: tuple[str, ...] = ()) -> int | None:
    """The component that a class label (a number, also as text, or a name) stands for; None for no label.

    Raises:
      UsageError: if there is no such class.
    """
    if label is None:
        return None
    if isinstance(label, str) and label in names:
        return names.index(label)
    if isinstance(label, int) or label.isdecimal():
        if 0 <= int(label) < num_classes:
            return int(label)
        raise UsageError(f"class {label} does not exist; classes run from 0 to {num_classes - 1}")
    raise unknown_name("class", label, names, f"Numbers from 0 to {num_classes - 1} are classes too.")


def prompt_near(point: Sequence[float]) -> str:
    """The prompt that asks for samples near a point."""
    return f"near ({', '.join(f'{number:g}' for number in point)})"


def parse_target(prompt: str, dim: int | None = None) -> tuple[float, ...]:
    """The point that a prompt "near (x, y)" names.

    Raises:
      UsageError: for any other text, or a point that has not `dim` (None: any number of) finite numbers.
    """
    example = EXAMPLE_PROMPT if dim in (None, 2) else prompt_near(range(1, dim + 1))
    count = "finite numbers" if dim is None else f"{dim} finite number{'s' * (dim != 1)}"
    advice = f'the gaussian world understands only "near (...)" with {count}, for example "{example}"'
    match = re.fullmatch(r"\s*near\s*\(([^()]*)\)\s*", prompt)
    try:
        point = tuple(float(number) for number in match.group(1).split(",")) if match else ()
    except ValueError:
        point = ()
    if not point or dim not in (None, len(point)) or not all(math.isfinite(number) for number in point):
        raise UsageError(f"cannot read the prompt {prompt!r}: {advice}")
    return point
