"""Policies with nothing wrong, for broken ones to be made of."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from tsdiff.plugin import Cost, Denoise, Draw, Score, Spend, UsageError, check, parameter


@dataclass(frozen=True, kw_only=True)
class Sound:
    """Best of n, with nothing wrong."""

    name: ClassVar[str] = "test-sound"
    size_parameters: ClassVar[tuple[str, ...]] = ("n",)
    needs: ClassVar[frozenset[str]] = frozenset()

    n: int = parameter(2, low=1, help="samples")

    def __post_init__(self):
        check(self)

    def search(self, tree):
        leaves = yield from self.sample(tree, self.n)
        return tree.best() or next((leaf for leaf in leaves if not leaf.failed), None)

    def sample(self, tree, count):
        """Some finished, scored samples."""
        leaves = yield Denoise((yield Draw(count)), to=tree.schedule.last)
        yield Score(leaves)
        return leaves

    def cost(self, setting):
        return Cost.exactly(Spend(nfe=self.n * setting.sample_cost) + setting.scoring(self.n, final=True) + setting.result())

    def fit(self, nfe, setting):
        if nfe < setting.sample_cost:
            raise UsageError(f"a budget of {nfe} NFE is too small; the smallest is {setting.sample_cost}")
        return replace(self, n=nfe // setting.sample_cost)


class Varied(Sound):
    """Two samples, and as many more as its `choose` says."""

    most: ClassVar[int] = 1

    def search(self, tree):
        leaves = yield from self.sample(tree, 2)
        if more := self.choose(tree, leaves):
            yield from self.sample(tree, int(more))
        return tree.best() or next((leaf for leaf in leaves if not leaf.failed), None)

    def choose(self, tree, leaves):
        """At most `most`."""
        raise NotImplementedError

    def cost(self, setting):
        fewest, most = (Sound.cost(replace(self, n=n), setting).upper for n in (2, 2 + self.most))
        return Cost(fewest, most)

    def fit(self, nfe, setting):
        price = self.cost(setting).upper.nfe
        if nfe < price:
            raise UsageError(f"a budget of {nfe} NFE is too small; the smallest is {price}")
        return self
