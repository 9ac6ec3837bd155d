"""The command group: lazy commands, and one place where errors become a line and an exit status.

Exit statuses: 0 done; 1 failed; 2 wrong usage; 3 finished but incomplete; 130 interrupted.
"""

from __future__ import annotations

import os
import shlex
import sys
import traceback
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any, NoReturn

import click

from tsdiff.cli.output import say
from tsdiff.treesearch.errors import TsdiffError, unknown_name

FAILED, USAGE, INCOMPLETE, INTERRUPTED = 1, 2, 3, 130

COMMANDS = {
    "search": "Search for the best sample of each prompt.",
    "resume": "Continue a search after an interruption.",
    "expand": "Grow a saved tree from one of its nodes, into the same run.",
    "plan": "Show what a search would cost, without running it.",
    "show": "Show a saved run, one of its nodes, or an image's origin.",
    "view": "Look at saved runs in the browser, and steer them.",
    "export": "Write a saved run for other programs, or as pictures.",
    "grid": "Show the answers of many runs side by side.",
    "plot": "Plot saved runs.",
    "list": "List all that has a name, or saved runs.",
    "describe": "Explain a policy, verifier, model, solver or suite.",
    "score": "Score image files.",
    "rescore": "Score saved trees by other verifiers, without denoising.",
    "verifiers": "Check that a verifier works: its weights, scores and speed.",
    "predict-curve": "Show how early a verifier tells which sample will be the best.",
    "hacking-report": "Show whether searches please their verifier only.",
    "fit-value": "Fit a verifier that ranks nodes early to saved trees.",
    "convert": "Make a model folder of a published checkpoint.",
    "doctor": "Check this installation.",
}
"""Command (its module of `tsdiff.cli` has underscores for hyphens) -> the first line of its help, kept here so that the group's help imports no command."""


@dataclass
class State:
    """What `main` must still know when a command has ended.

    Attributes:
      debug: show tracebacks.
      kept: the folder of a search that can be continued.
    """

    debug: bool = False
    kept: str | None = None


class App(click.Group):
    """The group of all commands."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """All names, in the order of a first session rather than of the alphabet."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        """Import one command."""
        if name not in COMMANDS:
            return None
        command: click.Command = import_module(f"tsdiff.cli.{name.replace('-', '_')}").command
        return command

    def resolve_command(self, ctx: click.Context, args: list[str]) -> tuple[str | None, click.Command | None, list[str]]:
        """The command that the first argument names. Raises UsageError, naming the nearest ones."""
        if args[0] not in COMMANDS and not args[0].startswith("-"):
            raise unknown_name("command", args[0], COMMANDS, "`tsdiff --help` lists all.")
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List the commands without importing them."""
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        **extra: Any,
    ) -> NoReturn:
        """Run, tell errors in one line, exit."""
        state = State()
        if hasattr(sys.stdout, "reconfigure"):
            sys.stdout.reconfigure(errors="backslashreplace")  # a terminal that cannot show a prompt must not lose a result
        with warnings.catch_warnings():
            _narrate_warnings()
            try:
                status = super().main(args, prog_name or "tsdiff", complete_var, standalone_mode=False, obj=state, **extra)
                sys.stdout.flush()
            except BrokenPipeError:
                # The reader has gone. What Python still holds for it must go nowhere, or the interpreter complains at exit.
                _discard_stdout()
                status = FAILED
            except KeyboardInterrupt:  # between click's own handlers
                status = _tell(click.Abort(), state)
            except Exception as error:
                if state.debug and not isinstance(error, click.Abort):
                    traceback.print_exc()
                status = _tell(error, state)
        sys.exit(status or 0)


def _narrate_warnings() -> None:
    """Show our own warnings (a broken plug-in, unknown words of a prompt) as one line, each once; others keep Python's form."""
    from tsdiff.treesearch.errors import TsdiffWarning

    show = warnings.showwarning
    told: set[str] = set()  # Python's own memory of them is lost whenever a library changes a filter

    def shown(message: Warning | str, category: type[Warning], *rest: Any, **more: Any) -> None:
        if issubclass(category, TsdiffWarning):
            if str(message) not in told:
                told.add(str(message))
                say("warning", str(message))
        else:
            show(message, category, *rest, **more)

    warnings.showwarning = shown


def _discard_stdout() -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _tell(error: Exception, state: State) -> int:
    """Print one line about an error; return the exit status."""
    if isinstance(error, click.Abort):
        say("interrupted", f"what was done is kept; continue with: tsdiff resume {shlex.quote(state.kept)}" if state.kept else "nothing was changed")
        return INTERRUPTED
    if isinstance(error, TsdiffError):
        say("error", str(error))
        return error.exit_status
    if isinstance(error, click.exceptions.NoArgsIsHelpError):
        click.echo(error.format_message(), err=True)
        return USAGE
    if isinstance(error, click.NoSuchOption) and error.ctx is not None:
        known = [name for parameter in error.ctx.command.params for name in (*parameter.opts, *parameter.secondary_opts) if name.startswith("-")]
        say("error", str(unknown_name("option", error.option_name, known, f"`{error.ctx.command_path} --help` lists all.")))
        return USAGE
    if isinstance(error, click.UsageError):
        path = error.ctx.command_path if error.ctx else "tsdiff"
        say("error", f"{error.format_message().rstrip('.')}; see `{path} --help`")
        return USAGE
    if isinstance(error, click.ClickException):
        say("error", error.format_message())
        return error.exit_code
    if isinstance(error, OSError):
        say("error", str(error))
        return FAILED
    advice = "" if state.debug else "; --debug shows where"
    say("error", f"unexpected {type(error).__name__}: {error}{advice}")
    return FAILED


@click.group(cls=App, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(package_name="tsdiff", prog_name="tsdiff")
def cli() -> None:
    """Tree search over diffusion and flow sampling.

    \b
    Try:
      tsdiff search --policy beam
      tsdiff plan --policy beam --nfe 400
      tsdiff describe beam

    Results go to standard output, everything else to standard error. Exit status: 0 done, 1 failed, 2 wrong usage,
    3 finished but incomplete, 130 interrupted.
    """


def main(args: Sequence[str] | None = None) -> NoReturn:
    """Run the command line.

    Args:
      args: the arguments after the program's name; None takes those of the process.
    """
    cli.main(args)
