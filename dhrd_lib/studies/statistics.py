"""Intervals of metrics, paired comparisons on the same rows, and corrections for several comparisons.

Predictions are one (N,) array of class indices, or a list with one per seed. What is resampled or swapped is the
group where there are groups, else the row; thousands of resamples of the units' counts are one matrix product.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import scipy.stats
from numpy.typing import ArrayLike

from dhrd_lib.evaluation import primary_metric, unit_counts

_BATCH_NUMBERS = 2**22  # how many numbers a batch of resamples may hold: 32 MiB
_NBSP = "\N{NO-BREAK SPACE}"
Runs = ArrayLike | Sequence[ArrayLike]
Groups = ArrayLike | None


@dataclass(frozen=True)
class Interval:
    """A metric (a fraction) and its confidence interval; its text is in percent: "74.6% [70.0, 79.1]"."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{100 * self.value:.1f}% [{100 * self.low:.1f},{_NBSP}{100 * self.high:.1f}]"


@dataclass(frozen=True)
class PairedComparison:
    """The primary metric of b minus that of a (a fraction), on the same rows; its text is in points.

    `n_rows` is of one run; the counts of rows on which one alone is right add up over the seeds.
    """

    difference: float
    low: float
    high: float
    p_value: float
    test: str
    n_rows: int
    n_seeds: int
    a_only_right: int
    b_only_right: int

    def __str__(self) -> str:
        return points_interval(self.difference, self.low, self.high)


def points_interval(difference: float, low: float, high: float) -> str:
    """Return a difference of fractions and its interval in percentage points: "+0.6 [-2.9, +4.6]"."""
    return f"{100 * difference:+.1f} [{100 * low:+.1f},{_NBSP}{100 * high:+.1f}]"


def bootstrap_interval(
    metrics: Sequence[str], labels: ArrayLike, predictions: Runs, groups: Groups = None, n_resamples: int = 2000
) -> Interval:
    """Return the primary metric (its mean over seeds) with its 95% bootstrap interval over rows and seeds.

    Percentile and not BCa, which is undefined where every row is right, as small test sets do reach. Raises
    `ValueError` as `task_metrics`.
    """
    counts = unit_counts(metrics, labels, _by_seed(predictions), groups)
    rng = np.random.default_rng(0)
    means = _seed_means(_resample(metrics, counts, n_resamples, rng), rng)
    return Interval(float(primary_metric(metrics, counts.sum(axis=0)).mean()), *_percentiles(means))


def paired_comparison(
    metrics: Sequence[str],
    labels: ArrayLike,
    predictions_a: Runs,
    predictions_b: Runs,
    groups: Groups = None,
    n_resamples: int = 2000,
) -> PairedComparison:
    """Compare two runs, or two settings over several seeds, on the same rows; the i-th runs share a seed.

    The interval is a paired percentile bootstrap over rows (or groups) and seed pairs. With one seed the p-value is
    McNemar's exact test for plain accuracy on rows, else a permutation test that swaps a and b unit by unit. With
    several it is twice the smaller share of resamples on either side of zero, so that it agrees with the interval;
    both are careful where seeds differ little, because drawing rows and seeds at once counts their joint noise more
    than once (Owen's pigeonhole bootstrap), and too narrow with two seeds that differ much. Raises `ValueError` for
    unequal numbers of seeds.
    """
    a, b = _by_seed(predictions_a), _by_seed(predictions_b)
    n_seeds = len(a)
    if len(b) != n_seeds:
        raise ValueError(f"a has {n_seeds} runs and b has {len(b)}; expected one pair per seed.")
    counts = unit_counts(metrics, labels, [*a, *b], groups)
    rng = np.random.default_rng(0)
    values = _resample(metrics, counts, n_resamples, rng)
    differences = _seed_means(values[:, n_seeds:] - values[:, :n_seeds], rng)
    point = primary_metric(metrics, counts.sum(axis=0))
    right = np.stack([*a, *b]) == np.asarray(labels)
    a_only = int((right[:n_seeds] & ~right[n_seeds:]).sum())
    b_only = int((right[n_seeds:] & ~right[:n_seeds]).sum())
    unit = "rows" if groups is None else "groups"
    if n_seeds > 1:
        tail = min((differences <= 0).sum(), (differences >= 0).sum()) + 1
        p_value, test = min(1.0, 2 * float(tail) / (n_resamples + 1)), f"bootstrap over seeds and {unit}"
    elif groups is None and list(metrics) == ["accuracy"]:
        n_differ, test = a_only + b_only, "exact McNemar test"
        p_value = float(scipy.stats.binomtest(a_only, n_differ).pvalue) if n_differ else 1.0
    else:
        p_value = _permutation_p(metrics, counts[:, 0], counts[:, 1], n_resamples)
        test = f"paired permutation test over {unit}"
    difference, bounds = float((point[n_seeds:] - point[:n_seeds]).mean()), _percentiles(differences)
    return PairedComparison(difference, *bounds, p_value, test, right.shape[1], n_seeds, a_only, b_only)


def holm(p_values: Sequence[float]) -> np.ndarray:
    """Return Holm's step-down correction of the p-values of several comparisons, in their order."""
    order, adjusted = np.argsort(p_values), np.empty(len(p_values))
    adjusted[order] = np.maximum.accumulate(np.sort(p_values) * np.arange(len(order), 0, -1))
    return np.minimum(adjusted, 1)


def _by_seed(predictions: Runs) -> list[ArrayLike]:
    return list(predictions) if np.ndim(next(iter(predictions), 0)) else [predictions]


def _resample(metrics: Sequence[str], counts: np.ndarray, n_resamples: int, rng: np.random.Generator) -> np.ndarray:
    """Return the primary metric of every run in every resample of the units: (n_resamples, runs)."""
    n_units, flat, values = len(counts), counts.reshape(len(counts), -1), []
    batch = max(1, _BATCH_NUMBERS // n_units)
    for start in range(0, n_resamples, batch):
        size = min(batch, n_resamples - start)
        weights = rng.multinomial(n_units, np.full(n_units, 1 / n_units), size)
        totals = (weights.astype(float) @ flat).reshape(size, *counts.shape[1:])
        values.append(primary_metric(metrics, totals))
    return np.concatenate(values)


def _seed_means(values: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Return means over resampled seeds: (resamples, seeds) to (resamples,).

    Draws one seed fewer than there are (Rao and Wu's rescaled bootstrap): drawing all S of them makes the
    variance between seeds too small by (S - 1) / S, which is a fifth at five seeds.
    """
    n_seeds = values.shape[1]
    drawn = rng.integers(n_seeds, size=(len(values), max(1, n_seeds - 1)))
    return np.take_along_axis(values, drawn, axis=1).mean(axis=1)


def _percentiles(values: np.ndarray) -> tuple[float, float]:
    # As (1 - 0.95) / 2, so that stored intervals stay equal to the last bit.
    return tuple(np.quantile(values, [(1 - 0.95) / 2, (1 + 0.95) / 2]).tolist())


def _permutation_p(metrics: Sequence[str], counts_a: np.ndarray, counts_b: np.ndarray, n_resamples: int) -> float:
    """Return the two-sided p-value under swaps of a and b within units; counts are (units, 3K + 2)."""
    if len(counts_a) < 2:
        return 1.0  # One unit and its swap are equally far apart; scipy needs two or more.
    total_a, total_b, gain = counts_a.sum(axis=0), counts_b.sum(axis=0), counts_b - counts_a

    def difference(swapped: np.ndarray, _: np.ndarray, axis: int) -> np.ndarray:
        moved = swapped @ gain
        return primary_metric(metrics, total_b - moved) - primary_metric(metrics, total_a + moved)

    # scipy permutes the marks 0 and 1 within a unit, so the first sample says which units are swapped.
    marks = np.zeros(len(gain)), np.ones(len(gain))
    options = {"permutation_type": "samples", "vectorized": True, "n_resamples": n_resamples}
    options |= {"batch": max(1, _BATCH_NUMBERS // len(gain)), "rng": np.random.default_rng(0)}
    return float(scipy.stats.permutation_test(marks, difference, **options).pvalue)
