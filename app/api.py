"""The named endpoints: what the page does, for programs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict

import gradio as gr

from app import batch, stored
from app.backend import ZERO_SHOT, Backend
from app.batch import Inputs
from app.events import COMPUTE
from app.settings import MAX_NEW_TOKENS
from app.views import shown_error
from dhrd_lib.config import ConfigError, WorkbenchError


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
        """The stored runs: name, setting, task, labels, and the metrics of each split (fractions)."""
        return [
            {
                "run": run.name,
                "setting": run.config.training.setting,
                "task": run.config.data.task,
                "labels": run.metrics["label_names"],
                "splits": run.metrics["splits"],
            }
            for run in stored.usable_runs(self.root)
        ]

    def classify(self, run: str, texts: dict) -> dict:
        """One input, as texts by the task's field, by a run's pooled classifier.

        Returns label, probabilities by label, latency_ms and the tokens read, written and cut.
        """
        try:
            return asdict(self.backend.classify(run, texts))
        except WorkbenchError as error:
            raise shown_error(error) from error

    def classify_rows(self, run: str, rows: list[dict]) -> Iterator[dict]:
        """Many inputs by a run's pooled classifier, in their order.

        Streams rows_done; the last one has labels, probabilities (in the order of the run's labels), seconds,
        the time inside the calls, and inputs_cut, how many were too long and were cut at the front.
        """
        try:
            batch.check_rows(rows, "The list")
            task = stored.task_of(stored.find_run(self.root, run))
            runs = {"run": run}
            steps = batch.classify(self.backend, task, Inputs(rows, None), runs, lambda: False)
            for _, done, result in steps:  # noqa: B007 (the last one has the result)
                yield {"rows_done": done}
            labels = [task.label_names[place] for place in result.predictions("run")]
            yield {
                "labels": labels,
                "probabilities": result.probabilities["run"].round(6).tolist(),
                "seconds": result.seconds["run"],
                "inputs_cut": result.inputs_cut["run"],
            }
        except WorkbenchError as error:
            raise shown_error(error) from error

    def cot(
        self,
        task: str,
        texts: dict,
        run: str = ZERO_SHOT,
        max_new_tokens: int = MAX_NEW_TOKENS,
        beside: str | None = None,
    ) -> Iterator[dict]:
        """One input by CoT decoding: of a run that was taught to reason, or zero-shot on the task's backbone.

        Zero-shot, labels, fields and backbone are those of the run that it stands `beside`, or else of the task's
        first in `/runs`: several runs on one file may read other columns.

        Streams text, tokens and latency_ms; the last one has the answer. Cancelling the job stops the decoding.
        """
        try:
            if beside is not None:
                self._check_beside(beside, task, run)
            for step in self.backend.cot(task, run, texts, max_new_tokens, lambda: False, [beside]):
                yield asdict(step)
        except WorkbenchError as error:
            raise shown_error(error) from error

    def _check_beside(self, name: str, task: str, run: str) -> None:
        """Refuse what has no labels to give to zero-shot CoT on a task."""
        if run != ZERO_SHOT:
            raise ConfigError(f"beside is {name!r}, and run {run!r} has labels of its own; expected {ZERO_SHOT!r}.")
        found = stored.find_run(self.root, name).config.data.task
        if found != task:
            raise ConfigError(f"Run {name!r} was trained on {found!r}; expected one on {task!r}, the task asked.")

    def rationale(self, run: str, texts: dict) -> Iterator[dict]:
        """What a run's reasoning head writes about an input; its prediction doesn't depend on it.

        Streams text, tokens and latency_ms.
        """
        try:
            for step in self.backend.rationale(run, texts, lambda: False):
                yield asdict(step)
        except WorkbenchError as error:
            raise shown_error(error) from error
