"""The panel above the tabs: trains the quick comparison where there is no run, and shows its progress.

Training is a separate process, `python -m dhrd_lib compare`: it and answers would share torch's one random
generator. Its progress is read from the runs' folders. It outlives the browser, and ends with the app.
"""

from __future__ import annotations

import asyncio
import atexit
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from threading import Lock
from typing import IO, Any

import gradio as gr

from app import html
from app import runs as stored
from app.events import QUIET
from app.settings import Settings
from app.tabs.compare import CompareTab
from dhrd_lib.config import RunConfig
from dhrd_lib.studies.comparison import comparison

_NO_RUNS = (
    "There is no trained run here yet, so the pooled baseline and DHRD can't predict. Train both on support_triage "
    "(about 25 minutes on two CPU cores), or name another folder in DHRD_RUNS. Zero-shot CoT answers meanwhile."
)
_POLL_SECONDS, _STOP_SECONDS = 1.0, 10


def read_progress(root: Path, configs: Sequence[RunConfig]) -> tuple[float, str]:
    """Return the share of all epochs that is done, and what goes on, of runs trained one after the other."""
    for done, config in enumerate(configs):
        if (root / config.name / "metrics.json").is_file():
            continue
        history = root / config.name / "history.jsonl"
        # Training appends whole lines; the last may be incomplete.
        lines = history.read_text(encoding="utf-8").splitlines(keepends=True) if history.is_file() else []
        log = {key: value for line in lines if line.endswith("\n") for key, value in json.loads(line).items()}
        if not log:
            return done / len(configs), "Training starts: reading the data, loading the backbone"
        where = f"Training run {done + 1} of {len(configs)}: {config.name}, step {log['step']}"
        loss = f", loss {log['loss']:.3f}" if "loss" in log else ""
        return (done + min(log["epoch"] / config.training.epochs, 1.0)) / len(configs), where + loss
    return 1.0, "Writing the report"


class Training:
    """One training process at most; `state` is "idle", "running", "done", "stopped" or "failed"."""

    def __init__(self, root: Path, configs: Sequence[RunConfig], command: Sequence[str]) -> None:
        self.root, self.configs, self.command = root, configs, command
        self._process: subprocess.Popen | None = None
        self._errors: IO[bytes] | None = None
        self._stopped = False
        self._started = (0.0, 0.0)  # seconds of the clock, and the share that was done by then
        self._changing = Lock()  # held while a process starts or ends

    @property
    def state(self) -> str:
        """The state of the process."""
        if self._process is None:
            return "idle"
        code = self._process.poll()
        if code is None:
            return "running"
        return "stopped" if self._stopped else "failed" if code else "done"

    def start(self) -> None:
        """Train the runs that aren't finished, unless a training is running; waits for one that is stopping."""
        with self._changing:
            if self.state != "running":
                self._stopped = False
                self._errors = tempfile.NamedTemporaryFile()  # noqa: SIM115 (read if the process fails)
                self._started = (time.time(), read_progress(self.root, self.configs)[0])
                self._process = subprocess.Popen(self.command, stdout=subprocess.DEVNULL, stderr=self._errors)

    def stop(self) -> None:
        """End the training; a later start resumes from its last checkpoint."""
        with self._changing:
            if self.state == "running":
                self._stopped = True
                self._process.terminate()
                try:
                    self._process.wait(_STOP_SECONDS)
                except subprocess.TimeoutExpired:
                    self._process.kill()
                    self._process.wait()

    def status(self) -> str:
        """Return the progress bar, or how the training ended, as HTML; nothing before the first start."""
        if self.state == "running":
            share, message = read_progress(self.root, self.configs)
            started, share_before = self._started
            left = ""
            if share - share_before > 0.02:
                minutes = (time.time() - started) / 60 * (1 - share) / (share - share_before)
                left = f", about {max(round(minutes), 1)} min left"
            message += f". {share:.0%} of all epochs{left}. Latencies are longer meanwhile."
            return html.progress_bar(share, "Training", message)
        if self.state == "failed":
            lines = Path(self._errors.name).read_text(encoding="utf-8", errors="replace").splitlines()
            reason = next((line for line in reversed(lines) if line.strip()), "no message")
            return html.notice(f"The training failed: {reason}", "error")
        ended = {"done": "The training is done.", "stopped": "The training was stopped; a new start resumes it."}
        return html.notice(ended[self.state]) if self.state in ended else ""


class TrainingPanel:
    """Shown where there is no run, and while one is trained."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        command = [sys.executable, "-m", "dhrd_lib", "compare", "--profile", "quick", "--runs", str(settings.runs)]
        self.training = Training(settings.runs, comparison("quick"), command)
        atexit.register(self.training.stop)
        with gr.Column(visible=not stored.usable_runs(settings.runs), elem_id="training") as self.panel:
            self.notice = gr.HTML(html.notice(_NO_RUNS))
            with gr.Row(elem_classes="actions"):
                self.start = gr.Button("Train the quick comparison", variant="primary", min_width=280)
                self.stop = gr.Button("Stop training", variant="stop", interactive=False, min_width=160)
            self.bar = gr.HTML(elem_id="training-progress")

    def connect(self, page: gr.Blocks, compare: CompareTab) -> None:
        """Start, stop and watch; a page that is opened during training watches it too."""
        outputs = [self.panel, self.start, self.stop, self.bar]
        # Watching costs nothing, so any number may watch, outside the queue's one computation at a time.
        watching = {"api_visibility": "private", "show_progress": "hidden", "concurrency_limit": None}
        refresh = (compare.refreshed, compare.task, [compare.task, *compare.runs.values()])
        started = self.start.click(self.training.start, None, None, **QUIET)
        started.then(self._watch, None, outputs, **watching).then(*refresh, **QUIET)
        self.stop.click(self.training.stop, None, None, **QUIET).then(self._shown, None, outputs, **QUIET)
        page.load(*refresh, **QUIET)
        page.load(self._watch, None, outputs, **watching)

    async def _watch(self) -> AsyncIterator[list[Any]]:
        while self.training.state == "running":
            yield self._shown()
            await asyncio.sleep(_POLL_SECONDS)
        yield self._shown()

    def _shown(self) -> list[Any]:
        running = self.training.state == "running"
        needed = self.training.state != "idle" or not stored.usable_runs(self.settings.runs)
        return [
            gr.Column(visible=needed),
            gr.Button(interactive=not running),
            gr.Button(interactive=running),
            self.training.status(),
        ]
