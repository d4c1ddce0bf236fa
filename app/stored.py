"""What is stored: the runs that the page may load, the tasks that they were trained on, and their tables."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from pathlib import Path

import pandas as pd
import plotly.graph_objects as go

from dhrd_lib.backbones import EMBEDDED
from dhrd_lib.config import ConfigError, DataConfig, WorkbenchError, user_path
from dhrd_lib.runs import Run, find_runs, load_runs
from dhrd_lib.serving.classifier import read_model_config
from dhrd_lib.studies import plots
from dhrd_lib.studies.ablations import by_seed, factors, load_results, one_factor, summarise
from dhrd_lib.tasks import TASKS, Task, load_rows

EMBEDDED_TASKS = ("support_triage", "everyday_nli")
EXAMPLES = 30
COLUMNS = {
    "run": "run",
    "setting": "setting",
    "task": "task",
    "alpha": "alpha",
    "beta": "beta",
    "seed": "seed",
    "split": "split",
    "primary": "metric (%)",
    "train_seconds": "training (s)",
}


@dataclass(frozen=True)
class Example:
    """A row of a final split: its fields' texts, and the gold label's name."""

    texts: dict[str, str]
    gold: str

    @property
    def title(self) -> str:
        """One line that tells the row from the others."""
        line = " · ".join(" ".join(text.split()) for text in self.texts.values())
        return f"{self.gold}: {line[:90]}{'…' if len(line) > 90 else ''}"


def usable_runs(root: Path) -> list[Run]:
    """The finished runs that kept their model; a grid's may have left it out."""
    return [run for run in find_runs(root) if _has_model(run) and not _fault(run)]


def faults(runs: list[Run]) -> list[str]:
    """A sentence for each model that is kept and can't be read."""
    return [fault for fault in map(_fault, filter(_has_model, runs)) if fault]


def _has_model(run: Run) -> bool:
    return (run.folder / "model" / "config.json").is_file()


def _fault(run: Run) -> str:
    try:
        task_of(run)
    except WorkbenchError as error:
        return str(error)
    return ""


def tasks_of(runs: list[Run]) -> list[str]:
    """The tasks that can be picked: those with a run first, then the embedded ones."""
    return list(dict.fromkeys([run.config.data.task for run in runs] + list(EMBEDDED_TASKS)))


def runs_of(runs: list[Run], task: str, setting: str) -> list[str]:
    """The names of a task's runs of one setting ("pooled baseline", "DHRD", "reasoning only")."""
    return [r.name for r in runs if r.config.data.task == task and r.config.training.setting == setting]


def find_run(root: Path, name: str) -> Run:
    """The run of a name, with its model; the name is looked up, never joined to a path."""
    runs = {run.name: run for run in usable_runs(root)}
    if name not in runs:
        there = ", ".join(map(repr, runs)) or "none"
        raise ConfigError(f"There is no finished run {name!r} with a model; expected one of those stored: {there}.")
    return runs[name]


def written(folder: Path) -> tuple[tuple[str, int], ...]:
    """When a run's metrics and its model's files were last written, which tells a run trained anew from the old."""
    return tuple((file.name, _mtime(file)) for file in (folder / "metrics.json", *sorted(folder.glob("model/*"))))


def _mtime(path: Path) -> int:
    """When a file was last written, in ns; 0 where there is none."""
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return 0


def backbone_of(runs: list[Run], task: str, picked: Iterable[str | None], otherwise: str = EMBEDDED) -> str:
    """The backbone that the first of the picked runs, or of the task's, was trained from, for zero-shot CoT."""
    own = {run.name: run.config.model.backbone for run in runs if run.config.data.task == task}
    return next((own[name] for name in (*picked, *own) if name in own), otherwise)


def find_task(root: Path, name: str) -> Task:
    """A task by name: one of the library's, or a user's file as the first run on it knows it."""
    if name in TASKS:
        return TASKS[name]
    run = next((run for run in usable_runs(root) if run.config.data.task == name), None)
    if run is None:
        raise ConfigError(f"There is no task {name!r}; expected {', '.join(EMBEDDED_TASKS)}, or one with a run.")
    return task_of(run)


def task_of(run: Run) -> Task:
    """The task as a run and its saved model know it.

    A user's file may be gone by now, and another run may read other labels or texts from the same one. Raises
    `WorkbenchError` where the model's configuration is none.
    """
    config = read_model_config(run.folder / "model")
    labels = tuple(run.metrics["label_names"])
    metrics, splits = tuple(run.metrics["task_metrics"]), tuple(run.test_splits)
    return Task(run.config.data.task, config["template"], labels, tuple(config["verbalizers"]), metrics, splits)


def picked_task(root: Path, name: str, picked: Iterable[str | None]) -> Task:
    """The task as the first of the picked runs knows it, or by its name where none is picked."""
    return next(iter(_tasks(root, picked).values()), None) or find_task(root, name)


def shared_task(root: Path, name: str, picked: Iterable[str | None]) -> Task:
    """As `picked_task`; raises `ConfigError` where the picked runs have other labels or fields than each other."""
    tasks = _tasks(root, picked)
    for (one, a), (other, b) in pairwise(tasks.items()):
        for what, of_one, of_other in (
            ("labels", a.label_names, b.label_names),
            ("fields", sorted(a.fields), sorted(b.fields)),
        ):
            if of_one != of_other:
                found = f"Run {one!r} has the {what} {_listed(of_one)}, and run {other!r} {_listed(of_other)}"
                raise ConfigError(f"{found}; expected runs with the same {what}, to compare them.")
    return next(iter(tasks.values()), None) or find_task(root, name)


def _tasks(root: Path, picked: Iterable[str | None]) -> dict[str, Task]:
    """The tasks of the picked runs by name; what is no run, or none any more, is passed over."""
    runs = {run.name: run for run in usable_runs(root)}
    return {name: task_of(runs[name]) for name in picked if name in runs}


def _listed(names: Iterable[str]) -> str:
    return ", ".join(map(repr, names))


def examples(root: Path, name: str, picked: tuple[str | None, ...] = ()) -> tuple[Example, ...]:
    """Rows of the task's first final split, the labels in turn; none where its data can't be had any more.

    Labels and texts are those of the first of the picked runs, or of the first stored one.
    """
    runs = usable_runs(root)
    if name not in tasks_of(runs):  # A path would be a file of the server's.
        return ()
    own = {run.name: run for run in runs if run.config.data.task == name}
    run = next((own[one] for one in (*picked, *own) if one in own), None)
    data = run.config.data if run else DataConfig(task=name)
    try:
        return _examples(data, _data_written(data))
    except (WorkbenchError, OSError):
        return ()


def _data_written(data: DataConfig) -> tuple[tuple[str, int], ...]:
    """When a user's file, or those of a folder, were last written; the library's own tasks stay as they are."""
    if data.task in TASKS:
        return ()
    path = user_path(data.task)
    return tuple((file.name, _mtime(file)) for file in (sorted(path.iterdir()) if path.is_dir() else [path]))


@lru_cache(maxsize=8)  # what raises isn't kept: the data may come
def _examples(data: DataConfig, written: tuple[tuple[str, int], ...]) -> tuple[Example, ...]:
    task, splits = load_rows(data)
    rows = splits[task.test_splits[0]].to_pandas()
    turns = rows.groupby("label").cumcount()
    rows = rows.assign(turn=turns).sort_values(["turn", "label"], kind="stable").head(EXAMPLES)
    return tuple(
        Example({field: row[field] or "" for field in task.fields}, task.label_names[row["label"]])
        for row in rows.to_dict("records")
    )


def runs_table(root: Path) -> pd.DataFrame:
    """One row a stored run and split; metrics in percent, times in seconds."""
    table = load_runs(root)
    if table.empty:
        return pd.DataFrame(columns=list(COLUMNS.values()))
    table["primary"] = (100 * table["primary"]).round(1)
    table["train_seconds"] = table["train_seconds"].round(0)
    return table[list(COLUMNS)].rename(columns=COLUMNS)


def loss_figure(runs: list[Run]) -> go.Figure:
    """The loss curves of runs, each with its setting."""
    history = pd.concat(run.history.assign(setting=run.config.training.setting, name=run.name) for run in runs)
    return plots.loss_curves(history)


def ablation_files(results: Path) -> list[str]:
    """The names of the stored ablations."""
    return [path.stem.removeprefix("ablation_") for path in sorted(results.glob("ablation_*.json"))]


def _ablation(results: Path, name: str) -> pd.DataFrame:
    if name not in ablation_files(results):
        raise ConfigError(f"There is no stored ablation {name!r}; expected one of {ablation_files(results)}.")
    path = results / f"ablation_{name}.json"
    return _results(path, _mtime(path))


@lru_cache(maxsize=16)
def _results(path: Path, written: int) -> pd.DataFrame:
    return load_results(path)


def ablation_figure(results: Path, name: str) -> go.Figure:
    """The metric over the first factor of a stored ablation, a line a value of the second, on the final split."""
    table = _ablation(results, name)
    final = table[table["split"] == next(split for split in table["split"] if split != "dev")]
    factor, line = [*factors(table), None][:2]
    rows = one_factor(final, factor, line)
    return plots.factor_effect(summarise(rows, [factor, "series"]), by_seed(rows), factor)


def ablation_table(results: Path, name: str) -> pd.DataFrame:
    """One row a setting and split of a stored ablation: the fields that tell the settings apart, and the metric.

    The metric is the mean over seeds with its 95% interval, in percent.
    """
    table = _ablation(results, name)
    found = summarise(table, factors(table))
    for column in ("value", "low", "high", "std"):
        found[column] = (100 * found[column]).round(1)
    return found.rename(
        columns={"value": "metric (%)", "low": "low (%)", "high": "high (%)", "std": "std (points)"}
    )
