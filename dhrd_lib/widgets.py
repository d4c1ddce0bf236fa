"""Widgets: ipywidgets panels for the notebooks."""

from __future__ import annotations

import html
import time
from collections import ChainMap
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import ipywidgets as widgets
import pandas as pd
import plotly.graph_objects as go
import plotly.io
from datasets import Dataset
from IPython.display import HTML, DisplayHandle, display
from transformers import TrainerCallback, TrainerState

from dhrd_lib.config import ConfigError, WorkbenchError
from dhrd_lib.rationales import FLAGS, Record, TeacherConfig, flags, quality_report, select, store_for
from dhrd_lib.runs import Run
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
        bundle = _mime_bundle(content) if is_figure else {"text/html": content}
        if self._handle is None:
            self._handle = display(bundle, raw=True, display_id=True)
            return
        if is_figure:
            self._handle.update({"text/html": f"<div style='height: {content.layout.height}px'></div>"}, raw=True)
        self._handle.update(bundle, raw=True)


def _mime_bundle(figure: go.Figure) -> dict[str, Any]:
    """Return what `figure.show()` displays in a notebook: the bundle of every active renderer."""
    renderers = [plotly.io.renderers[name] for name in plotly.io.renderers.default.split("+")]
    of_notebooks = [renderer for renderer in renderers if hasattr(renderer, "to_mimebundle")]
    return dict(ChainMap(*(renderer.to_mimebundle(figure.to_dict()) for renderer in of_notebooks)))


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
        if not state.log_history or not state.is_world_process_zero:
            return
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
    n_label = 0 if verbalizer is None else len(fmt.encode_label(verbalizer))
    n_pad = max(length - len(ids), 0)
    spans = ["input"] * n_input + ["rationale"] * (len(ids) - n_input - n_label) + ["label"] * n_label
    tokens = [
        _token(fmt.tokenizer.decode([token]), span, place == n_input - 1, target != IGNORE_INDEX)
        for place, (token, span, target) in enumerate(zip(ids, spans, row["lm_labels"], strict=True))
    ]
    tokens += [_token("pad", "pad")] * n_pad
    counts = {span: spans.count(span) for span in _SPAN_COLORS} | {"pad": n_pad}
    legend = [_token(f"{span}: {count}", span) for span, count in counts.items()]
    legend += [_token("pooled", "input", pooled=True), _token("LM target", "", target=True)]
    body = f"<div style='line-height: 2; font-family: monospace'>{''.join(tokens)}</div>"
    return HTML(f"<p>{' '.join(legend)}</p>{body}")


def _token(text: str, span: str, pooled: bool = False, target: bool = False) -> str:
    style = f"background: {_SPAN_COLORS.get(span, 'none')}; padding: 2px 1px; margin: 0 1px; border-radius: 3px; "
    style += "white-space: pre-wrap; "
    style += "outline: 2px solid #D55E00; font-weight: bold; " if pooled else ""
    style += "border-bottom: 2px solid rgba(125, 130, 138, .9); " if target else ""
    return f"<span style='{style}'>{html.escape(text.replace(chr(10), '↵'))}</span>"


class _Panel:
    """Controls by name, and below them an output that `draw` makes of their values, again when one changes."""

    def __init__(self, controls: Mapping[str, widgets.Widget], draw: Callable[..., go.Figure | str]) -> None:
        self.controls, self._draw = dict(controls), draw
        self._output: _Output | None = None
        for control in self.controls.values():
            control.observe(lambda _: self._redraw(), names="value")

    def drawn(self) -> go.Figure | str:
        """Return the figure or page of the controls' values."""
        return self._draw(**{name: control.value for name, control in self.controls.items()})

    def _redraw(self) -> None:
        if self._output is not None:
            self._output.show(self.drawn())

    def _ipython_display_(self) -> None:
        display(_toolbar(*self.controls.values()))
        self._output = _Output()
        self._redraw()


class _Browser(_Panel):
    """The rows that pass filters, as cards, one page at a time.

    `filters` maps the name of each filter to a column, whose cells hold a value or a tuple of values; `card` maps a
    row to titles and texts.
    """

    def __init__(
        self,
        rows: pd.DataFrame,
        filters: Mapping[str, str],
        card: Callable[[pd.Series], Mapping[str, str]],
        per_page: int,
    ) -> None:
        self.rows = rows
        page = widgets.BoundedIntText(value=1, min=1, description="Page:", layout={"width": "11em"})
        controls = {column: _dropdown(name, ["all", *_values(rows[column])]) for name, column in filters.items()}
        for control in controls.values():
            control.observe(lambda _: setattr(page, "value", 1), names="value")

        def draw(page_number: int, **values: str) -> str:
            chosen = rows
            for column, value in values.items():
                if value != "all":
                    chosen = chosen[chosen[column].map(lambda cell, value=value: value in _as_tuple(cell))]
            page.max = max(-(-len(chosen) // per_page), 1)
            first = (min(page_number, page.max) - 1) * per_page
            shown = chosen.iloc[first : first + per_page]
            place = f"{first + 1} to {first + len(shown)} of " if len(shown) else ""
            head = f"<p>{place}{len(chosen)} rows ({len(rows)} without a filter)</p>"
            return head + "".join(_boxed(_sections(card(row))) for _, row in shown.iterrows())

        super().__init__({**controls, "page_number": page}, draw)


class RationaleExplorer(_Browser):
    """The rows of a split with their rationales, by label, input length in words, and flag.

    `records` are those of `generate(...)`; without them, the rationales are those of the data.
    """

    def __init__(
        self, task: Task, dataset: Dataset, records: Sequence[Record | None] | None = None, per_page: int = 5
    ) -> None:
        rows = quality_report(task, dataset, records).rows
        words = rows["input_text"].str.split().str.len()
        edges = {words.min() - 1, *words.quantile([0.25, 0.5, 0.75, 1]).astype(int)}
        quarters = pd.cut(words, sorted(edges))
        rows["length"] = quarters.cat.rename_categories(lambda of: f"{of.left + 1} to {of.right} words")
        kind = rows["rationale"].notna().map({True: "not flagged", False: "none"})
        rows["kind"] = [("flagged", *of) if of else name for of, name in zip(rows["flags"], kind, strict=True)]

        def card(row: pd.Series) -> dict[str, str]:
            title = f"{row['label']} · idx {row['idx']} · {words[row.name]} words"
            sections = {title: row["input_text"], "Rationale": _or_none(row["rationale"])}
            return sections | ({"Flags": _spelled(row["flags"])} if row["flags"] else {})

        super().__init__(rows, {"Label:": "label", "Rationale:": "kind", "Length:": "length"}, card, per_page)


class DisagreementBrowser(_Browser):
    """The rows of a split that two runs predict differently, with both predictions and the data's rationale.

    Raises `ConfigError` where the runs differ in the rows of the split.
    """

    def __init__(self, baseline: Run, other: Run, split: str, per_page: int = 3) -> None:
        names = [run.config.training.setting for run in (baseline, other)]
        if names[0] == names[1]:
            names = [baseline.name, other.name]
        a, b = (run.predictions(split) for run in (baseline, other))
        rows = a.merge(b, on=["idx", "input_text"], suffixes=("_a", "_b"))
        if not len(rows) == len(a) == len(b):
            both = f"{baseline.name!r} and {other.name!r}"
            raise ConfigError(f"{both} differ in the rows of {split!r}; expected the same rows.")
        rows = rows[rows["prediction_a"] != rows["prediction_b"]].rename(columns={"label_a": "gold"})
        rows["correct"] = "both are wrong"
        for side, name in zip("ab", names, strict=True):
            rows.loc[rows[f"prediction_{side}"] == rows["gold"], "correct"] = f"only {name} is right"

        def card(row: pd.Series) -> dict[str, str]:
            predictions = [
                f"{name}: {row[f'prediction_{side}']} ({max(row[f'probabilities_{side}']):.0%})"
                for side, name in zip("ab", names, strict=True)
            ]
            return {
                f"Gold: {row['gold']} · idx {row['idx']}": row["input_text"],
                "Predictions": "\n".join(predictions),
                "Rationale of the data, seen by neither": _or_none(row["rationale_b"]),
            }

        super().__init__(rows, {"Show:": "correct", "Gold:": "gold"}, card, per_page)


class AblationDashboard(_Panel):
    """The runs of an ablation by metric, task, split, factor and line; hover shows the run.

    `table` is that of an `AblationResult`. A field that is neither factor nor line is held at the value with which
    most values of the factor were run.
    """

    def __init__(self, table: pd.DataFrame) -> None:
        factors = [(name.replace("_", " "), name) for name in tables.factors(table)]
        splits = sorted(dict.fromkeys(table["split"]), key=lambda split: split == "dev")
        controls = {
            "metric": _dropdown("Metric:", [("accuracy", "accuracy"), ("macro f1", "macro_f1")]),
            "task": _dropdown("Task:", list(dict.fromkeys(table["task"]))),
            "split": _dropdown("Split:", splits),
            "factor": _dropdown("Factor:", factors),
            "line": _dropdown("Lines:", [("none", None), *factors]),
        }
        controls["line"].value = factors[1][1] if len(factors) > 1 else None

        def draw(metric: str, task: str, split: str, factor: str, line: str | None) -> go.Figure:
            rows = tables.one_factor(table[(table["split"] == split) & (table["task"] == task)], factor, line)
            summary = tables.summarize(rows, [factor, "series"], [metric])
            return plots.factor_effect(summary, tables.by_seed(rows, [metric]), factor, metric)

        super().__init__(controls, draw)


class ReviewPanel(widgets.VBox):
    """Pages through the rationales of a split: input, gold, rationale and flags; accept, reject or edit.

    A verdict goes to the store as a new record that keeps the teacher's text; `select` takes it from there. Rows
    without a rationale aren't shown.
    """

    def __init__(
        self, task: Task, dataset: Dataset, config: TeacherConfig, folder: str | Path = "rationales"
    ) -> None:
        self._task, self._dataset = task, dataset
        self._store, self._records = store_for(task, config, folder), select(task, dataset, config, folder)
        self._places: list[int] = []
        self._page = 0
        self.choice = _dropdown("Show:", ["all", "flagged", "not reviewed"])
        self.row, self.message = widgets.HTML(), widgets.HTML()
        self.words = widgets.Textarea(layout={"width": "100%", "height": "8em"})
        self.previous = _button("Previous", lambda: self._show(self._page - 1), icon="arrow-left")
        self.next = _button("Next", lambda: self._show(self._page + 1), icon="arrow-right")
        self.accept = _button("Accept", lambda: self._review("accept"), button_style="success")
        self.reject = _button("Reject", lambda: self._review("reject"), button_style="danger")
        self.edit = _button("Save the edit", lambda: self._review("edit"), button_style="warning")
        paging = _toolbar(self.choice, self.previous, self.next)
        verdicts = _toolbar(self.accept, self.reject, self.edit)
        super().__init__([paging, self.row, self.words, verdicts, self.message])
        self.choice.observe(lambda _: self._choose(), names="value")
        self._choose()

    def _choose(self) -> None:
        passes = {
            "all": lambda place: True,
            "flagged": lambda place: bool(self._flags(place)),
            "not reviewed": lambda place: self._records[place].review is None,
        }[self.choice.value]
        self._places = [place for place, record in enumerate(self._records) if record and passes(place)]
        self._show(0)

    def _flags(self, place: int) -> tuple[str, ...]:
        row = self._dataset[place]
        gold = self._task.verbalizers[row["label"]]
        return flags(self._records[place], row["input_text"], gold)

    def _review(self, verdict: str) -> None:
        place, text = self._places[self._page], self.words.value
        if verdict == "accept" and text.strip() != self._records[place].rationale:
            verdict = "edit"  # or the new text would be lost
        try:
            self._records[place] = self._store.review(self._records[place], verdict, text)
        except (WorkbenchError, OSError) as error:
            self.message.value = html.escape(str(error))
            return
        self._show(self._page)

    def _show(self, page: int) -> None:
        self._page, self.message.value = max(min(page, len(self._places) - 1), 0), ""
        for button in (self.previous, self.next, self.accept, self.reject, self.edit):
            button.disabled = not self._places
        if not self._places:
            self.row.value, self.words.value = "No rationale to show.", ""
            return
        place = self._places[self._page]
        row, record = self._dataset[place], self._records[place]
        sections = {
            f"{self._page + 1} of {len(self._places)}, idx {row['idx']}": row["input_text"],
            "Gold": self._task.verbalizers[row["label"]],
            "Answer": _or_none(record.answer),
            "Flags": _spelled(self._flags(place)),
            "Review": _or_none(record.review),
        }
        if record.original not in (None, record.rationale):
            sections["Before the edit"] = record.original
        self.row.value, self.words.value = _sections(sections), record.rationale


def _button(label: str, action: Callable[[], None], **look: str) -> widgets.Button:
    button = widgets.Button(description=label, **look)
    button.on_click(lambda _: action())
    return button


def _dropdown(label: str, options: list) -> widgets.Dropdown:
    return widgets.Dropdown(options=options, description=label)


def _values(column: pd.Series) -> list[str]:
    """Return the values in a column's cells, in the order of its categories or sorted."""
    ordered = isinstance(column.dtype, pd.CategoricalDtype)
    return (
        list(column.cat.categories) if ordered else sorted({value for cell in column for value in _as_tuple(cell)})
    )


def _as_tuple(cell: Any) -> tuple:
    return cell if isinstance(cell, tuple) else (cell,)


def _toolbar(*controls: widgets.Widget) -> widgets.HBox:
    return widgets.HBox(controls, layout={"flex_flow": "row wrap"})


def _sections(texts: Mapping[str, str]) -> str:
    style = "white-space: pre-wrap; margin-bottom: .5em"
    return "".join(
        f"<b>{html.escape(title)}</b><div style='{style}'>{html.escape(text)}</div>"
        for title, text in texts.items()
    )


def _boxed(content: str) -> str:
    style = "border: 1px solid rgba(125, 130, 138, .4); border-radius: 4px; padding: .6em .8em; margin: .5em 0"
    return f"<div style='{style}'>{content}</div>"


def _spelled(names: tuple[str, ...]) -> str:
    return "\n".join(f"{name.replace('_', ' ')}: {FLAGS[name]}" for name in names) or "none"


def _or_none(text: Any) -> str:
    """Return a cell's text, or "none" where it is missing (None, NaN) or empty."""
    return text if isinstance(text, str) and text.strip() else "none"
