"""Widgets: ipywidgets panels for the notebooks."""

from __future__ import annotations

import html
import time
from abc import ABC, abstractmethod
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
from dhrd_lib.rationales import FLAGS, Filters, TeacherConfig, flags, quality_report, select, store_for
from dhrd_lib.runs import Run
from dhrd_lib.sequences import IGNORE_INDEX, SequenceFormat
from dhrd_lib.studies import plots, tables
from dhrd_lib.tasks import Task


class ReviewPanel(widgets.VBox):
    """Pages through the rationales of a split: input, gold, rationale and flags; accept, reject or edit.

    A verdict goes to the store as a new record that keeps the teacher's text; `select` takes it from there. Rows
    without a rationale aren't shown.
    """

    def __init__(
        self,
        task: Task,
        dataset: Dataset,
        config: TeacherConfig,
        folder: str | Path = "rationales",
        filters: Filters | None = None,
    ) -> None:
        self._task, self._dataset, self._filters = task, dataset, filters
        self._store, self._records = store_for(task, config, folder), select(task, dataset, config, folder)
        self._shown: list[int] = []
        self._at = 0
        self.choice = widgets.Dropdown(options=["all", "flagged", "not reviewed"], description="Show:")
        self.row = widgets.HTML()
        self.words = widgets.Textarea(layout={"width": "100%", "height": "8em"})
        self.message = widgets.HTML()
        self.previous = _button("Previous", self._turn(-1), icon="arrow-left")
        self.next = _button("Next", self._turn(+1), icon="arrow-right")
        self.accept = _button("Accept", lambda _: self._judge("accept"), button_style="success")
        self.reject = _button("Reject", lambda _: self._judge("reject"), button_style="danger")
        self.edit = _button("Save the edit", lambda _: self._judge("edit"), button_style="warning")
        paging = widgets.HBox([self.choice, self.previous, self.next])
        verdicts = widgets.HBox([self.accept, self.reject, self.edit])
        super().__init__([paging, self.row, self.words, verdicts, self.message])
        self.choice.observe(lambda _: self._choose(), names="value")
        self._choose()

    def _choose(self) -> None:
        wanted = {
            "all": lambda place: True,
            "flagged": lambda place: bool(self._flags(place)),
            "not reviewed": lambda place: self._records[place].review is None,
        }[self.choice.value]
        there = [place for place, record in enumerate(self._records) if record]
        self._shown, self._at = [place for place in there if wanted(place)], 0
        self._show()

    def _flags(self, place: int) -> tuple[str, ...]:
        row = self._dataset[place]
        gold = self._task.verbalizers[row["label"]]
        return flags(self._records[place], row["input_text"], gold, self._filters)

    def _turn(self, step: int) -> Callable[[Any], None]:
        def turn(_: Any) -> None:
            self._at = max(min(self._at + step, len(self._shown) - 1), 0)
            self._show()

        return turn

    def _judge(self, verdict: str) -> None:
        place = self._shown[self._at]
        if verdict == "accept" and self.words.value.strip() != self._records[place].rationale:
            verdict = "edit"  # or the new words would be lost
        try:
            self._records[place] = self._store.review(self._records[place], verdict, self.words.value)
        except (WorkbenchError, OSError) as error:
            self.message.value = html.escape(str(error))
            return
        self._show()

    def _show(self) -> None:
        for button in (self.previous, self.next, self.accept, self.reject, self.edit):
            button.disabled = not self._shown
        self.message.value = ""
        if not self._shown:
            self.row.value, self.words.value = "No rationale to show.", ""
            return
        place = self._shown[self._at]
        row, record = self._dataset[place], self._records[place]
        found = [f"{name.replace('_', ' ')}: {FLAGS[name]}" for name in self._flags(place)]
        parts = {
            "Input": row["input_text"],
            "Gold": self._task.verbalizers[row["label"]],
            "Answer": record.answer or "none",
            "Flags": "\n".join(found) or "none",
            "Review": record.review or "none yet",
        }
        if record.original not in (None, record.rationale):
            parts["Before the edit"] = record.original
        head = f"<p>{self._at + 1} of {len(self._shown)}, idx {html.escape(row['idx'])}</p>"
        self.row.value = head + "".join(_part(name, text) for name, text in parts.items())
        self.words.value = record.rationale


def _button(label: str, action: Callable[[Any], None], **look: str) -> widgets.Button:
    button = widgets.Button(description=label, **look)
    button.on_click(action)
    return button


def _part(name: str, text: str) -> str:
    name, text = html.escape(name), html.escape(text)
    return f"<b>{name}</b><div style='white-space: pre-wrap; margin-bottom: .5em'>{text}</div>"


class _LiveFigure:
    """A figure that is an ordinary output and can be drawn anew, so a saved notebook shows it as it was last.

    JupyterLab passes over an update of a plotly figure that it shows already (plotly.py's issue 3053), and draws
    one that replaces something else: an empty place of the same height stands there for a moment.
    """

    def __init__(self, figure: go.Figure) -> None:
        self._handle: DisplayHandle = display(figure._repr_mimebundle_(), raw=True, display_id=True)

    def update(self, figure: go.Figure) -> None:
        self._handle.update(HTML(f"<div style='height: {figure.layout.height}px'></div>"))
        self._handle.update(figure._repr_mimebundle_(), raw=True)


class LiveLossCurves(TrainerCallback):
    """Draws `plots.loss_curves` while `train` runs: pass it as `train(config, callbacks=[LiveLossCurves()])`."""

    def __init__(self, seconds_between: float = 2.0) -> None:
        self.seconds_between = seconds_between
        self.figure: go.Figure | None = None
        self._shown: _LiveFigure | None = None
        self._drawn_at = 0.0

    def on_log(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        if self._shown is None or time.monotonic() - self._drawn_at >= self.seconds_between:
            self._draw(state)

    def on_train_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        self._draw(state)

    def _draw(self, state: TrainerState) -> None:
        if not state.log_history or not state.is_world_process_zero:
            return
        history = pd.DataFrame(state.log_history)
        setting = "DHRD" if "lm_loss" in history else "pooled baseline"
        self.figure = plots.loss_curves(history.assign(setting=setting, name="this run"))
        if self._shown is None:
            self._shown = _LiveFigure(self.figure)
        else:
            self._shown.update(self.figure)
        self._drawn_at = time.monotonic()


_SPANS = {
    "input": "rgba(0, 114, 178, .28)",
    "rationale": "rgba(230, 159, 0, .32)",
    "label": "rgba(0, 158, 115, .38)",
    "pad": "rgba(125, 130, 138, .18)",
}


def colored_tokens(fmt: SequenceFormat, row: Mapping[str, Any], verbalizer: str | None, length: int) -> HTML:
    """One encoded row, token by token, coloured by span, padded to `length` as in a batch.

    `row` is what `encode_example` gives and `verbalizer` the label text in it (None: there is none). The input's
    last token, which "last" pooling reads, is framed; the LM head learns to write the tokens with a line below.
    """
    ids, n_input = row["input_ids"], row["input_length"]
    n_label = 0 if verbalizer is None else len(fmt.encode_label(verbalizer))
    n_pad = max(length - len(ids), 0)
    spans = ["input"] * n_input + ["rationale"] * (len(ids) - n_input - n_label) + ["label"] * n_label
    tokens = [
        _token(fmt.tokenizer.decode([token]), span, place == n_input - 1, target != IGNORE_INDEX)
        for place, (token, span, target) in enumerate(zip(ids, spans, row["lm_labels"], strict=True))
    ]
    tokens += [_token("pad", "pad", False, False)] * n_pad
    counts = {span: spans.count(span) for span in _SPANS} | {"pad": n_pad}
    legend = " ".join(_token(f"{span}: {count}", span, False, False) for span, count in counts.items())
    legend += " " + _token("pooled", "input", True, False) + " " + _token("taught to the LM head", "", False, True)
    return HTML(f"<p>{legend}</p><div style='line-height: 2; font-family: monospace'>{''.join(tokens)}</div>")


def _token(text: str, span: str, pooled: bool, taught: bool) -> str:
    style = f"background: {_SPANS.get(span, 'none')}; padding: 2px 1px; margin: 0 1px; border-radius: 3px; "
    style += "white-space: pre-wrap; "
    style += "outline: 2px solid #D55E00; font-weight: bold; " if pooled else ""
    style += "border-bottom: 2px solid rgba(125, 130, 138, .9); " if taught else ""
    return f"<span style='{style}'>{html.escape(text.replace(chr(10), '↵'))}</span>"


class _Browser(ABC):
    """Filters, and below them the rows that pass them, some a page.

    The rows are an ordinary output that is drawn anew, not a widget: a saved notebook shows them without a kernel.
    """

    def __init__(self, rows: pd.DataFrame, filters: Mapping[str, widgets.Widget], per_page: int) -> None:
        self.rows, self.filters, self.per_page = rows, dict(filters), per_page
        self._at, self._handle = 0, None
        self.previous = _button("Previous", lambda _: self._turn(-1), icon="arrow-left")
        self.next = _button("Next", lambda _: self._turn(+1), icon="arrow-right")
        self.controls = widgets.HBox(
            [*self.filters.values(), self.previous, self.next], layout={"flex_flow": "row wrap"}
        )
        for one in self.filters.values():
            one.observe(lambda _: self._turn(0), names="value")

    @abstractmethod
    def chosen(self) -> pd.DataFrame:
        """The rows that pass the filters."""

    @abstractmethod
    def _card(self, row: pd.Series) -> str:
        """One row as HTML."""

    def _turn(self, step: int) -> None:
        last = max((len(self.chosen()) - 1) // self.per_page, 0)
        self._at = min(max(self._at + step, 0), last) if step else 0
        if self._handle is not None:
            self._handle.update(self.shown())

    def shown(self) -> HTML:
        """The page of rows that the filters and buttons are at."""
        found = self.chosen()
        page = found.iloc[self._at * self.per_page : (self._at + 1) * self.per_page]
        first = self._at * self.per_page + 1
        which = f"{first} to {first + len(page) - 1} of " if len(page) else ""
        head = f"<p>{which}{len(found)} rows ({len(self.rows)} without a filter)</p>"
        return HTML(head + "".join(_boxed(self._card(row)) for _, row in page.iterrows()))

    def _ipython_display_(self) -> None:
        display(self.controls)
        self._handle = display(self.shown(), display_id=True)


class RationaleExplorer(_Browser):
    """The rows of a split with their rationales, by label, length of the input in words, and flag.

    `rows` is a `RationaleReport`'s; `of` makes them for the rationales that a split brings.
    """

    def __init__(self, rows: pd.DataFrame, per_page: int = 5) -> None:
        rows = rows.assign(input_words=rows["input_text"].str.split().str.len())
        low, high = int(rows["input_words"].min()), int(rows["input_words"].max())
        flagged = sorted({flag for of in rows["flags"] for flag in of})
        filters = {
            "label": _choice("Label:", ["all", *sorted(rows["label"].unique())]),
            "flag": _choice("Rationale:", ["all", "not flagged", "none", "flagged", *flagged]),
            "words": widgets.IntRangeSlider(value=(low, high), min=low, max=high, description="Words:"),
        }
        super().__init__(rows, filters, per_page)

    @classmethod
    def of(cls, task: Task, dataset: Dataset, per_page: int = 5) -> RationaleExplorer:
        """Explore a split that `load_task` gave, with the rationales that stand in it."""
        return cls(quality_report(task, dataset).rows, per_page)

    def chosen(self) -> pd.DataFrame:
        """The rows that pass the filters."""
        label, flag = self.filters["label"].value, self.filters["flag"].value
        low, high = self.filters["words"].value
        rows = self.rows[self.rows["input_words"].between(low, high)]
        if label != "all":
            rows = rows[rows["label"] == label]
        there, n_flags = rows["rationale"].notna(), rows["flags"].map(len)
        named = rows["flags"].map(lambda of: flag in of)
        ways = {"all": there | True, "none": ~there, "flagged": n_flags > 0, "not flagged": there & (n_flags == 0)}
        return rows[ways.get(flag, named)]

    def _card(self, row: pd.Series) -> str:
        found = ", ".join(f"{flag.replace('_', ' ')}: {FLAGS[flag]}" for flag in row["flags"])
        return "".join(
            [
                _part(f"{row['label']} · idx {row['idx']} · {row['input_words']} words", row["input_text"]),
                _part("Rationale", _or_none(row["rationale"])),
                _part("Flags", found) if found else "",
            ]
        )


class DisagreementBrowser(_Browser):
    """The rows of a split on which two runs differ, with what each says and the data's rationale.

    Raises `ValueError` where the two runs didn't predict the same rows.
    """

    def __init__(self, baseline: Run, other: Run, split: str, per_page: int = 3) -> None:
        rows = _disagreements(baseline, other, split)
        self.names = {side: run.config.training.setting for side, run in (("a", baseline), ("b", other))}
        if self.names["a"] == self.names["b"]:
            self.names = {"a": baseline.name, "b": other.name}
        kinds = {
            "all": "all",
            f"only {self.names['b']} is right": "b",
            f"only {self.names['a']} is right": "a",
            "both are wrong": "none",
        }
        filters = {
            "right": _choice("Show:", list(kinds.items())),
            "label": _choice("Gold:", ["all", *sorted(rows["gold"].unique())]),
        }
        super().__init__(rows, filters, per_page)

    def chosen(self) -> pd.DataFrame:
        """The rows that pass the filters."""
        rows = self.rows
        for column, name in (("right", "right"), ("gold", "label")):
            if self.filters[name].value != "all":
                rows = rows[rows[column] == self.filters[name].value]
        return rows

    def _card(self, row: pd.Series) -> str:
        said = [f"{name}: {row[f'said_{side}']} ({row[f'p_{side}']:.0%})" for side, name in self.names.items()]
        return "".join(
            [
                _part(f"Gold: {row['gold']} · idx {row['idx']}", row["input_text"]),
                _part("Predictions", "\n".join(said)),
                _part("Rationale of the data, seen by neither", _or_none(row["rationale"])),
            ]
        )


class AblationDashboard:
    """The runs of an ablation by metric, task, split, factor and line; hover shows the run.

    `table` is of `tables.collect` or `load_results`. A field that is neither factor nor line is held at the
    value with which most values of the factor were run. A saved notebook shows the figure as it was last, without
    a kernel.
    """

    METRICS = ("accuracy", "macro_f1")

    def __init__(self, table: pd.DataFrame) -> None:
        self.table, factors = table, tables.factors(table)
        splits = sorted(dict.fromkeys(table["split"]), key=lambda split: split == "dev")
        self.choices = {
            "metric": _choice("Metric:", _spoken(self.METRICS)),
            "task": _choice("Task:", list(dict.fromkeys(table["task"]))),
            "split": _choice("Split:", splits),
            "factor": _choice("Factor:", _spoken(factors)),
            "line": _choice("Lines:", [("none", None), *_spoken(factors)]),
        }
        self.choices["line"].value = factors[1] if len(factors) > 1 else None
        self.controls = widgets.HBox(list(self.choices.values()), layout={"flex_flow": "row wrap"})
        self._shown: _LiveFigure | None = None
        for one in self.choices.values():
            one.observe(lambda _: self._draw(), names="value")

    def chosen(self) -> pd.DataFrame:
        """The runs that the figure shows, with their line as `series`."""
        rows = self.table[self.table["split"] == self.choices["split"].value]
        rows = rows[rows["task"] == self.choices["task"].value]
        return tables.one_factor(rows, self.choices["factor"].value, self.choices["line"].value)

    def figure(self) -> go.Figure:
        """Means with their intervals, and every run, of what is chosen."""
        rows, factor, metric = self.chosen(), self.choices["factor"].value, self.choices["metric"].value
        summary = tables.summarize(rows, [factor, "series"], [metric])
        return plots.factor_effect(summary, tables.by_seed(rows, [metric]), factor, metric)

    def _draw(self) -> None:
        if self._shown is not None:
            self._shown.update(self.figure())

    def _ipython_display_(self) -> None:
        display(self.controls)
        self._shown = _LiveFigure(self.figure())


def _spoken(names: Sequence[str]) -> list[tuple[str, str]]:
    return [(name.replace("_", " "), name) for name in names]


def _disagreements(a: Run, b: Run, split: str) -> pd.DataFrame:
    """Rows of both runs' predictions that differ: idx, input_text, gold, right, rationale, said_* and p_*."""
    both = a.predictions(split).merge(b.predictions(split), on="idx", suffixes=("_a", "_b"))
    same_rows = len(both) == len(a.predictions(split)) == len(b.predictions(split))
    if not same_rows or (both["input_text_a"] != both["input_text_b"]).any():
        raise ValueError(f"{a.name!r} and {b.name!r} differ in the rows of {split!r}; expected the same rows.")
    both = both[both["prediction_a"] != both["prediction_b"]]
    right = {side: both[f"prediction_{side}"] == both["label_a"] for side in "ab"}
    rows = {
        "idx": both["idx"],
        "input_text": both["input_text_a"],
        "gold": both["label_a"],
        "right": ["a" if in_a else "b" if in_b else "none" for in_a, in_b in zip(*right.values(), strict=True)],
        "rationale": both["rationale_b"],
    }
    for side in "ab":
        rows[f"said_{side}"] = both[f"prediction_{side}"]
        rows[f"p_{side}"] = both[f"probabilities_{side}"].map(max)
    return pd.DataFrame(rows)


def _or_none(text: Any) -> str:
    """A cell's text; a missing one is NaN or None."""
    return text if isinstance(text, str) and text.strip() else "none"


def _choice(label: str, options: list) -> widgets.Dropdown:
    return widgets.Dropdown(options=options, description=label)


def _boxed(inside: str) -> str:
    box = "border: 1px solid rgba(125, 130, 138, .4); border-radius: 4px; padding: .6em .8em; margin: .5em 0"
    return f"<div style='{box}'>{inside}</div>"
