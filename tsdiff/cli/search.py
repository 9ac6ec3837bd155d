"""`tsdiff search`: run a search, show the best image and what it cost."""

from __future__ import annotations

import traceback
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tsdiff.cli.announce import of_search, say_where_to_answer
from tsdiff.cli.app import FAILED, INCOMPLETE
from tsdiff.cli.errands import do_what_waits
from tsdiff.cli.folders import try_writing
from tsdiff.cli.interrupt import first_finishes_the_batch
from tsdiff.cli.options import Sectioned, SectionedOption, make_plan, search_options
from tsdiff.cli.output import number, one_line, plural, print_facts, print_json, print_table, say
from tsdiff.cli.progress import progress
from tsdiff.treesearch.errors import UsageError

if TYPE_CHECKING:
    from tsdiff.treesearch.basepool import Calibrated
    from tsdiff.treesearch.forest import Forest
    from tsdiff.treesearch.results import Result, Results

_TABLE = ("prompt", "seed", "score", "baseline", "NFE", "rows", "calls", "seconds", "")
PROMPT_WIDTH = 40


@click.command("search", cls=Sectioned)
@search_options
@click.option("--fresh/--no-fresh", cls=SectionedOption, section="Output", help="Begin anew even where the same search was interrupted in --out; it is continued otherwise.")
@click.pass_context
def command(ctx: click.Context, /, **params: Any) -> int:
    """Search for the best sample of each prompt.

    \b
    Try:
      tsdiff search --policy beam
      tsdiff search "a red cube on a blue sphere" --model FOLDER --verifier sharpness --nfe 400

    Without model, prompt and verifier it shows a demonstration on the built-in model `shapes`.
    """
    fresh = params.pop("fresh")
    plan = make_plan(ctx)
    _check_writable(params["out"])
    from tsdiff.treesearch.arguments import CHANGEABLE
    from tsdiff.treesearch.durable import being_written, unfinished
    from tsdiff.treesearch.resume import planned
    from tsdiff.treesearch.search import execute

    def begun(folder: Path) -> None:
        ctx.obj.kept = str(folder)
        if not params["quiet"]:
            say_where_to_answer(plan, folder)

    into = None if fresh else unfinished(plan)
    with ExitStack() as stack:
        if into is not None:
            lasting = {name: value for name, value in plan.arguments.items() if name in CHANGEABLE}
            plan, _ = stack.enter_context(planned(into, **lasting))
            begun(into)
        elif not params["quiet"] and (other := being_written(plan)) is not None:
            say("", f"{other[0]} is the same search, which {other[1]} is doing now; this is another one")
        if not params["quiet"]:
            again = "" if into is None else f"continuing {into}, which was interrupted (--fresh begins anew): "
            say("", f"{again}{of_search(plan)}")
        callback = stack.enter_context(progress(quiet=params["quiet"], loading=f"loading {plan.model.name}"))
        stop = stack.enter_context(first_finishes_the_batch())
        results = execute(plan, callback=callback, stop=stop, begun=begun, into=into)
    if ctx.obj.debug:
        for failure in results.failures:
            traceback.print_exception(failure.error)
    exit_status = report(results, as_json=params["as_json"], quiet=params["quiet"])
    if results.path is not None:
        do_what_waits(results.path, quiet=params["quiet"], state=ctx.obj)
    return exit_status


def report(results: Results, *, as_json: bool, quiet: bool = False) -> int:
    """Print every result on stdout, every failure and early stop on stderr; return the exit status."""
    finished = list(results)
    if as_json:
        for result in finished:
            print_json(result.to_json())
        for failure in results.failures:
            blank = dict.fromkeys(("image", "score", "first_score", "nfe", "rows", "seconds", "run"))
            print_json({"prompt": failure.prompt, "seed": failure.seed, **blank, "complete": False, "error": failure.message})
    elif len(finished) == 1:
        print_facts(_facts(finished[0]))
    elif finished:
        print_table(_TABLE, [_row(result) for result in finished], numeric=_TABLE[1:-1])
    for line in () if quiet else results.notices:
        say("", line)
    for failure in results.failures:
        say("failed", f"{one_prompt(failure.prompt)}, seed {failure.seed}: {failure.message}")
    for result in finished:
        if result.truncated is not None and not quiet:
            say("", f"{one_prompt(result.prompt)}, seed {result.seed}, was stopped early: {result.truncated}")
    if results.forest is not None and not quiet:
        say("", sharing(results.forest))
    unfinished = sum(not result.complete for result in finished)
    if unfinished:
        say("warning", f"{plural(unfinished, 'run')} incomplete: the answer or its baseline has no score; tree.json in the run's folder says why")
    if not finished:
        return FAILED
    return INCOMPLETE if results.failures or unfinished else 0


def sharing(forest: Forest) -> str:
    """One line: what all searches spent together, and how many reached the target."""
    spent = f"{forest.spent:,} of {forest.budget.limit:,} NFE spent by all searches together"
    target = "" if forest.target is None else f"; {forest.reached} of {len(forest.trees)} reached the target {number(forest.target)}"
    early = "" if forest.truncated is None else f"; {forest.allocator.name} was stopped early: {forest.truncated}"
    return f"{spent}{target}{early}"


def one_prompt(prompt: str) -> str:
    """A prompt in quotes, cut where it is long."""
    text = " ".join(prompt.split())
    return repr(text if len(text) <= PROMPT_WIDTH else f"{text[: PROMPT_WIDTH - 1]}…")


def _where(result: Result) -> str:
    if result.image_path is not None:
        return str(result.image_path)
    return "-" if result.path is None else str(result.path)


def _calls(result: Result) -> int:
    return sum(result.ledger.verifier_calls.values())


def _row(result: Result) -> tuple[object, ...]:
    prompt = result.prompt if len(result.prompt) <= PROMPT_WIDTH else f"{result.prompt[: PROMPT_WIDTH - 1]}…"
    scores = (number(result.score), number(result.first_score))
    return (prompt, result.seed, *scores, result.ledger.nfe, result.ledger.rows, _calls(result), f"{result.seconds:.1f}", _where(result))


def _facts(result: Result) -> dict[str, object]:
    """What is printed about a single run."""
    score = number(result.score) or "none: scoring failed"
    if result.relative and result.score is not None:
        score += " (relative to this search's samples)"
    if result.score is not None and result.first_score is not None:
        score += f" (baseline {number(result.first_score)}, {result.score - result.first_score:+.4g})"
    also = "" if result.baseline_ledger is None else f" + {result.baseline_ledger.nfe:,} for the baseline"
    rows = "" if result.baseline_ledger is None else f" + {result.baseline_ledger.rows:,} for the baseline"
    return {
        "video": result.video_path,
        "image": result.image_path,
        "score": score,
        **{f"- {one_line(name)}": _part(*numbers) for name, numbers in result.parts.items()},
        **{one_line(name): _other(*numbers) for name, numbers in result.others.items()},
        "NFE": f"{result.ledger.nfe:,}{also}",
        "rows": f"{result.ledger.rows:,}{rows}",
        "verifier calls": f"{_calls(result):,}",
        "calibration": "; ".join(map(_calibration, result.calibrated)) or None,
        "seconds": f"{result.seconds:.1f}",
        "run": result.path,
    }


def _part(part: float, plain: float | None) -> str:
    return f"{number(part)}{'' if plain is None else f' (baseline {number(plain)})'}"


def _other(score: float | None, plain: float | None) -> str:
    return "none: scoring failed" if score is None else _part(score, plain)


def _calibration(one: Calibrated) -> str:
    """Where the plain samples' scores came from, and what they cost."""
    made = f"{one.ledger.nfe:,} NFE for {one.samples} plain samples" if one.made else f"{one.samples} plain samples"
    return f"{made}, {f'in {one.path}' if one.path is not None else f'not kept: {one.reason}'}"


def _check_writable(out: Path) -> None:
    """Fail now rather than after the search. Raises UsageError."""
    try:
        try_writing(out)
    except OSError as error:
        raise UsageError(f"--out {out} cannot be written ({error.strerror}); choose another folder") from error
