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
from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache, partial
from typing import Any

from tsdiff.treesearch.errors import UsageError
from tsdiff.treesearch.node import Json

_MARK = '"$'  # what is marked can only start like this
_STRICT = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode
_PLAIN = json.JSONEncoder(ensure_ascii=False, allow_nan=False).encode
_WORD = lru_cache(maxsize=1024, typed=True)(_PLAIN)  # names of facts, of which there are few; true, false and null


def encode(record: Json, *, spread: bool = False) -> bytes:
    """Strict JSON without a line feed at its end.

    Args:
      spread: over many lines, for people, instead of one without spaces.

    Raises:
      UsageError: if the record holds anything but text, numbers, booleans, None, lists and dictionaries.
    """
    return _encode(_spread if spread else _STRICT, record)


def in_pieces(record: Mapping[str, Any]) -> Iterator[bytes]:
    """What `encode(record, spread=True)` gives, in pieces. Values that are iterators become lists, and are never in memory as a whole.

    Raises:
      UsageError: as `encode`, at the piece that cannot be written.
    """
    before = b"{\n "
    for key, value in record.items():
        yield before + _WORD(_mark_key(key)).encode() + b": "
        before = b",\n "
        if isinstance(value, Iterator):
            ahead = b"[\n  "
            for item in value:
                yield ahead + _encode(_INNER, item)
                ahead = b",\n  "
            yield b"[]" if ahead.startswith(b"[") else b"\n ]"
        else:
            yield _encode(_OUTER, value)
    yield b"\n}" if record else b"{}"


def _encode(write: Callable[[Any], str], record: Any) -> bytes:
    """A record as `write` writes it, marked where it has to be."""
    try:
        try:
            text = write(record)
            if _MARK not in text:
                return text.encode()
        except ValueError:  # not finite; a lone surrogate (UnicodeEncodeError) is one too
            pass
        return write(_mark(record)).encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise UsageError(f"a record cannot be written as strict JSON ({error}); write plain numbers, text, lists and dictionaries") from None


def _spread(value: Any, margin: str = "\n") -> str:
    """What `json.dumps(value, indent=1, allow_nan=False, ensure_ascii=False)` gives, faster; further lines begin with `margin`."""
    kind = type(value)
    if kind is int or (kind is float and math.isfinite(value)):
        return repr(value)
    if kind is not str and isinstance(value, (dict, list, tuple)):
        inner = margin + " "
        if isinstance(value, dict):
            return f"{{{','.join([f'{inner}{_name(key)}: {_spread(item, inner)}' for key, item in value.items()])}{margin}}}" if value else "{}"
        return f"[{','.join([inner + _spread(item, inner) for item in value])}{margin}]" if value else "[]"
    return _WORD(value) if kind is bool or value is None else _PLAIN(value)


_OUTER = partial(_spread, margin="\n ")
_INNER = partial(_spread, margin="\n  ")


def _name(key: Any) -> str:
    """A key as the library writes it."""
    if isinstance(key, str):
        return _WORD(key)
    if key is None or isinstance(key, (bool, int, float)):
        return f'"{_PLAIN(key)}"'
    raise TypeError(f"keys must be text, not {type(key).__name__}")


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
