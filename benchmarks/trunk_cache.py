"""The frozen-trunk cache: cells of a grid trained from it, without it, and by full fine-tuning, in one run.

    python benchmarks/trunk_cache.py [--freeze 20 24] [--rows 24] [--out runs/bench]

The grid has four alphas, two poolings and three seeds. The cells of the first seed are trained each way in turns,
and then the whole grid from the cache. Prints how many times faster the cache is beside what counted operations
leave room for, and writes OUT/trunk_cache.json. A step's time holds no loading, evaluation or saving; a cell's
wall time holds them all, and the first one's the computing of the states that later cells share.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

import pandas as pd
from transformers import PreTrainedModel

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.harness import StepTimer, train_flops
from dhrd_lib.backbones import load_backbone
from dhrd_lib.config import RunConfig
from dhrd_lib.runs import environment, write_json
from dhrd_lib.studies.sweeps import Grid, sweep
from dhrd_lib.training import train

GRID = {"training.alpha": (0.0, 0.5, 1.0, 2.0), "model.pooling": ("last", "mean")}
FULL = {"freeze_layers": 0, "cache_trunk": False}
ENDS = ((", no cache", False), (", cache", True))


def main(arguments: list[str] | None = None) -> dict:
    """Measure, print, and write the JSON file; returns what stands in it."""
    options = parse(arguments)
    lm = load_backbone(options.backbone).model
    ways = {"full fine-tuning": FULL}
    for layers in options.freeze:
        ways |= {f"{layers} frozen{end}": {"freeze_layers": layers, "cache_trunk": cached} for end, cached in ENDS}
    with tempfile.TemporaryDirectory() as root:
        first = [
            {**measure(grid.config(run), root, lm), "way": way, "cell": run.removeprefix(f"{grid.name}-")}
            for cells in zip(*(named(grid) for grid in grids(ways, options, (0,))), strict=True)
            for way, (grid, run) in zip(ways, cells, strict=True)
        ]
        last = list(ways)[-1]
        (grid,) = grids({last: ways[last]}, options, (0, 1, 2))
        started = time.perf_counter()
        whole = {"way": last, "cells": sweep(grid, root)["run"].nunique()}
        whole["wall_seconds"] = time.perf_counter() - started
    result = {
        "cells": first,
        "ways": compare(pd.DataFrame(first)),
        "whole_grid": whole,
        "settings": vars(options),
        "environment": environment(lm.device),
    }
    write(result, Path(options.out))
    return result


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command's options."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backbone", default="smollm2-135m")
    parser.add_argument("--freeze", type=int, nargs="+", default=[20, 24], help="frozen layers to try")
    parser.add_argument("--rows", type=int, default=24, help="train rows of a cell, in batches of 8")
    parser.add_argument("--eval-rows", type=int, default=8, help="rows of each other split")
    parser.add_argument("--out", default="runs/bench")
    return parser.parse_args(arguments)


def grids(ways: dict[str, dict], options: argparse.Namespace, seeds: tuple[int, ...]) -> list[Grid]:
    """The grid of each way to train."""
    rows = {"max_train_rows": options.rows, "max_eval_rows": options.eval_rows}
    tokens = {"max_input_tokens": 256, "max_rationale_tokens": 128}
    shared = {"epochs": 1, "batch_size": 8, "learning_rate": 1e-4, "logging_steps": 1, "keep_model": False}
    found = []
    for place, way in enumerate(ways.values()):
        base = {
            "model": {"backbone": options.backbone, "finetune": "full", "freeze_layers": way["freeze_layers"]},
            "data": {"task": "support_triage", **rows, **tokens},
            "training": {**shared, "cache_trunk": way["cache_trunk"]},
        }
        found.append(Grid(f"way{place}-{len(seeds)}", {**GRID, "training.seed": seeds}, base))
    return found


def named(grid: Grid) -> list[tuple[Grid, str]]:
    """Each cell's run beside its grid."""
    return [(grid, run) for run in grid.cells]


def measure(config: RunConfig, root: str, lm: PreTrainedModel) -> dict:
    """Train one cell: seconds of its steps and in all, counted operations, losses, and what it answered."""
    timer = StepTimer()
    started = time.perf_counter()
    run = train(config, root, callbacks=[timer])
    wall = time.perf_counter() - started
    flops = train_flops(
        lm,
        run.metrics["train_tokens"],
        run.metrics["sequences"]["train"]["lm_tokens"] * config.training.epochs,
        frozen_layers=config.model.freeze_layers,
        cached=config.training.cache_trunk,
    )
    losses = run.history["class_loss"].dropna().tolist()
    answers = [run.predictions(split)["prediction"].tolist() for split in run.metrics["splits"]]
    return {
        "step_seconds": sum(timer.seconds),
        "wall_seconds": wall,
        "gflop": flops / 1e9,
        "tokens": run.metrics["train_tokens"],
        "class_losses": losses,
        "answers": answers,
    }


def compare(cells: pd.DataFrame) -> list[dict]:
    """A row a way: its seconds over all cells, and from the cache the gain beside the room and the differences."""
    by_way = {way: part.reset_index() for way, part in cells.groupby("way", sort=False)}
    rows = []
    for way, part in by_way.items():
        row = {"way": way, **part[["step_seconds", "wall_seconds", "gflop", "tokens"]].sum().to_dict()}
        if way.endswith(", cache"):
            uncached = by_way[way.replace(", cache", ", no cache")]
            row |= gains("no_cache", part, uncached) | gains("full", part, by_way["full fine-tuning"])
            row["largest_class_loss_difference"] = max(
                abs(a - b)
                for ours, theirs in zip(part["class_losses"], uncached["class_losses"], strict=True)
                for a, b in zip(ours, theirs, strict=True)
            )
            row["same_answers"] = part["answers"].tolist() == uncached["answers"].tolist()
        rows.append(row)
    return rows


def gains(name: str, cached: pd.DataFrame, other: pd.DataFrame) -> dict[str, float]:
    """How many times faster the cache's steps are, and how many the counted operations leave room for."""
    faster, room = (other[of].sum() / cached[of].sum() for of in ("step_seconds", "gflop"))
    wall = other["wall_seconds"].sum() / cached["wall_seconds"].sum()
    return {
        f"faster_than_{name}": faster,
        f"room_over_{name}": room,
        f"share_of_room_over_{name}": faster / room,
        f"faster_wall_than_{name}": wall,
    }


def write(result: dict, folder: Path) -> None:
    """The JSON file, and what is printed."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "trunk_cache.json", result)
    table = pd.DataFrame(result["ways"]).set_index("way")
    print(table[["step_seconds", "wall_seconds", "gflop"]].to_string(float_format="{:.1f}".format))
    for way, row in table.dropna().iterrows():
        for name in ("no_cache", "full"):
            print(
                f"{way}: {row[f'faster_than_{name}']:.2f} times as fast as {name.replace('_', ' ')}, of "
                f"{row[f'room_over_{name}']:.2f} that there is room for ({row[f'share_of_room_over_{name}']:.0%}); "
                f"{row[f'faster_wall_than_{name}']:.2f} times by wall time"
            )
        print(
            f"{way}: class losses within {row['largest_class_loss_difference']:.1e} of the uncached ones, "
            f"{'the same' if row['same_answers'] else 'not the same'} answers"
        )
    whole = result["whole_grid"]
    print(f"{whole['cells']} cells ({whole['way']}): {whole['wall_seconds']:.0f} s")


if __name__ == "__main__":
    main()
