"""Stopped, killed and shared runs: they end as if nothing had happened."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT
from small_runs import assert_same_weights, config, logged
from transformers import TrainerCallback

from dhrd_lib.config import ConfigError
from dhrd_lib.runs import load_run
from dhrd_lib.training import train

pytestmark = pytest.mark.usefixtures("own_cache")


SCRIPT = """
import sys
import torch
torch.set_num_threads(1)
from dhrd_lib.config import RunConfig
from dhrd_lib.training import train
train(RunConfig.load(sys.argv[1]), sys.argv[2])
"""


def launch(arguments: list[str], **environment: str) -> subprocess.Popen:
    return subprocess.Popen(
        arguments,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.mark.timeout(240)
@pytest.mark.parametrize("alive_until", [3, 7])
def test_killed_run_resumes_to_same_weights(table, tmp_path, alive_until):
    changes = {"training__eval_steps": 2, "training__epochs": 2, "training__alpha_schedule": "linear"}
    straight = train(config(table, "straight", **changes), tmp_path)
    killed = config(table, "killed", **changes)
    killed.save(tmp_path / "killed.json")
    (tmp_path / "script.py").write_text(
        "import os, signal\n"
        "from dhrd_lib.trainer import DHRDTrainer\n"
        "step = DHRDTrainer.training_step\n"
        "def dies(self, *args, **kwargs):\n"
        f"    if self.state.global_step == {alive_until}: os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return step(self, *args, **kwargs)\n"
        "DHRDTrainer.training_step = dies\n" + SCRIPT
    )
    command = [sys.executable, str(tmp_path / "script.py"), str(tmp_path / "killed.json"), str(tmp_path)]
    process = launch(command, PYTHONPATH=str(ROOT))
    output, _ = process.communicate(timeout=200)
    assert process.returncode == -signal.SIGKILL, output
    resumed = train(killed, tmp_path)
    assert resumed.metrics["resumed_from_step"] == alive_until // 2 * 2
    terms = ("loss", "class_loss", "lm_loss", "alpha")
    assert logged(resumed, *terms) == logged(straight, *terms)
    assert_same_weights(resumed, straight)


HELD = """
import sys
from dhrd_lib.trainer import DHRDTrainer
step = DHRDTrainer.training_step
def waits(self, *args, **kwargs):
    if self.state.global_step == 3:
        print("IN STEP 3", flush=True)
        sys.stdin.readline()
    return step(self, *args, **kwargs)
DHRDTrainer.training_step = waits
"""


@pytest.mark.timeout(240)
@pytest.mark.parametrize("end", ["finished", "killed"])
def test_second_process_waits_for_run(table, tmp_path, end):
    own = config(table, training__eval_steps=2)
    own.save(tmp_path / "run.json")
    (tmp_path / "held.py").write_text(HELD + SCRIPT)
    (tmp_path / "script.py").write_text(SCRIPT)
    here = {"PYTHONPATH": str(ROOT)}
    command = [str(tmp_path / "run.json"), str(tmp_path / "runs")]
    first = launch([sys.executable, str(tmp_path / "held.py"), *command], **here)
    while "IN STEP 3" not in (line := first.stdout.readline()):
        assert line, "it ended before its third step"
    second = launch([sys.executable, str(tmp_path / "script.py"), *command], **here)
    while "being trained by another process" not in (line := second.stdout.readline()):
        assert line, "it didn't wait"
    first.send_signal(signal.SIGKILL if end == "killed" else signal.SIGCONT)
    first.communicate("go on\n", timeout=200)
    output, _ = second.communicate(timeout=200)
    assert second.returncode == 0, output
    # The one that waited trains where it has to, and from the checkpoint that is there.
    assert ("run · train:" in output) == (end == "killed")
    run = load_run(tmp_path / "runs" / "run")
    assert run.metrics["resumed_from_step"] == (2 if end == "killed" else 0)
    assert not list(run.folder.glob("*lock*"))


class StopAt(TrainerCallback):
    """Interrupt training at the beginning of a step, or when its checkpoint is written."""

    def __init__(self, step: int, once_saved: bool = False) -> None:
        self.step, self.once_saved = step, once_saved

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step and not self.once_saved:
            raise KeyboardInterrupt

    def on_save(self, args, state, control, **kwargs):
        if state.global_step == self.step and self.once_saved:
            raise KeyboardInterrupt


@pytest.mark.parametrize("stops", [[3], [3, 5]])
def test_resume_keeps_tokens_and_seconds(table, tmp_path, stops):
    class Slow(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            time.sleep(0.3 if state.global_step < 2 else 0)

    own = config(table, training__eval_steps=2)
    straight = train(own, tmp_path / "straight")
    for step in stops:
        with pytest.raises(KeyboardInterrupt):
            train(own, tmp_path / "stopped", callbacks=[Slow(), StopAt(step)])
    resumed = train(own, tmp_path / "stopped")
    assert resumed.metrics["resumed_from_step"] == stops[-1] // 2 * 2
    assert resumed.metrics["train_tokens"] == straight.metrics["train_tokens"]
    # The two slow steps were trained before the first stop.
    assert resumed.metrics["train_seconds"] > 0.6
    seconds = resumed.metrics["train_tokens"] / resumed.metrics["tokens_per_second"]
    assert seconds == pytest.approx(resumed.metrics["train_seconds"])


PRIVILEGED = {"training__privileged_head": "separate", "training__privileged_gamma": 1.0}


@pytest.mark.parametrize(
    ("changes", "terms"),
    [
        (PRIVILEGED | {"training__beta_delay": 0.3}, ("beta", "privileged_class_loss", "privileged_kl")),
        ({"training__alpha": "auto"}, ("alpha", "lm_class_cosine")),
    ],
)
def test_options_resume_to_same_weights(table, tmp_path, changes, terms):
    own = config(table, training__eval_steps=2, **changes)
    straight = train(own, tmp_path / "straight")
    with pytest.raises(KeyboardInterrupt):
        train(own, tmp_path / "stopped", callbacks=[StopAt(3)])
    resumed = train(own, tmp_path / "stopped")
    assert resumed.metrics["resumed_from_step"] == 2
    assert logged(resumed, "loss", *terms) == logged(straight, "loss", *terms)
    assert_same_weights(resumed, straight)


@pytest.mark.parametrize("max_steps", [0, 6])
def test_resume_after_last_step_trains_no_other(table, tmp_path, max_steps):
    own = config(table, training__eval_steps=2, training__max_steps=max_steps)
    straight = train(own, tmp_path / "straight")
    last = straight.metrics["steps"]
    with pytest.raises(KeyboardInterrupt):
        train(own, tmp_path / "stopped", callbacks=[StopAt(last, once_saved=True)])
    resumed = train(own, tmp_path / "stopped")
    assert resumed.metrics["resumed_from_step"] == last
    for name in ("steps", "best_step", "train_tokens", "splits"):
        assert resumed.metrics[name] == straight.metrics[name]
    assert_same_weights(resumed, straight)


@pytest.mark.parametrize("stopped", ["in its fourth step", "out of patience"])
def test_resume_restores_early_stopping_patience(table, tmp_path, stopped):
    idle = {"training__learning_rate": 1e-9, "training__classifier_learning_rate": 1e-9}
    own = config(table, training__eval_steps=1, training__early_stopping_patience=3, **idle)
    straight = train(own, tmp_path / "straight")
    assert straight.metrics["steps"] == 4  # The first evaluation sets the mark, and three don't reach above it.
    stop = StopAt(4, once_saved=True) if stopped == "out of patience" else StopAt(3)
    with pytest.raises(KeyboardInterrupt):
        train(own, tmp_path / "stopped", callbacks=[stop])
    resumed = train(own, tmp_path / "stopped")
    assert resumed.metrics["resumed_from_step"] == (4 if stopped == "out of patience" else 3)
    for name in ("steps", "best_step", "train_tokens", "splits"):
        assert resumed.metrics[name] == straight.metrics[name]


def test_resume_requires_the_same_rows(table, tmp_path):
    rows = Path(shutil.copy(table, tmp_path / "rows.jsonl"))
    own = config(rows, training__eval_steps=2)
    with pytest.raises(KeyboardInterrupt):
        train(own, tmp_path, callbacks=[StopAt(3)])
    rows.write_text(rows.read_text().replace("money", "coins", 1))
    with pytest.raises(ConfigError, match="was trained on other rows of train than the data has now"):
        train(own, tmp_path)
    assert list((tmp_path / "run" / "checkpoints").iterdir())
