"""Calibration: does a classifier's confidence (a row's largest probability) match its accuracy?

Labels are class indices (N,), probabilities (N, K) with rows that sum to 1.
"""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import scipy.optimize
from numpy.typing import ArrayLike
from scipy.special import logsumexp, softmax
from sklearn.metrics import brier_score_loss


def reliability(labels: ArrayLike, probabilities: ArrayLike, *, n_bins: int = 10) -> pd.DataFrame:
    """Return confidence, accuracy (means, fractions) and rows of bins by confidence, of equal mass.

    The first bins may have one row more; fewer rows than `n_bins` make a bin each.
    """
    probs = _normalized(probabilities)
    confidence, right = probs.max(axis=1), probs.argmax(axis=1) == np.asarray(labels)
    # A stable sort deals rows of equal confidence in their order, the same at every call.
    bins = np.array_split(np.argsort(confidence, kind="stable"), min(n_bins, len(right)))
    rows = [(confidence[rows].mean(), right[rows].mean(), len(rows)) for rows in bins]
    return pd.DataFrame(rows, columns=["confidence", "accuracy", "rows"])


def expected_calibration_error(labels: ArrayLike, probabilities: ArrayLike, *, n_bins: int = 10) -> float:
    """Return the ECE: the mean distance of accuracy and confidence over equal-mass bins, weighted by rows."""
    bins = reliability(labels, probabilities, n_bins=n_bins)
    return float(np.average((bins["accuracy"] - bins["confidence"]).abs(), weights=bins["rows"]))


def brier_score(labels: ArrayLike, probabilities: ArrayLike) -> float:
    """Return the mean over rows of the squared error summed over all K classes: 0 to 2, for two classes too."""
    probs = _normalized(probabilities)
    return float(brier_score_loss(labels, probs, labels=range(probs.shape[1]), scale_by_half=False))


def fit_temperature(labels: ArrayLike, probabilities: ArrayLike) -> float:
    """Return the temperature (0.05 to 20) that makes these labels likeliest; above 1 they were overconfident.

    Fit it on dev, apply it to test.
    """
    gold, log_probs = np.asarray(labels), _log(_normalized(probabilities))

    def negative_log_likelihood(log_temperature: float) -> float:
        logits = log_probs / math.exp(log_temperature)
        return float((logsumexp(logits, axis=1) - logits[np.arange(len(gold)), gold]).mean())

    bounds = (math.log(0.05), math.log(20))
    return math.exp(scipy.optimize.minimize_scalar(negative_log_likelihood, bounds=bounds, method="bounded").x)


def apply_temperature(probabilities: ArrayLike, temperature: float) -> np.ndarray:
    """Return the probabilities with their logits divided by the temperature (> 0); no prediction changes."""
    return softmax(_log(np.asarray(probabilities, dtype=float)) / temperature, axis=1)


# Stored probabilities are rounded: a row may miss 1, a small one may read 0.
def _normalized(probabilities: ArrayLike) -> np.ndarray:
    probs = np.asarray(probabilities, dtype=float)
    return probs / probs.sum(axis=1, keepdims=True)


def _log(probabilities: np.ndarray) -> np.ndarray:
    return np.log(np.maximum(probabilities, 1e-7))
