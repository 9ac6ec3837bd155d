"""`tsdiff plan`: what a search would cost. Same options as `search`; no weights are loaded, nothing is written."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import click

from tsdiff.cli.announce import nfe_text
from tsdiff.cli.options import Sectioned, make_plan, search_options
from tsdiff.cli.output import plural, print_facts, print_json
from tsdiff.cli.search import one_prompt
from tsdiff.treesearch.protocols import CountableOutline, Flops

if TYPE_CHECKING:
    from tsdiff.treesearch.plan import Plan
    from tsdiff.treesearch.protocols import Policy


_UNITS = (("EFLOP", 1e18), ("PFLOP", 1e15), ("TFLOP", 1e12), ("GFLOP", 1e9), ("MFLOP", 1e6))


@click.command("plan", cls=Sectioned)
@search_options
@click.pass_context
def command(ctx: click.Context, /, **params: Any) -> None:
    """Show what a search would cost, without running it.

    \b
    Try:
      tsdiff plan --policy beam --nfe 400

    Takes the options of `tsdiff search`; loads no weights and writes nothing. The cost is exact where the policy's
    cost does not depend on scores, otherwise bounded from both sides.
    """
    plan = make_plan(ctx)
    flops = counted(plan)
    if params["as_json"]:
        print_json(plan.to_json() | ({} if flops is None else {"flops": dataclasses.asdict(flops) | {"upper": flops_upper(plan, flops)}}))
    else:
        print_facts(facts(plan, flops))


def counted(plan: Plan) -> Flops | None:
    """What a network row and a decode compute, where the model can tell it without its weights."""
    return plan.model.flops(plan.size) if isinstance(plan.model, CountableOutline) else None


def flops_upper(plan: Plan, flops: Flops) -> int:
    """Operations of the network and the decoder in everything that is planned, at most; verifiers' own are not known."""
    decodes = plan.num_runs * (plan.cost.upper.decodes + (plan.baseline_cost.decodes if plan.baseline_cost else 0))
    return plan.rows_upper * flops.row + decodes * flops.decode


def facts(plan: Plan, flops: Flops | None = None) -> dict[str, object]:
    """What is printed about a plan."""
    prompts = ", ".join(one_prompt(condition.label) for condition in plan.conditions[:3])
    more = "" if len(plan.conditions) <= 3 else f" and {len(plan.conditions) - 3} more"
    guidance = f"{plan.guidance.scale:g}" if plan.guidance.on else "off"
    exact = "exact" if plan.cost.exact else "bounds: it depends on scores"
    return {
        "model": plan.model.name,
        "prompts": f"{prompts}{more}",
        "seeds": _seeds(plan.seeds),
        "policy": _policy(plan.policy),
        "verifiers": ", ".join(_verifier(plan, verifier.name) for verifier in plan.verifiers),
        "solver": f"{plan.solver}, {plural(plan.schedule.last, 'step')}",
        "guidance": guidance,
        "size": None if plan.size is None else f"{plan.size[0]} x {plan.size[1]} (height x width){''.join(f', {frames} frames' for frames in plan.size[2:])}",
        "runs": f"{plan.num_runs:,}",
        "each run": f"{nfe_text(plan)}, {_range(plan, 'decodes', 'decode')}, {_range(plan, 'verifier_calls', 'verifier call')} ({exact})",
        "together": None if plan.total_nfe is None else _together(plan),
        "baseline": None if plan.baseline_cost is None else f"{plan.baseline_cost.nfe:,} NFE for each run",
        "calibration": None if plan.calibration_cost is None else f"{plan.calibration_cost.nfe:,} NFE once, unless cached",
        "an evaluation": None if flops is None else _evaluation(plan, flops),
        "operations": None if flops is None else f"{_operations(flops_upper(plan, flops))} at most in network and decoder, verifiers not counted",
        "network rows": f"{plan.rows_upper:,} in all{'' if plan.cost.exact and (plan.total_nfe is None or plan.nfe is not None) else ' at most'}",
    }


def _evaluation(plan: Plan, flops: Flops) -> str:
    rows = 2 if plan.guidance.on else 1
    guided = f", {plural(rows, 'row')} of {_operations(flops.row)}" if rows > 1 else ""
    estimates = "" if flops.x0_decode is None else f" (an estimate {_operations(flops.x0_decode)})"
    return f"{_operations(rows * flops.row)}{guided}; a decode {_operations(flops.decode)}{estimates}"


def _operations(number: int) -> str:
    """ "6.76 TFLOP"."""
    unit, size = next(((unit, size) for unit, size in _UNITS if number >= size), _UNITS[-1])
    return f"{number / size:.3g} {unit}"


def _range(plan: Plan, name: str, noun: str) -> str:
    low, high = getattr(plan.cost.lower, name), getattr(plan.cost.upper, name)
    return plural(high, noun) if low == high else f"{low:,} to {plural(high, noun)}"


def _together(plan: Plan) -> str:
    """The budget of all searches, and what it is used for."""
    target = "" if plan.target is None else f", until the score is {plan.target:g}"
    return f"{plan.total_nfe:,} NFE, {'in equal parts' if plan.nfe is not None else f'shared out{target}'}"


def _verifier(plan: Plan, name: str) -> str:
    """The name, and where roles tell verifiers apart, its roles."""
    roles = [role for role, verifier in plan.roles.items() if verifier.name == name]
    return f"{name} ({', '.join(roles)})" if roles and len({id(verifier) for verifier in plan.roles.values()}) > 1 else name


def _seeds(seeds: Any) -> str:
    shown = ", ".join(map(str, seeds[:8]))
    return shown if len(seeds) <= 8 else f"{shown}, ... ({len(seeds):,} in all)"


def _policy(policy: Policy) -> str:
    from tsdiff.treesearch.plan import policy_options

    options = ", ".join(f"{name}={value!r}" for name, value in policy_options(policy).items() if name != "name")
    return f"{policy.name}({options})"
