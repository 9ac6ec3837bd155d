"""`tsdiff hacking-report`: whether searches please their own verifier only."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from tsdiff.cli import values
from tsdiff.cli.options import Sectioned, SectionedOption, debug_option, json_option
from tsdiff.cli.output import number, plural, print_facts, print_json, print_table, say

if TYPE_CHECKING:
    from tsdiff.bench.hacking import HackingReport
    from tsdiff.bench.statistics import Interval

_PATH = click.Path(path_type=Path)


@click.command("hacking-report", cls=Sectioned)
@click.argument("runs", nargs=-1, required=True, metavar="RUN...", type=_PATH)
@click.option("--held-out", cls=SectionedOption, section="What to compare", required=True, metavar="NAME", help="A verifier that was not searched with: one whose scores the runs hold (a second --verifier of the search), or one that can score their pictures.")
@click.option("--oracle", cls=SectionedOption, section="What to compare", metavar="NAME", help="A verifier that says what is truly wanted, if there is one; found like --held-out.")
@click.option("--features", cls=SectionedOption, section="What to compare", default="pixels", show_default=True, metavar="NAME", help="What diversity is measured in: pixels, or a verifier with a feature network such as clip:model=FOLDER or dino-classifier:model=FOLDER.")
@click.option("--within/--no-within", cls=SectionedOption, section="What to compare", help="Show best-of-k inside runs of best-of-n, instead of budgets across runs.")
@click.option("--confidence", cls=SectionedOption, section="What to compare", type=click.FloatRange(0.0, 1.0, min_open=True, max_open=True), default=0.95, show_default=True, metavar="SHARE", help="Of the intervals.")
@click.option("--device", cls=SectionedOption, section="What to compare", type=values.DEVICE, default="auto", show_default=True, metavar="DEVICE", help="Where verifiers and feature networks run: auto, cpu, cuda, cuda:N or mps.")
@click.option("--plot", type=_PATH, metavar="FILE", help="Draw the scores against NFE (.png, .pdf or .svg); needs matplotlib.")
@json_option
@click.option("--quiet/--no-quiet", cls=SectionedOption, section="Output", help="No narration; warnings of hacking stay.")
@debug_option
def command(
    runs: tuple[Path, ...], held_out: str, oracle: str | None, features: str, within: bool, confidence: float, device: str, plot: Path | None, as_json: bool, quiet: bool
) -> None:
    """Show whether searches please their verifier only.

    \b
    Try:
      tsdiff search --model gaussian --policy best-of-n -P n=64 --seed 0-7 --verifier gaussian-target --verifier gaussian-log-density
      tsdiff hacking-report runs/run-0001 --held-out gaussian-log-density --within

    RUN is a folder that a search has written, or a folder of those. The score that was searched with, the held-out one and
    the oracle's are shown against the budget, with the diversity of the answers to one prompt under different seeds. It
    warns where the searched score rises while the held-out one falls, both by intervals that exclude 0. "index" is the held-out gain over the
    searched gain, in standard deviations: constant is honest, falling is over-optimisation, negative is hacking.
    """
    from tsdiff.bench.hacking import hacking_report
    from tsdiff.bench.plots import check_plot

    if plot is not None:
        check_plot(plot)
    found = hacking_report(runs, held_out=held_out, oracle=oracle, features=features, within=within, confidence=confidence, device=device)
    if as_json:
        print_json(found.to_json())
    else:
        report(found)
    if plot is not None:
        found.plot(plot)
    if not quiet:
        for line in (*found.notices, *([f"the plot is {plot}"] if plot is not None else [])):
            say("", line)
    for line in found.warnings:
        say("warning", line)


def report(found: HackingReport) -> None:
    """Print a report on stdout: a table, and where the held-out score is highest."""
    columns = ("policy", "NFE", *(role.replace("_", "-") for role in found.verifiers), "index", "distance", "vendi", "searches")
    rows = [
        (
            curve.policy, f"{point.nfe:,.0f}", *(_score(point.scores[role], point.intervals.get(role)) for role in found.verifiers),
            _fixed(point.index, 2), _fixed(point.distance, 3), _fixed(point.vendi, 2), point.searches,
        )
        for curve in found.curves
        for point in curve.points
    ]  # fmt: skip
    print_table(columns, rows, numeric=columns[1:])
    facts: dict[str, object] = {role.replace("_", "-"): name for role, name in found.verifiers.items()}
    for curve in found.curves:
        which = f" of {curve.policy}" if len(found.curves) > 1 else ""
        facts[f"held-out peak{which}"] = f"{curve.at_peak.nfe:,.0f} NFE ({plural(curve.prompts, 'prompt')}, {plural(curve.seeds, 'seed')})"
    print_facts(facts)


def _score(value: float, interval: Interval | None) -> str:
    return str(number(value)) if interval is None else f"{number(value)} [{number(interval.low)}, {number(interval.high)}]"


def _fixed(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"
