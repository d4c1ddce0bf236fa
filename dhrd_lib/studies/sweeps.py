"""Grids and searches: runs of many configurations, shared by any number of processes and machines.

A run is finished when its folder has metrics.json, failed when it has error.txt, and taken while its lock is held,
which the operating system frees when a process is killed: another one resumes the run.
"""

from __future__ import annotations

import gc
import glob
import hashlib
import itertools
import json
import multiprocessing
import re
import time
import traceback
from concurrent.futures import ProcessPoolExecutor
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

from dhrd_lib.config import Config, ConfigError, PositiveInt, RunConfig, Seed, reason_of
from dhrd_lib.runs import is_finished, load_run, run_lock, write_json
from dhrd_lib.training import train

_SECTIONS = RunConfig().to_dict()
DEFAULTS = {f"{name}.{k}": v for name in ("model", "data", "training") for k, v in _SECTIONS[name].items()}
FieldName = Literal[tuple(DEFAULTS)]
Values = Annotated[tuple[str | bool | int | float | None, ...], Field(min_length=1, strict=False)]
Range = dict[Literal["low", "high", "log", "step"], float | bool]
_STATES = {"finished": TrialState.COMPLETE, "failed": TrialState.FAIL, "open": TrialState.RUNNING}


class _Plan(Config):
    name: str
    base: RunConfig = RunConfig()

    @model_validator(mode="after")
    def _check_name(self) -> Self:
        self.base.replace({"name": self.name})
        return self


class Grid(_Plan):
    """Every combination of the values of some fields, such as "training.alpha", on top of `base`.

    A cell's run is named after those of its values that aren't the base's: grids of one name and base share cells.
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
        """Return the configuration of a cell; raises `ConfigError` where its values don't go together."""
        return self.base.replace({"name": run, **self.cells[run]})

    def _open_runs(self, root: Path) -> list[str]:
        runs = [run for run in self.cells if _state(root / run)[0] == "open"]
        # Those that were begun come last: one that kills its process each time mustn't keep the others waiting.
        return sorted(runs, key=lambda run: (root / run / "config.json").is_file())

    def _train(self, run: str, root: Path) -> None:
        train(self.config(run), root)


class Search(_Plan):
    """Fields with a list of values, or with a range: `low` and `high`, both included, and perhaps `log`, `step`."""

    space: Annotated[dict[FieldName, Range | Values], Field(min_length=1)]
    n_trials: PositiveInt = 20  # of all calls and processes
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
                raise ConfigError(f"space.{name}: {reason_of(error)}.") from error
        return choices

    def study(self, root: Path) -> optuna.Study:
        """Return an Optuna study in memory, with a trial for each of the search's runs in `root`."""
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        name = f"{self.name}-{digest({**self.to_dict(), 'n_trials': None})}"  # More trials aren't another search.
        study = optuna.create_study(study_name=name, direction="maximize")
        for path in sorted(root.glob(f"{glob.escape(name)}-*/trial.json")):
            state, reason = _state(path.parent)
            trial = {"params": json.loads(path.read_text()), "distributions": self.distributions}
            trial |= {"state": _STATES[state], "user_attrs": {"run": path.parent.name, "reason": reason}}
            if state == "finished":
                trial["value"] = load_run(path.parent).metrics["splits"]["dev"]["primary"]
            study.add_trial(optuna.create_trial(**trial))
        return study

    def _open_runs(self, root: Path) -> list[str]:
        study = self.study(root)
        runs = [trial.user_attrs["run"] for trial in study.trials if trial.state == TrialState.RUNNING]
        n_runs = len(study.trials)
        if n_runs < self.n_trials and not any(_is_free(root / run) for run in runs):
            # A new sampler for each trial: a resumed search samples what an uninterrupted one would.
            study.sampler = optuna.samplers.TPESampler(seed=self.seed + n_runs)
            runs.append(f"{study.study_name}-{n_runs:03d}")
            (root / runs[-1]).mkdir(exist_ok=True)
            write_json(root / runs[-1] / "trial.json", study.ask(self.distributions).params)
        return runs

    def _train(self, run: str, root: Path) -> None:
        params = json.loads((root / run / "trial.json").read_text())
        config = self.base.replace({"name": run, **params})
        if config.training.beta == 0:
            raise ConfigError("beta is 0; expected a class loss, whose classifier has a metric on dev.")
        train(config, root)


def digest(value: Any) -> str:
    """Return eight hex digits that depend on a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:8]


def sweep(grid: Grid, root: str | Path = "runs", *, workers: int = 1) -> pd.DataFrame:
    """Train every cell that isn't finished; those that failed before are tried again.

    Returns one row per cell: run, values, state ("finished" or "failed"), reason, and each split's primary metric
    where there is one. `workers` are processes on this machine; for several GPUs, start one sweep per GPU. Raises
    `ConfigError` where a cell's folder holds a run of another configuration.
    """
    root, rows = Path(root), []
    for run in grid.cells:
        stored = root / run / "config.json"
        if stored.is_file() and RunConfig.load(stored) != grid.config(run):
            raise ConfigError(f"{root / run} holds a run of another configuration; expected another grid's name.")
        (root / run / "error.txt").unlink(missing_ok=True)
    _train_all(grid, root, workers)
    for run, values in grid.cells.items():
        state, reason = _state(root / run)
        splits = load_run(root / run).metrics["splits"] if state == "finished" else {}
        row = {"run": run, **{key.split(".")[1]: value for key, value in values.items()}, "state": state}
        rows.append(row | {"reason": reason} | {split: of.get("primary") for split, of in splits.items()})
    return pd.DataFrame(rows)


def tune(search: Search, root: str | Path = "runs", *, workers: int = 1) -> optuna.Study:
    """Train runs for the best metric on dev, sampled by TPE, until the search has its trials; return its study."""
    _train_all(search, Path(root), workers)
    return search.study(Path(root))


def _state(folder: Path) -> tuple[str, str | None]:
    """Return whether a run is finished, failed (and why) or open."""
    if is_finished(folder) and not (folder / "checkpoints").exists():  # Else killed right after its last file.
        return "finished", None
    error = folder / "error.txt"
    return ("failed", error.read_text(encoding="utf-8").partition("\n")[0]) if error.is_file() else ("open", None)


def _is_free(folder: Path) -> bool:
    try:
        with run_lock(folder).acquire(timeout=0):
            return True
    except Timeout:
        return False


def _train_all(plan: Grid | Search, root: Path, workers: int) -> None:
    if workers == 1:
        return _train_runs(plan, root)
    # A fresh interpreter each: a forked one would share this one's threads and GPU.
    spawn, threads = multiprocessing.get_context("spawn"), max(torch.get_num_threads() // workers, 1)
    with ProcessPoolExecutor(workers, spawn, torch.set_num_threads, (threads,)) as pool:
        list(pool.map(_train_runs, [plan] * workers, [root] * workers))
    return None


def _train_runs(plan: Grid | Search, root: Path) -> None:
    """Train the plan's runs that no other process trains, and wait for those: a killed process leaves its run."""
    root.mkdir(parents=True, exist_ok=True)
    while True:
        with FileLock(root / f"{plan.name}.lock"):
            runs = plan._open_runs(root)
            run = next((run for run in runs if _is_free(root / run)), None)
            lock = run_lock(root / run).acquire() if run else None
        if not runs:
            return
        if not lock:
            time.sleep(1)
            continue
        with lock:
            try:
                plan._train(run, root)
            except Exception as error:
                reason = f"{type(error).__name__}: {reason_of(error)}"
                print(f"{run} failed: {reason}")
                (root / run / "error.txt").write_text(f"{reason}\n\n{traceback.format_exc()}", encoding="utf-8")
        gc.collect()  # Else a GPU would hold the last model beside the next one.
