"""A prompt taken apart into atomic facts: by a small grammar, by GenEval's metadata, or as a list of questions.

    prompt   = group {(relation | "and" | "," | "with") group}
    group    = ["a" | "an" | "the" | number] {attribute} noun [("is" | "are") attribute]
    relation = "left of", "on top of", "next to", ... or a verb in -ing ("riding", "sitting on")

Attributes are colours, shapes, sizes and materials. Words that the grammar does not know belong to the noun, so that
every prompt has some reading; a prompt in sentences has a poor one, and is better given questions.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from tsdiff.treesearch.errors import UsageError

COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white", "gray", "grey", "cyan", "magenta", "gold", "silver", "beige")
ATTRIBUTES = frozenset((
    *COLORS,
    *("round", "circular", "oval", "square", "rectangular", "triangular", "cubic", "spherical", "conical", "cylindrical", "pyramidal", "diamond", "pentagonal", "hexagonal"),
    *("big", "large", "huge", "small", "little", "tiny", "tall", "short", "long", "wide", "narrow", "thick", "thin"),
    *("wooden", "metallic", "metal", "glass", "plastic", "leather", "rubber", "fabric", "fluffy", "furry", "stone", "ceramic", "paper"),
))  # fmt: skip
NUMBERS = {word: number for number, word in enumerate(("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"), start=1)}
ARTICLES = ("a", "an", "the", "another", "some")
RELATIONS = tuple(sorted((
    "left of", "right of", "to the left of", "to the right of", "on the left of", "on the right of", "above", "below", "over", "under", "underneath", "beneath",
    "on", "on top of", "on the top of", "on the bottom of", "on side of", "next to", "beside", "near", "by", "behind", "in front of", "inside", "in", "inside of", "outside", "between", "around", "against",
), key=lambda text: -len(text.split())))  # fmt: skip
"""Longest first."""

_SAME = {
    **dict.fromkeys(("to the left of", "on the left of"), "left of"),
    **dict.fromkeys(("to the right of", "on the right of"), "right of"),
}
_OPENING = re.compile(r"^\s*(?:(?:a|an|the)\s+)?(?:photo|photograph|picture|image|painting|drawing)\s+of\s+|^\s*there\s+(?:is|are)\s+", re.IGNORECASE)
_IRREGULAR = {"people": "person", "men": "man", "women": "woman", "children": "child", "mice": "mouse", "geese": "goose", "feet": "foot", "teeth": "tooth", "knives": "knife", "wolves": "wolf", "leaves": "leaf", "shelves": "shelf", "sheep": "sheep", "fish": "fish", "scissors": "scissors", "skis": "skis"}  # fmt: skip

Kind = Literal["object", "count", "attribute", "relation", "absent", "question"]


@dataclass(frozen=True)
class Fact:
    """One claim about a picture.

    Attributes:
      name: short and unique within its prompt: "star", "star is red", "two circles", "star left of circle".
      text: a phrase that shows it, "a red star"; of kind "question" the question itself.
      kind: what is claimed.
      noun: of the object, in the singular.
      count: how many objects there are; of kind "absent" how many there must not be.
      attribute: of kind "attribute".
      relation, other, other_count: of kind "relation": how it stands to how many of which other object.
    """

    name: str
    text: str
    kind: Kind
    noun: str = ""
    count: int = 1
    attribute: str = ""
    relation: str = ""
    other: str = ""
    other_count: int = 1


@dataclass(frozen=True)
class Group:
    """Objects that are named together.

    Attributes:
      noun: in the singular.
      count: how many, None where no number is given ("dogs").
      exact: whether their number is a claim.
      attributes: in their order.
      article: as typed, "" for none.
      shown: the noun as typed.
    """

    noun: str
    count: int | None = 1
    exact: bool = False
    attributes: tuple[str, ...] = ()
    article: str = ""
    shown: str = ""

    def phrase(self, *attributes: str) -> str:
        """ "two red circles", "a red star"."""
        words = " ".join((*attributes, self.shown or self.noun))
        if self.count is not None and (self.count > 1 or self.exact):
            return f"{_word(self.count)} {words}"
        if self.article in ("a", "an"):
            return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"
        return f"{self.article} {words}".strip()


def parse(prompt: str) -> tuple[tuple[Group, ...], tuple[tuple[int, str, int], ...]]:
    """The groups of a prompt, and relations between them as (first group, relation, second group)."""
    words = re.findall(r"[^\W_]+(?:['\u2019-][^\W_]+)*|[,;.]", _OPENING.sub("", prompt).lower())
    groups: list[Group] = []
    links: list[tuple[int, str, int]] = []
    held: list[str] = []  # words of the group in progress
    relation = ""

    def add(phrase: Sequence[str], then: str) -> None:
        nonlocal relation
        group = _group(phrase)
        if group is not None:
            groups.append(group)
            if relation and len(groups) > 1:
                links.append((len(groups) - 2, relation, len(groups) - 1))
            relation = _SAME.get(then, then)

    def close(then: str = "", *, followed: bool = False) -> None:
        """End a group; where another is sure to follow, what stands from a verb on says how it is related."""
        verb = next((i for i, word in enumerate(held) if len(word) > 4 and word.endswith("ing") and _noun_in(held[:i])), len(held))
        if followed:
            add(held[:verb], " ".join((*held[verb:], then)).strip())
        elif verb < len(held) - 1:  # "people riding horses"
            add(held[:verb], held[verb])
            add(held[verb + 1 :], then)
        else:
            add(held, then)
        held.clear()

    place = 0
    while place < len(words):
        found = next((text for text in RELATIONS if words[place : place + len(text.split())] == text.split()), None)
        word = words[place]
        if found is not None and _named(held):
            close(found, followed=True)
            place += len(found.split())
            continue
        if word in ("and", "with", "plus", ",", ";", "."):
            close()
        elif (word in ARTICLES or word in NUMBERS or word.isdecimal()) and _named(held):
            close(followed=True)
            held.append(word)
        else:
            held.append(word)
        place += 1
    close()
    return tuple(groups), tuple(links)


def _noun_in(words: Sequence[str]) -> bool:
    """Whether a phrase holds a word that can only be a noun."""
    left = [word for word in words if word not in ARTICLES and word not in NUMBERS and not word.isdecimal()]
    return any(word not in ATTRIBUTES for word in left)


def _named(words: Sequence[str]) -> bool:
    """Whether a phrase may name something; a lone attribute may be a noun too ("a glass on a table")."""
    return any(word not in ARTICLES and word not in NUMBERS and not word.isdecimal() for word in words)


def _group(words: Sequence[str]) -> Group | None:
    """What a phrase names; None if nothing."""
    left = list(words)
    article, count = "", None
    while left and (left[0] in ARTICLES or left[0] in NUMBERS or left[0].isdecimal()):
        word = left.pop(0)
        if word in ARTICLES:
            article = word
        else:
            count = NUMBERS.get(word) or int(word)
    said = next((i for i, word in enumerate(left) if word in ("is", "are") and i > 0), len(left))
    attributes = [" ".join(left[said + 1 :])] if said < len(left) - 1 else []  # "the cup is red"
    left = left[:said]
    while len(left) > 1 and left[0] in ATTRIBUTES:  # the last word is a noun, whatever it may mean elsewhere: "an orange"
        attributes.append(left.pop(0))
    if not left or count == 0:
        return None
    shown = " ".join(left)
    noun = singular(shown)
    exact = count is not None and (count > 1 or not article)
    return Group(noun, count if count is not None else 1 if noun == shown or article in ("a", "an") else None, exact, tuple(attributes), article, shown)


def singular(noun: str) -> str:
    """The singular of a noun phrase's last word, as far as simple rules know it."""
    *before, word = noun.split(" ")
    if word in _IRREGULAR:
        word = _IRREGULAR[word]
    elif re.search(r"[^aeiou]ies$", word) and len(word) > 4:
        word = f"{word[:-3]}y"
    elif re.search(r"(ss|x|ch|sh|zz|us)es$", word):
        word = word[:-2]
    elif re.search(r"[^su]s$", word) and len(word) > 3:
        word = word[:-1]
    return " ".join((*before, word))


def _word(count: int) -> str:
    return next((word for word, number in NUMBERS.items() if number == count), str(count))


def facts_of_groups(groups: Sequence[Group], links: Sequence[tuple[int, str, int]], absent: Sequence[tuple[str, int]] = ()) -> tuple[Fact, ...]:
    """Existence or number of each group, its attributes, the relations, and what must not be there ((noun, from how many on))."""
    facts: list[Fact] = []
    used: dict[str, int] = {}

    def named(name: str) -> str:
        used[name] = used.get(name, 0) + 1
        return name if used[name] == 1 else f"{name} ({used[name]})"

    for group in groups:
        count, shown = group.count or 1, group.shown or group.noun
        if group.exact:
            facts.append(Fact(named(f"{_word(count)} {shown}"), group.phrase(), "count", group.noun, count))
        else:
            facts.append(Fact(named(shown), group.phrase(), "object", group.noun))
        for attribute in group.attributes:
            verb = "is" if group.count == 1 else "are"
            facts.append(Fact(named(f"{shown} {verb} {attribute}"), group.phrase(attribute), "attribute", group.noun, count, attribute))
    for first, relation, second in links:
        a, b = groups[first], groups[second]
        same = a.noun == b.noun  # then only their attributes tell them apart
        text = f"{a.phrase(*a.attributes if same else ())} {relation} {b.phrase(*b.attributes if same else ())}"
        name = f"{a.shown or a.noun} {relation} {b.shown or b.noun}"
        facts.append(Fact(named(name), text, "relation", a.noun, a.count or 1, relation=relation, other=b.noun, other_count=b.count or 1))
    for noun, count in absent:
        text = f"no {noun}" if count == 1 else f"fewer than {_word(count)} {noun}s"
        facts.append(Fact(named(text), text, "absent", noun, count))
    return tuple(facts)


def facts_of_prompt(prompt: str) -> tuple[Fact, ...]:
    """The facts that the grammar finds in a prompt; none in an empty one."""
    return facts_of_groups(*parse(prompt))


def facts_of_geneval(metadata: Mapping[str, Any]) -> tuple[Fact, ...]:
    """The facts of a line of GenEval's evaluation_metadata.jsonl: its keys "include" and "exclude".

    "include" lists {class, count, color?, position?: [relation, index of an earlier one]}; "exclude" lists {class, count}.
    Where a class must be there n times and not n + 1 times, its exact number is claimed. Source: Ghosh, Hajishirzi &
    Schmidt 2023, GenEval (arXiv 2310.11513).

    Raises:
      UsageError: for entries of another form.
    """
    try:
        exclude = [(str(item["class"]), int(item["count"])) for item in metadata.get("exclude", ())]
        groups, links = [], []
        for number, item in enumerate(metadata["include"]):
            noun, count = str(item["class"]), int(item.get("count", 1))
            exact = count > 1 or (noun, count + 1) in exclude
            shown = _plural(noun) if count > 1 else noun
            groups.append(Group(noun, count, exact, (str(item["color"]),) if item.get("color") else (), "a", shown))
            if item.get("position"):
                relation, target = item["position"]
                if not 0 <= int(target) < number:
                    raise ValueError(f"position {item['position']} names no earlier object")
                links.append((number, str(relation), int(target)))
        counted = {(group.noun, (group.count or 1) + 1) for group in groups}
        return facts_of_groups(groups, links, [entry for entry in exclude if entry not in counted])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UsageError(
            f"metadata is not as GenEval writes it ({type(error).__name__}: {error}); write e.g. "
            '"include": [{"class": "cup", "count": 2, "color": "red"}], "exclude": [{"class": "cup", "count": 3}]'
        ) from None


def facts_of_questions(questions: Any) -> tuple[Fact, ...]:
    """The facts of a list of questions, each a text or {"question": text, "name": text}.

    Raises:
      UsageError: for anything else, or a name that appears twice.
    """
    facts: list[Fact] = []
    for item in questions if isinstance(questions, (list, tuple)) else [None]:
        given = {"question": item} if isinstance(item, str) else item
        text = given.get("question") if isinstance(given, Mapping) else None
        name = (given.get("name") or text) if isinstance(given, Mapping) else None
        if not isinstance(text, str) or not text.strip() or not isinstance(name, str):
            raise UsageError(f'questions are {questions!r} but must be a list of texts or of {{"question": TEXT, "name": TEXT}}')
        facts.append(Fact(name, text, "question"))
    names = [fact.name for fact in facts]
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise UsageError(f"the question {twice[0]!r} appears twice; its score is kept by its name, so name each once")
    return tuple(facts)


def _plural(noun: str) -> str:
    for many, one in _IRREGULAR.items():
        if one == noun:
            return many
    if re.search(r"(s|x|ch|sh|z)$", noun):
        return f"{noun}es"
    return f"{noun[:-1]}ies" if re.search(r"[^aeiou]y$", noun) else f"{noun}s"
