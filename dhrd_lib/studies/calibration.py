"""Calibration: does a classifier's confidence (a row's largest probability) match its accuracy?

Labels are class indices (N,), probabilities (N, K) with rows that sum to 1.
"""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import scipy.optimize
from numpy.typing import ArrayLike
from scipy.special import softmax
from sklearn.metrics import log_loss


def reliability(labels: ArrayLike, probabilities: ArrayLike, *, n_bins: int = 10) -> pd.DataFrame:
    """Return confidence, accuracy (means, fractions) and rows of at most `n_bins` bins of equal mass."""
    probs = np.asarray(probabilities)
    confidence, right = probs.max(axis=1), probs.argmax(axis=1) == np.asarray(labels)
    bins = np.array_split(np.argsort(confidence, kind="stable"), min(n_bins, len(right)))
    rows = [(confidence[rows].mean(), right[rows].mean(), len(rows)) for rows in bins]
    return pd.DataFrame(rows, columns=["confidence", "accuracy", "rows"])


def expected_calibration_error(labels: ArrayLike, probabilities: ArrayLike, *, n_bins: int = 10) -> float:
    """Return the ECE: the mean distance of accuracy and confidence over equal-mass bins, weighted by rows."""
    bins = reliability(labels, probabilities, n_bins=n_bins)
    return float(np.average((bins["accuracy"] - bins["confidence"]).abs(), weights=bins["rows"]))


def fit_temperature(labels: ArrayLike, probabilities: ArrayLike) -> float:
    """Return the temperature (0.05 to 20) that makes dev's labels likeliest; above 1 they were overconfident."""
    classes = range(np.shape(probabilities)[1])

    def loss(log_temperature: float) -> float:
        return log_loss(labels, apply_temperature(probabilities, math.exp(log_temperature)), labels=classes)

    bounds = (math.log(0.05), math.log(20))
    return math.exp(scipy.optimize.minimize_scalar(loss, bounds=bounds, method="bounded").x)


def apply_temperature(probabilities: ArrayLike, temperature: float) -> np.ndarray:
    """Return the probabilities with their logits divided by the temperature (> 0); no prediction changes."""
    return softmax(np.log(np.maximum(np.asarray(probabilities, dtype=float), 1e-7)) / temperature, axis=1)
