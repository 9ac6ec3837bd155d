"""Everything that has a name: what `list` and `describe` show. No weights, no torch."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from functools import cache
from importlib.metadata import entry_points
from typing import Any

from tsdiff.cli.output import say
from tsdiff.treesearch.errors import UsageError
from tsdiff.treesearch.models import PIPELINES
from tsdiff.treesearch.registry import Registry, models, policies, suites, verifiers

REGISTRIES: dict[str, Registry] = {"policies": policies, "verifiers": verifiers, "models": models, "suites": suites}
KINDS = ("policies", "verifiers", "models", "solvers", "suites")
SINGULAR = {kind: registry.kind for kind, registry in REGISTRIES.items()} | {"solvers": "solver"}


@cache
def solvers() -> dict[str, Any]:
    """Solvers by name, from the tables that the entry points `tsdiff.solvers` name."""
    found: dict[str, Any] = {}
    for point in entry_points(group="tsdiff.solvers"):
        try:
            found |= point.load()
        except Exception as error:  # a broken plug-in is one warning, never a dead program
            say("warning", f"solvers {point.name!r} of {point.value!r} cannot be loaded ({type(error).__name__}: {error})")
    return found


def names(kind: str) -> list[str]:
    """The names of a kind, sorted."""
    if kind == "solvers":
        return sorted(solvers())
    # The reader of pipeline folders and hub ids stands among the models, but is no model that one could name.
    return [name for name in REGISTRIES[kind].names() if name != PIPELINES or kind != "models"]


def components(kind: str) -> Iterator[tuple[str, Any]]:
    """Names and components of a kind; one warning line for each that cannot be imported."""
    if kind == "solvers":
        yield from sorted(solvers().items())
        return
    for name in names(kind):
        try:
            yield name, REGISTRIES[kind].load(name)
        except UsageError as error:
            say("warning", str(error))


def documentation(component: Any) -> str:
    """What a component says about itself: its docstring, or that of a solver's facts in words."""
    from tsdiff.treesearch.schedule import SolverInfo

    if isinstance(component, SolverInfo):
        return _solver_text(component)
    return inspect.getdoc(component) or ""


def summary(component: Any) -> str:
    """The first line of the documentation."""
    return documentation(component).partition("\n")[0]


def _solver_text(solver: Any) -> str:
    stages = "one evaluation a step" if solver.stages == 1 else f"{solver.stages} evaluations a step, the last omitted at sigma 0"
    noise = "stochastic" if solver.stochastic else "deterministic"
    return f"{noise.capitalize()}, {stages}; runs on schedules of kind {solver.kind!r}."
