"""A small table and configurations for tests that train."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file

from dhrd_lib.config import DataConfig, ModelConfig, RunConfig, TrainingConfig
from dhrd_lib.runs import Run


def write_table(folder: Path) -> Path:
    """Write 48 rows with two classes that a tiny model can tell apart, two of them without a rationale."""
    rows = []
    for i in range(48):
        words = ["money", "charged", "twice"] if i % 2 else ["app", "fault", "crash"]
        text = " ".join(words[j % 3] for j in range(i % 7 + 2))
        rationale = None if i in (4, 9) else f"case {i} is about {words[0]}"
        rows.append({"idx": i, "text": text, "label": ("fix", "refund")[i % 2], "rationale": rationale})
    return write_rows(folder / "rows.jsonl", rows)


def write_rows(path: Path, rows: list[dict]) -> Path:
    """Write rows as JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read_rows(path: Path, **changes: object) -> list[dict]:
    """Read JSON lines, with some fields replaced in every row."""
    return [{**json.loads(line), **changes} for line in path.read_text().splitlines()]


def config(table: Path, name: str = "run", **changes: object) -> RunConfig:
    """Return a small run's configuration; `training__alpha=0.5` changes a field."""
    rates = {"learning_rate": 3e-3, "classifier_learning_rate": 1e-2, "warmup_steps": 0}
    base = RunConfig(
        name=name,
        model=ModelConfig(backbone="tiny", device="cpu"),
        data=DataConfig(task=str(table), text=("text",), label="label", rationale="rationale", dev_fraction=0.17),
        training=TrainingConfig(epochs=2, batch_size=8, logging_steps=1, **rates),
    )
    return base.replace({key.replace("__", "."): value for key, value in changes.items()})


def weights(run: Run) -> dict[str, torch.Tensor]:
    """Return the stored weights by name."""
    return load_file(run.folder / "model" / "model.safetensors")


def logged(run: Run, *terms: str) -> list[list[float]]:
    """Return step and terms of each logged training step."""
    rows = run.history
    return rows[rows["loss"].notna()][["step", *terms]].astype(float).values.tolist()


def assert_same_weights(one: Run, two: Run, atol: float = 0.0) -> None:
    """Assert that two runs stored the same weights."""
    ours, theirs = weights(one), weights(two)
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=atol)
