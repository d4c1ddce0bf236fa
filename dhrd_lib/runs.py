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
import subprocess
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
from filelock import FileLock

from dhrd_lib.config import ConfigError, RunConfig

if TYPE_CHECKING:
    import torch

    from dhrd_lib.modeling import DHRDModel

PACKAGES = (
    "torch transformers datasets accelerate peft tokenizers safetensors scikit-learn scipy numpy pandas plotly"
)
# Metrics of a whole run, beside those of its splits.
TOTALS = ("train_seconds", "train_tokens", "tokens_per_second")


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
        fields = {"run": self.name, "setting": self.config.training.setting}
        return fields | config["model"] | config["data"] | config["training"]

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
        """Return one row per example of a split.

        Columns: idx, input_text, label and prediction (label names), label_id and prediction_id (class indices),
        probabilities (a list of K), group, rationale. A run with `beta = 0` has no prediction, prediction_id and
        probabilities: its classifier is untrained.
        """
        path = self.folder / f"predictions_{split}.jsonl"
        frame = pd.read_json(path, lines=True, dtype=False, convert_dates=False)
        class_of = {name: index for index, name in enumerate(self.label_names)}
        for column in ("label", "prediction"):
            if column in frame:
                if pd.api.types.is_integer_dtype(frame[column]):  # Runs of version 0.1 stored class indices.
                    frame[column] = [self.label_names[index] for index in frame[column]]
                frame[f"{column}_id"] = frame[column].map(class_of)
        if self.config.training.beta == 0:
            frame = frame.drop(columns=["prediction", "prediction_id", "probabilities"], errors="ignore")
        return frame

    def model(self, **kwargs: Any) -> DHRDModel:
        """Load the trained model; `kwargs` go to `DHRDModel.from_pretrained`.

        Raises `FileNotFoundError` where the run kept none (`keep_model = false`).
        """
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
    metrics, environment = (
        json.loads((folder / f"{name}.json").read_text(encoding="utf-8")) for name in ("metrics", "environment")
    )
    run = Run(folder, RunConfig.load(folder / "config.json"), metrics, environment)
    if run.config.training.beta == 0:  # Version 0.1 stored the metrics of the untrained classifier.
        metrics["splits"] = {split: {} for split in metrics["splits"]}
    return run


def read_runs(root: str | Path = "runs") -> tuple[list[Run], list[str]]:
    """Return all finished runs below a folder, by name, and one sentence for each that can't be loaded."""
    runs, unreadable = [], []
    for path in sorted(Path(root).glob("*/metrics.json")):
        try:
            runs.append(load_run(path.parent))
        except (ConfigError, OSError, ValueError) as error:  # Another version's configuration, for one.
            unreadable.append(f"{path.parent} can't be loaded: {error}")
    return runs, unreadable


def find_runs(root: str | Path = "runs") -> list[Run]:
    """Return all finished runs below a folder, by name; warns of those that can't be loaded."""
    runs, unreadable = read_runs(root)
    for sentence in unreadable:
        warnings.warn(f"{sentence} The run is left out.", stacklevel=2)
    return runs


def load_runs(root: str | Path = "runs") -> pd.DataFrame:
    """Return one row per run and split: every configuration field, every metric, seconds and tokens."""
    rows = []
    for run in find_runs(root):
        totals = {key: value for key, value in run.metrics.items() if isinstance(value, (int, float))}
        rows += [{**run.fields, **totals, "split": split, **of} for split, of in run.metrics["splits"].items()]
    return pd.DataFrame(rows)


def environment_differences(stored: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Return one line for each entry in which two environments differ."""
    old, new = ({**of, **of["packages"]} for of in (stored, now))
    names = [name for name in {**old, **new} if name != "packages" and old.get(name) != new.get(name)]
    return [f"{name}: {old.get(name)} then, {new.get(name)} now" for name in names]


def compare_repeat(stored: Run, new: Run) -> pd.DataFrame:
    """Return one row per split: the stored primary metric, the repeat's, and how their predictions compare."""
    rows, splits = [], [run.metrics["splits"] for run in (stored, new)]
    for split in {**splits[0], **splits[1]}:
        primary = [of.get(split, {}).get("primary") for of in splits]
        rows.append((split, *primary, _compare_predictions(stored, new, split)))
    return pd.DataFrame(rows, columns=["split", "stored", "new", "predictions"])


def _compare_predictions(stored: Run, new: Run, split: str) -> str:
    if any(split not in run.metrics["splits"] for run in (stored, new)):
        return "of another split: the data has changed"
    if not (stored.folder / f"predictions_{split}.jsonl").is_file():
        return "not stored"
    old, repeat = (run.predictions(split) for run in (stored, new))
    rows = ["idx", "input_text", "label"]
    if not old[rows].equals(repeat[rows]):
        return "of other rows: the data has changed"
    if "prediction" not in old:
        return "none: beta is 0"
    differing = int((old["prediction"] != repeat["prediction"]).sum())
    return f"{differing} of {len(old)} differ" if differing else "all the same"


def write_json(path: Path, value: Any) -> None:
    """Write JSON under another name and rename it, so that the file is whole or not there."""
    scratch = path.with_name(f"{path.name}.part-{os.getpid()}")
    scratch.write_text(json.dumps(value, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    os.replace(scratch, path)


def run_lock(folder: Path) -> FileLock:
    """Return the lock of a run's folder, which its holder may acquire again.

    The operating system frees the lock of a killed process.
    """
    folder.mkdir(parents=True, exist_ok=True)
    return FileLock(folder / "training.lock", is_singleton=True)


def environment(device: torch.device) -> dict[str, Any]:
    """Return what a run's figures depend on beside its configuration: versions, hardware, git commit."""
    import torch

    accelerator = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    return {
        "packages": {name: importlib.metadata.version(name) for name in PACKAGES.split()},
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
