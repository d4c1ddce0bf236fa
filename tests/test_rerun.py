"""A stored run can be repeated from its folder alone, and what a repeat may differ in is said."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from dhrd_lib import __main__ as cli
from dhrd_lib.config import ConfigError, DataConfig, ModelConfig, RunConfig, TrainingConfig
from dhrd_lib.runs import Run, compare_repeat, environment_differences, load_run, write_json
from dhrd_lib.training import rerun, train

pytestmark = pytest.mark.usefixtures("own_cache")

# What a second thread may change over six steps in float32, where sums are taken in another order. The tiny
# backbone's matrices are too small to be shared out; with a hidden size of 128, losses were up to 5e-7 apart.
LOSS_TOLERANCE, PROBABILITY_TOLERANCE = 1e-5, 1e-4


@pytest.fixture(scope="module")
def stored(tmp_path_factory) -> Run:
    config = RunConfig(
        name="mine",
        model=ModelConfig(backbone="tiny", device="cpu"),
        data=DataConfig(max_train_rows=24, max_eval_rows=12, max_input_tokens=96, max_rationale_tokens=64),
        training=TrainingConfig(epochs=2, batch_size=8, learning_rate=3e-3, warmup_steps=0, logging_steps=1),
    )
    return train(config, tmp_path_factory.mktemp("runs"))


def bare(stored: Run, folder: Path) -> Path:
    """A copy of the run's folder that holds nothing but the three files that a repeat needs."""
    folder.mkdir()
    for name in ("config.json", "environment.json", "metrics.json"):
        shutil.copy(stored.folder / name, folder)
    return folder


def repeat(run: Path, out: Path) -> str:
    result = CliRunner().invoke(cli.app, ["rerun", str(run), "--out", str(out)], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def test_a_repeat_on_one_thread_has_the_same_metrics_losses_and_predictions_twice_in_a_row(stored, tmp_path):
    for out in (tmp_path / "first", tmp_path / "second"):
        new = rerun(stored, out)
        assert new.metrics["splits"] == stored.metrics["splits"]
        assert new.history["loss"].equals(stored.history["loss"])
        table = compare_repeat(stored, new)
        assert set(table["predictions"]) == {"all the same"}
        assert table["split"].tolist() == ["dev", "test", "test_new_domain"]
        assert table["stored"].tolist() == table["new"].tolist()


def test_a_repeat_on_two_threads_stays_within_the_stated_tolerance(stored, tmp_path):
    torch.set_num_threads(2)
    try:
        new = rerun(stored, tmp_path)
    finally:
        torch.set_num_threads(1)
    losses = [run.history["loss"].dropna() for run in (stored, new)]
    np.testing.assert_allclose(*losses, rtol=0, atol=LOSS_TOLERANCE)
    for split in stored.metrics["splits"]:
        shares = [np.stack(run.predictions(split)["probabilities"]) for run in (stored, new)]
        np.testing.assert_allclose(*shares, rtol=0, atol=PROBABILITY_TOLERANCE)
    threads = [line for line in environment_differences(stored.environment, new.environment) if "threads" in line]
    assert threads == ["cpu_threads: 1 then, 2 now"]


def test_configuration_environment_and_metrics_are_enough_to_repeat_a_run(stored, tmp_path):
    told = repeat(bare(stored, tmp_path / "bare"), tmp_path / "out")
    assert "Environment: the same as stored\n" in told
    for split, metrics in stored.metrics["splits"].items():
        value = f"{metrics['primary']:.6f}"
        assert re.search(rf"{split} +{value} +{value} +not stored", told)


def test_the_command_says_what_differs_before_it_trains_and_how_many_predictions_do_after(stored, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(stored.folder, other)
    changed = {**stored.environment, "cpu_threads": 64}
    changed["packages"] = {**changed["packages"], "torch": "1.0"}
    write_json(other / "environment.json", changed)
    path = other / "predictions_test.jsonl"
    first, *rest = path.read_text(encoding="utf-8").splitlines()
    row = json.loads(first)
    row["prediction"] = (row["prediction"] + 1) % 5
    path.write_text("\n".join([json.dumps(row), *rest]), encoding="utf-8")
    told = repeat(other, tmp_path / "out")
    head, body = told.split("mine · ", 1)
    assert "Environment: differs, so the figures may too\n" in head
    assert "cpu_threads: 64 then, 1 now" in head
    assert f"torch: 1.0 then, {torch.__version__} now" in head
    assert re.search(r"dev +\S+ +\S+ +all the same", body)
    assert re.search(rf"test +\S+ +\S+ +1 of {len(rest) + 1} differ", body)


def test_predictions_for_other_rows_are_not_compared(stored, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(stored.folder, other)
    path = other / "predictions_dev.jsonl"
    path.write_text(path.read_text(encoding="utf-8").replace('"input_text":"', '"input_text":"Other: ', 1))
    table = compare_repeat(load_run(other), stored).set_index("split")["predictions"]
    assert table["dev"] == "of other rows: the data has changed"
    assert table["test"] == "all the same"


def test_a_run_is_not_repeated_in_its_own_folder_of_runs(stored, monkeypatch):
    monkeypatch.setattr("dhrd_lib.training._prepare", lambda _: pytest.fail("trained again"))
    with pytest.raises(ConfigError, match=r"mine is finished already; expected another folder"):
        rerun(stored, stored.folder.parent)
