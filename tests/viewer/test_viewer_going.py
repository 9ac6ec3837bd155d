"""The viewer's server follows runs that go on: only what is new is told, and nobody waits."""

from __future__ import annotations

import json
import threading
import time

import pytest
from viewer_runs import STEPS, VERIFIER, Going, grown, node, write_run
from viewer_server import ask, serving, view

from tsdiff.viewer.folders import Folders
from tsdiff.viewer.library import Library


def test_only_what_is_new_or_has_changed_is_told(tmp_path):
    run = Going(tmp_path / "run")
    viewer = view(tmp_path)
    run.add(node(0, None, 0, kind="draw"), node(1, 0, 5), node(2, 0, 5))
    first = viewer.get("/api/runs/run/tree")
    assert [one["i"] for one in first["nodes"]] == [0, 1, 2]
    nothing = viewer.get(f"/api/runs/run/tree?since={first['token']}")
    assert (nothing["nodes"], nothing["restarted"], nothing["token"], nothing["status"]) == ([], False, first["token"], "running")
    run.add(node(3, 1, STEPS, score=2.0), values=[(1, 0.5)])
    grown_ = viewer.get(f"/api/runs/run/tree?since={first['token']}")
    assert [one["i"] for one in grown_["nodes"]] == [1, 3]
    assert [one["s"] for one in grown_["nodes"]] == [{VERIFIER: 0.5}, {VERIFIER: 2.0}]
    assert [one["n"] for one in grown_["nodes"]] == [3, 4]
    assert (grown_["best"], grown_["nfe"]) == (3, 4)
    run.add(node(4, 2, STEPS, score=1.0))
    assert [one["i"] for one in viewer.get(f"/api/runs/run/tree?since={grown_['token']}")["nodes"]] == [4]
    assert [one["i"] for one in viewer.get(f"/api/runs/run/tree?since={first['token']}")["nodes"]] == [1, 3, 4]
    assert viewer.get("/api/runs/run/curve")["points"] == [[4, 2.0, 3], [5, 2.0, 3]]
    run.close()
    assert viewer.get(f"/api/runs/run/tree?since={grown_['token']}")["status"] == "killed"


@pytest.mark.parametrize("token", ["x", "0.0", ".", "%00", "deadbeef.1", "9" * 5000])
def test_a_token_that_is_not_known_gives_everything(tmp_path, token):
    write_run(tmp_path / "run", grown(20))
    tree = view(tmp_path).get(f"/api/runs/run/tree?since={token}")
    assert (tree["restarted"], len(tree["nodes"])) == (True, 20)


def test_a_tree_that_grows_on_after_its_end_is_the_same_tree(tmp_path):
    """An expansion rewrites run.json and goes on in the journal: nothing is told twice."""
    nodes = [node(0, None, 0, kind="draw"), node(1, 0, STEPS, score=1.0)]
    run = Going(tmp_path / "run")
    run.add(*nodes)
    run.close()
    write_run(tmp_path / "run", nodes)
    viewer = view(tmp_path)
    first = viewer.get("/api/runs/run/tree")
    assert (first["status"], len(first["nodes"])) == ("done", 2)
    again = Going(tmp_path / "run")
    again.nfe = 2
    again.add(node(2, 1, 10, kind="renoise"))
    more = viewer.get(f"/api/runs/run/tree?since={first['token']}")
    assert (more["status"], more["restarted"], [one["i"] for one in more["nodes"]]) == ("running", False, [2])
    again.close()


def test_a_tree_that_lost_its_end_begins_again(tmp_path):
    run = Going(tmp_path / "run")
    run.add(node(0, None, 0, kind="draw"))
    place = (tmp_path / "run" / "journal.jsonl").read_bytes()
    run.add(node(1, 0, 5))
    viewer = view(tmp_path)
    first = viewer.get("/api/runs/run/tree")
    assert len(first["nodes"]) == 2
    run.close()
    (tmp_path / "run" / "journal.jsonl").write_bytes(place)  # a power cut, and another end
    run = Going(tmp_path / "run")
    run.add(node(1, 0, 7, salt=1))
    second = viewer.get(f"/api/runs/run/tree?since={first['token']}")
    assert (second["restarted"], [one["l"] for one in second["nodes"]]) == (True, [0, 7])
    run.close()


def test_nobody_waits_for_a_run_that_is_being_read(tmp_path):
    """While a thread reads one run, the others are answered."""
    write_run(tmp_path / "slow", grown(20))
    write_run(tmp_path / "quick", grown(20))
    library = Library(Folders(tmp_path))
    answers: list[int] = []
    with serving(library) as port:
        with library.run("slow").lock:
            waiting = threading.Thread(target=lambda: answers.append(ask(port, "/api/runs/slow/tree")[0]))
            waiting.start()
            assert ask(port, "/api/runs/quick/tree")[0] == 200
            assert answers == []
        waiting.join(10)
    assert answers == [200]


def test_many_readers_see_the_same_tree_while_it_grows(tmp_path):
    """Six readers follow a run that is written at the same time; each ends with exactly its tree."""
    run = Going(tmp_path / "run")
    nodes = grown(120)
    run.add(*nodes[:10])
    library = Library(Folders(tmp_path))
    done, wrong = threading.Event(), []

    def follow():
        known, token = {}, None
        while True:
            last = done.is_set()
            tree = json.loads(library.run("run").tree(token).plain)
            if tree["restarted"]:
                wrong.append("restarted")
            known |= {one["i"]: one for one in tree["nodes"]}
            token = tree["token"]
            if last:
                break
            time.sleep(0.002)
        if [known[i]["p"] for i in range(120)] != [one["parent"] for one in nodes]:
            wrong.append("another tree")

    threads = [threading.Thread(target=follow) for _ in range(6)]
    for thread in threads:
        thread.start()
    for start in range(10, 120, 5):
        run.add(*nodes[start : start + 5])
    done.set()
    for thread in threads:
        thread.join(20)
    run.close()
    assert wrong == []
