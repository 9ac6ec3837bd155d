"""Hyperparameters of policies and verifiers: frozen dataclass fields that know their range, symbol and meaning.

    @dataclass(frozen=True, kw_only=True)
    class BestOfN:
        n: int = parameter(4, low=1, symbol="N", help="samples to draw")

`check(self)` in `__post_init__` enforces the ranges, `build` makes an instance from typed or textual values
(`-P n=16`), `describe` lists everything for `tsdiff describe`.
"""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeVar, get_args, get_origin

from tsdiff.treesearch.errors import UsageError, unknown_name

T = TypeVar("T")


def parameter(
    default: Any,
    *,
    low: float | None = None,
    high: float | None = None,
    above: float | None = None,
    below: float | None = None,
    symbol: str = "",
    help: str = "",
) -> Any:
    """A dataclass field with a range: low <= value <= high, above < value < below (element-wise for tuples)."""
    bounds = {"low": low, "high": high, "above": above, "below": below}
    metadata = {"symbol": symbol, "help": help} | {name: bound for name, bound in bounds.items() if bound is not None}
    return dataclasses.field(default=default, metadata=metadata)


def range_text(metadata: Mapping[str, Any]) -> str:
    """The range of a parameter in words, "" if unbounded."""
    words = {"low": "at least", "above": "above", "high": "at most", "below": "below"}
    return " and ".join(f"{word} {metadata[name]:g}" for name, word in words.items() if name in metadata)


def check(options: Any) -> None:
    """Check the ranges and choices of a dataclass made of `parameter` fields. No number may be infinite.

    Raises:
      UsageError: naming the parameter, the value and the rule.
    """
    name = getattr(options, "name", type(options).__name__)
    hints = typing.get_type_hints(type(options))
    for field in dataclasses.fields(options):
        value = getattr(options, field.name)
        choices = _choices(hints[field.name])
        if choices and value not in choices and value is not None:
            raise UsageError(f"{name}: {field.name} is {value!r} but must be one of {', '.join(map(repr, choices))}")
        for number in value if isinstance(value, tuple) else (value,):
            if not isinstance(number, (int, float)) or isinstance(number, bool):
                continue
            if not _inside(number, field.metadata):
                raise UsageError(f"{name}: {field.name} is {number:g} but must be {range_text(field.metadata) or 'a number'}")
            if number in (math.inf, -math.inf):
                raise UsageError(f"{name}: {field.name} is {number:g} but must be finite")


def _inside(value: float, metadata: Mapping[str, Any]) -> bool:
    return (
        value == value
        and not value < metadata.get("low", value)
        and not value > metadata.get("high", value)
        and not ("above" in metadata and value <= metadata["above"])
        and not ("below" in metadata and value >= metadata["below"])
    )


def build(cls: type[T], values: Mapping[str, Any]) -> T:
    """Make an instance from values that may be text ("4", "0.2,0.5", "true"), as typed after -P.

    Raises:
      UsageError: for an unknown key (the nearest is named), a value of the wrong type, or one out of range.
    """
    known = [field.name for field in dataclasses.fields(cls) if field.init]  # type: ignore[arg-type]
    hints = typing.get_type_hints(cls)
    name = getattr(cls, "name", cls.__name__)
    for key in values:
        if key not in known:
            raise unknown_name(f"parameter of {name}", key, known, f"`tsdiff describe {name}` explains them.")
    return cls(**{key: parse(f"{name}: {key}", value, hints[key]) for key, value in values.items()})


def parse(label: str, value: Any, kind: Any) -> Any:
    """Turn text into a value of an annotated type; values that are not text are checked by type and passed on."""
    origin, args = get_origin(kind), get_args(kind)
    if origin in (typing.Union, types.UnionType):
        options = [option for option in args if option is not type(None)]
        if type(None) in args and (value is None or (isinstance(value, str) and value.lower() == "none")):
            return None
        for option in options[:-1]:
            try:
                return parse(label, value, option)
            except UsageError:
                continue
        return parse(label, value, options[-1])
    if origin is Literal:
        return value
    if origin is tuple:
        items = value.split(",") if isinstance(value, str) else value
        if not isinstance(items, Sequence):
            items = (items,)
        return tuple(parse(label, item.strip() if isinstance(item, str) else item, args[0]) for item in items)
    if kind is Any or kind is str or not isinstance(kind, type):
        return value
    try:
        if kind is bool:
            return _parse_bool(value)
        if kind is int and isinstance(value, float) and value != int(value):
            raise ValueError
        return kind(value) if isinstance(value, (str, int, float)) and kind in (int, float) else value
    except (ValueError, OverflowError):
        wanted = {int: "a whole number", float: "a number", bool: "true or false"}[kind]
        raise UsageError(f"{label} is {value!r} but must be {wanted}") from None


def _parse_bool(value: Any) -> bool:
    if isinstance(value, bool):
        return value
    if str(value).lower() in ("true", "yes", "on", "1"):
        return True
    if str(value).lower() in ("false", "no", "off", "0"):
        return False
    raise ValueError


def _choices(kind: Any) -> tuple[Any, ...]:
    for option in (kind, *get_args(kind)):
        if get_origin(option) is Literal:
            return get_args(option)
    return ()


def describe(cls: type[Any]) -> list[dict[str, Any]]:
    """Name, type, default, range, symbol and meaning of every parameter of a class, in order."""
    hints = typing.get_type_hints(cls)
    rows = []
    for field in dataclasses.fields(cls):
        if not field.init:
            continue
        choices = _choices(hints[field.name])
        kind = hints[field.name]
        rows.append(
            {
                "name": field.name,
                "type": "choice" if choices else (kind.__name__ if isinstance(kind, type) else str(kind).replace("typing.", "")),
                "default": field.default,
                "range": " or ".join(map(str, choices)) if choices else range_text(field.metadata),
                "symbol": field.metadata.get("symbol", ""),
                "help": field.metadata.get("help", ""),
            }
        )
    return rows
