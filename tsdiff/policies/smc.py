"""Sequential Monte Carlo: a population of partly denoised samples, resampled in proportion to what they promise."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import ClassVar, Literal

import numpy as np

from tsdiff.policies.selection import let_go
from tsdiff.treesearch.errors import UsageError
from tsdiff.treesearch.ledger import Cost, Spend
from tsdiff.treesearch.node import Node
from tsdiff.treesearch.parameters import check, parameter
from tsdiff.treesearch.protocols import Search, Setting, TreeView
from tsdiff.treesearch.requests import Denoise, Draw, Score
from tsdiff.treesearch.resampling import Counts, Floats, ancestors, effective_size, log_mean_exp, normalise, offspring, temper
from tsdiff.treesearch.schedule import Schedule


@dataclass(frozen=True, kw_only=True)
class SMC:
    """Feynman-Kac steering: K particles whose weighted end points follow the law p(x0) exp(lambda r(x0)).

        x_k <- first noise, log w_k <- 0, log Z <- 0                  for k = 1..K
        for each level l to resample at:
            x_k <- stochastic steps from x_k to l;  r_k <- score of its clean estimate
            log w_k <- log w_k + log G_l(rewards of x_k and its ancestors)
            if ESS(w) < tau K:
                log Z <- log Z + log mean w;  x <- resample x by w;  log w <- 0
        x_k <- finished samples;  log w_k <- log w_k + lambda r(x_k) - log(product of its potentials so far)
        log Z <- log Z + log mean w;  the answer is the sample of highest reward

    Potentials, with r_1, r_2, ... the rewards of a particle and its ancestors at the levels so far, and r_0 = 0:

        difference   G_l = exp(lambda (r_l - r_(l-1)))     max   G_l = exp(lambda max_(1 <= i <= l) r_i)
        rt           G_l = exp(lambda r_l)                 sum   G_l = exp(lambda sum_(1 <= i <= l) r_i)

    The last potential makes every product exp(lambda r(x0)), so the weighted samples target the tilted law whatever
    the intermediate potentials, and the estimate of Z = E[exp(lambda r(x0))] is unbiased at any K. The potentials differ
    in variance and in greed: "max" is for search, "difference" for sampling. lambda = 10 was chosen for rewards that spread
    by about 1. Weights that no resampling has spent are carried on. Tempering multiplies lambda by an exponent beta that grows to 1 at the end: "ramp" is
    min((1 + gamma)^(100 s) - 1, 1) at the share s of the schedule (Kim et al.), "ess" the largest beta, at least that of
    the level before, that keeps the share `keep_ess` of the effective size; where it is below 1, it resamples.

    A particle without a score keeps its share of the population's weight, at the last level it has none; a failed one
    has weight 0. Where the budget pays for fewer than K samples, the population is as large as it pays for.

    Written down: at each level the effective size, the largest weight, whether it resampled and how many first noises
    have descendants; on every sample its `weight` (they add up to 1); at the end `log_z`, null if nothing was scored.

    Sources: Singhal et al. 2025 (arXiv 2501.06848), whose released settings are the defaults. Deviations: the last
    potential is the paper's, where the code keeps the running maximum or sum; the maximum does not start from 0; a score is
    of the state that is weighed, not of the one a step before; SSP resampling when the effective size falls, where the
    code resamples multinomially at every level (`resampling=multinomial`, `ess_threshold=none`), which loses particles of
    equal weight (Zhang et al. 2025, arXiv 2505.23614). Tempering: Kim et al. 2025 (arXiv 2501.05803).
    """

    name: ClassVar[str] = "smc"
    size_parameters: ClassVar[tuple[str, ...]] = ("particles",)

    particles: int = parameter(4, low=1, symbol="K", help="samples that are denoised side by side")
    inverse_temperature: float = parameter(10.0, low=0.0, symbol="lambda", help="how strongly rewards count, in units of 1/score; 0 samples the model")
    potential: Literal["difference", "max", "sum", "rt"] = parameter("max", symbol="G", help="what a level's reward does to the weight")
    interval: float = parameter(0.2, low=0.001, high=1.0, help="distance between levels to resample at, as a share of the schedule; at least one level")
    t_start: float = parameter(0.2, low=0.0, high=1.0, help="first level to resample at, as a share of the schedule from noise (0) to clean (1)")
    t_end: float = parameter(0.8, low=0.0, high=1.0, help="last level to resample at, likewise")
    resampling: Literal["multinomial", "residual", "systematic", "ssp"] = parameter("ssp", help="how weights become numbers of offspring")
    ess_threshold: float | None = parameter(0.5, low=0.0, high=1.0, symbol="tau", help="resample where the effective size is below this share of K; none resamples at every level")
    tempering: Literal["none", "ramp", "ess"] = parameter("none", help="how rewards are weighed in: at once, along a fixed ramp, or as the effective size allows")
    gamma: float = parameter(0.008, above=0.0, high=1.0, symbol="gamma", help="growth of the ramp with each hundredth of the schedule")
    keep_ess: float = parameter(0.5, above=0.0, below=1.0, help='effective size that tempering "ess" keeps, as a share of the particles')

    def __post_init__(self) -> None:
        check(self)
        if self.t_start > self.t_end:
            raise UsageError(f"{self.name}: t_start is {self.t_start:g} but must be at most t_end, which is {self.t_end:g}; 0 is noise and 1 is clean")

    @property
    def needs(self) -> frozenset[str]:
        """Scores that compare across levels, and steps that make the copies of a particle part."""
        return frozenset({"absolute", "stochastic"} if self.particles > 1 else {"absolute"})

    def levels(self, schedule: Schedule) -> list[int]:
        """The levels to resample at, in order."""
        last = schedule.last
        step = max(self.interval * last, 1.0)
        count = int((self.t_end - self.t_start) * last / step + 1e-9) + 1
        return sorted({min(max(int(self.t_start * last + i * step + 0.5), 1), last - 1) for i in range(count)} if last > 1 else ())

    def search(self, tree: TreeView) -> Search:
        """See the class. The weights are on the finished samples, the estimate of log Z in the tree's notes."""
        rng = tree.rng("smc", "resample")
        nodes: list[Node] = yield Draw(self._affordable(tree))
        population = _Population(len(nodes))
        origins = list(range(len(nodes)))  # which first noise each particle descends from
        beta = 0.0
        for level in self.levels(tree.schedule):
            parents, nodes = nodes, (yield Denoise(nodes, to=level))
            population.add_rewards((yield Score(nodes)), failed=[node.failed for node in nodes])
            products = [self._log_product(history) for history in population.histories]
            beta = self._exponent(level / tree.schedule.last, population, products, beta)
            population.weigh([beta * product for product in products])
            if population.dead:
                return tree.best()  # every particle has failed
            size, largest = effective_size(population.log_w), float(normalise(population.log_w).max())
            held_back = self.tempering == "ess" and beta < 1.0
            resample = self.ess_threshold is None or size < self.ess_threshold * len(nodes) or held_back
            dropped = parents
            if resample:
                counts = offspring(population.log_w, rng, self.resampling)
                dropped = parents + [node for node, count in zip(nodes, counts, strict=True) if not count]
                chosen = population.resample(counts)
                nodes, origins = [nodes[k] for k in chosen], [origins[k] for k in chosen]
            alive = {origin for origin, node in zip(origins, nodes, strict=True) if not node.failed}
            tree.note(level=level, ess=size, max_weight=largest, resampled=resample, ancestors=len(alive), exponent=beta)
            yield let_go(dropped, keep=())
        leaves = yield Denoise(nodes, to=tree.schedule.last)
        rewards = yield Score(leaves)
        population.finish([None if reward is None else self.inverse_temperature * reward for reward in rewards])
        if not all(leaf.failed for leaf in leaves):  # otherwise another sample may still be made from what is there
            yield let_go(nodes, keep=())
        if population.dead:
            tree.note(particles=len(leaves), log_z=None)
            return tree.best()
        for leaf, weight in zip(leaves, normalise(population.log_w).tolist(), strict=True):
            tree.note(leaf, weight=weight)
        tree.note(particles=len(leaves), log_z=population.log_z + log_mean_exp(population.log_w), ess=effective_size(population.log_w))
        return tree.best()

    def _log_product(self, rewards: Sequence[float]) -> float:
        """log of the product of a history's potentials, without tempering; 0 before the first reward."""
        if self.potential == "difference":
            terms = rewards[-1:]
        elif self.potential == "max":
            terms = list(accumulate(rewards, max))
        elif self.potential == "sum":
            terms = list(accumulate(rewards))
        else:
            terms = rewards
        return self.inverse_temperature * math.fsum(terms)

    def _exponent(self, share: float, population: _Population, products: Sequence[float], before: float) -> float:
        """The tempering exponent beta at a share of the schedule."""
        if self.tempering == "none":
            return 1.0
        if self.tempering == "ramp":
            return float(min((1.0 + self.gamma) ** (100.0 * share) - 1.0, 1.0))
        scored = population.scored
        if not scored.any():
            return before
        unspent = (population.log_w - population.spent)[scored]
        return temper(unspent, np.array(products)[scored], self.keep_ess * int(scored.sum()), low=before)

    def _affordable(self, tree: TreeView) -> int:
        """K, or as many samples as the budget pays for: better fewer that finish than K that do not."""
        remaining, schedule = tree.budget.remaining, tree.schedule
        if remaining is None:
            return self.particles
        return max(1, min(self.particles, remaining // schedule.span_cost(schedule.span(0, schedule.last), tree.solver.stages)))

    def cost(self, setting: Setting) -> Cost:
        """K samples and the scores of K particles at each level, as long as no node fails.

        A particle's prediction is made to score it, and used by the steps of all of its copies.
        """
        checks = len(self.levels(setting.schedule))
        scores = checks * setting.scoring(self.particles, final=False) + setting.scoring(self.particles, final=True)
        return Cost.exactly(Spend(nfe=self.particles * setting.sample_cost) + scores + setting.result())

    def fit(self, nfe: int, setting: Setting) -> SMC:
        """As many particles as `nfe` pays for.

        Raises:
          UsageError: if it does not pay for one.
        """
        particles = nfe // setting.sample_cost
        if particles < 1:
            raise UsageError(f"{self.name}: a budget of {nfe} NFE is too small; one particle needs {setting.sample_cost} NFE, raise the budget")
        return replace(self, particles=particles)


class _Population:
    """What goes with each particle, and is passed on to its offspring.

    Attributes:
      log_w: (K,) log weights since the last resampling.
      spent: (K,) log of the product of all potentials that the weights have ever held.
      histories: rewards of the particle and its ancestors at the levels so far, null ones left out.
      scored: (K,) whether the particle had a score at this level.
      log_z: log of the estimate of the normaliser up to the last resampling.
    """

    def __init__(self, count: int) -> None:
        self.log_w: Floats = np.zeros(count)
        self.spent: Floats = np.zeros(count)
        self.histories: list[tuple[float, ...]] = [()] * count
        self.scored = np.zeros(count, dtype=bool)
        self.log_z = 0.0

    @property
    def dead(self) -> bool:
        """Whether no particle has any weight."""
        return bool((self.log_w == -math.inf).all())

    def add_rewards(self, rewards: Sequence[float | None], failed: Sequence[bool]) -> None:
        """Note a level's rewards; failed particles lose their weight."""
        self.scored = np.array([reward is not None for reward in rewards])
        self.histories = [old if new is None else (*old, new) for old, new in zip(self.histories, rewards, strict=True)]
        self.log_w = np.where(failed, -math.inf, self.log_w)

    def weigh(self, products: Sequence[float]) -> None:
        """Bring the log product of potentials to `products`; particles without a score keep their share of the weight."""
        scored = self.scored
        if not scored.any():
            return
        gains = np.where(scored, np.array(products) - self.spent, 0.0)
        gains[~scored] = log_mean_exp((self.log_w + gains)[scored]) - log_mean_exp(self.log_w[scored])
        self.log_w, self.spent = self.log_w + gains, self.spent + gains

    def resample(self, counts: Counts) -> list[int]:
        """Replace particles by their offspring, of equal weight; returns their parents."""
        self.log_z += log_mean_exp(self.log_w)
        chosen = ancestors(counts)
        self.log_w = np.zeros(len(chosen))
        self.spent = self.spent[chosen]
        self.histories = [self.histories[k] for k in chosen]
        return chosen

    def finish(self, logs: Sequence[float | None]) -> None:
        """The last potential: the product becomes exp(lambda r(x0)); a sample without a score has no weight."""
        targets = np.array([-math.inf if log is None else log for log in logs])
        self.log_w = self.log_w + targets - self.spent
