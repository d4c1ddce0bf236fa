"""Run folders: what a run was, what it gave, and all of them as one table.

runs/NAME/config.json          the resolved configuration
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
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from dhrd_lib.config import RunConfig, read_json

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


@dataclass(frozen=True)
class Run:
    """A finished run: its folder and what stands in it."""

    folder: Path
    config: RunConfig
    metrics: dict[str, Any]
    environment: dict[str, Any]

    @property
    def name(self) -> str:
        """The folder's name, below the folder of runs."""
        return self.config.name

    @property
    def test_splits(self) -> list[str]:
        """The splits of the final figures; "dev" served model selection and isn't one."""
        return [split for split in self.metrics["splits"] if split != "dev"]

    @property
    def history(self) -> pd.DataFrame:
        """The training log, a row a logged step: every loss term, alpha, learning rate, dev metrics."""
        return pd.read_json(self.folder / "history.jsonl", lines=True)

    def predictions(self, split: str) -> pd.DataFrame:
        """One row an example: idx, input_text, label, prediction, probabilities, group, rationale."""
        return pd.read_json(self.predictions_path(split), lines=True, dtype={"idx": str, "group": object})

    def predictions_path(self, split: str) -> Path:
        """The file of a split's predictions."""
        return self.folder / f"predictions_{split}.jsonl"


def is_finished(folder: Path) -> bool:
    """Whether a run's folder holds a finished run."""
    return (folder / "metrics.json").is_file()


def load_run(folder: str | Path) -> Run:
    """Read a finished run; raises `FileNotFoundError` where the folder holds none."""
    folder = Path(folder)
    if not is_finished(folder):
        raise FileNotFoundError(f"{folder} holds no finished run (no metrics.json); expected a run's folder.")
    return Run(
        folder=folder,
        config=RunConfig.load(folder / "config.json"),
        metrics=read_json(folder / "metrics.json"),
        environment=read_json(folder / "environment.json"),
    )


def find_runs(root: str | Path = "runs") -> list[Run]:
    """All finished runs below a folder, by name."""
    return [load_run(path.parent) for path in sorted(Path(root).glob("*/metrics.json"))]


def load_runs(root: str | Path = "runs") -> pd.DataFrame:
    """One row a run and split: every configuration field, every metric, seconds and tokens."""
    rows = []
    for run in find_runs(root):
        config = run.config.to_dict()
        fields = {"run": config.pop("name"), "setting": run.config.training.setting}
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
    """One row a split: the stored primary metric, the repeat's, and whether their predictions are the same."""
    return pd.DataFrame(
        {
            "split": split,
            "stored": metrics["primary"],
            "new": new.metrics["splits"][split]["primary"],
            "predictions": _same_predictions(stored, new, split),
        }
        for split, metrics in stored.metrics["splits"].items()
    )


def _same_predictions(stored: Run, new: Run, split: str) -> str:
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
