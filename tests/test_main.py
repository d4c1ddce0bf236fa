"""The commands: a comparison from data to report, a run from a file, predictions from a run."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
from conftest import ROOT, tiny_model
from typer.testing import CliRunner

from dhrd_lib import __main__ as cli
from dhrd_lib.config import ConfigError, DataConfig, ModelConfig, RunConfig, TrainingConfig, WorkbenchError
from dhrd_lib.training import train


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DHRD_CACHE", str(tmp_path / "cache"))


def invoke(*arguments: object) -> str:
    arguments = [str(argument) for argument in arguments]
    result = CliRunner(env={"COLUMNS": "160"}).invoke(cli.app, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def tiny(config: RunConfig) -> RunConfig:
    """The same run on a tiny backbone and few rows."""
    return RunConfig(
        name=config.name,
        model=ModelConfig(backbone="tiny", device="cpu", freeze_layers=2),
        data=DataConfig(task=config.data.task, max_train_rows=24, max_eval_rows=12),
        training=TrainingConfig(alpha=config.training.alpha, seed=config.training.seed, epochs=1, batch_size=8),
    )


def test_compare_trains_both_writes_the_report_and_takes_up_finished_runs(tmp_path, monkeypatch):
    configs = [tiny(config) for config in cli.comparison("quick")]
    monkeypatch.setattr(cli, "comparison", lambda _: configs)
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


def test_compare_names_the_profiles_that_there_are():
    result = CliRunner().invoke(cli.app, ["compare", "--profile", "slow"])
    assert result.exit_code == 2
    assert "profile is 'slow'; expected one of quick, full." in re.sub(r"[│\s]+", " ", result.output)


def test_what_the_caller_can_mend_is_said_in_one_sentence_without_a_traceback(tmp_path, monkeypatch):
    path = tmp_path / "config.json"
    path.write_text('{"training": {"alpha": -1}}')
    monkeypatch.setattr("sys.argv", ["dhrd_lib", "train", str(path)])
    told = re.escape(f"dhrd_lib: {path}: training.alpha is -1; expected greater than or equal to 0.")
    with pytest.raises(SystemExit, match=f"^{told}$"):
        cli.main()


def documented(command: str) -> list[str]:
    """The arguments of a command that the README gives in a line of text."""
    text = (ROOT / "README.md").read_text(encoding="utf-8").replace("\n", " ")
    (found,) = re.findall(rf"`python -m dhrd_lib ({command} [^`]*)`", text)
    return shlex.split(found)


def test_the_readmes_commands_work_on_the_readmes_run(tmp_path, monkeypatch):
    config = tiny(RunConfig(name="mine"))
    config = config.replace({"data.task": "my.csv", "data.text": ("title", "body"), "data.label": "queue"})
    rows = [f"Lamp {i},It {('broke', 'is late')[i % 2]}.,{('fix', 'send')[i % 2]},why {i}" for i in range(80)]
    monkeypatch.chdir(tmp_path)
    Path("my.csv").write_text("\n".join(["title,body,queue,why", *rows]))
    train(config.replace({"data.rationale": "why"}))
    told = invoke(*documented("predict"))
    assert re.fullmatch(r'(fix|send)\t\d\.\d{3}\t\{"title": "Lamp", "body": "It came broken\."\}\n', told)
    invoke(*documented("export"))
    told = invoke("predict", "runs/mine/export-openvino", *documented("predict")[2:])
    assert told.startswith(("fix", "send"))
    with pytest.raises(ConfigError, match="expected 'last' and 'linear'"):
        invoke("export", "runs/mine", "--format", "hf")


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        (
            ["--row", "{"],
            "--row 1 is not JSON: Expecting property name enclosed in double quotes: line 1 column 2 ",
        ),
        (["--row", '{"text": "x"}', "--row", "[1]"], "--row 2 is [1]; expected an object of fields."),
        (["--row", '{"body": "x"}'], "input 1 lacks 'text'; expected a dict with 'text'."),
    ],
)
def test_a_row_that_cannot_be_classified_is_refused_in_one_sentence(given, sentence, task, tmp_path):
    tiny_model(task).save_pretrained(tmp_path)
    with pytest.raises(WorkbenchError, match=re.escape(sentence)):
        invoke("predict", tmp_path, *given)


def test_predict_takes_rows_beside_texts_and_names_what_it_wants_where_there_is_neither(task, tmp_path):
    tiny_model(task).save_pretrained(tmp_path)
    text, row = "Why?", json.dumps({"text": "Why?"})
    lines = invoke("predict", tmp_path, text, "--row", row).splitlines()
    assert [line.split("\t")[2] for line in lines] == [text, row]
    assert lines[0].split("\t")[:2] == lines[1].split("\t")[:2]
    result = CliRunner().invoke(cli.app, ["predict", str(tmp_path)])
    assert result.exit_code == 2
    assert "there is nothing to classify" in " ".join(result.output.split())


def test_train_and_predict_from_a_config_file(tmp_path):
    tiny(cli.comparison("quick")[0]).replace({"name": "mine"}).save(tmp_path / "config.json")
    output = invoke("train", tmp_path / "config.json", "--runs", tmp_path / "runs")
    assert "test accuracy" in output
    output = invoke("predict", tmp_path / "runs" / "mine", "My lamp came broken.", "Why?")
    assert re.match(r"(refund|replace|fix|explain|escalate)\t0\.\d{3}\tMy lamp came broken\.\n", output)
