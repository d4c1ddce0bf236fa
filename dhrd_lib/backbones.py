"""Backbones: a causal LM and its tokenizer, from a hub id, a folder, a GGUF file or the embedded default."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from dhrd_lib.config import BackboneError, reason_of, user_path
from dhrd_lib.data.embedded import EMBEDDED, embedded_folder, gguf_folder, tiny_model

_DECODER_WANTED = "expected a decoder-only LM, in which no position sees a later one."


@dataclass(frozen=True)
class Backbone:
    """A causal LM with its pretrained LM head, its tokenizer, and where they came from."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    name: str
    source: str


def load_backbone(name: str = EMBEDDED, device: str | None = None, dtype: str | None = None) -> Backbone:
    """Load a causal decoder and its tokenizer.

    `name` is "smollm2-135m" (embedded), "tiny" (random, for tests), a folder with safetensors, a
    `.gguf` file, or a hub id. `device` and `dtype` of None or "auto" mean: the GPU where there is one,
    bfloat16 on it, float32 elsewhere. Raises `BackboneError` where nothing is found under the name, or
    the model isn't a causal decoder with an LM head that this project knows.
    """
    device = resolve_device(device)
    torch_dtype = resolve_dtype(dtype, device)
    if name == "tiny":
        model, tokenizer, source = *tiny_model(torch_dtype), "random weights"
    else:
        try:
            source = _locate(name)
            model, tokenizer = _from_pretrained(name, source, torch_dtype)
        except BackboneError:
            raise
        except (OSError, ValueError) as error:
            raise BackboneError(
                f"{name} can't be loaded as a causal LM ({reason_of(error)}); expected a folder with safetensors, "
                f"a .gguf file, a reachable hub id, or the embedded {EMBEDDED}."
            ) from error
    if tokenizer.pad_token_id is None:
        # Padding is masked by length, so any id serves.
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.bos_token
    model = model.to(device).eval()
    _check_causal_decoder(model, name)
    return Backbone(model=model, tokenizer=tokenizer, name=name, source=str(source))


def _locate(name: str) -> Path | str:
    """Turn a backbone's name into a folder, or leave a hub id as it is."""
    if name == EMBEDDED:
        return embedded_folder()
    path = user_path(name)
    if path.suffix == ".gguf":
        return gguf_folder(path)
    if path.is_dir():
        check_own_weights(path)
        return path
    if path.is_absolute() or name.startswith((".", "~")):
        raise BackboneError(f"{name}: no such folder; expected a backbone's folder, GGUF file or hub id.")
    return name


def _from_pretrained(
    name: str, source: Path | str, dtype: torch.dtype
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    if AutoConfig.from_pretrained(source, trust_remote_code=False).is_encoder_decoder:
        raise BackboneError(f"{name} is an encoder-decoder; {_DECODER_WANTED}")
    tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    model, report = AutoModelForCausalLM.from_pretrained(
        source, dtype=dtype, use_safetensors=True, trust_remote_code=False, output_loading_info=True
    )
    # transformers draws these at random with a warning, as of a classifier's checkpoint without an LM head.
    if missing := sorted(report["missing_keys"]):
        raise BackboneError(f"{name} lacks {len(missing)} weights, the first {missing[0]!r}; expected a whole LM.")
    return model, tokenizer


def check_own_weights(folder: Path) -> None:
    """Refuse a model's folder whose weights aren't its own safetensors files; raises `BackboneError`.

    transformers follows an index to any path, takes a file in it that isn't called .safetensors for a pickle, and
    an adapter to the model that it names, wherever that is.
    """
    if (folder / "adapter_config.json").is_file():
        raise BackboneError(f"{folder} is an adapter to another model; expected a folder with a whole model.")
    for index in folder.rglob("*.safetensors.index.json"):
        for shard in sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())):
            if Path(shard).name != shard or not shard.endswith(".safetensors"):
                raise BackboneError(f"{index} names the weights {shard!r}; expected safetensors files beside it.")


def resolve_device(device: str | None) -> torch.device:
    """Return the named device, or this process's own GPU where there is one and the CPU elsewhere.

    Raises `BackboneError` on a name that isn't a device's, and on a GPU where there is none.
    """
    n_gpus = torch.cuda.device_count()
    if device in (None, "auto"):
        return torch.device(f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if n_gpus else "cpu")
    try:
        resolved = torch.device(device)
    except RuntimeError:
        resolved = torch.device("meta")
    if resolved.type not in ("cpu", "cuda") or (resolved.type == "cuda" and (resolved.index or 0) >= n_gpus):
        raise BackboneError(f"device is {device!r} and torch sees {n_gpus} GPUs; expected 'auto', 'cpu' or 'cuda'.")
    return resolved


def resolve_dtype(dtype: str | None, device: torch.device) -> torch.dtype:
    """Return the named dtype; bfloat16 on a GPU and float32 on the CPU, where bfloat16 is far slower."""
    if dtype in (None, "auto"):
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return getattr(torch, dtype)


def decoder_of(model: PreTrainedModel) -> PreTrainedModel:
    """Return the decoder under the LM head: ids in, last hidden states out."""
    return model.get_decoder()


def layers_of(model: PreTrainedModel) -> nn.ModuleList:
    """Return the decoder's layers, lowest first."""
    n_layers = model.config.get_text_config().num_hidden_layers
    for module in decoder_of(model).modules():
        if isinstance(module, nn.ModuleList) and len(module) == n_layers:
            return module
    raise BackboneError(f"{type(model).__name__} has no list of {n_layers} layers.")


def lm_logits(model: PreTrainedModel, hidden: torch.Tensor) -> torch.Tensor:
    """Return the pretrained LM head's logits `(..., V)` of hidden states `(..., H)`."""
    logits = model.get_output_embeddings()(hidden)
    softcap = logit_softcap(model)
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def logit_softcap(model: PreTrainedModel) -> float | None:
    """Return the bound that some decoders (Gemma 2) put on their logits, or None."""
    return getattr(model.config.get_text_config(), "final_logit_softcapping", None)


@torch.no_grad()
def _check_causal_decoder(model: PreTrainedModel, name: str) -> None:
    """Refuse what breaks the method: attention to later tokens, or an LM head other than the one we apply."""
    rows = torch.tensor([[3, 4, 5, 6], [3, 4, 5, 7]], device=model.device)
    hidden = decoder_of(model)(input_ids=rows, use_cache=False).last_hidden_state  # (2, 4, H)
    if not torch.allclose(hidden[0, :3], hidden[1, :3], rtol=0, atol=1e-3):
        raise BackboneError(f"{name} attends to later tokens (an encoder); {_DECODER_WANTED}")
    expected = model(input_ids=rows, use_cache=False).logits  # (2, 4, V)
    if not torch.allclose(lm_logits(model, hidden).to(expected), expected, rtol=1e-2, atol=1e-2):
        raise BackboneError(
            f"{name} changes its logits after the LM head in a way this project doesn't know "
            f"({type(model).__name__}); expected plain or soft-capped logits."
        )
