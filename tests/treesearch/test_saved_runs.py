"""Saved runs say what the searches said, whatever state their folders are in."""

from __future__ import annotations

import csv
import io
import json
import random
import shutil
import sys
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import networkx as nx
import pytest
import torch
from faulty_disk import QuickDisk
from hypothesis import given, settings
from hypothesis import strategies as st

import tsdiff
from tsdiff.treesearch import journal as journal_module
from tsdiff.treesearch import runfolder
from tsdiff.treesearch.errors import SetupError, TsdiffWarning, UsageError
from tsdiff.treesearch.exports import csv_text, graph, table, write_csv, write_graphml, write_json
from tsdiff.treesearch.journal import JournalReader
from tsdiff.treesearch.lines import write_first, write_group
from tsdiff.treesearch.lock import Lock
from tsdiff.treesearch.saved import SavedRun, load_run, load_runs
from tsdiff.treesearch.savedpage import (
    page,  # before hypothesis looks around: it draws numbers and words of modules that are there
)
from tsdiff.treesearch.savedtree import SavedTree
from tsdiff.treesearch.search import execute, prepare
from tsdiff.treesearch.strictjson import encode

QUICK = QuickDisk()
STORED = Path(__file__).parents[1] / "data" / "saved-runs"
PROMPT = "near (3, 2.4)"
POLICIES = {
    "best-of-n": {"nfe": 24},
    "beam": {"nfe": 60, "policy_options": {"value": "lookahead"}},
    "mcts": {"nfe": 60},
    "dts": {"nfe": 40, "solver": "ddpm"},
    "smc": {"nfe": 40, "solver": "ddpm"},
    "zero-order": {"nfe": 40},
}


def search(out, policy="beam", prompts=PROMPT, *, stop=lambda: False, **options):
    options = {"deterministic": True, "steps": 4, "max_batch": 4} | POLICIES.get(policy, {}) | options
    return execute(prepare("gaussian", prompts, policy=policy, out=out, **options), disk=QUICK, sync_seconds=0.0, stop=stop)


def interrupted(out, policy="beam", batches=8, **options):
    left = iter(range(batches))
    with pytest.raises(KeyboardInterrupt):
        search(out, policy, stop=lambda: next(left, None) is None, **options)
    return next(out.glob("run-*"))


@pytest.fixture(scope="module", params=POLICIES)
def result(request, tmp_path_factory):
    (found,) = search(tmp_path_factory.mktemp("saved"), request.param)
    return found


@pytest.fixture(scope="module")
def beam(tmp_path_factory):
    """A finished run's folder, its journal's bytes, and where each group ends."""
    (found,) = search(tmp_path_factory.mktemp("beam"), "beam")
    data = (found.path / "journal.jsonl").read_bytes()
    reader = JournalReader(found.path / "journal.jsonl")
    return SimpleNamespace(path=found.path, data=data, ends=[reader.start.offset, *(group.end.offset for group in reader)], result=found)


@pytest.fixture(scope="module")
def place(tmp_path_factory, beam):
    """A folder that says it is running, for journals to be put into."""
    folder = tmp_path_factory.mktemp("place") / "run"
    folder.mkdir()
    facts = json.loads((beam.path / "run.json").read_text()) | {"status": "running"}
    (folder / "run.json").write_text(json.dumps(facts))
    return folder


def edit(path, change):
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


def as_killed(folder, to):
    """A copy as if the process had been killed before it wrote what derives from the journal."""
    shutil.copytree(folder, to)
    for name in ("tree.json", "baseline.json", "best.png", "baseline.png", "summary.csv", "latents.safetensors"):
        (to / name).unlink()
    edit(to / "run.json", lambda facts: (facts.update(status="running"), facts.pop("result")))
    return to


def opened(folder, data):
    (folder / "journal.jsonl").write_bytes(data)
    return load_run(folder)


def rows_of(path):
    return list(csv.DictReader(io.StringIO(path.read_text(encoding="utf-8"), newline="")))


def same_tree(one, other):
    return json.dumps(one.to_json()) == json.dumps(other.to_json())


# What it says --------------------------------------------------------------------------------------------------------


def test_a_finished_run_says_what_the_search_said(result):
    run = load_run(result.path)
    assert (run.status, run.damage, run.prompt, run.seed, run.model) == ("done", (), PROMPT, 0, "gaussian")
    assert json.dumps(run.tree.to_json()) == json.dumps(result.tree.to_json())
    assert json.dumps(run.baseline.to_json()) == json.dumps(result.baseline.tree.to_json())
    assert (run.policy, run.verifier, run.score, run.first_score) == (result.policy, result.tree.verifier, result.score, result.first_score)
    assert (run.best.index, run.baseline.best.index) == (result.node.index, result.baseline.node.index)
    assert [node.index for node in run.path_to(run.best)] == [node.index for node in result.node.path()]
    assert run.ledger == result.ledger.to_json()
    assert run.seconds == round(result.seconds, 3)
    for node, live in zip(run.nodes, result.tree.nodes, strict=True):
        assert (node.id, node.stream, node.move, node.values, node.note) == (live.id, live.stream, live.move, live.values, live.note)
        assert node.sigma == result.tree.schedule.sigma[node.level]
        assert node.alpha == result.tree.schedule.alpha[node.level]
        assert all(child.parent is node for child in node.children)
    assert sorted(child.index for node in run.nodes for child in node.children) == [node.index for node in run.nodes if node.parent is not None]
    assert sum(node.nfe for node in run.nodes) == run.ledger["nfe"]
    assert max(run.tree.path_costs()) <= run.ledger["nfe"]
    assert run.image().tobytes() == result.image.tobytes()
    assert run.image("baseline").tobytes() == result.baseline.image.tobytes()


def test_the_journal_says_the_same(result, tmp_path):
    run = load_run(as_killed(result.path, tmp_path / "run"))
    assert (run.status, run.damage) == ("killed", ())
    assert json.dumps(run.tree.to_json()) == json.dumps(result.tree.to_json())
    assert json.dumps(run.baseline.to_json()) == json.dumps(result.baseline.tree.to_json())
    assert (run.best.index, run.score, run.first_score) == (result.node.index, result.score, result.first_score)
    assert run.tree.ended
    assert run.tree.truncated == result.truncated
    assert {name: value for name, value in run.summary().items() if name not in ("status", "seconds")} == {
        name: value for name, value in load_run(result.path).summary().items() if name not in ("status", "seconds")
    }


def test_the_best_below_a_node_is_that_of_its_finished_samples(result):
    tree = load_run(result.path).tree
    below = tree.best_below()
    for node in tree.nodes:
        scores = [leaf.score(tree.verifier) for leaf in tree.finished if node in leaf.path() and leaf.score(tree.verifier) is not None]
        assert below[node.index] == max(scores, default=None)


def test_latents_of_an_unfinished_run_are_those_of_the_finished_one(tmp_path):
    search(tmp_path / "whole")
    whole = load_run(tmp_path / "whole" / "run-0001")
    part = load_run(interrupted(tmp_path / "part"))
    assert part.status == "interrupted"
    assert part.damage == ()
    assert 0 < len(part.nodes) < len(whole.nodes)
    kept = dict(part.latents())
    assert len(kept) > 5
    for node, latent in kept.items():
        assert torch.equal(latent, whole.latent(node.index)), node
        assert torch.equal(latent, part.latent(node))
    with pytest.raises(UsageError, match=r"has no best\.png; pictures are there when a run is done"):
        part.image()


def test_latents_that_were_not_kept_are_told(tmp_path):
    search(tmp_path, keep="path")
    run = load_run(tmp_path / "run-0001")
    assert [node for node, _ in run.latents()] == sorted(run.path_to(run.best), key=lambda node: node.index)
    other = next(node for node in run.nodes if node not in run.path_to(run.best))
    with pytest.raises(UsageError, match=f"has not kept the latent of node {other.index}; `--keep all`"):
        run.latent(other)
    with pytest.raises(UsageError, match="is not a node of this search's tree"):
        run.latent(load_run(run.path).best)
    with pytest.raises(UsageError, match=f"no node 999 in the search tree; its nodes are 0 to {len(run.nodes) - 1}"):
        run.latent(999)
    with pytest.raises(UsageError, match="image is 'worst' but must be best or baseline"):
        run.image("worst")


def test_reading_changes_nothing(beam, tmp_path):
    for folder in (beam.path, as_killed(beam.path, tmp_path / "run")):
        before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.iterdir() if path.is_file()}
        run = load_run(folder)
        run.refresh(), run.damage, run.to_json(), repr(run), run._repr_html_()
        assert {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.iterdir() if path.is_file()} == before


# Every state ---------------------------------------------------------------------------------------------------------


def test_a_run_is_running_while_somebody_holds_its_lock(place, beam):
    run = opened(place, beam.data)
    assert run.status == "killed"
    with Lock(place / "lock"):
        update = run.refresh()
        assert (run.status, update.status, update.nodes) == ("running", True, {})
        assert opened(place, beam.data[:-9]).damage == (), "a group on its way is no damage"
    assert "was never finished" in opened(place, beam.data[:-9]).damage[0]
    (place / "lock").unlink()


def test_a_search_that_failed_says_why(tmp_path):
    outcome = execute(prepare("gaussian", PROMPT, policy=Quitter(), steps=3, out=tmp_path), disk=QUICK)
    assert outcome.failures
    run = load_run(tmp_path / "run-0001")
    assert (run.status, run.score, len(run.nodes)) == ("failed", None, 2)
    assert "nothing more" in run.error
    assert run.summary()["status"] == "failed"
    (row,) = rows_of(tmp_path / "run-0001" / "summary.csv")
    assert (row["status"], row["score"], row["nfe"]) == ("failed", "", "0")


class Quitter:
    name, needs, size_parameters = "quitter", frozenset(), ()

    def search(self, tree):
        from tsdiff.treesearch.requests import Draw

        yield Draw(2)
        raise UsageError("nothing more")

    def cost(self, setting):
        from tsdiff.treesearch.ledger import Cost, Spend

        return Cost.exactly(Spend(3, 1, 1))

    def fit(self, nfe, setting):
        return self


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


# Hostile text --------------------------------------------------------------------------------------------------------

HOSTILE = ["<script>alert(1)</script>", '"><img src=x onerror=alert(1)>', "=HYPERLINK(\"http://x\")", "@SUM(1)", "+1", "-1+1", "\tx", "\0\x1b[31m\x07", "a\nb,c;\"d\"", "ünï日本\u202e", "\ud800", "&lt;", "$text:zz", "]]>"]  # fmt: skip


def hostile_run(beam, folder, text):
    """A run in which everything that can be text is this text."""
    shutil.copytree(beam.path, folder)

    def tree(data):
        data.update(prompt=text, verifier=text)
        data["nodes"][0].update(reason=text, note={text: [text]}, values={text: {"score": 1.0, "parts": {text: 2.0}, "reason": text}})
        data["nodes"][0]["move"].update(solver=text, kind=text)

    def run(data):
        data.update(prompt=text, error=text)
        data["options"].update(model=text)
        data["options"]["policy"].update(name=text)
        data["result"].update(verifier=text, truncated=text)

    for name, change in (("tree.json", tree), ("run.json", run)):
        data = runfolder.read_json(folder / name)
        change(data)
        runfolder.write_json(folder / name, data)
    return load_run(folder)


class Page(HTMLParser):
    def __init__(self):
        super().__init__()
        self.tags, self.attributes, self.text = set(), [], ""

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        self.attributes += attributes

    def handle_data(self, data):
        self.text += data


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_text_stays_text(beam, tmp_path, text):
    run = hostile_run(beam, tmp_path / "run", text)
    assert run.damage == ()
    assert (run.prompt, run.nodes[0].note, run.nodes[0].values[text].parts) == (text, {text: [text]}, {text: 2.0})
    shown = Page()
    shown.feed(run._repr_html_().encode("utf-8", "surrogatepass").decode("utf-8", "replace"))
    assert shown.tags <= {"div", "p", "b", "figure", "img", "figcaption", "table", "caption", "tr", "th", "td"}
    assert {name for name, _ in shown.attributes} <= {"style", "src", "alt"}
    assert all(value.startswith("data:image/png;base64,") for name, value in shown.attributes if name == "src")
    assert repr(run).isprintable()

    write_graphml(run, tmp_path / "tree.graphml")
    known = graph(run.tree)
    read = nx.read_graphml(tmp_path / "tree.graphml", node_type=int)
    assert dict(read.nodes(data=True)) == dict(known.nodes(data=True))
    assert list(read.edges(data=True)) == list(known.edges(data=True))

    write_csv(run, tmp_path / "tree.csv")
    rows = list(csv.reader(io.StringIO((tmp_path / "tree.csv").read_text(encoding="utf-8"), newline="")))
    assert len(rows) == len(run.nodes) + 1
    assert len({len(row) for row in rows}) == 1
    for cell in (cell for row in rows for cell in row):
        assert not cell.strip(" \t\r\n").startswith(("=", "+", "@")), cell
        assert not cell.startswith("-") or float(cell) < 0, cell

    write_json(run, tmp_path / "run.json")
    again = runfolder.read_json(tmp_path / "run.json")
    assert again["prompt"] == text
    assert SavedTree.from_json(again["tree"]).to_json() == run.tree.to_json()


@given(rows=st.lists(st.lists(st.text(st.characters(exclude_characters="\0"), max_size=8), min_size=2, max_size=2), max_size=4))
def test_tables_hold_any_text_and_no_formula(rows):
    read = list(csv.reader(io.StringIO(csv_text(["a", "b"], rows).decode(), newline="")))
    for row, back in zip([["a", "b"], *rows], read, strict=True):
        for cell, shown in zip(row, back, strict=True):
            text = cell.encode("utf-8", "backslashreplace").decode()
            assert shown in (text, f"'{text}")
            assert shown.lstrip()[:1] not in ("=", "+", "-", "@")


# Tables and graphs ---------------------------------------------------------------------------------------------------


def test_a_graph_in_one_call(result, tmp_path):
    run = load_run(result.path)
    found = run.to_networkx()
    assert nx.is_forest(found.to_undirected())
    assert list(found.nodes) == [node.index for node in run.nodes]
    assert {(a, b) for a, b in found.edges} == {(node.parent.index, node.index) for node in run.nodes if node.parent is not None}
    assert [n for n, best in found.nodes(data="best") if best] == [run.best.index]
    assert sorted(n for n, on in found.nodes(data="on_best_path") if on) == sorted(node.index for node in run.path_to(run.best))
    assert all(type(value) in (int, float, str, bool) for _, facts in found.nodes(data=True) for value in facts.values())
    for node in run.nodes:
        assert found.nodes[node.index].get("score") == node.score(run.verifier)
        assert found.nodes[node.index]["path_nfe"] == sum(one.nfe for one in node.path())
    nx.write_graphml_xml(found, tmp_path / "networkx.graphml")
    write_graphml(run, tmp_path / "ours.graphml")
    for name in ("networkx", "ours"):
        read = nx.read_graphml(tmp_path / f"{name}.graphml", node_type=int)
        assert dict(read.nodes(data=True)) == dict(found.nodes(data=True))
        assert set(read.edges) == set(found.edges)
        assert {name: read.graph[name] for name in found.graph} == found.graph


def test_a_frame_in_one_call_where_pandas_is_there(beam, monkeypatch):
    run = load_run(beam.path)
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(SetupError, match="to_pandas needs pandas, which is not installed; run: pip install pandas"):
        run.to_pandas()
    monkeypatch.setitem(sys.modules, "pandas", SimpleNamespace(DataFrame=lambda rows, columns: [dict(zip(columns, row, strict=True)) for row in rows]))
    frame = run.to_pandas()
    assert [row["index"] for row in frame] == list(range(len(run.nodes)))
    assert [row["parent"] for row in frame] == [None if node.parent is None else node.parent.index for node in run.nodes]
    assert [row["score"] for row in frame] == [node.score(run.verifier) for node in run.nodes]
    parts = {f"value {key}/{part}" for node in run.nodes for key, value in node.values.items() for part in value.parts or ()}
    assert parts
    assert parts <= set(frame[0])


def test_the_summary_has_a_line_for_each_run(tmp_path):
    results = search(tmp_path, "best-of-n", [PROMPT, "near (0, 0)"], seed=[0, 1], nfe=8)
    rows = rows_of(tmp_path / "run-0001" / "summary.csv")
    for row, result in zip(rows, results, strict=True):
        assert (row["prompt"], int(row["seed"]), row["policy"], row["model"], row["verifier"]) == (result.prompt, result.seed, "best-of-n", "gaussian", "gaussian-target")
        assert (float(row["score"]), float(row["baseline"])) == (result.score, result.first_score)
        assert (int(row["nfe"]), int(row["rows"]), int(row["decodes"])) == (result.ledger.nfe, result.ledger.rows, result.ledger.decodes)
        assert (int(row["calls"]), float(row["seconds"]), row["status"]) == (sum(result.ledger.verifier_calls.values()), round(result.seconds, 3), "done")
        assert (tmp_path / "run-0001" / row["folder"]).samefile(result.path)
    runs = load_runs(tmp_path)
    assert [run.path for run in runs] == [result.path for result in results]
    with pytest.raises(UsageError, match="holds 4 runs; name one of them, such as"):
        load_run(tmp_path / "run-0001")


# Folders -------------------------------------------------------------------------------------------------------------


def test_runs_are_found_in_any_depth_and_unreadable_ones_are_a_warning(beam, tmp_path):
    for name in ("a/b/one", "two", "c/three"):
        shutil.copytree(beam.path, tmp_path / name)
    (tmp_path / "two" / "inner").mkdir()
    (tmp_path / "two" / "inner" / "tree.json").write_text("{}")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "run.json").write_text("{")
    with pytest.warns(TsdiffWarning, match="left out: nothing of the run '.*broken' can be read"):
        runs = load_runs(tmp_path)
    assert [run.path.relative_to(tmp_path).as_posix() for run in runs] == ["a/b/one", "c/three", "two"]
    assert load_run(tmp_path / "a").path == tmp_path / "a/b/one", "the only run in a folder is meant by it"
    assert load_runs(tmp_path / "c/three")[0].path == tmp_path / "c/three"


@pytest.mark.parametrize(
    ("path", "message"),
    [("nowhere", "is not the folder of a run; `tsdiff list runs`"), ("run/tree.json", "is not the folder of a run; name its folder, '.*run'"), ("empty", "is not the folder of a run, and holds none")],
)
def test_what_is_no_run_is_told(beam, tmp_path, path, message):
    shutil.copytree(beam.path, tmp_path / "run")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match=message):
        load_run(tmp_path / path)


def test_it_shows_itself(beam):
    run = tsdiff.load_run(str(beam.path))
    assert isinstance(run, SavedRun)
    assert f"done: '{PROMPT}' seed 0, beam, gaussian-target {run.score:.4g} (one sample: {run.first_score:.4g}), {run.ledger['nfe']} NFE" in repr(run)
    assert run._repr_html_() == page(run)
    assert page(run).count("<img") == 2
    assert run.size == sum(path.stat().st_size for path in beam.path.rglob("*") if path.is_file())


# Versions ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", sorted(folder.name for folder in STORED.iterdir() if folder.is_dir()))
def test_runs_of_every_version_open(version):
    done, part = load_run(STORED / version / "done"), load_run(STORED / version / "unfinished")
    for run in (done, part):
        assert (run.prompt, run.seed, run.policy, run.model, run.verifier, run.damage) == (PROMPT, 1, "beam", "gaussian", "gaussian-target", ())
        assert run.arguments["policy_options"] == {"width": 1, "branch": 2}
    assert (done.status, part.status) == ("done", "interrupted")
    assert (done.score, done.first_score) == (pytest.approx(-9.267, abs=1e-3), pytest.approx(-14.59, abs=1e-2))
    assert done.image().size == (32, 32)
    assert [node.id for node in part.nodes] == [node.id for node in done.nodes[: len(part.nodes)]]
    assert 5 < len(part.nodes) < len(done.nodes)
    for node, latent in part.latents():
        assert torch.equal(latent, done.latent(node.index))


def test_every_version_has_its_stored_runs():
    """Of journals, that is; the JSON files are of format 1 still."""
    assert runfolder.FORMAT == 1
    assert journal_module.latest_version() == len([folder for folder in STORED.iterdir() if folder.is_dir()])


def test_a_stored_expansion_opens_alike_from_both_of_its_records(tmp_path):
    folder = shutil.copytree(STORED / "v2" / "expanded", tmp_path / "run")
    done = load_run(folder)
    assert [node.driver for node in done.nodes][-4:] == [1] * 4  # two copies, re-noised, and what came of them
    assert len(done.facts["drivers"]) == 2
    (folder / "tree.json").unlink()
    again = load_run(folder)
    assert [node.to_json() for node in again.nodes] == [node.to_json() for node in done.nodes]
    assert (again.best.index, again.ledger) == (done.best.index, done.ledger)


def test_older_formats_go_through_the_numbered_steps(monkeypatch):
    """As if the next version called the prompt a wish, and requests asked for by name."""

    def renamed(name, data):
        if name == "run.json":
            data["prompt"] = data["prompt"].upper()
        return data

    monkeypatch.setattr(runfolder, "UPGRADES", (renamed,))
    monkeypatch.setattr(journal_module, "UPGRADES", (lambda record: record | {"nodes": record.get("nodes", [])[:1]} if "request" in record else record,))
    run = load_run(STORED / "v1" / "done")
    assert run.prompt == PROMPT.upper()
    part = load_run(STORED / "v1" / "unfinished")
    assert part.damage, "the step has taken nodes away that later records need"


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
