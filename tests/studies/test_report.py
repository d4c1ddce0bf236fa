"""The report: its figures are the runs', it is fair to both sides, escaped and self-contained."""

import re

import numpy as np
import pandas as pd
import pytest
from plotly.offline import get_plotlyjs

from dhrd_lib.config import DataConfig, ModelConfig, RunConfig, TrainingConfig, WorkbenchError
from dhrd_lib.evaluation import task_metrics
from dhrd_lib.runs import load_run, write_json
from dhrd_lib.studies import report
from dhrd_lib.studies.statistics import paired_comparison

LABELS = ("refund", "replace", "fix", "explain", "escalate")
SPLITS = {"dev": 60, "test": 140, "test_new_domain": 80}


def store_run(folder, alpha, *, beta=1.0, seed=0, right_rate=0.7, labels=LABELS, freeze_layers=15, **options):
    """Store a finished run whose rows don't depend on its seed.

    Options: task, task_metrics, n_groups, text (of every row) and metrics (more entries of metrics.json).
    """
    folder.mkdir(parents=True)
    RunConfig(
        name=folder.name,
        model=ModelConfig(freeze_layers=freeze_layers),
        data=DataConfig(task=options.get("task", "support_triage")),
        training=TrainingConfig(alpha=alpha, beta=beta, seed=seed),
    ).save(folder / "config.json")
    names, splits = options.get("task_metrics", ("accuracy",)), {}
    rng = np.random.default_rng(10 * seed + (alpha > 0))
    for split, n_rows in SPLITS.items():
        gold = np.arange(n_rows) % len(labels)
        wrong = (gold + rng.integers(1, len(labels), n_rows)) % len(labels)
        predicted = np.where(rng.random(n_rows) < right_rate, gold, wrong)
        probabilities = 0.6 * np.eye(len(labels))[predicted] + 0.4 / len(labels)
        groups = [f"q{i % options['n_groups']}" for i in range(n_rows)] if "n_groups" in options else None
        rows = {
            "idx": [str(i) for i in range(n_rows)],
            "input_text": options.get("text", "Order broke."),
            "label": np.array(labels)[gold],
            "prediction": np.array(labels)[predicted],
            "probabilities": probabilities.tolist(),
            "group": groups,
            "rationale": [f"The goods are at fault in case {i}." for i in range(n_rows)],
        }
        frame = pd.DataFrame(rows)
        frame.to_json(folder / f"predictions_{split}.jsonl", orient="records", lines=True)
        splits[split] = task_metrics(names, gold, predicted, groups)
    history = {"step": [5, 10], "class_loss": [1.6, 1.2], "loss": [3.0, 2.5], "eval_class_loss": [None, 1.3]}
    pd.DataFrame(history).to_json(folder / "history.jsonl", orient="records", lines=True)
    write_json(folder / "environment.json", {"packages": {"torch": "2.13.0"}, "git_commit": "abc"})
    steps = {"steps": 60, "best_step": 60}
    totals = {"train_seconds": 706.0 * (1 + alpha), "train_tokens": 118_000, "tokens_per_second": 221.4}
    fixed = {"task_metrics": list(names), "label_names": list(labels), "splits": splits}
    write_json(folder / "metrics.json", fixed | steps | totals | options.get("metrics", {}))
    return load_run(folder)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    return [store_run(root / "base", 0.0, right_rate=0.6), store_run(root / "dhrd", 1.0, right_rate=0.8)]


def write(runs, folder):
    """Write a report; return the page without plotly.js, and the table."""
    frame = report.write_report(runs, folder / "report.html")
    return (folder / "report.html").read_text(encoding="utf-8").replace(get_plotlyjs(), ""), frame


@pytest.fixture(scope="module")
def written(runs, tmp_path_factory):
    return write(runs, tmp_path_factory.mktemp("report"))


def dhrd_on_test(frame):
    return frame[(frame["split"] == "test") & frame["setting"].str.startswith("DHRD")].iloc[0]


def test_table_has_row_per_split_and_setting(runs, written):
    _, frame = written
    assert list(frame.columns) == report.COLUMNS
    assert frame["split"].tolist() == [split for split in SPLITS for _ in runs]
    by_setting = {run.config.training.setting: run for run in runs}
    for row in frame.itertuples():
        assert row.value == pytest.approx(by_setting[row.setting].metrics["splits"][row.split]["primary"])
        assert row.low <= row.value <= row.high
        assert row.majority_share == 0.2


def test_difference_is_paired_comparison(runs, written):
    _, frame = written
    row = dhrd_on_test(frame)
    base, dhrd = (run.predictions("test").sort_values("idx") for run in runs)
    pair = paired_comparison(["accuracy"], base["label_id"], base["prediction_id"], dhrd["prediction_id"])
    assert (row["difference"], row["diff_low"], row["diff_high"], row["p_value"]) == pytest.approx(
        (pair.difference, pair.low, pair.high, pair.p_value)
    )
    assert frame.loc[frame["setting"] == "pooled baseline", "difference"].isna().all()


def test_page_requests_nothing(written):
    page, _ = written
    assert "default-src 'none'" in page
    assert not re.search(r"(?:src|href|url)\s*[=(]", re.sub(r"<script.*?</script>", "", page, flags=re.DOTALL))
    assert "//" not in page.replace("</", "")


def test_text_of_data_is_escaped(tmp_path):
    options = {"labels": ("<b>yes</b>", "<script>no</script>"), "text": "</script><script>alert(1)</script>"}
    runs = [
        store_run(tmp_path / name, alpha, right_rate=0.5, **options) for name, alpha in (("a", 0.0), ("b", 1.0))
    ]
    page, _ = write(runs, tmp_path)
    for text in ("<script>alert(", "<script>no", "<b>yes"):
        assert text not in page
    assert "&lt;script&gt;alert(" in page


def test_summary_has_difference_and_uncertainty(written):
    page, frame = written
    row = dhrd_on_test(frame)
    summary = re.search(r'class="summary">(.*?)</p>', page, re.DOTALL).group(1)
    assert f"DHRD is {100 * row.difference:.1f} points ahead of the pooled baseline" in summary
    assert f"{100 * row.diff_low:+.1f} to {100 * row.diff_high:+.1f} points" in summary
    for words in ("excludes zero", "one seed", "Quick profile: one seed, lower layers frozen"):
        assert words in summary


def test_summary_calls_zero_difference_unsettled(tmp_path):
    runs = [store_run(tmp_path / name, alpha, right_rate=0.75) for name, alpha in (("a", 0.0), ("b", 1.0))]
    page, _ = write(runs, tmp_path)
    assert "don&#39;t settle which of the two is better" in page


def test_runs_differing_in_seed_are_one_setting(tmp_path):
    options = {"task": "multirc", "labels": ("no", "yes"), "task_metrics": ("f1a", "em"), "n_groups": 20}
    runs = [
        store_run(tmp_path / f"{alpha}-{seed}", alpha, seed=seed, freeze_layers=0, **options)
        for alpha in (0.0, 0.5, 1.0)
        for seed in range(3)
    ]
    page, frame = write(runs, tmp_path)
    assert set(frame["n_seeds"]) == {3}
    assert set(frame["setting"]) == {"pooled baseline", "DHRD (alpha=0.5)", "DHRD (alpha=1.0)"}
    for words in ("bootstrap over seeds and groups", "f1a and em"):
        assert words in page
    assert "Quick profile" not in page
    ahead = (frame[frame["split"] != "dev"]["difference"] > 0).sum()
    assert f"ahead of their pooled baseline in {ahead} of 4 comparisons" in page


def test_disagreements_show_who_is_right(runs, written):
    page, _ = written
    base, dhrd = (run.predictions("test") for run in runs)
    differ = base["prediction"] != dhrd["prediction"]
    assert f"disagree on {differ.sum()} of {len(base)} rows" in page
    only_dhrd = differ & (dhrd["prediction"] == dhrd["label"])
    assert f"only DHRD is right: {only_dhrd.sum()}" in page
    row = dhrd[only_dhrd].iloc[0]
    assert f"<dt>DHRD</dt><dd>{row['prediction']} (68%)</dd>" in page
    assert row["rationale"] in page


def test_classes_have_recall(runs, written):
    rows = runs[1].predictions("test").query("label == 'refund'")
    assert f", {100 * (rows['prediction'] == 'refund').mean():.1f}%, " in written[0]


def test_single_run_is_compared_with_nothing(tmp_path):
    page, frame = write([store_run(tmp_path / "a", 0.0)], tmp_path)
    assert "Nothing is compared" in page
    assert frame["difference"].isna().all()


def test_reasoning_only_has_cot_figures_or_none(tmp_path, runs):
    reasoning = store_run(tmp_path / "reasoning", 1.0, beta=0.0)
    with pytest.raises(WorkbenchError, match="no runs with predictions"):
        write([reasoning], tmp_path)
    write_json(reasoning.folder / "cot_test.json", {"predictions": [0] * 139 + [-1], "tokens": [9] * 140})
    page, frame = write([*runs, reasoning], tmp_path)
    row = frame[frame["setting"] == "reasoning only"].iloc[0]
    assert (row["split"], row["value"]) == ("test", 0.2)
    assert not np.isnan(row["difference"])
    assert "<dt>reasoning only</dt><dd>refund</dd>" in page


def test_baseline_is_nearest_in_configuration(tmp_path):
    near = store_run(tmp_path / "near", 0.0, right_rate=0.7)
    far = store_run(tmp_path / "far", 0.0, right_rate=0.3, freeze_layers=0)
    dhrd = store_run(tmp_path / "dhrd", 1.0, right_rate=0.8)
    _, frame = write([far, near, dhrd], tmp_path)
    scores = [run.metrics["splits"]["test"]["primary"] for run in (near, dhrd)]
    assert dhrd_on_test(frame)["difference"] == pytest.approx(scores[1] - scores[0])


def test_rows_are_paired_by_idx(tmp_path, runs, written):
    shuffled = store_run(tmp_path / "dhrd", 1.0, right_rate=0.8)
    for split in SPLITS:
        path = shuffled.folder / f"predictions_{split}.jsonl"
        path.write_text("\n".join(sorted(path.read_text().splitlines(), key=lambda line: line[::-1])))
    pd.testing.assert_frame_equal(write([runs[0], shuffled], tmp_path)[1], written[1])


def test_different_rows_raise(tmp_path, runs):
    other = store_run(tmp_path / "other", 1.0)
    path = other.folder / "predictions_test.jsonl"
    path.write_text(path.read_text().replace('"idx":"', '"idx":"x'))
    with pytest.raises(WorkbenchError, match="'base' and 'other' predict different rows of test"):
        write([runs[0], other], tmp_path)


def test_repeated_or_missing_runs_raise(tmp_path, runs):
    with pytest.raises(WorkbenchError, match="'dhrd' and 'again' have the same task, split, setting and seed"):
        write([*runs, store_run(tmp_path / "again", 1.0)], tmp_path)
    with pytest.raises(WorkbenchError, match="no runs"):
        write([], tmp_path)
