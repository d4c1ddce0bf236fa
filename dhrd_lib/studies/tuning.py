"""Searches: configuration values that maximize dev's metric, sampled by TPE; runs that fall behind are pruned.

Optuna's storage has the trials, and each trial's run has a folder, whose lock shows whether a process trains it.
The trial of a killed process is queued again, and its run resumes from the last checkpoint.
"""

from __future__ import annotations

import gc
import shutil
import time
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Self

import optuna
import pandas as pd
import plotly.graph_objects as go
from filelock import AcquireReturnProxy, FileLock
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import TrialState
from pydantic import Field, model_validator
from transformers import TrainerCallback, TrainerState, TrainingArguments

from dhrd_lib.config import Config, ConfigError, PositiveInt, RunConfig, Seed, WorkbenchError
from dhrd_lib.runs import run_lock
from dhrd_lib.studies.plots import TEMPLATE
from dhrd_lib.studies.sweeps import DEFAULTS, Values, digest, is_free, open_study, reason_of, run_workers
from dhrd_lib.training import train

_STATES = {TrialState.COMPLETE: "finished", TrialState.FAIL: "failed"}


class Range(Config):
    """Numbers from `low` to `high`, both included, in steps or continuous, on a linear or a logarithmic scale."""

    low: float
    high: float
    log: bool = False
    step: float | None = None


class Search(Config):
    """Fields such as "training.learning_rate", each with a range or a list of values, on top of `base`.

    `n_trials` counts the trials of all calls and processes.
    """

    name: str
    space: Annotated[dict[str, Range | Values], Field(min_length=1)]
    base: dict[str, Any] = Field(default_factory=dict)
    n_trials: PositiveInt = 20
    seed: Seed = 0

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.config(self.name, {}).training.beta == 0:
            raise ConfigError("base has beta = 0; expected a class loss, whose classifier has a metric on dev.")
        _ = self.distributions
        return self

    @cached_property
    def distributions(self) -> dict[str, BaseDistribution]:
        """Optuna's distribution of each field: of whole numbers where the field has those."""
        return {name: _distribution(name, values) for name, values in self.space.items()}

    def config(self, run: str, values: dict[str, Any]) -> RunConfig:
        """Return the configuration of a run with these values of the fields."""
        return RunConfig.from_dict({**self.base, "name": run}).replace(values)

    @property
    def study_name(self) -> str:
        """The name of the Optuna study: another base or space is another study, and more trials aren't."""
        return f"{self.name}-{digest({**self.to_dict(), 'n_trials': None})}"


def _distribution(name: str, values: Range | tuple) -> BaseDistribution:
    if name not in DEFAULTS:
        raise ConfigError(f"space.{name} is no field of a run; expected one such as 'training.alpha'.")
    try:
        if isinstance(values, tuple):
            return CategoricalDistribution(values)
        low, high, log, step = values.low, values.high, values.log, values.step
        if isinstance(DEFAULTS[name], float):
            return FloatDistribution(low, high, log, step)
        if type(DEFAULTS[name]) is int and all(map(float.is_integer, (low, high, step or 1.0))):
            return IntDistribution(int(low), int(high), log, int(step or 1))
        raise ValueError("expected a list of values, or a range of whole numbers where the field has those")
    except ValueError as error:
        raise ConfigError(f"space.{name}: {str(error).rstrip('.')}.") from error


@dataclass(frozen=True)
class Tuning:
    """A search and its Optuna study."""

    search: Search
    study: optuna.Study

    @property
    def best(self) -> RunConfig:
        """The configuration with the highest metric on dev; raises `WorkbenchError` where no trial is finished."""
        if not self.study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,)):
            raise WorkbenchError(f"no trial of {self.search.name!r} is finished; expected one or more.")
        return self.search.config(self.search.name, self.study.best_params)

    def table(self) -> pd.DataFrame:
        """Return one row per run: run, state, value (dev's metric, a fraction), the searched fields, reason.

        `state` is "finished", "pruned", "failed" (with a reason), "running" or "waiting".
        """
        rows = {}
        for trial in self.study.get_trials(deepcopy=False):  # Of a run that was killed, the last trial stays.
            row = {"state": _STATES.get(trial.state, trial.state.name.lower()), "value": trial.value}
            row |= {key.split(".")[1]: value for key, value in trial.params.items()}
            rows[trial.user_attrs["run"]] = row | {"reason": trial.user_attrs.get("reason")}
        return pd.DataFrame.from_dict(rows, orient="index").rename_axis("run").reset_index()

    def plot(self, kind: str = "optimization_history") -> go.Figure:
        """Return one of optuna.visualization's figures: "slice", "parallel_coordinate", "param_importances", …"""
        return getattr(optuna.visualization, f"plot_{kind}")(self.study).update_layout(template=TEMPLATE)


def tune(
    search: Search,
    root: str | Path = "runs",
    storage: str | None = None,
    *,
    n_trials: int | None = None,
    workers: int = 1,
) -> Tuning:
    """Train trials of a search until it has `n_trials`, and return all of them.

    Processes and machines with one storage and one folder of runs share the search. A run behind the median of the
    others at the same evaluation of dev is pruned, and its folder removed; a trial that fails keeps its reason.

    Args:
        storage: URL of an Optuna `RDBStorage`; None is a SQLite file in the folder of runs, for one machine.
        n_trials: trials of all calls and processes; None is the search's own number.
        workers: processes on this machine.
    """
    root = Path(root)
    root.mkdir(parents=True, exist_ok=True)
    url = storage or f"sqlite:///{(root / search.name).resolve()}.sqlite3"
    with FileLock(root / f"{search.name}.lock"):  # Only one process creates the tables.
        study = open_study(search.study_name, url)
    run_workers(workers, _train_trials, search, root, url, n_trials or search.n_trials)
    return Tuning(search, study)


def _train_trials(search: Search, root: Path, url: str, n_trials: int) -> None:
    study = open_study(search.study_name, url, pruner=optuna.pruners.MedianPruner())
    while True:
        claim = _next_trial(search, study, root, n_trials)
        if claim:
            trial, lock = claim
            with lock:
                _train_trial(search, study, root, trial)
            gc.collect()  # Else a GPU would hold the last model beside the next one.
        elif study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            time.sleep(1)  # Other processes train the last trials; a killed one leaves its own to this one.
        else:
            return


def _next_trial(
    search: Search, study: optuna.Study, root: Path, n_trials: int
) -> tuple[optuna.Trial, AcquireReturnProxy] | None:
    """Take the next trial and the lock of its run; one whose process was killed comes first."""
    # Under a lock of the search, a trial is never seen before its run is locked.
    with FileLock(root / f"{search.name}.lock"):
        running = study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
        free = {run for run in (trial.user_attrs["run"] for trial in running) if is_free(root / run)}
        # Read after the locks: a process stores its result before it frees its lock.
        trials = study.get_trials(deepcopy=False)
        runs = {trial.user_attrs["run"] for trial in trials}
        queued = {trial.user_attrs["run"] for trial in trials if trial.state == TrialState.WAITING}
        for trial in trials:
            run = trial.user_attrs["run"]
            if trial.state == TrialState.RUNNING and run in free:
                if run not in queued:
                    study.enqueue_trial(trial.params, {"run": run})
                    queued.add(run)
                study.tell(trial.number, state=TrialState.FAIL)
        if not queued:
            if len(runs) >= n_trials:
                return None
            study.enqueue_trial({}, {"run": f"{search.study_name}-{len(runs):03d}"})
        # Anew for each trial, so that a resumed search samples what an uninterrupted one would.
        study.sampler = optuna.samplers.TPESampler(seed=search.seed + len(runs))
        trial = study.ask(search.distributions)
        return trial, run_lock(root / trial.user_attrs["run"]).acquire()


def _train_trial(search: Search, study: optuna.Study, root: Path, trial: optuna.Trial) -> None:
    run = trial.user_attrs["run"]
    try:
        done = train(search.config(run, trial.params), root, [_Pruning(trial)])
        if "primary" not in done.metrics["splits"]["dev"]:
            raise ConfigError("beta is 0; expected a class loss, whose classifier has a metric on dev.")
        study.tell(trial, done.metrics["splits"]["dev"]["primary"])
    except optuna.TrialPruned:
        study.tell(trial, state=TrialState.PRUNED)
        shutil.rmtree(root / run)
    except Exception as error:
        print(f"{run} failed: {reason_of(error)}")
        trial.set_user_attr("reason", reason_of(error))
        study.tell(trial, state=TrialState.FAIL)


class _Pruning(TrainerCallback):
    """Reports dev's metric to the trial at each evaluation, and ends a run that falls behind the others."""

    def __init__(self, trial: optuna.Trial) -> None:
        self.trial, self.reported = trial, 0

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, *_: Any, **kwargs: Any) -> None:
        values = [log["eval_primary"] for log in state.log_history if "eval_primary" in log]
        # A resumed run is a new trial, which lacks the evaluations before the checkpoint.
        for step in range(self.reported, len(values)):
            self.trial.report(values[step], step)
        self.reported = len(values)
        if self.trial.should_prune():
            raise optuna.TrialPruned
