"""Templates, inputs as users give them, and what is cut of them."""

import numpy as np
import pandas as pd
import pytest

from dhrd_lib.inputs import Predictions, TaskError, as_inputs, cut_to_fit, render_inputs


def test_as_inputs_takes_one_input_or_many():
    row = {"text": "a"}
    assert as_inputs("a") == ["a"]
    assert as_inputs(row) == as_inputs(pd.DataFrame([row])) == as_inputs(iter([row])) == [row]
    assert as_inputs(pd.Series(["a", "b"])) == as_inputs(("a", "b")) == ["a", "b"]


def test_cut_keeps_start_and_chosen_side():
    assert cut_to_fit([1, 2, 3, 4], [0], 3) == ([0, 3, 4], 2)
    assert cut_to_fit([1, 2, 3, 4], [0], 3, side="right") == ([0, 1, 2], 2)
    assert cut_to_fit([1, 2], [0], 3, side="right") == cut_to_fit([1, 2], [0], 3) == ([0, 1, 2], 0)
    with pytest.raises(TaskError, match="no token"):
        cut_to_fit([], [], 3)


def test_predictions_name_the_largest_logit():
    labels, probabilities = Predictions.from_logits(np.float32([[0, 1], [2, 1]]), ["a", "b"])
    assert labels == ["b", "a"]
    assert probabilities.dtype == np.float32
    np.testing.assert_allclose(probabilities.sum(1), 1)


def test_input_without_text_is_refused_by_number():
    with pytest.raises(TaskError, match="^input 2 has no text"):
        render_inputs("{text}", ["a", " "])
