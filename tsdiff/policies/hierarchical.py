"""Coarse-to-fine search: settle the layout cheaply at high noise, then refine the survivors at lower and lower noise."""

from __future__ import annotations

import statistics
from collections.abc import Generator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from tsdiff.policies.rounds import Round, as_said, deal, shared_out, spends
from tsdiff.policies.selection import let_go, survivors
from tsdiff.policies.stages import Stage, make_stages
from tsdiff.treesearch.errors import BudgetExhausted
from tsdiff.treesearch.ledger import Cost, Spend
from tsdiff.treesearch.node import Node
from tsdiff.treesearch.parameters import check, parameter
from tsdiff.treesearch.protocols import FINAL, Search, Setting, TreeView
from tsdiff.treesearch.requests import Denoise, Draw, Renoise, Request, Score
from tsdiff.treesearch.schedule import Schedule, SolverInfo


@dataclass(frozen=True, kw_only=True)
class Hierarchical:
    """Coarse-to-fine search in stages, which differ in noise, fidelity and verifier.

        survivors <- n first noises
        for each stage:
            children  <- b continuations of every survivor: re-noised to the stage's first level, denoised to its second
            survivors <- the k children that the stage's verifier values highest
        the last stage ends with finished samples; the answer is the best of them

    The three ways to save early are fewer steps, a short look-ahead instead of a whole completion, and a cheaper
    verifier. By default a layout stage in 3 steps is valued by a look-ahead of 4 (verifier role "layout"); three
    refinements follow, each going back less far than the one before; 8 children a stage, 4, 2 and 1 survivors. Where a
    stage starts at the level where survivors stand, nothing is re-noised and its children part by their own steps
    (which needs a stochastic solver, if they are several). Null scores rank last, ties break by age.

    `-P stages=FILE` reads other stages from a TOML file; all keys but levels may be left out:

        [[stages]]
        levels = [0.0, 0.3]   # where children part, where they are valued: 0 is noise, 1 is clean
        num_steps = 3         # at most; otherwise every level
        branch = 1            # children of each survivor (of stage 1: of each first noise)
        keep = 4              # survivors
        lookahead = 4         # steps; 0 values the clean estimate
        verifier = "layout"   # a role: --verifier layout=NAME; without it the one that steers
        share = 1.0           # of a budget, compared with the other stages

    Under a budget the shares say how many children a stage has, in place of branch, and keep is scaled with the number of
    first noises; a stage whose survivors just go on (branch 1, no re-noising) stays so. A stage that a coarse schedule
    has no level for is left out. A note on the tree tells for every stage the rank correlation (Spearman) between the
    values of children and those of their parents, over survivors only. Where it is below about 0.3, the stage before has
    chosen almost at random.

    Sources: no single paper. Halving survivors at equal shares: successive halving, Karnin et al. 2013, Jamieson &
    Talwalkar 2016 (arXiv 1502.07943); look-ahead: Oshima et al. 2025 (arXiv 2501.19252); re-noising: search over paths
    of Ma et al. 2025 (arXiv 2501.09732).
    """

    name: ClassVar[str] = "hierarchical"
    size_parameters: ClassVar[tuple[str, ...]] = ("width", "nfe")

    width: int = parameter(8, low=1, symbol="n", help="first noises")
    nfe: int | None = parameter(None, low=1, help="network evaluations for the stages to share; none takes width, branch and keep as they are")
    stages: str | Path | tuple[Stage, ...] | None = parameter(None, help="a TOML file of stages; none is the four built-in ones")  # noqa: RUF009 (a field)

    def __post_init__(self) -> None:
        check(self)
        object.__setattr__(self, "stages", make_stages(self.stages))

    @property
    def sequence(self) -> tuple[Stage, ...]:
        """The stages, in order."""
        assert isinstance(self.stages, tuple)
        return self.stages

    @property
    def roles(self) -> tuple[str, ...]:
        """The verifier roles that the stages name."""
        return tuple(dict.fromkeys((*(stage.verifier for stage in self.sequence), FINAL)))

    @property
    def needs(self) -> frozenset[str]:
        """A stochastic solver, where it is the steps that make children differ."""
        stands = [0.0, *(stage.levels[1] for stage in self.sequence)]
        by_steps = any(stage.branch > 1 and stage.levels[0] == level for stage, level in zip(self.sequence, stands, strict=False))
        return frozenset({"stochastic"} if by_steps else ())

    def rounds(self, schedule: Schedule, solver: SolverInfo) -> tuple[int, list[Round]]:
        """The number of first noises, and what is done in each stage on a schedule."""
        if self.nfe is None:
            return as_said(self.sequence, self.width, schedule)
        return shared_out(self.sequence, self.width, self.nfe, schedule, solver)

    def search(self, tree: TreeView) -> Search:
        """See the class. The values that decide are on the nodes; what is dropped is released at once."""
        width, rounds = self.rounds(tree.schedule, tree.solver)
        parents = yield Draw(width)
        worth: dict[Node, float | None] = {}
        for one in rounds:
            # Where nodes have failed there are fewer survivors, which share the children that were planned.
            count = min(one.children, len(parents)) if one.goes_on else one.children
            lineage = [parent for parent, share in zip(parents, deal(count, len(parents)), strict=True) for _ in range(share)]
            starts = lineage
            if one.back:
                starts = yield Renoise(lineage, to=one.start)
            children = yield from self._denoise(starts, one, last=one is rounds[-1])
            values = yield self._score(children, one, last=one is rounds[-1])
            kept = survivors(children, values, one.keep)
            pairs = [(worth.get(parent), value) for parent, value in zip(lineage, values, strict=False)]
            _report(tree, one, len(children), len(kept), pairs)
            if one is rounds[-1] or not kept:
                break
            yield let_go([*lineage, *starts, *children], keep=kept)
            parents, worth = kept, dict(zip(children, values, strict=True))
        return tree.best()

    def _denoise(self, starts: list[Node], one: Round, *, last: bool) -> Generator[Request, Any, list[Node]]:
        """The children; under a cap the last stage makes as many as it pays for."""
        while True:
            try:
                children: list[Node] = yield Denoise(starts, to=one.stop, num_steps=one.stage.num_steps)
                return children
            except BudgetExhausted as refusal:
                fewer = min(len(starts) - 1, len(starts) * (refusal.remaining or 0) // refusal.price)
                if not last or fewer < 1:
                    raise
                starts = starts[:fewer]

    def _score(self, children: list[Node], one: Round, *, last: bool) -> Score:
        role = None if one.stage.verifier == FINAL else one.stage.verifier
        if one.stage.lookahead and not last:
            return Score(children, verifier=role, at="lookahead", num_steps=one.stage.lookahead)
        return Score(children, verifier=role)

    def cost(self, setting: Setting) -> Cost:
        """Exact, as long as no node fails: a node's prediction is paid once, by whichever request needs it first."""
        width, rounds = self.rounds(setting.schedule, setting.solver)
        spend = Spend(nfe=sum(spends(width, rounds, setting.schedule, setting.solver))) + setting.result()
        for one in rounds:
            spend += setting.scoring(one.children, final=one is rounds[-1], role=one.stage.verifier)
        return Cost.exactly(spend)

    def fit(self, nfe: int, setting: Setting) -> Hierarchical:
        """The same stages, each with as many children as its share of `nfe` pays for.

        Raises:
          UsageError: if `nfe` does not pay for one child in every stage, with enough left to finish a sample.
        """
        shared_out(self.sequence, self.width, nfe, setting.schedule, setting.solver)
        return replace(self, nfe=nfe)


# What stages say of each other ---------------------------------------------------------------------------------------


def _report(tree: TreeView, one: Round, children: int, kept: int, pairs: Sequence[tuple[float | None, float | None]]) -> None:
    """A note on the tree: what a stage did, and how far the stage before foretold it."""
    known = [(before, after) for before, after in pairs if before is not None and after is not None]
    facts: dict[str, Any] = {"stage": one.number, "level": one.stop, "verifier": one.stage.verifier, "children": children, "survivors": kept}
    if one.start or one.back:
        facts |= {"rank_correlation": rank_correlation(known), "pairs": len(known)}
    tree.note(**facts)


def rank_correlation(pairs: Sequence[tuple[float, float]]) -> float | None:
    """Spearman's rank correlation of pairs, in [-1, 1], ties sharing their mean rank; None where one side is constant."""
    left, right = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
    if len(set(left)) < 2 or len(set(right)) < 2:
        return None
    return statistics.correlation(_ranks(left), _ranks(right))


def _ranks(values: Sequence[float]) -> list[float]:
    """1 for the lowest; equal values share the mean of their ranks."""
    ordered = sorted(values)
    first: dict[float, int] = {}
    for rank, value in enumerate(ordered, 1):
        first.setdefault(value, rank)
    return [first[value] + (ordered.count(value) - 1) / 2 for value in values]
