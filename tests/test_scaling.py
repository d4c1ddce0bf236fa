"""Scaling: the same training on many processes, by accelerate's configuration alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from dhrd_lib.backbones import load_backbone
from dhrd_lib.config import DataConfig, ModelConfig, RunConfig, TrainingConfig
from dhrd_lib.modeling import DHRDModel
from dhrd_lib.runs import Run, load_run
from dhrd_lib.training import train

pytestmark = pytest.mark.usefixtures("own_cache")
ROOT = Path(__file__).parents[1]
TERMS = ["step", "loss", "class_loss", "lm_loss"]
# The configurations of the two-process runs, by name: what each changes of `config`.
CHANGES = {
    "tied": {},
    # A batch of one has a row without a rationale on one process alone: the others mustn't wait for it.
    "untied": {"model__backbone": "untied", "training__batch_size": 1, "training__epochs": 1},
    "stopped": {"training__eval_steps": 2},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A table of 48 rows, two of them without a rationale, and a backbone whose LM head has weights of its own."""
    folder = tmp_path_factory.mktemp("scaling")
    words = (["app", "fault", "crash"], ["money", "charged", "twice"])
    rows = [
        {
            "text": " ".join(words[i % 2][j % 3] for j in range(i % 7 + 2)),
            "label": ("fix", "refund")[i % 2],
            "rationale": None if i in (4, 9) else f"case {i} is about {words[i % 2][0]}",
        }
        for i in range(48)
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tiny = load_backbone("tiny", device="cpu")
    torch.manual_seed(0)
    untied = LlamaForCausalLM(LlamaConfig(**{**tiny.model.config.to_dict(), "tie_word_embeddings": False}))
    untied.save_pretrained(folder / "untied")
    tiny.tokenizer.save_pretrained(folder / "untied")
    return folder


def config(folder: Path, name: str, processes: int) -> RunConfig:
    """The configuration of a run: the same number of rows a step, however many processes share them."""
    base = RunConfig(
        name=f"{name}-{processes}",
        model=ModelConfig(backbone="tiny", device="cpu"),
        data=DataConfig(task=str(folder / "rows.jsonl"), text=("text",), label="label", dev_fraction=0.17),
        training=TrainingConfig(
            epochs=2,
            batch_size=4,
            learning_rate=3e-3,
            classifier_learning_rate=1e-2,
            warmup_steps=0,
            logging_steps=1,
        ),
    )
    changed = base.replace(**CHANGES[name])
    if changed.model.backbone == "untied":
        changed = changed.replace(model__backbone=str(folder / "untied"))
    return changed.replace(training__batch_size=changed.training.batch_size * 2 // processes)


@pytest.fixture(scope="module")
def alone(folder) -> dict[str, Run]:
    """Each configuration as one process trains it."""
    return {name: train(config(folder, name, 1), folder / "alone") for name in CHANGES}


def launched(folder: Path, file: str) -> dict[str, Run]:
    """Each configuration as two processes train it that `accelerate launch` starts."""
    paths = []
    for name in CHANGES:
        paths.append(folder / f"{name}.json")
        config(folder, name, 2).save(paths[-1])
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(ROOT / "docs" / file)]
    command += ["--num_processes", "2", "--main_process_port", "0", str(ROOT / "tests" / "many_processes.py")]
    done = subprocess.run(
        [*command, str(folder / file), *map(str, paths)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stdout
    assert "stopped-2 was stopped" in done.stdout
    return {name: load_run(folder / file / f"{name}-2") for name in CHANGES}


@pytest.mark.timeout(300)
@pytest.mark.parametrize("file", ["accelerate/ddp.yaml", "accelerate/fsdp.yaml"])
def test_two_processes_train_what_one_does(folder, alone, file):
    """Losses within 1e-5, weights within 2e-4 (AdamW divides by small numbers), the same labels."""
    for name, two in launched(folder, file).items():
        one = alone[name]
        assert two.metrics["train_tokens"] == one.metrics["train_tokens"] or name == "stopped"
        np.testing.assert_allclose(logged(one), logged(two), atol=1e-5)
        assert two.metrics["splits"] == one.metrics["splits"]
        for split in two.metrics["splits"]:
            np.testing.assert_allclose(probabilities(one, split), probabilities(two, split), atol=1e-4)
        ours, theirs = (load_file(run.folder / "model" / "model.safetensors") for run in (one, two))
        assert ours.keys() == theirs.keys()
        for weight in ours:
            torch.testing.assert_close(ours[weight], theirs[weight], rtol=0, atol=2e-4)
        assert two.metrics["resumed_from_step"] == (4 if name == "stopped" else 0)
        rows = two.predictions("test")["input_text"].tolist()
        found = DHRDModel.from_pretrained(two.folder / "model").predict(rows)
        np.testing.assert_allclose(found.probabilities, probabilities(two, "test"), atol=1e-5)


def logged(run: Run) -> np.ndarray:
    """The loss and its terms, a row a step."""
    return run.history[run.history["loss"].notna()][TERMS].astype(float).to_numpy()


def probabilities(run: Run, split: str) -> np.ndarray:
    """The class probabilities of a split's rows."""
    return np.stack(run.predictions(split)["probabilities"])
