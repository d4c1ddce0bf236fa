"""Progress: one line that follows a long task, in a terminal, a notebook or a log."""

from __future__ import annotations

import multiprocessing
import time

from rich.console import Console


class Progress:
    """Follows a task: rewrites one line in a terminal or a notebook, and adds one to a log every 30 seconds.

    `with closing(Progress("states", "row")) as progress: progress.update(done, total)`
    """

    def __init__(self, title: str, unit: str) -> None:
        self.title, self.unit, self._line = title, unit, ""

    def update(self, done: int, total: int, note: str = "") -> None:
        """Show that `done` units of `total` are done, with what is noted of them and the time that is left."""
        now = time.monotonic()
        if not self._line:
            self._open()
            self._started, self._first, self._shown_at = now, done, now  # A resumed task starts later than at 0.
        seconds, new = now - self._started, done - self._first
        left = f"{_minutes(seconds / new * (total - done))} left" if new else ""
        left = left if done < total else _minutes(seconds)
        self._line = " · ".join(filter(None, [f"{self.title}: {self.unit} {done:,} of {total:,}", left, note]))
        if now - self._shown_at >= self._seconds_between and done < total:  # The last line is shown at the end.
            self._show(self._line, "")
            self._shown_at = now

    def close(self) -> None:
        """Show the last line, if there is one."""
        if self._line:
            self._show(self._line, "\n")

    def _open(self) -> None:
        console, self._seconds_between = Console(), 0.2
        if console.is_jupyter:  # An ordinary output, which a saved notebook keeps.
            from IPython.display import display

            handle = display({"text/plain": self.title}, raw=True, display_id=True)
            self._show = lambda line, end: handle.update({"text/plain": line}, raw=True)
        # Processes that share a terminal, such as a sweep's workers, write lines.
        elif console.is_interactive and multiprocessing.parent_process() is None:
            self._show = lambda line, end: print(f"\r\x1b[K{line[: console.width - 1]}", end=end, flush=True)
        else:
            self._show, self._seconds_between = lambda line, end: print(line, flush=True), 30.0


def _minutes(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"
