"""Inference: `load_classifier` loads a trained model or an export of one, which both predict in the same way.

An export for ONNX Runtime or OpenVINO starts without torch, transformers and datasets: nothing of them is imported
here.
"""

from __future__ import annotations

import dataclasses
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tokenizers import Tokenizer

from dhrd_lib.config import ConfigError, WorkbenchError, cache_dir, is_whole, read_json, reason_of
from dhrd_lib.inputs import (
    MAX_TOKENS_PER_CPU_BATCH,
    Predictions,
    as_inputs,
    cut_to_fit,
    keep_no_words,
    length_sorted_batches,
    render_inputs,
)

if TYPE_CHECKING:
    from dhrd_lib.modeling import DHRDModel

# In a config.json, which for an hf export is transformers' own.
EXPORT_KEY = "dhrd_export"

Run = Callable[[np.ndarray, np.ndarray], np.ndarray]


def _are_names(value: Any) -> bool:
    return isinstance(value, list) and len(value) > 1 and all(isinstance(one, str) for one in value)


# Of an export's fields, those that it answers with.
_RIGHT: dict[str, Callable[[Any], bool]] = {
    "template": lambda value: isinstance(value, str),
    "label_names": _are_names,
    "max_input_tokens": lambda value: is_whole(value, 1),
    "start_ids": lambda value: isinstance(value, list) and all(map(is_whole, value)),
    "pad_token_id": is_whole,
}


@dataclass(frozen=True)
class ExportConfig:
    """What an exported folder says about itself, in its config.json under `dhrd_export`.

    `format` is one of `RUNNERS`, `precision` "float32" or "int8"; `label_names` stand in the order of the logits.
    """

    format: str
    precision: str
    backbone: str
    pooling: str
    head: str
    template: str
    label_names: list[str]
    max_input_tokens: int
    start_ids: list[int]
    pad_token_id: int

    @classmethod
    def load(cls, folder: Path) -> ExportConfig:
        """Read a folder's; raises `ConfigError` where it isn't one that this version knows."""
        values, where = read_config(folder).get(EXPORT_KEY, {}), f"{folder}/config.json, {EXPORT_KEY}"
        if not isinstance(values, dict):
            raise ConfigError(f"{where} is {values!r}; expected the fields that export wrote.")
        known = {field.name for field in dataclasses.fields(cls)}
        if set(values) != known:
            odd = ", ".join(sorted(set(values) ^ known))
            raise ConfigError(f"{where}: {odd} is missing or unknown; export it anew.")
        if values["format"] not in tuple(RUNNERS):
            found = f"{folder}/config.json has the format {values['format']!r}"
            raise ConfigError(f"{found}; expected one of {', '.join(map(repr, RUNNERS))}.")
        for name, is_right in _RIGHT.items():
            if not is_right(values[name]):
                raise ConfigError(f"{where}: {name} is {values[name]!r}; expected what export wrote.")
        return cls(**values)


@dataclass(frozen=True)
class ExportedClassifier:
    """An exported classifier: what `DHRDModel.predict` does, on another engine.

    `run` takes `input_ids` and `attention_mask`, both `(B, S)` int64 and padded on the right, and gives logits
    `(B, K)` float32.
    """

    config: ExportConfig
    tokenizer: Tokenizer
    run: Run

    @property
    def label_names(self) -> list[str]:
        """The labels' names, in the order of the logits."""
        return self.config.label_names

    def encode(self, inputs: Any) -> list[dict[str, Any]]:
        """Return the token rows of inputs: each a dict of the template's fields, or a str where it has one field.

        One input may come alone, and many as a list or a DataFrame. A row has `input_ids`, `input_length` and
        `input_tokens_cut`, the number of tokens that were cut off.
        """
        rows = []
        texts = render_inputs(self.config.template, as_inputs(inputs))
        for encoding in self.tokenizer.encode_batch(texts, add_special_tokens=False):
            ids, cut = cut_to_fit(encoding.ids, self.config.start_ids, self.config.max_input_tokens)
            rows.append({"input_ids": ids, "input_length": len(ids), "input_tokens_cut": cut})
        return rows

    def predict(self, inputs: Any, max_batch_tokens: int = 4096) -> Predictions:
        """Return label names and probabilities of inputs, in their order (see `encode` and `logits`)."""
        logits = self.logits(self.encode(inputs), max_batch_tokens)
        return Predictions.from_logits(logits, self.label_names)

    def logits(self, rows: Sequence[Mapping[str, Any]], max_batch_tokens: int = 4096) -> np.ndarray:
        """Return class logits `(N, K)`, float32, of encoded inputs, in their order."""
        lengths = [len(row["input_ids"]) for row in rows]
        logits = np.zeros((len(rows), len(self.label_names)), dtype=np.float32)
        for places in length_sorted_batches(lengths, min(max_batch_tokens, MAX_TOKENS_PER_CPU_BATCH)):
            ids = np.full((len(places), lengths[places[0]]), self.config.pad_token_id, dtype=np.int64)
            mask = np.zeros_like(ids)
            for row, place in enumerate(places):
                ids[row, : lengths[place]] = rows[place]["input_ids"]
                mask[row, : lengths[place]] = 1
            found = self.run(ids, mask)
            if found.shape != logits[places].shape:
                told = f"the exported model gives {found.shape[1]} logits a text for {logits.shape[1]} labels"
                raise ConfigError(f"{told}; expected one a label, as export wrote.")
            logits[places] = found
        return logits


def load_classifier(path: str | Path) -> DHRDModel | ExportedClassifier:
    """A classifier with `predict`, from a run's folder, one that `DHRDModel.save_pretrained` wrote, or an export.

    Exports run on the CPU, on as many threads as OMP_NUM_THREADS says or the process has cores, and may be asked by
    several threads at once; a DHRDModel is in evaluation mode. Raises `ConfigError` where the folder holds none of
    them.
    """
    folder = model_folder(path)
    if EXPORT_KEY not in read_config(folder):
        from dhrd_lib.modeling import DHRDModel  # torch, transformers and peft: seconds that an export needn't wait

        return DHRDModel.from_pretrained(folder)
    config = ExportConfig.load(folder)
    with _reading(folder, "tokenizer of an export"):
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    if odd := [one for one in (*config.start_ids, config.pad_token_id) if one >= tokenizer.get_vocab_size()]:
        found = f"{folder} has the token id {odd[0]} in its config.json and {tokenizer.get_vocab_size()} tokens"
        raise ConfigError(f"{found}; expected one of them.")
    keep_no_words(tokenizer)
    tokenizer.no_padding()
    tokenizer.no_truncation()
    with _reading(folder, f"export of the format {config.format!r}"):
        return ExportedClassifier(config, tokenizer, RUNNERS[config.format](folder))


@contextmanager
def _reading(folder: Path, what: str) -> Iterator[None]:
    """Around another library's reading of an export: whatever it raises is a `ConfigError` of one sentence."""
    try:
        yield
    except (WorkbenchError, ImportError):
        raise
    except Exception as error:  # Each engine has errors of its own, and tokenizers a bare one.
        # The engines' own first lines name places in their sources.
        told = reason_of(Exception(str(error).strip().rpartition("\n")[2]))
        raise ConfigError(f"{folder} has no {what} that can be read ({told}); export it anew.") from error


def model_folder(path: str | Path) -> Path:
    """The folder with a classifier's config.json: the one given, or `model` in a run's."""
    folder = Path(path)
    folder = folder / "model" if (folder / "model" / "config.json").is_file() else folder
    found = read_config(folder) if (folder / "config.json").is_file() else {}
    if EXPORT_KEY not in found and found.get("model_type") != "dhrd":
        raise ConfigError(f"{path} holds no classifier; expected a finished run, a saved DHRDModel or an export.")
    return folder


def read_config(folder: Path) -> dict[str, Any]:
    """A folder's config.json; raises `ConfigError` where it isn't a JSON object."""
    values = read_json(folder / "config.json")
    if not isinstance(values, dict):
        raise ConfigError(f"{folder / 'config.json'} is a {type(values).__name__}; expected a JSON object.")
    return values


def read_model_config(folder: Path) -> dict[str, Any]:
    """A saved DHRDModel's config.json; raises `ConfigError` where it lacks what saving wrote.

    transformers would fill in what is missing, a backbone of 7 billion parameters too.
    """
    config, path = read_config(folder), folder / "config.json"
    if config.get("model_type") != "dhrd":
        found = f"{path} has the model_type {config.get('model_type')!r}"
        raise ConfigError(f"{found}; expected 'dhrd', a DHRDModel's.")
    if not (isinstance(config.get("template"), str) and isinstance(config.get("verbalizers"), list)):
        raise ConfigError(f"{path} lacks a template or verbalizers; expected what training wrote.")
    labels, words = label_names_of(config, path), config["verbalizers"]
    if len(words) != len(labels) or not all(isinstance(word, str) for word in words):
        raise ConfigError(f"{path} has the verbalizers {words!r}; expected {len(labels)} texts, one a label.")
    limit = config.get("max_input_tokens", 1)
    if not is_whole(limit, 1):
        raise ConfigError(f"{path} has {limit!r} as max_input_tokens; expected a whole number, 1 or more.")
    backbone = config.get("backbone_config")
    if not (isinstance(backbone, dict) and isinstance(backbone.get("model_type"), str)):
        raise ConfigError(f"{path} lacks a backbone_config with a model_type; expected what training wrote.")
    return config


def label_names_of(config: Mapping[str, Any], path: Path) -> list[str]:
    """The labels that a saved model's config.json names, by their numbers; raises `ConfigError` on others.

    `path` is the file, which the error names.
    """
    # transformers leaves out its own two.
    names = config.get("id2label", {"0": "LABEL_0", "1": "LABEL_1"})
    places = [str(place) for place in range(len(names))] if isinstance(names, dict) else []
    found = [names.get(place) for place in places]
    if not _are_names(found):
        raise ConfigError(f"{path} has {names!r} as id2label; expected two labels or more, numbered from 0.")
    return found


def _threads() -> int:
    named = os.environ.get("OMP_NUM_THREADS", "")
    if named.isdigit():
        return int(named)
    # What the process may use, where the system says so: the engines themselves count all cores of the machine.
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def _onnx_runner(folder: Path) -> Run:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = _threads()
    session = onnxruntime.InferenceSession(folder / "model.onnx", options, providers=["CPUExecutionProvider"])
    return lambda ids, mask: session.run(["logits"], {"input_ids": ids, "attention_mask": mask})[0]


def _kept_graphs(graph: Path) -> dict[str, str]:
    """OpenVINO's settings by which the next start finds what this one compiled, where that can be kept.

    Most weights are read from the export as ever, but not all: OpenVINO looks at the graph's path, size and time,
    so those of the weights' file are put into the folder's name.
    """
    try:
        of_weights = graph.with_suffix(".bin").stat()
        folder = cache_dir() / "openvino" / f"{of_weights.st_size}-{of_weights.st_mtime_ns}"
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return {}
    return {"CACHE_DIR": str(folder), "CACHE_MODE": "OPTIMIZE_SIZE"} if os.access(folder, os.W_OK) else {}


def _openvino_runner(folder: Path) -> Run:
    import openvino

    graph = (folder / "openvino_model.xml").resolve()
    # float32 everywhere: on some processors the engine would choose bfloat16.
    settings = {
        "INFERENCE_NUM_THREADS": _threads(),
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": "f32",
        **_kept_graphs(graph),
    }
    model = openvino.Core().compile_model(graph, "CPU", settings)
    # A request takes one call at a time, and the model itself has a single one for all its callers.
    own = threading.local()

    def run(ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
        if not hasattr(own, "request"):
            own.request = model.create_infer_request()
        return own.request.infer({"input_ids": ids, "attention_mask": mask}, share_inputs=True)["logits"]

    return run


def _hf_runner(folder: Path) -> Run:
    import torch
    from transformers import AutoConfig, AutoModelForSequenceClassification

    from dhrd_lib.backbones import REPORTED, check_size, check_weights, reading_weights

    arguments = {"use_safetensors": True, "trust_remote_code": False, **REPORTED}
    with reading_weights(folder, "an hf export"):
        check_size(folder, AutoConfig.from_pretrained(folder, trust_remote_code=False))
        model, report = AutoModelForSequenceClassification.from_pretrained(folder, **arguments)
        check_weights(report, str(folder))
        model.eval()

    @torch.inference_mode()
    def run(ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
        return model(torch.from_numpy(ids), attention_mask=torch.from_numpy(mask)).logits.numpy()

    return run


RUNNERS: dict[str, Callable[[Path], Run]] = {
    "onnx": _onnx_runner,
    "openvino": _openvino_runner,
    "hf": _hf_runner,
}
