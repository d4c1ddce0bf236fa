"""Throughput of the pooled classifiers, transformers' own pipeline, and CoT decoding, in one run.

    python benchmarks/throughput.py [--run runs/NAME] [--queries 500] [--out runs/bench]

Writes OUT/throughput.json and OUT/throughput.html, and prints the ratios. Speed doesn't depend on what the
weights say, except how soon CoT comes to its answer: the backbone as it came is asked zero-shot, and with --run a
trained run's own weights reason as they were taught. The table counts the tokens that were written.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.harness import (
    MIXED_TASKS,
    Measured,
    System,
    classify_flops,
    cot_system,
    lm_head_system,
    measure,
    mixed_texts,
    peak_share,
    pipeline_system,
    pooled_system,
    profile_classify,
    ratio,
)
from dhrd_lib.backbones import Backbone, load_backbone
from dhrd_lib.config import ModelConfig
from dhrd_lib.cot.decoding import BUDGETS, CoT, Decoding, fine_tuned, zero_shot
from dhrd_lib.modeling import DHRDModel, build_model
from dhrd_lib.runs import environment, write_json
from dhrd_lib.studies import plots
from dhrd_lib.tasks import TASKS, Task

# The pipeline's default of 1 answers every text, batches (whose padding takes minutes) some of them.
PIPELINES = {1: {}, 8: {"rounds": 1, "queries_per_round": 24}}
# The fastest of 4, 8 and 16 rows a batch, which took minutes to find out.
COT_BATCHES = (8,)
# Of all tasks that the texts are from; each text asks its own question.
LABELS = tuple(dict.fromkeys(w for name in MIXED_TASKS for w in TASKS[name].verbalizers))
PAPER_RATIOS = "96 to 142"


def main(arguments: list[str] | None = None) -> dict:
    """Measure, print, and write the JSON file and the page; returns what stands in the file."""
    options = parse(arguments)
    started = time.perf_counter()
    texts, source = mixed_texts(options.queries, options.seed)
    dhrd, baseline, cot = models(options)
    share = peak_share(dhrd, square=options.square, repeats=4)
    found = measure(
        systems(dhrd, baseline, cot, options),
        texts,
        rounds=options.rounds,
        latency_queries=options.latency_queries,
        choice_queries=16,
    )
    result = {
        "texts": source,
        "weights": options.run or options.backbone,
        "cot": cot.name,
        "systems": [one.row() for one in found],
        "ratios": ratios(found),
        "largest_logit_difference": logit_difference(found),
        "classify": share,
        "peak_share": peak_shares(found, dhrd, share["peak_gflop_per_second"]),
        "profile": profile_classify(dhrd).head(12).to_dict("records"),
        "environment": environment(dhrd.device),
        "seconds": time.perf_counter() - started,
    }
    write(result, Path(options.out))
    return result


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command's options."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backbone", default="smollm2-135m")
    parser.add_argument("--run", help="a trained run's folder, whose weights are used")
    parser.add_argument("--queries", type=int, default=500)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--latency-queries", type=int, default=12)
    parser.add_argument("--max-input-tokens", type=int, default=512)
    parser.add_argument("--max-new-tokens", type=int, default=500, help="of CoT; the paper has 500")
    parser.add_argument("--square", type=int, default=2048, help="side of the matmul peak's largest product")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", default="runs/bench")
    return parser.parse_args(arguments)


def models(options: argparse.Namespace) -> tuple[DHRDModel, DHRDModel, CoT]:
    """DHRD, the pooled baseline, and CoT, all on the same backbone.

    The classifiers have one linear layer each, because that is what transformers' own has; their template takes
    a text as it is, because the texts are of several tasks.
    """
    backbone = trained_backbone(options.run) if options.run else load_backbone(options.backbone)
    task = Task("mixed", "{text}", LABELS, LABELS)
    config = ModelConfig(head="linear", finetune="full")
    dhrd, baseline = (
        build_model(config, task, backbone=backbone, max_input_tokens=options.max_input_tokens, seed=seed).eval()
        for seed in (0, 1)
    )
    return dhrd, baseline, fine_tuned(dhrd) if options.run else zero_shot(backbone, task)


def trained_backbone(folder: str) -> Backbone:
    """The backbone of a trained run, with what its LM head has learned."""
    trained = DHRDModel.from_pretrained(Path(folder) / "model")
    return Backbone(trained.backbone, trained.tokenizer, folder, folder)


def systems(dhrd: DHRDModel, baseline: DHRDModel, cot: CoT, options: argparse.Namespace) -> list[System]:
    """What is measured: classifiers, and CoT on a few texts, which the table counts.

    With the paper's parameters CoT stops at its answer, which is parsed; at a budget it writes exactly so many
    tokens, and its answer is scored.
    """
    longest = options.max_new_tokens
    once = {"rounds": 1, "queries_per_round": 1}
    twice = {"rounds": 2, "queries_per_round": 1}
    many = {"rounds": 1, "queries_per_round": max(COT_BATCHES), "latency_queries": 1}
    budgets = [budget for budget in BUDGETS if 0 < budget <= longest]
    exactly = [Decoding(max_new_tokens=budget, early_stop=False) for budget in budgets]
    return [
        pooled_system("DHRD", dhrd),
        pooled_system("pooled baseline", baseline, rounds=1),
        *(pipeline_system(f"pipeline (batches of {n})", dhrd, (n,), **limits) for n, limits in PIPELINES.items()),
        cot_system("CoT (paper's parameters)", cot, Decoding(max_new_tokens=longest), **twice),
        cot_system("CoT (batched)", cot, Decoding(max_new_tokens=longest), COT_BATCHES, **many),
        lm_head_system("CoT (budget 0, LM head alone)", cot, rounds=1, queries_per_round=10),
        *(
            cot_system(f"CoT (budget {decoding.max_new_tokens})", cot, decoding, reading="scored", **once)
            for decoding in exactly
        ),
    ]


def ratios(found: list[Measured]) -> dict[str, dict]:
    """DHRD's queries a second by every other system's."""
    dhrd, *others = found
    return {f"DHRD / {other.system.name}": ratio(dhrd, other) for other in others}


def peak_shares(found: list[Measured], model: DHRDModel, peak_gflop_per_second: float) -> dict[str, float]:
    """The share of the matmul peak that each classifier makes of its real tokens, tokenisation included.

    One over a system's share bounds how many times its speed any other can have on the same weights.
    """
    rows = [one.row() for one in found if not one.system.name.startswith("CoT")]
    shares = {}
    for row in rows:
        flops = classify_flops(model, 1, round(row["read_tokens_per_query"]))
        shares[row["system"]] = flops * row["queries_per_second"] / 1e9 / peak_gflop_per_second
    return shares


def logit_difference(found: list[Measured]) -> float:
    """The largest difference between DHRD's logits and the pipeline's on the same texts."""
    by_name = {one.system.name: one for one in found}
    pairs = zip(by_name["DHRD"].answers, by_name["pipeline (batches of 1)"].answers, strict=True)
    return float(max(np.abs(ours - theirs).max() for ours, theirs in pairs))


def write(result: dict, folder: Path) -> None:
    """The JSON file, the page, and what is printed."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "throughput.json", result)
    table = pd.DataFrame(result["systems"])
    figure = plots.throughput_bars(table)
    figure.write_html(folder / "throughput.html", include_plotlyjs=True)
    shown = ["queries_per_second", "tokens_per_second", "latency_p50_ms", "latency_p95_ms", "padding_share"]
    shown += ["written_tokens_per_query", "tokenisation_ms_per_query", "peak_memory_mib", "best_batch", "queries"]
    print(table.set_index("system")[shown].to_string(float_format="{:.3g}".format))
    for name, found in result["ratios"].items():
        spread = f" ({found['low']:.3g} to {found['high']:.3g} over {found['rounds']} rounds)"
        print(f"{name}: {found['value']:.3g}{spread if found['rounds'] > 1 else ''}")
    print(f"CoT is {result['cot']}, on {result['weights']}.")
    print(f"The paper reports {PAPER_RATIOS} for pooled / CoT, with larger backbones on GPUs.")
    print(f"Largest logit difference from the pipeline: {result['largest_logit_difference']:.1e}")
    classify = result["classify"]
    print(
        f"classify at {classify['rows']} x {classify['tokens']} tokens: {classify['gflop_per_second']:.1f} "
        f"GFLOP/s, {classify['share']:.1%} of the matmul peak of {classify['peak_gflop_per_second']:.1f}"
    )
    for name, reached in result["peak_share"].items():
        print(f"{name}: {reached:.1%} of the peak; at most {1 / reached:.2f} times its speed is to be had")
    environment = result["environment"]
    print(f"{result['texts']}; {environment['processor']}, {environment['cpu_threads']} threads")
    print(f"{result['seconds']:.0f} s in all; {folder / 'throughput.json'}, {folder / 'throughput.html'}")


if __name__ == "__main__":
    main()
