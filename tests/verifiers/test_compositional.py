"""Compositional scores: what facts a prompt has, how each is scored, and what becomes of them."""

from __future__ import annotations

import itertools
import json
import math

import pytest
import torch
from fakes import Judge
from hypothesis import given
from hypothesis import strategies as st

from tsdiff.plugin.conformance import ExampleCandidates, VerifierConformance
from tsdiff.policies.best_of_n import BestOfN
from tsdiff.treesearch import registry
from tsdiff.treesearch.errors import UsageError
from tsdiff.treesearch.protocols import Condition, Scores
from tsdiff.treesearch.references import resolve_verifier
from tsdiff.treesearch.search import search
from tsdiff.verifiers.compositional import Compositional
from tsdiff.verifiers.compositional_detect import Detection, related, score_facts
from tsdiff.verifiers.compositional_facts import COLORS, facts_of_geneval, facts_of_prompt, facts_of_questions, singular
from tsdiff.worlds.shapes.grammar import KINDS, read

# Facts ---------------------------------------------------------------------------------------------------------------

READINGS = {
    "a red star": {"star": "a star", "star is red": "a red star"},
    "two red circles and a green square": {
        "two circles": "two circles", "circles are red": "two red circles", "square": "a square", "square is green": "a green square",
    },
    "a photo of a red cube on top of a large wooden table": {
        "cube": "a cube", "cube is red": "a red cube", "table": "a table", "table is large": "a large table", "table is wooden": "a wooden table",
        "cube on top of table": "a cube on top of a table",
    },
    "a red cup to the left of a blue cup": {
        "cup": "a cup", "cup is red": "a red cup", "cup (2)": "a cup", "cup is blue": "a blue cup", "cup left of cup": "a red cup left of a blue cup",
    },
    "an orange and an orange orange": {"orange": "an orange", "orange (2)": "an orange", "orange is orange": "an orange orange"},
    "a dog chasing a cat": {"dog": "a dog", "cat": "a cat", "dog chasing cat": "a dog chasing a cat"},
    "a man sitting on a bench next to 3 dogs": {
        "man": "a man", "bench": "a bench", "three dogs": "three dogs", "man sitting on bench": "a man sitting on a bench",
        "bench next to dogs": "a bench next to three dogs",
    },
    "there are two people riding horses": {"two people": "two people", "horses": "horses", "people riding horses": "two people riding horses"},
    "the cup is red": {"cup": "the cup", "cup is red": "the red cup"},
    "a cat with a hat": {"cat": "a cat", "hat": "a hat"},
    "": {},
    ", and ...": {},
}  # fmt: skip


@pytest.mark.parametrize("prompt", READINGS)
def test_prompts_are_taken_apart(prompt):
    assert {fact.name: fact.text for fact in facts_of_prompt(prompt)} == READINGS[prompt]


@pytest.mark.parametrize("kind", KINDS)
def test_facts_are_named_as_in_the_world_of_shapes(kind):
    theirs = [fact.name for fact in read(KINDS[kind]).prompt.facts if fact.name != "nothing else"]
    assert [fact.name for fact in facts_of_prompt(KINDS[kind])] == theirs


@given(words=st.lists(st.sampled_from(["a", "two", "red", "cube", "cubes", "left", "of", "on", "and", ",", "is", "riding", "0", "the", "\u00e9t\u00e9"]), max_size=12))
def test_any_text_has_a_reading_of_facts_with_different_names(words):
    facts = facts_of_prompt(" ".join(words))
    assert len({fact.name for fact in facts}) == len(facts)
    assert all(fact.text.strip() and fact.noun and fact.count >= 1 for fact in facts)


def test_singulars():
    plurals = {"dogs": "dog", "boxes": "box", "buses": "bus", "benches": "bench", "cherries": "cherry", "glasses": "glass", "people": "person", "teddy bears": "teddy bear", "bus": "bus", "glass": "glass", "ties": "tie", "knives": "knife"}  # fmt: skip
    assert {word: singular(word) for word in plurals} == plurals


def test_geneval_metadata():
    counted = facts_of_geneval({"tag": "counting", "include": [{"class": "cup", "count": 3}], "exclude": [{"class": "cup", "count": 4}], "prompt": "a photo of three cups"})
    assert [(fact.name, fact.text, fact.kind, fact.noun, fact.count) for fact in counted] == [("three cups", "three cups", "count", "cup", 3)]
    placed = facts_of_geneval({"include": [{"class": "dog", "count": 1}, {"class": "teddy bear", "count": 1, "color": "red", "position": ["right of", 0]}]})
    assert [fact.name for fact in placed] == ["dog", "teddy bear", "teddy bear is red", "teddy bear right of dog"]
    assert (placed[-1].noun, placed[-1].relation, placed[-1].other) == ("teddy bear", "right of", "dog")
    assert [fact.name for fact in facts_of_geneval({"include": [{"class": "dog"}], "exclude": [{"class": "cat", "count": 1}]})] == ["dog", "no cat"]


@pytest.mark.parametrize("metadata", [{"include": 3}, {"include": [{}]}, {"include": ["cup"]}, {"include": [{"class": "a", "position": ["above", 0]}]}, {"include": [{"class": "a", "count": "x"}]}])
def test_metadata_of_another_form_is_refused(metadata):
    with pytest.raises(UsageError, match=r"metadata is not as GenEval writes it.*\"class\": \"cup\""):
        facts_of_geneval(metadata)


def test_questions():
    facts = facts_of_questions(["Is there a dog?", {"question": "Is it red?", "name": "red"}])
    assert [(fact.name, fact.text) for fact in facts] == [("Is there a dog?", "Is there a dog?"), ("red", "Is it red?")]
    for bad in (3, "Is it?", [""], [{"name": "x"}], [None]):
        with pytest.raises(UsageError, match="must be a list of texts"):
            facts_of_questions(bad)
    with pytest.raises(UsageError, match="'a' appears twice"):
        facts_of_questions(["a", "a"])


# Detections ----------------------------------------------------------------------------------------------------------


def seen(label, x, y, score=0.95, color=None, size=10.0):
    return Detection(label, score, (x - size / 2, y - size / 2, x + size / 2, y + size / 2), color)


def scored(prompt, *objects):
    facts = facts_of_prompt(prompt)
    return {fact.name: score for fact, score in zip(facts, score_facts(facts, objects), strict=True)}


@given(x=st.floats(-100, 100), y=st.floats(-100, 100), sizes=st.tuples(st.floats(1, 40), st.floats(1, 40)))
def test_relations_are_those_of_geneval(x, y, sizes):
    a, b = seen("a", x, y, size=sizes[0]), seen("b", 0.0, 0.0, size=sizes[1])
    margin = 0.1 * (sizes[0] + sizes[1])
    length = math.hypot(x, y)
    expected = set()
    if max(abs(x), abs(y)) > margin + 0.1:
        for name, distance in (("left of", -x), ("right of", x), ("above", -y), ("below", y)):
            if (max(distance, 0.0) - margin) / length > 0.5:
                expected.add(name)
        assert related(a, b) == expected
    opposite = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
    assert {opposite[name] for name in related(a, b)} == related(b, a)


def test_a_diagonal_neighbour_stands_in_two_relations():
    assert related(seen("a", 50, 50), seen("b", 0, 0)) == {"right of", "below"}
    assert related(seen("a", 0, 1), seen("b", 0, 0)) == set()


def test_facts_are_scored_by_what_was_found():
    found = [seen("star", 10, 30, color="red"), seen("circle", 60, 30, color="green"), seen("circle", 60, 60, score=0.5)]
    assert scored("a red star left of a blue circle", *found) == {
        "star": 1.0, "star is red": 1.0, "circle": 1.0, "circle is blue": 0.0, "star left of circle": 1.0,
    }  # fmt: skip
    assert scored("a circle left of a star", *found)["circle left of star"] == 0.0
    assert scored("a cat above a star", *found) == {"cat": 0.0, "star": 1.0, "cat above star": 0.0}
    assert scored("a gray star", seen("star", 0, 0, color="grey")) == {"star": 1.0, "star is gray": 1.0}


@given(count=st.integers(2, 6), there=st.integers(0, 9), unsure=st.integers(0, 3))
def test_numbers_count_sure_objects_only_and_miss_in_part(count, there, unsure):
    objects = [seen("cup", 20 * i, 0) for i in range(there)] + [seen("cup", 0, 50, score=0.6)] * unsure
    (score,) = score_facts(facts_of_geneval({"include": [{"class": "cup", "count": count}], "exclude": [{"class": "cup", "count": count + 1}]}), objects)
    assert (score == 1.0) == (there == count)
    assert score == pytest.approx(1 - abs(there - count) / max(there, count))


def test_what_must_not_be_there():
    facts = facts_of_geneval({"include": [{"class": "dog"}], "exclude": [{"class": "cat", "count": 2}]})
    assert score_facts(facts, [seen("dog", 0, 0), seen("cat", 9, 9)]) == [1.0, 1.0]
    assert score_facts(facts, [seen("dog", 0, 0), seen("cat", 9, 9), seen("cat", 0, 9)]) == [1.0, 0.0]


# The verifier --------------------------------------------------------------------------------------------------------


class Oracle(Judge):
    """Scores a text by the number it stands for in a table, and remembers what it was asked."""

    def __init__(self, table, **options):
        super().__init__("oracle", needs=["images", "conditions"], **options)
        self.table = table
        self.asked = []

    def score(self, candidates):
        texts = [condition.prompt for condition in candidates.conditions]
        self.asked.append(texts)
        assert len(candidates.images) == len(texts)
        return Scores([self.table.get(text, 0.5) for text in texts])


def on(*prompts, metadata=None):
    candidates = ExampleCandidates.random(prompts)
    candidates.conditions = [Condition(prompt, metadata=metadata or {}) for prompt in prompts]
    return candidates


TABLE = {"a photo of a star": 0.9, "a photo of a red star": 0.4, "a photo of two circles": 0.25}


def test_each_fact_is_a_part_and_asked_in_the_template():
    oracle = Oracle(TABLE)
    verdict = Compositional(question=oracle).score(on("a red star", "two circles", "a star"))
    assert oracle.asked == [["a photo of a star", "a photo of a red star", "a photo of two circles", "a photo of a star"]]
    assert verdict.values.tolist() == pytest.approx([0.65, 0.25, 0.9])
    assert verdict.parts["star"] == pytest.approx([0.9, math.nan, 0.9], nan_ok=True)
    assert verdict.parts["star is red"] == pytest.approx([0.4, math.nan, math.nan], nan_ok=True)
    assert verdict.parts["two circles"] == pytest.approx([math.nan, 0.25, math.nan], nan_ok=True)


@pytest.mark.parametrize(("aggregate", "expected"), [("mean", 0.65), ("minimum", 0.4), ("product", 0.36), ("geometric", 0.6)])
def test_facts_become_one_score(aggregate, expected):
    verdict = Compositional(question=Oracle(TABLE), aggregate=aggregate).score(on("a red star"))
    assert verdict.values.tolist() == pytest.approx([expected])


@given(scores=st.lists(st.floats(0, 1), min_size=2, max_size=2))
def test_aggregates_are_ordered_as_they_must_be(scores):
    table = dict(zip(("a photo of a star", "a photo of a red star"), scores, strict=True))
    product, minimum, geometric, mean = (
        float(Compositional(question=Oracle(table), aggregate=name).score(on("a red star")).values[0]) for name in ("product", "minimum", "geometric", "mean")
    )
    for low, high in itertools.pairwise((product, minimum, geometric, mean)):
        assert low <= high + 1e-12


def test_a_fact_without_a_score_leaves_the_picture_without_one():
    verdict = Compositional(question=Oracle(TABLE | {"a photo of a red star": math.nan})).score(on("a red star", "a star"))
    assert verdict.values.isnan().tolist() == [True, False]
    assert verdict.reasons == {0: "'star is red' could not be scored"}
    assert verdict.parts["star"] == [0.9, 0.9], "the others stay"


@pytest.mark.parametrize("aggregate", ["product", "geometric"])
def test_products_of_negative_scores_are_refused_by_row(aggregate):
    verdict = Compositional(question=Oracle({"a photo of a star": -0.1}), aggregate=aggregate).score(on("a red star", "two circles"))
    assert verdict.values.isnan().tolist() == [True, False]
    assert "'star' scored below 0" in verdict.reasons[0]


def test_many_facts_are_asked_in_parts():
    oracle = Oracle(TABLE)
    Compositional(question=oracle).score(on(*["a red star"] * 20))
    assert [len(texts) for texts in oracle.asked] == [16, 16, 8]


def test_questions_come_from_the_prompts_line_or_from_a_file(tmp_path):
    oracle = Oracle({"Is it red?": 1.0, "Is it round?": 0.0})
    line = {"questions": ["Is it red?", {"question": "Is it round?", "name": "round"}], "include": [{"class": "dog"}]}
    verdict = Compositional(question=oracle).score(on("anything", metadata=line))
    assert verdict.parts == {"Is it red?": [1.0], "round": [0.0]}
    (tmp_path / "q.json").write_text(json.dumps({"anything": line["questions"]}))
    from_file = Compositional(question=oracle, questions=str(tmp_path / "q.json"))
    assert from_file.score(on("anything")).parts == verdict.parts
    assert set(from_file.score(on("a star")).parts) == {"star"}, "a prompt without questions is read"
    (tmp_path / "all.json").write_text('["Is it red?"]')
    assert set(Compositional(question=oracle, questions=str(tmp_path / "all.json")).score(on("x", "y")).parts) == {"Is it red?"}


def test_geneval_metadata_comes_before_the_prompts_own_words():
    metadata = {"include": [{"class": "dog", "count": 1}]}
    assert [fact.name for fact in Compositional(question=Oracle({})).facts_of(Condition("a red star", metadata=metadata))] == ["dog"]
    assert [fact.name for fact in Compositional(question=Oracle({}), facts="grammar").facts_of(Condition("a red star", metadata=metadata))] == ["star", "star is red"]


def test_a_detector_is_told_what_to_look_for():
    def detector(images, labels):
        assert labels == [["circle", "star"], ["cat"]]
        assert images.shape[0] == 2
        return [[seen("star", 10, 30, color="red"), seen("circle", 60, 30)], []]

    verdict = Compositional(detector=detector).score(on("a red star left of a circle", "a cat"))
    assert verdict.values.tolist() == [1.0, 0.0]
    assert verdict.parts["star left of circle"] == pytest.approx([1.0, math.nan], nan_ok=True)


def test_gradients_flow_to_the_pictures():
    bright = Judge("bright", lambda c: c.images.flatten(1).mean(1), needs=["images"])
    bright.differentiable = True
    verifier = Compositional(question=bright, aggregate="geometric")
    assert verifier.differentiable
    candidates = on("a red star", "two circles")

    def values(images):
        candidates.images = images
        return verifier.score(candidates).values

    images = torch.rand((2, 3, 4, 4), dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(values, images)


def test_it_is_a_reference_with_a_reference_in_brackets():
    registry.verifiers.add("compositional", Compositional)
    made = resolve_verifier("compositional:question=[target-color:color=navy],aggregate=minimum,template=this is {fact}")
    assert made.question.color == "navy"
    assert (made.aggregate, made.template) == ("minimum", "this is {fact}")
    assert resolve_verifier("compositional:question=luminance").question == resolve_verifier("luminance")


class TestKeepsToTheProtocol(VerifierConformance):
    @pytest.fixture
    def verifier(self):
        return Compositional(question="luminance")

    @pytest.fixture
    def candidates(self):
        return ExampleCandidates.random(["a red cube", "two dogs on a lawn", "a star left of a circle"])


class TestDetectorKeepsToTheProtocol(VerifierConformance):
    @pytest.fixture
    def verifier(self):
        def detector(images, labels):
            return [[seen(label, 10.0 * i, 100 * float(image.mean())) for i, label in enumerate(wanted)] for image, wanted in zip(images, labels, strict=True)]

        return Compositional(detector=detector)

    @pytest.fixture
    def candidates(self):
        return ExampleCandidates.random(["a red cube", "two dogs above a lawn", "a star left of a circle"])


MISTAKES = {
    "neither": ({}, "give either question"),
    "both": ({"question": Judge("a"), "detector": len}, "give either question"),
    "template": ({"question": Judge("a"), "template": "a photo"}, "must say {fact}"),
    "detector": ({"detector": 3}, "must be a function"),
    "aggregate": ({"question": Judge("a"), "aggregate": "sum"}, "must be one of"),
    "set": ({"question": Judge("a", scope="set")}, "verifier a scores whole sets and cannot be asked"),
    "name": ({"question": Judge("a"), "name": "a b"}, "must not be empty or contain"),
    "file": ({"question": Judge("a"), "questions": "nowhere.json"}, "'nowhere.json' cannot be read"),
    "verifier": ({"question": "clpi"}, "unknown verifier"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_told(name):
    options, match = MISTAKES[name]
    with pytest.raises(UsageError, match=match):
        Compositional(**options)


def test_bad_files_of_questions_are_told(tmp_path):
    for text, match in (("{", "is not JSON"), ('{"a": 3}', "must be a list of texts"), ("3", "must be a list of texts")):
        (tmp_path / "q.json").write_text(text)
        with pytest.raises(UsageError, match=match):
            Compositional(question=Judge("a"), questions=str(tmp_path / "q.json"))


def test_prompts_that_claim_nothing_are_refused_before_anything_runs():
    ask = Compositional(question=Oracle({}))
    for facts, match in (("auto", "names no object"), ("geneval", 'has no "include"'), ("questions", "has no questions")):
        with pytest.raises(UsageError, match=match):
            Compositional(question=ask.question, facts=facts).check(Condition(""))
    looker = Compositional(detector=lambda images, labels: [[]] * len(images))
    assert looker.check(Condition("a red star left of a circle")) is None
    for prompt in ("a wooden table", "a dog on a mat"):
        with pytest.raises(UsageError, match="a detector cannot judge"):
            looker.check(Condition(prompt))
    assert all(color in COLORS for color in ("red", "grey"))


def test_parts_are_kept_on_nodes():
    class Near(Judge):
        """Reads a fact's text for a colour, and scores by place."""

        def score(self, candidates):
            signs = [1.0 if "red" in condition.prompt else -1.0 for condition in candidates.conditions]
            return Scores(candidates.x0[:, 0] * torch.tensor(signs))

    result = search(
        "gaussian", Condition("near (3, 2.4)", metadata={"questions": ["red?", "blue?"]}), policy=BestOfN(n=4),
        verifier=Compositional(question=Near("near", needs=["x0", "conditions"]), aggregate="minimum"), steps=4,
    )  # fmt: skip
    leaves = [node for node in result.tree.nodes if node.level == 4]
    for leaf in leaves:
        value = leaf.values["compositional"]
        assert set(value.parts) == {"red?", "blue?"}
        assert value.parts["red?"] == -value.parts["blue?"]
        assert value.score == -abs(value.parts["red?"])
    assert result.score == max(leaf.score("compositional") for leaf in leaves)
