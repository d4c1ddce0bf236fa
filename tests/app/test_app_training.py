"""The training panel: a process that trains, its progress from the runs' folders, stop and resume."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from threading import Thread, Timer

import gradio as gr
from app_runs import store_runs

from app.settings import Settings
from app.tabs.training import Training, TrainingPanel, read_progress
from dhrd_lib.config import RunConfig

CONFIGS = [RunConfig(name=name).replace({"training.epochs": 4}) for name in ("one", "two")]
SLEEP = [sys.executable, "-c", "import time; time.sleep(60)"]


def ended(training: Training, *command: str) -> str:
    training.command = [sys.executable, *command]
    training.start()
    training._process.wait(60)
    return training.status()


def test_progress_is_read_from_run_folders(tmp_path):
    training = Training(tmp_path, CONFIGS, SLEEP)
    assert training.status() == ""
    training.start()
    assert "Training starts" in training.status()
    for config in CONFIGS:
        (tmp_path / config.name).mkdir()
    logs = [{"step": 5, "epoch": 1.0, "loss": 0.7}, {"step": 10, "epoch": 2.0, "eval_loss": 1}]
    (tmp_path / "one" / "history.jsonl").write_text("".join(json.dumps(log) + "\n" for log in logs) + '{"st')
    assert "Training run 1 of 2: one, step 10, loss 0.700. 25% of all epochs, about" in training.status()
    (tmp_path / "one" / "metrics.json").write_text("{}")
    assert read_progress(tmp_path, CONFIGS)[0] == 0.5
    (tmp_path / "two" / "metrics.json").write_text("{}")
    assert read_progress(tmp_path, CONFIGS)[0] == 1
    training.stop()
    assert "The training was stopped" in training.status()


def test_failure_is_its_last_line(tmp_path):
    training = Training(tmp_path, CONFIGS, [])
    code = "import sys; print('noise', file=sys.stderr); sys.exit('dhrd_lib: <b> is wrong.')"
    assert "The training failed: dhrd_lib: &lt;b&gt; is wrong." in ended(training, "-c", code)
    assert "The training is done." in ended(training, "-c", "")


def test_start_waits_for_stopping_process(tmp_path):
    training = Training(tmp_path, CONFIGS, SLEEP)
    training.start()
    old = training._process
    training.start()  # one at a time
    assert training._process is old
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
    assert (training.state, training._process.poll() is not None) == ("stopped", True)


def test_panel_is_shown_where_there_is_no_run(tmp_path):
    for root, needed in ((tmp_path / "none", True), (store_runs(tmp_path / "some"), False)):
        with gr.Blocks():
            assert TrainingPanel(Settings(runs=root, backbone="tiny")).panel.visible is needed


def test_panel_runs_the_compare_command(tmp_path):
    with gr.Blocks():
        training = TrainingPanel(Settings(runs=tmp_path)).training
    assert [config.training.setting for config in training.configs] == ["DHRD", "pooled baseline"]
    assert training.command[1:4] == ["-m", "dhrd_lib", "compare"]
    assert "The training is done." in ended(training, *training.command[1:], "--help")


def test_real_training_is_followed_to_its_end(tmp_path):
    values = {"model.backbone": "tiny", "model.device": "cpu", "data.max_input_tokens": 64}
    values |= {"data.max_rationale_tokens": 16, "data.max_train_rows": 8, "data.max_eval_rows": 8}
    config = RunConfig(name="tiny").replace(
        {**values, "training.epochs": 1, "training.batch_size": 4, "training.alpha": 0.0}
    )
    config.save(tmp_path / "tiny.json")
    training = Training(tmp_path, [config], [])
    command = ("-m", "dhrd_lib", "train", str(tmp_path / "tiny.json"), "--runs", str(tmp_path))
    assert "The training is done." in ended(training, *command)
    (tmp_path / "tiny" / "metrics.json").unlink()
    share, message = read_progress(tmp_path, [config])
    assert share == 1
    assert "Training run 1 of 1: tiny, step 2, loss" in message
