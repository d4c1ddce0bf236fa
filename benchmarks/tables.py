"""The tables of README.md and docs/scaling.md, generated from stored results: `python -m benchmarks.tables`.

Each block between `<!-- table: NAME -->` and `<!-- end -->` is replaced.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd

from benchmarks.frozen_layers import by_layers
from dhrd_lib.studies.statistics import Interval, points_interval
from dhrd_lib.studies.tables import compare, load_results

ROOT = Path(__file__).parents[1]
PAGES = (ROOT / "README.md", ROOT / "docs" / "scaling.md")

Rows = list[dict[str, Any]]


def quick_comparison() -> Rows:
    """DHRD and its baseline on the final splits, in the quick profile."""
    rows = pd.DataFrame(_stored("notebooks", "quick_comparison")["rows"]).query("split != 'dev'")
    return [
        {
            "split": f"`{row.split}`",
            "setting": row.setting,
            "accuracy [95% interval]": Interval(row.value, row.low, row.high),
            "points against the baseline [95%]": _points(row, "diff_low", "diff_high"),
            "p": "" if pd.isna(row.p_value) else f"{row.p_value:.3f}",
        }
        for _, row in rows.iterrows()
    ]


def loss_weights() -> Rows:
    """Loss weights against the pooled baseline on test."""
    table = load_results(ROOT / "notebooks" / "results" / "ablation_loss_weights_support_triage.json")
    baseline = {"alpha": 0.0, "beta": 1.0, "alpha_schedule": "constant"}
    compared = compare(table[table["split"] == "test"], list(baseline), baseline)
    return [
        {
            "DHRD with": f"alpha {row.alpha:g}, beta {row.beta:g}"
            + ", annealed" * (row.alpha_schedule == "linear"),
            "points against the pooled baseline": _points(row),
            "p": f"{row.p_holm:.3f}",
        }
        for _, row in compared.iterrows()
    ]


def throughput() -> Rows:
    """Queries per second of every system."""
    stored = _stored("benchmarks", "throughput")
    speedups = {f"DHRD / {row['system']}": "" for row in stored["systems"]}
    speedups |= {name: f"{ratio['value']:.3g}" for name, ratio in stored["ratios"].items()}
    return [
        {
            "system": row["system"],
            "texts": row["queries"],
            "input tokens per query": f"{row['read_tokens_per_query']:.0f}",
            "generated tokens per query": f"{row['written_tokens_per_query']:.0f}",
            "queries per second": f"{row['queries_per_second']:.3g}",
            "speed-up of DHRD": speedups[f"DHRD / {row['system']}"],
        }
        for row in stored["systems"]
    ]


def exports() -> Rows:
    """Inference engines against torch."""
    stored, rows = _stored("benchmarks", "inference"), []
    for engine in stored["engines"]:
        name, other = engine["system"], stored["to_torch"].get(engine["system"])
        speed = other["queries_per_second_ratio"] if other else {}
        cold = f" ({stored['start_seconds_empty_cache'][name]:.1f})" if other else ""
        rows.append(
            {
                "engine": name,
                "speed-up over torch": "{value:.2f} ({low:.2f} to {high:.2f})".format(**speed) if other else 1,
                "one at a time, ms": f"{engine['latency_p50_ms']:.0f}",
                "folder, MiB": f"{engine['folder_mib']:.0f}",
                "first prediction, s (empty cache)": f"{stored['start_seconds'][name]:.1f}{cold}",
                "accuracy, points from torch's": _points(other["accuracy_difference"]) if other else "",
                "different labels": f"{other['rows_with_another_label']} of {stored['rows']}" if other else "",
            }
        )
    return rows


def int8_accuracy() -> Rows:
    """Accuracy cost of int8 on two processors."""
    return [
        {
            "export": f"{name}{processor}",
            "accuracy, points from torch's": _points(engine["accuracy_difference"]),
            "different labels": f"{engine['rows_with_another_label']} of {len(stored['runs']) * stored['rows']:,}",
        }
        for file, processor in (("int8_accuracy", ""), ("int8_accuracy_vnni", ", with VNNI"))
        for stored in [_stored("benchmarks", file)]
        for name, engine in stored["engines"].items()
    ]


def growth() -> Rows:
    """First and last point of each line, and its slopes."""
    stored, rows = _stored("benchmarks", "growth"), []
    points = pd.DataFrame(stored["points"]).groupby(["factor", "what"])
    for line in stored["slopes"]:
        first, last = (points.get_group((line["factor"], line["what"])).iloc[place] for place in (0, -1))
        mib = ["< 1" if pd.isna(point.added_mib) else f"{point.added_mib:.3g}" for point in (first, last)]
        slopes = [line[f"{name}_slope"] for name in ("seconds", "added_mib")]
        slopes = ["—" if slope is None else f"{round(slope, 2) + 0:.2f}" for slope in slopes]
        rows.append(
            {
                "call": line["what"],
                "from … to": f"{first['size']:,} … {last['size']:,} {line['factor']}",
                "seconds": f"{first.seconds:.3g} … {last.seconds:.3g}",
                "slope": slopes[0],
                "memory added, MiB": " … ".join(mib),
                "slope of memory": slopes[1],
            }
        )
    return rows


def train_step() -> Rows:
    """The training step of each way to train."""
    return [
        {
            "way": way["way"],
            "tokens per second": f"{way['tokens'] / way['seconds']:.0f}",
            "share of the peak": f"{way['peak_share']:.0%}",
            "peak memory, MiB": f"{way['peak_memory_mib']:,.0f}",
        }
        for way in _stored("benchmarks", "train_step")["ways"]
    ]


def train_step_ratios() -> Rows:
    """Comparisons of the ways to train."""
    ratios = _stored("benchmarks", "train_step")["ratios"]
    return [{"ratio": name, "measured": f"{value:.2f}"} for name, value in ratios.items()]


def trunk_cache() -> Rows:
    """Variants of freezing, with the speed-ups of the cache and those that operations allow."""
    columns = {"speed-up over full fine-tuning": "faster_than_full", "by operations": "room_over_full"}
    columns |= {"speed-up over no cache": "faster_than_no_cache", "by operations ": "room_over_no_cache"}
    return [
        {
            "trained": way["way"],
            "steps, seconds": f"{way['step_seconds']:.0f}",
            "whole cells, seconds": f"{way['wall_seconds']:.0f}",
            **{title: f"{way[name]:.2f}" if name in way else "" for title, name in columns.items()},
        }
        for way in _stored("benchmarks", "trunk_cache")["ways"]
    ]


def frozen_layers() -> Rows:
    """Accuracy of each number of frozen layers, with the learning rate that dev chose."""
    chosen = by_layers(load_results(ROOT / "benchmarks" / "results" / "frozen_layers.json"))
    return [
        {"frozen layers": layers, "learning rate": f"{rate:g}"}
        | {f"`{row.split}`": Interval(row.value, row.low, row.high) for row in rows.itertuples()}
        for (layers, rate), rows in chosen.groupby(["freeze_layers", "learning_rate"])
    ]


TABLES: dict[str, Callable[[], Rows]] = {
    table.__name__: table
    for table in (
        *(quick_comparison, loss_weights, throughput, exports, int8_accuracy),
        *(growth, train_step, train_step_ratios, trunk_cache, frozen_layers),
    )
}


def with_tables(page: str) -> str:
    """Return a page's text with its tables generated from the stored results."""

    def table(block: re.Match) -> str:
        rows = TABLES[block[2]]()
        lines = [list(rows[0]), ["---"] * len(rows[0]), *(row.values() for row in rows)]
        return block[1] + "".join(f"| {' | '.join(str(cell).strip() for cell in line)} |\n" for line in lines)

    return re.sub(r"(<!-- table: (\w+) -->\n).*?(?=<!-- end -->)", table, page, flags=re.DOTALL)


def _stored(room: str, name: str) -> dict[str, Any]:
    return json.loads((ROOT / room / "results" / f"{name}.json").read_text(encoding="utf-8"))


def _points(row: Any, low: str = "low", high: str = "high") -> str:
    return "" if pd.isna(row["difference"]) else points_interval(row["difference"], row[low], row[high])


if __name__ == "__main__":
    for path in PAGES:
        path.write_text(with_tables(path.read_text(encoding="utf-8")), encoding="utf-8")
