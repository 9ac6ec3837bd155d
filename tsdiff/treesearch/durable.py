"""The folders of a search while it goes on: made before it starts, finished one by one, continued after an interruption.

A search of one prompt and one seed is one run folder. Several make a folder of run folders with an `index.json`; each of
them can be continued with the others, or by itself (unless they share a budget).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tsdiff.treesearch.arguments import CHANGEABLE, IMAGE, INPUTS, Written, object_in, write_arguments
from tsdiff.treesearch.disk import LOCAL, Disk, told
from tsdiff.treesearch.errors import UsageError
from tsdiff.treesearch.history import Origin
from tsdiff.treesearch.lock import Holder, holder
from tsdiff.treesearch.plan import Plan
from tsdiff.treesearch.protocols import Allocator, TellingOutline
from tsdiff.treesearch.questions import forget_questions
from tsdiff.treesearch.rebuild import rebuild
from tsdiff.treesearch.results import Failure
from tsdiff.treesearch.run import Run
from tsdiff.treesearch.runfacts import drivers_of, require_result
from tsdiff.treesearch.runfile import different, discard_segments
from tsdiff.treesearch.runfolder import (
    FORMAT,
    INDEX,
    LOCK,
    RUN,
    environment,
    read_json,
    slug,
    write_image,
    write_json,
    write_latents,
)
from tsdiff.treesearch.strictjson import decode, encode
from tsdiff.treesearch.summary import write_summary
from tsdiff.treesearch.tree import Tree

if TYPE_CHECKING:
    from tsdiff.treesearch.results import Result

FREE = frozenset({"model", "prompts", "seeds", "runs", "nfe_upper", "rows_upper", "calibration_cost", "notices", "rows_per_call", "seconds_limit", "previews", "metadata"})
"""Resolved options that may differ between the parts of a run: how much is done at once, beside what, and shown how."""

MACHINE = ("packages", "cpu_capability", "threads", "gpu")
"""Of the environment, what deterministic bytes depend on."""

Place = tuple[int, int]


class RunFolders:
    """The run folders of one search.

    Args:
      plan: the search.
      folder: its folder; it is there, and locked by the caller.
      fingerprint: of the model.
      disk: through which files are changed.
    """

    def __init__(self, plan: Plan, folder: Path, fingerprint: str, *, disk: Disk = LOCAL) -> None:
        self.plan = plan
        self.folder = folder
        self.disk = disk
        self.places: dict[int, Place] = {}
        self.environment = environment()
        self.fingerprint = fingerprint
        self._written = write_arguments(plan.arguments, plan.image)
        self._open: set[Place] = set()
        self._names: dict[Place, str] = {}
        self._changed = False

    def path(self, place: Place) -> Path:
        """The run folder of a prompt and a seed."""
        if self.plan.num_runs == 1:
            return self.folder
        return self.folder / f"{place[0]:04d}-{slug(self.plan.conditions[place[0]].label)}-seed{self.plan.seeds[place[1]]}"

    def begin_all(self) -> None:
        """Write what the search is, before anything else."""
        if self.plan.num_runs > 1:
            self._inputs(self.folder, self._written)
            self._index({"status": "running"})

    def begin(self, run: Run) -> Path:
        """The folder of a run, made if it is not there."""
        place = self.places[id(run)]
        folder = self.path(place)
        try:
            self.disk.make_folder(folder)
        except OSError as error:
            raise told(error, folder) from error
        known = status(folder)
        if known is None:
            self._inputs(folder, self._arguments(place))
            self._run(place, {"status": "running"})
        else:
            require_result(read_json(folder / RUN), folder)
        run.done = known == "done" or expansions(folder) != []
        self._changed |= not run.done
        return folder

    def opened(self, run: Run) -> None:
        """The run's journal is open, and is that of this run."""
        place = self.places[id(run)]
        if not run.done and place not in self._open:
            self._open.add(place)
            if status(self.path(place)) != "running":
                self._run(place, {"status": "running"})

    def about(self, run: Run) -> dict[str, Any]:
        """What a journal says of its run: everything that its bytes follow from."""
        return about_run(self.plan, self.places[id(run)], self.fingerprint, self.environment)

    def finish(self, place: Place, outcome: Result | Failure) -> None:
        """Write what came of a run; the tensors of one that is done are not needed any more."""
        folder = self.path(place)
        self._open.discard(place)
        if isinstance(outcome, Failure):
            self._run(place, {"status": "failed", "error": outcome.message})
            forget_questions(folder, self.disk)
        else:
            facts = self._facts(place)
            outcome.write(folder, origin=origin_of(folder, facts), facts=facts, disk=self.disk)
            self.tidy(place)

    def found(self, place: Place, result: Result) -> None:
        """All of a run was written before; where it was expanded since, its result is that of all its drivers."""
        folder = self.path(place)
        if expansions(folder):
            tree = Tree(result.tree.schedule, result.tree.solver, result.tree.condition, seed=result.seed, verifier=result.tree.verifier)
            rebuilt = rebuild(folder, tree)
            result.tree.ledger = tree.ledger  # of all drivers, for the engine's books
            result.tree, result.node, result.drivers = tree, rebuilt.best() or result.node, expansions(folder)
        result.found(folder)
        if status(folder) == "done":
            self.tidy(place)

    def tidy(self, place: Place) -> None:
        """Remove the tensors of a run that is done, whose `latents.safetensors` has what is kept of them; and its questions, whose answers are recorded."""
        discard_segments(self.path(place), self.disk)
        forget_questions(self.path(place), self.disk)

    def finish_all(self, facts: Mapping[str, Any]) -> None:
        """Write the index of the whole search, and the table of its runs; where all were done before, it is there."""
        places = [(c, s) for c in range(len(self.plan.conditions)) for s in range(len(self.plan.seeds))]
        write_summary(self.folder, [self.path(place) for place in places], disk=self.disk)
        index = self.folder / INDEX
        if self._changed or not index.exists() or read_json(index).get("status") != facts["status"]:
            self._index(facts)

    def interrupt(self) -> None:
        """Write that the search was stopped."""
        for place in self._open:
            self._run(place, {"status": "interrupted"})
        self._open.clear()
        if self.plan.num_runs > 1:
            self._index({"status": "interrupted"})

    def _arguments(self, place: Place) -> Written:
        """What searches one prompt under one seed."""
        plan = self.plan
        if plan.num_runs == 1:
            return self._written
        return write_arguments({**plan.arguments, "prompts": plan.conditions[place[0]], "seed": plan.seeds[place[1]]}, plan.image)

    def _inputs(self, folder: Path, written: Written) -> None:
        tensors, image = written.tensors, written.image
        if tensors and not (folder / INPUTS).exists():
            write_latents(folder / INPUTS, tensors, tensors.__getitem__, disk=self.disk)
        if image is not None and not (folder / IMAGE).exists():
            write_image(folder / IMAGE, image, disk=self.disk)

    def _run(self, place: Place, facts: Mapping[str, Any]) -> None:
        write_json(self.path(place) / RUN, self._facts(place) | dict(facts), disk=self.disk)

    def _index(self, facts: Mapping[str, Any]) -> None:
        plan = self.plan
        known = {"format": FORMAT, "status": "", "arguments": self._written.data, "options": plan.to_json() | {"typed": dict(plan.typed)}, "environment": self.environment}
        write_json(self.folder / INDEX, known | dict(facts), disk=self.disk)

    def _facts(self, place: Place) -> dict[str, Any]:
        """What a run is, for its `run.json`."""
        plan = self.plan
        condition, seed = plan.conditions[place[0]], plan.seeds[place[1]]
        data = self._arguments(place).data
        options = plan.to_json() | {"typed": dict(plan.typed), "environment": self.environment}
        facts = {"format": FORMAT, "status": "", "name": self._name(place), "prompt": condition.label, "seed": seed, "arguments": data, "options": options, "fingerprint": self.fingerprint}
        tree = Tree(plan.schedule, plan.solver, condition, seed=seed, verifier=plan.verifiers[0].name)
        relative = plan.verifiers[0].scope == "set"
        if isinstance(plan.model, TellingOutline):
            facts["model_facts"] = dict(plan.model.facts)
        return facts | {"alone": plan.num_runs == 1 or not shares_budget(plan), "relative": relative, "tree": tree.head()}

    def _name(self, place: Place) -> str:
        """What a run folder was called when it was begun, also after it has been moved."""
        if place not in self._names:
            path = self.path(place)
            known = read_json(path / RUN).get("name") if (path / RUN).exists() else None
            own = path.name if self.plan.num_runs == 1 else f"{self.folder.name}/{path.name}"
            self._names[place] = known if isinstance(known, str) else own
        return self._names[place]


def about_run(plan: Plan, place: Place, fingerprint: str, environment: Mapping[str, Any]) -> dict[str, Any]:
    """Everything that the bytes of a run follow from, as strict JSON."""
    condition, seed = plan.conditions[place[0]], plan.seeds[place[1]]
    about = {
        "prompt": condition.label,
        "seed": seed,
        "options": lasting(plan.to_json()),
        "fingerprint": fingerprint,
        "inputs": _digest(plan, condition),
        "baseline": plan.baseline_cost is not None,
    }
    if plan.limits.deterministic:
        about["machine"] = {name: environment[name] for name in MACHINE}
    normal: dict[str, Any] = decode(encode(about))  # type: ignore[assignment]
    return normal


def lasting(options: Mapping[str, Any]) -> dict[str, Any]:
    """The resolved options that must not change while a run lasts."""
    return {name: value for name, value in options.items() if name not in FREE and name not in ("typed", "environment")}


def shares_budget(plan: Plan) -> bool:
    """Whether what one run may do depends on the others."""
    return isinstance(plan.policy, Allocator) or plan.arguments.get("total_nfe") is not None


def status(folder: Path) -> str | None:
    """The status that a run folder tells: "running", "interrupted", "failed" or "done"; None if it tells none.

    A run that says "running" while nobody holds its lock was interrupted without notice.
    """
    path = folder / RUN
    if not path.exists():
        return None
    word = read_json(path).get("status")
    return word if isinstance(word, str) else None


def expansions(folder: Path) -> list[dict[str, Any]]:
    """What `run.json` says of a run's drivers, the search itself first; empty where the run was never expanded."""
    path = folder / RUN
    return drivers_of(read_json(path), folder) if path.exists() else []


def unfinished_expansion(folder: Path) -> bool:
    """Whether a run's last expansion has not come to its end."""
    return any(driver["status"] != "done" for driver in expansions(folder)[-1:])


def unfinished(plan: Plan) -> Path | None:
    """The newest folder in `plan.out` whose search was the same, was interrupted and is not being written; None if there is none."""
    return next((folder for folder, writer in _alike(plan) if writer is None), None)


def being_written(plan: Plan) -> tuple[Path, Holder] | None:
    """The newest folder in `plan.out` whose search is the same and is going on, and who writes it; None if there is none."""
    return next(((folder, writer) for folder, writer in _alike(plan) if writer is not None), None)


def _alike(plan: Plan) -> Iterator[tuple[Path, Holder | None]]:
    """The folders in `plan.out` whose search is the same and has not come to its end, the newest first, and who writes them."""
    written = write_arguments(plan.arguments, plan.image)
    if plan.out is None or not plan.out.is_dir() or written.tensors or object_in(written.data):
        return
    wanted, options = _lasting(written.data), lasting(plan.to_json())
    for folder in sorted(plan.out.glob("run-*"), reverse=True):
        path = folder / (RUN if plan.num_runs == 1 else INDEX)
        try:
            if not path.exists():
                continue
            facts, writer = read_json(path), holder(folder / LOCK)
        except UsageError:  # of another run, and nothing that this one needs
            continue
        arguments, known = facts.get("arguments"), facts.get("options")
        if facts.get("status") not in ("running", "interrupted") or facts.get("drivers") or not isinstance(arguments, dict) or not isinstance(known, dict):
            continue
        if _equal(_lasting(arguments), wanted) and _equal(lasting(known), options) and (plan.image is None or _same_image(folder / IMAGE, plan.image)):
            yield folder, writer


def _equal(known: Any, now: Any) -> bool:
    return not different(known, json.loads(json.dumps(now)))


def origin_of(folder: Path, facts: Mapping[str, Any]) -> Origin:
    """What images of a run say of where they come from; `facts` is its `run.json`."""
    return Origin(lasting(facts["options"]), _lasting(facts["arguments"]), facts["fingerprint"], facts.get("name", folder.name))


def _lasting(arguments: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in arguments.items() if name not in CHANGEABLE}


def _same_image(path: Path, image: Any) -> bool:
    from PIL import Image

    try:
        with Image.open(path) as opened:
            return bool(opened.tobytes() == image.tobytes())
    except (OSError, ValueError, SyntaxError):  # of another search, and damaged
        return False


def require_same(known: Mapping[str, Any], plan: Plan, folder: Path) -> None:
    """Raise a UsageError unless a plan does what a folder's search did."""
    changed = different(lasting(known), lasting(json.loads(json.dumps(plan.to_json()))))
    if changed:
        raise UsageError(f"{str(folder)!r} cannot be continued with other options: {changed}; leave them as they were, or start a new search")


@contextmanager
def same_machine(known: Any, folder: Path) -> Iterator[None]:
    """Deterministic bytes need the same libraries, kernels and number of threads, which is set."""
    import torch

    known = known if isinstance(known, Mapping) else {}
    threads = torch.get_num_threads()
    if isinstance(known.get("threads"), int):
        torch.set_num_threads(known["threads"])
    try:
        now = environment()
        before, after = ({name: facts.get(name) for name in MACHINE} for facts in (known, now))
        changed = different(before, after)
        if changed:
            raise UsageError(f"{str(folder)!r} is deterministic and can be continued only where it was begun: {changed}")
        yield
    finally:
        torch.set_num_threads(threads)


def _digest(plan: Plan, condition: Any) -> str:
    """A hash of what the options do not say: the condition, the initial image, the given noise."""
    written = write_arguments({"condition": condition, "latents": plan.given}, None)
    digest = hashlib.sha256(encode(written.data))
    for name in sorted(written.tensors):
        digest.update(written.tensors[name].numpy().tobytes())
    if plan.image is not None:
        digest.update(plan.image.tobytes())
    return digest.hexdigest()
