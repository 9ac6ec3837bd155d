"""`tsdiff describe`: what a named component is, and its parameters."""

from __future__ import annotations

import dataclasses
import inspect
import re
import sys
from typing import Any

import click

from tsdiff.cli.catalogue import KINDS, REGISTRIES, SINGULAR, documentation, names, solvers
from tsdiff.cli.options import debug_option, json_option
from tsdiff.cli.output import coloured, print_json, print_table
from tsdiff.treesearch import parameters
from tsdiff.treesearch.errors import unknown_name

_COLUMNS = ("name", "type", "default", "range", "symbol", "meaning")


@click.command("describe")
@click.argument("name")
@json_option
@debug_option
def command(name: str, as_json: bool) -> None:
    """Explain a policy, verifier, model, solver or suite.

    \b
    Try:
      tsdiff describe beam

    A name that several kinds share shows all of them.
    """
    kinds = [kind for kind in KINDS if name in names(kind)]
    if not kinds:
        everything = {known for kind in KINDS for known in names(kind)}
        raise unknown_name("name", name, everything, "`tsdiff list` lists all.")
    descriptions = [describe(kind, name) for kind in kinds]
    if as_json:
        print_json(descriptions)
        return
    for index, description in enumerate(descriptions):
        if index:
            click.echo()
        _print(description)


def describe(kind: str, name: str) -> dict[str, Any]:
    """What `tsdiff describe --json` says of a component; `kind` is one of `KINDS`."""
    component = solvers()[name] if kind == "solvers" else REGISTRIES[kind].load(name)
    return {
        "kind": SINGULAR[kind],
        "name": name,
        "documentation": documentation(component),
        "parameters": [] if kind == "models" else [_strict(row) for row in _parameters(component)],
    }


def _parameters(component: Any) -> list[dict[str, Any]]:
    """Hyperparameters of a dataclass; otherwise what the class or function is called with."""
    if dataclasses.is_dataclass(component):
        # A dataclass *instance* (a solver, a suite) is a fact, not something to be configured: it has no parameters.
        return parameters.describe(component) if isinstance(component, type) else []
    try:
        signature = inspect.signature(component)
    except (TypeError, ValueError):  # not callable, or written in C and silent about itself
        return []
    return [
        {
            "name": parameter.name,
            "type": "" if parameter.annotation is parameter.empty else inspect.formatannotation(parameter.annotation).strip("'"),
            "default": parameter.default if parameter.default is not parameter.empty else dataclasses.MISSING,
            "range": "",
            "symbol": "",
            "help": "",
        }
        for parameter in signature.parameters.values()
        if parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
    ]


def _strict(row: dict[str, Any]) -> dict[str, Any]:
    """A row as strict JSON: type and range in full, the default as one would type it after -P."""
    kind = re.sub(r"\b(?:\w+\.)+(\w+)", r"\1", row["type"])  # tsdiff.policies.stages.Stage is Stage
    return row | {"type": "any" if kind == "Any" else kind, "default": _typed(row["default"]), "range": _range(kind, row["range"], row["default"])}


def _range(kind: str, bounds: str, default: Any) -> str:
    """The range in words: of each element where there are several, and whether there may be none."""
    if kind == "bool":
        return "true or false"
    if bounds and kind.startswith("tuple"):
        bounds = f"each {bounds}"
    none = kind.endswith("| None") or (kind == "choice" and default is None)
    return f"{bounds}, or none" if bounds and none else bounds


def _typed(value: Any) -> str:
    if value is dataclasses.MISSING:
        return "required"
    if isinstance(value, bool) or value is None:
        return str(value).lower()
    if isinstance(value, tuple):
        return ",".join(map(_typed, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def _print(description: dict[str, Any]) -> None:
    click.echo(click.style(f"{description['kind']} {description['name']}", bold=True), color=coloured(sys.stdout))
    click.echo(description["documentation"] or "(no documentation)")
    if description["parameters"]:
        click.echo()
        rows = [[row["name"], row["type"], row["default"], row["range"], row["symbol"], row["help"]] for row in description["parameters"]]
        print_table(_COLUMNS, rows)
