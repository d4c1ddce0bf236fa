"""The Batch tab: a file up, both systems over its rows, a table to filter, figures, and files down."""

from __future__ import annotations

import html
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gradio as gr
import pandas as pd

from app import batch, stored, views
from app.backend import Backend
from app.batch import Result, Table
from app.compare_tab import CompareTab
from app.events import COMPUTE, QUIET, Session, ended, started, stop
from app.settings import MAX_CHARACTERS, MAX_FIELDS, MAX_FILE_MIB, MAX_ROWS
from dhrd_lib.config import WorkbenchError
from dhrd_lib.tasks import SUFFIXES

_SHOWN_ROWS = 300
_NO_LABEL = "(none)"


class BatchTab:
    """The tab's components and what they do; task and runs are those picked under Compare."""

    def __init__(self, backend: Backend, compare: CompareTab) -> None:
        self.backend, self.root = backend, backend.settings.runs
        self.task, self.picked = compare.task, [compare.runs["pooled baseline"], compare.runs["DHRD"]]
        self.session, self.table, self.result = gr.State(None), gr.State(None), gr.State(None)
        self.fields = gr.State(())  # those that the columns are chosen for
        gr.Markdown(
            f"Task and runs are those picked under **Compare**. A file of at most {MAX_ROWS:,} rows and "
            f"{MAX_FILE_MIB} MiB, {MAX_CHARACTERS:,} characters a text: CSV and TSV with a header, JSONL, Parquet.",
            elem_classes="limits",
        )
        self.file = gr.File(label="File", file_types=list(SUFFIXES), height=120)
        with gr.Row():
            self.columns = [gr.Dropdown([], label="", visible=False, filterable=False) for _ in range(MAX_FIELDS)]
            self.label = gr.Dropdown([], label="Gold label's column", visible=False, filterable=False)
        with gr.Row(elem_classes="actions"):
            self.stop = gr.Button("Stop", variant="stop", interactive=False, min_width=100)
            self.run = gr.Button("Classify the rows", variant="primary", interactive=False, min_width=190)
        self.status = gr.HTML(views.notice("No file yet.", "empty"), elem_id="batch-status")
        with gr.Column(visible=False) as self.found:
            self.figures = gr.HTML(elem_id="batch-figures")
            self.only = gr.Checkbox(label="Only where they disagree")
            self.rows = gr.Dataframe(
                interactive=False, wrap=True, max_height=420, label="Rows", elem_id="batch-rows", datatype="str"
            )
            with gr.Row():
                self.csv = gr.DownloadButton("Download as CSV", size="md")
                self.jsonl = gr.DownloadButton("Download as JSONL", size="md")
            with gr.Row():
                self.confusion = [
                    gr.Plot(label="Which labels are taken for which", visible=False, min_width=320)
                    for _ in range(2)
                ]
        self._connect()

    def _connect(self) -> None:
        mapping = [*self.columns, self.label]
        gr.on(
            [self.file.change, self.task.change],
            self._on_file,
            [self.file, self.task, *self.picked],
            [self.table, self.status, self.found, self.run, self.fields, *mapping],
            **QUIET,
        )
        asked = [self.table, self.fields, self.task, *self.picked]
        gr.on([run.change for run in self.picked], self._on_picked, asked, [self.fields, *mapping], **QUIET)
        buttons = [self.run, self.stop]
        self.run.click(started, self.session, [self.session, *buttons], **QUIET).then(
            self._on_run,
            [self.session, self.table, self.task, *self.picked, *mapping],
            [self.status, self.found, self.result, self.figures, self.rows, self.csv, self.jsonl, *self.confusion],
            api_visibility="private",
            show_progress="minimal",
            show_progress_on=self.status,
            **COMPUTE,
        ).then(_filtered, [self.result, self.only], self.rows, **QUIET).then(ended, None, buttons, **QUIET)
        self.stop.click(stop, self.session, self.stop, **QUIET)
        self.only.input(_filtered, [self.result, self.only], self.rows, **QUIET)

    def _on_file(self, path: str | None, task_name: str, *picked: str | None) -> list[Any]:
        hidden = [gr.Dropdown(choices=[], value=None, visible=False)] * (MAX_FIELDS + 1)
        nothing = [gr.Column(visible=False), gr.Button(interactive=False), (), *hidden]
        if path is None:
            return [None, views.notice("No file yet.", "empty"), *nothing]
        try:
            table = batch.read_table(path)
            fields = stored.picked_task(self.root, task_name, picked).fields
        except (WorkbenchError, OSError) as error:
            return [None, views.notice(str(error), "error"), *nothing]
        told = f"{table.name}: {len(table.rows):,} rows, columns {', '.join(table.columns)}."
        status, ready = views.notice(told), gr.Button(interactive=True)
        return [table, status, gr.Column(visible=False), ready, fields, *_mapping(table, fields)]

    def _on_picked(
        self, table: Table | None, shown: tuple[str, ...], task_name: str, *picked: str | None
    ) -> list[Any]:
        """Another run may read other texts; where it reads the same, the columns that were chosen stay."""
        fields = stored.picked_task(self.root, task_name, picked).fields if table else shown
        if fields == shown:
            return [gr.skip()] * (MAX_FIELDS + 2)
        return [fields, *_mapping(table, fields)]

    def _on_run(
        self,
        session: Session,
        table: Table | None,
        task_name: str,
        baseline: str | None,
        dhrd: str | None,
        *mapping: str | None,
    ) -> Iterator[list[Any]]:
        rest = [gr.skip()] * 8
        try:
            task = stored.shared_task(self.root, task_name, [baseline, dhrd])
            columns = dict(zip(task.fields, mapping, strict=False))
            label = None if mapping[-1] == _NO_LABEL else mapping[-1]
            inputs = batch.mapped(table, task, columns, label)
            runs = {"pooled baseline": baseline, "DHRD": dhrd}
            steps = batch.classify(self.backend, task, inputs, runs, session.stopped.is_set)
            for setting, done, result in steps:  # noqa: B007 (the last one has the result)
                yield [views.share_of_work(done, len(inputs.texts), setting), *rest]
        except WorkbenchError as error:
            yield [views.notice(str(error), "error"), *rest]
            return
        if result is None:
            yield [views.notice("Stopped: nothing was kept."), *rest]
            return
        # Gradio copies the files to its own cache, which it clears, before it asks for what comes after them.
        with tempfile.TemporaryDirectory(prefix="dhrd-app-") as folder:
            yield [views.notice(f"{len(inputs.texts):,} rows classified."), *_outcome(result, Path(folder))]


def _mapping(table: Table, fields: tuple[str, ...]) -> list[gr.Dropdown]:
    mapping = []
    for place in range(MAX_FIELDS):
        if place >= len(fields):
            mapping.append(gr.Dropdown(choices=[], value=None, visible=False))
            continue
        name = fields[place]
        guess = name if name in table.columns else table.columns[min(place, len(table.columns) - 1)]
        label = f"Column of {name}"
        mapping.append(gr.Dropdown(choices=table.columns, value=guess, label=label, visible=True))
    guess = "label" if "label" in table.columns else _NO_LABEL
    return [*mapping, gr.Dropdown(choices=[_NO_LABEL, *table.columns], value=guess, visible=True)]


def _outcome(result: Result, folder: Path) -> list[Any]:
    figures = views.table(batch.figures_of(result)) + f"<p>{html.escape(batch.difference_in_words(result))}</p>"
    csv, jsonl = batch.save(result, folder)
    plots = [gr.Plot(figure, visible=True) for figure in batch.confusion_figures(result)]
    plots += [gr.Plot(visible=False)] * (2 - len(plots))
    return [gr.Column(visible=True), result, figures, gr.skip(), str(csv), str(jsonl), *plots]


def _filtered(result: Result | None, only_disagreements: bool) -> gr.Dataframe:
    if result is None:
        return gr.Dataframe(pd.DataFrame())
    rows = batch.frame(result)
    if only_disagreements and "agree" in rows:
        rows = rows[rows["agree"] == batch.DISAGREE]
    label = f"{len(rows):,} rows" + (f", the first {_SHOWN_ROWS} shown" if len(rows) > _SHOWN_ROWS else "")
    return gr.Dataframe(rows.head(_SHOWN_ROWS).astype(str), label=label)
