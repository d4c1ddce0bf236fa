"""Token budgets."""

from __future__ import annotations

import numpy as np
import pytest
from conftest import tiny_model

from dhrd_lib.config import ConfigError
from dhrd_lib.cot import CoT, Decoding, Generations
from dhrd_lib.studies.cot_budget import accuracy_by_budget

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
