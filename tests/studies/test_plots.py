"""Plots and the report: figures hold the input's numbers; the page is honest, escaped and self-contained."""

import numpy as np
import pandas as pd
import pytest

from dhrd_lib import evaluation
from dhrd_lib.studies import plots

LABELS = ["refund", "replace", "fix", "explain", "escalate"]
SPLITS = {"dev": 60, "test": 140, "test_new_domain": 80}


def make_history(alpha, n_steps=60):
    steps = np.arange(5, n_steps + 1, 5)
    class_loss = 1.6 * np.exp(-steps / 40)
    lm_loss = 1.5 + 1.2 * np.exp(-steps / 30) if alpha else np.full(len(steps), np.nan)
    train = pd.DataFrame({"step": steps, "class_loss": class_loss, "lm_loss": lm_loss, "alpha": alpha})
    train["loss"] = class_loss + alpha * np.nan_to_num(lm_loss)
    dev = pd.DataFrame({"step": steps[3::4], "eval_class_loss": class_loss[3::4] + 0.1, "eval_primary": 0.7})
    return pd.concat([train, dev], ignore_index=True)


class TestFigures:
    def test_metric_with_interval_draws_each_value_and_both_arms(self):
        rows = pd.DataFrame(
            {
                "split": ["test", "test", "test_new_domain", "test_new_domain"],
                "setting": ["pooled baseline", "DHRD"] * 2,
                "name": ["base-0", "dhrd-0"] * 2,
                "value": [0.70, 0.80, 0.60, 0.65],
                "low": [0.65, 0.76, 0.50, 0.60],
                "high": [0.74, 0.83, 0.72, 0.71],
            }
        )
        figure = plots.metric_with_interval(rows, "accuracy")
        baseline, dhrd = figure.data
        assert list(dhrd.x) == ["test", "test_new_domain"]
        assert list(dhrd.y) == pytest.approx([80, 65])
        assert list(dhrd.error_y.array) == pytest.approx([3, 6])
        assert list(dhrd.error_y.arrayminus) == pytest.approx([4, 5])
        assert baseline.marker.color == plots.COLORS["pooled baseline"]
        assert dhrd.marker.color == plots.COLORS["DHRD"]
        assert list(dhrd.text) == ["dhrd-0", "dhrd-0"]
        assert figure.layout.yaxis.title.text == "accuracy (%)"

    def test_paired_difference_fills_the_marks_whose_interval_leaves_zero_out(self):
        rows = pd.DataFrame(
            {
                "task": ["cb", "cb"],
                "split": ["test", "other"],
                "setting": "DHRD",
                "name": "dhrd against base",
                "difference": [0.05, 0.02],
                "low": [0.01, -0.02],
                "high": [0.09, 0.06],
                "p_value": [0.01, 0.3],
            }
        )
        figure = plots.paired_difference(rows)
        (trace,) = figure.data
        assert list(trace.x) == pytest.approx([5, 2])
        assert list(trace.y) == ["cb<br>test", "cb<br>other"]
        assert list(trace.error_x.arrayminus) == pytest.approx([4, 4])
        assert list(trace.marker.symbol) == ["circle", "circle-open"]
        assert figure.layout.xaxis.zeroline
        assert "percentage points" in figure.layout.xaxis.title.text

    def test_loss_curves_draw_every_term_that_a_run_has(self):
        histories = [
            make_history(0.0).assign(setting="pooled baseline", name="base"),
            make_history(0.5).assign(setting="DHRD", name="dhrd"),
        ]
        history = pd.concat(histories)
        figure = plots.loss_curves(history)
        train = histories[1].dropna(subset="loss")
        lines = {(trace.name, trace.yaxis): trace for trace in figure.data if trace.mode == "lines"}
        assert ("pooled baseline", "y2") not in lines
        for axis, column in (("y", "class_loss"), ("y2", "lm_loss"), ("y3", "loss")):
            assert list(lines["DHRD", axis].x) == train["step"].tolist()
            assert list(lines["DHRD", axis].y) == pytest.approx(train[column].tolist())
        dev = next(trace for trace in figure.data if trace.mode == "markers" and trace.name == "DHRD")
        assert list(dev.y) == pytest.approx(histories[1]["eval_class_loss"].dropna().tolist())
        assert sum(bool(trace.showlegend) for trace in figure.data) == 2

    def test_loss_curves_accept_a_log_without_the_lm_loss(self):
        history = make_history(0.0).drop(columns="lm_loss").assign(setting="pooled baseline", name="base")
        assert {trace.yaxis for trace in plots.loss_curves(history).data} == {"y", "y3"}

    def test_confusion_matrices_show_counts_and_colour_by_share_of_the_gold_label(self):
        counts = np.array([[3, 1], [0, 4]])
        figure = plots.confusion_matrices({"pooled baseline": counts, "DHRD": counts.T}, ["no", "yes"])
        first, second = figure.data
        assert np.array(first.text).tolist() == counts.tolist()
        assert np.array(second.text).tolist() == counts.T.tolist()
        assert np.array(first.z).tolist() == [[75, 25], [0, 100]]
        assert list(first.x) == ["no", "yes"]

    def test_a_gold_label_without_rows_has_an_empty_line_in_the_confusion_matrix(self):
        figure = plots.confusion_matrices({"DHRD": np.array([[2, 0], [0, 0]])}, ["no", "yes"])
        assert np.array(figure.data[0].z).tolist() == [[100, 0], [0, 0]]

    def test_per_class_f1_draws_a_bar_for_each_class_and_setting(self):
        table = evaluation.per_class([0, 0, 1, 1], [0, 1, 1, 1], ["no", "yes"])
        figure = plots.per_class_f1({"pooled baseline": table, "DHRD": table})
        for trace in figure.data:
            assert list(trace.x) == pytest.approx([200 / 3, 80])
            assert list(trace.y) == ["no", "yes"]
        assert figure.layout.xaxis.title.text == "F1 (%)"

    def test_variants_of_a_setting_share_its_colour_and_differ_in_symbol(self):
        rows = pd.DataFrame(
            {
                "split": "test",
                "setting": ["DHRD (alpha=0.5)", "DHRD (alpha=1.0)"],
                "name": "x",
                "value": 0.7,
                "low": 0.6,
                "high": 0.8,
            }
        )
        half, full = plots.metric_with_interval(rows).data
        assert half.marker.color == full.marker.color == plots.COLORS["DHRD"]
        assert half.marker.symbol != full.marker.symbol

    def test_text_that_looks_like_markup_is_shown_letter_by_letter(self):
        figure = plots.confusion_matrices({"DHRD": np.eye(2, dtype=int)}, ["<neutral>", "R&D"])
        assert list(figure.data[0].x) == ["&lt;neutral&gt;", "R&amp;D"]
