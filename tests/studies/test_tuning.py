"""Searches: trials are resumable and shared, and the best configuration is that of dev's best metric."""

from __future__ import annotations

import json
import signal
import time
from typing import Any

import optuna
import pandas as pd
import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.visualization import plot_optimization_history
from typer.testing import CliRunner
from workers import finish, launch, record_trained

from dhrd_lib.__main__ import app
from dhrd_lib.config import ConfigError
from dhrd_lib.runs import load_run
from dhrd_lib.studies.sweeps import Search, tune

pytestmark = pytest.mark.usefixtures("own_cache")
BASE = {
    "model": {"backbone": "tiny", "device": "cpu"},
    "data": {"max_train_rows": 24, "max_eval_rows": 12, "max_input_tokens": 32, "max_rationale_tokens": 16},
    "training": {"epochs": 1, "batch_size": 8, "eval_steps": 1, "keep_model": False},
}
SPACE = {"training.learning_rate": {"low": 1e-5, "high": 1e-2, "log": True}, "model.freeze_layers": [0, 2]}


def trials(study: optuna.Study) -> pd.DataFrame:
    table = study.trials_dataframe(("value", "state", "params", "user_attrs"))
    return table.rename(columns=lambda name: name.rpartition(".")[2].removeprefix("user_attrs_"))


def a_search(**fields: Any) -> Search:
    return Search(**{"name": "s", "space": SPACE, "base": BASE, "n_trials": 2, **fields})


def test_resumed_search_samples_as_an_uninterrupted_one(tmp_path, monkeypatch):
    whole = trials(tune(a_search(n_trials=3), tmp_path / "whole"))
    begun = record_trained(monkeypatch)
    tune(a_search(), tmp_path / "parts")
    parts = tune(a_search(n_trials=3), tmp_path / "parts")
    assert len(begun) == len(set(begun)) == 3
    assert trials(tune(a_search(), tmp_path / "parts")).equals(trials(parts))
    assert trials(parts).equals(whole)
    assert whole["state"].tolist() == ["COMPLETE"] * 3
    assert whole["learning_rate"].between(1e-5, 1e-2).all()
    assert whole["learning_rate"].is_unique
    run = load_run(tmp_path / "whole" / whole["run"][0])
    assert run.metrics["splits"]["dev"]["primary"] == whole["value"][0]
    assert run.config.training.learning_rate == whole["learning_rate"][0]
    best = whole.loc[whole["value"].idxmax()]
    assert parts.best_params["training.learning_rate"] == best["learning_rate"]
    assert list(plot_optimization_history(parts).data[0].y) == whole["value"].tolist()


@pytest.mark.timeout(120)
def test_killed_trial_resumes(tmp_path):
    search = a_search()
    finish(launch(tmp_path, search, DIES="1"), -signal.SIGKILL)
    table = trials(tune(search, tmp_path / "runs"))
    assert table["state"].tolist() == ["COMPLETE"] * 2
    metrics = load_run(tmp_path / "runs" / table["run"][0]).metrics
    assert (metrics["resumed_from_step"], metrics["steps"]) == (2, 3)


@pytest.mark.timeout(120)
def test_processes_share_a_search(tmp_path, monkeypatch):
    search = a_search(n_trials=8)
    other = launch(tmp_path, search)
    while not list(tmp_path.glob("runs/*/config.json")):
        time.sleep(0.1)
    begun = record_trained(monkeypatch)
    table = trials(tune(search, tmp_path / "runs"))
    assert table["state"].tolist() == ["COMPLETE"] * 8
    assert table["learning_rate"].is_unique
    assert sorted(begun + finish(other)) == table["run"].tolist()


def test_failed_trial_keeps_its_reason(tmp_path):
    search = a_search(space={"model.freeze_layers": [99], "training.alpha": {"low": 0, "high": 1}}, n_trials=1)
    table = trials(tune(search, tmp_path))
    assert table["state"].tolist() == ["FAIL"]
    assert "freeze_layers is 99" in table["reason"][0]


def test_search_without_class_loss_fails_before_training(tmp_path, monkeypatch):
    begun = record_trained(monkeypatch)
    table = trials(tune(a_search(base={"training": {"beta": 0.0}}), tmp_path))
    assert table["state"].tolist() == ["FAIL", "FAIL"]
    assert "beta is 0" in table["reason"][0]
    assert not begun


def test_ranges_are_of_their_fields_type():
    space = {
        "training.epochs": {"low": 1, "high": 9, "step": 2},
        "training.alpha": {"low": 0, "high": 2, "step": 0.5},
        "model.pooling": ["last", "mean"],
    }
    epochs, alpha, pooling = a_search(space=space).distributions.values()
    assert epochs == IntDistribution(1, 9, step=2)
    assert alpha == FloatDistribution(0, 2, step=0.5)
    assert pooling == CategoricalDistribution(["last", "mean"])


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"space": {"training.alfa": [0]}}, "training.alfa"),
        ({"space": {}}, "space"),
        ({"space": {"training.alpha": {"low": 1, "high": 0}}}, "training.alpha.*low"),
        ({"space": {"training.alpha": {"low": 0, "high": 1, "log": True}}}, "training.alpha.*log"),
        ({"space": {"training.alpha": {"low": 0}}}, "training.alpha.*high"),
        ({"base": {"training": {"epoch": 1}}}, "epoch"),
        ({"n_trials": 0}, "n_trials"),
        ({"trials": 3}, "trials"),
    ],
)
def test_wrong_search_is_refused(fields, match):
    with pytest.raises(ConfigError, match=match) as error:
        _ = a_search(**fields).distributions
    assert "\n" not in str(error.value)


def test_command_prints_trials(tmp_path):
    a_search().save(tmp_path / "search.json")
    command = ["tune", str(tmp_path / "search.json"), "--runs", str(tmp_path / "runs")]
    result = CliRunner().invoke(app, [*command, "--trials", "1"], catch_exceptions=False)
    assert result.exit_code == 0
    assert "COMPLETE" in result.output
    best = json.loads(result.output.rpartition("Best: ")[2])
    assert set(best) == set(SPACE)
