"""How each kind of request is checked, priced and begun. A new kind is a class here and a line in `HANDLERS`.

* `check` raises a UsageError for a request that can never work; it is thrown into the policy.
* `price` adds to a `Quote` exactly what the request will cost, so that a budget is granted whole or refused whole.
* `begin` makes the nodes (in request order, so indices do not depend on the order of work) and queues the work.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

from tsdiff.treesearch.errors import UsageError, unknown_name
from tsdiff.treesearch.node import Move, Node, Value
from tsdiff.treesearch.noise import Fresh, Recipe, Torch, derive, move_noise, roots_of
from tsdiff.treesearch.protocols import Sampler, Verifier
from tsdiff.treesearch.requests import Denoise, Draw, Gather, Perturb, Release, Renoise, Request, Score, Start
from tsdiff.treesearch.run import Draft, Group, Run
from tsdiff.treesearch.work import Candidate, Chain, Decode, Estimate, Judgement

if TYPE_CHECKING:
    from torch import Tensor

    from tsdiff.treesearch.engine import Engine


class Quote:
    """The price of a request, and what it would leave to finish a sample with.

    Attributes:
      nfe: guided evaluations, each missing prediction once.
    """

    def __init__(self, run: Run) -> None:
        self.run = run
        self.nfe = 0
        self._predicted: set[tuple[int, str | None]] = set()
        self._repeats: set[tuple[Any, ...]] = set()
        self._created: list[tuple[int, bool]] = []
        self._released: set[Node] = set()

    def predict(self, node: Node, model: str | None) -> None:
        """The node's prediction will be needed."""
        key = (node.index, model)
        if key not in self._predicted and not self.run.has_prediction(node, model):
            self._predicted.add(key)
            self.nfe += 1
            if model is None and not node.draft:
                self._created.append((node.level, True))

    def denoise(self, node: Node, levels: tuple[int, ...], sampler: Sampler, model: str | None, *, stops: Sequence[int], draft: bool) -> None:
        """One chain through `levels`, the node's own prediction shared."""
        self.predict(node, model)
        self.nfe += self.run.tree.schedule.span_cost(levels, sampler.solver.stages) - 1
        if not draft:
            # A stop on the way will have its prediction, for the chain goes on from it.
            self._created.extend((stop, stop != levels[-1] and model is None) for stop in stops)

    def once(self, memo: tuple[Any, ...]) -> bool:
        """Whether work that is done only once has not been done or quoted yet."""
        if memo in self.run.repeats or memo in self._repeats:
            return False
        self._repeats.add(memo)
        return True

    def create(self, level: int) -> None:
        """A new node that can be grown."""
        self._created.append((level, False))

    def release(self, nodes: Sequence[Node]) -> None:
        """Nodes that will not be live any more."""
        self._released.update(node for node in nodes if node.status == "open" and not node.draft)

    def reserve(self) -> int:
        """NFE of the cheapest way to finish a sample after the request; 0 once one is finished."""
        run = self.run
        last = run.tree.schedule.last
        if run.finished_leaf or any(level == last for level, _ in self._created):
            return 0
        stages = run.tree.solver.stages

        def cost(level: int) -> int:
            return run.tree.schedule.span_cost(tuple(range(level, last + 1)), stages)

        leaving = [(node.level, run.has_prediction(node, None)) for node in self._released]
        for level, predicted in leaving:
            run.frontier.add(level, predicted, -1)
        try:
            return run.frontier.cheapest(cost, self._created) or 0
        finally:
            for level, predicted in leaving:
                run.frontier.add(level, predicted)


def begin(engine: Engine, run: Run, request: Request, parent: Group | None = None) -> Group:
    """Start the work of a granted request."""
    group = Group(run, request, parent)
    if parent is not None:
        parent.add()
    if isinstance(request, Gather):
        parts = [begin(engine, run, part, group) for part in request.requests]
        group.reply = lambda: tuple(part.reply() for part in parts)
    else:
        HANDLERS[type(request)].begin(engine, group, request)
    group.seal()
    return group


class Handler(Protocol):
    """What the engine needs to know about a kind of request."""

    def check(self, run: Run, request: Any) -> None: ...
    def price(self, quote: Quote, request: Any) -> None: ...
    def begin(self, engine: Engine, group: Group, request: Any) -> None: ...


# Roots ---------------------------------------------------------------------------------------------------------------


class DrawHandler:
    """New roots at level 0."""

    def check(self, run: Run, request: Draw) -> None:
        for offset, recipe in enumerate(self._recipes(run, request)):
            number = len(run.tree.roots) + offset
            for index in roots_of(recipe):
                if not 0 <= index < len(run.tree.roots):
                    raise UsageError(f"Draw: root {index} of {recipe} does not exist; this tree has {len(run.tree.roots)} roots, counted from 0")
            if isinstance(recipe, Torch) and number:
                raise UsageError("Draw: torch's own noise is for root 0 only; use Fresh(index)")

    def price(self, quote: Quote, request: Draw) -> None:
        for _ in range(request.count):
            quote.create(0)

    def begin(self, engine: Engine, group: Group, request: Draw) -> None:
        run = group.run
        with engine.timed("noise"):
            recipes = self._recipes(run, request)
            arrays = [run.realize(recipe) for recipe in recipes]
        sampler = run.bindings[None].sampler(run.tree)
        for recipe, array in zip(recipes, arrays, strict=True):
            node = run.tree.add_root(Move("draw", (0,), noise=recipe))
            run.adopt(node)
            noise = engine.to_device(array)
            run.store.put(run.key("noise", len(run.tree.roots) - 1), {"noise": noise})
            latent = sampler.draw(noise[None], None if run.origin is None else run.origin[None])[0]
            run.settle(node, {"latent": latent}, arrived=False)
            group.nodes.append(node)
        group.reply = lambda: group.nodes

    @staticmethod
    def _recipes(run: Run, request: Draw) -> list[Recipe]:
        first = len(run.tree.roots)
        if request.noise is None:
            fresh: list[Recipe] = [Fresh(first + i) for i in range(request.count)]
            if first == 0 and run.first is not None:
                fresh[0] = run.first
            return fresh
        return list(request.noise) if isinstance(request.noise, tuple) else [request.noise] * request.count  # type: ignore[list-item]


class StartHandler:
    """New roots from a clean latent, noised."""

    def check(self, run: Run, request: Start) -> None:
        if isinstance(request.source, Node):
            run.require_open(request.source, request)
            if request.source.level != run.tree.schedule.last:
                raise UsageError(f"Start: node {request.source.index} stands at level {request.source.level}; start from a finished node")
        elif run.origin is None:
            raise UsageError("Start: this search has no initial image; give one (--init-image) or start from a finished node")
        self._level(run, request)

    def price(self, quote: Quote, request: Start) -> None:
        for _ in range(request.copies):
            quote.create(self._level(quote.run, request))

    def begin(self, engine: Engine, group: Group, request: Start) -> None:
        run = group.run
        level = self._level(run, request)
        sampler = run.bindings[None].sampler(run.tree)
        source = request.source if isinstance(request.source, Node) else None
        for _ in range(request.copies):
            move = Move("start", (level,), scale=request.strength, source="image" if source is None else "node")
            node = run.tree.add_root(move, level)
            run.adopt(node)
            noise = engine.to_device(run.realize(Fresh(len(run.tree.roots) - 1)))
            run.store.put(run.key("noise", len(run.tree.roots) - 1), {"noise": noise})
            if source is None:
                clean = run.origin
            elif source.failed:
                run.fail(node, f"its source, node {source.index}, failed")
                group.nodes.append(node)
                continue
            else:
                node.note["source"] = source.index
                clean = run.store.get(run.key("node", source.index))["latent"]
            assert clean is not None
            run.settle(node, {"latent": sampler.add_noise(clean[None], [level], noise[None])[0]}, arrived=False)
            group.nodes.append(node)
        group.reply = lambda: group.nodes

    @staticmethod
    def _level(run: Run, request: Start) -> int:
        last = run.tree.schedule.last
        level = last - min(int(last * request.strength), last)
        if level == last:
            raise UsageError(f"Start: strength {request.strength:g} leaves no step of {last}; use at least {1 / last:g}")
        return level


# Edges ---------------------------------------------------------------------------------------------------------------


class DenoiseHandler:
    """Children at cleaner levels."""

    def check(self, run: Run, request: Denoise) -> None:
        if request.model not in run.bindings:
            raise unknown_name("helper model", str(request.model), [str(name) for name in run.bindings if name], "Pass it to the search as helpers={name: model}.")
        sampler = run.bindings[request.model].sampler(run.tree, request.solver)
        if not sampler.solver.stochastic:
            if request.copies > 1:
                raise UsageError(f"Denoise: copies is {request.copies} but solver {sampler.solver} is deterministic, so all would be equal; use a stochastic solver, or Renoise")
            if request.noise is not None:
                raise UsageError(f"Denoise: a noise recipe was given but solver {sampler.solver} is deterministic and draws none")
        for node, to in zip(request.group, request.targets, strict=True):
            run.require_open(node, request)
            levels = run.tree.schedule.span(node.level, to, request.num_steps)
            if request.noise is not None and not isinstance(request.noise, Fresh) and (len(levels) != 2 or sampler.solver.num_noise != 1):
                raise UsageError(f"Denoise: {type(request.noise).__name__} is the noise of a single step, but {levels[0]} -> {to} takes {len(levels) - 1}; denoise one level at a time")
            outside = [level for level in request.via if level not in levels[1:-1] and level != to and len(levels) > 1]
            if outside:
                raise UsageError(f"Denoise: via levels {outside} are not visited between {node.level} and {to} (visited: {list(levels)})")

    def price(self, quote: Quote, request: Denoise) -> None:
        run = quote.run
        sampler = run.bindings[request.model].sampler(run.tree, request.solver)
        for node, to in zip(request.group, request.targets, strict=True):
            levels = run.tree.schedule.span(node.level, to, request.num_steps)
            if node.failed or len(levels) == 1:
                continue
            stops = [level for level in levels[1:] if level in request.via or level == to]
            for _ in range(request.copies):
                memo = self._memo(node, levels, sampler, request)
                if memo is None or quote.once(memo):
                    quote.denoise(node, levels, sampler, request.model, stops=stops, draft=False)

    def begin(self, engine: Engine, group: Group, request: Denoise) -> None:
        run = group.run
        sampler = run.bindings[request.model].sampler(run.tree, request.solver)
        for node, to in zip(request.group, request.targets, strict=True):
            levels = run.tree.schedule.span(node.level, to, request.num_steps)
            for _ in range(request.copies):
                group.nodes.append(node if len(levels) == 1 else self._child(engine, group, request, node, levels, sampler))
        group.reply = lambda: group.nodes

    def _child(self, engine: Engine, group: Group, request: Denoise, node: Node, levels: tuple[int, ...], sampler: Sampler) -> Node:
        run = group.run
        memo = self._memo(node, levels, sampler, request)
        if memo is not None and memo in run.repeats:
            return run.repeats[memo]
        branch = self._branch(run, node, request) if sampler.solver.stochastic else 0
        stream = node.stream if branch == 0 else derive(node.stream, "denoise", node.level, branch)
        stops = [i for i, level in enumerate(levels) if i and (level in request.via or level == levels[-1])]
        pieces: list[tuple[Node, tuple[int, ...], Node]] = []
        parent, start = node, 0
        for stop in stops:
            kept = None if isinstance(request.noise, Fresh) else request.noise
            move = Move("denoise", levels[start : stop + 1], branch, kept, request.solver, request.model)
            child = grow(run, parent, move, stream, branch)
            pieces.append((parent, levels[start : stop + 1], child))
            parent, start = child, stop
        if memo is not None:
            run.remember(memo, parent)
        group.add(len(pieces))
        denoise(engine, run, pieces, sampler, request.model, request.noise, group.done)
        return parent

    @staticmethod
    def _branch(run: Run, node: Node, request: Denoise) -> int:
        key = (node.index, "denoise")
        if isinstance(request.noise, Fresh):
            run.tree.children[key] = max(run.tree.children[key], request.noise.index + 1)
            return request.noise.index
        return run.tree.next_child(*key)

    @staticmethod
    def _memo(node: Node, levels: tuple[int, ...], sampler: Sampler, request: Denoise) -> tuple[Any, ...] | None:
        """What names a child that is made only once; None for a new branch of a stochastic solver."""
        if not sampler.solver.stochastic:
            return (node.index, levels, request.solver, request.model, request.via)
        if isinstance(request.noise, Fresh):
            return (node.index, levels, request.solver, request.model, request.via, request.noise.index)
        return None


def grow(run: Run, parent: Node, move: Move, stream: int, branch: int, *, draft: bool = False) -> Node:
    """A new child whose id tells its solver, model and repetition too."""
    words = [word for word in (move.solver, move.model, "draft" if draft else None) if word]
    again = run.tree.next_child(parent.index, move.kind, move.levels, branch, *words)
    child = run.tree.add_child(parent, move, stream, branch, again, *words)
    child.draft = draft
    run.adopt(child)
    return child


def denoise(
    engine: Engine,
    run: Run,
    pieces: Sequence[tuple[Node, tuple[int, ...], Node]],
    sampler: Sampler,
    model: str | None,
    noise: Recipe | None,
    done: Callable[[], None],
) -> None:
    """Denoise along consecutive pieces (parent, levels, child); `done` is called once for each."""
    (parent, levels, child), *rest = pieces

    def then() -> None:
        if rest:
            denoise(engine, run, rest, sampler, model, noise, done)
        done()

    if parent.failed:
        run.fail(child, f"its parent, node {parent.index}, failed")
        then()
        return
    kept = run.store.get(run.key("node", parent.index))
    history = tuple(kept[f"history{i}"] for i in range(sum(name.startswith("history") for name in kept)))
    captured = {name: tensor for name, tensor in kept.items() if name.startswith("ancestor_x0@")}
    recipe = None if isinstance(noise, Fresh) else noise
    chain = Chain(
        run, run.bindings[model], sampler, levels, child, kept["latent"], history, run.history_level[parent.index], captured, recipe, then
    )
    engine.start(chain, parent)


class RenoiseHandler:
    """Children at noisier levels."""

    def check(self, run: Run, request: Renoise) -> None:
        for node in request.group:
            run.require_open(node, request)
            if not 0 <= request.to <= node.level:
                raise UsageError(f"Renoise: to is {request.to} but node {node.index} stands at level {node.level}; re-noising goes down, to 0 at least")

    def price(self, quote: Quote, request: Renoise) -> None:
        for node in request.group:
            if not node.failed and not _stays(node, request):
                if request.source == "x0" and node.level < quote.run.tree.schedule.last:
                    quote.predict(node, None)
                for _ in range(request.copies):
                    quote.create(request.to)

    def begin(self, engine: Engine, group: Group, request: Renoise) -> None:
        run = group.run
        sampler = run.bindings[None].sampler(run.tree)
        for node in request.group:
            children = []
            for _ in range(request.copies):
                if _stays(node, request):
                    group.nodes.append(node)
                    continue
                children.append(branch_off(run, node, Move("renoise", (node.level, request.to), source=request.source)))
            group.nodes.extend(children)
            if not children:
                continue

            def spread(clean: Tensor | None, node: Node = node, children: Sequence[Node] = children) -> None:
                import torch

                with engine.timed("noise"):
                    noise = engine.to_device(torch.stack([torch.from_numpy(move_noise(child.stream, run.shape)) for child in children]))
                copies = len(children)
                kept = run.store.get(run.key("node", node.index))
                if clean is not None:
                    latents = sampler.add_noise(clean.expand(copies, *clean.shape), [request.to] * copies, noise)
                else:
                    latent = kept["latent"]
                    arrived = [run.arrived[node.index]] * copies
                    latents = sampler.renoise(latent.expand(copies, *latent.shape), arrived, [node.level] * copies, [request.to] * copies, noise)
                captured = {name: tensor for name, tensor in kept.items() if run.ancestor_levels.get(name, request.to) < request.to}
                place(run, group, children, latents, captured)

            with_estimate(engine, group, node, children, spread, needed=request.source == "x0")
        group.reply = lambda: group.nodes


def _stays(node: Node, request: Renoise) -> bool:
    return node.level == request.to and request.source == "latent"


class PerturbHandler:
    """Children at the same level with a share of their noise replaced."""

    def check(self, run: Run, request: Perturb) -> None:
        for node in request.group:
            run.require_open(node, request)
            if node.level in (0, run.tree.schedule.last):
                raise UsageError(f"Perturb: node {node.index} stands at level {node.level}; perturb between levels (at level 0 use Draw with Rotate or Mix)")

    def price(self, quote: Quote, request: Perturb) -> None:
        for node in request.group:
            if not node.failed:
                quote.predict(node, None)
                for _ in range(request.copies):
                    quote.create(node.level)

    def begin(self, engine: Engine, group: Group, request: Perturb) -> None:
        run = group.run
        sampler = run.bindings[None].sampler(run.tree)
        for node in request.group:
            children = [branch_off(run, node, Move("perturb", (node.level, node.level), scale=request.scale)) for _ in range(request.copies)]
            group.nodes.extend(children)

            def spread(clean: Tensor | None, node: Node = node, children: Sequence[Node] = children) -> None:
                import torch

                assert clean is not None
                with engine.timed("noise"):
                    noise = engine.to_device(torch.stack([torch.from_numpy(move_noise(child.stream, run.shape)) for child in children]))
                copies = len(children)
                kept = run.store.get(run.key("node", node.index))
                latent, arrived = kept["latent"], [run.arrived[node.index]] * copies
                latents = sampler.perturb(
                    latent.expand(copies, *latent.shape), clean.expand(copies, *clean.shape), arrived, [node.level] * copies, [request.scale] * copies, noise
                )
                captured = {name: tensor for name, tensor in kept.items() if name.startswith("ancestor_x0@")}
                place(run, group, children, latents, captured, arrived=run.arrived[node.index])

            with_estimate(engine, group, node, children, spread, needed=True)
        group.reply = lambda: group.nodes


def branch_off(run: Run, node: Node, move: Move) -> Node:
    """A renoise or perturb child: always a stream of its own."""
    number = run.tree.next_child(node.index, move.kind, *move.levels)
    stream = derive(node.stream, move.kind, *move.levels, number)
    child = run.tree.add_child(node, Move(move.kind, move.levels, number, scale=move.scale, source=move.source), stream, number)
    run.adopt(child)
    return child


def with_estimate(
    engine: Engine, group: Group, node: Node, children: Sequence[Node], spread: Callable[[Tensor | None], None], *, needed: bool
) -> None:
    """Call `spread` with the node's clean estimate (None if not needed); failures fail the children."""
    run = group.run
    group.add()
    if node.failed:
        for child in children:
            run.fail(child, f"its parent, node {node.index}, failed")
        group.done()
        return

    def failed(reason: str) -> None:
        for child in children:
            run.fail(child, reason)
        group.done()

    def spread_and_done(clean: Tensor | None) -> None:
        spread(clean)
        group.done()

    if needed:
        estimate(engine, run, node, spread_and_done, failed)
    else:
        spread_and_done(None)


def estimate(engine: Engine, run: Run, node: Node, then: Callable[[Tensor], None], failed: Callable[[str], None]) -> None:
    """Call `then` with a node's clean estimate; at level T that is the latent itself."""
    latent = run.store.get(run.key("node", node.index))["latent"]
    if node.level == run.tree.schedule.last:
        then(latent)
        return

    def predicted(cond: Tensor, uncond: Tensor | None) -> None:
        engine.estimates.append(Estimate(run, run.bindings[None], node.level, latent, cond, uncond, then))

    engine.predict(run, node, None, predicted, failed)


def place(run: Run, group: Group, children: Sequence[Node], latents: Tensor, captured: dict[str, Tensor], *, arrived: bool = False) -> None:
    """Give freshly noised children their latents; solver history starts anew."""
    import torch

    finite = torch.isfinite(latents).flatten(1).all(1).tolist()
    for child, latent, good in zip(children, latents.unbind(0), finite, strict=True):
        if good:
            run.settle(child, {"latent": latent} | captured, arrived=arrived)
        else:
            run.fail(child, f"the latent is not finite after {child.move.kind} to level {child.level}")


# Scores --------------------------------------------------------------------------------------------------------------


class ScoreHandler:
    """Values."""

    def check(self, run: Run, request: Score) -> None:
        verifier = self._verifier(run, request)
        last = run.tree.schedule.last
        for node in request.group:
            run.require_open(node, request)
            if verifier.judges == "final" and request.at == "x0" and node.level < last:
                raise UsageError(f"Score: {verifier.name} judges finished samples only, but node {node.index} stands at level {node.level} of {last}; use at='lookahead'")

    def price(self, quote: Quote, request: Score) -> None:
        run = quote.run
        verifier = self._verifier(run, request)
        for node in request.group:
            if node.failed or self._known(node, request, verifier) or node.level == run.tree.schedule.last:
                continue
            if request.at == "x0":
                quote.predict(node, None)
                continue
            sampler, levels, memo = _lookahead(run, node, request)
            if quote.once(memo):
                quote.denoise(node, levels, sampler, None, stops=levels[-1:], draft=True)

    def begin(self, engine: Engine, group: Group, request: Score) -> None:
        run = group.run
        verifier = self._verifier(run, request)
        key = request.key(verifier.name)
        nodes = list(request.group)
        group.reply = lambda: [node.score(key) for node in nodes]
        wanted = list(dict.fromkeys(node for node in nodes if not node.failed and not self._known(node, request, verifier)))
        collector = SetCollector(engine, verifier, len(wanted)) if verifier.scope == "set" else None
        for node in wanted:
            group.add()
            waiting = run.scoring.setdefault((node.index, key, id(collector)), [])
            waiting.append(group)
            if len(waiting) > 1:
                continue  # being scored already, for another request of the same Gather
            Scoring(engine, run, node, verifier, key, collector).start(request)

    @staticmethod
    def _verifier(run: Run, request: Score) -> Verifier:
        if request.verifier is None:
            return run.steering
        if request.verifier not in run.verifiers:
            raise unknown_name("verifier of this search", request.verifier, run.verifiers, "Name it when the search starts (--verifier).")
        return run.verifiers[request.verifier]

    @staticmethod
    def _known(node: Node, request: Score, verifier: Verifier) -> bool:
        return verifier.scope == "row" and request.key(verifier.name) in node.values


def _lookahead(run: Run, node: Node, request: Score) -> tuple[Sampler, tuple[int, ...], tuple[Any, ...]]:
    sampler = run.bindings[None].sampler(run.tree, run.tree.solver.ode)
    levels = run.tree.schedule.span(node.level, run.tree.schedule.last, request.num_steps)
    return sampler, levels, (node.index, levels, run.tree.solver.ode, "draft")


class Scoring:
    """One node on its way to a value: (look-ahead ->) clean estimate -> pixels -> every verifier concerned."""

    def __init__(self, engine: Engine, run: Run, node: Node, verifier: Verifier, key: str, collector: SetCollector | None) -> None:
        self.engine = engine
        self.run = run
        self.node = node
        self.verifier = verifier
        self.key = key
        self.collector = collector
        self.source = node  # whose clean estimate is judged: the node, or its look-ahead leaf
        self.memo: tuple[Any, ...] = ()
        self.open = 0

    def start(self, request: Score) -> None:
        """Queue the first piece of work."""
        run, node = self.run, self.node
        if request.at == "x0" or node.level == run.tree.schedule.last:
            self._estimate()
            return
        sampler, levels, self.memo = _lookahead(run, node, request)
        draft = run.drafts.get(self.memo)
        if draft is None:
            leaf = grow(run, node, Move("denoise", levels, solver=run.tree.solver.ode), node.stream, 0, draft=True)
            draft = run.drafts[self.memo] = Draft(leaf)
            denoise(self.engine, run, [(node, levels, leaf)], sampler, None, None, draft.arrived)
        self.source = draft.leaf
        draft.users += 1
        if draft.ready:
            self._estimate()
        else:
            draft.waiting.append(self._estimate)

    def _estimate(self) -> None:
        if self.source.failed:
            self._fail(self.source.reason or "its look-ahead failed")
            return
        estimate(self.engine, self.run, self.source, self._decode, self._fail)

    def _fail(self, reason: str) -> None:
        if self.source is self.node:
            self.run.fail(self.node, reason)
        self._value(self.key, Value(None, reason=reason))
        if self.collector is not None:
            self.collector.skip()
        self._end()

    def _judges(self) -> list[Verifier]:
        """The verifier asked for; a finished sample that is steered by is scored by all."""
        finished = self.source is self.node and self.node.level == self.run.tree.schedule.last
        if not finished or self.verifier is not self.run.steering:
            return [self.verifier]
        others = [judge for judge in self.run.verifiers.values() if judge is not self.verifier and judge.name not in self.node.values]
        return [self.verifier, *(judge for judge in others if judge.scope == "row")]

    def _decode(self, x0: Tensor) -> None:
        import torch

        if not bool(torch.isfinite(x0).all()):
            self._fail(f"the clean estimate is not finite at level {self.source.level}")
            return
        if not any("images" in judge.needs for judge in self._judges()):
            self._judge(x0, None)
            return

        def decoded(pixels: Tensor | None, reason: str | None) -> None:
            if pixels is None:
                self._value(self.key, Value(None, reason=reason))
                if self.collector is not None:
                    self.collector.skip()
                self._end()
            else:
                self._judge(x0, pixels)

        self.engine.decode(Decode(self.run, self.run.bindings[None].model, x0, decoded))

    def _judge(self, x0: Tensor, pixels: Tensor | None) -> None:
        run, source = self.run, self.source
        kept = run.store.get(run.key("node", source.index))
        ancestors = {name: tensor for name, tensor in kept.items() if name.startswith("ancestor_x0@")}
        candidate = Candidate(run, self.node, source.level, kept["latent"], x0, pixels, ancestors)
        judges = self._judges()
        self.open = len(judges)
        for judge in judges:
            missing = [need for need in judge.needs if need.startswith("ancestor_x0@") and need not in ancestors]
            then = partial(self._judged, judge, pixels)
            if missing:
                then([Value(None, reason=f"{judge.name} compares with an estimate at sigma/alpha {missing[0].partition('@')[2]}, which this node has not reached")])
            elif self.collector is not None and judge is self.verifier:
                self.collector.add(candidate, then)
            else:
                self.engine.judge(Judgement(judge, [candidate], then))

    def _judged(self, judge: Verifier, pixels: Tensor | None, values: Sequence[Value]) -> None:
        self._value(self.key if judge is self.verifier else judge.name, values[0])
        if pixels is not None and judge is self.run.steering and self.source is self.node and self.node.level == self.run.tree.schedule.last:
            self.engine.keep_picture(self.run, self.node, pixels)
        self.open -= 1
        if self.open == 0:
            self._end()

    def _value(self, key: str, value: Value) -> None:
        self.node.values[key] = value

    def _end(self) -> None:
        if self.source is not self.node:
            draft = self.run.drafts[self.memo]
            draft.users -= 1
            if not draft.users:
                self.run.close(draft.leaf)
                del self.run.drafts[self.memo]
        for group in self.run.scoring.pop((self.node.index, self.key, id(self.collector))):
            group.done()


class SetCollector:
    """Waits for all candidates of a set, then has them judged together."""

    def __init__(self, engine: Engine, verifier: Verifier, expected: int) -> None:
        self.engine = engine
        self.verifier = verifier
        self.expected = expected
        self.rows: list[tuple[Candidate, Callable[[list[Value]], None]]] = []

    def add(self, candidate: Candidate, then: Callable[[list[Value]], None]) -> None:
        """One candidate is ready."""
        self.rows.append((candidate, then))
        self._judge_when_complete()

    def skip(self) -> None:
        """One candidate has failed on the way."""
        self.expected -= 1
        self._judge_when_complete()

    def _judge_when_complete(self) -> None:
        if not self.rows or len(self.rows) < self.expected:
            return
        # In node order: the set must not depend on which row was ready first.
        rows = sorted(self.rows, key=lambda row: row[0].node.index)

        def deliver(values: list[Value]) -> None:
            for (_, then), value in zip(rows, values, strict=True):
                then([value])

        self.engine.judge(Judgement(self.verifier, [candidate for candidate, _ in rows], deliver))


class ReleaseHandler:
    """Nodes leave the live set."""

    def check(self, run: Run, request: Release) -> None:
        for node in request.group:
            if node.index >= len(run.tree.nodes) or run.tree.nodes[node.index] is not node:
                raise UsageError(f"Release: {node!r} belongs to another tree")

    def price(self, quote: Quote, request: Release) -> None:
        quote.release(request.group)

    def begin(self, engine: Engine, group: Group, request: Release) -> None:
        for node in request.group:
            group.run.close(node)


HANDLERS: dict[type[Any], Handler] = {
    Draw: DrawHandler(),
    Start: StartHandler(),
    Denoise: DenoiseHandler(),
    Renoise: RenoiseHandler(),
    Perturb: PerturbHandler(),
    Score: ScoreHandler(),
    Release: ReleaseHandler(),
}
