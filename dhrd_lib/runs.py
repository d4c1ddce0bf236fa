"""Run folders: what a run stores, and stored runs as tables.

runs/NAME/config.json          the resolved configuration
          rows.json            a hash of each split's encoded rows, which a resumed run must match
          environment.json     package versions, hardware, git commit
          history.jsonl        the training log, one JSON object per logged step
          predictions_*.jsonl  one JSON object per row of each evaluated split
          model/               weights (safetensors), configuration, tokenizer
          metrics.json         written last: a folder that has it is a finished run
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import re
import shutil
import subprocess
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
from filelock import FileLock

from dhrd_lib.config import RunConfig, WorkbenchError, read_json

if TYPE_CHECKING:
    from dhrd_lib.modeling import DHRDModel

PACKAGES = (
    "torch transformers datasets accelerate peft tokenizers safetensors scikit-learn scipy numpy pandas plotly"
)
TOTALS = ("train_seconds", "train_tokens", "tokens_per_second")  # of a whole run, not of a split


@dataclass(frozen=True)
class Run:
    """A finished run: its folder, configuration, metrics and environment."""

    folder: Path
    config: RunConfig
    metrics: dict[str, Any]
    environment: dict[str, Any]

    @property
    def name(self) -> str:
        """The folder's name; a run that was moved or copied has its new one."""
        return os.path.basename(os.path.abspath(self.folder))  # "." has a name, too, and a link keeps its own.

    @property
    def fields(self) -> dict[str, Any]:
        """Name, setting and every configuration field, as the columns of a table of runs."""
        config = self.config.to_dict()
        names = {"run": self.name, "setting": self.config.training.setting}
        return names | config["model"] | config["data"] | config["training"]

    @property
    def label_names(self) -> list[str]:
        """The classes, in the order of the logits."""
        return self.metrics["label_names"]

    @property
    def test_splits(self) -> list[str]:
        """The splits of the final figures; dev served model selection and is none of them."""
        return [split for split in self.metrics["splits"] if split != "dev"]

    @property
    def history(self) -> pd.DataFrame:
        """The training log, one row per logged step: each loss term, alpha, learning rate, dev metrics."""
        return pd.read_json(self.folder / "history.jsonl", lines=True)

    def predictions(self, split: str) -> pd.DataFrame:
        """Return one row per example of a split: idx, input_text, label and prediction (names), label_id and
        prediction_id (class indices), probabilities (a list of K), group, rationale; with `beta = 0`, which leaves
        the classifier untrained, no prediction and no probabilities.
        """
        path, names = self.folder / f"predictions_{split}.jsonl", dict(enumerate(self.label_names))
        frame = pd.read_json(path, lines=True, dtype=False, convert_dates=False)
        if self.config.training.beta == 0:
            frame = frame.drop(columns=["prediction", "probabilities"], errors="ignore")
        for column in frame.columns.intersection(["label", "prediction"]):
            if pd.api.types.is_integer_dtype(frame[column]):  # Runs of version 0.1 stored class indices.
                frame[column] = frame[column].map(names)
            frame[f"{column}_id"] = frame[column].map({name: i for i, name in names.items()})
        return frame

    def model(self, **kwargs: Any) -> DHRDModel:
        """Load the model with `DHRDModel.from_pretrained`; raise `FileNotFoundError` where the run kept none."""
        from dhrd_lib.modeling import DHRDModel

        model = DHRDModel.from_pretrained(self.folder / "model", **kwargs)
        model.config.classifier_trained = self.config.training.beta > 0  # Models of version 0.1 don't know.
        return model


def is_finished(folder: Path) -> bool:
    """Return whether a folder holds a finished run."""
    return (folder / "metrics.json").is_file()


def load_run(folder: str | Path) -> Run:
    """Load a finished run; raises `FileNotFoundError` where the folder holds none."""
    folder = Path(folder)
    if not is_finished(folder):
        raise FileNotFoundError(f"{folder} holds no finished run (no metrics.json); expected a run's folder.")
    config, metrics = RunConfig.load(folder / "config.json"), read_json(folder / "metrics.json")
    if config.training.beta == 0:  # Version 0.1 stored the metrics of the untrained classifier.
        metrics["splits"] = {split: {} for split in metrics["splits"]}
    return Run(folder, config, metrics, read_json(folder / "environment.json"))


def find_runs(root: str | Path = "runs", report: Callable[[str], Any] = warnings.warn) -> list[Run]:
    """Return all finished runs below a folder, by name; `report` gets a sentence for each that can't be loaded."""
    runs = []
    for path in sorted(Path(root).glob("*/metrics.json")):
        try:
            runs.append(load_run(path.parent))
        except (WorkbenchError, OSError) as error:  # Another version's configuration, for one.
            report(f"{path.parent} can't be loaded and is skipped: {error}")
    return runs


def load_runs(root: str | Path = "runs") -> pd.DataFrame:
    """Return one row per run and split: every configuration field, every metric, seconds and tokens."""
    rows = []
    for run in find_runs(root):
        totals = {key: value for key, value in run.metrics.items() if isinstance(value, (int, float))}
        rows += [{**run.fields, **totals, "split": split, **of} for split, of in run.metrics["splits"].items()]
    return pd.DataFrame(rows)


def write_json(path: Path, value: Any) -> None:
    """Write JSON under another name and rename it, so that the file is whole or not there."""
    scratch = path.with_name(f"{path.name}.part-{os.getpid()}")
    scratch.write_text(json.dumps(value, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    os.replace(scratch, path)


def run_lock(folder: Path) -> FileLock:
    """Return the lock of a run's folder, which its holder may acquire again; a kill frees it."""
    folder.mkdir(parents=True, exist_ok=True)
    return FileLock(folder / "training.lock", is_singleton=True)


def environment(device: Any) -> dict[str, Any]:
    """Return what a run's figures depend on beside its configuration: versions, hardware, git commit."""
    import torch

    cpu = Path("/proc/cpuinfo")
    models = re.findall(r"^model name\s*: (.+)$", cpu.read_text() if cpu.is_file() else "", re.MULTILINE)
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12"]
    commit = subprocess.run(command, capture_output=True, text=True).stdout.strip() if shutil.which("git") else ""
    return {
        "packages": {name: importlib.metadata.version(name) for name in PACKAGES.split()},
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "processor": models[0] if models else platform.processor(),
        "cpu_threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "git_commit": commit or None,
    }
