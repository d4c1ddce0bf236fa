"""Stored runs and results as the page shows them: pickers, tasks, examples, model cards, tables, figures."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from pathlib import Path

import pandas as pd
import plotly.graph_objects as go

from dhrd_lib.config import ConfigError, DataConfig, WorkbenchError, user_path
from dhrd_lib.runs import Run, find_runs, load_run, load_runs
from dhrd_lib.studies import plots
from dhrd_lib.studies.ablations import AblationResult
from dhrd_lib.studies.statistics import bootstrap_interval
from dhrd_lib.studies.tables import load_results
from dhrd_lib.tasks import TASKS, Task, load_rows

EMBEDDED_TASKS = ("support_triage", "everyday_nli")
EXAMPLES = 30
_COLUMNS = {
    **{name: name for name in ("run", "setting", "task", "alpha", "beta", "seed", "split")},
    "primary": "metric (%)",
    "train_seconds": "training (s)",
}


@dataclass(frozen=True)
class Example:
    """A row of a test split: its texts by field, and the gold label's name."""

    texts: dict[str, str]
    gold: str

    @property
    def title(self) -> str:
        """The row in one line."""
        line = " · ".join(" ".join(text.split()) for text in self.texts.values())
        return f"{self.gold}: {line[:90]}{'…' if len(line) > 90 else ''}"


def usable_runs(root: Path) -> list[Run]:
    """Return the finished runs that kept their model; those of a grid may have dropped it."""
    return [run for run in find_runs(root) if _has_model(run.folder)]


def _has_model(folder: Path) -> bool:
    return (folder / "model" / "config.json").is_file()


def find_run(root: Path, name: str) -> Run:
    """Return the run of a name, with its model; the name is looked up, never joined to a path."""
    folders = {path.parent.name: path.parent for path in sorted(root.glob("*/metrics.json"))}
    usable = {name: folder for name, folder in folders.items() if _has_model(folder)}
    if str(name) not in usable:
        stored = ", ".join(map(repr, usable)) or "none"
        raise ConfigError(f"There is no finished run {name!r} with a model; expected one of those: {stored}.")
    return load_run(usable[str(name)])


def tasks_of(runs: Sequence[Run]) -> list[str]:
    """Return the tasks that can be picked: those with a run first, then the embedded ones."""
    return list(dict.fromkeys([run.config.data.task for run in runs] + list(EMBEDDED_TASKS)))


def runs_of(runs: Sequence[Run], task: str, setting: str) -> list[str]:
    """Return the names of a task's runs of one setting ("pooled baseline", "DHRD", "reasoning only")."""
    return [r.name for r in runs if r.config.data.task == task and r.config.training.setting == setting]


def reference_run(root: Path, task: str, picked: Iterable[str | None] = ()) -> Run | None:
    """Return the first picked run on a task, or else the task's first; it decides on labels and fields."""
    of_task = {run.name: run for run in usable_runs(root) if run.config.data.task == task}
    return next((of_task[name] for name in (*picked, *of_task) if name in of_task), None)


def task_of(run: Run) -> Task:
    """Return the task as a run knows it: its data file may be gone or changed by now."""
    saved = json.loads((run.folder / "model" / "config.json").read_text(encoding="utf-8"))
    labels, metrics = tuple(run.label_names), tuple(run.metrics["task_metrics"])
    verbalizers, splits = tuple(saved["verbalizers"]), tuple(run.test_splits)
    return Task(run.config.data.task, saved["template"], labels, verbalizers, metrics, splits)


def task_for(root: Path, name: str, picked: Iterable[str | None] = ()) -> Task:
    """Return the task as its reference run knows it, or one of the library's."""
    if run := reference_run(root, name, picked):
        return task_of(run)
    if name in TASKS:
        return TASKS[name]
    raise ConfigError(f"There is no task {name!r}; expected {', '.join(EMBEDDED_TASKS)}, or one with a run.")


def check_comparable(root: Path, picked: Iterable[str | None]) -> None:
    """Raise `ConfigError` where picked runs have other labels or fields than each other."""
    usable = {run.name: run for run in usable_runs(root)}
    tasks = {name: task_of(usable[name]) for name in picked if name in usable}
    for (first, a), (second, b) in pairwise(tasks.items()):
        for kind, of_first, of_second in (
            ("labels", a.label_names, b.label_names),
            ("fields", sorted(a.fields), sorted(b.fields)),
        ):
            if of_first != of_second:
                one, other = (", ".join(map(repr, names)) for names in (of_first, of_second))
                problem = f"Run {first!r} has the {kind} {one}, and run {second!r} {other}"
                raise ConfigError(f"{problem}; expected runs with the same {kind}, to compare them.")


def examples(root: Path, task: str, picked: Sequence[str | None] = ()) -> list[Example]:
    """Return rows of the task's first test split, the labels in turn; none where its data is gone."""
    if task not in tasks_of(usable_runs(root)):  # A path would be a file of the server's.
        return []
    run = reference_run(root, task, picked)
    data = run.config.data if run else DataConfig(task=task)
    path = user_path(task)
    files = [] if task in TASKS else sorted(path.iterdir()) if path.is_dir() else [path]
    try:
        return _examples(data, tuple(file.stat().st_mtime_ns for file in files))
    except (WorkbenchError, OSError):
        return []


@lru_cache(maxsize=8)  # An exception isn't cached: the data may come back.
def _examples(data: DataConfig, modified_ns: tuple[int, ...]) -> list[Example]:
    task, splits = load_rows(data)
    rows = splits[task.test_splits[0]].to_pandas()
    turns = rows.groupby("label").cumcount()
    rows = rows.assign(turn=turns).sort_values(["turn", "label"], kind="stable").head(EXAMPLES)
    return [
        Example({field: row[field] or "" for field in task.fields}, task.label_names[row["label"]])
        for row in rows.to_dict("records")
    ]


def runs_table(root: Path) -> pd.DataFrame:
    """Return one row per stored run and split: metrics in percent, times in seconds.

    A run with beta = 0 has no metric: its classifier is untrained.

    """
    table = load_runs(root).reindex(columns=list(_COLUMNS))
    table["primary"] = (100 * table["primary"].astype(float)).round(1)

    table["train_seconds"] = table["train_seconds"].astype(float).round(0)
    return table.rename(columns=_COLUMNS)


def metrics_by_split(run: Run) -> list[dict[str, str]]:
    """Return one row per split: rows and metric with its 95% bootstrap interval."""
    metrics, table = run.metrics["task_metrics"], []
    for split in run.metrics["splits"]:
        rows, interval = run.predictions(split).sort_values("idx"), "none: answers by CoT decoding"
        if run.config.training.beta > 0:
            groups = rows["group"] if rows["group"].notna().all() else None
            interval = str(bootstrap_interval(metrics, rows["label_id"], rows["prediction_id"], groups))
        name = f"{' and '.join(metrics)} [95% interval]"
        table.append({"split": split, "rows": f"{len(rows):,}", name: interval})
    return table


def loss_figure(picked: Run, runs: Iterable[Run]) -> go.Figure:
    """Return the loss curves of a run and of one run per other setting, of the same task and seed."""
    by_setting = {picked.config.training.setting: picked}
    for run in runs:
        if (run.config.data.task, run.config.training.seed) == (
            picked.config.data.task,
            picked.config.training.seed,
        ):
            by_setting.setdefault(run.config.training.setting, run)
    histories = [run.history.assign(setting=setting, name=run.name) for setting, run in by_setting.items()]
    return plots.loss_curves(pd.concat(histories))


def ablation_files(results: Path) -> list[str]:
    """Return the names of the stored ablations."""
    return [path.stem.removeprefix("ablation_") for path in sorted(results.glob("ablation_*.json"))]


def ablation(results: Path, name: str) -> AblationResult:
    """Return a stored ablation."""
    if name not in ablation_files(results):
        raise ConfigError(f"There is no stored ablation {name!r}; expected one of {ablation_files(results)}.")
    return AblationResult(name, load_results(results / f"ablation_{name}.json"))


def ablation_table(result: AblationResult) -> pd.DataFrame:
    """Return one row per setting and split: its factors, mean over seeds and 95% interval, in percent."""
    rows = result.summary().drop(columns="task")  # which is in the ablation's name
    percent = {"value": "metric (%)", "low": "low (%)", "high": "high (%)", "std": "std (points)"}
    for column in percent:
        rows[column] = (100 * rows[column]).round(1)
    return rows.rename(columns=percent)
