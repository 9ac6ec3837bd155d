"""A policy of your own: write the generator, price it, register it, and compare it with best-of-n at equal NFE.

`GoBack` takes one sample and improves it: go back part of the way by re-noising, denoise again, keep what is better.

    python examples/custom_policy.py
"""

from dataclasses import dataclass, replace
from typing import ClassVar

import tsdiff
from tsdiff.plugin import Cost, Denoise, Draw, Release, Renoise, Score, Spend, UsageError, check, parameter, register_policy


@register_policy
@dataclass(frozen=True, kw_only=True)
class GoBack:
    """Hill climbing: re-noise the best sample to an earlier level, denoise, keep the better one."""

    name: ClassVar[str] = "go-back"
    size_parameters: ClassVar[tuple[str, ...]] = ("rounds",)  # what `fit` may choose when only a budget is given
    needs: ClassVar[frozenset[str]] = frozenset()  # any solver, any verifier

    rounds: int = parameter(8, low=0, help="attempts to improve the sample")
    copies: int = parameter(4, low=1, help="samples in each attempt")
    share: float = parameter(0.4, above=0.0, below=1.0, help="level to go back to, as a share of the schedule")

    def __post_init__(self):
        check(self)

    def level(self, schedule):
        """The level to go back to: after noise, before the clean end."""
        return min(max(1, round(self.share * schedule.last)), schedule.last - 1)

    def search(self, tree):
        """Yield what should be done; the engine does it, in batches with other trees, and replies."""
        last = tree.schedule.last
        roots = yield Draw()
        leaves = yield Denoise(roots, to=last)
        yield Score(leaves)
        for _ in range(self.rounds):
            best = tree.best() or leaves[0]  # no best: not a single score was a number
            starts = yield Renoise(best, to=self.level(tree.schedule), copies=self.copies)
            leaves = yield Denoise(starts, to=last)
            yield Score(leaves)
            yield Release(starts)  # never grown again: their latents may leave memory
        return tree.best()

    def cost(self, setting):
        """Exact: nothing here depends on scores."""
        samples = 1 + self.rounds * self.copies
        again = setting.denoise_cost(self.level(setting.schedule), setting.schedule.last)
        nfe = setting.sample_cost + self.rounds * self.copies * again
        return Cost.exactly(Spend(nfe=nfe) + setting.scoring(samples, final=True) + setting.result())

    def fit(self, nfe, setting):
        """As many rounds as `nfe` pays for."""
        first, both = (replace(self, rounds=rounds).cost(setting).upper.nfe for rounds in (0, 1))
        if nfe < first:
            raise UsageError(f"{self.name}: a budget of {nfe} NFE is too small; the first sample needs {first}")
        return replace(self, rounds=(nfe - first) // (both - first))


def main():
    """Ten seeds, the same first noises for both policies, the same budget."""
    for policy in ("best-of-n", "go-back"):
        results = tsdiff.search("gaussian", "near (3, 2.4)", policy=policy, nfe=400, seed=range(10))
        mean = sum(result.score for result in results) / len(results)
        spent = max(result.ledger.nfe for result in results)
        print(f"{policy:10} mean score {mean:8.4f} over {len(results)} seeds, at most {spent} NFE each")


if __name__ == "__main__":
    main()
