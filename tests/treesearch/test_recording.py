"""The recorder hears of everything before the policies do."""

from __future__ import annotations

import pytest
from fakes import Hooked, Judge, Jury, RandomSearch, grow, sample

from tsdiff.treesearch.errors import BudgetExhausted, UsageError
from tsdiff.treesearch.protocols import NullRecorder
from tsdiff.treesearch.requests import Denoise, Draw, Gather, Release, Renoise, Score


class Recording(NullRecorder):
    """Writes down the order of events."""

    def __init__(self):
        self.events = []
        self.open = set()

    def begin(self, run):
        self.events.append(("begin", run.tree, None))

    def commit(self, groups):
        assert groups
        for group in groups:
            assert group.waiting == 0
            assert group.parent is None
            self.events.append(("commit", group.run.tree, group.request))

    def answer(self, run, node, key, value):
        self.events.append(("answer", run.tree, (node, key, value)))

    def refuse(self, run, request, why):
        self.events.append(("refuse", run.tree, (request, str(why))))

    def end(self, run):
        self.events.append(("end", run.tree, None))


def watched(search, recorder):
    """A policy that writes its own view between the recorder's events."""

    def policy(tree):
        asked, reply, error = search(tree), None, None
        recorder.events.append(("start", tree, None))
        while True:
            try:
                request = asked.send(reply) if error is None else asked.throw(error)
            except StopIteration as stop:
                return stop.value
            reply = error = None
            try:
                reply = yield request
                recorder.events.append(("reply", tree, request))
            except (BudgetExhausted, UsageError) as refused:
                recorder.events.append(("refused", tree, request))
                error = refused

    return policy


@pytest.mark.parametrize("together", [1, 3])
def test_a_group_is_committed_before_its_reply(together):
    recorder = Recording()
    searches = [watched(RandomSearch(seed, rounds=15), recorder) for seed in range(together)]
    grown = grow(*searches, eta=1.0, nfe=25, recorder=recorder, seeds=list(range(together)))
    for run in grown.runs:
        mine = [(kind, what) for kind, tree, what in recorder.events if tree is run.tree]
        assert [kind for kind, _ in mine[:2]] == ["begin", "start"]
        assert mine[-1][0] == "end"
        events = iter(mine[2:-1])
        for kind, what in events:
            if kind == "refuse":
                assert next(events) == ("refused", what[0])
                assert what[1]
                continue
            assert kind == "commit"
            following = next(events, None)
            if following is None or following[0] != "reply":  # the engine's own finishing
                assert run.truncated or run.answer
                break
            assert following == ("reply", what)
    assert any(kind == "refuse" for kind, _, _ in recorder.events)


def test_the_commit_finds_the_results():
    seen = []

    class Looking(Recording):
        def commit(self, groups):
            for group in groups:
                tree, run = group.run.tree, group.run
                seen.append(type(group.request).__name__)
                for node in tree.nodes:
                    assert node.failed or node.status == "closed" or run.key("node", node.index) in run.store
                if isinstance(group.request, Score):
                    assert all(tree.verifier in node.values for node in group.request.group)

    def policy(tree):
        roots = yield Draw(3)
        nodes, _ = yield Gather(Denoise(roots, to=3), Score(roots))
        back = yield Renoise(nodes, to=1)
        yield Release(roots)
        leaves = yield Denoise(back, to=6)
        yield Score(leaves)
        return tree.best()

    grow(policy, recorder=Looking(), keep=False)
    assert seen == ["Draw", "Gather", "Renoise", "Release", "Denoise", "Score"]


def test_answers_are_recorded_on_arrival():
    recorder = Recording()
    grown = grow(sample, sample, seeds=[0, 1], recorder=recorder, verifiers=[Jury()])
    for run in grown.runs:
        kinds = [kind for kind, tree, _ in recorder.events if tree is run.tree]
        assert kinds == ["begin", "commit", "commit", "answer", "commit", "end"]
        (answer,) = [what for kind, tree, what in recorder.events if tree is run.tree and kind == "answer"]
        assert answer == (run.answer, "judge", run.answer.values["judge"])


def test_refusals_say_why():
    recorder = Recording()

    def policy(tree):
        roots = yield Draw(2)
        with pytest.raises(BudgetExhausted):
            yield Denoise(roots, to=6)
        with pytest.raises(UsageError):
            yield Denoise(roots[0], to=9)
        return (yield from sample(tree))

    grow(policy, nfe=7, recorder=recorder, model=Hooked(), verifiers=[Judge()])
    (first, second) = [what[1] for kind, _, what in recorder.events if kind == "refuse"]
    assert "12 NFE" in first
    assert "level 9" in second
