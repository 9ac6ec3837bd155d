"""What is about to be done and what it costs, in one line, before it begins."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from tsdiff.cli.output import plural, say
from tsdiff.treesearch.protocols import Allocator

if TYPE_CHECKING:
    from tsdiff.treesearch.expansion import Expansion
    from tsdiff.treesearch.plan import Plan


def of_search(plan: Plan) -> str:
    """One line: what is searched and what it costs."""
    shared = isinstance(plan.policy, Allocator)
    budget = f"{plan.total_nfe:,} NFE together, {nfe_text(plan)} each" if shared else f"{nfe_text(plan)} each"
    what = f"{plural(len(plan.conditions), 'prompt')} x {plural(len(plan.seeds), 'seed')}, {plan.policy.name}: {budget}"
    baseline = "" if plan.baseline_cost is None else f" + {plan.baseline_cost.nfe:,} for the baseline"
    bound = "" if plan.cost.exact and not shared else "at most "
    return f"{what}{baseline}; {bound}{plural(plan.rows_upper, 'network row')} in all"


def of_expansion(expansion: Expansion) -> str:
    """What is grown from where, and what it costs."""
    node, to, cost = expansion.node, expansion.launch.level, expansion.cost
    where = f"from node {node.index} (level {node.level} of {expansion.plan.schedule.last})"
    back = "as it is" if to == node.level else f"re-noised to level {to}"
    what = f"{plural(expansion.policy.count, 'child') if expansion.policy.count == 1 else f'{expansion.policy.count:,} children'}" if hasattr(expansion.policy, "count") else expansion.policy.name
    low, high = cost.lower.nfe, cost.upper.nfe
    nfe = f"{high:,} NFE" if low == high else f"{low:,} to {high:,} NFE"
    again = f", {plural(len(expansion.lost), 'latent')} to be computed again among them" if expansion.lost else ""
    return f"{where}, {back}: {what}, {nfe}{again}; {'' if cost.exact else 'at most '}{plural(expansion.rows_upper, 'network row')} in all"


def nfe_text(plan: Plan) -> str:
    """ "320 NFE" or "320 to 400 NFE"; under a budget, "399 of 400 NFE" says how far it is filled."""
    low, high = plan.cost.lower.nfe, plan.cost.upper.nfe
    budget = "" if plan.nfe is None else f" of {plan.nfe:,}"
    return f"{high:,}{budget} NFE" if low == high else f"{low:,} to {high:,}{budget} NFE"


def say_where_to_answer(plan: Plan, folder: Path) -> None:
    """Where a verifier asks a person in the page, one line."""
    if any("pages" in judge.needs for judge in plan.verifiers):
        say("", f"questions wait for their answers in the page: tsdiff view {shlex.quote(str(folder))}")
