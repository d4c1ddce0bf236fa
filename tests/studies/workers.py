"""`python -m dhrd_lib sweep` or `tune` in another process."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

from dhrd_lib.studies import sweeps
from dhrd_lib.studies.sweeps import Grid, Search

SCRIPT = """
import os, signal, sys, torch
torch.set_num_threads(1)
from dhrd_lib import trainer
from dhrd_lib.__main__ import app
step = trainer.DHRDTrainer.training_step
def dies(self, *args, **kwargs):
    if self.state.global_step == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return step(self, *args, **kwargs)
if os.environ.get("DIES"):
    trainer.DHRDTrainer.training_step = dies
app(sys.argv[1:])
"""


def launch(folder: Path, plan: Grid | Search, **environment: str) -> subprocess.Popen:
    """Start to work on a grid or a search in folder/runs; DIES=1 kills the process in a run's third step."""
    plan.save(folder / "plan.json")
    command = ["sweep" if isinstance(plan, Grid) else "tune", folder / "plan.json", "--runs", folder / "runs"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **environment}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True, "env": environment}
    return subprocess.Popen([sys.executable, "-u", "-c", SCRIPT, *command], **pipes)


def finish(process: subprocess.Popen, code: int = 0) -> list[str]:
    """Wait for the end, and return the runs that the process trained, or resumed."""
    output, _ = process.communicate(timeout=100)
    assert process.returncode == code, output
    return re.findall(r"^(\S+) · train:", output, re.MULTILINE)


def record_trained(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return the list of runs whose training begins from now on; finished runs that are reused aren't in it."""
    begun, original = [], sweeps.train
    monkeypatch.setattr(sweeps, "train", lambda config, *args: begun.append(config.name) or original(config, *args))
    return begun
