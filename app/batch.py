"""A file of texts: read, mapped to a task's fields, classified by both systems, measured and written out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from app.backend import Backend
from app.settings import MAX_FILE_MIB, MAX_ROWS, MAX_UNFOLDED_MIB
from dhrd_lib import evaluation
from dhrd_lib.config import ConfigError
from dhrd_lib.inputs import as_text
from dhrd_lib.studies import plots
from dhrd_lib.studies.statistics import bootstrap_interval, paired_comparison
from dhrd_lib.tasks import SUFFIXES, Task, TaskError, read_rows

AGREE, DISAGREE = "yes", "no"


@dataclass(frozen=True)
class Table:
    """An uploaded file: its name as the visitor knows it, its columns, and its rows as they stand in it."""

    name: str
    columns: list[str]
    rows: list[dict[str, Any]]


@dataclass(frozen=True)
class Inputs:
    """Rows ready to be classified: texts by field, and gold class indices where there are labels."""

    texts: list[dict[str, str]]
    gold: np.ndarray | None


@dataclass
class Result:
    """What the systems said about N rows, by setting: probabilities `(N, K)`, seconds in the calls, inputs cut."""

    task: Task
    inputs: Inputs
    probabilities: dict[str, np.ndarray] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    inputs_cut: dict[str, int] = field(default_factory=dict)

    def predictions(self, setting: str) -> np.ndarray:
        """Class indices, (N,)."""
        return self.probabilities[setting].argmax(1)


def read_table(path: str | Path) -> Table:
    """Read an uploaded file; raises `TaskError` with a sentence that names it as the visitor does."""
    path = Path(path)
    if path.suffix.lower() not in SUFFIXES:
        raise TaskError(f"{path.name} ends in {path.suffix!r}; expected one of {', '.join(SUFFIXES)}.")
    if path.stat().st_size > MAX_FILE_MIB * 2**20:
        raise TaskError(f"{path.name} has {path.stat().st_size / 2**20:.1f} MiB; expected at most {MAX_FILE_MIB}.")
    try:
        rows = read_rows(path, MAX_ROWS, MAX_UNFOLDED_MIB * 2**20)
    except TaskError as error:
        # The folder is the server's; it is no business of the visitor's.
        raise TaskError(str(error).replace(str(path), path.name)) from error
    check_rows(rows, path.name)
    return Table(path.name, list(dict.fromkeys(key for row in rows for key in row)), rows)


def check_rows(rows: Sequence[Mapping[str, Any]], where: str) -> None:
    """Refuse no rows, and too many."""
    if not 1 <= len(rows) <= MAX_ROWS:
        raise TaskError(f"{where} has {len(rows):,} rows; expected 1 to {MAX_ROWS:,}.")


def mapped(table: Table, task: Task, columns: Mapping[str, str | None], label: str | None) -> Inputs:
    """The rows' texts by the task's fields, and their gold labels where `label` names a column."""
    for name in task.fields:
        if columns.get(name) not in table.columns:
            there = ", ".join(map(repr, table.columns))
            raise TaskError(f"No column of {table.name} is chosen for {name!r}; expected one of {there}.")
    texts = [{name: _text(row.get(columns[name])) for name in task.fields} for row in table.rows]
    if not label:
        return Inputs(texts, None)
    if label not in table.columns:
        raise TaskError(
            f"{table.name} has no column {label!r}; expected one of {', '.join(map(repr, table.columns))}."
        )
    return Inputs(texts, _gold(table, task, label))


def _text(value: Any) -> str:
    return as_text(value) or ""  # as in training, where true and 1.0 are the labels 'true' and '1'


def _gold(table: Table, task: Task, column: str) -> np.ndarray:
    places = {name: place for place, name in enumerate(task.label_names)}
    found = []
    for number, row in enumerate(table.rows, start=1):
        name = _text(row.get(column)).strip()
        if name not in places:
            expected = ", ".join(map(repr, places))
            raise TaskError(f"{table.name}, row {number} has the label {name!r}; expected one of {expected}.")
        found.append(places[name])
    return np.array(found)


def classify(
    backend: Backend, task: Task, inputs: Inputs, runs: Mapping[str, str | None], is_stopped: Callable[[], bool]
) -> Iterator[tuple[str, int, Result | None]]:
    """Classify the rows by each run: (setting, rows done, None) on the way, and at the end the `Result`.

    Stopped, it ends without one. Raises `WorkbenchError`s, and `ConfigError` where there is no run.
    """
    chosen = {setting: run for setting, run in runs.items() if run}
    if not chosen:
        raise ConfigError(f"There is no trained run for {task.name}; expected a pooled baseline or DHRD.")
    result = Result(task, inputs)
    for setting, run in chosen.items():
        yield f"{setting}: loading", 0, None
        parts, seconds, done, inputs_cut = [], 0.0, 0, 0
        with closing(backend.classify_rows(run, inputs.texts)) as steps:
            for found, spent, cut in steps:
                parts.append(found)
                seconds, done, inputs_cut = seconds + spent, done + len(found), inputs_cut + cut
                yield setting, done, None
                if is_stopped():
                    return
        result.probabilities[setting], result.seconds[setting] = np.concatenate(parts), seconds
        result.inputs_cut[setting] = inputs_cut
    yield "done", len(inputs.texts), result


def frame(result: Result) -> pd.DataFrame:
    """A row a text: gold, what each system says and how sure it is, whether they agree, and the text."""
    names = np.array(result.task.label_names)
    columns: dict[str, Any] = {"row": range(1, len(result.inputs.texts) + 1)}
    if result.inputs.gold is not None:
        columns["gold"] = names[result.inputs.gold]
    for setting, probabilities in result.probabilities.items():
        columns[setting] = names[probabilities.argmax(1)]
        columns[f"{setting} p"] = probabilities.max(1).round(4)
    table = pd.DataFrame(columns)
    if len(result.probabilities) == 2:
        a, b = (table[setting] for setting in result.probabilities)
        table["agree"] = np.where(a == b, AGREE, DISAGREE)
    # The texts stand last: they are long, and what is said of them is to be seen beside them.
    return table.assign(**{name: [texts[name] for texts in result.inputs.texts] for name in result.task.fields})


def exported(result: Result) -> pd.DataFrame:
    """The table with every label's probability by every system, for the downloads."""
    table = frame(result)
    for setting, probabilities in result.probabilities.items():
        for place, name in enumerate(result.task.label_names):
            table[f"{setting} p({name})"] = probabilities[:, place].round(6)
    return table


def save(result: Result, folder: Path) -> tuple[Path, Path]:
    """Write the results as predictions.csv and predictions.jsonl to a folder."""
    table, csv, jsonl = exported(result), folder / "predictions.csv", folder / "predictions.jsonl"
    table.to_csv(csv, index=False)
    table.to_json(jsonl, orient="records", lines=True, force_ascii=False)
    return csv, jsonl


def figures_of(result: Result) -> list[dict[str, str]]:
    """A row a system: its metric with a 95% bootstrap interval (where there are labels), throughput, inputs cut."""
    metrics, rows = metric_names(result.task), []
    for setting, seconds in result.seconds.items():
        row = {"system": setting}
        if result.inputs.gold is not None:
            found = bootstrap_interval(metrics, result.inputs.gold, result.predictions(setting))
            row[f"{_named(metrics)} [95% interval]"] = str(found)
        row["rows a second"] = f"{len(result.inputs.texts) / seconds:,.1f}"
        row["inputs cut at the front"] = f"{result.inputs_cut[setting]:,}"
        rows.append(row)
    return rows


def metric_names(task: Task) -> tuple[str, ...]:
    """The task's metrics; plain accuracy where they need the groups, which a file of texts lacks."""
    return ("accuracy",) if "em" in task.metrics else task.metrics


def _named(metrics: Sequence[str]) -> str:
    return metrics[0] if len(metrics) == 1 else f"mean of {' and '.join(metrics)}"


def difference_in_words(result: Result) -> str:
    """How DHRD differs from the baseline on these rows: in labels, and where there are labels in the metric."""
    if len(result.probabilities) < 2:
        return ""
    a, b = (result.predictions(setting) for setting in result.probabilities)
    told = f"The two systems disagree on {(a != b).sum():,} of {len(a):,} rows."
    if result.inputs.gold is None:
        return told
    found = paired_comparison(metric_names(result.task), result.inputs.gold, a, b)
    points = f"{100 * found.difference:+.1f} points [{100 * found.low:+.1f}, {100 * found.high:+.1f}]"
    return f"{told} DHRD minus pooled baseline: {points}, p = {found.p_value:.3f} ({found.test}); one run each."


def confusion_figures(result: Result) -> list[go.Figure]:
    """A confusion matrix a system, where there are labels; each a figure, so that they stack where it is narrow."""
    gold, names = result.inputs.gold, result.task.label_names
    if gold is None:
        return []
    found = {
        setting: evaluation.confusion(gold, result.predictions(setting), len(names)) for setting in result.seconds
    }
    figures = [plots.confusion_matrices({setting: matrix}, names) for setting, matrix in found.items()]
    return [figure.update_layout(title_text=None, margin_t=40) for figure in figures]
