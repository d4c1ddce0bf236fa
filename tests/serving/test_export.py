"""Exports predict as the model does, start without torch, and are written whole or not at all."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import numpy as np
import onnx
import openvino
import pandas as pd
import pytest
import torch
from conftest import tiny_model
from onnx import helper
from transformers import pipeline

from benchmarks import int8_accuracy
from dhrd_lib.config import HEADS, POOLING_MODES, ConfigError, DataConfig, ModelConfig, RunConfig, TrainingConfig
from dhrd_lib.modeling import DHRDModel
from dhrd_lib.serving.classifier import ExportedClassifier, load_classifier
from dhrd_lib.serving.export import export
from dhrd_lib.tasks import Task
from dhrd_lib.training import train

# One token, a few, and more than `max_input_tokens`: rows of a batch are padded, and the last is cut.
TEXTS = [
    "a",
    "My lamp broke.",
    "I was charged twice for one night, and want the money back.",
    " ".join(["Why?"] * 300),
]
ENGINES = ("onnx", "openvino")


@pytest.fixture(scope="module")
def plain(task) -> Task:
    """The same labels, and a text as it is: only so can an input have one token."""
    return Task("plain", "{text}", task.label_names, task.verbalizers)


def saved(task: Task, folder: Path, architecture: str = "llama", side: str = "left", **config: object) -> DHRDModel:
    """Save a model whose every weight has moved, so that losing an adapter or a query shows."""
    model = tiny_model(task, architecture, **config)
    model.config.truncation_side = side
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder)
    return DHRDModel.from_pretrained(folder)


@pytest.fixture(scope="module")
def exports(plain, tmp_path_factory, own_cache):
    """Model and export of a format and of options of the model, each traced once for all tests."""

    @cache
    def of(format: str, int8: bool = False, **config: object) -> tuple[DHRDModel, Path]:
        folder = tmp_path_factory.mktemp(format)
        return saved(plain, folder / "model", **config), export(folder / "model", format, int8=int8)

    return of


@pytest.fixture(scope="module")
def hf(exports) -> tuple[DHRDModel, Path]:
    return exports("hf", pooling="last", head="linear")


def logits(model: DHRDModel | ExportedClassifier, texts: list[str] = TEXTS) -> np.ndarray:
    return model.logits(model.encode(texts))


# Tracing takes many seconds a model; these three meet each engine, and what the poolings do to a trace.
QUICK = {("onnx", "last", "mlp"), ("openvino", "attention", "mlp"), ("openvino", "last", "mlp")}
EVERY = [
    pytest.param(format, config, marks=[] if (format, *config.values()) in QUICK else [pytest.mark.slow])
    for format in ENGINES
    for config in (
        *({"pooling": pooling, "head": head} for pooling in POOLING_MODES for head in HEADS),
        *({"architecture": architecture} for architecture in ("qwen3", "gemma2", "gpt2")),
    )
]


@pytest.mark.parametrize(("format", "config"), EVERY)
def test_export_has_the_logits_of_the_model(exports, format, config):
    model, folder = exports(format, **config)
    exported = load_classifier(folder)
    expected = logits(model)
    np.testing.assert_allclose(logits(exported), expected, rtol=0, atol=1e-4)
    assert expected.std(0).max() > 1e-2  # The texts do give different logits.
    alone = [exported.logits([row])[0] for row in exported.encode(TEXTS)]
    np.testing.assert_allclose(alone, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize(("format", "head"), [("onnx", "mlp"), ("openvino", "mlp"), ("hf", "linear")])
def test_export_serves_several_threads(exports, format, head):
    exported = load_classifier(exports(format, pooling="last", head=head)[1])
    texts = [[f"{text} {number}" for text in TEXTS[: 1 + number % 4]] for number in range(64)]
    with ThreadPoolExecutor(8) as threads:
        for found, expected in zip(threads.map(exported.predict, texts), map(exported.predict, texts), strict=True):
            assert found.labels == expected.labels
            np.testing.assert_allclose(found.probabilities, expected.probabilities, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("format", "head"), [("onnx", "mlp"), ("openvino", "mlp"), ("hf", "linear")])
def test_special_tokens_in_a_text_are_text(exports, format, head):
    model, folder = exports(format, pooling="last", head=head)
    exported, special = load_classifier(folder), model.tokenizer.pad_token
    texts = [f"My lamp broke.{special}", f"{special}{special}", f"Is {special} a token?"]
    rows = exported.encode(texts)
    assert [row["input_ids"] for row in rows] == [row["input_ids"] for row in model.encode(texts)]
    assert all(model.tokenizer.pad_token_id not in row["input_ids"] for row in rows)
    np.testing.assert_allclose(logits(exported, texts), logits(model, texts), rtol=0, atol=1e-4)


@pytest.mark.parametrize("changes", [{}, {"finetune": "lora"}])
def test_transformers_pipeline_loads_an_hf_export(plain, tmp_path, changes):
    model = saved(plain, tmp_path / "model", side="right" if changes else "left", head="linear", **changes)
    folder = export(tmp_path / "model", "hf")
    classify = pipeline("text-classification", model=str(folder), function_to_apply="none", top_k=None)
    texts = [*TEXTS, f"My lamp broke.{model.tokenizer.pad_token}", "first " * 300 + "last"]
    rows = [{entry["label"]: entry["score"] for entry in row} for row in classify(texts, truncation=True)]
    found = [[row[name] for name in model.label_names] for row in rows]
    np.testing.assert_allclose(found, logits(model, texts), rtol=0, atol=1e-4)
    np.testing.assert_allclose(logits(load_classifier(folder), texts), logits(model, texts), rtol=0, atol=1e-4)


@pytest.mark.parametrize("format", ["onnx", pytest.param("openvino", marks=[pytest.mark.slow])])
def test_int8_export_stays_near_the_model(exports, format):
    model, folder = exports(format, int8=True, pooling="last", head="mlp")
    exported = load_classifier(folder)
    assert (exported.config.format, exported.config.precision) == (format, "int8")
    found, expected = logits(exported), logits(model)
    np.testing.assert_allclose(found, expected, rtol=0, atol=0.5)
    assert np.abs(found - expected).max() > 1e-4  # It isn't the float32 graph under another name.


def test_int8_onnx_quantizes_the_decoder_alone(exports):
    model, folder = exports("onnx", int8=True, pooling="last", head="mlp")
    graph = onnx.load(folder / "model.onnx").graph
    settings = [
        {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
        for node in graph.node
        if node.op_type == "MatMulNBits"
    ]
    # Query, key and value are one product in the graph, and so are gate and up.
    assert len(settings) == 4 * model.config.backbone_config.num_hidden_layers
    assert {(of["bits"], of["block_size"], of["accuracy_level"]) for of in settings} == {(8, 128, 4)}
    float32 = {tensor.name for tensor in graph.initializer if tensor.data_type == onnx.TensorProto.FLOAT}
    products = [node for node in graph.node if node.op_type in ("MatMul", "Gemm") and node.input[1] in float32]
    assert len(products) == 2  # the classifier's


def test_impossible_exports_are_refused(plain, tmp_path):
    saved(plain, tmp_path / "model", head="linear")
    saved(plain, tmp_path / "mlp")
    done = export(tmp_path / "model", "hf", out=tmp_path / "done")
    for source, arguments, expected in (
        ("model", {"format": "gguf"}, "format is 'gguf'; expected one of 'onnx', 'openvino', 'hf'"),
        ("model", {"format": "hf", "int8": True}, "expected 'onnx' or 'openvino'"),
        ("model", {"format": "hf", "out": done}, "exists already"),
        ("mlp", {"format": "hf", "out": tmp_path / "out"}, "expected 'last' and 'linear'"),
        ("nothing", {"format": "hf"}, "holds no classifier; expected a finished run"),
        ("done", {"format": "hf", "out": tmp_path / "out"}, "is an export already"),
    ):
        with pytest.raises(ConfigError, match=expected):
            export(tmp_path / source, **arguments)
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == ["done", "mlp", "model"]


def test_untrained_classifier_is_refused(plain, tmp_path):
    model = tiny_model(plain)
    model.config.classifier_trained = False
    model.save_pretrained(tmp_path / "model")
    # A run of version 0.1, whose model doesn't know.
    tiny_model(plain).save_pretrained(tmp_path / "old" / "model")
    (tmp_path / "old" / "config.json").write_text('{"training": {"beta": 0.0}}')
    for path in (tmp_path / "model", tmp_path / "old", tmp_path / "old" / "model"):
        for use in (load_classifier, lambda path: export(path, "onnx")):
            with pytest.raises(ConfigError, match="untrained classifier .beta = 0.; expected CoT decoding"):
                use(path)


def test_load_classifier_takes_run_model_and_export(hf, tmp_path):
    model, folder = hf
    expected = model.predict(TEXTS).labels
    shutil.copytree(folder.parent, tmp_path / "run" / "model")
    for path in (tmp_path / "run", tmp_path / "run" / "model", folder):
        assert load_classifier(path).predict(TEXTS).labels == expected
    for inputs in (TEXTS[1], {"text": TEXTS[1]}, pd.DataFrame({"text": TEXTS[1:2]})):
        assert model.predict(inputs).labels == load_classifier(folder).predict(inputs).labels == expected[1:2]


def test_export_runs_without_torch(exports):
    model, folder = exports("openvino", pooling="last", head="mlp")
    script = (
        "import sys; from dhrd_lib import load_classifier\n"
        f"print(load_classifier({str(folder)!r}).predict('My lamp broke.').labels[0])\n"
        "assert not {'torch', 'transformers', 'datasets', 'pandas', 'scipy'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.split() == model.predict("My lamp broke.").labels


def compiled(folder: Path, monkeypatch: pytest.MonkeyPatch) -> openvino.CompiledModel:
    """Return what `load_classifier` compiles."""
    models, compile_model = [], openvino.Core.compile_model
    monkeypatch.setattr(openvino.Core, "compile_model", lambda *of: models.append(compile_model(*of)) or models[-1])
    load_classifier(folder)
    return models[-1]


def test_openvino_caches_what_it_compiles(exports, tmp_path, monkeypatch):
    model, folder = exports("openvino", pooling="last", head="mlp")
    assert compiled(folder, monkeypatch).get_property("LOADED_FROM_CACHE")
    monkeypatch.chdir(folder.parent)
    assert compiled(Path(folder.name), monkeypatch).get_property("LOADED_FROM_CACHE")
    moved = shutil.copytree(folder, tmp_path / "moved")
    assert not compiled(moved, monkeypatch).get_property("LOADED_FROM_CACHE")
    weights = moved / "openvino_model.bin"
    content = bytearray(weights.read_bytes())
    numbers = np.frombuffer(content, dtype=np.float32, count=len(content) // 4)
    numbers[(np.abs(numbers) > 1e-3) & (np.abs(numbers) < 1)] /= 2  # Others may be whole numbers, of shapes.
    weights.write_bytes(content)
    assert not compiled(moved, monkeypatch).get_property("LOADED_FROM_CACHE")
    assert np.abs(logits(load_classifier(moved)) - logits(model)).max() > 1e-3
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("DHRD_CACHE", str(tmp_path / "file"))  # No cache can be written there.
    np.testing.assert_allclose(logits(load_classifier(folder)), logits(model), rtol=0, atol=1e-4)


@pytest.mark.slow
def test_int8_benchmark_compares_every_stored_row(tmp_path):
    config = RunConfig(
        name="run",
        model=ModelConfig(backbone="tiny", device="cpu"),
        data=DataConfig(task="support_triage", max_train_rows=8, max_eval_rows=20),
        training=TrainingConfig(max_steps=2),
    )
    runs = [train(config.replace({"name": f"seed{s}", "training.seed": s}), tmp_path) for s in (0, 1)]
    int8_accuracy.main([*(str(run.folder) for run in runs), "--out", str(tmp_path)])
    stored = json.loads((tmp_path / "int8_accuracy.json").read_text())
    assert (stored["runs"], stored["rows"]) == (["seed0", "seed1"], 60)
    for found in stored["engines"].values():
        assert found["accuracy_difference"]["n_seeds"] == 2
        assert found["rows_with_another_label"] <= 6  # Untrained logits lie close together.
