"""Grids: every cell once, however many processes work on it and whatever becomes of them."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT
from typer.testing import CliRunner
from workers import finish, launch, record_trained

from dhrd_lib import __main__ as cli
from dhrd_lib.config import ConfigError
from dhrd_lib.runs import load_run
from dhrd_lib.studies import sweeps
from dhrd_lib.studies.sweeps import Grid, sweep
from dhrd_lib.training import train

BASE = {
    "model": {"backbone": "tiny", "device": "cpu"},
    "data": {"dev_fraction": 0.2},
    "training": {"epochs": 1, "batch_size": 8, "logging_steps": 1},
}


@pytest.fixture(autouse=True, scope="module")
def base(tmp_path_factory):
    """A tiny backbone on 24 rows for all cells."""
    folder = tmp_path_factory.mktemp("data")
    rows = [
        {"text": f"case {i} is about {word}", "label": word, "rationale": f"it says {word} in case {i}"}
        for i in range(12)
        for word in ("money", "faults")
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    BASE["data"]["task"] = str(folder / "rows.jsonl")
    patch = pytest.MonkeyPatch()
    patch.setenv("DHRD_CACHE", str(folder / "cache"))
    yield
    patch.undo()


def a_grid(**values: list) -> Grid:
    return Grid(name="g", grid={key.replace("__", "."): of for key, of in values.items()}, base=BASE)


def test_every_cell_is_trained_once(tmp_path, monkeypatch):
    begun = record_trained(monkeypatch)
    grid = a_grid(training__alpha=[0, 1], training__seed=[0, 1])
    table = sweep(grid, tmp_path)
    assert sorted(begun) == ["g-alpha0-seed0", "g-alpha0-seed1", "g-seed0", "g-seed1"]
    assert set(table["state"]) == {"finished"}
    assert table[["dev", "test"]].stack().between(0, 1).all()
    assert table[["alpha", "seed"]].values.tolist() == [[0, 0], [0, 1], [1, 0], [1, 1]]
    assert sweep(grid, tmp_path).equals(table)
    assert len(begun) == 4


def test_values_that_look_alike_have_separate_runs():
    grid = a_grid(model__backbone=["org/model", "org_model", "x" * 200])
    assert len(grid.cells) == 3
    assert all("/" not in run and len(run) < 130 for run in grid.cells)


def test_finished_run_is_reused_and_its_checkpoints_removed(tmp_path, monkeypatch):
    grid = a_grid(training__alpha=[0, 1])
    train(grid.config("g"), tmp_path)
    checkpoint = tmp_path / "g" / "checkpoints" / "checkpoint-3"  # as after a kill right after metrics.json
    checkpoint.mkdir(parents=True)
    sweep(grid, tmp_path)
    assert not checkpoint.parent.exists()
    begun = record_trained(monkeypatch)
    sweep(grid, tmp_path)
    assert begun == []


def test_failed_cell_is_listed_and_retried(tmp_path, monkeypatch):
    grid = a_grid(model__freeze_layers=[99, 1])
    table = sweep(grid, tmp_path).set_index("run")
    assert table["state"].to_dict() == {"g-freeze_layers99": "failed", "g-freeze_layers1": "finished"}
    assert "freeze_layers is 99" in table.loc["g-freeze_layers99", "reason"]
    monkeypatch.setattr(sweeps, "train", lambda *_: [][0])
    table = sweep(grid, tmp_path).set_index("run")
    assert table.loc["g-freeze_layers99", "reason"] == "IndexError: list index out of range"
    assert table.loc["g-freeze_layers1", "state"] == "finished"
    assert "Traceback" in (tmp_path / "g-freeze_layers99" / "error.txt").read_text()


def test_incompatible_values_fail_their_cell_alone(tmp_path):
    table = sweep(a_grid(training__alpha=[0], training__beta=[0, 1]), tmp_path).set_index("run")
    assert table["state"].to_dict() == {"g-alpha0-beta0": "failed", "g-alpha0": "finished"}
    assert "above 0" in table.loc["g-alpha0-beta0", "reason"]


def test_run_of_another_configuration_is_refused(tmp_path):
    train(a_grid(training__alpha=[1]).config("g"), tmp_path)
    other = Grid(name="g", grid={"training.alpha": [1]}, base={**BASE, "training": {"epochs": 2}})
    with pytest.raises(ConfigError, match="holds a run of another configuration"):
        sweep(other, tmp_path)


def test_run_without_class_loss_has_no_metrics(tmp_path):
    table = sweep(a_grid(training__beta=[0.0, 1.0]), tmp_path)
    assert set(table["state"]) == {"finished"}
    assert table["test"].isna().tolist() == [True, False]


@pytest.mark.timeout(120)
def test_processes_share_a_grid(tmp_path, monkeypatch):
    grid = a_grid(training__alpha=[0, 1], training__seed=[0, 1, 2])
    begun = record_trained(monkeypatch)
    other = launch(tmp_path, grid)
    while not list(tmp_path.glob("runs/*/config.json")):
        time.sleep(0.1)
    assert set(sweep(grid, tmp_path / "runs")["state"]) == {"finished"}
    theirs = finish(other)
    assert begun
    assert theirs
    assert sorted(begun + theirs) == sorted(grid.cells)


@pytest.mark.timeout(120)
def test_killed_cell_resumes_after_the_others(tmp_path, monkeypatch):
    base = {**BASE, "training": {**BASE["training"], "batch_size": 4, "eval_steps": 1}}
    grid = Grid(name="g", grid={"training.seed": [0, 1]}, base=base)
    killed = launch(tmp_path, grid, DIES="1")
    (first,) = finish(killed, -signal.SIGKILL)
    begun = record_trained(monkeypatch)
    assert set(sweep(grid, tmp_path / "runs")["state"]) == {"finished"}
    assert begun == ["g-seed1", first]
    assert load_run(tmp_path / "runs" / first).metrics["resumed_from_step"] == 2


@pytest.mark.timeout(120)
def test_worker_takes_over_from_a_killed_one(tmp_path, monkeypatch):
    grid = a_grid(training__alpha=[1])
    (tmp_path / "runs" / "g").mkdir(parents=True)
    grid.config("g").save(tmp_path / "runs" / "g" / "config.json")
    code = "import sys, time; from dhrd_lib.runs import run_lock, Path; "
    code += "lock = run_lock(Path(sys.argv[1])); lock.acquire(); print(flush=True); time.sleep(99)"
    holder = subprocess.Popen(
        [sys.executable, "-c", code, tmp_path / "runs" / "g"], cwd=ROOT, stdout=subprocess.PIPE
    )
    holder.stdout.readline()
    monkeypatch.setattr(sweeps.time, "sleep", lambda _: holder.kill())
    assert set(sweep(grid, tmp_path / "runs")["state"]) == {"finished"}
    holder.wait()


@pytest.mark.timeout(120)
def test_command_runs_workers(tmp_path):
    grid = {"name": "g", "base": BASE, "grid": {"model.freeze_layers": [0, 99]}}
    (tmp_path / "grid.json").write_text(json.dumps(grid))
    arguments = ["sweep", str(tmp_path / "grid.json"), "--workers", "2", "--runs", str(tmp_path / "runs")]
    result = CliRunner().invoke(cli.app, arguments)
    assert result.exit_code == 1, result.output
    assert re.search(r"g +0 +finished +0\.\d{3} +0\.\d{3}", result.output)
    assert re.search(r"g-freeze_layers99 +99 +failed +ConfigError: freeze_layers is 99", result.output)


@pytest.mark.parametrize(
    ("values", "match"),
    [
        ({"training.alfa": [0]}, "training.alfa"),
        ({"name": ["a"]}, "grid.name"),
        ({}, "grid"),
        ({"training.alpha": []}, "training.alpha"),
        ({"training.alpha": 1}, "training.alpha"),
        ({"data.text": [["a", "b"]]}, "data.text"),
    ],
)
def test_wrong_grid_is_refused(values, match):
    with pytest.raises(ConfigError, match=match) as error:
        Grid(name="g", grid=values, base=BASE)
    assert "\n" not in str(error.value)


def test_wrong_base_or_file_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="training.epoch is not a field"):
        Grid(name="g", grid={"training.alpha": [0]}, base={"training": {"epoch": 1}})
    for text in ("{", "[]", '{"name": "g"}', '{"name": "g", "grid": {}, "seeds": 3}', '{"name": "g", "grid": 1}'):
        (tmp_path / "grid.json").write_text(text)
        with pytest.raises(ConfigError, match="grid.json"):
            Grid.load(tmp_path / "grid.json")
