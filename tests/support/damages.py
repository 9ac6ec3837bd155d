"""What can be wrong with the folder of a saved pipeline."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

INDEX = "model_index.json"

Damage = tuple[Callable[[Path], Any], str]
"""What spoils a folder, and what is said of it."""


def edit(path: Path, **changes: Any) -> None:
    """Change entries of a JSON file."""
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def indexed(says: str, **changes: Any) -> Damage:
    """A folder whose index has other entries."""
    return lambda folder: edit(folder / INDEX, **changes), says


def configured(component: str, says: str, **changes: Any) -> Damage:
    """A folder whose component has other entries in its config."""
    return lambda folder: edit(folder / component / "config.json", **changes), says


@contextmanager
def spoilt(path: Path, content: bytes | None) -> Iterator[None]:
    """A file has other content, or is not there for a while."""
    before = path.read_bytes()
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    yield
    path.unlink(missing_ok=True)
    path.write_bytes(before)


@contextmanager
def edited(path: Path, **changes: Any) -> Iterator[None]:
    """A JSON file has other entries for a while."""
    with spoilt(path, json.dumps(json.loads(path.read_text()) | changes).encode()):
        yield
