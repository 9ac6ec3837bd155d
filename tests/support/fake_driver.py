"""A driver of policies without network, store or torch: real trees and nodes, a two-number latent, every evaluation counted.

It follows the engine's pricing rules (a prediction is made once while its node is open, copies share it, a two-stage
step evaluates once more) by simply keeping a set of predicted nodes. That makes it an independent count to hold a
policy's `cost` against.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from tsdiff.treesearch.errors import BudgetExhausted
from tsdiff.treesearch.ledger import Spend
from tsdiff.treesearch.node import Move, Node, Value
from tsdiff.treesearch.noise import derive, initial_noise, move_noise, step_noise
from tsdiff.treesearch.protocols import Condition, Setting
from tsdiff.treesearch.requests import Denoise, Draw, Release, Renoise, Score
from tsdiff.treesearch.schedule import Schedule, SolverInfo
from tsdiff.treesearch.tree import Tree

SHAPE = (2,)
STOCHASTIC = SolverInfo("ddim", "ddim", eta=1.0, stochastic=True, ode="ddim")
DETERMINISTIC = SolverInfo("ddim", "ddim", ode="ddim")
TWO_STAGE = SolverInfo("heun", "euler", stages=2, ode="heun")


def flow_schedule(steps: int, kind: str = "ddim") -> Schedule:
    """Straight-line levels: alpha + sigma = 1, clean at level `steps`."""
    sigma = tuple(1.0 - level / steps for level in range(steps + 1))
    alpha = tuple(1.0 - s for s in sigma)
    return Schedule(kind, f"flow-{steps}", tuple(1000.0 * s for s in sigma[:-1]), alpha, sigma, tuple(zip(alpha, sigma, strict=True)), 1.0)


class FakeVerifier:
    """What a `Setting` reads of a verifier."""

    scope = "row"

    def __init__(self, name: str, needs: frozenset[str] = frozenset({"images"})) -> None:
        self.name = name
        self.needs = needs


def setting(steps: int = 20, solver: SolverInfo = STOCHASTIC, others: int = 0, needs: frozenset[str] = frozenset({"images"}), media: bool = True) -> Setting:
    """A setting with `others` verifiers beside the steering one."""
    rest = tuple(FakeVerifier(f"other-{i}") for i in range(others))
    return Setting(flow_schedule(steps, solver.kind), solver, FakeVerifier("value", needs), rest, media)


def closeness(latent: np.ndarray) -> float:
    """The default value: minus the distance of the clean estimate to (1, 1)."""
    return -float(np.linalg.norm(latent.astype(np.float64) - 1.0))


class FakeDriver:
    """Carries out a policy's requests.

    Args:
      setting: schedule, solver and verifiers.
      value: maps a latent to its score; None is a failed score.
      fails: which new nodes fail, by node.
      limit: refuse requests that would spend more than this many NFE in total.
    """

    def __init__(
        self,
        setting: Setting,
        *,
        seed: int = 0,
        value: Callable[[np.ndarray], float | None] = closeness,
        fails: Callable[[Node], bool] = lambda node: False,
        limit: int | None = None,
    ) -> None:
        self.setting = setting
        self.tree = Tree(setting.schedule, setting.solver, Condition("a test"), seed=seed, verifier="value", nfe=limit)
        self.value = value
        self.fails = fails
        self.latents: dict[int, np.ndarray] = {}
        self.predicted: set[Node] = set()
        self.repeats: dict[tuple[Any, ...], Node] = {}
        self.decoded: set[tuple[int, str]] = set()
        self.nfe = self.decodes = 0
        self.calls: Counter[str] = Counter()
        self.requests: list[Any] = []

    def run(self, policy: Any) -> Node | None:
        """Drive a policy to its end; refused requests are thrown into it."""
        search = policy.search(self.tree)
        reply: Any = None
        refusal: BudgetExhausted | None = None
        while True:
            try:
                request = search.send(reply) if refusal is None else search.throw(refusal)
            except StopIteration as stop:
                return stop.value
            refusal, reply = None, None
            self.requests.append(request)
            price, limit = self._price(request), self.tree.budget.limit
            if limit is not None and self.nfe + price > limit:
                refusal = BudgetExhausted("too dear", price=price, remaining=limit - self.nfe)
                continue
            before = self.nfe
            reply = getattr(self, f"_{type(request).__name__.lower()}")(request)
            assert self.nfe - before == price or any(node.failed for node in self.tree.nodes), "the price of a request is what it spends"

    @property
    def spend(self) -> Spend:
        """Everything counted so far, the answer's decode included."""
        return Spend(self.nfe, self.decodes, sum(self.calls.values())) + self.setting.result()

    def leaves(self) -> list[Node]:
        """Finished nodes, in order."""
        return [node for node in self.tree.nodes if node.level == self.tree.schedule.last and not node.draft]

    def _price(self, request: Any) -> int:
        new: set[Node] = set()
        total = 0
        if isinstance(request, Denoise):
            repeated: set[tuple[Any, ...]] = set()
            for node, to in zip(request.group, request.targets, strict=True):
                if node.failed or node.level == to:
                    continue
                memo = (node, to)
                if not self.setting.solver.stochastic and (memo in self.repeats or memo in repeated):
                    continue
                repeated.add(memo)
                interior = self._interior(self.tree.schedule.span(node.level, to), self.setting.solver.stages)
                total += request.copies * interior
                new.add(node)
        elif isinstance(request, Score):
            for node in request.group:
                if node.failed or node.level == self.tree.schedule.last:
                    continue
                new.add(node)
                if request.at == "lookahead":
                    stages = self.setting.solver.stages
                    total += self._interior(self.tree.schedule.span(node.level, self.tree.schedule.last, request.num_steps), stages)
        return total + len(new - self.predicted)

    def _interior(self, levels: tuple[int, ...], stages: int) -> int:
        """Evaluations of a span beyond its start's own prediction, step by step."""
        evaluations = 0
        for level in levels[1:]:
            evaluations += 1
            if stages == 2 and self.tree.schedule.sigma[level] > 0.0:
                evaluations += 1
        return evaluations - 1

    def _predict(self, node: Node) -> None:
        assert node.status == "open", f"{node} was released and then used"
        if node not in self.predicted:
            self.predicted.add(node)
            self._spend(node, 1)

    def _spend(self, node: Node, nfe: int) -> None:
        node.nfe += nfe
        self.nfe += nfe

    def _new(self, node: Node, latent: np.ndarray) -> Node:
        if self.fails(node):
            node.status, node.reason = "failed", "as the test wanted"
        else:
            self.latents[node.index] = latent
        return node

    def _draw(self, request: Draw) -> list[Node]:
        assert request.noise is None
        roots = [self.tree.add_root(Move("draw", (0,))) for _ in range(request.count)]
        return [self._new(root, initial_noise(root.stream, SHAPE)) for root in roots]

    def _denoise(self, request: Denoise) -> list[Node]:
        return [
            self._denoise_one(node, to, request.via) for node, to in zip(request.group, request.targets, strict=True) for _ in range(request.copies)
        ]

    def _denoise_one(self, node: Node, to: int, via: Sequence[int]) -> Node:
        if node.failed or node.level == to:
            return node
        solver = self.setting.solver
        if not solver.stochastic and (node, to) in self.repeats:
            return self.repeats[node, to]
        number = self.tree.next_child(node, "denoise") if solver.stochastic else 0
        stream = node.stream if number == 0 else derive(node.stream, "denoise", node.level, number)
        parent = node
        for stop in (*(level for level in via if level < to), to):
            parent = self._walk(parent, self.tree.schedule.span(parent.level, stop), stream, number)
        self.repeats[node, to] = parent
        return parent

    def _walk(self, node: Node, levels: Sequence[int], stream: int, number: int) -> Node:
        solver = self.setting.solver
        child = self.tree.add_child(node, Move("denoise", tuple(levels), copy=number), stream, levels[-1], number)
        if node.failed:
            child.status, child.reason = "failed", "its parent failed"
            return child
        self._predict(node)
        latent = self.latents[node.index]
        for level in levels[1:]:
            latent = np.float32(0.95) * latent
            if solver.stochastic:
                latent = latent + np.float32(0.3) * step_noise(stream, level, SHAPE)[0]
        self._spend(child, self._interior(tuple(levels), solver.stages))
        return self._new(child, latent)

    def _renoise(self, request: Renoise) -> list[Node]:
        return [self._renoise_one(node, request.to) for node in request.group for _ in range(request.copies)]

    def _renoise_one(self, node: Node, to: int) -> Node:
        if node.failed or node.level == to:
            return node
        assert to < node.level
        assert node.status == "open", f"{node} was released and then used"
        number = self.tree.next_child(node, "renoise", to)
        stream = derive(node.stream, "renoise", node.level, to, number)
        child = self.tree.add_child(node, Move("renoise", (node.level, to), copy=number), stream, to, number)
        return self._new(child, self.latents[node.index] + np.float32(0.3) * move_noise(stream, SHAPE))

    def _score(self, request: Score) -> list[float | None]:
        last = self.tree.schedule.last
        key = request.key("value")
        for node in request.group:
            if node.failed:
                self.tree.give_value(node, key, Value(None, reason="failed node"))
                continue
            if node.level < last:
                self._predict(node)
                if request.at == "lookahead":
                    levels = self.tree.schedule.span(node.level, last, request.num_steps)
                    draft = self.tree.add_child(node, Move("denoise", levels), node.stream, "lookahead", request.num_steps or 0)
                    draft.draft = True
                    self._spend(draft, self._interior(levels, self.setting.solver.stages))
            finished = node.level == last
            judges = (self.setting.verifier, *self.setting.others) if finished else (self.setting.verifier,)
            self.calls.update(judge.name for judge in judges)
            self.decodes += any("images" in judge.needs for judge in judges)
            score = self.value(self.latents[node.index])
            self.tree.give_value(node, key, Value(score, reason=None if score is not None else "as the test wanted"))
        return [node.score(key) for node in request.group]

    def _release(self, request: Release) -> None:
        for node in request.group:
            if node.status == "open":
                node.status = "closed"
                self.predicted.discard(node)
