"""Backbones: a causal LM and its tokenizer, from a hub id, a folder, a GGUF file or the embedded default."""

from __future__ import annotations

import json
import os
import timeit
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from dhrd_lib.config import BackboneError, ConfigError, reason_of, user_path
from dhrd_lib.data.embedded import EMBEDDED, embedded_folder, gguf_folder, tiny_model


class Backbone(NamedTuple):
    """A causal LM with its pretrained LM head, its tokenizer and its name."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    name: str


def load_backbone(name: str = EMBEDDED, device: str | None = None, dtype: str | None = None) -> Backbone:
    """Load a causal decoder and its tokenizer; raise `BackboneError` where the name has none.

    `name` is "smollm2-135m" (embedded), "tiny" (random, for tests), a folder with safetensors, a `.gguf` file, or a
    hub id. `device` of "auto" is the GPU where there is one; `dtype` of "auto" is bfloat16 on a GPU and float32 on
    a CPU, which computes in bfloat16 autocast where that is faster.
    """
    device = resolve_device(device)
    torch_dtype = resolve_dtype(dtype, device)
    if name == "tiny":
        model, tokenizer = tiny_model(torch_dtype)
    else:
        try:
            path, source = user_path(name), name  # as it is for a hub id
            if name == EMBEDDED or path.suffix == ".gguf":
                source = embedded_folder() if name == EMBEDDED else gguf_folder(path)
            elif path.is_dir():
                check_own_weights(source := path)
            tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
            safe = {"use_safetensors": True, "trust_remote_code": False, "output_loading_info": True}
            model, report = AutoModelForCausalLM.from_pretrained(source, dtype=torch_dtype, **safe)
            # transformers draws these at random with a warning, as of a classifier's checkpoint without an LM head.
            if missing := sorted(report["missing_keys"]):
                raise BackboneError(f"{name} lacks {len(missing)} weights, as {missing[0]!r}; expected a whole LM.")
        except BackboneError:
            raise
        except (OSError, ValueError) as error:
            problem = f"{name} can't be loaded as a causal LM ({reason_of(error)})"
            expected = f"a folder with safetensors, a .gguf file, a reachable hub id, or the embedded {EMBEDDED}"
            raise BackboneError(f"{problem}; expected {expected}.") from error
    if tokenizer.pad_token_id is None:  # Padding is masked by length, so any id serves.
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.bos_token
    model = model.to(device).eval()
    _check_causal_decoder(model, name)
    if dtype in (None, "auto"):
        autocast_if_faster(model)
    return Backbone(model, tokenizer, name)


def check_own_weights(folder: Path) -> None:
    """Raise `BackboneError` where a model's folder has weights other than safetensors files in it.

    transformers follows an index to any path, takes a file in it not called .safetensors for a pickle, and an
    adapter to the model that it names.
    """
    if (folder / "adapter_config.json").is_file():
        raise BackboneError(f"{folder} is an adapter to another model; expected a folder with a whole model.")
    for index in folder.rglob("*.safetensors.index.json"):
        for shard in sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())):
            if Path(shard).name != shard or not shard.endswith(".safetensors"):
                raise BackboneError(f"{index} names the weights {shard!r}; expected safetensors files beside it.")


def resolve_device(device: str | None) -> torch.device:
    """Return the named device, or this process's own GPU where there is one and the CPU elsewhere."""
    gpus = [f"cuda:{index}" for index in range(torch.cuda.device_count())]
    if device in (None, "auto"):
        device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if gpus else "cpu"
    elif device not in (known := ["cpu", *(["cuda", *gpus] if gpus else [])]):
        raise BackboneError(f"device is {device!r}; expected one of auto, {', '.join(known)}.")
    return torch.device(device)


def resolve_dtype(dtype: str | None, device: torch.device) -> torch.dtype:
    """Return the named dtype of the weights; bfloat16 on a GPU and float32 on the CPU."""
    if dtype in (None, "auto"):
        dtype = "bfloat16" if device.type == "cuda" else "float32"
    return getattr(torch, dtype)


def autocast_if_faster(model: PreTrainedModel) -> None:
    """Let float32 weights on a CPU compute in bfloat16 autocast where that is at least 1.2 times as fast."""
    if model.device.type == "cpu" and model.dtype == torch.float32:
        shapes = {tuple(weight.shape) for weight in layers_of(model)[0].parameters() if weight.dim() == 2}
        if _bfloat16_speedup(tuple(sorted(shapes)), torch.get_num_threads()) >= 1.2:
            model.has_autocast = True
            # PyTorch's fused attention is slow in its bfloat16 backward pass on a CPU.
            model.set_attn_implementation("eager")


@cache
def _bfloat16_speedup(shapes: tuple[tuple[int, int], ...], n_threads: int, tokens: int = 256) -> float:
    """Return by how much autocast speeds up forward and backward products with weights of these shapes; 0 without
    bfloat16 instructions. Takes about 0.3 s for a layer of SmolLM2-135M, each dtype at its best of three turns.
    """
    capabilities = torch.cpu.get_capabilities()
    if not any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16")):  # The last is ARM's.
        return 0.0
    pairs = [[torch.ones(of, requires_grad=True) for of in ((tokens, shape[1]), shape)] for shape in shapes]

    def step(enabled: bool) -> None:
        for inputs, weight in pairs:
            with torch.enable_grad(), torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                outputs = F.linear(inputs, weight)
            torch.autograd.grad(outputs, (inputs, weight), torch.ones_like(outputs))

    turns = [[timeit.timeit(partial(step, of), number=1) for of in (False, True)] for _ in range(3)]
    float32, bfloat16 = map(min, zip(*turns, strict=True))
    return float32 / bfloat16


def autocast(model: PreTrainedModel) -> torch.autocast:
    """Return the context that a backbone computes in: bfloat16 autocast on a CPU that is faster at it, or none."""
    return torch.autocast("cpu", torch.bfloat16, enabled=getattr(model, "has_autocast", False))


def compute_dtype(model: PreTrainedModel) -> str:
    """Return what a backbone computes in: its weights' dtype, or "bfloat16 autocast"."""
    return "bfloat16 autocast" if getattr(model, "has_autocast", False) else str(model.dtype).removeprefix("torch.")


def layers_of(model: PreTrainedModel) -> nn.ModuleList:
    """Return the decoder's layers, lowest first."""
    n_layers = model.config.get_text_config().num_hidden_layers
    for module in model.get_decoder().modules():
        if isinstance(module, nn.ModuleList) and len(module) == n_layers:
            return module
    raise BackboneError(f"{type(model).__name__} has no list of {n_layers} layers.")


def lowest_layers(model: PreTrainedModel, n_layers: int) -> list[nn.Module]:
    """Return the decoder's embeddings and its lowest layers; raise `ConfigError` where it has fewer."""
    layers = layers_of(model)
    if n_layers > len(layers):
        raise ConfigError(f"freeze_layers is {n_layers}; the backbone has {len(layers)} layers.")
    return [*(m for m in model.get_decoder().modules() if isinstance(m, nn.Embedding)), *layers[:n_layers]]


def lm_logits(model: PreTrainedModel, hidden: torch.Tensor) -> torch.Tensor:
    """Return the pretrained LM head's logits `(..., V)` of hidden states `(..., H)`."""
    logits, softcap = model.get_output_embeddings()(hidden), logit_softcap(model)
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def logit_softcap(model: PreTrainedModel) -> float | None:
    """Return the bound that some decoders (Gemma 2) put on their logits, or None."""
    return getattr(model.config.get_text_config(), "final_logit_softcapping", None)


@torch.no_grad()
def _check_causal_decoder(model: PreTrainedModel, name: str) -> None:
    """Refuse what breaks the method: attention to later tokens, or an LM head other than the one we apply."""
    rows = torch.tensor([[3, 4, 5, 6], [3, 4, 5, 7]], device=model.device)
    hidden = model.get_decoder()(input_ids=rows, use_cache=False).last_hidden_state  # (2, 4, H)
    if not torch.allclose(hidden[0, :3], hidden[1, :3], rtol=0, atol=1e-3):
        raise BackboneError(f"{name} attends to later tokens (an encoder); expected a decoder-only LM.")
    expected = model(input_ids=rows, use_cache=False).logits  # (2, 4, V)
    if not torch.allclose(lm_logits(model, hidden).to(expected), expected, rtol=1e-2, atol=1e-2):
        problem = f"{name} ({type(model).__name__}) changes its logits after the LM head"
        raise BackboneError(f"{problem}; expected plain or soft-capped logits.")
