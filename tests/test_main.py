"""The commands: a comparison from data to report, a run from a file, predictions as CSV and JSONL."""

from __future__ import annotations

import csv
import io
import json
import re
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
from conftest import ROOT, tiny_model
from typer.testing import CliRunner

from dhrd_lib import __main__ as cli
from dhrd_lib.config import ConfigError, DataConfig, ModelConfig, RunConfig, TrainingConfig, WorkbenchError
from dhrd_lib.studies import comparison
from dhrd_lib.training import train

AWKWARD = ['My "lamp", broke', "two\nlines\tand a tab", "Größe 38 — 靴"]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DHRD_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def saved(task, tmp_path_factory):
    """An untrained classifier with labels fix, refund and explain."""
    folder = tmp_path_factory.mktemp("model")
    tiny_model(task).save_pretrained(folder)
    return folder


def invoke(*arguments: object, stdin: str | None = None) -> str:
    arguments = [str(argument) for argument in arguments]
    result = CliRunner(env={"COLUMNS": "160"}).invoke(cli.app, arguments, input=stdin, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def refused(*arguments: object) -> str:
    result = CliRunner(env={"COLUMNS": "160"}).invoke(cli.app, [str(argument) for argument in arguments])
    assert result.exit_code == 2
    return " ".join(result.output.replace("│", " ").split())


def tiny(config: RunConfig) -> RunConfig:
    """Return the same run on a tiny backbone and few rows."""
    return RunConfig(
        name=config.name,
        model=ModelConfig(backbone="tiny", device="cpu", freeze_layers=2),
        data=DataConfig(task=config.data.task, max_train_rows=24, max_eval_rows=12),
        training=TrainingConfig(alpha=config.training.alpha, seed=config.training.seed, epochs=1, batch_size=8),
    )


def test_compare_writes_report_and_reuses_runs(tmp_path, monkeypatch):
    configs = [tiny(config) for config in comparison.comparison("quick")]
    monkeypatch.setattr(comparison, "comparison", lambda _: configs)
    runs = tmp_path / "runs"
    output = invoke("compare", "--runs", runs)
    assert "pooled baseline" in output
    assert str(runs / "report.html") in output.replace("\n", "")
    assert "DHRD" in (runs / "report.html").read_text()
    monkeypatch.setattr("dhrd_lib.training._train", lambda *_: pytest.fail("trained again"))
    assert invoke("compare", "--runs", runs).partition("(pooled baseline)\n")[2] in output


def test_unknown_profile_is_refused():
    assert "'slow' is not one of 'quick', 'full'" in refused("compare", "--profile", "slow")


def test_user_errors_are_one_sentence_without_traceback(tmp_path, monkeypatch):
    path = tmp_path / "config.json"
    path.write_text('{"training": {"alpha": -1}}')
    monkeypatch.setattr("sys.argv", ["dhrd_lib", "train", str(path)])
    with pytest.raises(
        SystemExit, match=rf"^dhrd_lib: {re.escape(str(path))}: training\.alpha is -1; expected .*\.$"
    ):
        cli.main()


def test_every_command_has_an_example_in_its_help():
    for command in cli.app.registered_commands:
        example = command.callback.__doc__.strip().splitlines()[-1].strip()
        assert example.startswith("Example: python -m dhrd_lib ")
        assert command.rich_help_panel


def test_train_predict_and_export_from_the_shell(tmp_path, monkeypatch):
    config = tiny(RunConfig(name="mine"))
    columns = {"data.text": ("title", "body"), "data.label": "queue", "data.rationale": "why"}
    rows = [f"Lamp {i},It {('broke', 'is late')[i % 2]}.,{('fix', 'send')[i % 2]},why {i}" for i in range(80)]
    monkeypatch.chdir(tmp_path)
    Path("my.csv").write_text("\n".join(["title,body,queue,why", *rows]))
    config.replace({"data.task": "my.csv", **columns}).save("config.json")
    assert "test accuracy" in invoke("train", "config.json")
    invoke("export", "runs/mine", "--format", "openvino")
    for folder in ("runs/mine", "runs/mine/export-openvino"):
        header, *lines = invoke("predict", folder, "--file", "my.csv").splitlines()
        assert (header, len(lines)) == ("title,body,queue,why,prediction,probability", 80)
    assert re.fullmatch(r"Lamp 0,It broke.,fix,why 0,(fix|send),0\.\d+", lines[0])
    with pytest.raises(WorkbenchError, match="lacks 'body'; expected a dict with 'title', 'body'"):
        invoke("predict", "runs/mine", "Why?")
    with pytest.raises(ConfigError, match="expected 'last' and 'linear'"):
        invoke("export", "runs/mine", "--format", "hf")


class TestPredict:
    def test_csv_keeps_awkward_texts_apart(self, saved):
        rows = list(csv.DictReader(io.StringIO(invoke("predict", saved, *AWKWARD), newline="")))
        assert [row["text"] for row in rows] == AWKWARD
        assert {row["prediction"] for row in rows} <= {"fix", "refund", "explain"}

    def test_jsonl_has_all_probabilities(self, saved, tmp_path):
        invoke("predict", saved, *AWKWARD, "--out", tmp_path / "labels.jsonl")
        rows = [json.loads(line) for line in (tmp_path / "labels.jsonl").read_text().splitlines()]
        assert [row["text"] for row in rows] == AWKWARD
        for row in rows:
            assert sum(row["probabilities"].values()) == pytest.approx(1)
            assert row["prediction"] == max(row["probabilities"], key=row["probabilities"].get)

    def test_file_keeps_its_columns(self, saved, tmp_path):
        path = tmp_path / "rows.parquet"
        pd.DataFrame({"id": range(3), "text": AWKWARD}).to_parquet(path)
        assert invoke("predict", saved, "--file", path, "--out", tmp_path / "labels.csv") == ""
        written = pd.read_csv(tmp_path / "labels.csv")
        assert list(written) == ["id", "text", "prediction", "probability"]
        assert written["text"].tolist() == AWKWARD
        assert f"expected --file {path}" in refused("predict", saved, path)

    def test_standard_input_has_a_text_per_line(self, saved):
        output = invoke("predict", saved, "--file", "-", stdin="One.\n\nTwo, three.\r\n")
        assert [row["text"] for row in csv.DictReader(io.StringIO(output))] == ["One.", "Two, three."]

    def test_wrong_inputs_are_refused(self, saved):
        assert "expected either texts or --file" in refused("predict", saved)
        assert "labels.xls ends in '.xls'" in refused("predict", saved, "Why?", "--out", "labels.xls")
        with pytest.raises(WorkbenchError, match="input 1 lacks 'text'"):
            invoke("predict", saved, "--file", ROOT / "dhrd_lib/data/everyday_nli/test.jsonl")
        with pytest.raises(ConfigError, match="- has no rows"):
            invoke("predict", saved, "--file", "-", stdin="\n")

    def test_reasoning_only_run_is_refused(self, tmp_path):
        config = tiny(RunConfig(name="reasoning")).replace({"training.beta": 0.0, "training.alpha": 1.0})
        run = train(config, tmp_path)
        with pytest.raises(ConfigError, match="CoT"):
            invoke("predict", run.folder, "Why?")


def test_help_imports_neither_torch_nor_datasets():
    script = "import dhrd_lib.__main__, sys; print({'torch', 'datasets'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, text=True).stdout == "set()\n"
