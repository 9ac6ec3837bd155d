"""Best-of-N: draw N samples, keep the one that the verifier likes best."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from tsdiff.treesearch.errors import BudgetExhausted, UsageError
from tsdiff.treesearch.ledger import Cost, Spend
from tsdiff.treesearch.parameters import check, parameter
from tsdiff.treesearch.protocols import Search, Setting, TreeView
from tsdiff.treesearch.requests import Denoise, Draw, Release, Score


@dataclass(frozen=True, kw_only=True)
class BestOfN:
    """Random search: N first noises, each denoised on its own; the best finished sample wins.

    The baseline that every search has to beat at equal compute. The i-th sample is the same for every N, so its score
    never falls as N grows.

    Source: the random search of Ma et al. 2025, "Inference-time scaling for diffusion models beyond scaling denoising
    steps" (arXiv 2501.09732).
    """

    name: ClassVar[str] = "best-of-n"
    size_parameters: ClassVar[tuple[str, ...]] = ("n",)

    n: int = parameter(4, low=1, symbol="N", help="samples to draw")

    def __post_init__(self) -> None:
        check(self)

    @property
    def needs(self) -> frozenset[str]:
        """Nothing: any solver and any verifier will do."""
        return frozenset()

    def search(self, tree: TreeView) -> Search:
        """Draw, denoise, score; under a budget for fewer than N samples, take as many as it pays for."""
        last = tree.schedule.last
        roots = yield Draw(self.n)
        try:
            leaves = yield Denoise(roots, to=last)
        except BudgetExhausted as refusal:
            affordable = self.n * (refusal.remaining or 0) // refusal.price
            if affordable == 0:
                raise
            leaves = yield Denoise(roots[:affordable], to=last)
        yield Score(leaves)
        best = tree.best()
        kept = best.path() if best is not None else ()
        yield Release([root for root, leaf in zip(roots, leaves, strict=False) if not leaf.failed and root not in kept])
        return best

    def cost(self, setting: Setting) -> Cost:
        """N samples, each scored once."""
        return Cost.exactly(Spend(nfe=self.n * setting.sample_cost) + setting.scoring(self.n, final=True) + setting.result())

    def fit(self, nfe: int, setting: Setting) -> BestOfN:
        """As many samples as `nfe` pays for; less than one is left over.

        Raises:
          UsageError: if it does not pay for one.
        """
        n = nfe // setting.sample_cost
        if n < 1:
            raise UsageError(f"{self.name}: a budget of {nfe} NFE is too small; one sample needs at least {setting.sample_cost} NFE")
        return replace(self, n=n)
