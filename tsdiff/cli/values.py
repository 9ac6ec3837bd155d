"""Values as typed on the command line: seeds "0-3,7", intervals "0.2,5", sizes "2GB", devices "cuda:1"."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import click

MAX_SEEDS = 1_000_000
_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


class Parsed(click.ParamType):  # type: ignore[type-arg]  # generic in recent versions of click only
    """A parameter type made of a function that raises ValueError with a message."""

    def __init__(self, name: str, parse: Callable[[str], Any]) -> None:
        self.name = name
        self._parse = parse

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """The value that a text stands for; anything else has been converted before."""
        if not isinstance(value, str):
            return value
        try:
            return self._parse(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)


def parse_seeds(text: str) -> tuple[int, ...]:
    """The seeds of "7", "0-3" or "0-3,7", in that order.

    Raises:
      ValueError: if the text has another form, a range runs backwards, or a seed appears twice.
    """
    seeds: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*([0-9]+)\s*(?:-\s*([0-9]+)\s*)?", part)
        if match is None:
            raise ValueError(f"{part.strip()!r} is neither a seed nor a range; write whole numbers like 7, 0-3 or 0-3,7")
        first = int(match[1])
        last = first if match[2] is None else int(match[2])
        if last < first:
            raise ValueError(f"the range {part.strip()} runs backwards; write {last}-{first}")
        if len(seeds) + last - first >= MAX_SEEDS:
            raise ValueError(f"{text!r} names more than {MAX_SEEDS:,} seeds; split the search")
        seeds.extend(range(first, last + 1))
    if len(set(seeds)) < len(seeds):
        twice = next(seed for index, seed in enumerate(seeds) if seed in seeds[:index])
        raise ValueError(f"seed {twice} appears twice; name each seed once")
    return tuple(seeds)


def parse_interval(text: str) -> tuple[float, float]:
    """The bounds of "LOW,HIGH", 0 <= LOW <= HIGH; HIGH may be "inf"."""
    try:
        low, high = map(float, text.split(","))
    except ValueError:
        raise ValueError(f"{text!r} is not of the form LOW,HIGH, e.g. 0.3,5") from None
    if math.isnan(low) or math.isnan(high) or not 0.0 <= low <= high:
        raise ValueError(f"{text!r} must hold 0 <= LOW <= HIGH")
    return low, high


def parse_bytes(text: str) -> int:
    """The bytes of "2GB", "512MiB" or a bare number; GB are powers of 1000, GiB of 1024."""
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([a-zA-Z]*)\s*", text)
    if match is None or match[2].upper() not in _UNITS:
        raise ValueError(f"{text!r} is not a size in bytes; write e.g. 2GB, 512MiB or 1000000")
    amount = int(float(match[1]) * _UNITS[match[2].upper()])
    if amount < 1:
        raise ValueError(f"{text!r} must be at least one byte")
    return amount


def parse_device(text: str) -> str:
    """ "auto", "cpu", "mps", "cuda" or "cuda:N"."""
    if re.fullmatch(r"auto|cpu|mps|cuda(:[0-9]+)?", text) is None:
        raise ValueError(f"{text!r} is not one of auto, cpu, cuda, cuda:N, mps")
    return text


def parse_class(text: str) -> int | str:
    """A class id where the text is a whole number, otherwise a class name."""
    if not text.strip():
        raise ValueError("the class is empty; give an id or a name")
    return int(text) if re.fullmatch(r"[0-9]+", text) else text


SEEDS = Parsed("seeds", parse_seeds)
INTERVAL = Parsed("low,high", parse_interval)
BYTES = Parsed("bytes", parse_bytes)
DEVICE = Parsed("device", parse_device)
CLASS = Parsed("class", parse_class)
