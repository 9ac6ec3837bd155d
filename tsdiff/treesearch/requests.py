"""What a policy may ask for. Requests are plain values; the engine prices, grants and carries them out.

A reply is complete, in request order and parent-major: with `copies=2`, `[a, b]` gives `[a0, a1, b0, b1]`.
A request on a failed node gives failed nodes (or null values) at no cost.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from tsdiff.treesearch.errors import UsageError
from tsdiff.treesearch.node import Node
from tsdiff.treesearch.noise import Fresh, Recipe


def _nodes(request: object, nodes: Node | Sequence[Node]) -> tuple[Node, ...]:
    group = (nodes,) if isinstance(nodes, Node) else tuple(nodes)
    for node in group:
        if not isinstance(node, Node):
            raise UsageError(f"{type(request).__name__}: {node!r} is not a node of a tree")
    return group


def _whole(request: object, name: str, value: Any) -> int:
    """A level or count as an int; numpy's whole numbers are as good as any."""
    try:
        return operator.index(value)
    except TypeError:
        raise UsageError(f"{type(request).__name__}: {name} is {value!r} but must be a whole number") from None


def _at_least_one(request: object, name: str, value: int) -> None:
    if value < 1:
        raise UsageError(f"{type(request).__name__}: {name} is {value} but must be at least 1")


@dataclass(frozen=True)
class Draw:
    """New roots at level 0 -> list of `count` nodes.

    `noise` is one recipe per root (or one for all); None takes `Fresh(i)` for the i-th root of the tree. Level-0
    perturbation is `Draw` with `Rotate` or `Mix`; crossing two roots is `Draw` with `Slerp`.
    """

    count: int = 1
    noise: Recipe | Sequence[Recipe] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "count", _whole(self, "count", self.count))
        _at_least_one(self, "count", self.count)
        if isinstance(self.noise, Sequence):
            object.__setattr__(self, "noise", tuple(self.noise))
            if len(self.noise) != self.count:
                raise UsageError(f"Draw: {len(self.noise)} noise recipes for {self.count} roots; give one for each, or one for all")


@dataclass(frozen=True)
class Start:
    """New roots from a clean latent, noised by `strength` in (0, 1] -> list of `copies` nodes.

    As in image-to-image, strength 1 starts at level 0 and skips `T - int(T * strength)` levels otherwise.
    `source` is a finished node, or "image" for the search's own initial image.
    """

    source: Node | Literal["image"]
    strength: float
    copies: int = 1

    def __post_init__(self) -> None:
        object.__setattr__(self, "copies", _whole(self, "copies", self.copies))
        _at_least_one(self, "copies", self.copies)
        if not 0.0 < self.strength <= 1.0:
            raise UsageError(f"Start: strength is {self.strength} but must lie in (0, 1]")
        if not isinstance(self.source, Node) and self.source != "image":
            raise UsageError(f"Start: source is {self.source!r} but must be a finished node or 'image'")


@dataclass(frozen=True)
class Denoise:
    """Denoise nodes to a cleaner level -> list of nodes, `copies` for each.

    A span makes one node; the levels in `via` become nodes on the way (the noise is the same with and without them).
    On a deterministic solver a repeated Denoise returns the existing child at no cost. To the node's own level it
    returns the node itself.

    Args:
      nodes: one node or several.
      to: the level to reach; one for all, or one per node.
      num_steps: at most this many steps, evenly spread over the levels between; None takes every level.
      solver: a solver of the schedule's kind instead of the tree's own, e.g. "ddim".
      model: one of the search's other models instead of the main one.
      noise: `Fresh(j)` selects the j-th branch of a node; any other recipe is the noise of a single step.
      copies: children of each node; more than one needs a stochastic solver.
      via: levels between that become nodes too.
    """

    nodes: Node | Sequence[Node]
    to: int | Sequence[int]
    num_steps: int | None = None
    solver: str | None = None
    model: str | None = None
    noise: Recipe | None = None
    copies: int = 1
    via: Sequence[int] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "nodes", _nodes(self, self.nodes))
        object.__setattr__(self, "via", tuple(sorted({_whole(self, "via", level) for level in self.via})))
        if self.num_steps is not None:
            object.__setattr__(self, "num_steps", _whole(self, "num_steps", self.num_steps))
        object.__setattr__(self, "copies", _whole(self, "copies", self.copies))
        _at_least_one(self, "copies", self.copies)
        if isinstance(self.to, Iterable):
            object.__setattr__(self, "to", tuple(_whole(self, "to", level) for level in self.to))
            if len(self.targets) != len(self.group):
                raise UsageError(f"Denoise: {len(self.targets)} target levels for {len(self.group)} nodes; give one for each, or one for all")
        else:
            object.__setattr__(self, "to", _whole(self, "to", self.to))
        if self.noise is not None and self.copies > 1:
            raise UsageError(f"Denoise: copies is {self.copies} but a noise recipe makes one child; ask once for each recipe")
        if isinstance(self.noise, Fresh) and self.noise.index < 0:
            raise UsageError(f"Denoise: branch {self.noise.index} does not exist; branches count from 0")

    @property
    def group(self) -> tuple[Node, ...]:
        """The nodes as a tuple."""
        return self.nodes  # type: ignore[return-value]

    @property
    def targets(self) -> tuple[int, ...]:
        """The level to reach for each node."""
        return (self.to,) * len(self.group) if isinstance(self.to, int) else self.to  # type: ignore[return-value]


@dataclass(frozen=True)
class Renoise:
    """Add noise to go back to a noisier level -> list of nodes, `copies` for each. Costs nothing from the latent.

    From the "latent" the forward kernel is applied, which preserves the model's marginals. From "x0" the clean
    estimate is noised (costs the node's prediction; not marginal-preserving from a noisy level). Solver history is
    cleared. To the node's own level, from the latent, it returns the node itself.
    """

    nodes: Node | Sequence[Node]
    to: int
    copies: int = 1
    source: Literal["latent", "x0"] = "latent"

    def __post_init__(self) -> None:
        object.__setattr__(self, "nodes", _nodes(self, self.nodes))
        object.__setattr__(self, "copies", _whole(self, "copies", self.copies))
        _at_least_one(self, "copies", self.copies)
        object.__setattr__(self, "to", _whole(self, "to", self.to))
        if self.source not in ("latent", "x0"):
            raise UsageError(f"Renoise: source is {self.source!r} but must be 'latent' or 'x0'")

    @property
    def group(self) -> tuple[Node, ...]:
        """The nodes as a tuple."""
        return self.nodes  # type: ignore[return-value]


@dataclass(frozen=True)
class Perturb:
    """Replace a share of a node's noise at its own level -> list of nodes, `copies` for each.

    x' = alpha * x0 + sigma * (sqrt(1 - scale^2) * eps + scale * z): scale 0 keeps the latent, 1 replaces all of its
    noise. Costs the node's prediction (kept, if it is there already). Between levels only: at level 0 use `Draw`
    with `Rotate` or `Mix`.
    """

    nodes: Node | Sequence[Node]
    scale: float
    copies: int = 1

    def __post_init__(self) -> None:
        object.__setattr__(self, "nodes", _nodes(self, self.nodes))
        object.__setattr__(self, "copies", _whole(self, "copies", self.copies))
        _at_least_one(self, "copies", self.copies)
        if not 0.0 <= self.scale <= 1.0:
            raise UsageError(f"Perturb: scale is {self.scale} but must lie in [0, 1]")

    @property
    def group(self) -> tuple[Node, ...]:
        """The nodes as a tuple."""
        return self.nodes  # type: ignore[return-value]


@dataclass(frozen=True)
class Score:
    """Score nodes with a verifier -> list of float, None where scoring failed.

    Args:
      nodes: one node or several; a verifier of scope "set" sees them as one set.
      verifier: a role that the policy declares, or the name of one of the search's verifiers; None takes the one that
        steers. Values are kept under the verifier's own name.
      at: "x0" scores the clean estimate (costs the node's prediction, free at level T); "lookahead" denoises on with
        the deterministic solver in `num_steps` steps and scores what comes out.
      num_steps: steps of the look-ahead.
    """

    nodes: Node | Sequence[Node]
    verifier: str | None = None
    at: Literal["x0", "lookahead"] = "x0"
    num_steps: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "nodes", _nodes(self, self.nodes))
        if self.at not in ("x0", "lookahead"):
            raise UsageError(f"Score: at is {self.at!r} but must be 'x0' or 'lookahead'")
        if self.num_steps is not None:
            object.__setattr__(self, "num_steps", _whole(self, "num_steps", self.num_steps))
        if self.at == "lookahead" and (self.num_steps is None or self.num_steps < 1):
            raise UsageError(f"Score: a look-ahead needs num_steps of at least 1, not {self.num_steps}")

    @property
    def group(self) -> tuple[Node, ...]:
        """The nodes as a tuple."""
        return self.nodes  # type: ignore[return-value]

    def key(self, verifier: str) -> str:
        """The key that the values are stored under."""
        return verifier if self.at == "x0" else f"{verifier}@lookahead{self.num_steps}"


@dataclass(frozen=True, init=False)
class Gather:
    """Several requests in flight at once -> tuple of their replies, when all are complete. Granted whole or not at all."""

    requests: tuple[Request, ...]

    def __init__(self, *requests: Request) -> None:
        object.__setattr__(self, "requests", requests)


@dataclass(frozen=True)
class Release:
    """The policy will not grow these nodes any more -> None. Their latents may leave memory."""

    nodes: Node | Sequence[Node]

    def __post_init__(self) -> None:
        object.__setattr__(self, "nodes", _nodes(self, self.nodes))

    @property
    def group(self) -> tuple[Node, ...]:
        """The nodes as a tuple."""
        return self.nodes  # type: ignore[return-value]


# The kinds that policies can rely on. The engine carries them out through a table, `tsdiff.treesearch.handlers`.
Request: TypeAlias = Draw | Start | Denoise | Renoise | Perturb | Score | Gather | Release
