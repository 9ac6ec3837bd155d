"""Pictures with captions in rows and columns: what contact sheets and grids are made of."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tsdiff.treesearch.errors import UsageError
from tsdiff.treesearch.runfolder import write_file
from tsdiff.viewer.figures.images import thumbnail
from tsdiff.viewer.figures.lettering import fitted, font, plain, wrapped
from tsdiff.viewer.figures.paper import FAINT, INK, QUIET

if TYPE_CHECKING:
    from PIL.Image import Image
    from PIL.ImageDraw import ImageDraw

SUFFIXES = (".png", ".jpg", ".webp")

EDGE, GAP = 24, 10
HEAD, FOOT = 64, 26
TITLE, TEXT, SMALL = 17, 12, 11


@dataclass(frozen=True)
class Card:
    """A picture and what stands below it.

    Attributes:
      image: None where there is none.
      caption: in ink at the left; aside: at the right.
      missing: what stands in place of a picture.
      chosen: framed.
    """

    image: Image | None
    caption: str = ""
    aside: str = ""
    missing: str = "no picture"
    chosen: bool = False


def page(
    cards: Sequence[Sequence[Card | None]], side: int, title: str, facts: str, *, columns: Sequence[str] = (), rows: Sequence[str] = (), foot: str = ""
) -> Image:
    """Cards in rows, each of `side` pixels, under a title.

    Args:
      cards: row by row; None leaves a place empty.
      columns, rows: what stands over each column and before each row; none for no such headings.
      foot: a line at the end.
    """
    from PIL import Image, ImageDraw

    across = max(map(len, cards), default=0)
    before = 150 if rows else 0
    named = [wrapped(plain(name), font(TEXT, bold=True), side, 3) for name in columns]
    over = max(map(len, named), default=0) * (TEXT + 4) + (8 if columns else 0)
    wide = max(EDGE * 2 + before + across * side + max(0, across - 1) * GAP, 420)
    high = EDGE + HEAD + over + len(cards) * (side + FOOT + GAP) + (SMALL + 8 if foot else 0) + EDGE // 2
    sheet = Image.new("RGB", (wide, high), "white")
    pen = ImageDraw.Draw(sheet)
    pen.text((EDGE, EDGE - 6), fitted(plain(title), font(TITLE, bold=True), wide - 2 * EDGE), font=font(TITLE, bold=True), fill=INK)
    pen.text((EDGE, EDGE + 22), fitted(plain(facts), font(TEXT), wide - 2 * EDGE), font=font(TEXT), fill=QUIET)
    top = EDGE + HEAD
    for number, lines in enumerate(named):
        left = EDGE + before + number * (side + GAP)
        for line, text in enumerate(lines):
            pen.text((left, top + over - 6 - (len(lines) - line) * (TEXT + 4)), text, font=font(TEXT, bold=True), fill=INK)
    top += over
    for number, row in enumerate(cards):
        upper = top + number * (side + FOOT + GAP)
        if rows:
            for line, text in enumerate(wrapped(plain(rows[number]), font(TEXT), before - 14, max(1, min(8, side // (TEXT + 5))))):
                pen.text((EDGE, upper + line * (TEXT + 5)), text, font=font(TEXT), fill=INK)
        for place, card in enumerate(row):
            if card is not None:
                _draw_card(sheet, pen, card, EDGE + before + place * (side + GAP), upper, side)
    if foot:
        pen.text((EDGE, high - EDGE // 2 - SMALL - 8), fitted(plain(foot), font(SMALL), wide - 2 * EDGE), font=font(SMALL), fill=QUIET)
    return sheet


def _draw_card(sheet: Image, pen: ImageDraw, card: Card, left: int, top: int, side: int) -> None:
    if card.image is None:
        pen.rectangle((left, top, left + side - 1, top + side - 1), fill="#f4f5f7", outline=FAINT)
        for number, line in enumerate(wrapped(plain(card.missing), font(SMALL), side - 12, 3)):
            pen.text((left + side / 2, top + side / 2 + (number - 0.5) * (SMALL + 4)), line, font=font(SMALL), fill=QUIET, anchor="ma")
    else:
        small = thumbnail(card.image, side)
        place = (left + (side - small.width) // 2, top + (side - small.height) // 2)
        sheet.paste(small, place)
        if card.chosen:
            pen.rectangle((place[0] - 4, place[1] - 4, place[0] + small.width + 3, place[1] + small.height + 3), outline=INK, width=3)
    aside = font(SMALL).getlength(card.aside)
    if card.caption:
        pen.text((left, top + side + 6), fitted(plain(card.caption), font(SMALL, bold=card.chosen), side - aside - 6), font=font(SMALL, bold=card.chosen), fill=INK)
    pen.text((left + side, top + side + 6), plain(card.aside), font=font(SMALL), fill=QUIET, anchor="ra")


def check_suffix(path: Path) -> Path:
    """A path that a page can be written to. Raises UsageError."""
    if path.suffix.lower() not in SUFFIXES:
        raise UsageError(f"{str(path)!r} ends in {path.suffix or 'no suffix'}; pictures are written as {', '.join(SUFFIXES)}")
    return path


def write_page(image: Image, path: Path) -> None:
    """Write a page in the format of the suffix, whole or not at all. Raises UsageError, SetupError if it cannot be written."""
    suffix = check_suffix(path).suffix.lower()
    buffer = io.BytesIO()
    if suffix == ".png":
        image.save(buffer, format="PNG", optimize=False)
    elif suffix == ".jpg":
        image.save(buffer, format="JPEG", quality=90, subsampling=0)
    else:
        image.save(buffer, format="WEBP", quality=90, method=4)
    write_file(path, [buffer.getvalue()])
