"""All model families by name, for what they have in common: a family that has a line here gets the tests of all."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from family import Family
from family_dit import DIT
from family_flux import FLUX
from family_ltx import LTX
from family_pixart import PIXART
from family_sd import SD
from family_sd3 import SD3
from family_sdxl import SDXL
from family_sit import SIT

from tsdiff.treesearch.protocols import Condition

FAMILIES: dict[str, Family] = {one.name: one for one in (SD, SDXL, SD3, FLUX, PIXART, LTX, DIT, SIT)}

PIPELINES: dict[str, Callable[..., Any]] = {name: one.make for name, one in FAMILIES.items() if one.make is not None and not one.video}
"""The tiny pipelines of families of images."""


def condition(family: str, number: int = 0) -> Condition:
    """A condition that a family takes, another for each number."""
    if family == "dit":
        return Condition(f"class {number}", class_label=number)
    extra = {"max_sequence_length": 8} if family in ("sd3", "flux", "pixart") else {}
    return Condition(f"cat {number}", negative_prompt="blurry", extra=extra)


def guidance(family: str) -> dict[str, float]:
    """Options of a guided search: two rows for each evaluation."""
    return FAMILIES[family].guided(3.0)
