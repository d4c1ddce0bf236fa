"""Growth: time and memory against the number of rows, the length of a sequence and the number of labels.

    python benchmarks/growth.py [--backbone tiny] [--out runs/bench]

Rows and labels are synthetic, on a tiny random backbone, so that what is measured is the library's handling of
them; `--backbone` is that of the lengths. Each point is measured in a process of its own; the memory added is the
most that the process held meanwhile, looked at every 20 ms, less what it held just before. Writes OUT/growth.json
and OUT/growth.html, on log axes, with each line's slope.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import random
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from transformers import TrainerCallback

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.harness import memory_added, synchronise
from dhrd_lib.backbones import load_backbone, resolve_device
from dhrd_lib.config import DataConfig, ModelConfig, RunConfig, TrainingConfig
from dhrd_lib.evaluation import task_metrics
from dhrd_lib.modeling import DHRDModel, build_model
from dhrd_lib.runs import environment, write_json
from dhrd_lib.sequences import encode_split
from dhrd_lib.studies import plots
from dhrd_lib.studies.statistics import bootstrap_interval
from dhrd_lib.tasks import load_rows, load_task, read_rows
from dhrd_lib.training import train

WORDS = [first + second for first in "bdfgklmnprst" for second in ("ale", "ime", "one", "ute", "art")]
TEXT_WORDS, RATIONALE_WORDS = 12, 12
ROWS_WITH_LABELS = 4000  # four of each, where there are a thousand labels
LEAST_MIB = 1.0  # less can't be told from what an interpreter needs anyway


class Point(NamedTuple):
    """One measurement: of what, by which factor, at which size."""

    factor: str
    what: str
    size: int


class FirstStep(Exception):
    """Training has come to its first step."""


class StopAtFirstStep(TrainerCallback):
    """Ends a training before its first step."""

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        """Raise `FirstStep`."""
        raise FirstStep


def main(arguments: list[str] | None = None) -> dict:
    """Measure, print, and write the JSON file and the page; returns what stands in the file."""
    options = parse(arguments)
    started = time.perf_counter()
    found = [in_own_process(point, options) for point in points(options)]
    table = pd.DataFrame(found)
    result = {
        "points": found,
        "slopes": slopes(table),
        "settings": {**vars(options), "words_a_row": TEXT_WORDS + RATIONALE_WORDS, "least_mib": LEAST_MIB},
        "environment": environment(resolve_device(None)),
        "seconds": time.perf_counter() - started,
    }
    write(result, table, Path(options.out))
    return result


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command's options."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backbone", default="tiny", help="of the lengths; rows and labels take the tiny one")
    parser.add_argument("--rows", type=int, nargs="+", default=[1_000, 10_000, 100_000])
    parser.add_argument("--lengths", type=int, nargs="+", default=[64, 128, 256, 512, 1024, 2048])
    parser.add_argument("--labels", type=int, nargs="+", default=[2, 10, 100, 1000])
    parser.add_argument("--out", default="runs/bench")
    return parser.parse_args(arguments)


def points(options: argparse.Namespace) -> list[Point]:
    """Every measurement, the small ones of a line first."""
    sizes = {"rows": options.rows, "tokens": options.lengths, "labels": options.labels}
    return [Point(factor, what, size) for factor, what in MEASURES for size in sizes[factor]]


def in_own_process(point: Point, options: argparse.Namespace) -> dict[str, Any]:
    """The measurement in a process that has imported the libraries, and done nothing else."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["dhrd_lib.training", "dhrd_lib.studies.plots"])
    with ProcessPoolExecutor(1, context) as executor:
        found = executor.submit(measure, point, options.backbone).result()
    print(f"{point.what}, {point.size:,} {point.factor}: {found['seconds']:.3g} s", flush=True)
    return found


def measure(point: Point, backbone: str) -> dict[str, Any]:
    """Seconds and added memory of a point; None for memory too little to tell."""
    with tempfile.TemporaryDirectory() as folder:
        seconds, added = MEASURES[point.factor, point.what](point.size, Path(folder), backbone)
    return {**point._asdict(), "seconds": seconds, "added_mib": added if added >= LEAST_MIB else None}


def timed(call: Callable[[], Any], repeats: int = 1, warm_up: bool = False) -> tuple[float, float]:
    """Median seconds of a call, and the most memory that it and its warm-up held above the start's, in MiB."""
    device, seconds = resolve_device(None), []
    with memory_added(device) as added_mib:
        for _ in range(repeats + warm_up):
            synchronise(device)
            started = time.perf_counter()
            call()
            synchronise(device)
            seconds.append(time.perf_counter() - started)
    return float(np.median(seconds[warm_up:])), added_mib[0]


# ---------------------------------------------------------------------- rows and labels


def write_table(folder: Path, rows: int, labels: int = 4) -> Path:
    """A JSONL file of random words, with as many rows of each label."""
    drawn = random.Random(0)
    path = folder / "rows.jsonl"
    with path.open("w", encoding="utf-8") as file:
        for place in range(rows):
            text, rationale = (" ".join(drawn.choices(WORDS, k=k)) for k in (TEXT_WORDS, RATIONALE_WORDS))
            row = {"text": text, "label": f"label {place % labels}", "rationale": rationale}
            file.write(json.dumps(row) + "\n")
    return path


def run_config(path: Path) -> RunConfig:
    """One epoch of DHRD on the tiny backbone."""
    return RunConfig(
        model=ModelConfig(backbone="tiny"),
        data=DataConfig(task=str(path)),
        training=TrainingConfig(epochs=1, keep_model=False),
    )


def reading(rows: int, folder: Path, _: str) -> tuple[float, float]:
    """The file, as a task with its splits."""
    config = run_config(write_table(folder, rows)).data
    return timed(lambda: load_rows(config))


def encoding(rows: int, folder: Path, _: str) -> tuple[float, float]:
    """The train split, as token ids; its memory is that of the encoding, above that of the rows."""
    config = run_config(write_table(folder, rows)).data
    task, splits = load_rows(config)
    fmt = build_model(ModelConfig(backbone="tiny"), task).sequence_format
    return timed(lambda: encode_split(splits["train"], fmt, task.verbalizers, with_rationale=True))


def start_up(rows: int, folder: Path, _: str, labels: int = 4) -> tuple[float, float]:
    """A training up to its first step: reading, encoding, model, sampler and optimiser."""
    config = run_config(write_table(folder, rows, labels))

    def start() -> None:
        try:
            train(config, folder, callbacks=[StopAtFirstStep()])
        except FirstStep:
            return

    return timed(start)


def prediction(rows: int, folder: Path, _: str) -> tuple[float, float]:
    """The labels and probabilities of every text of a file, reading included."""
    path = write_table(folder, rows)
    model = tiny_model(folder, labels=4)
    return timed(lambda: model.predict(read_rows(path)))


def tiny_model(folder: Path, labels: int) -> DHRDModel:
    """A tiny untrained classifier."""
    (folder / "task").mkdir()
    task, _ = load_task(str(write_table(folder / "task", 4 * labels, labels)))
    return build_model(ModelConfig(backbone="tiny"), task)


def start_up_by_labels(labels: int, folder: Path, backbone: str) -> tuple[float, float]:
    """As `start_up`, with a number of rows that doesn't grow."""
    return start_up(ROWS_WITH_LABELS, folder, backbone, labels)


def step_by_labels(labels: int, folder: Path, _: str) -> tuple[float, float]:
    """One training step of 16 rows of 80 tokens."""
    model = tiny_model(folder, labels)
    return timed(training_step(model, 16, 80), repeats=5, warm_up=True)


def classify_by_labels(labels: int, folder: Path, _: str) -> tuple[float, float]:
    """`classify` of 16 rows of 80 tokens."""
    model = tiny_model(folder, labels)
    return timed(classification(model, 16, 80), repeats=5, warm_up=True)


def metrics_by_labels(labels: int, _: Path, __: str) -> tuple[float, float]:
    """Accuracy and macro-F1 of 4000 answers."""
    gold, said = answers(labels)
    return timed(lambda: task_metrics(["accuracy", "macro_f1"], gold, said))


def interval_by_labels(labels: int, _: Path, __: str) -> tuple[float, float]:
    """The bootstrap interval of macro-F1 over 4000 answers, with 200 resamples."""
    gold, said = answers(labels)
    return timed(lambda: bootstrap_interval(["macro_f1"], gold, said, n_resamples=200))


def answers(labels: int) -> np.ndarray:
    """Random labels and predictions `(2, N)`."""
    return np.random.default_rng(0).integers(labels, size=(2, ROWS_WITH_LABELS))


# ---------------------------------------------------------------------- lengths


def step_by_length(tokens: int, folder: Path, backbone: str) -> tuple[float, float]:
    """Forward and backward pass of one DHRD row, half of it input."""
    return timed(training_step(long_model(backbone), 1, tokens), repeats=3, warm_up=True)


def classify_by_length(tokens: int, folder: Path, backbone: str) -> tuple[float, float]:
    """`classify` of one input."""
    return timed(classification(long_model(backbone), 1, tokens), repeats=3, warm_up=True)


def long_model(backbone: str) -> DHRDModel:
    """An untrained two-class model on the backbone of the lengths."""
    task, _ = load_task("everyday_nli")
    return build_model(ModelConfig(backbone=backbone), task, backbone=load_backbone(backbone))


def random_batch(model: DHRDModel, rows: int, tokens: int) -> dict[str, torch.Tensor]:
    """Rows of random ids without padding."""
    ids = torch.randint(5, model.backbone.config.vocab_size - 5, (rows, tokens), device=model.device)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def training_step(model: DHRDModel, rows: int, tokens: int) -> Callable[[], None]:
    """Both losses and their gradients, without the optimiser."""
    batch = random_batch(model, rows, tokens)
    input_mask = batch["attention_mask"].clone()
    input_mask[:, tokens // 2 :] = 0
    labels = torch.zeros(rows, dtype=torch.long, device=model.device)
    model.train()

    def step() -> None:
        model.zero_grad()
        out = model(**batch, input_mask=input_mask, class_labels=labels, lm_labels=batch["input_ids"])
        out.loss.backward()

    return step


def classification(model: DHRDModel, rows: int, tokens: int) -> Callable[[], None]:
    """Class logits alone."""
    batch = random_batch(model, rows, tokens)
    model.eval()

    def classify() -> None:
        with torch.inference_mode():
            model.classify(**batch)

    return classify


MEASURES: dict[tuple[str, str], Callable[[int, Path, str], tuple[float, float]]] = {
    ("rows", "reading"): reading,
    ("rows", "encoding"): encoding,
    ("rows", "training start-up"): start_up,
    ("rows", "prediction"): prediction,
    ("tokens", "DHRD step"): step_by_length,
    ("tokens", "classify"): classify_by_length,
    ("labels", "training start-up"): start_up_by_labels,
    ("labels", "DHRD step"): step_by_labels,
    ("labels", "classify"): classify_by_labels,
    ("labels", "metrics"): metrics_by_labels,
    ("labels", "bootstrap"): interval_by_labels,
}


# ---------------------------------------------------------------------- what is written


def slopes(table: pd.DataFrame) -> list[dict[str, Any]]:
    """The power with which seconds and memory grow, for each line."""
    found = []
    for (factor, what), part in table.groupby(["factor", "what"], sort=False):
        row = {"factor": factor, "what": what}
        for measure in ("seconds", "added_mib"):
            row[f"{measure}_slope"] = plots.log_slope(part["size"], part[measure])
        found.append(row)
    return found


def write(result: dict, table: pd.DataFrame, folder: Path) -> None:
    """The JSON file, the page, and what is printed."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "growth.json", result)
    plots.growth_lines(table).write_html(folder / "growth.html", include_plotlyjs=True)
    for row in result["slopes"]:
        line = f"{row['what']} by {row['factor']}: seconds grow with the power {row['seconds_slope'] or 0:.2f}"
        memory = row["added_mib_slope"]
        print(line + (f", memory with {memory:.2f}" if memory is not None else ", memory is too little to tell"))
    print(f"{result['seconds']:.0f} s in all; {folder / 'growth.json'}, {folder / 'growth.html'}")


if __name__ == "__main__":
    main()
