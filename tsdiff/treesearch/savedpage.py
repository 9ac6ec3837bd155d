"""A saved run as a piece of HTML for notebooks: whole in itself, and everything that is text in it is escaped."""

from __future__ import annotations

import base64
from html import escape
from typing import TYPE_CHECKING

from tsdiff.treesearch.runfolder import PICTURES

if TYPE_CHECKING:
    from tsdiff.treesearch.saved import SavedRun
    from tsdiff.treesearch.savedtree import SavedNode

LONGEST = 12
"""Nodes of the best path that are shown; of a longer one, its beginning and its end."""


def page(run: SavedRun) -> str:
    """Facts, pictures and the best path of a run."""
    facts = {
        "run": f"{run.path} ({run.status})",
        "policy": f"{run.policy} on {run.model}, seed {run.seed}",
        run.verifier or "score": _score(run.score),
        "baseline": None if run.first_score is None else _score(run.first_score),
        "cost": f"{run.ledger['nfe']:,} NFE, {len(run.nodes):,} nodes" + ("" if run.seconds is None else f", {run.seconds:.1f} s"),
        "stopped": run.truncated,
        "error": run.error,
        **{f"damage {number}": line for number, line in enumerate(run.damage, 1)},
    }
    rows = "".join(f'<tr><th style="text-align:left">{escape(name)}</th><td style="text-align:left">{escape(str(value))}</td></tr>' for name, value in facts.items() if value is not None)
    pictures = "".join(_picture(run, which) for which in PICTURES)
    return f'<div><p><b>{escape(run.prompt)}</b></p>{pictures}<table>{rows}</table>{_path(run)}</div>'


def _picture(run: SavedRun, which: str) -> str:
    path = run.path / PICTURES[which]
    if not path.exists():
        return ""
    data = base64.b64encode(path.read_bytes()).decode()
    return f'<figure style="display:inline-block;margin:0 1em 0 0"><img style="max-width:256px" alt="{which}" src="data:image/png;base64,{data}"><figcaption>{which}</figcaption></figure>'


def _path(run: SavedRun) -> str:
    if run.best is None:
        return ""
    nodes: list[SavedNode | None] = [*run.path_to(run.best)]
    if len(nodes) > LONGEST:
        nodes[LONGEST // 2 : LONGEST // 2 - LONGEST] = [None]
    rows = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in _cells(run, node))}</tr>" for node in nodes)
    head = "".join(f"<th>{name}</th>" for name in ("node", "move", "level", "sigma", "score", "NFE"))
    return f"<table><caption>the path to the best sample</caption><tr>{head}</tr>{rows}</table>"


def _cells(run: SavedRun, node: SavedNode | None) -> list[str]:
    if node is None:
        return ["…"] * 6
    sigma = "" if node.sigma is None else f"{node.sigma:.3g}"
    return [str(node.index), node.move.kind, str(node.level), sigma, _score(node.score(run.verifier)), str(node.nfe)]


def _score(score: float | None) -> str:
    return "-" if score is None else f"{score:.4g}"
