"""Calibration: quantiles of plain samples, and the plain samples themselves, made once, counted apart and kept."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from fakes import PROMPT, Hooked, Judge, closeness
from hypothesis import given
from hypothesis import strategies as st

from tsdiff.policies.best_of_n import BestOfN
from tsdiff.policies.smc import SMC
from tsdiff.treesearch import registry
from tsdiff.treesearch.basepool import KIND
from tsdiff.treesearch.cache import cache_folder
from tsdiff.treesearch.errors import TsdiffError, UsageError
from tsdiff.treesearch.ledger import Spend
from tsdiff.treesearch.protocols import Pool
from tsdiff.treesearch.search import execute, prepare, search
from tsdiff.verifiers.ensemble import Ensemble
from tsdiff.verifiers.ensemble_tables import Calibration, Table, Tables, between
from tsdiff.worlds.gaussian.verifiers import LogDensity, Target

STEPS = 6
MEMBERS = ["gaussian-target", "gaussian-log-density"]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """An empty cache, and the verifier under its name, whether or not the installed package lists it."""
    monkeypatch.setenv("TSDIFF_CACHE", str(tmp_path / "cache"))
    registry.verifiers.add("ensemble", Ensemble)


def tensor(numbers):
    return torch.as_tensor(np.asarray(numbers, dtype=float))


_SCORES = st.lists(st.floats(-1e3, 1e3, width=32), min_size=2, max_size=20)


# Tables --------------------------------------------------------------------------------------------------------------


@given(scores=st.lists(st.floats(-1e3, 1e3, width=32), min_size=2, max_size=20, unique=True))
def test_the_samples_themselves_are_uniform(scores):
    places = Table(tuple(scores)).quantile(tensor(sorted(scores)))
    assert places.tolist() == pytest.approx([(k + 0.5) / len(scores) for k in range(len(scores))])


@given(scores=_SCORES)
def test_ties_share_the_middle_of_their_places(scores):
    places = Table(tuple(scores)).quantile(tensor(scores)).tolist()
    for score, place in zip(scores, places, strict=True):
        below, equal = sum(one < score for one in scores), scores.count(score)
        assert place == pytest.approx((below + equal / 2) / len(scores))
    assert np.mean(places) == pytest.approx(0.5)


@given(scores=_SCORES, asked=st.lists(st.floats(-1e4, 1e4, width=32), min_size=2, max_size=20))
def test_quantiles_grow_with_the_score_and_stay_between_zero_and_one(scores, asked):
    places = Table(tuple(scores)).quantile(tensor(sorted(asked)))
    assert (places.diff() >= 0).all()
    assert (places >= 0).all()
    assert (places <= 1).all()


def test_beyond_all_samples_the_better_is_still_the_better():
    table = Table((0.0, 1.0, 2.0, 3.0))
    high, low = table.quantile(tensor([3.0, 3.1, 5.0, 20.0])), table.quantile(tensor([0.0, -0.1, -5.0, -20.0]))
    assert (high.diff() > 0).all()
    assert (low.diff() < 0).all()
    assert high[0] == pytest.approx(7 / 8)
    assert high[1] == pytest.approx(1 - math.exp(-0.1 / table.std) / 8)
    assert low.flip(0).tolist() == pytest.approx((1 - table.quantile(tensor([23.0, 8.0, 3.1, 3.0]))).tolist()), "both ends alike"


@given(scores=_SCORES)
def test_standard_scores_have_mean_zero_and_variance_one(scores):
    table = Table(tuple(scores))
    z = table.standard(tensor(scores))
    assert table.std == pytest.approx(np.std(scores), abs=1e-9)
    assert float(z.mean()) == pytest.approx(0.0, abs=1e-6)
    if table.std > 1e-3:
        assert float(z.std(correction=0)) == pytest.approx(1.0)


def test_samples_that_are_all_equal_make_a_table_too():
    table = Table((2.0, 2.0, 2.0))
    assert table.quantile(tensor([1.0, 2.0, 3.0])).tolist() == pytest.approx([0.5 / math.e, 0.5, 1 - 0.5 / math.e])
    assert table.standard(tensor([2.0, 3.0])).tolist() == [0.0, 1.0]
    with pytest.raises(UsageError, match="at least 2 finite scores"):
        Table((1.0,))


def test_nan_stays_nan():
    table = Table((0.0, 1.0))
    assert table.quantile(tensor([math.nan])).isnan().all()
    assert table.standard(tensor([math.nan])).isnan().all()


@given(left=_SCORES, right=_SCORES, share=st.floats(0, 1))
def test_between_two_levels_every_order_statistic_lies_between(left, right, share):
    a, b = Table(tuple(left)), Table(tuple(right))
    table = between(a, b, share)
    if len(left) == len(right):
        assert table.scores == pytest.approx([(1 - share) * x + share * y for x, y in zip(a.scores, b.scores, strict=True)], abs=1e-6)
    assert min(a.scores[0], b.scores[0]) - 1e-6 <= table.scores[0] <= table.scores[-1] <= max(a.scores[-1], b.scores[-1]) + 1e-6


def test_levels_without_a_table_of_their_own():
    tables = Tables("a", {1: [0.0, 1.0], 5: [10.0, 11.0], 9: [3.0]})
    assert tables.at(3).scores == (5.0, 6.0)
    assert tables.at(2).scores == (2.5, 3.5), "whatever was asked before"
    assert tables.at(0) is None
    assert tables.at(6) is None, "one score is no table"


def test_every_row_is_placed_by_its_own_level():
    schedule = Hooked().schedule(Hooked().solver(None, None), 4, None)
    calibration = Calibration(schedule, {"a": {1: [0.0, 2.0], 4: [10.0, 12.0]}, "b": {1: [5.0, 7.0], 4: [5.0, 7.0]}})
    scores = tensor([[1.0, 6.0], [11.0, 6.0], [1.0, 6.0]])
    assert calibration.quantile(scores, [1, 4, 0]).tolist() == [[0.5, 0.5], [0.5, 0.5], [pytest.approx(math.nan, nan_ok=True)] * 2]
    assert calibration.standard(scores, [1, 4, 1])[:2].tolist() == [[0.0, 0.0], [0.0, 0.0]]
    assert calibration.missing(0) == ["a", "b"]


@given(last=st.integers(1, 60), levels=st.integers(0, 12))
def test_levels_are_spread_evenly_and_end_with_the_last(last, levels):
    chosen = Pool((), 2, levels).at(last)
    assert chosen[-1] == last
    assert list(chosen) == sorted(set(chosen))
    assert len(chosen) == (last + 1 if levels == 0 else min(levels, last + 1))
    if len(chosen) > 1:
        assert chosen[0] == 0
        assert max(np.diff(chosen)) - min(np.diff(chosen)) <= 1


# Plain samples -------------------------------------------------------------------------------------------------------


def judged(**options):
    settings = {"policy": BestOfN(n=3), "verifier": MEMBERS, "ensemble": "quantile:samples=10,levels=0", "steps": STEPS}
    return search("gaussian", PROMPT, **settings | options)


def files():
    return sorted((cache_folder() / KIND).glob("*.json")) if (cache_folder() / KIND).exists() else []


def scores_of(path):
    return json.loads(path.read_text())["entry"]["scores"]


def test_a_table_is_made_once_and_kept():
    first, second = judged(), judged(seed=5)
    (made,), (found,) = first.calibrated, second.calibrated
    assert made.made
    assert not found.made
    assert made.path == found.path == files()[0]
    assert made.ledger == found.ledger
    assert first.score == judged().score, "from the cache or not"


def test_plain_samples_have_their_own_ledger_line_and_leave_the_budget_alone():
    model = Hooked()
    judges = [Judge("close", closeness), Judge("left", lambda c: -c.x0[:, 0])]
    plan = prepare(model, PROMPT, policy=BestOfN(n=3), verifiers=judges, ensemble="quantile:samples=10,levels=0", steps=STEPS, nfe=18)
    results = execute(plan)
    (line,) = results.calibrated
    assert line.made
    assert line.reason == "verifier close is no dataclass, so that its content is unknown"
    spent = Spend(line.ledger.nfe, line.ledger.decodes, sum(line.ledger.verifier_calls.values()))
    assert spent == plan.calibration_cost == Spend(10 * STEPS, 1, 10 * (STEPS + 1))
    assert results[0].ledger.nfe == 18
    assert results.engine.network_rows + line.engine.network_rows == model.seen, "no row is uncounted"
    plain = search(Hooked(), PROMPT, policy=BestOfN(n=3), verifier=Judge("close", closeness), steps=STEPS, nfe=18)
    assert [node.id for node in plain.tree.nodes] == [node.id for node in results[0].tree.nodes]
    assert any("10 samples are made first and scored at 7 of 7 levels (60 NFE, 1 decodes), beside the search's budget" in line for line in plan.notices)
    assert plan.to_json()["calibration_cost"] == {"nfe": 60, "decodes": 1, "verifier_calls": 70}
    assert json.dumps(results[0].to_json(), allow_nan=False)


@pytest.mark.parametrize("images", [True, False])
@pytest.mark.parametrize("prompts", [1, 3, 7])
def test_the_cost_is_exact_for_any_prompts(prompts, images):
    judges = [Judge("close", closeness), Judge("dark", lambda c: -c.x0[:, 0], needs=["images", "x0"] if images else ["x0"])]
    several = [f"near ({i}, 2)" for i in range(prompts)]
    plan = prepare(Hooked(), several, policy=BestOfN(n=1), verifiers=judges, ensemble="zscore:samples=5,levels=3", steps=STEPS)
    (line,) = execute(plan).calibrated
    assert Spend(line.ledger.nfe, line.ledger.decodes, sum(line.ledger.verifier_calls.values())) == plan.calibration_cost
    assert line.levels == (0, 3, 6)


CHANGES = {
    "prompt": {"prompts": "near (1, 1)"},
    "steps": {"steps": STEPS + 1},
    "solver": {"solver": "ddpm"},
    "guidance": {"class_label": 3, "guidance_scale": 2.0},
    "a member's option": {"verifier": ["gaussian-target:rho=2", "gaussian-log-density"]},
    "samples": {"ensemble": "quantile:samples=11,levels=0"},
    "levels": {"ensemble": "quantile:samples=10,levels=2"},
    "model": {"model": "gaussian:process=flow"},
    "deterministic": {"deterministic": True},
}


@pytest.mark.parametrize("change", CHANGES)
def test_whatever_the_scores_follow_from_has_a_table_of_its_own(change):
    settings = {"model": "gaussian", "prompts": PROMPT, "policy": BestOfN(n=1), "verifier": MEMBERS, "ensemble": "quantile:samples=10,levels=0", "steps": STEPS}
    search(**settings)
    search(**settings | {"policy": BestOfN(n=2), "seed": 9, "nfe": 60, "ensemble": "zscore:samples=10,levels=0"})
    assert len(files()) == 1, "the search itself is not among it"
    search(**settings | CHANGES[change])
    assert len(files()) == 2


def test_plain_samples_are_uniform_under_their_own_quantiles_at_every_level():
    judged()
    scores = scores_of(files()[0])
    assert set(scores) == set(MEMBERS)
    for columns in scores.values():
        assert sorted(map(int, columns)) == list(range(STEPS + 1))
        for column in columns.values():
            assert len(column) == 10
            assert sorted(Table(tuple(column)).quantile(tensor(column)).tolist()) == pytest.approx([(k + 0.5) / 10 for k in range(10)])


def test_new_plain_samples_are_nearly_uniform():
    """Both empirical distributions are within sqrt(ln(2/d) / 2n) of the true one, each with probability 1 - d (DKW); d = 1e-6."""
    result = judged(policy=BestOfN(n=400), ensemble="quantile:samples=400,levels=1", baseline=False)
    tables = {name: Table(tuple(columns[str(STEPS)])) for name, columns in scores_of(files()[0]).items()}
    value = result.tree.verifier
    for name, table in tables.items():
        fresh = [node.values[value].parts[name] for node in result.tree.nodes if node.level == STEPS]
        places = np.sort(table.quantile(tensor(fresh)).numpy())
        distance = np.abs(places - (np.arange(400) + 0.5) / 400).max()
        assert distance < 2 * math.sqrt(math.log(2 / 1e-6) / (2 * 400)) + 1 / 400
        assert set(fresh).isdisjoint(table.scores), "they are other samples"


def test_scores_compare_across_levels_and_may_weigh_particles():
    result = judged(policy=SMC(particles=4), solver="ddpm")
    values = [value.score for node in result.tree.nodes for value in node.values.values()]
    assert values
    assert all(0.0 < value < 1.0 for value in values)
    assert len({node.level for node in result.tree.nodes if node.values}) > 2


def test_levels_in_between_are_interpolated():
    result = judged(policy="beam", policy_options={"width": 2, "branch": 2}, ensemble="quantile:samples=8,levels=2")
    scored = [node for node in result.tree.nodes if node.values and 0 < node.level < STEPS]
    assert scored
    assert all(0.0 < node.score(result.tree.verifier) < 1.0 for node in scored)


def test_a_row_is_placed_alone():
    """Scores of one search do not depend on how many samples were judged together."""
    few = judged(policy=BestOfN(n=1)).tree
    many = judged(policy=BestOfN(n=20)).tree
    value = few.verifier
    same = {node.id: node.score(value) for node in many.nodes if node.level == STEPS}
    (leaf,) = [node for node in few.nodes if node.level == STEPS]
    assert leaf.score(value) == pytest.approx(same[leaf.id], abs=1e-5)


def test_a_damaged_file_is_made_again():
    first = judged()
    path = first.calibrated[0].path
    for damage in ("", "{}", path.read_text()[:100], path.read_text().replace('"rare-mode"', '"two-modes"')):
        path.write_text(damage)
        again = judged()
        assert again.calibrated[0].made
        assert again.score == first.score
    assert [one.name for one in path.parent.iterdir()] == [path.name], "nothing else is left behind"


def test_what_has_no_content_to_hash_is_made_every_time():
    function = lambda images, prompts: images.flatten(1).mean(1)  # noqa: E731
    (line,) = judged(verifier=["gaussian-target", function]).calibrated
    assert line.made
    assert line.path is None
    assert "function of verifier callable is a function, whose content is unknown" in line.reason
    assert not files()


def test_a_cache_that_cannot_be_written_is_no_reason_to_fail(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TSDIFF_CACHE", str(tmp_path / "file"))
    (line,) = judged().calibrated
    assert line.made
    assert "cannot be written" in line.reason


def test_the_cache_is_where_the_user_says(monkeypatch):
    monkeypatch.setenv("TSDIFF_CACHE", "~/mine")
    assert cache_folder() == Path.home() / "mine"
    monkeypatch.delenv("TSDIFF_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert cache_folder() == Path("/somewhere/tsdiff")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == Path.home() / ".cache/tsdiff"


def test_a_run_folder_says_what_it_was_compared_with(tmp_path):
    result = judged(out=tmp_path / "runs")
    record = json.loads((result.path / "run.json").read_text())
    (line,) = record["result"]["calibrated"]
    assert line["ledger"]["nfe"] == 10 * STEPS
    assert line["levels"] == list(range(STEPS + 1))
    assert json.loads((result.path / "index.json").read_text())["calibrated"] == [line]


@pytest.mark.parametrize("bad", ["nothing", "errors"])
def test_a_member_that_can_score_no_plain_sample_ends_the_search_before_it_begins(tmp_path, bad):
    def value(candidates):
        if bad == "errors":
            raise RuntimeError("no such picture")
        return torch.full((len(candidates),), math.nan)

    judges = [Judge("close", closeness), Judge("blind", value)]
    told = {"nothing": "member blind could score 0 finished plain samples", "errors": "no finished plain sample could be scored.*RuntimeError: no such picture"}
    with pytest.raises(TsdiffError, match=told[bad]):
        search(Hooked(), PROMPT, policy=BestOfN(n=2), verifier=judges, ensemble="quantile:samples=4", steps=STEPS, out=tmp_path / "runs")
    assert list(tmp_path.iterdir()) == [], "neither a run nor its folder is left behind"


def test_deterministic_tables_have_the_same_bytes_whatever_runs_beside():
    judged(deterministic=True)
    (one,) = files()
    before = one.read_bytes()
    one.unlink()
    judged(deterministic=True, policy=BestOfN(n=7), seed=(3, 4))
    assert files() == [one]
    assert one.read_bytes() == before


def test_members_know_a_table_only_for_their_own_schedule():
    members = (Target(), LogDensity())
    ensemble = Ensemble(members=members, rule="quantile:samples=4,levels=1")
    search("gaussian", PROMPT, policy=BestOfN(n=1), verifier=ensemble, steps=STEPS)
    other = search("gaussian", PROMPT, policy=BestOfN(n=1), verifier=ensemble, steps=STEPS + 1)
    assert other.score is not None, "a search makes its own"
    assert len(files()) == 2
