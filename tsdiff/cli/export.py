"""`tsdiff export`: a saved run in the format of another program."""

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
    ".json": ("tsdiff.treesearch.exports:write_json", "the run with its trees as one strict JSON object"),
}
"""Suffix -> the function `(run, path)` that writes such a file, imported when it is asked for, and what it is."""

_PATH = click.Path(path_type=Path)


@click.command("export", cls=Sectioned)
@click.argument("run", type=_PATH)
@click.argument("out", type=_PATH)
@click.option("--force/--no-force", cls=SectionedOption, section="Output", help="Replace OUT if it is there.")
@json_option
@debug_option
def command(run: Path, out: Path, force: bool, as_json: bool) -> None:
    """Write a saved run for other programs.

    \b
    Try:
      tsdiff export runs/run-0001 tree.graphml

    RUN is the folder of a run, whatever state it is in. The suffix of OUT says what is written.
    """
    from tsdiff.treesearch.saved import load_run

    suffix = out.suffix.lower()
    if suffix not in FORMATS:
        raise UsageError(f"{str(out)!r} ends in {suffix or 'no suffix'}, which says no format; known are {', '.join(FORMATS)}")
    if out.is_dir():
        raise UsageError(f"{str(out)!r} is a folder; name a file in it")
    if not out.parent.is_dir():
        raise UsageError(f"there is no folder {str(out.parent)!r} to write {out.name!r} into; make it first")
    if out.exists() and not force:
        raise UsageError(f"{str(out)!r} is there already; choose another name, or replace it with --force")
    saved = load_run(run)
    if out.exists() and _is_part(out):
        raise UsageError(f"{str(out)!r} is a part of a run, which nothing replaces; choose another name")
    module, _, function = FORMATS[suffix][0].partition(":")
    getattr(import_module(module), function)(saved, out)
    if as_json:
        print_json({"run": str(saved.path), "out": str(out), "nodes": len(saved.nodes), "damage": list(saved.damage)})
    else:
        click.echo(str(out))
        say("", f"{plural(len(saved.nodes), 'node')} of {saved.path} ({saved.status})")
        for text in saved.damage:
            say("warning", text)


def _is_part(out: Path) -> bool:
    """Whether a file is one that a run, or a search of several, is made of."""
    from tsdiff.treesearch.runfolder import FILES, INDEX, RUN

    return out.name in FILES and any((out.parent / name).exists() for name in (RUN, INDEX))


command.help = f"{cleandoc(command.help or '')}\n\n\b\n" + "\n".join(f"  {suffix:10}{what}" for suffix, (_, what) in FORMATS.items())
