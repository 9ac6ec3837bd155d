"""Work in full batches: network rows of all trees and levels, decodes, and verifier calls.

A batch that fails is narrowed down: out of memory halves it, any other error is traced to the rows that cause it, so
that one bad row fails one node.
"""

from __future__ import annotations

import heapq
import logging
import queue
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import TYPE_CHECKING, Any, TypeVar

from tsdiff.treesearch.calibrate import calibrate, is_out_of_memory
from tsdiff.treesearch.errors import SetupError, UsageError
from tsdiff.treesearch.ledger import EngineLedger
from tsdiff.treesearch.node import Value
from tsdiff.treesearch.protocols import (
    CompiledModel,
    EstimateDecoder,
    PendingVerifier,
    Recorder,
    Sampler,
    Scores,
    Verifier,
)
from tsdiff.treesearch.stopwatch import Stopwatch
from tsdiff.treesearch.work import Candidate, CandidateBatch, Decode, Evaluation, Judgement

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")
log = logging.getLogger("tsdiff")

CONSTANT_ROWS = 8
"""Rows of every network call in deterministic mode, and of a compiled network, unless fewer are asked for."""

CALIBRATION_ROWS = 500
"""Searches expected to need fewer network rows than this do not spend any on measuring the best batch size."""

DEFAULT_ROWS = 16
"""Rows of a network call where they were not measured."""


VERIFY_ROWS = 16
"""Rows of a verifier call where they were not measured."""

MEASURED_WAITING = 64
"""A verifier on an accelerator is worth measuring once as many candidates wait for it; on a CPU larger batches gain nothing."""


@dataclass(frozen=True)
class Limits:
    """How the engine may use the machine.

    Attributes:
      deterministic: one fixed row count for every call, never calibrated; out of memory is an error.
      network, decode, verify: rows a call at most (and, when deterministic, exactly). `network` None is
        `CONSTANT_ROWS` then, and otherwise calibrated: the smallest batch within 95 % of the best throughput. So is each verifier's on an accelerator, if `verify`
        is what it is by default; what runs out of memory shrinks for that verifier alone.
      host_bytes, device_bytes: memory for latents before the least recently used move out.
      seconds: no request is granted after this long; None for no limit.
    """

    deterministic: bool = False
    network: int | None = None
    decode: int = 8
    verify: int = VERIFY_ROWS
    host_bytes: int = 4 << 30
    device_bytes: int = 4 << 30
    seconds: float | None = None

    def __post_init__(self) -> None:
        if self.deterministic and self.network is None:
            object.__setattr__(self, "network", CONSTANT_ROWS)


class PlaceMatters(SetupError):
    """Equal rows of one batch gave unequal results, so that bytes depend on what else the batch holds."""


@dataclass
class Bucket:
    """Network rows that fit in one batch, the longest remaining work first."""

    sampler: Sampler
    limit: int | None
    constant: bool = False  # whether every call has exactly `limit` rows
    fresh: bool = True  # whether there was no call yet
    rows: list[tuple[int, int, Evaluation, int]] = field(default_factory=list)


@dataclass(frozen=True)
class Broken:
    """What became of a row that could not be computed."""

    reason: str
    error: Exception


class Batches:
    """The queues of work, and the calls that empty them.

    Args:
      limits: rows a call may have.
      device: where the models are.
      ledger: what to count on.
      recorder: told of pending verifiers' answers.
      timed: books the time of every call.
      expected_rows: how many network rows the search may need, to decide whether calibrating pays.
      progress: called after every call.
    """

    def __init__(
        self,
        limits: Limits,
        device: str,
        ledger: EngineLedger,
        recorder: Recorder,
        timed: Stopwatch,
        *,
        expected_rows: int = 0,
        progress: Callable[[], None] = lambda: None,
    ) -> None:
        self.limits = limits
        self.device = device
        self.ledger = ledger
        self.recorder = recorder
        self.timed = timed
        self.expected_rows = expected_rows
        self.progress = progress
        self.buckets: dict[Hashable, Bucket] = {}
        self.decodes: dict[Hashable, deque[Decode]] = {}
        self.judgements: dict[int, deque[Judgement]] = {}
        self.decode_limit = limits.decode
        self.verify_limits: dict[int, int] = {}  # by the verifier's id
        self.answers: queue.SimpleQueue[tuple[Callable[[Value], None], Value]] = queue.SimpleQueue()
        self.unanswered = 0
        self._order = count()

    @property
    def has_room(self) -> bool:
        """Whether another tree's rows would fill batches: less than two full ones are ready."""
        ready = sum(len(bucket.rows) for bucket in self.buckets.values())
        return ready < (sum(2 * (bucket.limit or DEFAULT_ROWS) for bucket in self.buckets.values()) or 1)

    def evaluate(self, evaluation: Evaluation) -> None:
        """Queue the rows of an evaluation."""
        run, binding = evaluation.run, evaluation.binding
        assert binding.encoded is not None
        key = (id(binding.model), run.tree.schedule.key, run.shape, binding.encoded.bucket)
        if key not in self.buckets:
            compiled = isinstance(binding.model, CompiledModel) and binding.model.constant_rows
            limit = self.limits.network or (CONSTANT_ROWS if compiled else None)
            self.buckets[key] = Bucket(binding.sampler(run.tree), limit, self.limits.deterministic or compiled)
        rows = evaluation.rows
        evaluation.outputs = [None] * len(rows)
        remaining = run.tree.schedule.last - evaluation.level
        for branch in range(len(rows)):
            heapq.heappush(self.buckets[key].rows, (-remaining, next(self._order), evaluation, branch))

    def decode(self, item: Decode) -> None:
        """Queue a decode."""
        self.decodes.setdefault((id(item.model), _is_apart(item), tuple(item.x0.shape)), deque()).append(item)

    def decode_now(self, item: Decode) -> None:
        """Decode one clean latent without waiting for others."""
        self._decode([item])

    def judge(self, item: Judgement) -> None:
        """Queue candidates for a verifier."""
        self.judgements.setdefault(id(item.verifier), deque()).append(item)

    def launch(self, *, full: bool) -> bool:
        """Run the fullest batch; with `full`, only one that fills its row count."""
        for bucket in self.buckets.values():
            if bucket.rows and bucket.limit is None:
                self._calibrate(bucket)
        for judgements in self.judgements.values():
            if len(judgements) >= MEASURED_WAITING:
                self._measure(judgements[0])
        ready: list[tuple[float, int, Callable[[], None]]] = []
        for bucket in self.buckets.values():
            ready.append((len(bucket.rows) / (bucket.limit or 1), 2, lambda bucket=bucket: self._evaluate(bucket)))  # type: ignore[misc]
        for decodes in self.decodes.values():
            ready.append((len(decodes) / self.decode_limit, 1, lambda decodes=decodes: self._decode(_take(decodes, self.decode_limit))))  # type: ignore[misc]
        for judgements in filter(None, self.judgements.values()):
            ready.append((len(judgements) / self._verify_rows(judgements[0].verifier), 0, lambda judgements=judgements: self._verify(judgements)))  # type: ignore[misc]
        fullness, _, launch = max(ready, default=(0.0, 0, None), key=lambda entry: entry[:2])
        if launch is None or fullness == 0.0 or (full and fullness < 1.0):
            return False
        launch()
        self.progress()
        return True

    def _calibrate(self, bucket: Bucket) -> None:
        evaluation, branch = bucket.rows[0][2:]
        if self.expected_rows < CALIBRATION_ROWS:
            bucket.limit = DEFAULT_ROWS
            return

        def probe(rows: int) -> None:
            latents = evaluation.latents.expand(rows, *evaluation.latents.shape).contiguous()
            self.ledger.probe += rows
            bucket.sampler.evaluate(latents, [evaluation.level] * rows, [evaluation.rows[branch]] * rows)

        with self.timed("calibrate"):
            try:
                bucket.limit = calibrate(probe, device=self.device)
            except Exception as error:  # of the row that was measured: its own evaluation will tell, and fail its node only
                log.debug("calibration failed", exc_info=error)
                bucket.limit = DEFAULT_ROWS

    def _verify_rows(self, verifier: Verifier) -> int:
        """Rows of a call of a verifier, at most."""
        return self.verify_limits.get(id(verifier), self.limits.verify)

    def _measure(self, item: Judgement) -> None:
        """Find a verifier's best batch, by one candidate many times; no answer is kept and nothing is counted."""
        verifier, row = item.verifier, item.candidates[0]
        own = getattr(verifier, "device", "auto")
        device = own if isinstance(own, str) and own != "auto" else self.device
        fixed = self.limits.deterministic or self.limits.verify != VERIFY_ROWS or id(verifier) in self.verify_limits
        if fixed or device == "cpu" or verifier.scope == "set" or verifier.latency == "pending":
            return

        def call(rows: int) -> None:
            verifier.score(CandidateBatch([row] * rows))

        with self.timed("calibrate"):
            try:
                self.verify_limits[id(verifier)] = calibrate(call, device=device)
            except Exception as error:  # of the row that was measured: its own judgement will tell
                log.debug("calibration of %s failed", verifier.name, exc_info=error)
                self.verify_limits[id(verifier)] = VERIFY_ROWS

    def _evaluate(self, bucket: Bucket) -> None:
        """One network call, and what follows from the evaluations that it completes."""
        assert bucket.limit is not None
        # The first call of deterministic mode has a filled-up row in any case, which shows whether places matter.
        most = max(bucket.limit - 1, 1) if bucket.fresh and self.limits.deterministic else bucket.limit
        bucket.fresh = False
        taken = [heapq.heappop(bucket.rows)[2:] for _ in range(min(most, len(bucket.rows)))]
        taken = [(evaluation, branch) for evaluation, branch in taken if not evaluation.over]
        if not taken:
            return

        def call(items: Sequence[tuple[Evaluation, int]]) -> list[Tensor]:
            import torch

            padded = [*items, *[items[0]] * (bucket.limit - len(items))] if bucket.constant and bucket.limit else items
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
            self._require_equal("network", len(padded), _all_equal(outputs, len(items)))
            return list(outputs.unbind(0)[: len(items)])

        def shrink(size: int) -> None:
            bucket.limit = size

        with self.timed("network"):
            outputs = self._attempt("network", taken, call, shrink)
        for (evaluation, branch), output in zip(taken, outputs, strict=True):
            if isinstance(output, Broken):
                if not evaluation.over:
                    evaluation.over = True
                    evaluation.run.blame(output.error)
                    evaluation.failed(output.reason)
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
            model: Any = batch[0].model
            decode = model.decode_estimates if _is_apart(batch[0]) else model.decode
            media = decode(torch.stack([item.x0 for item in padded]))
            if media.kind != model.media or media.pixels.dim() != (5 if media.kind == "video" else 4):
                raise UsageError(f"model {model.name!r}, whose media is {model.media!r}, decoded {media.kind!r} of shape {tuple(media.pixels.shape)}; images are (B, 3, H, W), videos (B, F, 3, H, W)")
            self._require_equal("decode", len(padded), _all_equal(media.pixels, len(batch)))
            return list(media.pixels.unbind(0)[: len(batch)])

        def shrink(size: int) -> None:
            self.decode_limit = size

        with self.timed("decode"):
            results = self._attempt("decode", items, call, shrink)
        for item, pixels in zip(items, results, strict=True):
            item.run.tree.ledger.decodes += 1
            if isinstance(pixels, Broken):
                item.run.blame(pixels.error)
                item.then(None, pixels.reason)
            else:
                item.then(pixels, None)

    def _verify(self, waiting: deque[Judgement]) -> None:
        """One verifier call: a batch of rows, or one whole set."""
        verifier = waiting[0].verifier
        items = [waiting.popleft()] if verifier.scope == "set" else _take(waiting, self._verify_rows(verifier))
        for item in items:
            for candidate in item.candidates:
                candidate.run.tree.ledger.verifier_calls[verifier.name] += 1
        if verifier.latency == "pending":
            # Node ids are unique within a tree only, and a node may be asked about as it is and by its look-ahead.
            asks = [(item.candidates[0].run, item.candidates[0].suffix) for item in items]
            for ask in dict.fromkeys(asks):
                self._ask(verifier, [item for item, its in zip(items, asks, strict=True) if its == ask])
            return

        def call(batch: Sequence[Judgement]) -> list[list[Value]]:
            rows = [candidate for item in batch for candidate in item.candidates]
            padded = rows if verifier.scope == "set" else self._padded(rows, self.limits.verify)
            values = _score(verifier, padded)
            self._require_equal(f"verifier {verifier.name}", len(padded), all(value == values[0] for value in values[len(rows) :]))
            shares = iter(values)
            return [[next(shares) for _ in item.candidates] for item in batch]

        def shrink(size: int) -> None:
            self.verify_limits[id(verifier)] = size

        with self.timed("verify"):
            results = self._attempt(f"verifier {verifier.name}", items, call, shrink)
        for item, values in zip(items, results, strict=True):
            if isinstance(values, Broken):
                for candidate in item.candidates:
                    candidate.run.blame(values.error)
                item.then([Value(None, reason=values.reason)] * len(item.candidates))
            else:
                item.then(values)

    def _ask(self, verifier: Verifier, items: Sequence[Judgement]) -> None:
        """Ask a pending verifier; the tree waits, the others go on."""
        if not isinstance(verifier, PendingVerifier):
            raise UsageError(f"verifier {verifier.name} says that its latency is pending but has no method `ask`")
        waiting: dict[str, list[Callable[[Value], None]]] = {}
        asked: list[Candidate] = []
        for item in items:
            values: list[Value | None] = [None] * len(item.candidates)
            for i, candidate in enumerate(item.candidates):
                deliver = self._answer(verifier, item, values, i, candidate)
                known = self.recorder.answered(candidate.run, candidate.node, verifier.name + candidate.suffix)
                self.unanswered += 1
                if known is not None:
                    self.answers.put((deliver, known))
                    continue
                waiting.setdefault(f"{candidate.node.id:032x}", []).append(deliver)
                asked.append(candidate)

        def answer(node_id: str, score: float | None, reason: str | None = None, parts: dict[str, float] | None = None) -> None:
            for deliver in waiting.pop(node_id, []):
                self.answers.put((deliver, _checked(verifier, score, reason, parts)))

        if not asked:
            return
        try:
            verifier.ask(CandidateBatch(asked), answer)
        except Exception as error:
            log.debug("verifier %s failed", verifier.name, exc_info=error)
            items[0].candidates[0].run.blame(error)
            for node_id in list(waiting):
                answer(node_id, None, f"verifier {verifier.name} failed: {type(error).__name__}: {error}")

    def _answer(self, verifier: Verifier, item: Judgement, values: list[Value | None], i: int, candidate: Candidate) -> Callable[[Value], None]:
        def deliver(value: Value) -> None:
            self.recorder.answer(candidate.run, candidate.node, verifier.name + candidate.suffix, value)
            values[i] = value
            if all(known is not None for known in values):
                item.then([known for known in values if known is not None])

        return deliver

    def hear(self, *, wait: float = 0.0) -> bool:
        """Take the answers that have arrived; where there is none, wait that many seconds for one."""
        heard = False
        while self.unanswered:
            try:
                deliver, value = self.answers.get(block=wait > 0.0 and not heard, timeout=wait or None)
            except queue.Empty:
                break
            self.unanswered -= 1
            deliver(value)
            heard = True
        return heard

    def _padded(self, items: Sequence[T], rows: int) -> Sequence[T]:
        """A batch of exactly `rows` when deterministic: padding repeats a real row."""
        return [*items, *[items[0]] * (rows - len(items))] if self.limits.deterministic else items

    def _require_equal(self, stage: str, rows: int, equal: bool) -> None:
        """In deterministic mode, end the search if a row that was filled up, a copy of the first, has another result than the first."""
        if self.limits.deterministic and not equal:
            raise PlaceMatters(
                f"equal rows of one {stage} call of {rows} gave unequal results, so that the bytes of a tree would depend on what shares its batches; "
                "deterministic mode needs another row count on this machine: set max_batch (powers of two fare best, and 1 always does), or leave the mode"
            )

    def _attempt(self, stage: str, items: Sequence[T], call: Callable[[Sequence[T]], list[Any]], shrink: Callable[[int], None]) -> list[Any]:
        """Run a batch; out of memory halves it, any other error is narrowed down to its rows.

        Returns:
          One result for each item: what `call` gave, or `Broken`.
        """
        try:
            return call(items)
        except PlaceMatters:
            raise
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
            elif len(items) > 1:  # a mistake of the caller's too: it may be one prompt's
                return [result for item in items for result in self._attempt(stage, [item], call, shrink)]
            log.debug("%s failed", stage, exc_info=error)
            return [Broken(f"{stage} failed: {type(error).__name__}: {error}", error)] * len(items)


def _is_apart(item: Decode) -> bool:
    """Whether a clean estimate is decoded by a decoder of its own."""
    return item.estimated and isinstance(item.model, EstimateDecoder) and item.model.estimate_decoder is not None


def _all_equal(results: Tensor, real: int) -> bool:
    """Whether the results (B, ...) after the first `real` repeat the first, bit for bit (NaN is like NaN)."""
    copies, first = results[real:], results[:1]
    return bool(((copies == first) | (copies.isnan() & first.isnan())).all())


def _take(items: deque[T], most: int) -> list[T]:
    return [items.popleft() for _ in range(min(most, len(items)))]


def _score(verifier: Verifier, rows: Sequence[Candidate]) -> list[Value]:
    """A verifier's values; of videos the means over their key frames, each of which is scored like a picture."""
    views = max((row.views for row in rows), default=1)
    if views == 1:
        return _values(verifier, verifier.score(CandidateBatch(rows)), len(rows))
    each = [_values(verifier, verifier.score(CandidateBatch(rows, view)), len(rows)) for view in range(views)]
    return [_mean([values[i] for values in each[: row.views]]) for i, row in enumerate(rows)]


def _mean(values: Sequence[Value]) -> Value:
    """The mean of the values of a video's key frames; none if one of them has none."""
    reason = next((value.reason for value in values if value.score is None), None)
    scores = [value.score for value in values if value.score is not None]
    if len(scores) < len(values):
        return Value(None, reason=reason)
    names = [name for name in values[0].parts or {} if all(name in (value.parts or {}) for value in values)]
    parts = {name: sum((value.parts or {})[name] for value in values) / len(values) for name in names}
    return Value(sum(scores) / len(scores), parts or None, next((value.reason for value in values if value.reason), None))


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
    finite = {name: value for name, value in (parts or {}).items() if value == value and abs(value) != float("inf")}
    if score is None or score != score or score in (float("inf"), float("-inf")):
        return Value(None, finite or None, reason or f"{verifier.name} gave {score}")
    return Value(score, finite or None, reason)
