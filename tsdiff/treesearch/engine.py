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

import heapq
import logging
import queue
import time
from collections import deque
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count
from typing import TYPE_CHECKING, Any, TypeVar

from tsdiff.treesearch.calibrate import calibrate, is_out_of_memory
from tsdiff.treesearch.errors import BudgetExhausted, SearchFailed, SetupError, TsdiffError, UsageError
from tsdiff.treesearch.finish import finish
from tsdiff.treesearch.handlers import HANDLERS, Quote, begin
from tsdiff.treesearch.ledger import EngineLedger
from tsdiff.treesearch.node import Node, Value
from tsdiff.treesearch.noise import derive, normals
from tsdiff.treesearch.protocols import NullRecorder, PendingVerifier, Recorder, Sampler, Scores, StepState, Verifier
from tsdiff.treesearch.requests import Request
from tsdiff.treesearch.run import Run, flatten
from tsdiff.treesearch.store import Store
from tsdiff.treesearch.work import Candidate, CandidateBatch, Chain, Decode, Estimate, Evaluation, Judgement, Step

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")
log = logging.getLogger("tsdiff")

CALIBRATION_ROWS = 500
"""Searches expected to need fewer network rows than this do not spend any on measuring the best batch size."""


@dataclass(frozen=True)
class Limits:
    """How the engine may use the machine.

    Attributes:
      deterministic: one fixed row count for every call, never calibrated; out of memory is an error.
      network, decode, verify: rows a call at most (and, when deterministic, exactly). `network` None is calibrated:
        the smallest batch within 95 % of the best throughput.
      host_bytes, device_bytes: memory for latents before the least recently used move out.
      seconds: no request is granted after this long; None for no limit.
    """

    deterministic: bool = False
    network: int | None = None
    decode: int = 8
    verify: int = 16
    host_bytes: int = 4 << 30
    device_bytes: int = 4 << 30
    seconds: float | None = None


@dataclass
class Bucket:
    """Network rows that fit in one batch, the longest remaining work first."""

    sampler: Sampler
    limit: int | None
    rows: list[tuple[int, int, Evaluation, int]] = field(default_factory=list)


class Engine:
    """Grows trees.

    Args:
      limits: how to use the machine.
      store: where latents live.
      recorder: writes down what happens.
      expected_rows: how many network rows the search may need, to decide whether calibrating pays.
      progress: called after every batch.
    """

    def __init__(
        self,
        limits: Limits,
        store: Store,
        *,
        recorder: Recorder | None = None,
        expected_rows: int = 0,
        progress: Callable[[], None] | None = None,
    ) -> None:
        self.limits = limits
        self.store = store
        self.recorder = recorder or NullRecorder()
        self.expected_rows = expected_rows
        self.progress = progress or (lambda: None)
        self.ledger = EngineLedger()
        self.waiting: deque[Run] = deque()
        self.live: dict[int, Run] = {}
        self.buckets: dict[Hashable, Bucket] = {}
        self.steps: list[Step] = []
        self.estimates: list[Estimate] = []
        self.decodes: dict[Hashable, deque[Decode]] = {}
        self.judgements: dict[int, deque[Judgement]] = {}
        self.predicting: dict[tuple[int, int, str | None], list[tuple[Callable[[Tensor, Tensor | None], None], Callable[[str], None]]]] = {}
        self.samplers: dict[tuple[Any, ...], Sampler] = {}
        self.answers: queue.SimpleQueue[tuple[Callable[[Value], None], Value]] = queue.SimpleQueue()
        self.unanswered = 0
        self.decode_limit = limits.decode
        self.verify_limit = limits.verify
        self._numbers = count()
        self._order = count()
        self._started = time.perf_counter()
        self._stages: list[str] = []
        self._stage_since = 0.0

    def add(self, run: Run) -> None:
        """Queue a tree; it starts when there is room in the batches."""
        self.waiting.append(run)

    def run(self) -> None:
        """Work until every tree has ended. A tree's own error ends that tree only (`Run.error`)."""
        import torch

        with torch.no_grad():
            self._loop()

    def _loop(self) -> None:
        self._started = time.perf_counter()
        while self.live or self.waiting:
            moved = self._hear()
            moved = self._resume() or moved
            moved = self._admit() or moved
            moved = self._compute() or moved
            if moved or self._launch(full=True) or self._launch(full=False):
                continue
            assert self.unanswered, f"no tree can go on and no work is left: {[run.group and run.group.request for run in self.live.values()]}"
            self._hear(wait=True)
        for tier, peak in self.store.peak.items():
            self.ledger.peak_memory[tier] = max(peak, self.ledger.peak_memory.get(tier, 0))

    # Policies ---------------------------------------------------------------------------------------------------

    def _admit(self) -> bool:
        """Start the next tree while the batches have room."""
        ready = sum(len(bucket.rows) for bucket in self.buckets.values())
        room = sum(2 * (bucket.limit or 16) for bucket in self.buckets.values()) or 1
        if not self.waiting or ready >= room:
            return False
        run = self.waiting.popleft()
        run.number = next(self._numbers)
        run.store = self.store
        run.started_at = time.perf_counter()
        self.live[run.number] = run
        try:
            self._prepare(run)
            self.recorder.replay(run.tree)
            run.generator = run.policy(run.tree)
            self._drive(run, None)
        except TsdiffError as error:
            self._end(run, error)
        return True

    def _prepare(self, run: Run) -> None:
        """Encode the condition (and the initial image) for every model of the run."""
        import torch

        for binding in run.bindings.values():
            binding.samplers = self.samplers
            if binding.encoded is None:
                with self.timed("encode"):
                    binding.encoded = binding.model.encode([run.tree.condition], guided=run.guidance.on)[0]
                run.tree.ledger.encodes += 1
        if run.image is not None:
            noise = normals(derive(run.tree.seed, "encode"), int(torch.Size(run.shape).numel())).reshape(run.shape)
            model = run.bindings[None].model
            with self.timed("encode"):
                run.origin = model.encode_images(run.image[None].to(self.store.device), self.to_device(noise[None]))[0]
            run.tree.ledger.encodes += 1

    def _resume(self) -> bool:
        """Commit completed groups, then hand their replies to their policies."""
        ready = [run for run in self.live.values() if run.completed]
        if not ready:
            return False
        groups = [group for run in ready for group in run.completed]
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
                self._grant(run, request)
            except (BudgetExhausted, UsageError) as refusal:
                self.recorder.refuse(run.tree, request, str(refusal))
                error = refusal

    def _grant(self, run: Run, request: Request) -> None:
        """Check, price and begin a request, whole or not at all."""
        parts = flatten(request)
        for part in parts:
            if type(part) not in HANDLERS:
                raise UsageError(f"{run.name} yielded {part!r}; requests are {', '.join(kind.__name__ for kind in HANDLERS)} and Gather")
            HANDLERS[type(part)].check(run, part)
        quote = Quote(run)
        for part in parts:
            HANDLERS[type(part)].price(quote, part)
        budget = run.tree.budget
        if budget.remaining is not None:
            reserve = 0 if run.finishing else quote.reserve()
            if quote.nfe + reserve > budget.remaining:
                raise BudgetExhausted(
                    f"{type(request).__name__} costs {quote.nfe} NFE and finishing a sample after it {reserve}, but {budget.remaining} of {budget.limit} are left",
                    price=quote.nfe,
                    remaining=budget.remaining,
                )
        if quote.nfe and not run.finishing and self.limits.seconds is not None and time.perf_counter() - self._started >= self.limits.seconds:
            raise BudgetExhausted(f"the {self.limits.seconds:g} seconds are over", price=quote.nfe, remaining=None)
        budget.spent += quote.nfe
        run.group = begin(self, run, request)

    def _returned(self, run: Run, node: Node | None) -> None:
        """A policy (or the finisher) returned: accept its answer, or finish a sample for it."""
        last = run.tree.schedule.last
        if node is not None:
            if not isinstance(node, Node) or node.level != last or node.draft or node.failed:
                self._end(run, UsageError(f"{run.name} returned {node!r}; return a finished node (level {last}), normally tree.best()"))
                return
            if run.steering.scope == "row" or run.finishing:
                run.answer = node
                self._end(run)
                return
        if run.finishing:
            failed = [n.index for n in run.tree.nodes if n.failed]
            reasons = sorted({n.reason for n in run.tree.nodes if n.reason})
            self._end(run, SearchFailed(f"no sample could be finished: nodes {failed[:8]} failed ({'; '.join(reasons[:3]) or 'none was left to grow'})"))
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
        if run.answer is not None:
            self._picture(run, run.answer)
        del self.live[run.number]
        run.seconds = time.perf_counter() - run.started_at
        if run.on_end is not None:
            with self.timed("store"):
                run.on_end(run)
        for node in run.tree.nodes:
            run.close(node)
            self.store.drop(run.key("node", node.index))
        for index in range(len(run.tree.roots)):
            self.store.drop(run.key("noise", index))
        self.progress()

    def _picture(self, run: Run, node: Node) -> None:
        """Decode the answer unless scoring it has."""
        model = run.bindings[None].model
        if model.media is None or (run.picture is not None and run.picture[0] is node):
            return
        run.picture = None

        def keep(pixels: Tensor | None, reason: str | None) -> None:
            if pixels is not None:
                run.picture = (node, pixels.cpu())
            else:
                node.note["image"] = reason

        self._decode([Decode(run, model, self.store.get(run.key("node", node.index))["latent"], keep)])

    # Predictions and chains --------------------------------------------------------------------------------------

    def predict(self, run: Run, node: Node, model: str | None, then: Callable[[Tensor, Tensor | None], None], failed: Callable[[str], None]) -> None:
        """Call `then` with the raw outputs of a model at a node, evaluated at most once while the node is open."""
        if run.has_prediction(node, model):
            kept = self.store.get(run.key("prediction", node.index, model))
            then(kept["cond"], kept.get("uncond"))
            return
        key = (run.number, node.index, model)
        if key in self.predicting:
            self.predicting[key].append((then, failed))
            return
        self.predicting[key] = [(then, failed)]

        def arrived(cond: Tensor, uncond: Tensor | None) -> None:
            run.predict_done(node, model, {"cond": cond} if uncond is None else {"cond": cond, "uncond": uncond})
            for waiter, _ in self.predicting.pop(key):
                waiter(cond, uncond)

        def broke(reason: str) -> None:
            for _, waiter in self.predicting.pop(key):
                waiter(reason)

        latents = self.store.get(run.key("node", node.index))["latent"]
        self.evaluate(Evaluation(run, run.bindings[model], node.level, latents, node, arrived, broke))

    def evaluate(self, evaluation: Evaluation) -> None:
        """Queue the rows of an evaluation."""
        run, binding = evaluation.run, evaluation.binding
        assert binding.encoded is not None
        key = (id(binding.model), run.tree.schedule.key, run.shape, binding.encoded.bucket)
        if key not in self.buckets:
            limit = self.limits.network or (8 if self.limits.deterministic else None)
            self.buckets[key] = Bucket(binding.sampler(run.tree), limit)
        rows = evaluation.rows
        evaluation.outputs = [None] * len(rows)
        remaining = run.tree.schedule.last - evaluation.level
        for branch in range(len(rows)):
            heapq.heappush(self.buckets[key].rows, (-remaining, next(self._order), evaluation, branch))

    def start(self, chain: Chain, parent: Node) -> None:
        """Begin a denoise at a node."""

        def failed(reason: str) -> None:
            chain.run.fail(chain.child, reason)
            chain.then()

        self.predict(chain.run, parent, chain.binding.name, lambda cond, uncond: self.steps.append(Step(chain, cond, uncond)), failed)

    def _continue(self, chain: Chain) -> None:
        """Evaluate a chain's latents between two nodes."""

        def failed(reason: str) -> None:
            chain.run.fail(chain.child, reason)
            chain.then()

        level = chain.next if chain.stage else chain.level
        self.evaluate(
            Evaluation(
                chain.run, chain.binding, level, chain.latents, chain.child, lambda cond, uncond: self.steps.append(Step(chain, cond, uncond)), failed
            )
        )

    # Arithmetic --------------------------------------------------------------------------------------------------

    def _compute(self) -> bool:
        """Do all steps and estimates that are ready: cheap, so never worth waiting with."""
        if not self.steps and not self.estimates:
            return False
        with self.timed("step"):
            steps, self.steps = self.steps, []
            for group in _grouped(steps, lambda s: (id(s.chain.sampler), s.chain.stage, s.uncond is None, len(s.chain.history))):
                self._step(group)
            estimates, self.estimates = self.estimates, []
            for part in _grouped(estimates, lambda e: (id(e.binding.sampler(e.run.tree)), e.uncond is None)):
                self._estimate(part)
        return True

    def _guided(self, sampler: Sampler, items: Sequence[Step | Estimate], runs: Sequence[Run]) -> Tensor:
        import torch

        cond = torch.stack([item.cond for item in items])
        if items[0].uncond is None:
            return cond
        uncond = torch.stack([item.uncond for item in items if item.uncond is not None])
        return sampler.guide(cond, uncond, [run.guidance.scale for run in runs], [run.guidance.rescale for run in runs])

    def _step(self, steps: Sequence[Step]) -> None:
        """Advance chains of one sampler by one stage."""
        import torch

        chains = [step.chain for step in steps]
        sampler, stage = chains[0].sampler, chains[0].stage
        levels, nexts = [chain.level for chain in chains], [chain.next for chain in chains]
        output = self._guided(sampler, steps, [chain.run for chain in chains])
        latents = torch.stack([chain.latents for chain in chains])
        self._capture(chains, latents, output)
        noise = None
        if sampler.solver.stochastic and stage == 0:
            with self.timed("noise"):
                drawn = torch.stack([torch.from_numpy(chain.draw()) for chain in chains], dim=1)
            noise = self.to_device(drawn)
        history = tuple(torch.stack(column) for column in zip(*(chain.history for chain in chains), strict=True))
        state = StepState(latents, history, [chain.history_level for chain in chains])
        state = sampler.advance(state, stage, levels, nexts, output, noise)
        rows = state.latents.unbind(0)
        columns = [column.unbind(0) for column in state.history]
        schedule = sampler.schedule
        ending = [schedule.step_cost(n, sampler.solver.stages) <= stage + 1 and n == chain.levels[-1] for chain, n in zip(chains, nexts, strict=True)]
        finite = torch.isfinite(state.latents).flatten(1).all(1).tolist() if any(ending) else []
        for i, chain in enumerate(chains):
            chain.latents = rows[i]
            chain.history = tuple(column[i] for column in columns)
            chain.history_level = state.history_levels[i] if state.history_levels else -1
            if schedule.step_cost(nexts[i], sampler.solver.stages) > stage + 1:
                chain.stage = stage + 1
                self._continue(chain)
                continue
            chain.stage = 0
            chain.position += 1
            if not ending[i]:
                self._continue(chain)
                continue
            if finite[i]:
                self._settle(chain)
            else:
                chain.run.fail(chain.child, f"the latent is not finite at level {nexts[i]}")
            chain.then()

    def _settle(self, chain: Chain) -> None:
        """A chain has reached its child: keep the latent and what the solver remembers."""
        tensors = {"latent": chain.latents} | chain.captured
        if chain.child.level < chain.run.tree.schedule.last:
            tensors |= {f"history{i}": column for i, column in enumerate(chain.history)}
        chain.run.settle(chain.child, tensors, arrived=chain.levels[-1] - chain.levels[-2] == 1, history_level=chain.history_level)

    def _capture(self, chains: Sequence[Chain], latents: Tensor, output: Tensor) -> None:
        """Remember clean estimates that a verifier wants of ancestors, in passing and at no cost."""
        for i, chain in enumerate(chains):
            for name, level in chain.run.ancestor_levels.items():
                if chain.stage == 0 and name not in chain.captured and chain.level >= level:
                    chain.captured[name] = chain.sampler.x0(latents[i : i + 1], [chain.level], output[i : i + 1])[0]

    def _estimate(self, estimates: Sequence[Estimate]) -> None:
        """Form clean estimates."""
        import torch

        sampler = estimates[0].binding.sampler(estimates[0].run.tree)
        output = self._guided(sampler, estimates, [item.run for item in estimates])
        x0 = sampler.x0(torch.stack([item.latents for item in estimates]), [item.level for item in estimates], output)
        for item, row in zip(estimates, x0.unbind(0), strict=True):
            item.then(row)

    # Scores ------------------------------------------------------------------------------------------------------

    def decode(self, item: Decode) -> None:
        """Queue a decode."""
        self.decodes.setdefault((id(item.model), tuple(item.x0.shape)), deque()).append(item)

    def judge(self, item: Judgement) -> None:
        """Queue candidates for a verifier."""
        self.judgements.setdefault(id(item.verifier), deque()).append(item)

    def keep_picture(self, run: Run, node: Node, pixels: Tensor) -> None:
        """Keep the pixels of the best finished node so far, so that the answer is not decoded again."""
        score = node.score(run.tree.verifier)
        if score is None or node.draft:
            return
        best = run.picture[0] if run.picture is not None else None
        held = best.score(run.tree.verifier) if best is not None else None
        if best is None or held is None or (score, -node.index) > (held, -best.index):
            run.picture = (node, pixels.cpu())

    # Batches -----------------------------------------------------------------------------------------------------

    def _launch(self, *, full: bool) -> bool:
        """Run the fullest batch; with `full`, only one that fills its row count."""
        for bucket in self.buckets.values():
            if bucket.rows and bucket.limit is None:
                self._calibrate(bucket)
        ready: list[tuple[float, int, Callable[[], None]]] = []
        for bucket in self.buckets.values():
            ready.append((len(bucket.rows) / (bucket.limit or 1), 2, lambda bucket=bucket: self._evaluate(bucket)))  # type: ignore[misc]
        for decodes in self.decodes.values():
            ready.append((len(decodes) / self.decode_limit, 1, lambda decodes=decodes: self._decode(_take(decodes, self.decode_limit))))  # type: ignore[misc]
        for judgements in self.judgements.values():
            ready.append((len(judgements) / self.verify_limit, 0, lambda judgements=judgements: self._verify(judgements)))  # type: ignore[misc]
        fullness, _, launch = max(ready, default=(0.0, 0, None), key=lambda entry: entry[:2])
        if launch is None or fullness == 0.0 or (full and fullness < 1.0):
            return False
        launch()
        self.progress()
        return True

    def _calibrate(self, bucket: Bucket) -> None:
        evaluation, branch = bucket.rows[0][2:]
        if self.expected_rows < CALIBRATION_ROWS:
            bucket.limit = 16
            return

        def probe(rows: int) -> None:
            latents = evaluation.latents.expand(rows, *evaluation.latents.shape).contiguous()
            self.ledger.probe += rows
            bucket.sampler.evaluate(latents, [evaluation.level] * rows, [evaluation.rows[branch]] * rows)

        with self.timed("calibrate"):
            bucket.limit = calibrate(probe, device=self.store.device)

    def _evaluate(self, bucket: Bucket) -> None:
        """One network call, and what follows from the evaluations that it completes."""
        assert bucket.limit is not None
        taken = [heapq.heappop(bucket.rows)[2:] for _ in range(min(bucket.limit, len(bucket.rows)))]
        taken = [(evaluation, branch) for evaluation, branch in taken if not evaluation.over]
        if not taken:
            return

        def call(items: Sequence[tuple[Evaluation, int]]) -> list[Tensor]:
            import torch

            padded = [*items, *[items[0]] * (bucket.limit - len(items))] if self.limits.deterministic and bucket.limit else items
            latents = torch.stack([evaluation.latents for evaluation, _ in padded])
            levels = [evaluation.level for evaluation, _ in padded]
            rows = [evaluation.rows[branch] for evaluation, branch in padded]
            before = self.ledger.retried
            self.ledger.retried += len(padded)  # until the call has succeeded
            outputs = bucket.sampler.evaluate(latents, levels, rows)
            self.ledger.retried = before
            self.ledger.rows += len(items)
            self.ledger.padding += len(padded) - len(items)
            self.ledger.batches += 1
            return list(outputs.unbind(0)[: len(items)])

        def shrink(size: int) -> None:
            bucket.limit = size

        with self.timed("network"):
            outputs = self._attempt("network", taken, call, shrink)
        for (evaluation, branch), output in zip(taken, outputs, strict=True):
            if isinstance(output, str):
                if not evaluation.over:
                    evaluation.over = True
                    evaluation.failed(output)
                continue
            evaluation.run.tree.ledger.rows += 1
            evaluation.outputs[branch] = output
            if not evaluation.over and all(part is not None for part in evaluation.outputs):
                evaluation.over = True
                evaluation.run.tree.ledger.nfe += 1
                evaluation.owner.nfe += 1
                cond, *uncond = evaluation.outputs
                assert cond is not None
                evaluation.then(cond, uncond[0] if uncond else None)

    def _decode(self, items: Sequence[Decode]) -> None:
        """One decoder call."""

        def call(batch: Sequence[Decode]) -> list[Tensor]:
            import torch

            padded = self._padded(batch, self.limits.decode)
            pixels = batch[0].model.decode(torch.stack([item.x0 for item in padded])).pixels
            return list(pixels.unbind(0)[: len(batch)])

        def shrink(size: int) -> None:
            self.decode_limit = size

        with self.timed("decode"):
            results = self._attempt("decode", items, call, shrink)
        for item, pixels in zip(items, results, strict=True):
            item.run.tree.ledger.decodes += 1
            if isinstance(pixels, str):
                item.then(None, pixels)
            else:
                item.then(pixels, None)

    def _verify(self, waiting: deque[Judgement]) -> None:
        """One verifier call: a batch of rows, or one whole set."""
        verifier = waiting[0].verifier
        items = [waiting.popleft()] if verifier.scope == "set" else _take(waiting, self.verify_limit)
        for item in items:
            for candidate in item.candidates:
                candidate.run.tree.ledger.verifier_calls[verifier.name] += 1
        if verifier.latency == "pending":
            self._ask(verifier, items)
            return

        def call(batch: Sequence[Judgement]) -> list[list[Value]]:
            rows = [candidate for item in batch for candidate in item.candidates]
            padded = rows if verifier.scope == "set" else self._padded(rows, self.limits.verify)
            values = _values(verifier, verifier.score(CandidateBatch(padded)), len(padded))
            shares = iter(values)
            return [[next(shares) for _ in item.candidates] for item in batch]

        def shrink(size: int) -> None:
            self.verify_limit = size

        with self.timed("verify"):
            results = self._attempt(f"verifier {verifier.name}", items, call, shrink)
        for item, values in zip(items, results, strict=True):
            item.then([Value(None, reason=values)] * len(item.candidates) if isinstance(values, str) else values)

    def _ask(self, verifier: Verifier, items: Sequence[Judgement]) -> None:
        """Ask a pending verifier; the tree waits, the others go on."""
        if not isinstance(verifier, PendingVerifier):
            raise UsageError(f"verifier {verifier.name} says that its latency is pending but has no method `ask`")
        waiting: dict[str, list[Callable[[Value], None]]] = {}
        for item in items:
            values: list[Value | None] = [None] * len(item.candidates)
            for i, candidate in enumerate(item.candidates):
                self.unanswered += 1
                waiting.setdefault(f"{candidate.node.id:032x}", []).append(self._answer(verifier, item, values, i, candidate))

        def answer(node_id: str, score: float | None, reason: str | None = None) -> None:
            for deliver in waiting.pop(node_id, []):
                self.answers.put((deliver, _checked(verifier, score, reason)))

        verifier.ask(CandidateBatch([candidate for item in items for candidate in item.candidates]), answer)

    def _answer(self, verifier: Verifier, item: Judgement, values: list[Value | None], i: int, candidate: Candidate) -> Callable[[Value], None]:
        def deliver(value: Value) -> None:
            self.recorder.answer(candidate.run.tree, candidate.node, verifier.name, value.score)
            values[i] = value
            if all(known is not None for known in values):
                item.then([known for known in values if known is not None])

        return deliver

    def _hear(self, *, wait: bool = False) -> bool:
        """Take the answers that have arrived; with `wait`, until there is one."""
        heard = False
        while self.unanswered:
            try:
                deliver, value = self.answers.get(block=wait and not heard)
            except queue.Empty:
                break
            self.unanswered -= 1
            deliver(value)
            heard = True
        return heard

    def _padded(self, items: Sequence[T], rows: int) -> Sequence[T]:
        """A batch of exactly `rows` when deterministic: padding repeats a real row."""
        return [*items, *[items[0]] * (rows - len(items))] if self.limits.deterministic else items

    def _attempt(self, stage: str, items: Sequence[T], call: Callable[[Sequence[T]], list[Any]], shrink: Callable[[int], None]) -> list[Any]:
        """Run a batch; out of memory halves it, any other error is narrowed down to its rows.

        Returns:
          One result for each item: what `call` gave, or the reason as a string.
        """
        try:
            return call(items)
        except Exception as error:
            if is_out_of_memory(error):
                if self.limits.deterministic:
                    option = "--max-batch" if stage == "network" else "max_batch"
                    raise SetupError(f"out of memory in a {stage} call of {len(items)} rows; deterministic mode keeps its row count, so set a smaller one ({option})") from error
                if len(items) > 1:
                    half = (len(items) + 1) // 2
                    shrink(half)
                    log.warning("out of memory in the %s: continuing with %d rows a call", stage, half)
                    return self._attempt(stage, items[:half], call, shrink) + self._attempt(stage, items[half:], call, shrink)
            elif len(items) > 1:
                return [result for item in items for result in self._attempt(stage, [item], call, shrink)]
            log.debug("%s failed", stage, exc_info=error)
            return [f"{stage} failed: {type(error).__name__}: {error}"]

    # Helpers -----------------------------------------------------------------------------------------------------

    def to_device(self, array: Any) -> Tensor:
        """A numpy array or tensor on the store's device."""
        import torch

        tensor = array if isinstance(array, torch.Tensor) else torch.from_numpy(array)
        return tensor.to(self.store.device)

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Book wall time on a stage; a stage inside another is booked on its own only."""
        self._clock(stage)
        try:
            yield
        finally:
            self._clock(None)

    def _clock(self, stage: str | None) -> None:
        """Enter a stage, or leave the current one (None); the stage around it stands still meanwhile."""
        now = time.perf_counter()
        if self._stages:
            self.ledger.seconds[self._stages[-1]] += now - self._stage_since
        if stage is None:
            self._stages.pop()
        else:
            self._stages.append(stage)
        self._stage_since = now


def _grouped(items: Sequence[T], key: Callable[[T], Hashable]) -> list[list[T]]:
    groups: dict[Hashable, list[T]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return list(groups.values())


def _take(items: deque[T], most: int) -> list[T]:
    return [items.popleft() for _ in range(min(most, len(items)))]


def _values(verifier: Verifier, scores: Scores, rows: int) -> list[Value]:
    """A verifier's answer as values; NaN and infinities become failures of their row."""
    numbers = _floats(verifier, scores.values, rows)
    parts = {name: _floats(verifier, column, rows) for name, column in scores.parts.items()}
    return [
        _checked(verifier, number, scores.reasons.get(i), {name: column[i] for name, column in parts.items()} or None)
        for i, number in enumerate(numbers)
    ]


def _floats(verifier: Verifier, numbers: Any, rows: int) -> list[float]:
    # One transfer for a whole batch, where the scores are on a device.
    values = [float(number) for number in (numbers.tolist() if hasattr(numbers, "tolist") else numbers)]
    if len(values) != rows:
        raise UsageError(f"verifier {verifier.name} gave {len(values)} scores for {rows} candidates; give one for each, in order")
    return values


def _checked(verifier: Verifier, score: float | None, reason: str | None, parts: dict[str, float] | None = None) -> Value:
    if score is None or score != score or score in (float("inf"), float("-inf")):
        return Value(None, reason=reason or f"{verifier.name} gave {score}")
    finite = {name: value for name, value in (parts or {}).items() if value == value and abs(value) != float("inf")}
    return Value(score, finite or None, reason)
