"""Everything that a plug-in needs, in one import: what to yield, what to return, what to register.

A policy is a frozen dataclass with a generator:

    from dataclasses import dataclass
    from tsdiff.plugin import Cost, Denoise, Draw, Score, Spend, check, parameter, register_policy

    @register_policy
    @dataclass(frozen=True, kw_only=True)
    class First:
        name = "first"
        size_parameters = ()
        needs = frozenset()

        def search(self, tree):
            roots = yield Draw()
            leaves = yield Denoise(roots, to=tree.schedule.last)
            yield Score(leaves)
            return tree.best()

        def cost(self, setting):
            return Cost.exactly(Spend(nfe=setting.sample_cost) + setting.scoring(1, final=True) + setting.result())

        def fit(self, nfe, setting):
            return self

`register_...` makes a name known to the running process. An installed package does without: its entry points in the
groups `tsdiff.policies`, `tsdiff.verifiers`, `tsdiff.models` and `tsdiff.suites` are found by themselves.
`tsdiff.plugin.conformance` holds the tests that every policy and verifier should pass. Importing this imports no torch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, overload

from tsdiff.treesearch.callables import CallableVerifier
from tsdiff.treesearch.errors import BudgetExhausted, SearchFailed, SetupError, TsdiffError, UsageError, unknown_name
from tsdiff.treesearch.ledger import Budget, Cost, Spend
from tsdiff.treesearch.node import Json, Move, Node, Value
from tsdiff.treesearch.noise import Fresh, Mix, Recipe, Rotate, Slerp
from tsdiff.treesearch.parameters import build, check, parameter
from tsdiff.treesearch.protocols import (
    FINAL,
    PROTOCOL_VERSION,
    Allocation,
    Allocator,
    Candidates,
    CompiledModel,
    Condition,
    CountableOutline,
    Demo,
    DiffusionModel,
    Encoded,
    EstimateDecoder,
    Flops,
    ForestView,
    Grant,
    Guidance,
    LoadOptions,
    Media,
    ModelOutline,
    Outcome,
    Page,
    PendingVerifier,
    Policy,
    Sampler,
    Scores,
    Search,
    Setting,
    Size,
    StepState,
    ToldOutline,
    TreeView,
    Verifier,
    VideoOutline,
)
from tsdiff.treesearch.registry import Registry, models, policies, reference, suites, verifiers
from tsdiff.treesearch.requests import Denoise, Draw, Gather, Perturb, Release, Renoise, Request, Score, Start
from tsdiff.treesearch.schedule import Schedule, SolverInfo

__all__ = [
    "FINAL",
    "PROTOCOL_VERSION",
    "Allocation",
    "Allocator",
    "Budget",
    "BudgetExhausted",
    "CallableVerifier",
    "Candidates",
    "CompiledModel",
    "Condition",
    "Cost",
    "CountableOutline",
    "Demo",
    "Denoise",
    "DiffusionModel",
    "Draw",
    "Encoded",
    "EstimateDecoder",
    "Flops",
    "ForestView",
    "Fresh",
    "Gather",
    "Grant",
    "Guidance",
    "Json",
    "LoadOptions",
    "Media",
    "Mix",
    "ModelOutline",
    "Move",
    "Node",
    "Outcome",
    "Page",
    "PendingVerifier",
    "Perturb",
    "Policy",
    "Recipe",
    "Release",
    "Renoise",
    "Request",
    "Rotate",
    "Sampler",
    "Schedule",
    "Score",
    "Scores",
    "Search",
    "SearchFailed",
    "Setting",
    "SetupError",
    "Size",
    "Slerp",
    "SolverInfo",
    "Spend",
    "Start",
    "StepState",
    "ToldOutline",
    "TreeView",
    "TsdiffError",
    "UsageError",
    "Value",
    "Verifier",
    "VideoOutline",
    "build",
    "check",
    "parameter",
    "reference",
    "register_model",
    "register_policy",
    "register_suite",
    "register_verifier",
    "unknown_name",
]

C = TypeVar("C")


@overload
def register_policy(component: str) -> Callable[[C], C]: ...
@overload
def register_policy(component: C, name: str | None = None) -> C: ...
def register_policy(component: Any, name: str | None = None) -> Any:
    """Make a policy class known by name for the rest of the process.

    Use it as `@register_policy` (the class's own `name`), as `@register_policy("name")`, or as a call
    `register_policy(cls, "name")`. Returns the class (or a decorator).

    Raises:
      UsageError: if there is no name, or one that the command line cannot take.
    """
    return _register(policies, component, name)


@overload
def register_verifier(component: str) -> Callable[[C], C]: ...
@overload
def register_verifier(component: C, name: str | None = None) -> C: ...
def register_verifier(component: Any, name: str | None = None) -> Any:
    """Make a verifier class known by name; used like `register_policy`."""
    return _register(verifiers, component, name)


@overload
def register_model(component: str) -> Callable[[C], C]: ...
@overload
def register_model(component: C, name: str | None = None) -> C: ...
def register_model(component: Any, name: str | None = None) -> Any:
    """Make a function `(reference, LoadOptions) -> ModelOutline` known by name; used like `register_policy`."""
    return _register(models, component, name)


@overload
def register_suite(component: str) -> Callable[[C], C]: ...
@overload
def register_suite(component: C, name: str | None = None) -> C: ...
def register_suite(component: Any, name: str | None = None) -> Any:
    """Make a prompt suite known by name; used like `register_policy`."""
    return _register(suites, component, name)


def _register(registry: Registry, component: Any, name: str | None) -> Any:
    if isinstance(component, str):
        if name is not None:
            raise UsageError(f"register_{registry.kind}: give the {registry.kind} first and its name second, not {component!r} and {name!r}")
        return lambda decorated: _register(registry, decorated, component)
    own = getattr(component, "name", None) if name is None else name
    if not isinstance(own, str):
        label = getattr(component, "__name__", type(component).__name__)
        raise UsageError(f"{registry.kind} {label} has no name; give it an attribute `name`, or register it as register_{registry.kind}({label}, 'its-name')")
    registry.add(own, component)
    return component
