"""Statistics of studies, against scipy and closed forms."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from tsdiff.bench.statistics import (
    bootstrap,
    crossed_counts,
    fisher_interval,
    kendall,
    mean_distance,
    mean_interval,
    resample_counts,
    spearman,
    vendi_score,
    wilson_interval,
)
from tsdiff.treesearch.errors import UsageError

PAIRS = st.lists(st.tuples(st.integers(-3, 3), st.integers(-3, 3)), min_size=2, max_size=12)


@given(PAIRS)
def test_rank_correlations_with_ties_are_scipys(pairs):
    left, right = map(list, zip(*pairs, strict=True))
    if len(set(left)) == 1 or len(set(right)) == 1:
        assert spearman(left, right) is None
        assert kendall(left, right) is None
    else:
        assert spearman(left, right) == pytest.approx(stats.spearmanr(left, right).statistic, abs=1e-12)
        assert kendall(left, right) == pytest.approx(stats.kendalltau(left, right).statistic, abs=1e-12)


def test_rank_correlations_need_pairs():
    assert spearman([], []) is None
    assert kendall([1.0], [2.0]) is None
    with pytest.raises(UsageError, match="equal length"):
        spearman([1.0, 2.0], [1.0])


@pytest.mark.parametrize(("correlation", "count", "confidence"), [(0.3, 20, 0.95), (-0.8, 7, 0.9), (0.0, 100, 0.99)])
def test_fisher_interval_is_that_of_pearson(correlation, count, confidence):
    # Two columns that correlate exactly so: a unit vector and a mixture of it with one that is orthogonal to it.
    x = np.cos(2 * np.pi * np.arange(count) / count)
    y = correlation * x + math.sqrt(1 - correlation**2) * np.sin(2 * np.pi * np.arange(count) / count)
    expected = stats.pearsonr(x, y).confidence_interval(confidence)
    ours = fisher_interval(correlation, count, confidence)
    assert (ours.low, ours.high) == pytest.approx((expected.low, expected.high), abs=1e-12)
    wider = fisher_interval(correlation, count, confidence, "spearman")
    assert wider.low <= ours.low
    assert ours.high <= wider.high


def test_fisher_interval_at_its_ends():
    assert fisher_interval(1.0, 5).low == 1.0
    for wrong in ((0.5, 3), (1.5, 10)):
        with pytest.raises(UsageError):
            fisher_interval(*wrong)
    with pytest.raises(UsageError, match="confidence"):
        fisher_interval(0.5, 10, confidence=1.0)


@given(st.integers(1, 50).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))), st.sampled_from([0.8, 0.95, 0.99]))
def test_wilson_interval_is_scipys(trials, confidence):
    ours = wilson_interval(*trials, confidence)
    theirs = stats.binomtest(*trials).proportion_ci(confidence, method="wilson")
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), abs=1e-12)
    assert ours.low <= ours.estimate <= ours.high


def test_wilson_interval_needs_trials():
    for wrong in ((0, 0), (3, 2), (-1, 4)):
        with pytest.raises(UsageError):
            wilson_interval(*wrong)


def test_resampled_means_have_the_moments_of_the_bootstrap():
    values = np.array([0.0, 1.0, 4.0, 10.0])
    counts = resample_counts(4, 20_000, seed=3)
    assert (counts.sum(axis=1) == 4).all()
    means = counts @ values / 4
    # The mean of n draws with replacement has the mean of the values and 1/n of their variance; the bound is 6 standard errors.
    assert means.mean() == pytest.approx(values.mean(), abs=6 * values.std() / 2 / math.sqrt(20_000))
    assert means.var() == pytest.approx(values.var() / 4, rel=6 * math.sqrt(2 / 20_000))


def test_bootstrap_of_two_values_is_known_exactly():
    # Two units: the resampled mean is low, middle or high with probability 1/4, 1/2, 1/4.
    outer = mean_interval([0.0, 1.0], 0.95)
    assert (outer.low, outer.estimate, outer.high) == (0.0, 0.5, 1.0)
    inner = mean_interval([0.0, 1.0], confidence=0.4)
    assert (inner.low, inner.high) == (0.5, 0.5)


def test_columns_are_resampled_together_and_repeat_under_a_seed():
    left = np.random.default_rng(0).normal(size=30)
    paired = bootstrap(lambda a, b: float((b - a).mean()), left, left + 2.0, resamples=200)
    assert (paired.low, paired.estimate, paired.high) == pytest.approx((2.0, 2.0, 2.0))  # alone, each mean is uncertain by 0.2
    options = {"resamples": 300, "seed": 5}
    assert bootstrap(np.mean, left, **options) == bootstrap(np.mean, left, **options)
    assert bootstrap(np.mean, left, **options) != bootstrap(np.mean, left, resamples=300, seed=6)
    with pytest.raises(UsageError, match="lengths"):
        bootstrap(np.mean, left, left[1:])
    with pytest.raises(UsageError, match="finite"):
        bootstrap(lambda a: math.nan, left, resamples=5)


def test_mean_intervals_cover_the_mean():
    rng = np.random.default_rng(1)
    intervals = [mean_interval(rng.normal(3.0, 2.0, size=40), resamples=400, seed=i) for i in range(400)]
    covered = sum(interval.low <= 3.0 <= interval.high for interval in intervals)
    assert wilson_interval(covered, 400, 0.999).high >= 0.93  # percentile intervals of 40 units: a little below 95 %
    assert wilson_interval(covered, 400, 0.999).low <= 0.95


def test_crossed_counts_see_the_variance_of_both_factors():
    """Rows and columns with effects of their own: the variance of the grand mean is that of both, not of the cells."""
    rng = np.random.default_rng(2)
    rows, columns = rng.normal(size=40), rng.normal(size=25)
    table = rows[:, None] + columns[None, :]
    by_row, by_column = crossed_counts(table.shape, 4000, seed=1)
    means = np.einsum("ri,rj,ij->r", by_row, by_column, table) / table.size
    assert means.var() == pytest.approx(rows.var() / 40 + columns.var() / 25, rel=6 * math.sqrt(2 / 4000))
    cells = rng.normal(size=(40, 25))
    means = np.einsum("ri,rj,ij->r", by_row, by_column, cells) / cells.size
    assert 1.0 < means.var() / (cells.var() / cells.size) < 3.5  # cells that vary on their own: up to threefold
    (alone,) = crossed_counts((1,), 10)
    assert (alone == 1.0).all()


# Diversity -----------------------------------------------------------------------------------------------------------


def test_vendi_of_orthogonal_and_equal_rows():
    assert vendi_score(3.0 * np.eye(7)) == pytest.approx(7.0)
    assert vendi_score(np.ones((5, 3))) == pytest.approx(1.0)
    assert vendi_score([[1.0, 2.0]]) == pytest.approx(1.0)
    for order in (0.0, 0.5, 2.0, math.inf):
        assert vendi_score(np.eye(4), order) == pytest.approx(4.0)
        assert vendi_score(np.ones((4, 2)), order) == pytest.approx(1.0)


@given(st.floats(0.01, math.pi - 0.01))
def test_vendi_of_two_rows_at_an_angle(angle):
    """K / 2 has the eigenvalues (1 +- cos) / 2."""
    shares = [(1 + math.cos(angle)) / 2, (1 - math.cos(angle)) / 2]
    rows = [[1.0, 0.0], [math.cos(angle), math.sin(angle)]]
    assert vendi_score(rows) == pytest.approx(math.exp(-sum(share * math.log(share) for share in shares)), rel=1e-9)
    assert vendi_score(rows, 2.0) == pytest.approx(1 / sum(share**2 for share in shares), rel=1e-9)
    assert vendi_score(rows, math.inf) == pytest.approx(1 / max(shares), rel=1e-9)
    assert mean_distance(rows) == pytest.approx(1 - math.cos(angle), abs=1e-12)


def test_vendi_counts_groups_and_falls_with_the_order():
    groups = np.repeat(np.eye(3), [6, 3, 1], axis=0)  # more rows than features, and fewer
    wide = np.pad(groups, ((0, 0), (0, 20)))
    shares = np.array([0.6, 0.3, 0.1])
    for rows in (groups, wide):
        assert vendi_score(rows) == pytest.approx(math.exp(-(shares * np.log(shares)).sum()))
    scores = [vendi_score(groups, order) for order in (0.0, 0.5, 1.0, 2.0, math.inf)]
    assert scores[0] == pytest.approx(3.0)
    assert scores == sorted(scores, reverse=True)


@given(st.integers(2, 8), st.integers(1, 6), st.integers(0, 1000))
def test_distance_is_the_mean_over_pairs(count, width, seed):
    rows = np.random.default_rng(seed).normal(size=(count, width))
    units = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    pairs = [1.0 - units[i] @ units[j] for i, j in itertools.combinations(range(count), 2)]
    assert mean_distance(rows) == pytest.approx(np.mean(pairs), abs=1e-12)
    assert 1.0 - 1e-9 <= vendi_score(rows) <= min(count, width) + 1e-9


def test_features_without_a_direction_are_refused():
    assert mean_distance([[1.0, 0.0]]) is None
    for wrong in ([[0.0, 0.0], [1.0, 0.0]], [[math.nan, 1.0]], [1.0, 2.0], np.empty((0, 3))):
        with pytest.raises(UsageError):
            vendi_score(wrong)
    with pytest.raises(UsageError, match="order"):
        vendi_score(np.eye(2), -1.0)
