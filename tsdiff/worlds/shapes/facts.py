"""What a prompt claims, in atomic facts, and how far a picture's objects bear them out.

A prompt names groups ("two red circles") and relations between them. Objects, be they drawn things or what a checker
saw, are given to groups in the way that bears out most; a fact then scores between 0 and 1, and 1 only if it holds.
"""

from __future__ import annotations

import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias

from tsdiff.worlds.shapes.geometry import CANVAS, SEEN_CLEARANCE, Color, Relation, Shape, clearance

NUMBERS = {1: "one", 2: "two", 3: "three", 4: "four", 5: "five", 6: "six", 7: "seven", 8: "eight", 9: "nine", 10: "ten"}


class Object(Protocol):
    """Something in a picture; None where it cannot be told. A `Thing` is one."""

    @property
    def shape(self) -> Shape | None: ...
    @property
    def color(self) -> Color | None: ...
    @property
    def x(self) -> float: ...
    @property
    def y(self) -> float: ...


@dataclass(frozen=True)
class Group:
    """Objects that a prompt names together: `count` of one shape, of one colour or (None) of any."""

    shape: Shape
    color: Color | None = None
    count: int = 1

    @property
    def noun(self) -> str:
        """The shape, in the plural where there are several."""
        return plural(self.shape) if self.count > 1 else self.shape


@dataclass(frozen=True)
class Link:
    """A claim on places: group number `first` stands in `relation` to group number `second`."""

    first: int
    relation: Relation
    second: int


def plural(shape: Shape) -> str:
    """The plural of a shape's name."""
    return f"{shape}es" if shape.endswith("s") else f"{shape}s"


MOST_ASSIGNMENTS = 1000
"""Assignments tried before the best so far is taken. Six objects have no more than 720, so that this only bounds the time
spent on pictures full of rubble."""

Assignment: TypeAlias = tuple[tuple[Object, ...], ...]
"""The objects given to each group, in the groups' order."""


@dataclass(frozen=True)
class Fact(ABC):
    """One claim. `name` says it in words, e.g. "star is red"."""

    name: str

    @abstractmethod
    def score(self, given: Assignment, objects: Sequence[Object]) -> float:
        """How far it holds, in [0, 1]; 1 only if it holds."""


@dataclass(frozen=True)
class Exists(Fact):
    """There is an object for the group: all or nothing."""

    group: int

    def score(self, given: Assignment, objects: Sequence[Object]) -> float:
        """1 or 0."""
        return float(len(given[self.group]) > 0)


@dataclass(frozen=True)
class Counted(Fact):
    """There are exactly `count` objects of a shape, those given to other groups aside: 1 - |n - count| / max(n, count)."""

    group: int
    shape: Shape
    count: int

    def score(self, given: Assignment, objects: Sequence[Object]) -> float:
        """1 less the relative miss."""
        others = sum(item.shape == self.shape for number, members in enumerate(given) for item in members if number != self.group)
        found = sum(item.shape == self.shape for item in objects) - others
        return 1.0 - abs(found - self.count) / max(found, self.count)


@dataclass(frozen=True)
class Colored(Fact):
    """The group's objects have a colour: the share of the `count` that do."""

    group: int
    color: Color
    count: int

    def score(self, given: Assignment, objects: Sequence[Object]) -> float:
        """The share; a missing object has no colour."""
        return sum(item.color == self.color for item in given[self.group]) / self.count


@dataclass(frozen=True)
class Related(Fact):
    """Every object of one group stands in a relation to every object of another, with a clear margin.

    If the worst pair misses the margin by m pixels, the score is (1 - m / 128) / 2, and 0 if an object is missing.
    """

    link: Link

    def score(self, given: Assignment, objects: Sequence[Object]) -> float:
        """1, or less than a half."""
        pairs = list(itertools.product(given[self.link.first], given[self.link.second]))
        if not pairs:
            return 0.0
        worst = min(clearance(self.link.relation, (a.x, a.y), (b.x, b.y)) for a, b in pairs)
        if worst >= SEEN_CLEARANCE:
            return 1.0
        return 0.5 * max(0.0, 1.0 - (SEEN_CLEARANCE - worst) / (2 * CANVAS))


@dataclass(frozen=True)
class NothingElse(Fact):
    """There is no object that no group named: the share of objects that were."""

    def score(self, given: Assignment, objects: Sequence[Object]) -> float:
        """1 for an empty picture."""
        return sum(map(len, given)) / len(objects) if objects else 1.0


def facts_of(groups: Sequence[Group], links: Sequence[Link]) -> tuple[Fact, ...]:
    """Take a prompt apart: existence or number and colour of each group, the relations, and nothing else in the picture.

    Names are unique; a repeated one gets a number.
    """
    facts: list[Fact] = []
    used: dict[str, int] = {}

    def named(name: str) -> str:
        used[name] = used.get(name, 0) + 1
        return name if used[name] == 1 else f"{name} ({used[name]})"

    for number, group in enumerate(groups):
        if group.count == 1:
            facts.append(Exists(named(group.shape), number))
        else:
            facts.append(Counted(named(f"{NUMBERS.get(group.count, group.count)} {group.noun}"), number, group.shape, group.count))
        if group.color is not None:
            facts.append(Colored(named(f"{group.noun} {'is' if group.count == 1 else 'are'} {group.color}"), number, group.color, group.count))
    for link in links:
        facts.append(Related(named(f"{groups[link.first].noun} {link.relation} {groups[link.second].noun}"), link))
    if groups:
        facts.append(NothingElse(named("nothing else")))
    return tuple(facts)


@dataclass(frozen=True)
class Verdict:
    """How far a picture bears out a prompt.

    Attributes:
      satisfied: whether every fact holds.
      score: mean of the facts' scores, 1 exactly if satisfied.
      parts: each fact's score by its name.
    """

    satisfied: bool
    score: float
    parts: dict[str, float]


def judge(groups: Sequence[Group], links: Sequence[Link], objects: Sequence[Object]) -> Verdict:
    """Judge objects by a prompt, under the assignment of objects to groups that scores highest.

    Raises:
      ValueError: if there are no groups, so that nothing is claimed.
    """
    if not groups:
        raise ValueError("a prompt without groups claims nothing that could be judged")
    facts = facts_of(groups, links)
    best: list[float] = []
    for given in itertools.islice(_assignments(groups, objects), MOST_ASSIGNMENTS):
        scores = [fact.score(given, objects) for fact in facts]
        if not best or sum(scores) > sum(best):
            best = scores
    satisfied = all(score == 1.0 for score in best)
    return Verdict(satisfied, 1.0 if satisfied else math.fsum(best) / len(best), dict(zip((fact.name for fact in facts), best, strict=True)))


def _assignments(groups: Sequence[Group], objects: Sequence[Object]) -> Iterator[Assignment]:
    """Every way to give each group as many objects of its shape as it names, or all there are.

    A wrong colour does not keep an object out: then its existence holds and its colour does not.
    """

    def choose(number: int, free: list[int], chosen: tuple[tuple[int, ...], ...]) -> Iterator[Assignment]:
        if number == len(groups):
            yield tuple(tuple(objects[i] for i in members) for members in chosen)
            return
        group = groups[number]
        fitting = [i for i in free if objects[i].shape == group.shape]
        # Right colours first: where places do not matter and shapes differ, the first assignment is the best.
        fitting.sort(key=lambda i: objects[i].color != group.color)
        for members in itertools.combinations(fitting, min(group.count, len(fitting))):
            yield from choose(number + 1, [i for i in free if i not in members], (*chosen, members))

    return choose(0, list(range(len(objects))), ())
