"""Grids: every combination of some configuration values as a run, worked through as an Optuna study.

Optuna decides which cell is next and keeps what became of it; a cell is a call of `train`, so its run folder
holds the result, and a cell that was stopped goes on from its last checkpoint. Processes and machines that
share a storage and a folder of runs work on one grid together.
"""

from __future__ import annotations

import difflib
import hashlib
import itertools
import json
import multiprocessing
import re
import time
import warnings
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import optuna
import pandas as pd
import torch
from optuna.exceptions import ExperimentalWarning, OptunaError, UpdateFinishedTrialError
from optuna.storages import RDBStorage, RetryHeartbeatStaleTrialCallback, fail_stale_trials
from optuna.storages._rdb.models import TrialHeartbeatModel
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy.exc import SQLAlchemyError

from dhrd_lib.backbones import locked, writing
from dhrd_lib.config import (
    ConfigError,
    DataConfig,
    ModelConfig,
    RunConfig,
    TrainingConfig,
    WorkbenchError,
    read_json,
    reason_of,
)
from dhrd_lib.runs import is_finished, load_run, load_runs
from dhrd_lib.training import drop_checkpoints, train

HEARTBEAT_SECONDS = 20
# A cell counts as killed when its process hasn't been heard of for so many heartbeats.
_MISSED_HEARTBEATS = 4
# A cell that kills its process each time must not take down every worker.
_MAX_RETRIES = 3
_FIELDS = {
    f"{section}.{name}"
    for section, of in (("model", ModelConfig), ("data", DataConfig), ("training", TrainingConfig))
    for name in of.model_fields
}

Value = str | float | int | bool | None


@dataclass(frozen=True)
class Grid:
    """A name, the values that all cells share, and for each varied field the values that it takes.

    `base` has `RunConfig`'s sections; `values` has fields as "training.alpha". A cell's run is named after
    the grid and those of the cell's values that aren't the base's, so that the same grid meets the same run
    folders again, and grids of one name and base share the cells that they have in common.
    """

    name: str
    values: dict[str, tuple[Value, ...]]
    base: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        values = {
            name: tuple(of) if isinstance(of, list | tuple) else _refuse(name, of)
            for name, of in self.values.items()
        }
        object.__setattr__(self, "values", values)
        if not values:
            raise ConfigError("the grid varies no field; expected one or more, such as 'training.alpha'.")
        for name, of in values.items():
            _check_values(name, of)
        self._config(self.name, {})  # refuses a name that is no plain folder name, too

    @classmethod
    def load(cls, path: str | Path) -> Grid:
        """Read `{"name": …, "base": {…}, "grid": {"training.alpha": [0, 1], …}}`; raises `ConfigError`."""
        given = read_json(path)
        if not isinstance(given, dict) or not {"name", "grid"} <= set(given) <= {"name", "base", "grid"}:
            raise ConfigError(f"{path} is no grid; expected an object with name, grid, and perhaps base.")
        if not isinstance(given["grid"], dict) or not isinstance(given.get("base", {}), dict):
            raise ConfigError(f"{path} is no grid; expected objects as its grid and base.")
        return cls(given["name"], given["grid"], given.get("base", {}))

    @cached_property  # Whoever asks for one cell's configuration asks for all cells.
    def cells(self) -> dict[str, dict[str, Value]]:
        """Each cell's values by the name of its run."""
        cells, shared = {}, self._config("base", {})
        for chosen in itertools.product(*self.values.values()):
            cell = dict(zip(self.values, chosen, strict=True))
            told = {key: value for key, value in cell.items() if _is_told(key, value, shared)}
            name = "-".join([self.name, *(f"{_short(key)}{_slug(value)}" for key, value in told.items())])
            # Two values that read the same as a part of a file's name, or one that is too long for it.
            if name in cells or len(name) > 120:
                name = f"{name[:100]}-{digest(cell)}"
            cells[name] = cell
        return cells

    def config(self, run: str) -> RunConfig:
        """The configuration of a cell's run; raises `ConfigError` where its values don't go together."""
        return self._config(run, self.cells[run])

    def _config(self, run: str, cell: dict[str, Value]) -> RunConfig:
        config = {**self.base, "name": run}
        for key, value in cell.items():
            section, name = key.split(".")
            config[section] = {**config.get(section, {}), name: value}
        return RunConfig.from_dict(config)

    @property
    def study_name(self) -> str:
        """The name of the Optuna study: another base or other values make another study."""
        return f"{self.name}-{digest([self.base, self.values])}"


def _refuse(name: str, values: object) -> tuple:
    raise ConfigError(f"grid field {name} is {values!r}; expected a list of values.")


def _check_values(name: str, values: tuple[Value, ...]) -> None:
    if name not in _FIELDS:
        near = difflib.get_close_matches(name, _FIELDS, n=1, cutoff=0)[0]
        raise ConfigError(f"grid field {name!r} is no field of a run's configuration; did you mean {near!r}?")
    for value in values:
        if not isinstance(value, str | int | float | None):
            raise ConfigError(f"grid field {name} has {value!r}; expected texts, numbers, truth values or null.")
    # By their words, as two NaN aren't equal, and by what they are: 1, 1.0 and true are one value to Optuna.
    if not values or min(len(set(map(repr, values))), len(set(values))) < len(values):
        raise ConfigError(f"grid field {name} is {list(values)!r}; expected one or more values, each once.")


def _is_told(key: str, value: Value, shared: RunConfig) -> bool:
    """Whether a cell's name tells a value: a seed always, others where they aren't the base's."""
    section, name = key.split(".")
    return name == "seed" or value != getattr(getattr(shared, section), name)


def _short(key: str) -> str:
    return key.split(".")[1]


def _slug(value: Value) -> str:
    return re.sub(r"[^\w.+-]+", "_", str(value))


def digest(value: Any) -> str:
    """Return eight hex digits that depend on a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:8]


def sweep(
    grid: Grid,
    root: str | Path = "runs",
    *,
    storage: str | None = None,
    workers: int = 1,
    again: bool = False,
) -> pd.DataFrame:
    """Train every cell that isn't finished yet, and return `cells` of the grid.

    Call it in several processes, or on several machines with one storage and folder of runs: they share the
    cells. A finished run is taken as it is. A cell whose process was killed is taken up once its heartbeat is
    missed, one that was interrupted at the next call. A cell that fails is listed with its reason, and the
    rest go on.

    Args:
        storage: any URL that Optuna's `RDBStorage` takes; None is a SQLite file in the runs folder.
        workers: processes on this machine; for several GPUs, start one sweep a GPU instead, each with its
            own CUDA_VISIBLE_DEVICES.
        again: train failed cells once more too, and those that were finished in another folder.
    """
    root = Path(root)
    url = storage or _default_storage(grid, root)
    # Together, so that no table is made and no cell queued twice.
    with writing(root, "another folder of runs may be named"), locked(root / f"{grid.name}.lock"):
        study = _study(grid, url)
        begun = len(study.get_trials(deepcopy=False))
        _give_heartbeats(study)
        _queue_again(grid, study, root, again)
    if workers == 1:
        _work(grid, root, url, begun)
    else:
        threads = max(torch.get_num_threads() // workers, 1)
        # A fresh interpreter each: a forked one would share this one's threads and GPU.
        context = multiprocessing.get_context("spawn")
        processes = [context.Process(target=_work, args=(grid, root, url, begun, threads)) for _ in range(workers)]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
    table = cells(grid, root, storage=url)
    for run in set(table.loc[table["state"] == "finished", "run"]):
        # Killed after its last file, a run is finished and isn't trained again, which would remove them.
        drop_checkpoints(root / run)
    return table


def cells(grid: Grid, root: str | Path = "runs", *, storage: str | None = None) -> pd.DataFrame:
    """One row a cell, or a cell and split where it is finished: run, state, reason, values and metrics.

    `state` is "finished", "running", "waiting", "failed", "stopped" (it was interrupted, or killed too often) or
    "elsewhere" (its run is in another folder); the last three have a `reason`. Values and metrics are
    `load_runs`' columns.
    """
    states = _states(grid, _study(grid, storage or _default_storage(grid, Path(root))), Path(root))
    rows = [
        {"run": run, "state": state, "reason": reason, **{_short(key): v for key, v in grid.cells[run].items()}}
        for run, (state, reason) in states.items()
    ]
    frame, found = pd.DataFrame(rows), load_runs(root)
    if found.empty:
        return frame
    finished = frame.loc[frame["state"] == "finished", "run"]
    found = found[found["run"].isin(finished)].drop(columns=[_short(key) for key in grid.values])
    return frame.merge(found, on="run", how="left")


def _default_storage(grid: Grid, root: Path) -> str:
    return f"sqlite:///{(root / f'{grid.name}.sqlite3').resolve()}"


@dataclass(frozen=True)
class _Retry:
    """Queues a killed cell again; one that was begun before this call however often it was killed.

    `begun` is the number of trials before the call. The limit is for a cell that kills those who take it up, and
    not for a machine that goes down again and again.
    """

    begun: int

    def __call__(self, study: optuna.Study, trial: FrozenTrial) -> None:
        RetryHeartbeatStaleTrialCallback(None if trial.number < self.begun else _MAX_RETRIES)(study, trial)


def _study(grid: Grid, url: str, begun: int = 0) -> optuna.Study:
    """The grid's study, made where it isn't there; raises `ConfigError` where the storage can't be used."""
    try:
        return _opened(grid, url, begun)
    except (SQLAlchemyError, OptunaError, ImportError) as error:
        # The address isn't repeated: it may hold a password.
        told = reason_of(getattr(error, "orig", None) or error)
        what = f"the file {url.removeprefix('sqlite:///')}" if url.startswith("sqlite:///") else "--storage"
        found = f"the storage of grid {grid.name!r}, {what}, can't be used ({told})"
        raise ConfigError(f"{found}; expected a database that Optuna can write to.") from error


def _opened(grid: Grid, url: str, begun: int) -> optuna.Study:
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    # Processes that write at once wait for each other; SQLite's own patience is five seconds.
    patience = {"connect_args": {"timeout": 60}} if url.startswith("sqlite") else None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        storage = RDBStorage(
            url,
            engine_kwargs=patience,
            heartbeat_interval=HEARTBEAT_SECONDS,
            grace_period=_MISSED_HEARTBEATS * HEARTBEAT_SECONDS,
            heartbeat_stale_trial_callback=_Retry(begun),
        )
    sampler = optuna.samplers.GridSampler(grid.values, seed=0)
    return optuna.create_study(
        storage=storage, study_name=grid.study_name, sampler=sampler, direction="maximize", load_if_exists=True
    )


def _states(grid: Grid, study: optuna.Study, root: Path) -> dict[str, tuple[str, str | None]]:
    """State and reason of each cell's run, in the grid's order."""
    trials = _trials(grid, study)
    return {run: _state(grid, run, root, trials.get(run, [])) for run in grid.cells}


def _state(grid: Grid, run: str, root: Path, trials: list[FrozenTrial]) -> tuple[str, str | None]:
    """ "finished" where the run is in this folder, can be read, and isn't another one of the same name."""
    try:
        if is_finished(root / run) and load_run(root / run).config == grid.config(run):
            return "finished", None
    except ConfigError as error:
        if trials and trials[-1].state == TrialState.COMPLETE:
            return "failed", str(error)
        # It fails with the same words once it's its turn, and the others go on.
    return _state_of(trials)


def _trials(grid: Grid, study: optuna.Study) -> dict[str, list[FrozenTrial]]:
    """A cell's trials by the name of its run; one that was just asked for has no values yet and is left out."""
    runs = {json.dumps(cell, sort_keys=True): run for run, cell in grid.cells.items()}
    found: dict[str, list[FrozenTrial]] = {}
    for trial in study.get_trials(deepcopy=False):
        run = runs.get(json.dumps(trial.params, sort_keys=True))
        if run is not None:
            found.setdefault(run, []).append(trial)
    return found


def _state_of(trials: list[FrozenTrial]) -> tuple[str, str | None]:
    """What the last of a cell's trials says, the run not being finished in this folder."""
    if not trials or trials[-1].state == TrialState.WAITING:
        return "waiting", None
    if trials[-1].state == TrialState.RUNNING:
        return "running", None
    if trials[-1].state == TrialState.COMPLETE:
        return "elsewhere", "it was finished in another folder of runs"
    reason = trials[-1].user_attrs.get("reason")
    return ("failed", reason) if reason else ("stopped", "it was interrupted, or its process killed")


def _give_heartbeats(study: optuna.Study) -> None:
    """A first heartbeat for each running cell without one, which would count as running for ever.

    A process that is killed right after it took a queued cell leaves one. That of a living process beats on.
    """
    storage = study._storage._backend
    with storage.scoped_session() as session:
        beating = {trial_id for (trial_id,) in session.query(TrialHeartbeatModel.trial_id)}
    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        if trial._trial_id not in beating:
            storage.record_heartbeat(trial._trial_id)


def _queue_again(grid: Grid, study: optuna.Study, root: Path, again: bool) -> None:
    """Queue what Optuna counts as done and isn't: cells that were stopped, with `again` all that aren't here."""
    wanted = {"stopped", "failed", "elsewhere"} if again else {"stopped"}
    trials = _trials(grid, study)
    for run, (state, _) in _states(grid, study, root).items():
        if state in wanted:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", ExperimentalWarning)
                RetryHeartbeatStaleTrialCallback()(study, trials[run][-1])


def _work(grid: Grid, root: Path, url: str, begun: int, threads: int | None = None) -> None:
    """Take cells until none is left; while others work on the last ones, wait in case one of them is killed."""
    if threads:
        torch.set_num_threads(threads)
    study = _study(grid, url, begun)

    def train_cell(trial: optuna.Trial) -> float:
        cell = {key: trial.suggest_categorical(key, values) for key, values in grid.values.items()}
        return _train_cell(grid, root, trial, next(run for run, own in grid.cells.items() if own == cell))

    while True:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ExperimentalWarning)
            fail_stale_trials(study)
        states = {state for state, _ in _states(grid, study, root).values()}
        if "waiting" in states:
            try:
                study.optimize(train_cell, n_trials=1, catch=(Exception,), gc_after_trial=True)
            except (ValueError, UpdateFinishedTrialError):
                # This process slept through its heartbeats and the cell was queued again: its run is stored.
                print("A cell was given up for lost while it ran; its run counts all the same.")
        elif "running" in states:
            time.sleep(1)
        else:
            return


def _train_cell(grid: Grid, root: Path, trial: optuna.Trial, run: str) -> float:
    """Train a cell and give Optuna its dev metric; the reason of a failure is kept with the trial."""
    trial.set_user_attr("reason", None)
    try:
        # Two processes may ask for the last cell at once: in `train` the second waits, and takes the finished run.
        return train(grid.config(run), root).metrics["splits"]["dev"]["primary"]
    except Exception as error:
        reason = str(error).strip().partition("\n")[0]
        trial.set_user_attr(
            "reason", reason if isinstance(error, WorkbenchError) else f"{type(error).__name__}: {reason}"
        )
        print(f"{run} failed: {reason}")
        raise
