"""`tsdiff list`: the names of what can be combined."""

from __future__ import annotations

import click

from tsdiff.cli.catalogue import KINDS, components, summary
from tsdiff.cli.options import debug_option, json_option
from tsdiff.cli.output import print_json, print_table

_HINTS = {"models": "Any diffusers folder or hub id is a model too: --model FOLDER, --model OWNER/NAME."}


@click.command("list")
@click.argument("kind", required=False, type=click.Choice(KINDS))
@json_option
@debug_option
def command(kind: str | None, as_json: bool) -> None:
    """List policies, verifiers, models, solvers and suites.

    \b
    Try:
      tsdiff list policies

    `tsdiff describe NAME` explains one of them.
    """
    kinds = KINDS if kind is None else (kind,)
    found = {kind: [(name, summary(component)) for name, component in components(kind)] for kind in kinds}
    if as_json:
        print_json({kind: dict(rows) for kind, rows in found.items()})
        return
    for index, (title, rows) in enumerate(found.items()):
        if index:
            click.echo()
        print_table(("name", "what it does"), rows, title="" if kind else title)
        if title in _HINTS:
            click.echo(_HINTS[title])
