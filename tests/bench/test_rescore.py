"""Saved trees under other verifiers: the same scores again, nothing denoised, what cannot be scored, what is written."""

from __future__ import annotations

import json
import math
import shutil
from types import SimpleNamespace

import pytest
import tiny_dino
import torch
from all_verifiers import save_value
from fakes import Hooked, Judge, Jury, closeness
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import spearmanr

import tsdiff
from tsdiff.bench.answers import load_searches
from tsdiff.bench.hacking import hacking_report
from tsdiff.bench.rescore import NOT_KEPT, UNFINISHED, Rescore, rescore
from tsdiff.treesearch.errors import UsageError
from tsdiff.treesearch.lock import Lock
from tsdiff.treesearch.node import Value
from tsdiff.treesearch.plan import prepare
from tsdiff.treesearch.protocols import Condition
from tsdiff.treesearch.rescored import Rescored, read_rescored, write_rescored
from tsdiff.treesearch.saved import load_run
from tsdiff.treesearch.search import execute
from tsdiff.worlds.gaussian.model import GaussianModel

BEAM = {"policy": "beam", "policy_options": {"width": 2, "branch": 2}, "steps": 6}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Beams of two prompts under two seeds."""
    folder = tmp_path_factory.mktemp("home")
    tsdiff.search("gaussian", ["near (3, 2.4)", "near (1, 1)"], **BEAM, verifier=["gaussian-target", "luminance"], seed=(0, 1), out=folder)
    return folder / "run-0001"


@pytest.fixture
def one(home, tmp_path):
    """A copy of one of the runs."""
    return shutil.copytree(next(path for path in sorted(home.iterdir()) if path.is_dir()), tmp_path / "one")


def files(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


# Right scores --------------------------------------------------------------------------------------------------------


def test_a_verifier_says_the_same_again_and_nothing_is_denoised(one, monkeypatch):
    monkeypatch.setattr(GaussianModel, "forward", lambda *given: pytest.fail("the network was evaluated"))
    for found in rescore([one], ["gaussian-target", "luminance"]):
        run = load_run(one)
        saved = {node.index: node.values[found.verifier] for node in run.tree.finished}
        assert len(saved) > 1
        assert set(found.found.values) == set(saved)
        for index, value in found.found.values.items():
            assert value.score == pytest.approx(saved[index].score, rel=1e-6)
            assert (value.parts or {}) == pytest.approx(saved[index].parts or {})
        assert found.skipped == {}
    assert found.old == {node.index: node.score("gaussian-target") for node in run.tree.finished}, "the other verifier steered"


def test_the_answer_under_its_own_verifier_is_the_best_and_no_place_has_changed(one):
    (found,) = rescore([one], ["gaussian-target"])
    assert found.best == load_run(one).best.index
    assert found.spearman == pytest.approx(1.0)
    assert [change for _, _, change in found.ranks()] == [0] * len(found.new)


def test_verifiers_of_latents_judge_every_node_and_the_others_say_how_many_they_cannot(one):
    reads_latents = Judge("latents", lambda candidates: candidates.latents.sum(1), needs=("latents", "levels"))
    everywhere, estimates, pictures = rescore([one], [reads_latents, Judge("x0"), Judge("seen", lambda candidates: candidates.images.mean((1, 2, 3)), needs=("images",))], at="x0", model=Hooked())
    run = load_run(one)
    on_the_way = [node for node in run.nodes if node.level < run.tree.last and not node.draft]
    assert on_the_way
    for index, value in everywhere.found.values.items():
        assert value.score == pytest.approx(float(run.latent(index).sum()), abs=1e-5)
    assert set(everywhere.new) == {node.index for node in run.nodes}
    assert everywhere.skipped == {}
    for found in (estimates, pictures):
        assert set(found.new) == {node.index for node in run.tree.finished}
        assert found.skipped == {UNFINISHED: len(on_the_way)}
    for index, value in estimates.found.values.items():
        assert value.score == pytest.approx(float(closeness_of(run.latent(index))), abs=1e-5)


def closeness_of(latent):
    return closeness(SimpleNamespace(x0=latent[None]))[0]


def test_trees_share_batches_and_a_picture_is_decoded_once_for_all_that_look(home):
    model, judges = Hooked(), [Judge(name, lambda candidates: candidates.images.mean((1, 2, 3)), needs=("images",)) for name in ("one", "two")]
    found = rescore([home], judges, model=model, write=False)
    assert len(found) == 8
    finished = sum(len(load_run(path).tree.finished) for path in home.iterdir() if path.is_dir())
    assert sum(model.decodes) == finished
    assert model.seen == 0
    for judge in judges:
        assert judge.rows == finished
        assert max(len(ids) for ids, _ in judge.batches) == min(16, finished), "full batches, of several trees"
    assert [one.path for one in found] == [None] * 8


def test_facts_about_a_prompt_are_the_searchs_own(tmp_path):
    """They are with the arguments of the run, not in its tree."""
    seen = []

    def remember(candidates):
        seen.extend(dict(condition.metadata) for condition in candidates.conditions)
        return candidates.x0.sum(1)

    facts = {"questions": ["is it near?"], "tag": {"deep": [1, None]}}
    prompts = [Condition("near (1, 1)", metadata=facts), Condition("near (2, 1)")]
    for count in (1, 2):
        tsdiff.search("gaussian", prompts[:count], policy="best-of-n", policy_options={"n": 2}, steps=3, out=tmp_path / str(count))
        seen.clear()
        rescore([tmp_path / str(count)], [Judge("asks", remember, needs=("x0", "conditions"))], write=False)
        assert seen == [facts] * 2 + [{}] * 2 * (count - 1)


def test_an_interrupted_search_is_scored_as_far_as_it_is(tmp_path):
    left = iter(range(9))
    plan = prepare("gaussian", "near (1, 1)", policy="best-of-n", policy_options={"n": 60}, steps=4, baseline=False, out=tmp_path)
    with pytest.raises(KeyboardInterrupt):
        execute(plan, stop=lambda: next(left, None) is None)
    run = load_run(tmp_path)
    assert run.status == "interrupted"
    reads_latents = Judge("latents", lambda candidates: candidates.latents.sum(1), needs=("latents",))
    before = files(run.path)
    (found,) = rescore([run], [reads_latents], at="x0")
    assert len(found.new) == len([node for node in run.nodes if node.index in run.tree.places]) > 0
    assert before.items() <= files(run.path).items()


# What is written -----------------------------------------------------------------------------------------------------


def test_one_file_is_written_beside_the_run_and_nothing_else_changes(one):
    before = files(one)
    (found,) = rescore([one], ["sharpness"])
    after = files(one)
    assert {name for name in after if name not in before} == {"rescored/sharpness.json"}
    assert before.items() <= after.items()
    assert found.path == one / "rescored/sharpness.json"
    data = json.loads(after["rescored/sharpness.json"])
    assert data["format"] == 1
    assert data["against"] == "gaussian-target"
    assert data["fingerprint"] == load_run(one).facts["fingerprint"]
    assert load_run(one).rescored == read_rescored(one) == {"sharpness": found.found}
    assert load_run(one).status == "done"
    rescore([one], ["sharpness", "luminance"])
    assert set(read_rescored(one)) == {"sharpness", "luminance"}
    assert (one / "rescored/sharpness.json").read_bytes() == after["rescored/sharpness.json"], "the same again"


names = st.text(st.characters(codec="utf-8", exclude_characters=":=,@ \t\n\0"), min_size=1, max_size=20)


@given(name=names, scores=st.dictionaries(st.integers(0, 1 << 40), st.none() | st.floats(allow_nan=False, allow_infinity=False), max_size=5))
def test_any_name_and_any_scores_survive_the_disk(tmp_path_factory, name, scores):
    folder = tmp_path_factory.mktemp("run")
    values = {index: Value(score, None if score is None else {"part": score}, "why" if score is None else None) for index, score in scores.items()}
    found = Rescored(name, values, {"at": "final", "sha256": None})
    path = write_rescored(folder, found)
    assert path.parent == folder / "rescored"
    assert read_rescored(folder) == {name: found}


@pytest.mark.parametrize("content", ["", "[]", '{"format": 1}', '{"format": 1, "verifier": "other", "values": {}}', '{"format": 1, "verifier": "sharpness", "values": {"0": {"score": "x"}}}', '{"format": 9, "verifier": "sharpness", "values": {}}'])
def test_a_damaged_file_is_told(tmp_path, content):
    (tmp_path / "rescored").mkdir()
    (tmp_path / "rescored/sharpness.json").write_text(content)
    with pytest.raises(UsageError, match=r"rescored/sharpness\.json' (cannot be read|has format 9)"):
        read_rescored(tmp_path)


def test_a_folder_that_cannot_be_written_is_told(one):
    (one / "rescored").write_text("a file")
    with pytest.raises(Exception, match="rescored"):
        rescore([one], ["sharpness"])


def test_scores_of_whole_runs_hold_verifiers_out(tmp_path):
    """`hacking-report --within` needs a score of every sample, which only a search or rescoring gives."""
    tsdiff.search("gaussian", "near (1, 1)", policy="best-of-n", policy_options={"n": 4}, steps=3, seed=(0, 1), out=tmp_path)
    with pytest.raises(UsageError, match="`tsdiff rescore RUN --verifier"):
        hacking_report([tmp_path], held_out="luminance", within=True)
    found = rescore([tmp_path], ["luminance"])
    report = hacking_report([tmp_path], held_out="luminance", within=True)
    (curve,) = report.curves
    every = [score for one in found for score in one.new.values()]
    assert curve.points[0].scores["held_out"] == pytest.approx(sum(every) / len(every)), "best of one is a sample by chance"
    held = [sample.scores["luminance"] for search in load_searches([tmp_path]) for sample in search.samples]
    assert sorted(held) == sorted(every)


# Ranks ---------------------------------------------------------------------------------------------------------------


class Tree:
    verifier = "old"


pairs = st.lists(st.tuples(st.none() | st.integers(-3, 3), st.none() | st.integers(-3, 3)), max_size=12)


@given(pairs)
def test_ranks_changes_and_correlation_are_those_of_the_definition(scores):
    new = {index: Value(None if fresh is None else float(fresh), reason="why" if fresh is None else None) for index, (_, fresh) in enumerate(scores)}
    made = Rescore(Tree(), Rescored("new", new), {index: None if old is None else float(old) for index, (old, _) in enumerate(scores)}, {})
    rows = made.ranks()
    known = [index for index, (_, fresh) in enumerate(scores) if fresh is not None]
    assert [index for index, _, _ in rows] == sorted(known, key=lambda index: (-scores[index][1], index))
    assert [rank for _, rank, _ in rows] == list(range(1, len(known) + 1))
    assert made.best == (rows[0][0] if rows else None)
    both = [index for index in known if scores[index][0] is not None]
    changes = {index: change for index, _, change in rows if change is not None}
    assert set(changes) == set(both)
    assert sum(changes.values()) == 0, "what one gains another loses"
    for index in both:
        above_before = sum((-scores[other][0], other) < (-scores[index][0], index) for other in both)
        above_now = sum((-scores[other][1], other) < (-scores[index][1], index) for other in both)
        assert changes[index] == above_before - above_now
    columns = list(zip(*((scores[index][0], scores[index][1]) for index in both), strict=True)) or [(), ()]
    if min(len(set(column)) for column in columns) > 1:
        assert made.spearman == pytest.approx(spearmanr(*columns).statistic)
    else:
        assert made.spearman is None


# What fails, and what is refused -------------------------------------------------------------------------------------


def test_a_latent_that_cannot_be_decoded_and_a_score_that_is_none_fail_alone(tmp_path):
    tsdiff.search("gaussian", "near (1, 1)", policy="best-of-n", policy_options={"n": 6}, steps=3, out=tmp_path)
    model, first = Hooked(), []

    def blind(latents):
        first.append(first or latents[0].clone())
        if any(torch.equal(row, first[0]) for row in latents):
            raise ValueError("this latent is poison")

    model.blind = blind

    def some(candidates):
        scores = candidates.images.mean((1, 2, 3))
        scores[-1] = math.nan
        return scores

    (found,) = rescore([tmp_path], [Judge("seen", some, needs=("images",))], model=model)
    reasons = [value.reason for value in found.found.values.values() if value.score is None]
    assert len(reasons) == 2
    assert any("poison" in reason for reason in reasons)
    assert any("seen gave nan" in reason for reason in reasons)
    assert len(found.ranks()) == 4
    assert read_rescored(found.run.path)["seen"] == found.found


def test_what_was_not_kept_is_counted(tmp_path):
    counts = {}
    for keep in ("all", "leaves", "path"):
        tsdiff.search("gaussian", "near (1, 1)", **BEAM, keep=keep, out=tmp_path / keep)
        (found,) = rescore([tmp_path / keep], ["luminance"])
        counts[keep] = len(found.new), found.skipped
    finished = counts["all"][0]
    assert counts == {"all": (finished, {}), "leaves": (finished, {}), "path": (1, {NOT_KEPT: finished - 1})}
    tsdiff.search("gaussian", "near (1, 1)", **BEAM, keep="none", out=tmp_path / "none")
    with pytest.raises(UsageError, match="has kept no latent of a node that could be scored; search with --keep all"):
        rescore([tmp_path / "none"], ["luminance"])


class Pooled(Judge):
    """Compares with plain samples."""

    pool = ("samples",)

    def calibrate(self, schedule, scores):
        """Never called."""


def test_verifiers_that_cannot_judge_a_saved_node_are_refused_by_name(one, tmp_path):
    dino = tiny_dino.save_dino(tmp_path / "dino")
    for verifier, complaint in (
        ("ensemble:rule=rank,members=luminance,sharpness", r"verifier rank\(luminance\+sharpness\) scores relative to a whole set"),
        (Judge("ranks", scope="set"), "verifier ranks scores relative to a whole set"),
        ("human", "verifier human answers later"),
        (Jury("jury"), "verifier jury answers later"),
        ("ensemble:rule=quantile,members=luminance,sharpness", r"quantile\(luminance\+sharpness\) compares with plain samples"),
        (Pooled("pooled"), "verifier pooled compares with plain samples"),
        (f"self-supervised:model={dino}", r"verifier self-supervised reads ancestor_images@0\.66\d*, which runs do not keep"),
    ):
        with pytest.raises(UsageError, match=complaint):
            rescore([one], [verifier])
    with pytest.raises(UsageError, match="'luminance' is given twice"):
        rescore([one], ["luminance", "luminance"])
    with pytest.raises(UsageError, match="no verifier was given"):
        rescore([one], [])
    assert not (one / "rescored").exists()


def test_other_weights_than_the_runs_are_refused(one):
    facts = json.loads((one / "run.json").read_text())
    (one / "run.json").write_text(json.dumps(facts | {"fingerprint": "gaussian-other"}))
    with pytest.raises(UsageError, match=r"was made with other weights \(gaussian-other\) than 'gaussian' has now \(gaussian-"):
        rescore([one], ["luminance"])
    assert rescore([one], ["gaussian-target"]), "a verifier of clean estimates decodes nothing"


def test_a_value_of_another_model_is_refused(one, tmp_path):
    value = save_value(tmp_path / "value")
    assert rescore([one], [f"value:{value}"], at="x0")
    config = json.loads((value / "value.json").read_text())
    (value / "value.json").write_text(json.dumps(config | {"fingerprint": "other"}))
    with pytest.raises(UsageError, match="was fitted to the model"):
        rescore([one], [f"value:{value}"])


def test_a_model_that_no_file_holds_has_to_be_given(tmp_path):
    model = Hooked()
    tsdiff.search(model, "near (1, 1)", policy="best-of-n", policy_options={"n": 2}, steps=3, verifier="gaussian-target", out=tmp_path)
    with pytest.raises(UsageError, match=r"was made with a model that no file holds \(Hooked.*model=\.\.\.\)"):
        rescore([tmp_path], ["luminance"])
    (found,) = rescore([tmp_path], ["luminance"], model=model)
    assert len(found.new) == 2


def test_runs_that_are_none_or_are_being_written_are_refused(one, tmp_path):
    with pytest.raises(UsageError, match="is not the folder of a run"):
        rescore([tmp_path / "nowhere"], ["luminance"])
    with pytest.raises(UsageError, match="no runs were given"):
        rescore([], ["luminance"])
    (one / "run.json").write_text(json.dumps(json.loads((one / "run.json").read_text()) | {"status": "running"}))
    with Lock(one / "lock"), pytest.raises(UsageError, match="is being written; wait for its search to end"):
        rescore([load_run(one)], ["luminance"])


def test_a_prompt_that_a_verifier_cannot_judge_is_told_before_anything_loads(one):
    with pytest.raises(UsageError, match="compositional has nothing to judge"):
        rescore([one], ["compositional:question=[luminance],facts=geneval"])


def test_progress_counts_the_nodes(home):
    told = []
    rescore([home], ["luminance"], write=False, progress=lambda done, total: told.append((done, total)))
    assert told[-1][0] == told[-1][1] > 0
    assert [done for done, _ in told] == sorted(done for done, _ in told)
