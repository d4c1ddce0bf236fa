"""Scaling: the same training on many processes, by accelerate's configuration alone."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import small_runs
import torch
from conftest import ROOT
from filelock import FileLock
from safetensors.torch import load_file
from small_runs import write_table
from transformers import LlamaConfig, LlamaForCausalLM

from dhrd_lib.backbones import load_backbone
from dhrd_lib.config import RunConfig
from dhrd_lib.modeling import DHRDModel
from dhrd_lib.runs import Run, load_run
from dhrd_lib.training import train

pytestmark = pytest.mark.usefixtures("own_cache")
TERMS = ["step", "loss", "class_loss", "lm_loss"]
# The configurations of the two-process runs, by name: what each changes of `config`.
CHANGES = {
    "tied": {},
    # A batch of one has a row without a rationale on one process alone: the others mustn't wait for it.
    "untied": {"model.backbone": "untied", "training.batch_size": 2, "training.epochs": 1},
    "stopped": {"training.eval_steps": 2},
    "options": {"training.alpha": "auto", "training.privileged_head": "separate", "training.privileged_gamma": 1.0},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A table, and a backbone whose LM head has weights of its own."""
    folder = tmp_path_factory.mktemp("scaling")
    write_table(folder)
    tiny = load_backbone("tiny", device="cpu")
    torch.manual_seed(0)
    untied = LlamaForCausalLM(LlamaConfig(**{**tiny.model.config.to_dict(), "tie_word_embeddings": False}))
    untied.save_pretrained(folder / "untied")
    tiny.tokenizer.save_pretrained(folder / "untied")
    return folder


def config(folder: Path, name: str, processes: int) -> RunConfig:
    """Return a run's configuration with the same number of rows per step, however many processes share them."""
    changed = small_runs.config(folder / "rows.jsonl", f"{name}-{processes}").replace(CHANGES[name])
    if changed.model.backbone == "untied":
        changed = changed.replace({"model.backbone": str(folder / "untied")})
    return changed.replace({"training.batch_size": changed.training.batch_size // processes})


@pytest.fixture(scope="module")
def alone(folder) -> dict[str, Run]:
    """Each configuration as one process trains it."""
    return {name: train(config(folder, name, 1), folder / "alone") for name in CHANGES}


GUIDE, COSTS = ((ROOT / "docs" / page).read_text(encoding="utf-8") for page in ("guides/scaling.md", "costs.md"))


def launch(root: Path, file: str, paths: list[Path]) -> subprocess.Popen:
    """Two processes that `accelerate launch` starts on some configurations."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(ROOT / "docs" / file)]
    command += ["--num_processes", "2", "--main_process_port", "0", str(ROOT / "tests" / "many_processes.py")]
    return subprocess.Popen(
        [*command, str(root), *map(str, paths)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def launched(folder: Path, file: str) -> dict[str, Run]:
    """Each configuration as two processes train it."""
    paths = []
    for name in CHANGES:
        paths.append(folder / f"{name}.json")
        config(folder, name, 2).save(paths[-1])
    process = launch(folder / file, file, paths)
    output, _ = process.communicate(timeout=280)
    assert process.returncode == 0, output
    assert "stopped-2 was stopped" in output
    return {name: load_run(folder / file / f"{name}-2") for name in CHANGES}


@pytest.mark.timeout(300)
@pytest.mark.parametrize("file", ["accelerate/ddp.yaml", "accelerate/fsdp.yaml"])
def test_two_processes_equal_one(folder, alone, file):
    """Losses within 1e-5, weights within 2e-4 (AdamW divides by small numbers), the same labels."""
    for name, two in launched(folder, file).items():
        one = alone[name]
        assert two.metrics["train_tokens"] == one.metrics["train_tokens"]
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


@pytest.mark.timeout(300)
def test_two_processes_wait_for_a_run_together(folder, alone, tmp_path):
    finished = alone["tied"]
    there = tmp_path / finished.name
    there.mkdir()
    with FileLock(there / "training.lock"):
        process = launch(tmp_path, "accelerate/ddp.yaml", [finished.folder / "config.json"])
        while "is being trained by another process; waiting" not in (line := process.stdout.readline()):
            assert line, "they didn't wait"
        shutil.copytree(finished.folder, there, dirs_exist_ok=True)
    output, _ = process.communicate(timeout=200)
    assert process.returncode == 0, output
    assert "train:" not in output
    assert load_run(there).metrics == finished.metrics


def logged(run: Run) -> np.ndarray:
    """The loss and its terms, a row a step."""
    return run.history[run.history["loss"].notna()][TERMS].astype(float).to_numpy()


def probabilities(run: Run, split: str) -> np.ndarray:
    """The class probabilities of a split's rows."""
    return np.stack(run.predictions(split)["probabilities"])


def test_documented_files_exist():
    for file in ("docs/accelerate/ddp.yaml", "docs/accelerate/fsdp.yaml"):
        assert file in GUIDE
        assert (ROOT / file).is_file()


def test_documented_activation_bytes():
    def kept(layers: int, tokens: int = 64) -> int:
        config = LlamaConfig(
            hidden_size=64,
            intermediate_size=192,
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            vocab_size=64,
        )
        decoder = LlamaForCausalLM(config).model
        weights = {parameter.data_ptr() for parameter in decoder.parameters()}
        storages = {}

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            decoder(input_ids=torch.zeros(1, tokens, dtype=torch.long), use_cache=False)
        return sum(storage.nbytes() for place, storage in storages.items() if place not in weights) // tokens

    width, mlp, kv_width = 64, 192, 32
    assert "`4 L (7 H + 4 I + 4 K)`" in COSTS
    assert (kept(4) - kept(2)) / 2 == pytest.approx(4 * (7 * width + 4 * mlp + 4 * kv_width), rel=0.02)
