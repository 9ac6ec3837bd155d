"""Writes down what happens to trees, each in its run folder, and gives it back after an interruption.

A completed request is one record: what was asked, what it cost, the nodes that it made, what its work changed (with the
places of the tensors), what the policy noted, and the ledgers. It is in the journal before its reply reaches the policy,
so that running the policy again, and answering from the record, ends in the same tree.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tsdiff.treesearch.disk import LOCAL, Disk
from tsdiff.treesearch.errors import UsageError
from tsdiff.treesearch.forest import Await
from tsdiff.treesearch.ledger import EngineLedger
from tsdiff.treesearch.node import Node, Value
from tsdiff.treesearch.previews import PreviewWriter
from tsdiff.treesearch.records import (
    UNREPEATABLE,
    Diverged,
    InSegments,
    Recorded,
    Refusal,
    effect_to_json,
    node_to_json,
    request_to_json,
    restore,
)
from tsdiff.treesearch.requests import Request
from tsdiff.treesearch.run import Effect, Group, Run
from tsdiff.treesearch.runfile import SYNC_SECONDS, RunFile, Tape, different
from tsdiff.treesearch.segmentfile import Place
from tsdiff.treesearch.segments import SEGMENT_BYTES
from tsdiff.treesearch.strictjson import encode

if TYPE_CHECKING:
    from torch import Tensor

COUNTS = ("rows", "padding", "probe", "retried", "lost", "batches")
"""Of the engine's ledger, those that go on where an interruption left them."""


class _Desk:
    """Where the records of one tree's present driver are written.

    Attributes:
      tape: what was recorded before; None once it has been repeated.
      nodes: how many of the tree's nodes have been written down.
      pending: records that go with the next group.
      heard: answers that are written down already.
    """

    def __init__(self, run: Run, file: RunFile) -> None:
        self.run = run
        self.file = file
        self.tape: Tape | None = file.tapes.get((run.tree.line, run.tree.driver))
        self.answers = {} if self.tape is None else self.tape.answers
        self.nodes = run.first_node
        self.pending: list[dict[str, Any]] = []
        self.heard: set[tuple[int, str]] = set()
        self.ended = self.tape is not None and self.tape.end is not None


class FileRecorder:
    """Implements `tsdiff.treesearch.protocols.Recorder` with files.

    Args:
      folder: of a run. A tree's baseline is recorded beside it.
      about: what a run is, strict JSON.
      opened: told when a run's journal is open, and found to be that run's.
      disk: through which files are changed.
      sync_seconds: how long a group may wait before it would survive a power cut; every group survives the process.
      segment_bytes: size from which a new segment is begun.
      previews: keeps small pictures of nodes, if anybody does; closed by its owner.

    Attributes:
      ledger: the engine's, which goes on where an interruption left it.
      notices: what was damaged in the files and has to be done again, a line each.
    """

    def __init__(
        self,
        folder: Callable[[Run], Path],
        about: Callable[[Run], Mapping[str, Any]],
        opened: Callable[[Run], None] = lambda run: None,
        *,
        disk: Disk = LOCAL,
        sync_seconds: float = SYNC_SECONDS,
        segment_bytes: int = SEGMENT_BYTES,
        previews: PreviewWriter | None = None,
    ) -> None:
        self.ledger = EngineLedger()
        self.notices: list[str] = []
        self._folder = folder
        self._about = about
        self._opened = opened
        self._previews = previews
        self._options: dict[str, Any] = {"disk": disk, "sync_seconds": sync_seconds, "segment_bytes": segment_bytes}
        self._files: dict[Path, RunFile] = {}
        self._desks: dict[int, _Desk] = {}
        self._seen: set[Path] = set()
        self._before = dict.fromkeys(COUNTS, 0)

    def begin(self, run: Run) -> None:
        """Open the tree's run folder."""
        folder = self._folder(run)
        if folder not in self._files:
            self._files[folder] = RunFile(folder, self._about(run), **self._options)
            self.notices += filter(None, [self._files[folder].repaired])
            if folder not in self._seen:  # what this process wrote itself is on its ledger already
                self._seen.add(folder)
                self._go_on(self._files[folder].engine)
        self._opened(run)
        file = self._files[folder]
        file.users += 1
        desk = self._desks[id(run)] = _Desk(run, file)
        if run.launch is not None:
            self._launch(desk, {"number": run.tree.driver, **run.launch.facts})
        run.effects = []
        run.tree.heard = []

    def recorded(self, run: Run, request: Request) -> Recorded | Refusal | None:
        """The record of the policy's next request, if that is what it asks."""
        desk = self._desks[id(run)]
        if desk.tape is None or isinstance(request, Await):
            return None
        found = desk.tape.next()
        if found is None:
            desk.tape = None
            return None
        record, where = found
        asked = request_to_json(request)
        if encode(asked) != encode(record["request"]):
            raise Diverged(
                f"{run.name} asks {_short(asked)} where it asked {_short(record['request'])} before ({where}); continue the run with the policy and the tsdiff that began it"
            )
        if run.tree.heard is not None:
            run.tree.heard.clear()  # they are in the record
        if "refused" in record:
            return Refusal.from_json(record)
        desk.nodes += len(record["nodes"])
        return Recorded(record, where, desk.file.segment_folder)

    def commit(self, groups: Sequence[Group]) -> None:
        """Write completed requests, one group of records for each run folder."""
        written: dict[RunFile, list[dict[str, Any]]] = {}
        for group in groups:
            desk = self._desks[id(group.run)]
            if not isinstance(group.request, Await):
                written.setdefault(desk.file, []).extend([*desk.pending, self._completed(desk, group)])
                desk.pending = []
        for file, records in written.items():
            file.commit(records)
        for group in groups:
            self._sweep(self._desks[id(group.run)].file, group.run)

    def answer(self, run: Run, node: Node, key: str, value: Value) -> None:
        """Write an answer at once: it cannot be asked for again."""
        desk = self._desks[id(run)]
        if (node.index, key) in desk.heard:
            desk.heard.remove((node.index, key))
            return
        record = {"tree": run.tree.line, "answer": {"node": node.index, "key": key, "value": value.to_json()}}
        desk.file.commit([*desk.pending, record], sync=True)
        desk.pending = []

    def answered(self, run: Run, node: Node, key: str) -> Value | None:
        """An answer that was written before the interruption."""
        desk = self._desks[id(run)]
        known = desk.answers.get((node.index, key))
        if not known:
            return None
        desk.heard.add((node.index, key))
        return Value(**known.popleft())

    def refuse(self, run: Run, request: Request, why: Exception) -> None:
        """Keep a refusal for the next group: nothing depends on it before."""
        self._desks[id(run)].pending.append({"tree": run.tree.line, "request": request_to_json(request)} | Refusal.to_json(why))

    def decoded(self, run: Run, node: Node, pixels: Tensor) -> None:
        """Keep a small picture of a node."""
        if self._previews is not None:
            self._previews.add(self._desks[id(run)].file.folder, run, node, pixels)

    def end(self, run: Run) -> None:
        """Write that a tree has ended; its file is closed when no other tree uses it."""
        desk = self._desks.pop(id(run))
        if desk.tape is not None and run.error is None and (rest := desk.tape.next()) is not None:
            run.answer, run.error = None, Diverged(f"{run.name} ended where it asked {_short(rest[0]['request'])} before ({rest[1]}); continue the run with the policy and the tsdiff that began it")
        if run.done and desk.tape is not None and desk.tape.end is not None:
            restore(run.tree.ledger, desk.tape.end["ledger"])  # with the answer's decode
        if not desk.ended and not isinstance(run.error, UNREPEATABLE):
            end = {
                "answer": None if run.answer is None else run.answer.index,
                "truncated": run.truncated,
                "error": None if run.error is None else f"{type(run.error).__name__}: {run.error}",
                "ledger": run.tree.ledger.to_json(),
            }
            desk.file.commit([*desk.pending, {"tree": run.tree.line, "end": end, "notes": _notes(run), "engine": self._engine()}], sync=True)
        desk.file.users -= 1
        if self._previews is not None:
            self._previews.end(desk.file.folder, run, last=not desk.file.users)
        if not desk.file.users:
            desk.file.close()
            del self._files[desk.file.folder]

    def close(self) -> None:
        """Close all files; closing twice is fine."""
        for file in self._files.values():
            file.close()
        self._files.clear()

    def _launch(self, desk: _Desk, facts: dict[str, Any]) -> None:
        """Write down that a later driver begins; what is written down of it already must say the same."""
        if desk.tape is None:
            desk.file.commit([{"tree": desk.run.tree.line, "driver": facts}], sync=True)
        elif desk.tape.driver != facts:
            raise UsageError(f"{str(desk.file.folder)!r} cannot be continued with another expansion: {different(desk.tape.driver, facts)}")

    def _completed(self, desk: _Desk, group: Group) -> dict[str, Any]:
        run = group.run
        assert run.effects is not None
        made = run.tree.nodes[desk.nodes :]
        desk.nodes = len(run.tree.nodes)
        places = self._keep(desk.file, run, run.effects)
        effects = [effect_to_json(effect, known) for effect, known in zip(run.effects, places, strict=True)]
        run.effects.clear()
        return {
            "tree": run.tree.line,
            "request": request_to_json(group.request),
            "price": run.price,
            "nodes": [node_to_json(node) for node in made],
            "effects": effects,
            "notes": _notes(run),
            "ledger": run.tree.ledger.to_json(),
            "engine": self._engine(),
        }

    def _keep(self, file: RunFile, run: Run, effects: Sequence[Effect]) -> list[dict[str, Place]]:
        """Write the tensors of effects, but for those that have been forgotten already; from then on the store can do without its own.

        Returns:
          For each effect the places of its tensors.
        """
        keys: list[tuple[Any, ...] | None] = []
        tensors: list[tuple[str, Tensor]] = []
        for effect in effects:
            key = _key(run, effect)
            keys.append(key if key in run.store else None)
            if keys[-1] is not None:
                name = "/".join([run.tree.line, *("main" if word is None else str(word) for word in keys[-1][1:])])
                tensors.extend((f"{name}/{part}", tensor) for part, tensor in effect.tensors.items())  # type: ignore[union-attr]
        places = iter(file.store(tensors))
        kept: list[dict[str, Place]] = []
        for effect, key in zip(effects, keys, strict=True):
            kept.append({} if key is None else {name: next(places) for name in effect.tensors})  # type: ignore[union-attr]
            if key is not None:
                run.store.refer(key, InSegments(file.segment_folder, kept[-1]))
        return kept

    def _sweep(self, file: RunFile, run: Run) -> None:
        """Give back the disk space of nodes that were given up, segment by segment, where they are not to be kept."""
        if run.tree.line == "search" and not run.keep and file.full_segments:
            ours = (known for known in run.store.referred() if isinstance(known, InSegments) and known.folder == file.segment_folder)
            file.sweep({place.segment for known in ours for place in known.places})

    def _engine(self) -> dict[str, int]:
        return {name: getattr(self.ledger, name) for name in COUNTS}

    def _go_on(self, counts: Mapping[str, int]) -> None:
        """Add to the ledger what the engine had counted before; of several journals, the one written last knows most."""
        for name in COUNTS:
            more = max(counts.get(name, 0) - self._before[name], 0)
            self._before[name] += more
            setattr(self.ledger, name, getattr(self.ledger, name) + more)


def _key(run: Run, effect: Effect) -> tuple[Any, ...] | None:
    """What the tensors of an effect are stored under; None if it has none."""
    if effect.node is None or not effect.tensors:
        return None
    if effect.kind == "settled":
        return run.key("node", effect.node.index)
    return run.key("prediction", effect.node.index, effect.facts["model"])


def _notes(run: Run) -> list[Any]:
    """What the policy has noted since last: [node or None, facts]."""
    heard = run.tree.heard or []
    notes = [[None if node is None else node.index, dict(facts)] for node, facts in heard]
    heard.clear()
    return notes


def _short(request: Any) -> str:
    text = encode(request).decode()
    return text if len(text) <= 120 else f"{text[:119]}…"
