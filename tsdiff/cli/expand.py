"""`tsdiff expand`: grow a saved tree from one of its nodes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tsdiff.cli import values
from tsdiff.cli.announce import of_expansion, say_where_to_answer
from tsdiff.cli.app import FAILED, INCOMPLETE
from tsdiff.cli.errands import do_what_waits
from tsdiff.cli.interrupt import first_finishes_the_batch
from tsdiff.cli.options import Sectioned, SectionedOption, debug_option, json_option, split_policy_options
from tsdiff.cli.output import number, one_line, print_facts, print_json, say
from tsdiff.cli.progress import progress
from tsdiff.treesearch.errors import SearchFailed

if TYPE_CHECKING:
    from tsdiff.treesearch.expansion import Asked
    from tsdiff.treesearch.results import Result

_HOW, _SEARCH = "How to grow", "The search from there"


@click.command("expand", cls=Sectioned)
@click.argument("run", type=click.Path(path_type=Path))
@click.argument("node", default="best", required=False)
@click.option("--children", cls=SectionedOption, section=_HOW, type=click.IntRange(min=1), metavar="N", help="Copies to re-noise and denoise to the end.  [default: 8, or what --nfe pays for]")
@click.option("--renoise", cls=SectionedOption, section=_HOW, type=click.FloatRange(0.0, 1.0), metavar="SHARE", help="How far to go back, as a share of the node's own way from noise, in levels: 0 stays at its level, 1 goes back to pure noise.  [default: 0.5]")
@click.option("--to-level", cls=SectionedOption, section=_HOW, type=click.IntRange(min=0), metavar="LEVEL", help="The level to go back to, instead of --renoise.")
@click.option("--policy", cls=SectionedOption, section=_SEARCH, metavar="NAME", help="A name of `tsdiff list policies`, which searches from there as it does from noise.  [default: none, plain children]")
@click.option("-P", "--policy-option", "policy_options", cls=SectionedOption, section=_SEARCH, multiple=True, metavar="KEY=VALUE", help="A parameter of the policy, see `tsdiff describe POLICY`; repeatable.")
@click.option("--nfe", cls=SectionedOption, section=_SEARCH, type=click.IntRange(min=1), metavar="N", help="Network evaluations that the expansion may spend.")
@click.option("--verifier", "verifiers", cls=SectionedOption, section=_SEARCH, multiple=True, metavar="[ROLE=]NAME", help="What steers it, as for `tsdiff search`; the run's own by default, which judge what is finished in any case.")
@click.option("--seconds", cls=SectionedOption, section=_SEARCH, type=click.FloatRange(min=0.0, min_open=True), metavar="S", help="Start nothing new after this time.")
@click.option("--max-batch", cls=SectionedOption, section=_SEARCH, type=click.IntRange(min=1), metavar="ROWS", help="Rows in one network call at most.")
@click.option("--memory-limit", cls=SectionedOption, section=_SEARCH, type=values.BYTES, metavar="SIZE", help="Host memory for latents, e.g. 2GB; the rest goes to disk.")
@json_option
@click.option("--quiet/--no-quiet", help="No narration, no progress.")
@debug_option
@click.pass_context
def command(ctx: click.Context, /, run: Path, node: str, as_json: bool, quiet: bool, seconds: float | None, max_batch: int | None, memory_limit: int | None, **how: Any) -> int:
    """Grow a saved tree from one of its nodes, into the same run.

    RUN is the folder of a run that is done, NODE the index of a node in its tree.json, or `best`, the answer. Copies of
    the node are re-noised, denoised to the end and scored; with --policy, a policy searches from there. The run's answer
    is then the best of all. Each expansion has noises of its own; an interrupted one goes on with `tsdiff resume RUN`, or
    when it is asked for again.

    \b
    Try:
      tsdiff expand runs/run-0001 best --children 8 --renoise 0.5
      tsdiff expand runs/run-0001 12 --policy beam --nfe 200
    """
    from tsdiff.treesearch.expansion import Asked

    options = split_policy_options(how.pop("policy_options"))
    asked = Asked(int(node) if node.isdecimal() else node, policy_options=options, **{**how, "verifiers": list(how["verifiers"])})
    exit_status = grow(ctx, run, asked, quiet=quiet, as_json=as_json, seconds=seconds, max_batch=max_batch, memory_limit=memory_limit)
    do_what_waits(run, quiet=quiet, state=ctx.obj)
    return exit_status


def grow(ctx: click.Context, folder: Path, asked: Asked | None, *, quiet: bool, as_json: bool, **given: Any) -> int:
    """Carry out an expansion, or with None go on with the one that was interrupted; show what came of it."""
    from tsdiff.treesearch.expand import carry_out
    from tsdiff.treesearch.expansion import planned_expansion

    with planned_expansion(folder, asked, **given) as expansion:
        if not quiet:
            say("", f"{'continuing the expansion of' if expansion.begun else 'expanding'} {folder} {of_expansion(expansion)}")
            for line in expansion.notices:
                say("warning", line)
            say_where_to_answer(expansion.plan, folder)
        ctx.obj.kept = str(folder)
        with progress(quiet=quiet, loading=f"loading {expansion.plan.model.name}") as callback, first_finishes_the_batch() as stop:
            try:
                result = carry_out(expansion, callback=callback, stop=stop, notify=(lambda line: None) if quiet else (lambda line: say("warning", line)))
            except SearchFailed as failure:
                say("failed", f"the expansion of node {expansion.node.index}: {failure}")
                return FAILED
    if as_json:
        print_json(result.to_json() | {"driver": result.drivers[-1]})
    else:
        print_facts(facts(result))
    driver = result.drivers[-1]
    if driver["truncated"] is not None and not quiet:
        say("", f"it was stopped early: {driver['truncated']}")
    if driver["score"] is None:
        say("warning", "the expansion is incomplete: its best sample has no score; tree.json in the run's folder says why")
    return INCOMPLETE if driver["score"] is None else 0


def facts(result: Result) -> dict[str, object]:
    """What is printed about an expanded run."""
    driver = result.drivers[-1]
    before = max((one["score"] for one in result.drivers[:-1] if one["score"] is not None), default=None)
    score = number(result.score) or "none: scoring failed"
    if result.relative:
        score += " (relative to this search's samples)"
    elif before is not None and result.score is not None:
        score += f" (before {number(before)}, {result.score - before:+.4g})"
    found = "none" if driver["best"] is None else f"node {driver['best']}" + ("" if driver["score"] is None else f", {number(driver['score'])}")
    return {
        "video": result.video_path,
        "image": result.image_path,
        "score": score,
        "answer": f"node {result.node.index}",
        "best of these": found,
        **{f"- {one_line(name)}": number(part) for name, (part, _) in result.parts.items()},
        "NFE": f"{driver['nfe']:,} ({result.ledger.nfe:,} with all before)",
        "rows": f"{driver['rows']:,} ({result.ledger.rows:,} with all before)",
        "verifier calls": f"{sum(driver['verifier_calls'].values()):,} ({sum(result.ledger.verifier_calls.values()):,} with all before)",
        "seconds": f"{driver['seconds']:.1f}",
        "run": result.path,
    }
