"""Run folders: what a run was, what it gave, and all of them as one table.

runs/NAME/config.json          the resolved configuration
          rows.json            a hash of each split's encoded rows, to which a run that goes on is held
          environment.json     package versions, hardware, git commit
          history.jsonl        the training log, a line a step that was logged
          predictions_*.jsonl  a line a row, for every split that was predicted
          model/               weights (safetensors), configuration, tokenizer
          metrics.json         written last: a folder with it is a finished run
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import subprocess
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from dhrd_lib.config import ConfigError, RunConfig, is_number, read_json, reason_of

PACKAGES = (
    "torch",
    "transformers",
    "datasets",
    "accelerate",
    "peft",
    "tokenizers",
    "safetensors",
    "scikit-learn",
    "scipy",
    "numpy",
    "pandas",
    "plotly",
)


# Of a run's metrics, beside those of its splits.
TOTALS = ("train_seconds", "train_tokens", "tokens_per_second")
# The columns of a split's predictions.
PREDICTED = ("idx", "input_text", "label", "prediction", "probabilities", "group", "rationale")


@dataclass(frozen=True)
class Run:
    """A finished run: its folder and what stands in it."""

    folder: Path
    config: RunConfig
    metrics: dict[str, Any]
    environment: dict[str, Any]

    @property
    def name(self) -> str:
        """The folder's name, below the folder of runs: a run that was moved or copied goes by its new one."""
        return os.path.basename(os.path.abspath(self.folder))  # "." has a name, too, and a link keeps its own

    @property
    def test_splits(self) -> list[str]:
        """The splits of the final figures; "dev" served model selection and isn't one."""
        return [split for split in self.metrics["splits"] if split != "dev"]

    @property
    def history(self) -> pd.DataFrame:
        """The training log, a row a logged step: every loss term, alpha, learning rate, dev metrics."""
        return _read_lines(self.folder / "history.jsonl")

    def predictions(self, split: str) -> pd.DataFrame:
        """One row an example: idx, input_text, label, prediction, probabilities, group, rationale."""
        path = self.predictions_path(split)
        frame = _read_lines(path, dtype={"idx": str, "group": object})
        if missing := [name for name in PREDICTED if name not in frame]:
            raise ConfigError(f"{path} lacks {', '.join(missing)}; expected what training wrote.")
        return frame

    def predictions_path(self, split: str) -> Path:
        """The file of a split's predictions."""
        return self.folder / f"predictions_{split}.jsonl"


def _read_lines(path: Path, **types: Any) -> pd.DataFrame:
    try:
        return pd.read_json(path, lines=True, **types)
    except OSError as error:
        raise ConfigError(f"{path} can't be read ({error.strerror}); expected what training wrote.") from error
    except ValueError as error:
        raise ConfigError(f"{path} is not JSON lines: {reason_of(error)}; expected what training wrote.") from error


def is_finished(folder: Path) -> bool:
    """Whether a run's folder holds a finished run."""
    return (folder / "metrics.json").is_file()


def load_run(folder: str | Path) -> Run:
    """Read a finished run.

    Raises `FileNotFoundError` where the folder holds none, and `ConfigError` where one of its files says something
    else than a run's.
    """
    folder = Path(folder)
    if not is_finished(folder):
        raise FileNotFoundError(f"{folder} holds no finished run (no metrics.json); expected a run's folder.")
    metrics, environment = (read_json(folder / name) for name in ("metrics.json", "environment.json"))
    _check_metrics(folder / "metrics.json", metrics)
    if not (isinstance(environment, dict) and isinstance(environment.get("packages"), dict)):
        raise ConfigError(f"{folder / 'environment.json'} has no packages; expected what training wrote.")
    return Run(folder, RunConfig.load(folder / "config.json"), metrics, environment)


def _check_metrics(path: Path, metrics: Any) -> None:
    """Refuse what lacks the parts that every reader of a run asks for."""
    splits = metrics.get("splits") if isinstance(metrics, dict) else None
    if not (isinstance(splits, dict) and all(isinstance(of, dict) and "primary" in of for of in splits.values())):
        raise ConfigError(f"{path} has no metrics of splits; expected what training wrote.")
    for name in ("task_metrics", "label_names"):
        if not isinstance(metrics.get(name), list):
            raise ConfigError(f"{path} has {metrics.get(name)!r} as {name}; expected a list, as training wrote.")
    figures = {f"{name} of {split}": value for split, of in splits.items() for name, value in of.items()}
    for name, value in (figures | {name: metrics.get(name) for name in TOTALS}).items():
        if not is_number(value):
            raise ConfigError(f"{path} has {value!r} as {name}; expected a number, as training wrote.")


def read_runs(root: str | Path = "runs") -> tuple[list[Run], list[str]]:
    """All finished runs below a folder, by name, and a sentence for each that can't be read."""
    runs, broken = [], []
    for path in sorted(Path(root).glob("*/metrics.json")):
        try:
            runs.append(load_run(path.parent))
        except (ConfigError, OSError) as error:
            broken.append(str(error))
    return runs, broken


def find_runs(root: str | Path = "runs") -> list[Run]:
    """All finished runs below a folder, by name; it warns of those that can't be read, and leaves them out."""
    runs, broken = read_runs(root)
    for sentence in broken:
        warnings.warn(f"{sentence} The run is left out.", stacklevel=2)
    return runs


def load_runs(root: str | Path = "runs") -> pd.DataFrame:
    """One row a run and split: every configuration field, every metric, seconds and tokens."""
    rows = []
    for run in find_runs(root):
        config = run.config.to_dict()
        del config["name"]  # the run's own is its folder's
        fields = {"run": run.name, "setting": run.config.training.setting}
        for section in config.values():
            fields |= section
        totals = {key: value for key, value in run.metrics.items() if isinstance(value, (int, float))}
        for split, metrics in run.metrics["splits"].items():
            rows.append({**fields, **totals, "split": split, **metrics})
    return pd.DataFrame(rows)


def environment_differences(stored: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What differs between a run's stored environment and another, a line each; nothing where they are equal."""
    old, new = ({**one, **one["packages"]} for one in (stored, now))
    names = [name for name in {**old, **new} if name != "packages" and old.get(name) != new.get(name)]
    return [f"{name}: {old.get(name)} then, {new.get(name)} now" for name in names]


def compare_repeat(stored: Run, new: Run) -> pd.DataFrame:
    """One row a split: the stored primary metric, the repeat's, and whether their predictions are the same.

    A split that only one of them has is a row, too, without the other's metric.
    """
    then, now = stored.metrics["splits"], new.metrics["splits"]
    return pd.DataFrame(
        {
            "split": split,
            "stored": then.get(split, {}).get("primary"),
            "new": now.get(split, {}).get("primary"),
            "predictions": _same_predictions(stored, new, split),
        }
        for split in {**then, **now}
    )


def _same_predictions(stored: Run, new: Run, split: str) -> str:
    if any(split not in run.metrics["splits"] for run in (stored, new)):
        return "of another split: the data has changed"
    if not stored.predictions_path(split).is_file():
        return "not stored"
    one, two = (run.predictions(split) for run in (stored, new))
    rows = ["idx", "input_text", "label"]
    if not one[rows].equals(two[rows]):
        return "of other rows: the data has changed"
    differing = int((one["prediction"] != two["prediction"]).sum())
    return f"{differing} of {len(one)} differ" if differing else "all the same"


def write_json(path: Path, value: Any) -> None:
    """Write JSON under another name and rename it, so that a file is whole or not there."""
    scratch = path.with_name(f"{path.name}.part-{os.getpid()}")
    scratch.write_text(json.dumps(value, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    os.replace(scratch, path)


def environment(device: torch.device) -> dict[str, Any]:
    """What the figures depend on beside the configuration: versions, hardware, git commit."""
    accelerator = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    return {
        "packages": {name: importlib.metadata.version(name) for name in PACKAGES},
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "processor": _processor(),
        "cpu_threads": torch.get_num_threads(),
        "device": accelerator or device.type,
        "git_commit": _git_commit(),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(": ", 1)[1] for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()


def _git_commit() -> str | None:
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
