"""`tsdiff list runs`: what is there, in whatever state."""

from __future__ import annotations

import json

import pytest

import tsdiff as package
from tsdiff.treesearch.saved import load_run


@pytest.fixture
def runs(tsdiff, tmp_path):
    """Four runs of two prompts and two seeds, and a killed one."""
    package.search("gaussian", ["near (3, 2.4)", "near (0, 0)"], policy="best-of-n", policy_options={"n": 2}, steps=3, seed=[0, 1], out=tmp_path / "runs")
    package.search("gaussian", "near (3, 2.4)", policy="beam", policy_options={"width": 1, "branch": 2}, steps=4, out=tmp_path / "runs")
    folder = tmp_path / "runs/run-0002"
    facts = json.loads((folder / "run.json").read_text())
    facts.pop("result")
    (folder / "run.json").write_text(json.dumps(facts | {"status": "running"}))
    for name in ("tree.json", "baseline.json"):
        (folder / name).unlink()
    journal = folder / "journal.jsonl"
    journal.write_bytes(journal.read_bytes()[:-30])
    return tmp_path / "runs"


def test_every_run_has_a_line(tsdiff, runs):
    result = tsdiff("list", "runs")
    assert (result.exit_code, result.stderr) == (0, "")
    title, *lines = result.stdout.splitlines()
    assert title.split() == ["run", "status", "prompt", "policy", "score", "baseline", "NFE", "size", "damage"]
    assert [line.split()[0] for line in lines] == [f"runs/run-0001/{i:04d}-{slug}-seed{seed}" for i, slug in ((0, "near-3-2-4"), (1, "near-0-0")) for seed in (0, 1)] + ["runs/run-0002"]
    assert all("  done  " in line for line in lines[:4])
    assert "  killed  " in lines[4]
    assert "was never finished" in lines[4]
    killed = load_run(runs / "run-0002")
    assert f"{killed.score:.4g}" in lines[4]


def test_the_same_as_json(tsdiff, runs):
    found = json.loads(tsdiff("list", "runs", runs, "--json").stdout)
    assert len(found) == 5
    for row in found:
        run = load_run(row["run"])
        assert {name: row[name] for name in run.summary()} == run.summary()
        assert row["bytes"] == run.size == sum(path.stat().st_size for path in run.path.rglob("*") if path.is_file())
        assert row["damage"] == list(run.damage)


def test_one_that_cannot_be_read_is_listed_with_the_others(tsdiff, runs):
    for path in (runs / "run-0002").iterdir():
        if path.is_file():
            path.write_bytes(b"{")
    result = tsdiff("list", "runs")
    assert result.exit_code == 0
    line = result.stdout.splitlines()[-1]
    assert "unreadable" in line
    assert "nothing of the run" in line


def test_hostile_prompts_stay_in_their_line(tsdiff, runs):
    path = runs / "run-0002" / "run.json"
    facts = json.loads(path.read_text()) | {"prompt": "\x1b[2Jx\r\n[bold]y[/bold] :smile:\u202e"}
    path.write_text(json.dumps(facts))
    result = tsdiff("list", "runs")
    assert len(result.stdout.splitlines()) == 6
    assert "[2Jx [bold]y[/bold] :smile:" in result.stdout
    assert "\x1b" not in result.stdout


def test_where_there_are_no_runs(tsdiff, tmp_path):
    (tmp_path / "empty").mkdir()
    result = tsdiff("list", "runs", "empty")
    assert (result.exit_code, result.stdout, result.stderr) == (0, "", "there are no runs in empty; `tsdiff search` makes some\n")
    assert json.loads(tsdiff("list", "runs", "empty", "--json").stdout) == []


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        (("runs",), "there is no folder 'runs'"),
        (("runs", "away"), "there is no folder 'away'"),
        (("policies", "away"), "only runs are in a folder; leave 'away' out"),
        (("run",), "'run' is not one of"),
        (("runs", ".", "extra"), "unexpected extra argument"),
    ],
)
def test_mistakes_are_one_line(tsdiff, arguments, hint):
    result = tsdiff("list", *arguments)
    assert (result.exit_code, result.stdout) == (2, ""), result.output
    (line,) = result.stderr.splitlines()
    assert hint in line
