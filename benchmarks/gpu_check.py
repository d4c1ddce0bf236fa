"""Check on one GPU, in minutes: speed and memory first, then as many cells of the study as the time allows.

    python -m benchmarks.gpu_check [--minutes 8] [--workers 6] [--out runs/gpu]

Needs no network: backbone and data are packaged. Speed and memory are measured alone on the device: inference of
DHRD, baseline and CoT in bfloat16 (OUT/throughput.json), and training of DHRD and baseline, all weights and LoRA,
in bfloat16 autocast (OUT/gpu_train_step.json). Then `--workers` processes, as the small model leaves most of a
large GPU idle, train the study's settings on support_triage, seed by seed at 128 rows and after that at all rows.
Finished cells are in OUT/study_support_triage_gpu.json; those that run when `--minutes` are over are lost, and
another call with the same OUT trains what is missing. Give the learning rate, frozen layers and batch size that the
study chose.
"""

from __future__ import annotations

import multiprocessing
import tempfile
import time
import traceback
from pathlib import Path

from benchmarks import throughput
from benchmarks.common import in_own_process, parse_args, write_result
from benchmarks.study import SETTINGS, Cell, missing, stored, train_cell
from benchmarks.study_results import accuracy
from benchmarks.train_step import OURS, WAYS, measure
from dhrd_lib.backbones import resolve_device

TASK = "support_triage"


def main(arguments: list[str] | None = None) -> None:
    """Measure speed, train cells until the time is over, and print the accuracies."""
    options = parse_args(
        __doc__,
        arguments,
        minutes=(8.0, "time limit in all"),
        workers=(6, "processes that train the study's cells"),
        backbone=("smollm2-135m", "name, hub id or folder"),
        settings=(list(SETTINGS), "of the study"),
        sizes=([128, 875], "train rows of the study's cells"),
        seeds=(5, "seeds per setting and size"),
        learning_rate=(2e-4, "of the study's cells"),
        freeze_layers=(12, "of the study's cells"),
        batch_size=(8, "of the study's cells"),
        max_steps=(0, "of the study's cells; 0 is the study's epochs"),
        rows=(128, "rows of the training step's measurement"),
        queries=(500, "texts of the inference's measurement"),
        max_new_tokens=(256, "of CoT"),
    )
    limits = {name: getattr(options, name) for name in ("backbone", "queries", "max_new_tokens", "out")}
    throughput.main([f"--{name.replace('_', '-')}={value}" for name, value in limits.items()])
    ways = [way for way in WAYS if way.by == OURS and way.batches == 1]
    measured = [{"way": way.name, **in_own_process(measure, way, options)} for way in ways]
    write_result("gpu_train_step", {"ways": measured}, options, resolve_device(None))

    fields = {"model.backbone": options.backbone, "model.freeze_layers": options.freeze_layers}
    for name in ("learning_rate", "batch_size", "max_steps"):
        fields[f"training.{name}"] = getattr(options, name)
    cells = [
        Cell(setting, rows, seed, SETTINGS[setting] | fields)
        for rows in options.sizes
        for seed in range(options.seeds)
        for setting in options.settings
    ]
    path = Path(options.out) / f"study_{TASK}_gpu.json"
    with tempfile.TemporaryDirectory() as runs:
        start = multiprocessing.get_context("spawn").Process
        workers = [start(target=train_cells, args=(cells, runs, path)) for _ in range(options.workers)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join(max(options.started + 60 * options.minutes - time.perf_counter(), 0))
        for worker in workers:
            worker.terminate()
            worker.join()
    table = stored(path)
    print(f"{len(cells) - len(missing(cells, table))} of {len(cells)} cells; accuracy on test:")
    if len(table):
        print(accuracy(table).T.to_string())


def train_cells(cells: list[Cell], runs: str, path: Path) -> None:
    """Train the cells that have no result and that no other worker trains; show the error of one that fails."""
    for cell in cells:
        try:
            train_cell(cell, {"data.task": TASK}, Path(runs), path)
        except Exception:  # A check shows which settings work here.
            print(cell.name, traceback.format_exc(), flush=True)


if __name__ == "__main__":
    main()
