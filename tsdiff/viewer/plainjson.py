"""JSON for browsers: strict, whatever a damaged or hostile file held; and short numbers."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

DEEPEST = 32
"""Levels of nesting that are passed on; run folders need four."""

LONGEST = 20_000
"""Characters of a text that are passed on."""

MOST = 10_000
"""Items of a list or mapping within a run's facts that are passed on."""


def dump(data: Any) -> bytes:
    """Strict JSON in ASCII. Data made of plain finite values only; what comes from files goes through `plain` first."""
    return json.dumps(data, allow_nan=False, separators=(",", ":")).encode()


def plain(value: Any, deepest: int = DEEPEST) -> Any:
    """Any JSON value of a file as one that every reader takes: no NaN, no infinities, no lone surrogates, bounded in every way."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int):
        return value if abs(value) < 1 << 63 else str(value)[:40]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, str):
        return text(value)
    if not deepest:
        return "…"
    if isinstance(value, Mapping):
        return {text(str(key)): plain(item, deepest - 1) for key, item in list(value.items())[:MOST]}
    if isinstance(value, (list, tuple)):
        return [plain(item, deepest - 1) for item in value[:MOST]]
    return text(str(value))


def text(value: object, longest: int = LONGEST) -> str:
    """Anything as text that can be written as UTF-8, and is not too long."""
    found = value if isinstance(value, str) else str(value)
    if len(found) > longest:
        found = found[: longest - 1] + "…"
    return found.encode("utf-8", "replace").decode()


def line(value: object) -> str:
    """Anything as one printable line."""
    return " ".join("".join(character if character.isprintable() else " " for character in text(value, 1000)).split())


def number(value: Any) -> float | int | None:
    """A finite number, else None."""
    if type(value) is int and abs(value) < 1 << 63:
        return value
    return value if type(value) is float and math.isfinite(value) else None


def count(value: Any) -> int | None:
    """A whole number from 0 on that JavaScript can hold, else None."""
    return value if type(value) is int and 0 <= value < 1 << 53 else None


def short(value: float | None) -> float | None:
    """A score with as many digits as a picture needs."""
    return None if value is None else float(f"{value:.6g}")


def mapping(value: Any) -> dict[str, Any]:
    """A mapping; an empty one for anything else."""
    return value if isinstance(value, dict) else {}
