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
    table = json.loads((runs / "report.json").read_text())
    assert {row["split"] for row in table["rows"]} == {"dev", "test", "test_new_domain"}
    metrics = json.loads((runs / configs[0].name / "metrics.json").read_text())
    (test,) = [r for r in table["rows"] if r["split"] == "test" and r["setting"] == "DHRD"]
    assert test["value"] == pytest.approx(metrics["splits"]["test"]["primary"])
    assert "DHRD" in (runs / "report.html").read_text()
    monkeypatch.setattr("dhrd_lib.training._train", lambda *_: pytest.fail("trained again"))
    assert invoke("compare", "--runs", runs) in output


def test_unknown_profile_is_refused():
    assert "profile is 'slow'; expected one of quick, full." in refused("compare", "--profile", "slow")


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
    output = invoke("predict", "runs/mine", "--row", '{"title": "Lamp", "body": "It came broken."}')
    assert re.fullmatch(r"title,body,prediction,probability\nLamp,It came broken.,(fix|send),0\.\d+\n", output)
    invoke("export", "runs/mine", "--format", "openvino")
    exported = invoke("predict", "runs/mine/export-openvino", "my.csv").splitlines()
    assert (exported[0], len(exported)) == ("title,body,queue,why,prediction,probability", 81)
    with pytest.raises(ConfigError, match="expected 'last' and 'linear'"):
        invoke("export", "runs/mine", "--format", "hf")


class TestPredict:
    def test_csv_keeps_awkward_texts_apart(self, saved):
        rows = list(csv.DictReader(io.StringIO(invoke("predict", saved, *AWKWARD), newline="")))
        assert [row["text"] for row in rows] == AWKWARD
        assert {row["prediction"] for row in rows} <= {"fix", "refund", "explain"}

    def test_jsonl_has_all_probabilities(self, saved):
        lines = invoke("predict", saved, *AWKWARD, "--format", "jsonl").splitlines()
        rows = [json.loads(line) for line in lines]
        assert [row["text"] for row in rows] == AWKWARD
        for row in rows:
            assert sum(row["probabilities"].values()) == pytest.approx(1)
            assert row["prediction"] == max(row["probabilities"], key=row["probabilities"].get)

    @pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
    @pytest.mark.parametrize("option", [(), ("--file",)], ids=["positional", "option"])
    def test_files_are_read_as_files(self, saved, tmp_path, suffix, option):
        table, path = pd.DataFrame({"id": range(3), "text": AWKWARD}), tmp_path / f"rows{suffix}"
        write = {".csv": table.to_csv, ".parquet": table.to_parquet}.get(suffix)
        write(path, index=False) if write else table.to_json(path, orient="records", lines=True)
        assert invoke("predict", saved, *option, path, "--out", tmp_path / "labels.csv") == ""
        written = pd.read_csv(tmp_path / "labels.csv")
        assert list(written) == ["id", "text", "prediction", "probability"]
        assert written["text"].tolist() == AWKWARD

    @pytest.mark.parametrize(
        "content",
        ["One.\n\nTwo, three.\n", 'text\nOne.\n"Two, three."\n', '{"text": "One."}\n{"text": "Two, three."}\n'],
        ids=["lines", "csv", "jsonl"],
    )
    def test_standard_input_is_a_table_or_lines(self, saved, content):
        rows = csv.DictReader(io.StringIO(invoke("predict", saved, "--file", "-", stdin=content)))
        assert [row["text"] for row in rows] == ["One.", "Two, three."]

    def test_rows_and_texts_agree(self, saved):
        output = invoke("predict", saved, "Why?", "--row", json.dumps({"text": "Why?"}))
        _, first, second = output.splitlines()
        assert first == second

    @pytest.mark.parametrize(
        ("given", "sentence"),
        [
            (["--row", "{"], "--row 1 is {; expected a JSON object"),
            (["--row", '{"text": "x"}', "--row", "[1]"], "--row 2 is [1]; expected a JSON object"),
            (["--row", '{"body": "x"}'], "input 1 lacks 'text'"),
            (["nowhere.csv"], "nowhere.csv: no such file"),
            (["--file", ROOT / "dhrd_lib/data/everyday_nli/test.jsonl"], "test.jsonl lacks text; expected"),
        ],
    )
    def test_invalid_inputs_are_refused(self, saved, given, sentence):
        with pytest.raises(WorkbenchError, match=re.escape(sentence)):
            invoke("predict", saved, *given)

    def test_nothing_to_classify_is_refused(self, saved):
        assert "there is nothing to classify" in refused("predict", saved)
        assert "the format is 'xls'" in refused("predict", saved, "Why?", "--out", "labels.xls")

    def test_reasoning_only_run_is_refused(self, tmp_path):
        config = tiny(RunConfig(name="reasoning")).replace({"training.beta": 0.0, "training.alpha": 1.0})
        run = train(config, tmp_path)
        with pytest.raises(ConfigError, match="CoT"):
            invoke("predict", run.folder, "Why?")


def test_help_imports_neither_torch_nor_datasets():
    script = "import dhrd_lib.__main__, sys; print({'torch', 'datasets'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, text=True).stdout == "set()\n"
