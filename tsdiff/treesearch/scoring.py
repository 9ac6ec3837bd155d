"""Requests for values: from a node over its clean estimate (or a look-ahead) and its pixels to a verifier's score."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from tsdiff.treesearch.errors import UsageError, unknown_name
from tsdiff.treesearch.growth import Growth
from tsdiff.treesearch.moves import denoise, estimate, grow
from tsdiff.treesearch.node import Move, Node, Value
from tsdiff.treesearch.protocols import Sampler, Verifier
from tsdiff.treesearch.quote import Quote
from tsdiff.treesearch.requests import Score
from tsdiff.treesearch.run import Draft, Group, Run
from tsdiff.treesearch.video import held
from tsdiff.treesearch.work import Candidate, Decode, Judgement

if TYPE_CHECKING:
    from torch import Tensor


class ScoreHandler:
    """Values."""

    def check(self, run: Run, request: Score) -> None:
        verifier = self._verifier(run, request)
        last = run.tree.schedule.last
        for node in request.group:
            if not (run.finishing and node.level == last and run.owns(node)):  # a released sample may still become the answer
                run.require_open(node, request)
            if verifier.judges == "final" and request.at == "x0" and node.level < last:
                raise UsageError(f"Score: {verifier.name} judges finished samples only, but node {node.index} stands at level {node.level} of {last}; use at='lookahead'")

    def price(self, quote: Quote, request: Score) -> None:
        run = quote.run
        verifier = self._verifier(run, request)
        for node in request.group:
            if node.failed or self._known(node, request, verifier) or node.level == run.tree.schedule.last:
                continue
            if request.at == "x0":
                quote.predict(node, None)
                continue
            sampler, levels, memo = _lookahead(run, node, request)
            if quote.once(memo):
                quote.denoise(node, levels, sampler, None, stops=levels[-1:], draft=True)

    def begin(self, growth: Growth, group: Group, request: Score) -> None:
        run = group.run
        verifier = self._verifier(run, request)
        key = request.key(verifier.name)
        nodes = list(request.group)
        group.reply = lambda: [node.score(key) for node in nodes]
        wanted = list(dict.fromkeys(node for node in nodes if not node.failed and not self._known(node, request, verifier)))
        collector = SetCollector(growth, verifier, len(wanted)) if verifier.scope == "set" else None
        for node in wanted:
            if growth.repeating:
                Scoring(growth, run, node, verifier, key, None).leaf(request)
                continue
            group.add()
            waiting = run.scoring.setdefault((node.index, key, id(collector)), [])
            waiting.append(group)
            if len(waiting) > 1:
                continue  # being scored already, for another request of the same Gather
            Scoring(growth, run, node, verifier, key, collector).start(request)

    @staticmethod
    def _verifier(run: Run, request: Score) -> Verifier:
        if request.verifier is None:
            return run.steering
        if request.verifier in run.roles:
            return run.roles[request.verifier]
        if request.verifier not in run.verifiers:
            raise unknown_name("verifier of this search", request.verifier, [*run.roles, *run.verifiers], "Name it when the search starts (--verifier).")
        return run.verifiers[request.verifier]

    @staticmethod
    def _known(node: Node, request: Score, verifier: Verifier) -> bool:
        return verifier.scope == "row" and request.key(verifier.name) in node.values


def _lookahead(run: Run, node: Node, request: Score) -> tuple[Sampler, tuple[int, ...], tuple[Any, ...]]:
    sampler = run.bindings[None].sampler(run.tree, run.tree.solver.ode)
    levels = run.tree.schedule.span(node.level, run.tree.schedule.last, request.num_steps)
    return sampler, levels, (node.index, levels, run.tree.solver.ode, "draft")


def _kept_as(need: str) -> str:
    """The name in the store of what a picture is decoded from."""
    return need.replace("ancestor_images@", "ancestor_x0@")


class Scoring:
    """One node on its way to a value: (look-ahead ->) clean estimate -> pixels -> every verifier concerned."""

    def __init__(self, growth: Growth, run: Run, node: Node, verifier: Verifier, key: str, collector: SetCollector | None) -> None:
        self.growth = growth
        self.run = run
        self.node = node
        self.verifier = verifier
        self.key = key
        self.collector = collector
        self.source = node  # whose clean estimate is judged: the node, or its look-ahead leaf
        self.memo: tuple[Any, ...] = ()
        self.open = 0

    def start(self, request: Score) -> None:
        """Queue the first piece of work."""
        draft = self.leaf(request)
        if draft is None or draft.ready:
            self._estimate()
        else:
            draft.waiting.append(self._estimate)

    def leaf(self, request: Score) -> Draft | None:
        """The look-ahead that a request asks for, on its way; None where the node's own estimate is judged."""
        run, node = self.run, self.node
        if request.at == "x0" or node.level == run.tree.schedule.last:
            return None
        sampler, levels, self.memo = _lookahead(run, node, request)
        draft = run.drafts.get(self.memo)
        if draft is None:
            leaf = grow(run, node, Move("denoise", levels, solver=run.tree.solver.ode), run.tree.stream(node), 0, draft=True)
            draft = run.drafts[self.memo] = Draft(leaf)
            denoise(self.growth, run, [(node, levels, leaf)], sampler, None, None, draft.arrived)
        self.source = draft.leaf
        draft.users += 1
        return draft

    def _estimate(self) -> None:
        if self.source.failed:
            self._fail(self.source.reason or "its look-ahead failed")
            return
        estimate(self.growth, self.run, self.source, self._decode, self._fail)

    def _fail(self, reason: str) -> None:
        if self.source is self.node:
            self.run.fail(self.node, reason)
        self._value(self.key, Value(None, reason=reason))
        if self.collector is not None:
            self.collector.skip()
        self._end()

    @property
    def _finished(self) -> bool:
        """Whether it is a finished sample that is judged."""
        return self.source is self.node and self.node.level == self.run.tree.schedule.last

    def _judges(self) -> list[Verifier]:
        """The verifier asked for; a finished sample that is steered by is scored by all."""
        if not self._finished or self.verifier is not self.run.steering:
            return [self.verifier]
        others = [judge for judge in self.run.verifiers.values() if judge is not self.verifier and judge.name not in self.node.values]
        return [self.verifier, *(judge for judge in others if judge.scope == "row")]

    def _decode(self, x0: Tensor) -> None:
        """Pictures of the estimate and of the ancestors' estimates, as far as they are wanted and there are any."""
        run = self.run
        kept = run.store.get(run.key("node", self.source.index)) | {"images": x0}
        needs = frozenset[str]().union(*(judge.needs for judge in self._judges()))
        wanted = {need: kept[_kept_as(need)] for need in sorted(needs) if need.startswith(("images", "ancestor_images@")) and _kept_as(need) in kept}
        pictures: dict[str, Tensor] = {}
        reasons: dict[str, str] = {}

        def decoded(need: str, pixels: Tensor | None, reason: str | None) -> None:
            if pixels is None:
                reasons[need] = reason or "it could not be decoded"
            else:
                pictures[need] = pixels
                if need == "images":
                    with self.growth.timed("previews"):
                        self.growth.batches.recorder.decoded(run, self.source, pixels)
            if len(pictures) + len(reasons) < len(wanted):
                return
            if "images" in reasons:
                self._value(self.key, Value(None, reason=reasons["images"]))
                if self.collector is not None:
                    self.collector.skip()
                self._end()
            else:
                self._judge(x0, pictures, reasons)

        if not wanted:
            self._judge(x0, pictures, reasons)
        for need, latent in wanted.items():
            self.growth.batches.decode(Decode(run, run.bindings[None].model, latent, partial(decoded, need), not self._finished))

    def _judge(self, x0: Tensor, pictures: dict[str, Tensor], reasons: Mapping[str, str]) -> None:
        run, source = self.run, self.source
        pixels = held(pictures["images"]) if self._finished and "images" in pictures else None
        kept = run.store.get(run.key("node", source.index))
        ancestors = {name: tensor for name, tensor in kept.items() if name.startswith("ancestor_x0@")}
        candidate = Candidate(run, self.node, source.level, kept["latent"], x0, pictures, ancestors, self.key.removeprefix(self.verifier.name))
        judges = self._judges()
        self.open = len(judges)
        for judge in judges:
            missing = [need for need in sorted(judge.needs) if "@" in need and need not in (pictures if need.startswith("ancestor_images@") else ancestors)]
            then = partial(self._judged, judge, pixels)
            if missing:
                if self.collector is not None and judge is self.verifier:
                    self.collector.skip()
                unreached = f"{judge.name} compares with an estimate at sigma/alpha {missing[0].partition('@')[2]}, which this node has not reached"
                then([Value(None, reason=reasons.get(missing[0], unreached))])
            elif self.collector is not None and judge is self.verifier:
                self.collector.add(candidate, then)
            else:
                self.growth.batches.judge(Judgement(judge, [candidate], then))

    def _judged(self, judge: Verifier, pixels: Tensor | None, values: Sequence[Value]) -> None:
        self._value(self.key if judge is self.verifier else judge.name, values[0])
        if pixels is not None and judge is self.run.steering:
            self.run.keep_picture(self.node, pixels)
        self.open -= 1
        if self.open == 0:
            self._end()

    def _value(self, key: str, value: Value) -> None:
        self.run.value(self.node, key, value)

    def _end(self) -> None:
        if self.source is not self.node:
            draft = self.run.drafts[self.memo]
            draft.users -= 1
            if not draft.users:
                self.run.close(draft.leaf)
                del self.run.drafts[self.memo]
        for group in self.run.scoring.pop((self.node.index, self.key, id(self.collector))):
            group.done()


class SetCollector:
    """Waits for all candidates of a set, then has them judged together."""

    def __init__(self, growth: Growth, verifier: Verifier, expected: int) -> None:
        self.growth = growth
        self.verifier = verifier
        self.expected = expected
        self.rows: list[tuple[Candidate, Callable[[list[Value]], None]]] = []

    def add(self, candidate: Candidate, then: Callable[[list[Value]], None]) -> None:
        """One candidate is ready."""
        self.rows.append((candidate, then))
        self._judge_when_complete()

    def skip(self) -> None:
        """One candidate has failed on the way."""
        self.expected -= 1
        self._judge_when_complete()

    def _judge_when_complete(self) -> None:
        if not self.rows or len(self.rows) < self.expected:
            return
        # In node order: the set must not depend on which row was ready first.
        rows = sorted(self.rows, key=lambda row: row[0].node.index)

        def deliver(values: list[Value]) -> None:
            for (_, then), value in zip(rows, values, strict=True):
                then([value])

        self.growth.batches.judge(Judgement(self.verifier, [candidate for candidate, _ in rows], deliver))
