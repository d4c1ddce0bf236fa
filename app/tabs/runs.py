"""The Runs tab: stored runs as a table, a picked run's model card and loss curves, and stored ablations."""

from __future__ import annotations

from typing import Any

import gradio as gr
import plotly.graph_objects as go

from app import html
from app import runs as stored
from app.events import QUIET
from app.settings import Settings
from dhrd_lib.runs import Run, find_runs
from dhrd_lib.studies.tables import factors

_PURPOSE = {
    "pooled baseline": "A decoder with a pooled classifier, trained on labels alone (alpha = 0).",
    "privileged pooling": "A pooled classifier, taught by one that reads a teacher's rationales (alpha = 0).",
    "DHRD": "A decoder with a pooled classifier, trained jointly with its LM head on a teacher's rationales.",
    "reasoning only": "A decoder whose LM head was trained on rationales (beta = 0); it answers by CoT decoding.",
}
_LIMITS = (
    "The figures are those of one seed. Their intervals are bootstraps over rows and don't cover other seeds.",
    "The model was evaluated on the splits above alone; on other domains and languages it may do worse.",
    "A rationale of the reasoning head is generated post hoc and may be wrong where the prediction is right.",
)
_MODEL = ("backbone", "pooling", "head", "finetune", "freeze_layers")
_DATA = ("task", "alignment", "max_input_tokens", "max_rationale_tokens")
_TRAINING = ("alpha", "beta", "alpha_schedule", "lm_span", "epochs", "batch_size", "learning_rate", "seed")
_ENVIRONMENT = ("python", "system", "processor", "device", "git_commit", "torch", "transformers")


def model_card(run: Run) -> str:
    """Return a run's card as HTML: purpose, figures with intervals, training, data, environment, limits."""
    config, metrics = run.config.to_dict(), run.metrics
    environment = {**run.environment, **run.environment["packages"]}
    rows = {f"rows of {split}": report["rows"] for split, report in metrics["sequences"].items()}
    totals = {
        "steps (best)": f"{metrics['steps']} ({metrics['best_step']})",
        "time": f"{metrics['train_seconds']:,.0f} s",
        "tokens": f"{metrics['train_tokens']:,}",
    }
    sections = {
        "Model": {name: config["model"][name] for name in _MODEL},
        "Data": {name: config["data"][name] for name in _DATA} | rows,
        "Training": {name: config["training"][name] for name in _TRAINING} | totals,
        "Environment": {name: environment.get(name, "unknown") for name in _ENVIRONMENT},
    }
    return (
        f'<article class="model-card"><h3>{html.text(run.name)}</h3>'
        f"<p>{html.text(_PURPOSE[run.config.training.setting])}</p>"
        f"{html.table(stored.metrics_by_split(run), 'Metrics by split; dev selected the checkpoint')}"
        f"{''.join(html.definitions(title, values) for title, values in sections.items())}"
        f"<h4>Limits</h4><ul>{''.join(f'<li>{html.text(limit)}</li>' for limit in _LIMITS)}</ul></article>"
    )


class RunsTab:
    """The tab's components and events; the folders are read each time that the tab is opened."""

    def __init__(self, settings: Settings, tab: gr.Tab) -> None:
        self.settings = settings
        self.refresh = gr.Button("Refresh", size="sm")
        self.status = gr.HTML(elem_id="runs-status")
        self.table = gr.Dataframe(interactive=False, label="Runs by split", max_height=360, elem_id="runs-table")
        self.run = gr.Dropdown([], label="Run", filterable=False)
        with gr.Row(equal_height=False):
            with gr.Column(min_width=320):
                self.card = gr.HTML(elem_id="model-card")
            with gr.Column(min_width=320):
                self.curves = gr.Plot(label="Loss: lines training, marks dev", visible=False)
        self.ablation = gr.Dropdown([], label="Stored ablation", filterable=False)
        self.ablation_status = gr.HTML(elem_id="ablation-status")
        self.ablation_figure = gr.Plot(label="Means with 95% intervals, a mark per run", visible=False)
        self.ablation_table = gr.Dataframe(interactive=False, visible=False, label="Settings", max_height=420)
        listed = [self.status, self.table, self.run, self.ablation, self.ablation_status]
        gr.on([tab.select, self.refresh.click], self._read, self.run, listed, **QUIET)
        self.run.change(self._on_run, self.run, [self.card, self.curves], **QUIET)
        self.ablation.change(self._on_ablation, self.ablation, [self.ablation_figure, self.ablation_table], **QUIET)

    def _read(self, picked: str | None) -> list[Any]:
        unreadable: list[str] = []
        names = [run.name for run in find_runs(self.settings.runs, unreadable.append)]
        status = "".join(html.notice(sentence, "error") for sentence in unreadable)
        if not names:
            status += html.notice("No finished run yet. Train one with `make run` or the button above.", "empty")
        picked = picked if picked in names else next(iter(names), None)
        ablations = stored.ablation_files(self.settings.results)
        missing = "" if ablations else html.notice("No ablation's results are stored here yet.", "empty")
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
        return model_card(runs[name]), _plot(stored.loss_figure(runs[name], runs.values()))

    def _on_ablation(self, name: str | None) -> tuple[gr.Plot, gr.Dataframe]:
        if not name:
            return gr.Plot(visible=False), gr.Dataframe(visible=False)
        result = stored.ablation(self.settings.results, name)
        figure = result.plot(*factors(result.table)[:2])
        return _plot(figure), gr.Dataframe(stored.ablation_table(result), visible=True)


def _plot(figure: go.Figure) -> gr.Plot:
    """Return a figure without its title, which a phone cuts off; the component's label takes its place."""
    return gr.Plot(figure.update_layout(title_text=None, margin_t=100), visible=True)
