"""Policies, verifiers, models and suites by name: entry points of installed packages, and names added at run time.

Nothing is imported until it is asked for, so `tsdiff list` and `--help` stay instant. A plug-in that cannot be
imported is one warning, never a dead program.
"""

from __future__ import annotations

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
      kind: "policy", "verifier", "model" or "suite"; the entry-point group is "tsdiff." and its plural.
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


def split_reference(reference: str) -> tuple[str, str]:
    """Split "name:rest" into the name and the rest ("" if there is none)."""
    name, _, rest = reference.partition(":")
    return name, rest


def split_options(text: str) -> dict[str, str]:
    """Turn "key=value,key=value" into a dictionary; a part without "=" is a further element of the value before it.

    Raises:
      UsageError: if the first part has no "=".
    """
    options: dict[str, str] = {}
    key = ""
    for part in filter(None, text.split(",")):
        if "=" in part:
            key, _, value = part.partition("=")
            key = key.strip()
            options[key] = value.strip()
        elif key:
            options[key] += f",{part.strip()}"
        else:
            raise UsageError(f"{part!r} is not of the form key=value")
    return options
