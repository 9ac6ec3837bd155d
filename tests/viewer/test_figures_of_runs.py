"""Pictures of several runs: grids, progress, scores by level, paths over a density."""

from __future__ import annotations

import json
import math
from itertools import product
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.stats
import torch
from PIL import Image
from viewer_runs import STEPS, VERIFIER, Going, node, write_run

import tsdiff
from tsdiff.treesearch.errors import UsageError
from tsdiff.treesearch.saved import load_run, load_runs
from tsdiff.viewer.figures import cards, density, grid, levels, paper, progress, series
from tsdiff.worlds.gaussian.presets import preset

PROMPTS = ["near (3, 2.4)", "near (0, 2)"]
POLICIES = ["best-of-n", "dts"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two prompts, two seeds, two policies."""
    out = tmp_path_factory.mktemp("runs")
    for policy in POLICIES:
        tsdiff.search("gaussian", PROMPTS, policy=policy, verifier="gaussian-target", nfe=24, seed=[0, 1], steps=4, solver="ddpm", out=out)
    return load_runs(out)


# Grids ---------------------------------------------------------------------------------------------------------------


@pytest.fixture
def laid(monkeypatch):
    """What a grid is made of, instead of its image."""
    seen = SimpleNamespace()

    def page(found, side, title, facts, **more):
        seen.cards, seen.title, seen.facts, seen.more = found, title, facts, more
        return Image.new("RGB", (1, 1))

    monkeypatch.setattr(grid, "page", page)
    return seen


def test_each_cell_has_the_best_image_of_its_runs(runs, laid):
    found = grid.arrange(runs, "prompt", "policy")
    assert (found.down, found.across) == (tuple(PROMPTS), tuple(POLICIES))
    _, notices = grid.draw(found)
    assert notices == ["cells hold up to 2 runs, and show the one with the best score"]
    for (row, prompt), (column, policy) in product(enumerate(PROMPTS), enumerate(POLICIES)):
        best = max((run for run in runs if (run.prompt, run.policy) == (prompt, policy)), key=lambda run: run.score)
        card = laid.cards[row][column]
        assert card.image.tobytes() == best.image().convert("RGB").tobytes()
        assert (card.caption, card.aside) == (paper.number(best.score, 4), "best of 2")
    assert (laid.more["rows"], laid.more["columns"]) == (PROMPTS, POLICIES)


def test_plain_samples_are_a_first_column_and_numbers_are_in_order(runs, laid):
    grid.draw(grid.arrange(runs[::-1], "seed", "prompt"), baseline=True)
    assert laid.more["rows"] == ["seed 0", "seed 1"]
    assert laid.more["columns"] == ["one sample", *PROMPTS[::-1]]
    for row, seed in enumerate((0, 1)):
        run = next(run for run in runs[::-1] if run.seed == seed)
        assert laid.cards[row][0].image.tobytes() == run.image("baseline").convert("RGB").tobytes()
        assert laid.cards[row][0].caption == paper.number(run.first_score, 4)


def test_missing_cells_are_shown_as_such(runs, laid, tmp_path):
    some = [run for run in runs if (run.prompt, run.policy) != (PROMPTS[1], "dts")]
    going = Going(tmp_path / "going", prompt="a cat")
    grid.draw(grid.arrange(some, "prompt", "policy"))
    assert (laid.cards[1][1].image, laid.cards[1][1].missing) == (None, "no run")
    grid.draw(grid.arrange([load_run(going.path)], "prompt", "policy"))
    assert (laid.cards[0][0].image, laid.cards[0][0].missing, laid.cards[0][0].caption) == (None, "running", paper.NONE)
    going.close()
    done = load_run(write_run(tmp_path / "done", [node(0, None, 0), node(1, 0, STEPS, score=1.0)]))
    _, notices = grid.draw(grid.arrange([done], "prompt", "policy"))
    assert laid.cards[0][0].missing == "no image"
    assert "has no best.png" in notices[0]


def fake(prompt, seed, policy="beam", score=0.0):
    return SimpleNamespace(
        prompt=prompt, seed=seed, policy=policy, verifier="v", options={}, status="failed", summary=lambda: {"score": score, "baseline": None, "nfe": 1},
        image=lambda which="best": (_ for _ in ()).throw(UsageError("none")),
    )  # fmt: skip


def test_pages_show_every_cell_once(laid):
    found = grid.arrange([fake(f"p{prompt}", seed) for prompt in range(30) for seed in range(10)], "prompt", "seed")
    assert found.pages == 3 * 2
    seen = []
    for number in range(1, found.pages + 1):
        _, notices = grid.draw(found, number)
        seen += list(product(laid.more["rows"], laid.more["columns"]))
        assert len(laid.cards) <= grid.ROWS
        assert max(map(len, laid.cards)) <= grid.COLUMNS
        assert notices[0] == f"{laid.more['foot']}; --page shows another"
    assert sorted(seen) == sorted((f"p{prompt}", f"seed {seed}") for prompt in range(30) for seed in range(10))
    for number in (0, 7):
        with pytest.raises(UsageError, match=f"there is no page {number}; the grid has 6 pages"):
            grid.draw(found, number)


def test_ties_go_to_the_first_and_runs_without_scores_come_last():
    one, two, none = fake("p", 0, score=1.0), fake("p", 1, score=1.0), fake("p", 2, score=None)
    assert grid.arrange([none, one, two], "prompt", "policy").best(0, 0) is one


@pytest.mark.parametrize(("rows", "columns", "hint"), [("prompt", "prompt", "both 'prompt'"), ("prompt", "polcy", "did you mean 'policy'")])
def test_wrong_axes_are_told(runs, rows, columns, hint):
    with pytest.raises(UsageError, match=hint):
        grid.arrange(runs, rows, columns)


def test_a_cell_compares_scores_of_one_verifier_only():
    other = fake("p", 0)
    other.verifier = "w"
    with pytest.raises(UsageError, match="steered by v, w"):
        grid.arrange([fake("p", 0), other], "prompt", "policy")
    assert grid.arrange([fake("p", 0), other], "prompt", "verifier").across == ("v", "w")


def test_cards_stand_where_they_should():
    colours = [[(200, 0, 0), (0, 200, 0)], [(0, 0, 200), (200, 200, 0)]]
    image = cards.page([[cards.Card(Image.new("RGB", (8, 8), one)) for one in row] for row in colours], 64, "title", "facts", columns=["a", "b"], rows=["c", "d"])
    pixels = np.asarray(image)
    centres = [[np.argwhere((pixels == one).all(axis=2)).mean(axis=0) for one in row] for row in colours]
    for row in range(2):
        assert centres[row][0][0] == centres[row][1][0]
        assert centres[row][1][1] - centres[row][0][1] == 64 + cards.GAP
    assert np.ptp(np.argwhere((pixels == colours[0][0]).all(axis=2)), axis=0).tolist() == [63, 63]


# Progress ------------------------------------------------------------------------------------------------------------


def told(run, spend="nfe"):
    """The best score so far from the lines of the journal alone: (spent, best) wherever it rises."""
    found, levels_of, spent, best = [], {}, 0, -math.inf
    for line in (run.path / "journal.jsonl").read_text().splitlines()[1:]:
        record = json.loads(line)["record"]
        if record["tree"] != "search" or "request" not in record or "refused" in record:
            continue
        spent = record["ledger"][spend]
        levels_of |= {one["index"]: one["level"] for one in record["nodes"]}
        scores = [one["value"]["score"] for one in record["effects"] if one["effect"] == "valued" and levels_of[one["node"]] == 4]
        if scores and max(scores) > best:
            best = max(scores)
            found.append((spent, best))
    return found


@pytest.mark.parametrize("axis", ["nfe", "rows"])
def test_steps_are_those_of_the_journal(runs, axis):
    for run in runs:
        found = progress.steps(run, "gaussian-target", axis)
        assert list(zip(found.x, found.y, strict=True)) == told(run, axis)
        assert (found.y[-1], found.end) == (run.score, run.ledger[axis])
        assert found.at(found.x[0] - 0.5) is None
        assert found.at(found.end) == run.score
    assert max(len(told(run)) for run in runs) > 2


def test_seconds_are_spread_over_the_evaluations(runs):
    run = runs[-1]
    found = progress.steps(run, "gaussian-target", "seconds")
    assert found.x == pytest.approx([spent / run.ledger["nfe"] * run.seconds for spent, _ in told(run)])
    assert found.end == run.seconds


def test_curves_are_means_over_prompts_with_their_intervals(runs):
    curves, notices = progress.progress(runs)
    assert [curve.label for curve in curves] == POLICIES
    assert notices == []
    for curve in curves:
        own = [run for run in runs if run.policy == curve.label]
        assert (curve.units, curve.unit) == (2, "prompts")
        assert curve.x[0] == max(told(run)[0][0] for run in own)
        assert curve.x[-1] == max(run.ledger["nfe"] for run in own)
        for x, mean, low, high in zip(curve.x, curve.mean, curve.low, curve.high, strict=True):
            by_prompt = [np.mean([max(best for spent, best in told(run) if spent <= x) for run in own if run.prompt == prompt]) for prompt in PROMPTS]
            assert mean == pytest.approx(np.mean(by_prompt))
            assert (low, high) == pytest.approx(scipy.stats.t.interval(0.95, 1, np.mean(by_prompt), scipy.stats.sem(by_prompt)))
    with paper.drawing():
        figure = progress.progress_figure(curves, "nfe", "gaussian-target")
    for place, curve in enumerate(curves):
        (line,) = [one for one in figure.axes[0].lines if one.get_gid() == f"curve-{place}"]
        assert np.array_equal(line.get_xydata(), np.column_stack([curve.x, curve.mean]))


def test_of_one_prompt_the_interval_is_over_seeds(runs):
    (curve, _), _ = progress.progress([run for run in runs if run.prompt == PROMPTS[0]])
    assert (curve.units, curve.unit) == (2, "seeds")


def test_runs_without_a_curve_are_left_out_and_said(runs, tmp_path):
    going = Going(tmp_path / "r")
    going.add(node(0, None, 0), node(1, 0, STEPS))
    other = load_run(going.path)
    going.close()
    with pytest.raises(UsageError, match="none of 1 runs has a curve to show"):
        progress.progress([other])
    _, notices = progress.progress([*runs, other], verifier="gaussian-target")
    assert notices == [f"left out: {other.path} (no sample is scored, or its journal is not whole)"]
    with pytest.raises(UsageError, match=f"different verifiers \\(gaussian-target, {VERIFIER}\\)"):
        progress.progress([*runs, other])
    with pytest.raises(UsageError, match="no node has a score by 'nobody'"):
        progress.progress(runs, verifier="nobody")


def about(policy, budget=None, given=None, **parameters):
    options = {"policy": {"name": policy, **parameters}, "nfe_budget": budget, "solver": "ddim", "steps": 4}
    return SimpleNamespace(policy=policy, model="m", verifier="v", prompt="p", seed=0, options=options, arguments={"policy_options": given} if given else {})


def test_searches_are_told_apart_by_as_little_as_it_takes():
    found = series.in_series([about("beam", width=1, branch=2), about("beam", width=4, branch=2), about("smc", n=3)])
    assert [one.label for one in found] == ["beam, width 1", "beam, width 4", "smc"]


def test_budgets_make_one_family_and_what_was_fitted_to_them_tells_nothing():
    found = series.in_series([about("beam", 400, width=9), about("beam", 100, width=2), about("beam", 100, {"branch": 8}, width=1, branch=8)])
    assert [(one.family, one.budget, one.label) for one in found] == [
        ("beam, branch None", 100, "beam, branch None, 100 NFE"), ("beam, branch None", 400, "beam, branch None, 400 NFE"), ("beam, branch 8", 100, "beam, branch 8"),
    ]  # fmt: skip


def test_there_are_no_more_families_than_colours():
    with pytest.raises(UsageError, match="8 different searches"):
        series.in_series([about("beam", width=width) for width in range(8)])


# Levels --------------------------------------------------------------------------------------------------------------


def test_levels_are_means_of_all_nodes_with_a_score(runs):
    curves, dots, notices = levels.levels(runs)
    assert notices == []
    for curve, group in zip(curves, dots, strict=True):
        own = [run for run in runs if run.policy == curve.label]
        scored = [(run, one.level, one.score("gaussian-target")) for run in own for one in run.nodes if one.score("gaussian-target") is not None]
        assert sorted(group) == sorted((level, score) for _, level, score in scored)
        for level, mean in zip(curve.x, curve.mean, strict=True):
            by_run = {id(run): np.mean([score for one, at, score in scored if one is run and at == level]) for run in own}
            assert mean == pytest.approx(np.mean([np.mean([by_run[id(run)] for run in own if run.prompt == prompt]) for prompt in PROMPTS]))
        assert curve.x[-1] == 4
    with paper.drawing():
        figure = levels.levels_figure(curves, dots, "gaussian-target", shares=False)
    marks = [one for one in figure.axes[0].collections if (one.get_gid() or "").startswith("dots-")]
    assert [len(one.get_offsets()) for one in marks] == [len(group) for group in dots]


def test_runs_of_different_lengths_are_compared_by_share(runs, tmp_path):
    other = load_run(write_run(tmp_path / "r", [node(0, None, 0), node(1, 0, 10, score=0.5), node(2, 1, STEPS, score=1.0)]))
    other.facts["options"]["verifiers"] = ["gaussian-target"]
    curves, _, notices = levels.levels([*runs, other], verifier=VERIFIER)
    assert (curves[0].x, curves[0].mean) == ((0.5, 1.0), (0.5, 1.0))
    assert len(notices) == len(runs)


def test_many_dots_are_thinned_and_means_are_of_all(runs, monkeypatch):
    whole, _, _ = levels.levels(runs)
    monkeypatch.setattr(levels, "MOST_DOTS", 10)
    curves, dots, notices = levels.levels(runs)
    assert curves == whole
    assert sum(map(len, dots)) <= 10
    assert "dots are left out, evenly; means are of all" in notices[0]


# Paths over a density ------------------------------------------------------------------------------------------------


def test_a_run_keeps_its_density(runs):
    mixture = density.Mixture.of(runs[0])
    x, y = np.linspace(-3.0, 4.0, 9), np.linspace(-2.0, 3.0, 7)
    points = torch.tensor([[across, up] for up in y for across in x])
    expected = preset("rare-mode").mixture.log_density(points).exp().reshape(7, 9).numpy()
    assert mixture.density(x, y) == pytest.approx(expected)
    centre_x, centre_y, half = mixture.view()
    assert all(abs(mean[0] - centre_x) < half and abs(mean[1] - centre_y) < half for mean in preset("rare-mode").mixture.means)


def test_paths_begin_and_end_where_the_latents_are(runs):
    run = runs[-1]
    with paper.drawing():
        figure, notices = density.trajectories_figure([run])
    assert notices == []
    axes = figure.axes[0]
    samples = next(one for one in axes.collections if one.get_gid() == "samples").get_offsets()
    assert np.allclose(samples, [run.latent(one).numpy() for one in run.tree.finished])
    starts = next(one for one in axes.collections if one.get_gid() == "starts").get_offsets()
    assert np.allclose(starts, [run.latent(one).numpy() for one in run.nodes if one.parent is None])
    answer = next(one for one in axes.collections if one.get_gid() == "answer").get_offsets()
    assert np.allclose(answer[0], run.latent(run.best).numpy())
    lines = sum(len(one.get_segments()) for one in axes.collections if (one.get_gid() or "").startswith("edges-"))
    assert lines + len(run.path_to(run.best)) - 1 == sum(one.parent is not None for one in run.nodes)


def test_where_noise_makes_latents_grow_they_are_shrunk(tmp_path):
    tsdiff.search("gaussian:process=ve", "near (0, 2)", policy="best-of-n", policy_options={"n": 2}, verifier="gaussian-target", steps=4, baseline=False, out=tmp_path)
    run = load_run(tmp_path)
    places = density.paths_of(run, run.nodes)
    first = run.nodes[0]
    assert first.sigma > 5.0
    assert places[0] == pytest.approx((run.latent(first) / math.hypot(first.alpha, first.sigma)).tolist())
    last = run.best
    assert places[last.index] == pytest.approx(run.latent(last).tolist())


@pytest.mark.parametrize(
    "facts",
    [None, [], {"mixture": None}, {"mixture": {"weights": [1], "means": [[0, 0, 0]], "stds": [1]}}, {"mixture": {"weights": ["x"], "means": [[0, 0]], "stds": [1]}},
     {"mixture": {"weights": [1], "means": [[0, 0]], "stds": [0]}}, {"mixture": {"weights": [], "means": [], "stds": []}}, {"mixture": {"weights": 1, "means": 2, "stds": 3}},
     {"mixture": {"weights": [1e400], "means": [[0, 0]], "stds": [1]}}],
)  # fmt: skip
def test_facts_that_make_no_sense_draw_no_density(runs, facts):
    run = load_run(runs[0].path)
    run.facts["model_facts"] = facts
    assert density.Mixture.of(run) is None
    with paper.drawing():
        _, notices = density.trajectories_figure([run])
    assert notices == [f"{run.path} does not say what its density is, so only its paths are drawn"]


def test_panels_are_bounded_and_runs_without_points_are_refused(runs, tmp_path):
    with paper.drawing():
        figure, notices = density.trajectories_figure(runs)
    assert notices == ["2 of 8 runs are left out: a plot of paths has 6 panels; name those that you want"]
    assert len(figure.axes) == 6 + 1  # and the scores' colours
    with pytest.raises(UsageError, match="has kept no latents"):
        density.paths_of(load_run(write_run(tmp_path / "r", [node(0, None, 0)])), [])
