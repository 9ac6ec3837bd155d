"""Questions that a run puts to people: small files in its folder, which the page shows and answers (`tsdiff view`).

    inbox/questions/ID.png           the picture
    inbox/questions/ID.json          the question; it is there once this is
    inbox/questions/ID.answer.json   {"format": 1, "score": a number or null}

The id follows from the node and from who asks, so that a question is the same one before and after an interruption, and an
answer that is there is taken at once, whoever was killed in between. The files go when the run is done, since its journal
has all answers by then.
"""

from __future__ import annotations

import hashlib
import logging
import re
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from tsdiff.treesearch.disk import LOCAL, Disk
from tsdiff.treesearch.errors import UsageError
from tsdiff.treesearch.node import Node
from tsdiff.treesearch.smallfiles import MOST_BYTES, Changes, is_folder, names_in, read_small, write_bytes, write_small

FORMAT = 1
QUESTIONS = ("inbox", "questions")

Heard: TypeAlias = Callable[[float | None], None]

_ID = re.compile(r"[0-9a-f]{32}")
_OURS = re.compile(rf"{_ID.pattern}\.(json|png|answer\.json)(\.part)?")
log = logging.getLogger("tsdiff")


@dataclass(frozen=True)
class OpenQuestion:
    """A picture that waits for a person's score.

    Attributes:
      id: unique in the run, 32 hexadecimal digits.
      run: the folder of the run that asks.
      node: index of the node; `node_id` its id, 32 hexadecimal digits.
      verifier: who asks.
      prompt: what the picture should show.
      low, high: what the worst and the best picture get.
      picture: the PNG file; None if it is not there.
      since: when it was asked, seconds since 1970.
    """

    id: str
    run: Path
    node: int
    node_id: str
    verifier: str
    prompt: str
    low: float
    high: float
    picture: Path | None
    since: float


def open_questions(run: Path) -> list[OpenQuestion]:
    """The questions of a run that have no answer, the oldest first. Changes nothing; what is damaged is left out."""
    folder = _folder(run)
    found: list[OpenQuestion] = []
    for name in names_in(folder) if _ordinary(run) else ():
        number = name.removesuffix(".json")
        if number != name and _ID.fullmatch(number) and (question := _read(run, number)) is not None and not _answered(folder, question):
            found.append(question)
    return sorted(found, key=lambda question: (question.since, question.node))


def answer_question(run: Path, number: str, score: float | None, *, disk: Disk = LOCAL) -> None:
    """Answer a question; None gives no score.

    Raises:
      UsageError: if it is not open (any more), or the score is not in its range.
      SetupError: if the answer cannot be written.
    """
    question = _read(run, number) if _ID.fullmatch(number) and _ordinary(run) else None
    if question is None or _answered(_folder(run), question):
        raise UsageError("this question is not open any more")
    if score is not None and not _fits(score, question.low, question.high):
        raise UsageError(f"the score is {score!r} but must be a number from {question.low:g} to {question.high:g}, or null for none")
    write_small(_folder(run) / f"{number}.answer.json", {"format": FORMAT, "score": score}, disk)


class RunQuestions:
    """What a run asks, on the side of the process that writes it. For one thread.

    Args:
      run: its folder.
      disk: through which files are changed.
      clock: tells seconds.
    """

    def __init__(self, run: Path, *, disk: Disk = LOCAL, clock: Callable[[], float] = time.monotonic) -> None:
        self._run = run
        self._folder = _folder(run)
        self._disk = disk
        self._changes = Changes(self._folder, clock)
        self._open: dict[str, tuple[OpenQuestion, list[Heard]]] = {}

    def ask(self, node: Node, at: str, prompt: str, who: str, picture: bytes, *, low: float, high: float, heard: Heard) -> None:
        """Put a question, or take the answer that it has already.

        Args:
          node: whose picture it is.
          at: how the picture was made of it ("@lookahead6"), "" for its own estimate.
          prompt: what it should show.
          who: the verifier's name.
          picture: a PNG file.
          low, high: the range of scores.
          heard: called with the score, None for none: now, or by `look`.

        Raises:
          UsageError, SetupError: if it cannot be written.
        """
        node_id = f"{node.id:032x}"
        number = hashlib.sha256(f"{node_id}\0{who}\0{at}".encode("utf-8", "surrogatepass")).hexdigest()[:32]
        question = OpenQuestion(number, self._run, node.index, node_id, who, prompt, low, high, None, time.time())
        if not _ordinary(self._run):
            self._make_folders()
        known = _answer(self._folder, question)
        if known is not None and known.good:
            heard(known.score)
            return
        if number in self._open:
            self._open[number][1].append(heard)
            return
        said = {"format": FORMAT, "node": node.index, "node_id": node_id, "verifier": who, "at": at, "prompt": _short(prompt), "low": low, "high": high}
        write_bytes(self._folder / f"{number}.png", picture, self._disk)
        write_small(self._folder / f"{number}.json", said, self._disk)
        self._open[number] = (question, [heard])

    def look(self) -> None:
        """Take the answers that have arrived. A file that is no answer is removed, so that the question is open again."""
        if not self._open or not self._changes.look():
            return
        for number, (question, waiting) in list(self._open.items()):
            known = _answer(self._folder, question)
            if known is None:
                continue
            if not known.good:
                self._clear(self._folder / f"{number}.answer.json")
                continue
            del self._open[number]
            for heard in waiting:
                heard(known.score)

    def _make_folders(self) -> None:
        inbox = self._folder.parent
        try:
            self._disk.make_folder(inbox)
            if is_folder(inbox):
                self._disk.make_folder(self._folder)
        except OSError as error:
            raise UsageError(f"cannot ask in {str(self._folder)!r} ({error.strerror}); make {str(self._run)!r} writable") from error
        if not _ordinary(self._run):
            raise UsageError(f"{str(self._folder)!r} is a link, and nothing is written through it; remove it")

    def _clear(self, path: Path) -> None:
        if path.is_file() or path.is_symlink():
            log.warning("%s is no answer, and is removed", path)
            _remove(path, self._disk)


def forget_questions(run: Path, disk: Disk = LOCAL) -> None:
    """Remove a run's questions and answers, which its journal has by now; what is none of them stays."""
    folder = _folder(run)
    if not _ordinary(run):
        return
    names = names_in(folder)
    # Questions before answers: one without its answer would be open again.
    for name in sorted(names, key=lambda name: name.count(".") > 1 or name.endswith(".png")):
        if _OURS.fullmatch(name) and ((folder / name).is_file() or (folder / name).is_symlink()):
            _remove(folder / name, disk)
    try:
        folder.rmdir()
    except OSError:
        log.debug("%s is not empty, and stays", folder)


def _folder(run: Path) -> Path:
    return run.joinpath(*QUESTIONS)


def _ordinary(run: Path) -> bool:
    """Whether the folder of questions is there, and no part of the way to it leads elsewhere."""
    return is_folder(run / QUESTIONS[0]) and is_folder(_folder(run))


def _read(run: Path, number: str) -> OpenQuestion | None:
    """A question; None if it is none."""
    folder = _folder(run)
    try:
        data: dict[str, Any] = read_small(folder / f"{number}.json")
        since = (folder / f"{number}.json").stat().st_mtime
    except (OSError, ValueError):
        return None
    node, node_id, verifier, prompt, low, high = (data.get(name) for name in ("node", "node_id", "verifier", "prompt", "low", "high"))
    if data.get("format") != FORMAT or type(node) is not int or not 0 <= node < 1 << 53:
        return None
    if not isinstance(node_id, str) or not _ID.fullmatch(node_id) or not isinstance(verifier, str) or not isinstance(prompt, str):
        return None
    if not _number(low) or not _number(high) or not low < high:  # type: ignore[operator]
        return None
    picture = folder / f"{number}.png"
    return OpenQuestion(number, run, node, node_id, verifier, prompt, low, high, picture if picture.is_file() and not picture.is_symlink() else None, since)  # type: ignore[arg-type]


@dataclass(frozen=True)
class _Answer:
    """What lies there as an answer; one that is not `good` is none."""

    score: float | None = None
    good: bool = True


def _answer(folder: Path, question: OpenQuestion) -> _Answer | None:
    """The answer to a question; None if there is none."""
    try:
        data = read_small(folder / f"{question.id}.answer.json")
    except FileNotFoundError:
        return None
    except ValueError:
        return _Answer(good=False)
    score = data.get("score")
    if data.get("format") != FORMAT or "score" not in data or not (score is None or _fits(score, question.low, question.high)):
        return _Answer(good=False)
    return _Answer(None if score is None else float(score))


def _answered(folder: Path, question: OpenQuestion) -> bool:
    known = _answer(folder, question)
    return known is not None and known.good


def _fits(score: object, low: float, high: float) -> bool:
    return _number(score) and low <= score <= high  # type: ignore[operator]


def _number(value: object) -> bool:
    return not isinstance(value, bool) and isinstance(value, (int, float)) and abs(value) <= sys.float_info.max  # no NaN either


def _short(prompt: str) -> str:
    """As much of a prompt as a small file can hold, however it is written there."""
    most = MOST_BYTES // 8
    return prompt if len(prompt) <= most else f"{prompt[: most - 1]}…"


def _remove(path: Path, disk: Disk) -> None:
    try:
        disk.remove(path)
    except OSError as error:
        log.warning("cannot remove %s: %s", path, error)
