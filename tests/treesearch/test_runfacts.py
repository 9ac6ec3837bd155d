"""Files of a run that somebody has edited: whatever they say, one line tells, and nothing is changed."""

from __future__ import annotations

import contextlib
import json
import shutil

import pytest
from faulty_disk import QuickDisk
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import tsdiff
from tsdiff.treesearch.errors import SetupError, UsageError
from tsdiff.treesearch.expansion import Asked, planned_expansion
from tsdiff.treesearch.lock import Lock
from tsdiff.treesearch.resume import planned
from tsdiff.treesearch.runfacts import drivers_of, no_run, result_of
from tsdiff.treesearch.saved import load_run
from tsdiff.treesearch.search import execute, prepare

PROMPT = "near (3, 2.4)"
OPTIONS = {"policy": "best-of-n", "policy_options": {"n": 2}, "steps": 3, "eta": 1.0, "deterministic": True, "max_batch": 4}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A run that is done and was expanded, and one that was stopped: what is in their `run.json`, and their folders."""
    out = tmp_path_factory.mktemp("runs")
    done = tsdiff.search("gaussian", PROMPT, out=out, **OPTIONS).path
    tsdiff.expand(done, children=1)
    stop = iter([False, False, True])
    with contextlib.suppress(KeyboardInterrupt):
        execute(prepare("gaussian", PROMPT, out=out, **OPTIONS), stop=lambda: next(stop), disk=QuickDisk())
    stopped = out / "run-0002"
    assert json.loads((stopped / "run.json").read_text())["status"] == "interrupted"
    return {path: json.loads((path / "run.json").read_text()) for path in (done, stopped)}


PLACES = [
    (), ("format",), ("status",), ("arguments",), ("arguments", "policy"), ("arguments", "policy_options"), ("arguments", "prompts"), ("arguments", "seed"),
    ("arguments", "steps"), ("arguments", "model"), ("arguments", "new"), ("options",), ("options", "policy"), ("options", "policy", "name"), ("options", "verifiers"),
    ("options", "environment"), ("options", "rows_per_call"), ("options", "typed"), ("result",), ("result", "node"), ("result", "score"), ("result", "verifier_calls"),
    ("result", "seconds"), ("drivers",), ("drivers", 0), ("drivers", 1), ("drivers", 1, "status"), ("drivers", 1, "number"), ("drivers", 1, "arguments"), ("fingerprint",),
    ("alone",), ("tree",), ("tree", "schedule"), ("prompt",), ("seed",), ("name",),
]  # fmt: skip
ANYTHING = st.sampled_from([None, True, 0, 1, -7, 1.5, 10**30, "", "done", "x", [], [1], [{}], {}, {"a": 1}, {"@object": "pipe"}, {"@condition": {"x": 1}}, {"@tensor": "t"}])


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=st.sampled_from(PLACES), value=ANYTHING, which=st.integers(0, 1))
def test_whatever_a_run_says_one_line_tells_and_nothing_is_changed(runs, place, value, which):
    folder, facts = list(runs.items())[which]
    facts = json.loads(json.dumps(facts))
    around, last = {"": facts}, ""
    for name in place:
        inner = around[last]
        if (isinstance(inner, list) and name >= len(inner)) or (isinstance(inner, dict) and isinstance(name, int)):
            return
        if isinstance(inner, dict):
            inner.setdefault(name, {})
        around, last = inner, name
    around[last] = value
    text = json.dumps(facts if place else value)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name not in ("lock", "run.json")}
    original = (folder / "run.json").read_bytes()
    (folder / "run.json").write_text(text)
    try:
        for tried in (planned(folder), planned_expansion(folder, Asked("best", children=1))):
            message = ""
            try:
                with tried:
                    pass
            except (UsageError, SetupError) as error:
                message = str(error)
            assert "\n" not in message
        with contextlib.suppress(UsageError):
            run = load_run(folder)
            assert json.dumps(run.to_json())
            assert repr(run)
            assert run._repr_html_()
        assert (folder / "run.json").read_text() == text
        assert {path: path.read_bytes() for path in before} == before
    finally:
        (folder / "run.json").write_bytes(original)


def test_what_is_as_it_was_written_is_taken(runs):
    (done, stopped) = runs
    assert result_of(runs[done])["node"] == load_run(done).best.index
    assert [driver["status"] for driver in drivers_of(runs[done], done)] == ["done", "done"]
    assert result_of(runs[stopped]) == {}
    assert drivers_of(runs[stopped], stopped) == []
    with planned(stopped) as (plan, into):
        assert (plan.policy.name, into) == ("best-of-n", stopped)


def test_a_run_that_says_it_is_done_and_not_what_came_of_it_is_not_touched(runs, tmp_path):
    """Continuing it would end without images, and growing it would rely on what is not there."""
    stopped = list(runs)[1]
    folder = shutil.copytree(stopped, tmp_path / "run")
    (folder / "run.json").write_text(json.dumps(runs[stopped] | {"status": "done"}))
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    for attempt in (tsdiff.resume, tsdiff.expand):
        with pytest.raises(UsageError, match=r"says that the run is done, but its result or its model's fingerprint is missing"):
            attempt(folder)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != "lock"} == {path: data for path, data in before.items() if path.name != "lock"}
    assert "run.json: its result is missing or makes no sense" in load_run(folder).damage


def test_options_that_nobody_knows_are_named(runs, tmp_path):
    stopped = list(runs)[1]
    with pytest.raises(UsageError, match=r"unknown option 'max_bach'; did you mean 'max_batch'"):
        tsdiff.resume(stopped, max_bach=4)
    folder = shutil.copytree(stopped, tmp_path / "run")
    (folder / "run.json").write_text(json.dumps(runs[stopped] | {"arguments": {**runs[stopped]["arguments"], "wings": 2}}))
    with pytest.raises(UsageError, match=r"was searched with 'wings', which this tsdiff does not know"):
        tsdiff.resume(folder)


def test_a_wrong_folder_is_told_for_what_it_is(runs, tmp_path):
    parent = next(iter(runs)).parent
    assert str(no_run(parent, "run.json")).endswith(f"holds some: name one of them, such as {str(parent / 'run-0001')!r} (2 in all)")
    (tmp_path / "empty").mkdir()
    with Lock(tmp_path / "empty/lock"):
        assert "it holds nothing" in str(no_run(tmp_path / "empty", "run.json"))
    (tmp_path / "empty/picture.png").touch()
    assert str(no_run(tmp_path / "empty", "run.json")).endswith("it has no run.json")
    with pytest.raises(UsageError, match="'nowhere' is not the folder of a run"):
        tsdiff.resume("nowhere")
