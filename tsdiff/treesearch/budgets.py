"""What may be spent, checked: the budgets of searches, the target that ends them, and the limits of the machine."""

from __future__ import annotations

import dataclasses
import math
from numbers import Real

from tsdiff.treesearch.asked import at_least, whole
from tsdiff.treesearch.engine import Limits
from tsdiff.treesearch.errors import UsageError
from tsdiff.treesearch.ledger import Cost, Spend
from tsdiff.treesearch.protocols import Allocator, Policy, Setting, Verifier


def budgets_of(policy: Policy | Allocator, nfe: int | None, total_nfe: int | None, runs: int, setting: Setting) -> tuple[int | None, int | None]:
    """The budget of each search, and that of all together: an allocator shares it out, other policies have equal parts of it."""
    least = setting.sample_cost
    sample = f"one sample with {setting.solver} and {setting.schedule.last} steps costs {least}"
    if total_nfe is not None:
        total_nfe = whole("total_nfe", total_nfe)
        if nfe is not None:
            raise UsageError(f"nfe={nfe} and total_nfe={total_nfe} were both given; nfe is the budget of each search, total_nfe that of all together: give one")
        several = f" and there are {runs} searches" if runs > 1 else ""
        if total_nfe < runs * least:
            raise UsageError(f"total_nfe is {total_nfe} but {sample}{several}; the smallest total is {runs * least}")
        return (None if isinstance(policy, Allocator) else total_nfe // runs), total_nfe
    if isinstance(policy, Allocator):
        same = "" if nfe is None else f"; nfe={nfe} for each of {runs} is total_nfe={nfe * runs}"
        raise UsageError(f"policy {policy.name} shares one budget among all searches; give it as total_nfe (--total-nfe), at least {runs * least}{same}")
    if nfe is not None:
        nfe = whole("nfe", nfe)
        if nfe < least:
            raise UsageError(f"nfe is {nfe} but {sample}; the smallest budget is {least}")
    return nfe, None


def fitted(policy: Policy, nfe: int, total_nfe: int | None, runs: int, setting: Setting) -> Policy:
    """A policy as large as one search's budget allows."""
    try:
        return policy.fit(nfe, setting)
    except UsageError as error:
        if total_nfe is None:
            raise
        raise UsageError(f"{error} (total_nfe={total_nfe} is {nfe} for each of {runs} searches)") from None


def capped(cost: Cost, nfe: int | None, setting: Setting) -> Cost:
    """A policy's cost under a budget: what exceeds it ends with the engine finishing one sample."""
    if nfe is None or cost.upper.nfe <= nfe:
        return cost
    lower = cost.lower if cost.lower.nfe <= nfe else Spend(nfe=setting.sample_cost) + setting.scoring(1, final=True)
    return Cost(lower, dataclasses.replace(cost.upper, nfe=nfe))


def check_target(policy: Policy | Allocator, target: float | None, verifier: Verifier) -> None:
    """Raise UsageError for a target that no score can reach, or that the policy does not stop at."""
    if target is None:
        return
    if verifier.scope == "set":
        raise UsageError(f"a target was given, but verifier {verifier.name} scores relative to each set, so that no number is good enough; choose a verifier of scope 'row'")
    if not isinstance(target, Real) or not math.isfinite(target):
        raise UsageError(f"target is {target!r} but must be a finite number, a score that is good enough")
    if not isinstance(policy, Allocator):
        raise UsageError(f"a target was given, but policy {policy.name} spends its budget whatever it finds; policies that share one budget stop there, e.g. adaptive with total_nfe")


def limits_of(deterministic: bool, max_batch: int | None, memory_limit: int | None, seconds: float | None) -> Limits:
    """Rows a call and bytes of latents; in deterministic mode the row counts are fixed, and fewer only if asked."""
    if seconds is not None and not (isinstance(seconds, Real) and seconds > 0):
        raise UsageError(f"seconds is {seconds!r} but must be a number above 0")
    usual = Limits(deterministic)
    most = None if max_batch is None else at_least("max_batch", max_batch, 1)
    size = usual.host_bytes if memory_limit is None else at_least("memory_limit", memory_limit, 1)

    def at_most(rows: int | None) -> int | None:
        return most if rows is None else rows if most is None else min(rows, most)

    return dataclasses.replace(
        usual,
        network=at_most(usual.network),
        decode=at_most(usual.decode) or usual.decode,
        verify=at_most(usual.verify) or usual.verify,
        host_bytes=size,
        device_bytes=size,
        seconds=seconds,
    )
