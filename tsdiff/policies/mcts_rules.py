"""The hyperparameters of `mcts`, and what follows from them alone; the algorithm is in `mcts`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from tsdiff.treesearch.parameters import check, parameter
from tsdiff.treesearch.schedule import Schedule

GUMBEL_CANDIDATES = 16  # considered at the root unless `width` says otherwise, as in the authors' library


@dataclass(frozen=True, kw_only=True)
class Rules:
    """How `MCTS` selects, expands, values and backs up."""

    simulations: int = parameter(16, low=1, symbol="n", help="simulations; each opens one child")
    until_nfe: int | None = parameter(None, low=1, help="simulate for as long as so many NFE pay for it, whatever `simulations` says (which then only plans the halving of gumbel); none does not")
    width: int | None = parameter(None, low=1, help="first noises: a fixed number of them; none widens the root like any place, and is 16 for gumbel")
    branch: int | None = parameter(None, low=1, help="children of every other place: a fixed number of them; none is progressive widening")
    widening: float = parameter(2.0, above=0.0, symbol="C", help="a place of N visits may have C N^a children")
    exponent: float = parameter(0.8, above=0.0, high=1.0, symbol="a", help="exponent of progressive widening")
    levels: tuple[float, ...] = parameter((0.2, 0.4, 0.6, 0.8), above=0.0, below=1.0, help="branch levels, as shares of the schedule from noise (0) to clean (1)")
    jump: float = parameter(0.2, above=0.0, high=1.0, help="how far re-noised children go back, as a share of the schedule; at least one level")
    branch_by: Literal["renoise", "step"] = parameter("renoise", help="children part by fresh noise from the forward kernel, or by the noise of stochastic steps")
    value: Literal["x0", "lookahead", "rollout"] = parameter("x0", help="what a simulation scores: the child's clean estimate, a short deterministic look-ahead, or a sample finished from it")
    lookahead_steps: int = parameter(6, low=1, symbol="T'", help="steps of the look-ahead")
    finish: int = parameter(4, low=1, help="leaves that are finished at the end, the best first, where simulations do not finish samples themselves")
    selection: Literal["uct", "puct", "boltzmann", "gumbel"] = parameter("uct", help="how a simulation chooses among children")
    exploration: float | None = parameter(None, low=0.0, symbol="c", help="exploration constant, for values in [0, 1]; none is sqrt(2) for uct and 1.25 for puct")
    inverse_temperature: float = parameter(5.0, low=0.0, symbol="lambda", help="of Boltzmann selection, the prior and the soft back-up, for values in [0, 1]")
    prior: Literal["x0", "uniform"] = parameter("x0", help="prior of puct and gumbel: a softmax of the scores of clean estimates (verifier calls, but no NFE), or none")
    c_visit: float = parameter(50.0, low=0.0, symbol="c_visit", help="gumbel: values weigh (c_visit + largest visit count) c_scale")
    c_scale: float = parameter(0.1, above=0.0, symbol="c_scale", help="gumbel: see c_visit")
    backup: Literal["max", "mean", "soft"] = parameter("max", help="what a place is worth: its best child, the mean of all returns, or (1/lambda) ln mean exp(lambda v) of its children")
    in_flight: int = parameter(8, low=1, symbol="P", help="simulations that are carried out in one batch at most")
    parallel: Literal["unobserved", "virtual-loss"] = parameter("unobserved", help="what simulations in flight count as: visits without a value, or with the worst")

    def __post_init__(self) -> None:
        check(self)

    @property
    def needs(self) -> frozenset[str]:
        """Scores that can be compared between batches; a stochastic solver where it is the steps that make children differ."""
        return frozenset({"absolute", "stochastic"} if self.branch_by == "step" else {"absolute"})

    @property
    def roots(self) -> int | None:
        """The fixed number of first noises, None if there is none."""
        return GUMBEL_CANDIDATES if self.width is None and self.selection == "gumbel" else self.width

    @property
    def with_prior(self) -> bool:
        """Whether clean estimates of branch levels are scored for the prior."""
        return self.prior == "x0" and self.selection in ("puct", "gumbel")

    def stops(self, schedule: Schedule) -> tuple[int, ...]:
        """The level of every depth: 0, the branch levels, and the last."""
        last = schedule.last
        deepest = last - 1 if self.branch_by == "renoise" else last - 2  # the last step alone may draw no noise
        inner = {min(max(int(share * last + 0.5), 1), deepest) for share in self.levels} if deepest >= 1 else set()
        return (0, *sorted(inner), last)

    def back(self, level: int, last: int) -> int:
        """The level that a re-noised child of a place at `level` starts from."""
        return max(0, level - max(1, int(self.jump * last + 0.5)))
