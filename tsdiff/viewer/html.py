"""A saved run as one page that needs nothing else: `tsdiff export RUN run.html` opens from a disk, a mail or a paper's supplement.

It is the page of `tsdiff view` with its scripts joined into one and the run's data beside them. A content security policy
permits that one script and style by their hashes, and no connection to anywhere.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tsdiff.treesearch.errors import UsageError
from tsdiff.treesearch.runfolder import write_file
from tsdiff.viewer.commands import node_commands, search_command
from tsdiff.viewer.documents import curve_document, has_picture, node_document, run_document, summary_document, tree_document
from tsdiff.viewer.pictures import CELLS, Atlas, Picture, node_picture
from tsdiff.viewer.watched import Changes, Watched

if TYPE_CHECKING:
    from tsdiff.treesearch.saved import SavedRun

STATIC = Path(__file__).parent / "static"

ROOM = 16 << 20
"""Bytes for pictures and for details of nodes; the tree itself is always whole."""

THUMBNAIL = 64

_IMPORT = re.compile(r'^import (?:\{([^}]*)\} from )?"\./([\w./-]+)";\n', re.MULTILINE)
_EXPORT = re.compile(r"^export (?=(?:async )?(?:function|class|const) )", re.MULTILINE)
_NAME = re.compile(r"^export (?:async )?(?:function|class|const) (\w+)", re.MULTILINE)
_LIST = re.compile(r"export\{([^}]*)\};\s*\Z")
_PRELOAD = re.compile(r'<link rel="modulepreload" [^>]*>\n')
_STYLE = '<link rel="stylesheet" href="/static/style.css">'
_SCRIPT = '<script type="module" src="/static/main.js"></script>'
_FIRST = '<meta charset="utf-8">'


def write_html(run: SavedRun, path: Path) -> list[str]:
    """The run as one HTML file. Returns what was left out to keep it small, in lines; the file tells it too.

    Raises:
      UsageError, SetupError: if the run cannot be read, or the file cannot be written.
    """
    data, left_out = run_data(run)
    write_file(path, [page(data).encode()])
    return [f"left out to keep the file small: {text}" for text in left_out]


def page(data: Any) -> str:
    """The page with its scripts, its style and some data inside."""
    html = _PRELOAD.sub("", (STATIC / "index.html").read_text(encoding="utf-8"))
    style = (STATIC / "style.css").read_text(encoding="utf-8")
    script = joined("main.js")
    carried = json.dumps(data, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")
    policy = (
        f"default-src 'none'; script-src '{_hash(script)}'; style-src '{_hash(style)}'; img-src data: blob:; connect-src 'none'; base-uri 'none'; form-action 'none'"
    )
    parts = {
        _FIRST: f'{_FIRST}\n<meta http-equiv="Content-Security-Policy" content="{policy}">',
        _STYLE: f"<style>{style}</style>",
        _SCRIPT: f'<script type="application/json" id="tsdiff-data">{carried}</script>\n<script type="module">{script}</script>',
    }
    for mark, part in parts.items():
        before, found, after = html.partition(mark)
        if not found:
            raise UsageError(f"the page of this installation is damaged: index.html has no {mark}")
        html = before + part + after
    return html


def _hash(text: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"


# Scripts in one ------------------------------------------------------------------------------------------------------


def joined(first: str) -> str:
    """A module and all that it imports as one script: each a function that is called once, after those that it imports."""
    order: dict[str, str] = {}
    _collect(first, order, ())
    script = "".join(order.values())
    if "</script" in script.lower() or "<!--" in script:
        raise UsageError("the page of this installation is damaged: a script holds a closing tag")
    return script


def _collect(name: str, order: dict[str, str], above: tuple[str, ...]) -> None:
    if name in order:
        return
    if name in above:
        raise UsageError(f"the page of this installation is damaged: {' imports '.join((*above, name))}")
    code = (STATIC / name).read_text(encoding="utf-8")
    for match in _IMPORT.finditer(code):
        _collect(match[2], order, (*above, name))
    names = {found: found for found in _NAME.findall(code)}
    listed = _LIST.search(code)
    if listed:
        for item in listed[1].split(","):
            own, _, shown = item.strip().partition(" as ")
            names[shown or own] = own
        code = code[: listed.start()]
    code = _IMPORT.sub(lambda match: f"const {{ {match[1].strip().replace(' as ', ': ')} }} = {_variable(match[2])};\n" if match[1] else "", code)
    code = _EXPORT.sub("", code)
    shown = ", ".join(name if name == own else f"{name}: {own}" for name, own in names.items())
    order[name] = f"const {_variable(name)} = (() => {{\n{code}\nreturn {{ {shown} }};\n}})();\n"


def _variable(name: str) -> str:
    return "module_" + re.sub(r"\W", "_", name)


# The run's data ------------------------------------------------------------------------------------------------------


class _Room:
    """What still fits, and what did not."""

    def __init__(self, size: int) -> None:
        self.left = size
        self.out: dict[str, int] = {}

    def take(self, size: int, what: str) -> bool:
        """Whether so many bytes more fit; counts what does not."""
        if size <= self.left:
            self.left -= size
            return True
        self.out[what] = self.out.get(what, 0) + 1
        return False


def run_data(run: SavedRun) -> tuple[dict[str, Any], list[str]]:
    """What the page asks its server for, as one object; and what was left out of it, in words."""
    watched = Watched(run.path)
    name = run.path.name or "run"
    room = _Room(ROOM)
    best = watched.run.best
    order = _order(watched)
    images: dict[int, str] = {}
    if best is not None:
        _add_image(images, watched, best.index, room)
    atlas = _atlas(watched, room)
    nodes = {}
    for index in order:
        facts = _details(name, watched, index)
        if room.take(len(json.dumps(facts)), "the details of {} nodes"):
            nodes[index] = facts
    for index in order:
        if index not in images:
            _add_image(images, watched, index, room)
    document = run_document(name, watched)
    document["commands"] = {"search": search_command(watched.run)}
    document["live"] = False
    if document["baseline"] is not None:
        document["baseline"]["image"] = None
    left_out = [what.format(count) for what, count in room.out.items()]
    data = {
        "runs": [summary_document(name, watched.run, watched.damage)],
        "run": document,
        "tree": {**tree_document(watched, Changes("", True, watched.records)), "token": ""},
        "curve": curve_document(watched),
        "nodes": nodes,
        "images": images,
        "atlas": atlas,
        "left_out": left_out,
    }
    return data, left_out


def _order(watched: Watched) -> list[int]:
    """All nodes, those first that one wants to see most: the best path, finished samples by their scores, the rest."""
    tree = watched.run.tree
    path = [] if tree.best is None else [node.index for node in tree.path(tree.best)]
    verifier = tree.verifier
    scored = sorted((node for node in tree.finished if node.score(verifier) is not None), key=lambda node: (-(node.score(verifier) or 0.0), node.index))
    return list(dict.fromkeys([*path, *(node.index for node in scored), *range(len(tree.nodes))]))


def _details(name: str, watched: Watched, index: int) -> dict[str, Any]:
    """Of a node, what does not follow from the tree."""
    facts = node_document(name, watched, index)
    kept = ("id", "noise_scale", "nfe", "rows", "seconds", "label", "recipe", "scores")
    return {key: facts[key] for key in kept} | {"commands": node_commands(Path(watched.path.name), index)}


def _add_image(images: dict[int, str], watched: Watched, index: int, room: _Room) -> None:
    if not has_picture(watched, index):
        return
    try:
        address = _address(node_picture(watched, index))
    except UsageError:  # it is told as damage, or has gone meanwhile
        return
    if room.take(len(address), "the pictures of {} nodes"):
        images[index] = address


def _atlas(watched: Watched, room: _Room) -> list[str | None]:
    """The pages of thumbnails; None for one that does not fit."""
    atlas = Atlas()
    pages: Iterable[int] = range(-(-len(watched.thumbnails) // CELLS))
    found = [_address(atlas.page(watched, number, THUMBNAIL)) for number in pages]
    return [one if room.take(len(one), "{} pages of thumbnails") else None for one in found]


def _address(picture: Picture) -> str:
    return f"data:{picture.media_type};base64,{base64.b64encode(picture.data).decode()}"
