"""Tiny finished runs for the app's tests: stored as `train` stores them, without the time that training takes."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from conftest import tiny_backbone

from dhrd_lib.config import DataConfig, ModelConfig, RunConfig, TrainingConfig
from dhrd_lib.modeling import build_model
from dhrd_lib.runs import environment, write_json
from dhrd_lib.tasks import TASKS, Task

TASK = TASKS["support_triage"]
BASELINE, DHRD, REASONING = "tiny-baseline", "tiny-dhrd", "tiny-reasoning"
_WEIGHTS = {BASELINE: (0.0, 1.0), DHRD: (1.0, 1.0), REASONING: (1.0, 0.0)}
TEXTS = {"text": "My lamp broke on the second day."}
_HISTORY = [{"step": 1, "loss": 2.0, "class_loss": 1.6, "lm_loss": 4.0}, {"step": 2, "eval_class_loss": 1.5}]


def never() -> bool:
    """A computation that nobody stops."""
    return False


def last(steps: Iterable) -> Any:
    """Return the last of some steps."""
    *_, step = steps
    return step


def store_runs(root: Path, *names: str) -> Path:
    """Store the named runs (all three by default) in a folder, and return it."""
    for seed, name in enumerate(names or _WEIGHTS):
        store_run(root / name, _WEIGHTS[name], seed)
    return root


def store_run(
    folder: Path, weights: tuple[float, float] = (1.0, 1.0), seed: int = 0, known: Task = TASK, **data: object
) -> None:
    """Store a run with its alpha and beta that knows its task as `known`; `data` are fields of its `DataConfig`."""
    alpha, beta = weights
    limits = {"max_input_tokens": 64, "max_rationale_tokens": 24}
    config = RunConfig(
        name=folder.name,
        model=ModelConfig(backbone="tiny", device="cpu"),
        data=DataConfig(**limits, **data),
        training=TrainingConfig(alpha=alpha, beta=beta),
    )
    model = build_model(config.model, known, config.data, TrainingConfig(seed=seed), tiny_backbone("llama"))
    # An untrained head predicts one label for all; centered, its labels differ by the text.
    words = ("lamp", "kettle", "train", "bill") * 5
    texts = [dict.fromkeys(known.fields, f"My {word} broke{' again' * n}.") for n, word in enumerate(words)]
    mean = model.logits(model.encode(texts)).mean(0)
    model.classifier[-1].bias.data -= torch.tensor(mean)
    model.save_pretrained(folder / "model")
    config.save(folder / "config.json")
    write_json(folder / "environment.json", environment(torch.device("cpu")))
    pd.DataFrame(_HISTORY).to_json(folder / "history.jsonl", orient="records", lines=True)
    names = known.label_names
    labels = [names[n % len(names)] for n in range(20)]
    predicted = [label if n < 10 + seed else names[0] for n, label in enumerate(labels)]
    columns = {"idx": map(str, range(20)), "input_text": "x", "label": labels, "prediction": predicted}
    uniform = [[1 / len(names)] * len(names)] * 20
    rows = pd.DataFrame({**columns, "probabilities": uniform, "group": None, "rationale": None})
    for split in ("dev", "test"):
        rows.to_json(folder / f"predictions_{split}.jsonl", orient="records", lines=True)
    splits = {split: {"accuracy": 0.5, "primary": 0.5} for split in ("dev", "test")}
    totals = {"steps": 2, "best_step": 2, "train_seconds": 1.0, "train_tokens": 10, "tokens_per_second": 10.0}
    facts = {"task_metrics": ["accuracy"], "label_names": names, "sequences": {"train": {"rows": 8}}}
    write_json(folder / "metrics.json", {**facts, "splits": splits, **totals})
