"""Policies, verifiers, models, suites and converters by name: entry points of installed packages, and names added at run time.

Nothing is imported until it is asked for, so `tsdiff list` and `--help` stay instant. A plug-in that cannot be
imported is one warning, never a dead program.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from tsdiff.treesearch.errors import TsdiffWarning, UsageError, unknown_name


class PluginWarning(TsdiffWarning):
    """A third-party plug-in could not be loaded."""


class Registry:
    """The names of one kind of component.

    Args:
      kind: "policy", "verifier", "model", "suite" or "converter"; the entry-point group is "tsdiff." and its plural.
    """

    def __init__(self, kind: str, plural: str) -> None:
        self.kind = kind
        self.plural = plural
        self.group = f"tsdiff.{plural}"
        self._added: dict[str, Any] = {}

    def add(self, name: str, component: Any) -> None:
        """Make a component known under a name for the rest of the process; it hides an entry point of that name.

        Raises:
          UsageError: if the name is empty or holds characters that the command line needs (":", "=", ",", spaces).
        """
        if not name or any(character in name for character in ":=, \t\n"):
            raise UsageError(f"{self.kind} name {name!r} must not be empty or contain ':', '=', ',' or spaces")
        self._added[name] = component

    def names(self) -> list[str]:
        """All known names, sorted, without importing anything."""
        return sorted({*self._added, *_entry_points(self.group)})

    def __iter__(self) -> Iterator[str]:
        return iter(self.names())

    def __contains__(self, name: str) -> bool:
        return name in self._added or name in _entry_points(self.group)

    def load(self, name: str) -> Any:
        """Import and return what is registered under a name.

        Raises:
          UsageError: if the name is unknown (the nearest are named) or its plug-in cannot be imported.
        """
        if name in self._added:
            return self._added[name]
        points = _entry_points(self.group)
        if name not in points:
            raise unknown_name(self.kind, name, self.names(), f"`tsdiff list {self.plural}` lists all.")
        try:
            return points[name].load()
        except Exception as error:
            source = getattr(points[name].dist, "name", points[name].value)
            raise UsageError(f"{self.kind} {name!r} of {source!r} cannot be loaded ({type(error).__name__}: {error}); mend or uninstall that plug-in") from error

    def loaded(self) -> Iterator[tuple[str, Any]]:
        """Every component that can be imported; one warning for each that cannot."""
        for name in self.names():
            try:
                yield name, self.load(name)
            except UsageError as error:
                warnings.warn(PluginWarning(str(error)), stacklevel=2)


@cache
def _entry_points(group: str) -> dict[str, EntryPoint]:
    return {point.name: point for point in entry_points(group=group)}


policies = Registry("policy", "policies")
verifiers = Registry("verifier", "verifiers")
models = Registry("model", "models")
suites = Registry("suite", "suites")
converters = Registry("converter", "converters")


def split_reference(reference: str) -> tuple[str, str]:
    """Split "name:rest" into the name and the rest ("" if there is none)."""
    name, _, rest = reference.partition(":")
    return name, rest


def split_options(text: str) -> dict[str, str]:
    """Turn "key=value,key=value" into a dictionary; a part without "=" is a further element of the value before it.

    A value that begins with "[" ends with the "]" that closes it, commas and all: so a reference with options of its own
    can be an option, "question=[clip:model=FOLDER,scale=logit]". The brackets stay (see `split_elements`).

    Raises:
      UsageError: if the first part has no "=", or a bracket is not closed.
    """
    options: dict[str, str] = {}
    key = ""
    for part in filter(None, _parts(text)):
        name, equals, value = part.partition("=")
        if equals and not part.lstrip().startswith("["):
            key = name.strip()
            options[key] = value.strip()
        elif key:
            options[key] += f",{part.strip()}"
        else:
            raise UsageError(f"{part!r} is not of the form key=value")
    return options


def split_elements(text: str) -> list[str]:
    """The elements of a list "a,[b:x=1,y=2],c", without the brackets around any of them. Raises UsageError as above."""
    parts = [part.strip() for part in _parts(text)]
    return [part[1:-1] if part.startswith("[") and part.endswith("]") else part for part in parts if part]


def _parts(text: str) -> list[str]:
    """Split at commas, except inside brackets that open at the beginning of a part or of its value."""
    parts: list[str] = []
    rest = text
    while rest:
        start = re.match(r"\s*(?:[^=,\[]*=\s*)?\[", rest)
        end = rest.find(",", _closed(rest, start.end(), text) if start else 0)
        parts.append(rest if end < 0 else rest[:end])
        rest = "" if end < 0 else rest[end + 1 :]
    return parts


def _closed(text: str, start: int, whole: str) -> int:
    """Where the bracket that was opened before `start` is closed."""
    depth = 1
    for place in range(start, len(text)):
        depth += {"[": 1, "]": -1}.get(text[place], 0)
        if depth == 0:
            return place
    raise UsageError(f"{whole!r} opens a bracket that it does not close; write lists as key=[a:x=1,y=2],[b]")


def reference(name: str, /, **options: object) -> str:
    """Write "name:key=value,...": what `split_reference` and `split_options` take apart again.

    A plug-in uses it to offer a component that it may not import: registered under a name of its own, a function that
    returns the reference of another verifier stands for that one.

        def my_clip(**options: str) -> str:
            "CLIPScore by my own checkpoint."
            return reference("clip", **{"name": "my-clip", "model": FOLDER} | options)

    Raises:
      UsageError: if a value cannot be written so, because it holds a comma before an equals sign, or spaces at its ends.
    """
    written = {key: str(value) for key, value in options.items()}
    text = ",".join(f"{key}={value}" for key, value in written.items())
    try:
        same = split_options(text) == written
    except UsageError:
        same = False
    if not same:
        raise UsageError(f"{name}: options {written!r} cannot be written as key=value,...; leave out commas before '=', and spaces at the ends of a value")
    return f"{name}:{text}" if text else name
