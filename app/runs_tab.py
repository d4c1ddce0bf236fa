"""The Runs tab: stored runs as a table, their loss curves, a picked run's model card, and stored ablations."""

from __future__ import annotations

from typing import Any

import gradio as gr
import plotly.graph_objects as go

from app import stored, views
from app.card import model_card
from app.events import QUIET
from app.settings import Settings
from dhrd_lib.config import WorkbenchError
from dhrd_lib.runs import find_runs, read_runs

# What reading a run's folder raises where something else than training wrote it, or only a part.
_UNREADABLE = (AttributeError, LookupError, OSError, TypeError, ValueError)
_EMPTY = "No finished run is stored here yet."


class RunsTab:
    """The tab's components and what they do; read anew each time that the tab is opened."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.refresh = gr.Button("Read the folder again", size="sm")
        self.status = gr.HTML(elem_id="runs-status")
        self.table = gr.Dataframe(interactive=False, label="Runs by split", max_height=360, elem_id="runs-table")
        self.run = gr.Dropdown([], label="Run", filterable=False)
        with gr.Row(equal_height=False):
            with gr.Column(min_width=320):
                self.card = gr.HTML(elem_id="model-card")
            with gr.Column(min_width=320):
                self.curves = gr.Plot(label="Loss curves of the run and of the others of its task", visible=False)
        self.ablation = gr.Dropdown([], label="Stored ablation", filterable=False)
        self.ablation_status = gr.HTML(elem_id="ablation-status")
        self.ablation_figure = gr.Plot(label="The ablation's first factor", visible=False)
        self.ablation_table = gr.Dataframe(interactive=False, visible=False, label="Settings", max_height=420)
        self._connect()

    def connect_to(self, tab: gr.Tab) -> None:
        """Read the folder when the tab is opened."""
        tab.select(self._read, self.run, self._read_into, **QUIET)

    def _connect(self) -> None:
        self._read_into = [self.status, self.table, self.run, self.ablation, self.ablation_status]
        shown = [self.card, self.curves]
        self.refresh.click(self._read, self.run, self._read_into, **QUIET)
        self.run.change(self._on_run, self.run, shown, **QUIET)
        told = [self.ablation_status, self.ablation_figure, self.ablation_table]
        self.ablation.change(self._on_ablation, self.ablation, told, **QUIET)

    def _read(self, picked: str | None) -> list[Any]:
        runs, broken = read_runs(self.settings.runs)
        names = [run.name for run in runs]
        status = "".join(views.notice(sentence, "error") for sentence in [*broken, *stored.faults(runs)])
        if not names:
            status += views.notice(f"{_EMPTY} Train one with `make run`, or with the button above.", "empty")
        picked = picked if picked in names else next(iter(names), None)
        ablations = stored.ablation_files(self.settings.results)
        missing = "" if ablations else views.notice("No ablation's results are stored here yet.", "empty")
        return [
            status,
            gr.Dataframe(stored.runs_table(self.settings.runs), visible=bool(names)),
            gr.Dropdown(choices=names, value=picked, visible=bool(names)),
            gr.Dropdown(choices=ablations, value=next(iter(ablations), None), visible=bool(ablations)),
            missing,
        ]

    def _on_run(self, name: str | None) -> tuple[str, gr.Plot]:
        runs = {run.name: run for run in find_runs(self.settings.runs)}
        if name not in runs:
            return "", gr.Plot(visible=False)
        card, plot = "", gr.Plot(visible=False)
        try:
            card = model_card(runs[name])
        except _UNREADABLE as error:
            card = _told(name, "card", error)
        try:
            plot = gr.Plot(self._curves(list(runs.values()), name), visible=True)
        except _UNREADABLE as error:
            card += _told(name, "loss curves", error)
        return card, plot

    def _curves(self, runs: list[Any], name: str) -> go.Figure:
        """The run's curves beside those of its task that share its seed, one a setting."""
        own = next(run for run in runs if run.name == name)
        settings = {own.config.training.setting: own}
        for run in runs:
            same = run.config.data.task == own.config.data.task and _seed(run) == _seed(own)
            if same and _has_history(run):
                settings.setdefault(run.config.training.setting, run)
        return stored.loss_figure(list(settings.values()))

    def _on_ablation(self, name: str | None) -> tuple[Any, gr.Plot, gr.Dataframe]:
        hidden = gr.Plot(visible=False), gr.Dataframe(visible=False)
        if not name:
            return gr.skip(), *hidden
        try:
            table = stored.ablation_table(self.settings.results, name)
            figure = stored.ablation_figure(self.settings.results, name)
        except (WorkbenchError, OSError) as error:
            return views.notice(str(error), "error"), *hidden
        return "", gr.Plot(figure, visible=True), gr.Dataframe(table, visible=True)


def _told(name: str, what: str, error: Exception) -> str:
    reason = str(error) if isinstance(error, WorkbenchError) else f"{type(error).__name__}: {error}."
    return views.notice(f"Run {name!r} has no {what}: {reason}", "error")


def _has_history(run: Any) -> bool:
    try:
        return "step" in run.history
    except WorkbenchError:
        return False


def _seed(run: Any) -> int:
    return run.config.training.seed
