"""Plots and the report: figures hold the input's numbers; the page is honest, escaped and self-contained."""

import io
import re
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from plotly.offline import get_plotlyjs
from rich.console import Console

from dhrd_lib import evaluation
from dhrd_lib.config import DataConfig, ModelConfig, RunConfig, TrainingConfig
from dhrd_lib.studies import plots, report
from dhrd_lib.studies.statistics import paired_comparison

LABELS = ["refund", "replace", "fix", "explain", "escalate"]
SPLITS = {"dev": 60, "test": 140, "test_new_domain": 80}


@dataclass
class FakeRun:
    """What the report reads of a run, in memory."""

    config: RunConfig
    metrics: dict
    history: pd.DataFrame
    frames: dict[str, pd.DataFrame]
    environment: dict = field(default_factory=lambda: {"packages": {"torch": "2.13.0"}, "git_commit": "abc"})

    @property
    def name(self) -> str:
        return self.config.name

    @property
    def folder(self) -> Path:
        return Path("runs", self.name)

    @property
    def test_splits(self) -> list[str]:
        return [split for split in self.metrics["splits"] if split != "dev"]

    def predictions(self, split: str) -> pd.DataFrame:
        return self.frames[split]


def make_predictions(n_rows, right_rate, seed, labels=LABELS, n_groups=0, text="Order {} came broken."):
    """Predictions of a classifier that is right at `right_rate`; rows and labels don't depend on `seed`."""
    gold = np.arange(n_rows) % len(labels)
    rng = np.random.default_rng(seed)
    wrong = (gold + rng.integers(1, len(labels), n_rows)) % len(labels)
    said = np.where(rng.random(n_rows) < right_rate, gold, wrong)
    logits = rng.normal(size=(n_rows, len(labels))) + 3 * np.eye(len(labels))[said]
    probabilities = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    return pd.DataFrame(
        {
            "idx": [str(i) for i in range(n_rows)],
            "input_text": [text.format(i) for i in range(n_rows)],
            "label": gold,
            "prediction": said,
            "probabilities": probabilities.tolist(),
            "group": [f"q{i % n_groups}" if n_groups else None for i in range(n_rows)],
            "rationale": [f"The goods are at fault in case {i}." for i in range(n_rows)],
        }
    )


def make_history(alpha, n_steps=60):
    steps = np.arange(5, n_steps + 1, 5)
    class_loss = 1.6 * np.exp(-steps / 40)
    lm_loss = 1.5 + 1.2 * np.exp(-steps / 30) if alpha else np.full(len(steps), np.nan)
    train = pd.DataFrame({"step": steps, "class_loss": class_loss, "lm_loss": lm_loss, "alpha": alpha})
    train["loss"] = class_loss + alpha * np.nan_to_num(lm_loss)
    dev = pd.DataFrame({"step": steps[3::4], "eval_class_loss": class_loss[3::4] + 0.1, "eval_primary": 0.7})
    return pd.concat([train, dev], ignore_index=True)


def make_run(
    name,
    alpha,
    seed=0,
    right_rate=0.7,
    task="support_triage",
    labels=LABELS,
    task_metrics=("accuracy",),
    n_groups=0,
    freeze_layers=15,
    **prediction_options,
):
    config = RunConfig(
        name=name,
        model=ModelConfig(freeze_layers=freeze_layers),
        data=DataConfig(task=task),
        training=TrainingConfig(alpha=alpha, seed=seed),
    )
    draw = 10 * seed + (alpha > 0)
    frames = {
        split: make_predictions(n, right_rate, draw + n, labels, n_groups, **prediction_options)
        for split, n in SPLITS.items()
    }
    splits = {
        split: evaluation.task_metrics(
            task_metrics, frame["label"], frame["prediction"], frame["group"] if n_groups else None
        )
        for split, frame in frames.items()
    }
    metrics = {
        "task_metrics": list(task_metrics),
        "label_names": list(labels),
        "splits": splits,
        "best_step": 60,
        "steps": 60,
        "train_seconds": 706.0 * (1 + alpha),
        "train_tokens": 118_000,
        "tokens_per_second": 221.4,
    }
    return FakeRun(config, metrics, make_history(alpha), frames)


def text_of(page: str) -> str:
    """The page without plotly.js and the figures' data."""
    return re.sub(r"<script.*?</script>", "", page, flags=re.DOTALL)


@pytest.fixture(scope="module")
def runs():
    return [make_run("baseline", 0.0, right_rate=0.6), make_run("dhrd", 1.0, right_rate=0.8)]


@pytest.fixture(scope="module")
def written(runs, tmp_path_factory):
    path = tmp_path_factory.mktemp("report") / "report.html"
    frame = report.write_report(runs, path)
    return path.read_text(encoding="utf-8"), frame


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


class TestReport:
    def test_the_table_has_a_row_a_split_and_setting_with_the_metrics_own_value(self, runs, written):
        _, frame = written
        assert tuple(frame.columns) == report.COLUMNS
        assert len(frame) == 6
        by_setting = {run.config.training.setting: run for run in runs}
        for row in frame.itertuples():
            assert row.value == pytest.approx(by_setting[row.setting].metrics["splits"][row.split]["primary"])
            assert row.low <= row.value <= row.high

    def test_the_difference_is_that_of_the_paired_comparison(self, runs, written):
        _, frame = written
        row = frame[(frame["split"] == "test") & (frame["setting"] == "DHRD")].iloc[0]
        base, dhrd = (run.predictions("test").sort_values("idx") for run in runs)
        pair = paired_comparison(["accuracy"], base["label"], base["prediction"], dhrd["prediction"])
        assert (row["difference"], row["diff_low"], row["diff_high"], row["p_value"]) == pytest.approx(
            (pair.difference, pair.low, pair.high, pair.p_value)
        )
        assert frame.loc[frame["setting"] == "pooled baseline", "difference"].isna().all()

    def test_the_page_asks_for_nothing_outside_itself(self, written):
        page, _ = written
        own = page.replace(get_plotlyjs(), "")
        assert len(own) < len(page) - 10**6  # plotly.js is inside, once
        assert not re.search(r"(?:src|href|url)\s*[=(]", text_of(page))
        assert "//" not in own.replace("</", "")
        assert "default-src 'none'" in own

    def test_text_of_the_data_is_escaped(self, tmp_path):
        attack = "</script><script>alert({})</script>"
        labels = ["<b>yes</b>", "<script>no</script>"]
        options = {"text": attack, "labels": labels, "right_rate": 0.5}
        runs = [make_run("<i>base", 0.0, **options), make_run("dhrd", 1.0, **options)]
        report.write_report(runs, tmp_path / "report.html")
        own = (tmp_path / "report.html").read_text(encoding="utf-8").replace(get_plotlyjs(), "")
        assert "<script>alert(" not in own
        assert "<script>no" not in own
        assert "<b>yes" not in own
        assert "<i>base" not in own
        assert "&lt;script&gt;alert(" in own

    def test_the_summary_says_who_is_ahead_by_how_much_and_how_sure_that_is(self, written):
        page, frame = written
        row = frame[(frame["split"] == "test") & (frame["setting"] == "DHRD")].iloc[0]
        summary = re.search(r'class="summary">(.*?)</p>', page).group(1)
        assert f"DHRD is {100 * row.difference:.1f} points ahead of the pooled baseline" in summary
        assert f"{100 * row.diff_low:+.1f} to {100 * row.diff_high:+.1f} points" in summary
        assert "excludes zero" in summary
        assert "one seed" in summary
        assert "Quick profile: one seed, lower layers frozen" in summary

    def test_a_difference_that_may_be_zero_is_called_unsettled(self, tmp_path):
        runs = [make_run("a", 0.0, right_rate=0.7), make_run("b", 1.0, right_rate=0.7)]
        for run in runs:
            run.frames["test"] = run.frames["test_new_domain"] = make_predictions(60, 0.7, run.name == "a")
        report.write_report(runs, tmp_path / "report.html")
        page = text_of((tmp_path / "report.html").read_text(encoding="utf-8"))
        assert "don&#39;t settle which of the two is better" in page

    def test_runs_that_differ_in_seed_alone_are_one_setting_with_paired_seeds(self, tmp_path):
        options = {"task": "multirc", "labels": ["no", "yes"], "task_metrics": ("f1a", "em")}
        options |= {"n_groups": 20, "freeze_layers": 0}
        runs = [make_run(f"{a}-{seed}", a, seed=seed, **options) for a in (0.0, 0.5, 1.0) for seed in range(3)]
        frame = report.write_report(runs, tmp_path / "report.html")
        assert set(frame["n_seeds"]) == {3}
        assert set(frame["setting"]) == {"pooled baseline", "DHRD (alpha=0.5)", "DHRD (alpha=1.0)"}
        page = text_of((tmp_path / "report.html").read_text(encoding="utf-8"))
        assert "bootstrap over seeds and groups" in page
        assert "mean of F1a and EM" in page
        assert "Quick profile" not in page
        ahead = (frame[frame["split"] != "dev"]["difference"] > 0).sum()
        assert f"ahead of their pooled baseline in {ahead} of 4 comparisons" in page

    def test_disagreements_are_listed_by_who_is_right_with_probability_and_rationale(self, runs, written):
        page, _ = written
        base, dhrd = (run.predictions("test") for run in runs)
        differ = base["prediction"] != dhrd["prediction"]
        assert f"disagree on {differ.sum()} of {len(base)} rows" in page
        only_dhrd = differ & (dhrd["prediction"] == dhrd["label"])
        assert f"only DHRD is right: {only_dhrd.sum()}" in page
        row = dhrd[only_dhrd].iloc[0]
        share = row["probabilities"][row["prediction"]]
        assert f"{LABELS[row['prediction']]} ({100 * share:.0f}%)" in page
        assert row["rationale"] in page

    def test_a_setting_without_a_baseline_is_reported_and_not_compared(self, tmp_path):
        frame = report.write_report([make_run("dhrd", 1.0)], tmp_path / "report.html")
        assert frame["difference"].isna().all()
        assert "Nothing is compared" in (tmp_path / "report.html").read_text(encoding="utf-8")

    def test_the_baseline_of_a_pair_is_the_nearest_in_configuration(self, tmp_path):
        near = make_run("near", 0.0, right_rate=0.7, freeze_layers=15)
        far = make_run("far", 0.0, right_rate=0.3, freeze_layers=0)
        dhrd = make_run("dhrd", 1.0, right_rate=0.8, freeze_layers=15)
        frame = report.write_report([far, near, dhrd], tmp_path / "report.html")
        row = frame[(frame["split"] == "test") & (frame["setting"] == "DHRD")].iloc[0]
        scores = [run.metrics["splits"]["test"]["primary"] for run in (near, dhrd)]
        assert row["difference"] == pytest.approx(scores[1] - scores[0])

    def test_rows_are_paired_by_idx_and_not_by_position(self, runs, written, tmp_path):
        shuffled = make_run("dhrd", 1.0, right_rate=0.8)
        shuffled.frames = {split: f.sample(frac=1, random_state=0) for split, f in shuffled.frames.items()}
        frame = report.write_report([runs[0], shuffled], tmp_path / "report.html")
        pd.testing.assert_frame_equal(frame, written[1])

    def test_runs_about_different_rows_are_refused(self, runs, tmp_path):
        other = make_run("other", 1.0)
        other.frames["test"] = other.frames["test"].assign(idx=lambda frame: "x" + frame["idx"])
        with pytest.raises(ValueError, match="'baseline' and 'other' predict different rows of test"):
            report.write_report([runs[0], other], tmp_path / "report.html")

    def test_the_same_run_twice_is_not_two_seeds(self, runs, tmp_path):
        with pytest.raises(ValueError, match="same configuration and seed"):
            report.write_report([*runs, make_run("again", 1.0)], tmp_path / "report.html")

    def test_no_runs_are_refused(self, tmp_path):
        with pytest.raises(ValueError, match="no runs"):
            report.write_report([], tmp_path / "report.html")

    def test_the_terminal_table_shows_every_row(self, written):
        _, frame = written
        console = Console(file=io.StringIO(), width=140)
        report.print_table(frame, console)
        printed = console.file.getvalue()
        assert printed.count("DHRD") == printed.count("pooled baseline") == 3
        row = frame.iloc[-1]
        assert f"{100 * row['value']:.1f}% [{100 * row['low']:.1f}," in printed
        assert f"{100 * row['difference']:+.1f} [{100 * row['diff_low']:+.1f}," in printed


def test_growth_lines_say_the_power_of_each_line_and_leave_out_what_cannot_be_told():
    sizes = [10, 100, 1000]
    points = pd.DataFrame(
        {
            "factor": "rows",
            "what": ["linear"] * 3 + ["square"] * 3,
            "size": sizes * 2,
            "seconds": [0.1 * size for size in sizes] + [1e-3 * size**2 for size in sizes],
            "added_mib": [None, 20.0, 200.0, None, None, 3.0],
        }
    )
    figure = plots.growth_lines(points)
    names = [line.name for line in figure.data]
    # Without a first point, a line's slope can't be told from the others.
    assert names == ["linear: slope 1.00", "square: slope 2.00", "linear", "square"]
    assert [len(line.x) for line in figure.data] == [3, 3, 2, 1]
    assert {axis.type for axis in figure.select_xaxes()} == {"log"}
    assert plots.log_slope([1], [1]) is None
