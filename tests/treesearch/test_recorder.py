"""What a run's journal holds, and what replaying it gives."""

from __future__ import annotations

import json
import tempfile
from itertools import count
from pathlib import Path

import pytest
import torch
from fakes import Hooked, Judge, Jury, RandomSearch, grow, sample
from faulty_disk import FaultyDisk, Killed
from hypothesis import given, settings
from hypothesis import strategies as st
from recorded_runs import Folders, record, recorded_bytes

from tsdiff.treesearch.engine import Limits
from tsdiff.treesearch.errors import BudgetExhausted, UsageError
from tsdiff.treesearch.journal import JournalReader
from tsdiff.treesearch.protocols import Condition
from tsdiff.treesearch.requests import Denoise, Draw, Gather, Release, Renoise, Score
from tsdiff.treesearch.runfile import JOURNAL, SEGMENTS
from tsdiff.treesearch.segmentfile import segment_numbers


def records(folder: Path) -> list[dict]:
    return [line for group in JournalReader(folder / JOURNAL) for line in group.records]


def script(tree):
    """One of everything that a journal tells."""
    roots = yield Draw(3)
    tree.note(why="a beginning")
    nodes, _ = yield Gather(Denoise(roots, to=3), Score(roots))
    with pytest.raises(BudgetExhausted):
        yield Denoise(nodes, to=6, copies=9)
    with pytest.raises(UsageError):
        yield Denoise(nodes[0], to=9)
    back = yield Renoise(nodes, to=1)
    tree.note(back[0], kept=True)
    yield Release(roots)
    yield Score(back[:1], at="lookahead", num_steps=2)
    leaves = yield Denoise(back[:2], to=6)
    yield Score(leaves)
    return tree.best()


def test_every_request_is_a_record_with_what_it_did(tmp_path):
    grown = record(tmp_path, script, eta=1.0, nfe=40)
    lines = records(tmp_path / "0")
    kinds = [(line["request"]["kind"], "refused" in line) for line in lines if "request" in line]
    assert kinds == [
        ("Draw", False), ("Gather", False), ("Denoise", True), ("Denoise", True), ("Renoise", False), ("Release", False), ("Score", False), ("Denoise", False), ("Score", False),
    ]  # fmt: skip
    done = [line for line in lines if "price" in line and "refused" not in line]
    assert sum(line["price"] for line in done) == grown.tree.budget.spent
    assert [node["id"] for line in done for node in line["nodes"]] == [f"{node.id:032x}" for node in grown.nodes]
    assert lines[-1]["end"]["ledger"] == grown.tree.ledger.to_json()
    assert [note for line in lines for note in line.get("notes", [])] == [[None, {"why": "a beginning"}], [grown.nodes[6].index, {"kept": True}]]
    values = {(effect["node"], effect["key"]): effect["value"]["score"] for line in done for effect in line["effects"] if effect["effect"] == "valued"}
    assert values == {(node.index, key): value.score for node in grown.nodes for key, value in node.values.items()}
    assert lines[-1]["end"]["answer"] == grown.run.answer.index


@pytest.mark.parametrize("seed", range(12))
def test_a_whole_journal_repeats_to_the_same_tree_without_any_work(tmp_path, seed):
    search = RandomSearch(seed, rounds=15)
    first = record(tmp_path, search, eta=1.0, nfe=60, ok=False)
    model, judge = Hooked(), Judge()
    again = record(tmp_path, search, eta=1.0, nfe=60, ok=False, model=model, verifiers=[judge])
    assert recorded_bytes(again) == recorded_bytes(first)
    assert again.run.answer is None or again.run.answer.index == first.run.answer.index
    assert (model.seen, judge.rows) == (0, 0)
    assert again.engine.ledger.rows == first.engine.ledger.rows
    assert again.run.frontier.counts == first.run.frontier.counts
    assert again.tree.children == first.tree.children
    assert again.tree.budget.spent == first.tree.budget.spent


@pytest.mark.parametrize("options", [{"solver": "dpm++2m"}, {"solver": "dpm++2m-sde"}, {"solver": "heun", "model": "ve"}, {"solver": "exact"}, {"class_label": "rare"}])
def test_any_prefix_goes_on_to_the_same_tree(tmp_path, options):
    search = RandomSearch(1, rounds=10)
    if "model" in options:
        options = options | {"model": Hooked(options["model"])}
    whole = recorded_bytes(record(tmp_path / "whole", search, ok=False, **options))
    text = (tmp_path / "whole" / "0" / JOURNAL).read_bytes().splitlines(keepends=True)
    for keep in range(1, len(text), 2):
        folders = Folders(tmp_path / "whole")
        copy = folders.cut(tmp_path / f"cut-{keep}", b"".join(text[:keep]))
        assert recorded_bytes(record(copy, search, ok=False, **options)) == whole, keep


def test_the_engine_counts_on_where_it_was(tmp_path):
    """Over all processes together, and each row once, however often a journal is opened."""
    limits = Limits(deterministic=True, network=4)
    options = {"limits": limits, "seeds": [0, 1, 2, 3]}
    whole = record(tmp_path / "whole", *[sample] * 4, **options)
    before = []
    for at in range(5, 200, 30):
        folder, first, then = tmp_path / str(at), Hooked(), Hooked()
        try:
            record(folder, *[sample] * 4, disk=FaultyDisk(at, "killed"), model=first, **options)
        except Killed:
            again = record(folder, *[sample] * 4, model=then, **options)
            ledger = again.engine.ledger
            assert sum(run.tree.ledger.rows for run in again.runs) == sum(run.tree.ledger.rows for run in whole.runs)
            assert ledger.network_rows <= first.seen + then.seen
            assert ledger.network_rows - then.seen >= 0
            before.append(ledger.network_rows - then.seen)
    assert any(before)


def test_another_policy_is_told_at_the_first_difference(tmp_path):
    record(tmp_path, script, eta=1.0, nfe=40)

    def other(tree):
        roots = yield Draw(3)
        yield Denoise(roots, to=4)

    with pytest.raises(UsageError, match=r'search 0 asks \{"kind":"Denoise".* where it asked \{"kind":"Gather".*line 3 of .*journal.jsonl'):
        record(tmp_path, other, eta=1.0, nfe=40)
    before = records(tmp_path / "0")

    def shorter(tree):
        yield Draw(3)

    with pytest.raises(UsageError, match=r'asks .*"Denoise".* where it asked .*"Gather"'):
        record(tmp_path, shorter, eta=1.0, nfe=40)
    assert records(tmp_path / "0") == before
    assert recorded_bytes(record(tmp_path, script, eta=1.0, nfe=40))


def test_the_refusals_of_a_clock_are_repeated(tmp_path):
    seen = []

    def patient(tree):
        try:
            yield from sample(tree)
        except BudgetExhausted as over:
            seen.append(str(over))
            raise

    first = record(tmp_path, patient, limits=Limits(seconds=1e-9))
    again = record(tmp_path, patient, limits=Limits(seconds=1e9))
    assert recorded_bytes(first) == recorded_bytes(again)
    assert first.run.truncated == again.run.truncated == seen[0] == seen[1]


def test_what_the_caller_can_mend_is_remembered(tmp_path):
    def picky(candidates):
        raise UsageError("this prompt has no such word")

    for _ in range(2):
        with pytest.raises(UsageError, match="no such word"):
            record(tmp_path, sample, verifiers=[Judge(value=picky)])


def test_closed_nodes_are_read_from_the_run_and_not_written_twice(tmp_path):
    def wide(tree):
        roots = yield Draw(40)
        yield Release(roots[1:])
        leaves = yield Denoise(roots[:1], to=tree.schedule.last)
        yield Score(leaves)

    assert grow(wide).spilled == 39 * 8
    grown = record(tmp_path, wide)
    assert grown.spilled == 0
    assert len(grown.latents[0]) == 41
    again = record(tmp_path, wide)
    assert all(torch.equal(again.latents[0][i], latent) for i, latent in grown.latents[0].items())


def climbing(tree):
    """A chain that gives up every node that it has left."""
    nodes = yield Draw(2)
    for _ in range(6):
        further = yield Denoise(nodes, to=4)
        yield Release(nodes)
        nodes = yield Renoise(further, to=1)
        yield Release(further)
    leaves = yield Denoise(nodes, to=tree.schedule.last)
    yield Score(leaves)
    return tree.best()


@pytest.mark.parametrize("keep", [True, False])
def test_the_disk_holds_what_is_wanted(tmp_path, keep):
    options = {"keep": keep, "segment_bytes": 800}
    record(tmp_path / "whole", climbing, **options)
    whole = recorded_bytes(record(tmp_path / "once more", climbing, **options))
    numbers = segment_numbers(tmp_path / "whole" / "0" / SEGMENTS)
    assert numbers[-1] > 8
    assert (len(numbers) == numbers[-1] + 1) == keep
    assert keep or len(numbers) < 6
    for at in range(3, 400, 23):
        disk = FaultyDisk(at, "power", seed=at)
        try:
            record(tmp_path / str(at), climbing, disk=disk, sync_seconds=1e9 if at % 2 else 0.0, **options)
        except Killed:
            assert recorded_bytes(record(tmp_path / str(at), climbing, **options)) == whole, at


class Person(Jury):
    """Answers at once, with parts."""

    def ask(self, candidates, answer):
        self.batches.append((list(candidates.node_ids), list(candidates.levels)))
        for node_id, score in zip(candidates.node_ids, self.value(candidates).tolist(), strict=True):
            answer(node_id, score, None, {"half": score / 2})

    def asked(self, nodes):
        """(index, level) of what it was shown."""
        indices = {f"{node.id:032x}": node.index for node in nodes}
        return {(indices[node_id], level) for ids, levels in self.batches for node_id, level in zip(ids, levels, strict=True)}


def asking(tree):
    nodes = yield Draw(2)
    nodes = yield Denoise(nodes, to=3)
    yield Gather(Score(nodes), Score(nodes[:1], at="lookahead", num_steps=2))
    nodes = yield Denoise(nodes, to=tree.schedule.last)
    yield Score(nodes)
    return tree.best()


def test_answers_survive_and_nobody_is_asked_twice(tmp_path):
    whole = recorded_bytes(record(tmp_path / "whole", asking, verifiers=[Person()]))
    changes = count(1)
    kept = 0
    for at in changes:
        folder, first, then = tmp_path / str(at), Person(), Person()
        disk = FaultyDisk(at, "killed")
        try:
            record(folder, asking, verifiers=[first], disk=disk)
        except Killed:
            pass
        else:
            break
        known = records(folder / "0") if (folder / "0" / JOURNAL).exists() else []
        answers = [line["answer"] for line in known if "answer" in line]
        grown = record(folder, asking, verifiers=[then])
        assert recorded_bytes(grown) == whole
        answered = {(one["node"], 6 if "lookahead" in one["key"] else grown.nodes[one["node"]].level) for one in answers}
        again = then.asked(grown.nodes)
        assert not again & answered
        kept += bool(answered and again)
    assert kept >= 3, "some interruption fell between two answers"


def test_without_a_folder_nothing_is_logged():
    grown = grow(sample)
    assert grown.run.effects is None
    assert grown.tree.heard is None


def test_journals_are_strict_json(tmp_path):
    record(tmp_path, script, eta=1.0, nfe=40)
    for line in (tmp_path / "0" / JOURNAL).read_text().splitlines():
        json.loads(line, parse_constant=lambda name: pytest.fail(name))


WORDS = st.text(st.characters(exclude_categories=("Cs",)), max_size=12)


@settings(max_examples=12)
@given(st.lists(st.dictionaries(WORDS.filter(lambda word: word != "node"), WORDS | st.integers() | st.lists(WORDS, max_size=2), max_size=3), max_size=3), WORDS)
def test_notes_and_prompts_of_any_words_come_back(notes, prompt):
    def noting(tree):
        roots = yield Draw(2)
        for facts in notes:
            tree.note(**facts)
            tree.note(roots[1], **facts)
        yield Score(roots)
        leaves = yield Denoise(roots, to=tree.schedule.last)
        yield Score(leaves)
        return tree.best()

    with tempfile.TemporaryDirectory() as name:
        first = record(Path(name), noting, conditions=[Condition(prompt)])
        again = record(Path(name), noting, conditions=[Condition(prompt)])
    assert first.tree.notes == notes
    assert recorded_bytes(again) == recorded_bytes(first)


@pytest.mark.parametrize("seed", range(6))
def test_the_best_so_far_is_the_best_of_all(seed):
    """It is kept up to date as values come; here it is looked for anew at every request."""

    def watched(tree):
        search, reply = RandomSearch(seed, rounds=25, verifiers=("judge", "other"))(tree), None
        while True:
            try:
                request = search.send(reply)
            except StopIteration as stop:
                return stop.value
            reply = yield request
            for key in ("judge", "other", "nobody"):
                finished = [node for node in tree.nodes if node.level == tree.schedule.last and not node.draft and not node.failed and node.score(key) is not None]
                assert tree.best(key) is max(finished, key=lambda node: (node.score(key), -node.index), default=None)

    model = Hooked()
    model.spoil = lambda latents, timesteps, outputs: torch.where(latents[:, :1] > 1.2, torch.nan, outputs)
    grown = grow(watched, model=model, eta=1.0, verifiers=[Judge(scope="set" if seed % 2 else "row", needs=["images", "x0"]), Judge("other")])
    assert any(node.failed for node in grown.nodes)
