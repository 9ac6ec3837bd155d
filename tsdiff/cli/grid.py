"""`tsdiff grid`: the answers of many runs side by side."""

from __future__ import annotations

from pathlib import Path

import click

from tsdiff.cli.options import Sectioned, SectionedOption, debug_option, json_option
from tsdiff.cli.output import plural, print_json, say
from tsdiff.viewer.figures.grid import AXES


@click.command("grid", cls=Sectioned)
@click.argument("runs", nargs=-1, required=True, metavar="RUN...", type=click.Path(path_type=Path))
@click.option("--rows", cls=SectionedOption, section="What to show", type=click.Choice(tuple(AXES)), default="prompt", show_default=True, help="What differs from row to row.")
@click.option("--cols", cls=SectionedOption, section="What to show", type=click.Choice(tuple(AXES)), default="policy", show_default=True, help="What differs from column to column.")
@click.option("--baseline/--no-baseline", cls=SectionedOption, section="What to show", help="A first column of plain samples.")
@click.option("--page", cls=SectionedOption, section="What to show", type=click.IntRange(min=1), default=1, show_default=True, metavar="N", help="Of a grid with more than 12 rows or 8 columns.")
@click.option("-o", "--out", cls=SectionedOption, section="Output", type=click.Path(path_type=Path), default=Path("grid.png"), show_default=True, metavar="FILE", help="Ends in .png, .jpg or .webp.")
@click.option("--force/--no-force", cls=SectionedOption, section="Output", help="Replace FILE if it is there.")
@json_option
@debug_option
def command(runs: tuple[Path, ...], rows: str, cols: str, baseline: bool, page: int, out: Path, force: bool, as_json: bool) -> None:
    """Show the answers of many runs side by side.

    \b
    Try:
      tsdiff grid runs --rows prompt --cols policy
      tsdiff grid runs --rows prompt --cols nfe --baseline -o budgets.png

    RUN is the folder of a run, or a folder of them. A cell shows the best image of its runs with its score; images are those that the
    runs have kept. "nfe" is the budget. Needs matplotlib.
    """
    from tsdiff.cli.saved_runs import check_out, read_runs
    from tsdiff.viewer.figures.cards import SUFFIXES, write_page
    from tsdiff.viewer.figures.grid import arrange, draw
    from tsdiff.viewer.figures.paper import require_matplotlib

    check_out(out, SUFFIXES, force=force)
    require_matplotlib()
    found = read_runs(runs)
    grid = arrange(found, rows, cols)
    image, notices = draw(grid, page, baseline=baseline)
    write_page(image, out)
    if as_json:
        print_json({
            "out": str(out), "page": page, "pages": grid.pages, "rows": rows, "cols": cols, "row_values": list(grid.down), "col_values": list(grid.across),
            "cells": [[None if (run := grid.best(row, column)) is None else str(run.path) for column in grid.part(page)[1]] for row in grid.part(page)[0]],
            "notices": notices,
        })  # fmt: skip
        return
    click.echo(str(out))
    say("", f"{plural(len(found), 'run')}: {plural(len(grid.down), 'row')} by {plural(len(grid.across), 'column')}")
    for text in notices:
        say("", text)
