"""Plain samples for verifiers that compare with them: made and scored before a search, then kept in the user's cache.

The samples are those of the search's own model, schedule, guidance and prompts, under a seed of their own. They are
trees of their own, on a ledger of their own, and never part of a search's budget. A cached table belongs to the content
of everything it follows from: the model's fingerprint, the schedule, the prompts, the verifiers' options and weights.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tsdiff.treesearch.cache import cached_path, read_cached, write_cached
from tsdiff.treesearch.engine import Engine
from tsdiff.treesearch.errors import SearchFailed
from tsdiff.treesearch.ledger import EngineLedger, TreeLedger
from tsdiff.treesearch.pools import KIND, name_of, pools
from tsdiff.treesearch.protocols import (
    Candidates,
    Condition,
    DiffusionModel,
    Need,
    Pool,
    Scores,
    Search,
    TreeView,
    Verifier,
)
from tsdiff.treesearch.requests import Denoise, Draw, Release, Score
from tsdiff.treesearch.run import Run
from tsdiff.treesearch.store import Store
from tsdiff.treesearch.tree import Tree

if TYPE_CHECKING:
    from torch import Tensor

    from tsdiff.treesearch.plan import Plan

SEED = int.from_bytes(b"plain", "big")
"""Of the plain samples' noise: theirs alone, so that a table does not depend on a search's seeds."""


@dataclass(frozen=True)
class Calibrated:
    """How a verifier came to know the scores of plain samples.

    Attributes:
      verifier: its name.
      samples, levels: the pool's.
      made: whether the samples were made now; otherwise their scores were in the cache.
      path: the file in the cache; None where nothing was kept.
      reason: why nothing was kept.
      ledger: what making them spent, then or now.
      engine: what the engine did for it now, beside; None where nothing was made.
    """

    verifier: str
    samples: int
    levels: tuple[int, ...]
    made: bool
    path: Path | None
    reason: str | None
    ledger: TreeLedger
    engine: EngineLedger | None = None

    def to_json(self) -> dict[str, Any]:
        """Strict JSON."""
        return {
            "verifier": self.verifier,
            "samples": self.samples,
            "levels": list(self.levels),
            "made": self.made,
            "path": None if self.path is None else str(self.path),
            "reason": self.reason,
            "ledger": self.ledger.to_json(),
            "engine": None if self.engine is None else self.engine.to_json(),
        }


def calibrate(plan: Plan, model: DiffusionModel, image: Tensor | None, watch: Callable[[Tree], None], progress: Callable[[], None]) -> tuple[Calibrated, ...]:
    """Give every verifier of a plan the plain samples' scores that it needs, from the cache or made now.

    Args:
      plan: the search; its verifiers' weights are loaded.
      model: its model, loaded.
      image: the initial image (3, H, W) in [0, 1], if there is one.
      watch: called with every tree that is going to grow.
      progress: called after every batch.

    Raises:
      SearchFailed, UsageError: if too few samples can be made or scored.
    """
    done = []
    for verifier, pool in pools(plan.verifiers):
        entry, path, reason, engine = None, None, None, None
        try:
            key = _key(plan, model, pool)
        except _NoKeyError as unknown:
            reason = str(unknown)
        else:
            entry = read_cached(KIND, key)
        made = entry is None
        if entry is None:
            entry, engine = _make(plan, model, image, name_of(verifier), pool, watch, progress)
        verifier.calibrate(plan.schedule, {name: {int(level): column for level, column in columns.items()} for name, columns in entry["scores"].items()})
        if reason is None:
            path = cached_path(KIND, key)
            if made:  # only once the verifier has found it good enough
                try:
                    write_cached(KIND, key, entry)
                except OSError as error:
                    path, reason = None, f"{path} cannot be written ({error.strerror})"
        spent = TreeLedger(**entry["ledger"] | {"verifier_calls": Counter(entry["ledger"]["verifier_calls"])})
        done.append(Calibrated(name_of(verifier), pool.samples, pool.at(plan.schedule.last), made, path, reason, spent, engine))
    return tuple(done)


# Making --------------------------------------------------------------------------------------------------------------


class Chorus:
    """Several verifiers that score side by side: each one's score is a part by its name, the score itself is 0."""

    scope: Literal["row", "set"] = "row"
    latency: Literal["immediate", "pending"] = "immediate"
    judges: Literal["any", "final"] = "any"
    differentiable = False

    def __init__(self, name: str, verifiers: Sequence[Verifier]) -> None:
        self.name = name
        self.verifiers = verifiers
        self.needs: frozenset[Need] = frozenset().union(*(verifier.needs for verifier in verifiers))

    def prepare(self, device: str) -> None:
        """The verifiers are ready."""

    def check(self, condition: Condition) -> None:
        """The verifiers have been asked."""

    def score(self, candidates: Candidates) -> Scores:
        """One part for each verifier."""
        return Scores([0.0] * len(candidates), {verifier.name: verifier.score(candidates).values for verifier in self.verifiers})


@dataclass(frozen=True)
class PlainSamples:
    """Draws samples, and scores their clean estimates on the way."""

    count: int
    levels: tuple[int, ...]

    def search(self, tree: TreeView) -> Search:
        """Every sample through every level; nothing is chosen."""
        nodes = yield Draw(self.count)
        for level in self.levels:
            if level > 0:
                grown = yield Denoise(nodes, to=level)
                yield Release(nodes)
                nodes = grown
            yield Score(nodes)
        return tree.best()


def _make(
    plan: Plan, model: DiffusionModel, image: Tensor | None, name: str, pool: Pool, watch: Callable[[Tree], None], progress: Callable[[], None]
) -> tuple[dict[str, Any], EngineLedger]:
    """The pool's scores and what they cost, as strict JSON, and what the engine did."""
    chorus = Chorus(name, pool.verifiers)
    store = Store(model.device, host_limit=plan.limits.host_bytes, device_limit=plan.limits.device_bytes)
    engine = Engine(dataclasses.replace(plan.limits, seconds=None), store, expected_rows=pool.samples * plan.schedule.last, progress=progress)
    runs = []
    for condition, count in _shares(plan.conditions, pool.samples):
        tree = Tree(plan.schedule, plan.solver, condition, seed=SEED, verifier=name, line=KIND)
        search = PlainSamples(count, pool.at(plan.schedule.last)).search
        runs.append(Run(tree, search, {None: model}, [chorus], guidance=plan.guidance, size=plan.size, name=f"the calibration of {name}", image=image, keep=False))
        watch(tree)
        engine.add(runs[-1])
    try:
        engine.run()
    finally:
        store.close()
    for run in runs:
        if run.error is not None:
            raise SearchFailed(f"{run.name} failed: {run.error}") from run.error
    nodes = [node for run in runs for node in run.tree.nodes]
    finished = [node.values.get(name) for node in nodes if node.level == plan.schedule.last]
    if not any(value and value.parts for value in finished):
        reasons = dict.fromkeys(value.reason for value in finished if value and value.reason)
        raise SearchFailed(f"the calibration of {name} failed: no finished plain sample could be scored ({next(iter(reasons), 'none has a finite score')})")
    scores: dict[str, dict[str, list[float]]] = {verifier.name: {} for verifier in pool.verifiers}
    for node in nodes:
        value = node.values.get(name)
        for part, score in ((value.parts if value else None) or {}).items():
            scores[part].setdefault(str(node.level), []).append(score)
    ledgers = [run.tree.ledger for run in runs]
    ledger = TreeLedger(*(sum(getattr(one, count) for one in ledgers) for count in ("nfe", "rows", "encodes", "decodes")))
    for one in ledgers:
        ledger.verifier_calls += one.verifier_calls
    return {"scores": scores, "ledger": ledger.to_json()}, engine.ledger


def _shares(conditions: Sequence[Condition], samples: int) -> Iterator[tuple[Condition, int]]:
    """The prompts and how many samples each has; with fewer samples than prompts, prompts evenly spread."""
    if samples <= len(conditions):
        yield from ((conditions[i * len(conditions) // samples], 1) for i in range(samples))
        return
    each, more = divmod(samples, len(conditions))
    yield from ((condition, each + (i < more)) for i, condition in enumerate(conditions))


# What a table follows from -------------------------------------------------------------------------------------------


class _NoKeyError(Exception):
    """Something has no content that could be hashed."""


def _key(plan: Plan, model: DiffusionModel, pool: Pool) -> dict[str, Any]:
    """Everything that a pool's scores follow from, as strict JSON. Raises _NoKeyError for what cannot be told by its content."""
    limits = plan.limits
    return {
        "tsdiff": version("tsdiff"),
        "model": model.fingerprint,
        "schedule": plan.schedule.key,
        "solver": str(plan.solver),
        "guidance": [plan.guidance.scale, plan.guidance.rescale, None if plan.guidance.interval is None else list(plan.guidance.interval)],
        "size": None if plan.size is None else list(plan.size),
        "image": None if plan.image is None else hashlib.sha256(plan.image.tobytes()).hexdigest(),
        "conditions": [_condition(condition) for condition in plan.conditions],
        "verifiers": [_verifier(verifier) for verifier in pool.verifiers],
        "samples": pool.samples,
        "levels": list(pool.at(plan.schedule.last)),
        "rows": [limits.network, limits.decode, limits.verify] if limits.deterministic else None,  # bytes depend on them
    }


def _condition(condition: Condition) -> dict[str, Any]:
    own = {name: getattr(condition, name) for name in ("prompt", "negative_prompt", "class_label")}
    tensors = {name: _content(f"the tensor {name}", tensor) for name, tensor in condition.tensors.items()}
    extra = {name: _content(f"the option {name}", value) for name, value in condition.extra.items()}
    return own | {"tensors": tensors, "extra": extra, "metadata": _content("the metadata", condition.metadata)}


def _verifier(verifier: Verifier) -> dict[str, Any]:
    """Class, options and weights."""
    if not dataclasses.is_dataclass(verifier):
        raise _NoKeyError(f"verifier {name_of(verifier)} is no dataclass, so that its content is unknown")
    cls = type(verifier)
    options = {item.name: _content(f"{item.name} of verifier {name_of(verifier)}", getattr(verifier, item.name)) for item in dataclasses.fields(verifier) if item.compare}
    return {"class": f"{cls.__module__}.{cls.__qualname__}", "options": options, "sha256": getattr(verifier, "sha256", None)}


def _content(what: str, value: Any) -> Any:
    """A value as strict JSON: by its content, where it is a tensor or a verifier."""
    if isinstance(value, (bool, int, float, str, type(None))):
        return value
    if isinstance(value, (list, tuple)):
        return [_content(what, item) for item in value]
    if isinstance(value, (set, frozenset)):
        return sorted(_content(what, item) for item in value)
    if isinstance(value, Mapping):
        return {str(name): _content(what, item) for name, item in value.items()}
    if hasattr(value, "detach"):
        array = value.detach().float().cpu().contiguous().numpy()
        return {"shape": list(array.shape), "sha256": hashlib.sha256(array.tobytes()).hexdigest()}
    if hasattr(value, "score") and hasattr(value, "needs"):
        return _verifier(value)
    raise _NoKeyError(f"{what} is a {type(value).__name__}, whose content is unknown")
