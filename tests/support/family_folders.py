"""Every family as a folder, tiny, and what a search of it asks for: what they have in common is tested on these."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import families
from safetensors.torch import save_file
from sit_reference import HEADS, checkpoint, tiny_vae_folder
from tiny_ltx import tiny_ltx

from tsdiff.diffusion.sit_checkpoint import convert
from tsdiff.treesearch.protocols import Condition


def tiny_sit(folder: Path) -> None:
    """A converted checkpoint with latents (4, 8, 8) and 10 classes, in a folder that is not there yet."""
    with TemporaryDirectory() as parts:
        save_file(checkpoint(), f"{parts}/sit.safetensors")
        convert(Path(parts, "sit.safetensors"), folder, vae=tiny_vae_folder(Path(parts, "vae")), heads=HEADS)


FOLDERS: dict[str, Callable[[Path], Any]] = {**families.PIPELINES, "sit": tiny_sit, "ltx": tiny_ltx}
"""Writes a family's folder."""


def kept_in(root: Path) -> Callable[[str], Path]:
    """Where the folder of a family is, made when it is first asked for; tests must not change them."""

    def folder(family: str) -> Path:
        if not (root / family).exists():
            FOLDERS[family](root / family)
        return root / family

    return folder


OF_CLASSES = ("dit", "sit")
"""Families that are conditioned on a class."""


def condition(family: str, number: int = 0) -> Condition:
    """A condition that a family takes, another for each number."""
    if family in OF_CLASSES:
        return Condition(f"class {number}", class_label=number)
    if family == "ltx":
        return Condition(f"cat {number}", negative_prompt="blurry", extra={"max_sequence_length": 8})
    return families.condition(family, number)


def guidance(family: str) -> dict[str, float]:
    """Options of a guided search: two rows for each evaluation."""
    return families.guidance(family)


def asked(family: str) -> dict[str, int]:
    """The size of a sample, for `tsdiff.search`."""
    return {"height": 32, "width": 32, "frames": 5} if family == "ltx" else {"height": 16, "width": 16}


def size(family: str) -> tuple[int, ...]:
    """The same, for outlines."""
    return tuple(asked(family).values())
