"""Shared fixtures: tiny backbones of several architectures, and one small run."""

from __future__ import annotations

import gc
import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import small_runs
import torch
from datasets import Dataset
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GPT2Config,
    GPTNeoXConfig,
    OPTConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

from dhrd_lib import training
from dhrd_lib.backbones import Backbone, load_backbone
from dhrd_lib.config import DataConfig, ModelConfig, TrainingConfig
from dhrd_lib.modeling import DHRDModel, build_model
from dhrd_lib.runs import Run
from dhrd_lib.tasks import Task, load_task

ROOT = Path(__file__).parents[1]

# Tiny models are slower on two threads than on one.
torch.set_num_threads(1)

_MODERN = {
    "vocab_size": 512,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 1024,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
_IDS = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}


def _configs() -> dict[str, PreTrainedConfig]:
    old = {"vocab_size": 512, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, **_IDS}
    return {
        "qwen2": Qwen2Config(**_MODERN),
        "qwen3": Qwen3Config(**_MODERN),
        "gemma2": Gemma2Config(**_MODERN, final_logit_softcapping=2.0, sliding_window=8),
        "gpt2": GPT2Config(
            vocab_size=512,
            n_embd=16,
            n_layer=3,
            n_head=2,
            n_positions=1024,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            **_IDS,
        ),
        "gpt_neox": GPTNeoXConfig(**old, intermediate_size=32, max_position_embeddings=1024),
        "opt": OPTConfig(**old, ffn_dim=32, max_position_embeddings=1024, word_embed_proj_dim=8, dropout=0.0),
    }


ARCHITECTURES = ("llama", "qwen2", "qwen3", "gemma2", "gpt2", "gpt_neox", "opt")


def tiny_backbone(architecture: str) -> Backbone:
    """A random backbone of a few thousand parameters; a new one at every call."""
    tiny = load_backbone("tiny", device="cpu")
    if architecture == "llama":
        return tiny
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(_configs()[architecture]).eval()
    return Backbone(model=model, tokenizer=tiny.tokenizer, name=architecture)


@pytest.fixture(scope="module", autouse=True)
def _what_is_there_stays():
    """Keeps the collector off what a module finds: libraries collect after each run, half a tiny one's time."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="module")
def own_cache(tmp_path_factory):
    """A cache of the module's own."""
    patch = pytest.MonkeyPatch()
    patch.setenv("DHRD_CACHE", str(tmp_path_factory.mktemp("cache")))
    yield
    patch.undo()


@pytest.fixture(scope="session")
def table(tmp_path_factory) -> Path:
    """Return a data file with two classes that a tiny model can tell apart."""
    return small_runs.write_table(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="session")
def finished(table, tmp_path_factory) -> Run:
    """Return a small run on `table`."""
    return training.train(small_runs.config(table), tmp_path_factory.mktemp("runs"))


@pytest.fixture
def no_teacher(monkeypatch):
    """Hide servers, keys and rationales of the environment; backing off takes no time."""
    for name in ("OPENAI_API_KEY", "OPENAI_BASE_URL", "DHRD_RATIONALES_DIR", "DHRD_DATA_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("openai._base_client.INITIAL_RETRY_DELAY", 0.01)


@pytest.fixture(scope="session")
def triage() -> Task:
    return load_task("support_triage")[0]


@pytest.fixture(scope="session")
def train() -> Dataset:
    return load_task("support_triage")[1]["train"]


@pytest.fixture(scope="session")
def rows(train) -> Dataset:
    return train.select(range(12))


@pytest.fixture(scope="session")
def task() -> Task:
    return Task(
        name="three_ways",
        template="Customer: {text}\nWhat must happen next?",
        label_names=("fix", "refund", "explain"),
        verbalizers=("fix", "refund", "explain"),
        metrics=("accuracy",),
        test_splits=("test",),
    )


def tiny_model(
    task: Task,
    architecture: str = "llama",
    data: DataConfig | None = None,
    training: TrainingConfig | None = None,
    **config: object,
) -> DHRDModel:
    settings = ModelConfig(backbone="tiny", device="cpu", **config)
    return build_model(settings, task, data, training, tiny_backbone(architecture)).eval()
