"""People for tests: somebody who answers the questions of runs as they come, and a verifier that scores alike at once."""

from __future__ import annotations

import _thread
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from PIL import Image

from tsdiff.treesearch import engine, inbox
from tsdiff.treesearch.protocols import Scores
from tsdiff.treesearch.questions import OpenQuestion, answer_question, open_questions

PATIENCE = 60.0


def taste(pixels: np.ndarray) -> float:
    """What a picture of 8-bit pixels (H, W, 3) is worth, from 0 to 10."""
    weights = np.arange(1, pixels.size + 1).reshape(pixels.shape) % 7
    return float(10.0 * (weights * pixels.astype(np.int64)).sum() / (weights.sum() * 255))


def worth(question: OpenQuestion) -> float:
    """What the picture of a question is worth."""
    assert question.picture is not None
    with Image.open(question.picture) as opened:
        return taste(np.asarray(opened))


class Taste:
    """A verifier that says at once what `worth` says.

    Attributes:
      asked: ids of the nodes that it has scored.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"images", "node_ids"})
    scope = "row"
    latency = "immediate"
    judges = "any"
    differentiable = False

    def __init__(self, name: str = "human") -> None:
        self.name = name
        self.asked: list[str] = []

    def prepare(self, device: str) -> None:
        pass

    def check(self, condition: Any) -> None:
        pass

    def score(self, candidates: Any) -> Scores:
        self.asked += candidates.node_ids
        pixels = (candidates.images.clamp(0.0, 1.0) * 255.0).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
        return Scores([taste(one) for one in pixels])


class Person:
    """Somebody who has answered questions.

    Attributes:
      answered: the questions, in the order in which they were answered.
      wrong: what went wrong.
    """

    def __init__(self) -> None:
        self.answered: list[OpenQuestion] = []
        self.wrong: list[BaseException] = []


def runs_in(out: Path) -> list[Path]:
    """Run folders anywhere in a folder."""
    # Folders go while a search tidies up, which this way of walking passes over.
    return sorted(Path(folder) for folder, _, files in os.walk(out) if "run.json" in files)


@contextmanager
def answering(
    out: Path, value: Callable[[OpenQuestion], float | None] = worth, *, most: int = 10**9, answer: Callable[[OpenQuestion, float | None], None] | None = None
) -> Iterator[Person]:
    """Somebody answers the questions of all runs in a folder, the newest first, up to `most` of them."""
    person, over = Person(), threading.Event()

    def give(question: OpenQuestion, score: float | None) -> None:
        answer_question(question.run, question.id, score)

    def live() -> None:
        try:
            while not over.wait(0.01):
                for question in [one for run in runs_in(out) for one in open_questions(run)][::-1]:
                    if len(person.answered) < most:
                        (answer or give)(question, value(question))
                        person.answered.append(question)
        except BaseException as error:
            person.wrong.append(error)
            _thread.interrupt_main()  # nobody will answer any more

    thread = threading.Thread(target=live)
    thread.start()
    try:
        yield person
    finally:
        over.set()
        thread.join(PATIENCE)
        if person.wrong:
            raise person.wrong[0]


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Answers and commands are looked for at every turn."""
    monkeypatch.setattr(inbox, "SECONDS", 0.0)
    monkeypatch.setattr(engine, "PATIENCE", 0.005)
