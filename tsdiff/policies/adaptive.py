"""Adaptive compute: one budget over many prompts, spent where it is expected to raise scores the most."""

from __future__ import annotations

import heapq
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Any, ClassVar, Self

from tsdiff.policies.best_of_n import BestOfN
from tsdiff.treesearch import registry
from tsdiff.treesearch.errors import UsageError
from tsdiff.treesearch.ledger import Cost, Spend
from tsdiff.treesearch.parameters import build, check, parameter
from tsdiff.treesearch.protocols import Allocation, Allocator, ForestView, Grant, Outcome, Policy, Setting


@dataclass(frozen=True, kw_only=True)
class Adaptive:
    """One budget (`--total-nfe`) over all prompts: a pilot of each, then compute where it is expected to help the most.

        pilot <- a few samples of every prompt
        in every round:
            fit each prompt's n scores by a Gaussian: mean mu, spread s; m is its best score so far
            deal out a part of what is left, sample by sample, each to the prompt with the highest expected gain
            search every prompt that got something with the policy, fitted to what it got
        until nothing is left, or every prompt has reached the target

    The gain is that of best-of-n. A further sample follows Student's law with nu degrees of freedom, centre mu and scale
    c = s sqrt(1 + 1/n): a Gaussian whose mean and spread are known from n samples only. With z = (m - mu) / c it beats m
    with chance p = 1 - T_nu(z), on average by b = c ((nu + z^2) / (nu - 1) t_nu(z) / p - z). Taking excesses over m as
    exponential with this mean (their limit law over a high threshold), the j-th further sample raises the expected best by

        g(j) = b ((1 - q)^j - (1 - p)^j) / j,     q = p exp(-(T - m) / b),

    counted up to the target T (q = 0 without one). g(1) is exact for T far away, and g falls with j, so dealing greedily is
    optimal. For policies other than best-of-n, this stands in for what more compute does.

    A spread from a few samples is unreliable, and 0 where they tie. So prompts share it: s^2 is the prompt's own variance
    averaged with the square of all prompts' mean spread, which counts as nu0 further degrees of freedom: nu = nu0 + n - 1.
    Without any spread at all, and for `pilot=0`, all prompts get the same.

    The fit knows no upper bound. Where scores have one (1 for a share of facts that hold), give it, or what is close enough
    to it, as the target; otherwise compute is wasted on prompts that cannot get better.

    Pilot samples are candidates for the answer. In later rounds a policy starts from first noises that the prompt has not
    used, so with best-of-n (the default) a prompt that was given n samples has the n samples of best-of-n. A policy that
    does more with one large budget than with several small ones, such as beam search, is best used with rounds=1. `fit`
    sets its size; its other parameters are set as policy.NAME=VALUE.

    Sources: expected improvement, Mockus 1975 and Jones, Schonlau & Welch 1998; variances moderated by those of others and
    Student's law, Smyth 2004 (here with fixed nu0); exponential excesses, Pickands 1975. No paper shares a budget among
    prompts in exactly this way.
    """

    name: ClassVar[str] = "adaptive"

    policy: Any = parameter("best-of-n", help="the policy that searches, by name or as an object; policy.NAME=VALUE sets its parameters")  # noqa: RUF009 - a field
    pilot: int = parameter(4, low=0, symbol="n0", help="samples of every prompt to begin with, at most half of the budget; 0 shares equally at once")
    rounds: int = parameter(4, low=1, symbol="R", help="parts that the rest is dealt out in; with a target, more parts spend less")
    prior: float = parameter(1.0, low=0.0, symbol="nu0", help="degrees of freedom that the mean spread of all prompts counts as in each prompt's own")

    def __post_init__(self) -> None:
        if isinstance(self.policy, str):
            object.__setattr__(self, "policy", _named(self.policy, {}))
        if isinstance(self.policy, Allocator) or not isinstance(getattr(self.policy, "name", None), str) or not hasattr(self.policy, "fit"):
            raise UsageError(f"{self.name}: policy is {self.policy!r} but must be a policy that searches one prompt; `tsdiff list policies` lists all")
        check(self)

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> Self:
        """From values that may be text; "policy.NAME" is a parameter of the policy that searches."""
        inner = {key.removeprefix("policy."): value for key, value in options.items() if key.startswith("policy.")}
        own = {key: value for key, value in options.items() if not key.startswith("policy.")}
        if inner:
            chosen = own.get("policy", "best-of-n")
            if not isinstance(chosen, str):
                raise UsageError(f"{cls.name}: parameters {', '.join(inner)} were given beside a policy object; set them on the object")
            own["policy"] = _named(chosen, inner)
        return build(cls, own)

    @property
    def needs(self) -> frozenset[str]:
        """What the policy needs; and scores that can be compared from one round to the next, where there is a pilot."""
        return self.policy.needs | ({"absolute"} if self.pilot else frozenset())

    @property
    def roles(self) -> tuple[str, ...]:
        """The verifier roles that the policy knows."""
        return tuple(getattr(self.policy, "roles", ()))

    def search(self, forest: ForestView) -> Allocation:
        """See the class. What each round went by is noted on the forest."""
        setting, total = forest.setting, forest.budget.limit or 0
        pilot = self.pilot_size(total, len(forest.trees), setting)
        if pilot == 0:
            share = total // len(forest.trees)
            fitted = self.policy.fit(share, setting)
            yield [Grant(tree, fitted, share) for tree in forest.trees]
            return
        unit = setting.sample_cost
        outcomes = yield [Grant(tree, BestOfN(n=pilot), pilot * unit) for tree in forest.trees]
        prompts = [Prompt(place) for place in range(len(forest.trees))]
        for prompt, outcome in zip(prompts, outcomes, strict=True):
            prompt.take(outcome, sampled=True)
        block = -(-least(self.policy, setting) // unit)
        for number in count(1):
            left = (forest.budget.remaining or 0) // unit
            part = left if number >= self.rounds else min(left, max(block, -(-left // (self.rounds - number + 1))))
            going = [prompt for prompt in prompts if not prompt.failed and not prompt.reached(forest.target)]
            spreads = moderated([prompt.sampled for prompt in prompts], self.prior)
            tails = [prompt.tail(spreads[prompt.place], self.prior, forest.target) for prompt in going]
            dealt = deal(tails, part, block)
            forest.note(
                round=number,
                prompts=[
                    {"tree": prompt.place, "mean": prompt.mean, "spread": spreads[prompt.place], "best": prompt.best, "samples_worth": units}
                    for prompt, units in zip(going, dealt, strict=True)
                ],
            )
            chosen = [(prompt, units) for prompt, units in zip(going, dealt, strict=True) if units]
            if not chosen:
                return
            outcomes = yield [Grant(forest.trees[prompt.place], self.policy.fit(units * unit, setting), units * unit) for prompt, units in chosen]
            for (prompt, _), outcome in zip(chosen, outcomes, strict=True):
                prompt.take(outcome, sampled=isinstance(self.policy, BestOfN))
            if not any(outcome.nfe for outcome in outcomes):
                return  # time is up

    def pilot_size(self, total_nfe: int, runs: int, setting: Setting) -> int:
        """Samples in each prompt's pilot: `pilot`, but no more than half of the budget, or two, or what can be paid."""
        share = total_nfe // (runs * setting.sample_cost)
        return min(self.pilot, max(min(share, 2), share // 2))

    def forecast(self, total_nfe: int, runs: int, setting: Setting) -> Cost:
        """One prompt's share: from the pilot alone to all that the other pilots leave.

        The bounds on NFE hold always. Decodes and verifier calls are, above, those of one search with all of it.

        Raises:
          UsageError: if the total does not pay for one sample of every prompt, or, without a pilot, for the policy.
        """
        unit = setting.sample_cost
        pilot = self.pilot_size(total_nfe, runs, setting)
        if self.pilot == 0:
            smallest = runs * least(self.policy, setting)
            if total_nfe < smallest:
                raise UsageError(f"{self.name}: total_nfe is {total_nfe} but {runs} searches with {self.policy.name} and no pilot need at least {smallest}")
            return self.policy.fit(total_nfe // runs, setting).cost(setting)
        if pilot == 0:
            raise UsageError(f"{self.name}: total_nfe is {total_nfe} but {runs} searches need at least {runs * unit}, one sample each")
        lower = BestOfN(n=pilot).cost(setting).lower
        rest = total_nfe - runs * pilot * unit
        if rest < least(self.policy, setting):
            return Cost.exactly(lower)
        most = self.policy.fit(rest, setting).cost(setting).upper
        return Cost(lower, lower + Spend(rest, most.decodes, most.verifier_calls))


def _named(name: str, options: Mapping[str, Any]) -> Any:
    if name == Adaptive.name:
        raise UsageError(f"{name}: policy is {name!r} but must be a policy that searches one prompt; `tsdiff list policies` lists all")
    return build(registry.policies.load(name), options)


# One prompt ----------------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class Prompt:
    """What is known about one prompt.

    Attributes:
      place: which tree of the forest.
      sampled: scores of independent samples: what mean and spread are estimated from.
      best: the highest score of all, None while there is none.
      failed: whether its tree has ended with an error.
    """

    place: int
    sampled: list[float] = field(default_factory=list)
    best: float | None = None
    failed: bool = False

    def take(self, outcome: Outcome, *, sampled: bool) -> None:
        """Learn from a grant; `sampled` says whether its samples are independent draws of the model."""
        scores = [score for score in outcome.scores if score is not None]
        if sampled:
            self.sampled += scores
        self.best = max(scores if self.best is None else [self.best, *scores], default=None)
        self.failed = outcome.failed

    def reached(self, target: float | None) -> bool:
        """Whether the best sample is good enough."""
        return target is not None and self.best is not None and self.best >= target

    @property
    def mean(self) -> float | None:
        """Mean of the sampled scores."""
        return math.fsum(self.sampled) / len(self.sampled) if self.sampled else None

    def tail(self, spread: float, prior: float, target: float | None) -> Tail:
        """The chances of further samples. A prompt without a score is taken to stand at its unknown mean."""
        n = max(len(self.sampled), 1)
        freedom = max(prior + n - 1, 2.0)  # the mean excess is finite above 1
        scale = spread * math.sqrt(1.0 + 1.0 / n)
        if self.mean is None or self.best is None:
            return Tail.beyond(0.0, 0.0, scale, freedom, None)
        return Tail.beyond(self.best, self.mean, scale, freedom, target)


@dataclass(frozen=True)
class Tail:
    """The law of samples that beat the best score: with chance p by an exponential excess of mean b, counted up to `room`."""

    p: float
    b: float
    room: float = math.inf

    @staticmethod
    def beyond(best: float, mean: float, scale: float, freedom: float, target: float | None) -> Tail:
        """The tail of Student's law beyond `best`, by its mass and its mean excess; `freedom` > 1."""
        from scipy.special import stdtr

        room = math.inf if target is None else target - best
        if scale <= 0.0:
            return Tail(0.0, 0.0, room)
        z = (best - mean) / scale
        p = float(stdtr(freedom, -z))
        if p == 0.0:
            return Tail(0.0, 0.0, room)
        half = 0.5 * (freedom + 1.0)
        density = math.exp(math.lgamma(half) - math.lgamma(0.5 * freedom) - half * math.log1p(z * z / freedom)) / math.sqrt(math.pi * freedom)
        return Tail(p, max(scale * ((freedom + z * z) / (freedom - 1.0) * density / p - z), 0.0), room)

    def gain(self, j: int) -> float:
        """What the j-th further sample adds to the expected best score, up to the target."""
        if self.b <= 0.0 or self.p == 0.0:
            return 0.0
        q = self.p * math.exp(-self.room / self.b)
        return self.b * (_any_of(j, self.p) - _any_of(j, q)) / j


def _any_of(j: int, chance: float) -> float:
    """1 - (1 - chance)^j, exact for small chances too."""
    return -math.expm1(j * math.log1p(-chance)) if chance < 1.0 else 1.0


# All prompts ---------------------------------------------------------------------------------------------------------


def moderated(samples: Sequence[Sequence[float]], prior: float) -> list[float]:
    """Each prompt's spread: its own variance, averaged with the squared mean spread of all, which counts as `prior` degrees of freedom."""
    means = [math.fsum(scores) / max(len(scores), 1) for scores in samples]
    squares = [math.fsum((score - mean) ** 2 for score in scores) for scores, mean in zip(samples, means, strict=True)]
    freedom = [max(len(scores) - 1, 0) for scores in samples]
    own = [math.sqrt(square / free) for square, free in zip(squares, freedom, strict=True) if free]
    usual = math.fsum(own) / max(len(own), 1)
    return [
        math.sqrt((prior * usual**2 + square) / (prior + free)) if prior + free > 0.0 else usual
        for square, free in zip(squares, freedom, strict=True)
    ]


def deal(tails: Sequence[Tail], units: int, block: int = 1) -> list[int]:
    """Samples for each prompt, `units` in all, each where it adds the most; a prompt gets none, or at least `block`.

    Equal gains go to the prompt that has got the least, then to the first.
    """
    dealt = [0] * len(tails)
    heap = [(-sum(tail.gain(j) for j in range(1, block + 1)) / block, 0, place) for place, tail in enumerate(tails)]
    heapq.heapify(heap)
    while heap:
        _, got, place = heapq.heappop(heap)
        step = block if got == 0 else 1
        if step > units:
            continue
        units -= step
        dealt[place] += step
        if units:
            heapq.heappush(heap, (-tails[place].gain(dealt[place] + 1), dealt[place], place))
    return dealt


def least(policy: Policy, setting: Setting) -> int:
    """The smallest budget that a policy can be fitted to. Raises its UsageError if there is none up to a million samples."""

    def fits(nfe: int) -> bool:
        try:
            policy.fit(nfe, setting)
        except UsageError:
            return False
        return True

    low, high = 0, setting.sample_cost
    while not fits(high):
        if high >= 1_000_000 * setting.sample_cost:
            policy.fit(high, setting)
        low, high = high, 2 * high
    while high - low > 1:  # the policy can be fitted to `high`, and not to `low`
        middle = (low + high) // 2
        low, high = (low, middle) if fits(middle) else (middle, high)
    return high
