"""The engine: one loop that keeps many trees growing in full batches, and counts every row.

    policies yield requests -> groups of work -> queues -> batches over all live trees and levels -> replies -> policies

Work waits in queues by kind: evaluations (network rows), steps and estimates (arithmetic on latents), decodes,
judgements (verifiers). Each turn of the loop delivers completed groups, admits trees, or launches a batch: a full one
if there is any, and a partial one only when no policy can go on without it. Every turn makes progress (asserted), so
the loop cannot hang.

Results do not depend on the order of work: noise follows from the node, arithmetic is per row, and with
`Limits.deterministic` every network, decoder and verifier call has one fixed row count.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from itertools import count
from typing import TYPE_CHECKING, Any

from tsdiff.treesearch.batches import Batches, Limits
from tsdiff.treesearch.errors import BudgetExhausted, SearchFailed, TsdiffError, UsageError
from tsdiff.treesearch.finish import finish
from tsdiff.treesearch.growth import Growth
from tsdiff.treesearch.handlers import HANDLERS, begin
from tsdiff.treesearch.ledger import EngineLedger
from tsdiff.treesearch.node import Node
from tsdiff.treesearch.noise import derive, normals
from tsdiff.treesearch.protocols import Condition, DiffusionModel, Encoded, NullRecorder, Recorder, Sampler
from tsdiff.treesearch.quote import Quote
from tsdiff.treesearch.records import Diverged, Recorded, Refusal
from tsdiff.treesearch.requests import Draw, Release, Request
from tsdiff.treesearch.run import Run, flatten
from tsdiff.treesearch.segmentfile import DamagedRecord
from tsdiff.treesearch.stopwatch import Stopwatch
from tsdiff.treesearch.store import Store
from tsdiff.treesearch.video import held
from tsdiff.treesearch.work import Decode

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Engine", "Limits"]

PATIENCE = 0.1
"""Seconds to wait for an answer before looking up again."""


class Engine:
    """Grows trees.

    Args:
      limits: how to use the machine.
      store: where latents live.
      recorder: writes down what happens, and knows what happened before an interruption.
      expected_rows: how many network rows the search may need, to decide whether calibrating pays.
      progress: called after every batch.
      stop: asked before every batch whether to stop; what was completed is written down by then.
    """

    def __init__(
        self,
        limits: Limits,
        store: Store,
        *,
        recorder: Recorder | None = None,
        expected_rows: int = 0,
        progress: Callable[[], None] = lambda: None,
        stop: Callable[[], bool] = lambda: False,
    ) -> None:
        self.limits = limits
        self.stop = stop
        self.store = store
        self.recorder = recorder or NullRecorder()
        self.ledger = EngineLedger()
        self.timed = Stopwatch(self.ledger.seconds)
        self.batches = Batches(limits, store.device, self.ledger, self.recorder, self.timed, expected_rows=expected_rows, progress=progress)
        self.growth = Growth(self.batches, store, self.timed)
        self.waiting: deque[Run] = deque()
        self.live: dict[int, Run] = {}
        self.samplers: dict[tuple[Any, ...], Sampler] = {}
        self._encoded: dict[int, tuple[Condition, bool, Encoded]] = {}
        self._numbers = count()
        self._started = time.perf_counter()

    def add(self, run: Run) -> None:
        """Queue a tree; it starts when there is room in the batches."""
        self.waiting.append(run)

    def run(self) -> None:
        """Work until every tree has ended. A tree's own error ends that tree only (`Run.error`).

        Raises:
          KeyboardInterrupt: if it was told to stop.
        """
        import torch

        with torch.no_grad():
            self._loop()

    def _loop(self) -> None:
        self._started = time.perf_counter()
        while self.live or self.waiting:
            moved = self.batches.hear()
            moved = self._resume() or moved
            moved = self._admit() or moved
            moved = self.growth.compute() or moved
            if moved:
                continue
            if self.stop():
                raise KeyboardInterrupt
            if self.batches.launch(full=True) or self.batches.launch(full=False):
                continue
            assert self.batches.unanswered, f"no tree can go on and no work is left: {[run.group and run.group.request for run in self.live.values()]}"
            self.batches.hear(wait=PATIENCE)
        for tier, peak in self.store.peak.items():
            self.ledger.peak_memory[tier] = max(peak, self.ledger.peak_memory.get(tier, 0))

    def _admit(self) -> bool:
        """Start the next tree while the batches have room."""
        if not self.waiting or not self.batches.has_room:
            return False
        run = self.waiting.popleft()
        run.number = next(self._numbers)
        run.store = self.store
        run.started_at = time.perf_counter()
        self.live[run.number] = run
        self.recorder.begin(run)
        try:
            self._prepare(run)
            run.generator = run.policy(run.tree)
            if not hasattr(run.generator, "send"):
                raise UsageError(f"{run.name}: search gave {run.generator!r} but must be a generator of requests")
        except Exception as error:  # of this tree's condition or policy: the others go on
            self._end(run, error)
            return True
        self._drive(run, None)
        return True

    def _prepare(self, run: Run) -> None:
        """Encode the condition (and the initial image) for every model of the run."""
        import torch

        for binding in run.bindings.values():
            binding.samplers = self.samplers
            binding.encoded = self._encode(binding.model, run.tree.condition, guided=run.guidance.on)
            run.tree.ledger.encodes += 1
        if run.image is not None:
            noise = normals(derive(run.tree.seed, "encode"), int(torch.Size(run.shape).numel())).reshape(run.shape)
            model = run.bindings[None].model
            with self.timed("encode"):
                run.origin = model.encode_images(run.image[None].to(self.store.device), self.growth.to_device(noise[None]))[0]
            run.tree.ledger.encodes += 1

    def _encode(self, model: DiffusionModel, condition: Condition, *, guided: bool) -> Encoded:
        """Encode a condition alone, so that the bytes do not depend on others; a prompt's seeds follow one another and share it."""
        latest = self._encoded.get(id(model))
        if latest is None or latest[0] is not condition or latest[1] != guided:
            with self.timed("encode"):
                latest = self._encoded[id(model)] = (condition, guided, model.encode([condition], guided=guided)[0])
        return latest[2]

    def _resume(self) -> bool:
        """Commit completed groups, then hand their replies to their policies."""
        ready = [run for run in self.live.values() if run.completed]
        if not ready:
            return False
        groups = [group for run in ready for group in run.completed]
        with self.timed("store"):
            self.recorder.commit(groups)
        for run in ready:
            (group,) = run.completed
            run.completed.clear()
            run.group = None
            self._drive(run, group.reply())
        return True

    def _drive(self, run: Run, reply: Any) -> None:
        """Advance a policy until it waits for work or ends."""
        error: TsdiffError | None = None
        while run.group is None and not run.ended:
            assert run.generator is not None
            try:
                with self.timed("policy"):
                    request = run.generator.throw(error) if error is not None else run.generator.send(reply)
            except StopIteration as stop:
                self._returned(run, stop.value)
                return
            except BudgetExhausted as exhausted:
                if run.finishing:
                    self._end(run, SearchFailed(str(exhausted)))
                    return
                run.truncated = str(exhausted)
                self._finish(run)
                reply, error = None, None
                continue
            except Exception as mistake:  # the policy's own error ends its tree, not the search
                self._end(run, mistake)
                return
            reply, error = None, None
            try:
                recorded = self.recorder.recorded(run, request)
                if isinstance(recorded, Recorded):
                    reply = self._repeat(run, request, recorded)
            except Diverged as divergence:
                self._end(run, divergence)
                return
            if isinstance(recorded, Refusal):
                error = recorded.error
            elif recorded is None:
                try:
                    self._grant(run, request)
                except DamagedRecord as damage:
                    self._end(run, damage)
                    return
                except (BudgetExhausted, UsageError) as refusal:
                    self.recorder.refuse(run, request, refusal)
                    error = refusal

    def _repeat(self, run: Run, request: Request, recorded: Recorded) -> Any:
        """Carry out a request as it was written down, at no cost; returns its reply.

        The nodes are made again by the ordinary handlers; what the work gave is taken from the record. Raises `Diverged`
        if other nodes were written down.
        """
        known = len(run.tree.nodes)
        run.tree.budget.spent += recorded.price
        self.growth.repeating = True
        try:
            group = begin(self.growth, run, request)
        finally:
            self.growth.repeating = False
        recorded.require(run.tree.nodes[known:])
        for effect in recorded.effects(run.tree.nodes):
            run.repeat(effect)
        recorded.restore(run.tree.ledger)
        run.completed.clear()
        run.drafts.clear()
        assert group.waiting == 0, "a group that is repeated waits for nothing"
        if run.effects is not None:
            run.effects.clear()
        return group.reply()

    def _grant(self, run: Run, request: Request) -> None:
        """Check, price and begin a request, whole or not at all."""
        parts = flatten(request)
        for part in parts:
            if type(part) not in HANDLERS:
                raise UsageError(f"{run.name} yielded {part!r}; requests are {', '.join(kind.__name__ for kind in HANDLERS)} and Gather")
            HANDLERS[type(part)].check(run, part)
        released = {node for part in parts if isinstance(part, Release) for node in part.group}
        used = {node for part in parts if not isinstance(part, (Release, Draw)) for node in getattr(part, "group", (getattr(part, "source", None),))}
        if released & used:
            raise UsageError(f"Gather: node {min(node.index for node in released & used)} is released beside a request that uses it; release it afterwards")
        quote = Quote(run)
        for part in parts:
            HANDLERS[type(part)].price(quote, part)
        budget = run.tree.budget
        if budget.remaining is not None:
            reserve = 0 if run.finishing else quote.reserve()
            # What costs nothing and gives nothing up is granted even where failures have eaten the reserve.
            if (quote.nfe or released) and quote.nfe + reserve > budget.remaining:
                raise BudgetExhausted(
                    f"{type(request).__name__} costs {quote.nfe} NFE and finishing a sample after it {reserve}, but {budget.remaining} of {budget.limit} are left",
                    price=quote.nfe,
                    remaining=budget.remaining,
                )
        if quote.nfe and not run.finishing and self.limits.seconds is not None and time.perf_counter() - self._started >= self.limits.seconds:
            raise BudgetExhausted(f"the {self.limits.seconds:g} seconds are over", price=quote.nfe, remaining=None)
        budget.spent += quote.nfe
        run.price = quote.nfe
        run.group = begin(self.growth, run, request)

    def _returned(self, run: Run, node: Node | None) -> None:
        """A policy (or the finisher) returned: accept its answer, or finish a sample for it."""
        if node is not None:
            try:
                run.require_answer(node)
            except UsageError as mistake:
                self._end(run, mistake)
                return
            if run.steering.scope == "row" or run.finishing:
                if node.score(run.tree.verifier) is None and run.mistake is not None:
                    self._end(run, run.mistake)  # nothing could be scored, and the caller can mend it
                    return
                run.answer = node
                self._end(run)
                return
        if run.finishing:
            failed = [n.index for n in run.nodes if n.failed]
            # The causes, in order; what failed after a failed parent explains nothing.
            reasons = list(dict.fromkeys(n.reason for n in run.nodes if n.reason and not (n.parent is not None and n.parent.failed)))
            self._end(run, run.mistake or SearchFailed(f"no sample could be finished: nodes {failed[:8]} failed ({'; '.join(reasons[:3]) or 'none was left to grow'})"))
            return
        self._finish(run)
        self._drive(run, None)

    def _finish(self, run: Run) -> None:
        """Let the engine complete the best sample it can in place of the policy."""
        run.finishing = True
        run.generator = finish(run)

    def _end(self, run: Run, error: BaseException | None = None) -> None:
        """A tree has ended: decode its answer, tell its owner, forget its latents."""
        run.ended = True
        run.error = error
        if run.answer is not None and not run.done:
            self._picture(run, run.answer)
        del self.live[run.number]
        run.seconds = time.perf_counter() - run.started_at
        with self.timed("store"):
            run.close_all()
            self.recorder.end(run)
            if run.on_end is not None:
                run.on_end(run)
            run.dissolve()
        self.batches.progress()

    def _picture(self, run: Run, node: Node) -> None:
        """Decode the answer unless scoring it has, and what came of that is still there."""
        model = run.bindings[None].model
        again = run.picture is not None and run.picture[0] is node
        if model.media is None or (run.picture is not None and again and run.picture[1] is not None):
            return
        run.picture = None

        def keep(pixels: Tensor | None, reason: str | None) -> None:
            if pixels is not None:
                run.picture = (node, held(pixels).cpu())
                with self.timed("previews"):
                    self.recorder.decoded(run, node, pixels)
            else:
                run.tree.note(node, image=reason)

        decodes = run.tree.ledger.decodes
        self.batches.decode_now(Decode(run, model, self.store.get(run.key("node", node.index))["latent"], keep))
        if again:  # it was counted before the interruption
            self.ledger.lost_decodes += run.tree.ledger.decodes - decodes
            run.tree.ledger.decodes = decodes
