"""Predictivity curves: known correlations of the analytic world, exact costs, intervals that cover."""

import json
import math

import numpy as np
import pytest
from scipy import stats

from tsdiff.bench.predict import PredictCurve, ScoredSamples, curve_plan, predict_curve
from tsdiff.bench.statistics import wilson_interval
from tsdiff.treesearch.errors import SearchFailed, UsageError
from tsdiff.treesearch.protocols import Scores
from tsdiff.treesearch.search import execute
from tsdiff.worlds.gaussian.mixture import Mixture
from tsdiff.worlds.gaussian.model import GaussianModel
from tsdiff.worlds.gaussian.verifiers import SoftValue

ONE_MODE = Mixture([1.0], [(0.5, -1.0)], [0.7])
PROMPTS = ["near (3, 2.4)", "near (2, 0)", "near (-1.4, 1.4)"]


class Linear:
    """x + 2 y of the clean estimate."""

    name = "linear"
    needs = frozenset({"x0"})
    scope, latency, judges, differentiable = "row", "immediate", "any", True

    def prepare(self, device):
        pass

    def check(self, condition):
        pass

    def score(self, candidates):
        return Scores(candidates.x0.double() @ candidates.x0.new_tensor([1.0, 2.0]).double())


def expected_spearman(rho, count):
    """The mean of Spearman's correlation of `count` jointly Gaussian pairs (Moran 1948)."""
    return 6 / (math.pi * (count + 1)) * (math.asin(rho) + (count - 2) * math.asin(rho / 2))


@pytest.mark.parametrize(
    ("verifier", "prompt"),
    [(Linear(), "near (0, 0)"), (SoftValue(mixture=ONE_MODE, rho=1000.0, temperature=0.0), "near (1000, 2000)")],
    ids=["linear", "value of a reward that is all but linear"],
)
def test_correlation_with_the_final_reward_is_the_known_one(verifier, prompt):
    """Of one Gaussian mode, E[r | x_t] of a linear reward is linear in x_t, and x_t, x_0 are jointly Gaussian with
    correlation alpha s / sqrt(alpha^2 s^2 + sigma^2); a quadratic reward with a target far away is linear to 1/1000.
    """
    count = 300
    curve = predict_curve(GaussianModel(ONE_MODE), prompt, verifier=verifier, solver="exact", steps=8, samples=count, resamples=50)
    for point in curve.points[1:-1]:
        ratio = point.noise / 0.7
        rho = 1 / math.sqrt(1 + ratio**2)
        # Standard error of Spearman's correlation (Bonett & Wright 2000), of tau-b by its own form; 4.5 of them.
        error = 4.5 * (1 - rho**2) * math.sqrt((1 + rho**2 / 2) / (count - 3)) + 0.002
        assert point.correlation.estimate == pytest.approx(expected_spearman(rho, count), abs=error), point.level
        assert point.kendall == pytest.approx(2 / math.pi * math.asin(rho), abs=error + 0.01)
    assert curve.points[-1].correlation.estimate == pytest.approx(1.0, abs=1e-12)
    assert curve.points[-1].kept == 1.0


def test_a_curve_costs_its_plain_samples_and_no_more():
    plan = curve_plan("gaussian", PROMPTS, verifier="gaussian-target", samples=5, steps=6, solver="ddpm")
    results = execute(plan)
    for result in results:
        assert plan.cost.exact
        assert result.ledger.nfe == plan.cost.upper.nfe == 5 * 6
        assert sum(result.ledger.verifier_calls.values()) == plan.cost.upper.verifier_calls == 5 * 7
        assert result.ledger.decodes == plan.cost.upper.decodes
    curve = predict_curve("gaussian", PROMPTS, verifier="gaussian-target", samples=5, steps=6, solver="ddpm", resamples=20)
    assert curve.nfe == 3 * 30
    assert any("5 samples of each prompt are few" in line for line in curve.notices)
    assert [point.nfe for point in curve.points] == [1, 2, 3, 4, 5, 6, 6]


def test_scores_are_those_of_plain_samples_and_levels_change_nothing():
    options = {"verifier": "gaussian-target", "samples": 4, "steps": 6, "solver": "ddpm", "resamples": 20}
    whole, few = (predict_curve("gaussian", PROMPTS, levels=levels, **options) for levels in (0, 3))
    assert few.levels == (0, 3, 6)
    np.testing.assert_array_equal(few.scores, whole.scores[:, :, [0, 3, 6]])
    np.testing.assert_array_equal(few.finals, whole.scores[:, :, -1])
    [point] = [point for point in few.points if point.level == 3]
    assert point.correlation.estimate == pytest.approx(np.mean([stats.spearmanr(s, f).statistic for s, f in zip(few.scores[:, :, 1], few.finals, strict=True)]))
    assert point.kendall == pytest.approx(np.mean([stats.kendalltau(s, f).statistic for s, f in zip(few.scores[:, :, 1], few.finals, strict=True)]))


def test_heun_counts_both_stages():
    curve = predict_curve("gaussian:process=ve", PROMPTS[:1], verifier="gaussian-target", samples=3, steps=4, solver="heun", resamples=20)
    assert [point.nfe for point in curve.points] == [1, 3, 5, 7, 7]
    assert curve.nfe == 3 * 7


def test_another_verifier_may_have_the_last_word():
    curve = predict_curve("gaussian", PROMPTS, verifier="gaussian-target", against="gaussian-log-density", samples=6, steps=4, solver="exact", resamples=50)
    assert (curve.verifier, curve.against) == ("gaussian-target", "gaussian-log-density")
    assert not np.allclose(curve.scores[:, :, -1], curve.finals)
    own = stats.spearmanr(curve.scores[0, :, -1], curve.finals[0]).statistic
    assert curve.by_prompt[0, -1] == pytest.approx(own)


def curve_of(scores, finals, **options):
    prompts, _, levels = scores.shape
    names = tuple(f"prompt {number}" for number in range(prompts))
    return PredictCurve(
        "m", "s", "v", "v", names, tuple(range(levels)), (1.0,) * levels, tuple(range(1, levels + 1)), scores, finals, 0, 0, 0, **{"resamples": 300} | options
    )


@pytest.mark.parametrize("shared", [True, False], ids=["every prompt has the same noise", "prompts are independent"])
def test_intervals_cover_the_expected_correlation(shared):
    """Shared noise makes prompts agree, so that resampling prompts alone would cover next to never."""
    rng, rho, covered, runs = np.random.default_rng(4), 0.6, 0, 60
    for run in range(runs):
        base, more = rng.normal(size=(2, 1 if shared else 8, 16))
        early, late = (np.broadcast_to(values, (8, 16)) for values in (base, rho * base + math.sqrt(1 - rho**2) * more))
        final_level = late + 1e-9 * rng.normal(size=late.shape)
        interval = curve_of(np.stack([early, final_level], axis=-1), late, seed=run).points[0].correlation
        covered += interval.low <= expected_spearman(rho, 16) <= interval.high
    assert wilson_interval(covered, runs, 0.999).high >= 0.93


def test_ties_missing_scores_and_constants():
    finals = np.array([[1.0, 2.0, 3.0, 4.0], [1.0, 1.0, 1.0, 1.0]])
    scores = np.stack([np.array([[0.0, 0.0, 1.0, math.nan], [1.0, 2.0, 3.0, 4.0]]), finals], axis=-1)
    curve = curve_of(scores, finals)
    first, last = curve.points
    assert first.prompts == last.prompts == 1  # all final scores of the second prompt are equal
    assert first.correlation.estimate == pytest.approx(stats.spearmanr([0, 0, 1], [1, 2, 3]).statistic)
    assert first.kept == pytest.approx(1.0)  # the best of the three that have a score is chosen
    assert json.loads(json.dumps(curve.to_json(), allow_nan=False))["levels"][0]["by_prompt"] == [pytest.approx(0.8660254), None]
    nothing = curve_of(np.full((1, 4, 2), math.nan), np.full((1, 4), math.nan))
    assert nothing.points[0].correlation is None
    assert nothing.points[0].kept is nothing.points[0].kendall is nothing.branch_level is None


def test_equal_early_scores_are_chosen_from_by_lot():
    finals = np.array([[0.0, 1.0, 5.0]])
    curve = curve_of(np.array([[[1.0, 0.0], [1.0, 1.0], [0.0, 5.0]]]), finals)
    assert curve.points[0].kept == pytest.approx((0.5 - 2.0) / (5.0 - 2.0))


def test_branching_pays_where_the_lower_bound_passes_the_threshold():
    rng = np.random.default_rng(7)
    finals = rng.normal(size=(10, 24))
    scores = np.stack([finals + spread * rng.normal(size=finals.shape) for spread in (20.0, 1.5, 0.3, 0.0)], axis=-1)
    for threshold in (-0.9, 0.3, 0.8, 0.99):
        curve = curve_of(scores, finals, threshold=threshold)
        passed = [point.level for point in curve.points if point.correlation.low > threshold]
        on_the_way = [level for level in passed if level < 3]
        assert curve.branch_level == (on_the_way[0] if on_the_way else None)
    assert curve_of(scores, finals, threshold=0.8).branch_level == 2


def test_what_cannot_be_measured_is_refused_before_anything_runs():
    class Final(Linear):
        judges = "final"

    for complaint, arguments in (
        ("finished samples only", {"verifier": Final()}),
        ("given twice", {"verifier": "gaussian-target", "prompts": ["near (1, 1)", "near (1, 1)"]}),
        ("given twice", {"verifier": "gaussian-target", "against": "gaussian-target"}),
        ("seeds were given", {"verifier": "gaussian-target", "seed": (0, 1)}),
        ("2 verifiers were given", {"verifier": ["gaussian-target", "luminance"]}),
        ("samples is 2", {"verifier": "gaussian-target", "samples": 2}),
        ("levels is 1", {"verifier": "gaussian-target", "levels": 1}),
    ):
        with pytest.raises(UsageError, match=complaint):
            curve_plan("gaussian", **{"prompts": "near (1, 1)"} | arguments)
    for name, value in (("confidence", 1.0), ("threshold", 1.0)):
        with pytest.raises(UsageError, match=name):
            predict_curve("gaussian", "near (1, 1)", verifier="gaussian-target", **{name: value})


def test_prompts_that_fail_are_named_and_left_out():
    class Picky(Linear):
        def score(self, candidates):
            if any(condition.prompt == PROMPTS[1] for condition in candidates.conditions):
                raise UsageError("not this one")
            return super().score(candidates)

    options = {"verifier": Picky(), "samples": 3, "steps": 3, "max_batch": 1, "resamples": 20}
    curve = predict_curve("gaussian", PROMPTS, **options)
    assert curve.prompts == (PROMPTS[0], PROMPTS[2])
    assert curve.failures == ((PROMPTS[1], "not this one"),)
    with pytest.raises(SearchFailed, match="not this one"):
        predict_curve("gaussian", PROMPTS[1], **options)


def test_policy_spreads_levels_evenly():
    assert ScoredSamples(levels=0).at(5) == (0, 1, 2, 3, 4, 5)
    assert ScoredSamples(levels=2).at(20) == (0, 20)
    assert ScoredSamples(levels=100).at(3) == (0, 1, 2, 3)


def test_plot_is_a_picture(tmp_path):
    from PIL import Image

    rng = np.random.default_rng(0)
    finals = rng.normal(size=(3, 8))
    curve = curve_of(np.stack([rng.normal(size=finals.shape), finals], axis=-1), finals)
    with Image.open(curve.plot(tmp_path / "curve.png")) as picture:
        assert picture.size == (1050, 660)
    assert [path.name for path in tmp_path.iterdir()] == ["curve.png"]
