"""The frozen-trunk cache: cells of a grid trained from it, without it, and by full fine-tuning, in one run.

    python -m benchmarks.trunk_cache [--freeze 20 24] [--rows 24] [--out runs/bench]

The grid has four alphas, two poolings and three seeds. The cells of the first seed are trained each way in turns,
then the whole grid from the cache. Prints the speed-up of the cache next to the one that counted operations allow,
and writes OUT/trunk_cache.json. Step times exclude loading, evaluation and saving; a cell's wall time includes
them, and the first cell's the computation of the states that later cells share.
"""

from __future__ import annotations

import tempfile
import time
from typing import Any

import pandas as pd
from transformers import PreTrainedModel

from benchmarks.common import parse_args, write_result
from benchmarks.compute import StepTimer, train_flops
from dhrd_lib.backbones import load_backbone
from dhrd_lib.config import RunConfig
from dhrd_lib.studies.sweeps import Grid, sweep
from dhrd_lib.training import train

GRID = {"training.alpha": (0.0, 0.5, 1.0, 2.0), "model.pooling": ("last", "mean")}
FULL = "full fine-tuning"


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Measure, print, and write the JSON file; return its contents."""
    options = parse_args(
        __doc__,
        arguments,
        backbone=("smollm2-135m", "name, hub id or folder"),
        freeze=([20, 24], "numbers of frozen layers"),
        rows=(24, "train rows of a cell, in batches of 8"),
        eval_rows=(8, "rows of each other split"),
    )
    lm = load_backbone(options.backbone).model
    # name of the variant: number of frozen layers, and whether their states are cached
    variants = {FULL: (0, False)}
    for layers in options.freeze:
        variants |= {f"{layers} frozen, no cache": (layers, False), f"{layers} frozen, cache": (layers, True)}

    def make_grid(place: int, seeds: tuple[int, ...]) -> Grid:
        layers, cached = list(variants.values())[place]
        rows = {"max_train_rows": options.rows, "max_eval_rows": options.eval_rows}
        shared = {"epochs": 1, "batch_size": 8, "learning_rate": 1e-4, "logging_steps": 1, "keep_model": False}
        base = {
            "model": {"backbone": options.backbone, "finetune": "full", "freeze_layers": layers},
            "data": {"task": "support_triage", "max_input_tokens": 256, "max_rationale_tokens": 128, **rows},
            "training": {**shared, "cache_trunk": cached},
        }
        return Grid(name=f"way{place}-{len(seeds)}", grid={**GRID, "training.seed": seeds}, base=base)

    grids = [make_grid(place, (0,)) for place in range(len(variants))]
    with tempfile.TemporaryDirectory() as root:
        cells = [
            {**measure(grid.config(run), root, lm), "way": name, "cell": run.removeprefix(f"{grid.name}-")}
            for runs in zip(*(grid.cells for grid in grids), strict=True)
            for name, grid, run in zip(variants, grids, runs, strict=True)
        ]
        started = time.perf_counter()
        n_cells = sweep(make_grid(len(variants) - 1, (0, 1, 2)), root)["run"].nunique()
        whole = {"way": list(variants)[-1], "cells": n_cells, "wall_seconds": time.perf_counter() - started}
    result = {"cells": cells, "ways": compare(pd.DataFrame(cells)), "whole_grid": whole}
    print_result(result)
    return write_result("trunk_cache", result, options, lm.device)


def measure(config: RunConfig, root: str, lm: PreTrainedModel) -> dict[str, Any]:
    """Train one cell; return its seconds, counted operations, class losses and predictions."""
    timer = StepTimer()
    started = time.perf_counter()
    run = train(config, root, callbacks=[timer])
    wall_seconds = time.perf_counter() - started
    flops = train_flops(
        lm,
        run.metrics["train_tokens"],
        run.metrics["sequences"]["train"]["lm_tokens"] * config.training.epochs,
        frozen_layers=config.model.freeze_layers,
        cached=config.training.cache_trunk,
    )
    return {
        "step_seconds": sum(timer.seconds),
        "wall_seconds": wall_seconds,
        "gflop": flops / 1e9,
        "tokens": run.metrics["train_tokens"],
        "class_losses": run.history["class_loss"].dropna().tolist(),
        "answers": [run.predictions(split)["prediction_id"].tolist() for split in run.metrics["splits"]],
    }


def compare(cells: pd.DataFrame) -> list[dict[str, Any]]:
    """Return one row per variant: totals, and for the cache its speed-ups and its differences from no cache."""
    by_way = {way: part.reset_index() for way, part in cells.groupby("way", sort=False)}
    rows = []
    for way, part in by_way.items():
        row = {"way": way, **part[["step_seconds", "wall_seconds", "gflop", "tokens"]].sum().to_dict()}
        if way.endswith(", cache"):
            uncached = by_way[way.replace(", cache", ", no cache")]
            for name, other in (("no_cache", uncached), ("full", by_way[FULL])):
                speedup, room, wall = (
                    other[column].sum() / part[column].sum() for column in ("step_seconds", "gflop", "wall_seconds")
                )
                row[f"faster_than_{name}"], row[f"room_over_{name}"] = speedup, room
                row[f"share_of_room_over_{name}"], row[f"faster_wall_than_{name}"] = speedup / room, wall
            losses = (cells["class_losses"].explode().to_numpy(float) for cells in (part, uncached))
            row["largest_class_loss_difference"] = float(abs(next(losses) - next(losses)).max())
            row["same_answers"] = part["answers"].tolist() == uncached["answers"].tolist()
        rows.append(row)
    return rows


def print_result(result: dict[str, Any]) -> None:
    """Print the seconds of each variant, and the speed-ups of the cache."""
    table = pd.DataFrame(result["ways"]).set_index("way")
    print(table[["step_seconds", "wall_seconds", "gflop"]].to_string(float_format="{:.1f}".format))
    for way, row in table.dropna().iterrows():
        for name in ("no_cache", "full"):
            print(
                f"{way}: speed-up over {name.replace('_', ' ')} {row[f'faster_than_{name}']:.2f}, of "
                f"{row[f'room_over_{name}']:.2f} by operations ({row[f'share_of_room_over_{name}']:.0%}); "
                f"{row[f'faster_wall_than_{name}']:.2f} by wall time"
            )
        same = "the same" if row["same_answers"] else "different"
        print(
            f"{way}: class losses differ by at most {row['largest_class_loss_difference']:.1e}, {same} predictions"
        )
    whole = result["whole_grid"]
    print(f"{whole['cells']} cells ({whole['way']}): {whole['wall_seconds']:.0f} s")


if __name__ == "__main__":
    main()
