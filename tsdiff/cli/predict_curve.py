"""`tsdiff predict-curve`: how early a verifier tells which of a prompt's samples will be the best."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tsdiff.cli import values
from tsdiff.cli.app import INCOMPLETE
from tsdiff.cli.options import Sectioned, SectionedOption, debug_option, json_option
from tsdiff.cli.output import number, plural, print_facts, print_json, print_table, say
from tsdiff.cli.progress import progress
from tsdiff.cli.prompts import read_prompts
from tsdiff.treesearch.errors import UsageError

if TYPE_CHECKING:
    from tsdiff.bench.predict import PredictCurve

_COLUMNS = ("level", "sigma/alpha", "NFE", "Spearman", "low", "high", "Kendall", "gain kept", "prompts")
_FILE = click.Path(path_type=Path)
_POSITIVE = click.IntRange(min=1)


@click.command("predict-curve", cls=Sectioned)
@click.argument("prompt", nargs=-1, metavar="[PROMPT]...")
@click.option("--prompts", "prompt_file", cls=SectionedOption, section="What to sample", type=_FILE, metavar="FILE", help="Prompts from a file, as for `tsdiff search`.")
@click.option("--samples", cls=SectionedOption, section="What to sample", type=click.IntRange(min=3), default=16, show_default=True, metavar="N", help="Samples of each prompt.")
@click.option("--seed", cls=SectionedOption, section="What to sample", type=click.IntRange(min=0), default=0, show_default=True, metavar="SEED", help="Of all noise, and of the bootstrap.")
@click.option("--verifier", cls=SectionedOption, section="What to measure", required=True, metavar="NAME", help="Scores the clean estimates on the way, and what comes out.")
@click.option("--against", cls=SectionedOption, section="What to measure", metavar="NAME", help="Another verifier to score what comes out: does the first tell early what this one says in the end?")
@click.option("--levels", cls=SectionedOption, section="What to measure", type=click.IntRange(min=2), metavar="N", help="Levels to score at, evenly spread, the last among them.  [default: all]")
@click.option("--threshold", cls=SectionedOption, section="What to measure", type=click.FloatRange(-1.0, 1.0, max_open=True), default=0.5, show_default=True, metavar="R", help="Branching is said to pay from the first level whose interval lies above it.")
@click.option("--confidence", cls=SectionedOption, section="What to measure", type=click.FloatRange(0.0, 1.0, min_open=True, max_open=True), default=0.95, show_default=True, metavar="SHARE", help="Of the intervals.")
@click.option("--model", cls=SectionedOption, section="The model", metavar="NAME", help="A name of `tsdiff list models`, a diffusers folder or a hub id.  [default: the built-in shapes]")
@click.option("--steps", cls=SectionedOption, section="The model", type=_POSITIVE, metavar="N", help="Denoising steps; the model's own by default.")
@click.option("--solver", cls=SectionedOption, section="The model", metavar="NAME", help="A name of `tsdiff list solvers`; the model's own by default.")
@click.option("--eta", cls=SectionedOption, section="The model", type=float, metavar="SHARE", help="Noise added by each step of the solvers that have it.")
@click.option("--guidance-scale", cls=SectionedOption, section="The model", type=float, metavar="SCALE", help="1 is no guidance; the model's own by default.")
@click.option("--device", cls=SectionedOption, section="The model", type=values.DEVICE, default="auto", show_default=True, metavar="DEVICE", help="auto, cpu, cuda, cuda:N or mps.")
@click.option("--dtype", cls=SectionedOption, section="The model", type=click.Choice(["auto", "float32", "float16", "bfloat16"]), default="auto", show_default=True, help="Of the weights.")
@click.option("--max-batch", cls=SectionedOption, section="The model", type=_POSITIVE, metavar="ROWS", help="Rows in one network call at most.")
@click.option("--offline/--no-offline", cls=SectionedOption, section="The model", help="Never touch the network.")
@click.option("--plot", type=_FILE, metavar="FILE", help="Draw the curve (.png, .pdf or .svg); needs matplotlib.")
@json_option
@click.option("--quiet/--no-quiet", cls=SectionedOption, section="Output", help="No narration, no progress.")
@debug_option
def command(
    prompt: tuple[str, ...], prompt_file: Path | None, plot: Path | None, as_json: bool, quiet: bool, threshold: float, confidence: float,
    levels: int | None, model: str | None, **options: Any,
) -> int:  # fmt: skip
    """Show how early a verifier tells which sample will be the best.

    \b
    Try:
      tsdiff predict-curve --model gaussian --verifier gaussian-target --solver exact
      tsdiff predict-curve --verifier shapes-clip --against shapes-oracle --prompts FILE --plot curve.png

    Plain samples of each prompt are scored at every level, by their clean estimates, and in the end. The curve is the rank
    correlation of the two over the samples of one prompt, averaged over prompts: where it is high, branching and pruning
    pay. "gain kept" is the share of best-of-n's gain that choosing at that level would keep. It costs the evaluations of
    the plain samples alone. Intervals resample prompts and samples.
    """
    from tsdiff.bench.plots import check_plot
    from tsdiff.bench.predict import curve_plan, measure

    if prompt and prompt_file is not None:
        raise UsageError("prompts were given both one by one and as a file with --prompts; use one of them")
    if plot is not None:
        check_plot(plot)
    prompts = list(prompt) or (None if prompt_file is None else read_prompts(prompt_file))
    plan = curve_plan(model, prompts, levels=levels or 0, **options)
    if not quiet:
        for line in dict.fromkeys((*plan.model.notices, *plan.notices)):
            say("", line)
        say("", f"{plural(len(plan.conditions), 'prompt')}: {plan.num_runs * plan.cost.upper.nfe:,} NFE, {plan.num_runs * plan.cost.upper.decodes:,} decodes in all")
    with progress(quiet=quiet, loading=f"loading {plan.model.name}") as callback:
        curve = measure(plan, confidence=confidence, threshold=threshold, callback=callback)
    for line in () if quiet else curve.notices:
        say("", line)
    report(curve, as_json=as_json)
    if plot is not None:
        curve.plot(plot)
        if not quiet:
            say("", f"the plot is {plot}")
    for label, error in curve.failures:
        say("failed", f"{label!r}: {error}")
    return INCOMPLETE if curve.failures else 0


def report(curve: PredictCurve, *, as_json: bool) -> None:
    """Print a curve on stdout: one JSON object, or a table and what follows from it."""
    if as_json:
        print_json(curve.to_json())
        return
    rows = []
    for point in curve.points:
        interval = point.correlation
        numbers = (None,) * 3 if interval is None else (interval.estimate, interval.low, interval.high)
        rows.append((point.level, _number(point.noise), point.nfe, *(_share(one) for one in (*numbers, point.kendall, point.kept)), point.prompts))
    print_table(_COLUMNS, rows, numeric=_COLUMNS)
    final = "" if curve.against == curve.verifier else f" against the final {curve.against}"
    where = "on no level on the way"
    if curve.branch_level is not None:
        where = f"from level {curve.branch_level} of {curve.levels[-1]}"
    print_facts({
        "verifier": f"{curve.verifier}{final}",
        "branching pays": f"{where} (lower bound above {curve.threshold:g})",
        "NFE": f"{curve.nfe:,} for {plural(len(curve.prompts), 'prompt')} x {curve.finals.shape[1]} samples",
        "decodes": f"{curve.decodes:,}",
        "verifier calls": f"{curve.verifier_calls:,}",
    })


def _share(value: float | None) -> str | None:
    return None if value is None else f"{value:.3f}"


def _number(value: float | None) -> str | None:
    return "inf" if value is None else number(value)
