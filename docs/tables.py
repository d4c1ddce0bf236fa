"""Write the tables of README and docs from stored results, or check them.

`python docs/tables.py` rewrites each block between `<!-- NAME -->` and `<!-- / -->` with what its function here
returns; `--check` changes nothing and exits with 1 where a block is outdated.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd

from dhrd_lib.studies.ablations import AblationResult
from dhrd_lib.studies.statistics import Interval, points_interval
from dhrd_lib.studies.tables import load_results

ROOT = Path(__file__).parents[1]
GUIDES = ("docs/guides/rationales.md", "docs/guides/superglue.md")
PAGES = ("README.md", "docs/results.md", "docs/performance.md", "docs/costs.md", *GUIDES)
STUDIES, BENCHMARKS = ROOT / "notebooks" / "results", ROOT / "benchmarks" / "results"
BLOCKS: dict[str, Callable[[], str]] = {}
# The paper's backbones: published shapes (see `llama` and `qwen`), and queries per second (pooled, CoT).
PAPER = {
    "Llama-3.1-8B": ("llama", {"hidden": 4096, "mlp": 14336, "layers": 32, "heads": 32}, 414.91, 4.14),
    "Llama-3.2-3B": ("llama", {"hidden": 3072, "mlp": 8192, "layers": 28, "heads": 24, "tied": True}, 631.16, 4.44),
    "Qwen3-8B": ("qwen", {"hidden": 4096, "mlp": 12288}, 341.15, 3.56),
    "Qwen3-4B": ("qwen", {"hidden": 2560, "mlp": 9728, "tied": True}, 440.83, 3.76),
}
PAPER_TRAINED = ("Llama-3.2-3B", "Qwen3-4B")
H100_BYTES_PER_SECOND = 3.35e12  # of its data sheet
H100_FLOPS_PER_SECOND = 0.4 * 989e12  # 40% of its data sheet's dense bfloat16


def block(function: Callable[[], str]) -> Callable[[], str]:
    """Register a function as the block of its name."""
    BLOCKS[function.__name__] = function
    return function


def markdown(header: str, rows: Iterable[Iterable[Any]]) -> str:
    """Return a Markdown table; `header` has its columns between bars."""
    columns = [name.strip() for name in header.split("|")]
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(map(str, cells))} |" for cells in lines)


def stored(folder: Path, name: str) -> dict[str, Any]:
    """Load a JSON file of results."""
    return json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))


def points(row: Any) -> str:
    """Return a difference in percentage points with its interval."""
    return points_interval(row["difference"], row["low"], row["high"]).replace("\xa0", " ")


def comparison(name: str) -> str:
    """Return the table of a stored comparison of DHRD with its baseline."""
    rows = []
    for row in stored(STUDIES, name)["rows"]:
        if row["split"] != "dev":
            value = str(Interval(row["value"], row["low"], row["high"])).replace("\xa0", " ")
            difference = p_value = ""
            if row["difference"] is not None:
                difference = points_interval(row["difference"], row["diff_low"], row["diff_high"]).replace(
                    "\xa0", " "
                )
                p_value = f"{row['p_value']:.3f}"
            rows.append([f"`{row['split']}`", row["setting"], row["n_seeds"], value, difference, p_value])
    return markdown("split | setting | seeds | accuracy [95%] | points against the baseline [95%] | p", rows)


@block
def quick_comparison() -> str:
    """Return the quick profile's comparison on one seed."""
    return comparison("quick_comparison")


@block
def quick_two_seeds() -> str:
    """Return the quick profile's comparison on two seeds."""
    return comparison("quick_two_seeds")


def ablation(name: str, reference: dict[str, Any], split: str = "test") -> str:
    """Return one table per task: each setting's mean on a split, and its difference from the reference."""
    parts = []
    for path in sorted(STUDIES.glob(f"ablation_{name}_*.json")):
        result = AblationResult(name, load_results(path)).where(split=split)
        summary = result.summary().drop(columns=["low", "high"])
        compared = result.against(**reference).drop(columns="n_seeds")
        by = [column for column in compared if column in summary and column not in ("task", "split")]
        rows = []
        for _, row in summary.merge(compared, on=["task", "split", *by], how="left").iterrows():
            cells = [
                *(f"{row[column]}" for column in by),
                row["n_seeds"],
                f"{row['value']:.1%}",
                f"{row['std']:.1%}",
            ]
            known = pd.notna(row["difference"])
            rows.append([*cells, points(row), f"{row['p_holm']:.3f}"] if known else [*cells, "", ""])
        header = " | ".join(column.replace("_", " ") for column in by)
        title = f"**{summary['task'].iloc[0]}**, `{split}`"
        columns = f"{header} | seeds | mean | std over seeds | points against the reference [95%] | p (Holm)"
        parts.append(f"{title}\n\n{markdown(columns, rows)}")
    return "\n\n".join(parts)


@block
def loss_weights() -> str:
    """Return the loss weights' ablation against the pooled baseline."""
    return ablation("loss_weights", {"alpha": 0.0})


@block
def pooling() -> str:
    """Return the poolings' ablation against the baseline that pools the last token."""
    return ablation("pooling", {"alpha": 0.0, "pooling": "last", "head": "mlp"})


@block
def alignment() -> str:
    """Return the alignment ablation against aligned rationales."""
    return ablation("alignment", {"alpha": 1.0, "alignment": "consistent"})


@block
def rationale_length() -> str:
    """Return the rationale lengths' ablation against whole rationales."""
    return ablation("rationale_length", {"alpha": 1.0, "alignment": "consistent"})


@block
def leak_filter() -> str:
    """Return how often the label filter erred on rationales that were read by hand."""
    read = stored(STUDIES, "leak_filter")["read_by_hand"]
    return (
        f"Of {read['flagged']} flagged rationales that were read, {read['false_positives']} don't give their label "
        f"away. Of {read['unflagged']} unflagged ones {read['false_negatives']} name it, and "
        f"{read['in_other_words']} give it away in other words."
    )


@block
def throughput() -> str:
    """Return queries per second of every system in one run, and the share of the matmul peak."""
    result, rows = stored(BENCHMARKS, "throughput"), []
    for row in result["systems"]:
        ratio = result["ratios"].get(f"DHRD / {row['system']}")
        tokens = [f"{row['read_tokens_per_query']:.0f}", f"{row['written_tokens_per_query']:.0f}"]
        speed_up = f"{ratio['value']:.3g}" if ratio else ""
        rows.append([row["system"], row["queries"], *tokens, f"{row['queries_per_second']:.3g}", speed_up])
    header = "system | texts | tokens read per query | tokens generated | queries per second | DHRD's speed-up"
    classify = result["classify"]
    return (
        f"{markdown(header, rows)}\n\nSmolLM2-135M on {result['texts']}. `predict` reaches {classify['share']:.0%} "
        f"of the matmul peak measured in the same run ({classify['peak_gflop_per_second']:.0f} GFLOP/s)."
    )


@block
def exports() -> str:
    """Return speed, size and start of each engine, on processors with and without VNNI."""
    rows = []
    for processor, name in (("without VNNI", "inference"), ("with VNNI", "inference_vnni")):
        result = stored(BENCHMARKS, name)
        for engine in result["engines"]:
            system = engine["system"]
            cells = [f"{engine['latency_p50_ms']:.0f}", "", ""]  # The pipeline and bfloat16 have no folder.
            if system in result["start_seconds"]:
                cells[1:] = [f"{engine['folder_mib']:.0f}", f"{result['start_seconds'][system]:.1f}"]
            if system == "torch":
                rows.append([processor, system, "1", *cells, "", ""])
                continue
            if empty := result.get("start_seconds_empty_cache", {}).get(system):
                cells[-1] += f" ({empty:.1f})"
            to = result["to_torch"][system]
            ratio = to["queries_per_second_ratio"]
            speed_up = f"{ratio['value']:.2f} ({ratio['low']:.2f} to {ratio['high']:.2f})"
            labels = f"{to['rows_with_another_label']} of {result['rows']}"
            rows.append([processor, system, speed_up, *cells, points(to["accuracy_difference"]), labels])
    return markdown(
        "processor | engine | speed-up over torch | latency of one text, ms | folder, MiB | first prediction, s "
        "(empty cache) | accuracy, points from torch [95%] | other labels",
        rows,
    )


@block
def int8_accuracy() -> str:
    """Return what int8 costs on all rows that two runs weren't trained on."""
    rows = []
    for processor, name in (("without VNNI", "int8_accuracy"), ("with VNNI", "int8_accuracy_vnni")):
        result = stored(BENCHMARKS, name)
        for engine, of in result["engines"].items():
            labels = f"{of['rows_with_another_label']} of {len(result['runs']) * result['rows']:,}"
            rows.append([processor, engine, points(of["accuracy_difference"]), labels])
    return markdown("processor | export | accuracy, points from torch [95%] | other labels", rows)


@block
def train_step() -> str:
    """Return a training step's speed and memory against transformers' Trainer and two passes."""
    result = stored(BENCHMARKS, "train_step")
    ways = []
    for way in result["ways"]:
        speed, memory = way["tokens"] / way["seconds"], way["peak_memory_mib"]
        ways.append([way["way"], f"{speed:.0f}", f"{way['peak_share']:.0%}", f"{memory:,.0f}"])
    ratios = [[name, f"{value:.2f}"] for name, value in result["ratios"].items()]
    header = "way | tokens per second | share of the matmul peak | peak memory, MiB"
    return f"{markdown(header, ways)}\n\n{markdown('ratio | measured', ratios)}"


@block
def trunk_cache() -> str:
    """Return what frozen layers and their cached states save."""
    result, rows = stored(BENCHMARKS, "trunk_cache"), []
    for way in result["ways"]:
        gains = ["faster_than_full", "room_over_full", "faster_than_no_cache", "room_over_no_cache"]
        cells = [f"{way[name]:.2f}" if way["way"].endswith(", cache") else "" for name in gains]
        rows.append([way["way"], f"{way['step_seconds']:.0f}", f"{way['wall_seconds']:.0f}", *cells])
    return markdown(
        "trained | steps, s | whole cells, s | speed-up over full | possible by FLOPs | speed-up over no cache | "
        "possible by FLOPs",
        rows,
    )


@block
def frozen_layers() -> str:
    """Return the baseline's accuracy by frozen layers, with the learning rate that does best on dev."""
    summary = AblationResult("", load_results(BENCHMARKS / "frozen_layers.json")).summary()
    rows = []
    for layers, part in summary.groupby("freeze_layers"):
        dev = part[part["split"] == "dev"].sort_values("value")
        chosen = part[part["learning_rate"] == dev["learning_rate"].iloc[-1]].set_index("split")
        values = [chosen.loc[split] for split in ("test", "test_new_domain")]
        cells = [str(Interval(of["value"], of["low"], of["high"])).replace("\xa0", " ") for of in values]
        rows.append([layers, f"{dev['learning_rate'].iloc[-1]:g}", *cells])
    return markdown("frozen layers | learning rate | `test` [95%] | `test_new_domain` [95%]", rows)


@block
def growth() -> str:
    """Return time and memory against rows, tokens and labels."""
    result, rows = stored(BENCHMARKS, "growth"), []
    for slope in result["slopes"]:
        of = [p for p in result["points"] if (p["factor"], p["what"]) == (slope["factor"], slope["what"])]
        ends = of[0], of[-1]
        sizes = " … ".join(f"{p['size']:,}" for p in ends)
        seconds = " … ".join(f"{p['seconds']:.3g}" for p in ends)
        memory = " … ".join("< 1" if p["added_mib"] is None else f"{p['added_mib']:.3g}" for p in ends)
        slopes = ["—" if slope[n] is None else f"{slope[n]:.2f}" for n in ("seconds_slope", "added_mib_slope")]
        rows.append([slope["what"], f"{sizes} {slope['factor']}", seconds, slopes[0], memory, slopes[1]])
    return markdown("what | from … to | seconds | slope | memory added, MiB | slope", rows)


def llama(
    hidden: int, mlp: int, layers: int, heads: int, kv_heads: int = 8, vocab: int = 128256, tied: bool = False
):
    """Return a Llama of these widths without weights."""
    from transformers import LlamaConfig

    shape = {"num_attention_heads": heads, "num_key_value_heads": kv_heads, "num_hidden_layers": layers}
    sizes = {"hidden_size": hidden, "intermediate_size": mlp, "vocab_size": vocab}
    return without_weights(LlamaConfig(**shape, **sizes, tie_word_embeddings=tied))


def qwen(hidden: int, mlp: int, tied: bool = False):
    """Return a Qwen3 of 36 layers without weights."""
    from transformers import Qwen3Config

    shape = {"num_attention_heads": 32, "num_key_value_heads": 8, "num_hidden_layers": 36, "head_dim": 128}
    sizes = {"hidden_size": hidden, "intermediate_size": mlp, "vocab_size": 151936}
    return without_weights(Qwen3Config(**shape, **sizes, tie_word_embeddings=tied))


def without_weights(config: Any) -> Any:
    """Return a causal LM on the meta device."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def query_flops(lm: Any, tokens: float) -> float:
    """Return the FLOPs of classifying a text of so many tokens."""
    from benchmarks.compute import classify_flops

    return classify_flops(SimpleNamespace(backbone=lm), 1, round(tokens))


@block
def cost_model() -> str:
    """Return the cost model's figures beside the measured ones."""
    from benchmarks.compute import train_flops
    from dhrd_lib.backbones import layers_of, load_backbone
    from dhrd_lib.config import DataConfig
    from dhrd_lib.sequences import SequenceFormat, encode_split
    from dhrd_lib.tasks import load_rows

    result = stored(BENCHMARKS, "throughput")
    systems = {row["system"]: row for row in result["systems"]}
    lm = llama(576, 1536, 30, heads=9, kv_heads=3, vocab=49152, tied=True)
    peak = result["classify"]["peak_gflop_per_second"] * 1e9
    per_token = 2 * sum(p.numel() for p in [*layers_of(lm).parameters(), lm.lm_head.weight])

    def flops(name: str) -> float:
        row = systems[name]
        return query_flops(lm, row["read_tokens_per_query"]) + per_token * row["written_tokens_per_query"]

    mib = 4 * lm.num_parameters() / 2**20
    figures = [("weights, `4 N`, MiB", mib, systems["DHRD"]["weights_mib"])]
    for name in ("DHRD", "CoT (budget 500)"):
        figures.append((f"{name}, queries per second", peak / flops(name), systems[name]["queries_per_second"]))
    ratio = result["ratios"]["DHRD / CoT (budget 500)"]["value"]
    figures.append(("DHRD / CoT (budget 500), queries", flops("CoT (budget 500)") / flops("DHRD"), ratio))
    task, splits = load_rows(DataConfig(task="support_triage"))
    fmt = SequenceFormat(load_backbone().tokenizer, max_input_tokens=256, max_rationale_tokens=128)
    training = []
    for with_rationale in (True, False):
        _, report = encode_split(splits["train"], fmt, task.verbalizers, with_rationale=with_rationale)
        training.append(train_flops(lm, report["tokens"], report["lm_tokens"], frozen_layers=20, cached=True))
    seconds = {run["run"]: run["train_seconds"] for run in stored(STUDIES, "quick_two_seeds")["by_seed"]}
    for seed in (0, 1):
        dhrd, baseline = (seconds[f"quick-support_triage-{name}-seed{seed}"] for name in ("dhrd", "baseline"))
        name = f"DHRD / baseline, training seconds, seed {seed}"
        figures.append((name, training[0] / training[1], dhrd / baseline))
    rows = [[name, f"{model:.3g}", f"{found:.3g}", f"{found / model:.2g}"] for name, model, found in figures]
    return markdown("figure | the model | measured | measured / model", rows)


@block
def paper_backbones() -> str:
    """Return the paper's throughput against the published shapes of its backbones."""
    from dhrd_lib.backbones import layers_of

    rows = []
    for name, (family, shape, pooled, cot) in PAPER.items():
        lm = {"llama": llama, "qwen": qwen}[family](**shape)
        weights = sum(parameter.numel() for parameter in layers_of(lm).parameters())
        reading = 500 * 2 * lm.num_parameters() / H100_BYTES_PER_SECOND
        rate = query_flops(lm, 100) * pooled / 1e12
        rows.append([name, f"{weights / 1e9:.2f}", pooled, f"{rate:.0f}", f"{1 / cot:.2f}", f"{reading:.2f}"])
    return markdown(
        "backbone | W, 10^9 | pooled, queries per second | TFLOP/s for every 100 input tokens | CoT, seconds per "
        "query | reading all weights 500 times, seconds",
        rows,
    )


@block
def paper_training() -> str:
    """Return the least minutes and the memory of the paper's runs on one H100, for two of its backbones."""
    lms = {name: {"llama": llama, "qwen": qwen}[PAPER[name][0]](**PAPER[name][1]) for name in PAPER_TRAINED}
    rows = []
    for task, of in stored(BENCHMARKS, "paper")["tasks"].items():
        n_rows, rationale = of["train_rows"], of["rationale_tokens"]
        tokens = f"{of['input_tokens']:.0f} + {rationale:.0f}"
        cells = [f"`{task}`", f"{n_rows:,}", 3 * math.ceil(n_rows / 256), tokens]
        for lm in lms.values():
            lengths = (of["input_tokens"] + rationale, of["input_tokens"])
            seconds = (row_seconds(lm, length, length > lengths[1]) for length in lengths)
            minutes = [3 * n_rows * of_row / 60 for of_row in seconds]
            cells += [" / ".join(f"{value:.2g}" for value in minutes)]
            cells += [f"{lora_bytes(lm, of['longest_input'] + rationale) / 1e9:.0f}"]
        rows.append(cells)
    columns = " | ".join(f"{name}: minutes, DHRD / baseline | GB" for name in lms)
    return markdown(f"task | train rows | steps | tokens, input + rationale | {columns}", rows)


def row_seconds(lm: Any, tokens: float, with_rationale: bool) -> float:
    """Return the least seconds of LoRA on a row on one H100: its FLOPs', or those of reading the weights thrice."""
    from benchmarks.compute import train_flops

    flops = train_flops(lm, tokens, tokens * with_rationale, lora=True)
    return max(flops / H100_FLOPS_PER_SECOND, 3 * 2 * lm.num_parameters() / H100_BYTES_PER_SECOND)


def lora_bytes(lm: Any, tokens: float) -> float:
    """Return the memory of LoRA (r = 16, bfloat16 weights) on a row of so many tokens (docs/costs.md)."""
    from torch.nn import Linear

    from dhrd_lib.backbones import layers_of

    config = lm.config
    linear = [module for module in layers_of(lm).modules() if isinstance(module, Linear)]
    adapters = sum(16 * (module.in_features + module.out_features) for module in linear)
    key_value = config.num_key_value_heads * config.head_dim
    layer = 7 * config.hidden_size + 4 * config.intermediate_size + 4 * key_value
    # An adapter keeps its input after dropout, in bfloat16, and dropout's mask of a byte.
    per_token = 2 * config.num_hidden_layers * layer + 3 * sum(module.in_features for module in linear)
    logits = 12 * config.vocab_size * min(tokens, 512)
    return 2 * lm.num_parameters() + 16 * adapters + per_token * tokens + logits


def main(check: bool) -> list[str]:
    """Rewrite the pages' blocks, or only check them; return the names of outdated blocks."""
    outdated = []
    for page in PAGES:
        text = (ROOT / page).read_text(encoding="utf-8")

        def fresh(match: re.Match[str], page: str = page) -> str:
            content = f"<!-- {match[1]} -->\n{BLOCKS[match[1]]()}\n<!-- / -->"
            if content != match[0]:
                outdated.append(f"{page}: {match[1]}")
            return content

        text = re.sub(r"<!-- (\w+) -->\n.*?<!-- / -->", fresh, text, flags=re.DOTALL)
        if not check:
            (ROOT / page).write_text(text, encoding="utf-8")
    return outdated


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--check", action="store_true", help="change nothing; exit with 1 where a block is outdated"
    )
    outdated = main(parser.parse_args().check)
    print("\n".join(outdated) or "every block is up to date")
    sys.exit(parser.parse_args().check and bool(outdated))
