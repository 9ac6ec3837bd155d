"""`tsdiff show`: a saved run as a tree, one of its nodes, or where an image came from."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tsdiff.cli.options import Sectioned, SectionedOption, debug_option, json_option
from tsdiff.cli.output import coloured, number, one_line, plural, print_facts, print_json, print_table, say
from tsdiff.treesearch.errors import UsageError
from tsdiff.treesearch.node import Move
from tsdiff.treesearch.runfolder import VIDEOS
from tsdiff.treesearch.savedtree import WRONG
from tsdiff.treesearch.video import length

if TYPE_CHECKING:
    from tsdiff.treesearch.saved import SavedRun
    from tsdiff.treesearch.savedtree import SavedNode

_NUMERIC = ("level", "sigma", "score", "NFE", "hidden")


@click.command("show", cls=Sectioned)
@click.argument("what", metavar="RUN|RUN:NODE|IMAGE", type=click.Path(path_type=Path))
@click.option("--node", cls=SectionedOption, section="What to show", metavar="NODE", help="A node, by its number or as `best`: how it came about, and all that is known of it.")
@click.option("--most", cls=SectionedOption, section="What to show", type=click.IntRange(min=1), metavar="N", help="Show the paths to the N best ends, unfinished ones too.  [default: the 12 best samples]")
@click.option("--depth", cls=SectionedOption, section="What to show", type=click.IntRange(min=0), metavar="N", help="Show N moves from each root at most.")
@click.option("--baseline/--no-baseline", cls=SectionedOption, section="What to show", help="Show the plain sample's tree instead of the search's.")
@json_option
@debug_option
def command(what: Path, node: str | None, most: int | None, depth: int | None, baseline: bool, as_json: bool) -> None:
    """Show a saved run, one of its nodes, or an image's origin.

    \b
    Try:
      tsdiff show runs/run-0001
      tsdiff show runs/run-0001:best
      tsdiff show runs/run-0001/best.png

    RUN is the folder of a run, whatever state it is in. It is shown as a tree, with a line for each stretch without a branch:
    its first and last node, its levels, the last node's score (~ for that of an estimate on the way), what it cost, and how
    many nodes branch off there and are not shown. An asterisk marks the way to the best sample.
    """
    from tsdiff.treesearch.saved import load_run

    folder, named = _named(what, node)
    if folder.is_file():
        if named is not None:
            raise UsageError(f"{str(folder)!r} is a file, which has no nodes; leave --node out, or name a run's folder")
        _show_picture(folder, as_json=as_json)
        return
    run = load_run(folder)
    if baseline and run.baseline is None:
        raise UsageError(f"{str(run.path)!r} has no baseline tree; leave --baseline out")
    line = "baseline" if baseline else "search"
    if named is not None:
        _show_node(run, line, _find(run, line, named), as_json=as_json)
    else:
        _show_run(run, line, most=most, depth=depth, as_json=as_json)
    if not as_json:
        for text in run.damage:
            say("warning", text)


def _named(what: Path, node: str | None) -> tuple[Path, str | None]:
    """Where the run is, and which of its nodes is meant, if any."""
    match = re.fullmatch(r"(.+):(\d+|best)", str(what), re.DOTALL)
    if what.exists() or match is None:
        return what, node
    if node is not None and node != match[2]:
        raise UsageError(f"both {str(what)!r} and --node {node} name a node; use one of them")
    return Path(match[1]), match[2]


def _find(run: SavedRun, line: str, named: str) -> SavedNode:
    tree = run.trees[line]
    if named == "best":
        if tree.best is None:
            raise UsageError(f"{str(run.path)!r} has no finished sample with a score yet; name a node by its number")
        return tree.best
    if not re.fullmatch(r"\d{1,18}", named):
        raise UsageError(f"--node is {named!r} but must be a node's number, or `best`")
    return tree.at(int(named))


# A run ---------------------------------------------------------------------------------------------------------------


def _show_run(run: SavedRun, line: str, *, most: int | None, depth: int | None, as_json: bool) -> None:
    from tsdiff.cli import tree_lines

    tree = run.trees[line]
    shown = tree_lines.lay_out(tree, most=most, depth=depth)
    if as_json:
        paths = [
            {"nodes": [node.index for node in one.nodes], "parent": _parent(one.nodes[0]), "hidden": one.hidden, "best": one.best, "score": one.nodes[-1].score(tree.verifier)}
            for one in shown.lines
        ]
        print_json({"run": str(run.path), **run.summary(), "tree": line, "nodes": len(tree.nodes), "best": _index(tree.best), "damage": list(run.damage), "paths": paths})
        return
    _print_head(run, line)
    if not tree.nodes:
        click.echo("no node has been written down")
        return
    rows = [
        (
            f"{'*' if one.best else ' '} {one.guides}{tree_lines.chain_text(one.nodes)}", tree_lines.level_text(one.nodes),
            tree_lines.score_text(one.nodes[-1], tree), f"{sum(node.nfe for node in one.nodes):,}",
            f"+{one.hidden:,}" if one.hidden else "", one_line(tree_lines.remark(one.nodes), 60),
        )
        for one in shown.lines
    ]  # fmt: skip
    click.echo()
    _print_tree(("  node", "level", "score", "NFE", "hidden", ""), rows, [one.best for one in shown.lines])
    if shown.nodes < len(tree.nodes):
        more = f"; --most {min(shown.all_ends, 4 * shown.ends)} shows more" if shown.ends < shown.all_ends else ""
        say("", f"{shown.nodes:,} of {plural(len(tree.nodes), 'node')} and {shown.ends:,} of {plural(shown.all_ends, 'end')} are shown{more}")


def _print_head(run: SavedRun, line: str) -> None:
    tree = run.trees[line]
    score, first = number(tree.score) or "none yet", run.first_score if line == "search" else None
    best = "" if tree.best is None else f", node {tree.best.index}"
    also = f" + {run.baseline.ledger['nfe']:,} for the baseline" if line == "search" and run.baseline is not None else ""
    took = "" if run.seconds is None else f" in {run.seconds:.1f} s"
    print_facts(
        {
            "prompt": run.prompt,
            "run": f"{run.path}, {run.status}{took}",
            "policy": f"{run.policy or 'unknown'} on {run.model or 'unknown'}, seed {run.seed}" + ("" if line == "search" else ": the plain sample"),
            "score": f"{score} ({tree.verifier}{best}{'' if first is None else f'; baseline {number(first)}'})",
            "cost": f"{tree.ledger['nfe']:,} NFE{also}, {plural(len(tree.nodes), 'node')}",
            "video": _video(run.path / VIDEOS["best" if line == "search" else "baseline"]),
            "stopped": run.truncated,
            "error": run.error,
        }
    )


def _video(path: Path) -> str | None:
    """Where a video is and how long; None if there is none that can be read."""
    try:
        count, rate = length(path)
    except (OSError, ValueError):  # that it is missing or damaged is told otherwise
        return None
    return f"{path}, {plural(count, 'frame')}, {rate:g} a second"


def _print_tree(columns: Sequence[str], rows: Sequence[Sequence[str]], marked: Sequence[bool]) -> None:
    """A table whose first column is a drawing, which must keep its spaces."""
    widths = [max(len(cell) for cell in column) for column in zip(columns, *rows, strict=True)]
    paint = coloured(sys.stdout)

    def line(cells: Sequence[str]) -> str:
        return "  ".join(cell.rjust(width) if name in _NUMERIC else cell.ljust(width) for cell, width, name in zip(cells, widths, columns, strict=True)).rstrip()

    click.echo(click.style(line(columns), bold=True), color=paint)
    for row, best in zip(rows, marked, strict=True):
        click.echo(click.style(line(row), fg="green") if best else line(row), color=paint)


# A node --------------------------------------------------------------------------------------------------------------


def _show_node(run: SavedRun, line: str, node: SavedNode, *, as_json: bool) -> None:
    from tsdiff.cli import tree_lines

    tree = run.trees[line]
    path = tree.path(node)
    recipe = path[0].move.to_json().get("noise", {"kind": "fresh", "index": tree.roots.index(path[0])})
    if as_json:
        facts = {"run": str(run.path), "tree": line, "prompt": run.prompt, "seed": run.seed, "solver": tree.solver, "recipe": recipe}
        data = [one.to_json() | {"alpha": one.alpha, "sigma": one.sigma, "children": [child.index for child in one.children]} for one in path]
        print_json(facts | {"node": data[-1], "path": data, "path_nfe": sum(one.nfe for one in path)})
        return
    values = {f"value {key}": number(value.score) if value.score is not None else f"none: {value.reason}" for key, value in sorted(node.values.items())}
    parts = {f"- {key}: {name}": number(part) for key, value in sorted(node.values.items()) for name, part in (value.parts or {}).items()}
    children = ", ".join(str(child.index) for child in node.children[:20]) + (f" and {len(node.children) - 20:,} more" if len(node.children) > 20 else "")
    print_facts(
        {
            "node": f"{node.index} of {len(tree.nodes):,} ({run.path}, {line} tree)",
            "prompt": run.prompt,
            "status": ("draft, " if node.draft else "") + node.status + (f": {node.reason}" if node.reason else ""),
            "level": f"{node.level} of {tree.last}" + ("" if node.sigma is None else f" (alpha {node.alpha:.4g}, sigma {node.sigma:.4g})"),
            **{one_line(name): value for name, value in (values | parts).items()},
            "cost": f"{node.nfe:,} NFE, {sum(one.nfe for one in path):,} on the path to it",
            "seed": run.seed,
            "first noise": _recipe(recipe),
            "solver": tree.solver,
            "id": f"{node.id:032x}",
            "stream": f"{node.stream:032x}",
            "children": children or "none",
            "note": node.note or None,
        }
    )
    rows = [(one.index, _move(one.move, root=one.parent is None), _levels(one.move.levels), number(one.sigma), tree_lines.score_text(one, tree), f"{one.nfe:,}") for one in path]
    click.echo()
    print_table(("node", "move", "levels", "sigma", "score", "NFE"), rows, title="the path to it", numeric=("node", "sigma", "score", "NFE"))


def _move(move: Move, *, root: bool) -> str:
    """A move with everything that is not as usual."""
    data = move.to_json()
    more = [f"{name} {data[name]}" for name in ("solver", "model", "scale", "source") if name in data]
    more += [f"copy {data['copy']}"] if data["copy"] else []
    if "noise" in data and not root:  # a root's is told beside
        more.append(f"noise {_recipe(data['noise'])}")
    return ", ".join((str(move.kind), *more))


def _recipe(recipe: dict[str, Any]) -> str:
    """ "fresh, index 4"."""
    return ", ".join((str(recipe["kind"]), *(f"{name} {value}" for name, value in recipe.items() if name != "kind")))


def _levels(levels: Sequence[int]) -> str:
    """From where to where a move led."""
    return " → ".join(map(str, levels if len(levels) < 3 else (levels[0], levels[-1])))


def _parent(node: SavedNode) -> int | None:
    return None if node.parent is None else node.parent.index


def _index(node: SavedNode | None) -> int | None:
    return None if node is None else node.index


# A picture -----------------------------------------------------------------------------------------------------------


def _show_picture(path: Path, *, as_json: bool) -> None:
    from tsdiff.cli.picture_history import read_history

    history = read_history(path)
    if as_json:
        print_json({"image": str(path), "size": list(history.size), "parameters": history.parameters, "tsdiff": history.own})
    else:
        print_facts({"image": path, "size": f"{history.size[0]} x {history.size[1]}", "video": _video(path)})
        path = _path_of(history.own)
        own = {name: value for name, value in history.own.items() if name != "path"} if path else history.own
        for title, facts in (("parameters", history.parameters), ("tsdiff", own)):
            if facts is not None:
                click.echo()
                click.echo(click.style(title, bold=True), color=coloured(sys.stdout))
                print_facts(_flat(facts))
        if path:
            click.echo()
            print_table(("node", "move", "levels", "NFE"), path, title="the path to it", numeric=("node", "NFE"))
    for text in history.problems:
        say("warning", text)
    if history.parameters is None and history.own is None and not history.problems:
        say("", "this image does not say where it came from: it has no text `tsdiff` or `parameters` (some programs remove it when they save)")


def _path_of(own: Any) -> list[tuple[Any, ...]]:
    """Rows for the nodes of the path that a picture tells; empty if it tells none, or what it tells is no path."""
    try:
        moves = [(step["index"], Move.from_json(step["move"]), step["nfe"]) for step in own["path"]]
        return [(index, _move(move, root=not i), _levels(move.levels), nfe) for i, (index, move, nfe) in enumerate(moves)]
    except WRONG:
        return []


def _flat(data: Any, name: str = "") -> dict[str, object]:
    """Nested JSON as names with dots."""
    if isinstance(data, dict) and data:
        return {key: value for inner, item in data.items() for key, value in _flat(item, f"{name}.{inner}" if name else str(inner)).items()}
    if isinstance(data, list) and any(isinstance(item, (dict, list)) for item in data):
        return {key: value for inner, item in enumerate(data) for key, value in _flat(item, f"{name}.{inner}").items()}
    if isinstance(data, list):
        data = ", ".join(map(str, data))
    return {one_line(name): "none" if data in ({}, "", None) else data}
