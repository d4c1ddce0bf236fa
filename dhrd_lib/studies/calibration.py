"""Calibration: does a classifier's confidence match its accuracy?

Probabilities have shape (N, K) with rows that sum to 1; a row's confidence is its largest probability.
"""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import scipy.optimize
from numpy.typing import ArrayLike
from scipy.special import logsumexp, softmax
from sklearn.metrics import brier_score_loss

from dhrd_lib.evaluation import class_indices


def reliability(labels: ArrayLike, probabilities: ArrayLike, *, n_bins: int = 10) -> pd.DataFrame:
    """Return bins of rows by confidence, of equal mass (the first ones may have one row more).

    Columns: confidence and accuracy (means over the bin, fractions) and rows. Fewer rows than `n_bins` make a
    bin each.
    """
    gold, probs = _check(labels, probabilities)
    confidence, right = probs.max(axis=1), probs.argmax(axis=1) == gold
    # A stable sort deals rows of equal confidence in their order, the same at every call.
    bins = np.array_split(np.argsort(confidence, kind="stable"), min(n_bins, len(gold)))
    rows = [(confidence[rows].mean(), right[rows].mean(), len(rows)) for rows in bins]
    return pd.DataFrame(rows, columns=["confidence", "accuracy", "rows"])


def expected_calibration_error(labels: ArrayLike, probabilities: ArrayLike, *, n_bins: int = 10) -> float:
    """Return the ECE: the mean distance of accuracy and confidence over equal-mass bins, weighted by rows."""
    bins = reliability(labels, probabilities, n_bins=n_bins)
    return float(np.average((bins["accuracy"] - bins["confidence"]).abs(), weights=bins["rows"]))


def brier_score(labels: ArrayLike, probabilities: ArrayLike) -> float:
    """Return the mean over rows of the squared error summed over all K classes: 0 to 2, for two classes too."""
    gold, probs = _check(labels, probabilities)
    return float(brier_score_loss(gold, probs, labels=range(probs.shape[1]), scale_by_half=False))


def fit_temperature(labels: ArrayLike, probabilities: ArrayLike) -> float:
    """Return the temperature (0.05 to 20) that makes these labels likeliest; fit it on dev, apply it to test.

    Above 1 means that the probabilities were overconfident.
    """
    gold, probs = _check(labels, probabilities)

    def negative_log_likelihood(log_temperature: float) -> float:
        logits = _log(probs) / math.exp(log_temperature)
        return float((logsumexp(logits, axis=1) - logits[np.arange(len(gold)), gold]).mean())

    bounds = (math.log(0.05), math.log(20))
    return math.exp(scipy.optimize.minimize_scalar(negative_log_likelihood, bounds=bounds, method="bounded").x)


def apply_temperature(probabilities: ArrayLike, temperature: float) -> np.ndarray:
    """Return the probabilities with their logits divided by the temperature; no prediction changes."""
    if not temperature > 0:
        raise ValueError(f"temperature is {temperature!r}; expected a number above 0.")
    return softmax(_log(np.asarray(probabilities, dtype=float)) / temperature, axis=1)


def _log(probabilities: np.ndarray) -> np.ndarray:
    return np.log(np.maximum(probabilities, 1e-7))  # stored probabilities are rounded: a small one may read 0


def _check(labels: ArrayLike, probabilities: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    gold, probs = class_indices("labels", labels), np.asarray(probabilities, dtype=float)
    if probs.ndim != 2 or len(probs) != len(gold) or len(gold) == 0:
        raise ValueError(f"probabilities have shape {probs.shape} for {len(gold)} labels; expected (N, K), N > 0.")
    if gold.max() >= probs.shape[1] or not np.allclose(probs.sum(axis=1), 1, atol=1e-3) or probs.min() < 0:
        raise ValueError("probabilities don't sum to 1 in each row, or a label has no column.")
    return gold, probs / probs.sum(axis=1, keepdims=True)  # stored ones are rounded
