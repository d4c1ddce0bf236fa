"""Progress: one line that follows a long task, in a terminal, a notebook or a log."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Self

from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text
from transformers import TrainerCallback, TrainerState, TrainingArguments
from transformers.utils import logging


class Progress:
    """Follows a task: rewrites one line in a terminal or a notebook, and adds one to a log every 30 seconds.

    `with Progress("states", "row") as progress: progress.update(done, total)`
    """

    def __init__(self, title: str, unit: str) -> None:
        self.title, self.unit, self._line = title, unit, ""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: Any) -> None:
        if self._line:
            if not self._is_shown:
                self._show()
            if self._live:
                self._live.stop()

    def update(self, done: int, total: int, note: str = "") -> None:
        """Show that `done` units of `total` are done, with what is noted of them and the time that is left."""
        now = time.monotonic()
        if not self._line:
            self._open()
            # A resumed task starts later than at 0.
            self._started, self._first, self._shown_at = now, done, now
        seconds = now - self._started
        if done < total:
            rate = (done - self._first) / max(seconds, 1e-9)
            left = f"{_minutes((total - done) / rate)} left" if rate else ""
        else:
            left = _minutes(seconds)
        self._share = done / total
        self._line = " · ".join(filter(None, [f"{self.title}: {self.unit} {done:,} of {total:,}", left, note]))
        self._is_shown = now - self._shown_at >= self._seconds_between
        if self._is_shown:
            self._show()
            self._shown_at = now

    def _open(self) -> None:
        console, self._live, self._handle = Console(), None, None
        self._seconds_between = 0.2
        if console.is_jupyter:
            from IPython.display import display

            self._handle = display({"text/plain": self.title}, raw=True, display_id=True)
        # Processes that share a terminal, such as a sweep's workers, write lines.
        elif console.is_interactive and multiprocessing.parent_process() is None:
            self._live = Live(console=console, auto_refresh=False)
            self._live.start()
        else:
            self._seconds_between = 30.0

    def _show(self) -> None:
        if self._handle:  # An ordinary output, which a saved notebook keeps.
            self._handle.update({"text/plain": self._line}, raw=True)
        elif self._live:
            row = Table.grid(padding=(0, 1))
            row.add_row(ProgressBar(1.0, self._share, width=20), Text(self._line))
            self._live.update(row, refresh=True)
        else:
            print(self._line, flush=True)


class TrainingProgress(TrainerCallback):
    """Shows the step, both losses, dev's metric and the time left, in place of transformers' bars and logs."""

    def __init__(self, progress: Progress) -> None:
        self._progress, self._notes = progress, {}

    def on_log(self, args: TrainingArguments, state: TrainerState, *_: Any, logs: dict, **kwargs: Any) -> None:
        labels = {"class_loss": "class loss", "lm_loss": "LM loss", args.metric_for_best_model: "dev"}
        self._notes |= {label: f"{label} {logs[name]:.3f}" for name, label in labels.items() if name in logs}

    def on_step_end(self, args: TrainingArguments, state: TrainerState, *_: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            self._progress.update(state.global_step, state.max_steps, " · ".join(self._notes.values()))


@contextmanager
def without_transformers_bars() -> Iterator[None]:
    """Hide transformers' bars of loading and writing weights; those of downloads stay."""
    previous = logging.set_tqdm_hook(lambda _, args, kwargs: logging.EmptyTqdm(*args, **kwargs))
    try:
        yield
    finally:
        logging.set_tqdm_hook(previous)


def _minutes(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"
