"""What a folder says of its run, checked before anybody acts on it: people edit `run.json`, and name wrong folders.

Each check raises a UsageError that says what is wrong, and has changed nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from tsdiff.treesearch.errors import UsageError
from tsdiff.treesearch.runfolder import INDEX, LOCK, RUN

_NUMBER = (int, float)
_NUMBER_OR_NOT = (int, float, type(None))
_RESULT: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("node", "nodes", "failed_nodes", "nfe", "rows", "decodes"), (int,)),
    "score": _NUMBER_OR_NOT,
    "seconds": _NUMBER,
    "truncated": (str, type(None)),
    "verifier_calls": (dict,),
}
"""What of a result others rely on."""

_DRIVER: dict[str, tuple[type, ...]] = {"number": (int,), "status": (str,)}
_DONE: dict[str, tuple[type, ...]] = {"score": _NUMBER_OR_NOT, "seconds": _NUMBER}
_BEGUN: dict[str, tuple[type, ...]] = {"node": (int,), "restored": (list,), "arguments": (dict,)}


def result_of(facts: Mapping[str, Any]) -> dict[str, Any]:
    """What `run.json` says came of a run; empty if it says nothing, or nothing that makes sense."""
    result: Any = facts.get("result")
    if not _has(result, _RESULT) or not all(type(count) is int for count in result["verifier_calls"].values()):
        return {}
    known: dict[str, Any] = result
    return known


def require_result(facts: Mapping[str, Any], folder: Path) -> None:
    """A run that says that it is done says what came of it."""
    if facts.get("status") == "done" and not (result_of(facts) and isinstance(facts.get("fingerprint"), str)):
        raise UsageError(f"{str(folder / RUN)!r} says that the run is done, but its result or its model's fingerprint is missing or makes no sense; put back what it said before it was changed")


def require_searched(facts: Mapping[str, Any], folder: Path, done: str = "continued") -> None:
    """A run that goes on says what was searched."""
    options: Any = facts.get("options")
    if not isinstance(facts.get("arguments"), dict) or not _has(options, {"policy": (dict,), "verifiers": (list,)}) or not _has(options["policy"], {"name": (str,)}):
        raise UsageError(f"{str(folder)!r} cannot be {done}: its {RUN} does not say what was searched")


def drivers_of(facts: Mapping[str, Any], folder: Path) -> list[dict[str, Any]]:
    """What `run.json` says of a run's drivers, the search itself first; empty where the run was never expanded.

    Raises:
      UsageError: if it makes no sense.
    """
    drivers = facts.get("drivers", [])
    if not isinstance(drivers, list) or not all(_driver(place, driver) for place, driver in enumerate(drivers)):
        raise UsageError(f"{str(folder / RUN)!r} cannot be trusted: its list of drivers makes no sense; put back what it said before it was changed")
    return list(drivers)


def _driver(place: int, driver: Any) -> bool:
    return _has(driver, _DRIVER) and driver["number"] == place and _has(driver, _DONE if driver["status"] == "done" else _BEGUN)


def no_run(folder: Path, missing: str) -> UsageError:
    """What to say where a folder was named as a run's and is none: which runs it holds, or that its search never began."""
    try:
        entries = sorted(folder.iterdir())
        within = _runs(entries) or _runs(sorted(folder.glob("*/*")))
    except OSError:
        entries, within = [folder], []
    if within:
        others = f" ({len(within)} in all)" if len(within) > 1 else ""
        return UsageError(f"{str(folder)!r} is not a run folder, but holds some: name one of them, such as {str(within[0])!r}{others}")
    if all(entry.name == LOCK or entry.name.endswith(".part") for entry in entries):
        return UsageError(f"{str(folder)!r} is not a run folder: it holds nothing. If a search made it, that was stopped before it began; start it again")
    return UsageError(f"{str(folder)!r} is not a run folder: it has no {missing}")


def _runs(entries: Iterable[Path]) -> list[Path]:
    return [entry for entry in entries if (entry / RUN).exists() or (entry / INDEX).exists()]


def _has(data: Any, wanted: Mapping[str, tuple[type, ...]]) -> bool:
    """Whether it is an object with values of such types; True and False are no numbers."""
    return isinstance(data, dict) and all(type(data.get(name, _NUMBER)) in types for name, types in wanted.items())
