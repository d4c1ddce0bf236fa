"""The Batch tab: a file of texts, classified by both systems, measured, filtered and downloaded."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import gradio as gr
import numpy as np
import pandas as pd
import plotly.graph_objects as go

from app import html
from app import runs as stored
from app.backend import Backend, RowPredictions
from app.events import QUIET, Session, connect_computation
from app.settings import MAX_CHARACTERS, MAX_FIELDS, MAX_FILE_MIB, MAX_ROWS
from app.tabs.compare import CompareTab
from dhrd_lib import evaluation
from dhrd_lib.config import ConfigError, WorkbenchError
from dhrd_lib.data import files
from dhrd_lib.studies import plots
from dhrd_lib.studies.statistics import bootstrap_interval, paired_comparison
from dhrd_lib.tasks import Task, TaskError

_SHOWN_ROWS, _NO_LABEL = 300, "(none)"
SUFFIXES = sorted({*files.SUFFIXES} - {".parquet"})  # which may unfold to more than memory holds


class Table(NamedTuple):
    """An uploaded file: its name as the visitor knows it, and its rows as text ("" where a value is missing)."""

    name: str
    rows: pd.DataFrame


@dataclass(frozen=True)
class Result:
    """Predictions for a file by system; `texts` by field, `gold` class indices (N,) or None."""

    task: Task
    texts: pd.DataFrame
    gold: np.ndarray | None
    predictions: Mapping[str, RowPredictions]

    @property
    def class_ids(self) -> dict[str, np.ndarray]:
        """The predicted class indices (N,) by system."""
        return {name: rows.predictions.probabilities.argmax(1) for name, rows in self.predictions.items()}


def read_table(path: str | Path) -> Table:
    """Read an uploaded file; raises `TaskError` with a sentence that names it as the visitor does."""
    path = Path(path)
    if path.suffix.lower() not in SUFFIXES:
        raise TaskError(f"{path.name} ends in {path.suffix!r}; expected one of {', '.join(SUFFIXES)}.")
    try:
        rows = files.read_table(path, max_rows=MAX_ROWS)
    except TaskError as error:  # The folder is the server's; it is no business of the visitor's.
        raise TaskError(str(error).replace(str(path), path.name)) from error
    if rows.empty:
        raise TaskError(f"{path.name} has 0 rows; expected 1 to {MAX_ROWS:,}.")
    return Table(path.name, rows.fillna(""))


def texts_of(table: Table, task: Task, columns: Mapping[str, str | None]) -> pd.DataFrame:
    """Return the columns chosen for the task's fields, by field."""
    for name in task.fields:
        _check_column(table, columns.get(name), f"for {name!r}")
    return pd.DataFrame({name: table.rows[columns[name]] for name in task.fields})


def gold_of(table: Table, task: Task, column: str) -> np.ndarray:
    """Return the gold class indices in a column; raises `TaskError` for a label that isn't the task's."""
    _check_column(table, column, "for the gold label")
    labels = table.rows[column].str.strip()
    gold = pd.Index(task.label_names).get_indexer(labels)
    if (gold < 0).any():
        row = int((gold < 0).argmax())
        problem = f"{table.name}, row {row + 1} has the label {labels.iloc[row]!r}"
        raise TaskError(f"{problem}; expected one of {', '.join(map(repr, task.label_names))}.")
    return gold


def _check_column(table: Table, column: str | None, purpose: str) -> None:
    if column not in table.rows:
        expected = ", ".join(map(repr, table.rows))
        raise TaskError(f"{table.name} has no column {column!r} {purpose}; expected one of {expected}.")


def frame(result: Result, every_label: bool = False) -> pd.DataFrame:
    """Return one row per text: gold label, each system's label and its probability, agreement, and the text.

    With `every_label` it has the probability of every label, for the downloads.
    """
    table = pd.DataFrame({"row": range(1, len(result.texts) + 1)})
    if result.gold is not None:
        table["gold"] = np.array(result.task.label_names)[result.gold]
    for system, rows in result.predictions.items():
        table[system] = rows.predictions.labels
        table[f"{system} p"] = rows.predictions.probabilities.max(1).round(4)
    if len(result.predictions) == 2:
        a, b = (table[system] for system in result.predictions)
        table["agree"] = np.where(a == b, "yes", "no")
    # The texts come last: they are long, and the predictions stay in view next to the row number.
    table = table.assign(**result.texts.reset_index(drop=True))
    for system, rows in result.predictions.items() if every_label else ():
        for label, probabilities in zip(result.task.label_names, rows.predictions.probabilities.T, strict=True):
            table[f"{system} p({label})"] = probabilities.round(6)
    return table


def save(result: Result, folder: Path) -> tuple[Path, Path]:
    """Write the predictions as predictions.csv and predictions.jsonl to a folder."""
    table, csv, jsonl = frame(result, True), folder / "predictions.csv", folder / "predictions.jsonl"
    table.to_csv(csv, index=False)
    table.to_json(jsonl, orient="records", lines=True, force_ascii=False)
    return csv, jsonl


def _metrics(task: Task) -> tuple[str, ...]:
    """The task's metrics; plain accuracy where they need groups, which a file of texts lacks."""
    return ("accuracy",) if "em" in task.metrics else task.metrics


def summary(result: Result) -> list[dict[str, str]]:
    """Return one row per system: metric with 95% interval (if gold is known), throughput, truncations."""
    metrics, table = _metrics(result.task), []
    name = metrics[0] if len(metrics) == 1 else f"mean of {' and '.join(metrics)}"
    for system, rows in result.predictions.items():
        row = {"system": system}
        if result.gold is not None:
            row[f"{name} [95% interval]"] = str(bootstrap_interval(metrics, result.gold, result.class_ids[system]))
        row["rows per second"] = f"{len(result.texts) / rows.seconds:,.1f}"
        row["truncated inputs"] = f"{rows.inputs_cut:,}"
        table.append(row)
    return table


def difference(result: Result) -> str:
    """Return how DHRD differs from the baseline on these rows: in labels, and if gold is known in the metric."""
    if len(result.predictions) < 2:
        return ""
    a, b = result.class_ids.values()
    disagreement = f"The two systems disagree on {(a != b).sum():,} of {len(a):,} rows."
    if result.gold is None:
        return disagreement
    comparison = paired_comparison(_metrics(result.task), result.gold, a, b)
    test = f"p = {comparison.p_value:.3f} ({comparison.test})"
    return f"{disagreement} DHRD minus pooled baseline: {comparison} points, {test}; one run each."


def confusion_figures(result: Result) -> list[go.Figure]:
    """Return a confusion matrix per system if gold is known; separate figures, so that they stack on a phone."""
    if result.gold is None:
        return []
    names, figures = result.task.label_names, []
    for system, predicted in result.class_ids.items():
        matrix = evaluation.confusion(result.gold, predicted, len(names))
        figure = plots.confusion_matrices({system: matrix}, names)
        figures.append(figure.update_layout(title_text=None, margin_t=40))
    return figures


class BatchTab:
    """The tab's components and events; task and runs are those picked under Compare."""

    def __init__(self, backend: Backend, compare: CompareTab) -> None:
        self.backend, self.root = backend, backend.settings.runs
        self.task, self.picked = compare.task, [compare.runs["pooled baseline"], compare.runs["DHRD"]]
        self.table, self.result = gr.State(None), gr.State(None)
        self.fields = gr.State(())  # those that columns are chosen for
        gr.Markdown(
            f"Task and runs are those picked under **Compare**. At most {MAX_ROWS:,} rows, {MAX_FILE_MIB} MiB and "
            f"{MAX_CHARACTERS:,} characters per text: CSV and TSV with a header, JSONL.",
            elem_classes="limits",
        )
        self.file = gr.File(label="File", file_types=SUFFIXES, height=120)
        with gr.Row():
            self.columns = [gr.Dropdown([], label="", visible=False, filterable=False) for _ in range(MAX_FIELDS)]
            self.label = gr.Dropdown([], label="Gold label column", visible=False, filterable=False)
        with gr.Row(elem_classes="actions"):
            self.stop = gr.Button("Stop", variant="stop", interactive=False, min_width=100)
            self.run = gr.Button("Classify", variant="primary", interactive=False, min_width=150)
        self.status = gr.HTML(html.notice("No file yet.", "empty"), elem_id="batch-status")
        with gr.Column(visible=False) as self.outcome:
            self.figures = gr.HTML(elem_id="batch-figures")
            self.only = gr.Checkbox(label="Only disagreements")
            self.rows = gr.Dataframe(
                interactive=False, wrap=True, max_height=420, elem_id="batch-rows", datatype="str"
            )
            with gr.Row():
                self.csv = gr.DownloadButton("Download as CSV", size="md")
                self.jsonl = gr.DownloadButton("Download as JSONL", size="md")
            with gr.Row():
                self.confusion = [gr.Plot(label="Confusion matrix", visible=False, min_width=320) for _ in range(2)]
        self._connect()

    def _connect(self) -> None:
        mapping = [self.fields, *self.columns, self.label]
        outputs = [self.table, self.status, self.outcome, self.run, *mapping]
        self.file.change(self._on_file, [self.file, self.task, *self.picked], outputs, **QUIET)
        known = [self.table, self.fields, self.task, *self.picked]
        gr.on([self.task.change, *(run.change for run in self.picked)], self._on_picked, known, mapping, **QUIET)
        outputs = [self.status, self.outcome, self.result, self.figures, self.csv, self.jsonl, *self.confusion]
        inputs = [self.table, self.task, *self.picked, *self.columns, self.label]
        clicked, buttons = [self.run.click], (self.run, self.stop)
        ran = connect_computation(clicked, self._on_run, inputs, outputs, buttons, self.status)
        for listen in (ran.then, self.only.input):
            listen(_filtered, [self.result, self.only], self.rows, **QUIET)

    def _on_file(self, path: str | None, task: str, *picked: str | None) -> list[Any]:
        hidden = [gr.Column(visible=False), gr.Button(interactive=False), *_mapping(None, ())]
        if path is None:
            return [None, html.notice("No file yet.", "empty"), *hidden]
        try:
            table = read_table(path)
            fields = stored.task_for(self.root, task, picked).fields
        except (WorkbenchError, OSError) as error:
            return [None, html.notice(str(error), "error"), *hidden]
        status = html.notice(f"{table.name}: {len(table.rows):,} rows, columns {', '.join(table.rows)}.")
        return [table, status, gr.Column(visible=False), gr.Button(interactive=True), *_mapping(table, fields)]

    def _on_picked(self, table: Table | None, fields: tuple[str, ...], task: str, *picked: str | None) -> list[Any]:
        """Another task or run may read other texts; where it reads the same, the chosen columns stay."""
        wanted = stored.task_for(self.root, task, picked).fields if table else fields
        return [gr.skip()] * (MAX_FIELDS + 2) if wanted == fields else _mapping(table, wanted)

    def _on_run(
        self, session: Session, table: Table, task_name: str, baseline: str | None, dhrd: str | None, *mapping: Any
    ) -> Iterator[list[Any]]:
        unchanged, done = [gr.skip()] * 7, {}
        runs = {name: run for name, run in (("pooled baseline", baseline), ("DHRD", dhrd)) if run}
        try:
            if not runs:
                raise ConfigError("There is no trained run for this task; expected a pooled baseline or DHRD.")
            stored.check_comparable(self.root, runs.values())
            task = stored.task_for(self.root, task_name, runs.values())
            texts = texts_of(table, task, dict(zip(task.fields, mapping, strict=False)))
            gold = None if mapping[-1] == _NO_LABEL else gold_of(table, task, mapping[-1])
            yield [html.progress_bar(0, "Rows", "Loading the model …"), *unchanged]
            for system, run in runs.items():
                with closing(self.backend.classify_rows(run, texts.to_dict("records"))) as steps:
                    for done[system] in steps:
                        n_done = len(done[system].predictions.labels)
                        message = f"{system}: {n_done:,} of {len(texts):,} rows"
                        yield [html.progress_bar(n_done / len(texts), "Rows", message), *unchanged]
                        if session.stopped.is_set():
                            yield [html.notice("Stopped: the predictions so far were dropped."), *unchanged]
                            return
        except WorkbenchError as error:
            yield [html.notice(str(error), "error"), *unchanged]
            return
        result = Result(task, texts, gold, done)
        figures = html.table(summary(result)) + f"<p>{html.text(difference(result))}</p>"
        plots = [gr.Plot(figure, visible=True) for figure in confusion_figures(result)]
        plots += [gr.Plot(visible=False)] * (2 - len(plots))
        # Gradio copies the files to its own cache, which it clears, before it takes the generator's next item.
        with tempfile.TemporaryDirectory(prefix="dhrd-app-") as folder:
            files = map(str, save(result, Path(folder)))
            status = html.notice(f"{len(texts):,} rows classified.")
            yield [status, gr.Column(visible=True), result, figures, *files, *plots]


def _mapping(table: Table | None, fields: Sequence[str]) -> list[Any]:
    """Return the fields, and pickers of the columns for each of them and for the gold label."""
    hidden = gr.Dropdown(choices=[], value=None, visible=False)
    if table is None:
        return [(), *[hidden] * (MAX_FIELDS + 1)]
    columns, pickers = [*table.rows], []
    for index, name in enumerate(fields):
        guess = name if name in columns else columns[min(index, len(columns) - 1)]
        pickers.append(gr.Dropdown(choices=columns, value=guess, label=f"Column of {name}", visible=True))
    guess = "label" if "label" in columns else _NO_LABEL
    label = gr.Dropdown(choices=[_NO_LABEL, *columns], value=guess, visible=True)
    return [fields, *pickers, *[hidden] * (MAX_FIELDS - len(pickers)), label]


def _filtered(result: Result | None, only_disagreements: bool) -> gr.Dataframe:
    if result is None:
        return gr.Dataframe(pd.DataFrame())
    rows = frame(result)
    if only_disagreements and "agree" in rows:
        rows = rows[rows["agree"] == "no"]
    label = f"{len(rows):,} rows" + (f", the first {_SHOWN_ROWS} shown" if len(rows) > _SHOWN_ROWS else "")
    return gr.Dataframe(rows.head(_SHOWN_ROWS).astype(str), label=label)
