"""Requests that make nodes: draw, start, denoise, renoise, perturb.

Nodes are made when a request begins, in request order, so that their indices do not depend on the order of work.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any

from tsdiff.treesearch.errors import UsageError, unknown_name
from tsdiff.treesearch.growth import Growth
from tsdiff.treesearch.node import Move, Node
from tsdiff.treesearch.noise import Fresh, Recipe, Torch, derive, move_noise
from tsdiff.treesearch.protocols import Sampler
from tsdiff.treesearch.quote import Quote
from tsdiff.treesearch.requests import Denoise, Draw, Perturb, Renoise, Start
from tsdiff.treesearch.run import Group, Launch, Run
from tsdiff.treesearch.work import Chain, Estimate

if TYPE_CHECKING:
    from torch import Tensor

    from tsdiff.treesearch.noise import Array


# Roots ---------------------------------------------------------------------------------------------------------------


class DrawHandler:
    """New roots at level 0; of a later driver of a tree, re-noised copies of the node that it begins at."""

    def check(self, run: Run, request: Draw) -> None:
        for offset, recipe in enumerate(self._recipes(run, request)):
            run.require_noise(recipe, request)
            if isinstance(recipe, Torch) and (run.launch is not None or len(run.roots) + offset):
                raise UsageError("Draw: torch's own noise is for root 0 only; use Fresh(index)")

    def price(self, quote: Quote, request: Draw) -> None:
        launch = quote.run.launch
        for _ in range(request.count if launch is None or launch.level < launch.node.level else 0):
            quote.create(quote.run.first_level)

    def begin(self, growth: Growth, group: Group, request: Draw) -> None:
        run = group.run
        group.reply = lambda: group.nodes
        if run.launch is not None and run.launch.level == run.launch.node.level:
            group.nodes.extend([run.launch.node] * request.count)
            return
        with growth.timed("noise"):
            recipes = self._recipes(run, request)
            arrays = [run.realize(recipe) for recipe in recipes]
        if run.launch is not None:
            self._copies(growth, group, run.launch, recipes, [growth.to_device(array) for array in arrays])
            return
        sampler = run.bindings[None].sampler(run.tree)
        for recipe, array in zip(recipes, arrays, strict=True):
            node = run.tree.add_root(Move("draw", (0,), noise=recipe))
            noise = growth.to_device(array)
            run.adopt_root(node, noise)
            latent = sampler.draw(noise[None], None if run.origin is None else run.origin[None])[0]
            run.settle(node, {"latent": latent}, arrived=False)
            group.nodes.append(node)

    @staticmethod
    def _copies(growth: Growth, group: Group, launch: Launch, recipes: Sequence[Recipe], noises: Sequence[Tensor]) -> None:
        """A later driver's first nodes: its stream of the node that it begins at takes the place of the seed."""
        import torch

        run, node = group.run, launch.node
        levels = (node.level, launch.level)
        children = []
        for recipe, noise in zip(recipes, noises, strict=True):
            number = len(run.roots)
            stream = derive(run.tree.stream(node), "draw", number)
            child = run.tree.add_child(node, Move("renoise", levels, number, recipe, source="latent"), stream, number)
            run.roots.append(child)
            run.adopt_root(child, noise)
            children.append(child)
        group.nodes.extend(children)
        if not growth.repeating:
            place(run, children, *renoised(run, node, launch.level, None, torch.stack(list(noises))))

    @staticmethod
    def _recipes(run: Run, request: Draw) -> list[Recipe]:
        first = len(run.roots)
        if request.noise is None:
            fresh: list[Recipe] = [Fresh(first + i) for i in range(request.count)]
            if first == 0 and run.first is not None:
                fresh[0] = run.first
            return fresh
        return list(request.noise) if isinstance(request.noise, tuple) else [request.noise] * request.count  # type: ignore[list-item]


class StartHandler:
    """New roots from a clean latent, noised."""

    def check(self, run: Run, request: Start) -> None:
        if run.launch is not None:
            raise UsageError(f"Start: this search goes on from node {run.launch.node.index}; Draw gives re-noised copies of it")
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

    def begin(self, growth: Growth, group: Group, request: Start) -> None:
        run = group.run
        level = self._level(run, request)
        sampler = run.bindings[None].sampler(run.tree)
        source = request.source if isinstance(request.source, Node) else None
        for _ in range(request.copies):
            move = Move("start", (level,), scale=request.strength, source="image" if source is None else "node")
            node = run.tree.add_root(move, level)
            noise = growth.to_device(run.realize(Fresh(len(run.tree.roots) - 1)))
            run.adopt_root(node, noise)
            if source is None:
                clean = run.origin
            elif source.failed:
                run.fail(node, f"its source, node {source.index}, failed")
                group.nodes.append(node)
                continue
            else:
                node.note = {"source": source.index}
                clean = None if growth.repeating else run.store.get(run.key("node", source.index))["latent"]
            if growth.repeating:
                group.nodes.append(node)
                continue
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
        if request.noise is not None:
            run.require_noise(request.noise, request)
            if isinstance(request.noise, Torch):
                raise UsageError("Denoise: torch's own noise is for root 0 only; use Fresh(index)")
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

    def begin(self, growth: Growth, group: Group, request: Denoise) -> None:
        run = group.run
        sampler = run.bindings[request.model].sampler(run.tree, request.solver)
        for node, to in zip(request.group, request.targets, strict=True):
            levels = run.tree.schedule.span(node.level, to, request.num_steps)
            for _ in range(request.copies):
                group.nodes.append(node if len(levels) == 1 else self._child(growth, group, request, node, levels, sampler))
        group.reply = lambda: group.nodes

    def _child(self, growth: Growth, group: Group, request: Denoise, node: Node, levels: tuple[int, ...], sampler: Sampler) -> Node:
        run = group.run
        memo = self._memo(node, levels, sampler, request)
        if memo is not None and memo in run.repeats:
            return run.repeats[memo]
        branch = self._branch(run, node, request) if sampler.solver.stochastic else 0
        stream = run.tree.stream(node)
        stream = stream if branch == 0 else derive(stream, "denoise", node.level, branch)
        stops = [i for i, level in enumerate(levels) if i and (level in request.via or level == levels[-1])]
        pieces: list[tuple[Node, tuple[int, ...], Node]] = []
        parent, start = node, 0
        for stop in stops:
            kept = None if isinstance(request.noise, Fresh) else request.noise
            piece = levels[start : stop + 1]
            child = grow(run, parent, _along(piece, branch, kept, request.solver, request.model), stream, branch)
            pieces.append((parent, piece, child))
            # Going on from a stop is that node's first continuation, as if it had been asked for by itself.
            parent, start, branch = child, stop, 0
        if memo is not None:
            run.remember(memo, parent)
        self._continued(run, request, pieces, levels, sampler)
        group.add(len(pieces))
        noise = None if request.noise is None or isinstance(request.noise, Fresh) else partial(run.realize, request.noise)
        denoise(growth, run, pieces, sampler, request.model, noise, group.done)
        return parent

    @staticmethod
    def _branch(run: Run, node: Node, request: Denoise) -> int:
        if isinstance(request.noise, Fresh):
            run.tree.count_children(node, request.noise.index + 1, "denoise")
            return request.noise.index
        return run.tree.next_child(node, "denoise")

    def _continued(
        self, run: Run, request: Denoise, pieces: Sequence[tuple[Node, tuple[int, ...], Node]], levels: tuple[int, ...], sampler: Sampler
    ) -> None:
        """Each stop on the way has had its first continuation: asked for again, to the next stop or to the end, it is there."""
        end = pieces[-1][2]
        for node, piece, child in pieces[1:]:
            if sampler.solver.stochastic:
                run.tree.count_children(node, 1, "denoise")
            run.remember(self._key(node, piece, request, (), 0), child)
            if child is not end:
                rest = levels[levels.index(piece[0]) :]
                run.remember(self._key(node, rest, request, [level for level in request.via if level > piece[0]], 0), end)

    @classmethod
    def _memo(cls, node: Node, levels: tuple[int, ...], sampler: Sampler, request: Denoise) -> tuple[Any, ...] | None:
        """What names a child that is made only once; None for a new branch of a stochastic solver."""
        if not sampler.solver.stochastic:
            return cls._key(node, levels, request, request.via, 0)
        if isinstance(request.noise, Fresh):
            return cls._key(node, levels, request, request.via, request.noise.index)
        return None

    @staticmethod
    def _key(node: Node, levels: tuple[int, ...], request: Denoise, via: Sequence[int], branch: int) -> tuple[Any, ...]:
        return (node.index, levels, request.solver, request.model, tuple(via), branch)


def _along(levels: tuple[int, ...], branch: int, noise: Recipe | None, solver: str | None, model: str | None) -> Move:
    """A denoise move; of those without a recipe there are few different ones, which nodes share."""
    return _plain_move(levels, branch, solver, model) if noise is None else Move("denoise", levels, branch, noise, solver, model)


@lru_cache(maxsize=4096)
def _plain_move(levels: tuple[int, ...], branch: int, solver: str | None, model: str | None) -> Move:
    return Move("denoise", levels, branch, None, solver, model)


def grow(run: Run, parent: Node, move: Move, stream: int, branch: int, *, draft: bool = False) -> Node:
    """A new child whose id tells its solver, model and repetition too."""
    words = [word for word in (move.solver, move.model, "draft" if draft else None) if word]
    again = run.tree.next_child(parent, move.kind, move.levels, branch, *words)
    child = run.tree.add_child(parent, move, stream, branch, again, *words)
    child.draft = draft
    run.adopt(child)
    return child


def denoise(
    growth: Growth,
    run: Run,
    pieces: Sequence[tuple[Node, tuple[int, ...], Node]],
    sampler: Sampler,
    model: str | None,
    noise: Callable[[], Array] | None,
    done: Callable[[], None],
) -> None:
    """Denoise along consecutive pieces (parent, levels, child); `done` is called once for each."""
    (parent, levels, child), *rest = pieces

    def then() -> None:
        if rest:
            denoise(growth, run, rest, sampler, model, noise, done)
        done()

    if parent.failed:
        run.fail(child, f"its parent, node {parent.index}, failed")
        then()
        return
    if growth.repeating:
        for _ in range(len(rest) + 1):
            done()
        return
    kept = run.store.get(run.key("node", parent.index))
    history = tuple(kept[f"history{i}"] for i in range(sum(name.startswith("history") for name in kept)))
    captured = {name: tensor for name, tensor in kept.items() if name.startswith("ancestor_x0@")}
    chain = Chain(
        run, run.bindings[model], sampler, levels, child, kept["latent"], history, run.history_level.get(parent.index, -1), captured, noise, then
    )
    growth.start(chain, parent)


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

    def begin(self, growth: Growth, group: Group, request: Renoise) -> None:
        run = group.run
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
                place(run, children, *renoised(run, node, request.to, clean, noise_of(growth, run, children)))

            with_estimate(growth, group, node, children, spread, needed=request.source == "x0")
        group.reply = lambda: group.nodes


def renoised(run: Run, node: Node, to: int, clean: Tensor | None, noise: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Latents of a node's renoise children, one for each noise (B, ...), and the ancestors' estimates that they inherit.

    From the node's latent by the forward kernel, or from its clean estimate where that is given.
    """
    sampler, copies = run.bindings[None].sampler(run.tree), len(noise)
    kept = run.store.get(run.key("node", node.index))
    if clean is not None:
        latents = sampler.add_noise(clean.expand(copies, *clean.shape), [to] * copies, noise)
    else:
        latent = kept["latent"]
        arrived = [run.arrived[node.index]] * copies
        latents = sampler.renoise(latent.expand(copies, *latent.shape), arrived, [node.level] * copies, [to] * copies, noise)
    return latents, {name: kept[name] for name, level in run.ancestor_levels.items() if name in kept and captured_at(node, level) < to}


def _stays(node: Node, request: Renoise) -> bool:
    return node.level == request.to and request.source == "latent"


def captured_at(node: Node, wanted: int) -> int:
    """The level of the clean estimate that a node carries for `wanted`: the first at or past it that its path stepped from."""
    level = -1
    for step in node.path():
        if step.move.kind == "renoise" and step.level <= level:
            level = -1
        elif step.move.kind == "denoise" and level < 0:
            level = next((start for start in step.move.levels[:-1] if start >= wanted), -1)
    return level


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

    def begin(self, growth: Growth, group: Group, request: Perturb) -> None:
        run = group.run
        for node in request.group:
            children = [branch_off(run, node, Move("perturb", (node.level, node.level), scale=request.scale)) for _ in range(request.copies)]
            group.nodes.extend(children)

            def spread(clean: Tensor | None, node: Node = node, children: Sequence[Node] = children) -> None:
                assert clean is not None
                latents, captured = perturbed(run, node, request.scale, clean, noise_of(growth, run, children))
                place(run, children, latents, captured, arrived=run.arrived[node.index])

            with_estimate(growth, group, node, children, spread, needed=True)
        group.reply = lambda: group.nodes


def perturbed(run: Run, node: Node, scale: float, clean: Tensor, noise: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Latents of a node's perturb children, one for each noise (B, ...), and the ancestors' estimates that they inherit."""
    sampler, copies = run.bindings[None].sampler(run.tree), len(noise)
    kept = run.store.get(run.key("node", node.index))
    latent, arrived = kept["latent"], [run.arrived[node.index]] * copies
    latents = sampler.perturb(
        latent.expand(copies, *latent.shape), clean.expand(copies, *clean.shape), arrived, [node.level] * copies, [scale] * copies, noise
    )
    return latents, {name: tensor for name, tensor in kept.items() if name.startswith("ancestor_x0@")}


def branch_off(run: Run, node: Node, move: Move) -> Node:
    """A renoise or perturb child: always a stream of its own."""
    number = run.tree.next_child(node, move.kind, *move.levels)
    stream = derive(run.tree.stream(node), move.kind, *move.levels, number)
    child = run.tree.add_child(node, Move(move.kind, move.levels, number, scale=move.scale, source=move.source), stream, number)
    run.adopt(child)
    return child


def noise_of(growth: Growth, run: Run, children: Sequence[Node]) -> Tensor:
    """The noise of the moves that make these nodes, (children, ...)."""
    import torch

    with growth.timed("noise"):
        return growth.to_device(torch.stack([torch.from_numpy(move_noise(child.stream, run.shape)) for child in children]))


def with_estimate(
    growth: Growth, group: Group, node: Node, children: Sequence[Node], spread: Callable[[Tensor | None], None], *, needed: bool
) -> None:
    """Call `spread` with the node's clean estimate (None if not needed); failures fail the children."""
    run = group.run
    group.add()
    if node.failed:
        for child in children:
            run.fail(child, f"its parent, node {node.index}, failed")
        group.done()
        return
    if growth.repeating:
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
        estimate(growth, run, node, spread_and_done, failed)
    else:
        spread_and_done(None)


def estimate(growth: Growth, run: Run, node: Node, then: Callable[[Tensor], None], failed: Callable[[str], None]) -> None:
    """Call `then` with a node's clean estimate; at level T that is the latent itself."""
    latent = run.store.get(run.key("node", node.index))["latent"]
    if node.level == run.tree.schedule.last:
        then(latent)
        return

    def predicted(cond: Tensor, uncond: Tensor | None) -> None:
        growth.estimates.append(Estimate(run, run.bindings[None], node.level, latent, cond, uncond, then, failed))

    growth.predict(run, node, None, predicted, failed)


def place(run: Run, children: Sequence[Node], latents: Tensor, captured: dict[str, Tensor], *, arrived: bool = False) -> None:
    """Give freshly noised children their latents; solver history starts anew."""
    import torch

    finite = torch.isfinite(latents).flatten(1).all(1).tolist()
    for child, latent, good in zip(children, latents.unbind(0), finite, strict=True):
        if good:
            run.settle(child, {"latent": latent} | captured, arrived=arrived)
        else:
            run.fail(child, f"the latent is not finite after {child.move.kind} to level {child.level}")
