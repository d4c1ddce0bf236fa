"""Grids and searches: runs of many configurations, shared by any number of processes and machines.

A run's folder decides what became of it: it is finished with metrics.json, failed with error.txt, and taken while
its lock is held. The operating system frees the lock of a killed process, and another one resumes the run.
"""

from __future__ import annotations

import gc
import hashlib
import itertools
import json
import multiprocessing
import re
import shutil
import time
import traceback
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import optuna
import pandas as pd
import torch
from filelock import FileLock, Timeout
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import TrialState
from pydantic import Field, model_validator
from sqlalchemy.exc import SQLAlchemyError
from transformers import TrainerCallback, TrainerState

from dhrd_lib.config import Config, ConfigError, PositiveInt, RunConfig, Seed, WorkbenchError
from dhrd_lib.runs import is_finished, load_run, load_runs, run_lock
from dhrd_lib.training import drop_checkpoints, train

_SECTIONS = ("model", "data", "training")
DEFAULTS = {f"{section}.{k}": v for section in _SECTIONS for k, v in RunConfig().to_dict()[section].items()}
FieldName = Literal[tuple(DEFAULTS)]
Values = Annotated[tuple[str | bool | int | float | None, ...], Field(min_length=1, strict=False)]
Range = dict[Literal["low", "high", "log", "step"], float | bool]
_DONE = ("finished", "failed")


class _Plan(Config):
    name: str
    base: RunConfig = RunConfig()

    @model_validator(mode="after")
    def _check_name(self) -> Self:
        self.base.replace({"name": self.name})
        return self

    def open_study(self, url: str) -> optuna.Study:
        """Open the plan's Optuna study, or create it; raises `ConfigError` where the storage can't be used."""
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        name = f"{self.name}-{digest({**self.to_dict(), 'n_trials': None})}"  # More trials aren't another study.
        # Processes that write at once wait for each other; SQLite gives up after five seconds by default.
        engine = {"connect_args": {"timeout": 60}} if url.startswith("sqlite") else None
        options = {"direction": "maximize", "pruner": optuna.pruners.MedianPruner(), "load_if_exists": True}
        try:
            storage = optuna.storages.RDBStorage(url, engine_kwargs=engine)
            return optuna.create_study(storage=storage, study_name=name, **options)
        except (SQLAlchemyError, optuna.exceptions.OptunaError, ImportError) as error:
            reason = _reason_of(getattr(error, "orig", None) or error)  # Not the URL, which may hold a password.
            raise ConfigError(f"the storage can't be used ({reason}); expected a database for Optuna.") from error


class Grid(_Plan):
    """Every combination of the values of some fields, such as "training.alpha", on top of `base`.

    A cell's run is named after the grid and those of its values that aren't the base's, so that grids of one name
    and base share the cells that they have in common.
    """

    grid: Annotated[dict[FieldName, Values], Field(min_length=1)]

    @cached_property
    def cells(self) -> dict[str, dict[str, Any]]:
        """Each cell's values by the name of its run."""
        cells = {}
        for combination in itertools.product(*self.grid.values()):
            cell, name = dict(zip(self.grid, combination, strict=True)), self.name
            for key, value in cell.items():
                section, field = key.split(".")
                if field == "seed" or value != getattr(getattr(self.base, section), field):
                    name += f"-{field}" + re.sub(r"[^\w.+-]+", "_", str(value))
            if name in cells or len(name) > 120:  # Values may look the same in a file name, or be too long for it.
                name = f"{name[:100]}-{digest(cell)}"
            cells[name] = cell
        return cells

    def config(self, run: str) -> RunConfig:
        """Return the configuration of a cell's run; raises `ConfigError` where its values don't go together."""
        return self.base.replace({"name": run, **self.cells[run]})


def digest(value: Any) -> str:
    """Return eight hex digits that depend on a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:8]


def sweep(
    grid: Grid, root: str | Path = "runs", *, storage: str | None = None, workers: int = 1, again: bool = False
) -> pd.DataFrame:
    """Train every cell that is neither finished nor failed (`again`: nor finished), and return `cells`.

    `storage` is the URL of an Optuna `RDBStorage` that lists the finished cells, for Optuna's own tools; `workers`
    are processes on this machine (for several GPUs, start one sweep per GPU with its own CUDA_VISIBLE_DEVICES).
    """
    root = Path(root)
    root.mkdir(parents=True, exist_ok=True)
    if storage:
        _list_finished(grid, root, storage)  # Refuses one that can't be used before hours of training.
    for run in grid.cells if again else ():
        (root / run / "error.txt").unlink(missing_ok=True)
    _run_workers(workers, _train_cells, grid, root, storage)
    for run in grid.cells:
        if is_finished(root / run):
            drop_checkpoints(root / run)  # Those of a process that was killed right after the run's last file.
    return cells(grid, root)


def cells(grid: Grid, root: str | Path = "runs") -> pd.DataFrame:
    """Return one row per cell, or per cell and split where it is finished: run, state, reason, values and metrics.

    `state` is "finished", "failed" (with a `reason`), "running", "stopped" (resumes at the next call) or "waiting".
    Values and metrics are the columns of `load_runs`; a run with `beta = 0` has no metrics.
    """
    table = pd.DataFrame({"run": run, **cell} for run, cell in grid.cells.items())
    table = table.rename(columns=lambda key: key.rpartition(".")[2])
    table[["state", "reason"]] = [_state(grid, Path(root), run) for run in grid.cells]
    runs = load_runs(root)
    if runs.empty:
        return table
    runs = runs[runs["run"].isin(table.loc[table["state"] == "finished", "run"])]
    return table.merge(runs.drop(columns=[key.split(".")[1] for key in grid.grid]), on="run", how="left")


def _state(grid: Grid, root: Path, run: str) -> tuple[str, str | None]:
    stored, error = root / run / "config.json", root / run / "error.txt"
    if stored.is_file() and RunConfig.load(stored) != grid.config(run):
        return "failed", f"{root / run} holds a run of another configuration; expected another name of the grid."
    if is_finished(root / run):
        return "finished", None
    if error.is_file():
        return "failed", error.read_text(encoding="utf-8").partition("\n")[0]
    return ("waiting" if not stored.is_file() else "stopped" if _is_free(root / run) else "running"), None


def _is_free(folder: Path) -> bool:
    try:
        with run_lock(folder).acquire(timeout=0):
            return True
    except Timeout:
        return False


def _train_cells(threads: int, grid: Grid, root: Path, storage: str | None) -> None:
    torch.set_num_threads(threads)
    # Cells that were begun come last: one that kills its process each time mustn't keep the others from training.
    runs = sorted(grid.cells, key=lambda run: (root / run).exists())
    while remaining := [run for run in runs if _state(grid, root, run)[0] not in _DONE]:
        for run in remaining:
            try:
                with run_lock(root / run).acquire(timeout=0):
                    if _state(grid, root, run)[0] not in _DONE:  # Another process may have been faster.
                        _train_cell(grid, root, run)
            except Timeout:
                time.sleep(1)  # Another process trains it; one that is killed leaves its cell to this one.
                continue
            if storage:
                _list_finished(grid, root, storage)


def _train_cell(grid: Grid, root: Path, run: str) -> None:
    try:
        train(grid.config(run), root)
    except Exception as error:
        print(f"{run} failed: {_reason_of(error)}")
        (root / run / "error.txt").write_text(f"{_reason_of(error)}\n\n{traceback.format_exc()}", encoding="utf-8")
    gc.collect()  # Else a GPU would hold the last model beside the next one.


def _list_finished(grid: Grid, root: Path, url: str) -> None:
    """Add finished cells to the grid's study, with dev's primary metric; those with `beta = 0` have none."""
    choices = {key: CategoricalDistribution(values) for key, values in grid.grid.items()}
    with FileLock(root / f"{grid.name}.lock"):
        study = grid.open_study(url)
        listed = {trial.user_attrs["run"] for trial in study.trials}
        for run in [run for run in grid.cells if run not in listed]:
            if _state(grid, root, run)[0] == "finished" and grid.config(run).training.beta > 0:
                value = load_run(root / run).metrics["splits"]["dev"]["primary"]
                trial = {"params": grid.cells[run], "distributions": choices, "user_attrs": {"run": run}}
                study.add_trial(optuna.create_trial(value=value, **trial))


class Search(_Plan):
    """Fields with a list of values, or with a range: `low` and `high`, both included, and perhaps `log`, `step`.

    `n_trials` counts the trials of all calls and processes.
    """

    space: Annotated[dict[FieldName, Range | Values], Field(min_length=1)]
    n_trials: PositiveInt = 20
    seed: Seed = 0

    @property
    def distributions(self) -> dict[str, BaseDistribution]:
        """Optuna's distribution of each field; raises `ConfigError` where a range isn't one."""
        choices: dict[str, BaseDistribution] = {}
        for name, values in self.space.items():
            numbers = IntDistribution if type(DEFAULTS[name]) is int else FloatDistribution
            try:
                choices[name] = CategoricalDistribution(values) if isinstance(values, tuple) else numbers(**values)
            except (TypeError, ValueError) as error:
                raise ConfigError(f"space.{name}: {str(error).rstrip('.')}.") from error
        return choices


def tune(
    search: Search, root: str | Path = "runs", storage: str | None = None, *, workers: int = 1
) -> optuna.Study:
    """Train runs for the best metric on dev, sampled by TPE, until the search has its trials; see `trials`.

    Processes and machines with one `storage` (the URL of an Optuna `RDBStorage`; by default a SQLite file in
    `root`, for one machine) and one `root` share the search. A run behind the median of the others at the same step
    is pruned, and its folder removed.
    """
    root = Path(root)
    root.mkdir(parents=True, exist_ok=True)
    url = storage or f"sqlite:///{(root / search.name).resolve()}.sqlite3"
    with FileLock(root / f"{search.name}.lock"):  # Only one process creates the tables.
        study = search.open_study(url)
    _run_workers(workers, _train_trials, search, root, url)
    return study


def trials(study: optuna.Study) -> pd.DataFrame:
    """Return one row per run of a search: value (dev's metric, a fraction), state, fields, run, reason if failed.

    `state` is "finished", "pruned", "failed", "running" or "waiting".
    """
    table = study.trials_dataframe(("value", "state", "params", "user_attrs"))
    table = table.rename(columns=lambda name: re.sub(r"^(params_\w+\.|user_attrs_)", "", name))
    table["state"] = table["state"].str.lower().replace({"complete": "finished", "fail": "failed"})
    return table.drop_duplicates("run", keep="last", ignore_index=True)  # A resumed run has several trials.


def _train_trials(threads: int, search: Search, root: Path, url: str) -> None:
    torch.set_num_threads(threads)
    study = search.open_study(url)
    while True:
        with FileLock(root / f"{search.name}.lock"):  # No process sees a trial before its run is locked.
            if trial := _next_trial(search, study, root):
                lock = run_lock(root / trial.user_attrs["run"]).acquire()
        if trial:
            with lock:
                _train_trial(search, study, root, trial)
        elif study.get_trials(states=(TrialState.RUNNING,)):
            time.sleep(1)  # Other processes train the last trials; a killed one leaves its trial to this one.
        else:
            return


def _next_trial(search: Search, study: optuna.Study, root: Path) -> optuna.Trial | None:
    for trial in study.get_trials(states=(TrialState.RUNNING,)):
        if _is_free(root / trial.user_attrs["run"]):
            # A process stores its trial's result before it frees the lock, perhaps since the trials were read.
            ended = study.tell(trial.number, state=TrialState.FAIL, skip_if_finished=True)
            if ended.state == TrialState.FAIL:
                names = ("params", "distributions", "intermediate_values", "user_attrs")
                copied = {name: getattr(trial, name) for name in names}
                study.add_trial(optuna.create_trial(state=TrialState.WAITING, **copied))
    n_runs = len({trial.user_attrs["run"] for trial in study.trials})
    if not study.get_trials(states=(TrialState.WAITING,)):
        if n_runs >= search.n_trials:
            return None
        study.enqueue_trial({}, {"run": f"{study.study_name}-{n_runs:03d}"})
    # A new sampler for each trial: a resumed search samples what an uninterrupted one would.
    study.sampler = optuna.samplers.TPESampler(seed=search.seed + n_runs)
    return study.ask(search.distributions)


def _train_trial(search: Search, study: optuna.Study, root: Path, trial: optuna.Trial) -> None:
    run = trial.user_attrs["run"]
    try:
        config = search.base.replace({"name": run, **trial.params})
        if config.training.beta == 0:
            raise ConfigError("beta is 0; expected a class loss, whose classifier has a metric on dev.")
        study.tell(trial, train(config, root, [_Pruning(trial)]).metrics["splits"]["dev"]["primary"])
    except optuna.TrialPruned:
        study.tell(trial, state=TrialState.PRUNED)
        shutil.rmtree(root / run)
    except Exception as error:
        print(f"{run} failed: {_reason_of(error)}")
        trial.set_user_attr("reason", _reason_of(error))
        study.tell(trial, state=TrialState.FAIL)
    gc.collect()  # Else a GPU would hold the last model beside the next one.


class _Pruning(TrainerCallback):
    """Reports dev's metric to the trial at each evaluation, and ends a run that falls behind the others."""

    def __init__(self, trial: optuna.Trial) -> None:
        self.trial = trial

    def on_evaluate(self, _args: Any, state: TrainerState, _control: Any, metrics: dict, **_: Any) -> None:
        self.trial.report(metrics["eval_primary"], state.global_step)
        if self.trial.should_prune():
            raise optuna.TrialPruned


def _reason_of(error: Exception) -> str:
    """Return the first line of an error, with its type where the user can't fix it."""
    reason = str(error).strip().partition("\n")[0]
    return reason if isinstance(error, WorkbenchError) else f"{type(error).__name__}: {reason}"


def _run_workers(workers: int, work: Callable[..., None], *args: Any) -> None:
    """Call `work(threads, *args)` in this process, or in several new ones that share its threads."""
    threads = max(torch.get_num_threads() // workers, 1)
    if workers == 1:
        return work(threads, *args)
    # A fresh interpreter each: a forked one would share this one's threads and GPU.
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=work, args=(threads, *args)) for _ in range(workers)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    return None
