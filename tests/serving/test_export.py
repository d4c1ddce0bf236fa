"""Exports say what the model says, start without torch, and are written whole or not at all."""

from __future__ import annotations

import itertools
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
import pytest
import torch
from conftest import tiny_model
from onnx import helper
from transformers import pipeline
from typer.testing import CliRunner

from benchmarks import int8_accuracy
from dhrd_lib import __main__ as cli
from dhrd_lib.config import (
    HEADS,
    POOLING_MODES,
    ConfigError,
    DataConfig,
    ModelConfig,
    RunConfig,
    TrainingConfig,
)
from dhrd_lib.modeling import DHRDModel
from dhrd_lib.serving.classifier import ExportedClassifier, load_classifier
from dhrd_lib.serving.export import _smooth, export, sequence_classifier
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


def saved(task: Task, folder: Path, architecture: str = "llama", **config: object) -> DHRDModel:
    """A saved model whose every weight has moved, so that losing an adapter or a query shows."""
    model = tiny_model(task, architecture, **config)
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


def logits(model: DHRDModel | ExportedClassifier) -> np.ndarray:
    return model.logits(model.encode(TEXTS))


# Tracing takes many seconds a model; these three meet each engine, and what the poolings do to a trace.
QUICK = {("onnx", "last", "mlp"), ("openvino", "attention", "mlp"), ("openvino", "last", "mlp")}
EVERY = [
    pytest.param(*of, marks=[] if of in QUICK else [pytest.mark.slow])
    for of in itertools.product(ENGINES, POOLING_MODES, HEADS)
]


@pytest.mark.parametrize(("format", "pooling", "head"), EVERY)
def test_an_export_has_the_models_logits_for_every_pooling_and_head(exports, format, pooling, head):
    model, folder = exports(format, pooling=pooling, head=head)
    exported = load_classifier(folder)
    expected = logits(model)
    np.testing.assert_allclose(logits(exported), expected, rtol=0, atol=1e-4)
    assert expected.std(0).max() > 1e-2  # The texts do give different logits.
    alone = [exported.logits([row])[0] for row in exported.encode(TEXTS)]
    np.testing.assert_allclose(alone, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize(("format", "head"), [("onnx", "mlp"), ("openvino", "mlp"), ("hf", "linear")])
def test_an_export_gives_several_threads_at_once_what_it_gives_one(exports, format, head):
    _, folder = exports(format, pooling="last", head=head)
    exported = load_classifier(folder)
    texts = [[f"{text} {number}" for text in TEXTS[: 1 + number % 4]] for number in range(64)]
    expected = [exported.predict(some) for some in texts]
    with ThreadPoolExecutor(8) as threads:
        found = list(threads.map(exported.predict, texts))
    for one, other in zip(found, expected, strict=True):
        assert one.labels == other.labels
        np.testing.assert_allclose(one.probabilities, other.probabilities, rtol=0, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["qwen3", "gemma2", "gpt2"])
@pytest.mark.parametrize("format", ENGINES)
def test_other_decoders_export_too(exports, format, architecture):
    model, folder = exports(format, architecture=architecture)
    exported = load_classifier(folder)
    np.testing.assert_allclose(logits(exported), logits(model), rtol=0, atol=1e-4)


@pytest.mark.parametrize("format", ["onnx", pytest.param("openvino", marks=[pytest.mark.slow])])
def test_an_int8_export_says_so_and_stays_near_the_model(exports, format):
    model, folder = exports(format, int8=True, pooling="last", head="mlp")
    exported = load_classifier(folder)
    assert (exported.config.format, exported.config.precision) == (format, "int8")
    found, expected = logits(exported), logits(model)
    np.testing.assert_allclose(found, expected, rtol=0, atol=0.5)
    assert np.abs(found - expected).max() > 1e-4  # It isn't the float32 graph under another name.


def test_an_int8_onnx_export_has_every_product_of_the_decoder_in_8_bits_and_the_classifiers_in_float32(exports):
    model, folder = exports("onnx", int8=True, pooling="last", head="mlp")
    graph = onnx.load(folder / "model.onnx").graph
    settings = [
        {one.name: helper.get_attribute_value(one) for one in node.attribute}
        for node in graph.node
        if node.op_type == "MatMulNBits"
    ]
    layers = model.config.backbone_config.num_hidden_layers
    # Query, key and value are one product in the graph, and so are gate and up, whose activations have one scale.
    assert len(settings) == 3 * layers
    assert {(of["bits"], of["block_size"], of["accuracy_level"]) for of in settings} == {(8, 128, 4)}
    assert sum(node.op_type == "MatMulInteger" for node in graph.node) == layers
    whole = {one.name for one in graph.initializer if one.data_type == onnx.TensorProto.FLOAT}
    products = [node for node in graph.node if node.op_type in ("MatMul", "Gemm") and node.input[1] in whole]
    assert len(products) == 2  # the classifier's


def with_outliers(model: DHRDModel) -> DHRDModel:
    """The same function, but that a few of a layer's activations are a thousand times the others."""
    for layer in model.backbone.model.layers:
        layer.post_attention_layernorm.weight.data[:2] *= 1000
        for product in (layer.mlp.gate_proj, layer.mlp.up_proj):
            product.weight.data[:, :2] /= 1000
    return model


def test_an_int8_onnx_export_isnt_thrown_by_activations_that_are_outliers(exports, plain, tmp_path):
    even, even_export = exports("onnx", int8=True, pooling="last", head="mlp")
    outlying = with_outliers(saved(plain, tmp_path / "model"))
    outlying.save_pretrained(tmp_path / "outlying")
    expected = logits(even)
    np.testing.assert_allclose(logits(outlying), expected, rtol=0, atol=1e-4)
    folders = (even_export, export(tmp_path / "outlying", "onnx", int8=True))
    errors = [np.abs(logits(load_classifier(folder)) - expected).max() for folder in folders]
    assert errors[1] < 2 * errors[0]


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gemma2", "gpt2"])
def test_smoothing_leaves_a_model_saying_what_it_said(plain, tmp_path, architecture):
    model = saved(plain, tmp_path / "model", architecture)
    expected, before = logits(model), [parameter.clone() for parameter in model.parameters()]
    _smooth(model)
    np.testing.assert_allclose(logits(model), expected, rtol=0, atol=1e-4)
    changed = not all(map(torch.equal, model.parameters(), before))
    assert changed == (architecture in ("llama", "qwen3"))


def test_exporting_leaves_the_process_logging_as_it_was():
    script = (
        "import logging; from dhrd_lib.serving.export import _quantizer_in_blocks\n"
        "before = logging.getLogger().level\n"
        "assert _quantizer_in_blocks().__name__ == 'MatMulNBitsQuantizer'\n"
        "assert (logging.getLogger().level, logging.getLogger().handlers) == (before, [])"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


@pytest.mark.parametrize("changes", [{}, {"finetune": "lora"}, {"finetune": "lora", "markers": "special"}])
def test_transformers_own_pipeline_loads_an_hf_export_with_equal_logits(plain, tmp_path, changes):
    model = saved(plain, tmp_path / "model", head="linear", **changes)
    folder = export(tmp_path / "model", "hf")
    found = pipeline("text-classification", model=str(folder), function_to_apply="none", top_k=None)(
        TEXTS, truncation=True
    )
    rows = [{entry["label"]: entry["score"] for entry in row} for row in found]
    assert json.loads((folder / "config.json").read_text())["architectures"] == ["LlamaForSequenceClassification"]
    np.testing.assert_allclose(
        [[row[name] for name in model.label_names] for row in rows], logits(model), atol=1e-4
    )
    np.testing.assert_allclose(logits(load_classifier(folder)), logits(model), rtol=0, atol=1e-4)


@pytest.mark.parametrize("config", [{"head": "mlp"}, {"head": "linear", "pooling": "mean"}])
def test_hf_refuses_what_transformers_classifier_cannot_hold_and_leaves_nothing(plain, tmp_path, config):
    saved(plain, tmp_path / "model", **config)
    with pytest.raises(ConfigError, match="expected 'last' and 'linear'"):
        export(tmp_path / "model", "hf", out=tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == ["model"]


def test_what_cannot_be_exported_is_said_in_one_sentence(plain, tmp_path):
    saved(plain, tmp_path / "model", head="linear")
    for arguments, expected in (
        ({"format": "gguf"}, "format is 'gguf'; expected one of 'onnx', 'openvino', 'hf'"),
        ({"format": "hf", "int8": True}, "expected 'onnx' or 'openvino'"),
        ({"format": "hf", "out": tmp_path / "model"}, "exists already"),
    ):
        with pytest.raises(ConfigError, match=expected):
            export(tmp_path / "model", **arguments)
    with pytest.raises(ConfigError, match="holds no classifier; expected a finished run"):
        export(tmp_path / "nothing", "hf", out=tmp_path / "out")
    folder = export(tmp_path / "model", "hf")
    with pytest.raises(ConfigError, match="is an export already"):
        export(folder, "hf", out=tmp_path / "out")


def test_load_classifier_takes_a_runs_folder_and_a_saved_model(plain, tmp_path):
    model = saved(plain, tmp_path / "run" / "model")
    for path in (tmp_path / "run", tmp_path / "run" / "model"):
        assert load_classifier(path).predict(TEXTS).labels == model.predict(TEXTS).labels


def test_an_exports_config_of_another_kind_is_refused(plain, tmp_path):
    saved(plain, tmp_path / "model", head="linear")
    folder = export(tmp_path / "model", "hf")
    config = json.loads((folder / "config.json").read_text())
    for field, value, expected in (
        ("format", "gguf", "has the format 'gguf'"),
        ("more", 1, "more is missing or unknown"),
    ):
        changed = {**config, "dhrd_export": {**config["dhrd_export"], field: value}}
        (folder / "config.json").write_text(json.dumps(changed))
        with pytest.raises(ConfigError, match=expected):
            load_classifier(folder)


def test_an_export_answers_without_torch_transformers_or_datasets(exports):
    model, folder = exports("openvino", pooling="last", head="mlp")
    script = (
        "import sys; from dhrd_lib.serving.classifier import load_classifier\n"
        f"print(load_classifier({str(folder)!r}).predict(['My lamp broke.']).labels[0])\n"
        "assert not {'torch', 'transformers', 'datasets'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.split() == model.predict(["My lamp broke."]).labels


def compiled(folder: Path, monkeypatch: pytest.MonkeyPatch) -> openvino.CompiledModel:
    """What `load_classifier` compiles."""
    found = []
    compile_model = openvino.Core.compile_model
    monkeypatch.setattr(
        openvino.Core, "compile_model", lambda *args: found.append(compile_model(*args)) or found[-1]
    )
    load_classifier(folder)
    return found[-1]


def test_the_first_start_of_an_openvino_export_finds_its_graph_compiled(exports, tmp_path, monkeypatch):
    model, folder = exports("openvino", pooling="last", head="mlp")
    assert compiled(folder, monkeypatch).get_property("LOADED_FROM_CACHE")
    monkeypatch.chdir(folder.parent)
    assert compiled(Path(folder.name), monkeypatch).get_property("LOADED_FROM_CACHE")
    moved = shutil.copytree(folder, tmp_path / "moved")
    assert not compiled(moved, monkeypatch).get_property("LOADED_FROM_CACHE")
    np.testing.assert_allclose(logits(load_classifier(moved)), logits(model), rtol=0, atol=1e-4)


def test_other_weights_under_the_same_graph_are_compiled_anew(exports, tmp_path, monkeypatch):
    _, folder = exports("openvino", pooling="last", head="mlp")
    moved = shutil.copytree(folder, tmp_path / "moved")
    before = logits(load_classifier(moved))
    weights = moved / "openvino_model.bin"
    content = bytearray(weights.read_bytes())
    numbers = np.frombuffer(content, dtype=np.float32, count=len(content) // 4)
    numbers[(np.abs(numbers) > 1e-3) & (np.abs(numbers) < 1)] /= 2  # Others may be whole numbers, of shapes.
    weights.write_bytes(content)
    assert not compiled(moved, monkeypatch).get_property("LOADED_FROM_CACHE")
    found = logits(load_classifier(moved))
    monkeypatch.setenv("DHRD_CACHE", str(tmp_path / "empty"))
    np.testing.assert_array_equal(found, logits(load_classifier(moved)))
    assert np.abs(found - before).max() > 1e-3


def test_an_openvino_export_starts_where_the_cache_cant_be_written(exports, tmp_path, monkeypatch):
    model, folder = exports("openvino", pooling="last", head="mlp")
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("DHRD_CACHE", str(tmp_path / "file"))
    np.testing.assert_allclose(logits(load_classifier(folder)), logits(model), rtol=0, atol=1e-4)


def test_the_commands_export_and_predict_from_an_export(plain, tmp_path):
    model = saved(plain, tmp_path / "model", head="linear")
    for command in (
        ["export", tmp_path / "model", "--format", "hf", "--out", tmp_path / "out"],
        ["predict", tmp_path / "out", "My lamp broke."],
    ):
        result = CliRunner().invoke(cli.app, list(map(str, command)), catch_exceptions=False)
        assert result.exit_code == 0, result.output
    assert result.stdout.startswith(model.predict(["My lamp broke."]).labels[0])


@pytest.mark.slow
def test_the_benchmark_of_int8_compares_every_row_of_every_run_with_what_training_stored(tmp_path):
    config = RunConfig(
        name="run",
        model=ModelConfig(backbone="tiny", device="cpu"),
        data=DataConfig(task="support_triage", max_train_rows=8, max_eval_rows=20),
        training=TrainingConfig(max_steps=2),
    )
    runs = [train(config.replace({"name": f"seed{seed}", "training.seed": seed}), tmp_path) for seed in (0, 1)]
    int8_accuracy.main([*(str(run.folder) for run in runs), "--out", str(tmp_path)])
    stored = json.loads((tmp_path / "int8_accuracy.json").read_text())
    assert (stored["runs"], stored["rows"]) == (["seed0", "seed1"], 60)
    for found in stored["engines"].values():
        assert found["accuracy_difference"]["n_seeds"] == 2
        assert found["rows_with_another_label"] <= 6  # Untrained logits lie close together.


def test_sequence_classifier_shares_the_weights(task):
    model = tiny_model(task, head="linear")
    classifier = sequence_classifier(model)
    assert classifier.model is model.backbone.model
    assert classifier.score is model.classifier
