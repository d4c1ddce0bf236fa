"""Jobs that are to be killed: each works in one folder, goes on where it was stopped, and can be compared.

A job is deterministic, and started again it ends where an unkilled one ends. `OUTCOMES` says what it gave, without
times; `whole` what a reader finds in the folder of a job that may have been killed at any moment.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from transformers import PreTrainedModel

from dhrd_lib.backbones import load_backbone
from dhrd_lib.config import RunConfig
from dhrd_lib.rationales import RationaleStore, TeacherConfig, generate
from dhrd_lib.runs import Run, find_runs
from dhrd_lib.serving.classifier import load_classifier
from dhrd_lib.serving.export import export
from dhrd_lib.studies.sweeps import Grid, sweep
from dhrd_lib.tasks import load_task
from dhrd_lib.training import train

# Greedy, it writes blank lines alone; a row of its own for each batch, so that its draws are the same after a kill.
TEACHER = TeacherConfig(model="tiny", max_tokens=12, batch_size=1, device="cpu", temperature=1.0, seed=0)
ROWS = 12
CONFIG = {
    "name": "run",
    "model": {"backbone": "tiny", "device": "cpu", "freeze_layers": 2},
    "data": {"max_train_rows": 24, "max_eval_rows": 8, "max_input_tokens": 64, "max_rationale_tokens": 32},
    "training": {"epochs": 1, "batch_size": 4, "eval_steps": 1, "logging_steps": 1, "learning_rate": 1e-3},
}
TEXTS = ["My lamp broke.", "I was charged twice and want the money back."]


def begin(job: str, folder: Path, ready: Any = None) -> None:
    """What the process does: the job, in a folder that `prepare` made; `ready` is set once it starts."""
    os.environ["DHRD_CACHE"] = str(folder / "cache")
    torch.set_num_threads(1)
    if ready is not None:
        ready.set()
    JOBS[job](folder)


def prepare(job: str, folder: Path) -> None:
    """The files that a job starts from."""
    folder.mkdir(parents=True)
    if job == "convert":
        write_gguf(folder / "tiny.gguf")
    elif job == "export":
        os.environ["DHRD_CACHE"] = str(folder / "cache")
        # The hf format alone takes no tracing, which is a minute of work that writes nothing.
        train(RunConfig.from_dict(CONFIG).replace({"model.head": "linear", "training.max_steps": 1}), folder)


# ---------------------------------------------------------------------- the jobs


def _convert(folder: Path) -> None:
    load_backbone(str(folder / "tiny.gguf"), device="cpu")


def _convert_embedded(folder: Path) -> None:
    load_backbone("smollm2-135m", device="cpu")


def _rationales(folder: Path) -> None:
    task, splits = load_task("support_triage")
    generate(task, splits["train"].select(range(ROWS)), TEACHER, folder)


def _train(folder: Path) -> None:
    train(RunConfig.from_dict(CONFIG), folder)


def _grid(folder: Path) -> None:
    base = {name: values for name, values in CONFIG.items() if name != "name"}
    base["training"] = {**base["training"], "max_steps": 3}
    table = sweep(Grid(name="g", grid={"training.alpha": [0, 1]}, base=base), folder)
    assert set(table["state"]) == {"finished"}, table


def _export(folder: Path) -> None:
    if not (folder / "export").exists():
        export(folder / "run", "hf", out=folder / "export")


JOBS = {
    "convert": _convert,
    "convert_embedded": _convert_embedded,
    "rationales": _rationales,
    "train": _train,
    "grid": _grid,
    "export": _export,
}


# ---------------------------------------------------------------------- what they gave


def outcome(job: str, folder: Path) -> Any:
    """What a finished job left, in a form that equals another's."""
    assert not list(folder.rglob("*.part-*")), "something half-made is left"
    return OUTCOMES[job](folder)


def _converted(folder: Path) -> Any:
    (target,) = [path for path in (folder / "cache" / "backbones").iterdir() if path.is_dir()]
    return {path.name: _digest(path) for path in target.iterdir()}


def _records(folder: Path) -> Any:
    records = RationaleStore(folder / "support_triage" / "tiny.jsonl").read()
    return sorted((one.key, one.rationale, one.answer, one.agreed, one.finish_reason) for one in records)


def _trained(folder: Path) -> Any:
    return {run.name: _of_run(run) for run in find_runs(folder)}


def _of_run(run: Run) -> Any:
    predictions = {path.name: _digest(path) for path in sorted(run.folder.glob("predictions_*.jsonl"))}
    losses = run.history["loss"].dropna().tolist()
    weights = _digest(run.folder / "model" / "model.safetensors")
    assert not (run.folder / "checkpoints").exists()
    return run.metrics["splits"], predictions, losses, weights


def _exported(folder: Path) -> Any:
    model = load_classifier(folder / "export")
    names = sorted(path.name for path in (folder / "export").iterdir())
    return names, model.logits(model.encode(TEXTS)).tolist()


OUTCOMES = {
    "convert": _converted,
    "rationales": _records,
    "train": _trained,
    "grid": _trained,
    "export": _exported,
}


def whole(job: str, folder: Path, expected: Any) -> None:
    """Right after a kill: what a reader takes for finished is what an unkilled job gave, or a part of it."""
    if job == "convert":
        found = [path for path in (folder / "cache").glob("backbones/*") if path.is_dir()]
        assert all(".part-" in path.name for path in found) or _converted(folder) == expected
    elif job == "rationales":
        if (folder / "support_triage" / "tiny.jsonl").exists():
            found = _records(folder)
            assert len({record[0] for record in found}) == len(found)
            assert set(found) <= set(expected)
    elif job == "export":
        assert not (folder / "export").exists() or _exported(folder) == expected
    else:
        for run in find_runs(folder):
            assert run.metrics["splits"] == expected[run.name][0]


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


# ---------------------------------------------------------------------- a GGUF file of a tiny model


def write_gguf(path: Path) -> PreTrainedModel:
    """The tiny backbone as a GGUF file, in float32; returns the model that was written."""
    backbone = load_backbone("tiny", device="cpu")
    config, tokenizer = backbone.model.config, backbone.tokenizer
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    _add_tokenizer(writer, json.loads(tokenizer.backend_tokenizer.to_str())["model"])
    weights = backbone.model.state_dict()
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, weight in weights.items():
        if name != "lm_head.weight":  # it is tied to the embedding
            writer.add_tensor(names.get_name(name, (".weight",)), _permuted(name, weight, config).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return backbone.model


def _add_tokenizer(writer: gguf.GGUFWriter, model: dict[str, Any]) -> None:
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    normal, control = gguf.TokenType.NORMAL, gguf.TokenType.CONTROL
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([control if token == "<|endoftext|>" else normal for token in tokens])
    writer.add_token_merges([" ".join(pair) for pair in model["merges"]])
    writer.add_eos_token_id(model["vocab"]["<|endoftext|>"])
    writer.add_bos_token_id(model["vocab"]["<|endoftext|>"])


def _permuted(name: str, weight: torch.Tensor, config: Any) -> torch.Tensor:
    """Queries and keys stand in another order of their rotary halves in a GGUF file."""
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for part, count in heads.items():
        if part in name:
            half = weight.shape[0] // count // 2
            weight = weight.reshape(count, 2, half, -1).swapaxes(1, 2).reshape(weight.shape)
    return weight.contiguous().float()


def same_logits(one: PreTrainedModel, two: PreTrainedModel) -> bool:
    """Whether two models say the same about some ids."""
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        return bool(np.allclose(one(ids).logits, two(ids).logits, atol=1e-5))
