"""Intervals that cover, comparisons that are fair, corrections by hand."""

import numpy as np
import pytest
import scipy.stats

from dhrd_lib.evaluation import task_metrics
from dhrd_lib.studies.statistics import Interval, bootstrap_interval, holm, paired_comparison

CB = ("macro_f1", "accuracy")
MULTIRC = ("f1a", "em")


@pytest.fixture
def rng():
    return np.random.default_rng(7)


def noisy(gold, right_rate, n_labels, rng):
    """Predictions that are right at `right_rate`."""
    wrong = (gold + rng.integers(1, n_labels, len(gold))) % n_labels
    return np.where(rng.random(len(gold)) < right_rate, gold, wrong)


def primary(metrics, labels, runs):
    return np.mean([task_metrics(metrics, labels, run)["primary"] for run in runs])


@pytest.mark.parametrize("n_seeds", [1, 4])
def test_interval_surrounds_mean_of_runs(rng, n_seeds):
    labels = rng.integers(3, size=120)
    runs = [noisy(labels, 0.7, 3, rng) for _ in range(n_seeds)]
    interval = bootstrap_interval(CB, labels, runs if n_seeds > 1 else runs[0])
    assert interval.value == pytest.approx(primary(CB, labels, runs))
    assert interval.low < interval.value < interval.high
    assert str(Interval(0.7461, 0.7, 0.791)) == "74.6% [70.0,\N{NO-BREAK SPACE}79.1]"


def test_interval_covers_true_accuracy(rng):
    labels = np.zeros(150, dtype=int)
    covered = 0
    for _ in range(200):
        predictions = (rng.random(150) > 0.75).astype(int)
        interval = bootstrap_interval(["accuracy"], labels, predictions, n_resamples=400)
        covered += interval.low <= 0.75 <= interval.high
    assert 0.90 <= covered / 200 <= 0.99


def test_groups_are_resampled_whole():
    # Ten questions of 20 answers, right throughout or wrong throughout: as rows 200, as units 10.
    groups = np.repeat(np.arange(10), 20)
    labels, predictions = np.ones(200, dtype=int), (groups < 7).astype(int)
    by_group = bootstrap_interval(["accuracy"], labels, predictions, groups)
    by_row = bootstrap_interval(["accuracy"], labels, predictions)
    steps = np.array([by_group.low, by_group.high]) * 10
    assert steps == pytest.approx(np.round(steps))
    assert by_group.high - by_group.low > 3 * (by_row.high - by_row.low)


@pytest.mark.parametrize("metrics", [["accuracy"], CB, MULTIRC])
@pytest.mark.parametrize("n_seeds", [1, 3])
def test_swapping_a_and_b_flips_sign(rng, metrics, n_seeds):
    labels = rng.integers(2, size=120)
    groups = np.arange(120) // 4 if "em" in metrics else None
    a, b = ([noisy(labels, rate, 2, rng) for _ in range(n_seeds)] for rate in (0.6, 0.8))
    there = paired_comparison(metrics, labels, a, b, groups)
    back = paired_comparison(metrics, labels, b, a, groups)
    assert (back.difference, back.low, back.high) == pytest.approx((-there.difference, -there.high, -there.low))
    assert back.p_value == pytest.approx(there.p_value)
    assert (back.a_only_right, back.b_only_right) == (there.b_only_right, there.a_only_right)


@pytest.mark.parametrize(("n_seeds", "test"), [(1, "permutation"), (5, "bootstrap over seeds and rows")])
def test_difference_is_b_minus_a_over_seeds(rng, n_seeds, test):
    labels = rng.integers(3, size=90)
    a, b = ([noisy(labels, rate, 3, rng) for _ in range(n_seeds)] for rate in (0.6, 0.8))
    comparison = paired_comparison(CB, labels, a, b)
    assert comparison.difference == pytest.approx(primary(CB, labels, b) - primary(CB, labels, a))
    assert comparison.low < comparison.difference < comparison.high
    assert (comparison.n_rows, comparison.n_seeds) == (90, n_seeds)
    assert test in comparison.test


def test_accuracy_on_rows_uses_exact_mcnemar():
    labels = np.zeros(20, dtype=int)
    a = np.array([0] * 10 + [1] * 10)
    b = np.array([0] * 8 + [1] * 2 + [0] * 7 + [1] * 3)
    comparison = paired_comparison(["accuracy"], labels, a, b)
    # Of nine rows on which one alone is right, a has two: twice the lower tail of a fair coin.
    assert comparison.p_value == pytest.approx(2 * scipy.stats.binom.cdf(2, 9, 0.5))
    assert comparison.test == "exact McNemar test"
    assert (comparison.a_only_right, comparison.b_only_right) == (2, 7)
    same = paired_comparison(["accuracy"], labels, a, a)
    assert (same.difference, same.low, same.high, same.p_value) == (0, 0, 0, 1)
    assert comparison == paired_comparison(["accuracy"], labels, [a], [b])


def test_permutation_swaps_whole_units_exactly():
    labels = np.array([1, 0, 1, 1, 0, 1])
    # All six units favor b: two of the 2^6 swaps are as extreme.
    assert paired_comparison(["macro_f1"], labels, 1 - labels, labels).p_value == pytest.approx(2 / 64)
    # Three questions, all of whose answers favor b: as units, p can't be below 2 / 2^3.
    groups, labels = np.repeat([0, 1, 2], 10), np.ones(30, dtype=int)
    comparison = paired_comparison(MULTIRC, labels, 1 - labels, labels, groups)
    assert comparison.p_value == pytest.approx(2 / 8)
    assert comparison.test.endswith("over groups")


def test_null_difference_is_rarely_significant(rng):
    labels = rng.integers(2, size=60)
    pairs = ([noisy(labels, 0.7, 2, rng) for _ in "ab"] for _ in range(100))
    p_values = [paired_comparison(["macro_f1"], labels, *pair, n_resamples=200).p_value for pair in pairs]
    assert np.mean(np.array(p_values) < 0.05) < 0.10


def test_pairing_narrows_interval_of_shared_errors(rng):
    labels = rng.integers(2, size=300)
    a = noisy(labels, 0.7, 2, rng)
    paired = paired_comparison(["accuracy"], labels, a, np.where(np.arange(300) < 15, labels, a))
    alone = bootstrap_interval(["accuracy"], labels, a)
    assert paired.high - paired.low < (alone.high - alone.low) / 2


def test_interval_covers_seeds_as_well_as_rows(rng):
    """Where seeds differ much, row resampling alone is blind to most of the spread."""
    covered, labels = 0, np.zeros(200, dtype=int)
    for _ in range(60):
        a = [(rng.random(200) > 0.75).astype(int) for _ in range(5)]
        b = [(rng.random(200) > rate).astype(int) for rate in 0.75 + rng.normal(0, 0.05, 5)]
        comparison = paired_comparison(["accuracy"], labels, a, b, n_resamples=300)
        covered += comparison.low <= 0 <= comparison.high
    assert covered >= 54


def test_p_value_agrees_with_interval(rng):
    labels = rng.integers(2, size=200)
    for rate in (0.71, 0.75, 0.9):
        a, b = ([noisy(labels, each, 2, rng) for _ in range(4)] for each in (0.7, rate))
        comparison = paired_comparison(["accuracy"], labels, a, b)
        assert (comparison.p_value < 0.05) == (comparison.low > 0 or comparison.high < 0)


def test_unequal_numbers_of_seeds_raise():
    with pytest.raises(ValueError, match="2 runs and b has 1"):
        paired_comparison(["accuracy"], [0, 1], [[0, 1], [0, 0]], [[0, 1]])


def test_holm_equals_hand_worked_example():
    # Sorted 0.01, 0.02, 0.04 times 3, 2, 1; never less than the one before, at most 1.
    assert holm([0.04, 0.01, 0.02]) == pytest.approx([0.04, 0.03, 0.04])
    assert holm([0.7, 0.6]) == pytest.approx([1, 1])
    assert holm([]).tolist() == []
