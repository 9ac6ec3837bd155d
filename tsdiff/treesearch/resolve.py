"""From what a caller typed to the objects it names: policies and verifiers."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tsdiff.treesearch import registry
from tsdiff.treesearch.callables import CallableVerifier
from tsdiff.treesearch.errors import UsageError
from tsdiff.treesearch.parameters import build
from tsdiff.treesearch.protocols import PendingVerifier, Policy, Setting, Verifier

VerifierLike = str | Verifier | Callable[..., Any]


def resolve_policy(policy: str | Policy, options: Mapping[str, Any]) -> tuple[Policy, bool]:
    """The policy, and whether its size was left open (so that a budget may choose it).

    Raises:
      UsageError: for an unknown name or parameter, or options beside a policy object.
    """
    if not isinstance(policy, str):
        if options:
            raise UsageError(f"policy options {', '.join(options)} were given beside a policy object; set them on the object")
        return policy, False
    cls: Any = registry.policies.load(policy)
    if not (isinstance(cls, type) and dataclasses.is_dataclass(cls)):
        raise UsageError(f"policy {policy!r} is {cls!r} but a policy is a dataclass of hyperparameters")
    made: Any = build(cls, options)
    return made, not any(name in options for name in made.size_parameters)


def resolve_verifier(verifier: VerifierLike) -> Verifier:
    """A verifier from "name", "name:key=value,...", "name:anything" (where it takes that), an object or a callable.

    Raises:
      UsageError: for an unknown name or parameter.
    """
    if isinstance(verifier, str):
        name, rest = registry.split_reference(verifier)
        factory: Any = registry.verifiers.load(name)
        if hasattr(factory, "from_reference"):
            made: Verifier = factory.from_reference(rest)
            return made
        options = registry.split_options(rest)
        if isinstance(factory, type) and dataclasses.is_dataclass(factory):
            built: Any = build(factory, options)
            return built  # type: ignore[no-any-return]
        try:
            inspect.signature(factory).bind(**options)
        except TypeError as error:
            raise UsageError(f"verifier {verifier!r}: {error}") from None
        made = factory(**options)
        return made
    if hasattr(verifier, "score") and hasattr(verifier, "needs"):
        return verifier  # type: ignore[return-value]
    if callable(verifier):
        return CallableVerifier(verifier)
    raise UsageError(f"verifier {verifier!r} is neither a name, nor a verifier, nor a function (images, prompts) -> scores")


def resolve_verifiers(verifiers: VerifierLike | Sequence[VerifierLike]) -> tuple[Verifier, ...]:
    """Several verifiers with different names; the first steers."""
    several = verifiers if isinstance(verifiers, (list, tuple)) else (verifiers,)
    resolved = tuple(resolve_verifier(one) for one in several)
    names = [one.name for one in resolved]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise UsageError(f"verifier {twice[0]!r} is given twice; scores are kept by name, so name each once")
    mute = [one.name for one in resolved if one.latency == "pending" and not isinstance(one, PendingVerifier)]
    if mute:
        raise UsageError(f"verifier {mute[0]!r} says that its latency is pending but has no method `ask`")
    late = [one.name for one in resolved[1:] if one.scope == "set"]
    if late:
        raise UsageError(f"verifier {late[0]!r} scores whole sets and can only steer; name it first")
    return resolved


def check_needs(policy: Policy, setting: Setting, solvers: Sequence[str]) -> None:
    """Refuse a policy that cannot work with a solver, schedule or verifier.

    Raises:
      UsageError: naming both and what to change.
    """
    if "stochastic" in policy.needs and not setting.solver.stochastic:
        raise UsageError(
            f"policy {policy.name} as configured branches by stochastic steps, but solver {setting.solver} is deterministic; "
            f"choose a stochastic one (this model has {', '.join(solvers)}; ddim takes --eta) or branch by re-noising"
        )
    if "flow" in policy.needs and setting.schedule.kind != "flow":
        raise UsageError(f"policy {policy.name} needs a flow model, but solver {setting.solver} is of kind {setting.schedule.kind!r}")
    if "absolute" in policy.needs and setting.verifier.scope == "set":
        raise UsageError(
            f"policy {policy.name} compares scores across sets, but verifier {setting.verifier.name} scores relative to each set; choose a verifier of scope 'row'"
        )
    unsupported = policy.needs - {"stochastic", "flow", "absolute"}
    if unsupported:
        raise UsageError(f"policy {policy.name} needs {', '.join(sorted(unsupported))}, which this engine does not offer")
