"""`tsdiff export`: one format a suffix, and nothing is overwritten by accident."""

from __future__ import annotations

import csv
import json

import networkx as nx
import pytest

import tsdiff as package
from tsdiff.cli.export import FORMATS
from tsdiff.treesearch.saved import load_run
from tsdiff.treesearch.savedtree import SavedTree


@pytest.fixture
def run(tsdiff, tmp_path):
    package.search("gaussian", "near (3, 2.4)", policy="beam", policy_options={"width": 1, "branch": 2}, steps=4, out=tmp_path)
    return load_run(tmp_path / "run-0001")


def test_every_format_says_what_the_run_says(tsdiff, run, tmp_path):
    for suffix in FORMATS:
        result = tsdiff("export", "run-0001", f"tree{suffix.upper()}")
        assert (result.exit_code, result.stdout) == (0, f"tree{suffix.upper()}\n"), result.output
        assert result.stderr == f"{len(run.nodes)} nodes of run-0001 (done)\n"
    read = nx.read_graphml(tmp_path / "tree.GRAPHML", node_type=int)
    assert dict(read.nodes(data=True)) == dict(run.to_networkx().nodes(data=True))
    with (tmp_path / "tree.CSV").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["index"]) for row in rows] == [node.index for node in run.nodes]
    assert [row["score"] for row in rows] == ["" if node.score(run.verifier) is None else repr(node.score(run.verifier)) for node in run.nodes]
    data = json.loads((tmp_path / "tree.JSON").read_text(encoding="utf-8"))
    assert SavedTree.from_json(data["tree"]).to_json() == run.tree.to_json()
    assert (data["score"], data["best"], data["status"]) == (run.score, run.best.index, "done")


def test_nothing_is_replaced_without_being_told_to(tsdiff, run, tmp_path):
    (tmp_path / "t.csv").write_text("mine")
    refused = tsdiff("export", "run-0001", "t.csv")
    assert (refused.exit_code, refused.stdout) == (2, "")
    assert refused.stderr == "error: 't.csv' is there already; choose another name, or replace it with --force\n"
    assert (tmp_path / "t.csv").read_text() == "mine"
    done = tsdiff("export", "run-0001", "t.csv", "--force", "--json")
    assert json.loads(done.stdout) == {"run": "run-0001", "out": "t.csv", "nodes": len(run.nodes), "damage": []}
    assert (tmp_path / "t.csv").read_text().startswith("index,parent,")
    assert tsdiff("export", "run-0001", "run-0001/mine.csv").exit_code == 0


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        (("nowhere", "t.csv"), "'nowhere' is not the folder of a run"),
        (("run-0001", "t.xlsx"), "'t.xlsx' ends in .xlsx, which says no format; known are .csv, .graphml, .json"),
        (("run-0001", "t"), "'t' ends in no suffix, which says no format; known are"),
        (("run-0001", "folder.csv"), "'folder.csv' is a folder; name a file in it"),
        (("run-0001", "away/t.csv"), "there is no folder 'away' to write 't.csv' into"),
        (("run-0001", "run-0001/tree.json", "--force"), "'run-0001/tree.json' is a part of a run, which nothing replaces"),
        (("run-0001", "run-0001/summary.csv", "--force"), "is a part of a run"),
        (("run-0001", "run-0001/run.json"), "is there already"),
        ((".", "t.json"), None),
        (("empty", "t.json"), "'empty' is not the folder of a run, and holds none"),
        (("run-0001",), "Missing argument 'OUT'"),
    ],
)
def test_mistakes_are_one_line_and_write_nothing(tsdiff, run, tmp_path, arguments, hint):
    (tmp_path / "folder.csv").mkdir()
    (tmp_path / "empty").mkdir()
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    result = tsdiff("export", *arguments)
    if hint is None:  # the only run in a folder is meant by it
        assert result.exit_code == 0
        return
    assert (result.exit_code, result.stdout) == (2, ""), result.output
    (line,) = result.stderr.splitlines()
    assert hint in line
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_help_names_every_format(tsdiff):
    text = tsdiff("export", "--help").stdout
    assert all(suffix in text and what in text for suffix, (_, what) in FORMATS.items())
