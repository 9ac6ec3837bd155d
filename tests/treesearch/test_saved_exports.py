"""Saved runs as pages, tables and graphs, whatever text is in them."""

from __future__ import annotations

import csv
import io
import shutil
import sys
from html.parser import HTMLParser
from types import SimpleNamespace

import networkx as nx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from saved_searches import POLICIES, finished_beam, search

from tsdiff.treesearch import runfolder
from tsdiff.treesearch.errors import SetupError
from tsdiff.treesearch.exports import csv_text, graph, write_csv, write_graphml, write_json
from tsdiff.treesearch.saved import load_run
from tsdiff.treesearch.savedtree import SavedTree


@pytest.fixture(scope="module", params=POLICIES)
def result(request, tmp_path_factory):
    (found,) = search(tmp_path_factory.mktemp("saved"), request.param)
    return found


@pytest.fixture(scope="module")
def beam(tmp_path_factory):
    return finished_beam(tmp_path_factory.mktemp("beam"))


# Hostile text --------------------------------------------------------------------------------------------------------

HOSTILE = ["<script>alert(1)</script>", '"><img src=x onerror=alert(1)>', "=HYPERLINK(\"http://x\")", "@SUM(1)", "+1", "-1+1", "\tx", "\0\x1b[31m\x07", "a\nb,c;\"d\"", "ünï日本\u202e", "\ud800", "&lt;", "$text:zz", "]]>"]  # fmt: skip


def hostile_run(beam, folder, text):
    """A run in which everything that can be text is this text."""
    shutil.copytree(beam.path, folder)

    def tree(data):
        data.update(prompt=text, verifier=text)
        data["nodes"][0].update(reason=text, note={text: [text]}, values={text: {"score": 1.0, "parts": {text: 2.0}, "reason": text}})
        data["nodes"][0]["move"].update(solver=text, kind=text)

    def run(data):
        data.update(prompt=text, error=text)
        data["options"].update(model=text)
        data["options"]["policy"].update(name=text)
        data["result"].update(verifier=text, truncated=text)

    for name, change in (("tree.json", tree), ("run.json", run)):
        data = runfolder.read_json(folder / name)
        change(data)
        runfolder.write_json(folder / name, data)
    return load_run(folder)


class Page(HTMLParser):
    def __init__(self):
        super().__init__()
        self.tags, self.attributes, self.text = set(), [], ""

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        self.attributes += attributes

    def handle_data(self, data):
        self.text += data


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_text_stays_text(beam, tmp_path, text):
    run = hostile_run(beam, tmp_path / "run", text)
    assert run.damage == ()
    assert (run.prompt, run.nodes[0].note, run.nodes[0].values[text].parts) == (text, {text: [text]}, {text: 2.0})
    shown = Page()
    shown.feed(run._repr_html_().encode("utf-8", "surrogatepass").decode("utf-8", "replace"))
    assert shown.tags <= {"div", "p", "b", "figure", "img", "figcaption", "table", "caption", "tr", "th", "td"}
    assert {name for name, _ in shown.attributes} <= {"style", "src", "alt"}
    assert all(value.startswith("data:image/png;base64,") for name, value in shown.attributes if name == "src")
    assert repr(run).isprintable()

    write_graphml(run, tmp_path / "tree.graphml")
    known = graph(run.tree)
    read = nx.read_graphml(tmp_path / "tree.graphml", node_type=int)
    assert dict(read.nodes(data=True)) == dict(known.nodes(data=True))
    assert list(read.edges(data=True)) == list(known.edges(data=True))

    write_csv(run, tmp_path / "tree.csv")
    rows = list(csv.reader(io.StringIO((tmp_path / "tree.csv").read_text(encoding="utf-8"), newline="")))
    assert len(rows) == len(run.nodes) + 1
    assert len({len(row) for row in rows}) == 1
    for cell in (cell for row in rows for cell in row):
        assert not cell.strip(" \t\r\n").startswith(("=", "+", "@")), cell
        assert not cell.startswith("-") or float(cell) < 0, cell

    write_json(run, tmp_path / "run.json")
    again = runfolder.read_json(tmp_path / "run.json")
    assert again["prompt"] == text
    assert SavedTree.from_json(again["tree"]).to_json() == run.tree.to_json()


@given(rows=st.lists(st.lists(st.text(st.characters(exclude_characters="\0"), max_size=8), min_size=2, max_size=2), max_size=4))
def test_tables_hold_any_text_and_no_formula(rows):
    read = list(csv.reader(io.StringIO(csv_text(["a", "b"], rows).decode(), newline="")))
    for row, back in zip([["a", "b"], *rows], read, strict=True):
        for cell, shown in zip(row, back, strict=True):
            text = cell.encode("utf-8", "backslashreplace").decode()
            assert shown in (text, f"'{text}")
            assert shown.lstrip()[:1] not in ("=", "+", "-", "@")


# Tables and graphs ---------------------------------------------------------------------------------------------------


def test_a_graph_in_one_call(result, tmp_path):
    run = load_run(result.path)
    found = run.to_networkx()
    assert nx.is_forest(found.to_undirected())
    assert list(found.nodes) == [node.index for node in run.nodes]
    assert {(a, b) for a, b in found.edges} == {(node.parent.index, node.index) for node in run.nodes if node.parent is not None}
    assert [n for n, best in found.nodes(data="best") if best] == [run.best.index]
    assert sorted(n for n, on in found.nodes(data="on_best_path") if on) == sorted(node.index for node in run.path_to(run.best))
    assert all(type(value) in (int, float, str, bool) for _, facts in found.nodes(data=True) for value in facts.values())
    for node in run.nodes:
        assert found.nodes[node.index].get("score") == node.score(run.verifier)
        assert found.nodes[node.index]["path_nfe"] == sum(one.nfe for one in node.path())
    nx.write_graphml_xml(found, tmp_path / "networkx.graphml")
    write_graphml(run, tmp_path / "ours.graphml")
    for name in ("networkx", "ours"):
        read = nx.read_graphml(tmp_path / f"{name}.graphml", node_type=int)
        assert dict(read.nodes(data=True)) == dict(found.nodes(data=True))
        assert set(read.edges) == set(found.edges)
        assert {name: read.graph[name] for name in found.graph} == found.graph


def test_a_frame_in_one_call_where_pandas_is_there(beam, monkeypatch):
    run = load_run(beam.path)
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(SetupError, match="to_pandas needs pandas, which is not installed; run: pip install pandas"):
        run.to_pandas()
    monkeypatch.setitem(sys.modules, "pandas", SimpleNamespace(DataFrame=lambda rows, columns: [dict(zip(columns, row, strict=True)) for row in rows]))
    frame = run.to_pandas()
    assert [row["index"] for row in frame] == list(range(len(run.nodes)))
    assert [row["parent"] for row in frame] == [None if node.parent is None else node.parent.index for node in run.nodes]
    assert [row["score"] for row in frame] == [node.score(run.verifier) for node in run.nodes]
    parts = {f"value {key}/{part}" for node in run.nodes for key, value in node.values.items() for part in value.parts or ()}
    assert parts
    assert parts <= set(frame[0])
