"""A small laboratory around the engine: an exact model that counts its rows, verifiers with a script, random policies.

`grow` runs policies through a real engine on the analytic model and keeps every latent; `check_books` holds the result
against the accounting promises.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tsdiff.treesearch.engine import Engine, Limits
from tsdiff.treesearch.errors import BudgetExhausted
from tsdiff.treesearch.node import Node
from tsdiff.treesearch.noise import Fresh, Mix, Rotate, Slerp
from tsdiff.treesearch.protocols import Candidates, Condition, Guidance, Media, Scores
from tsdiff.treesearch.requests import Denoise, Draw, Gather, Perturb, Release, Renoise, Score, Start
from tsdiff.treesearch.run import Run
from tsdiff.treesearch.store import Store
from tsdiff.treesearch.tree import Tree
from tsdiff.worlds.gaussian.model import GaussianModel
from tsdiff.worlds.gaussian.presets import preset

PROMPT = "near (3, 2.4)"


class Hooked(GaussianModel):
    """The exact model with a counter on its network, and ways to break it.

    Attributes:
      seen: rows that the network was given, whatever became of them.
      calls: rows of every call.
      capacity: a call of more rows is out of memory.
      fault: called before every evaluation with (latents, timesteps); may raise.
      spoil: called after it with (latents, timesteps, outputs), gives the outputs.
      blind: called before every decode with the latents; may raise.
    """

    def __init__(self, process: str = "vp", name: str = "rare-mode") -> None:
        chosen = preset(name)
        super().__init__(chosen.mixture, process, class_names=chosen.class_names)  # type: ignore[arg-type]
        self.seen = 0
        self.calls: list[int] = []
        self.decodes: list[int] = []
        self.capacity: int | None = None
        self.fault: Callable[[Tensor, Tensor], None] = lambda latents, timesteps: None
        self.spoil: Callable[[Tensor, Tensor, Tensor], Tensor] = lambda latents, timesteps, outputs: outputs
        self.blind: Callable[[Tensor], None] = lambda latents: None

    def load(self) -> Hooked:
        return self

    def forward(self, latents: Tensor, timesteps: Tensor, rows: Sequence[Mapping[str, Tensor]]) -> Tensor:
        assert len(latents) == len(timesteps) == len(rows)
        self.seen += len(latents)
        self.calls.append(len(latents))
        if self.capacity is not None and len(latents) > self.capacity:
            raise torch.OutOfMemoryError("a test's memory is full")
        self.fault(latents, timesteps)
        return self.spoil(latents, timesteps, super().forward(latents, timesteps, rows))

    def decode(self, latents: Tensor) -> Media:
        self.decodes.append(len(latents))
        self.blind(latents)
        return Media((torch.tanh(latents / 4.0).mean(1) * 0.5 + 0.5).reshape(-1, 1, 1, 1).expand(-1, 3, 4, 4).contiguous())


def closeness(candidates: Candidates) -> Tensor:
    """Minus the distance of the clean estimate to (3, 2.4), row by row."""
    return -(candidates.x0 - torch.tensor([3.0, 2.4])).norm(dim=1)


class Judge:
    """A verifier with a script.

    Args:
      value: from candidates to scores.

    Attributes:
      batches: (node ids, levels) of every call.
    """

    differentiable = False
    latency = "immediate"

    def __init__(
        self,
        name: str = "judge",
        value: Callable[[Candidates], Any] = closeness,
        *,
        needs: Sequence[str] = ("x0",),
        scope: str = "row",
        judges: str = "any",
    ) -> None:
        self.name = name
        self.value = value
        self.needs = frozenset(needs)
        self.scope = scope
        self.judges = judges
        self.batches: list[tuple[list[str], list[int]]] = []

    def prepare(self, device: str) -> None:
        """Nothing to load."""

    def check(self, condition: Condition) -> None:
        """Any condition will do."""

    def score(self, candidates: Candidates) -> Scores:
        self.batches.append((list(candidates.node_ids), list(candidates.levels)))
        if "images" in self.needs:
            assert candidates.images.shape[1:] == (3, 4, 4)
        return Scores(self.value(candidates))

    @property
    def rows(self) -> int:
        """Rows judged so far."""
        return sum(len(ids) for ids, _ in self.batches)


class Jury(Judge):
    """A pending verifier whose answers come from another thread, last asked first."""

    latency = "pending"

    def __init__(self, *args: Any, delay: float = 0.0, **options: Any) -> None:
        super().__init__(*args, **options)
        self.delay = delay
        self.threads: list[threading.Thread] = []

    def ask(self, candidates: Candidates, answer: Callable[[str, float | None, str | None], None]) -> None:
        self.batches.append((list(candidates.node_ids), list(candidates.levels)))
        verdicts = list(zip(candidates.node_ids, self.value(candidates).tolist(), strict=True))[::-1]

        def later() -> None:
            for node_id, score in verdicts:
                threading.Event().wait(self.delay)
                answer(node_id, score, None)

        self.threads.append(threading.Thread(target=later))
        self.threads[-1].start()


# Running -------------------------------------------------------------------------------------------------------------


@dataclass
class Grown:
    """What came of some searches."""

    engine: Engine
    models: list[Hooked]
    runs: list[Run]
    latents: list[dict[int, Tensor]] = field(default_factory=list)
    spilled: int = 0

    @property
    def run(self) -> Run:
        (run,) = self.runs
        return run

    @property
    def tree(self) -> Tree:
        return self.run.tree

    @property
    def nodes(self) -> list[Node]:
        return self.tree.nodes

    def latent(self, node: Node | int, run: int = 0) -> Tensor:
        return self.latents[run][node if isinstance(node, int) else node.index]


def grow(
    *searches: Callable[..., Any],
    model: Hooked | None = None,
    helpers: Mapping[str, Hooked] | None = None,
    solver: str | None = None,
    eta: float | None = None,
    steps: int = 6,
    seeds: Sequence[int] | None = None,
    conditions: Sequence[Condition] | None = None,
    class_label: int | None = None,
    verifiers: Sequence[Any] | None = None,
    guidance: Guidance | None = None,
    limits: Limits | None = None,
    nfe: int | None = None,
    recorder: Any = None,
    expected_rows: int = 0,
    keep: bool = True,
    ok: bool = True,
    **options: Any,
) -> Grown:
    """Run searches in one engine; with `ok`, their errors are raised."""
    limits = limits or Limits()
    guidance = guidance or Guidance()
    model = Hooked() if model is None else model
    helpers = dict(helpers or {})
    verifiers = [Judge()] if verifiers is None else list(verifiers)
    info = model.solver(solver, eta)
    schedule = model.schedule(info, steps, None)
    store = Store("cpu", host_limit=limits.host_bytes, device_limit=limits.device_bytes)
    engine = Engine(limits, store, recorder=recorder, expected_rows=expected_rows)
    if hasattr(recorder, "ledger"):
        recorder.ledger = engine.ledger
    latents: dict[int, dict[int, Tensor]] = {}

    def ended(run: Run) -> None:
        latents[id(run)] = {
            node.index: run.store.get(run.key("node", node.index))["latent"].clone()
            for node in run.tree.nodes
            if run.key("node", node.index) in run.store
        }

    runs = []
    for i, search in enumerate(searches):
        condition = conditions[i] if conditions is not None else Condition(PROMPT, class_label=class_label)
        tree = Tree(schedule, info, condition, seed=0 if seeds is None else seeds[i], verifier=verifiers[0].name, nfe=nfe)
        runs.append(Run(tree, search, {None: model, **helpers}, verifiers, guidance=guidance, name=f"search {i}", keep=keep, on_end=ended, **options))
        engine.add(runs[-1])
    try:
        engine.run()
    finally:
        left = set(store._entries) | set(store._disk) | set(store._stored)
        store.close()
    grown = Grown(engine, [model, *helpers.values()], runs, [latents[id(run)] for run in runs], store.spilled_bytes)
    for run in runs:
        if ok and run.error is not None:
            raise run.error
    assert not left, f"latents outlive their tree: {left}"
    return grown


def check_books(grown: Grown) -> None:
    """Every row seen is a row counted, every tree's nodes add up to its ledger, and no budget is exceeded."""
    ledger = grown.engine.ledger
    assert ledger.rows + ledger.padding + ledger.probe + ledger.retried == sum(model.seen for model in grown.models)
    assert ledger.rows == sum(run.tree.ledger.rows for run in grown.runs)
    for run in grown.runs:
        tree = run.tree
        assert sum(node.nfe for node in tree.nodes) == tree.ledger.nfe
        assert tree.ledger.nfe <= tree.ledger.rows <= 2 * tree.ledger.nfe or any(node.failed for node in tree.nodes)
        assert tree.ledger.nfe <= tree.budget.spent
        if not any(node.failed for node in tree.nodes):
            assert tree.ledger.nfe == tree.budget.spent
        if tree.budget.limit is not None:
            assert tree.budget.spent <= tree.budget.limit


def sample(tree: Any) -> Generator[Any, Any, Any]:
    """One plain sample."""
    roots = yield Draw()
    leaves = yield Denoise(roots, to=tree.schedule.last)
    yield Score(leaves)
    return tree.best()


# Random policies -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RandomSearch:
    """A policy that asks for random valid things.

    Args:
      seed: of its choices.
      rounds: requests to make.
      solvers: overrides to try, with whether they are stochastic.
      models: names of helper models to try.
      verifiers: names of verifiers to ask for; the first is the steering one.
      catch: share of refusals that it catches.
      release: share of rounds that release something.
    """

    seed: int
    rounds: int = 8
    solvers: tuple[tuple[str, bool], ...] = ()
    models: tuple[str, ...] = ()
    verifiers: tuple[str, ...] = ()
    catch: float = 0.7
    release: float = 0.15

    def __call__(self, tree: Any) -> Generator[Any, Any, Any]:
        rng = np.random.default_rng(self.seed)
        for _ in range(self.rounds):
            request = self._request(rng, tree)
            before = snapshot(tree)
            try:
                reply = yield request
            except BudgetExhausted as caught:
                refusal = caught
                if rng.random() >= self.catch:
                    raise
            else:
                check_reply(request, reply, tree)
                continue
            assert snapshot(tree) == before, "a refusal changed the tree"
            assert refusal.remaining is None or refusal.remaining == tree.budget.remaining
        ending = rng.random()
        leaves = [node for node in tree.nodes if node.level == tree.schedule.last and not node.draft and not node.failed]
        if ending < 0.2 and leaves:
            return leaves[int(rng.integers(len(leaves)))]
        return tree.best() if ending < 0.8 else None

    def _request(self, rng: np.random.Generator, tree: Any) -> Any:
        last = tree.schedule.last
        usable = [node for node in tree.nodes if node.status != "closed" and not node.draft]
        if usable and rng.random() < self.release:
            return Release(self._some(rng, usable))
        if rng.random() < 0.25:
            return Gather(*(self._simple(rng, tree, usable, last) for _ in range(int(rng.integers(0, 4)))))
        if rng.random() < 0.05:
            return Gather(Gather(self._simple(rng, tree, usable, last)), self._simple(rng, tree, usable, last))
        return self._simple(rng, tree, usable, last)

    def _simple(self, rng: np.random.Generator, tree: Any, usable: list[Node], last: int) -> Any:
        growing = [node for node in usable if node.level < last]
        between = [node for node in growing if node.level > 0]
        leaves = [node for node in usable if node.level == last]
        kinds = ["draw"]
        kinds += ["denoise"] * 5 + ["score"] * 2 + ["lookahead"] if growing else []
        kinds += ["renoise"] * 2 if usable else []
        kinds += ["perturb"] if between else []
        kinds += ["start", "judge", "judge"] if leaves else []
        kind = kinds[int(rng.integers(len(kinds)))]
        copies = int(rng.integers(1, 4))
        verifier = None if not self.verifiers or rng.random() < 0.5 else str(rng.choice(self.verifiers))
        if kind == "draw":
            return Draw(copies, self._recipe(rng, tree))
        if kind == "denoise":
            return self._denoise(rng, tree, self._some(rng, growing), copies, last)
        if kind == "score":
            return Score(self._some(rng, growing), verifier)
        if kind == "lookahead":
            return Score(self._some(rng, growing), verifier, at="lookahead", num_steps=int(rng.integers(1, 4)))
        if kind == "renoise":
            group = self._some(rng, usable)
            return Renoise(group, int(rng.integers(0, min(node.level for node in group) + 1)), copies, "x0" if rng.random() < 0.3 else "latent")
        if kind == "perturb":
            return Perturb(self._some(rng, between), float(rng.random()), copies)
        if kind == "start":
            return Start(self._some(rng, leaves)[0], float(rng.uniform(1.0 / last, 1.0)), copies)
        return Score(self._some(rng, leaves), verifier)

    def _denoise(self, rng: np.random.Generator, tree: Any, group: list[Node], copies: int, last: int) -> Denoise:
        deepest = max(node.level for node in group)
        solver, stochastic = None, tree.solver.stochastic
        if self.solvers and rng.random() < 0.3:
            solver, stochastic = self.solvers[int(rng.integers(len(self.solvers)))]
        model = self.models[int(rng.integers(len(self.models)))] if self.models and rng.random() < 0.3 else None
        num_steps = int(rng.integers(1, 4)) if rng.random() < 0.3 else None
        to: Any = int(rng.integers(deepest, last + 1)) if rng.random() < 0.6 else last
        via: list[int] = []
        if num_steps is None and rng.random() < 0.4:
            via = [level for level in range(deepest + 1, to) if rng.random() < 0.5]
        if not via and rng.random() < 0.2:
            to = [int(rng.integers(node.level, last + 1)) for node in group]
        noise = Fresh(int(rng.integers(3))) if stochastic and rng.random() < 0.2 else None
        return Denoise(group, to, num_steps, solver, model, noise, copies if stochastic and noise is None else 1, via)

    @staticmethod
    def _recipe(rng: np.random.Generator, tree: Any) -> Any:
        roots = len(tree.roots)
        if not roots or rng.random() < 0.6:
            return None
        a, b = (int(index) for index in rng.integers(0, roots, 2))
        return (Fresh(a), Rotate(a, float(rng.uniform(-1, 1)), b), Mix({a: 0.6}, fresh=(b, 0.8)), Slerp(a, b, float(rng.random())))[int(rng.integers(4))]

    @staticmethod
    def _some(rng: np.random.Generator, pool: list[Node]) -> list[Node]:
        return [pool[int(i)] for i in rng.integers(0, len(pool), int(rng.integers(1, 4)))]


def snapshot(tree: Any) -> Any:
    """What a refused request must not change."""
    nodes = [(node.index, node.status, node.nfe, tuple(node.values)) for node in tree.nodes]
    return nodes, tree.budget.spent, len(tree.roots), tree.ledger.to_json()


def check_reply(request: Any, reply: Any, tree: Any) -> None:
    """Replies are complete and in request order."""
    last = tree.schedule.last
    if isinstance(request, Gather):
        assert isinstance(reply, tuple)
        for part, answer in zip(request.requests, reply, strict=True):
            check_reply(part, answer, tree)
    elif isinstance(request, Release):
        assert reply is None
        assert all(node.status != "open" for node in request.group)
    elif isinstance(request, Score):
        verifier = request.verifier or tree.verifier
        assert len(reply) == len(request.group)
        for node, value in zip(request.group, reply, strict=True):
            assert value is None or np.isfinite(value)
            assert node.failed or request.key(verifier) in node.values
    elif isinstance(request, Draw):
        assert [node.level for node in reply] == [0] * request.count
    elif isinstance(request, Start):
        assert all(0 <= node.level < last and node.move.kind == "start" for node in reply)
        assert len(reply) == request.copies
    else:
        assert len(reply) == len(request.group) * request.copies
        targets = request.targets if isinstance(request, Denoise) else [node.level if isinstance(request, Perturb) else request.to for node in request.group]
        for i, node in enumerate(reply):
            parent, target = request.group[i // request.copies], targets[i // request.copies]
            assert node.level == target
            assert node is parent or parent in node.path()[:-1]
