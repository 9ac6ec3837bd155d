"""Any record as strict JSON in UTF-8, and back without loss.

Strict JSON has no NaN, no infinities, and no half of a surrogate pair (which file names and arguments of a command may
hold). These are written as objects with one key that starts with "$":

    NaN, infinities                 {"$float": "nan"}, {"$float": "inf"}, {"$float": "-inf"}
    text with lone surrogates       {"$text": "68eda080"}: hexadecimal UTF-8, each surrogate as three bytes
    a key with lone surrogates      "$text:68eda080"
    a key that starts with "$"      one more "$" in front

All else is plain JSON, as Python's `json` writes it: tuples become lists, keys that are not text become text. The text
of a record is always the same, so records can be compared by their bytes.
"""

from __future__ import annotations

import json
import math
from typing import Any

from tsdiff.treesearch.errors import UsageError
from tsdiff.treesearch.node import Json

_MARK = '"$'  # what is marked can only start like this
_STRICT = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode


def encode(record: Json) -> bytes:
    """One line of strict JSON without its line feed.

    Raises:
      UsageError: if the record holds anything but text, numbers, booleans, None, lists and dictionaries.
    """
    try:
        try:
            text = _STRICT(record)
            if _MARK not in text:
                return text.encode()
        except ValueError:  # not finite; a lone surrogate (UnicodeEncodeError) is one too
            pass
        return _STRICT(_mark(record)).encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise UsageError(f"a record cannot be written as strict JSON ({error}); write plain numbers, text, lists and dictionaries") from None


def decode(text: bytes) -> Json:
    """The inverse of `encode`. Raises ValueError if it is not strict JSON."""
    try:
        whole = text.decode()
        data: Json = _DECODER.decode(whole)
        return _unmark(data) if _MARK in whole else data
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _refuse(name: str) -> None:
    raise ValueError(f"{name} is not strict JSON")


_DECODER = json.JSONDecoder(parse_constant=_refuse)


def _mark(value: Any) -> Any:
    if isinstance(value, str):
        return {"$text": _hex(value)} if _lone(value) else value
    if isinstance(value, float) and not math.isfinite(value):
        return {"$float": repr(float(value))}
    if isinstance(value, dict):
        return {_mark_key(key): _mark(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_mark(inner) for inner in value]
    return value


def _mark_key(key: Any) -> str:
    if not isinstance(key, str):
        if not isinstance(key, (bool, int, float, type(None))):
            raise TypeError(f"keys must be text, not {type(key).__name__}")
        return json.dumps(key)
    if _lone(key):
        return f"$text:{_hex(key)}"
    return f"${key}" if key.startswith("$") else key


def _unmark(value: Any) -> Any:
    if isinstance(value, dict):
        if value.keys() == {"$float"} and value["$float"] in ("nan", "inf", "-inf"):
            return float(value["$float"])
        if value.keys() == {"$text"} and isinstance(value["$text"], str):
            return _text(value["$text"])
        return {_unmark_key(key): _unmark(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_unmark(inner) for inner in value]
    return value


def _unmark_key(key: str) -> str:
    if key.startswith("$text:"):
        return _text(key[6:])
    if key.startswith("$$"):
        return key[1:]
    if key.startswith("$"):
        raise ValueError(f"{key!r} has no meaning")
    return key


def _lone(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return True
    return False


def _hex(text: str) -> str:
    return text.encode("utf-8", "surrogatepass").hex()


def _text(digits: str) -> str:
    return bytes.fromhex(digits).decode("utf-8", "surrogatepass")
