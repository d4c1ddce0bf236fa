"""Stored runs on the page: pickers, tasks of user files, examples, model cards, ablations."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import gradio as gr
import pandas as pd
import pytest
from app_runs import DHRD, REASONING, TASK, store_run, store_runs

from app import runs as stored
from app.settings import Settings
from app.tabs.runs import RunsTab, model_card
from dhrd_lib.config import ConfigError
from dhrd_lib.runs import find_runs
from dhrd_lib.studies import tables
from dhrd_lib.tasks import load_task


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return store_runs(tmp_path_factory.mktemp("runs"))


class TestStoredRuns:
    def test_tasks_with_run_come_first(self, root):
        runs = stored.usable_runs(root)
        assert stored.tasks_of(runs) == ["support_triage", "everyday_nli"]
        assert stored.runs_of(runs, "support_triage", "reasoning only") == [REASONING]
        examples = stored.examples(root, "support_triage")
        assert {example.gold for example in examples[:5]} == set(TASK.label_names)

    def test_run_without_model_is_listed_and_not_picked(self, tmp_path):
        root = store_runs(tmp_path, DHRD)
        shutil.rmtree(root / DHRD / "model")
        assert stored.usable_runs(root) == []
        assert len(stored.runs_table(root)) == 2
        with pytest.raises(ConfigError, match="There is no finished run"):
            stored.find_run(root, DHRD)

    def test_examples_follow_their_data(self, tmp_path):
        path, rows = tmp_path / "rows.csv", {"text": ["old one", "old two"] * 20, "label": ["a", "b"] * 20}
        pd.DataFrame(rows).to_csv(path, index=False)
        store_run(tmp_path / "runs" / "mine", known=load_task(str(path))[0], task=str(path))
        path.unlink()
        assert stored.examples(tmp_path / "runs", str(path)) == []
        pd.DataFrame(rows).to_csv(path, index=False)
        assert stored.examples(tmp_path / "runs", str(path))[0].texts == {"text": "old one"}
        pd.DataFrame({**rows, "text": ["new one", "new two"] * 20}).to_csv(path, index=False)
        os.utime(path, (1, 1))  # another time, however coarse the clock of the file system is
        assert stored.examples(tmp_path / "runs", str(path))[0].texts == {"text": "new one"}

    def test_path_is_no_task(self, root, tmp_path):
        (tmp_path / "private.csv").write_text("text,label\n" + "secret,a\nsecret,b\n" * 10)
        assert stored.examples(root, str(tmp_path / "private.csv")) == []
        with pytest.raises(ConfigError, match="There is no task"):
            stored.task_for(root, str(tmp_path / "private.csv"))


class TestRunsTab:
    @pytest.fixture(scope="class")
    def tab(self, root) -> RunsTab:
        return self.made(root)

    def made(self, root: Path) -> RunsTab:
        with gr.Blocks(), gr.Tab("Runs") as tab:
            return RunsTab(Settings(runs=root, results=root, backbone="tiny"), tab)

    def test_card_has_intervals_and_limits(self, tab):
        card, plot = tab._on_run(DHRD)
        assert "accuracy [95% interval]" in card
        assert "Limits" in card
        assert plot.visible
        assert tab._on_run("gone")[0] == ""

    def test_untrained_classifier_has_no_metrics(self, root):
        table = stored.runs_table(root).set_index("run")
        assert table.loc[REASONING, "metric (%)"].isna().all()
        assert table.loc[DHRD, "metric (%)"].notna().all()
        card = model_card(stored.find_run(root, REASONING))
        assert "%" not in card.split("<h4>")[0].replace("95%", "")
        assert "CoT decoding" in card

    def test_curves_show_other_settings(self, root):
        runs = stored.usable_runs(root)
        names = {trace.name for trace in stored.loss_figure(runs[0], runs).data}
        assert names == {"pooled baseline", "DHRD", "reasoning only"}

    def test_unreadable_run_is_named(self, tmp_path):
        root = store_runs(tmp_path, DHRD)
        shutil.copytree(root / DHRD, root / "other")
        (root / "other" / "config.json").write_text('{"name": "x", "of_another_version": 1}')
        with pytest.warns(UserWarning, match="is skipped"):
            status, _, picker, *_ = self.made(root)._read(None)
        assert "of_another_version is not a field" in status
        assert picker.choices == [(DHRD, DHRD)]

    def test_ablation_is_figure_and_table(self, root, tmp_path):
        table = tables.collect(find_runs(root)[:2])
        tables.store_results(table, tmp_path / "ablation_mine.json")
        with gr.Blocks(), gr.Tab("Runs") as tab:
            runs_tab = RunsTab(Settings(runs=root, results=tmp_path), tab)
        plot, shown = runs_tab._on_ablation("mine")
        assert plot.value is not None
        assert len(shown.value["data"]) == table["run"].nunique() * table["split"].nunique()
        rows = stored.ablation_table(stored.ablation(tmp_path, "mine"))
        assert rows["metric (%)"].between(0, 100).all()

    def test_unknown_ablation_is_refused(self, tmp_path):
        with pytest.raises(ConfigError, match="There is no stored ablation"):
            stored.ablation(tmp_path, "../../secret")
