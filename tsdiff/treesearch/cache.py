"""What is worth keeping between searches: JSON files by the hash of what they follow from, in the user's cache folder."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

FORMAT = 1


def cache_folder() -> Path:
    """TSDIFF_CACHE, else "tsdiff" in XDG_CACHE_HOME, else in ~/.cache."""
    own = os.environ.get("TSDIFF_CACHE")
    return Path(own).expanduser() if own else Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "tsdiff"


def cached_path(kind: str, key: Mapping[str, Any]) -> Path:
    """Where the entry of a key (strict JSON) is, or would be: KIND/SHA256.json."""
    text = json.dumps(key, sort_keys=True, allow_nan=False)
    return cache_folder() / kind / f"{hashlib.sha256(text.encode()).hexdigest()}.json"


def read_cached(kind: str, key: Mapping[str, Any]) -> dict[str, Any] | None:
    """The entry of a key; None if there is none that can be used (a damaged file is as good as none)."""
    try:
        data = json.loads(cached_path(kind, key).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if not isinstance(data, dict) or data.get("format") != FORMAT or data.get("key") != json.loads(json.dumps(key)):
        return None
    entry = data.get("entry")
    return entry if isinstance(entry, dict) else None


def write_cached(kind: str, key: Mapping[str, Any], entry: Mapping[str, Any]) -> Path:
    """Keep an entry, whole or not at all, whoever else writes it at the same time. Raises OSError if the folder cannot be written."""
    path = cached_path(kind, key)
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"format": FORMAT, "key": key, "entry": entry}, allow_nan=False)
    with tempfile.NamedTemporaryFile("w", encoding="utf-8", dir=path.parent, suffix=".part", delete=False) as file:
        temporary = Path(file.name)
        try:
            file.write(text + "\n")
            file.close()
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
    return path
