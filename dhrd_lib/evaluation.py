"""Task metrics, the per-class table and the confusion matrix.

Every metric is a function of counts summed over rows, so a resample of the rows is a weighted sum of the same
counts (`dhrd_lib.studies.statistics`), by group where there are groups (a MultiRC question), else by row. Labels
and predictions are class indices (N,); a prediction of `NO_ANSWER` is wrong and of no class. Metrics are fractions.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike
from sklearn.metrics import confusion_matrix, precision_recall_fscore_support

NO_ANSWER = -1


def task_metrics(
    metrics: Sequence[str], labels: ArrayLike, predictions: ArrayLike, groups: ArrayLike | None = None
) -> dict[str, float]:
    """Return the named metrics and "primary", their mean, which is how the paper counts a task with two.

    "macro_f1" is over the classes that labels or predictions hold, "balanced_accuracy" the mean recall of those
    that labels hold, "f1a" the F1 of class 1, "em" the share of groups whose rows are all right. Raises
    `ValueError` for a negative label, and for "em" without `groups` (N,).
    """
    counts = unit_counts(metrics, labels, [predictions], groups).sum(axis=0)[0]
    values = {name: float(_metric(name, counts)) for name in metrics}
    return {**values, "primary": float(primary_metric(metrics, counts))}


def per_class(labels: ArrayLike, predictions: ArrayLike, label_names: Sequence[str]) -> pd.DataFrame:
    """Return precision, recall, F1 (fractions; 0 where undefined) and support (rows), one row per class."""
    table = precision_recall_fscore_support(labels, predictions, labels=range(len(label_names)), zero_division=0)
    columns = ("precision", "recall", "f1", "support")
    return pd.DataFrame(dict(zip(columns, table, strict=True)), index=pd.Index(label_names, name="label"))


def confusion(labels: ArrayLike, predictions: ArrayLike, n_labels: int) -> np.ndarray:
    """Return counts of shape (n_labels, n_labels), gold label by prediction; `NO_ANSWER` is in no cell."""
    return confusion_matrix(labels, predictions, labels=range(n_labels))


def unit_counts(
    metrics: Sequence[str], labels: ArrayLike, predictions: Sequence[ArrayLike], groups: ArrayLike | None
) -> np.ndarray:
    """Return the counts of each unit and run, from one (N,) array of predictions per run: (units, runs, 3K + 2).

    The last axis holds, for K classes, K of right rows by class, K of rows by gold label, K of rows by prediction,
    the groups that are all right, and the groups. Raises as `task_metrics`.
    """
    if "em" in metrics and groups is None:
        raise ValueError("the metric 'em' is a share of groups; expected groups, one per row.")
    gold, predicted = np.asarray(labels), np.stack(predictions, axis=1)
    if gold.min() < 0:
        raise ValueError(f"labels holds {gold.min()}; expected class indices, 0 or more.")
    classes = np.arange(max(2, gold.max() + 1, predicted.max() + 1))
    is_gold = np.repeat((gold[:, None] == classes)[:, None], predicted.shape[1], axis=1)  # (N, runs, K)
    is_predicted = predicted[:, :, None] == classes  # (N, runs, K)
    units = np.concatenate([is_gold & is_predicted, is_gold, is_predicted], axis=-1).astype(float)
    if groups is not None:
        codes, names = pd.factorize(np.asarray(groups))
        rows, units = units, np.zeros((len(names), *units.shape[1:]))
        np.add.at(units, codes, rows)
    right, of_gold = (part.sum(axis=-1) for part in np.split(units, 3, axis=-1)[:2])
    return np.concatenate([units, (right == of_gold)[..., None], np.ones((*right.shape, 1))], axis=-1)


def primary_metric(metrics: Sequence[str], counts: np.ndarray) -> np.ndarray:
    """Return the mean of the named metrics: counts (..., 3K + 2) to (...)."""
    return np.mean([_metric(name, counts) for name in metrics], axis=0)


def _metric(name: str, counts: np.ndarray) -> np.ndarray:
    """Return a metric of counts: (..., 3K + 2) to (...)."""
    right, gold, predicted = np.split(counts[..., :-2], 3, axis=-1)  # each (..., K), by class
    rows = gold.sum(axis=-1)
    f1 = 2 * right / np.maximum(gold + predicted, 1)  # 0 for a class that doesn't occur
    match name:
        case "accuracy":
            return right.sum(axis=-1) / rows
        case "macro_f1":
            return f1.sum(axis=-1) / (gold + predicted > 0).sum(axis=-1)
        case "balanced_accuracy":
            return (right / np.maximum(gold, 1)).sum(axis=-1) / (gold > 0).sum(axis=-1)
        case "f1a":
            return f1[..., 1]
        case "em":
            return counts[..., -2] / counts[..., -1]
        case "mcc":  # Gorodkin's R_K; rows without an answer count as one more predicted class, as in scikit-learn
            unanswered = rows - predicted.sum(axis=-1)
            covariance = right.sum(axis=-1) * rows - (gold * predicted).sum(axis=-1)
            spread_predicted = rows**2 - (predicted**2).sum(axis=-1) - unanswered**2
            spread = np.sqrt((rows**2 - (gold**2).sum(axis=-1)) * spread_predicted)
            return covariance / np.where(spread > 0, spread, 1)  # 0 where all labels or predictions are the same
    raise ValueError(f"the metric is {name!r}; expected accuracy, macro_f1, balanced_accuracy, mcc, f1a or em.")
