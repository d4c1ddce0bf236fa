"""The training panel: a process that trains, its progress from the runs' folders, stop and resume."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from threading import Thread, Timer

import gradio as gr
from app_runs import store_runs

from app.settings import Settings
from app.tabs.training import Training, TrainingPanel, read_progress
from dhrd_lib.config import RunConfig
from dhrd_lib.studies.comparison import comparison

CONFIGS = [RunConfig(name=name).replace({"training.epochs": 4}) for name in ("one", "two")]
SLEEP = [sys.executable, "-c", "import time; time.sleep(60)"]


def log(root: Path, name: str, *steps: dict, torn: str = "") -> None:
    (root / name).mkdir(exist_ok=True)
    (root / name / "history.jsonl").write_text("".join(json.dumps(step) + "\n" for step in steps) + torn)


def ended(training: Training, command: list[str]) -> str:
    training.command = command
    training.start()
    training._process.wait(60)
    return training.status()


def test_progress_counts_epochs_of_all_runs(tmp_path):
    assert read_progress(tmp_path, CONFIGS)[0] == 0
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "metrics.json").write_text("{}")
    steps = {"step": 5, "epoch": 1.0, "loss": 0.7}, {"step": 10, "epoch": 2.0, "eval_loss": 1}
    log(tmp_path, "two", *steps, torn="{")
    assert read_progress(tmp_path, CONFIGS) == (0.75, "Training run 2 of 2: two, step 10, loss 0.700")
    (tmp_path / "two" / "metrics.json").write_text("{}")
    assert read_progress(tmp_path, CONFIGS)[0] == 1


def test_status_shows_run_step_and_loss(tmp_path):
    training = Training(tmp_path, CONFIGS, SLEEP)
    assert training.status() == ""
    training.start()
    assert "Training starts" in training.status()
    log(tmp_path, "one", {"step": 5, "epoch": 1.0, "loss": 0.7})
    assert "Training run 1 of 2: one, step 5, loss 0.700. 12% of all epochs, about" in training.status()
    training.stop()
    assert "The training was stopped" in training.status()


def test_failure_is_its_last_line(tmp_path):
    training = Training(tmp_path, CONFIGS, [])
    failing = [
        sys.executable,
        "-c",
        "import sys; print('noise', file=sys.stderr); sys.exit('dhrd_lib: <b> is wrong.')",
    ]
    assert "The training failed: dhrd_lib: &lt;b&gt; is wrong." in ended(training, failing)
    assert "The training is done." in ended(training, [sys.executable, "-c", ""])


def test_one_training_at_a_time(tmp_path):
    training = Training(tmp_path, CONFIGS, SLEEP)
    training.start()
    process = training._process
    training.start()
    assert training._process is process
    training.stop()
    assert (training.state, process.poll() is not None) == ("stopped", True)


def test_start_waits_for_stopping_process(tmp_path):
    training = Training(tmp_path, CONFIGS, SLEEP)
    training.start()
    old = training._process
    os.kill(old.pid, signal.SIGSTOP)
    os.waitpid(old.pid, os.WUNTRACED)  # held, it ends no sooner than it continues, below
    stopping = Thread(target=training.stop)
    stopping.start()
    while not training._stopped:
        time.sleep(0.01)
    Timer(0.5, os.kill, [old.pid, signal.SIGCONT]).start()
    training.start()
    assert old.poll() is not None
    stopping.join()
    assert training.state == "running"
    training.stop()


def test_panel_is_shown_where_there_is_no_run(tmp_path):
    for root, needed in ((tmp_path / "none", True), (store_runs(tmp_path / "some"), False)):
        with gr.Blocks():
            assert TrainingPanel(Settings(runs=root, backbone="tiny")).panel.visible is needed


def test_panel_trains_what_the_command_compares(tmp_path):
    with gr.Blocks():
        training = TrainingPanel(Settings(runs=tmp_path)).training
    assert training.configs == comparison("quick")
    assert training.command[1:] == ["-m", "dhrd_lib", "compare", "--profile", "quick", "--runs", str(tmp_path)]
    done = subprocess.run([*training.command[:4], "--help"], capture_output=True, text=True, check=True)
    assert "--profile" in done.stdout
    assert "--runs" in done.stdout


def test_real_training_is_followed_to_its_end(tmp_path):
    values = {"model.backbone": "tiny", "model.device": "cpu", "data.max_input_tokens": 64}
    values |= {"data.max_rationale_tokens": 16, "data.max_train_rows": 8, "data.max_eval_rows": 8}
    values |= {"training.epochs": 1, "training.batch_size": 4, "training.alpha": 0.0}
    config = RunConfig(name="tiny").replace(values)
    config.save(tmp_path / "tiny.json")
    training = Training(tmp_path, [config], [])
    command = [sys.executable, "-m", "dhrd_lib", "train", str(tmp_path / "tiny.json"), "--runs", str(tmp_path)]
    assert "The training is done." in ended(training, command)
    assert read_progress(tmp_path, [config])[0] == 1
    (tmp_path / "tiny" / "metrics.json").unlink()
    share, message = read_progress(tmp_path, [config])
    assert share == 1
    assert "Training run 1 of 1: tiny, step 2, loss" in message
