"""A person in the page scores pictures: the questions are files, the answers survive everything, and the tree is the scores'."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from fakes import PROMPT, Hooked
from faulty_disk import FaultyDisk, Killed, QuickDisk
from hypothesis import given, settings
from hypothesis import strategies as st
from people import Taste, answering, quick, runs_in, taste, worth  # noqa: F401 - a fixture
from PIL import Image

from tsdiff.treesearch.errors import UsageError
from tsdiff.treesearch.expand import carry_out
from tsdiff.treesearch.expansion import Asked, planned_expansion
from tsdiff.treesearch.node import Move, Node
from tsdiff.treesearch.parameters import build
from tsdiff.treesearch.questions import RunQuestions, answer_question, forget_questions, open_questions
from tsdiff.treesearch.resume import planned
from tsdiff.treesearch.search import execute, prepare, search
from tsdiff.verifiers.human import SKIPPED, Human, png
from tsdiff.verifiers.neural import NOT_FINITE

QUICK = QuickDisk()
BEST = {"policy": "best-of-n", "policy_options": {"n": 3}}
BEAM = {"policy": "beam", "policy_options": {"width": 2, "branch": 2}}
MCTS = {"policy": "mcts", "policy_options": {"simulations": 3}, "eta": 1.0}
PAGE = "human:where=page"


def searched(out: Path, verifiers, *, disk=QUICK, prompts="near (3, 2.4)", **options):
    options = {"deterministic": True, "steps": 4, "max_batch": 4} | options
    return execute(prepare("gaussian", prompts, out=out, verifiers=verifiers, **options), disk=disk, sync_seconds=0.0)


def go_on(folder: Path, **given):
    with planned(folder, disk=QUICK, **given) as (plan, into):
        return execute(plan, into=into, disk=QUICK, sync_seconds=0.0)


def trees(out: Path) -> list:
    return [json.loads((run / name).read_text()) for run in runs_in(out) for name in ("tree.json", "baseline.json")]


# The same tree as by anybody else -----------------------------------------------------------------------------------


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("how", [BEST, BEAM, MCTS], ids=["best-of-n", "beam", "mcts"])
def test_the_tree_is_that_of_the_same_scores(tmp_path, how):
    scripted = Taste()
    searched(tmp_path / "scripted", [scripted], **how)
    with answering(tmp_path / "asked") as person:
        searched(tmp_path / "asked", [PAGE], **how)
    assert trees(tmp_path / "asked") == trees(tmp_path / "scripted")
    assert sorted(question.node_id for question in person.answered) == sorted(set(scripted.asked)), "one question about a node, whoever's tree it is in"


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("rule", ["rank", "weighted:weights=5,1"])
def test_in_ensembles_too(tmp_path, rule):
    how = {"policy": "best-of-n", "policy_options": {"n": 4}, "ensemble": rule}
    searched(tmp_path / "scripted", [Taste(), "sharpness"], **how)
    with answering(tmp_path / "asked"):
        searched(tmp_path / "asked", [PAGE, "sharpness"], **how)
    assert trees(tmp_path / "asked") == trees(tmp_path / "scripted")


@pytest.mark.usefixtures("quick")
def test_several_prompts_ask_in_their_own_runs_and_the_files_go_when_they_are_done(tmp_path):
    prompts = ["near (3, 2.4)", "near (0, 0)"]
    searched(tmp_path / "scripted", [Taste()], prompts=prompts, **BEST)
    with answering(tmp_path / "asked") as person:
        searched(tmp_path / "asked", [PAGE], prompts=prompts, **BEST)
    assert trees(tmp_path / "asked") == trees(tmp_path / "scripted")
    assert {question.prompt for question in person.answered} == set(prompts)
    assert {question.run.name[:4] for question in person.answered} == {"0000", "0001"}
    assert not list(tmp_path.rglob("questions"))


@pytest.mark.usefixtures("quick")
def test_a_look_ahead_is_another_question_about_the_node(tmp_path):
    how = BEAM | {"policy_options": {"width": 2, "branch": 2, "value": "lookahead"}}
    searched(tmp_path / "scripted", [Taste()], **how)
    with answering(tmp_path / "asked"):
        searched(tmp_path / "asked", [PAGE], **how)
    assert trees(tmp_path / "asked") == trees(tmp_path / "scripted")


@pytest.mark.usefixtures("quick")
def test_no_score_is_null_with_its_reason(tmp_path):
    with answering(tmp_path, lambda question: None if question.node % 2 else worth(question)):
        results = searched(tmp_path, [PAGE], policy="best-of-n", policy_options={"n": 4})
    values = [node.values["human"] for node in results[0].tree.nodes if "human" in node.values]
    assert {value.reason for value in values if value.score is None} == {SKIPPED}
    assert any(value.score is None for value in values)


@pytest.mark.usefixtures("quick")
def test_an_expansion_asks_in_the_page_too(tmp_path):
    searched(tmp_path / "scripted", [Taste()], **BEST)
    with answering(tmp_path / "asked") as person:
        searched(tmp_path / "asked", [PAGE], **BEST)
        before = len(person.answered)
        for out, verifier in (("asked", None), ("scripted", Taste())):
            with planned_expansion(tmp_path / out / "run-0001", Asked("best", children=3), verifier=verifier, disk=QUICK) as expansion:
                carry_out(expansion, disk=QUICK, sync_seconds=0.0)
    assert trees(tmp_path / "asked") == trees(tmp_path / "scripted")
    assert len(person.answered) == before + 3


# Interruptions ------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("ensemble", [None, "rank"])
def test_killed_and_continued_it_asks_nothing_again_that_was_answered(tmp_path, ensemble):
    """Also where an ensemble waits for the answers about a whole set, which no journal has yet."""
    verifiers = {None: [PAGE], "rank": [PAGE, "sharpness"]}[ensemble]
    how = {"policy": "best-of-n", "policy_options": {"n": 4}, "ensemble": ensemble}
    with answering(tmp_path / "whole") as person:
        disk = FaultyDisk(-1, "killed")
        searched(tmp_path / "whole", verifiers, disk=disk, **how)
    asked = len(person.answered)
    asking = [index for index, change in enumerate(disk.log) if change == "rename"]
    for at in asking[4 : 4 + 2 * asked : 3]:
        answered: list[str] = []
        with answering(tmp_path / "cut") as person, pytest.raises(Killed):
            searched(tmp_path / "cut", verifiers, disk=FaultyDisk(at, "killed"), **how)
        answered += [question.id for question in person.answered]
        with answering(tmp_path / "cut") as person:
            go_on(tmp_path / "cut" / "run-0001")
        answered += [question.id for question in person.answered]
        assert len(answered) == len(set(answered)) == asked, at
        assert trees(tmp_path / "cut") == trees(tmp_path / "whole"), at
        shutil.rmtree(tmp_path / "cut")


@pytest.mark.usefixtures("quick")
def test_what_is_answered_while_nobody_searches_counts(tmp_path):
    with answering(tmp_path / "whole"):
        searched(tmp_path / "whole", [PAGE], **BEST)
    out = tmp_path / "stopped"
    plan = prepare("gaussian", "near (3, 2.4)", out=out, verifiers=[PAGE], deterministic=True, steps=4, max_batch=4, **BEST)
    with pytest.raises(KeyboardInterrupt):
        execute(plan, disk=QUICK, stop=lambda: len([one for run in runs_in(out) for one in open_questions(run)]) >= 3)
    folder = out / "run-0001"
    waiting = open_questions(folder)
    assert len(waiting) >= 3
    for question in waiting:
        answer_question(folder, question.id, worth(question))
    assert not open_questions(folder)
    with answering(out) as person:
        go_on(folder)
    assert not {question.id for question in person.answered} & {question.id for question in waiting}
    assert trees(out) == trees(tmp_path / "whole")


# Questions as files -------------------------------------------------------------------------------------------------


NODE = Node(7, 0xAB, 1, None, Move("draw", ()), 0)
PIXELS = np.random.default_rng(0).integers(0, 255, (6, 4, 3), dtype=np.uint8)


def asked(run: Path, heard, *, prompt="a red cube", low=0.0, high=10.0, questions=None):
    questions = questions or RunQuestions(run, disk=QUICK)
    questions.ask(NODE, "", prompt, "human", png(PIXELS), low=low, high=high, heard=heard)
    return questions


def test_a_question_says_what_the_page_needs(tmp_path):
    asked(tmp_path, print, prompt="a \x1b[31mred\n<script>", low=-1.0, high=1.5)
    (question,) = open_questions(tmp_path)
    assert (question.node, question.node_id, question.verifier, question.low, question.high) == (7, f"{0xAB:032x}", "human", -1.0, 1.5)
    assert question.prompt == "a \x1b[31mred\n<script>"
    with Image.open(question.picture) as opened:
        assert (np.asarray(opened) == PIXELS).all()


def test_one_answer_reaches_all_who_asked_and_is_taken_once(tmp_path):
    heard: list = []
    questions = asked(tmp_path, heard.append)
    asked(tmp_path, heard.append, questions=questions)
    (question,) = open_questions(tmp_path)
    answer_question(tmp_path, question.id, 4)
    assert not open_questions(tmp_path)
    with pytest.raises(UsageError, match="not open any more"):
        answer_question(tmp_path, question.id, 5.0)
    questions.look()
    questions.look()
    assert heard == [4.0, 4.0]
    asked(tmp_path, heard.append)  # after an interruption
    assert heard == [4.0, 4.0, 4.0]
    forget_questions(tmp_path, QUICK)
    assert not (tmp_path / "inbox" / "questions").exists()


@pytest.mark.parametrize("score", [-0.1, 10.5, float("nan"), float("inf"), True, "5", 10**400])
def test_what_is_no_score_is_refused(tmp_path, score):
    asked(tmp_path, print)
    (question,) = open_questions(tmp_path)
    with pytest.raises(UsageError, match="must be a number from 0 to 10"):
        answer_question(tmp_path, question.id, score)
    assert open_questions(tmp_path) == [question]


def test_questions_that_are_not_there_are_not_open(tmp_path):
    for number in ("0" * 32, "../run", "", "0" * 31 + "\n"):
        with pytest.raises(UsageError, match="not open any more"):
            answer_question(tmp_path, number, 1.0)


@settings(max_examples=40)
@given(st.one_of(st.binary(max_size=300), st.recursive(st.none() | st.booleans() | st.floats() | st.integers() | st.text(), lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=8).map(lambda value: json.dumps(value).encode())), st.sampled_from(["answer.json", "json"]))
def test_any_bytes_as_answer_or_question_do_no_harm(tmp_path_factory, data, suffix):
    run = tmp_path_factory.mktemp("run")
    heard: list = []
    questions = asked(run, heard.append)
    (question,) = open_questions(run)
    (question.picture.parent / f"{question.id}.{suffix}").write_bytes(data)
    questions.look()
    open_questions(run)
    if suffix == "json":
        asked(run, heard.append, questions=RunQuestions(run, disk=QUICK))
    assert heard == []
    assert [one.id for one in open_questions(run)] == [question.id], "it is asked again"
    answer_question(run, question.id, 3.0)
    questions.look()
    assert heard == [3.0]
    shutil.rmtree(run)


def test_links_and_folders_in_the_way_do_no_harm(tmp_path):
    run, secret = tmp_path / "run", tmp_path / "secret"
    run.mkdir()
    secret.mkdir()
    heard: list = []
    questions = asked(run, heard.append)
    (question,) = open_questions(run)
    answer = question.picture.parent / f"{question.id}.answer.json"
    (secret / "answer").write_text('{"format": 1, "score": 9}')
    answer.symlink_to(secret / "answer")
    questions.look()
    assert heard == []
    assert not answer.is_symlink(), "what is no answer is removed, and what it leads to stays"
    assert (secret / "answer").exists()
    answer.mkdir()
    questions.look()
    assert [one.id for one in open_questions(run)] == [question.id]
    with pytest.raises((UsageError, Exception), match="cannot write"):
        answer_question(run, question.id, 1.0)
    forget_questions(run, QUICK)
    assert answer.is_dir()
    shutil.rmtree(run / "inbox")
    (run / "inbox").symlink_to(secret)
    with pytest.raises(UsageError, match="is a link"):
        asked(run, heard.append)
    assert open_questions(run) == []
    forget_questions(run, QUICK)
    assert sorted(path.name for path in secret.iterdir()) == ["answer"]


# The verifier -------------------------------------------------------------------------------------------------------


class Rows:
    """Candidates with a page each."""

    def __init__(self, images):
        from tsdiff.treesearch.protocols import Condition

        self.images = images
        self.conditions = [Condition("a red cube")] * len(images)
        self.node_ids = [f"{index:032x}" for index in range(len(images))]
        self.asked: list = []

    @property
    def pages(self):
        rows = self

        class Page:
            def ask(self, who, picture, *, low, high, heard):
                rows.asked.append((who, picture, low, high))
                heard(low)

        return [Page() for _ in self.images]


def test_a_picture_without_pixels_is_not_asked_about():
    images = torch.rand((3, 3, 8, 6), generator=torch.Generator().manual_seed(0))
    images[1, 0, 0, 0] = float("inf")
    rows, said = Rows(images), {}
    rows.node_ids[2] = rows.node_ids[0]
    build(Human, {"where": "page", "low": "-2", "high": "2", "name": "taste"}).ask(rows, lambda node_id, *what: said.setdefault(node_id, what))
    assert said == {rows.node_ids[0]: (-2.0, None), rows.node_ids[1]: (None, NOT_FINITE)}
    assert [(who, low, high) for who, _, low, high in rows.asked] == [("taste", -2.0, 2.0)], "one question about a node"


def test_a_search_that_is_not_recorded_is_refused_before_anything_loads():
    class Unloaded(Hooked):
        def load(self):
            raise AssertionError("weights were loaded")

    model = Unloaded()
    model.media = "image"
    for verifier, ensemble in ((PAGE, None), ([PAGE, "sharpness"], "rank")):
        with pytest.raises(UsageError, match="asks a person in the page of the run, but this search is not recorded"):
            search(model, PROMPT, verifier=verifier, ensemble=ensemble)


def test_it_needs_no_terminal_and_only_the_page_needs_a_run():
    human = build(Human, {"where": "page"})
    human.prepare("cpu")
    assert "pages" in human.needs
    assert "pages" not in Human().needs
    with pytest.raises(UsageError, match="outside of one ask in the terminal"):
        human.score(Rows(torch.zeros(1, 3, 4, 4)))
    with pytest.raises(UsageError, match="is for where=terminal"):
        build(Human, {"where": "page", "folder": "pictures"})
    with pytest.raises(UsageError, match="must be one of 'terminal', 'page'"):
        build(Human, {"where": "mail"})


def test_taste_tells_pictures_apart():
    assert taste(np.zeros((2, 2, 3), np.uint8)) == 0.0
    assert taste(np.full((2, 2, 3), 255, np.uint8)) == 10.0
