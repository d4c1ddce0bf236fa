"""Accuracy against the number of frozen layers: the pooled baseline of the ablations, several seeds.

    python benchmarks/frozen_layers.py [--layers 20 24 26 28] [--runs runs] [--out runs/bench]

With fewer layers to train a larger learning rate suits, so that each number of layers has the one that does best on
dev. A grid that was stopped goes on. Writes OUT/frozen_layers.json, a file of `ablations.store_results`, and prints
one line a number of layers.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import pandas as pd

sys.path.insert(0, str(Path(__file__).parents[1]))

from dhrd_lib.runs import load_run
from dhrd_lib.studies import ablations
from dhrd_lib.studies.sweeps import Grid, sweep

FIELDS = ["freeze_layers", "learning_rate"]


def main(arguments: list[str] | None = None) -> pd.DataFrame:
    """Train what is missing, print, and write the JSON file; returns what is printed."""
    options = parse(arguments)
    base = ablations.base(options.task, backbone=options.backbone, max_train_rows=options.rows)
    grid = Grid(
        f"ablation-{options.task}",
        {
            "training.alpha": (0.0,),
            "model.freeze_layers": tuple(options.layers),
            "training.learning_rate": tuple(options.learning_rates),
            "training.seed": tuple(options.seeds),
        },
        base,
    )
    cells = sweep(grid, options.runs)
    table = ablations.collect([load_run(Path(options.runs) / run) for run in cells["run"].unique()])
    Path(options.out).mkdir(parents=True, exist_ok=True)
    ablations.store_results(table, Path(options.out) / "frozen_layers.json")
    chosen = by_layers(table)
    print(chosen.to_string(index=False, float_format="{:.4g}".format))
    return chosen


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command's options."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--task", default="support_triage")
    parser.add_argument("--backbone", default="smollm2-135m")
    parser.add_argument("--layers", type=int, nargs="+", default=[20, 24, 26, 28])
    parser.add_argument("--learning-rates", type=float, nargs="+", default=[3e-4, 1e-3])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rows", type=int, default=208, help="train rows")
    parser.add_argument("--runs", default="runs")
    parser.add_argument("--out", default="runs/bench")
    return parser.parse_args(arguments)


def by_layers(table: pd.DataFrame) -> pd.DataFrame:
    """A row a number of layers and final split: the learning rate that dev chose, and the metric with it."""
    found = ablations.summarise(table, FIELDS)
    dev = found[found["split"] == "dev"]
    best = dev.loc[dev.groupby("freeze_layers")["value"].idxmax(), FIELDS]
    seconds = table.drop_duplicates("run").groupby(FIELDS)["train_seconds"].mean().reset_index()
    return best.merge(found[found["split"] != "dev"]).merge(seconds)


if __name__ == "__main__":
    main()
