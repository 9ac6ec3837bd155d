"""One grammar that writes the prompts of the shapes world and reads them back.

    prompt    = group | group relation group | group {"," group} "and" group
    group     = ["just"] ("a" | "an" | "one" | "two" | "three" | "four") [color] shape
    relation  = "left of" | "right of" | "above" | "below"

Nine kinds of prompts, the first six those of GenEval (Ghosh, Hajishirzi & Schmidt 2023, arXiv 2310.11513). Reading is
lenient: it makes of any text what it can, and says which words it had no use for.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from tsdiff.treesearch.errors import TsdiffWarning
from tsdiff.worlds.shapes.facts import NUMBERS, Fact, Group, Link, Object, Verdict, facts_of, judge, plural
from tsdiff.worlds.shapes.geometry import COLORS, RELATIONS, SHAPES, Relation, Shape

KINDS: dict[str, str] = {
    "single_object": "a star",
    "colors": "a red star",
    "two_object": "a star and a circle",
    "counting": "three circles",
    "position": "a star left of a circle",
    "color_attr": "a red star and a blue circle",
    "color_position": "a red star left of a blue circle",
    "color_count": "two red circles and a green square",
    "three_objects": "a red star, a blue circle and a green square",
}
"""The kinds of prompts, easy ones first, each with an example."""

MOST_THINGS = 4
"""Most things that a prompt of the grammar names."""

_COUNTS = {word: number for number, word in NUMBERS.items()} | {str(number): number for number in NUMBERS} | {"a": 1, "an": 1}
_SHAPES: dict[str, Shape] = {shape: shape for shape in SHAPES} | {plural(shape): shape for shape in SHAPES}
_RELATIONS: dict[str, Relation] = {relation.split()[0]: relation for relation in RELATIONS}

VOCABULARY: tuple[str, ...] = (
    *(",", "and", "just", "a", "an", "one", "two", "three", "four"),
    *COLORS,
    *SHAPES,
    *map(plural, SHAPES),
    *("left", "right", "of", "above", "below"),
)
"""Every word of the grammar: all that a model of this world can have learned."""


class PromptWarning(TsdiffWarning):
    """A prompt says what this world has no words for."""


@dataclass(frozen=True)
class Prompt:
    """What a prompt means: groups of objects, and relations between them."""

    groups: tuple[Group, ...]
    links: tuple[Link, ...] = ()

    @cached_property
    def facts(self) -> tuple[Fact, ...]:
        """The atomic facts it claims."""
        return facts_of(self.groups, self.links)

    @property
    def total(self) -> int:
        """How many objects it names."""
        return sum(group.count for group in self.groups)

    @property
    def kind(self) -> str | None:
        """Which of `KINDS` it is, or None."""
        counts, colored = tuple(group.count for group in self.groups), {group.color is not None for group in self.groups}
        distinct = len({group.shape for group in self.groups}) == len(self.groups)
        if not distinct or len(colored) != 1 or self.total > MOST_THINGS:
            return None
        key = (counts[0] if len(counts) == 1 else counts, colored.pop(), tuple((link.first, link.second) for link in self.links))
        return _KIND_OF.get(key)

    @property
    def text(self) -> str:
        """The plain wording; `phrasings` lists all. Relations are written for two groups only.

        Raises:
          ValueError: if the grammar has no sentence for it.
        """
        phrases = [_phrase(group) for group in self.groups]
        if [(link.first, link.second) for link in self.links] == [(0, 1)] and len(phrases) == 2:
            return f"{phrases[0]} {self.links[0].relation} {phrases[1]}"
        if self.links or not phrases:
            raise ValueError(f"the grammar has no sentence for {self!r}")
        return phrases[0] if len(phrases) == 1 else f"{', '.join(phrases[:-1])} and {phrases[-1]}"

    @property
    def phrasings(self) -> tuple[str, ...]:
        """Every wording: "just" may stress that a lone group is all there is, and "one" may stand for "a"."""
        if self.kind == "single_object":
            (group,) = self.groups
            return self.text, f"one {group.shape}", f"just {self.text}", f"just one {group.shape}"
        if self.kind == "counting":
            return self.text, f"just {self.text}"
        return (self.text,)

    def judge(self, objects: Sequence[Object]) -> Verdict:
        """How far a picture's objects bear it out."""
        return judge(self.groups, self.links, objects)


_KIND_OF: dict[object, str] = {
    (1, False, ()): "single_object",
    (1, True, ()): "colors",
    ((1, 1), False, ()): "two_object",
    (2, False, ()): "counting",
    (3, False, ()): "counting",
    (4, False, ()): "counting",
    ((1, 1), False, ((0, 1),)): "position",
    ((1, 1), True, ()): "color_attr",
    ((1, 1), True, ((0, 1),)): "color_position",
    ((2, 1), True, ()): "color_count",
    ((3, 1), True, ()): "color_count",
    ((1, 1, 1), True, ()): "three_objects",
}


def _phrase(group: Group) -> str:
    words = group.noun if group.color is None else f"{group.color} {group.noun}"
    if group.count > 1:
        return f"{NUMBERS[group.count]} {words}"
    return f"an {words}" if words[0] in "aeiou" else f"a {words}"


@dataclass(frozen=True)
class Reading:
    """What was made of a text.

    Attributes:
      prompt: what it means.
      unknown: words that the world does not have, in their order.
      unplaced: words that it has, but that found no place ("a red", "left of" with nothing after it).
    """

    prompt: Prompt
    unknown: tuple[str, ...] = ()
    unplaced: tuple[str, ...] = ()

    @property
    def complete(self) -> bool:
        """Whether every word was understood and the world can draw it."""
        return not self.unknown and not self.unplaced and 0 < self.prompt.total <= MOST_THINGS


def read(text: str) -> Reading:
    """Read a text. Nothing is refused; case, punctuation and digits for numbers do not matter.

    A noun in the plural without a number is read as two. Unknown words are passed over ("to the left of" is "left of").
    """
    groups: list[Group] = []
    links: list[Link] = []
    unknown: list[str] = []
    unplaced: list[str] = []
    count: int | None = None
    color: str | None = None
    pending: list[str] = []  # words of a group whose noun has not come yet
    relation: Relation | None = None

    for word in re.findall(r"[^\W_]+|,", text.lower()):
        if word in _SHAPES:
            number = count if count is not None else 2 if word != _SHAPES[word] else 1
            groups.append(Group(_SHAPES[word], color, number))
            if relation is not None:
                links.append(Link(len(groups) - 2, relation, len(groups) - 1))
            count, color, relation, pending = None, None, None, []
        elif word in _COUNTS and (count is None or word in ("a", "an")):
            count = _COUNTS[word] if count is None else count
            pending.append(word)
        elif word in COLORS and color is None:
            color = word
            pending.append(word)
        elif word in _RELATIONS and groups and relation is None:
            unplaced += pending
            count, color, pending = None, None, []
            relation = _RELATIONS[word]
        elif word in ("and", ","):
            unplaced += pending
            count, color, pending = None, None, []
        elif word not in ("of", "just"):
            (unplaced if word in VOCABULARY or word in _COUNTS else unknown).append(word)
    unplaced += pending
    if relation is not None:
        unplaced.append(relation.split()[0])
    return Reading(Prompt(tuple(groups), tuple(links)), tuple(unknown), tuple(unplaced))


def explain(text: str) -> str | None:
    """What of a text this world cannot show, and what it can; None if there is nothing to say."""
    reading = read(text)
    if reading.complete:
        return None
    problems = []
    if reading.unknown:
        problems.append(f"does not know {_quoted(reading.unknown)}")
    if reading.unplaced:
        problems.append(f"has no use for {_quoted(reading.unplaced)} where it stands")
    if reading.prompt.total > MOST_THINGS:
        problems.append(f"draws at most {MOST_THINGS} things, not {reading.prompt.total}")
    if not reading.prompt.groups:
        problems.append("finds no shape in it")
    return (
        f"prompt {text!r}: the shapes world {' and '.join(problems)}. It can say: {', '.join(SHAPES)}; {', '.join(COLORS)}; "
        f"two, three, four; and; {', '.join(RELATIONS)}. For example {KINDS['color_position']!r} or {KINDS['color_count']!r}."
    )


def _quoted(words: tuple[str, ...]) -> str:
    return ", ".join(repr(word) for word in dict.fromkeys(words))


def warn(text: str) -> None:
    """Issue one `PromptWarning` if a text says what this world cannot show."""
    message = explain(text)
    if message is not None:
        # Told once a prompt, although a model and its verifiers all ask: Python shows a warning once a place, here this one.
        warnings.warn(PromptWarning(message), stacklevel=1)
