"""Text on pictures: in the font that comes with matplotlib, without what it cannot show, cut to the room there is."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from tsdiff.viewer.figures.paper import require_matplotlib

if TYPE_CHECKING:
    from PIL.ImageFont import FreeTypeFont

MISSING = "□"


def plain(text: object, most: int | None = None) -> str:
    """Text as one line that the font can show: control characters are spaces, what it lacks is a box.

    Args:
      most: characters at most; the last is an ellipsis where something was cut.
    """
    known = _letters()
    shown = "".join(character if ord(character) in known else MISSING if character.isprintable() else " " for character in str(text))
    line = " ".join(shown.split())
    return line if most is None or len(line) <= most else f"{line[: most - 1].rstrip()}…"


def wrapped(text: str, font: FreeTypeFont, width: float, lines: int) -> list[str]:
    """Plain text in at most `lines` lines of a width in pixels; the last ends in an ellipsis if there is more."""
    found: list[str] = []
    rest = text.split()
    while rest and len(found) < lines:
        count = len(rest)
        if len(found) < lines - 1:
            count = next((number for number in range(len(rest), 0, -1) if font.getlength(" ".join(rest[:number])) <= width), 1)
        found.append(fitted(" ".join(rest[:count]), font, width))
        rest = rest[count:]
    return found


def fitted(text: str, font: FreeTypeFont, width: float) -> str:
    """Plain text, cut to a width in pixels."""
    if font.getlength(text) <= width:
        return text
    low, high = 0, len(text)
    while low < high:
        middle = (low + high + 1) // 2
        if font.getlength(f"{text[:middle].rstrip()}…") <= width:
            low = middle
        else:
            high = middle - 1
    return f"{text[:low].rstrip()}…"


def points(text: str, size: float, *, bold: bool = False) -> float:
    """Width of plain text in a figure, in points, at a size in points."""
    return font(100, bold=bold).getlength(text) * size / 100.0


@cache
def font(size: int, *, bold: bool = False) -> FreeTypeFont:
    """The font in a size in pixels. Raises SetupError without matplotlib."""
    from PIL import ImageFont

    return ImageFont.truetype(_font_file("DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"), size, layout_engine=ImageFont.Layout.BASIC)


@cache
def _letters() -> frozenset[int]:
    """The code points that the font can show, but for control characters."""
    require_matplotlib()
    from matplotlib.ft2font import FT2Font

    return frozenset(code for code in FT2Font(_font_file("DejaVuSans.ttf")).get_charmap() if chr(code).isprintable())


def _font_file(name: str) -> str:
    require_matplotlib()
    import matplotlib

    return str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / name)
