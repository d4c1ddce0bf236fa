"""The panel above the tabs: says that there is no trained run, trains the quick profile, shows how far it is."""

from __future__ import annotations

import asyncio
import atexit
from collections.abc import AsyncIterator
from typing import Any

import gradio as gr

from app import stored, views
from app.compare_tab import CompareTab
from app.events import QUIET
from app.quick import Training
from app.settings import Settings
from dhrd_lib.__main__ import comparison

_NO_RUNS = (
    "There is no trained run here yet, so the pooled baseline and DHRD can't answer. Train both on support_triage "
    "(about 25 minutes on two CPU cores), or name another folder in DHRD_RUNS. Zero-shot CoT answers meanwhile."
)
_LOOK_SECONDS = 1.0


class TrainingPanel:
    """Shown where there is no run, and while one is trained."""

    def __init__(self, settings: Settings) -> None:
        self.settings, self.training = settings, Training(settings.runs)
        atexit.register(self.training.stop)
        with gr.Column(visible=self._needed, elem_id="training") as self.panel:
            self.notice = gr.HTML(views.notice(_NO_RUNS))
            with gr.Row(elem_classes="actions"):
                self.start = gr.Button("Train the quick comparison", variant="primary", min_width=200)
                self.stop = gr.Button("Stop training", variant="stop", interactive=False, min_width=140)
            self.bar = gr.HTML(elem_id="training-progress")

    @property
    def _needed(self) -> bool:
        return self.training.running or not stored.usable_runs(self.settings.runs)

    def connect(self, page: gr.Blocks, compare: CompareTab) -> None:
        """Start, stop and watch; a page that is opened while training goes on watches it too."""
        shown = [self.panel, self.start, self.stop, self.bar]
        # Waiting for a second costs nothing, so any number may watch, and none of them stands in the line.
        watching = {"api_visibility": "private", "show_progress": "hidden", "concurrency_limit": None}
        refresh = (compare.refreshed, compare.task, compare.pickers)
        self.start.click(self._start, None, shown, **QUIET).then(self._watch, None, shown, **watching).then(
            *refresh, **QUIET
        )
        self.stop.click(self._stop, None, shown, **QUIET)
        page.load(*refresh, **QUIET)
        page.load(self._watch, None, shown, **watching)

    def _start(self) -> list[Any]:
        self.training.start(comparison("quick"))
        return self._shown()

    def _stop(self) -> list[Any]:
        self.training.stop()
        return self._shown()

    async def _watch(self) -> AsyncIterator[list[Any]]:
        while self.training.running:
            yield self._shown()
            await asyncio.sleep(_LOOK_SECONDS)
        yield self._shown()

    def _shown(self) -> list[Any]:
        running = self.training.running
        told = self._needed or self.training.progress.state in ("done", "failed", "stopped")
        return [
            gr.Column(visible=told),
            gr.Button(interactive=not running),
            gr.Button(interactive=running),
            views.progress(self.training.progress),
        ]
