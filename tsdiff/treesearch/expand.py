"""Growing a saved tree from one of its nodes, into the same run.

The tree is taken from the run's journal, so that nothing of the search is done again. An expansion is a further *driver* of
the tree: the journal goes on with a record that says what it is, and then with its requests. Interrupted anywhere, it is
continued like a search, and ends in the same bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tsdiff.treesearch.basepool import Calibrated, calibrate
from tsdiff.treesearch.branch import Branch
from tsdiff.treesearch.disk import LOCAL, Disk
from tsdiff.treesearch.durable import origin_of
from tsdiff.treesearch.engine import Engine
from tsdiff.treesearch.errors import SearchFailed, UsageError
from tsdiff.treesearch.expansion import LATENTS, Asked, Expansion, planned_expansion
from tsdiff.treesearch.inbox import Inbox
from tsdiff.treesearch.journal import JournalReader
from tsdiff.treesearch.ledger import Budget, EngineLedger
from tsdiff.treesearch.loading import first_noise, load_models, pixels, settings
from tsdiff.treesearch.node import Node
from tsdiff.treesearch.previews import PreviewWriter
from tsdiff.treesearch.protocols import Policy, Search, TreeView
from tsdiff.treesearch.questions import forget_questions
from tsdiff.treesearch.rebuild import Ended, rebuild
from tsdiff.treesearch.recorder import FileRecorder
from tsdiff.treesearch.records import UNREPEATABLE
from tsdiff.treesearch.resolve import Verifiers
from tsdiff.treesearch.restore import Restore
from tsdiff.treesearch.results import Result, shown, write_tree
from tsdiff.treesearch.run import Run
from tsdiff.treesearch.runfile import JOURNAL, SYNC_SECONDS, different, discard_segments
from tsdiff.treesearch.runfolder import INDEX, RUN, LatentsFile, lock_path, read_json, write_json, write_latents
from tsdiff.treesearch.search import Progress
from tsdiff.treesearch.store import Store, Stored, remove_scratch
from tsdiff.treesearch.summary import write_summary
from tsdiff.treesearch.tree import Tree, best_node

if TYPE_CHECKING:
    from torch import Tensor


def expand(
    run: str | Path | Result,
    node: int | str | Node = "best",
    *,
    children: int | None = None,
    renoise: float | None = None,
    to_level: int | None = None,
    policy: str | Policy | None = None,
    policy_options: Mapping[str, Any] | None = None,
    nfe: int | None = None,
    verifier: Verifiers = (),
    model: Any = None,
    helpers: Mapping[str, Any] | None = None,
    callback: Callable[[Progress], None] | None = None,
    stop: Callable[[], bool] = lambda: False,
    max_batch: int | None = None,
    memory_limit: int | None = None,
    seconds: float | None = None,
) -> Result:
    """Grow a saved tree from one of its nodes; what grows becomes part of the same run.

    Without a policy, copies of the node are re-noised, denoised to the end and scored. With one, the policy searches from
    there as it does from noise: the levels below the copies' are its schedule, and its first noises are such copies.
    Asked for again after an interruption, it goes on where it was (as `tsdiff.resume` makes it do). Every expansion has
    noises of its own, so that the same one done twice gives different children.

    Args:
      run: the folder of a run that is done (of several prompts or seeds, of one of them), or its result.
      node: its index, or "best" for the run's answer.
      children: how many; None takes 8, or as many as `nfe` pays for. Not beside a policy.
      renoise: how far to go back, as a share of the node's own way from pure noise, in levels: 0 stays at its level (for
        stochastic solvers), 0.5 goes back half-way (the default), 1 to pure noise. At least one level, if it is not 0.
      to_level: the level to go back to, instead of `renoise`.
      policy, policy_options: what searches from there, as for `tsdiff.search`.
      nfe: network evaluations that the expansion may spend. A named policy whose size is left open fills it.
      verifier: what steers it, as for `tsdiff.search`; the run's own by default, which judge the samples in any case.
      model, helpers: the models again, where they were objects (pipelines). A verifier that was an object is passed as `verifier`.
      callback: called with a `Progress` after every batch.
      stop: asked before every batch whether to stop.
      max_batch, memory_limit, seconds: as for `tsdiff.search`.

    Returns:
      The run's result, whose answer is the best of the search's and of all expansions'. Its `drivers` say what each was
      and what it came to.

    Raises:
      UsageError: if it cannot be done as asked; nothing is changed then.
      SearchFailed: if it ends without a sample. The run stays as it was, but for the nodes that failed.
      KeyboardInterrupt: if it was told to stop.
    """
    asked = Asked(node, children, renoise, to_level, policy, policy_options or {}, nfe, verifier)
    given = {"model": model, "helpers": helpers, "verifier": verifier or None, "policy": policy, "max_batch": max_batch, "memory_limit": memory_limit, "seconds": seconds}
    with planned_expansion(_folder(run), asked, **given) as expansion:
        return carry_out(expansion, callback=callback, stop=stop)


def _folder(run: str | Path | Result) -> Path:
    if not isinstance(run, Result):
        return Path(run)
    if run.path is None:
        raise UsageError("this result is in no folder; search with out=FOLDER to expand its tree later")
    return run.path


def carry_out(
    expansion: Expansion,
    *,
    callback: Callable[[Progress], None] | None = None,
    stop: Callable[[], bool] = lambda: False,
    notify: Callable[[str], None] = lambda line: None,
    disk: Disk = LOCAL,
    sync_seconds: float = SYNC_SECONDS,
) -> Result:
    """Load the weights and do what `planned_expansion` has resolved, while it holds the lock.

    Args:
      callback: called with a `Progress` after every batch.
      stop: asked before every batch whether to stop.
      notify: told what was damaged in the run's files and has to be done again, or could not be written, a line each.
      disk: through which the run's files are changed.
      sync_seconds: how long what happened may wait before it would survive a power cut.

    Raises:
      UsageError: if the model is another one, or the run's files cannot be trusted.
      SearchFailed: if no sample could be finished.
      KeyboardInterrupt: if it was told to stop.
    """
    plan, folder = expansion.plan, expansion.folder
    with ExitStack() as stack:
        models = load_models(plan)
        model = models[None]
        about = {**expansion.about, "fingerprint": model.fingerprint}
        known = JournalReader(folder / JOURNAL).about
        if known != about:
            raise UsageError(f"{str(folder)!r} cannot be expanded as another search: {different(known, about)}")
        remove_scratch(folder)
        store = Store(model.device, host_limit=plan.limits.host_bytes, device_limit=plan.limits.device_bytes, folder=folder)
        stack.callback(store.close)
        stack.enter_context(settings(plan.limits.deterministic))
        tree = expansion.rebuilt.tree
        files = _Files(expansion, disk)

        def progress() -> None:
            if callback is not None:
                best = tree.best(expansion.steering)
                callback(Progress(tree.ledger.nfe - files.before["nfe"], expansion.cost.upper.nfe, 0, 1, None if best is None else best.score(expansion.steering)))

        image = None if plan.image is None else pixels(plan.image)
        files.calibrated = calibrate(plan, model, image, lambda tree: None, lambda: None)
        files.begin()
        previews = PreviewWriter(plan.previews, plan.keep_latents)
        inbox = Inbox(lock_path(folder).parent, disk=disk)
        stack.callback(inbox.close)
        recorder = FileRecorder(lambda run: folder, lambda run: about, disk=disk, sync_seconds=sync_seconds, previews=previews)
        stack.callback(recorder.close)
        stack.callback(previews.close)
        engine = Engine(plan.limits, store, recorder=recorder, expected_rows=expansion.rows_upper, progress=progress, stop=lambda: inbox.look() or stop())
        recorder.ledger = engine.ledger
        run = _driver(expansion, models, image, files.ended)
        run.questions = inbox.questions(folder)
        engine.add(run)
        try:
            engine.run()
        except KeyboardInterrupt:
            files.interrupt()
            raise
        finally:
            for line in recorder.notices:
                notify(line)
        if isinstance(run.error, UNREPEATABLE):
            raise run.error
        previews.close()
        if previews.notice is not None:
            notify(previews.notice)
        result = files.finish(run, engine.ledger)
        if run.error is not None:
            raise run.error
    return result


def _driver(expansion: Expansion, models: Mapping[str | None, Any], image: Any, ended: Callable[[Run], None]) -> Run:
    """The run that grows the tree on."""
    plan, tree = expansion.plan, expansion.rebuilt.tree
    tree.driver = expansion.number
    tree.budget = Budget(expansion.nfe)
    tree.verifier = plan.verifiers[0].name

    def drive(view: TreeView) -> Search:
        for index in _needed(expansion):
            assert expansion.kept is not None
            run.store.refer(run.key("node", index), _Kept(expansion.kept, index))
        if expansion.lost and not (yield Restore(expansion.lost)):  # type: ignore[misc]
            raise SearchFailed(f"the latent of node {expansion.node.index} could not be computed again: {'; '.join(dict.fromkeys(run.unrestored.values()))}")
        return (yield from Branch(run).grow(expansion.policy))

    run = Run(
        tree,
        drive,
        models,
        plan.verifiers,
        roles=expansion.roles,
        guidance=plan.guidance,
        size=plan.size,
        name=f"policy {expansion.policy.name}",
        given=None if plan.given is None else plan.given.numpy(),
        first=first_noise(plan.first, tree.seed),
        image=image if expansion.lost and expansion.lost[0].parent is None else None,
        keep=plan.keep_latents in ("all", "path"),
        launch=expansion.launch,
        on_end=ended,
    )
    run.arrived.update(expansion.rebuilt.arrived)
    run.history_level.update(expansion.rebuilt.history)
    return run


def _kept(expansion: Expansion) -> list[int]:
    """The nodes whose latents the run has kept."""
    known = len(expansion.rebuilt.tree.nodes)
    names = () if expansion.kept is None else expansion.kept.names
    return [index for name in names if (index := int(name.removeprefix("node/"))) < known]


def _needed(expansion: Expansion) -> list[int]:
    """Of these, the ones that the expansion reads: where it begins, and what is ranked again."""
    last = expansion.plan.schedule.last
    nodes = expansion.rebuilt.tree.nodes
    first = expansion.lost[0].parent if expansion.lost else expansion.node
    ranked = {node.index for node in nodes if expansion.launch.joint and node.level == last and not node.draft and not node.failed}
    return [index for index in _kept(expansion) if nodes[index] is first or index in ranked]


class _Kept(Stored):
    """A latent that the run has kept, for a store."""

    __slots__ = ("_file", "_name")

    def __init__(self, file: LatentsFile, index: int) -> None:
        self._file = file
        self._name = f"node/{index}"

    def __len__(self) -> int:
        return 1

    def read(self) -> dict[str, Tensor]:
        return {"latent": self._file.read(self._name)}


class _Files:
    """What an expansion changes in its run's folder beside the journal.

    Attributes:
      before: the ledger when it began.
      calibrated: how verifiers came to know plain samples.
    """

    def __init__(self, expansion: Expansion, disk: Disk) -> None:
        self.expansion = expansion
        self.folder = expansion.folder
        self.disk = disk
        self.before = expansion.rebuilt.tree.ledger.to_json()
        self.first_node = len(expansion.rebuilt.tree.nodes)
        self.calibrated: tuple[Calibrated, ...] = ()
        drivers = list(expansion.facts.get("drivers") or [_first_driver(expansion.facts)])
        self.earlier: list[dict[str, Any]] = drivers[: expansion.number]

    def begin(self) -> None:
        """Write that the run goes on, and how, before anything else."""
        self._write("running", {})

    def interrupt(self) -> None:
        """Write that it was stopped."""
        self._write("interrupted", {})

    def ended(self, run: Run) -> None:
        """The driver has ended, its latents are still there."""
        if isinstance(run.error, UNREPEATABLE):
            return
        file, kept = self.expansion.kept, set(_kept(self.expansion))
        indices = sorted(kept | {node.index for node in self._wanted(run) if run.key("node", node.index) in run.store})

        def latent(name: str) -> Tensor:
            index = int(name.removeprefix("node/"))
            if file is not None and index in kept:
                return file.read(name)
            return run.store.read(run.key("node", index))["latent"]

        write_latents(self.folder / LATENTS, (f"node/{index}" for index in indices), latent, alike=True, disk=self.disk)

    def finish(self, run: Run, ledger: EngineLedger) -> Result:
        """Write what came of it; `run.json` last."""
        expansion, facts = self.expansion, self.expansion.facts
        tree, rebuilt = run.tree, expansion.rebuilt
        tree.verifier = expansion.steering
        own = [node for node in tree.nodes[self.first_node :] if node.driver == expansion.number]
        mine = run.answer if run.answer is None or run.answer.driver == expansion.number else best_node(own, tree.schedule.last, tree.verifier)
        rebuilt.drivers.append(Ended(expansion.launch.facts, run.answer, run.truncated, None if run.error is None else str(run.error)))
        outcome = {
            **{name: count - self.before[name] for name, count in tree.ledger.to_json().items() if name in ("nfe", "rows", "decodes")},
            "verifier_calls": {name: count - self.before["verifier_calls"].get(name, 0) for name, count in sorted(tree.ledger.verifier_calls.items())},
            "nodes": len(own),
            "failed_nodes": sum(node.failed for node in own),
            "best": None if mine is None else mine.index,
            "score": None if mine is None else mine.score(tree.verifier),
            "truncated": run.truncated,
            "error": None if run.error is None else " ".join(str(run.error).split()),
            "seconds": round(run.seconds, 3),
        }
        result = self._result(run, sum(driver["seconds"] for driver in self.earlier) + run.seconds)
        write_tree(self.folder / "tree.json", tree, disk=self.disk)
        result.update_image(self.folder, origin_of(self.folder, facts), changed=result.node.index != facts["result"]["node"], disk=self.disk)
        drivers = [*self.earlier, {**self._driver("done"), **outcome}]
        result.drivers = drivers
        self._index(result, ledger)
        write_json(self.folder / RUN, {**facts, "status": "done", "drivers": drivers, "result": result.to_json()}, disk=self.disk)
        self._summary()
        discard_segments(self.folder, self.disk)
        forget_questions(self.folder, self.disk)
        return result

    def _result(self, run: Run, seconds: float) -> Result:
        """The run's result now."""
        plan, facts = self.expansion.plan, self.expansion.facts
        tree = run.tree
        answer = self.expansion.rebuilt.best()
        assert answer is not None, "a run that is done has an answer"
        picture = run.picture[1] if run.picture is not None and run.picture[0] is answer else None
        names = facts["options"]["policy"]["name"], plan.model.name
        image, video = shown(picture, plan.model, tree.condition)
        result = Result(tree, answer, image, seconds, *names, self._baseline(tree), video=video, path=self.folder, calibrated=self.calibrated)
        result.truncated = facts.get("result", {}).get("truncated")
        result.relative = facts.get("result", {}).get("relative", False)
        result.options = facts["options"]
        return result

    def _baseline(self, tree: Tree) -> Result | None:
        """The baseline as it was recorded."""
        plan, facts = self.expansion.plan, self.expansion.facts
        plain = Tree(tree.schedule, tree.solver, tree.condition, seed=tree.seed, verifier=tree.verifier, line="baseline")
        ended = rebuild(self.folder, plain).drivers if plan.baseline_cost is not None else []
        if not ended or ended[0].answer is None:
            return None
        return Result(plain, ended[0].answer, None, 0.0, facts["options"]["policy"]["name"], plan.model.name)

    def _wanted(self, run: Run) -> list[Node]:
        """The nodes whose latents stay, beside those that were kept before."""
        keep, tree = self.expansion.plan.keep_latents, run.tree
        if keep == "all":
            return tree.nodes
        if keep == "path":
            return [] if run.answer is None else run.answer.path()
        return [node for node in run.nodes if node.level == tree.schedule.last and not node.draft] if keep == "leaves" else []

    def _driver(self, status: str) -> dict[str, Any]:
        return {"number": self.expansion.number, "status": status, **self.expansion.launch.facts}

    def _write(self, status: str, more: Mapping[str, Any]) -> None:
        drivers = [*self.earlier, {**self._driver(status), **more}]
        write_json(self.folder / RUN, {**self.expansion.facts, "status": status, "drivers": drivers}, disk=self.disk)

    def _index(self, result: Result, ledger: EngineLedger) -> None:
        """Bring the search's index up to date: its list of results, and of a run by itself what the engine has done."""
        alone = (self.folder / INDEX).exists()
        path = (self.folder if alone else self.folder.parent) / INDEX
        if not path.exists():
            return
        facts = read_json(path)
        runs = [result.to_json() if (one["prompt"], one["seed"]) == (result.prompt, result.seed) else one for one in facts.get("runs", ())]
        more = {"engine": self._engine(result, ledger)} if alone else {}
        write_json(path, {**facts, **more, "runs": runs}, disk=self.disk)

    def _summary(self) -> None:
        """Make the table of the search's runs again."""
        if (self.folder / INDEX).exists():
            write_summary(self.folder, [self.folder], disk=self.disk)
        elif (self.folder.parent / INDEX).exists():
            runs = sorted(entry for entry in self.folder.parent.iterdir() if (entry / RUN).exists())
            write_summary(self.folder.parent, runs, disk=self.disk)

    @staticmethod
    def _engine(result: Result, ledger: EngineLedger) -> dict[str, Any]:
        """The engine's books of all drivers; rows that no tree knows of were lost to interruptions."""
        booked = result.ledger.rows + (0 if result.baseline_ledger is None else result.baseline_ledger.rows)
        return replace(ledger, lost=ledger.lost + ledger.rows - booked, rows=booked).to_json()


def _first_driver(facts: Mapping[str, Any]) -> dict[str, Any]:
    """The search itself, as its result says, for the list of drivers."""
    result, options = facts["result"], facts["options"]
    names = ("nfe", "rows", "decodes", "verifier_calls", "nodes", "failed_nodes", "score", "truncated", "seconds")
    first = {"number": 0, "status": "done", "policy": options["policy"], "verifiers": options["verifiers"], "nfe_budget": options["nfe_budget"], "best": result["node"]}
    return first | {name: result[name] for name in names} | {"error": None}
