"""Steering from the page: what it sends reaches runs, whoever writes them, and what comes of it reaches the page."""

from __future__ import annotations

import json
import os
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from expansions import PROMPT, QUICK, begin, derived, expand
from people import Taste, answering, quick, worth  # noqa: F401 - a fixture
from viewer_server import Viewer, view

from tsdiff.cli.steering import RunSteering
from tsdiff.treesearch.durable import status
from tsdiff.treesearch.errands import carry_out_waiting
from tsdiff.treesearch.inbox import ask_expand
from tsdiff.treesearch.lock import Lock
from tsdiff.treesearch.resume import planned
from tsdiff.treesearch.search import execute, prepare
from tsdiff.viewer.folders import Folders

PATIENCE = 120.0
SAMPLE = 2
SEARCH = {"deterministic": True, "steps": 4, "max_batch": 4}


@contextmanager
def steered(root: Path, **options) -> Iterator[Viewer]:
    """A viewer of a folder that can steer its runs."""
    folders = Folders(root)
    folders.patience = 0.0
    steering = RunSteering(lambda: folders.all().values(), **options)
    try:
        yield view(root, steering)
    finally:
        steering.close()


def until(what: Callable[[], bool]) -> None:
    """Wait for something."""
    deadline = time.monotonic() + PATIENCE
    while not what():
        assert time.monotonic() < deadline, "it did not come"
        time.sleep(0.02)


def states(viewer: Viewer, run: str) -> list[tuple[str, str]]:
    return [(one["do"], one["state"]) for one in viewer.get(f"/api/runs/{run}/commands")["commands"]]


def tree(folder: Path) -> dict:
    return json.loads((folder / "tree.json").read_text())


@pytest.fixture(scope="module")
def searched(tmp_path_factory) -> Path:
    """A run that is done; do not write there."""
    return begin(tmp_path_factory.mktemp("searched"), steps=4)


@pytest.fixture
def run(searched, tmp_path) -> Path:
    """A copy of it, in a folder that is viewed."""
    return Path(shutil.copytree(searched, tmp_path / "runs" / "run-0001"))


# Rating -------------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(
    "how",
    [
        {"policy": "best-of-n", "policy_options": {"n": 3}},
        {"policy": "beam", "policy_options": {"width": 2, "branch": 2}},
        {"policy": "mcts", "policy_options": {"simulations": 3}, "eta": 1.0},
    ],
    ids=["best-of-n", "beam", "mcts"],
)
def test_a_search_that_the_page_rates_is_that_of_the_same_scores(tmp_path, how):
    execute(prepare("gaussian", PROMPT, out=tmp_path / "scripted", verifiers=[Taste()], **SEARCH, **how), disk=QUICK)
    (tmp_path / "rated").mkdir()
    with steered(tmp_path / "rated") as viewer:

        def through_the_page(question, score) -> None:
            (shown,) = [one for one in viewer.get("/api/questions")["questions"] if one["node_id"] == question.node_id and one["id"].endswith(question.id)]
            assert (shown["run"], shown["node"], shown["verifier"], shown["low"], shown["high"], shown["prompt"]) == ("run-0001", question.node, "human", 0.0, 10.0, PROMPT)
            assert viewer.client.get(shown["image"]).content == question.picture.read_bytes()
            viewer.post("/api/answers", {"question": shown["id"], "score": score})

        with answering(tmp_path / "rated", answer=through_the_page):
            execute(prepare("gaussian", PROMPT, out=tmp_path / "rated", verifiers=["human:where=page"], **SEARCH, **how), disk=QUICK)
        assert viewer.get("/api/questions") == {"questions": []}
    assert tree(tmp_path / "rated" / "run-0001") == tree(tmp_path / "scripted" / "run-0001")


def test_answers_that_are_none_are_refused(run):
    with steered(run.parent) as viewer:
        (run / "inbox" / "questions").mkdir(parents=True)
        question = {"format": 1, "node": 2, "node_id": "a" * 32, "verifier": "human", "at": "", "prompt": "x", "low": 0, "high": 1}
        (run / "inbox" / "questions" / f"{'b' * 32}.json").write_text(json.dumps(question))
        (shown,) = viewer.get("/api/questions")["questions"]
        assert shown["image"] == "/api/runs/run-0001/image/2", "without a picture of its own it has the node's"
        for wrong in (1.5, -1):
            assert "from 0 to 1" in viewer.post("/api/answers", {"question": shown["id"], "score": wrong}, status=400)["error"]
        for strange in ("c" * 32, shown["id"][1:], shown["id"].replace("-", "_")):
            assert "not open" in viewer.post("/api/answers", {"question": strange, "score": 1}, status=400)["error"]
        viewer.post("/api/answers", {"question": shown["id"], "score": None})
        assert viewer.get("/api/questions")["questions"] == []
        assert "not open" in viewer.post("/api/answers", {"question": shown["id"], "score": 1}, status=400)["error"]


# Expanding ----------------------------------------------------------------------------------------------------------


def test_an_expansion_is_carried_out_by_a_process_of_its_own(run, tmp_path):
    plain = Path(shutil.copytree(run, tmp_path / "plain"))
    expand(plain, SAMPLE, children=3, renoise=0.5)
    with steered(run.parent) as viewer:
        first = viewer.get("/api/runs/run-0001/tree")
        command = viewer.post("/api/runs/run-0001/expand", {"node": SAMPLE, "children": 3, "renoise": 0.5})["command"]
        assert states(viewer, "run-0001") == [("expand", "waiting")]
        refused = viewer.post("/api/runs/run-0001/expand", {"node": SAMPLE, "children": 1, "to_level": 99})["command"]
        until(lambda: all(state in ("done", "failed") for _, state in states(viewer, "run-0001")))
        told = {one["id"]: one for one in viewer.get("/api/runs/run-0001/commands")["commands"]}
        assert told[command]["state"] == "done", told
        assert (told[refused]["state"], "to_level is 99" in told[refused]["message"]) == ("failed", True)
        new = viewer.get(f"/api/runs/run-0001/tree?since={first['token']}")
        assert [node["g"] for node in new["nodes"] if node["i"] >= len(first["nodes"])] == [1] * (len(tree(run)["nodes"]) - len(first["nodes"]))
        assert viewer.get("/api/runs/run-0001")["status"] == "done"
    assert derived(run) == derived(plain)


def test_what_somebody_else_has_laid_there_starts_nothing(run):
    ask_expand(run, SAMPLE, children=1)
    with steered(run.parent, program=(sys.executable, "-c", "raise SystemExit('started')")) as viewer:
        assert states(viewer, "run-0001") == [("expand", "waiting")]
        viewer.get("/api/questions")
        assert not [thread for thread in threading.enumerate() if thread.name == "steering"]


@pytest.mark.parametrize(("program", "why"), [("raise SystemExit('the weights are gone')", "the weights are gone"), ("import os; os.kill(os.getpid(), 9)", "ended with status -9"), ("pass", "no process could be started")])
def test_a_process_that_does_not_take_it_is_told(run, program, why):
    with steered(run.parent, program=(sys.executable, "-S", "-c", program)) as viewer:
        viewer.post("/api/runs/run-0001/expand", {"node": SAMPLE, "children": 1})
        until(lambda: states(viewer, "run-0001") == [("expand", "failed")])
        (told,) = viewer.get("/api/runs/run-0001/commands")["commands"]
        assert why in told["message"]


def test_while_somebody_else_writes_it_waits(run):
    with steered(run.parent) as viewer, Lock(run / "lock"):
        viewer.post("/api/runs/run-0001/expand", {"node": SAMPLE, "children": 1})
        time.sleep(1.0)
        assert states(viewer, "run-0001") == [("expand", "waiting")]
    assert "command" not in json.dumps(json.loads((run / "run.json").read_text()).get("drivers", []))


def test_closing_the_viewer_is_a_first_ctrl_c_for_what_it_has_started(run, tmp_path):
    told = tmp_path / "told"
    program = f"import signal, time, pathlib; told = pathlib.Path({str(told)!r}); signal.signal(signal.SIGINT, lambda *_: (told.write_text('stopped'), exit(130))); told.write_text('begun'); time.sleep({PATIENCE})"
    with steered(run.parent, program=(sys.executable, "-S", "-c", program)) as viewer:
        viewer.post("/api/runs/run-0001/expand", {"node": SAMPLE, "children": 1})
        until(lambda: told.exists() and told.read_text() == "begun")
    assert told.read_text() == "stopped"


# Stopping -----------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("quick")
def test_a_search_that_the_page_stops_goes_on_to_the_same_bytes_and_then_does_what_waits(tmp_path):
    how = {"policy": "best-of-n", "policy_options": {"n": 4}, **SEARCH}
    execute(prepare("gaussian", PROMPT, out=tmp_path / "whole", **how), disk=QUICK)
    expand(tmp_path / "whole" / "run-0001", 4, children=2)
    (tmp_path / "runs").mkdir()
    folder = tmp_path / "runs" / "run-0001"
    with steered(tmp_path / "runs", program=(sys.executable, "-c", "raise SystemExit('started')")) as viewer:
        sent: list[str] = []

        def callback(progress) -> None:
            if not sent:
                sent.append(viewer.post("/api/runs/run-0001/stop", {})["command"])

        with pytest.raises(KeyboardInterrupt):
            execute(prepare("gaussian", PROMPT, out=tmp_path / "runs", **how), disk=QUICK, callback=callback)
        assert status(folder) == "interrupted"
        assert states(viewer, "run-0001") == [("stop", "done")]
        ask_expand(folder, 4, children=2)
        (told,) = viewer.get("/api/runs/run-0001/commands")["commands"][1:]
        assert (told["state"], "tsdiff resume" in told["message"]) == ("waiting", True)
        assert "nobody grows" in viewer.post("/api/runs/run-0001/stop", {}, status=400)["error"]
        with planned(folder, disk=QUICK) as (plan, into):
            execute(plan, into=into, disk=QUICK)
        assert carry_out_waiting(folder, disk=QUICK) == 1
        assert states(viewer, "run-0001") == [("stop", "done"), ("expand", "done")]
    assert derived(folder) == derived(tmp_path / "whole" / "run-0001")


# The command line ---------------------------------------------------------------------------------------------------


def test_the_search_command_does_what_was_asked_meanwhile(tmp_path, monkeypatch, capfd):
    from click.testing import CliRunner

    from tsdiff.cli import errands
    from tsdiff.cli.app import State, cli

    monkeypatch.chdir(tmp_path)
    before = errands.do_what_waits

    def asked_meanwhile(folder: Path, **how) -> None:
        ask_expand(folder, SAMPLE, children=1)
        before(folder, **how)

    monkeypatch.setattr("tsdiff.cli.search.do_what_waits", asked_meanwhile)
    outcome = CliRunner().invoke(cli, ["search", "--policy", "best-of-n", "-P", "n=2", "--steps", "3", "--json"])
    assert outcome.exit_code == 0, outcome.output
    assert "as it was asked for, expanding runs/run-0001 from node 2" in outcome.stderr
    assert len(outcome.stdout.splitlines()) == 1, "results of the search alone"
    facts = json.loads((tmp_path / "runs" / "run-0001" / "run.json").read_text())
    assert [driver["number"] for driver in facts["drivers"]] == [0, 1]
    before(tmp_path / "runs" / "run-0001", quiet=False, state=State())
    assert os.listdir(tmp_path / "runs" / "run-0001" / "inbox") != []
