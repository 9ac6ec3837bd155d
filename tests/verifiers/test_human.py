"""A person at a pseudo-terminal scores pictures: what is shown, what answers mean, and that nobody waits for them."""

from __future__ import annotations

import base64
import io
import os
import pty
import re
import select
import signal
import subprocess
import sys
import termios
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from fakes import PROMPT, Hooked, Judge, check_books, grow
from PIL import Image

from tsdiff.treesearch.errors import UsageError
from tsdiff.treesearch.parameters import build
from tsdiff.treesearch.protocols import Condition, PendingVerifier
from tsdiff.treesearch.requests import Denoise, Draw, Score
from tsdiff.treesearch.search import search
from tsdiff.treesearch.terminal import drawn, undisturbed
from tsdiff.verifiers.human import SKIPPED, STOPPED, Human
from tsdiff.verifiers.human_terminal import CHUNK, inline, inline_protocol
from tsdiff.verifiers.neural import NOT_FINITE

ASKED = b"? help"
PATIENCE = 30.0


class Person:
    """Answers questions at the other end of a pseudo-terminal, each when it is there to be read.

    Attributes:
      shown: everything that the terminal has shown.
      before: called before every answer.
    """

    def __init__(self, leader: int) -> None:
        self.leader = leader
        self.shown = b""
        self.answers: list[bytes] = []
        self.before = lambda: None
        self.over = threading.Event()
        self.thread = threading.Thread(target=self._live)

    def will_say(self, *answers: str) -> Person:
        self.answers = [answer.encode() if answer == "\x04" else answer.encode() + b"\n" for answer in answers]
        self.thread.start()
        return self

    @property
    def text(self) -> str:
        return self.shown.decode().replace("\r\n", "\n")

    def _live(self) -> None:
        seen = 0
        while not self.over.is_set():
            if not select.select([self.leader], [], [], 0.01)[0]:
                continue
            self.shown += os.read(self.leader, 65536)
            asked = len(re.findall(rb"\(s skip, q quit, \? help[^)]*\): ", self.shown))
            if asked > seen and self.answers:
                seen = asked
                self.before()
                os.write(self.leader, self.answers.pop(0))


@pytest.fixture
def person(monkeypatch):
    """Somebody at the terminal that is standard input."""
    leader, follower = pty.openpty()
    stdin = os.fdopen(follower, "r", closefd=False)
    monkeypatch.setattr(sys, "stdin", stdin)
    for name in ("TMUX", "TERM_PROGRAM", "KITTY_WINDOW_ID", "LC_TERMINAL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    one = Person(leader)
    yield one
    one.over.set()
    if one.thread.ident is not None:
        one.thread.join(PATIENCE)
    stdin.close()
    for end in (leader, follower):
        os.close(end)


def best_of(count):
    def search(tree):
        roots = yield Draw(count)
        leaves = yield Denoise(roots, to=tree.schedule.last)
        yield Score(leaves)
        return tree.best()

    return search


def pictures(count, *, prompt="a red cube"):
    images = torch.rand((count, 3, 8, 6), generator=torch.Generator().manual_seed(0))
    return SimpleNamespace(images=images, conditions=[Condition(prompt)] * count, node_ids=[f"{index:032x}" for index in range(count)])


def finished(grown):
    return [node.values["human"] for node in grown.nodes if node.level == grown.tree.schedule.last]


# Answers -------------------------------------------------------------------------------------------------------------


def test_a_search_goes_by_what_a_person_says(person, tmp_path):
    person.will_say("3", "s", "8.5", "0")
    grown = grow(best_of(4), verifiers=[Human(folder=str(tmp_path))])
    check_books(grown)
    assert [value.score for value in finished(grown)] == [3.0, None, 8.5, 0.0]
    assert finished(grown)[1].reason == SKIPPED
    assert grown.run.answer.score("human") == 8.5
    assert grown.tree.ledger.verifier_calls == {"human": 4}
    for node in grown.nodes:
        if "human" in node.values:
            assert f"node     {node.id:032x}" in person.text


def test_quit_means_no_more_questions_and_the_search_ends_all_the_same(person):
    person.will_say("5", "q")
    human = Human()
    grown = grow(best_of(4), best_of(2), verifiers=[human], seeds=[0, 1], ok=False)
    values = [node.values["human"] for run in grown.runs for node in run.tree.nodes if "human" in node.values]
    assert [value.score for value in values] == [5.0, None, None, None, None, None]
    assert {value.reason for value in values[1:]} == {STOPPED}
    assert grown.runs[0].answer.score("human") == 5.0
    assert person.text.count("picture ") == 2


@pytest.mark.parametrize(("typed", "meaning"), [("Q", STOPPED), ("quit", STOPPED), ("\x04", STOPPED), ("S", SKIPPED), ("skip", SKIPPED)])
def test_words_and_the_end_of_input(person, typed, meaning):
    person.will_say(typed)
    assert Human().score(pictures(1)).reasons == {0: meaning}


def test_what_is_no_score_is_asked_again(person):
    person.will_say("", "eleven", "11", "-0.1", "nan", "inf", "?", " 10 ")
    assert list(Human().score(pictures(1)).values) == [10.0]
    for wrong in ("'eleven'", "'11'", "'-0.1'", "'nan'", "'inf'"):
        assert f"{wrong} is neither a number from 0 to 10 nor one of s, q, ?" in person.text
    assert "nothing was typed" in person.text
    assert "Ctrl-C: stop the search" in person.text


def test_the_range_is_the_callers(person):
    person.will_say("0.5", "-1")
    human = build(Human, {"low": "-1", "high": "1", "name": "taste"})
    assert list(human.score(pictures(2)).values) == [0.5, -1.0]
    assert "score from -1 to 1 (s skip, q quit, ? help, 1 more wait): " in person.text


def test_what_was_typed_before_the_question_does_not_answer_it(person):
    os.write(person.leader, b"9\n")
    time.sleep(0.05)
    person.will_say("4")
    assert list(Human().score(pictures(1)).values) == [4.0]


def test_one_answer_is_for_all_rows_of_a_node(person):
    person.will_say("4", "6")
    batch = pictures(3)
    batch.node_ids[2] = batch.node_ids[0]
    assert list(Human().score(batch).values) == [4.0, 6.0, 4.0]


def test_a_picture_without_pixels_is_not_asked_about(person):
    person.will_say("4")
    batch = pictures(2)
    batch.images[0, 0, 0, 0] = float("nan")
    scores = Human().score(batch)
    assert scores.reasons == {0: NOT_FINITE}
    assert scores.values[1] == 4.0
    assert person.text.count("picture ") == 1


def test_a_terminal_that_goes_away_leaves_nobody_waiting(person, monkeypatch):
    def gone(*_):
        raise OSError(5, "Input/output error")

    human = Human()
    human.prepare("cpu")
    monkeypatch.setattr(termios, "tcflush", gone)
    scores = human.score(pictures(2))
    assert scores.reasons == dict.fromkeys((0, 1), "asking failed: OSError: [Errno 5] Input/output error")


def test_others_go_on_while_a_question_waits(person):
    """The person answers only when the other search has denoised and scored: a blocked loop would end in a timeout."""
    gone_on = threading.Event()
    waited: list[bool] = []
    person.before = lambda: waited.append(gone_on.wait(PATIENCE))
    person.will_say("2", "7")

    def asks(tree):
        roots = yield Draw()
        (value,) = yield Score(roots, verifier="human")
        assert value == 2.0
        return (yield from best_of(1)(tree))

    def works(tree):
        roots = yield Draw(2)
        yield Score(roots)
        leaves = yield Denoise(roots, to=tree.schedule.last)
        gone_on.set()
        return leaves[0]

    grown = grow(asks, works, verifiers=[Judge(), Human()], seeds=[0, 1])
    assert waited[0]
    assert grown.runs[0].answer.score("human") == 7.0


# What is shown -------------------------------------------------------------------------------------------------------


def test_the_file_named_is_the_picture(person, tmp_path):
    person.will_say("1", "2")
    batch = pictures(2)
    assert isinstance(Human(), PendingVerifier)
    Human(folder=str(tmp_path / "a" / "b")).score(batch)
    for row in range(2):
        path = re.findall(r"^picture  (.+)$", person.text, re.MULTILINE)[row]
        assert path.endswith(f"{batch.node_ids[row]}.png")
        with Image.open(path) as image:
            shown = np.asarray(image).transpose(2, 0, 1) / 255.0
        assert np.abs(shown - batch.images[row].numpy()).max() <= 0.5 / 255 + 1e-6


def test_pictures_of_an_earlier_search_stay(person, tmp_path):
    person.will_say("1", "1")
    for _ in range(2):
        Human(folder=str(tmp_path)).score(pictures(1))
    assert len(list(tmp_path.glob("*.png"))) == 2


def test_no_prompt_steers_the_terminal(person):
    person.will_say("1", "1")
    human = Human()
    human.score(pictures(1, prompt="a \x1b[31mred\x07\ncube"))
    human.score(pictures(1, prompt=""))
    assert "prompt   a [31mred cube\n" in person.text
    assert "prompt   (none)\n" in person.text
    assert "\x1b" not in person.text


PNG = io.BytesIO()
Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(PNG, "PNG")


def test_kitty_gets_the_file_in_chunks_and_is_told_not_to_reply():
    text = inline(PNG.getvalue(), "kitty")
    pieces = re.findall("\x1b_G([^;]*);([^\x1b]*)\x1b\\\\", text)
    assert "".join(f"\x1b_G{keys};{data}\x1b\\" for keys, data in pieces) + "\n" == text
    assert len(pieces) > 2
    assert all(len(data) <= CHUNK and "q=2" in keys.split(",") for keys, data in pieces)
    assert [keys[-3:] for keys, _ in pieces] == ["m=1"] * (len(pieces) - 1) + ["m=0"]
    assert {"a=T", "f=100"} <= set(pieces[0][0].split(","))
    assert base64.standard_b64decode("".join(data for _, data in pieces)) == PNG.getvalue()


def test_iterm_gets_the_file_whole():
    head, _, data = inline(PNG.getvalue(), "iterm").partition(":")
    assert head.startswith("\x1b]1337;File=inline=1;")
    assert f"size={len(PNG.getvalue())}" in head.split(";")
    assert base64.standard_b64decode(data.removesuffix("\x07\n")) == PNG.getvalue()


def test_other_terminals_get_the_path_only():
    assert inline(PNG.getvalue(), "none") == ""


@pytest.mark.parametrize(
    ("environment", "protocol"),
    [
        ({"TERM": "xterm-kitty"}, "kitty"),
        ({"TERM": "xterm-256color", "KITTY_WINDOW_ID": "1"}, "kitty"),
        ({"TERM": "xterm-ghostty"}, "kitty"),
        ({"TERM": "xterm-256color", "TERM_PROGRAM": "iTerm.app"}, "iterm"),
        ({"TERM": "xterm-256color", "LC_TERMINAL": "iTerm2"}, "iterm"),
        ({"TERM": "xterm-256color", "TERM_PROGRAM": "WezTerm"}, "iterm"),
        ({"TERM": "xterm-kitty", "TMUX": "/tmp/tmux,1,0"}, "none"),
        ({"TERM": "screen-256color", "LC_TERMINAL": "iTerm2"}, "none"),
        ({"TERM": "xterm-256color"}, "none"),
        ({}, "none"),
    ],
)
def test_the_environment_tells_what_the_terminal_can_show(environment, protocol):
    assert inline_protocol(environment) == protocol


def test_a_terminal_that_can_shows_the_picture_before_the_question(person, monkeypatch):
    monkeypatch.setenv("TERM", "xterm-kitty")
    person.will_say("1", "1")
    Human().score(pictures(1))
    assert person.shown.count(b"\x1b_G") == 1
    assert person.shown.index(b"\x1b_G") < person.shown.index(b"picture  ")
    Human(show="none").score(pictures(1))
    assert person.shown.count(b"\x1b_G") == 1


def test_a_progress_bar_keeps_still_while_a_question_waits(person):
    from rich.console import Console
    from rich.progress import Progress

    terminal = os.fdopen(os.dup(sys.stdin.fileno()), "w")
    lengths: list[int] = []

    def watch():
        time.sleep(0.4)  # four redraws of a bar that did not keep still
        lengths.append(len(person.shown) + (len(os.read(person.leader, 65536)) if select.select([person.leader], [], [], 0)[0] else 0))
        lengths.append(len(person.shown))

    person.before = watch
    person.will_say("6")
    with Progress(console=Console(file=terminal, force_terminal=True), transient=True) as bar, drawn(bar.stop, bar.start):
        bar.add_task("denoising", total=None)
        time.sleep(0.25)
        assert list(Human().score(pictures(1)).values) == [6.0]
        time.sleep(0.25)
    terminal.close()
    assert lengths[0] == lengths[1], "something was drawn over the question"
    question = person.shown.index(ASKED)
    assert b"denoising" in person.shown[:question]
    assert b"denoising" not in person.shown[person.shown.index(b"picture  ") : question]
    assert b"denoising" in person.shown[question:]


def test_drawings_come_back_in_turn_and_those_that_ended_do_not():
    done: list[str] = []
    with drawn(lambda: done.append("stop a"), lambda: done.append("start a")):
        other = drawn(lambda: done.append("stop b"), lambda: done.append("start b"))
        other.__enter__()
        with undisturbed():
            assert done == ["stop a", "stop b"]
        assert done == ["stop a", "stop b", "start a", "start b"]
        with undisturbed():
            other.__exit__(None, None, None)
        assert done[4:] == ["stop a", "stop b", "start a"]
    with undisturbed():
        pass
    assert len(done) == 7


PROGRAM = """
from tsdiff.treesearch import registry
from tsdiff.verifiers.human import Human
registry.verifiers.add("human", Human)
from tsdiff.cli import main
main(["score", "picture.png", "--verifier", "human"])
"""


def test_ctrl_c_at_a_question_ends_the_program(tmp_path):
    """A thread that waits for input must not keep the interpreter from ending, nor break its end."""
    Image.new("RGB", (8, 8)).save(tmp_path / "picture.png")
    leader, follower = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "NO_COLOR": "1", "TMPDIR": str(tmp_path)}
    process = subprocess.Popen((sys.executable, "-c", PROGRAM), stdin=follower, stdout=follower, stderr=follower, cwd=tmp_path, env=environment)
    os.close(follower)
    shown, interrupted = b"", False
    while select.select([leader], [], [], PATIENCE)[0]:
        try:
            shown += os.read(leader, 65536)
        except OSError:  # how Linux tells that the other end is closed
            break
        if ASKED in shown and not interrupted:
            interrupted = True
            process.send_signal(signal.SIGINT)
    os.close(leader)
    assert process.wait(PATIENCE) == 130
    assert shown.decode().splitlines()[-1].endswith("interrupted: nothing was changed")
    assert not list(tmp_path.glob("tsdiff-human-*")), "pictures without a folder of their own go with the program"


# Refusals ------------------------------------------------------------------------------------------------------------


def test_without_a_terminal_it_is_refused_before_anything_loads(tmp_path, monkeypatch):
    class Unloaded(Hooked):
        def load(self):
            raise AssertionError("weights were loaded")

    model = Unloaded()
    model.media = "image"
    with (tmp_path / "empty").open("w+") as stdin:
        monkeypatch.setattr(sys, "stdin", stdin)
        with pytest.raises(UsageError, match="human asks a person in the terminal, but standard input is not one"):
            search(model, PROMPT, verifier=Human(), out=tmp_path / "runs")
        assert not (tmp_path / "runs").exists()
    for nothing in (None, stdin):  # none at all, one that is closed
        monkeypatch.setattr(sys, "stdin", nothing)
        with pytest.raises(UsageError, match="start it from a terminal"):
            Human().check(Condition())


@pytest.mark.parametrize(
    ("options", "hint"),
    [
        ({"low": "5", "high": "5"}, "low must be below high"),
        ({"low": "nan"}, "low is nan but must be at least"),
        ({"high": "inf"}, "high is inf but must be at least"),
        ({"low": "many"}, "must be a number"),
        ({"show": "sixel"}, "must be one of 'auto', 'kitty', 'iterm', 'none'"),
        ({"name": "a b"}, "must not be empty or contain"),
        ({"folder": __file__}, "is a file"),
        ({"range": "0-10"}, "unknown parameter"),
    ],
)
def test_wrong_options(options, hint):
    with pytest.raises(UsageError, match=hint):
        build(Human, options)


def test_a_folder_that_cannot_be_made_is_told_before_the_search(person, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="choose another folder"):
        Human(folder=str(tmp_path / "file" / "below")).prepare("cpu")


def test_an_unanswerable_question_fails_its_node_only(monkeypatch):
    """A terminal that is lost between the check and the question: values say so, the engine ends."""
    monkeypatch.setattr(sys, "stdin", None)
    grown = grow(best_of(2), model=Hooked(), verifiers=[Human()], ok=False)
    assert all("asks a person in the terminal" in value.reason for value in finished(grown))
