"""`tsdiff resume`: continue a search after an interruption."""

from __future__ import annotations

import dataclasses
import traceback
from pathlib import Path
from typing import Any

import click

from tsdiff.cli import values
from tsdiff.cli.announce import of_search, say_where_to_answer
from tsdiff.cli.errands import do_what_waits
from tsdiff.cli.expand import grow
from tsdiff.cli.interrupt import first_finishes_the_batch
from tsdiff.cli.options import Sectioned, debug_option, json_option
from tsdiff.cli.output import say
from tsdiff.cli.progress import progress
from tsdiff.cli.search import report


@click.command("resume", cls=Sectioned)
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--max-batch", type=click.IntRange(min=1), metavar="ROWS", help="Rows in one network call at most, from now on.")
@click.option("--memory-limit", type=values.BYTES, metavar="SIZE", help="Host memory for latents, e.g. 2GB; the rest goes to disk.")
@click.option("--seconds", type=click.FloatRange(min=0.0, min_open=True), metavar="S", help="Start nothing new after this time, counted from now.")
@click.option("--previews", type=click.Choice(["kept", "all", "none"]), help="Of which decoded nodes a small picture stays, from now on.")
@click.option("--metadata/--no-metadata", default=None, help="Write images with their history, or without.")
@json_option
@click.option("--quiet/--no-quiet", help="No narration, no progress.")
@debug_option
@click.pass_context
def command(ctx: click.Context, /, run: Path, as_json: bool, quiet: bool, **changed: Any) -> int:
    """Continue a search after an interruption.

    RUN is the folder of a run, or of a search of several prompts, of which those that are not done are continued; so is an
    expansion. What was written down is not computed again, and the result is that of a search without the interruption.

    \b
    Try:
      tsdiff resume runs/run-0001
    """
    from tsdiff.treesearch.durable import status, unfinished_expansion
    from tsdiff.treesearch.resume import planned
    from tsdiff.treesearch.search import execute

    changed = {name: value for name, value in changed.items() if value is not None}
    if run.is_dir():
        ctx.obj.kept = str(run)
    if unfinished_expansion(run):
        return _then_what_waits(ctx, run, grow(ctx, run, None, quiet=quiet, as_json=as_json, **changed), quiet)
    with planned(run, **changed) as (plan, folder):
        if not quiet and plan.num_runs == 1 and status(folder) == "done":
            say("", f"{folder} is done, and nothing is left to do")
        elif not quiet:
            say("", f"continuing {folder}: {of_search(plan)}")
            say_where_to_answer(plan, folder)
            for line in plan.notices:
                say("warning", line)
        ctx.obj.kept = str(folder)
        with progress(quiet=quiet, loading=f"loading {plan.model.name}") as callback, first_finishes_the_batch() as stop:
            results = execute(plan, callback=callback, stop=stop, into=folder)
    if ctx.obj.debug:
        for failure in results.failures:
            traceback.print_exception(failure.error)
    done = [result for result in results if not unfinished_expansion(result.path)]
    begun = [result.path for result in results if unfinished_expansion(result.path)]
    if not begun:
        return _then_what_waits(ctx, run, report(results, as_json=as_json, quiet=quiet), quiet)
    statuses = [report(dataclasses.replace(results, results=done), as_json=as_json, quiet=quiet)] if done or results.failures else []
    statuses += [grow(ctx, path, None, quiet=quiet, as_json=as_json, **changed) for path in begun]
    return _then_what_waits(ctx, run, max(statuses), quiet)


def _then_what_waits(ctx: click.Context, folder: Path, exit_status: int, quiet: bool) -> int:
    do_what_waits(folder, quiet=quiet, state=ctx.obj)
    return exit_status
