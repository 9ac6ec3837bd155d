"""Commands in a run's inbox: each is carried out once, whoever is killed when, and nothing that lies there harms a run."""

from __future__ import annotations

import json
import os
import random
import shutil
import threading
from itertools import count
from pathlib import Path

import pytest
from expansions import PROMPT, QUICK, begin, derived, expand
from faulty_disk import FaultyDisk, Killed
from hypothesis import given, settings
from hypothesis import strategies as st
from people import quick  # noqa: F401 - a fixture

from tsdiff.treesearch import inbox as inbox_module
from tsdiff.treesearch.durable import status
from tsdiff.treesearch.errands import carry_out_waiting, waiting
from tsdiff.treesearch.errors import SetupError, UsageError
from tsdiff.treesearch.expansion import Asked, Taken, planned_expansion
from tsdiff.treesearch.inbox import Inbox, ask_expand, ask_stop, commands, inbox_path, read_commands, tell
from tsdiff.treesearch.lock import Lock
from tsdiff.treesearch.resume import planned
from tsdiff.treesearch.search import execute, prepare

SEARCH = {"deterministic": True, "steps": 5, "max_batch": 4, "policy": "best-of-n", "policy_options": {"n": 4}}
SAMPLE, LATER = 2, 4
"""Nodes that are finished samples: of two that were drawn first, and of four."""
STEP = int(os.environ.get("TSDIFF_DRILL_STEP", "0"))
"""1 kills at every change of a run's files, which takes minutes; by default they are sampled."""


@pytest.fixture(scope="module")
def searched(tmp_path_factory) -> Path:
    """A run that is done; do not write there."""
    return begin(tmp_path_factory.mktemp("searched"), steps=4)


@pytest.fixture
def run(searched, tmp_path) -> Path:
    """A copy of it."""
    return Path(shutil.copytree(searched, tmp_path / "run-0001"))


def work(folder: Path, disk=QUICK, **how) -> int:
    return carry_out_waiting(folder, disk=disk, sync_seconds=0.0, **how)


def states(folder: Path) -> list[str]:
    return [one.state for one in commands(folder)]


def drivers(folder: Path) -> list[dict]:
    return json.loads((folder / "run.json").read_text()).get("drivers", [])


# Asking -------------------------------------------------------------------------------------------------------------


def test_what_was_asked_is_done_once_in_the_order_of_asking(run):
    asked = [ask_expand(run, SAMPLE, children=2, disk=QUICK), ask_expand(run, 3, children=1, to_level=0, disk=QUICK)]
    assert asked == sorted(asked)
    assert states(run) == ["waiting", "waiting"]
    assert work(run) == 2
    assert work(run) == 0
    assert [driver.get("command") for driver in drivers(run)] == [None, *asked]
    assert [driver["arguments"]["node"] for driver in drivers(run)[1:]] == [SAMPLE, 3]
    assert [(one.id, one.do, one.state) for one in commands(run)] == [(asked[0], "expand", "done"), (asked[1], "expand", "done")]
    assert commands(run)[0].message.startswith(f"its best is node {drivers(run)[1]['best']}, ")


def test_a_command_gives_what_the_same_expansion_gives(run, tmp_path):
    plain = Path(shutil.copytree(run, tmp_path / "plain"))
    expand(plain, SAMPLE, children=2, renoise=0.7)
    ask_expand(run, SAMPLE, children=2, renoise=0.7)
    work(run)
    assert derived(run) == derived(plain)


@pytest.mark.parametrize("wrong", [{"node": -1}, {"node": True}, {"node": 1 << 60}, {"node": "1"}, {"children": 0}, {"renoise": 1.5}, {"renoise": float("nan")}, {"to_level": -1}, {"renoise": 0.5, "to_level": 1}])
def test_what_is_no_command_is_not_written(run, wrong):
    with pytest.raises(UsageError, match="cannot be asked"):
        ask_expand(run, **{"node": 1, **wrong})
    assert not (run / "inbox").exists()


def test_what_cannot_be_done_is_told_and_the_next_is_done(run):
    ask_expand(run, 10**6)
    last = len(json.loads((run / "tree.json").read_text())["nodes"]) - 1
    ask_expand(run, last, renoise=0.0)
    ask_expand(run, SAMPLE, children=1)
    assert work(run) == 1
    assert states(run) == ["failed", "failed", "done"]
    assert "does not exist" in commands(run)[0].message
    assert len(drivers(run)) == 2


def test_nobody_can_be_stopped_where_nobody_writes(run):
    with pytest.raises(UsageError, match="nothing to stop"):
        ask_stop(run)


def test_commands_of_several_runs_lie_beside_their_lock(tmp_path):
    folder = begin(tmp_path, [PROMPT, "near (0, 0)"], steps=3)
    first, second = sorted(path.parent for path in folder.glob("*/run.json"))
    assert inbox_path(first) == inbox_path(second) == folder / "inbox"
    command = ask_expand(second, SAMPLE, children=1)
    assert commands(first) == []
    assert [one.id for one in commands(second)] == [command]
    assert work(folder) == 1
    assert (len(drivers(first)), len(drivers(second))) == (0, 2)
    ask_expand(first, SAMPLE, children=1)
    assert work(first) == 1, "named by one of its runs it is the same inbox"


def test_old_commands_that_are_over_are_forgotten(run, monkeypatch):
    monkeypatch.setattr(inbox_module, "KEPT", 2)
    asked = [ask_expand(run, 10**6 + i) for i in range(5)]
    work(run)
    assert [one.id for one in commands(run)] == asked[-2:]
    assert len(os.listdir(run / "inbox")) == 4


# While somebody writes ----------------------------------------------------------------------------------------------


def stopping(folder: Path, at: int):
    """A callback of a search that asks it to stop, through its inbox, after so many batches."""
    batches = count()

    def callback(progress) -> None:
        if next(batches) == at:
            ask_stop(folder)

    return callback


@pytest.mark.usefixtures("quick")
def test_stopped_through_its_inbox_a_search_goes_on_to_the_same_bytes(tmp_path):
    execute(prepare("gaussian", PROMPT, out=tmp_path / "whole", **SEARCH), disk=QUICK)
    folder = tmp_path / "cut" / "run-0001"
    with pytest.raises(KeyboardInterrupt):
        execute(prepare("gaussian", PROMPT, out=tmp_path / "cut", **SEARCH), disk=QUICK, callback=stopping(folder, 2))
    assert status(folder) == "interrupted"
    assert [(one.do, one.state) for one in commands(folder)] == [("stop", "done")]
    with planned(folder, disk=QUICK) as (plan, into):
        execute(plan, into=into, disk=QUICK)  # the old command stops nobody
    assert derived(folder) == derived(tmp_path / "whole" / "run-0001")


@pytest.mark.usefixtures("quick")
def test_a_stop_is_for_the_process_that_held_the_lock_then(run, tmp_path):
    """A process that was killed before it read it leaves it behind; the next one is not meant."""
    with Lock(run / "lock"):
        number = ask_stop(run)
        path = run / "inbox" / f"{number}.json"
        path.write_text(path.read_text().replace(f'"pid":{os.getpid()}', '"pid":1'))
    expand(run, SAMPLE, children=1)
    assert [(one.state, one.message) for one in commands(run)] == [("failed", "the process that it was for has ended")]
    with Lock(run / "lock"):
        ask_stop(run)
        Inbox(run).close()
    assert commands(run)[1].message == "it had ended already"


@pytest.mark.usefixtures("quick")
def test_what_is_asked_while_a_search_goes_on_is_done_right_after_it(tmp_path):
    folder = tmp_path / "run-0001"
    asked: list[str] = []

    def callback(progress) -> None:
        if not asked:
            asked.append(ask_expand(folder, LATER, children=2))
            assert states(folder) == ["waiting"]
            assert work(folder) == 0, "somebody else holds the lock"

    execute(prepare("gaussian", PROMPT, out=tmp_path, **SEARCH), disk=QUICK, callback=callback)
    assert states(folder) == ["waiting"]
    assert work(folder) == 1
    assert states(folder) == ["done"]


@pytest.mark.usefixtures("quick")
def test_an_expansion_of_a_search_that_was_stopped_waits_for_its_end(tmp_path):
    folder = tmp_path / "run-0001"
    with pytest.raises(KeyboardInterrupt):
        execute(prepare("gaussian", PROMPT, out=tmp_path, **SEARCH), disk=QUICK, callback=stopping(folder, 1))
    ask_expand(folder, LATER, children=1)
    assert work(folder) == 0
    assert [(one.state, "tsdiff resume" in one.message) for one in commands(folder)][1:] == [("waiting", True)]
    with planned(folder, disk=QUICK) as (plan, into):
        execute(plan, into=into, disk=QUICK)
    assert work(folder) == 1


@pytest.mark.usefixtures("quick")
def test_a_stopped_expansion_is_told_and_goes_on_before_the_next_one(run, tmp_path):
    whole = Path(shutil.copytree(run, tmp_path / "whole"))
    for folder in (whole, run):
        ask_expand(folder, SAMPLE, children=4)
        ask_expand(folder, 3, children=1, to_level=0)
    work(whole)
    with pytest.raises(KeyboardInterrupt):
        work(run, callback=stopping(run, 1))
    assert [(one.do, one.state) for one in commands(run)] == [("expand", "failed"), ("expand", "failed"), ("stop", "done")]
    first, second, _ = commands(run)
    assert "it was stopped; continue it with: tsdiff resume" in first.message
    assert second.message == "it was stopped before it began"
    ask_expand(run, 3, children=1, to_level=0)
    assert work(run) == 1
    assert [one.state for one in commands(run)] == ["done", "failed", "done", "done"]
    assert derived(run) == derived(whole)


# Killed -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", ["killed", "power", "full"])
def test_killed_at_any_change_a_command_is_carried_out_once(run, tmp_path, fault):
    whole = Path(shutil.copytree(run, tmp_path / "whole"))
    for folder in (whole, run):
        ask_expand(folder, SAMPLE, children=2)
    work(whole)
    expected, done, step = derived(whole), 0, STEP or {"killed": 7, "power": 11, "full": 13}[fault]
    for at in count(random.Random(fault).randrange(step), step):
        copy = Path(shutil.copytree(run, tmp_path / "cut"))
        disk = FaultyDisk(at, fault, seed=at)
        try:
            work(copy, disk)
        except (Killed, SetupError):
            assert disk.failed
        if not disk.failed:
            break
        work(copy)
        assert [one.state for one in commands(copy)] in (["done"], ["failed"]), at
        if commands(copy)[0].state == "failed":  # its disk was full, or it was begun: then it is continued, and not begun again
            assert fault == "full" or "tsdiff resume" in commands(copy)[0].message
        ask_expand(copy, 10**6)  # whatever is asked next finishes it first
        work(copy)
        assert sum("command" in driver for driver in drivers(copy)) == len(drivers(copy)) - 1 <= 1
        if len(drivers(copy)) == 2:
            assert derived(copy) == expected, at
            assert commands(copy)[0].state == "done"
        else:
            assert fault == "full", at
        shutil.rmtree(copy)
        done += 1
    assert done >= 3


@pytest.mark.parametrize("fault", ["killed", "power"])
def test_killed_while_it_is_asked_it_is_a_command_or_none(run, tmp_path, fault):
    for at in count():
        copy = Path(shutil.copytree(run, tmp_path / "cut"))
        disk = FaultyDisk(at, fault, seed=at)
        try:
            ask_expand(copy, SAMPLE, children=1, disk=disk)
        except Killed:
            assert states(copy) in ([], ["waiting"])
            shutil.rmtree(copy)
            continue
        assert states(copy) == ["waiting"]
        break
    assert at > 3


def test_two_who_want_the_same_do_it_once(run):
    command = ask_expand(run, SAMPLE, children=2)
    done: list[int] = []
    threads = [threading.Thread(target=lambda: done.append(work(run))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(done) <= 1
    assert len(drivers(run)) == 2
    with pytest.raises(Taken), planned_expansion(run, Asked(SAMPLE, 2), command=command):
        pass


# Hostile ------------------------------------------------------------------------------------------------------------


JSON = st.recursive(st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=5), lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3), max_leaves=6)
COMMANDS = st.fixed_dictionaries(
    {"format": st.just(1) | JSON, "do": st.sampled_from(["expand", "stop"]) | JSON, "run": st.sampled_from([".", "..", "a/b", ""]) | JSON},
    optional={name: st.integers(-2, 3) | st.floats() | JSON for name in ("node", "children", "renoise", "to_level", "pid", "host", "more")},
)
NAMES = st.sampled_from(["00000000000000000001-0000000a.json", "00000000000000000001-0000000a.told.json", "00000000000000000002-0000000b.json", "strange", "x.json.part"])


@settings(max_examples=60)
@given(st.dictionaries(NAMES, st.binary(max_size=200) | (COMMANDS | JSON).map(lambda value: json.dumps(value).encode()), max_size=4))
def test_any_bytes_in_the_inbox_are_read_without_harm(tmp_path_factory, files):
    folder = tmp_path_factory.mktemp("any")
    (folder / "inbox").mkdir()
    (folder / "run.json").write_text('{"format": 1, "status": "failed"}')
    for name, data in files.items():
        (folder / "inbox" / name).write_bytes(data)
    for one in commands(folder):
        assert one.state in ("waiting", "running", "done", "failed")
        assert one.message.isprintable() or not one.message or "\n" not in one.message
    with Lock(folder / "lock"):
        assert not Inbox(folder).look(), "nobody here was meant"
    assert work(folder) == 0
    assert waiting(folder) == [], "what cannot be done is told, and never tried again"
    assert not any(one.state == "waiting" for one in commands(folder) if one.do == "expand" and one.command.run == ".")
    shutil.rmtree(folder)


def litter(folder: Path) -> None:
    """What might lie in an inbox, under the names of commands."""
    folder.mkdir()
    names = (f"{number:020d}-0000000a.json" for number in count())
    (folder / next(names)).mkdir()
    os.mkfifo(folder / next(names))
    (folder / next(names)).symlink_to("/dev/zero")
    (folder / next(names)).symlink_to("/nowhere")
    (folder / next(names)).write_bytes(b"\xff" * 100_000)
    (folder / next(names)).write_bytes(b"[" * 60_000)
    (folder / next(names)).write_text(json.dumps({"format": 1, "do": "stop", "run": ".", "pid": os.getpid(), "host": "elsewhere"}))
    held = next(names)
    (folder / held).write_text('{"format":1,"do":"stop","run":".","pid":1,"host":"x"}')
    (folder / held.replace(".json", ".told.json")).mkdir()
    (folder / "questions").write_text("no folder")


@pytest.mark.usefixtures("quick")
def test_what_lies_in_the_inbox_does_not_change_a_run(tmp_path):
    for kind in ("plain", "litter", "file", "link"):
        folder = tmp_path / kind / "run-0001"

        def lay(progress, folder=folder, kind=kind) -> None:
            if (folder / "run.json").exists() and not (folder / "inbox").exists():
                if kind == "litter":
                    litter(folder / "inbox")
                elif kind == "file":
                    (folder / "inbox").write_text("no folder")
                elif kind == "link":
                    (folder / "inbox").symlink_to(tmp_path)

        execute(prepare("gaussian", PROMPT, out=tmp_path / kind, **SEARCH), disk=QUICK, callback=lay)
        expand(folder, LATER, children=1)
        commands(folder)
        work(folder)
        assert derived(folder) == derived(tmp_path / "plain" / "run-0001"), kind
    assert all(one.state == "failed" for one in commands(tmp_path / "litter" / "run-0001"))


def test_a_command_names_only_runs_beside_its_inbox(run, tmp_path):
    other = Path(shutil.copytree(run, tmp_path / "other"))
    (run / "inbox").mkdir()
    for number, name in enumerate(["../other", "..", "other", str(other)]):
        (run / "inbox" / f"{number:020d}-0000000a.json").write_text(json.dumps({"format": 1, "do": "expand", "run": name, "node": SAMPLE}))
    assert work(run) == 0
    assert drivers(other) == drivers(run) == []


def test_where_the_outcome_cannot_be_read_nothing_is_done_again(run):
    number = ask_expand(run, SAMPLE)
    (run / "inbox" / f"{number}.told.json").write_text("{")
    assert work(run) == 0
    assert states(run) == ["failed"]
    assert drivers(run) == []


# Cheap --------------------------------------------------------------------------------------------------------------


def test_looking_costs_one_look_at_the_folder_now_and_then(tmp_path, monkeypatch):
    looks: list[str] = []
    now = [1000.0]
    box = Inbox(tmp_path, clock=lambda: now[0])
    lstat, listdir = os.lstat, os.listdir
    monkeypatch.setattr(os, "lstat", lambda path: (looks.append("look"), lstat(path))[1])
    monkeypatch.setattr(os, "listdir", lambda path: (looks.append("list"), listdir(path))[1])
    for _ in range(100):
        now[0] += 0.01
        box.look()
    assert looks.count("look") <= 5
    assert "list" not in looks
    tell(tmp_path / "inbox", "0" * 20 + "-0000000a", "done", "", QUICK)
    for _ in range(40):
        now[0] += 0.25
        box.look()
    assert looks.count("list") <= 10, "a folder that has not changed is not read again"
    assert read_commands(tmp_path / "inbox") == []
