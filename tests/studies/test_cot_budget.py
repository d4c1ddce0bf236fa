"""Token budgets and the cascade."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest
from conftest import tiny_model

from dhrd_lib.config import ConfigError
from dhrd_lib.cot import CoT, Decoding, Generations
from dhrd_lib.evaluation import NO_ANSWER
from dhrd_lib.studies.cot_budget import accuracy_by_budget, cascade

TEXTS = ["My lamp broke.", "I was charged twice for one night, and want the money back.", "Why?"]


@pytest.fixture(scope="module")
def decoded(task) -> tuple[CoT, Generations]:
    cot = CoT.from_model(tiny_model(task))
    return cot, cot.generate(TEXTS, Decoding(max_new_tokens=9, early_stop=False, temperature=1.0, top_p=1.0))


def test_budgets_are_exact_in_both_readings(decoded):
    table = accuracy_by_budget(*decoded, [0, 1, 2], budgets=(0, 4, 9))
    expected = [("parsed", 4), ("parsed", 9), ("scored", 0), ("scored", 4), ("scored", 9)]
    assert list(zip(table["reading"], table["budget"], strict=True)) == expected
    assert table["tokens"].tolist() == table["budget"].tolist()
    assert (table["rows"] == 3).all()
    assert table["value"].between(table["low"], table["high"]).all()
    with pytest.raises(ConfigError, match="The budget is 25; at most 9 tokens were decoded"):
        accuracy_by_budget(*decoded, [0, 1, 2], budgets=(25,))


def test_budget_zero_is_the_lm_head_alone(decoded):
    (row,) = accuracy_by_budget(*decoded, [0, 1, 2], budgets=(0,)).to_dict("records")
    alone = decoded[0].score(Generations(decoded[1].inputs, [[[]]] * 3, 0, 0.0)).probabilities
    np.testing.assert_allclose(row["predictions"].probabilities, alone, atol=1e-6)
    assert (row["tokens"], row["unanswered"]) == (0, 0)


def curve(**changes) -> pd.DataFrame:
    probabilities = np.array([[0.9, 0.1], [0.6, 0.4], [0.2, 0.8], [0.3, 0.7]])
    costs = {"classifier_seconds": 0.5, "cot_seconds": np.array([1.0, 2.0, 3.0, 4.0])} | changes
    return cascade([0, 1, 1, 0], probabilities, np.array([NO_ANSWER, 1, 1, 0]), **costs)


def test_cascade_sends_least_confident_rows_first():
    # Confidence 0.9, 0.6, 0.8, 0.7: the second row goes first, then the fourth, then the third.
    table = curve()
    assert table["share_to_cot"].tolist() == [0, 0.25, 0.5, 0.75, 1]
    assert table["value"].tolist() == [0.5, 0.75, 1, 1, 0.75]
    # In between every row pays for the classifier; the ends are the two pure systems.
    assert table["queries_per_second"].tolist() == pytest.approx([4 / 2, 4 / 4, 4 / 8, 4 / 11, 4 / 10])
    assert table["threshold"].iloc[-1] == math.inf
    assert curve(cot_seconds=2.5)["queries_per_second"].iloc[-1] == pytest.approx(1 / 2.5)


def test_cascade_keeps_equal_confidence_together():
    table = cascade([0, 1], np.full((2, 2), 0.5), [0, 1], classifier_seconds=1.0, cot_seconds=1.0)
    assert table["share_to_cot"].tolist() == [0, 1]
