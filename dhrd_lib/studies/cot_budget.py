"""Token budgets: accuracy against the tokens spent, and a cascade of classifier and CoT."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike

from dhrd_lib.cot import CoT, Generations
from dhrd_lib.evaluation import NO_ANSWER, task_metrics
from dhrd_lib.studies.statistics import bootstrap_interval

BUDGETS = (0, 16, 32, 64, 128, 256, 500)


def accuracy_by_budget(
    cot: CoT,
    generations: Generations,
    labels: ArrayLike,
    *,
    budgets: Sequence[int] = BUDGETS,
    metrics: Sequence[str] = ("accuracy",),
    groups: ArrayLike | None = None,
) -> pd.DataFrame:
    """Return the primary metric at every budget and by both readings (parsed, scored), from one decoding.

    Columns: cot, reading, budget (tokens), tokens (mean of the rows), value, low, high (fractions, with the 95%
    bootstrap interval), unanswered (rows), rows, and `predictions`, the `CoTPredictions`. Budget 0 is the LM head
    alone and has no parsed reading. Raises `ConfigError` where a budget exceeds what was decoded.
    """
    table = []
    for reading, read in (("parsed", cot.parse), ("scored", cot.score)):
        for budget in sorted(set(budgets) - ({0} if reading == "parsed" else set())):
            predictions = read(generations.truncated(budget))
            interval = bootstrap_interval(metrics, labels, predictions.prediction_ids, groups)
            row = {"cot": cot.name, "reading": reading, "budget": budget, "tokens": predictions.tokens.mean()}
            unanswered = (predictions.prediction_ids == NO_ANSWER).sum()
            row |= {**vars(interval), "unanswered": unanswered, "rows": len(predictions.tokens)}
            table.append(row | {"predictions": predictions})
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

    The classifier has `probabilities` (N, K) and costs `classifier_seconds` per row; `cot_predictions` (N,) are
    class indices or `NO_ANSWER`, `cot_seconds` one figure or (N,). Columns: threshold, share_to_cot, value (the
    primary metric), queries_per_second. The first row is the classifier alone (threshold 0), the last CoT alone
    (infinity), which does not run the classifier; in between, every row pays for it.
    """
    probabilities = np.asarray(probabilities, dtype=float)
    confidence, predictions = probabilities.max(1), probabilities.argmax(1)
    cost = np.broadcast_to(np.asarray(cot_seconds, dtype=float), confidence.shape)
    table = []
    for threshold in [0.0, *np.unique(confidence)[1:], math.inf]:
        to_cot = confidence < threshold
        final = np.where(to_cot, cot_predictions, predictions)
        seconds = cost[to_cot].sum() + (0.0 if threshold == math.inf else classifier_seconds * len(final))
        value = task_metrics(metrics, labels, final, groups)["primary"]
        table.append((threshold, to_cot.mean(), value, len(final) / seconds))
    return pd.DataFrame(table, columns=["threshold", "share_to_cot", "value", "queries_per_second"])
