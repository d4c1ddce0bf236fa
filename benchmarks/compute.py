"""Compute: floating-point operations, the share of the machine's matmul peak, profiles, and step times."""

from __future__ import annotations

import sys
import time
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import nn
from transformers import PreTrainedModel, TrainerCallback, TrainingArguments

from benchmarks.harness import MIB, synchronize, timed
from dhrd_lib.backbones import layers_of
from dhrd_lib.modeling import DHRDModel


def classify_flops(model: DHRDModel, rows: int, tokens: int) -> float:
    """Return the floating-point operations of class logits: two per decoder weight and token, and causal attention.

    Embedding look-ups, norms and activations aren't counted.
    """
    config = model.backbone.config.get_text_config()
    weights = sum(parameter.numel() for parameter in layers_of(model.backbone).parameters())
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    width = config.num_attention_heads * head_dim
    attention = 2 * config.num_hidden_layers * rows * tokens * (tokens + 1) * width
    return 2.0 * weights * rows * tokens + attention


def train_flops(
    lm: PreTrainedModel,
    tokens: int,
    supervised: int,
    *,
    frozen_layers: int = 0,
    cached: bool = False,
    lora: bool = False,
) -> float:
    """Return the floating-point operations of training on so many tokens: two per weight forward, four backward.

    A frozen layer has no backward pass, and no forward pass where its states are cached. LoRA needs no gradient
    of the frozen weights, which halves the backward pass. The LM head reads the `supervised` positions alone; with
    frozen layers and with LoRA its weight has no gradient. Attention, norms and adapters aren't counted.
    """
    layers = layers_of(lm)
    trained = len(layers) - frozen_layers
    layer_weights = sum(parameter.numel() for parameter in layers[0].parameters())
    in_layers = layer_weights * tokens * (2 * (trained if cached else len(layers)) + (2 if lora else 4) * trained)
    head = lm.get_output_embeddings().weight.numel()
    return float(in_layers + head * supervised * (4 if lora or frozen_layers else 6))


def matmul_peak(model: DHRDModel, tokens: int = 1280, square: int = 2048, repeats: int = 3) -> dict[str, float]:
    """Return GFLOP/s of plain matrix products in the model's dtype by shape, the best of `repeats`.

    The shapes are those of the decoder's linear layers over so many tokens, and a square.
    """
    weight = model.get_input_embeddings().weight
    shapes = [(tokens, shape) for shape in linear_shapes(model)] + [(square, (square, square))]
    rates = {}
    with torch.inference_mode():
        for rows, (out, width) in shapes:
            x, w = (torch.randn(n, width, device=weight.device, dtype=weight.dtype) for n in (rows, out))
            seconds = [timed(weight.device, nn.functional.linear, x, w)[0] for _ in range(repeats + 1)]
            rates[f"{rows} x {width} x {out}"] = 2 * rows * width * out / min(seconds[1:]) / 1e9
    return rates


def linear_shapes(model: DHRDModel) -> list[tuple[int, int]]:
    """Return the distinct shapes (out, in) of the decoder's linear layers."""
    linear = [module for module in layers_of(model.backbone).modules() if isinstance(module, nn.Linear)]
    return sorted({tuple(module.weight.shape) for module in linear})


def random_batch(model: DHRDModel, rows: int, tokens: int) -> dict[str, torch.Tensor]:
    """Return rows of random ids without padding: `input_ids` and `attention_mask`, each (rows, tokens)."""
    ids = torch.randint(5, model.backbone.config.vocab_size - 5, (rows, tokens), device=model.device)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def classify(model: DHRDModel, batch: dict[str, torch.Tensor]) -> np.ndarray:
    """Return the class logits (B, K) of a batch without padding."""
    return model.logits([{"input_ids": ids, "input_length": len(ids)} for ids in batch["input_ids"].tolist()])


def peak_share(
    model: DHRDModel, rows: int = 16, tokens: int = 80, square: int = 2048, repeats: int = 5
) -> dict[str, Any]:
    """Return the share of the matmul peak that `classify` reaches, both at their best, measured in turns."""
    batch = random_batch(model.eval(), rows, tokens)
    classify(model, batch)
    peaks, seconds = [matmul_peak(model, rows * tokens, square)], []
    for _ in range(repeats):
        seconds.append(timed(model.device, classify, model, batch)[0])
        peaks.append(matmul_peak(model, rows * tokens, square))
    by_shape = pd.DataFrame(peaks).max().to_dict()
    flops = classify_flops(model, rows, tokens)
    return {
        "rows": rows,
        "tokens": tokens,
        "gflop_per_second": flops / min(seconds) / 1e9,
        "gflop_per_second_median": flops / float(np.median(seconds)) / 1e9,
        "peak_gflop_per_second": max(by_shape.values()),
        "share": flops / min(seconds) / 1e9 / max(by_shape.values()),
        "peak_by_shape": by_shape,
    }


def profile_classify(model: DHRDModel, rows: int = 16, tokens: int = 80) -> pd.DataFrame:
    """Return the milliseconds and share of `classify` by operator, the slowest first."""
    batch = random_batch(model, rows, tokens)
    with torch.profiler.profile() as profile:
        classify(model, batch)
    on_gpu = model.device.type == "cuda"
    spent = {
        event.key: (event.self_device_time_total if on_gpu else event.self_cpu_time_total) / 1000
        for event in profile.key_averages()
    }
    table = pd.DataFrame({"operator": spent.keys(), "ms": spent.values()})
    table["share"] = table["ms"] / table["ms"].sum()
    return table.sort_values("ms", ascending=False, ignore_index=True)


class StepTimer(TrainerCallback):
    """Record the seconds of each optimizer step, without loading, evaluation and saving, and peak memory in MiB."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.peak_memory_mib: list[float] = []

    def on_step_begin(self, args: TrainingArguments, *_: Any, **__: Any) -> None:
        """Start the clock."""
        synchronize(args.device)
        self._started = time.perf_counter()

    def on_step_end(self, args: TrainingArguments, *_: Any, **__: Any) -> None:
        """Stop the clock, after the optimizer."""
        synchronize(args.device)
        self.seconds.append(time.perf_counter() - self._started)
        self.peak_memory_mib.append(peak_memory_mib(args.device))


def peak_memory_mib(device: torch.device) -> float:
    """Return the peak memory of this process in MiB: on the GPU, or in main memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / MIB
    import resource  # not on Windows, where everything else here works

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / MIB if sys.platform == "darwin" else peak / 1024
