"""Evaluation: task metrics and their intervals, paired comparisons on the same rows, calibration.

Every metric here is a function of counts summed over rows, so a resample of the rows is a weighted sum
of the same counts: thousands of resamples are one matrix product. The unit that is resampled or
swapped is the group where there are groups (a MultiRC question with all its answers), else the row.

Throughout: labels and predictions are class indices, int arrays of shape (N,); a prediction of
`NO_ANSWER` is wrong whatever the label and belongs to no class; metrics are fractions from 0 to 1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import scipy.optimize
import scipy.stats
from numpy.typing import ArrayLike
from scipy.special import logsumexp, softmax
from sklearn.metrics import brier_score_loss, confusion_matrix, precision_recall_fscore_support

NO_ANSWER = -1
_BATCH_NUMBERS = 2**22  # how many numbers a batch of resamples may hold: 32 MiB


@dataclass(frozen=True)
class Interval:
    """A metric (a fraction) and its confidence interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class PairedComparison:
    """The primary metric of b minus that of a (a fraction), on the same rows.

    `low` and `high` bound the difference, `p_value` is two-sided and comes from `test`. `n_rows` counts
    the rows of one run; `a_only_right` and `b_only_right` count rows, added up over the seeds.
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


@dataclass(frozen=True)
class SeedSummary:
    """The mean of a figure over seeds; with one seed `low`, `high` and `std` are None."""

    mean: float
    low: float | None
    high: float | None
    n_seeds: int
    std: float | None


def task_metrics(
    metrics: Sequence[str], labels: ArrayLike, predictions: ArrayLike, groups: ArrayLike | None = None
) -> dict[str, float]:
    """The named metrics, and "primary": their mean, which is how the paper counts a task with two.

    Args:
        metrics: names out of "accuracy", "macro_f1" (scikit-learn's macro average over the classes that
            labels or predictions hold; CB), "f1a" (F1 of class 1 over all answers; MultiRC) and "em"
            (the share of groups whose rows are all right; MultiRC).
        groups: (N,), any hashable values; the question that each row belongs to.

    Raises:
        ValueError: unequal lengths, no rows, an unknown metric, "em" without groups, or a label or
            prediction that is no class index.
    """
    counts = _unit_counts(metrics, labels, [predictions], groups).sum(axis=0)[0]
    values = {name: float(_METRICS[name](counts)) for name in metrics}
    return {**values, "primary": float(_primary(metrics, counts))}


def per_class(labels: ArrayLike, predictions: ArrayLike, label_names: Sequence[str]) -> pd.DataFrame:
    """Precision, recall, F1 (fractions; 0 where undefined) and support (rows), one row a class."""
    table = precision_recall_fscore_support(labels, predictions, labels=range(len(label_names)), zero_division=0)
    columns = ("precision", "recall", "f1", "support")
    return pd.DataFrame(dict(zip(columns, table, strict=True)), index=pd.Index(label_names, name="label"))


def confusion(labels: ArrayLike, predictions: ArrayLike, n_labels: int) -> np.ndarray:
    """Counts of shape (n_labels, n_labels), gold label by prediction; `NO_ANSWER` is in no cell."""
    return confusion_matrix(labels, predictions, labels=range(n_labels))


def bootstrap_interval(
    metrics: Sequence[str],
    labels: ArrayLike,
    predictions: ArrayLike,
    groups: ArrayLike | None = None,
    *,
    confidence: float = 0.95,
    n_resamples: int = 2000,
    seed: int = 0,
) -> Interval:
    """The primary metric of one run with its percentile bootstrap interval over rows (or groups).

    Percentile and not BCa: BCa is undefined where every row is right, which small test sets do reach,
    and its jackknife costs N^2, for no gain on means and F1s of hundreds of rows. Where every row is
    right the percentile interval has no width; read it as "no error seen in N rows".

    Raises:
        ValueError: as `task_metrics`.
    """
    return bootstrap_interval_over_seeds(
        metrics, labels, [predictions], groups, confidence=confidence, n_resamples=n_resamples, seed=seed
    )


def bootstrap_interval_over_seeds(
    metrics: Sequence[str],
    labels: ArrayLike,
    predictions: Sequence[ArrayLike],
    groups: ArrayLike | None = None,
    *,
    confidence: float = 0.95,
    n_resamples: int = 2000,
    seed: int = 0,
) -> Interval:
    """The mean primary metric of several runs, with an interval that resamples runs and rows together.

    Args:
        predictions: one (N,) array a seed, all on the same rows.

    Raises:
        ValueError: as `task_metrics`.
    """
    counts = _unit_counts(metrics, labels, predictions, groups)
    rng = np.random.default_rng(seed)
    means = _seed_means(_resample(metrics, counts, n_resamples, rng), rng)
    value = _primary(metrics, counts.sum(axis=0)).mean()
    return Interval(float(value), *_percentiles(means, confidence))


def paired_comparison(
    metrics: Sequence[str],
    labels: ArrayLike,
    predictions_a: ArrayLike,
    predictions_b: ArrayLike,
    groups: ArrayLike | None = None,
    *,
    confidence: float = 0.95,
    n_resamples: int = 2000,
    seed: int = 0,
) -> PairedComparison:
    """Compare two runs on the same rows.

    The interval is a paired percentile bootstrap. The p-value is McNemar's exact test for plain
    accuracy on rows, else a permutation test that swaps a and b unit by unit.

    Raises:
        ValueError: as `task_metrics`.
    """
    return paired_comparison_over_seeds(
        metrics,
        labels,
        [predictions_a],
        [predictions_b],
        groups,
        confidence=confidence,
        n_resamples=n_resamples,
        seed=seed,
    )


def paired_comparison_over_seeds(
    metrics: Sequence[str],
    labels: ArrayLike,
    predictions_a: Sequence[ArrayLike],
    predictions_b: Sequence[ArrayLike],
    groups: ArrayLike | None = None,
    *,
    confidence: float = 0.95,
    n_resamples: int = 2000,
    seed: int = 0,
) -> PairedComparison:
    """Compare two settings over several seeds: the i-th runs of a and of b share a seed.

    Each resample draws rows (or groups) and seed pairs, the same ones for a and b, and averages the
    difference over the drawn seeds, so the interval covers both the choice of test rows and that of the
    seed. The p-value is twice the smaller share of resamples on either side of zero (each share with
    one added to its count), so that it falls under 1 - confidence where the interval leaves zero out.
    Both err on the careful side where seeds differ little, because drawing rows and seeds at once counts
    their joint noise more than once (Owen's pigeonhole bootstrap); with two seeds that differ much they
    are too narrow still. One pair of runs is the `paired_comparison` of the two.

    Args:
        predictions_a, predictions_b: one (N,) array a seed, in the same order of seeds.

    Raises:
        ValueError: as `task_metrics`, or unequal numbers of runs.
    """
    n_seeds = len(predictions_a)
    if len(predictions_b) != n_seeds:
        raise ValueError(f"a has {n_seeds} runs and b has {len(predictions_b)}; expected one pair a seed.")
    counts = _unit_counts(metrics, labels, [*predictions_a, *predictions_b], groups)
    rng = np.random.default_rng(seed)
    values = _resample(metrics, counts, n_resamples, rng)
    differences = _seed_means(values[:, n_seeds:] - values[:, :n_seeds], rng)
    point = _primary(metrics, counts.sum(axis=0))
    right = np.stack([*predictions_a, *predictions_b]) == np.asarray(labels)
    a_only = int((right[:n_seeds] & ~right[n_seeds:]).sum())
    b_only = int((right[n_seeds:] & ~right[:n_seeds]).sum())
    unit = "rows" if groups is None else "groups"
    if n_seeds > 1:
        p_value, test = _bootstrap_p(differences), f"bootstrap over seeds and {unit}"
    elif groups is None and list(metrics) == ["accuracy"]:
        p_value, test = _mcnemar_p(a_only, b_only), "exact McNemar test"
    else:
        p_value = _permutation_p(metrics, counts[:, 0], counts[:, 1], n_resamples, seed)
        test = f"paired permutation test over {unit}"
    return PairedComparison(
        float((point[n_seeds:] - point[:n_seeds]).mean()),
        *_percentiles(differences, confidence),
        p_value=p_value,
        test=test,
        n_rows=right.shape[1],
        n_seeds=n_seeds,
        a_only_right=a_only,
        b_only_right=b_only,
    )


def over_seeds(values: Sequence[float], *, confidence: float = 0.95) -> SeedSummary:
    """The mean of one figure per seed, its sample standard deviation and its t interval.

    The interval says where the mean over further seeds on the same rows would lie; the chance in the
    rows themselves is `bootstrap_interval_over_seeds`' part.

    Raises:
        ValueError: no values.
    """
    numbers = np.asarray(values, dtype=float)
    if numbers.size == 0:
        raise ValueError("values is empty; expected one figure a seed.")
    mean = float(numbers.mean())
    if numbers.size == 1:
        return SeedSummary(mean, None, None, 1, None)
    std = float(numbers.std(ddof=1))
    half = float(scipy.stats.t.ppf((1 + confidence) / 2, numbers.size - 1)) * std / math.sqrt(numbers.size)
    return SeedSummary(mean, mean - half, mean + half, numbers.size, std)


def holm(p_values: Sequence[float]) -> np.ndarray:
    """Holm's step-down correction of the p-values of several comparisons (tasks, settings), in their order.

    The adjusted values hold the chance of any false finding among all of them: compare each with the level.
    """
    if len(p_values) == 0:
        return np.zeros(0)
    from statsmodels.stats.multitest import multipletests  # a second of import, for this alone

    return multipletests(p_values, method="holm")[1]


# --- Calibration. Probabilities have shape (N, K), rows summing to 1; confidence is a row's largest one.


def reliability(labels: ArrayLike, probabilities: ArrayLike, *, n_bins: int = 10) -> pd.DataFrame:
    """Bins of rows by confidence, each with as many rows as the next (one more in the first ones).

    Columns: confidence and accuracy (means over the bin, fractions) and rows. Fewer rows than `n_bins` make a
    bin each.
    """
    gold, said = _probabilities(labels, probabilities)
    confidence, right = said.max(axis=1), said.argmax(axis=1) == gold
    # The sort is stable, so rows of equal confidence are dealt in their order, the same at every call.
    bins = np.array_split(np.argsort(confidence, kind="stable"), min(n_bins, len(gold)))
    rows = [(confidence[rows].mean(), right[rows].mean(), len(rows)) for rows in bins]
    return pd.DataFrame(rows, columns=["confidence", "accuracy", "rows"])


def expected_calibration_error(labels: ArrayLike, probabilities: ArrayLike, *, n_bins: int = 10) -> float:
    """ECE: the mean distance of accuracy and confidence over equal-mass bins, weighted by their rows."""
    bins = reliability(labels, probabilities, n_bins=n_bins)
    return float(np.average((bins["accuracy"] - bins["confidence"]).abs(), weights=bins["rows"]))


def brier_score(labels: ArrayLike, probabilities: ArrayLike) -> float:
    """The mean over rows of the squared error summed over all K classes: 0 to 2, also for two classes."""
    gold, said = _probabilities(labels, probabilities)
    return float(brier_score_loss(gold, said, labels=range(said.shape[1]), scale_by_half=False))


def fit_temperature(labels: ArrayLike, probabilities: ArrayLike) -> float:
    """The temperature that makes these labels likeliest; fit it on dev and apply it to test.

    Searched from 0.05 to 20. Above 1 means that the probabilities were too sure.
    """
    gold, said = _probabilities(labels, probabilities)

    def negative_log_likelihood(log_temperature: float) -> float:
        logits = _log(said) / math.exp(log_temperature)
        return float((logsumexp(logits, axis=1) - logits[np.arange(len(gold)), gold]).mean())

    bounds = (math.log(0.05), math.log(20))
    found = scipy.optimize.minimize_scalar(negative_log_likelihood, bounds=bounds, method="bounded")
    return math.exp(found.x)


def apply_temperature(probabilities: ArrayLike, temperature: float) -> np.ndarray:
    """Probabilities of the same classifier with its logits divided by the temperature; no answer changes."""
    if not temperature > 0:
        raise ValueError(f"temperature is {temperature!r}; expected a number above 0.")
    return softmax(_log(np.asarray(probabilities, dtype=float)) / temperature, axis=1)


def _log(probabilities: np.ndarray) -> np.ndarray:
    # Stored probabilities are rounded, so that a small one may read 0.
    return np.log(np.maximum(probabilities, 1e-7))


def _probabilities(labels: ArrayLike, probabilities: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    gold = _class_indices("labels", labels, minimum=0)
    said = np.asarray(probabilities, dtype=float)
    if said.ndim != 2 or len(said) != len(gold) or len(gold) == 0:
        raise ValueError(f"probabilities have shape {said.shape} for {len(gold)} labels; expected (N, K), N > 0.")
    if gold.max() >= said.shape[1] or not np.allclose(said.sum(axis=1), 1, atol=1e-3) or said.min() < 0:
        raise ValueError("probabilities aren't such; expected rows that sum to 1, with a column for every label.")
    return gold, said / said.sum(axis=1, keepdims=True)  # stored ones are rounded


# --- Counts. The last axis holds 3K + 2 numbers for K classes: K of right rows by class, K of rows by
# --- gold label, K of rows by prediction, the groups that are all right, and the groups.


def _unit_counts(
    metrics: Sequence[str], labels: ArrayLike, predictions: Sequence[ArrayLike], groups: ArrayLike | None
) -> np.ndarray:
    """The counts of each unit and run: floats of shape (units, runs, 3K + 2)."""
    _check_metrics(metrics, groups)
    gold = _class_indices("labels", labels, minimum=0)
    said = [_class_indices("predictions", one, minimum=NO_ANSWER) for one in predictions]
    lengths = {len(gold), *map(len, said), *([] if groups is None else [len(groups)])}
    if len(lengths) > 1:
        raise ValueError(f"labels, predictions and groups differ in length: {sorted(lengths)}.")
    if not said or len(gold) == 0:
        raise ValueError("there are no rows; expected at least one.")
    classes = np.arange(max(2, gold.max() + 1, *(one.max() + 1 for one in said)))
    is_gold = np.repeat((gold[:, None] == classes)[:, None], len(said), axis=1)
    is_said = np.stack(said, axis=1)[:, :, None] == classes
    rows = np.concatenate([is_gold & is_said, is_gold, is_said], axis=-1).astype(float)
    units = rows if groups is None else _sum_by_group(rows, groups)
    right, of_gold = (units[..., i * len(classes) : (i + 1) * len(classes)].sum(axis=-1) for i in (0, 1))
    return np.concatenate([units, (right == of_gold)[..., None], np.ones((*right.shape, 1))], axis=-1)


def _check_metrics(metrics: Sequence[str], groups: ArrayLike | None) -> None:
    unknown = [name for name in metrics if name not in _METRICS]
    if unknown or not metrics:
        expected = ", ".join(map(repr, _METRICS))
        raise ValueError(f"{unknown[0] if unknown else metrics!r} is no metric; expected some of {expected}.")
    if "em" in metrics and groups is None:
        raise ValueError("the metric 'em' is a share of groups; expected groups, one a row.")


def _class_indices(name: str, values: ArrayLike, minimum: int) -> np.ndarray:
    indices = np.asarray(values)
    if indices.size and indices.dtype.kind not in "iub":
        raise ValueError(f"{name} holds {indices.dtype} values; expected whole numbers.")
    if indices.size and indices.min() < minimum:
        raise ValueError(f"{name} holds {indices.min()}; expected class indices, {minimum} or more.")
    return indices.astype(int)


def _sum_by_group(rows: np.ndarray, groups: ArrayLike) -> np.ndarray:
    codes, names = pd.factorize(np.asarray(groups))
    if codes.min() < 0:
        raise ValueError("groups has a missing value; expected one group a row.")
    units = np.zeros((len(names), *rows.shape[1:]))
    np.add.at(units, codes, rows)
    return units


def _f1_by_class(counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """F1 and whether the class occurs, both (..., K); a class that doesn't occur has F1 0."""
    right, gold, said = np.split(counts[..., :-2], 3, axis=-1)
    return 2 * right / np.maximum(gold + said, 1), gold + said > 0


def _accuracy(counts: np.ndarray) -> np.ndarray:
    right, gold, _ = np.split(counts[..., :-2], 3, axis=-1)
    return right.sum(axis=-1) / gold.sum(axis=-1)


def _macro_f1(counts: np.ndarray) -> np.ndarray:
    f1, occurs = _f1_by_class(counts)
    return f1.sum(axis=-1) / occurs.sum(axis=-1)


def _f1a(counts: np.ndarray) -> np.ndarray:
    return _f1_by_class(counts)[0][..., 1]


def _em(counts: np.ndarray) -> np.ndarray:
    return counts[..., -2] / counts[..., -1]


_METRICS = {"accuracy": _accuracy, "macro_f1": _macro_f1, "f1a": _f1a, "em": _em}


def _primary(metrics: Sequence[str], counts: np.ndarray) -> np.ndarray:
    return np.mean([_METRICS[name](counts) for name in metrics], axis=0)


# --- Resampling


def _resample(metrics: Sequence[str], counts: np.ndarray, n_resamples: int, rng: np.random.Generator) -> np.ndarray:
    """The primary metric of every run in every resample of the units: (n_resamples, runs)."""
    n_units, n_runs, n_counts = counts.shape
    flat = counts.reshape(n_units, -1)
    values, batch = [], max(1, _BATCH_NUMBERS // n_units)
    for start in range(0, n_resamples, batch):
        size = min(batch, n_resamples - start)
        weights = rng.multinomial(n_units, np.full(n_units, 1 / n_units), size)
        totals = (weights.astype(float) @ flat).reshape(size, n_runs, n_counts)
        values.append(_primary(metrics, totals))
    return np.concatenate(values)


def _seed_means(values: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Means over resampled seeds: (resamples, seeds) to (resamples,).

    Draws one seed fewer than there are (Rao and Wu's rescaled bootstrap): drawing all S of them makes the
    variance between seeds too small by (S - 1) / S, which is a fifth at five seeds.
    """
    n_resamples, n_seeds = values.shape
    drawn = rng.integers(n_seeds, size=(n_resamples, max(1, n_seeds - 1)))
    return np.take_along_axis(values, drawn, axis=1).mean(axis=1)


def _percentiles(values: np.ndarray, confidence: float) -> tuple[float, float]:
    low, high = np.quantile(values, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def _mcnemar_p(a_only: int, b_only: int) -> float:
    disagreements = a_only + b_only
    return float(scipy.stats.binomtest(a_only, disagreements).pvalue) if disagreements else 1.0


def _bootstrap_p(differences: np.ndarray) -> float:
    tail = min((differences <= 0).sum(), (differences >= 0).sum()) + 1
    return min(1.0, 2 * float(tail) / (len(differences) + 1))


def _permutation_p(
    metrics: Sequence[str], counts_a: np.ndarray, counts_b: np.ndarray, n_resamples: int, seed: int
) -> float:
    """Two-sided p-value under swaps of a and b within units; counts are (units, 3K + 2)."""
    if len(counts_a) < 2:
        return 1.0  # One unit and its swap are as far apart as each other; scipy takes two and more.
    total_a, total_b, gain = counts_a.sum(axis=0), counts_b.sum(axis=0), counts_b - counts_a

    def difference(swapped: np.ndarray, _: np.ndarray, axis: int) -> np.ndarray:
        moved = swapped @ gain
        return _primary(metrics, total_b - moved) - _primary(metrics, total_a + moved)

    # scipy permutes the marks 0 and 1 within a unit, so the first sample says which units are swapped.
    result = scipy.stats.permutation_test(
        (np.zeros(len(gain)), np.ones(len(gain))),
        difference,
        permutation_type="samples",
        vectorized=True,
        n_resamples=n_resamples,
        batch=max(1, _BATCH_NUMBERS // len(gain)),
        rng=np.random.default_rng(seed),
    )
    return float(result.pvalue)
