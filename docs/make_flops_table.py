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
SIZES: dict[str, tuple[tuple[int, ...], ...]] = {
    "sd15": ((512, 512), (768, 768)), "sdxl": ((768, 768), (1024, 1024)), "sd3": ((512, 512), (1024, 1024)), "sd35-large": ((512, 512), (1024, 1024)),
    "flux-dev": ((512, 512), (1024, 1024)), "pixart-sigma": ((512, 512), (1024, 1024)), "dit-xl": ((256, 256),), "sit-xl": ((256, 256),),
    "ltx-video": ((480, 704, 121), (512, 704, 161)),
}  # fmt: skip
"""Height and width, and frames of videos, that people make, by architecture."""

_BLOCK = re.compile(r"(<!-- generated: operations -->\n).*?(<!-- end -->)", re.DOTALL)


def table() -> str:
    """The table, in Markdown."""
    lines = ["| model | pixels | text tokens | a row, TFLOP | a decode, TFLOP | a decode in rows |", "| --- | --- | --- | --- | --- | --- |"]
    for name, sizes in SIZES.items():
        outline = ARCHITECTURES[name].outline()
        assert isinstance(outline, CountableOutline)
        for size in sizes:
            flops = outline.flops(outline.size(*size))
            assert flops is not None
            pixels = " x ".join(map(str, size[:2])) + "".join(f", {frames} frames" for frames in size[2:])
            lines.append(f"| {ARCHITECTURES[name].title} | {pixels} | {_tokens(outline)} | {flops.row / 1e12:.3g} | {flops.decode / 1e12:.3g} | {flops.decode / flops.row:.2g} |")
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
