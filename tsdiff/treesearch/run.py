"""One tree on its way through the engine: its tree, its policy's suspended generator, its models and its latents."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, TypeAlias

from tsdiff.treesearch.errors import SetupError, TsdiffError, UsageError
from tsdiff.treesearch.node import Node, Value
from tsdiff.treesearch.noise import Fresh, Given, Mix, Recipe, realize, roots_of
from tsdiff.treesearch.protocols import DiffusionModel, Encoded, Guidance, Sampler, Search, Size, TreeView, Verifier
from tsdiff.treesearch.questions import RunQuestions
from tsdiff.treesearch.requests import Gather, Request
from tsdiff.treesearch.schedule import Schedule
from tsdiff.treesearch.store import Store, Stored
from tsdiff.treesearch.tree import Tree, best_node

if TYPE_CHECKING:
    from torch import Tensor

    from tsdiff.treesearch.noise import Array


@dataclass
class Binding:
    """A model as one tree uses it: the samplers for its schedule, and the tree's condition as the model takes it."""

    name: str | None
    model: DiffusionModel
    encoded: Encoded | None = None
    samplers: dict[tuple[Any, ...], Sampler] = field(default_factory=dict)  # the engine's, shared by all runs

    def sampler(self, tree: Tree, solver: str | None = None) -> Sampler:
        """The sampler of the tree's own solver, or of an override of the same kind."""
        info = tree.solver if solver is None else self.model.solver(solver)
        if info.kind != tree.schedule.kind:
            raise UsageError(
                f"solver {info} cannot run on this tree's levels, which belong to {tree.solver}; solvers of one tree must be of one kind"
            )
        key = (id(self.model), tree.schedule.key, info)
        if key not in self.samplers:
            self.samplers[key] = self.model.sampler(tree.schedule, info)
        return self.samplers[key]


class Frontier:
    """How many live nodes stand at each level, with and without their prediction: enough to price a completion."""

    def __init__(self) -> None:
        self.counts: Counter[tuple[int, bool]] = Counter()

    def add(self, level: int, predicted: bool, count: int = 1) -> None:
        """Count nodes in (or, with a negative count, out)."""
        key = (level, predicted)
        self.counts[key] += count
        if not self.counts[key]:
            del self.counts[key]

    def cheapest(self, completion_cost: Sequence[int], extra: Sequence[tuple[int, bool]] = ()) -> int | None:
        """NFE of the cheapest full-grid completion among the live nodes and `extra` ones; None if there are none."""
        prices = [completion_cost[level] - predicted for level, predicted in (*self.counts, *extra)]
        return min((max(price, 0) for price in prices), default=None)


class Group:
    """A granted request whose reply is not complete yet.

    `waiting` counts the pieces of work still out. When it reaches 0 the group is complete, and `reply` builds what the
    policy receives. A `Gather` is a group whose pieces are groups.
    """

    def __init__(self, run: Run, request: Request, parent: Group | None = None) -> None:
        self.run = run
        self.request = request
        self.parent = parent
        self.waiting = 1  # released by `seal`, so that a group cannot complete while it is being filled
        self.nodes: list[Node] = []
        self.reply: Callable[[], Any] = lambda: None

    def add(self, pieces: int = 1) -> None:
        """Expect more pieces of work."""
        self.waiting += pieces

    def done(self) -> None:
        """One piece of work is complete."""
        self.waiting -= 1
        assert self.waiting >= 0, "a group was completed twice"
        if self.waiting == 0:
            if self.parent is not None:
                self.parent.done()
            else:
                self.run.complete(self)

    seal = done


@dataclass(frozen=True)
class Launch:
    """Where a later driver of a tree begins: what `Draw` gives it are re-noised copies of a node.

    Attributes:
      node: of an earlier driver.
      level: to re-noise it to; its own level stands for the node itself.
      facts: what the driver's record says, strict JSON.
      joint: its samples and those of earlier drivers are ranked together (a steering verifier of scope "set").
    """

    node: Node
    level: int
    facts: Mapping[str, Any]
    joint: bool = False


Tensors: TypeAlias = Mapping[str, "Tensor"] | Stored
NOTHING: Tensors = MappingProxyType({})


@dataclass(eq=False, slots=True)
class Effect:
    """One thing that the work of a group changed in its tree, as it is written down and repeated.

    Attributes:
      kind: "settled" (has its latent), "predicted" (has a model's raw output), "failed", "closed", "valued", "pictured"
        (decoded, and the best finished node so far) or "blamed" (a mistake that the caller can mend).
      node: which; None for "blamed".
      facts: by kind; strict JSON.
      tensors: what was kept.
    """

    kind: str
    node: Node | None
    facts: dict[str, Any]
    tensors: Tensors


@dataclass(eq=False)
class Draft:
    """A look-ahead leaf that one or more scorings of its parent wait for."""

    leaf: Node
    users: int = 0
    ready: bool = False
    waiting: list[Callable[[], None]] = field(default_factory=list)

    def arrived(self) -> None:
        """The leaf has its latent, or has failed."""
        self.ready = True
        for go_on in self.waiting:
            go_on()


class Run:
    """A tree and everything the engine keeps for it.

    Args:
      tree: the tree to grow.
      policy: called with the tree, gives the generator of requests.
      models: the main model under None, helper models by name.
      verifiers: the one that steers first; the others score finished samples, and what the policy asks them to.
      roles: which of them the policy means by the names of its roles.
      guidance: classifier-free guidance of every evaluation.
      name: for error messages ("policy beam").
      given: unit noise (float32, one latent's shape) for `Given` recipes.
      first: recipe of root 0, where it is not `Fresh(0)`.
      image: initial image (3, H, W) in [0, 1] that roots are noised versions of.
      keep: keep the latents of closed nodes (on disk) until the tree ends.
      launch: where the tree's driver begins, if it is not the first.
      on_end: called once when the tree has ended, before its latents are forgotten.
    """

    def __init__(
        self,
        tree: Tree,
        policy: Callable[[TreeView], Search],
        models: Mapping[str | None, DiffusionModel],
        verifiers: Sequence[Verifier],
        *,
        roles: Mapping[str, Verifier] | None = None,
        guidance: Guidance = Guidance(),  # noqa: B008 - frozen
        size: Size = None,
        name: str = "policy",
        given: Array | None = None,
        first: Recipe | None = None,
        image: Tensor | None = None,
        keep: bool = True,
        launch: Launch | None = None,
        on_end: Callable[[Run], None] | None = None,
    ) -> None:
        self.tree = tree
        self.policy = policy
        self.bindings = {key: Binding(key, model) for key, model in models.items()}
        self.verifiers = {verifier.name: verifier for verifier in verifiers}
        self.steering = verifiers[0]
        self.roles = dict(roles or {})
        self.guidance = guidance
        self.name = name
        self.given = given
        self.first = first
        self.image = image
        self.keep = keep
        self.launch = launch
        self.on_end = on_end
        self.first_node = len(tree.nodes)  # of this driver
        self.roots: list[Node] = tree.roots if launch is None else []  # what `Draw` gave
        self.shape = self.bindings[None].model.latent_shape(size)
        self.ancestor_levels = levels_of_ancestors(tree.schedule, verifiers)
        self.number = -1  # set by the engine on admission
        self.store: Store = None  # type: ignore[assignment]  # likewise
        self.generator: Search | None = None
        self.origin: Tensor | None = None
        self.completed: list[Group] = []
        self.group: Group | None = None
        self.finishing = False
        self.ended = False
        self.done = False  # all of it was written before, by an earlier process
        self.answer: Node | None = None
        # The best finished node so far and its pixels, as `video.held`; None for pixels that were decoded before an interruption.
        self.picture: tuple[Node, Tensor | None] | None = None
        self.error: BaseException | None = None
        self.mistake: TsdiffError | None = None
        self.truncated: str | None = None
        self.frontier = Frontier()
        self.completion_cost = [0] * (tree.schedule.last + 1)  # NFE from each level to the last on the full grid
        for level in reversed(range(tree.schedule.last)):
            self.completion_cost[level] = self.completion_cost[level + 1] + tree.schedule.step_cost(level + 1, tree.solver.stages)
        self.finished_leaf = False
        self.predicted: set[tuple[int, str | None]] = set()
        self.arrived: dict[int, bool] = {}
        self.history_level: dict[int, int] = {}  # of nodes that have a history
        self.open_roots: dict[int, int] = {}  # which root an open node is
        self.repeats: dict[tuple[Any, ...], Node] = {}
        self.memos_of: dict[int, list[tuple[Any, ...]]] = {}
        self.scoring: dict[tuple[int, str, int], list[Group]] = {}
        self.drafts: dict[tuple[Any, ...], Draft] = {}
        self.effects: list[Effect] | None = None  # of the group on its way, where somebody writes them down
        self.price = 0  # NFE of that group
        self.started_at = 0.0
        self.seconds = 0.0
        self.questions: RunQuestions | None = None  # to people; set by who records the run
        self.unrestored: dict[Node, str] = {}  # nodes of earlier drivers whose latent could not be computed again, and why

    # Nodes ------------------------------------------------------------------------------------------------------

    @property
    def nodes(self) -> Sequence[Node]:
        """The nodes of the tree's present driver."""
        return self.tree.nodes[self.first_node :] if self.first_node else self.tree.nodes

    @property
    def first_level(self) -> int:
        """The level that a new sample begins at."""
        return 0 if self.launch is None else self.launch.level

    def finished(self) -> list[Node]:
        """Finished samples that the answer is chosen among; a released one may still become it."""
        nodes = self.tree.nodes if self.launch is not None and self.launch.joint else self.nodes
        return [node for node in nodes if node.level == self.tree.schedule.last and not node.failed and not node.draft]

    def best(self) -> Node | None:
        """The finished sample with the highest score (ties: the oldest); None while there is none."""
        return best_node(self.finished(), self.tree.schedule.last, self.tree.verifier)

    def key(self, kind: str, *rest: Any) -> tuple[Any, ...]:
        """A key of the store that belongs to this run."""
        return (self.number, kind, *rest)

    def adopt(self, node: Node) -> None:
        """Count a new node as live (drafts are never an answer, so they never count)."""
        if not node.draft:
            self.frontier.add(node.level, False)

    def adopt_root(self, node: Node, noise: Tensor) -> None:
        """The same for the newest root, whose noise is kept at hand while it is open."""
        self.adopt(node)
        number = self.open_roots[node.index] = len(self.roots) - 1
        self.store.put(self.key("noise", number), {"noise": noise})

    def settle(self, node: Node, tensors: Tensors, *, arrived: bool, history_level: int = -1) -> None:
        """Give a node its latent and history."""
        self._log("settled", node, tensors, arrived=arrived, history=history_level, nfe=node.nfe)
        self.store.put(self.key("node", node.index), tensors)
        self.arrived[node.index] = arrived
        if history_level >= 0:
            self.history_level[node.index] = history_level
        if node.level == self.tree.schedule.last and not node.draft and node.driver == self.tree.driver:
            self.finished_leaf = True

    def has_prediction(self, node: Node, model: str | None) -> bool:
        """Whether the raw output of a model at a node is there (or was and is only spilled)."""
        return (node.index, model) in self.predicted

    def predict_done(self, node: Node, model: str | None, tensors: Tensors) -> None:
        """Keep the raw outputs of a node."""
        self._log("predicted", node, tensors, model=model, nfe=node.nfe)
        self.store.put(self.key("prediction", node.index, model), tensors)
        self.predicted.add((node.index, model))
        if model is None and not node.draft and node.status == "open":
            self.frontier.add(node.level, False, -1)
            self.frontier.add(node.level, True)

    def fail(self, node: Node, reason: str) -> None:
        """Mark a node as failed; its latent is forgotten. A node of an earlier driver, which is only computed again, stays as it is."""
        if node.status == "failed":
            return
        if node.driver != self.tree.driver:
            self.unrestored.setdefault(node, reason)
            return
        self._log("failed", node, reason=reason, nfe=node.nfe)
        self._leave(node)
        self.tree.give_up(node, reason)
        self._forget(node, keep=False)

    def close(self, node: Node) -> None:
        """The node will not be grown any more."""
        if node.status != "open":
            return
        self._log("closed", node)
        self._leave(node)
        node.status = "closed"
        # A finished sample may still become the answer.
        finished = node.level == self.tree.schedule.last
        self._forget(node, keep=(self.keep or finished) and not node.draft)
        # Nothing will be asked of it any more: what is kept for every node must be little.
        self.arrived.pop(node.index, None)
        self.history_level.pop(node.index, None)
        self.tree.children.pop(node.index, None)
        if node.index in self.open_roots:
            self.store.drop(self.key("noise", self.open_roots.pop(node.index)))

    def value(self, node: Node, key: str, value: Value) -> None:
        """Give a node a verifier's value."""
        self._log("valued", node, key=key, value=value.to_json())
        self.tree.give_value(node, key, value)

    def close_all(self) -> None:
        """The tree has ended: no node will be grown any more. Latents stay until `dissolve`."""
        for node in self.tree.nodes:
            if node.status == "open":
                node.status = "closed"

    def dissolve(self) -> None:
        """Forget all latents, predictions and noises."""
        for node in self.tree.nodes:
            self.store.drop(self.key("node", node.index))
            for name in self.bindings:
                self.store.drop(self.key("prediction", node.index, name))
        for index in range(len(self.roots)):
            self.store.drop(self.key("noise", index))

    def _leave(self, node: Node) -> None:
        if node.status == "open" and not node.draft:
            self.frontier.add(node.level, self.has_prediction(node, None), -1)

    def _forget(self, node: Node, *, keep: bool) -> None:
        for name in self.bindings:
            self.store.drop(self.key("prediction", node.index, name))
            self.predicted.discard((node.index, name))
        key = self.key("node", node.index)
        if keep:
            self.store.spill(key)
        else:
            self.store.drop(key)
        for memo in self.memos_of.pop(node.index, ()):
            del self.repeats[memo]

    def remember(self, memo: tuple[Any, ...], node: Node) -> None:
        """Asking for `memo` again gives this node, until it is released or fails."""
        self.repeats[memo] = node
        self.memos_of.setdefault(node.index, []).append(memo)

    def blame(self, error: Exception) -> None:
        """Remember the first mistake that the caller can mend: it explains a search without an answer best."""
        if self.mistake is None and isinstance(error, TsdiffError):
            self._log("blamed", None, error=type(error).__name__, why=str(error))
            self.mistake = error

    def owns(self, node: Node) -> bool:
        """Whether the node is one of this tree."""
        return node.index < len(self.tree.nodes) and self.tree.nodes[node.index] is node

    def require_open(self, node: Node, request: Request) -> None:
        """Raise a UsageError unless the node is one of this tree that may still be used."""
        if not self.owns(node):
            raise UsageError(f"{type(request).__name__}: {node!r} belongs to another tree")
        if node.status == "closed" and not (self.launch is not None and node is self.launch.node):
            raise UsageError(f"{type(request).__name__}: node {node.index} was released; release a node only when it is not needed any more")

    def require_answer(self, answer: object) -> Node:
        """The answer that a policy returned. Raises a UsageError unless it is a finished node of this tree."""
        last = self.tree.schedule.last
        if isinstance(answer, Node) and self.owns(answer) and answer.level == last and not answer.draft and not answer.failed:
            return answer
        raise UsageError(f"{self.name} returned {answer!r}; return a finished node of its tree (level {last}), normally tree.best()")

    def keep_picture(self, node: Node, pixels: Tensor | None) -> None:
        """Keep the pixels (as `video.held`) of the best finished node so far, so that the answer is not decoded again."""
        score = node.score(self.tree.verifier)
        if score is None or node.draft:
            return
        best = self.picture[0] if self.picture is not None else None
        held = best.score(self.tree.verifier) if best is not None else None
        if best is None or held is None or (score, -node.index) > (held, -best.index):
            self._log("pictured", node)
            self.picture = (node, None if pixels is None else pixels.cpu())

    def repeat(self, effect: Effect) -> None:
        """Do again what was written down."""
        node, facts = effect.node, effect.facts
        if node is None:
            known: dict[str, type[TsdiffError]] = {kind.__name__: kind for kind in (UsageError, SetupError)}
            self.blame(known.get(facts["error"], TsdiffError)(facts["why"]))
            return
        if "nfe" in facts:
            node.nfe = facts["nfe"]
        if effect.kind == "settled":
            self.settle(node, effect.tensors, arrived=facts["arrived"], history_level=facts["history"])
        elif effect.kind == "predicted":
            self.predict_done(node, facts["model"], effect.tensors)
        elif effect.kind == "failed":
            self.fail(node, facts["reason"])
        elif effect.kind == "closed":
            self.close(node)
        elif effect.kind == "valued":
            self.value(node, facts["key"], Value(**facts["value"]))
        else:
            assert effect.kind == "pictured", effect.kind
            self.keep_picture(node, None)

    def _log(self, kind: str, node: Node | None, tensors: Tensors | None = None, **facts: Any) -> None:
        if self.effects is not None:
            self.effects.append(Effect(kind, node, facts, NOTHING if tensors is None else tensors))

    # Noise ------------------------------------------------------------------------------------------------------

    def require_noise(self, recipe: Recipe, request: Request) -> None:
        """Raise a UsageError unless the noise of a recipe can be made."""
        kind = type(request).__name__
        for index in roots_of(recipe):
            if not 0 <= index < len(self.roots):
                raise UsageError(f"{kind}: root {index} of {recipe} does not exist; this tree has {len(self.roots)} roots, counted from 0")
        fresh = recipe.fresh[0] if isinstance(recipe, Mix) and recipe.fresh is not None else getattr(recipe, "index", 0)
        if fresh < 0:
            raise UsageError(f"{kind}: noise number {fresh} of {recipe} does not exist; noises count from 0")
        if isinstance(recipe, Given) and (self.given is None or recipe != self.first):
            raise UsageError(f"{kind}: {recipe} is not the noise that this search was given; pass it as latents=")

    def realize(self, recipe: Recipe) -> Array:
        """The noise of a recipe.

        A later driver's recipes count its own first nodes, and a stream of its own takes the place of the seed.
        """
        seed = self.tree.seed if self.launch is None else self.tree.stream(self.launch.node)
        roots = {index: self._noise_of_root(index) for index in roots_of(recipe)}
        return realize(recipe, seed=seed, shape=self.shape, roots=roots, given=self.given)

    def _noise_of_root(self, number: int) -> Array:
        """The noise of a root; that of a closed one is made again, and kept from then on."""
        import torch

        key = self.key("noise", number)
        if key in self.store:
            kept: Array = self.store.get(key)["noise"].cpu().numpy()
            return kept
        noise = self.realize(self.roots[number].move.noise or Fresh(number))
        self.store.put(key, {"noise": torch.from_numpy(noise)})
        return noise

    # Groups -----------------------------------------------------------------------------------------------------

    def complete(self, group: Group) -> None:
        """A group's reply is complete (its policy is resumed at the next turn)."""
        self.completed.append(group)


def levels_of_ancestors(schedule: Schedule, verifiers: Sequence[Verifier]) -> dict[str, int]:
    """The levels of the clean estimates that verifiers want of ancestors, by their names in the store."""
    return {
        f"ancestor_x0@{ratio}": schedule.level_at(-2.0 * math.log(float(ratio)) - 1e-9)  # a level's own ratio names it
        for verifier in verifiers
        for need in verifier.needs
        for kind, _, ratio in (need.partition("@"),)
        if kind in ("ancestor_x0", "ancestor_images")
    }


def flatten(request: Request) -> list[Request]:
    """The requests that a request is made of, in order."""
    if isinstance(request, Gather):
        return [part for inner in request.requests for part in flatten(inner)]
    return [request]
