"""What diffusion tree sampling and search share: rollouts that grow one tree of partly denoised samples, and its price."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any, ClassVar, Self

from tsdiff.treesearch.errors import BudgetExhausted, UsageError
from tsdiff.treesearch.ledger import Cost, Spend
from tsdiff.treesearch.node import Node
from tsdiff.treesearch.noise import Fresh
from tsdiff.treesearch.parameters import check, parameter
from tsdiff.treesearch.protocols import Search, Setting, TreeView
from tsdiff.treesearch.requests import Denoise, Draw, Gather, Release, Request, Score
from tsdiff.treesearch.schedule import Schedule, SolverInfo
from tsdiff.treesearch.statistics import Bounds, children_allowed

if TYPE_CHECKING:
    import numpy as np


@dataclass(slots=True, eq=False)
class Place:
    """A node of the tree with its statistics. The root, above all first noises, has no node: its children are draws.

    Attributes:
      n: 1 + the simulations that passed through, those in flight included.
      v: the value that was backed up; None while no sample below has a score.
      opening: children in flight.
    """

    node: Node | None = None
    n: int = 1
    v: float | None = None
    children: list[Place] = field(default_factory=list)
    opening: int = 0

    @property
    def level(self) -> int:
        """Where a rollout from here starts."""
        return 0 if self.node is None else self.node.level

    @property
    def width(self) -> int:
        """Children, those in flight included."""
        return len(self.children) + self.opening

    def able(self) -> list[Place]:
        """The children that can be descended to: those with a value; while there are none, all that did not fail."""
        alive = [child for child in self.children if child.node is not None and not child.node.failed]
        return [child for child in alive if child.v is not None] or alive


@dataclass(frozen=True, slots=True)
class Opening:
    """A simulation that opens a child.

    Attributes:
      path: the places that it passed through.
      branch: which child of the last one it opens.
      lead: v(root) - v(last place) as it was chosen; 0 while there are no values.
    """

    path: list[Place]
    branch: int
    lead: float


@dataclass(frozen=True, slots=True)
class Pass:
    """A simulation that has ended: its finished sample, and the lead with which it was reached."""

    end: Place
    lead: float


@dataclass(frozen=True, kw_only=True)
class DiffusionTree(ABC):
    """What DTS and DTS* share: all but how a child is chosen, how values are backed up, and what is read out."""

    name: ClassVar[str]
    size_parameters: ClassVar[tuple[str, ...]] = ("simulations", "until_nfe")

    simulations: int = parameter(64, low=1, symbol="M", help="passes from the root; one that ends at a finished sample is counted but costs nothing")
    until_nfe: int | None = parameter(None, low=1, help="simulate for as long as so many NFE pay for it (the first always, and no more often than once for each NFE), whatever `simulations` says; none does not")
    levels: tuple[float, ...] = parameter((0.2, 0.4, 0.6, 0.8), above=0.0, below=1.0, help="branch levels beside pure noise, as shares of the schedule from noise (0) to clean (1)")
    widening: float = parameter(2.0, low=1.0, symbol="C", help="a node visited n - 1 times gets another child while it has fewer than C n^alpha")
    exponent: float = parameter(0.8, above=0.0, high=1.0, symbol="alpha", help="how fast nodes widen; small makes deep, narrow trees")
    inverse_temperature: float = parameter(1.0, low=0.0, symbol="lambda", help="how strongly scores count, in units of 1/score; 0 samples the model")
    in_flight: int = parameter(1, low=1, symbol="P", help="simulations in one batch at most; at 1 each knows the scores of all before it")

    def __post_init__(self) -> None:
        check(self)

    @property
    def needs(self) -> frozenset[str]:
        """Scores that can be averaged, and steps that make the children of a node differ."""
        return frozenset({"absolute", "stochastic"})

    @property
    def passes(self) -> int:
        """Simulations at most."""
        return self.simulations if self.until_nfe is None else self.until_nfe

    def stops(self, schedule: Schedule) -> list[int]:
        """The levels of the tree's nodes, from 0 to the last. The last step alone may draw no noise, so none parts there."""
        last = schedule.last
        return sorted({0, last, *(min(max(int(share * last + 0.5), 1), last - 2) for share in self.levels if last > 2)})

    # Where DTS and DTS* differ ---------------------------------------------------------------------------------------

    @abstractmethod
    def choose(self, parent: Place, children: Sequence[Place], bounds: Bounds, rng: np.random.Generator) -> Place:
        """The child to descend to. Either all have a value or none has; `bounds` are those of the scores so far."""

    @abstractmethod
    def back_up(self, values: Sequence[float | None]) -> float | None:
        """A place's value, from its children's; missing ones are left out."""

    @abstractmethod
    def conclude(self, root: Place, passes: Sequence[Pass], tree: TreeView) -> None:
        """Write on the tree what it says beside its best sample, at no cost."""

    # The algorithm ---------------------------------------------------------------------------------------------------

    def search(self, tree: TreeView) -> Search:
        """See the class. Where the budget does not pay for the next simulation, the search ends without it."""
        last, rng = tree.schedule.last, tree.rng(self.name, "select")
        root, bounds = Place(), Bounds()
        passes: list[Pass] = []
        best: list[Place] = []
        done, stopped = 0, False
        while done < self.passes and not stopped:
            flight: list[Opening] = []
            price = 0
            while done < self.passes and len(flight) < self.in_flight:
                path = self._descend(root, last, bounds, rng)
                if path is None:
                    break
                end = path[-1]
                lead = 0.0 if root.v is None or end.v is None else root.v - end.v
                if self._widens(end, last):
                    price += _rollout_cost(end, tree.schedule, tree.solver)
                    stopped = not self._affords(price, tree, first=not root.width)
                    if stopped:
                        break
                    flight.append(Opening(path, end.width, lead))
                    end.opening += 1
                elif end.level == last:
                    passes.append(Pass(end, lead))
                for place in path:
                    place.n += 1
                done += 1
            try:
                landed = yield from self._roll_out(flight, tree, bounds)
            except BudgetExhausted:
                if not root.children:
                    raise
                for place in (place for opening in flight for place in opening.path):
                    place.n -= 1
                done -= len(flight)
                break
            passes += landed
            ends = best + [one.end for one in landed]
            best = ends and [max(ends, key=lambda end: -math.inf if end.v is None else end.v)]
            dropped = [end.node for end in ends if end.node is not None and end not in best and end.node.status == "open"]
            if dropped:  # every other node may be grown again
                yield Release(dropped)
        self._record(root, tree)
        tree.note(simulations=done, value=root.v)
        self.conclude(root, passes, tree)
        return tree.best()

    def _descend(self, root: Place, last: int, bounds: Bounds, rng: np.random.Generator) -> list[Place] | None:
        """The places that a simulation passes through; None where it has to wait for those in flight.

        It ends where a child is to be opened, at a finished sample, or where all children have failed.
        """
        path = [root]
        while path[-1].level < last and not self._widens(path[-1], last):
            children = path[-1].able()
            if not children:
                return None if path[-1].opening else path
            path.append(self.choose(path[-1], children, bounds, rng))
        return path

    def _widens(self, place: Place, last: int) -> bool:
        """Progressive widening. What is in flight counts, so the widths do not depend on how many are."""
        return place.level < last and place.width < children_allowed(place.n, self.widening, self.exponent)

    def _affords(self, price: int, tree: TreeView, *, first: bool) -> bool:
        """Whether a round may cost this much. The first simulation is always asked for: the engine knows best."""
        left = [] if tree.budget.remaining is None else [tree.budget.remaining]
        left += [] if self.until_nfe is None else [self.until_nfe - tree.budget.spent]
        return first or all(price <= limit for limit in left)

    def _roll_out(self, flight: Sequence[Opening], tree: TreeView, bounds: Bounds) -> Generator[Request, Any, list[Pass]]:
        """Open a child at the end of every path, sample on from it, and back up the scores."""
        if not flight:
            return []
        last, stops = tree.schedule.last, self.stops(tree.schedule)
        ends = [opening.path[-1] for opening in flight]
        drawn = sum(end.node is None for end in ends)
        draws = iter((yield Draw(drawn)) if drawn else [])
        starts = [next(draws) if end.node is None else end.node for end in ends]
        # The branch is said aloud: a node in the middle of a rollout has its first child from then.
        branches = [0 if end.node is None else opening.branch for end, opening in zip(ends, flight, strict=True)]
        leaves = yield Gather(
            *(
                Denoise(start, to=last, noise=Fresh(branch), via=[stop for stop in stops if start.level < stop < last])
                for start, branch in zip(starts, branches, strict=True)
            )
        )
        scores = yield Score([leaf for (leaf,) in leaves])
        for score in scores:
            bounds.add(score)
        return [Pass(self._take_up(opening.path, leaf, score), opening.lead) for opening, (leaf,), score in zip(flight, leaves, scores, strict=True)]

    def _take_up(self, path: list[Place], leaf: Node, score: float | None) -> Place:
        """Make the whole rollout part of the tree and back up its score, from the leaf's new place to the root."""
        path[-1].opening -= 1
        rollout = leaf.path()
        if path[-1].node is not None:
            rollout = rollout[rollout.index(path[-1].node) + 1 :]
        grown = list(path)
        for node in rollout:
            place = Place(node, n=2)
            grown[-1].children.append(place)
            grown.append(place)
        grown[-1].v = score
        for place in reversed(grown[:-1]):
            place.v = self.back_up([child.v for child in place.children])
        return grown[-1]

    @staticmethod
    def _record(root: Place, tree: TreeView) -> None:
        """Write visits and values on the nodes."""
        places = list(root.children)
        while places:
            place = places.pop()
            tree.note(place.node, visits=place.n - 1, value=place.v)
            places += place.children

    # What it costs ---------------------------------------------------------------------------------------------------

    def widths(self, simulations: int, depth: int) -> list[tuple[int, int]]:
        """Bounds on the number of nodes at depths 1 (first noises) to `depth` (finished samples) after M simulations.

        A node that m simulations passed through has K(m) = min(m, ceil(C m^alpha)) children, whatever the scores; they
        decide only how the M simulations at one depth are split among its N nodes. K lies between the concave functions
        h(m) = min(m, C m^alpha) and min(m, C m^alpha + 1), so it adds up to least when one node has all that the others can
        spare, and to no more than the upper function does when all have alike.
        """
        low = high = self._children(simulations)
        bounds = [(low, high)]
        while len(bounds) < depth:
            low = low - 1 + self._children(simulations - low + 1)
            high = min(simulations, int(high * (self.widening * (simulations / high) ** self.exponent + 1.0)))
            bounds.append((low, high))
        return bounds

    def _children(self, passes: int) -> int:
        return min(passes, math.ceil(children_allowed(passes, self.widening, self.exponent)))

    def cost(self, setting: Setting) -> Cost:
        """Bounds, as long as no node fails: scores decide where simulations branch off, and with it what they share."""
        stops = self.stops(setting.schedule)
        widths = self.widths(self.passes, len(stops))
        edges = [setting.denoise_cost(start, stop) - 1 for start, stop in pairwise(stops)]

        def nfe(counts: list[int]) -> int:
            # Every node but the finished ones is predicted once; the rest of an edge is its own.
            return sum(counts[:-1]) + sum(edge * count for edge, count in zip(edges, counts[1:], strict=True))

        lower, upper = nfe([low for low, _ in widths]), nfe([high for _, high in widths])
        fewest, most = widths[-1]
        if self.until_nfe is not None and upper > self.until_nfe:
            sample = setting.sample_cost
            upper = max(sample, self.until_nfe)
            lower = min(lower, max(sample, self.until_nfe - sample + 1))  # no simulation costs more than a sample
            fewest = min(fewest, -(-lower // sample))
            most = min(most, 1 + (upper - sample) // edges[-1]) if edges[-1] else most
        lows, highs = (setting.scoring(count, final=True) + setting.result() for count in (fewest, most))
        return Cost(Spend(nfe=lower) + lows, Spend(nfe=upper) + highs)

    def fit(self, nfe: int, setting: Setting) -> Self:
        """As many simulations as `nfe` turns out to pay for.

        Raises:
          UsageError: if it does not pay for one sample.
        """
        if nfe < setting.sample_cost:
            raise UsageError(f"{self.name}: a budget of {nfe} NFE is too small; the first simulation is a whole sample and needs {setting.sample_cost} NFE")
        return replace(self, until_nfe=nfe)


def _rollout_cost(place: Place, schedule: Schedule, solver: SolverInfo) -> int:
    """NFE of a new child of a place and its rollout; the place's own prediction is there if it has grown before."""
    price = schedule.span_cost(schedule.span(place.level, schedule.last), solver.stages)
    predicted = place.node is not None and (place.opening or any(not child.node.failed for child in place.children if child.node))
    return price - bool(predicted)
