"""Grids: every cell once, however many processes work on it and whatever becomes of them."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import optuna
import pytest
import sqlalchemy
from conftest import ROOT
from optuna.storages import fail_stale_trials
from typer.testing import CliRunner

from dhrd_lib import __main__ as cli
from dhrd_lib import training
from dhrd_lib.config import ConfigError
from dhrd_lib.runs import load_run
from dhrd_lib.studies import sweeps
from dhrd_lib.studies.sweeps import Grid, cells, sweep
from dhrd_lib.training import train


@pytest.fixture(autouse=True, scope="module")
def base(tmp_path_factory):
    """The values that the cells share: a tiny backbone on 24 rows."""
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


BASE = {
    "model": {"backbone": "tiny", "device": "cpu"},
    "data": {"dev_fraction": 0.2},
    "training": {"epochs": 1, "batch_size": 8, "logging_steps": 1},
}


def a_grid(**values: list) -> Grid:
    return Grid("g", {key.replace("__", "."): of for key, of in values.items()}, BASE)


def record_trained(monkeypatch, interrupted: str | None = None) -> list[str]:
    """The names of the runs that are trained; a finished one that is taken as it is isn't."""
    begun, prepare = [], training._prepare

    def recording(config):
        begun.append(config.name)
        if config.name == interrupted:
            raise KeyboardInterrupt
        return prepare(config)

    monkeypatch.setattr(training, "_prepare", recording)
    return begun


WORKER = """
import os, signal, sys
import torch
torch.set_num_threads(1)
from dhrd_lib import training
from dhrd_lib.studies.sweeps import Grid, sweep
step, prepare = training.DHRDTrainer.training_step, training._prepare
def dies(self, *args, **kwargs):
    if self.state.global_step == 2 and os.environ.get("DIES"):
        os.kill(os.getpid(), signal.SIGKILL)
    return step(self, *args, **kwargs)
def prepares(config):
    print("PREPARED", config.name, flush=True)
    return prepare(config)
training.DHRDTrainer.training_step, training._prepare = dies, prepares
table = sweep(Grid.load(sys.argv[1]), sys.argv[2])
assert set(table["state"]) == {"finished"}, table
"""


def launch(folder: Path, grid: Grid, **environment: str) -> subprocess.Popen:
    (folder / "worker.py").write_text(WORKER)
    (folder / "grid.json").write_text(json.dumps({"name": grid.name, "base": grid.base, "grid": grid.values}))
    return subprocess.Popen(
        [sys.executable, folder / "worker.py", folder / "grid.json", folder / "runs"],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen, code: int = 0) -> str:
    output, errors = process.communicate(timeout=100)
    assert process.returncode == code, output + errors
    return output


def test_every_cell_is_trained_once_and_a_second_call_trains_nothing(tmp_path, monkeypatch):
    called = record_trained(monkeypatch)
    grid = a_grid(training__alpha=[0, 1], training__seed=[0, 1])
    table = sweep(grid, tmp_path)
    assert sorted(called) == ["g-alpha0-seed0", "g-alpha0-seed1", "g-seed0", "g-seed1"]
    assert len(table) == 4 * 2  # dev and test
    assert set(table["state"]) == {"finished"}
    assert table["primary"].between(0, 1).all()
    assert table.groupby("run")[["alpha", "seed"]].first().values.tolist() == [[0, 0], [0, 1], [1, 0], [1, 1]]
    again = sweep(grid, tmp_path)
    assert len(called) == 4
    assert again.equals(table)


def test_grids_of_one_name_and_base_share_the_cells_that_they_have_in_common(tmp_path, monkeypatch):
    called = record_trained(monkeypatch)
    sweep(a_grid(training__alpha=[0, 1], training__seed=[0]), tmp_path)
    table = sweep(a_grid(model__pooling=["last", "mean"], training__seed=[0]), tmp_path)
    assert sorted(called) == ["g-alpha0-seed0", "g-poolingmean-seed0", "g-seed0"]
    assert dict(zip(table["run"], table["state"], strict=True)) == dict.fromkeys(
        ["g-seed0", "g-poolingmean-seed0"], "finished"
    )


def test_the_run_of_a_cell_has_the_bases_values_and_its_own(tmp_path):
    grid = a_grid(training__alpha=[0.5], model__pooling=["mean"])
    config = grid.config("g-alpha0.5-poolingmean")
    assert (config.training.alpha, config.model.pooling) == (0.5, "mean")
    assert (config.training.epochs, config.data.dev_fraction) == (1, 0.2)


def test_the_cells_of_a_grid_are_worked_out_once_however_many_are_asked_for(monkeypatch):
    grid, made = a_grid(training__seed=list(range(20))), []
    monkeypatch.setattr(Grid, "_config", lambda *of, own=Grid._config: made.append(of) or own(*of))
    assert len({grid.config(run).training.seed for run in grid.cells}) == 20
    assert len(made) == 21  # what the cells share, and each of them


def test_cells_whose_values_read_the_same_as_a_file_name_keep_runs_of_their_own():
    grid = a_grid(model__backbone=["org/model", "org_model", "x" * 200])
    assert len(grid.cells) == 3
    assert all("/" not in run and len(run) < 130 for run in grid.cells)


def test_finished_runs_are_taken_as_they_are(tmp_path, monkeypatch):
    grid = a_grid(training__alpha=[0, 1])
    train(grid.config("g"), tmp_path)
    written = (tmp_path / "g" / "metrics.json").stat().st_mtime_ns
    sweep(grid, tmp_path)
    assert (tmp_path / "g" / "metrics.json").stat().st_mtime_ns == written


def test_a_copy_of_a_cells_run_under_another_name_adds_nothing_to_the_cell(tmp_path):
    grid = a_grid(training__alpha=[0])
    table = sweep(grid, tmp_path)
    shutil.copytree(tmp_path / "g-alpha0", tmp_path / "kept")
    assert cells(grid, tmp_path).equals(table)


def test_checkpoints_of_a_cell_that_was_killed_after_its_last_file_are_removed(tmp_path, monkeypatch):
    grid = a_grid(training__alpha=[0, 1])
    sweep(grid, tmp_path)
    left = tmp_path / "g" / "checkpoints" / "checkpoint-3"
    left.mkdir(parents=True)
    begun = record_trained(monkeypatch)
    assert set(sweep(grid, tmp_path)["state"]) == {"finished"}
    assert begun == []
    assert not left.parent.exists()


def test_a_cell_that_fails_is_listed_with_its_reason_and_the_rest_go_on(tmp_path, monkeypatch):
    called = record_trained(monkeypatch)
    grid = a_grid(model__freeze_layers=[99, 1])
    table = sweep(grid, tmp_path).groupby("run").first()
    assert table["state"].to_dict() == {"g-freeze_layers1": "finished", "g-freeze_layers99": "failed"}
    reason = table.loc["g-freeze_layers99", "reason"]
    assert re.fullmatch(r"freeze_layers is 99; the backbone has \d layers\.", reason)
    sweep(grid, tmp_path)
    assert len(called) == 2  # a failure isn't tried again unasked
    sweep(grid, tmp_path, again=True)
    assert called.count("g-freeze_layers99") == 2


def test_values_that_do_not_go_together_fail_their_own_cell_alone(tmp_path):
    table = sweep(a_grid(training__alpha=[0], training__beta=[0, 1]), tmp_path).groupby("run").first()
    assert table["state"].to_dict() == {"g-alpha0-beta0": "failed", "g-alpha0": "finished"}
    assert "both 0" in table.loc["g-alpha0-beta0", "reason"]


def test_an_interrupted_cell_is_taken_up_at_the_next_call(tmp_path, monkeypatch):
    record_trained(monkeypatch, interrupted="g")
    grid = a_grid(training__alpha=[0, 1])
    with pytest.raises(KeyboardInterrupt):
        sweep(grid, tmp_path)
    assert dict(cells(grid, tmp_path)[["run", "state"]].values)["g"] == "stopped"
    monkeypatch.undo()
    assert set(sweep(grid, tmp_path)["state"]) == {"finished"}


@pytest.mark.timeout(120)
def test_two_processes_share_a_grid_and_train_no_cell_twice(tmp_path, monkeypatch):
    grid = a_grid(training__alpha=[0, 1], training__seed=[0, 1, 2])
    called = record_trained(monkeypatch)
    other = launch(tmp_path, grid)
    first = other.stdout.readline()  # it has begun
    assert set(sweep(grid, tmp_path / "runs")["state"]) == {"finished"}
    theirs = re.findall("PREPARED (.*)", first + finish(other))
    assert called
    assert theirs
    assert sorted(called + theirs) == sorted(grid.cells)


@pytest.mark.timeout(120)
def test_after_a_kill_in_the_middle_of_a_cell_the_next_call_resumes_it_and_does_the_rest(tmp_path, monkeypatch):
    base = {**BASE, "training": {**BASE["training"], "batch_size": 4, "eval_steps": 1}}
    grid = Grid("g", {"training.seed": [0, 1]}, base)
    killed = launch(tmp_path, grid, DIES="1")
    (begun,) = re.findall("PREPARED (.*)", finish(killed, -signal.SIGKILL))
    assert set(cells(grid, tmp_path / "runs")["state"]) == {"running", "waiting"}
    monkeypatch.setattr(sweeps, "HEARTBEAT_SECONDS", 1)
    assert set(sweep(grid, tmp_path / "runs")["state"]) == {"finished"}
    assert load_run(tmp_path / "runs" / begun).metrics["resumed_from_step"] == 2


def killed(study: optuna.Study, beating: bool = True) -> None:
    """Take a cell as a process does that is killed at once, and long ago."""
    trial = study.ask()
    if beating:
        trial.suggest_categorical("training.alpha", (1,))
        study._storage.record_heartbeat(trial._trial_id)
        with study._storage._backend.engine.begin() as connection:
            connection.execute(sqlalchemy.text("update trial_heartbeats set heartbeat = '2000-01-01 00:00:00'"))


TAKEN_BY_HAND = pytest.mark.filterwarnings("ignore::UserWarning")  # optuna's: experimental, and meant for optimize


@TAKEN_BY_HAND
@pytest.mark.parametrize("killed_before", [True, False])
def test_only_kills_during_a_call_count_towards_giving_up_a_cell(killed_before, tmp_path):
    grid = a_grid(training__alpha=[1])
    url = sweeps._default_storage(grid, tmp_path)
    study = sweeps._study(grid, url)
    for _ in range(sweeps._MAX_RETRIES):
        killed(study)
        fail_stale_trials(study)
    killed(study)
    if killed_before:  # as the next call begins, nobody has missed its heartbeat yet
        study = sweeps._study(grid, url, begun=len(study.trials))
    fail_stale_trials(study)
    expected = "waiting" if killed_before else "stopped"
    assert dict(cells(grid, tmp_path)[["run", "state"]].values) == {"g": expected}


@TAKEN_BY_HAND
@pytest.mark.timeout(60)
def test_a_queued_cell_whose_process_was_killed_before_its_first_heartbeat_is_taken_up(tmp_path, monkeypatch):
    monkeypatch.setattr(sweeps, "HEARTBEAT_SECONDS", 1)
    monkeypatch.setattr(sweeps, "_MISSED_HEARTBEATS", 1)
    grid = a_grid(training__alpha=[1])
    study = sweeps._study(grid, sweeps._default_storage(grid, tmp_path))
    for _ in range(sweeps._MAX_RETRIES):
        killed(study)
        fail_stale_trials(study)
    killed(study, beating=False)
    assert dict(cells(grid, tmp_path)[["run", "state"]].values) == {"g": "running"}
    assert set(sweep(grid, tmp_path)["state"]) == {"finished"}


def test_a_cell_whose_files_are_torn_is_listed_with_the_reason_and_the_rest_go_on(tmp_path):
    grid = a_grid(training__alpha=[0, 1])
    (tmp_path / "g").mkdir()
    grid.config("g").save(tmp_path / "g" / "config.json")
    (tmp_path / "g" / "metrics.json").write_text("{")
    with pytest.warns(UserWarning, match="The run is left out"):
        table = sweep(grid, tmp_path).set_index("run")
    assert set(table.loc["g-alpha0", "state"]) == {"finished"}
    reason = f"{tmp_path}/g/metrics.json is not JSON: Expecting property name enclosed in double quotes"
    assert table.loc["g", "state"] == "failed"
    assert table.loc["g", "reason"].startswith(reason)
    (tmp_path / "g-alpha0" / "metrics.json").write_text("[]")  # after it was finished here
    with pytest.warns(UserWarning, match="The run is left out"):
        table = cells(grid, tmp_path).set_index("run")
    told = f"{tmp_path}/g-alpha0/metrics.json has no metrics of splits; expected what training wrote."
    assert tuple(table.loc["g-alpha0", ["state", "reason"]]) == ("failed", told)


@pytest.mark.parametrize(
    ("url", "told"),
    [
        ("nothing", "--storage, can't be used (Could not parse SQLAlchemy URL from given URL string)"),
        ("foo://ada:secret@host/x", "--storage, can't be used (Can't load plugin: sqlalchemy.dialects:foo)"),
        (
            "postgresql://ada:secret@localhost:1/x",
            "--storage, can't be used (Failed to import DB access module for the specified storage URL)",
        ),
        ("sqlite:///{folder}/no/x.db", "the file {folder}/no/x.db, can't be used (unable to open database file)"),
        ("sqlite:///{folder}/text.db", "the file {folder}/text.db, can't be used (file is not a database)"),
    ],
)
def test_a_storage_that_cannot_be_used_is_refused_in_one_sentence_without_its_password(url, told, tmp_path):
    (tmp_path / "text.db").write_text("no database, and long enough to be taken for one " * 20)
    with pytest.raises(ConfigError) as caught:
        sweep(a_grid(training__alpha=[1]), tmp_path / "runs", storage=url.format(folder=tmp_path))
    told = told.format(folder=tmp_path)
    assert str(caught.value) == (f"the storage of grid 'g', {told}; expected a database that Optuna can write to.")


@pytest.mark.timeout(120)
def test_the_command_works_with_several_processes_and_says_what_is_not_finished(tmp_path):
    grid = {"name": "g", "base": BASE, "grid": {"model.freeze_layers": [0, 99]}}
    (tmp_path / "grid.json").write_text(json.dumps(grid))
    url = f"sqlite:///{tmp_path / 'elsewhere.sqlite3'}"
    arguments = ["sweep", str(tmp_path / "grid.json"), "--workers", "2", "--runs", str(tmp_path / "runs")]
    result = CliRunner().invoke(cli.app, [*arguments, "--storage", url])
    assert result.exit_code == 1, result.output
    assert re.search(r"g\tfinished\tdev \d\.\d{3}, test \d\.\d{3}", result.output)
    assert re.search(r"g-freeze_layers99\tfailed\tfreeze_layers is 99; the backbone has", result.output)
    assert (tmp_path / "elsewhere.sqlite3").is_file()
    assert not (tmp_path / "runs" / "g.sqlite3").exists()


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        (
            {"training.alfa": [0]},
            "'training.alfa' is no field of a run's configuration; did you mean 'training.alpha'?",
        ),
        ({"name": ["a"]}, "'name' is no field"),
        ({}, "the grid varies no field"),
        ({"training.alpha": []}, "expected one or more values, each once"),
        ({"training.alpha": [1, 1]}, "expected one or more values, each once"),
        ({"training.alpha": [1, 1.0]}, "expected one or more values, each once"),
        ({"training.keep_model": [0, False]}, "expected one or more values, each once"),
        ({"training.alpha": 1}, "expected a list of values"),
        ({"data.text": [["a", "b"]]}, "expected texts, numbers, truth values or null"),
    ],
)
def test_a_grid_that_cannot_be_run_is_refused_in_one_sentence(values, sentence):
    with pytest.raises(ConfigError) as caught:
        Grid("g", values, BASE)
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)


def test_unknown_fields_of_the_base_or_the_file_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="training.epoch is not a field"):
        Grid("g", {"training.alpha": [0]}, {"training": {"epoch": 1}})
    path = tmp_path / "grid.json"
    for text in ("{", "[]", '{"name": "g"}', '{"name": "g", "grid": {}, "seeds": 3}', '{"name": "g", "grid": 1}'):
        path.write_text(text)
        with pytest.raises(ConfigError, match=r"is not JSON|is no grid"):
            Grid.load(path)


def test_a_run_folder_of_another_configuration_is_a_reason_to_fail(tmp_path):
    train(a_grid(training__alpha=[1]).config("g"), tmp_path)
    other = Grid("g", {"training.alpha": [1]}, {**BASE, "training": {**BASE["training"], "epochs": 2}})
    table = sweep(other, tmp_path)
    assert table["state"].tolist() == ["failed"]
    assert "holds a run of another configuration" in table["reason"].iloc[0]
