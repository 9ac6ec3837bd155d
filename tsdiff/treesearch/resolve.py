"""From what a caller typed to the objects it names: policies and verifiers."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

from tsdiff.treesearch import registry
from tsdiff.treesearch.errors import UsageError
from tsdiff.treesearch.parameters import build
from tsdiff.treesearch.protocols import FINAL, Allocator, PendingVerifier, Policy, Setting, Verifier
from tsdiff.treesearch.references import VerifierLike, resolve_verifier

Verifiers = VerifierLike | Sequence[VerifierLike] | Mapping[str, VerifierLike]

_WITH_ROLE = re.compile(r"([A-Za-z][\w-]*)=(.+)")  # options come after a colon, so "name:key=value" has no role


def resolve_policy(policy: str | Policy | Allocator, options: Mapping[str, Any]) -> tuple[Policy | Allocator, bool]:
    """The policy or allocator, and whether its size was left open (so that a budget may choose it).

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
    made: Any = cls.from_options(options) if hasattr(cls, "from_options") else build(cls, options)
    return made, not any(name in options for name in getattr(made, "size_parameters", ()))


def resolve_verifiers(
    verifiers: Verifiers, policy: Policy | Allocator, ensemble: str | None = None
) -> tuple[tuple[Verifier, ...], dict[str, Verifier]]:
    """Verifiers with different names, the one that steers first; and the one in each role that the policy knows.

    A verifier with the role "final" steers, without one the first that has no role. It also takes the roles that nobody
    was given. One reference may have several roles. By the rule `ensemble`, those without a role become one verifier.

    Raises:
      UsageError: for what cannot be resolved or used, and for a role that the policy does not know.
    """
    entries: list[tuple[str, VerifierLike, Verifier]] = []
    for role, one in _with_roles(verifiers):
        same = [made for other, reference, made in entries if (role or other) and _same(reference, one)]
        entries.append((role, one, same[0] if same else resolve_verifier(one)))
    if ensemble is not None:
        entries = _together([entry for entry in entries if not entry[0]], ensemble) + [entry for entry in entries if entry[0]]
    given = {role: made for role, _, made in entries if role}
    _check_roles([role for role, _, _ in entries if role], policy)
    steering = given[FINAL] if FINAL in given else next((made for role, _, made in entries if not role), None)
    if steering is None:
        raise UsageError(f"verifiers were given for {', '.join(given)} but none for {FINAL}, which steers the answer; add {FINAL}=NAME")
    resolved = tuple({id(made): made for made in (steering, *(made for _, _, made in entries))}.values())
    names = [one.name for one in resolved]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise UsageError(f"verifier {twice[0]!r} is given twice; scores are kept by name, so name each once")
    mute = [one.name for one in resolved if one.latency == "pending" and not isinstance(one, PendingVerifier)]
    if mute:
        raise UsageError(f"verifier {mute[0]!r} says that its latency is pending but has no method `ask`")
    late = [one.name for one in resolved[1:] if one.scope == "set" and all(one is not judge for judge in given.values())]
    if late:
        raise UsageError(f"verifier {late[0]!r} scores whole sets and can only steer; name it first")
    return resolved, {role: given.get(role, steering) for role in roles_of(policy)}


def _together(entries: Sequence[tuple[str, VerifierLike, Verifier]], rule: str) -> list[tuple[str, VerifierLike, Verifier]]:
    """The verifiers without a role as one, by the rule of an ensemble."""
    if len(entries) < 2:
        raise UsageError(f"ensemble={rule!r} makes one verifier of several, but {len(entries)} were given without a role; give at least two")
    whole: Verifier = registry.verifiers.load("ensemble")(members=tuple(made for _, _, made in entries), rule=rule)
    return [("", whole, whole)]


def roles_of(policy: Policy | Allocator) -> tuple[str, ...]:
    """The verifier roles that a policy knows: "final", and those of its own attribute `roles`, if it has one."""
    return tuple(dict.fromkeys((FINAL, *getattr(policy, "roles", ()))))


def roles_in(verifiers: Verifiers) -> tuple[str, ...]:
    """The roles that verifiers were given for."""
    return tuple(dict.fromkeys(role for role, _ in _with_roles(verifiers) if role))


def _with_roles(verifiers: Verifiers) -> list[tuple[str, VerifierLike]]:
    """(role, verifier) pairs, the role "" where there is none; texts may say "role=reference"."""
    if isinstance(verifiers, Mapping):
        return list(verifiers.items())
    pairs: list[tuple[str, VerifierLike]] = []
    for one in verifiers if isinstance(verifiers, (list, tuple)) else (verifiers,):
        match = _WITH_ROLE.fullmatch(one) if isinstance(one, str) else None
        pairs.append(("", one) if match is None else (match[1], match[2]))
    return pairs


def _same(left: VerifierLike, right: VerifierLike) -> bool:
    return left is right or (isinstance(left, str) and isinstance(right, str) and left == right)


def _check_roles(given: Sequence[str], policy: Policy | Allocator) -> None:
    known = roles_of(policy)
    for role in given:
        if role not in known:
            raise UsageError(f"policy {policy.name} has no verifier role {role!r}; its roles are: {', '.join(known)}")
        if given.count(role) > 1:
            raise UsageError(f"two verifiers were given for the role {role!r}; a role has one")


def check_needs(policy: Policy | Allocator, setting: Setting, solvers: Sequence[str]) -> None:
    """Refuse a policy that cannot work with a solver, schedule or verifier.

    Raises:
      UsageError: naming both and what to change.
    """
    if "stochastic" in policy.needs and not setting.solver.stochastic:
        otherwise = ", or branch_by=renoise" if hasattr(getattr(policy, "policy", policy), "branch_by") else ""
        raise UsageError(
            f"policy {policy.name} as configured branches by stochastic steps, but solver {setting.solver} is deterministic; "
            f"choose a stochastic one (this model has {', '.join(solvers)}; ddim takes --eta){otherwise}"
        )
    if "flow" in policy.needs and setting.schedule.kind != "flow":
        raise UsageError(f"policy {policy.name} needs a flow model, but solver {setting.solver} is of kind {setting.schedule.kind!r}")
    relative = [judge.name for judge in (setting.verifier, *setting.roles.values()) if judge.scope == "set"]
    if "absolute" in policy.needs and relative:
        raise UsageError(
            f"policy {policy.name} compares scores across sets, but verifier {relative[0]} scores relative to each set; choose a verifier of scope 'row'"
        )
    unsupported = policy.needs - {"stochastic", "flow", "absolute"}
    if unsupported:
        raise UsageError(f"policy {policy.name} needs {', '.join(sorted(unsupported))}, which this engine does not offer")
