"""Carrying out what people asked of a run while it was busy: the expansions that wait in its inbox, one after the other.

Whoever has just written the run does it, or who is started for it. An expansion that waits is begun once: its command's id
is in `run.json` from the moment that it changes anything, and is looked for there under the run's lock.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from tsdiff.treesearch.disk import LOCAL, Disk
from tsdiff.treesearch.durable import status, unfinished_expansion
from tsdiff.treesearch.errors import SearchFailed, TsdiffError, UsageError
from tsdiff.treesearch.expand import carry_out
from tsdiff.treesearch.expansion import Asked, Expansion, Taken, planned_expansion
from tsdiff.treesearch.inbox import Expand, commanded, forget, inbox_path, outcome, read_commands, tell
from tsdiff.treesearch.lock import Busy
from tsdiff.treesearch.runfile import SYNC_SECONDS
from tsdiff.treesearch.runfolder import RUN, lock_path

if TYPE_CHECKING:
    from tsdiff.treesearch.results import Result
    from tsdiff.treesearch.search import Progress


class Listener(Protocol):
    """Is told how it goes."""

    def begins(self, expansion: Expansion) -> None:
        """An expansion has been planned, and is about to begin or to go on."""
        ...

    def done(self, result: Result) -> None:
        """An expansion has come to its end."""
        ...

    def failed(self, folder: Path, message: str) -> None:
        """What was asked of a run cannot be done, or came to nothing."""
        ...


class Silent:
    """A `Listener` that says nothing."""

    def begins(self, expansion: Expansion) -> None:
        """Nothing is said."""

    def done(self, result: Result) -> None:
        """Nothing is said."""

    def failed(self, folder: Path, message: str) -> None:
        """Nothing is said; the inbox tells it."""


def waiting(folder: Path) -> list[Expand]:
    """The expansions that wait in the inbox of a folder (of a run, or of a search of several), the oldest first."""
    found = []
    inbox = inbox_path(folder)
    begun: dict[str, bool] = {}
    for command in read_commands(inbox):
        if isinstance(command, Expand) and outcome(inbox, command.id) is None:
            run = run_of(inbox, command)
            if run is not None and command.run not in begun:
                begun.update(dict.fromkeys(commanded(run), True))
            if not begun.get(command.id, False):
                found.append(command)
    return found


def run_of(inbox: Path, command: Expand) -> Path | None:
    """The folder of the run that a command means; None if there is none beside its inbox."""
    run = inbox.parent if command.run == "." else inbox.parent / command.run
    return run if (run / RUN).is_file() and lock_path(run).parent == inbox.parent else None


def carry_out_waiting(
    folder: Path,
    *,
    callback: Callable[[Progress], None] | None = None,
    stop: Callable[[], bool] = lambda: False,
    listener: Listener = Silent(),  # noqa: B008 - it has no state
    disk: Disk = LOCAL,
    sync_seconds: float = SYNC_SECONDS,
) -> int:
    """Carry out the expansions that wait in a folder's inbox; the lock must be free, or whoever holds it will do it.

    An expansion that cannot be done is told as failed, and the next one is begun. One of a run whose search is not done
    waits on. Where an earlier expansion was interrupted, that one is finished first.

    Args:
      folder: of a run, or of a search of several.
      callback, stop, disk, sync_seconds: as for `tsdiff.treesearch.expand.carry_out`.
      listener: told how it goes.

    Returns:
      How many commands were carried out.

    Raises:
      KeyboardInterrupt: if it was told to stop; commands that have not begun are told as failed.
    """
    inbox, count = inbox_path(folder), 0
    passed: set[str] = set()  # of runs that are not done
    while command := next((one for one in waiting(folder) if one.id not in passed), None):
        run = run_of(inbox, command)
        try:
            if run is None:
                raise UsageError(f"{str(inbox.parent)!r} has no run of the name {command.run!r}")
            if unfinished_expansion(run):
                with suppress(SearchFailed):  # which is told in the run, and is not this command's
                    _one(run, None, None, callback, stop, listener, disk, sync_seconds)
                continue
            if status(run) in ("running", "interrupted"):
                passed.add(command.id)
                continue
            asked = Asked(command.node, command.children, command.renoise, command.to_level)
            result = _one(run, asked, command.id, callback, stop, listener, disk, sync_seconds)
            count += 1
            driver = result.drivers[-1]
            tell(inbox, command.id, "done", "" if driver["score"] is None else f"its best is node {driver['best']}, {driver['score']:.6g}", disk)
        except Busy:
            break
        except Taken:
            continue
        except KeyboardInterrupt:
            for one in waiting(folder):
                tell(inbox, one.id, "failed", "it was stopped before it began", disk)
            raise
        except Exception as error:
            message = str(error) if isinstance(error, TsdiffError) else f"unexpected {type(error).__name__}: {error}"
            count += isinstance(error, SearchFailed)
            tell(inbox, command.id, "failed", message, disk)
            listener.failed(run or folder, message)
            if not isinstance(error, TsdiffError):
                raise
    forget(inbox, disk)
    return count


def _one(
    run: Path,
    asked: Asked | None,
    command: str | None,
    callback: Callable[[Progress], None] | None,
    stop: Callable[[], bool],
    listener: Listener,
    disk: Disk,
    sync_seconds: float,
) -> Result:
    with planned_expansion(run, asked, command=command, disk=disk) as expansion:
        listener.begins(expansion)
        result = carry_out(expansion, callback=callback, stop=stop, disk=disk, sync_seconds=sync_seconds)
    listener.done(result)
    return result
