"""A model's folder that somebody else made runs no code and reads no file but its own safetensors."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from conftest import tiny_model
from safetensors import SafetensorError, safe_open

from dhrd_lib.backbones import load_backbone
from dhrd_lib.modeling import DHRDModel
from dhrd_lib.serving.classifier import load_classifier
from dhrd_lib.serving.export import export

LOADERS = {
    "model": load_classifier,
    "backbone": lambda folder: load_backbone(str(folder), device="cpu"),
    "export": load_classifier,
}
# Each loader's errors, those of the user (all `ValueError`s) and those of the libraries.
REFUSALS = (ValueError, KeyError, OSError, SafetensorError)


class Payload:
    """Unpickled, it writes a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


@pytest.fixture(scope="module")
def saved(task, tmp_path_factory) -> Path:
    """Return a folder with a saved model, a backbone and an export with transformers' weights, all good."""
    folder = tmp_path_factory.mktemp("saved")
    tiny_model(task).save_pretrained(folder / "model")
    backbone = load_backbone("tiny", device="cpu")
    backbone.model.save_pretrained(folder / "backbone")
    backbone.tokenizer.save_pretrained(folder / "backbone")
    tiny_model(task, head="linear").save_pretrained(folder / "linear")
    export(folder / "linear", "hf", out=folder / "export")
    return folder


def pickled_weights(folder: Path, marker: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save({"weight": Payload(marker)}, folder / "pytorch_model.bin")


def pickle_named_safetensors(folder: Path, marker: Path) -> None:
    torch.save({"weight": Payload(marker)}, folder / "model.safetensors")


def index_to_a_pickle(folder: Path, marker: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save({"weight": Payload(marker)}, folder / "part.bin")
    _index(folder, {"weight": "part.bin"})


def index_out_of_the_folder(folder: Path, marker: Path) -> None:
    outside = folder.parent / "outside.safetensors"
    (folder / "model.safetensors").rename(outside)
    with safe_open(outside, "pt") as file:
        _index(folder, dict.fromkeys(file.keys(), "../outside.safetensors"))


def _index(folder: Path, weights: dict[str, str]) -> None:
    index = {"metadata": {"total_size": 1}, "weight_map": weights}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def adapter_with_a_pickle(folder: Path, marker: Path) -> None:
    config = {"peft_type": "LORA", "base_model_name_or_path": str(folder.parent), "target_modules": ["q_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    torch.save({"weight": Payload(marker)}, folder / "adapter_model.bin")


def custom_code(folder: Path, marker: Path, model_type: str = "llama") -> None:
    classes = "class C(LlamaConfig): ...\nclass M(LlamaForCausalLM): ...\nclass T(PreTrainedTokenizerFast): ...\n"
    code = f"from pathlib import Path\nfrom transformers import *\nPath({str(marker)!r}).touch()\n{classes}"
    (folder / "theirs.py").write_text(code)
    auto_map = {"AutoConfig": "theirs.C", "AutoModel": "theirs.M", "AutoModelForCausalLM": "theirs.M"}
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = auto_map
    config.get("backbone_config", config).update(auto_map=auto_map, model_type=model_type)
    (folder / "config.json").write_text(json.dumps(config))
    tokenizer = json.loads((folder / "tokenizer_config.json").read_text())
    tokenizer |= {"tokenizer_class": "T", "auto_map": {"AutoTokenizer": ["theirs.T", "theirs.T"]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))


def custom_code_of_an_unknown_type(folder: Path, marker: Path) -> None:
    custom_code(folder, marker, "theirs")


# The export has no tokenizer of transformers' to load, and its model is of a type that transformers has itself.
HARMLESS = {("export", custom_code)}
MALICIOUS = [pickled_weights, pickle_named_safetensors, index_to_a_pickle, index_out_of_the_folder]
MALICIOUS += [adapter_with_a_pickle, custom_code, custom_code_of_an_unknown_type]


@pytest.mark.parametrize("kind", LOADERS)
@pytest.mark.parametrize("alter", MALICIOUS, ids=lambda alter: alter.__name__)
def test_malicious_folder_runs_no_code(saved, tmp_path, kind, alter):
    folder, marker = tmp_path / "folder", tmp_path / "marker"
    shutil.copytree(saved / kind, folder)
    alter(folder, marker)
    if (kind, alter) in HARMLESS:
        LOADERS[kind](folder)
    else:
        with pytest.raises(REFUSALS) as caught:
            LOADERS[kind](folder)
        assert "weights_only" not in str(caught.value)  # no advice on how to run it after all
    assert not marker.exists()


@pytest.mark.parametrize("kind", LOADERS)
def test_pickles_beside_safetensors_are_not_read(saved, tmp_path, kind):
    folder, marker = tmp_path / "folder", tmp_path / "marker"
    shutil.copytree(saved / kind, folder)
    for name in ("pytorch_model.bin", "training_args.bin", "optimizer.pt"):
        torch.save({"weight": Payload(marker)}, folder / name)
    LOADERS[kind](folder)
    assert not marker.exists()
    torch.load(folder / "optimizer.pt", weights_only=False)
    assert marker.exists()  # The payload does run where a pickle is loaded.


def test_folder_of_another_kind_is_refused(saved, tmp_path):
    with pytest.raises(ValueError, match="model of the type 'llama'; expected 'dhrd'"):
        DHRDModel.from_pretrained(saved / "backbone")
    with pytest.raises(FileNotFoundError, match="holds no model"):
        DHRDModel.from_pretrained(tmp_path)
