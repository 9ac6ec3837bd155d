"""The stages of a coarse-to-fine search: what one says, and how a TOML file of them is read."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import pairwise
from pathlib import Path
from typing import Any

from tsdiff.treesearch.errors import UsageError, unknown_name
from tsdiff.treesearch.parameters import check, parameter
from tsdiff.treesearch.protocols import FINAL


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One stage: every survivor of the stage before gets children, which are denoised, valued, and thinned out.

    Attributes:
      levels: where children part and where they are valued, as shares of the schedule from noise (0) to clean (1).
        Survivors that stand at a cleaner level are re-noised to the first one.
      num_steps: steps between the two at most, evenly spread; None takes every level of the schedule.
      branch: children of every survivor (of the first stage: of every first noise).
      keep: children that survive, at most; of the last stage the answer alone.
      lookahead: steps of a deterministic look-ahead whose result is valued; 0 values the clean estimate.
      verifier: the role of the verifier that values them.
      share: of a budget, in proportion to the other stages' shares.
    """

    levels: tuple[float, float] = parameter((0.0, 1.0), low=0.0, high=1.0)
    num_steps: int | None = parameter(None, low=1)
    branch: int = parameter(1, low=1)
    keep: int = parameter(1, low=1)
    lookahead: int = parameter(0, low=0)
    verifier: str = FINAL
    share: float = parameter(1.0, above=0.0)

    def __post_init__(self) -> None:
        check(self)
        start, stop = self.levels
        if not start < stop:
            raise UsageError(f"Stage: levels is {list(self.levels)} but denoising must lead up, from the first to a second above it")
        if re.fullmatch(r"[A-Za-z][\w-]*", self.verifier) is None:
            raise UsageError(f"Stage: verifier is {self.verifier!r} but must be the name of a role: a letter, then letters, digits, - or _")


DEFAULT_STAGES = (
    Stage(levels=(0.0, 0.3), num_steps=3, keep=4, lookahead=4, verifier="layout"),
    Stage(levels=(0.1, 0.5), num_steps=6, branch=2, keep=2, lookahead=4),
    Stage(levels=(0.35, 0.7), branch=4),
    Stage(levels=(0.6, 1.0), branch=8),
)
"""Layout first, in few steps and by a look-ahead; then three refinements that go back less and less far."""


# Reading -------------------------------------------------------------------------------------------------------------

_KINDS: dict[str, tuple[str, Any]] = {
    "levels": ("a list of two numbers", lambda value: isinstance(value, (list, tuple)) and len(value) == 2 and all(map(_number, value))),
    "num_steps": ("a whole number", lambda value: _whole(value) or value is None),
    "branch": ("a whole number", lambda value: _whole(value)),
    "keep": ("a whole number", lambda value: _whole(value)),
    "lookahead": ("a whole number", lambda value: _whole(value)),
    "verifier": ("the name of a role, as text", lambda value: isinstance(value, str)),
    "share": ("a number", lambda value: _number(value)),
}


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _number(value: Any) -> bool:
    return _whole(value) or (isinstance(value, float) and abs(value) < float("inf"))


def make_stages(given: str | Path | Sequence[Any] | None) -> tuple[Stage, ...]:
    """Stages from a TOML file, from stages (or tables with a stage's fields), or the default ones.

    Raises:
      UsageError: naming the file and the entry.
    """
    if given is None:
        return DEFAULT_STAGES
    source = "stages" if not isinstance(given, (str, Path)) else str(given)
    entries = _read(Path(given)) if isinstance(given, (str, Path)) else given
    stages = tuple(entry if isinstance(entry, Stage) else _stage(source, number, entry) for number, entry in enumerate(entries, 1))
    _check_order(source, stages)
    return stages


def _read(path: Path) -> list[Any]:
    try:
        with path.open("rb") as file:
            content = tomllib.load(file)
    except OSError as error:
        raise UsageError(f"stages file {path} cannot be read ({error.strerror}); check its name and its rights") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"stages file {path} is not UTF-8 (byte {error.start}); save it as UTF-8") from error
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"stages file {path} is not TOML: {error}") from error
    for key in content:
        if key != "stages":
            raise unknown_name(f"key of {path}:", key, ["stages"], "Each stage is a table headed [[stages]].")
    entries = content.get("stages", [])
    if not isinstance(entries, list):
        raise UsageError(f"{path}: stages is {entries!r} but must be a list of tables, each headed [[stages]]")
    return entries


def _stage(source: str, number: int, entry: Any) -> Stage:
    where = f"{source}: stage {number}"
    if not isinstance(entry, Mapping):
        raise UsageError(f"{where} is {entry!r} but must be a table, headed [[stages]]")
    known = [field.name for field in fields(Stage)]
    for key, value in entry.items():
        if key not in known:
            raise unknown_name(f"key of {where}:", key, known)
        words, fits = _KINDS[key]
        if not fits(value):
            raise UsageError(f"{where}: {key} is {value!r} but must be {words}")
    if "levels" not in entry:
        raise UsageError(f"{where} has no levels; say where its children part and where they are valued, e.g. levels = [0.1, 0.5]")
    options: dict[str, Any] = {key: tuple(value) if key == "levels" else value for key, value in entry.items()}
    try:
        return Stage(**options)
    except UsageError as error:
        raise UsageError(f"{where}{str(error).removeprefix(Stage.__name__)}") from None


def _check_order(source: str, stages: Sequence[Stage]) -> None:
    """Stages lead from noise to clean samples, each further than the one before."""
    if not stages:
        raise UsageError(f"{source}: there is no stage; give at least one, headed [[stages]]")
    first, last = stages[0], stages[-1]
    if first.levels[0] != 0.0:
        raise UsageError(f"{source}: stage 1 starts at {first.levels[0]:g} but must start at 0, from the first noises")
    for number, (before, stage) in enumerate(pairwise(stages), 2):
        if stage.levels[0] > before.levels[1]:
            raise UsageError(
                f"{source}: stage {number} starts at {stage.levels[0]:g} but the survivors of stage {number - 1} stand at {before.levels[1]:g}; start there or below"
            )
        if stage.levels[1] <= before.levels[1]:
            raise UsageError(f"{source}: stage {number} ends at {stage.levels[1]:g} but must end above {before.levels[1]:g}, where stage {number - 1} ends")
    if last.levels[1] != 1.0:
        raise UsageError(f"{source}: the last stage ends at {last.levels[1]:g} but must end at 1, with finished samples")
    for key, only in (("keep", 1), ("lookahead", 0), ("verifier", FINAL)):
        if getattr(last, key) != only:
            raise UsageError(f"{source}: the last stage's {key} is {getattr(last, key)!r} but must be {only!r}: it makes the samples that the answer is chosen from")
