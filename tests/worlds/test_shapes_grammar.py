"""Prompts of the shapes world: written, read back, taken apart, judged."""

from __future__ import annotations

import re
import time
import warnings
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tsdiff.treesearch.errors import UsageError
from tsdiff.worlds.shapes.facts import Group, Link
from tsdiff.worlds.shapes.geometry import COLORS, RELATIONS, SHAPES
from tsdiff.worlds.shapes.grammar import KINDS, VOCABULARY, Prompt, PromptWarning, explain, read, warn
from tsdiff.worlds.shapes.scenes import every_prompt, near_misses

ANY_PROMPT = st.sampled_from(sorted(KINDS)).flatmap(lambda kind: st.sampled_from(every_prompt(kind)))
GROUPS = st.builds(Group, st.sampled_from(SHAPES), st.none() | st.sampled_from(COLORS), st.integers(1, 6))


@dataclass(frozen=True)
class Spot:
    """An object somewhere."""

    shape: str | None
    color: str | None
    x: float = 0.0
    y: float = 0.0


def test_examples_are_of_their_kinds() -> None:
    for kind, text in KINDS.items():
        reading = read(text)
        assert reading.complete
        assert reading.prompt.kind == kind
        assert reading.prompt.text == text


@pytest.mark.parametrize("kind", KINDS)
def test_every_wording_of_every_prompt_reads_back(kind: str) -> None:
    for prompt in every_prompt(kind)[:: 1 if kind != "three_objects" else 37]:
        assert prompt.kind == kind
        for text in prompt.phrasings:
            reading = read(text)
            assert reading.prompt == prompt, text
            assert reading.complete, text
            assert set(re.findall(r"\w+|,", text)) <= set(VOCABULARY)


@given(st.lists(GROUPS, min_size=1, max_size=4))
def test_lists_of_groups_read_back(groups: list[Group]) -> None:
    prompt = Prompt(tuple(groups))
    assert read(prompt.text).prompt == prompt


@given(GROUPS, GROUPS, st.sampled_from(RELATIONS))
def test_relations_read_back(first: Group, second: Group, relation: str) -> None:
    prompt = Prompt((first, second), (Link(0, relation, 1),))  # type: ignore[arg-type]
    assert read(prompt.text).prompt == prompt


@given(st.text(max_size=60))
def test_any_text_can_be_read(text: str) -> None:
    reading = read(text)
    assert reading.complete == (explain(text) is None)


@given(st.lists(st.sampled_from([*VOCABULARY, "dog", "7"]), max_size=12))
def test_any_words_can_be_read(words: list[str]) -> None:
    reading = read(" ".join(words))
    assert reading.unknown.count("dog") == words.count("dog")
    assert len(reading.prompt.groups) == sum(word in SHAPES or word.rstrip("s").removesuffix("e") in SHAPES or word == "crosses" or word[:-1] in SHAPES for word in words)


def test_reading_is_lenient() -> None:
    assert read("A RED STAR to the left of 2 blue circles!").prompt == Prompt((Group("star", "red"), Group("circle", "blue", 2)), (Link(0, "left of", 1),))
    assert read("stars").prompt == Prompt((Group("star", count=2),))
    assert read("a red and a star").unplaced == ("a", "red")
    assert read("a star left of").unplaced == ("left",)


def test_unknown_words_are_warned_of_and_what_can_be_said_is_shown() -> None:
    with pytest.warns(PromptWarning, match=r"does not know 'shiny', 'dog'.*circle, square, triangle, star, cross.*red, green.*left of") as caught:
        warn("a shiny red star and a dog")
    assert len(caught) == 1
    with pytest.warns(PromptWarning, match="at most 4 things, not 7"):
        warn("seven circles")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn("a red star left of a blue circle")


def test_facts_of_a_prompt() -> None:
    names = [fact.name for fact in read("two red circles and a green square").prompt.facts]
    assert names == ["two circles", "circles are red", "square", "square is green", "nothing else"]
    names = [fact.name for fact in read("a star left of a circle").prompt.facts]
    assert names == ["star", "circle", "star left of circle", "nothing else"]
    names = [fact.name for fact in read("a star and a star").prompt.facts]
    assert len(set(names)) == len(names) == 3


def test_scores_of_facts() -> None:
    prompt = read("three circles").prompt
    circles = [Spot("circle", "red")] * 4
    assert prompt.judge(circles[:3]).satisfied
    verdict = prompt.judge(circles[:2])
    assert verdict.parts == {"three circles": pytest.approx(2 / 3), "nothing else": 1.0}
    verdict = prompt.judge(circles)
    assert verdict.parts == {"three circles": pytest.approx(3 / 4), "nothing else": pytest.approx(3 / 4)}
    assert prompt.judge([]).score == pytest.approx(0.5)


def test_the_best_assignment_counts() -> None:
    pair = [Spot("star", "red", 10, 10), Spot("star", "blue", 50, 10)]
    for objects in (pair, pair[::-1]):
        assert read("a star left of a star").prompt.judge(objects).satisfied
        assert read("a blue star right of a red star").prompt.judge(objects).satisfied
        assert not read("a blue star left of a red star").prompt.judge(objects).satisfied
    extra = read("a blue star").prompt.judge(pair)
    assert extra.parts == {"star": 1.0, "star is blue": 1.0, "nothing else": 0.5}


def test_rubble_is_judged_in_no_time() -> None:
    rubble = [Spot(shape, color, 3.0 * i, 60.0 - i) for i, (shape, color) in enumerate((s, c) for s in SHAPES for c in COLORS)]
    started = time.perf_counter()
    verdict = read("a red star, a blue circle, a green square and a white cross").prompt.judge(rubble)
    assert time.perf_counter() - started < 1.0  # milliseconds; all 4096 assignments and more of larger pictures would take long
    assert not verdict.satisfied
    assert verdict.parts["star is red"] == verdict.parts["cross is white"] == 1.0
    assert verdict.parts["nothing else"] == 4 / 40


def test_relations_need_a_clear_margin() -> None:
    prompt = read("a star left of a circle").prompt
    near = [prompt.judge([Spot("star", "red", 10, 10), Spot("circle", "red", 30, 10 + dy)]) for dy in (0, 17, 19, 30)]
    assert [verdict.satisfied for verdict in near] == [True, True, False, False]
    assert near[2].parts["star left of circle"] > near[3].parts["star left of circle"] > 0
    assert prompt.judge([Spot("star", "red", 10, 10)]).parts["star left of circle"] == 0.0


def test_every_member_of_a_group_must_stand_right() -> None:
    prompt = read("two stars left of a circle").prompt
    circle, near, far = Spot("circle", "red", 50, 30), Spot("star", "red", 10, 30), Spot("star", "red", 60, 30)
    assert prompt.judge([near, Spot("star", "red", 20, 35), circle]).satisfied
    assert not prompt.judge([near, far, circle]).satisfied


@given(ANY_PROMPT, st.lists(st.builds(Spot, st.none() | st.sampled_from(SHAPES), st.none() | st.sampled_from(COLORS), st.floats(0, 64), st.floats(0, 64)), max_size=6))
def test_a_score_is_one_exactly_if_every_fact_holds(prompt: Prompt, objects: list[Spot]) -> None:
    verdict = prompt.judge(objects)
    assert set(verdict.parts) == {fact.name for fact in prompt.facts}
    assert 0.0 <= verdict.score <= 1.0
    assert verdict.satisfied == (verdict.score == 1.0) == all(part == 1.0 for part in verdict.parts.values())


@given(ANY_PROMPT)
def test_near_misses_differ_from_the_prompt(prompt: Prompt) -> None:
    misses = near_misses(prompt)
    assert {"wrong count", "wrong shape", "extra object"} <= set(misses)
    assert prompt not in misses.values()
    assert ("swapped colors" in misses) == (prompt.kind in ("color_attr", "color_position", "color_count", "three_objects"))


def test_unknown_kinds_are_refused() -> None:
    with pytest.raises(UsageError, match="must be one of single_object"):
        every_prompt("colours")
