"""The training step: tokens per second, share of the matmul peak and peak memory, against two other set-ups.

    python -m benchmarks.train_step [--rows 32] [--batch-size 16] [--out runs/bench]

The same rows of everyday_nli are trained by the workbench; by transformers' Trainer (with PEFT for LoRA) as its
documentation shows, with batches padded to their longest row and all logits; and in two passes, input and rationale
separately, each padded to a fixed length. Each variant runs in its own process, so its peak memory is its own; the
first epoch warms up, and the steps of the second are timed, without loading, evaluation and saving. Writes
OUT/train_step.json, and prints the ratios.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn import functional as F
from transformers import DataCollatorForSeq2Seq, PreTrainedModel, Trainer, TrainingArguments

from benchmarks.common import COMPARED_DTYPE, in_own_process, parse_args, write_result
from benchmarks.compute import StepTimer, matmul_peak, train_flops
from dhrd_lib.backbones import Backbone, load_backbone
from dhrd_lib.config import DataConfig, ModelConfig, RunConfig, TrainingConfig
from dhrd_lib.modeling import build_model
from dhrd_lib.sequences import IGNORE_INDEX, SequenceFormat, encode_split
from dhrd_lib.tasks import load_rows
from dhrd_lib.training import train

OURS, TRAINER, TWO_PASSES = "workbench", "Trainer", "two passes"


@dataclass(frozen=True)
class Way:
    """One way to train: by whom, with which alpha, all weights or LoRA, and the multiple of the batch size."""

    by: str
    alpha: float
    finetune: str
    batches: int = 1

    @property
    def name(self) -> str:
        """Return the name in tables."""
        setting = "DHRD" if self.alpha else "pooled baseline"
        return f"{self.by}, {setting}, {self.finetune}" + (f", batch x {self.batches}" if self.batches > 1 else "")


# The baseline's rows are shorter, so its memory is also measured with a batch of about as many tokens as DHRD's.
WAYS = [
    Way(by, alpha, finetune)
    for finetune in ("full", "lora")
    for by, alphas in ((OURS, (0.0, 1.0)), (TRAINER, (0.0, 1.0)), (TWO_PASSES, (1.0,)))
    for alpha in alphas
] + [Way(OURS, 0.0, finetune, batches=2) for finetune in ("full", "lora")]


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Measure each way in its own process, print, and write the JSON file; return its contents."""
    options = parse_args(
        __doc__,
        arguments,
        backbone=("smollm2-135m", "name, hub id or folder"),
        rows=(32, "train rows"),
        batch_size=(16, "rows per step"),
    )
    ways = [{**vars(way), "way": way.name, **in_own_process(measure, way, options)} for way in WAYS]
    task, _ = load_rows(data_config(options))
    model = build_model(ModelConfig(backbone=options.backbone, dtype=COMPARED_DTYPE), task)
    peak = max(max(matmul_peak(model, options.batch_size * 80).values()) for _ in range(3))
    table = pd.DataFrame(ways).set_index("way")
    table["tokens_per_second"] = table["tokens"] / table["seconds"]
    table["peak_share"] = table["gflop"] / table["seconds"] / peak
    result = {
        "peak_gflop_per_second": peak,
        "ways": [{**way, "peak_share": share} for way, share in zip(ways, table["peak_share"], strict=True)],
        "ratios": ratios(table),
    }
    columns = ["tokens", "seconds", "tokens_per_second", "peak_share", "peak_memory_mib"]
    print(table[columns].to_string(float_format="{:.3g}".format))
    for name, value in result["ratios"].items():
        print(f"{name}: {value:.2f}")
    print(f"matmul peak {peak:.0f} GFLOP/s")
    return write_result("train_step", result, options, model.device)


def ratios(table: pd.DataFrame) -> dict[str, float]:
    """Compare the ways, for all weights and for LoRA: seconds for the same rows, operations, and memory."""
    result = {}
    for finetune in ("full", "lora"):
        baseline, dhrd = (table.loc[Way(OURS, alpha, finetune).name] for alpha in (0.0, 1.0))
        plain_baseline, plain_dhrd = (table.loc[Way(TRAINER, alpha, finetune).name] for alpha in (0.0, 1.0))
        two_passes = table.loc[Way(TWO_PASSES, 1.0, finetune).name]
        twice = table.loc[Way(OURS, 0.0, finetune, batches=2).name]
        result |= {
            f"{finetune}: Trainer / workbench, baseline": plain_baseline.seconds / baseline.seconds,
            f"{finetune}: Trainer / workbench, DHRD": plain_dhrd.seconds / dhrd.seconds,
            f"{finetune}: two passes / workbench, DHRD": two_passes.seconds / dhrd.seconds,
            f"{finetune}: DHRD / baseline, seconds": dhrd.seconds / baseline.seconds,
            f"{finetune}: DHRD / baseline, operations": dhrd.gflop / baseline.gflop,
            f"{finetune}: DHRD / baseline at twice the batch, peak memory": dhrd.peak_memory_mib
            / twice.peak_memory_mib,
        }
    return result


def data_config(options: argparse.Namespace) -> DataConfig:
    """Return the rows that every way trains on."""
    return DataConfig(task="everyday_nli", max_train_rows=options.rows, max_eval_rows=8)


def measure(way: Way, options: argparse.Namespace) -> dict[str, Any]:
    """Train two epochs; return the second one's seconds and operations, and the peak memory."""
    timer = StepTimer()
    with tempfile.TemporaryDirectory() as folder:
        if way.by == OURS:  # before the rows are loaded here, which would add to its memory
            train_ours(way, options, timer, folder)
        backbone = load_backbone(options.backbone, dtype=COMPARED_DTYPE)
        task, splits = load_rows(data_config(options))
        encoded, _ = encode_split(
            splits["train"], SequenceFormat(backbone.tokenizer), task.verbalizers, with_rationale=way.alpha > 0
        )
        rows = encoded.to_list()
        if way.by != OURS:
            train_plain(way, options, timer, folder, backbone, rows, len(task.label_names))
    steps = len(timer.seconds) // 2
    tokens = sum(len(row["input_ids"]) for row in rows)
    supervised = sum(label != IGNORE_INDEX for row in rows for label in row["lm_labels"])
    seconds = sum(timer.seconds[steps:])
    print(f"{way.name}: {tokens / seconds:.0f} tokens/s", flush=True)
    return {
        "rows": len(rows),
        "tokens": tokens,
        "gflop": train_flops(backbone.model, tokens, supervised, lora=way.finetune == "lora") / 1e9,
        "seconds": seconds,
        # Of the first epoch: the second one's would include the checkpoint that was written between them.
        "peak_memory_mib": timer.peak_memory_mib[steps - 1],
    }


def train_ours(way: Way, options: argparse.Namespace, timer: StepTimer, folder: str) -> None:
    """Train with the workbench."""
    config = RunConfig(
        model=ModelConfig(backbone=options.backbone, finetune=way.finetune, dtype=COMPARED_DTYPE),
        data=data_config(options),
        training=TrainingConfig(
            alpha=way.alpha, epochs=2, batch_size=options.batch_size * way.batches, keep_model=False
        ),
    )
    train(config, folder, callbacks=[timer])


class TwoHeads(nn.Module):
    """A causal LM with a linear classifier on the last input token's state, computed the plain way."""

    def __init__(self, lm: nn.Module, hidden_size: int, n_labels: int) -> None:
        super().__init__()
        self.lm = lm
        self.score = nn.Linear(hidden_size, n_labels, bias=False)

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        class_labels: torch.Tensor,
        input_length: torch.Tensor,
        labels: torch.Tensor | None = None,
        whole: dict[str, torch.Tensor] | None = None,
    ) -> dict[str, torch.Tensor]:
        """Return the class CE plus the LM CE over `labels` in the same pass, or over `whole` in a second one."""
        out = self.lm(input_ids, attention_mask, labels=labels, output_hidden_states=True)
        pooled = out.hidden_states[-1][torch.arange(len(input_ids)), input_length - 1]
        loss = F.cross_entropy(self.score(pooled), class_labels)
        if labels is not None:
            loss = loss + out.loss
        if whole is not None:
            loss = loss + self.lm(**whole).loss
        return {"loss": loss}


def train_plain(
    way: Way,
    options: argparse.Namespace,
    timer: StepTimer,
    folder: str,
    backbone: Backbone,
    rows: list[dict[str, Any]],
    n_labels: int,
) -> None:
    """Train with transformers' Trainer."""
    lm: PreTrainedModel = backbone.model
    if way.finetune == "lora":
        defaults = ModelConfig()
        adapters = LoraConfig(
            r=defaults.lora_r,
            lora_alpha=defaults.lora_alpha,
            lora_dropout=defaults.lora_dropout,
            target_modules="all-linear",
        )
        lm = get_peft_model(lm, adapters)
    arguments = TrainingArguments(
        output_dir=folder,
        per_device_train_batch_size=options.batch_size,
        num_train_epochs=2,
        learning_rate=1e-4,
        save_strategy="no",
        report_to="none",
        use_cpu=backbone.model.device.type == "cpu",
        remove_unused_columns=False,
    )
    collate = {TRAINER: dynamic_batches, TWO_PASSES: fixed_batches}[way.by](backbone.tokenizer, rows, way.alpha > 0)
    model = TwoHeads(lm, backbone.model.config.hidden_size, n_labels)
    Trainer(model, arguments, data_collator=collate, train_dataset=rows, callbacks=[timer]).train()


def dynamic_batches(tokenizer: Any, rows: list[dict[str, Any]], with_labels: bool) -> Callable:
    """Return transformers' own collation: each batch padded to its longest row."""
    pad = DataCollatorForSeq2Seq(tokenizer)
    columns = {"input_ids": "input_ids", "input_length": "input_length", "class_labels": "class_labels"}
    columns |= {"labels": "lm_labels"} if with_labels else {}
    return lambda batch: dict(pad([{name: row[column] for name, column in columns.items()} for row in batch]))


def fixed_batches(tokenizer: Any, rows: list[dict[str, Any]], with_labels: bool) -> Callable:
    """Return a collation of input and whole row, each padded to the least power of two that holds every row."""
    lengths = [max(row["input_length"] for row in rows), max(len(row["input_ids"]) for row in rows)]
    short, long = (
        DataCollatorForSeq2Seq(tokenizer, padding="max_length", max_length=2 ** (longest - 1).bit_length())
        for longest in lengths
    )

    def collate(batch: list[dict[str, Any]]) -> dict[str, Any]:
        inputs = [{"input_ids": row["input_ids"][: row["input_length"]]} for row in batch]
        whole = [{"input_ids": row["input_ids"], "labels": row["lm_labels"]} for row in batch]
        targets = {name: torch.tensor([row[name] for row in batch]) for name in ("input_length", "class_labels")}
        return {**short(inputs), **targets, "whole": dict(long(whole))}

    return collate


if __name__ == "__main__":
    main()
