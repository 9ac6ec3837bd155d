"""Runs are read from their journals while they grow, and however these are damaged."""

from __future__ import annotations

import json
import random
import shutil

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from saved_searches import PROMPT, QUICK, as_killed, edit, finished_beam, interrupted, opened, running_place, same_tree

import tsdiff.treesearch.savedpage  # noqa: F401 - before hypothesis looks around: it draws numbers and words of modules that are there
from tsdiff.treesearch import journal as journal_module
from tsdiff.treesearch import runfolder
from tsdiff.treesearch.errors import UsageError
from tsdiff.treesearch.exports import table
from tsdiff.treesearch.journal import JournalReader
from tsdiff.treesearch.lines import write_first, write_group
from tsdiff.treesearch.lock import Lock
from tsdiff.treesearch.saved import load_run
from tsdiff.treesearch.search import execute, prepare
from tsdiff.treesearch.strictjson import encode


@pytest.fixture(scope="module")
def beam(tmp_path_factory):
    return finished_beam(tmp_path_factory.mktemp("beam"))


@pytest.fixture(scope="module")
def place(tmp_path_factory, beam):
    return running_place(tmp_path_factory.mktemp("place"), beam)


# Cuts -----------------------------------------------------------------------------------------------------------------


@settings(max_examples=60)
@given(data=st.data())
def test_any_prefix_of_a_journal_opens_and_is_a_prefix_of_the_tree(data, place, beam):
    """Whole groups are there, what follows is not."""
    size = data.draw(st.integers(0, len(beam.data)) | st.sampled_from(beam.ends))
    run = opened(place, beam.data[:size])
    whole = beam.result.tree.to_json()["nodes"]
    kept = ("index", "id", "stream", "parent", "move", "level", "draft")
    groups = sum(end <= size for end in beam.ends) - 1
    assert [{name: node.to_json()[name] for name in kept} for node in run.nodes] == [{name: node[name] for name in kept} for node in whole[: len(run.nodes)]]
    assert (0 if run.place is None else run.place.groups) == max(groups, 0)
    assert (run.damage == ()) == (size in beam.ends)
    assert run.prompt == PROMPT
    records = [record for group in journal_groups(place) for record in group if record["tree"] == "search"]
    assert run.ledger["nfe"] == next((record["ledger"]["nfe"] for record in reversed(records) if "ledger" in record), run.ledger["nfe"])
    assert len(run.nodes) == sum(len(record.get("nodes", ())) for record in records)


def journal_groups(folder):
    try:
        return [group.records for group in JournalReader(folder / "journal.jsonl")]
    except UsageError:
        return []


@settings(max_examples=60)
@given(at=st.integers(0, 10**9), bit=st.integers(0, 7))
def test_any_bit_flip_costs_only_what_follows(at, bit, place, beam):
    data = bytearray(beam.data)
    data[at % len(data)] ^= 1 << bit
    run = opened(place, bytes(data))
    groups = sum(end <= at % len(data) for end in beam.ends) - 1
    assert (0 if run.place is None else run.place.groups) == max(groups, 0)
    assert [node.id for node in run.nodes] == [node.id for node in beam.result.tree.nodes[: len(run.nodes)]]
    assert run.damage


def test_random_cuts_of_several_journals_never_raise(tmp_path):
    """A coarse sweep over all policies' journals, in the state of a running search."""
    source = random.Random(7)
    for number, policy in enumerate(("mcts", "smc")):
        folder = interrupted(tmp_path / policy, policy, batches=12)
        edit(folder / "run.json", lambda facts: facts.update(status="running"))
        data = (folder / "journal.jsonl").read_bytes()
        for _ in range(15):
            (folder / "journal.jsonl").write_bytes(data[: source.randrange(len(data) + 1)])
            with Lock(folder / "lock"):
                run = load_run(folder)
                assert (run.status, run.damage) == ("running", ()), number


# Following -----------------------------------------------------------------------------------------------------------


@settings(max_examples=25)
@given(sizes=st.lists(st.integers(0, 10**9), max_size=12))
def test_following_equals_reading_at_once(sizes, place, beam):
    """And a mirror that is told only what is new shows the same."""
    journal = place / "journal.jsonl"
    journal.unlink(missing_ok=True)
    run = load_run(place)
    mirror = {line: {} for line in ("search", "baseline")}
    for size in [*sorted(size % len(beam.data) for size in sizes), len(beam.data)]:
        journal.write_bytes(beam.data[:size])
        update = run.refresh()
        assert not update.restarted
        for line, nodes in update.nodes.items():
            mirror[line] |= {node.index: json.dumps(node.to_json()) for node in nodes}
        assert not run.refresh()
        fresh = load_run(place)
        assert same_tree(run.tree, fresh.tree)
        assert run.place == fresh.place
    assert same_tree(run.tree, beam.result.tree)
    for line, nodes in mirror.items():
        assert list(nodes.values()) == [json.dumps(node.to_json()) for node in run.trees[line].nodes]


def test_following_reads_only_what_is_new(place, beam, monkeypatch):
    seen = []
    real = journal_module.read_line
    monkeypatch.setattr(journal_module, "read_line", lambda text: seen.append(text) or real(text))
    (place / "journal.jsonl").unlink(missing_ok=True)
    run = load_run(place)
    for end in beam.ends:
        (place / "journal.jsonl").write_bytes(beam.data[:end])
        run.refresh()
    assert b"".join(seen) == beam.data[beam.ends[0] :]


def test_a_run_is_followed_to_its_end(tmp_path):
    """Every batch of a search is looked at from beside, through its files alone."""
    runs, sizes = [], []

    def look(_):
        runs[:] = runs or [load_run(tmp_path / "run-0001")]
        runs[0].refresh()
        assert runs[0].status in ("running", "done")
        assert runs[0].damage == ()
        sizes.append(len(runs[0].nodes))

    (result,) = execute(prepare("gaussian", PROMPT, policy="beam", nfe=60, steps=4, max_batch=4, out=tmp_path), callback=look, disk=QUICK, sync_seconds=0.0)
    runs[0].refresh()
    assert runs[0].status == "done"
    assert same_tree(runs[0].tree, result.tree)
    assert (runs[0].score, runs[0].seconds) == (result.score, round(result.seconds, 3))
    assert len(set(sizes)) > 5
    assert torch.equal(runs[0].latent(runs[0].best), load_run(result.path).latent(result.node.index))


def test_a_journal_that_lost_its_end_is_read_again(place, beam):
    """Even where it has grown beyond where it was read to since: the line before that place is another one."""
    cut, other = beam.ends[len(beam.ends) // 2], beam.ends[-3]
    run = opened(place, beam.data[:other])
    (place / "journal.jsonl").write_bytes(beam.data[:cut])
    update = run.refresh()
    assert update.restarted
    assert same_tree(run.tree, load_run(place).tree)
    assert [node for nodes in update.nodes.values() for node in nodes] == [node for tree in run.trees.values() for node in tree.nodes]
    lines = beam.data[:cut].count(b"\n")
    ledger = {"nfe": 0, "rows": 0, "encodes": 0, "decodes": 0, "verifier_calls": {}}
    end = {"tree": "search", "end": {"answer": None, "truncated": None, "error": "x" * len(beam.data), "ledger": ledger}, "notes": []}
    (place / "journal.jsonl").write_bytes(beam.data[:cut] + b"".join(write_group(lines, beam.ends.index(cut) + 1, [end])))
    assert not run.refresh().restarted
    assert run.tree.ended
    (place / "journal.jsonl").write_bytes(beam.data)
    assert run.refresh().restarted
    assert same_tree(run.tree, beam.result.tree)


def test_a_finished_run_that_is_begun_again_is_read_again(beam, tmp_path):
    folder = shutil.copytree(beam.path, tmp_path / "run")
    run = load_run(folder)
    assert run.place is None
    edit(folder / "run.json", lambda facts: facts.update(status="interrupted"))
    update = run.refresh()
    assert (update.restarted, run.status) == (True, "interrupted")
    assert run.place is not None
    assert same_tree(run.tree, beam.result.tree)


# Damage --------------------------------------------------------------------------------------------------------------


def test_a_damaged_tree_is_made_again_from_the_journal(beam, tmp_path):
    folder = shutil.copytree(beam.path, tmp_path / "run")
    (folder / "tree.json").write_text("{")
    run = load_run(folder)
    assert same_tree(run.tree, beam.result.tree)
    assert run.status == "done"
    (line,) = run.damage
    assert "tree.json' cannot be read" in line


def test_without_run_json_the_journal_says_what_is_searched(beam, tmp_path):
    folder = as_killed(beam.path, tmp_path / "run")
    (folder / "run.json").write_text("[]")
    run = load_run(folder)
    assert (run.prompt, run.seed, run.policy, run.verifier, run.tree.last) == (PROMPT, 0, "beam", "gaussian-target", 4)
    assert (run.score, run.best.index) == (beam.result.score, beam.result.node.index)
    assert run.nodes[0].sigma is None, "the schedule is not known"
    assert "run.json' cannot be read: it holds no JSON object" in run.damage[0]
    run.to_networkx(), repr(run), run._repr_html_(), run.to_json()


def test_a_run_of_which_nothing_is_readable_is_one_line(beam, tmp_path):
    folder = as_killed(beam.path, tmp_path / "run")
    for name in ("run.json", "journal.jsonl"):
        (folder / name).write_bytes(b"\0\1\2\n")
    with pytest.raises(UsageError, match=r"nothing of the run '.*run' can be read: .*is not the journal of a run"):
        load_run(folder)
    (folder / "journal.jsonl").write_bytes(beam.data[: beam.ends[0] - 3])
    with pytest.raises(UsageError, match=r"nothing of the run .* line 1 was never finished"):
        load_run(folder)


@pytest.mark.parametrize("name", ["run.json", "tree.json", "journal.jsonl"])
def test_a_newer_format_is_told(beam, tmp_path, name):
    folder = shutil.copytree(beam.path, tmp_path / "run") if name == "tree.json" else as_killed(beam.path, tmp_path / "run")
    if name == "journal.jsonl":
        newest = journal_module.latest_version()
        (folder / name).write_bytes(write_first(newest + 1, {}) + beam.data[beam.ends[0] :])
    else:
        newest = runfolder.FORMAT
        edit(folder / name, lambda data: data.update(format=newest + 1))
    run = load_run(folder)
    assert any(name in line and f"has format {newest + 1}, but this tsdiff reads up to format {newest}; install a newer tsdiff" in line for line in run.damage)
    assert len(run.nodes) == (0 if name == "journal.jsonl" else len(beam.result.tree.nodes))


def test_missing_pictures_and_short_segments_are_told(beam, tmp_path):
    folder = shutil.copytree(beam.path, tmp_path / "run")
    (folder / "best.png").unlink()
    assert load_run(folder).damage == ("best.png is missing",)
    (folder / "best.png").write_bytes(b"\x89PNG\r\n\x1a\n and no more")
    with pytest.raises(UsageError, match=r"best\.png' cannot be read"):
        load_run(folder).image()
    (folder / "latents.safetensors").write_bytes(b"no")
    with pytest.raises(UsageError, match=r"latents\.safetensors' cannot be read"):
        load_run(folder).latent(0)
    part = interrupted(tmp_path / "part")
    segment = part / "latents" / "00000.seg"
    segment.write_bytes(segment.read_bytes()[:-64])
    run = load_run(part)
    assert run.damage == (f"latents/00000.seg ends at byte {segment.stat().st_size}, where the journal knows of {segment.stat().st_size + 64}",)
    assert torch.isfinite(run.latent(0)).all()
    segment.unlink()
    assert load_run(part).damage == ("latents/00000.seg is missing",)


json_values = st.sampled_from(["null", "true", "-1", "0", "1", "7", "1000000", "1e40", "-0.5", "1" + "0" * 40, '""', '"0"', '"x"', '"denoise"', "[]", "[0]", "[[]]", "[null, {}]", "{}", '{"a": 1}', '{"score": null}', '{"score": "1"}']).map(json.loads)


@settings(max_examples=60)
@given(data=st.data())
def test_records_that_make_no_sense_are_left_out_and_told(data, place, beam):
    """Intact lines with one value replaced by another: what is before is there, nothing is raised, nothing half done is shown."""
    groups = [json.loads(json.dumps(group.records)) for group in JournalReader(beam.path / "journal.jsonl")]
    number = data.draw(st.integers(0, len(groups) - 1), label="group")
    spots = list(_spots(groups[number]))
    container, key = spots[data.draw(st.integers(0, len(spots) - 1), label="spot")]
    container[key] = data.draw(json_values, label="value")
    text, lines = write_first(1, {}), 1
    for i, records in enumerate(groups):
        text += b"".join(write_group(lines, i + 1, records))
        lines += len(records)
    run = opened(place, text)
    if run.damage:
        assert run.damage == (f"journal.jsonl: group {number + 1} makes no sense; it and what follows is left out",) or run.place.groups >= number
        assert len(run.nodes) == sum(len(record.get("nodes", ())) for group in groups[: run.place.groups] for record in group if record["tree"] == "search")
    else:
        assert run.place.groups == len(groups)
    assert not run.refresh()
    run.to_networkx(), repr(run), run._repr_html_(), run.summary(), encode(run.to_json())


def _spots(value):
    """Every place in a JSON value where another could stand."""
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
        yield value, key
        if isinstance(inner, (dict, list)):
            yield from _spots(inner)


@settings(max_examples=60)
@given(data=st.data())
def test_a_tree_file_that_makes_no_sense_is_told(data, beam, tmp_path_factory):
    tree = json.loads((beam.path / "tree.json").read_text())
    tree["nodes"] = tree["nodes"][:6]
    spots = list(_spots(tree))
    container, key = spots[data.draw(st.integers(0, len(spots) - 1))]
    container[key] = data.draw(json_values)
    folder = tmp_path_factory.getbasetemp() / "edited"
    folder.mkdir(exist_ok=True)
    (folder / "run.json").write_bytes((beam.path / "run.json").read_bytes())
    (folder / "tree.json").write_bytes(encode(tree))
    run = load_run(folder)
    assert len(run.nodes) in (0, 6)
    assert run.damage, "its pictures are missing at least"
    run.to_networkx(), repr(run), run._repr_html_(), table(run.tree), encode(run.to_json())
