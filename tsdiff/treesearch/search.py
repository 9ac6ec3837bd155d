"""Searching: from a plan to results. `tsdiff.search` is the whole Python interface in one function."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from numbers import Integral
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tsdiff.treesearch.basepool import Calibrated, calibrate
from tsdiff.treesearch.disk import LOCAL, Disk
from tsdiff.treesearch.durable import RunFolders
from tsdiff.treesearch.engine import Engine
from tsdiff.treesearch.errors import UsageError
from tsdiff.treesearch.forest import Forest
from tsdiff.treesearch.inbox import Inbox
from tsdiff.treesearch.loading import first_noise, load_models, pixels, settings
from tsdiff.treesearch.lock import Lock
from tsdiff.treesearch.node import Node
from tsdiff.treesearch.plan import Plan, prepare
from tsdiff.treesearch.pools import KIND
from tsdiff.treesearch.previews import PreviewWriter
from tsdiff.treesearch.protocols import Allocator, Condition, DiffusionModel, Policy, Search, TreeView
from tsdiff.treesearch.recorder import FileRecorder
from tsdiff.treesearch.records import UNREPEATABLE
from tsdiff.treesearch.requests import Denoise, Draw, Score
from tsdiff.treesearch.resolve import Verifiers
from tsdiff.treesearch.results import Failure, Result, Results, shown
from tsdiff.treesearch.run import Run
from tsdiff.treesearch.runfile import SYNC_SECONDS
from tsdiff.treesearch.runfolder import LOCK, claim_folder, environment, lock_path, write_latents
from tsdiff.treesearch.store import Store, remove_scratch
from tsdiff.treesearch.tree import Tree

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Plan", "Progress", "execute", "prepare", "search"]


@dataclass(frozen=True)
class Progress:
    """Where a search stands, for a callback.

    Attributes:
      nfe, nfe_total: network evaluations done and expected at most, baselines included.
      runs_done, runs_total: searches.
      best_score: the highest score of any finished answer so far.
    """

    nfe: int
    nfe_total: int
    runs_done: int
    runs_total: int
    best_score: float | None


def search(
    model: Any = None,
    prompts: str | Condition | Sequence[str | Condition] | None = None,
    *,
    policy: str | Policy | Allocator = "beam",
    verifier: Verifiers = (),
    ensemble: str | None = None,
    nfe: int | None = None,
    total_nfe: int | None = None,
    target: float | None = None,
    seed: int | Sequence[int] = 0,
    callback: Callable[[Progress], None] | None = None,
    **options: Any,
) -> Result | Results:
    """Search for the samples that a verifier likes best.

    Args:
      model: a registered name ("gaussian"), the folder or hub id of a diffusers pipeline, or a pipeline object (never
        changed). None takes the embedded default.
      prompts: one prompt, or several; None searches the model's demonstration prompt.
      policy: a registered name, or a policy object. `policy_options={"width": 8}` sets parameters of a named one.
      verifier: a name, an object, a callable `(images (B, 3, H, W) in [0, 1], prompts) -> scores`, or several of
        these: the first steers, the others score finished samples. A policy may tell its verifiers apart by their
        roles: `{"layout": "luminance", "final": "sharpness"}`, where "final" steers.
      ensemble: makes one verifier of those without a role, by a rule: "rank", "pareto", "weighted", "zscore", "minimum"
        or "quantile", parameters after a colon ("weighted:weights=5,1"); `tsdiff.verifiers.Ensemble` explains them.
      nfe: network evaluations per prompt and seed. A named policy whose size is left open fills it; otherwise it caps.
      total_nfe: network evaluations of all prompts and seeds together, instead of `nfe`. An allocator ("adaptive") shares
        them out; with any other policy each search has an equal part.
      target: a score that is good enough, for allocators: a search that has reached it gets nothing more.
      seed: one seed, or several: each prompt is searched under each.
      callback: called with a `Progress` after every batch.
      **options: `steps`, `solver`, `eta`, `guidance_scale`, `true_cfg_scale`, `guidance_rescale`, `guidance_interval`,
        `negative_prompt`, `class_label`, `prompt_embeds` ((tokens, width)), `pooled_prompt_embeds`
        ((width,)), `prompt_attention_mask` ((tokens,)) and each with `negative_` in front, as the model family takes them,
        `condition_extra` (of the model family, e.g. `{"clip_skip": 1}`), `height`, `width`, `frames` and `fps` (of a
        video), `init_image`, `strength`,
        `latents` (unit noise of root 0), `initial_noise="torch"` (root 0 is what
        `pipe(generator=torch.Generator().manual_seed(seed))` draws), `helpers` (other models by name), `seconds`,
        `baseline`, `deterministic`, `max_batch`, `memory_limit` (bytes), `device`, `dtype`, `offline`, `revision`,
        `variant`, `strict_scheduler`, `lora` (files "PATH" or "PATH:SCALE" that are merged into the weights), `latent_dtype` ("model" rounds latents
        as pipelines in half precision do), `offload` (only the components at work are on the device), `vae_slicing`, `vae_tiling`,
        `channels_last`, `compile` (the network's repeated blocks), `x0_decoder` (folder of a tiny autoencoder, by which clean
        estimates of unfinished nodes are decoded for verifiers), `out` (folder to write run folders into, where `tsdiff.resume` continues them), `keep`
        (whose latents are kept there of nodes that were released: "all", "path", "leaves" or "none"), `previews` (of
        which nodes that were decoded for a verifier small pictures are kept there: "kept" for those that `keep` names,
        "all" or "none"), `metadata` (False writes images without their history).

    Returns:
      A `Result` for one prompt and one seed, `Results` for several.

    Raises:
      UsageError: for whatever cannot be done as asked, before any weights load.
      SearchFailed: if a single search ends without a sample.
    """
    known = prepare.__kwdefaults__ or {}
    for name in options:
        if name not in known or name == "verifiers":
            from tsdiff.treesearch.errors import unknown_name

            raise unknown_name("option", name, set(known) - {"verifiers"} | {"verifier", "callback"})
    plan = prepare(model, prompts, policy=policy, verifiers=verifier, ensemble=ensemble, nfe=nfe, total_nfe=total_nfe, target=target, seed=seed, **options)
    results = execute(plan, callback=callback)
    several = isinstance(prompts, (list, tuple)) or not isinstance(seed, Integral)
    if several:
        return results
    if results.failures:
        raise results.failures[0].error
    (result,) = results
    return result


def execute(
    plan: Plan,
    *,
    callback: Callable[[Progress], None] | None = None,
    stop: Callable[[], bool] = lambda: False,
    begun: Callable[[Path], None] = lambda folder: None,
    into: Path | None = None,
    disk: Disk = LOCAL,
    sync_seconds: float = SYNC_SECONDS,
) -> Results:
    """Load the weights and carry out a plan.

    A search that fails does not stop the others; it is listed in `Results.failures`. With `plan.out`, everything is written
    down as it happens, so that `tsdiff.resume` can go on after an interruption.

    Args:
      callback: called with a `Progress` after every batch.
      stop: asked before every batch whether to stop; so is the run's inbox (`tsdiff.treesearch.inbox`).
      begun: called with the search's folder as soon as it can be continued.
      into: the folder of this plan's search, begun before, which is locked by the caller: what it holds is not done again.
      disk: through which the run's files are changed.
      sync_seconds: how long what happened may wait before it would survive a power cut; it survives the process at once.

    Raises:
      KeyboardInterrupt: if it was told to stop.
    """
    started = time.perf_counter()
    outer_is_new = plan.out is not None and not plan.out.exists()  # whether the folder around the run's is new, too
    folder = into if into is not None or plan.out is None else claim_folder(plan.out)
    forest = None
    if isinstance(plan.policy, Allocator):
        assert plan.total_nfe is not None
        forest = Forest(plan.policy, plan.setting, plan.total_nfe, plan.target)
    collector = _Collector(plan)

    def progress() -> None:
        if callback is not None:
            callback(collector.progress())

    with ExitStack() as stack:
        try:
            models = load_models(plan)
            model = models[None]
            if into is not None:
                remove_scratch(into)
            store = Store(model.device, host_limit=plan.limits.host_bytes, device_limit=plan.limits.device_bytes, folder=folder)
            stack.callback(store.close)
            stack.enter_context(settings(plan.limits.deterministic))
            collector.calibrated = calibrate(plan, model, None if plan.image is None else pixels(plan.image), collector.trees.append, progress)
        except BaseException:
            stack.close()  # with what was spilled into the folder
            if folder is not None and into is None:
                folder.rmdir()  # nothing has been written into it yet
                if outer_is_new:
                    with suppress(OSError):  # another search has begun in it
                        folder.parent.rmdir()
            raise
        recorder: FileRecorder | None = None
        asked: tuple[Callable[[], bool], ...] = (stop,)  # all of them, before every batch
        previews = PreviewWriter(plan.previews, plan.keep_latents)
        if folder is not None:
            if into is None:
                stack.enter_context(Lock(folder / LOCK, disk=disk))
            folders = collector.folders = RunFolders(plan, folder, model.fingerprint, disk=disk)
            folders.begin_all()
            begun(folder)
            inbox = Inbox(lock_path(folder).parent, disk=disk)
            stack.callback(inbox.close)
            asked = inbox.look, stop

            def begin(run: Run) -> Path:
                path = folders.begin(run)
                run.questions = inbox.questions(path)
                return path

            recorder = FileRecorder(begin, folders.about, folders.opened, disk=disk, sync_seconds=sync_seconds, previews=previews)
            stack.callback(recorder.close)
            stack.callback(previews.close)
        engine = Engine(plan.limits, store, recorder=recorder, expected_rows=plan.rows_upper, progress=progress, stop=lambda: any(ask() for ask in asked))
        if recorder is not None:
            recorder.ledger = engine.ledger
        for pair in _runs(plan, models, collector, forest):
            for run in pair:
                collector.trees.append(run.tree)
                engine.add(run)
        try:
            engine.run()
        except KeyboardInterrupt:
            if collector.folders is not None:
                collector.folders.interrupt()
            raise
        if recorder is not None:
            _count_lost(engine, collector.trees)
        results, failures = collector.finish()
        previews.close()
        damaged = () if recorder is None else recorder.notices
        notices = (*damaged, *(line for line in model.notices if line not in plan.notices), *filter(None, [previews.notice]))
        done = Results(results, engine.ledger, failures, folder, time.perf_counter() - started, notices, forest, collector.calibrated)
        if collector.folders is not None:
            collector.folders.finish_all(_index(done))
    return done


def _count_lost(engine: Engine, trees: Sequence[Tree]) -> None:
    """Rows that no tree knows of were computed before an interruption, and again after it."""
    lost = engine.ledger.rows - sum(tree.ledger.rows for tree in trees if tree.line != KIND)
    engine.ledger.lost += lost
    engine.ledger.rows -= lost


def plain_sample(tree: TreeView) -> Search:
    """The baseline: the first noise, denoised without any search."""
    roots = yield Draw()
    leaves = yield Denoise(roots, to=tree.schedule.last)
    yield Score(leaves)
    return tree.best()


def _runs(plan: Plan, models: Mapping[str | None, DiffusionModel], collector: _Collector, forest: Forest | None) -> Iterator[tuple[Run, ...]]:
    """The search trees, each with its baseline beside it."""

    def ended(run: Run) -> None:
        if forest is not None:
            forest.ended(run)
        collector.ended(run)

    drive: Callable[..., Search]
    if isinstance(plan.policy, Allocator):
        assert forest is not None
        drive = forest.drive
    else:
        drive = plan.policy.search
    image = None if plan.image is None else pixels(plan.image)
    given = None if plan.given is None else plan.given.numpy()
    for c, condition in enumerate(plan.conditions):
        for s, seed in enumerate(plan.seeds):
            lines = [("search", drive, plan.nfe)]
            if plan.baseline_cost is not None:
                lines.append(("baseline", plain_sample, None))
            pair = []
            for line, policy, nfe in lines:
                tree = Tree(plan.schedule, plan.solver, condition, seed=seed, verifier=plan.verifiers[0].name, nfe=nfe, line=line)
                run = Run(
                    tree,
                    policy,
                    models,
                    plan.verifiers,
                    roles=plan.roles,
                    guidance=plan.guidance,
                    size=plan.size,
                    name=f"policy {plan.policy.name}" if line == "search" else "the baseline",
                    given=given,
                    first=first_noise(plan.first, seed),
                    image=image,
                    keep=plan.out is not None and plan.keep_latents in ("all", "path") and line == "search",
                    on_end=ended if line == "search" else collector.ended,
                )
                if forest is not None and line == "search":
                    forest.add(run)
                collector.assign(run, (c, s))
                pair.append(run)
            yield tuple(pair)


class _Collector:
    """Gathers what trees leave behind as they end, and writes run folders."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.folders: RunFolders | None = None
        self.trees: list[Tree] = []
        self.place: dict[int, tuple[int, int]] = {}
        self.parts: dict[tuple[int, int], dict[str, Run]] = {}
        self.results: dict[tuple[int, int], Result] = {}
        self.failures: dict[tuple[int, int], Failure] = {}
        self.latents: dict[tuple[int, int], dict[int, Tensor]] = {}
        self.best: float | None = None
        self.environment = environment()
        self.calibrated: tuple[Calibrated, ...] = ()

    def assign(self, run: Run, place: tuple[int, int]) -> None:
        """Say which prompt and seed a run belongs to."""
        self.place[id(run)] = place
        if self.folders is not None:
            self.folders.places[id(run)] = place

    def ended(self, run: Run) -> None:
        """A tree has ended, its latents are still there."""
        place = self.place.pop(id(run))
        parts = self.parts.setdefault(place, {})
        parts[run.tree.line] = run
        if run.tree.line == "search" and run.answer is not None and not run.done:
            if self.folders is not None:
                kept = [node.index for node in _kept(self.plan, run) if run.key("node", node.index) in run.store]
                path = self.folders.path(place) / "latents.safetensors"
                write_latents(path, (f"node/{i}" for i in kept), lambda name: run.store.read(run.key("node", int(name[5:])))["latent"], alike=True, disk=self.folders.disk)
            else:
                self.latents[place] = {node.index: run.store.get(run.key("node", node.index))["latent"].cpu() for node in run.answer.path() if run.key("node", node.index) in run.store}
        if len(parts) == (1 if self.plan.baseline_cost is None else 2):
            self._assemble(place, self.parts.pop(place))  # whole runs do not outlive their end

    def _assemble(self, place: tuple[int, int], parts: Mapping[str, Run]) -> None:
        searched, plain = parts["search"], parts.get("baseline")
        condition, seed = searched.tree.condition, searched.tree.seed
        for run in parts.values():
            if isinstance(run.error, UNREPEATABLE):  # its files stay as they are
                self.failures[place] = Failure(condition.label, seed, run.error)
                return
        if searched.answer is None:
            error = searched.error or UsageError(f"{searched.name} ended without an answer")
            self.failures[place] = Failure(condition.label, seed, error)
            if self.folders is not None:
                self.folders.finish(place, self.failures[place])
            return
        baseline = None if plain is None or plain.answer is None else self._result(plain)
        result = self._result(searched, baseline)
        result.latents = self.latents.pop(place, {})
        result.options = self.plan.to_json() | {"typed": dict(self.plan.typed), "environment": self.environment}
        if self.folders is not None:
            if searched.done:
                self.folders.found(place, result)
            else:
                self.folders.finish(place, result)
        self.results[place] = result
        if result.score is not None and (self.best is None or result.score > self.best):
            self.best = result.score

    def _result(self, run: Run, baseline: Result | None = None) -> Result:
        assert run.answer is not None
        pixels = run.picture[1] if run.picture is not None and run.picture[0] is run.answer else None
        image, video = shown(pixels, self.plan.model, run.tree.condition)
        relative = run.steering.scope == "set"
        names = self.plan.policy.name, self.plan.model.name
        return Result(run.tree, run.answer, image, run.seconds, *names, baseline, video=video, truncated=run.truncated, relative=relative, calibrated=self.calibrated)

    def finish(self) -> tuple[list[Result], list[Failure]]:
        """Everything, prompt-major."""
        return [self.results[place] for place in sorted(self.results)], [self.failures[place] for place in sorted(self.failures)]

    def progress(self) -> Progress:
        """Where the search stands."""
        done = sum(tree.ledger.nfe for tree in self.trees)
        first = sum(tree.budget.spent for tree in self.trees if tree.line == KIND)
        return Progress(done, max(first + self.plan.nfe_upper, done), len(self.results) + len(self.failures), self.plan.num_runs, self.best)


def _kept(plan: Plan, run: Run) -> Sequence[Node]:
    """The nodes whose latents stay when a run is done."""
    assert run.answer is not None
    if plan.keep_latents == "path":
        return run.answer.path()
    if plan.keep_latents == "leaves":
        return [node for node in run.tree.nodes if node.level == run.tree.schedule.last and not node.draft]
    return run.tree.nodes if plan.keep_latents == "all" else []


def _index(done: Results) -> dict[str, Any]:
    """What a folder of several runs says of them."""
    return {
        "status": "done" if not done.failures else "incomplete",
        "engine": done.engine.to_json(),
        "calibrated": [one.to_json() for one in done.calibrated],
        "forest": None if done.forest is None else done.forest.to_json(),
        "seconds": round(done.seconds, 3),
        "runs": [result.to_json() for result in done],
        "failures": [{"prompt": failure.prompt, "seed": failure.seed, "error": failure.message} for failure in done.failures],
    }
