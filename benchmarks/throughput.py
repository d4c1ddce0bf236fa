"""Throughput of the pooled classifiers and of CoT decoding, in one run.

    python -m benchmarks.throughput [--run runs/NAME] [--queries 500] [--out runs/bench]

Writes OUT/throughput.json and OUT/throughput.html, and prints the ratios. Speed depends on the weights only in how
soon CoT reaches its answer: without --run the backbone is prompted zero-shot, with --run the trained run's LM head
generates its rationales. The table counts the generated tokens. `benchmarks.inference` compares the classifier with
other engines.
"""

from __future__ import annotations

from typing import Any

import pandas as pd

from benchmarks.common import COMPARED_DTYPE, parse_args, write_result
from benchmarks.compute import classify_flops, peak_share, profile_classify
from benchmarks.harness import (
    MIXED_TASKS,
    Measurement,
    System,
    cot_system,
    lm_head_system,
    measure,
    mixed_texts,
    pooled_system,
    ratio,
    throughput_bars,
)
from dhrd_lib.backbones import Backbone, load_backbone
from dhrd_lib.config import DataConfig, ModelConfig, TrainingConfig
from dhrd_lib.cot import CoT, Decoding
from dhrd_lib.modeling import DHRDModel, build_model
from dhrd_lib.studies.cot_budget import BUDGETS
from dhrd_lib.tasks import TASKS, Task

COT_BATCHES = (8,)  # the fastest of 4, 8 and 16 rows, fixed because the choice takes minutes
# The labels of all tasks: the texts are mixed, and each asks its own question.
LABELS = tuple(dict.fromkeys(w for name in MIXED_TASKS for w in TASKS[name].verbalizers))


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Measure, print, and write the JSON file and the page; return the file's contents."""
    options = parse_args(
        __doc__,
        arguments,
        backbone=("smollm2-135m", "name, hub id or folder"),
        run=("", "folder of a trained run whose weights are used"),
        queries=(500, "texts"),
        rounds=(5, "rounds that the texts are split into"),
        latency_queries=(12, "texts answered one at a time"),
        max_input_tokens=(512, "longer inputs are cut"),
        max_new_tokens=(500, "of CoT; the paper has 500"),
        square=(2048, "side of the matmul peak's largest product"),
        seed=(0, "of the texts' order"),
    )
    texts, source = mixed_texts(options.queries, options.seed)
    dhrd, baseline, cot = models(options.run, options.backbone, options.max_input_tokens)
    share = peak_share(dhrd, square=options.square, repeats=4)
    results = measure(
        systems(dhrd, baseline, cot, options.max_new_tokens),
        texts,
        rounds=options.rounds,
        latency_queries=options.latency_queries,
        choice_queries=16,
    )
    rows = pd.DataFrame([result.row() for result in results])
    result = {
        "texts": source,
        "weights": options.run or options.backbone,
        "cot": cot.name,
        "systems": rows.to_dict("records"),
        "ratios": {f"DHRD / {other.system.name}": ratio(results[0], other) for other in results[1:]},
        "classify": share,
        "peak_share": peak_shares(results, dhrd, share["peak_gflop_per_second"]),
        "profile": profile_classify(dhrd).head(12).to_dict("records"),
    }
    print_result(result, rows)
    return write_result("throughput", result, options, dhrd.device, throughput_bars(rows))


def models(run: str, backbone: str, max_input_tokens: int) -> tuple[DHRDModel, DHRDModel, CoT]:
    """Return DHRD, the pooled baseline, and CoT, all on the same backbone.

    The classifiers have one linear layer each, as transformers' own has; their template takes a text unchanged,
    because the texts come from several tasks.
    """
    loaded = load_backbone(backbone, dtype=COMPARED_DTYPE)
    if run:
        trained = DHRDModel.from_pretrained(f"{run}/model")
        loaded = Backbone(trained.backbone, trained.tokenizer, run)
    dtype = str(loaded.model.dtype).removeprefix("torch.")  # "auto" would make it float32, which is for training.
    task = Task("mixed", "{text}", LABELS, LABELS)
    dhrd, baseline = (
        build_model(
            ModelConfig(head="linear", finetune="full", dtype=dtype),
            task,
            backbone=loaded,
            data=DataConfig(max_input_tokens=max_input_tokens),
            training=TrainingConfig(seed=seed),
        ).eval()
        for seed in (0, 1)
    )
    return dhrd, baseline, CoT.from_model(dhrd) if run else CoT.from_backbone(loaded, task)


def systems(dhrd: DHRDModel, baseline: DHRDModel, cot: CoT, max_new_tokens: int) -> list[System]:
    """Return the classifiers, and CoT on a few texts, which the table counts.

    With the paper's parameters CoT stops at its answer, which is parsed; at a budget it generates exactly so many
    tokens, and its answer is scored.
    """
    paper = Decoding(max_new_tokens=max_new_tokens)
    once = {"rounds": 1, "queries_per_round": 1}
    batched = {"rounds": 1, "queries_per_round": max(COT_BATCHES), "latency_queries": 1}
    budgets = [budget for budget in BUDGETS if 0 < budget <= max_new_tokens]
    return [
        pooled_system("DHRD", dhrd),
        pooled_system("pooled baseline", baseline, rounds=1),
        cot_system("CoT (paper's parameters)", cot, paper, rounds=2, queries_per_round=1),
        cot_system("CoT (batched)", cot, paper, COT_BATCHES, **batched),
        lm_head_system("CoT (budget 0, LM head alone)", cot, rounds=1, queries_per_round=10),
        *(
            cot_system(
                f"CoT (budget {budget})",
                cot,
                Decoding(max_new_tokens=budget, early_stop=False),
                reading="scored",
                **once,
            )
            for budget in budgets
        ),
    ]


def peak_shares(results: list[Measurement], model: DHRDModel, peak_gflop_per_second: float) -> dict[str, float]:
    """Return the share of the matmul peak that each classifier makes of its real tokens, tokenization included.

    One over a system's share bounds the speed-up that any other system can have on the same weights.
    """
    rows = [result.row() for result in results if not result.system.name.startswith("CoT")]
    return {
        row["system"]: classify_flops(model, 1, round(row["read_tokens_per_query"]))
        * row["queries_per_second"]
        / 1e9
        / peak_gflop_per_second
        for row in rows
    }


def print_result(result: dict[str, Any], rows: pd.DataFrame) -> None:
    """Print the table, the ratios and the shares of the peak."""
    columns = ["queries_per_second", "tokens_per_second", "latency_p50_ms", "latency_p95_ms", "padding_share"]
    columns += ["written_tokens_per_query", "tokenization_ms_per_query", "peak_memory_mib", "best_batch", "queries"]
    print(rows.set_index("system")[columns].to_string(float_format="{:.3g}".format))
    for name, speedup in result["ratios"].items():
        spread = f" ({speedup['low']:.3g} to {speedup['high']:.3g} over {speedup['rounds']} rounds)"
        print(f"{name}: {speedup['value']:.3g}{spread if speedup['rounds'] > 1 else ''}")
    print(f"CoT is {result['cot']}, on {result['weights']}; {result['texts']}.")
    print("The paper reports 96 to 142 for pooled / CoT, with larger backbones on GPUs.")
    classify = result["classify"]
    print(
        f"classify at {classify['rows']} x {classify['tokens']} tokens: {classify['gflop_per_second']:.1f} "
        f"GFLOP/s, {classify['share']:.1%} of the matmul peak of {classify['peak_gflop_per_second']:.1f}"
    )
    for name, share in result["peak_share"].items():
        print(f"{name}: {share:.1%} of the peak, which leaves room for a speed-up of {1 / share:.2f}")


if __name__ == "__main__":
    main()
