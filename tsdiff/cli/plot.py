"""`tsdiff plot`: curves and paths of saved runs, for print."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tsdiff.cli.options import Sectioned, SectionedOption, debug_option, json_option
from tsdiff.cli.output import plural, print_json, say
from tsdiff.treesearch.errors import UsageError
from tsdiff.viewer.figures.progress import AXES

if TYPE_CHECKING:
    from tsdiff.treesearch.saved import SavedRun

KINDS = ("progress", "levels", "trajectories")


@click.command("plot", cls=Sectioned)
@click.argument("runs", nargs=-1, required=True, metavar="RUN...", type=click.Path(path_type=Path))
@click.option("--kind", cls=SectionedOption, section="What to show", type=click.Choice(KINDS), default="progress", show_default=True, help="Best score so far against cost; scores by level; or paths in the plane.")
@click.option("--x", "axis", cls=SectionedOption, section="What to show", type=click.Choice(tuple(AXES)), help="What progress is plotted against.  [default: nfe]")
@click.option("--verifier", cls=SectionedOption, section="What to show", metavar="NAME", help="Whose scores; by default, of the one that steers.")
@click.option("-o", "--out", cls=SectionedOption, section="Output", type=click.Path(path_type=Path), default=Path("plot.png"), show_default=True, metavar="FILE", help="Ends in .png, .svg or .pdf.")
@click.option("--force/--no-force", cls=SectionedOption, section="Output", help="Replace FILE if it is there.")
@json_option
@debug_option
def command(runs: tuple[Path, ...], kind: str, axis: str | None, verifier: str | None, out: Path, force: bool, as_json: bool) -> None:
    """Plot saved runs.

    \b
    Try:
      tsdiff plot runs
      tsdiff plot runs --x rows -o progress.svg
      tsdiff plot runs/run-0001 --kind trajectories

    RUN is the folder of a run, or a folder of them. Runs that differ in prompts and seeds only make one curve: their mean with its 95 %
    interval, over prompts where there are several, else over seeds. Paths are those of points in the plane (the model `gaussian`), a
    panel for each run. A run does not keep the time of each step: its seconds are spread evenly over its NFE. Needs matplotlib.
    """
    from tsdiff.cli.saved_runs import check_out, read_runs
    from tsdiff.viewer.figures.paper import SUFFIXES, require_matplotlib

    if kind != "progress" and axis is not None:
        raise UsageError(f"--x is for --kind progress; leave it out with --kind {kind}")
    if kind == "trajectories" and verifier is not None:
        raise UsageError("--verifier is for --kind progress and levels; leave it out with --kind trajectories")
    check_out(out, SUFFIXES, force=force)
    require_matplotlib()
    found = read_runs(runs)
    curves, notices = _draw(found, kind, axis or "nfe", verifier, out)
    if as_json:
        print_json({"out": str(out), "kind": kind, "runs": len(found), **curves, "notices": notices})
        return
    click.echo(str(out))
    say("", plural(len(found), "run"))
    for text in notices:
        say("", text)


def _draw(runs: list[SavedRun], kind: str, axis: str, verifier: str | None, out: Path) -> tuple[dict[str, Any], list[str]]:
    """Write a plot; returns its curves as JSON, and what it leaves out."""
    if kind == "trajectories":
        from tsdiff.viewer.figures.density import write_trajectories

        return {}, write_trajectories(runs, out)
    from tsdiff.viewer.figures.series import steering

    name = steering(runs, verifier)
    if kind == "progress":
        from tsdiff.viewer.figures.progress import progress, write_progress

        curves, notices = progress(runs, axis, verifier)
        write_progress(curves, out, axis, name)
        return {"x": axis, "verifier": name, "curves": [curve.to_json() for curve in curves]}, notices
    from tsdiff.viewer.figures.levels import in_shares, levels, write_levels

    curves, dots, notices = levels(runs, verifier)
    write_levels(curves, dots, out, name, shares=in_shares(runs))
    return {"x": "share" if in_shares(runs) else "level", "verifier": name, "curves": [curve.to_json() for curve in curves]}, notices
