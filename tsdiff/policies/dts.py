"""Diffusion tree sampling (DTS) and diffusion tree search (DTS*): rollouts that share one tree of partly denoised samples."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from tsdiff.policies.dts_tree import DiffusionTree, Pass, Place
from tsdiff.treesearch.node import Node
from tsdiff.treesearch.parameters import parameter
from tsdiff.treesearch.protocols import TreeView
from tsdiff.treesearch.statistics import Bounds, boltzmann, max_backup, pick, soft_backup, uct

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True, kw_only=True)
class DTS(DiffusionTree):
    """Diffusion tree sampling: draw from p(x0) exp(lambda score), better and better as the tree grows.

        root above all first noises; a node's children are draws of the model's own transition
        repeat M times:
            select    descend while a node has C n^alpha children, to a child with probability ~ exp(lambda v)
            expand    open one new child
            roll out  sample on to a finished sample; all nodes on the way join the tree
            back up   v(finished) = score;  v(node) = 1/lambda log mean over children of exp(lambda v);  n += 1

    A simulation that ends at a finished sample costs nothing and only raises the counts, which lets a later one branch.

    The search's answer is the best finished sample. The draws from the tilted law are read off the finished tree, at no
    cost, and noted on it: `draws` has the index of each drawn node and its probability (a node may be drawn twice),
    `log_normalizer` the estimate of log E[exp(lambda score)]. Visits and values are noted on the nodes, and on finished
    ones their probability.

    Deviation: the paper draws by descending as in "select" (`read_out="descent"`). Those values stay too low for
    long: a child whose first samples were poor is hardly visited again, a lucky one is, until its luck is averaged out.
    "weights" divides the choices out instead. By the values of its moment, a simulation that left the tree at a place chose
    it exp(lambda (v(place) - v(root))) times as often as uniform choices would; so the finished sample that it led to has
    the importance weight exp(lambda (score + v(root) - v(place))), and draws go by these weights.

    Several simulations in flight count as visits at once and as values when their scores are there; the widths of all
    nodes follow from the counts and stay the same. Children without a score (it failed, or their sample did) are
    left out of means and choices; while a node has no others, all of them are equally likely.

    Source: Jain et al. 2025, "Diffusion tree sampling: scalable inference-time alignment of diffusion models" (arXiv
    2506.20701), with its C and alpha for images and its branch levels (50, 40, 30, 20, 10 of 50 steps to go).
    """

    name: ClassVar[str] = "dts"

    draws: int = parameter(16, low=0, help="independent draws to read off the finished tree")
    read_out: Literal["weights", "descent"] = parameter("weights", help="draw finished samples by importance weights, or by descending the tree as the paper does")

    def choose(self, parent: Place, children: Sequence[Place], bounds: Bounds, rng: np.random.Generator) -> Place:
        """Boltzmann: with probability in proportion to exp(lambda v)."""
        return children[pick(self.probabilities(children), rng)]

    def probabilities(self, children: Sequence[Place]) -> list[float]:
        """exp(lambda v), normalised; equal where no child has a value."""
        return boltzmann([0.0 if child.v is None else child.v for child in children], self.inverse_temperature)

    def back_up(self, values: Sequence[float | None]) -> float | None:
        """Soft: every child counts once, however often it was visited, because children are draws of the model."""
        return soft_backup(values, self.inverse_temperature)

    def conclude(self, root: Place, passes: Sequence[Pass], tree: TreeView) -> None:
        """Note the law over finished samples, and draws from it."""
        law, log_normalizer = self.weights(passes) if self.read_out == "weights" else self.descents(root)
        for node, probability in law.items():
            tree.note(node, probability=probability)
        nodes, probabilities = list(law), list(law.values())
        rng = tree.rng(self.name, "draws")
        drawn = [nodes[pick(probabilities, rng)] for _ in range(self.draws if law else 0)]
        tree.note(draws=[{"node": node.index, "probability": law[node]} for node in drawn], log_normalizer=log_normalizer)

    def weights(self, passes: Sequence[Pass]) -> tuple[dict[Node, float], float | None]:
        """Probabilities of the finished samples by importance weights, and the log of the mean weight."""
        scored = [(one.end.node, one.end.v + one.lead) for one in passes if one.end.node is not None and one.end.v is not None]
        if not scored:
            return {}, None
        merits = [merit for _, merit in scored]
        law: dict[Node, float] = {}
        for (node, _), share in zip(scored, boltzmann(merits, self.inverse_temperature), strict=True):
            law[node] = law.get(node, 0.0) + share
        return law, self.inverse_temperature * (self.back_up(merits) or 0.0)

    def descents(self, root: Place) -> tuple[dict[Node, float], float | None]:
        """Probabilities of the finished samples where every step down goes by exp(lambda v), and lambda v(root)."""
        if root.v is None:
            return {}, None
        law: dict[Node, float] = {}
        places = [(root, 1.0)]
        while places:
            place, probability = places.pop()
            if place.node is not None and not place.children:
                law[place.node] = probability
            children = place.able()
            places += zip(children, [probability * share for share in self.probabilities(children)] if children else [], strict=True)
        return law, self.inverse_temperature * root.v


@dataclass(frozen=True, kw_only=True)
class DTSStar(DiffusionTree):
    """Diffusion tree search (DTS*): the tree of `dts`, grown towards the highest scores.

        as DTS, but
            select    descend to the child of highest v + c sqrt(ln n(node) / n(child))
            back up   "soft" as in DTS, or "max": v(node) = the highest v of its children

    The answer is the best finished sample. The note `greedy` has the sample that the tree's values lead to, descending to
    the highest v; with max back-up it is the best, too.

    Counts include the simulations in flight, which is the parallel rule of Liu et al. 2020 (arXiv 1810.11755). Children
    without a score are left out as in `dts`; ties go to the oldest child.

    Source: Jain et al. 2025 (arXiv 2506.20701); max back-up is theirs for text. Deviation: v is
    min-max normalised by the scores so far where it meets c, so that c means the same for every verifier.
    """

    name: ClassVar[str] = "dts-star"

    inverse_temperature: float = parameter(10.0, low=0.0, symbol="lambda", help="of the soft back-up, in units of 1/score; 0 backs up means")
    exploration: float = parameter(1.0, low=0.0, symbol="c", help="weight of the bonus for rarely visited children, beside values from 0 to 1")
    backup: Literal["soft", "max"] = parameter("soft", help="how children's values make their parent's")

    def choose(self, parent: Place, children: Sequence[Place], bounds: Bounds, rng: np.random.Generator) -> Place:
        """UCT."""
        return max(children, key=lambda child: uct(bounds(child.v), child.n, parent.n, self.exploration))

    def back_up(self, values: Sequence[float | None]) -> float | None:
        """Soft or max."""
        return max_backup(values) if self.backup == "max" else soft_backup(values, self.inverse_temperature)

    def conclude(self, root: Place, passes: Sequence[Pass], tree: TreeView) -> None:
        """Note the sample that values lead to."""
        place = root
        while place.v is not None and place.children:
            place = max(place.able(), key=lambda child: -math.inf if child.v is None else child.v)
        tree.note(greedy=None if place.node is None else place.node.index)
