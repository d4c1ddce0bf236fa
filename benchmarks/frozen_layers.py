"""Accuracy against the number of frozen layers: the pooled baseline of the ablations, several seeds.

    python -m benchmarks.frozen_layers [--layers 20 24 26 28] [--runs runs] [--out runs/bench]

With fewer layers to train a larger learning rate suits, so each number of layers gets the one that is best on dev.
A stopped grid resumes. Writes OUT/frozen_layers.json, a file of `tables.store_results`.
"""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from benchmarks.common import parse_args
from dhrd_lib.runs import load_run
from dhrd_lib.studies import ablations, tables
from dhrd_lib.studies.sweeps import Grid, sweep

FIELDS = ["freeze_layers", "learning_rate"]


def main(arguments: list[str] | None = None) -> pd.DataFrame:
    """Train the missing runs, write the JSON file, and print and return one row per number of layers and split."""
    options = parse_args(
        __doc__,
        arguments,
        task=("support_triage", "task name or data file"),
        backbone=("smollm2-135m", "name, hub id or folder"),
        layers=([20, 24, 26, 28], "frozen layers"),
        learning_rates=([3e-4, 1e-3], "learning rates to choose from"),
        seeds=([0, 1, 2], "training seeds"),
        rows=(208, "train rows"),
        runs=("runs", "folder of runs"),
    )
    base = ablations.task_base(options.task, backbone=options.backbone, max_train_rows=options.rows)
    values = {
        "training.alpha": (0.0,),
        "model.freeze_layers": tuple(options.layers),
        "training.learning_rate": tuple(options.learning_rates),
        "training.seed": tuple(options.seeds),
    }
    cells = sweep(Grid(name=f"ablation-{options.task}", grid=values, base=base), options.runs)
    table = tables.collect([load_run(Path(options.runs) / run) for run in cells["run"].unique()])
    Path(options.out).mkdir(parents=True, exist_ok=True)
    tables.store_results(table, Path(options.out) / "frozen_layers.json")
    chosen = by_layers(table)
    print(chosen.to_string(index=False, float_format="{:.4g}".format))
    return chosen


def by_layers(table: pd.DataFrame) -> pd.DataFrame:
    """Return one row per number of layers and final split, with the learning rate that dev chose."""
    summary = tables.summarize(table, FIELDS)
    dev = summary[summary["split"] == "dev"]
    best = dev.loc[dev.groupby("freeze_layers")["value"].idxmax(), FIELDS]
    seconds = table.drop_duplicates("run").groupby(FIELDS)["train_seconds"].mean().reset_index()
    return best.merge(summary[summary["split"] != "dev"]).merge(seconds)


if __name__ == "__main__":
    main()
