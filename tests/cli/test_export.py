"""`tsdiff export`: one format a suffix, and nothing is overwritten by accident."""

from __future__ import annotations

import csv
import json

import networkx as nx
import pytest
from PIL import Image

import tsdiff as package
from tsdiff.cli.export import FORMATS, format_of
from tsdiff.treesearch.errors import UsageError
from tsdiff.treesearch.saved import load_run
from tsdiff.treesearch.savedtree import SavedTree


@pytest.fixture
def run(tsdiff, tmp_path):
    package.search("gaussian", "near (3, 2.4)", policy="beam", policy_options={"width": 1, "branch": 2}, steps=4, out=tmp_path)
    return load_run(tmp_path / "run-0001")


def test_every_format_is_written_and_says_what_the_run_says(tsdiff, run, tmp_path):
    for suffix in FORMATS:
        out = f"tree{suffix.upper()}"
        result = tsdiff("export", "run-0001", out)
        assert (result.exit_code, result.stdout) == (0, f"{out.rstrip('/')}\n"), result.output
        assert result.stderr.startswith(f"{len(run.nodes)} nodes of run-0001 (done)\n")
    read = nx.read_graphml(tmp_path / "tree.GRAPHML", node_type=int)
    assert dict(read.nodes(data=True)) == dict(run.to_networkx().nodes(data=True))
    with (tmp_path / "tree.CSV").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["index"]) for row in rows] == [node.index for node in run.nodes]
    assert [row["score"] for row in rows] == ["" if node.score(run.verifier) is None else repr(node.score(run.verifier)) for node in run.nodes]
    data = json.loads((tmp_path / "tree.JSON").read_text(encoding="utf-8"))
    assert SavedTree.from_json(data["tree"]).to_json() == run.tree.to_json()
    assert (data["score"], data["best"], data["status"]) == (run.score, run.best.index, "done")
    for suffix, kind in ((".PNG", "PNG"), (".SHEET.PNG", "PNG"), (".GIF", "GIF"), (".WEBP", "WEBP")):
        with Image.open(tmp_path / f"tree{suffix}") as picture:
            assert picture.format == kind


def test_the_longest_suffix_counts_and_a_name_without_one_is_a_folder():
    assert [format_of(name) for name in ("a.png", "a.sheet.png", "A.Sheet.PNG", "a/b.svg", "a.b/", "a", "a.v2/b")] == [".png", ".sheet.png", ".sheet.png", ".svg", "/", "/", "/"]
    assert format_of(".sheet.png") == ".png"  # of a name that is nothing else, the last suffix
    for name in ("a.xlsx", "a.sheet", ".svg", ""):
        with pytest.raises(UsageError, match="says no format"):
            format_of(name)


def test_a_folder_is_written_into_only_where_nothing_is(tsdiff, run, tmp_path):
    (tmp_path / "mine").mkdir()
    assert tsdiff("export", "run-0001", "mine").exit_code == 0  # empty
    again = tsdiff("export", "run-0001", "mine/")
    assert (again.exit_code, again.stderr) == (2, "error: 'mine' is there already and is not empty; choose another name, or write into it with --force\n")
    (tmp_path / "mine" / "own.txt").write_text("mine")
    assert tsdiff("export", "run-0001", "mine", "--force").exit_code == 0
    assert (tmp_path / "mine" / "own.txt").read_text() == "mine"


def test_nothing_is_replaced_without_being_told_to(tsdiff, run, tmp_path):
    (tmp_path / "t.csv").write_text("mine")
    refused = tsdiff("export", "run-0001", "t.csv")
    assert (refused.exit_code, refused.stdout) == (2, "")
    assert refused.stderr == "error: 't.csv' is there already; choose another name, or replace it with --force\n"
    assert (tmp_path / "t.csv").read_text() == "mine"
    done = tsdiff("export", "run-0001", "t.csv", "--force", "--json")
    assert json.loads(done.stdout) == {"run": "run-0001", "out": "t.csv", "nodes": len(run.nodes), "notices": [], "damage": []}
    assert (tmp_path / "t.csv").read_text().startswith("index,parent,")
    assert tsdiff("export", "run-0001", "run-0001/mine.csv").exit_code == 0


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        (("nowhere", "t.csv"), "'nowhere' is not the folder of a run"),
        (("run-0001", "t.xlsx"), "'t.xlsx' ends in .xlsx, which says no format; known are .csv, .graphml, "),
        (("run-0001", "file"), "'file' is a file, not a folder to write into"),
        (("run-0001", "run-0001", "--force"), "'run-0001' is the folder of a run, which nothing is written into"),
        (("run-0001", "away/folder/"), "there is no folder 'away' to write 'folder' into"),
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
    (tmp_path / "file").write_text("mine")
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
