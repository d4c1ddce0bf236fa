"""Inference with a trained model, or an export that starts without torch, transformers and datasets."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from tokenizers import Tokenizer

from dhrd_lib.config import Config, ConfigError, cache_dir, read_json
from dhrd_lib.inputs import (
    MAX_TOKENS_PER_CPU_BATCH,
    Inputs,
    Predictions,
    cut_to_fit,
    length_sorted_batches,
    render_inputs,
)

if TYPE_CHECKING:
    from dhrd_lib.modeling import DHRDModel

EXPORT_KEY = "dhrd_export"  # in a config.json, which for an hf export is transformers' own

Format = Literal["onnx", "openvino", "hf"]
# `input_ids` and `attention_mask`, both (B, S) int64 and right-padded, to logits (B, K) float32.
Engine = Callable[[np.ndarray, np.ndarray], np.ndarray]


class ExportConfig(Config):
    """What an exported folder's config.json holds under `dhrd_export`; labels are in the order of the logits."""

    format: Format
    precision: Literal["float32", "int8"]
    backbone: str
    pooling: str
    head: str
    template: str
    label_names: list[str]
    max_input_tokens: int
    truncation_side: Literal["left", "right"] = "left"
    start_ids: list[int]
    pad_token_id: int


@dataclass(frozen=True)
class ExportedClassifier:
    """An exported classifier: `encode`, `logits` and `predict` as of `DHRDModel`, on another engine."""

    config: ExportConfig
    tokenizer: Tokenizer
    engine: Engine

    @property
    def label_names(self) -> list[str]:
        """Labels in the order of the logits."""
        return self.config.label_names

    def encode(self, inputs: Inputs) -> list[dict[str, Any]]:
        """Return token rows with `input_ids`, `input_length` and `input_tokens_cut`, as of `DHRDModel.encode`."""
        config, rows = self.config, []
        texts = render_inputs(config.template, inputs)
        for encoding in self.tokenizer.encode_batch(texts, add_special_tokens=False):
            ids, cut = cut_to_fit(encoding.ids, config.start_ids, config.max_input_tokens, config.truncation_side)
            rows.append({"input_ids": ids, "input_length": len(ids), "input_tokens_cut": cut})
        return rows

    def logits(self, rows: Sequence[Mapping[str, Any]], max_batch_tokens: int = 4096) -> np.ndarray:
        """Return class logits `(N, K)`, float32, in batches of at most `max_batch_tokens` tokens."""
        lengths = [len(row["input_ids"]) for row in rows]
        logits = np.zeros((len(rows), len(self.label_names)), dtype=np.float32)
        for places in length_sorted_batches(lengths, min(max_batch_tokens, MAX_TOKENS_PER_CPU_BATCH)):
            ids = np.full((len(places), lengths[places[0]]), self.config.pad_token_id, dtype=np.int64)
            mask = np.zeros_like(ids)
            for row, place in enumerate(places):
                ids[row, : lengths[place]] = rows[place]["input_ids"]
                mask[row, : lengths[place]] = 1
            logits[places] = self.engine(ids, mask)
        return logits

    def predict(self, inputs: Inputs, max_batch_tokens: int = 4096) -> Predictions:
        """Return label names and probabilities of inputs, in their order."""
        return Predictions.from_logits(self.logits(self.encode(inputs), max_batch_tokens), self.label_names)


def load_classifier(path: str | Path) -> DHRDModel | ExportedClassifier:
    """Load a classifier from a run's folder, one that `DHRDModel.save_pretrained` wrote, or an export.

    Exports run on the CPU, on OMP_NUM_THREADS threads or all cores, and serve several threads at once. Raises
    `ConfigError` where there is no classifier, or one that was never trained.
    """
    folder = classifier_folder(path)
    values = read_json(folder / "config.json")
    if EXPORT_KEY not in values:
        from dhrd_lib.modeling import DHRDModel  # torch, transformers and peft take seconds; an export needs none

        return DHRDModel.from_pretrained(folder)
    config = ExportConfig.from_dict(values[EXPORT_KEY])
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.encode_special_tokens = True  # Special tokens in a user's text are text.
    tokenizer.no_padding()
    tokenizer.no_truncation()
    engines = {"onnx": _onnx_engine, "openvino": openvino_engine, "hf": _hf_engine}
    return ExportedClassifier(config, tokenizer, engines[config.format](folder))


def classifier_folder(path: str | Path) -> Path:
    """Return the folder given, or `model` in it; raise `ConfigError` where it has no trained classifier."""
    folder = Path(path)
    folder = folder / "model" if (folder / "model" / "config.json").is_file() else folder
    config = _read_config(folder)
    if EXPORT_KEY not in config and config.get("model_type") != "dhrd":
        raise ConfigError(f"{path} holds no classifier; expected a finished run, a saved DHRDModel or an export.")
    # Models of version 0.1 don't know whether their classifier was trained, but their runs do.
    training = _read_config(folder.parent).get("training", {}) if folder.name == "model" else {}
    if not config.get("classifier_trained", True) or training.get("beta") == 0:
        raise ConfigError(f"{path} has an untrained classifier (beta = 0); expected CoT decoding (dhrd_lib.cot).")
    return folder


def _read_config(folder: Path) -> dict[str, Any]:
    return read_json(folder / "config.json") if (folder / "config.json").is_file() else {}


def _threads() -> int:
    if (named := os.environ.get("OMP_NUM_THREADS", "")).isdigit():
        return int(named)
    # The engines themselves count all cores of the machine, not those that the process may use.
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def _onnx_engine(folder: Path) -> Engine:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = _threads()
    session = onnxruntime.InferenceSession(folder / "model.onnx", options, providers=["CPUExecutionProvider"])
    return lambda ids, mask: session.run(["logits"], {"input_ids": ids, "attention_mask": mask})[0]


def openvino_engine(folder: Path, precision: str = "f32") -> Engine:
    import openvino

    graph = (folder / "openvino_model.xml").resolve()
    settings = {
        "INFERENCE_NUM_THREADS": _threads(),
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": precision,  # left to itself, the engine chooses bfloat16 on some processors
    }
    # What is compiled is kept for the next start. OpenVINO identifies a graph by its path, size and time, but not
    # all weights are read from the export again: the cache folder is named after their file's size and time.
    weights = graph.with_suffix(".bin").stat()
    cache = cache_dir() / "openvino" / f"{weights.st_size}-{weights.st_mtime_ns}"
    with contextlib.suppress(OSError):
        cache.mkdir(parents=True, exist_ok=True)
    if os.access(cache, os.W_OK):
        settings |= {"CACHE_DIR": str(cache), "CACHE_MODE": "OPTIMIZE_SIZE"}
    model = openvino.Core().compile_model(graph, "CPU", settings)
    # A request takes one call at a time, and the model itself has a single one for all its callers.
    local = threading.local()

    def run(ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
        if not hasattr(local, "request"):
            local.request = model.create_infer_request()
        return local.request.infer({"input_ids": ids, "attention_mask": mask}, share_inputs=True)["logits"]

    return run


def _hf_engine(folder: Path) -> Engine:
    import torch
    from transformers import AutoModelForSequenceClassification

    from dhrd_lib.backbones import check_own_weights

    check_own_weights(folder)
    safe = {"use_safetensors": True, "trust_remote_code": False}
    model = AutoModelForSequenceClassification.from_pretrained(folder, **safe).eval()

    @torch.inference_mode()
    def run(ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
        return model(torch.from_numpy(ids), attention_mask=torch.from_numpy(mask)).logits.numpy()

    return run
