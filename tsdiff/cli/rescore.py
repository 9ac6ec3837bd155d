"""`tsdiff rescore`: what other verifiers say of saved trees."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tsdiff.cli import values
from tsdiff.cli.app import INCOMPLETE
from tsdiff.cli.counting import counting
from tsdiff.cli.options import debug_option, json_option
from tsdiff.cli.output import number, plural, print_facts, print_json, print_table, say

if TYPE_CHECKING:
    from tsdiff.bench.rescore import Rescore


@click.command("rescore")
@click.argument("runs", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="RUN...")
@click.option("--verifier", "verifiers", multiple=True, required=True, metavar="NAME", help="A name of `tsdiff list verifiers`; repeatable.")
@click.option("--at", type=click.Choice(["final", "x0"]), default="final", show_default=True, help="final: finished samples. x0: every node whose clean estimate is on disk, or that the verifier judges by its latent.")
@click.option("--top", type=click.IntRange(min=0), default=20, show_default=True, metavar="N", help="Nodes to show of each tree, 0 for all. The files and --json have all.")
@click.option("--device", type=values.DEVICE, default="auto", show_default=True, metavar="DEVICE", help="auto, cpu, cuda, cuda:N or mps.")
@json_option
@click.option("--quiet/--no-quiet", help="No narration, no progress.")
@debug_option
def command(runs: tuple[Path, ...], verifiers: tuple[str, ...], at: str, top: int, device: str, as_json: bool, quiet: bool) -> int:
    """Score saved trees by other verifiers, without denoising.

    \b
    Try:
      tsdiff rescore runs/run-0001 --verifier sharpness
      tsdiff rescore runs --verifier clip:model=FOLDER --verifier aesthetic:model=FOLDER,head=FILE

    RUN is a run folder, or a folder of such. Latents that the run has kept are decoded and scored; no network evaluation is
    spent. A node on the way has no clean estimate on disk, so that only verifiers of latents (value:FOLDER) can score it.
    Shown are the steering verifier's score and the new one, the rank among all by the new one ("+2" has gained two places),
    and the rank correlation of the two. What was found is written beside the run, as rescored/VERIFIER.json;
    `hacking-report --within --held-out VERIFIER` reads it, and so does load_run.

    Exit status 3: a verifier gave no score for some nodes.
    """
    from tsdiff.bench.rescore import rescore

    with counting(quiet or as_json, "scoring") as progress:
        found = rescore(runs, list(verifiers), at=at, device=device, progress=progress)  # type: ignore[arg-type]
    for index, one in enumerate(found):
        if as_json:
            print_json(one.to_json())
        else:
            if index:
                click.echo()
            _show(one, top)
    if not as_json and len({one.run.path for one in found}) > 1:
        _show_means(found)
    failed = 0
    for one in found:
        reasons = [value.reason for value in one.found.values.values() if value.score is None]
        failed += len(reasons)
        if reasons:
            say("failed", f"{one.run.path}: {one.verifier} gave no score for {plural(len(reasons), 'node')}: {reasons[0]}")
    return INCOMPLETE if failed else 0


def _show(one: Rescore, top: int) -> None:
    """A table of one tree under one verifier, and what follows."""
    old = one.run.verifier
    ranks = one.ranks()
    shown = ranks[:top] if top else ranks
    answer = one.run.best
    rows = [
        (index, one.run.nodes[index].level, number(one.old[index]), number(one.new[index]), rank, None if change is None else f"{change:+d}" if change else "0", "answer" if answer is not None and index == answer.index else "")
        for index, rank, change in shown
    ]  # fmt: skip
    columns: Sequence[str] = ("node", "level", old, one.verifier if one.verifier != old else f"{old}, now", "rank", "change", "")
    print_table(columns, rows, title=f"{one.run.path}: {one.run.prompt!r} seed {one.run.seed}", numeric=columns[:-1])
    facts: dict[str, Any] = {
        "shown": None if len(shown) == len(ranks) else f"{len(shown)} of {plural(len(ranks), 'scored node')} (--top 0 shows all)",
        "rank correlation": f"{one.spearman:.3f}" if one.spearman is not None else f"- ({_uncorrelated(one)})",
        "skipped": "; ".join(f"{plural(count, 'node')}: {reason}" for reason, count in one.skipped.items()) or None,
        "file": one.path,
    }
    print_facts(facts)


def _show_means(found: Sequence[Rescore]) -> None:
    """The rank correlation of each verifier over all trees, with an interval over trees."""
    from tsdiff.bench.statistics import mean_interval

    click.echo()
    facts: dict[str, Any] = {}
    for name in dict.fromkeys(one.verifier for one in found):
        known = [one.spearman for one in found if one.verifier == name and one.spearman is not None]
        if len(known) > 1:
            interval = mean_interval(known)
            facts[f"rank correlation of {name}"] = f"{interval.estimate:.3f} [{interval.low:.3f}, {interval.high:.3f}], mean of {len(known)} trees"
    print_facts(facts)


def _uncorrelated(one: Rescore) -> str:
    """Why there is no rank correlation."""
    both = sum(one.old[index] is not None and one.new[index] is not None for index, _, _ in one.ranks())
    return "one of them is constant" if both > 1 else f"{plural(both, 'node')} with both scores"
