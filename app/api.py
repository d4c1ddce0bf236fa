"""The named endpoints: what the page does, for programs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict

import gradio as gr

from app import runs as stored
from app.backend import ZERO_SHOT, Backend
from app.events import COMPUTE
from app.settings import MAX_NEW_TOKENS
from dhrd_lib.config import ConfigError, WorkbenchError


@contextmanager
def _plain_errors() -> Iterator[None]:
    """Answer a `WorkbenchError` with its sentence, as plain text: programs read it, not a page."""
    try:
        yield
    except WorkbenchError as error:
        raise gr.Error(str(error), print_exception=False) from error


class Api:
    """Functions whose results are plain JSON. Times are in ms, inside the call."""

    def __init__(self, backend: Backend) -> None:
        self.backend, self.root = backend, backend.settings.runs

    def register(self) -> None:
        """Make them endpoints of the `gr.Blocks` that is being built."""
        gr.api(self.runs, api_name="runs", queue=False)
        for function in (self.classify, self.classify_rows, self.cot, self.rationale):
            gr.api(function, api_name=function.__name__, **COMPUTE)

    def runs(self) -> list[dict]:
        """The stored runs: name, setting, task, labels, and the metrics of each split (fractions).

        A run with beta = 0 ("reasoning only") has no metrics: it answers by CoT decoding.
        """
        return [
            {
                "run": run.name,
                "setting": run.config.training.setting,
                "task": run.config.data.task,
                "labels": run.label_names,
                "splits": run.metrics["splits"],
            }
            for run in stored.usable_runs(self.root)
        ]

    def classify(self, run: str, texts: dict) -> dict:
        """One input, as texts by the task's field, by a run's pooled classifier.

        Returns label, probabilities by label, latency_ms and the tokens read, written and cut.
        """
        with _plain_errors():
            return asdict(self.backend.classify(run, texts))

    def classify_rows(self, run: str, rows: list[dict]) -> Iterator[dict]:
        """Many inputs by a run's pooled classifier, in their order.

        Streams rows_done; the last one has labels, probabilities (in the order of the run's labels), seconds,
        the time inside the calls, and inputs_cut, how many were truncated.
        """
        with _plain_errors():
            for done in self.backend.classify_rows(run, rows):
                yield {"rows_done": len(done.predictions.labels)}
        yield {
            "labels": done.predictions.labels,
            "probabilities": done.predictions.probabilities.round(6).tolist(),
            "seconds": done.seconds,
            "inputs_cut": done.inputs_cut,
        }

    def cot(
        self,
        task: str,
        texts: dict,
        run: str = ZERO_SHOT,
        max_new_tokens: int = MAX_NEW_TOKENS,
        beside: str | None = None,
    ) -> Iterator[dict]:
        """One input by CoT decoding: of a run that was trained to reason, or zero-shot on the task's backbone.

        Zero-shot, labels, fields and backbone come from the run `beside`, or else from the task's first run: those
        on one file may read other columns.

        Streams text, tokens and latency_ms; the last one has the answer. Cancelling the job stops the decoding.
        """
        with _plain_errors():
            if beside is not None and run != ZERO_SHOT:
                problem = f"beside is {beside!r}, and run {run!r} has labels of its own"
                raise ConfigError(f"{problem}; expected {ZERO_SHOT!r} as run, or no beside.")
            if beside is not None and (other := stored.find_run(self.root, beside).config.data.task) != task:
                raise ConfigError(f"Run {beside!r} was trained on {other!r}; expected one on {task!r}.")
            for step in self.backend.cot(task, run, texts, max_new_tokens, lambda: False, [beside]):
                yield asdict(step)

    def rationale(self, run: str, texts: dict) -> Iterator[dict]:
        """The rationale that a run's reasoning head generates; its prediction doesn't depend on it.

        Streams text, tokens and latency_ms.
        """
        with _plain_errors():
            for step in self.backend.rationale(run, texts, lambda: False):
                yield asdict(step)
