"""Zero-order search: hill climbing in the first noise, one small rotation after another."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from tsdiff.policies.selection import let_go
from tsdiff.treesearch.errors import UsageError
from tsdiff.treesearch.ledger import Cost, Spend
from tsdiff.treesearch.noise import Fresh, Mix, Recipe, Rotate
from tsdiff.treesearch.parameters import check, parameter
from tsdiff.treesearch.protocols import Search, Setting, TreeView
from tsdiff.treesearch.requests import Denoise, Draw, Score


@dataclass(frozen=True, kw_only=True)
class ZeroOrder:
    """Zero-order search (ZO-N): samples from N noises near the best one so far, R times over.

        pivot <- a first noise, denoised and scored
        repeat R times:
            Y     <- N neighbours of the pivot, denoised and scored in one batch
            pivot <- the best of Y, if it is better than the pivot
            after p rounds in a row without a better one: Y <- N first noises, pivot <- the best of them

    Two neighbourhoods, both of strength rho = "cosine", the expected cosine between a noise and its neighbours. With n the
    pivot's noise in d dimensions:

        spherical   |n| (rho n/|n| + sqrt(1 - rho^2) w), w a random unit vector orthogonal to n: norm and cosine are exact
        pcn         rho n + sqrt(1 - rho^2) xi, xi ~ N(0, I): the law N(0, I) of independent noises is kept exactly

    Choose "pcn" where samples should stay draws from the model; "spherical" is the published one. The sample is a function
    of its first noise only under a deterministic solver: under a stochastic one a neighbour has new noise at every step, and
    the more a step forgets, the less is left to climb. Null scores never win; a tie keeps the pivot, then the oldest.

    Source: Ma et al. 2025, "Inference-time scaling for diffusion models beyond scaling denoising steps"
    (arXiv 2501.09732), N = 2 for text-to-image; the spherical neighbourhood and rho = 0.95 are those of its first author's
    code. Deviations: the pivot competes with its neighbours and is not made again each round; the restarts, which the paper
    does not have (`patience=none` is without); a restart round is N first noises instead of one, so that every round costs
    the same.
    """

    name: ClassVar[str] = "zero-order"
    size_parameters: ClassVar[tuple[str, ...]] = ("rounds", "extra")

    neighbours: int = parameter(2, low=1, symbol="N", help="samples of a round")
    rounds: int = parameter(8, low=0, symbol="R", help="rounds after the first sample")
    extra: int = parameter(0, low=0, help="samples of one more, last round; how `fit` spends what is left after whole rounds")
    neighbourhood: Literal["spherical", "pcn"] = parameter("spherical", help="neighbours of equal norm, or neighbours that keep the law of the noise")
    cosine: float = parameter(0.95, low=0.0, high=1.0, symbol="rho", help="cosine between a pivot and its neighbours: 1 stays, 0 forgets")
    patience: int | None = parameter(4, low=1, symbol="p", help="rounds in a row without a better sample after which the search starts anew; none never does")

    def __post_init__(self) -> None:
        check(self)

    @property
    def needs(self) -> frozenset[str]:
        """Nothing: any solver and any verifier will do."""
        return frozenset()

    @property
    def round_sizes(self) -> list[int]:
        """Samples of each round."""
        return [self.neighbours] * self.rounds + [self.extra] * (self.extra > 0)

    @property
    def num_samples(self) -> int:
        """All samples: 1 + R N, and those of a last, odd round."""
        return 1 + sum(self.round_sizes)

    def search(self, tree: TreeView) -> Search:
        """See the class. A note for each round says what the pivot is after it, and whether the round was a restart."""
        last = tree.schedule.last
        roots = yield Draw()
        pivot, *_ = yield Denoise(roots, to=last)
        (score,) = yield Score(pivot)
        yield let_go(roots, keep=[])
        base = 0  # which root the pivot came from; a root's noise can be moved again, however it was made itself
        num_roots = num_firsts = 1
        failed_rounds = 0
        for number, size in enumerate(self.round_sizes, 1):
            restart = failed_rounds == self.patience
            if restart:
                noises: list[Recipe] = [Fresh(num_firsts + i) for i in range(size)]
                num_firsts += size
            else:
                noises = [self._neighbour(base, num_roots + i) for i in range(size)]
            roots = yield Draw(size, noises)
            leaves = yield Denoise(roots, to=last)
            score, *values = yield Score([pivot, *leaves])  # the pivot too: a verifier may rank within a set
            best = max(range(size), key=lambda place: (-math.inf if values[place] is None else values[place], -place))
            old = pivot
            if restart or (values[best] is not None and (score is None or values[best] > score)):
                pivot, score, base, failed_rounds = leaves[best], values[best], num_roots + best, 0
            else:
                failed_rounds += 1
            num_roots += size
            tree.note(round=number, restart=restart, pivot=pivot.index, score=score)
            yield let_go([*roots, *leaves, old], keep=[pivot, tree.best()])
        return tree.best()

    def _neighbour(self, base: int, index: int) -> Recipe:
        """Neighbour of the noise of root `base`, in the random direction number `index`."""
        if self.neighbourhood == "spherical":
            return Rotate(base, self.cosine, index)
        return Mix({base: self.cosine}, fresh=(index, math.sqrt(1.0 - self.cosine**2)))

    def cost(self, setting: Setting) -> Cost:
        """Exact: 1 + R N samples, each scored once. A verifier that ranks sees the pivot again in every round."""
        spend = Spend(nfe=self.num_samples * setting.sample_cost) + setting.scoring(self.num_samples, final=True) + setting.result()
        if setting.verifier.scope == "set":
            spend += setting.scoring(len(self.round_sizes), final=False)
        return Cost.exactly(spend)

    def fit(self, nfe: int, setting: Setting) -> ZeroOrder:
        """As many whole rounds as `nfe` pays for, and a shorter last one of what samples are left.

        Raises:
          UsageError: if it does not pay for one sample.
        """
        samples = nfe // setting.sample_cost
        if samples < 1:
            raise UsageError(f"{self.name}: a budget of {nfe} NFE is too small; one sample needs at least {setting.sample_cost} NFE")
        rounds, extra = divmod(samples - 1, self.neighbours)
        return replace(self, rounds=rounds, extra=extra)
