"""Saved trees under other verifiers: what would those have said? Latents that a run has kept are decoded and scored anew.

Nothing is denoised and nothing is guessed. A finished sample is its own clean estimate, so every verifier of pictures and clean
estimates can judge it. The clean estimate of a node on the way needs the network's prediction, which a run does not keep:
such a node is scored only if the verifier reads latents alone (`at="x0"`), and counted as skipped otherwise.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

from tsdiff.bench.statistics import spearman
from tsdiff.treesearch.arguments import object_in, read_arguments
from tsdiff.treesearch.batches import Batches, Limits
from tsdiff.treesearch.errors import UsageError
from tsdiff.treesearch.findruns import run_folders
from tsdiff.treesearch.ledger import EngineLedger
from tsdiff.treesearch.models import resolve_model, saved_options
from tsdiff.treesearch.node import Value
from tsdiff.treesearch.protocols import (
    BoundVerifier,
    CalibratedVerifier,
    Condition,
    DiffusionModel,
    NullRecorder,
    Verifier,
)
from tsdiff.treesearch.references import VerifierLike, resolve_verifier
from tsdiff.treesearch.rescored import Rescored, write_rescored
from tsdiff.treesearch.run import Run
from tsdiff.treesearch.runfolder import LATENTS, environment
from tsdiff.treesearch.saved import SavedRun, load_run
from tsdiff.treesearch.savedtree import SavedNode
from tsdiff.treesearch.schedule import SolverInfo
from tsdiff.treesearch.stopwatch import Stopwatch
from tsdiff.treesearch.tree import Tree
from tsdiff.treesearch.work import Candidate, Decode, Judgement

if TYPE_CHECKING:
    from torch import Tensor

At = Literal["final", "x0"]

CHUNK = 64
"""Nodes whose latents and pictures are in memory at once."""

FREE = frozenset({"latents", "levels", "conditions", "node_ids"})
"""What there is of a node without a prediction; pictures and clean estimates of finished samples come on top."""

UNFINISHED = "the network's prediction is not kept, from which its clean estimate would be made"
NOT_KEPT = "its latent was not kept"


@dataclass(frozen=True)
class Rescore:
    """One run under one other verifier.

    Attributes:
      run: as it was saved.
      found: the values, as they are written beside the run.
      old: the steering verifier's scores of the nodes that have a new one, by index; None where it gave none.
      skipped: how many nodes were not scored, by why; drafts and failed nodes count in neither.
      path: the file, None where none was written.
    """

    run: SavedRun
    found: Rescored
    old: Mapping[int, float | None]
    skipped: Mapping[str, int]
    path: Path | None = None

    @property
    def verifier(self) -> str:
        """The verifier's name."""
        return self.found.verifier

    @property
    def new(self) -> dict[int, float | None]:
        """The new scores by index."""
        return {index: value.score for index, value in self.found.values.items()}

    @property
    def spearman(self) -> float | None:
        """Rank correlation of old and new scores over the nodes that have both; None where one of them is constant."""
        pairs = [(old, new) for index, new in self.new.items() if new is not None and (old := self.old[index]) is not None]
        return spearman(*zip(*pairs, strict=True)) if pairs else None  # type: ignore[arg-type]

    @property
    def best(self) -> int | None:
        """The node with the highest new score; of equal ones the first."""
        scores = {index: score for index, score in self.new.items() if score is not None}
        return max(scores, key=lambda index: (scores[index], -index)) if scores else None

    def ranks(self) -> list[tuple[int, int, int | None]]:
        """Nodes by their new scores, highest first: index, new rank, and how many places it has gained (None without an old score).

        Ranks are among the nodes that have both scores for those, and among all scored ones for the rest; ties by index.
        """
        new = {index: score for index, score in self.new.items() if score is not None}
        both = {index: old for index in new if (old := self.old[index]) is not None}
        before = {index: place for place, index in enumerate(_order(both))}
        after = {index: place for place, index in enumerate(_order({index: new[index] for index in both}))}
        return [(index, rank, before[index] - after[index] if index in both else None) for rank, index in enumerate(_order(new), start=1)]

    def to_json(self) -> dict[str, Any]:
        """Strict JSON: the file, and where it is."""
        return {"run": str(self.run.path), "prompt": self.run.prompt, "seed": self.run.seed, "file": None if self.path is None else str(self.path), **self.found.to_json()}


def _order(scores: Mapping[int, float]) -> list[int]:
    return sorted(scores, key=lambda index: (-scores[index], index))


def rescore(
    runs: Iterable[SavedRun | str | Path],
    verifiers: Sequence[VerifierLike],
    *,
    at: At = "final",
    model: Any = None,
    device: str = "auto",
    write: bool = True,
    progress: Callable[[int, int], None] | None = None,
) -> list[Rescore]:
    """Score saved trees by other verifiers, without denoising.

    Args:
      runs: run folders, folders of run folders, or what `load_run` gave.
      verifiers: references, objects or functions, as for `tsdiff.search`.
      at: "final" for finished samples; "x0" for every node whose clean estimate is on disk, or need not be.
      model: a loaded model or pipeline, where the runs were made with an object that no file holds.
      device: where the model and the verifiers run; "auto" is the best there is.
      write: whether to write `rescored/VERIFIER.json` beside each run; what the verifier said of it before is replaced.
      progress: called with the nodes done and all of them.

    Returns:
      One for each run and verifier, run-major.

    Raises:
      UsageError: for a verifier that cannot judge a saved node by itself, a run that is being written, one of other weights
        than the model has now, or runs without a latent to score.
      SetupError: if weights or a device are not on this machine.
    """
    saved = _load(runs)
    judges = _judges(verifiers)
    jobs = [_Job(run, judge, at) for run in saved for judge in judges]
    if not any(job.nodes for job in jobs):
        raise UsageError(f"{_named(saved)} has kept no latent of a node that could be scored; search with --keep all, path or leaves")
    for job in jobs:
        judge = job.judge
        judge.check(job.tree.condition)
        if isinstance(judge, BoundVerifier) and job.nodes:
            judge.require_model(str(job.run.facts.get("fingerprint")), tuple(job.run.latent(job.nodes[0]).shape), job.tree.schedule.kind)
    from tsdiff.treesearch.pictures import picture_device

    device = picture_device(device)
    if any("images" in judge.needs for judge in judges):
        _load_models(jobs, model, device)
    for judge in judges:
        judge.prepare(device)
    _score(jobs, device, progress)
    return [job.result(write) for job in jobs]


# What is to be done --------------------------------------------------------------------------------------------------


class _Job:
    """The nodes of a run that a verifier is to score, and what batches ask of their tree."""

    def __init__(self, run: SavedRun, judge: Verifier, at: At) -> None:
        schedule = run.tree.schedule
        if schedule is None or run.seed is None:
            raise UsageError(f"{str(run.path)!r} does not say on which schedule its samples are; {'; '.join(run.damage) or 'it is no whole run'}")
        self.run = run
        self.judge = judge
        self.at = at
        self.model: DiffusionModel | None = None
        self.tree = Tree(schedule, SolverInfo(run.tree.solver, "none"), _condition(run), seed=run.seed, verifier=run.verifier)
        self.skipped: Counter[str] = Counter()
        self.nodes: list[SavedNode] = []
        self.values: dict[int, Value] = {}
        kept = _kept(run)
        for node in run.nodes:
            if node.draft or node.failed or (node.level < schedule.last and at == "final"):
                continue
            if node.level < schedule.last and not judge.needs <= FREE:
                self.skipped[UNFINISHED] += 1
            elif node.index not in kept:
                self.skipped[NOT_KEPT] += 1
            else:
                self.nodes.append(node)

    def blame(self, error: Exception) -> None:
        """The reason is in the value of each node."""

    def candidate(self, node: SavedNode, latent: Tensor, picture: Tensor | None) -> Candidate:
        """A row for the verifier; of an unfinished node it reads no clean estimate."""
        return Candidate(cast(Run, self), node, node.level, latent, latent, {} if picture is None else {"images": picture}, {})

    def result(self, write: bool) -> Rescore:
        """What has come of it, written down."""
        run, judge = self.run, self.judge
        old = {index: run.nodes[index].score(run.verifier) for index in self.values}
        found = Rescored(judge.name, self.values)
        made = Rescore(run, found, old, dict(self.skipped))
        digests = getattr(judge, "sha256", None)
        facts = {
            "at": self.at, "fingerprint": run.facts.get("fingerprint"), "sha256": digests if isinstance(digests, dict) else None,
            "against": run.verifier, "spearman": made.spearman, "best": made.best, "skipped": dict(self.skipped), "packages": environment()["packages"],
        }  # fmt: skip
        made = replace(made, found=replace(found, facts=facts))
        return replace(made, path=write_rescored(run.path, made.found)) if write and self.values else made


def _load(runs: Iterable[SavedRun | str | Path]) -> list[SavedRun]:
    """Runs, each once, none of which is being written."""
    found: dict[Path, SavedRun] = {}
    for run in runs:
        if isinstance(run, SavedRun):
            found.setdefault(run.path.resolve(), run)
            continue
        folders = run_folders(Path(run)) if Path(run).is_dir() else []
        for one in folders or [Path(run)]:  # a path that holds none: `load_run` says what to name instead
            found.setdefault(one.resolve(), load_run(one))
    if not found:
        raise UsageError("no runs were given; name run folders")
    writing = [run for run in found.values() if run.status == "running"]
    if writing:
        raise UsageError(f"{str(writing[0].path)!r} is being written; wait for its search to end, or interrupt it")
    return list(found.values())


def _judges(verifiers: Sequence[VerifierLike]) -> list[Verifier]:
    """Verifiers that can score a saved node by itself, with different names."""
    judges = [resolve_verifier(verifier) for verifier in verifiers]
    if not judges:
        raise UsageError("no verifier was given; name one of `tsdiff list verifiers`")
    for judge in judges:
        reason = unfit(judge)
        if reason:
            raise UsageError(f"verifier {judge.name} {reason}")
    names = [judge.name for judge in judges]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise UsageError(f"verifier {twice[0]!r} is given twice; values are kept by name, so give one of them another (NAME:name=...)")
    return judges


def unfit(judge: Verifier) -> str:
    """Why a verifier cannot score nodes of a saved tree; "" if it can."""
    missing = sorted(judge.needs - FREE - {"images", "x0"})
    if judge.scope == "set":
        return "scores relative to a whole set, so that a node has no score of its own; rescore by its members instead"
    if judge.latency == "pending":
        return "answers later, in a search that waits for it; rescore by a verifier that answers at once"
    if isinstance(judge, CalibratedVerifier) and judge.pool is not None:
        return "compares with plain samples that are made before a search; rescore by its members instead"
    if missing:
        return f"reads {', '.join(missing)}, which runs do not keep"
    return ""


def _condition(run: SavedRun) -> Condition:
    """What the samples are conditioned on; facts about the prompt are with the arguments, not in the tree."""
    own = run.tree.condition
    given = run.arguments.get("prompts")
    for one in given if isinstance(given, list) else [given]:
        fields = one.get("@condition") if isinstance(one, dict) else None
        if fields and (fields.get("prompt"), fields.get("class_label")) == (own.prompt, own.class_label) and not object_in(fields.get("metadata")):
            return replace(own, metadata=read_arguments({"metadata": fields.get("metadata", {})}, run.path, {})["metadata"])
    return own


def _kept(run: SavedRun) -> set[int]:
    """Nodes whose latents are on disk."""
    file = run.path / LATENTS
    if not file.exists():
        return set(run.tree.places)
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as opened:
            return {int(name.removeprefix("node/")) for name in opened.keys()}  # noqa: SIM118 (no dictionary)
    except (SafetensorError, OSError, ValueError) as error:
        raise UsageError(f"{str(file)!r} cannot be read ({error}); the latents of this run are lost") from None


# Models --------------------------------------------------------------------------------------------------------------


def _load_models(jobs: Sequence[_Job], given: Any, device: str) -> None:
    """Load what decodes each run's latents, once for all runs of one model; refuse other weights than made the run."""
    loaded: dict[tuple[Any, ...], DiffusionModel] = {}
    for job in jobs:
        if "images" not in job.judge.needs or not job.nodes:
            continue
        arguments = job.run.arguments
        named = arguments.get("model") or job.run.model
        if given is None and object_in(named):
            raise UsageError(f"{str(job.run.path)!r} was made with a model that no file holds ({object_in(named)}); rescore it from Python: tsdiff.bench.rescore.rescore(..., model=...)")
        options = saved_options(arguments, device)
        key = (id(given),) if given is not None else (named, options)
        if key not in loaded:
            outline = resolve_model(named, options) if given is None else resolve_model(given)
            if outline.media is None:
                raise UsageError(f"the model {outline.name!r} makes no pictures, which {job.judge.name} reads; rescore by a verifier of latents")
            loaded[key] = outline.load()
        job.model = loaded[key]
        made_by = job.run.facts.get("fingerprint")
        if made_by is not None and made_by != job.model.fingerprint:
            raise UsageError(f"{str(job.run.path)!r} was made with other weights ({made_by}) than {job.model.name!r} has now ({job.model.fingerprint}); its latents would not decode to what was searched")


# Scoring -------------------------------------------------------------------------------------------------------------


def _score(jobs: Sequence[_Job], device: str, progress: Callable[[int, int], None] | None) -> None:
    """Decode and score all nodes, those of many trees together, a chunk in memory at a time."""
    import torch

    ledger = EngineLedger()
    batches = Batches(Limits(), device, ledger, NullRecorder(), Stopwatch(ledger.seconds))
    total, done = sum(len(job.nodes) for job in jobs), 0
    rows = _rows(jobs)
    with torch.no_grad():
        while chunk := list(islice(rows, CHUNK)):
            for here, node, latent in chunk:
                _queue(batches, here, node, latent.to(device))
            while batches.launch(full=False):
                pass
            done += sum(len(here) for here, _, _ in chunk)
            if progress is not None:
                progress(done, total)


def _rows(jobs: Sequence[_Job]) -> Iterator[tuple[list[_Job], SavedNode, Tensor]]:
    """Every latent once, with the jobs that want its node."""
    by_run: dict[int, list[_Job]] = {}
    for job in jobs:
        by_run.setdefault(id(job.run), []).append(job)
    for same in by_run.values():
        wanted: dict[int, list[_Job]] = {}
        for job in same:
            for node in job.nodes:
                wanted.setdefault(node.index, []).append(job)
        for node, latent in same[0].run.latents(sorted(wanted)):
            yield wanted[node.index], node, latent


def _queue(batches: Batches, jobs: Sequence[_Job], node: SavedNode, latent: Tensor) -> None:
    """Queue a node for the verifiers that want it: decoded once for all that look at it."""

    def judge(job: _Job, picture: Tensor | None) -> None:
        def then(values: Sequence[Value]) -> None:
            job.values[node.index] = values[0]

        batches.judge(Judgement(job.judge, [job.candidate(node, latent, picture)], then))

    looking = [job for job in jobs if "images" in job.judge.needs]
    for job in jobs:
        if job not in looking:
            judge(job, None)
    if not looking:
        return

    def decoded(picture: Tensor | None, reason: str | None) -> None:
        for job in looking:
            if picture is None:
                job.values[node.index] = Value(None, reason=reason or "it could not be decoded")
            else:
                judge(job, picture)

    assert looking[0].model is not None
    batches.decode(Decode(cast(Run, looking[0]), looking[0].model, latent, decoded))


def _named(runs: Sequence[SavedRun]) -> str:
    return repr(str(runs[0].path)) if len(runs) == 1 else f"none of {len(runs)} runs, {str(runs[0].path)!r} among them,"
