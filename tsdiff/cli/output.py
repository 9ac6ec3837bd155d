"""Where text goes and how it looks: results to stdout, narration to stderr, colour and wrapping on a terminal only."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TextIO

import click

if TYPE_CHECKING:
    from rich.console import Console

_COLORS = {"error": "red", "failed": "red", "warning": "yellow", "interrupted": "yellow"}
_NO_LIMIT = 10_000  # columns of redirected output: tables are as wide as what they hold, paths are never cut


def coloured(stream: TextIO) -> bool:
    """Whether to colour a stream: terminals only, unless NO_COLOR (https://no-color.org) or FORCE_COLOR decide."""
    if os.environ.get("NO_COLOR"):
        return False
    if os.environ.get("FORCE_COLOR"):
        return True
    return stream.isatty() and os.environ.get("TERM") != "dumb"


def one_line(text: object, limit: int | None = None) -> str:
    """Text as one printable line: control characters become spaces, so that no prompt can steer a terminal.

    Args:
      limit: at most this many characters, the last an ellipsis where something was cut.
    """
    line = " ".join("".join(character if character.isprintable() else " " for character in str(text)).split())
    return line if limit is None or len(line) <= limit else f"{line[: limit - 1]}…"


def say(kind: str, text: str) -> None:
    """One line on stderr; `kind` is its first word ("error", "warning", "failed"), or "" for plain narration."""
    prefix = f"{click.style(f'{kind}:', fg=_COLORS.get(kind), bold=True)} " if kind else ""
    click.echo(prefix + one_line(text), err=True, color=coloured(sys.stderr))


def print_json(data: Mapping[str, Any] | Sequence[Any]) -> None:
    """One strict JSON document on one line of stdout."""
    click.echo(json.dumps(data, allow_nan=False))


def console() -> Console:
    """A console on stdout that takes every text literally (no markup, no emoji codes)."""
    from rich.console import Console

    return Console(
        file=sys.stdout, width=None if sys.stdout.isatty() else _NO_LIMIT, no_color=not coloured(sys.stdout), markup=False, emoji=False, highlight=False
    )


def print_table(columns: Sequence[str], rows: Sequence[Sequence[object]], *, title: str = "", numeric: Sequence[str] = ()) -> None:
    """A table on stdout, wrapped to a terminal and unlimited in a file; columns without any content are left out.

    Args:
      columns: the headers.
      rows: cells, in the order of the columns; None shows as "-".
      numeric: headers of the columns to align right.
    """
    from rich.table import Table

    cells = [["-" if cell is None else one_line(cell) for cell in row] for row in rows]
    shown = [index for index in range(len(columns)) if not cells or any(row[index] for row in cells)]
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for index in shown:
        table.add_column(
            columns[index], justify="right" if columns[index] in numeric else "left", overflow="fold", no_wrap=not sys.stdout.isatty()
        )
    for row in cells:
        table.add_row(*(row[index] for index in shown))
    if title:
        click.echo(click.style(title, bold=True), color=coloured(sys.stdout))
    _write(table)


def print_facts(facts: Mapping[str, object]) -> None:
    """Names and values, one pair a line, on stdout; None values are left out."""
    width = max(map(len, facts), default=0)
    for name, value in facts.items():
        if value is not None:
            click.echo(f"{click.style(name.ljust(width), bold=True)}  {one_line(value)}", color=coloured(sys.stdout))


def number(value: float | None) -> str | None:
    """A score or a time for people, four significant digits."""
    return None if value is None else f"{value:.4g}"


def data_size(count: int) -> str:
    """Bytes for people: "812 B", "3.4 MB"."""
    size, unit = float(count), "B"
    for larger in ("kB", "MB", "GB", "TB"):
        if size < 999.5:
            break
        size, unit = size / 1000.0, larger
    return f"{count} B" if unit == "B" else f"{size:.3g} {unit}"


def plural(count: int, noun: str) -> str:
    """ "1 prompt", "3 prompts"."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def _write(renderable: object) -> None:
    """Print through rich; what it pads at the ends of lines is dropped."""
    target = console()
    with target.capture() as captured:
        target.print(renderable)
    for line in captured.get().splitlines():
        click.echo(line.rstrip(), color=coloured(sys.stdout))
