"""Does a picture show what its prompt says, fact by fact?"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from tsdiff.treesearch.errors import UsageError
from tsdiff.treesearch.parameters import check, parameter
from tsdiff.treesearch.protocols import CalibratedVerifier, Candidates, Condition, Need, Scores
from tsdiff.treesearch.references import resolve_verifier
from tsdiff.treesearch.registry import split_elements
from tsdiff.verifiers.compositional_detect import Detection, require_detectable, score_facts
from tsdiff.verifiers.compositional_facts import Fact, facts_of_geneval, facts_of_prompt, facts_of_questions
from tsdiff.verifiers.views import View, numbers_of

if TYPE_CHECKING:
    from torch import Tensor

    Detector = Callable[[Tensor, list[list[str]]], Sequence[Sequence[Detection]]]

ROWS = 16
"""Pictures that the question verifier is given at most in one call."""


@dataclass(frozen=True, kw_only=True)
class Compositional:
    """How far a picture bears out the atomic facts of its prompt; every fact is a part of the score by its own name.

    The facts are, in this order of preference: the questions of the prompt (its metadata's "questions", or the file
    `questions`), the objects of GenEval's metadata ("include", "exclude"; Ghosh et al. 2023, arXiv 2310.11513), or what a
    small grammar reads in the prompt: "two red circles left of a wooden table" claims two circles, that they are red, a
    table, that it is wooden, and that the circles are left of the table.

    Each fact is scored either by a verifier, whose prompt is then the fact set into `template` (a question as it is):

      compositional:question=[clip:model=FOLDER,scale=probability],aggregate=geometric

    or, in Python, by `detector`, a function (images (B, 3, H, W) in [0, 1], labels wanted of each) -> a list of
    `Detection`s for each image, and GenEval's rules. A verifier is asked once for each fact of each picture. Facts all
    count alike; product and geometric mean need scores of at least 0. A picture one of whose facts has no score has
    none, and says which.

    Raises:
      UsageError: for wrong parameters, a file of questions that cannot be read, or a verifier of scope "set" or with
        answers that come later.
    """

    scope: ClassVar[Literal["row", "set"]] = "row"
    latency: ClassVar[Literal["immediate", "pending"]] = "immediate"

    question: Any = parameter("", help="the verifier that is asked about each fact, its own options in brackets")  # noqa: RUF009 (a field)
    detector: Any = parameter(None, help="in Python: a function that finds objects, instead of a verifier")  # noqa: RUF009 (a field)
    template: str = parameter("a photo of {fact}", help="what the verifier is asked, with {fact} in it")
    aggregate: Literal["mean", "minimum", "product", "geometric"] = parameter("mean", help="how facts become one score")
    facts: Literal["auto", "questions", "geneval", "grammar"] = parameter("auto", help="where facts come from; auto takes the first that there are")
    questions: str = parameter("", help="a JSON file: a list of questions for every prompt, or lists by prompt")
    name: str = parameter("compositional", help="what its scores are called, to tell two of them apart")
    _listed: Any = field(init=False, repr=False, compare=False, default=None)

    def __post_init__(self) -> None:
        check(self)
        if not self.name or any(character in self.name for character in ":=,@ \t\n"):
            raise UsageError(f"compositional: name is {self.name!r} but must not be empty or contain ':', '=', ',', '@' or spaces")
        if bool(self.question) == (self.detector is not None):
            raise UsageError(f"{self.name}: give either question, a verifier that is asked about each fact (question=[clip:model=FOLDER]), or detector")
        if "{fact}" not in self.template:
            raise UsageError(f"{self.name}: template is {self.template!r} but must say {{fact}} where the fact belongs")
        if self.detector is not None and not callable(self.detector):
            raise UsageError(f"{self.name}: detector is {self.detector!r} but must be a function (images, labels) -> detections of each image")
        if self.question:
            given = split_elements(self.question)[0] if isinstance(self.question, str) else self.question
            object.__setattr__(self, "question", resolve_verifier(given))
            self._require_usable()
        if self.questions:
            object.__setattr__(self, "_listed", _read_questions(self.name, Path(self.questions)))
        elif self.facts == "questions":
            object.__setattr__(self, "_listed", {})

    def _require_usable(self) -> None:
        asked = self.question
        calibrated = isinstance(asked, CalibratedVerifier) and asked.pool is not None
        if asked.scope == "set" or asked.latency == "pending" or calibrated:
            why = "scores whole sets" if asked.scope == "set" else "compares with plain samples" if calibrated else "answers later"
            raise UsageError(f"{self.name}: verifier {asked.name} {why} and cannot be asked about facts; choose one that scores each picture at once, by itself")

    # What it is -------------------------------------------------------------------------------------------------------

    @property
    def needs(self) -> frozenset[Need]:
        """What the verifier reads, or images; and the prompt."""
        return (self.question.needs if self.detector is None else frozenset({"images"})) | {"conditions"}

    @property
    def judges(self) -> Literal["any", "final"]:
        """As the verifier."""
        return "any" if self.detector is not None else self.question.judges

    @property
    def differentiable(self) -> bool:
        """Whether the verifier is."""
        return self.detector is None and self.question.differentiable

    def prepare(self, device: str) -> None:
        """Load the verifier's weights; a detector looks after its own."""
        if self.detector is None:
            self.question.prepare(device)

    def check(self, condition: Condition) -> None:
        """Raise UsageError if the prompt claims nothing, or something that cannot be judged."""
        for fact in self.facts_of(condition):
            if self.detector is not None:
                require_detectable(self.name, fact)
            else:
                self.question.check(self._asked(fact))

    def facts_of(self, condition: Condition) -> tuple[Fact, ...]:
        """The facts of a prompt.

        Raises:
          UsageError: if there are none.
        """
        facts: tuple[Fact, ...] = ()
        if self.facts in ("auto", "questions"):
            listed = self._listed.get(condition.prompt) if isinstance(self._listed, dict) else self._listed
            given = condition.metadata.get("questions", listed)
            facts = facts_of_questions(given) if given is not None else ()
        if not facts and self.facts in ("auto", "geneval") and "include" in condition.metadata:
            facts = facts_of_geneval(condition.metadata)
        if not facts and self.facts in ("auto", "grammar"):
            facts = facts_of_prompt(condition.prompt)
        if not facts:
            missing = {
                "questions": 'it has no questions; give them as "questions" in its line of a .jsonl file, or in a file (questions=FILE)',
                "geneval": 'its metadata has no "include"; take prompts from a .jsonl file in GenEval\'s form',
            }.get(self.facts, "it names no object; say for example 'a red cube left of two blue spheres'")
            raise UsageError(f"{self.name} has nothing to judge in the prompt {condition.prompt!r}: {missing}")
        return facts

    def _asked(self, fact: Fact) -> Condition:
        return Condition(fact.text if fact.kind == "question" else self.template.replace("{fact}", fact.text))

    # Scores -----------------------------------------------------------------------------------------------------------

    def score(self, candidates: Candidates) -> Scores:
        """Score pictures; parts hold NaN in rows whose prompt does not claim that fact."""
        import torch

        facts = [self.facts_of(condition) for condition in candidates.conditions]
        answers = self._detected(candidates, facts) if self.detector is not None else self._answered(candidates, facts)
        rows = [self._whole(column, own) for column, own in zip(answers, facts, strict=True)]
        reasons = {row: reason for row, (_, reason) in enumerate(rows) if reason}
        names = dict.fromkeys(fact.name for own in facts for fact in own)
        parts = {name: [math.nan] * len(facts) for name in names}
        for row, (own, column) in enumerate(zip(facts, answers, strict=True)):
            for fact, value in zip(own, column.tolist(), strict=True):
                parts[fact.name][row] = value
        return Scores(torch.stack([value for value, _ in rows]), parts, reasons)

    def _answered(self, candidates: Candidates, facts: Sequence[Sequence[Fact]]) -> list[Tensor]:
        """The verifier's score of every fact of every row, float64 on the CPU."""
        import torch

        pairs = [(row, fact) for row, own in enumerate(facts) for fact in own]
        columns = []
        for start in range(0, len(pairs), ROWS):
            some = pairs[start : start + ROWS]
            view = View(candidates, [row for row, _ in some], [self._asked(fact) for _, fact in some])
            columns.append(numbers_of(self.question, self.question.score(view).values, len(some)))
        return list(torch.cat(columns).split([len(own) for own in facts]))

    def _detected(self, candidates: Candidates, facts: Sequence[Sequence[Fact]]) -> list[Tensor]:
        """Every fact's score by what the detector finds."""
        import torch

        wanted = [sorted({noun for fact in own for noun in (fact.noun, fact.other) if noun}) for own in facts]
        found = self.detector(candidates.images, wanted)
        if len(found) != len(facts):
            raise UsageError(f"{self.name}: the detector gave {len(found)} lists for {len(facts)} images; give one for each, in order")
        return [torch.tensor(score_facts(own, seen), dtype=torch.float64) for own, seen in zip(facts, found, strict=True)]

    def _whole(self, scores: Tensor, facts: Sequence[Fact]) -> tuple[Tensor, str | None]:
        """One score of a row's facts (F,), or NaN and why."""
        values = scores.tolist()
        failed = [fact.name for fact, value in zip(facts, values, strict=True) if not math.isfinite(value)]
        if failed:
            return scores.sum() * math.nan, f"{', '.join(map(repr, failed))} could not be scored"
        if self.aggregate == "mean":
            return scores.mean(), None
        if self.aggregate == "minimum":
            return scores.amin(), None
        below = [fact.name for fact, value in zip(facts, values, strict=True) if value < 0.0]
        if below:
            return scores.sum() * math.nan, f"{below[0]!r} scored below 0, of which aggregate={self.aggregate} makes nothing; use mean, or a verifier of scores in [0, 1]"
        if self.aggregate == "product" or 0.0 in values:
            return scores.prod(), None
        return scores.log().mean().exp(), None


def _read_questions(name: str, path: Path) -> list[Any] | dict[str, Any]:
    """The lists of a file, every one looked at."""
    try:
        listed = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"{name}: questions {str(path)!r} cannot be read ({error.strerror}); check its name and its rights") from None
    except ValueError as error:
        raise UsageError(f"{name}: questions {str(path)!r} is not JSON ({error})") from None
    for questions in listed.values() if isinstance(listed, dict) else [listed]:
        facts_of_questions(questions)
    kept: list[Any] | dict[str, Any] = listed
    return kept
