"""Reliability, ECE and Brier score by hand; a fitted temperature undoes a known one."""

import numpy as np
import pytest
from scipy.special import softmax

from dhrd_lib.studies.calibration import (
    apply_temperature,
    expected_calibration_error,
    fit_temperature,
    reliability,
)

LABELS = (0, 0, 1, 1)
PROBABILITIES = ((0.9, 0.1), (0.4, 0.6), (0.3, 0.7), (0.2, 0.8))


def draw(n_rows, sharpness=1.0):
    """Draw labels from probabilities, which are then sharpened."""
    rng = np.random.default_rng(7)
    logits = rng.normal(size=(n_rows, 3)) * 2
    labels = (softmax(logits, axis=1).cumsum(axis=1) < rng.random((n_rows, 1))).sum(axis=1)
    return labels, softmax(logits * sharpness, axis=1)


def test_equal_mass_bins_equal_hand_worked_example():
    # Confidence 0.9 right, 0.6 wrong, 0.7 right, 0.8 right; sorted 0.6, 0.7 | 0.8, 0.9.
    table = reliability(LABELS, PROBABILITIES, n_bins=2)
    assert table["confidence"].tolist() == pytest.approx([0.65, 0.85])
    assert table["accuracy"].tolist() == [0.5, 1.0]
    assert table["rows"].tolist() == [2, 2]
    assert expected_calibration_error(LABELS, PROBABILITIES, n_bins=2) == pytest.approx((0.15 + 0.15) / 2)


def test_ece_weighs_bins_by_rows():
    # Confidence 0.6 (two rows, both right) and 1.0 (one row, wrong).
    ece = expected_calibration_error([0, 0, 1], [[0.6, 0.4], [0.6, 0.4], [1.0, 0.0]], n_bins=2)
    assert ece == pytest.approx((2 * 0.4 + 1 * 1.0) / 3)


@pytest.mark.parametrize("sharpness", [0.5, 1.0, 3.0])
def test_fitted_temperature_undoes_known_one(sharpness):
    labels, probabilities = draw(8000, sharpness)
    temperature = fit_temperature(labels[:4000], probabilities[:4000])
    assert temperature == pytest.approx(sharpness, rel=0.1)
    scaled = apply_temperature(probabilities[4000:], temperature)
    assert expected_calibration_error(labels[4000:], scaled) < 0.04


def test_temperature_changes_no_prediction():
    _, probabilities = draw(50)
    scaled = apply_temperature(probabilities, 4.0)
    assert (scaled.argmax(axis=1) == probabilities.argmax(axis=1)).all()
    assert (scaled.max(axis=1) < probabilities.max(axis=1)).all()
    assert apply_temperature(probabilities, 1.0) == pytest.approx(probabilities)


def test_probabilities_rounded_to_zero_work():
    labels, probabilities = [0, 1, 0], [[1.0, 0.0], [1.0, 0.0], [0.9998, 0.0]]
    assert fit_temperature(labels, probabilities) > 5
    assert np.isfinite(apply_temperature(probabilities, 2.0)).all()
