"""Saved runs say what the searches said, and runs of every version open."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from saved_searches import (
    POLICIES,
    PROMPT,
    QUICK,
    as_killed,
    finished_beam,
    interrupted,
    opened,
    rows_of,
    running_place,
    search,
)

import tsdiff
from tsdiff.treesearch import journal as journal_module
from tsdiff.treesearch import runfolder
from tsdiff.treesearch.errors import TsdiffWarning, UsageError
from tsdiff.treesearch.lock import Lock
from tsdiff.treesearch.saved import SavedRun, load_run, load_runs
from tsdiff.treesearch.savedpage import page
from tsdiff.treesearch.search import execute, prepare

STORED = Path(__file__).parents[1] / "data" / "saved-runs"


@pytest.fixture(scope="module", params=POLICIES)
def result(request, tmp_path_factory):
    (found,) = search(tmp_path_factory.mktemp("saved"), request.param)
    return found


@pytest.fixture(scope="module")
def beam(tmp_path_factory):
    return finished_beam(tmp_path_factory.mktemp("beam"))


@pytest.fixture(scope="module")
def place(tmp_path_factory, beam):
    return running_place(tmp_path_factory.mktemp("place"), beam)


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
