"""The training step: tokens a second, share of the matmul peak and peak memory, beside two other set-ups.

    python benchmarks/train_step.py [--rows 32] [--batch-size 16] [--out runs/bench]

The same rows of everyday_nli are trained by the workbench; by transformers' Trainer (with PEFT for LoRA) as its
documentation has it, with batches padded to their longest row and all logits; and in two passes, input and
rationale apart, each padded to a fixed length. Each way runs in a process of its own, which makes its peak memory
its own; the first epoch warms up, and the second one's steps are timed, without loading, evaluation and saving.
Writes OUT/train_step.json, and prints the ratios.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn import functional as F
from transformers import DataCollatorForSeq2Seq, PreTrainedModel, Trainer, TrainingArguments

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.harness import StepTimer, matmul_peak, train_flops
from dhrd_lib.backbones import Backbone, load_backbone
from dhrd_lib.config import DataConfig, ModelConfig, RunConfig, TrainingConfig
from dhrd_lib.modeling import build_model
from dhrd_lib.runs import environment, write_json
from dhrd_lib.sequences import IGNORE_INDEX, SequenceFormat, encode_split
from dhrd_lib.tasks import load_rows
from dhrd_lib.training import train

OURS, TRAINER, TWO_PASSES = "workbench", "Trainer", "two passes"
ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Way:
    """One way to train: by whom, with which alpha, all weights or LoRA, and how many times the batch size."""

    by: str
    alpha: float
    finetune: str
    batches: int = 1

    @property
    def name(self) -> str:
        """As the tables say it."""
        setting = "DHRD" if self.alpha else "pooled baseline"
        return f"{self.by}, {setting}, {self.finetune}" + (f", batch x {self.batches}" if self.batches > 1 else "")


# The baseline's rows are shorter, so that its memory is compared at a batch of about as many tokens too.
WAYS = [
    Way(by, alpha, finetune)
    for finetune in ("full", "lora")
    for by, alphas in ((OURS, (0.0, 1.0)), (TRAINER, (0.0, 1.0)), (TWO_PASSES, (1.0,)))
    for alpha in alphas
] + [Way(OURS, 0.0, finetune, batches=2) for finetune in ("full", "lora")]


def main(arguments: list[str] | None = None) -> dict | None:
    """Measure each way in a process of its own, print, and write the JSON file."""
    options = parse(arguments)
    if options.way is not None:
        print(json.dumps(measure(WAYS[options.way], options)))
        return None
    found = [{**vars(way), "way": way.name, **in_own_process(place)} for place, way in enumerate(WAYS)]
    backbone = load_backbone(options.backbone)
    model = build_model(ModelConfig(backbone=options.backbone), load_rows(data(options))[0], backbone=backbone)
    tokens = options.batch_size * 80
    peak = max(max(matmul_peak(model, tokens).values()) for _ in range(3))
    result = {
        "peak_gflop_per_second": peak,
        "ways": [{**one, "peak_share": one["gflop"] / one["seconds"] / peak} for one in found],
        "settings": vars(options),
        "environment": environment(backbone.model.device),
    }
    result["ratios"] = ratios(pd.DataFrame(result["ways"]).set_index("way"))
    write(result, Path(options.out))
    return result


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command's options."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backbone", default="smollm2-135m")
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--out", default="runs/bench")
    parser.add_argument("--way", type=int, help="measure this one in this process, and print it as JSON")
    return parser.parse_args(arguments)


def in_own_process(place: int) -> dict[str, Any]:
    """What the command prints for one way."""
    command = [sys.executable, __file__, *sys.argv[1:], "--way", str(place)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    print(f"{WAYS[place].name}: {found['tokens'] / found['seconds']:.0f} tokens/s", flush=True)
    return found


def data(options: argparse.Namespace) -> DataConfig:
    """The same rows for all."""
    return DataConfig(task="everyday_nli", max_train_rows=options.rows, max_eval_rows=8)


def measure(way: Way, options: argparse.Namespace) -> dict[str, Any]:
    """Train two epochs; what the second one's steps took, what they computed, and the memory up to its end."""
    timer = StepTimer()
    with tempfile.TemporaryDirectory() as folder:
        rows, lm = (train_ours if way.by == OURS else train_plain)(way, options, timer, folder)
    steps = len(timer.seconds) // 2
    tokens = sum(len(row["input_ids"]) for row in rows)
    supervised = sum(label != IGNORE_INDEX for row in rows for label in row["lm_labels"])
    return {
        "rows": len(rows),
        "tokens": tokens,
        "gflop": train_flops(lm, tokens, supervised, lora=way.finetune == "lora") / 1e9,
        "seconds": sum(timer.seconds[steps:]),
        # Of the first epoch: the second one's would have the checkpoint that was written between them.
        "peak_memory_mib": timer.peak_memory_mib[steps - 1],
    }


def train_ours(
    way: Way, options: argparse.Namespace, timer: StepTimer, folder: str
) -> tuple[list, PreTrainedModel]:
    """Train as the workbench does; the rows, and a backbone for its shapes."""
    config = RunConfig(
        model=ModelConfig(backbone=options.backbone, finetune=way.finetune),
        data=data(options),
        training=TrainingConfig(
            alpha=way.alpha, epochs=2, batch_size=options.batch_size * way.batches, keep_model=False
        ),
    )
    train(config, folder, callbacks=[timer])
    rows, backbone, _ = encoded(way, options)
    return rows, backbone.model


def encoded(way: Way, options: argparse.Namespace) -> tuple[list[dict[str, Any]], Backbone, int]:
    """The rows as the workbench encodes them, the backbone, and the number of labels."""
    backbone = load_backbone(options.backbone)
    task, splits = load_rows(data(options))
    fmt = SequenceFormat(backbone.tokenizer)
    rows, _ = encode_split(splits["train"], fmt, task.verbalizers, with_rationale=way.alpha > 0)
    return rows.to_list(), backbone, len(task.label_names)


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
        """Class CE, and LM CE over `labels` in the same pass, or in one of its own over `whole`."""
        out = self.lm(input_ids, attention_mask, labels=labels, output_hidden_states=True)
        pooled = out.hidden_states[-1][torch.arange(len(input_ids)), input_length - 1]
        loss = F.cross_entropy(self.score(pooled), class_labels)
        if labels is not None:
            loss = loss + out.loss
        if whole is not None:
            loss = loss + self.lm(**whole).loss
        return {"loss": loss}


def train_plain(
    way: Way, options: argparse.Namespace, timer: StepTimer, folder: str
) -> tuple[list, PreTrainedModel]:
    """Train with transformers' Trainer; the rows, and the backbone."""
    rows, backbone, n_labels = encoded(way, options)
    lm = backbone.model
    if way.finetune == "lora":
        lora = ModelConfig()
        adapters = LoraConfig(
            r=lora.lora_r, lora_alpha=lora.lora_alpha, lora_dropout=lora.lora_dropout, target_modules="all-linear"
        )
        lm = get_peft_model(lm, adapters)
    model = TwoHeads(lm, backbone.model.config.hidden_size, n_labels)
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
    Trainer(model, arguments, data_collator=collate, train_dataset=rows, callbacks=[timer]).train()
    return rows, backbone.model


def dynamic_batches(tokenizer: Any, rows: list[dict[str, Any]], with_labels: bool) -> Callable:
    """transformers' own collator: each batch padded to its longest row."""
    pad = DataCollatorForSeq2Seq(tokenizer)
    kept = ["input_ids", "input_length", "class_labels"]

    def collate(batch: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        features = [{name: row[name] for name in kept} for row in batch]
        for feature, row in zip(features, batch, strict=True):
            feature |= {"labels": row["lm_labels"]} if with_labels else {}
        return dict(pad(features))

    return collate


def fixed_batches(tokenizer: Any, rows: list[dict[str, Any]], with_labels: bool) -> Callable:
    """Input and whole row apart, each padded to the least power of two that holds every row."""
    lengths = [max(row["input_length"] for row in rows), max(len(row["input_ids"]) for row in rows)]
    short, long = (
        DataCollatorForSeq2Seq(tokenizer, padding="max_length", max_length=2 ** (longest - 1).bit_length())
        for longest in lengths
    )

    def collate(batch: list[dict[str, Any]]) -> dict[str, Any]:
        inputs = [{"input_ids": row["input_ids"][: row["input_length"]]} for row in batch]
        whole = [{"input_ids": row["input_ids"], "labels": row["lm_labels"]} for row in batch]
        told = {name: torch.tensor([row[name] for row in batch]) for name in ("input_length", "class_labels")}
        return {**short(inputs), **told, "whole": dict(long(whole))}

    return collate


def ratios(ways: pd.DataFrame) -> dict[str, float]:
    """How the ways compare, for all weights and for LoRA: by seconds for the same rows, operations, and memory."""
    found = {}
    for finetune in ("full", "lora"):
        baseline, dhrd, plain, plain_dhrd, two_passes, as_many = (
            ways.loc[Way(*of).name]
            for of in (
                (OURS, 0.0, finetune),
                (OURS, 1.0, finetune),
                (TRAINER, 0.0, finetune),
                (TRAINER, 1.0, finetune),
                (TWO_PASSES, 1.0, finetune),
                (OURS, 0.0, finetune, 2),
            )
        )
        found |= {
            f"{finetune}: Trainer / workbench, baseline": plain.seconds / baseline.seconds,
            f"{finetune}: Trainer / workbench, DHRD": plain_dhrd.seconds / dhrd.seconds,
            f"{finetune}: two passes / workbench, DHRD": two_passes.seconds / dhrd.seconds,
            f"{finetune}: DHRD / baseline, seconds": dhrd.seconds / baseline.seconds,
            f"{finetune}: DHRD / baseline, operations": dhrd.gflop / baseline.gflop,
            f"{finetune}: DHRD / baseline at twice the batch, peak memory": dhrd.peak_memory_mib
            / as_many.peak_memory_mib,
        }
    return found


def write(result: dict, folder: Path) -> None:
    """The JSON file, and what is printed."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "train_step.json", result)
    table = pd.DataFrame(result["ways"]).set_index("way")
    table["tokens_per_second"] = table["tokens"] / table["seconds"]
    shown = ["tokens", "seconds", "tokens_per_second", "peak_share", "peak_memory_mib"]
    print(table[shown].to_string(float_format="{:.3g}".format))
    for name, value in result["ratios"].items():
        print(f"{name}: {value:.2f}")
    print(f"matmul peak {result['peak_gflop_per_second']:.0f} GFLOP/s; {folder / 'train_step.json'}")


if __name__ == "__main__":
    main()
