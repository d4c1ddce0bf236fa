"""Scaling: the same training on many processes, by accelerate's configuration alone."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT
from filelock import FileLock
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, Qwen3Config

from benchmarks.compute import classify_flops, train_flops
from dhrd_lib.backbones import layers_of, load_backbone
from dhrd_lib.config import DataConfig, ModelConfig, RunConfig, TrainingConfig
from dhrd_lib.modeling import DHRDModel
from dhrd_lib.runs import Run, load_run
from dhrd_lib.sequences import SequenceFormat, encode_split
from dhrd_lib.studies import tables
from dhrd_lib.tasks import load_rows
from dhrd_lib.training import train

pytestmark = pytest.mark.usefixtures("own_cache")
TERMS = ["step", "loss", "class_loss", "lm_loss"]
# The configurations of the two-process runs, by name: what each changes of `config`.
CHANGES = {
    "tied": {},
    # A batch of one has a row without a rationale on one process alone: the others mustn't wait for it.
    "untied": {"model.backbone": "untied", "training.batch_size": 1, "training.epochs": 1},
    "stopped": {"training.eval_steps": 2},
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
    changed = base.replace(CHANGES[name])
    if changed.model.backbone == "untied":
        changed = changed.replace({"model.backbone": str(folder / "untied")})
    return changed.replace({"training.batch_size": changed.training.batch_size * 2 // processes})


@pytest.fixture(scope="module")
def alone(folder) -> dict[str, Run]:
    """Each configuration as one process trains it."""
    return {name: train(config(folder, name, 1), folder / "alone") for name in CHANGES}


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
def test_two_processes_train_what_one_does(folder, alone, file):
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
def test_two_processes_wait_together_for_a_run_that_another_trains_and_take_it_when_it_is_finished(
    folder, alone, tmp_path
):
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


# ---------------------------------------------------------------------- docs/scaling.md


def llama(
    hidden: int, mlp: int, layers: int, heads: int, kv_heads: int = 8, vocab: int = 128256, tied: bool = False
):
    """A Llama of these widths, without weights."""
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=mlp,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        vocab_size=vocab,
        tie_word_embeddings=tied,
    )
    return _without_weights(config)


def qwen(hidden: int, mlp: int, tied: bool = False):
    """A Qwen3 of 36 layers, without weights."""
    config = Qwen3Config(
        hidden_size=hidden,
        intermediate_size=mlp,
        num_hidden_layers=36,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        vocab_size=151936,
        tie_word_embeddings=tied,
    )
    return _without_weights(config)


def _without_weights(config):
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def query_flops(lm, tokens: float) -> float:
    """Of classifying a text of so many tokens."""
    return classify_flops(SimpleNamespace(backbone=lm), 1, round(tokens))


SCALING = (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8")
# The published shapes of the paper's backbones, and its queries a second (pooled, CoT).
PAPER = {
    "Llama-3.1-8B": (llama(4096, 14336, 32, heads=32), 414.91, 4.14),
    "Llama-3.2-3B": (llama(3072, 8192, 28, heads=24, tied=True), 631.16, 4.44),
    "Qwen3-8B": (qwen(4096, 12288), 341.15, 3.56),
    "Qwen3-4B": (qwen(2560, 9728, tied=True), 440.83, 3.76),
}
H100_BYTES_PER_SECOND = 3.35e12


def test_the_documented_commands_name_files_that_are_there():
    for file in ("docs/accelerate/ddp.yaml", "docs/accelerate/fsdp.yaml"):
        assert file in SCALING
        assert (ROOT / file).is_file()


def test_the_documented_throughput_is_the_models_and_the_stored_benchmarks():
    stored = json.loads((ROOT / "benchmarks" / "results" / "throughput.json").read_text())
    systems = {row["system"]: row for row in stored["systems"]}
    smollm2 = llama(576, 1536, 30, heads=9, kv_heads=3, vocab=49152, tied=True)
    peak = stored["classify"]["peak_gflop_per_second"] * 1e9
    a_token = 2 * sum(p.numel() for p in [*layers_of(smollm2).parameters(), smollm2.lm_head.weight])

    def operations(name: str) -> float:
        row = systems[name]
        return query_flops(smollm2, row["read_tokens_per_query"]) + a_token * row["written_tokens_per_query"]

    def line(figure: str, model: float, measured: float, digits: str = ".3g") -> str:
        return f"| {figure} | {model:{digits}} | {measured:{digits}} |"

    mib = f"{4 * smollm2.num_parameters() / 2**20:.0f} MiB | {systems['DHRD']['weights_mib']:.0f} MiB"
    assert f"| weights, `4 N` | {mib} |" in SCALING
    assert f"a matmul peak of {peak / 1e9:.0f} GFLOP/s" in SCALING
    for name, figure in (
        ("DHRD", "DHRD, queries a second at the peak"),
        ("pipeline (batches of 8)", "pipeline (batches of 8), its padding left out"),
        ("CoT (budget 500)", "CoT (budget 500) at the peak"),
    ):
        assert line(figure, peak / operations(name), systems[name]["queries_per_second"]) in SCALING
    room = operations("CoT (budget 500)") / operations("DHRD")
    ratio = stored["ratios"]["DHRD / CoT (budget 500)"]["value"]
    assert f"| DHRD / CoT (budget 500), by operations | {room:.1f} | {ratio:.0f} |" in SCALING


def test_the_documented_gain_of_the_trunk_cache_is_the_stored_one():
    stored = json.loads((ROOT / "benchmarks" / "results" / "trunk_cache.json").read_text())
    for way in stored["ways"]:
        gains = ["faster_than_full", "room_over_full", "faster_than_no_cache", "room_over_no_cache"]
        told = " | ".join(f"{way[name]:.2f}" for name in gains) if way["way"].endswith(", cache") else " | | |"
        row = f"| {way['way']} | {way['step_seconds']:.0f} | {way['wall_seconds']:.0f} | {told} |"
        assert row.replace("|  |", "| |") in SCALING
        if way["way"].endswith(", cache"):
            assert min(way["share_of_room_over_full"], way["share_of_room_over_no_cache"]) > 0.9
            assert way["same_answers"]
    whole = stored["whole_grid"]
    assert f"All {whole['cells']} cells ({whole['way']}) take {whole['wall_seconds']:.0f} s" in SCALING


def test_the_documented_accuracy_by_frozen_layers_is_the_stored_one():
    table = tables.load_results(ROOT / "benchmarks" / "results" / "frozen_layers.json")
    found = tables.summarize(table, ["freeze_layers", "learning_rate"]).set_index("split")
    for layers, part in found.groupby("freeze_layers"):
        best = part.loc["dev"].sort_values("value")["learning_rate"].iloc[-1]
        chosen = part[part["learning_rate"] == best]
        rows = [chosen.loc[split] for split in ("test", "test_new_domain")]
        told = [f"{row['value']:.1%} [{100 * row['low']:.1f}, {100 * row['high']:.1f}]" for row in rows]
        assert f"| {layers} | {best:g} | {' | '.join(told)} |" in SCALING


def test_the_documented_training_step_is_the_stored_one():
    stored = json.loads((ROOT / "benchmarks" / "results" / "train_step.json").read_text())
    for way in stored["ways"]:
        speed, memory = way["tokens"] / way["seconds"], way["peak_memory_mib"]
        assert f"| {way['way']} | {speed:.0f} | {way['peak_share']:.0%} | {memory:,.0f} |" in SCALING
    for name, ratio in stored["ratios"].items():
        assert f"| {name} | {ratio:.2f} |" in SCALING


def test_the_documented_training_ratio_is_the_models_and_the_stored_runs():
    stored = json.loads((ROOT / "notebooks" / "results" / "quick_two_seeds.json").read_text())
    seconds = {run["run"]: run["train_seconds"] for run in stored["by_seed"]}
    task, splits = load_rows(DataConfig(task="support_triage"))
    fmt = SequenceFormat(load_backbone().tokenizer, max_input_tokens=256, max_rationale_tokens=128)
    smollm2 = llama(576, 1536, 30, heads=9, kv_heads=3, vocab=49152, tied=True)
    flops = []
    for taught in (True, False):
        _, report = encode_split(splits["train"], fmt, task.verbalizers, with_rationale=taught)
        flops.append(train_flops(smollm2, report.tokens, report.lm_tokens, frozen_layers=20, cached=True))
    for seed in (0, 1):
        dhrd, baseline = (seconds[f"quick-support_triage-{name}-seed{seed}"] for name in ("dhrd", "baseline"))
        figure = f"DHRD / baseline, training seconds, seed {seed}"
        assert f"| {figure} | {flops[0] / flops[1]:.2f} | {dhrd / baseline:.2f} |" in SCALING


def test_the_papers_table_follows_from_the_shapes_of_its_backbones():
    for name, (lm, pooled, cot) in PAPER.items():
        layers = sum(parameter.numel() for parameter in layers_of(lm).parameters())
        reading = 500 * 2 * lm.num_parameters() / H100_BYTES_PER_SECOND
        line = f"| {name} | {layers / 1e9:.2f} | {pooled} | {query_flops(lm, 100) * pooled / 1e12:.0f} |"
        assert f"{line} {1 / cot:.2f} | {reading:.2f} |" in SCALING


def test_the_documented_bytes_of_activations_are_what_autograd_keeps():
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
    assert "`4 L (7 H + 4 I + 4 K)`" in SCALING
    assert (kept(4) - kept(2)) / 2 == pytest.approx(4 * (7 * width + 4 * mlp + 4 * kv_width), rel=0.02)


# ---------------------------------------------------------------------- benchmarks/growth.py


def test_the_documented_growth_is_the_stored_one():
    stored = json.loads((ROOT / "benchmarks" / "results" / "growth.json").read_text())
    for slope in stored["slopes"]:
        line = [p for p in stored["points"] if (p["factor"], p["what"]) == (slope["factor"], slope["what"])]
        sizes, seconds, memory = (
            " … ".join(told(line[place][name]) for place in (0, -1))
            for name, told in (
                ("size", "{:,}".format),
                ("seconds", "{:.3g}".format),
                ("added_mib", lambda mib: "< 1" if mib is None else f"{mib:.3g}"),
            )
        )
        powers = [
            "—" if slope[name] is None else f"{round(slope[name], 2) + 0:.2f}"
            for name in ("seconds_slope", "added_mib_slope")
        ]
        row = f"| {slope['what']} | {sizes} {slope['factor']} | {seconds} | {powers[0]} | {memory} | {powers[1]} |"
        assert row in SCALING
