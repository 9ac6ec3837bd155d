"""Saved trees in the formats of other programs: a networkx graph, GraphML, CSV and one JSON file.

Each `write_FORMAT(run, path)` writes a whole file or none, and raises UsageError or SetupError if it cannot be written.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any
from xml.sax.saxutils import escape, quoteattr

from tsdiff.treesearch.runfolder import write_file
from tsdiff.treesearch.strictjson import encode

if TYPE_CHECKING:
    import networkx as nx

    from tsdiff.treesearch.saved import SavedRun
    from tsdiff.treesearch.savedtree import SavedNode, SavedTree

_NOT_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
_FORMULA = re.compile(r"[\s]*[=+\-@]|[\t\r\n]")
"""How text begins that a spreadsheet program takes for a formula, or may after it has dropped what it finds before."""


def graph(tree: SavedTree) -> nx.DiGraph[int]:
    """A tree as a networkx DiGraph: nodes by index, edges from parents to children.

    Attributes are what every graph format can hold: numbers, truth values, and text without control characters (which are
    written as in Python, `\\x00`). What a node has not, such as a score, it has no attribute for.
    """
    import networkx

    found: nx.DiGraph[int] = networkx.DiGraph(**_tree_facts(tree))
    for node, facts in _node_facts(tree):
        found.add_node(node.index, **facts)
        if node.parent is not None:
            found.add_edge(node.parent.index, node.index, kind=facts["kind"])
    return found


def _tree_facts(tree: SavedTree) -> dict[str, Any]:
    return _plain({"prompt": tree.prompt, "seed": str(tree.seed), "verifier": tree.verifier, "solver": tree.solver, "line": tree.line})


def _node_facts(tree: SavedTree) -> Iterator[tuple[SavedNode, dict[str, Any]]]:
    """The attributes of a graph's nodes."""
    best = tree.best
    answer = set() if best is None else {node.index for node in tree.path(best)}
    for node, cost in zip(tree.nodes, tree.path_costs(), strict=True):
        yield node, _plain(_facts(node, cost, tree.verifier) | {"best": best is node, "on_best_path": node.index in answer})


def table(tree: SavedTree) -> tuple[list[str], list[list[Any]]]:
    """A tree as a table: its columns, and a row for each node by index; None where a node has no such thing."""
    pairs = zip(tree.nodes, tree.path_costs(), strict=True)
    rows = [_facts(node, cost, tree.verifier) | {"parent": None if node.parent is None else node.parent.index} for node, cost in pairs]
    first = ["index", "parent", "level", "alpha", "sigma", "kind", "levels", "status", "draft", "nfe", "path_nfe", "score"]
    last = ["reason", "solver", "model", "scale", "source", "noise", "note", "id", "stream"]
    named = dict.fromkeys(first) | dict.fromkeys(sorted({name for row in rows for name in row} - {*first, *last})) | dict.fromkeys(last)
    return list(named), [[row.get(name) for name in named] for row in rows]


def _facts(node: SavedNode, cost: int, verifier: str) -> dict[str, Any]:
    """A node as flat, plain values; a value's parts are named "VERIFIER/PART"."""
    move, score = node.move, node.score(verifier)
    facts: dict[str, Any] = {
        "index": node.index,
        "id": f"{node.id:032x}",
        "stream": f"{node.stream:032x}",
        "level": node.level,
        "alpha": node.alpha,
        "sigma": node.sigma,
        "kind": move.kind,
        "levels": " ".join(map(str, move.levels)),
        "status": node.status,
        "reason": node.reason,
        "draft": node.draft,
        "nfe": node.nfe,
        "path_nfe": cost,
        "score": score,
        "solver": move.solver,
        "model": move.model,
        "scale": None if move.scale is None else float(move.scale),
        "source": move.source,
        "noise": None if move.noise is None else json.dumps(move.to_json()["noise"]),
        "note": encode(dict(node.note)).decode() if node.note else None,
    }
    for key, value in sorted(node.values.items()):
        facts[f"value {key}"] = value.score
        facts |= {f"value {key}/{name}": part for name, part in (value.parts or {}).items()}
    return facts


def _plain(facts: dict[str, Any]) -> dict[str, Any]:
    return {_printable(name): _printable(value) if isinstance(value, str) else value for name, value in facts.items() if value is not None}


def _printable(text: str) -> str:
    """Text that XML can hold."""
    return _NOT_XML.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


# Files ---------------------------------------------------------------------------------------------------------------


_TYPES = {bool: "boolean", int: "long", float: "double", str: "string"}


def write_graphml(run: SavedRun, path: Path) -> None:
    """The tree of the search as GraphML: `graph`, written a node at a time, since networkx would need much memory for it."""
    write_file(path, (text.encode() for text in _graphml(run.tree)))


def _graphml(tree: SavedTree) -> Iterator[str]:
    about = _tree_facts(tree)
    keys: dict[tuple[str, str, type], str] = {}
    for scope, facts in (("graph", about), *(("node", facts) for _, facts in _node_facts(tree)), ("edge", {"kind": ""})):
        for name, value in facts.items():
            keys.setdefault((scope, name, type(value)), f"k{len(keys)}")

    def data(scope: str, facts: dict[str, Any]) -> str:
        return "".join(f'<data key="{keys[scope, name, type(value)]}">{_xml(value)}</data>' for name, value in facts.items())

    yield '<?xml version="1.0" encoding="utf-8"?>\n<graphml xmlns="http://graphml.graphdrawing.org/xmlns">\n'
    for (scope, name, kind), key in keys.items():
        yield f'<key id="{key}" for="{scope}" attr.name={quoteattr(name)} attr.type="{_TYPES[kind]}"/>\n'
    yield f'<graph edgedefault="directed">{data("graph", about)}\n'
    for node, facts in _node_facts(tree):
        yield f'<node id="{node.index}">{data("node", facts)}</node>\n'
        if node.parent is not None:
            yield f'<edge source="{node.parent.index}" target="{node.index}">{data("edge", {"kind": facts["kind"]})}</edge>\n'
    yield "</graph>\n</graphml>\n"


def _xml(value: Any) -> str:
    return escape(value, {"\r": "&#13;"}) if isinstance(value, str) else str(value).lower() if isinstance(value, bool) else repr(value)


def write_csv(run: SavedRun, path: Path) -> None:
    """The nodes of the search as a table, a line each."""
    write_file(path, [csv_text(*table(run.tree))])


def write_json(run: SavedRun, path: Path) -> None:
    """The run with its trees as one strict JSON object."""
    write_file(path, [encode(run.to_json(), spread=True), b"\n"])


def csv_text(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> bytes:
    """A table as CSV (RFC 4180) in UTF-8 that no spreadsheet program takes for formulas: text that begins like one gets a `'` in front."""
    buffer = io.StringIO(newline="")
    writer = csv.writer(buffer)
    for row in (columns, *rows):
        writer.writerow([_harmless(cell) if isinstance(cell, str) else cell for cell in row])
    return buffer.getvalue().encode("utf-8", "backslashreplace")


def _harmless(text: str) -> str:
    text = _NOT_XML.sub(" ", text) if "\0" in text else text  # many readers of CSV stop at a zero byte
    return f"'{text}" if _FORMULA.match(text) else text
