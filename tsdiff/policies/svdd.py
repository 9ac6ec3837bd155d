"""SVDD: at every step, several continuations and the choice of one by its value."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np

from tsdiff.policies.selection import let_go
from tsdiff.treesearch.errors import UsageError
from tsdiff.treesearch.ledger import Cost, Spend
from tsdiff.treesearch.node import Node
from tsdiff.treesearch.parameters import check, parameter
from tsdiff.treesearch.protocols import Search, Setting, TreeView
from tsdiff.treesearch.requests import Denoise, Draw, Score
from tsdiff.treesearch.resampling import ancestors, offspring
from tsdiff.treesearch.schedule import Schedule, SolverInfo


@dataclass(frozen=True, kw_only=True)
class SVDD:
    """Soft value-based decoding: one chain whose every step is chosen among M.

        x <- first noise
        for each step but the last:
            x_1 .. x_M <- M stochastic steps from x;  v_m <- score of the clean estimate of x_m
            soft (alpha > 0): x <- x_m with probability proportional to exp(v_m / alpha)
            hard (alpha = 0): x <- the x_m of highest value
        the answer is one plain step from x

    With exact values (1/lambda) log E[exp(lambda r(x0)) | x], lambda = 1/alpha, and M growing, the soft choice draws each
    step from the tilted law p(x0) exp(r(x0) / alpha). The M steps share one evaluation of x; the evaluation that scores
    the chosen one is the next step's. Null scores are chosen only where there is no other, failed nodes never; ties go
    to the oldest. Where the budget pays for fewer than M candidates, as many as it pays for are drawn.

    Source: Li et al. 2024, "Derivative-free guidance in continuous and discrete diffusion models with soft value-based
    decoding" (arXiv 2408.08252), with the clean estimate for a value (SVDD-PM). M = 20, alpha = 0 and a last step without
    a choice are those of its released code for images, which evaluates the chosen candidate twice.
    """

    name: ClassVar[str] = "svdd"
    size_parameters: ClassVar[tuple[str, ...]] = ("candidates",)

    candidates: int = parameter(20, low=1, symbol="M", help="continuations to choose from at each step")
    temperature: float = parameter(0.0, low=0.0, symbol="alpha", help="how freely to choose, in units of the score; 0 takes the best")

    def __post_init__(self) -> None:
        check(self)

    @property
    def needs(self) -> frozenset[str]:
        """Steps that differ. Values are compared within one set only, unless they become probabilities."""
        return frozenset(({"stochastic"} if self.candidates > 1 else set()) | ({"absolute"} if self.temperature > 0.0 else set()))

    def search(self, tree: TreeView) -> Search:
        """See the class. The candidates and their values are in the tree."""
        rng = tree.rng("svdd", "choose")
        count = self._affordable(tree)
        (node,) = yield Draw()
        for level in range(1, tree.schedule.last):
            children = yield Denoise(node, to=level, copies=count)
            values = yield Score(children)
            chosen = self._choose(children, values, rng)
            if chosen is None:
                return tree.best()  # all have failed
            yield let_go((node, *children), keep=[chosen])
            node = chosen
        (leaf,) = yield Denoise(node, to=tree.schedule.last)
        yield Score(leaf)
        if not leaf.failed:  # otherwise another sample may still be made from what is there
            yield let_go([node], keep=())
        return tree.best()

    def _choose(self, children: Sequence[Node], values: Sequence[float | None], rng: np.random.Generator) -> Node | None:
        """One child by value; None if all have failed."""
        usable = [(child, value) for child, value in zip(children, values, strict=True) if not child.failed]
        scored = [(child, value) for child, value in usable if value is not None]
        if not usable:
            return None
        if not scored:
            return usable[0][0]
        if self.temperature == 0.0:
            return max(scored, key=lambda pair: pair[1])[0]  # of equals the first
        peak = max(value for _, value in scored)
        (place,) = ancestors(offspring([(value - peak) / self.temperature for _, value in scored], rng, "multinomial", count=1))
        return scored[place][0]

    def _affordable(self, tree: TreeView) -> int:
        """M, or as many candidates as the budget pays for to the end."""
        if tree.budget.remaining is None:
            return self.candidates
        return max(1, min(self.candidates, _most(tree.budget.remaining, tree.schedule, tree.solver)))

    def cost(self, setting: Setting) -> Cost:
        """1 + M (S - 1) evaluations with S steps of one stage: the first noise's and every candidate's."""
        scores = setting.scoring(self.candidates, final=False) * (setting.schedule.last - 1) + setting.scoring(1, final=True)
        return Cost.exactly(Spend(nfe=_price(self.candidates, setting.schedule, setting.solver)) + scores + setting.result())

    def fit(self, nfe: int, setting: Setting) -> SVDD:
        """As many candidates as `nfe` pays for.

        Raises:
          UsageError: if it does not pay for one.
        """
        candidates = _most(nfe, setting.schedule, setting.solver)
        if candidates < 1:
            raise UsageError(f"{self.name}: a budget of {nfe} NFE is too small; one candidate a step needs {setting.sample_cost} NFE, raise the budget")
        return replace(self, candidates=candidates)


def _price(candidates: int, schedule: Schedule, solver: SolverInfo) -> int:
    """NFE of one chain with so many candidates a step."""
    steps = [schedule.step_cost(level, solver.stages) for level in range(1, schedule.last + 1)]
    return candidates * sum(steps[:-1]) + steps[-1]


def _most(nfe: int, schedule: Schedule, solver: SolverInfo) -> int:
    """The most candidates that `nfe` pays for; a single step has none to choose from."""
    more = _price(1, schedule, solver) - _price(0, schedule, solver)
    if nfe < _price(1, schedule, solver):
        return 0
    return 1 if not more else (nfe - _price(0, schedule, solver)) // more
