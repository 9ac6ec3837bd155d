"""How each kind of request is checked, priced and begun. A new kind is a class here and a line in `HANDLERS`.

* `check` raises a UsageError for a request that can never work; it is thrown into the policy.
* `price` adds to a `Quote` exactly what the request will cost, so that a budget is granted whole or refused whole.
* `begin` makes the nodes (in request order, so indices do not depend on the order of work) and queues the work.
"""

from __future__ import annotations

from typing import Any, Protocol

from tsdiff.treesearch.errors import UsageError
from tsdiff.treesearch.forest import Await, AwaitHandler
from tsdiff.treesearch.growth import Growth
from tsdiff.treesearch.moves import DenoiseHandler, DrawHandler, PerturbHandler, RenoiseHandler, StartHandler
from tsdiff.treesearch.quote import Quote
from tsdiff.treesearch.requests import Denoise, Draw, Gather, Perturb, Release, Renoise, Request, Score, Start
from tsdiff.treesearch.restore import Restore, RestoreHandler
from tsdiff.treesearch.run import Group, Run
from tsdiff.treesearch.scoring import ScoreHandler


class Handler(Protocol):
    """What the engine needs to know about a kind of request."""

    def check(self, run: Run, request: Any) -> None: ...
    def price(self, quote: Quote, request: Any) -> None: ...
    def begin(self, growth: Growth, group: Group, request: Any) -> None: ...


class ReleaseHandler:
    """Nodes leave the live set."""

    def check(self, run: Run, request: Release) -> None:
        for node in request.group:
            if not run.owns(node):
                raise UsageError(f"Release: {node!r} belongs to another tree")

    def price(self, quote: Quote, request: Release) -> None:
        quote.release(request.group)

    def begin(self, growth: Growth, group: Group, request: Release) -> None:
        for node in request.group:
            group.run.close(node)


HANDLERS: dict[type[Any], Handler] = {
    Draw: DrawHandler(),
    Start: StartHandler(),
    Denoise: DenoiseHandler(),
    Renoise: RenoiseHandler(),
    Perturb: PerturbHandler(),
    Score: ScoreHandler(),
    Release: ReleaseHandler(),
    Await: AwaitHandler(),  # of the trees of a forest; policies cannot make one
    Restore: RestoreHandler(),  # of later drivers
}


def begin(growth: Growth, run: Run, request: Request, parent: Group | None = None) -> Group:
    """Start the work of a granted request."""
    group = Group(run, request, parent)
    if parent is not None:
        parent.add()
    if isinstance(request, Gather):
        parts = [begin(growth, run, part, group) for part in request.requests]
        group.reply = lambda: tuple(part.reply() for part in parts)
    else:
        HANDLERS[type(request)].begin(growth, group, request)
    group.seal()
    return group
