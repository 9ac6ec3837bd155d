"""`tsdiff list`: the names of what can be combined, and the runs that are there."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from tsdiff.cli.catalogue import KINDS, components, summary
from tsdiff.cli.options import debug_option, json_option
from tsdiff.cli.output import data_size, number, one_line, print_json, print_table, say
from tsdiff.treesearch.errors import UsageError

RUNS = "runs"
_HINTS = {"models": "Any diffusers folder or hub id is a model too: --model FOLDER, --model OWNER/NAME."}


@click.command("list")
@click.argument("kind", required=False, type=click.Choice((*KINDS, RUNS)))
@click.argument("folder", required=False, metavar="[DIR]", type=click.Path(path_type=Path))
@json_option
@debug_option
def command(kind: str | None, folder: Path | None, as_json: bool) -> None:
    """List all that has a name, or saved runs.

    \b
    Try:
      tsdiff list policies
      tsdiff list runs

    Policies, verifiers, models, solvers and suites have names; `tsdiff describe NAME` explains one of them. DIR is where to look for runs, in it and the folders in it; by default it is
    that of `tsdiff search`. `tsdiff show RUN` shows one of them.
    """
    if kind == RUNS:
        _list_runs(Path("runs") if folder is None else folder, as_json=as_json)
        return
    if folder is not None:
        raise UsageError(f"only runs are in a folder; leave {str(folder)!r} out, or list them: tsdiff list runs {folder}")
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


# Runs ----------------------------------------------------------------------------------------------------------------

_COLUMNS = ("run", "status", "prompt", "policy", "score", "baseline", "NFE", "size", "damage")
_PROMPT = 32


def _list_runs(folder: Path, *, as_json: bool) -> None:
    found = list(_runs(folder))
    if as_json:
        print_json(found)
        return
    if not found:
        say("", f"there are no runs in {folder}; `tsdiff search` makes some")
        return
    rows = [
        (
            run["run"], run["status"], one_line(run["prompt"] or "", _PROMPT), run["policy"], number(run["score"]), number(run["baseline"]),
            None if run["nfe"] is None else f"{run['nfe']:,}", data_size(run["bytes"]), "; ".join(run["damage"]),
        )
        for run in found
    ]  # fmt: skip
    print_table(_COLUMNS, rows, numeric=("score", "baseline", "NFE", "size"))


def _runs(folder: Path) -> Iterator[dict[str, Any]]:
    """A row for each run, in the order of their names; one of which nothing can be read has the status "unreadable"."""
    from tsdiff.treesearch.findruns import run_folders
    from tsdiff.treesearch.saved import SavedRun, load_run

    for path in run_folders(folder):
        try:
            run = load_run(path)
            facts, damage = run.summary(), run.damage
        except UsageError as error:
            run = SavedRun(path)
            facts = dict.fromkeys(("prompt", "seed", "policy", "model", "verifier", "score", "baseline", "nfe", "rows", "decodes", "calls", "seconds"))
            facts, damage = facts | {"status": "unreadable"}, (str(error),)
        yield {"run": str(path), **facts, "bytes": run.size, "damage": list(damage)}
