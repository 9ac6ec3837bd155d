"""What the page asks for, as plain JSON: the runs, one run, its tree, one of its nodes, its curve.

Everything that a file said has gone through `tsdiff.viewer.plainjson` or was checked when the tree was read, so a document is
strict JSON whatever the files hold.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any
from urllib.parse import quote

from tsdiff.treesearch.node import Value
from tsdiff.treesearch.runfolder import PICTURES
from tsdiff.treesearch.saved import SavedRun
from tsdiff.treesearch.savedtree import SavedNode
from tsdiff.viewer.commands import node_commands, run_commands
from tsdiff.viewer.plainjson import count, line, mapping, number, plain, short, text
from tsdiff.viewer.records import finished, scores
from tsdiff.viewer.watched import Changes, Watched


def run_url(name: str) -> str:
    """Where a run's documents are; its id is one segment of the address."""
    return f"/api/runs/{quote(name, safe='')}"


# The runs of a folder ------------------------------------------------------------------------------------------------


def summary_document(name: str, run: SavedRun, damage: list[str] | None = None) -> dict[str, Any]:
    """A run in a line; null where something is not known.

    Args:
      name: its id.
      run: read as far as its `damage` is given, without it from `run.json` alone.
      damage: what is damaged or missing, a line each.
    """
    result, options, facts = run.result, run.options, run.facts
    best, nfe, nodes = number(result.get("score")), count(result.get("nfe")), count(result.get("nodes"))
    prompt, seed = facts.get("prompt"), facts.get("seed")
    if damage is not None:
        prompt, seed, best, nfe, nodes = run.prompt, run.seed, run.score, count(run.ledger["nfe"]), len(run.nodes)
    return {
        "id": name,
        "prompt": text(prompt or ""),
        "seed": count(seed),
        "policy": text(mapping(options.get("policy")).get("name", "")),
        "model": text(options.get("model") or ""),
        "status": run.status,
        "best": best,
        "nfe": nfe,
        "nodes": nodes,
        "steps_total": _expected(options),
        "damage": damage or [],
    }


def unreadable_document(name: str, why: object) -> dict[str, Any]:
    """The line of a run of which nothing can be read."""
    nothing: dict[str, Any] = dict.fromkeys(("seed", "best", "nfe", "nodes", "steps_total"))
    return {"id": name, "prompt": "", "policy": "", "model": "", "status": "unreadable", **nothing, "damage": [line(why)]}


def _expected(options: dict[str, Any]) -> int | None:
    """NFE that the search may come to, at most."""
    return count(mapping(mapping(options.get("cost")).get("upper")).get("nfe")) or count(options.get("nfe_budget"))


# A run ---------------------------------------------------------------------------------------------------------------


def run_document(name: str, watched: Watched) -> dict[str, Any]:
    """Everything of a run but its nodes."""
    run = watched.run
    tree, options = run.tree, run.options
    ranges = score_ranges(watched)
    names = dict.fromkeys([tree.verifier] if tree.verifier else [])
    names |= dict.fromkeys(text(one) for one in options.get("verifiers", ()) if isinstance(one, str)) if isinstance(options.get("verifiers"), list) else {}
    names |= dict.fromkeys(ranges)
    environment = mapping(options.get("environment"))
    schedule = tree.schedule
    return {
        "id": name,
        "prompt": text(run.prompt),
        "negative_prompt": text(tree.head.get("negative_prompt") or ""),
        "class": plain(tree.head.get("class")),
        "seed": run.seed if run.seed is None else plain(run.seed),
        "status": run.status,
        "policy": plain(mapping(options.get("policy"))) or {"name": text(run.policy)},
        "model": text(run.model),
        "solver": text(tree.solver),
        "steps": count(options.get("steps")) or (None if schedule is None else schedule.last),
        "budget": count(options.get("nfe_budget")),
        "expected": _expected(options),
        "verifiers": list(names),
        "ranges": {one: ranges.get(one) for one in names},
        "schedule": {"levels": tree.last, "noise_scale": [] if schedule is None else [number(sigma) for sigma in schedule.sigma]},
        "baseline": _baseline(name, watched),
        "best": None if run.best is None else run.best.index,
        "score": run.score,
        "relative": run.relative,
        "nfe": count(run.ledger["nfe"]),
        "ledger": plain(run.ledger),
        "nodes": len(run.nodes),
        "thumbnails": len(watched.thumbnails),
        "seconds": number(run.seconds),
        "truncated": None if run.truncated is None else line(run.truncated),
        "error": None if run.error is None else line(run.error),
        "drivers": plain(run.facts.get("drivers")) if isinstance(run.facts.get("drivers"), list) else [],
        "commands": run_commands(run),
        "damage": watched.damage,
        "live": run.status == "running",
        "versions": plain({**mapping(environment.get("packages")), "python": environment.get("python")}) if environment else {},
    }


def score_ranges(watched: Watched) -> dict[str, list[float]]:
    """Of each verifier that has scored anything, its lowest and highest score."""
    ranges: dict[str, list[float]] = {}
    for record in watched.records:
        for name, score in record["s"].items():
            if score is not None:
                low, high = ranges.setdefault(name, [score, score])
                if not low <= score <= high:
                    ranges[name] = [min(low, score), max(high, score)]
    return ranges


def _baseline(name: str, watched: Watched) -> dict[str, Any] | None:
    tree = watched.run.baseline
    if tree is None or tree.best is None:
        return None
    found = {verifier: short(score) for verifier, score in scores(tree.best).items()}
    there = watched.preview(tree.best.index, "baseline") is not None or (watched.path / PICTURES["baseline"]).is_file()
    return {"node": tree.best.index, "scores": found, "image": f"{run_url(name)}/image/baseline" if there else None}


# A tree --------------------------------------------------------------------------------------------------------------


def tree_document(watched: Watched, changes: Changes) -> dict[str, Any]:
    """Nodes that are new or have changed."""
    best = watched.run.best
    return {
        "token": changes.token,
        "restarted": changes.restarted,
        "status": watched.run.status,
        "best": None if best is None else best.index,
        "nfe": count(watched.run.ledger["nfe"]),
        "nodes": changes.records,
    }


def node_document(name: str, watched: Watched, index: int) -> dict[str, Any]:
    """Everything of one node. Raises UsageError if there is no such node."""
    run = watched.run
    tree = run.tree
    node = tree.at(index)
    path = tree.path(node)
    made = watched.spending.made
    label = node.note.get("label")
    return {
        "i": index,
        "id": f"{node.id:032x}",
        "p": None if node.parent is None else node.parent.index,
        "path": [one.index for one in path],
        "children": [child.index for child in node.children],
        "level": node.level,
        "noise_scale": number(node.sigma),
        "signal_scale": number(node.alpha),
        "op": text(node.move.kind, 40),
        "recipe": _recipe(watched, path),
        "scores": _scores(watched, node),
        "nfe": node.nfe,
        "path_nfe": sum(one.nfe for one in path),
        "spent": made[index] if index < len(made) else None,
        "rows": None,
        "seconds": None,
        "status": node.status,
        "reason": None if node.reason is None else line(node.reason),
        "draft": node.draft,
        "fin": finished(tree, node),
        "driver": node.driver,
        "prompt": text(run.prompt),
        "seed": plain(run.seed),
        "label": None if label is None else line(label),
        "note": plain(dict(node.note)),
        "commands": node_commands(run.path, index),
        "image": f"{run_url(name)}/image/{index}" if has_picture(watched, index) else None,
    }


def has_picture(watched: Watched, index: int) -> bool:
    """Whether there is any picture of a node of the search."""
    return watched.preview(index) is not None or (is_answer(watched.run, index) and (watched.path / PICTURES["best"]).is_file())


def is_answer(run: SavedRun, index: int) -> bool:
    """Whether `best.png` is of this node."""
    return type(run.result.get("node")) is int and run.result["node"] == index


def _recipe(watched: Watched, path: list[SavedNode]) -> dict[str, Any]:
    """What the node's latent follows from, with the path to it: the seed, the first noise, its own move and stream."""
    root, node = path[0], path[-1]
    first = root.move.to_json().get("noise")
    if first is None:
        first = {"kind": "fresh", "index": sum(1 for one in watched.run.nodes[: root.index] if one.parent is None)}
    return {"seed": plain(watched.run.seed), "first_noise": plain(first), "move": plain(node.move.to_json()), "stream": f"{node.stream:032x}"}


def _scores(watched: Watched, node: SavedNode) -> dict[str, Any]:
    found = {text(key): _score(value) for key, value in sorted(node.values.items())}
    for name, rescored in watched.rescored.items():
        if node.index in rescored.values:
            found.setdefault(text(name), _score(rescored.values[node.index]) | {"rescored": True})
    return found


def _score(value: Value) -> dict[str, Any]:
    return {"score": number(value.score), "parts": plain(value.parts), "reason": None if value.reason is None else line(value.reason)}


def curve_document(watched: Watched) -> dict[str, Any]:
    """The best score of a finished sample after so many NFE: a point wherever it rose, and one at the end.

    Without a journal, each node counts as made when those before it were paid for (`exact` is false then).
    """
    run = watched.run
    tree, verifier = run.tree, run.tree.verifier
    spending = watched.spending
    exact = len(spending.made) == len(tree.nodes)
    if exact:
        told = [(nfe, index, score) for nfe, index, key, score in spending.scored if key == verifier and index < len(tree.nodes)]
    else:
        told, spent = [], 0
        for node in tree.nodes:
            spent += node.nfe
            if (score := node.score(verifier)) is not None:
                told.append((spent, node.index, score))
    points: list[list[Any]] = []
    for nfe, index, score in told:
        if finished(tree, tree.nodes[index]) and (not points or score > points[-1][1]):
            points.append([nfe, score, index])
    end = count(run.ledger["nfe"])
    if points and end is not None and end > points[-1][0]:
        points.append([end, points[-1][1], points[-1][2]])
    return {"verifier": text(verifier), "exact": exact, "points": points}


def folder_title(root: Path) -> str:
    """What is viewed, for the page's head."""
    return text(root.name or str(root))
