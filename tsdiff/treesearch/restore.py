"""Computing the latent of a saved node again, where it was not kept: the moves on its path, done once more.

A node's noise follows from its stream or its recipe, so that its path can be walked again from any node whose state is
there: a kept latent, as long as neither a solver's history nor an ancestor's estimate belongs to it, which are not kept
with it; in the end a root, whose noise is a recipe too. It costs what it cost then, and is counted again.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from tsdiff.treesearch.errors import UsageError
from tsdiff.treesearch.growth import Growth
from tsdiff.treesearch.moves import captured_at, denoise, estimate, noise_of, perturbed, renoised
from tsdiff.treesearch.node import Node
from tsdiff.treesearch.noise import Fresh, Recipe, derive, realize, roots_of
from tsdiff.treesearch.quote import Quote
from tsdiff.treesearch.run import Group, Run
from tsdiff.treesearch.schedule import Schedule

if TYPE_CHECKING:
    from torch import Tensor

    from tsdiff.treesearch.noise import Array


@dataclass(frozen=True)
class Restore:
    """Latents of nodes of earlier drivers, computed again -> whether the last one's is there.

    Each node is the child of the one before; the first one's parent has its latent, or there is none.
    """

    nodes: tuple[Node, ...]

    @property
    def group(self) -> tuple[Node, ...]:
        """The nodes, as of other requests."""
        return self.nodes


def lost_path(node: Node, to: int, kept: Collection[int], history_level: Callable[[Node], int], ancestor_levels: Collection[int]) -> tuple[Node, ...]:
    """The nodes to `Restore`, so that a node can be re-noised to a level; none if it is all there.

    Args:
      node: the node.
      to: the level; its own stands for going on from it.
      kept: indices of the nodes whose latents were kept, by themselves.
      history_level: of the solver's history that belongs to a node, -1 for none.
      ancestor_levels: levels of the clean estimates that verifiers want of ancestors.

    Raises:
      UsageError: if its path begins at another node, whose latent is not there.
    """
    inherited = any(0 <= captured_at(node, level) < to for level in ancestor_levels) or (to == node.level and history_level(node) >= 0)
    if node.index in kept and not inherited:
        return ()
    lost = [node]
    while (parent := lost[-1].parent) is not None:
        remembered = lost[-1].move.kind == "denoise" and history_level(parent) >= 0
        if parent.index in kept and not remembered and all(captured_at(parent, level) < 0 for level in ancestor_levels):
            break
        lost.append(parent)
    if parent is None and lost[-1].move.source == "node":
        raise UsageError(f"it began at node {lost[-1].note.get('source')}, whose latent was not kept")
    return tuple(reversed(lost))


def price(nodes: Sequence[Node], schedule: Schedule, stages: Callable[[Node], int]) -> int:
    """NFE of restoring nodes, the solver of each one's move having so many stages."""
    total = 0
    for node in nodes:
        if node.move.kind == "denoise":
            total += schedule.span_cost(node.move.levels, stages(node))
        elif _by_estimate(node) and node.parent is not None and node.parent.level < schedule.last:
            total += 1
    return total


class RestoreHandler:
    """Saved nodes get their latents back."""

    def check(self, run: Run, request: Restore) -> None:
        for node in request.group:
            if not run.owns(node) or node.driver == run.tree.driver:
                raise UsageError(f"Restore: {node!r} is not of an earlier driver")

    def price(self, quote: Quote, request: Restore) -> None:
        run = quote.run
        quote.nfe += price(request.group, run.tree.schedule, lambda node: run.bindings[node.move.model].sampler(run.tree, node.move.solver).solver.stages)

    def begin(self, growth: Growth, group: Group, request: Restore) -> None:
        run = group.run
        group.reply = lambda: run.key("node", request.group[-1].index) in run.store
        if not growth.repeating:
            group.add()
            _walk(growth, group, deque(request.group))


def _walk(growth: Growth, group: Group, nodes: deque[Node]) -> None:
    """Restore nodes one after the other; what failed is in `Run.unrestored`."""
    run = group.run
    if not nodes or (nodes[0].parent is not None and run.key("node", nodes[0].parent.index) not in run.store):
        group.done()
        return
    node = nodes.popleft()
    parent = node.parent

    def then() -> None:
        _walk(growth, group, nodes)

    if parent is None:
        run.settle(node, {"latent": _root_latent(growth, run, node)}, arrived=False)
        then()
    elif node.move.kind == "denoise":
        sampler = run.bindings[node.move.model].sampler(run.tree, node.move.solver)
        recipe = node.move.noise
        noise = None if recipe is None else partial(_realized, run, node, recipe)
        denoise(growth, run, [(parent, node.move.levels, node)], sampler, node.move.model, noise, then)
    elif _by_estimate(node):

        def failed(reason: str) -> None:
            run.fail(node, reason)
            then()

        def estimated(clean: Tensor) -> None:
            fresh = noise_of(growth, run, [node])
            if node.move.kind == "perturb":
                assert node.move.scale is not None
                _settle(run, node, *perturbed(run, parent, node.move.scale, clean, fresh), arrived=run.arrived[parent.index])
            else:
                _settle(run, node, *renoised(run, parent, node.level, clean, fresh))
            then()

        estimate(growth, run, parent, estimated, failed)
    else:
        recipe = node.move.noise
        fresh = noise_of(growth, run, [node]) if recipe is None else growth.to_device(_realized(run, node, recipe))[None]
        _settle(run, node, *renoised(run, parent, node.level, None, fresh))
        then()


def _by_estimate(node: Node) -> bool:
    """Whether the move began at the parent's clean estimate."""
    return node.move.kind == "perturb" or (node.move.kind == "renoise" and node.move.source == "x0")


def _settle(run: Run, node: Node, latents: Tensor, captured: dict[str, Tensor], *, arrived: bool = False) -> None:
    run.settle(node, {"latent": latents[0]} | captured, arrived=arrived)


def _root_latent(growth: Growth, run: Run, node: Node) -> Tensor:
    sampler = run.bindings[None].sampler(run.tree)
    recipe = node.move.noise or Fresh(run.tree.roots.index(node))
    noise = growth.to_device(_realized(run, node, recipe))[None]
    if node.move.kind == "start":
        assert run.origin is not None, "roots that began at a node are not restored"
        return sampler.add_noise(run.origin[None], [node.level], noise)[0]
    return sampler.draw(noise, None if run.origin is None else run.origin[None])[0]


def _realized(run: Run, node: Node, recipe: Recipe) -> Array:
    """The noise of a recipe as it was for the driver that made a node, with the first noises that it names."""
    tree = run.tree
    if node.driver == 0:
        seed, firsts = tree.seed, tree.roots
    else:
        firsts = [other for other in tree.nodes if other.driver == node.driver and other.parent is not None and other.parent.driver != node.driver and other.move.noise is not None]
        launch = firsts[0].parent
        assert launch is not None
        seed = derive(launch.stream, "driver", node.driver)
    bases = {index: _realized(run, firsts[index], firsts[index].move.noise or Fresh(index)) for index in roots_of(recipe)}
    return realize(recipe, seed=seed, shape=run.shape, roots=bases, given=run.given)
