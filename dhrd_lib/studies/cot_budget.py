"""Token budgets: accuracy against the tokens spent."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd
from numpy.typing import ArrayLike

from dhrd_lib.cot import CoT, Generations
from dhrd_lib.evaluation import NO_ANSWER
from dhrd_lib.studies.statistics import bootstrap_interval

BUDGETS = (0, 16, 32, 64, 128, 256, 500)


def accuracy_by_budget(
    cot: CoT,
    generations: Generations,
    labels: ArrayLike,
    *,
    budgets: Sequence[int] = BUDGETS,
    metrics: Sequence[str] = ("accuracy",),
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
            row = {"cot": cot.name, "reading": reading, "budget": budget, "tokens": predictions.tokens.mean()}
            row |= vars(bootstrap_interval(metrics, labels, predictions.prediction_ids))
            unanswered = (predictions.prediction_ids == NO_ANSWER).sum()
            row |= {"unanswered": unanswered, "rows": len(predictions.tokens)}
            table.append(row | {"predictions": predictions})
    return pd.DataFrame(table)
