"""A person as a verifier: pictures are shown in the terminal one by one, or in the run's page, and the search goes on with what is answered."""

from __future__ import annotations

import atexit
import io
import math
import os
import shutil
import tempfile
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from tsdiff.treesearch.errors import UsageError
from tsdiff.treesearch.parameters import check, parameter
from tsdiff.treesearch.protocols import Candidates, Condition, Need, Page, Scores
from tsdiff.treesearch.terminal import undisturbed
from tsdiff.verifiers.human_terminal import Dialogue, inline, inline_protocol, printable, require_terminal
from tsdiff.verifiers.neural import NOT_FINITE

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

Answer = Callable[..., None]

SKIPPED = "the person gave no score"
STOPPED = "the person stopped scoring"


@dataclass(frozen=True)
class Question:
    """A picture that waits for its score: 8-bit pixels (H, W, 3), or None where it cannot be shown."""

    node_id: str
    prompt: str
    pixels: NDArray[np.uint8] | None
    answer: Answer


@dataclass(frozen=True, kw_only=True)
class Human:
    """A person's scores, asked for in the terminal or in the run's page: higher is better, in a range of your choice (0 to 10).

    In the terminal each picture is saved as a file and shown by its path, in kitty, Ghostty, iTerm2, WezTerm and mintty also as a
    picture, with its prompt and the id of its node. The answer is a number, s (no score for this one), q (no more
    scores at all; the search goes on without) or ? (help). While a question waits, other searches go on.

    Standard input must be a terminal, or else `human:where=page`: then the questions wait in the run's folder until
    somebody answers them in its page (`tsdiff view RUN`), while the search goes on, is stopped or was killed. What was
    answered is not asked again. Only searches that are recorded can ask there (`--out`, which the command line always has).

    A search asks as often as its policy scores: `tsdiff plan` says how often.

    Raises:
      UsageError: for a wrong option, or a folder that is a file.
    """

    scope: ClassVar[Literal["row", "set"]] = "row"
    latency: ClassVar[Literal["immediate", "pending"]] = "pending"
    judges: ClassVar[Literal["any", "final"]] = "any"
    differentiable: ClassVar[bool] = False

    where: Literal["terminal", "page"] = parameter("terminal", help="where the person is asked: at the terminal, or in the page of the run (`tsdiff view RUN`)")
    low: float = parameter(0.0, low=-1e6, high=1e6, help="the lowest score")
    high: float = parameter(10.0, low=-1e6, high=1e6, help="the highest score")
    folder: str = parameter("", help="where the terminal's pictures are kept; without one they go when the program ends")
    show: Literal["auto", "kitty", "iterm", "none"] = parameter("auto", help="how the terminal shows pictures; none names the file only")
    name: str = parameter("human", help="what its scores are called, to tell two of them apart")
    _state: Any = field(init=False, repr=False, compare=False, default=None)

    def __post_init__(self) -> None:
        check(self)
        if not self.name or any(character in self.name for character in ":=,@ \t\n"):
            raise UsageError(f"human: name is {self.name!r} but must not be empty or contain ':', '=', ',', '@' or spaces")
        if self.low >= self.high:
            raise UsageError(f"{self.name}: scores from {self.low:g} to {self.high:g} are no range; low must be below high")
        if self.folder and self.where == "page":
            raise UsageError(f"{self.name}: folder {self.folder!r} is for where=terminal; the page keeps its pictures in the run")
        if self.folder and Path(self.folder).exists() and not Path(self.folder).is_dir():
            raise UsageError(f"{self.name}: folder {self.folder!r} is a file; name a folder")
        object.__setattr__(self, "_state", _Conversation(self))

    @property
    def needs(self) -> frozenset[Need]:
        """Pictures, and what tells them apart; in the page also that."""
        return frozenset({"images", "conditions", "node_ids"} | ({"pages"} if self.where == "page" else set()))

    def prepare(self, device: str) -> None:
        """Make the folder. Raises UsageError if that cannot be done, or nobody can answer."""
        if self.where == "page":
            return
        require_terminal(self.name)
        try:
            self._state.open_folder()
        except OSError as error:
            raise UsageError(f"{self.name}: pictures cannot be kept in {self.folder or tempfile.gettempdir()} ({error.strerror}); choose another folder") from error

    def check(self, condition: Condition) -> None:
        """Any condition will do. Raises UsageError if nobody can answer, before anything is loaded."""
        if self.where == "terminal":
            require_terminal(self.name)

    def ask(self, candidates: Candidates, answer: Answer) -> None:
        """Queue the pictures. In the terminal a thread asks about them and answers one by one, in order; in the page in any order."""
        seen: dict[str, Question] = {}
        rows: dict[str, int] = {}
        for row, (node_id, condition, image) in enumerate(zip(candidates.node_ids, candidates.conditions, candidates.images, strict=True)):
            if node_id not in seen:  # one answer is for all rows of a node
                fine = bool(image.isfinite().all())
                pixels = (image.detach().float().clamp(0.0, 1.0) * 255.0).round().byte().permute(1, 2, 0).cpu().numpy() if fine else None
                seen[node_id], rows[node_id] = Question(node_id, condition.label, pixels, answer), row
        if self.where == "terminal":
            self._state.add(seen.values())
            return
        pages = candidates.pages
        for node_id, question in seen.items():
            self._ask_page(pages[rows[node_id]], question)

    def _ask_page(self, page: Page, question: Question) -> None:
        """Put one question to the page of its run."""
        if question.pixels is None:
            question.answer(question.node_id, None, NOT_FINITE)
            return

        def heard(score: float | None) -> None:
            question.answer(question.node_id, score, SKIPPED if score is None else None)

        page.ask(self.name, png(question.pixels), low=self.low, high=self.high, heard=heard)

    def score(self, candidates: Candidates) -> Scores:
        """Ask in the terminal, and wait for all the answers. Raises UsageError for `where=page`."""
        if self.where == "page":
            raise UsageError(f"verifier {self.name} asks in the page of a recorded search; outside of one ask in the terminal, with where=terminal")
        known: dict[str, tuple[float | None, str | None]] = {}
        heard = threading.Condition()

        def answer(node_id: str, score: float | None, reason: str | None = None) -> None:
            with heard:
                known[node_id] = score, reason
                heard.notify()

        self.ask(candidates, answer)
        wanted = set(candidates.node_ids)
        with heard:
            heard.wait_for(lambda: wanted <= known.keys())
        answers = [known[node_id] for node_id in candidates.node_ids]
        return Scores([math.nan if score is None else score for score, _ in answers], reasons={row: why for row, (_, why) in enumerate(answers) if why})


class _Conversation:
    """What is asked and answered, in a thread that lives while there are questions."""

    def __init__(self, human: Human) -> None:
        self.human = human
        self.lock = threading.Lock()
        self.waiting: deque[Question] = deque()
        self.asking = False
        self.stopped = False
        self.number = 0
        self.folder: Path | None = None

    def open_folder(self) -> Path:
        """Where pictures are kept."""
        if self.folder is None:
            if self.human.folder:
                self.folder = Path(self.human.folder)
                self.folder.mkdir(parents=True, exist_ok=True)
            else:
                self.folder = Path(tempfile.mkdtemp(prefix="tsdiff-human-"))
                atexit.register(shutil.rmtree, self.folder, ignore_errors=True)
        return self.folder

    def add(self, questions: Any) -> None:
        """Questions, to be asked after those that wait."""
        with self.lock:
            self.waiting.extend(questions)
            if self.asking or not self.waiting:
                return
            self.asking = True
        threading.Thread(target=self._converse, name=f"verifier {self.human.name}", daemon=True).start()

    def _converse(self) -> None:
        while True:
            with self.lock:
                if not self.waiting:
                    self.asking = False
                    return
                question = self.waiting.popleft()
            try:
                score, reason = self._answer(question)
            except Exception as error:  # every question must get its answer, or the search waits for ever
                score, reason = None, f"asking failed: {type(error).__name__}: {error}"
            question.answer(question.node_id, score, reason)

    def _answer(self, question: Question) -> tuple[float | None, str | None]:
        """A score, or None and why."""
        if question.pixels is None:
            return None, NOT_FINITE
        if self.stopped:
            return None, STOPPED
        typed, shown = require_terminal(self.human.name)
        path = self._save(question)
        protocol = inline_protocol(os.environ) if self.human.show == "auto" else self.human.show
        facts = f"\n{inline(path.read_bytes(), protocol)}picture  {path}\nprompt   {printable(question.prompt) or '(none)'}\nnode     {question.node_id}\n"
        with undisturbed():
            said = Dialogue(typed, shown, self.human.low, self.human.high).ask(facts, len(self.waiting))
        if said == "quit":
            self.stopped = True
            return None, STOPPED
        return (None, SKIPPED) if said == "skip" else (said, None)

    def _save(self, question: Question) -> Path:
        """The picture as a file that was not there before: ids of nodes are the same in equal searches."""
        folder = self.open_folder()
        while True:
            self.number += 1
            path = folder.absolute() / f"{self.number:04d}-{question.node_id}.png"
            if not path.exists():
                break
        assert question.pixels is not None
        path.write_bytes(png(question.pixels))
        return path


def png(pixels: NDArray[np.uint8]) -> bytes:
    """8-bit pixels (H, W, 3) as a PNG file."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    return buffer.getvalue()
