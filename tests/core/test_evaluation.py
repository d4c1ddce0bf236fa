"""Evaluation: metrics by hand and against scikit-learn, intervals that cover, comparisons that are fair."""

import time

import numpy as np
import pytest
import scipy.special
import scipy.stats
from sklearn.metrics import accuracy_score, f1_score

from dhrd_lib.evaluation import (
    NO_ANSWER,
    apply_temperature,
    bootstrap_interval,
    bootstrap_interval_over_seeds,
    brier_score,
    confusion,
    expected_calibration_error,
    fit_temperature,
    holm,
    over_seeds,
    paired_comparison,
    paired_comparison_over_seeds,
    per_class,
    reliability,
    task_metrics,
)

CB = ("macro_f1", "accuracy")
MULTIRC = ("f1a", "em")


def noisy(gold, right_rate, n_labels, rng):
    """Predictions that are right at `right_rate`."""
    wrong = (gold + rng.integers(1, n_labels, len(gold))) % n_labels
    return np.where(rng.random(len(gold)) < right_rate, gold, wrong)


@pytest.fixture
def rng():
    return np.random.default_rng(7)


class TestTaskMetrics:
    def test_multirc_equals_a_hand_worked_example(self):
        # Question a: both answers right. Question b: one of two right. Question c: its one answer wrong.
        groups = ["a", "a", "b", "b", "c"]
        labels = [1, 0, 1, 1, 0]
        predictions = [1, 0, 1, 0, 1]
        # tp 2, fp 1, fn 1: F1 = 4 / 6; one question of three is all right.
        metrics = task_metrics(MULTIRC, labels, predictions, groups)
        assert metrics == pytest.approx({"f1a": 2 / 3, "em": 1 / 3, "primary": 1 / 2})

    def test_cb_equals_a_hand_worked_example(self):
        labels = [0, 0, 1, 1, 2]
        predictions = [0, 1, 1, 1, 0]
        # F1: class 0 is 2/4, class 1 is 4/5, class 2 is 0.
        metrics = task_metrics(CB, labels, predictions)
        assert metrics == pytest.approx({"macro_f1": 1.3 / 3, "accuracy": 0.6, "primary": (1.3 / 3 + 0.6) / 2})

    @pytest.mark.parametrize("n_labels", [2, 3, 5])
    def test_metrics_equal_scikit_learn(self, rng, n_labels):
        labels = rng.integers(n_labels, size=200)
        predictions = noisy(labels, 0.6, n_labels, rng)
        metrics = task_metrics(["accuracy", "macro_f1", "f1a"], labels, predictions)
        assert metrics["accuracy"] == pytest.approx(accuracy_score(labels, predictions))
        assert metrics["macro_f1"] == pytest.approx(f1_score(labels, predictions, average="macro"))
        of_one = f1_score(labels, predictions, labels=[1], average="macro")
        assert metrics["f1a"] == pytest.approx(of_one)

    def test_macro_f1_counts_the_classes_that_occur_and_no_others(self):
        assert task_metrics(["macro_f1"], [0, 4], [0, 4])["macro_f1"] == 1
        assert task_metrics(["macro_f1"], [0, 0], [0, 4])["macro_f1"] == pytest.approx((2 / 3 + 0) / 2)

    def test_a_missing_answer_is_wrong_and_is_no_class(self):
        metrics = task_metrics(["accuracy", "macro_f1"], [0, 1, 1], [0, 1, NO_ANSWER])
        assert metrics["accuracy"] == pytest.approx(2 / 3)
        assert metrics["macro_f1"] == pytest.approx((1 + 2 / 3) / 2)

    def test_group_names_may_come_in_any_order(self):
        labels, predictions = [1, 0, 1, 0], [1, 1, 1, 0]
        assert task_metrics(["em"], labels, predictions, ["x", "y", "y", "x"])["em"] == 0.5

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ((["accuracy"], [0, 1], [0]), "differ in length"),
            ((["em"], [0, 1], [0, 1], ["a"]), "differ in length"),
            ((["accuracy"], [], []), "no rows"),
            ((["em"], [0, 1], [0, 1]), "expected groups"),
            ((["em"], [0, 1], [0, 1], ["a", None]), "missing value"),
            ((["bleu"], [0, 1], [0, 1]), "'bleu' is no metric"),
            (([], [0, 1], [0, 1]), "is no metric"),
            ((["accuracy"], [-1, 1], [0, 1]), "labels holds -1"),
            ((["accuracy"], [0, 1], [0.2, 1.0]), "predictions holds float64"),
        ],
    )
    def test_unusable_input_is_refused_in_one_sentence(self, arguments, message):
        with pytest.raises(ValueError, match=message):
            task_metrics(*arguments)


class TestPerClass:
    def test_precision_recall_and_f1_are_those_of_the_confusion_matrix(self, rng):
        labels = rng.integers(3, size=90)
        predictions = noisy(labels, 0.7, 3, rng)
        matrix = confusion(labels, predictions, 3)
        table = per_class(labels, predictions, ["a", "b", "c"])
        right = np.diag(matrix)
        assert matrix.sum() == 90
        assert table["precision"].to_numpy() == pytest.approx(right / matrix.sum(axis=0))
        assert table["recall"].to_numpy() == pytest.approx(right / matrix.sum(axis=1))
        assert table["f1"].to_numpy() == pytest.approx(2 * right / (matrix.sum(axis=0) + matrix.sum(axis=1)))
        assert table["support"].tolist() == matrix.sum(axis=1).tolist()

    def test_a_class_without_rows_has_a_row_of_zeros(self):
        table = per_class([0, 0], [0, 0], ["a", "b"])
        assert table.loc["b"].tolist() == [0, 0, 0, 0]


class TestBootstrapInterval:
    def test_the_value_is_the_primary_metric_and_lies_inside(self, rng):
        labels = rng.integers(3, size=120)
        predictions = noisy(labels, 0.7, 3, rng)
        interval = bootstrap_interval(CB, labels, predictions)
        assert interval.value == pytest.approx(task_metrics(CB, labels, predictions)["primary"])
        assert interval.low < interval.value < interval.high

    def test_it_covers_the_true_accuracy_about_as_often_as_it_says(self, rng):
        labels = np.zeros(150, dtype=int)
        covered = 0
        for seed in range(200):
            predictions = (rng.random(150) > 0.75).astype(int)
            interval = bootstrap_interval(["accuracy"], labels, predictions, n_resamples=400, seed=seed)
            covered += interval.low <= 0.75 <= interval.high
        assert 0.90 <= covered / 200 <= 0.99

    def test_the_same_seed_gives_the_same_interval(self, rng):
        labels = rng.integers(2, size=80)
        predictions = noisy(labels, 0.7, 2, rng)
        first, again, other = (bootstrap_interval(["macro_f1"], labels, predictions, seed=s) for s in (1, 1, 2))
        assert first == again
        assert first != other

    def test_multirc_resamples_questions_whole(self):
        # Ten questions of 20 answers, right throughout or wrong throughout: as rows 200, as units 10.
        groups = np.repeat(np.arange(10), 20)
        labels = np.ones(200, dtype=int)
        predictions = (groups < 7).astype(int)
        by_group = bootstrap_interval(["accuracy"], labels, predictions, groups)
        by_row = bootstrap_interval(["accuracy"], labels, predictions)
        steps = np.array([by_group.low, by_group.high]) * 10
        assert steps == pytest.approx(np.round(steps))
        assert by_group.high - by_group.low > 3 * (by_row.high - by_row.low)

    def test_2000_resamples_of_macro_f1_on_350_rows_take_less_than_3_seconds(self, rng):
        labels = rng.integers(5, size=350)
        start = time.perf_counter()
        bootstrap_interval(["macro_f1"], labels, noisy(labels, 0.7, 5, rng), n_resamples=2000)
        assert time.perf_counter() - start < 3

    def test_an_interval_over_seeds_is_centred_on_the_mean_of_the_runs(self, rng):
        labels = rng.integers(3, size=100)
        runs = [noisy(labels, 0.7, 3, rng) for _ in range(4)]
        interval = bootstrap_interval_over_seeds(CB, labels, runs)
        assert interval.value == pytest.approx(np.mean([task_metrics(CB, labels, r)["primary"] for r in runs]))
        assert interval.low < interval.value < interval.high


class TestPairedComparison:
    @pytest.mark.parametrize("metrics", [["accuracy"], CB, MULTIRC])
    def test_swapping_a_and_b_flips_the_sign_and_nothing_else(self, rng, metrics):
        labels = rng.integers(2, size=120)
        groups = np.arange(120) // 4 if "em" in metrics else None
        a, b = noisy(labels, 0.6, 2, rng), noisy(labels, 0.8, 2, rng)
        there = paired_comparison(metrics, labels, a, b, groups)
        back = paired_comparison(metrics, labels, b, a, groups)
        assert back.difference == pytest.approx(-there.difference)
        assert (back.low, back.high) == pytest.approx((-there.high, -there.low))
        assert back.p_value == pytest.approx(there.p_value)
        assert (back.a_only_right, back.b_only_right) == (there.b_only_right, there.a_only_right)

    def test_the_difference_is_b_minus_a_of_the_primary_metric(self, rng):
        labels = rng.integers(3, size=80)
        a, b = noisy(labels, 0.6, 3, rng), noisy(labels, 0.8, 3, rng)
        comparison = paired_comparison(CB, labels, a, b)
        scores = [task_metrics(CB, labels, each)["primary"] for each in (a, b)]
        assert comparison.difference == pytest.approx(scores[1] - scores[0])
        assert comparison.n_rows == 80
        assert "permutation" in comparison.test

    def test_accuracy_on_rows_is_tested_by_mcnemar_exactly(self):
        labels = np.zeros(20, dtype=int)
        a = np.array([0] * 10 + [1] * 10)
        b = np.array([0] * 8 + [1] * 2 + [0] * 7 + [1] * 3)
        comparison = paired_comparison(["accuracy"], labels, a, b)
        # Of nine rows on which one alone is right, a has two: twice the lower tail of a fair coin.
        by_hand = 2 * scipy.stats.binom.cdf(2, 9, 0.5)
        assert comparison.p_value == pytest.approx(by_hand)
        assert comparison.test == "exact McNemar test"
        assert (comparison.a_only_right, comparison.b_only_right) == (2, 7)

    def test_the_permutation_test_is_exact_where_there_are_few_units(self):
        labels = [1, 0, 1, 1, 0, 1]
        wrong = [1 - label for label in labels]
        # All six units favour b: two of the 2^6 swaps are as extreme.
        assert paired_comparison(["macro_f1"], labels, wrong, labels).p_value == pytest.approx(2 / 64)

    def test_groups_are_swapped_whole(self):
        # Three questions, all of whose answers favour b: as units, p can't be below 2 / 2^3.
        groups = np.repeat([0, 1, 2], 10)
        labels = np.ones(30, dtype=int)
        comparison = paired_comparison(MULTIRC, labels, 1 - labels, labels, groups)
        assert comparison.p_value == pytest.approx(2 / 8)
        assert comparison.test.endswith("over groups")

    def test_equal_predictions_differ_by_nothing(self, rng):
        labels = rng.integers(3, size=50)
        a = noisy(labels, 0.7, 3, rng)
        for metrics in (["accuracy"], CB):
            comparison = paired_comparison(metrics, labels, a, a)
            assert (comparison.difference, comparison.low, comparison.high) == (0, 0, 0)
            assert comparison.p_value == 1

    def test_pairing_narrows_the_interval_where_the_two_err_together(self, rng):
        labels = rng.integers(2, size=300)
        a = noisy(labels, 0.7, 2, rng)
        b = np.where(np.arange(300) < 15, labels, a)
        paired = paired_comparison(["accuracy"], labels, a, b)
        alone = bootstrap_interval(["accuracy"], labels, a)
        assert paired.high - paired.low < (alone.high - alone.low) / 2

    def test_a_null_difference_is_seldom_called_significant(self, rng):
        labels = rng.integers(2, size=60)
        p_values = [
            paired_comparison(
                ["macro_f1"], labels, *(noisy(labels, 0.7, 2, rng) for _ in "ab"), n_resamples=200
            ).p_value
            for _ in range(100)
        ]
        assert np.mean(np.array(p_values) < 0.05) < 0.10


class TestSeveralSeeds:
    def test_one_pair_of_runs_is_the_plain_comparison(self, rng):
        labels = rng.integers(2, size=60)
        a, b = noisy(labels, 0.6, 2, rng), noisy(labels, 0.8, 2, rng)
        plain = paired_comparison(["accuracy"], labels, a, b)
        assert paired_comparison_over_seeds(["accuracy"], labels, [a], [b]) == plain

    def test_the_difference_is_the_mean_over_seeds(self, rng):
        labels = rng.integers(3, size=90)
        a, b = ([noisy(labels, rate, 3, rng) for _ in range(5)] for rate in (0.6, 0.8))
        comparison = paired_comparison_over_seeds(CB, labels, a, b)
        score = [[task_metrics(CB, labels, run)["primary"] for run in runs] for runs in (a, b)]
        assert comparison.difference == pytest.approx(np.mean(score[1]) - np.mean(score[0]))
        assert comparison.low < comparison.difference < comparison.high
        assert comparison.n_seeds == 5
        assert comparison.test == "bootstrap over seeds and rows"

    def test_swapping_a_and_b_flips_the_sign(self, rng):
        labels = rng.integers(2, size=90)
        a, b = ([noisy(labels, rate, 2, rng) for _ in range(3)] for rate in (0.6, 0.7))
        there = paired_comparison_over_seeds(["accuracy"], labels, a, b)
        back = paired_comparison_over_seeds(["accuracy"], labels, b, a)
        assert (back.difference, back.low, back.high) == pytest.approx((-there.difference, -there.high, -there.low))
        assert back.p_value == there.p_value

    def test_the_interval_covers_the_seeds_as_well_as_the_rows(self, rng):
        """Where seeds differ much, row resampling alone is blind to most of the spread."""
        covered = 0
        for seed in range(60):
            labels = np.zeros(200, dtype=int)
            rates = 0.75 + rng.normal(0, 0.05, 5)
            a = [(rng.random(200) > 0.75).astype(int) for _ in range(5)]
            b = [(rng.random(200) > rate).astype(int) for rate in rates]
            comparison = paired_comparison_over_seeds(["accuracy"], labels, a, b, n_resamples=300, seed=seed)
            covered += comparison.low <= 0 <= comparison.high
        assert covered >= 54

    def test_the_p_value_agrees_with_the_interval(self, rng):
        labels = rng.integers(2, size=200)
        for rate in (0.71, 0.75, 0.9):
            a, b = ([noisy(labels, each, 2, rng) for _ in range(4)] for each in (0.7, rate))
            comparison = paired_comparison_over_seeds(["accuracy"], labels, a, b)
            assert (comparison.p_value < 0.05) == (comparison.low > 0 or comparison.high < 0)

    def test_unequal_numbers_of_runs_are_refused(self):
        with pytest.raises(ValueError, match="2 runs and b has 1"):
            paired_comparison_over_seeds(["accuracy"], [0, 1], [[0, 1], [0, 0]], [[0, 1]])

    def test_the_t_interval_equals_scipy(self):
        values = [0.70, 0.74, 0.71, 0.77, 0.73]
        summary = over_seeds(values)
        expected = scipy.stats.ttest_1samp(values, 0).confidence_interval(0.95)
        assert (summary.low, summary.high) == pytest.approx((expected.low, expected.high))
        assert (summary.mean, summary.std) == pytest.approx((np.mean(values), np.std(values, ddof=1)))

    def test_one_seed_has_a_mean_and_no_spread(self):
        summary = over_seeds([0.7])
        assert (summary.mean, summary.low, summary.high, summary.std) == (0.7, None, None, None)


class TestHolm:
    def test_it_equals_a_hand_worked_example(self):
        # Sorted 0.01, 0.02, 0.04 times 3, 2, 1; never less than the one before.
        assert holm([0.04, 0.01, 0.02]) == pytest.approx([0.04, 0.03, 0.04])

    def test_an_adjusted_value_is_at_most_one_and_one_comparison_stays(self):
        assert holm([0.7, 0.6]) == pytest.approx([1, 1])
        assert holm([0.03]) == pytest.approx([0.03])
        assert holm([]).tolist() == []


def calibrated(rng, n_rows, temperature=1.0):
    """Labels drawn from the probabilities, which are then made `1 / temperature` times as sure."""
    logits = rng.normal(size=(n_rows, 3)) * 2
    truth = scipy.special.softmax(logits, axis=1)
    labels = (truth.cumsum(axis=1) < rng.random((n_rows, 1))).sum(axis=1)
    return labels, scipy.special.softmax(logits * temperature, axis=1)


class TestCalibration:
    LABELS = (0, 0, 1, 1)
    PROBABILITIES = ((0.9, 0.1), (0.4, 0.6), (0.3, 0.7), (0.2, 0.8))

    def test_bins_of_equal_mass_equal_a_hand_worked_example(self):
        # Confidence 0.9 right, 0.6 wrong, 0.7 right, 0.8 right; sorted 0.6, 0.7 | 0.8, 0.9.
        table = reliability(self.LABELS, self.PROBABILITIES, n_bins=2)
        assert table["confidence"].tolist() == pytest.approx([0.65, 0.85])
        assert table["accuracy"].tolist() == [0.5, 1.0]
        assert table["rows"].tolist() == [2, 2]
        ece = expected_calibration_error(self.LABELS, self.PROBABILITIES, n_bins=2)
        assert ece == pytest.approx((0.15 + 0.15) / 2)

    def test_bins_differ_by_one_row_at_most_and_hold_every_row(self, rng):
        labels, probabilities = calibrated(rng, 103)
        rows = reliability(labels, probabilities)["rows"]
        assert rows.sum() == 103
        assert set(rows) == {10, 11}
        assert len(reliability(labels[:4], probabilities[:4])) == 4

    def test_ece_weighs_bins_by_their_rows(self):
        # Confidence 0.6 (two rows, both right) and 1.0 (one row, wrong).
        ece = expected_calibration_error([0, 0, 1], [[0.6, 0.4], [0.6, 0.4], [1.0, 0.0]], n_bins=2)
        assert ece == pytest.approx((2 * 0.4 + 1 * 1.0) / 3)

    def test_the_brier_score_sums_over_classes(self):
        expected = np.mean([2 * 0.1**2, 2 * 0.6**2, 2 * 0.3**2, 2 * 0.2**2])
        assert brier_score(self.LABELS, self.PROBABILITIES) == pytest.approx(expected)
        # A class that no label has still has a column.
        assert brier_score([0, 1], [[0.5, 0.3, 0.2], [0, 1, 0]]) == pytest.approx((0.25 + 0.09 + 0.04) / 2)

    @pytest.mark.parametrize("sure", [0.5, 1.0, 3.0])
    def test_the_fitted_temperature_undoes_a_known_one_and_lowers_ece(self, rng, sure):
        dev, test = calibrated(rng, 4000, sure), calibrated(rng, 4000, sure)
        temperature = fit_temperature(*dev)
        assert temperature == pytest.approx(sure, rel=0.1)
        before = expected_calibration_error(*test)
        after = expected_calibration_error(test[0], apply_temperature(test[1], temperature))
        assert after < 0.04
        assert after < before or sure == 1.0

    def test_a_temperature_changes_no_answer_and_one_changes_nothing(self, rng):
        _, probabilities = calibrated(rng, 50)
        scaled = apply_temperature(probabilities, 4.0)
        assert (scaled.argmax(axis=1) == probabilities.argmax(axis=1)).all()
        assert (scaled.max(axis=1) < probabilities.max(axis=1)).all()
        assert apply_temperature(probabilities, 1.0) == pytest.approx(probabilities)

    def test_probabilities_that_were_rounded_to_zero_are_borne(self):
        labels, probabilities = [0, 1, 0], [[1.0, 0.0], [1.0, 0.0], [0.9998, 0.0]]
        assert brier_score(labels, probabilities) == pytest.approx(2 / 3)
        assert fit_temperature(labels, probabilities) > 5
        assert np.isfinite(apply_temperature(probabilities, 2.0)).all()

    @pytest.mark.parametrize(
        ("labels", "probabilities", "message"),
        [
            ([0, 1], [[0.5, 0.5]], r"shape \(1, 2\) for 2 labels"),
            ([0], [0.5], r"expected \(N, K\)"),
            ([], np.zeros((0, 2)), "N > 0"),
            ([2], [[0.5, 0.5]], "a column for every label"),
            ([0], [[0.5, 0.9]], "rows that sum to 1"),
        ],
    )
    def test_what_is_no_probability_is_refused(self, labels, probabilities, message):
        with pytest.raises(ValueError, match=message):
            expected_calibration_error(labels, probabilities)

    def test_a_temperature_of_zero_is_refused(self):
        with pytest.raises(ValueError, match="temperature is 0"):
            apply_temperature([[0.5, 0.5]], 0)
