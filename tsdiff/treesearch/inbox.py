"""What people ask of a run while it goes on, or after: commands, as small files in a folder that the run's writer looks into.

    inbox/ID.json        a command: {"format": 1, "do": "expand" | "stop", "run": ..., ...}
    inbox/ID.told.json   what came of it, where the run itself does not tell: {"format": 1, "state": "done" | "failed", "message": ...}

The folder stands beside the lock of the run (of several prompts or seeds, of their search), since it is for whoever holds
that. A command is there once its file is, which is written as a whole under a name of its own. It is carried out once, whenever
a process is killed: an expansion writes the id of its command into `run.json` as it begins, in one step, and who finds it
there never begins it again. A command to stop is for the one process that held the lock when it was given.

Nothing that lies in the folder can harm a run: a file that is no command is told as one that failed.
"""

from __future__ import annotations

import logging
import math
import os
import platform
import re
import secrets
import shlex
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

from tsdiff.treesearch.disk import LOCAL, Disk
from tsdiff.treesearch.errors import TsdiffError, UsageError
from tsdiff.treesearch.lock import holder
from tsdiff.treesearch.questions import RunQuestions
from tsdiff.treesearch.runfolder import RUN, lock_path, read_json
from tsdiff.treesearch.smallfiles import Changes, names_in, read_small, write_small

FORMAT = 1
INBOX = "inbox"

SECONDS = 0.25
"""How often a writer looks for commands and answers, at most."""

KEPT = 64
"""Commands that are over and still told of; older ones are forgotten."""

State: TypeAlias = Literal["waiting", "running", "done", "failed"]

_ID = re.compile(r"[0-9]{20}-[0-9a-f]{8}")
_NAME = re.compile(rf"({_ID.pattern})\.json")
_LINE = 1000
_LARGEST = 1 << 53
log = logging.getLogger("tsdiff")


@dataclass(frozen=True)
class Expand:
    """Grow a run from one of its nodes.

    Attributes:
      id: of the command; ids are in the order in which commands were given.
      run: name of the run's folder beside the inbox, "." for the one that the inbox is in.
      node: its index.
      children, renoise, to_level: as for `tsdiff.expand`.
    """

    id: str
    run: str
    node: int
    children: int | None = None
    renoise: float | None = None
    to_level: int | None = None


@dataclass(frozen=True)
class Stop:
    """Let the process that writes the run stop after its batch.

    Attributes:
      pid, host: which process it is for.
    """

    id: str
    run: str
    pid: int
    host: str


@dataclass(frozen=True)
class Damaged:
    """A file under the name of a command that is none."""

    id: str
    why: str


@dataclass(frozen=True)
class Told:
    """A command, and where it stands.

    Attributes:
      message: what came of it, or what it waits for; "" where there is nothing to say.
    """

    command: Expand | Stop | Damaged
    state: State
    message: str = ""

    @property
    def id(self) -> str:
        """Of the command."""
        return self.command.id

    @property
    def do(self) -> str:
        """ "expand", "stop", or "unknown" for what is damaged."""
        return {Expand: "expand", Stop: "stop"}.get(type(self.command), "unknown")


# Asking --------------------------------------------------------------------------------------------------------------


def inbox_path(run: Path) -> Path:
    """The inbox that is for a run's writer."""
    return lock_path(run).parent / INBOX


def ask_expand(run: Path, node: int, *, children: int | None = None, renoise: float | None = None, to_level: int | None = None, disk: Disk = LOCAL) -> str:
    """Ask for an expansion of a run; returns the id of the command.

    Raises:
      UsageError: if it can be seen that this is none; the rest is told when it is carried out.
      SetupError: if it cannot be written.
    """
    said = {"node": node, "children": children, "renoise": renoise, "to_level": to_level}
    return _ask(run, "expand", {name: value for name, value in said.items() if value is not None}, disk)


def ask_stop(run: Path, *, disk: Disk = LOCAL) -> str:
    """Ask who writes a run to stop after the batch; returns the id of the command. Raises UsageError if nobody does."""
    writer = holder(lock_path(run))
    if writer is None:
        raise UsageError(f"nobody grows {str(run)!r} at present, so there is nothing to stop")
    return _ask(run, "stop", {"pid": writer.pid, "host": writer.host}, disk)


def _ask(run: Path, do: str, more: Mapping[str, Any], disk: Disk) -> str:
    inbox = inbox_path(run)
    number = f"{time.time_ns():020d}-{secrets.token_hex(4)}"
    data = {"format": FORMAT, "do": do, "run": _run_name(run), **more}
    try:
        _command(number, data)
    except ValueError as error:
        raise UsageError(f"this cannot be asked of {str(run)!r}: {error}") from None
    write_small(inbox / f"{number}.json", data, disk)
    return number


def _run_name(run: Path) -> str:
    return "." if lock_path(run).parent == run else run.name


# Reading -------------------------------------------------------------------------------------------------------------


def commands(run: Path) -> list[Told]:
    """What was asked of a run and where that stands, the oldest first. Changes nothing, and reads whatever lies there."""
    inbox, name = inbox_path(run), _run_name(run)
    known = [command for command in read_commands(inbox) if isinstance(command, Damaged) or command.run == name]
    if not known:
        return []
    drivers = commanded(run)
    return [_stands(command, run, inbox, drivers) for command in known]


def read_commands(inbox: Path) -> list[Expand | Stop | Damaged]:
    """What lies in an inbox, the oldest first."""
    return [read_command(inbox, match[1]) for name in names_in(inbox) if (match := _NAME.fullmatch(name))]


def read_command(inbox: Path, number: str) -> Expand | Stop | Damaged:
    """One command."""
    try:
        return _command(number, read_small(inbox / f"{number}.json"))
    except (ValueError, FileNotFoundError) as error:
        return Damaged(number, _line(error))


def commanded(run: Path) -> dict[str, Mapping[str, Any]]:
    """The expansions of a run that a command began, by its id, as `run.json` tells of them."""
    try:
        drivers = read_json(run / RUN).get("drivers")
    except TsdiffError:
        return {}
    listed = drivers if isinstance(drivers, list) else []
    return {driver["command"]: driver for driver in listed if isinstance(driver, dict) and isinstance(driver.get("command"), str)}


def outcome(inbox: Path, number: str) -> tuple[State, str] | None:
    """What was told of a command, if anything was."""
    try:
        data = read_small(inbox / f"{number}.told.json")
    except FileNotFoundError:
        return None
    except ValueError as error:
        return "failed", f"what came of it cannot be read: {_line(error)}"
    state, message = data.get("state"), data.get("message")
    if data.get("format") != FORMAT or state not in ("done", "failed") or not isinstance(message, str):
        return "failed", "what came of it cannot be read: it says no state that is known"
    return state, _line(message)


def _stands(command: Expand | Stop | Damaged, run: Path, inbox: Path, drivers: Mapping[str, Mapping[str, Any]]) -> Told:
    driver = drivers.get(command.id)
    if driver is not None and driver.get("status") == "done":  # also where it was stopped first, and continued
        error = driver.get("error")
        return Told(command, "failed", _line(error)) if isinstance(error, str) else Told(command, "done", _found(driver))
    told = outcome(inbox, command.id)
    if told is not None:
        return Told(command, *told)
    if isinstance(command, Damaged):
        return Told(command, "failed", f"it cannot be read: {command.why}")
    busy = _busy(run)
    if driver is not None:
        if busy:
            return Told(command, "running")
        return Told(command, "failed", f"it was stopped; continue it with: {resume_line(run)}")
    if isinstance(command, Expand) and not busy and (why := waits_for(run)):
        return Told(command, "waiting", why)
    return Told(command, "waiting")


def waits_for(run: Path) -> str:
    """Why a run that nobody writes cannot be expanded yet; "" if it can, or never can."""
    try:
        status = read_json(run / RUN).get("status")
    except TsdiffError:
        return ""
    return f"its search has to be done first: {resume_line(run)}" if status in ("running", "interrupted") and not commanded_open(run) else ""


def commanded_open(run: Path) -> bool:
    """Whether what a run has not finished is an expansion."""
    try:
        drivers = read_json(run / RUN).get("drivers")
    except TsdiffError:
        return False
    last = drivers[-1] if isinstance(drivers, list) and drivers else None
    return isinstance(last, dict) and last.get("status") != "done"


def resume_line(run: Path) -> str:
    """The command that continues a run."""
    return f"tsdiff resume {shlex.quote(str(run))}"


def _busy(run: Path) -> bool:
    try:
        return holder(lock_path(run)) is not None
    except TsdiffError:
        return False


def _found(driver: Mapping[str, Any]) -> str:
    best, score = driver.get("best"), driver.get("score")
    if not isinstance(best, int):
        return ""
    return f"its best is node {best}" + (f", {score:.6g}" if isinstance(score, float) and math.isfinite(score) else "")


# What a command may say ----------------------------------------------------------------------------------------------


def _command(number: str, data: Mapping[str, Any]) -> Expand | Stop:
    """A command as it was written. Raises ValueError if it is none."""
    known = {"expand": {"node", "children", "renoise", "to_level"}, "stop": {"pid", "host"}}
    if type(data.get("format")) is not int or data["format"] != FORMAT:
        raise ValueError(f"its format is not {FORMAT}")
    do, run = data.get("do"), data.get("run")
    if not isinstance(do, str) or do not in known:
        raise ValueError(f"it does not say what to do: {', '.join(known)}")
    if not isinstance(run, str) or not run or run == ".." or "/" in run or "\\" in run or "\0" in run:
        raise ValueError("it names no run")
    strange = data.keys() - {"format", "do", "run"} - known[do]
    if strange:
        raise ValueError(f"it says more than is known: {', '.join(sorted(map(repr, strange)))[:100]}")
    if do == "stop":
        host = data.get("host")
        if not isinstance(host, str):
            raise ValueError("it names no process to stop")
        return Stop(number, run, _whole(data, "pid", 0), host)
    renoise = data.get("renoise")
    if renoise is not None and (isinstance(renoise, bool) or not isinstance(renoise, (int, float)) or not 0.0 <= renoise <= 1.0):
        raise ValueError("renoise must lie in [0, 1]")
    if renoise is not None and data.get("to_level") is not None:
        raise ValueError("renoise and to_level both say how far to go back; give one")
    children, to_level = (None if data.get(name) is None else _whole(data, name, low) for name, low in (("children", 1), ("to_level", 0)))
    return Expand(number, run, _whole(data, "node", 0), children, None if renoise is None else float(renoise), to_level)


def _whole(data: Mapping[str, Any], name: str, low: int) -> int:
    value = data.get(name)
    if type(value) is not int or not low <= value < _LARGEST:
        raise ValueError(f"{name} must be a whole number from {low} on")
    return value


def _line(text: object) -> str:
    """Text as one line that is not too long."""
    line = " ".join(str(text).split())
    return line if len(line) <= _LINE else f"{line[: _LINE - 1]}…"


# Answering -----------------------------------------------------------------------------------------------------------


def tell(inbox: Path, number: str, state: Literal["done", "failed"], message: str, disk: Disk = LOCAL) -> None:
    """Write down what came of a command. Raises UsageError, SetupError if that cannot be done."""
    write_small(inbox / f"{number}.told.json", {"format": FORMAT, "state": state, "message": _line(message)}, disk)


def forget(inbox: Path, disk: Disk = LOCAL) -> None:
    """Remove the oldest commands that are over, but for the newest `KEPT`. For the holder of the lock."""
    over = [name.removesuffix(".told.json") for name in names_in(inbox) if name.endswith(".told.json") and _ID.fullmatch(name.removesuffix(".told.json"))]
    for number in over[:-KEPT]:
        try:
            for name in (f"{number}.json", f"{number}.told.json"):  # in this order: what is told of no command means nothing
                if (inbox / name).is_file():
                    disk.remove(inbox / name)
        except OSError as error:
            log.warning("cannot forget a command in %s: %s", inbox, error)
            return


class Inbox:
    """The inbox of the process that writes runs, which holds their lock: commands to stop, and people's answers.

    For one thread.

    Args:
      folder: where the lock is.
      disk: through which files are changed.
      clock: tells seconds.
    """

    def __init__(self, folder: Path, *, disk: Disk = LOCAL, clock: Callable[[], float] = time.monotonic) -> None:
        self._inbox = folder / INBOX
        self._disk = disk
        self._clock = clock
        self._changes = Changes(self._inbox, clock)
        self._questions: dict[Path, RunQuestions] = {}
        self._heard: set[str] = set()
        self._next = -math.inf
        self._stop = False

    def questions(self, run: Path) -> RunQuestions:
        """Where a run puts its questions to people."""
        if run not in self._questions:
            self._questions[run] = RunQuestions(run, disk=self._disk, clock=self._clock)
        return self._questions[run]

    def look(self) -> bool:
        """Take what has arrived, now and then; whether somebody has asked to stop."""
        now = self._clock()
        if now >= self._next:
            self._next = now + SECONDS
            self._hear()
            if self._changes.look():
                self._stop = self._stops() or self._stop
        return self._stop

    def _hear(self) -> None:
        for questions in list(self._questions.values()):
            questions.look()

    def close(self) -> None:
        """Tell those who have asked to stop what ends by itself."""
        self._stops("it had ended already")

    def _stops(self, message: str = "it stops after the batch") -> bool:
        """Take commands to stop, and tell so first: a process that was told to stop must not be told twice."""
        mine = False
        for name in names_in(self._inbox):
            match = _NAME.fullmatch(name)
            if match is None or match[1] in self._heard:
                continue
            self._heard.add(match[1])
            command = read_command(self._inbox, match[1])
            if not isinstance(command, Stop) or outcome(self._inbox, match[1]) is not None:
                continue
            ours = (command.pid, command.host) == (os.getpid(), platform.node())
            mine = mine or ours
            try:
                tell(self._inbox, command.id, *(("done", message) if ours else ("failed", "the process that it was for has ended")), disk=self._disk)
            except TsdiffError as error:
                log.warning("%s", error)
        return mine

