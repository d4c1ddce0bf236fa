"""The quick profile, trained in a process of its own, which the page starts, watches and stops.

A process, because training draws from torch's one random generator: answers given meanwhile must not change a run.
It goes on when the browser is closed, and ends with the app. `python -m app.quick RUNS` is that process: it reads
configurations as a JSON list and writes a line a logged step.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Lock, Thread
from typing import Any

from dhrd_lib.config import RunConfig, WorkbenchError

_STOP_SECONDS = 10
_MARK = "progress: "  # tells the lines for the page from all else that training prints


@dataclass(frozen=True)
class Progress:
    """Where the training is: run `number` of `of`, at `step` of `steps` since `started` (seconds of the clock).

    `state` is "idle", "running", "done", "stopped" or "failed"; `message` says why it failed. `run` is empty until
    the run's first step is logged. `waiting` says that another process trains the run, and this one waits for it.
    """

    state: str = "idle"
    run: str = ""
    number: int = 0
    of: int = 0
    step: int = 0
    steps: int = 0
    loss: float | None = None
    started: float = 0.0
    message: str = ""
    waiting: bool = False

    @property
    def share(self) -> float:
        """The share of all steps that is done, 0 to 1; the runs count alike."""
        within = self.step / self.steps if self.steps else 0.0
        return (self.number - 1 + within) / self.of if self.number else 0.0


class Training:
    """One training process at most, and what it last said."""

    def __init__(self, root: Path) -> None:
        self.progress = Progress()
        self._root = root
        self._process: subprocess.Popen[str] | None = None
        self._lock = Lock()  # of progress and process
        self._changing = Lock()  # held while a process starts or ends

    @property
    def running(self) -> bool:
        """Whether a training is under way."""
        return self.progress.state == "running"

    def start(self, configs: Sequence[RunConfig]) -> None:
        """Start to train the runs that aren't finished; nothing where a training is under way already.

        One that is being stopped is waited for: both would write the same folders.
        """
        with self._changing:
            if self.running:
                return
            process = subprocess.Popen(
                [sys.executable, "-m", "app.quick", str(self._root)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            with self._lock:
                self._process = process
                self.progress = Progress("running", of=len(configs), started=time.time())
            process.stdin.write(json.dumps([config.to_dict() for config in configs]))
            process.stdin.close()
            Thread(target=self._watch, args=[process], daemon=True).start()

    def stop(self) -> None:
        """End the training; a later start goes on from its last checkpoint."""
        with self._changing:
            with self._lock:
                if not self.running:
                    return
                self.progress = replace(self.progress, state="stopped")
            self._process.terminate()
            try:
                self._process.wait(_STOP_SECONDS)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()

    def _watch(self, process: subprocess.Popen[str]) -> None:
        # Read apart, or a full pipe would hold the process up; the last line is the error's.
        errors: deque[str] = deque(maxlen=1)
        reader = Thread(target=lambda: errors.extend(filter(str.strip, process.stderr)), daemon=True)
        reader.start()
        for line in process.stdout:
            if line.startswith(_MARK):
                self._told(process, **json.loads(line.removeprefix(_MARK)))
        code = process.wait()
        reader.join()
        if code == 0:
            self._told(process, state="done")
        else:
            message = errors[0].strip() if errors else f"The process ended with {code}."
            self._told(process, state="failed", message=message)

    def _told(self, process: subprocess.Popen[str], **changes: Any) -> None:
        """Note what a process says, unless it was stopped; another may be running by now."""
        with self._lock:
            if self.running and process is self._process:
                self.progress = replace(self.progress, **changes)


def train_all(configs: Sequence[RunConfig], root: Path) -> None:
    """Train and compare as `python -m dhrd_lib compare` does, with a line of JSON for each logged step."""
    from dhrd_lib.studies.report import write_report

    done = [_train(config, number, root) for number, config in enumerate(configs, start=1)]
    write_report(done, root / "report.html")


def _train(config: RunConfig, number: int, root: Path) -> Any:
    from dhrd_lib.training import train

    def before_steps(waits: bool) -> None:
        _tell(run=config.name if waits else "", number=number, step=0, steps=0, loss=None, waiting=waits)

    before_steps(waits=False)
    return train(config, root, [_told_by_lines(config, number)], before_steps)


def _told_by_lines(config: RunConfig, number: int) -> Any:
    from transformers import TrainerCallback

    class Lines(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **_: Any) -> None:
            loss = {"loss": logs["loss"]} if "loss" in logs else {}
            _tell(run=config.name, number=number, step=state.global_step, steps=state.max_steps, **loss)

    return Lines()


def _tell(**progress: Any) -> None:
    """Write a line for the page; what else is printed may have left one open."""
    print(f"\n{_MARK}{json.dumps(progress)}", flush=True)


def main() -> None:
    """Train what stdin names in the folder that the first argument names."""
    try:
        train_all([RunConfig.from_dict(values) for values in json.load(sys.stdin)], Path(sys.argv[1]))
    except WorkbenchError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
