"""The memory of a Monte Carlo tree search: visits and values of the places it has been to, and where to go next."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from tsdiff.policies.mcts_rules import Rules
from tsdiff.treesearch.node import Node
from tsdiff.treesearch.statistics import (
    Bounds,
    boltzmann,
    children_allowed,
    gumbel_top,
    gumbel_value,
    gumbels,
    halving_schedule,
    improved_policy,
    least_served,
    max_backup,
    mean_backup,
    pick,
    puct,
    soft_backup,
    uct,
    with_virtual_loss,
)

if TYPE_CHECKING:
    import numpy as np


@dataclass(slots=True, eq=False)
class Place:
    """A node of the search tree: the root above all first noises (depth 0), a branch level, or a finished sample.

    Attributes:
      depth: 0 for the root, 1, 2, ... for the branch levels, the tree's depth for finished samples.
      parent, number: the place above it, and which of its children this is.
      node: its latent; None for the root, and while the simulation that makes it is in flight.
      visits, unobserved: simulations that came through here, done and in flight.
      returns: the evaluations that came back through here, its own first.
      value: backed up, None where every evaluation failed.
      cheap: score of the clean estimate, what the prior is made of.
      closed: nothing can be opened at or below this place any more.
    """

    depth: int
    parent: Place | None = None
    number: int = 0
    node: Node | None = None
    children: list[Place] = field(default_factory=list)
    visits: int = 0
    unobserved: int = 0
    own: float | None = None
    total: float = 0.0
    returns: int = 0
    value: float | None = None
    cheap: float | None = None
    closed: bool = False

    @property
    def simulations(self) -> int:
        """Visits, those in flight included."""
        return self.visits + self.unobserved

    @property
    def failed(self) -> bool:
        """Whether there is no latent to go on from, and never will be."""
        return self.node is not None and self.node.failed

    def path(self) -> Iterator[Place]:
        """From here up to the root."""
        place: Place | None = self
        while place is not None:
            yield place
            place = place.parent

    def below(self) -> Iterator[Place]:
        """This place and all under it, parents first."""
        places = [self]
        for place in places:
            places.extend(place.children)
        yield from places


class SearchTree:
    """Selection, expansion and back-up. Knows no noise levels: a child is one more draw from the model.

    Args:
      rules: the policy.
      depth: of finished samples.
      rng: for Boltzmann and Gumbel selection.
    """

    def __init__(self, rules: Rules, depth: int, rng: np.random.Generator) -> None:
        self.rules = rules
        self.depth = depth
        self.rng = rng
        self.root = Place(0)
        self.bounds = Bounds()
        self.cheap = Bounds()
        self.halving = Halving(self) if rules.selection == "gumbel" else None

    # Selection ------------------------------------------------------------------------------------------------------

    def select(self) -> Place | None:
        """Where the next simulation opens a child; None if that depends on simulations in flight, or nothing is left."""
        place = self.root
        while not self._opens(place):
            ways = [child for child in place.children if self._leads(child)]
            if self.halving is not None and place is self.root:
                ways = self.halving.considered(ways)
            if not ways:
                return None
            place = self._choose(place, ways)
        return place

    def open(self, place: Place) -> Place:
        """A new child, in flight."""
        child = Place(place.depth + 1, place, len(place.children))
        place.children.append(child)
        for above in child.path():
            above.unobserved += 1
        if self.halving is not None:
            self.halving.left -= 1
        return child

    def _opens(self, place: Place) -> bool:
        """Whether a visit to this place opens a child of it."""
        if place.depth == self.depth:
            return False
        if self.halving is not None and place is self.root and not self.halving.admits():
            return False
        limit = self._limit(place)
        if limit is not None:
            return len(place.children) < limit
        if place.depth == self.depth - 1:
            return True  # its children are finished samples: visiting one again would tell nothing new
        if len(place.children) < children_allowed(place.simulations + 1, self.rules.widening, self.rules.exponent):
            return True
        return all(self._closed(child) for child in place.children)

    def _limit(self, place: Place) -> int | None:
        """The fixed number of children; None under progressive widening."""
        if place is not self.root:
            return self.rules.branch
        return self.halving.candidates if self.halving is not None else self.rules.roots

    def _leads(self, place: Place) -> bool:
        """Whether some child can be opened at or below this place now."""
        if place.node is None or self._closed(place):
            return False
        return self._opens(place) or any(self._leads(child) for child in place.children)

    def _closed(self, place: Place) -> bool:
        if not place.closed and not place.unobserved:
            full = place.depth == self.depth or (place is not self.root and len(place.children) == self.rules.branch)
            place.closed = place.failed or (full and all(self._closed(child) for child in place.children))
        return place.closed

    def _choose(self, place: Place, ways: Sequence[Place]) -> Place:
        """The selection rule, among children that lead on. Visits in flight count, with or without a loss."""
        rules, total = self.rules, place.simulations
        values = [self._q(child) for child in ways]
        visits = [float(child.simulations) for child in ways]
        if rules.selection == "uct":
            c = math.sqrt(2.0) if rules.exploration is None else rules.exploration
            return ways[_first_best([uct(value, n, total, c) for value, n in zip(values, visits, strict=True)])]
        if rules.selection == "boltzmann":
            return ways[pick(boltzmann(values, rules.inverse_temperature), self.rng)]
        if rules.selection == "puct":
            c = 1.25 if rules.exploration is None else rules.exploration
            priors = boltzmann(self._logits(ways), 1.0)
            return ways[_first_best([puct(value, p, n, total, c) for value, p, n in zip(values, priors, visits, strict=True)])]
        if place is self.root:
            assert self.halving is not None
            return self.halving.choose(ways)
        return ways[least_served(improved_policy(self._logits(ways), values, visits, rules.c_visit, rules.c_scale), visits)]

    def _q(self, place: Place) -> float:
        """The value in [0, 1], as selection sees it."""
        value = self.bounds(place.value)
        return with_virtual_loss(value, place.visits, place.unobserved) if self.rules.parallel == "virtual-loss" else value

    def _logits(self, places: Sequence[Place]) -> list[float]:
        """Log-probabilities of the prior, up to a constant."""
        if self.rules.prior == "uniform":
            return [0.0] * len(places)
        return [self.rules.inverse_temperature * self.cheap(place.cheap) for place in places]

    # Back-up --------------------------------------------------------------------------------------------------------

    def observe(self, child: Place, nodes: Sequence[Node], value: float | None, cheap: dict[Node, float | None]) -> None:
        """A simulation has come back.

        Args:
          child: the place that it opened.
          nodes: the child's node and those of the rollout below it, one for each depth.
          value: of the last of them; None where scoring failed.
          cheap: scores of clean estimates, where the prior needs them.
        """
        for above in child.path():
            above.unobserved -= 1
        end = child
        for node in nodes:
            if end.failed:
                break
            if end.node is not None:
                below = Place(end.depth + 1, end)
                end.children.append(below)
                end = below
            end.node, end.cheap = node, cheap.get(node)
            self.cheap.add(end.cheap)
        value = value if value is not None and math.isfinite(value) else None
        end.own = value
        moved = self.bounds.add(value)
        for place in end.path():
            place.visits += 1
            if value is not None:
                place.total += value
                place.returns += 1
        # A soft back-up depends on the bounds, through its temperature.
        for place in reversed(list(self.root.below())) if moved and self.rules.backup == "soft" else end.path():
            place.value = self._backed_up(place)

    def _backed_up(self, place: Place) -> float | None:
        """An inner place's own estimate gives way to its children's; in a mean it counts as one of the returns."""
        if self.rules.backup == "mean":
            return mean_backup([place.total / place.returns]) if place.returns else None
        values = [child.value for child in place.children]
        if self.rules.backup == "max":
            best = max_backup(values)
        else:
            best = soft_backup(values, self.bounds.scale(self.rules.inverse_temperature))
        return place.own if best is None else best

    # What is left of it -------------------------------------------------------------------------------------------------

    def leaves(self) -> list[Place]:
        """Places that no child has been opened at and that are not finished: the best first, then those without a value."""
        leaves = [
            (math.inf if place.value is None else -place.value, place.node.index, place)
            for place in self.root.below()
            if place.node is not None and place.node.status == "open" and place.depth < self.depth and not place.children
        ]
        return [place for *_, place in sorted(leaves, key=lambda leaf: leaf[:2])]

    def fallow(self) -> list[Node]:
        """Open nodes that no simulation will start from again: samples, places full of children, and what a race has dropped."""
        out = {place for top in self.halving.dropped for place in top.below()} if self.halving is not None else set()
        return [
            place.node
            for place in self.root.below()
            if place.node is not None
            and place.node.status == "open"
            and (place.depth == self.depth or len(place.children) == self.rules.branch or place in out)
        ]


class Halving:
    """Gumbel selection at the root: sequential halving over first noises, ranked by g + log P + sigma(q).

    Attributes:
      candidates: how many first noises are drawn.
      left: simulations that the current phase still gives out.
    """

    def __init__(self, tree: SearchTree) -> None:
        rules = tree.rules
        assert rules.roots is not None
        self.tree = tree
        self.phases = halving_schedule(rules.roots, rules.simulations)
        self.candidates = self.phases[0][0]
        self.noise = gumbels(self.candidates, tree.rng)
        self.survivors: list[Place] | None = None  # all, in the first phase
        self.dropped: list[Place] = []
        self.phase = 0
        self.left = self._quota()

    def _quota(self) -> float:
        """Simulations of the current phase; the last one goes on for as long as the budget lasts, if there is one."""
        endless = self.phase == len(self.phases) - 1 and self.tree.rules.until_nfe is not None
        return math.inf if endless else self.phases[self.phase][1]

    def admits(self) -> bool:
        """Whether the root may open candidates: in the first phase."""
        return self.phase == 0 and self.left > 0

    def considered(self, ways: Sequence[Place]) -> list[Place]:
        """Of the candidates that lead on, those that are still in the race."""
        if self.left <= 0 and not self.tree.root.unobserved and self.phase + 1 < len(self.phases):
            self.phase += 1
            self.left = self._quota()
            racing = self.tree.root.children if self.survivors is None else self.survivors
            standing = [place for place in racing if not place.failed]
            kept = {standing[i] for i in gumbel_top(self.scores(standing), self.phases[self.phase][0])}
            self.survivors = [place for place in standing if place in kept]
            self.dropped += [place for place in standing if place not in kept]
        if self.left <= 0:
            return []
        return [place for place in ways if self.survivors is None or place in self.survivors]

    def choose(self, ways: Sequence[Place]) -> Place:
        """The candidate with the fewest visits; among equals the one that ranks highest."""
        fewest = min(place.simulations for place in ways)
        equals = [place for place in ways if place.simulations == fewest]
        return equals[_first_best(self.scores(equals))]

    def scores(self, places: Sequence[Place]) -> list[float]:
        """g + log P + sigma(q) of candidates."""
        tree = self.tree
        most = max((place.visits for place in tree.root.children), default=0)
        logits = tree._logits(places)
        values = [gumbel_value(tree.bounds(place.value), most, tree.rules.c_visit, tree.rules.c_scale) for place in places]
        return [self.noise[place.number] + logit + value for place, logit, value in zip(places, logits, values, strict=True)]


def _first_best(scores: list[float]) -> int:
    return scores.index(max(scores))
