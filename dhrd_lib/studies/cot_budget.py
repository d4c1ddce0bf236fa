"""Token budgets: accuracy against the tokens spent, and a cascade of classifier and CoT."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike

from dhrd_lib.cot import CoT, Generations
from dhrd_lib.evaluation import task_metrics
from dhrd_lib.studies.statistics import bootstrap_interval

BUDGETS = (0, 16, 32, 64, 128, 256, 500)
READINGS = ("parsed", "scored")


def accuracy_by_budget(
    cot: CoT,
    generations: Generations,
    labels: ArrayLike,
    *,
    budgets: Sequence[int] = BUDGETS,
    readings: Sequence[str] = READINGS,
    metrics: Sequence[str] = ("accuracy",),
    groups: ArrayLike | None = None,
) -> pd.DataFrame:
    """Return the primary metric at every budget and by both readings, from one decoding.

    Columns: cot, reading, budget (tokens), tokens (mean of the rows), value, low, high (the primary metric and its
    95% bootstrap interval, fractions), unanswered (rows), rows, and `predictions`, the `CoTPredictions`. Budget 0
    is the LM head alone and has no parsed reading. Raises `ConfigError` where a budget exceeds what was decoded.
    """
    table = []
    for reading in readings:
        for budget in sorted(set(budgets) - ({0} if reading == "parsed" else set())):
            truncated = generations.truncated(budget)
            predictions = cot.parse(truncated) if reading == "parsed" else cot.score(truncated)
            interval = bootstrap_interval(metrics, labels, predictions.prediction_ids, groups)
            table.append(
                {
                    "cot": cot.name,
                    "reading": reading,
                    "budget": budget,
                    "tokens": float(predictions.tokens.mean()),
                    "value": interval.value,
                    "low": interval.low,
                    "high": interval.high,
                    "unanswered": predictions.unanswered,
                    "rows": len(predictions.prediction_ids),
                    "predictions": predictions,
                }
            )
    return pd.DataFrame(table)


def cascade(
    labels: ArrayLike,
    probabilities: ArrayLike,
    cot_predictions: ArrayLike,
    *,
    classifier_seconds: float,
    cot_seconds: ArrayLike,
    metrics: Sequence[str] = ("accuracy",),
    groups: ArrayLike | None = None,
) -> pd.DataFrame:
    """Let DHRD predict, and CoT the rows below a confidence threshold: return one row per threshold.

    Args:
        probabilities: `(N, K)`, the classifier's.
        cot_predictions: `(N,)`, class indices or `NO_ANSWER`.
        classifier_seconds: measured cost of one row with the classifier.
        cot_seconds: measured cost of a row with CoT; one figure, or `(N,)`.

    Columns: threshold, share_to_cot, value (the primary metric), queries_per_second. The first row is the
    classifier alone (threshold 0). The last is CoT alone (threshold infinity), which does not run the classifier;
    in between, every row pays for it.
    """
    probabilities = np.asarray(probabilities, dtype=float)
    confidence, predictions = probabilities.max(1), probabilities.argmax(1)
    cost = np.broadcast_to(np.asarray(cot_seconds, dtype=float), confidence.shape)
    table = []
    for threshold in [0.0, *np.unique(confidence)[1:], math.inf]:
        to_cot = confidence < threshold
        final = np.where(to_cot, cot_predictions, predictions)
        seconds = cost[to_cot].sum() + (0.0 if threshold == math.inf else classifier_seconds * len(final))
        table.append(
            {
                "threshold": threshold,
                "share_to_cot": float(to_cot.mean()),
                "value": task_metrics(metrics, labels, final, groups)["primary"],
                "queries_per_second": len(final) / seconds,
            }
        )
    return pd.DataFrame(table)
