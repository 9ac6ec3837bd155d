"""What the viewer's page can ask for, carried out: by whoever writes the run, else by a process that is started for it.

The page's server knows `tsdiff.viewer.steering.Steering` alone; this is it. Everything goes through the run's inbox. An
expansion is done in a process of its own (`python -m tsdiff.cli.errands`): the server stays responsive, memory of a model is
given back, and neither of them takes the other along when it is killed. There is one such process at a time, and it is begun
only for what was asked for here: looking at a run that somebody else has made starts nothing.
"""

from __future__ import annotations

import hashlib
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO

from tsdiff.treesearch.durable import unfinished_expansion
from tsdiff.treesearch.errors import TsdiffError, UsageError
from tsdiff.treesearch.inbox import Told, ask_expand, ask_stop, commands, inbox_path, tell
from tsdiff.treesearch.lock import holder
from tsdiff.treesearch.questions import OpenQuestion, answer_question, open_questions
from tsdiff.treesearch.runfolder import RUN, lock_path, read_json
from tsdiff.viewer.steering import Command, Question

SECONDS = 0.25
"""How often it is looked whether something can be started."""

TRIES = 3
"""How often a process is started for a command that it does not take."""

PATIENCE = 30.0
"""Seconds that a process has, at the end, to finish its batch."""


class RunSteering:
    """Commands to runs and answers to their questions; implements `tsdiff.viewer.steering.Steering`.

    Args:
      runs: the folders of the runs that are viewed, now.
      program: what carries out the commands in a folder's inbox; the folder is its last argument.
    """

    def __init__(self, runs: Callable[[], Iterable[Path]], *, program: Sequence[str] = (sys.executable, "-m", "tsdiff.cli.errands")) -> None:
        self._runs = runs
        self._worker = _Worker(program)

    def expand(self, run: Path, node: int, *, children: int | None, renoise: float | None, to_level: int | None) -> str:
        """Ask for children of a node; returns the id of the command."""
        if not (run / RUN).is_file():
            raise UsageError(f"{str(run)!r} is not a run")
        command = ask_expand(run, node, children=children, renoise=renoise, to_level=to_level)
        self._worker.want(run, command)
        return command

    def stop(self, run: Path) -> str:
        """Ask who grows a run to stop after the batch; returns the id of the command."""
        return ask_stop(run)

    def commands(self, run: Path) -> Sequence[Command]:
        """What was asked of a run, the oldest first."""
        return [Command(one.id, one.do, one.state, one.message or self._worker.about(one)) for one in commands(run)]

    def questions(self) -> Sequence[Question]:
        """What waits for a person, of all runs that are viewed, the oldest first."""
        waiting = [question for run in self._runs() for question in open_questions(run)]
        return [_shown(question) for question in sorted(waiting, key=lambda question: (question.since, question.node))]

    def answer(self, question: str, score: float | None) -> None:
        """Answer a question; None gives no score."""
        which, _, number = question.partition("-")
        run = next((run for run in self._runs() if _place(run) == which), None)
        if run is None:
            raise UsageError("this question is not open any more")
        answer_question(run, number, score)

    def close(self) -> None:
        """End what was started, like a first Ctrl-C; what it has done is kept. Closing twice is fine."""
        self._worker.close()


def _place(run: Path) -> str:
    """Tells equal questions of different runs apart."""
    return hashlib.sha256(bytes(run.resolve())).hexdigest()[:16]


def _shown(question: OpenQuestion) -> Question:
    return Question(
        id=f"{_place(question.run)}-{question.id}",
        run=question.run,
        node=question.node,
        node_id=question.node_id,
        verifier=question.verifier,
        prompt=question.prompt,
        low=question.low,
        high=question.high,
        picture=question.picture,
    )


class _Worker:
    """Starts a process for what waits, one at a time, as soon as nobody else writes the run.

    Args:
      program: see `RunSteering`.
    """

    def __init__(self, program: Sequence[str]) -> None:
        self._program = list(program)
        self._lock = threading.Lock()
        self._wanted: dict[str, Path] = {}  # commands that are not over, and their runs
        self._tries: dict[str, int] = {}
        self._process: subprocess.Popen[bytes] | None = None
        self._for: Path | None = None  # the inbox that it works for
        self._said: IO[bytes] | None = None
        self._closed = threading.Event()
        self._thread: threading.Thread | None = None

    def want(self, run: Path, command: str) -> None:
        """Have a command carried out."""
        with self._lock:
            if self._closed.is_set():
                raise UsageError("the viewer is closing; ask again when it is open")
            self._wanted[command] = run
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="steering", daemon=True)
                self._thread.start()

    def about(self, one: Told) -> str:
        """What to say about a command of which the run says nothing."""
        process = self._process
        if one.state != "waiting" or process is None or process.poll() is not None:
            return ""
        return "the model is being loaded"

    def close(self) -> None:
        """End."""
        self._closed.set()
        if self._thread is not None:
            self._thread.join()
        process = self._process
        if process is None:
            return
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGKILL):
            if process.poll() is None:
                process.send_signal(number)
                with suppress(subprocess.TimeoutExpired):
                    process.wait(PATIENCE if number == signal.SIGINT else 5.0)
        self._ended()

    def _work(self) -> None:
        while not self._closed.wait(SECONDS):
            if self._process is not None:
                if self._process.poll() is None:
                    continue
                self._ended()
            for run in self._startable():
                self._start(run)
                break

    def _startable(self) -> list[Path]:
        """Runs that can be grown now; forgets the commands that are over."""
        found = []
        for command, run in list(self._wanted.items()):
            try:
                state = next((one.state for one in commands(run) if one.id == command), None)
                if state not in ("waiting", "running"):
                    with self._lock:
                        del self._wanted[command]
                elif state == "waiting" and holder(lock_path(run)) is None and (read_json(run / RUN).get("status") in ("done", "failed") or unfinished_expansion(run)):
                    self._tries[command] = self._tries.get(command, 0) + 1
                    if self._tries[command] > TRIES:
                        self._give_up(run, command, "no process could be started for it")
                    else:
                        found.append(run)
            except TsdiffError as error:
                self._give_up(run, command, str(error))
        return found

    def _start(self, run: Path) -> None:
        self._for = inbox_path(run)
        self._said = tempfile.TemporaryFile()  # noqa: SIM115 - closed when the process has ended
        try:
            # A session of its own: Ctrl-C at the viewer's terminal must reach it once only, from `close`.
            self._process = subprocess.Popen([*self._program, str(self._for.parent)], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=self._said, start_new_session=True)
        except OSError as error:
            self._said.close()
            self._tell_failed(f"no process could be started ({error.strerror})")

    def _ended(self) -> None:
        """The process has ended: say why, where it has not taken what it was started for."""
        process, said, self._process = self._process, self._said, None
        if process is None or said is None:
            return
        said.seek(0)
        lines = [line.strip() for line in said.read().decode(errors="replace").splitlines() if line.strip()]
        said.close()
        if process.returncode:
            self._tell_failed(lines[-1].removeprefix("error: ") if lines and process.returncode > 0 else f"its process ended with status {process.returncode}")

    def _tell_failed(self, why: str) -> None:
        for command, run in list(self._wanted.items()):
            if inbox_path(run) == self._for and any(one.id == command and one.state == "waiting" for one in commands(run)):
                self._give_up(run, command, why)

    def _give_up(self, run: Path, command: str, why: str) -> None:
        with self._lock:
            self._wanted.pop(command, None)
        with suppress(TsdiffError):  # of a run that cannot be written nothing more can be told
            tell(inbox_path(run), command, "failed", why)

