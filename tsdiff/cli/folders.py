"""Whether a folder can be written, told without leaving anything in it."""

from __future__ import annotations

import tempfile
from pathlib import Path


def try_writing(folder: Path) -> bool:
    """Write a nameless file into a folder or, where it is not there yet, into the nearest one above it that is.

    Returns:
      Whether the folder itself is there.

    Raises:
      OSError: if it cannot be written.
    """
    place = folder.absolute()
    while not place.exists() and place != place.parent:
        place = place.parent
    with tempfile.TemporaryFile(dir=place):
        pass
    return place == folder.absolute()
