"""Figures hold the numbers of their tables, in percent, with a setting's color and escaped text."""

import numpy as np
import pandas as pd
import pytest

from dhrd_lib.studies import plots


def rows_of(**columns):
    return pd.DataFrame({"split": "test", "task": "cb", "setting": "DHRD", **columns})


def test_metric_has_value_and_both_arms():
    rows = rows_of(
        split=["test", "test", "other", "other"],
        setting=["pooled baseline", "DHRD"] * 2,
        value=[0.70, 0.80, 0.60, 0.65],
        low=[0.65, 0.76, 0.50, 0.60],
        high=[0.74, 0.83, 0.72, 0.71],
    )
    figure = plots.metric_with_interval(rows, "accuracy")
    baseline, dhrd = figure.data
    assert list(dhrd.x) == ["test", "other"]
    assert list(dhrd.y) == pytest.approx([80, 65])
    assert list(dhrd.error_y.array) == pytest.approx([3, 6])
    assert list(dhrd.error_y.arrayminus) == pytest.approx([4, 5])
    assert [each.line.color for each in (baseline, dhrd)] == [plots.COLORS[each.name] for each in (baseline, dhrd)]
    assert dhrd.customdata[0].tolist() == [76, 83]
    assert figure.layout.yaxis.title.text == "accuracy (%)"


def test_difference_is_filled_where_interval_excludes_zero():
    rows = rows_of(split=["test", "other"], difference=[0.05, 0.02], low=[0.01, -0.02], high=[0.09, 0.06])
    figure = plots.paired_difference(rows.assign(p_value=[0.01, 0.3]))
    (trace,) = figure.data
    assert list(trace.x) == pytest.approx([5, 2])
    assert list(trace.y) == ["cb<br>test", "cb<br>other"]
    assert list(trace.error_x.arrayminus) == pytest.approx([4, 4])
    assert list(trace.marker.symbol) == ["circle", "circle-open"]
    assert figure.layout.xaxis.zeroline


@pytest.mark.parametrize("factor", ["alpha", "pooling"])
def test_factor_effect_has_means_and_runs(factor):
    values = [0.0, 1.0] if factor == "alpha" else ["last", "mean"]
    summary = pd.DataFrame({factor: values, "series": "all", "value": [0.5, 0.6]})
    summary = summary.assign(low=0.4, high=0.7, n_seeds=2)
    seeds = pd.DataFrame({factor: values[:1] * 2, "series": "all", "value": [0.4, 0.6], "run": "r", "seed": [0, 1]})
    traces = plots.factor_effect(summary, seeds, factor).data
    means, runs = traces
    assert (list(means.x), list(means.y)) == (values, pytest.approx([50, 60]))
    assert (list(runs.x), list(runs.y)) == (values[:1] * 2, pytest.approx([40, 60]))


def test_loss_curves_have_every_logged_term():
    log = {"step": [5, 10], "class_loss": [1.5, 1.0], "loss": [2.0, 1.2], "eval_class_loss": [np.nan, 1.1]}
    base = pd.DataFrame(log).assign(setting="pooled baseline", name="base")
    dhrd = pd.DataFrame(log).assign(setting="DHRD", name="dhrd", lm_loss=[3.0, 2.0])
    figure = plots.loss_curves(pd.concat([base, dhrd]))
    lines = {(trace.name, trace.yaxis): trace for trace in figure.data if trace.mode == "lines"}
    assert ("pooled baseline", "y2") not in lines
    for axis, column in (("y", "class_loss"), ("y2", "lm_loss"), ("y3", "loss")):
        assert (list(lines["DHRD", axis].x), list(lines["DHRD", axis].y)) == ([5, 10], dhrd[column].tolist())
    dev = next(trace for trace in figure.data if trace.mode == "markers" and trace.name == "DHRD")
    assert (list(dev.x), list(dev.y)) == ([10], [1.1])
    assert sum(trace.showlegend for trace in figure.data) == 2
    assert {trace.yaxis for trace in plots.loss_curves(base).data} == {"y", "y3"}


def test_confusion_has_counts_and_shares():
    counts = np.array([[3, 1], [0, 0]])
    first, second = plots.confusion_matrices({"pooled baseline": counts, "DHRD": counts.T}, ["no", "yes"]).data
    assert (np.array(first.text).tolist(), np.array(second.text).tolist()) == (counts.tolist(), counts.T.tolist())
    assert np.array(first.z).tolist() == [[75, 25], [0, 0]]
    assert list(first.x) == ["no", "yes"]


def test_variants_share_color_and_differ_in_symbol():
    half, full, other = plots.styles(["DHRD (alpha=0.5)", "DHRD (alpha=1.0)", "mlp"]).itertuples()
    assert half.color == full.color == plots.COLORS["DHRD"] != other.color
    assert len({half.symbol, full.symbol}) == len({half.dash, full.dash}) == 2


def test_markup_in_text_is_escaped():
    figure = plots.confusion_matrices({"DHRD": np.eye(2, dtype=int)}, ["<neutral>", "R&D"])
    assert list(figure.data[0].x) == ["&lt;neutral&gt;", "R&amp;D"]
    rows = rows_of(setting=["<b>run"], value=0.5, low=0.4, high=0.6)
    assert plots.metric_with_interval(rows).data[0].name == "&lt;b&gt;run"
