"""Fill in what docs/families.md says of operations: of a network row and of a decode, for well-known architectures.

    python docs/make_flops_table.py

Nothing is downloaded; the configs are those of `tsdiff.diffusion.architectures`, and torch counts on its meta device.
"""

from __future__ import annotations

import re
from pathlib import Path

from tsdiff.diffusion.architectures import ARCHITECTURES
from tsdiff.treesearch.protocols import CountableOutline

TARGET = Path(__file__).with_name("families.md")
SIZES = {
    "sd15": (512, 768), "sdxl": (768, 1024), "sd3": (512, 1024), "sd35-large": (512, 1024), "flux-dev": (512, 1024), "pixart-sigma": (512, 1024),
    "dit-xl": (256,), "sit-xl": (256,),
}  # fmt: skip
"""Sides of the square pictures that people make, by architecture."""

_BLOCK = re.compile(r"(<!-- generated: operations -->\n).*?(<!-- end -->)", re.DOTALL)


def table() -> str:
    """The table, in Markdown."""
    lines = ["| model | pixels | text tokens | a row, TFLOP | a decode, TFLOP | a decode in rows |", "| --- | --- | --- | --- | --- | --- |"]
    for name, sides in SIZES.items():
        outline = ARCHITECTURES[name].outline()
        assert isinstance(outline, CountableOutline)
        for side in sides:
            flops = outline.flops(outline.size(side, side))
            assert flops is not None
            lines.append(f"| {ARCHITECTURES[name].title} | {side} x {side} | {_tokens(outline)} | {flops.row / 1e12:.3g} | {flops.decode / 1e12:.3g} | {flops.decode / flops.row:.2g} |")
    return "\n".join(lines)


def _tokens(outline: object) -> str:
    """Length of the text that a row reads."""
    row = outline.row()  # type: ignore[attr-defined]
    return next((str(len(tensor)) for tensor in row.values() if tensor.dim() == 2), "none")


def filled_in(page: str) -> str:
    """The page with its table as it should be."""
    return _BLOCK.sub(lambda block: f"{block[1]}\n{table()}\n\n{block[2]}", page)


if __name__ == "__main__":
    TARGET.write_text(filled_in(TARGET.read_text(encoding="utf-8")), encoding="utf-8")
