"""Monte Carlo tree search over denoising: every simulation opens one more continuation where it promises most."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from tsdiff.policies.mcts_cost import Bill, Prices, largest
from tsdiff.policies.mcts_rules import Rules
from tsdiff.policies.mcts_tree import Place, SearchTree
from tsdiff.treesearch.errors import UsageError
from tsdiff.treesearch.ledger import Cost
from tsdiff.treesearch.node import Node
from tsdiff.treesearch.noise import Fresh
from tsdiff.treesearch.protocols import Search, Setting, TreeView
from tsdiff.treesearch.requests import Denoise, Draw, Gather, Release, Renoise, Request, Score

Scores = dict[Node, float | None]


@dataclass(frozen=True, kw_only=True)
class MCTS(Rules):
    """Monte Carlo tree search whose actions are noise draws.

        repeat n times:
            place <- root, above all first noises
            while place opens no new child:  place <- the child that the selection rule prefers       (selection)
            child <- one more draw of the model from place to the next branch level                   (expansion)
            value <- the score of a rollout, of a look-ahead or of the clean estimate                 (simulation)
            every place from child up to the root takes the value into account                        (back-up)
        the answer is the best finished sample

    The root's children are first noises, denoised to the first branch level. The first child of any other place is its
    plain continuation; later ones part from it either by "renoise" (fresh noise by the forward kernel, back by `jump`,
    which keeps the model's law; any solver will do) or by "step" (the noises of a stochastic solver). A place opens
    children while it has fewer than C N^a (progressive widening), or up to a fixed number. Branch levels are places
    with latents of their own, and a rollout's become part of the tree, so that nothing is evaluated twice.

    Selection: UCT; PUCT, whose prior is a softmax of the children's clean estimates' scores; Boltzmann; or Gumbel with
    sequential halving at the root, for few simulations. Values are min-max normalised over the tree, so constants and
    temperatures mean the same for any verifier. Up to `in_flight` simulations are selected before the first of them has
    come back and are carried out in one batch; meanwhile they count as visits without a value ("unobserved", Liu et al.
    2020, arXiv 1810.11755) or with the worst ("virtual-loss", Chaslot et al. 2008). Null scores count as the worst value
    in selection and are left out of back-ups; places whose latent failed are not visited again.

    Sources: UCT, Kocsis & Szepesvari 2006; PUCT, Silver et al. 2017 (arXiv 1712.01815); Gumbel, Danihelka et al. 2022;
    branch levels, C, a and the soft back-up of diffusion tree sampling, Jain et al. 2025 (arXiv 2506.20701); actions as
    noises with UCT, Ramesh & Mardani 2025 (arXiv 2506.03164). Deviation: a simulation that would end in a finished
    sample again opens another one beside it.
    """

    name: ClassVar[str] = "mcts"
    size_parameters: ClassVar[tuple[str, ...]] = ("simulations", "until_nfe")

    def search(self, tree: TreeView) -> Search:
        """See the class. Stops before a simulation that it cannot pay for together with finishing the best leaves."""
        prices = Prices(self, tree.schedule, tree.solver)
        memory = SearchTree(self, prices.depth, tree.rng("mcts"))
        limit = min((limit for limit in (self.until_nfe, tree.budget.limit) if limit is not None), default=None)
        done = spent = 0
        while True:
            wave: list[Place] = []
            while len(wave) < self.in_flight and (self.until_nfe is not None or done < self.simulations):
                place = memory.select()
                if place is None:
                    break
                price = prices.opening(place.depth, first=not place.children)
                if done and limit is not None and spent + price + prices.reserve(done + 1) > limit:
                    break
                wave.append(memory.open(place))
                done, spent = done + 1, spent + price
            if not wave:
                break
            yield from self._simulate(wave, prices.stops, memory)
            best = tree.best()
            yield Release([node for node in memory.fallow() if node is not best])
        if self.value != "rollout":
            yield from self._finish(memory, prices, tree.best() is not None, None if limit is None else limit - spent)
        for place in memory.root.below():
            if place.node is not None:
                tree.note(place.node, visits=place.visits, backed_up=place.value)
        return tree.best()

    def _simulate(self, wave: list[Place], stops: tuple[int, ...], memory: SearchTree) -> Search:
        """Expansion, simulation and back-up of the children that a wave opens: one batch for each kind of work."""
        starts = yield from self._starts(wave, stops)
        # On a stochastic solver the branch is named: a rollout's own continuation is branch 0 of every place on its way.
        branches = {child: child.number if self.branch_by == "step" and child.depth > 1 else None for child in wave}
        groups = _grouped(wave, lambda child: (child.depth, branches[child]))
        replies = yield Gather(*(
            Denoise(
                [starts[child] for child in group],
                to=stops[-1] if self.value == "rollout" else stops[depth],
                via=stops[depth:-1] if self.value == "rollout" else (),
                noise=None if branch is None else Fresh(branch),
            )
            for (depth, branch), group in groups.items()
        ))  # fmt: skip
        ends = _paired(groups, replies)
        grown = {child: _between(starts[child], ends[child]) for child in wave}
        values, cheap = yield from self._scores(list(ends.values()), [node for nodes in grown.values() for node in nodes], stops[-1])
        yield Release([start for child, start in starts.items() if child.parent is None or start is not child.parent.node])
        for child in wave:
            memory.observe(child, grown[child], values[ends[child]], cheap)

    def _starts(self, wave: list[Place], stops: tuple[int, ...]) -> Generator[Request, Any, dict[Place, Node]]:
        """Where each child of a wave is denoised from: a new first noise, its parent, or its parent re-noised."""
        starts = {child: child.parent.node for child in wave}
        groups = _grouped([child for child in wave if child.depth == 1 or (self.branch_by == "renoise" and child.number)], lambda child: child.depth)
        if groups:
            replies = yield Gather(*(
                Draw(len(group)) if depth == 1 else Renoise([starts[child] for child in group], to=self.back(stops[depth - 1], stops[-1]))
                for depth, group in groups.items()
            ))  # fmt: skip
            starts |= _paired(groups, replies)
        return starts

    def _scores(self, ends: list[Node], grown: list[Node], last: int) -> Generator[Request, Any, tuple[Scores, Scores]]:
        """Values of what simulations ended in, and the scores of clean estimates that the prior is made of."""
        finals, inner = [end for end in ends if end.level == last], [end for end in ends if end.level < last]
        passed = [node for node in grown if node.level < last] if self.with_prior and self.value != "x0" else []
        shortcut = Score(inner) if self.value == "x0" else Score(inner, at="lookahead", num_steps=self.lookahead_steps)
        judged, valued, estimated = yield Gather(Score(finals), shortcut, Score(passed))
        values = dict(zip(finals + inner, judged + valued, strict=True))
        return values, values if self.value == "x0" else dict(zip(passed, estimated, strict=True))

    def _finish(self, memory: SearchTree, prices: Prices, finished: bool, left: int | None) -> Search:
        """Finish the best leaves, where simulations have only estimated them; `until_nfe` may pay for more than `finish`."""
        chosen: list[Node] = []
        for leaf in memory.leaves()[: self.finish if self.until_nfe is None else None]:
            price = prices.completing(leaf.depth)
            if left is None or price <= left or not (chosen or finished):
                chosen.append(leaf.node)
                left = None if left is None else left - price
        samples = yield Denoise(chosen, to=prices.schedule.last)
        yield Score(samples)

    def cost(self, setting: Setting) -> Cost:
        """Bounds that hold as long as no node fails; equal where values decide only among simulations of one price."""
        return Bill(self, setting).cost()

    def fit(self, nfe: int, setting: Setting) -> MCTS:
        """As many simulations as `nfe` pays for: what is certain to fit is planned, and what turns out cheaper is spent on more.

        Raises:
          UsageError: if it does not pay for one.
        """

        def certain(simulations: int) -> int:
            return replace(self, simulations=simulations, until_nfe=None).cost(setting).upper.nfe

        if certain(1) > nfe:
            raise UsageError(f"{self.name}: a budget of {nfe} NFE is too small; one simulation with value={self.value} needs {certain(1)} NFE")
        return replace(self, simulations=largest(lambda simulations: certain(simulations) <= nfe, nfe), until_nfe=nfe)


def _grouped(children: Sequence[Place], key: Callable[[Place], Any]) -> dict[Any, list[Place]]:
    groups: dict[Any, list[Place]] = {}
    for child in children:
        groups.setdefault(key(child), []).append(child)
    return groups


def _paired(groups: dict[Any, list[Place]], replies: Sequence[list[Node]]) -> dict[Place, Node]:
    """What each child of every group got."""
    return {child: node for group, reply in zip(groups.values(), replies, strict=True) for child, node in zip(group, reply, strict=True)}


def _between(start: Node, end: Node) -> list[Node]:
    """The nodes on the way from `start`, without it, to `end`."""
    path = end.path()
    return path[path.index(start) + 1 :]
