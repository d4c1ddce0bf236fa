"""Metrics by hand and against scikit-learn, the per-class table and the confusion matrix."""

import numpy as np
import pytest
from sklearn.metrics import accuracy_score, balanced_accuracy_score, f1_score, matthews_corrcoef

from dhrd_lib.evaluation import NO_ANSWER, confusion, per_class, task_metrics

CB = ("macro_f1", "accuracy")
MULTIRC = ("f1a", "em")


@pytest.fixture
def rng():
    return np.random.default_rng(7)


def test_multirc_equals_hand_worked_example():
    # Question a: both answers right. Question b: one of two right. Question c: its one answer wrong.
    metrics = task_metrics(MULTIRC, [1, 0, 1, 1, 0], [1, 0, 1, 0, 1], ["a", "a", "b", "b", "c"])
    # tp 2, fp 1, fn 1: F1 = 4 / 6; one question of three is all right.
    assert metrics == pytest.approx({"f1a": 2 / 3, "em": 1 / 3, "primary": 1 / 2})
    assert task_metrics(["em"], [1, 0, 1, 0], [1, 1, 1, 0], ["x", "y", "y", "x"])["em"] == 0.5


def test_cb_equals_hand_worked_example():
    metrics = task_metrics(CB, [0, 0, 1, 1, 2], [0, 1, 1, 1, 0])
    # F1: class 0 is 2/4, class 1 is 4/5, class 2 is 0.
    assert metrics == pytest.approx({"macro_f1": 1.3 / 3, "accuracy": 0.6, "primary": (1.3 / 3 + 0.6) / 2})


@pytest.mark.parametrize("n_labels", [2, 3, 5])
def test_metrics_equal_scikit_learn(rng, n_labels):
    labels, predictions = rng.integers(n_labels, size=(2, 200))
    metrics = task_metrics(["accuracy", "macro_f1", "balanced_accuracy", "mcc", "f1a"], labels, predictions)
    assert metrics["accuracy"] == pytest.approx(accuracy_score(labels, predictions))
    assert metrics["macro_f1"] == pytest.approx(f1_score(labels, predictions, average="macro"))
    assert metrics["balanced_accuracy"] == pytest.approx(balanced_accuracy_score(labels, predictions))
    assert metrics["mcc"] == pytest.approx(matthews_corrcoef(labels, predictions))
    assert metrics["f1a"] == pytest.approx(f1_score(labels, predictions, labels=[1], average="macro"))


def test_imbalance_metrics_equal_hand_worked_example():
    labels, majority, half = [0] * 8 + [1] * 2, [0] * 10, [0] * 8 + [1, 0]
    metrics = ["accuracy", "balanced_accuracy", "mcc"]
    # Always the majority label: recalls 1 and 0, no correlation.
    assert task_metrics(metrics, labels, majority) == pytest.approx(
        {"accuracy": 0.8, "balanced_accuracy": 0.5, "mcc": 0, "primary": 1.3 / 3}
    )
    # tp 1, tn 8, fn 1, fp 0: mcc = (1 * 8 - 0) / sqrt(1 * 2 * 8 * 9).
    found = task_metrics(metrics, labels, half)
    assert (found["balanced_accuracy"], found["mcc"]) == pytest.approx((0.75, 8 / 12))


def test_mcc_counts_no_answer_as_a_class(rng):
    labels, predictions = rng.integers(3, size=60), rng.integers(-1, 3, size=60)
    assert task_metrics(["mcc"], labels, predictions)["mcc"] == pytest.approx(
        matthews_corrcoef(labels, predictions)
    )


def test_macro_f1_counts_only_classes_that_occur():
    assert task_metrics(["macro_f1"], [0, 4], [0, 4])["macro_f1"] == 1
    assert task_metrics(["macro_f1"], [0, 0], [0, 4])["macro_f1"] == pytest.approx((2 / 3 + 0) / 2)


def test_no_answer_is_wrong_and_no_class():
    metrics = task_metrics(["accuracy", "macro_f1"], [0, 1, 1], [0, 1, NO_ANSWER])
    assert metrics["accuracy"] == pytest.approx(2 / 3)
    assert metrics["macro_f1"] == pytest.approx((1 + 2 / 3) / 2)


def test_unusable_input_raises():
    with pytest.raises(ValueError, match="expected groups"):
        task_metrics(["em"], [0, 1], [0, 1])
    with pytest.raises(ValueError, match="labels holds -1"):
        task_metrics(["accuracy"], [-1, 1], [0, 1])


def test_per_class_equals_confusion_matrix(rng):
    labels, predictions = rng.integers(3, size=(2, 90))
    matrix, table = confusion(labels, predictions, 3), per_class(labels, predictions, ["a", "b", "c"])
    right = np.diag(matrix)
    assert matrix.sum() == 90
    assert table["precision"].to_numpy() == pytest.approx(right / matrix.sum(axis=0))
    assert table["recall"].to_numpy() == pytest.approx(right / matrix.sum(axis=1))
    assert table["f1"].to_numpy() == pytest.approx(2 * right / (matrix.sum(axis=0) + matrix.sum(axis=1)))
    assert table["support"].tolist() == matrix.sum(axis=1).tolist()


def test_class_without_rows_has_zeros():
    assert per_class([0, 0], [0, 0], ["a", "b"]).loc["b"].tolist() == [0, 0, 0, 0]
