"""What a run was asked for while it was busy: done by the command that wrote it, or by a process that the viewer starts."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from tsdiff.cli.announce import of_expansion
from tsdiff.cli.app import App, State
from tsdiff.cli.interrupt import first_finishes_the_batch
from tsdiff.cli.output import number, say
from tsdiff.cli.progress import progress

if TYPE_CHECKING:
    from tsdiff.treesearch.expansion import Expansion
    from tsdiff.treesearch.results import Result


class _Narrator:
    """Says on stderr what is done."""

    def __init__(self, state: State | None) -> None:
        self.state = state

    def begins(self, expansion: Expansion) -> None:
        """One line about what is grown, and its warnings."""
        if self.state is not None:
            self.state.kept = str(expansion.folder)
        say("", f"{'continuing the expansion of' if expansion.begun else 'as it was asked for, expanding'} {expansion.folder} {of_expansion(expansion)}")
        for line in expansion.notices:
            say("warning", line)

    def done(self, result: Result) -> None:
        """One line about what came of it."""
        driver = result.drivers[-1]
        found = "no score" if driver["score"] is None else f"node {driver['best']}, {number(driver['score'])}"
        say("", f"its best is {found}; the answer is node {result.node.index}")

    def failed(self, folder: Path, message: str) -> None:
        """One line."""
        say("failed", f"what was asked of {folder}: {message}")


def do_what_waits(folder: Path, *, quiet: bool, state: State | None = None) -> None:
    """Carry out the expansions that were asked for in a folder's inbox while it was being written; one that fails is told."""
    from tsdiff.treesearch.errands import Silent, carry_out_waiting, waiting

    if not waiting(folder):
        return
    with progress(quiet=quiet, loading="loading the model") as callback, first_finishes_the_batch() as stop:
        carry_out_waiting(folder, callback=callback, stop=stop, listener=Silent() if quiet else _Narrator(state))


class _Alone(App):
    """A group whose only command is the one below: for programs, not for people."""

    def resolve_command(self, ctx: click.Context, args: list[str]) -> tuple[str | None, click.Command | None, list[str]]:
        """That command, for all arguments."""
        return "errands", command, args


@click.command("errands")
@click.argument("folder", type=click.Path(path_type=Path))
@click.pass_context
def command(ctx: click.Context, folder: Path) -> None:
    """Carry out what was asked of the run in FOLDER, and end."""
    do_what_waits(folder, quiet=False, state=ctx.obj)


if __name__ == "__main__":
    _Alone("tsdiff").main(sys.argv[1:])
