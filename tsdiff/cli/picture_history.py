"""Where a picture came from, as far as it says: the text that programs for making images write into PNG files."""

from __future__ import annotations

import json
import re
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tsdiff.treesearch.disk import unread
from tsdiff.treesearch.errors import UsageError
from tsdiff.treesearch.strictjson import decode

PARAMETERS, OWN = "parameters", "tsdiff"
_SETTING = re.compile(r'\s*([^:,"]+):\s*("(?:\\.|[^"\\])*"|[^,]*)(?:,|$)')


@dataclass(frozen=True)
class History:
    """What a picture says of itself.

    Attributes:
      size: width and height in pixels.
      parameters: the settings in the layout that most programs read; None where there are none.
      own: what tsdiff has written; None where it has not.
      problems: what is there and cannot be read.
    """

    size: tuple[int, int]
    parameters: dict[str, str] | None
    own: Any
    problems: tuple[str, ...] = ()


def read_history(path: Path) -> History:
    """What a picture says of itself; its pixels are not looked at.

    Raises:
      UsageError: if the file cannot be read, or is no picture.
    """
    from PIL import Image, UnidentifiedImageError

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # nothing is decompressed
            with Image.open(path) as opened:
                size, info = opened.size, dict(opened.info)
    except UnidentifiedImageError:
        raise UsageError(f"{str(path)!r} is neither the folder of a run nor a picture") from None
    except OSError as error:
        raise unread(error, path) from error
    except (ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise UsageError(f"{str(path)!r} cannot be read as a picture: {error}") from None
    own, problems = None, []
    if isinstance(text := info.get(OWN), str):
        try:
            own = decode(text.encode())
        except ValueError as error:
            problems.append(f"what tsdiff has written into {str(path)!r} is damaged: {error}")
    text = info.get(PARAMETERS)
    return History(size, read_parameters(text) if isinstance(text, str) and text.strip() else None, own, tuple(problems))


def read_parameters(text: str) -> dict[str, str]:
    """Settings from their widely read layout, in order:

        PROMPT, over any number of lines
        Negative prompt: TEXT
        Steps: 20, Sampler: ddim, CFG scale: 7.5, Seed: 0, Size: 512x512, Model: NAME
    """
    *lines, last = text.strip().split("\n")
    settings = _SETTING.findall(last) if last.startswith("Steps: ") else []
    if not settings:
        lines.append(last)
    prompt, mark, negative = "\n".join(["", *lines]).partition("\nNegative prompt:")
    facts = {"Prompt": prompt.removeprefix("\n")}
    if mark:
        facts["Negative prompt"] = negative.strip()
    return facts | {name.strip(): _unquoted(value.strip()) for name, value in settings}


def _unquoted(value: str) -> str:
    if value.startswith('"'):
        try:
            inner = json.loads(value)
            return inner if isinstance(inner, str) else value
        except ValueError:
            return value
    return value
