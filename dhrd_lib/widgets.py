"""Widgets: ipywidgets panels for the notebooks."""

from __future__ import annotations

import html
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import ipywidgets as widgets
import pandas as pd
import plotly.graph_objects as go
from datasets import Dataset
from IPython.display import HTML, DisplayHandle, display
from transformers import TrainerCallback, TrainerState

from dhrd_lib.config import WorkbenchError
from dhrd_lib.rationales import FLAGS, TeacherConfig, flags, select, store_for
from dhrd_lib.sequences import IGNORE_INDEX, SequenceFormat
from dhrd_lib.studies import plots, tables
from dhrd_lib.tasks import Task


class _Output:
    """An ordinary output that can be replaced: a saved notebook shows its last state without a kernel.

    JupyterLab ignores an update of a plotly figure in place (plotly.py issue 3053), so a placeholder of the same
    height goes between two figures.
    """

    def __init__(self) -> None:
        self._handle: DisplayHandle | None = None

    def show(self, content: go.Figure | str) -> None:
        is_figure = isinstance(content, go.Figure)
        bundle = content._repr_mimebundle_() if is_figure else {"text/html": content}
        if self._handle is None:
            self._handle = display(bundle, raw=True, display_id=True)
            return
        if is_figure:
            self._handle.update({"text/html": f"<div style='height: {content.layout.height}px'></div>"}, raw=True)
        self._handle.update(bundle, raw=True)


class LiveLossCurves(TrainerCallback):
    """Draws `plots.loss_curves` while `train` runs: pass it as `train(config, callbacks=[LiveLossCurves()])`."""

    def __init__(self, seconds_between: float = 2.0) -> None:
        self.seconds_between = seconds_between
        self.figure: go.Figure | None = None
        self._output, self._drawn_at = _Output(), float("-inf")

    def on_log(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        if time.monotonic() - self._drawn_at >= self.seconds_between:
            self.on_train_end(args, state, control)

    def on_train_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        if state.log_history and state.is_world_process_zero:
            history = pd.DataFrame(state.log_history)
            setting = "DHRD" if "lm_loss" in history else "pooled baseline"
            self.figure = plots.loss_curves(history.assign(setting=setting, name="this run"))
            self._output.show(self.figure)
            self._drawn_at = time.monotonic()


_SPAN_COLORS = {
    "input": "rgba(0, 114, 178, .28)",
    "rationale": "rgba(230, 159, 0, .32)",
    "label": "rgba(0, 158, 115, .38)",
    "pad": "rgba(125, 130, 138, .18)",
}


def colored_tokens(fmt: SequenceFormat, row: Mapping[str, Any], verbalizer: str | None, length: int) -> HTML:
    """Render one encoded row token by token, colored by span and padded to `length` as in a batch.

    `row` is of `encode_example`, `verbalizer` its label text (None where it has none). The input's last token,
    which "last" pooling reads, is framed; the targets of the LM head are underlined.
    """
    ids, n_input = row["input_ids"], row["input_length"]
    n_label, n_pad = len(fmt.encode_label(verbalizer)) if verbalizer else 0, max(length - len(ids), 0)
    counts = {"input": n_input, "rationale": len(ids) - n_input - n_label, "label": n_label, "pad": n_pad}
    colors = {span: f"background: {color}; padding: 2px" for span, color in _SPAN_COLORS.items()}
    styles = [colors[span] for span, count in counts.items() for _ in range(count)]
    styles[n_input - 1] += "; outline: 2px solid #D55E00; font-weight: bold"
    for place, target in enumerate(row["lm_labels"]):
        styles[place] += "; border-bottom: 2px solid gray" if target != IGNORE_INDEX else ""
    texts = [fmt.tokenizer.decode([token]).replace("\n", "↵") for token in ids] + ["pad"] * n_pad
    body = (f"<span style='{of}'>{html.escape(text)}</span>" for of, text in zip(styles, texts, strict=True))
    legend = (f"<span style='{colors[span]}'>{span}: {count}</span>" for span, count in counts.items())
    head = f"<p>{' '.join(legend)} framed: pooled, underlined: LM target</p>"
    style = "line-height: 2; font-family: monospace; white-space: pre-wrap"
    return HTML(f"{head}<div style='{style}'>{''.join(body)}</div>")


class _Panel:
    """Choices by name, and below them what `draw` makes of their values, again when one changes."""

    def __init__(self, draw: Callable[..., go.Figure | str], choices: Mapping[str, Sequence]) -> None:
        self._draw = draw
        self.controls = {name: widgets.Dropdown(options=of, description=name) for name, of in choices.items()}

    def drawn(self) -> go.Figure | str:
        """Return the figure or page of the controls' values."""
        return self._draw(**{name: control.value for name, control in self.controls.items()})

    def _ipython_display_(self) -> None:
        display(_toolbar(*self.controls.values()))
        output = _Output()
        output.show(self.drawn())
        for control in self.controls.values():
            control.observe(lambda _: output.show(self.drawn()), names="value")


class RowBrowser(_Panel):
    """Rows as cards of their columns, filtered by the values of some of them, one page at a time."""

    def __init__(self, rows: pd.DataFrame, filters: Sequence[str] = (), per_page: int = 3) -> None:
        def draw(page: int, **values: str) -> str:
            chosen = rows
            for column, value in values.items():
                chosen = chosen if value == "all" else chosen[chosen[column] == value]
            n_pages = max(math.ceil(len(chosen) / per_page), 1)
            last = min(page, n_pages) * per_page
            cards = map(_card, chosen.iloc[last - per_page : last].to_dict("records"))
            return f"<p>{len(chosen)} of {len(rows)} rows in {n_pages} pages</p>{''.join(cards)}"

        super().__init__(draw, {name: ["all", *sorted(set(rows[name]))] for name in filters})
        self.controls["page"] = widgets.BoundedIntText(1, min=1, max=max(len(rows), 1), description="page")


class AblationDashboard(_Panel):
    """The runs of an ablation by metric, task, split, factor and line; hover shows the run.

    `table` is that of an `AblationResult`. A field that is neither factor nor line is held at the value with which
    most values of the factor were run.
    """

    def __init__(self, table: pd.DataFrame) -> None:
        factors = [(name.replace("_", " "), name) for name in tables.factors(table)]
        splits = sorted(dict.fromkeys(table["split"]), key=lambda split: split == "dev")

        def draw(metric: str, task: str, split: str, factor: str, line: str | None) -> go.Figure:
            rows = tables.one_factor(table[(table["split"] == split) & (table["task"] == task)], factor, line)
            summary = tables.summarize(rows, [factor, "series"], [metric])
            return plots.factor_effect(summary, tables.by_seed(rows, [metric]), factor, metric)

        choices = {"metric": [("accuracy", "accuracy"), ("macro f1", "macro_f1")]}
        choices |= {"task": list(dict.fromkeys(table["task"])), "split": splits, "factor": factors}
        super().__init__(draw, choices | {"line": [*factors[1:], ("none", None), *factors[:1]]})


class ReviewPanel(widgets.VBox):
    """Pages through the rationales of a split with input, gold and flags, to accept, reject or edit them.

    A verdict goes to the store as a new record that keeps the teacher's text; `select` takes it from there.
    """

    def __init__(self, task: Task, dataset: Dataset, config: TeacherConfig, folder: str | Path) -> None:
        self._store, records = store_for(task, config, folder), select(task, dataset, config, folder)
        golds = [task.verbalizers[label] for label in dataset["label"]]
        rows = zip(records, dataset["input_text"], golds, strict=True)
        self._rows = [list(row) for row in rows if row[0]]  # the arguments of `flags`
        self.choice = widgets.Dropdown(options=["all", "flagged", "not reviewed"], description="show")
        self.choice.observe(lambda _: self._show(0), names="value")
        self.row, self.message = widgets.HTML(), widgets.HTML()
        self.words = widgets.Textarea(layout={"width": "100%", "height": "8em"})
        actions = {
            "Previous": lambda _: self._show(self._page - 1),
            "Next": lambda _: self._show(self._page + 1),
            "Accept": lambda _: self._review("accept"),
            "Reject": lambda _: self._review("reject"),
            "Save the edit": lambda _: self._review("edit"),
        }
        self.buttons = {name: widgets.Button(description=name) for name in actions}
        for name, action in actions.items():
            self.buttons[name].on_click(action)
        super().__init__([_toolbar(self.choice, *self.buttons.values()), self.row, self.words, self.message])
        self._show(0)

    def _show(self, page: int) -> None:
        choice = self.choice.value
        rows = [row for row in self._rows if choice != "flagged" or flags(*row)]
        rows = [row for row in rows if choice != "not reviewed" or row[0].review is None]
        for button in self.buttons.values():
            button.disabled = not rows
        self._page, self.message.value = max(min(page, len(rows) - 1), 0), ""
        self.row.value, self.words.value = "No rationale to show.", ""
        if rows:
            self._row = rows[self._page]
            record, input_text, gold = self._row
            sections = {
                f"{self._page + 1} of {len(rows)}, idx {record.idx}": input_text,
                "Gold": gold,
                "Flags": "\n".join(f"{name}: {FLAGS[name]}" for name in flags(*self._row)),
                "Review": record.review,
                "The teacher's text": record.original,
            }
            self.row.value, self.words.value = _card(sections), record.rationale

    def _review(self, verdict: str) -> None:
        record, text = self._row[0], self.words.value
        if verdict == "accept" and text.strip() != record.rationale:
            verdict = "edit"  # or the new text would be lost
        try:
            self._row[0] = self._store.review(record, verdict, text)
        except (WorkbenchError, OSError) as error:
            self.message.value = html.escape(str(error))
        else:
            self._show(self._page)


def _toolbar(*controls: widgets.Widget) -> widgets.HBox:
    return widgets.HBox(controls, layout={"flex_flow": "row wrap"})


def _card(sections: Mapping[str, Any]) -> str:
    """Return titles and texts as HTML in a frame; a missing text (None, NaN, empty) is "none"."""
    style = "border: 1px solid gray; border-radius: 4px; padding: .6em; margin: .5em 0; white-space: pre-wrap"
    texts = {title: str(text) if text and text == text else "none" for title, text in sections.items()}
    parts = (f"<b>{html.escape(title)}</b>\n{html.escape(text)}\n" for title, text in texts.items())
    return f"<div style='{style}'>{''.join(parts)}</div>"
