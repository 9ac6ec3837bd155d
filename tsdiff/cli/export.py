"""`tsdiff export`: a saved run in the format of another program, or as pictures."""

from __future__ import annotations

from importlib import import_module
from inspect import cleandoc
from pathlib import Path

import click

from tsdiff.cli.options import Sectioned, SectionedOption, debug_option, json_option
from tsdiff.cli.output import plural, print_json, say
from tsdiff.treesearch.errors import UsageError

FORMATS = {
    ".csv": ("tsdiff.treesearch.exports:write_csv", "a table of the nodes, for spreadsheets and pandas"),
    ".graphml": ("tsdiff.treesearch.exports:write_graphml", "the tree for networkx, Gephi, yEd or Cytoscape"),
    ".html": ("tsdiff.viewer.html:write_html", "the page of `tsdiff view` in one file that needs nothing else"),
    ".json": ("tsdiff.treesearch.exports:write_json", "the run with its trees as one strict JSON object"),
    ".png": ("tsdiff.viewer.figures.tree:write_tree", "the tree as a figure for print"),
    ".svg": ("tsdiff.viewer.figures.tree:write_tree", "the same, as vectors"),
    ".gif": ("tsdiff.viewer.figures.animation:write_animation", "the way from noise to the answer, as an animation"),
    ".webp": ("tsdiff.viewer.figures.animation:write_animation", "the same, in more colours"),
    ".sheet.png": ("tsdiff.viewer.figures.sheet:write_sheet", "a contact sheet: pictures of nodes, best first"),
    "/": ("tsdiff.viewer.figures.folder:write_folder", "a folder of images, figures and tables; also a name without suffix"),
}
"""Suffix -> the function `(run, path)` that writes such a file, imported when it is asked for, and what it is.

The function returns lines about what it had to leave out, or None. The longest suffix that fits a name counts.
"""

FOLDER = "/"


@click.command("export", cls=Sectioned)
@click.argument("run", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path())
@click.option("--force/--no-force", cls=SectionedOption, section="Output", help="Replace OUT if it is there.")
@json_option
@debug_option
def command(run: Path, out: str, force: bool, as_json: bool) -> None:
    """Write a saved run for other programs, or as pictures.

    \b
    Try:
      tsdiff export runs/run-0001 tree.graphml
      tsdiff export runs/run-0001 tree.svg

    RUN is the folder of a run, whatever state it is in. The suffix of OUT says what is written. Pictures need matplotlib.
    """
    from tsdiff.treesearch.saved import load_run

    suffix, path = format_of(out), Path(out)
    _check_place(path, suffix, force)
    saved = load_run(run)
    if path.is_file() and _is_part(path):
        raise UsageError(f"{str(path)!r} is a part of a run, which nothing replaces; choose another name")
    module, _, function = FORMATS[suffix][0].partition(":")
    notices = getattr(import_module(module), function)(saved, path) or ()
    if as_json:
        print_json({"run": str(saved.path), "out": str(path), "nodes": len(saved.nodes), "notices": list(notices), "damage": list(saved.damage)})
    else:
        click.echo(str(path))
        say("", f"{plural(len(saved.nodes), 'node')} of {saved.path} ({saved.status})")
        for text in notices:
            say("", text)
        for text in saved.damage:
            say("warning", text)


def format_of(out: str) -> str:
    """The suffix of FORMATS that a name has. Raises UsageError for one that is not known."""
    name = out.lower()
    fits = [suffix for suffix in FORMATS if name.endswith(suffix) and Path(out).name.lower() != suffix]
    if fits:
        return max(fits, key=len)
    if out and not Path(out).suffix and Path(out).name.lower() not in FORMATS:
        return FOLDER
    known = ", ".join(suffix for suffix in FORMATS if suffix != FOLDER)
    raise UsageError(f"{out!r} ends in {Path(out).suffix or 'no suffix'}, which says no format; known are {known}, and {FOLDER} for a folder")


def _check_place(path: Path, suffix: str, force: bool) -> None:
    """Raise a UsageError if nothing may be written there."""
    parent = path.absolute().parent
    if not parent.is_dir():
        raise UsageError(f"there is no folder {str(path.parent)!r} to write {path.name!r} into; make it first")
    if not path.exists():
        return
    if suffix == FOLDER:
        if not path.is_dir():
            raise UsageError(f"{str(path)!r} is a file, not a folder to write into; choose another name")
        if _in_run(path / "any"):
            raise UsageError(f"{str(path)!r} is the folder of a run, which nothing is written into; choose another name")
        if any(path.iterdir()) and not force:
            raise UsageError(f"{str(path)!r} is there already and is not empty; choose another name, or write into it with --force")
    elif path.is_dir():
        raise UsageError(f"{str(path)!r} is a folder; name a file in it")
    elif not force:
        raise UsageError(f"{str(path)!r} is there already; choose another name, or replace it with --force")


def _is_part(out: Path) -> bool:
    """Whether a file is one that a run, or a search of several, is made of."""
    from tsdiff.treesearch.runfolder import FILES

    return out.name in FILES and _in_run(out)


def _in_run(out: Path) -> bool:
    """Whether a file lies where a run's own files do."""
    from tsdiff.treesearch.runfolder import INDEX, RUN

    return any((out.parent / name).exists() for name in (RUN, INDEX))


command.help = f"{cleandoc(command.help or '')}\n\n\b\n" + "\n".join(f"  {suffix:10}{what}" for suffix, (_, what) in FORMATS.items())
