"""What the page can ask for beyond looking. The server knows this protocol only; who views the runs hands it an object.

Everything here may be called from any thread, from several at once, and must return quickly: what takes time is started and
told by `commands`. A `UsageError` is the caller's mistake (the page shows its line), a `SetupError` says that this cannot be
done here and now.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol, TypeAlias

State: TypeAlias = Literal["waiting", "running", "done", "failed"]


@dataclass(frozen=True, slots=True)
class Command:
    """Something that was asked of a run.

    Attributes:
      id: of the command, unique in its run; letters, digits, "-" and "_" only.
      do: what: "expand", "stop".
      state: "waiting" (nobody has taken it yet), "running", "done" or "failed".
      message: one line: what came of it, or why it failed; "" where there is nothing to say.
    """

    id: str
    do: str
    state: State
    message: str = ""


@dataclass(frozen=True, slots=True)
class Question:
    """An image that a person is asked to rate.

    Attributes:
      id: of the question, unique among all that are open; letters, digits, "-" and "_" only.
      run: the folder of the run that asks.
      node: index of the node; None where it is not known.
      node_id: its id, 32 hexadecimal digits; "" where it is not known.
      verifier: the name of the verifier that asks.
      prompt: what the image should show.
      low, high: the scale: what the worst and the best image get.
      picture: the picture file, below the run's folder; None takes the node's own picture.
    """

    id: str
    run: Path
    node: int | None
    node_id: str
    verifier: str
    prompt: str
    low: float
    high: float
    picture: Path | None = None


class Steering(Protocol):
    """Commands to runs, and answers to their questions. Runs are named by their folders."""

    def expand(self, run: Path, node: int, *, children: int | None, renoise: float | None, to_level: int | None) -> str:
        """Ask for children of a node; returns the id of the command.

        Args:
          run: the folder.
          node: index in the tree of the search.
          children: how many, at least 1; None for the usual number.
          renoise: how far to go back, in [0, 1]; or `to_level`, the level to go back to. One of them at most.

        Raises:
          UsageError: if it cannot be done as asked.
          SetupError: if nobody can do it.
        """
        ...

    def stop(self, run: Path) -> str:
        """Ask who grows a run to stop after the batch; returns the id of the command. Raises UsageError if nobody grows it."""
        ...

    def commands(self, run: Path) -> Sequence[Command]:
        """What was asked of a run, the oldest first."""
        ...

    def questions(self) -> Sequence[Question]:
        """What waits for a person, of all runs that are viewed, the oldest first."""
        ...

    def answer(self, question: str, score: float | None) -> None:
        """Answer a question; None gives no score. Raises UsageError if it is not open, or the score is out of its range."""
        ...

    def close(self) -> None:
        """End what was started; closing twice is fine."""
        ...
