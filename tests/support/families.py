"""The tiny pipelines of all families under one name each, for what they have in common."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tiny_dit import tiny_dit, tiny_pixart
from tiny_flux import tiny_flux
from tiny_sd import tiny_stable_diffusion
from tiny_sd3 import tiny_sd3
from tiny_sdxl import tiny_sdxl

from tsdiff.treesearch.protocols import Condition

PIPELINES: dict[str, Callable[..., Any]] = {
    "sd": tiny_stable_diffusion,
    "sdxl": tiny_sdxl,
    "sd3": tiny_sd3,
    "flux": tiny_flux,
    "pixart": tiny_pixart,
    "dit": tiny_dit,
}


def condition(family: str, number: int = 0) -> Condition:
    """A condition that a family takes, another for each number."""
    if family == "dit":
        return Condition(f"class {number}", class_label=number)
    extra = {"max_sequence_length": 8} if family in ("sd3", "flux", "pixart") else {}
    return Condition(f"cat {number}", negative_prompt="blurry", extra=extra)


def guidance(family: str) -> dict[str, float]:
    """Options of a guided search: two rows for each evaluation."""
    return {"true_cfg_scale": 3.0} if family == "flux" else {"guidance_scale": 3.0}
