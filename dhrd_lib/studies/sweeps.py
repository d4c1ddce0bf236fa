"""Grids: every combination of some configuration values as a run, shared by any number of processes.

A run's folder decides what became of a cell: it is finished with metrics.json, failed with error.txt, and taken
while its lock is held. The operating system frees the lock of a killed process, and another one resumes its cell.
"""

from __future__ import annotations

import gc
import hashlib
import itertools
import json
import multiprocessing
import re
import time
import traceback
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Self

import optuna
import pandas as pd
import torch
from filelock import FileLock, Timeout
from optuna.distributions import CategoricalDistribution
from pydantic import BeforeValidator, Field, model_validator
from sqlalchemy.exc import SQLAlchemyError

from dhrd_lib.config import Config, ConfigError, RunConfig, WorkbenchError
from dhrd_lib.runs import is_finished, load_run, load_runs, run_lock
from dhrd_lib.training import drop_checkpoints, train

Value = str | bool | int | float | None
Values = Annotated[
    tuple[Value, ...], Field(min_length=1), BeforeValidator(lambda of: tuple(of) if isinstance(of, list) else of)
]
_DONE = ("finished", "failed")
_SECTIONS = ("model", "data", "training")
DEFAULTS = {f"{section}.{k}": v for section in _SECTIONS for k, v in RunConfig().to_dict()[section].items()}


class Grid(Config):
    """The values that each varied field takes, on top of `base`, which has `RunConfig`'s sections.

    A cell's run is named after the grid and those of its values that aren't the base's, so that grids of one name
    and base share the cells that they have in common.
    """

    name: str
    grid: Annotated[dict[str, Values], Field(min_length=1)]
    base: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _check(self) -> Self:
        RunConfig.from_dict({**self.base, "name": self.name})
        for name, values in self.grid.items():
            if name not in DEFAULTS or len(set(values)) < len(values):  # 1, 1.0 and true are equal.
                raise ConfigError(f"grid.{name} is {list(values)!r}; expected a run's field, and each value once.")
        return self

    @cached_property
    def cells(self) -> dict[str, dict[str, Value]]:
        """Each cell's values by the name of its run."""
        cells, base = {}, RunConfig.from_dict(self.base)
        for combination in itertools.product(*self.grid.values()):
            cell, name = dict(zip(self.grid, combination, strict=True)), self.name
            for key, value in cell.items():
                section, field = key.split(".")
                if field == "seed" or value != getattr(getattr(base, section), field):
                    name += f"-{field}" + re.sub(r"[^\w.+-]+", "_", str(value))
            if name in cells or len(name) > 120:  # Values may look the same in a file name, or be too long for it.
                name = f"{name[:100]}-{digest(cell)}"
            cells[name] = cell
        return cells

    def config(self, run: str) -> RunConfig:
        """Return the configuration of a cell's run; raises `ConfigError` where its values don't go together."""
        return RunConfig.from_dict({**self.base, "name": run}).replace(self.cells[run])


def digest(value: Any) -> str:
    """Return eight hex digits that depend on a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:8]


def sweep(
    grid: Grid, root: str | Path = "runs", *, storage: str | None = None, workers: int = 1, again: bool = False
) -> pd.DataFrame:
    """Train every cell that is neither finished nor failed, and return `cells` of the grid.

    Processes and machines with one folder of runs share the cells. A cell whose process was killed resumes from its
    last checkpoint. A cell that fails is listed with its reason, and the others are trained all the same.

    Args:
        storage: URL of an Optuna `RDBStorage` that lists the finished cells as trials, for Optuna's own tools.
        workers: processes on this machine; for several GPUs, start one sweep per GPU instead, each with its own
            CUDA_VISIBLE_DEVICES.
        again: train failed cells once more.
    """
    root = Path(root)
    root.mkdir(parents=True, exist_ok=True)
    if storage:
        _record(grid, root, storage)  # Refuses one that can't be used before hours of training.
    for run in grid.cells if again else ():
        (root / run / "error.txt").unlink(missing_ok=True)
    run_workers(workers, _train_cells, grid, root, storage)
    for run in grid.cells:
        if is_finished(root / run):
            drop_checkpoints(root / run)  # Those of a process that was killed right after the run's last file.
    return cells(grid, root)


def cells(grid: Grid, root: str | Path = "runs") -> pd.DataFrame:
    """Return one row per cell, or per cell and split where it is finished: run, state, reason, values and metrics.

    `state` is "finished", "failed" (with a `reason`), "running", "stopped" (resumes at the next call) or "waiting".
    Values and metrics are the columns of `load_runs`; a run with `beta = 0` has no metrics.
    """
    rows = [
        {"run": run, **dict(zip(("state", "reason"), _state(grid, Path(root), run), strict=True))}
        | {key.split(".")[1]: value for key, value in cell.items()}
        for run, cell in grid.cells.items()
    ]
    table, runs = pd.DataFrame(rows), load_runs(root)
    if runs.empty:
        return table
    runs = runs[runs["run"].isin(table.loc[table["state"] == "finished", "run"])]
    return table.merge(runs.drop(columns=[key.split(".")[1] for key in grid.grid]), on="run", how="left")


def _state(grid: Grid, root: Path, run: str) -> tuple[str, str | None]:
    folder = root / run
    stored, error = folder / "config.json", folder / "error.txt"
    try:
        if grid.config(run) != (RunConfig.load(stored) if stored.is_file() else grid.config(run)):
            raise ConfigError(f"{folder} holds a run of another configuration; expected another name of the grid.")
    except ConfigError as problem:
        return "failed", str(problem)
    if is_finished(folder):
        return "finished", None
    if error.is_file():
        return "failed", error.read_text(encoding="utf-8").partition("\n")[0]
    if not stored.is_file():
        return "waiting", None
    return ("stopped" if is_free(folder) else "running"), None


def is_free(folder: Path) -> bool:
    """Return whether no process holds the lock of a run's folder."""
    if not folder.is_dir():
        return True
    try:
        with run_lock(folder).acquire(timeout=0):
            return True
    except Timeout:
        return False


def _train_cells(grid: Grid, root: Path, storage: str | None) -> None:
    # Cells that were begun come last: one that kills its process each time mustn't keep the others from training.
    remaining = sorted(grid.cells, key=lambda run: (root / run).exists())
    while remaining:
        taken = [run for run in remaining if not _train_cell(grid, root, run, storage)]
        if taken == remaining:
            time.sleep(1)  # Other processes train them; one that is killed leaves its cell to this one.
        remaining = taken


def _train_cell(grid: Grid, root: Path, run: str, storage: str | None) -> bool:
    """Train a cell unless it is finished or failed; return False where another process holds it."""
    if _state(grid, root, run)[0] in _DONE:
        return True
    try:
        lock = run_lock(root / run).acquire(timeout=0)
    except Timeout:
        return False
    with lock:
        if _state(grid, root, run)[0] in _DONE:  # Another process was faster.
            return True
        try:
            train(grid.config(run), root)
        except Exception as error:
            reason = reason_of(error)
            print(f"{run} failed: {reason}")
            (root / run / "error.txt").write_text(f"{reason}\n\n{traceback.format_exc()}", encoding="utf-8")
        if storage:
            _record(grid, root, storage)
    gc.collect()  # Else a GPU would hold the last model beside the next one.
    return True


def _record(grid: Grid, root: Path, storage: str) -> None:
    """Add finished cells to the grid's study, with dev's primary metric; those with `beta = 0` have none."""
    choices = {key: CategoricalDistribution(values) for key, values in grid.grid.items()}
    with FileLock(root / f"{grid.name}.lock"):
        study = open_study(f"{grid.name}-{digest(grid.to_dict())}", storage)
        recorded = {trial.user_attrs["run"] for trial in study.get_trials(deepcopy=False)}
        for run, cell in grid.cells.items():
            if run not in recorded and _state(grid, root, run)[0] == "finished":
                value = load_run(root / run).metrics["splits"]["dev"].get("primary")
                trial = {"params": cell, "distributions": choices, "value": value, "user_attrs": {"run": run}}
                if value is not None:
                    study.add_trial(optuna.create_trial(**trial))


def open_study(name: str, url: str, **options: Any) -> optuna.Study:
    """Open an Optuna study, or create it; raises `ConfigError` where the storage can't be used."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    # Processes that write at once wait for each other; SQLite gives up after five seconds by default.
    engine = {"connect_args": {"timeout": 60}} if url.startswith("sqlite") else None
    try:
        storage = optuna.storages.RDBStorage(url, engine_kwargs=engine)
        return optuna.create_study(
            storage=storage, study_name=name, direction="maximize", load_if_exists=True, **options
        )
    except (SQLAlchemyError, optuna.exceptions.OptunaError, ImportError) as error:
        reason = reason_of(getattr(error, "orig", None) or error)  # Not the URL, which may hold a password.
        raise ConfigError(f"the storage can't be used ({reason}); expected a database for Optuna.") from error


def reason_of(error: Exception) -> str:
    """Return the first line of an error, with its type where the user can't fix it."""
    reason = str(error).strip().partition("\n")[0]
    return reason if isinstance(error, WorkbenchError) else f"{type(error).__name__}: {reason}"


def run_workers(workers: int, work: Callable[..., None], *args: Any) -> None:
    """Call `work` in this process, or in several new ones that share its number of threads."""
    if workers == 1:
        return work(*args)
    # A fresh interpreter each: a forked one would share this one's threads and GPU.
    context, threads = multiprocessing.get_context("spawn"), max(torch.get_num_threads() // workers, 1)
    processes = [context.Process(target=_with_threads, args=(threads, work, *args)) for _ in range(workers)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    return None


def _with_threads(threads: int, work: Callable[..., None], *args: Any) -> None:
    torch.set_num_threads(threads)
    work(*args)
