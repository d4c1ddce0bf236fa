"""Templates, inputs as users give them, what is cut of them, and batches."""

import numpy as np
import pandas as pd
import pytest

from dhrd_lib.inputs import (
    Predictions,
    TaskError,
    as_inputs,
    as_text,
    cut_to_fit,
    length_sorted_batches,
    render,
    render_inputs,
    template_fields,
)


def test_template_fields_are_in_order_and_once():
    assert template_fields("{b} and {a} and {b} {{not one}}") == ("b", "a")


@pytest.mark.parametrize("name", ["what was said", "review.text", "a[0]", "ratio: x", "a!r", "a.__class__", "Ünï"])
def test_template_reads_any_column_by_its_whole_name(name):
    template = f"<{{{name}}}>"
    assert template_fields(template) == (name,)
    assert render(template, {name: "Hi", "a": "never read"}) == "<Hi>"
    with pytest.raises(TaskError, match="lacks"):
        render(template, {"a": "Hi"})


@pytest.mark.parametrize("template", ["{}", "no field", "{a", "a}", "{a:{b}}", "{{a}}", "{a}}"])
def test_template_without_clear_fields_is_refused(template):
    with pytest.raises(TaskError, match=r"^template .*expected some"):
        template_fields(template)


def test_rendering_never_formats_values():
    assert render("{a}/{b}", {"a": "{b}", "b": "{a.x}"}) == "{b}/{a.x}"
    assert render("{{{a}}}", "x") == "{x}"


def test_rendering_leaves_out_missing_values_and_trailing_space():
    assert render("{a}|{b}|{c} \n", {"a": None, "b": float("nan"), "c": "end \n"}) == "||end"


@pytest.mark.parametrize("row", ["a string", {"premise": "x"}, ["premise", "hypothesis"], None])
def test_rendering_names_the_expected_fields(row):
    with pytest.raises(TaskError, match=r"expected a dict with 'premise', 'hypothesis'\.$"):
        render("{premise} {hypothesis}", row)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (["fine", ""], "input 2 has no text"),
        ([" \n\t\u3000", "x"], "input 1 has no text"),
        ([{"text": None}], "input 1 has no text"),
        ([{"text": float("nan")}], "input 1 has no text"),
        ([3], "input 1 is of the type int"),
        ([{"text": "x"}, {"body": "x"}], "input 2 lacks 'text'"),
    ],
)
def test_wrong_input_is_refused_by_number(inputs, message):
    with pytest.raises(TaskError, match=f"^{message}"):
        render_inputs("{text}", inputs)


def test_as_inputs_takes_one_input_or_many():
    row = {"text": "a"}
    assert as_inputs("a") == ["a"]
    assert as_inputs(row) == as_inputs(pd.DataFrame([row])) == as_inputs(iter([row])) == [row]
    assert as_inputs(pd.Series(["a", "b"])) == as_inputs(("a", "b")) == ["a", "b"]
    with pytest.raises(TaskError, match="int"):
        as_inputs(3)


@pytest.mark.parametrize("missing", [None, np.nan, pd.NA, pd.NaT])
def test_missing_cells_of_a_dataframe_render_as_nothing(missing):
    frame = pd.DataFrame({"a": ["x", missing], "b": ["y", "z"]})
    assert render_inputs("{a}{b}", frame) == ["xy", "z"]


def test_as_text_writes_values_as_json_does():
    values = [None, float("nan"), True, 1.0, 0.5, 7, "é", [1, "é"], {"a": None}]
    expected = [None, None, "true", "1", "0.5", "7", "é", '[1, "é"]', '{"a": null}']
    assert [as_text(value) for value in values] == expected


def test_cut_keeps_start_and_chosen_side():
    assert cut_to_fit([1, 2, 3, 4], [0], 3, side="left") == ([0, 3, 4], 2)
    assert cut_to_fit([1, 2, 3, 4], [0], 3, side="right") == ([0, 1, 2], 2)
    assert cut_to_fit([1, 2], [0], 3, side="right") == cut_to_fit([1, 2], [0], 3, side="left") == ([0, 1, 2], 0)
    with pytest.raises(TaskError, match="no token"):
        cut_to_fit([], [], 3, side="left")


def test_length_sorted_batches_fit_the_token_budget():
    lengths = [3, 40, 7, 7, 90, 1, 12]
    batches = list(length_sorted_batches(lengths, 50))
    assert sorted(row for batch in batches for row in batch) == list(range(7))
    assert all(len(batch) * max(lengths[row] for row in batch) <= 50 or len(batch) == 1 for batch in batches)
    assert batches[0] == [4]


def test_predictions_name_the_largest_logit():
    labels, probabilities = Predictions.from_logits(np.float32([[0, 1], [2, 1]]), ["a", "b"])
    assert labels == ["b", "a"]
    assert probabilities.dtype == np.float32
    np.testing.assert_allclose(probabilities.sum(1), 1)
