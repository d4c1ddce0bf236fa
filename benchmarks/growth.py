"""Growth: time and memory against the number of rows, the length of a sequence and the number of labels.

    python -m benchmarks.growth [--backbone tiny] [--out runs/bench]

Rows and labels are synthetic, on a tiny random backbone, so that the library's handling of them is measured;
`--backbone` is for the lengths. Each point is measured in its own process; the memory added is the peak, sampled
every 20 ms, above what the process held just before. Writes OUT/growth.json and OUT/growth.html, on log axes, with
each line's slope.
"""

from __future__ import annotations

import json
import random
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import plotly.express as px
import plotly.graph_objects as go
from transformers import TrainerCallback

from benchmarks.common import in_own_process, parse_args, write_result
from benchmarks.compute import classify, random_batch
from benchmarks.harness import memory_added, timed
from dhrd_lib.backbones import resolve_device
from dhrd_lib.config import DataConfig, ModelConfig, RunConfig, TrainingConfig
from dhrd_lib.data.files import read_table
from dhrd_lib.evaluation import task_metrics
from dhrd_lib.modeling import DHRDModel, build_model
from dhrd_lib.sequences import encode_split
from dhrd_lib.studies import plots
from dhrd_lib.studies.statistics import bootstrap_interval
from dhrd_lib.tasks import load_rows, load_task
from dhrd_lib.training import train

WORDS = [first + second for first in "bdfgklmnprst" for second in ("ale", "ime", "one", "ute", "art")]
TEXT_WORDS, RATIONALE_WORDS = 12, 12
ROWS_WITH_LABELS = 4000  # four per label where there are a thousand labels
MIN_MIB = 1.0  # less is noise of the interpreter
MEASURES = {"seconds": "seconds", "added_mib": "memory added (MiB)"}

Timing = tuple[float, float]  # seconds, and memory added in MiB


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Measure, print, and write the JSON file and the page; return the file's contents."""
    options = parse_args(
        __doc__,
        arguments,
        backbone=("tiny", "of the lengths; rows and labels use the tiny one"),
        rows=([1_000, 10_000, 100_000], "numbers of rows"),
        lengths=([64, 128, 256, 512, 1024, 2048], "tokens per sequence"),
        labels=([2, 10, 100, 1000], "numbers of labels"),
    )
    sizes = {"rows": options.rows, "tokens": options.lengths, "labels": options.labels}
    points = [
        in_own_process(measure, factor, what, size, options.backbone)
        for factor, what in POINTS
        for size in sizes[factor]
    ]
    table = pd.DataFrame(points)
    slopes = [
        {
            "factor": factor,
            "what": what,
            **{f"{name}_slope": log_slope(part["size"], part[name]) for name in MEASURES},
        }
        for (factor, what), part in table.groupby(["factor", "what"], sort=False)
    ]
    for row in slopes:
        powers = ("—" if row[f"{name}_slope"] is None else f"{row[f'{name}_slope']:.2f}" for name in MEASURES)
        print("{what} by {factor}: slope of seconds {}, of memory {}".format(*powers, **row))
    result = {"points": points, "slopes": slopes, "words_per_row": TEXT_WORDS + RATIONALE_WORDS, "min_mib": MIN_MIB}
    return write_result("growth", result, options, resolve_device(None), growth_lines(table))


def measure(factor: str, what: str, size: int, backbone: str) -> dict[str, Any]:
    """Return the seconds and added memory of one point; memory below `MIN_MIB` is None."""
    with tempfile.TemporaryDirectory() as folder:
        seconds, added = POINTS[factor, what](size, Path(folder), backbone)
    print(f"{what}, {size:,} {factor}: {seconds:.3g} s", flush=True)
    added_mib = added if added >= MIN_MIB else None
    return {"factor": factor, "what": what, "size": size, "seconds": seconds, "added_mib": added_mib}


def time_and_memory(call: Callable[[], Any], repeats: int = 1, warm_up: bool = False) -> Timing:
    """Return the median seconds of a call, and the memory that it and its warm-up add."""
    device = resolve_device(None)
    with memory_added(device) as added_mib:
        seconds = [timed(device, call)[0] for _ in range(repeats + warm_up)]
    return float(np.median(seconds[warm_up:])), added_mib[0]


# ---------------------------------------------------------------------- rows and labels


def write_table(folder: Path, rows: int, labels: int = 4) -> Path:
    """Write a JSONL file of random words with balanced labels; return its path."""
    rng = random.Random(0)
    path = folder / "rows.jsonl"
    with path.open("w", encoding="utf-8") as file:
        for place in range(rows):
            text, rationale = (" ".join(rng.choices(WORDS, k=k)) for k in (TEXT_WORDS, RATIONALE_WORDS))
            row = {"text": text, "label": f"label {place % labels}", "rationale": rationale}
            file.write(json.dumps(row) + "\n")
    return path


def run_config(path: Path) -> RunConfig:
    """Return the configuration of one DHRD epoch on the tiny backbone."""
    return RunConfig(
        model=ModelConfig(backbone="tiny"),
        data=DataConfig(task=str(path)),
        training=TrainingConfig(epochs=1, keep_model=False),
    )


def reading(rows: int, folder: Path, _: str) -> Timing:
    """Read a file as a task with its splits."""
    config = run_config(write_table(folder, rows)).data
    return time_and_memory(lambda: load_rows(config))


def encoding(rows: int, folder: Path, _: str) -> Timing:
    """Encode the train split as token ids."""
    task, splits = load_rows(run_config(write_table(folder, rows)).data)
    fmt = build_model(ModelConfig(backbone="tiny"), task).sequence_format
    return time_and_memory(lambda: encode_split(splits["train"], fmt, task.verbalizers, with_rationale=True))


class FirstStep(Exception):
    """Raised when training reaches its first step."""


class StopAtFirstStep(TrainerCallback):
    """Stop a training before its first step."""

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        """Raise `FirstStep`."""
        raise FirstStep


def start_up(rows: int, folder: Path, _: str, labels: int = 4) -> Timing:
    """Start a training: reading, encoding, model, sampler and optimizer."""
    config = run_config(write_table(folder, rows, labels))

    def start() -> None:
        try:
            train(config, folder, callbacks=[StopAtFirstStep()])
        except FirstStep:
            return

    return time_and_memory(start)


def prediction(rows: int, folder: Path, _: str) -> Timing:
    """Classify every text of a file, reading included."""
    path = write_table(folder, rows)
    model = tiny_model(folder, labels=4)
    return time_and_memory(lambda: model.predict(read_table(path)))


def tiny_model(folder: Path, labels: int) -> DHRDModel:
    """Return a tiny untrained classifier."""
    (folder / "task").mkdir()
    task, _ = load_task(str(write_table(folder / "task", 4 * labels, labels)))
    return build_model(ModelConfig(backbone="tiny"), task)


def random_labels(labels: int) -> np.ndarray:
    """Return random gold labels and predictions (2, N)."""
    return np.random.default_rng(0).integers(labels, size=(2, ROWS_WITH_LABELS))


# ---------------------------------------------------------------------- steps


def untrained(backbone: str) -> DHRDModel:
    """Return an untrained two-class model on the backbone of the lengths."""
    task, _ = load_task("everyday_nli")
    return build_model(ModelConfig(backbone=backbone), task)


def time_step(model: DHRDModel, rows: int, tokens: int, repeats: int) -> Timing:
    """Time both losses and their gradients without the optimizer; half of each row is input."""
    batch = random_batch(model, rows, tokens)
    batch["input_mask"] = batch["attention_mask"].clone()
    batch["input_mask"][:, tokens // 2 :] = 0
    batch["class_labels"] = batch["input_ids"].new_zeros(rows)
    model.train()

    def step() -> None:
        model.zero_grad()
        model(**batch, lm_labels=batch["input_ids"]).loss.backward()

    return time_and_memory(step, repeats, warm_up=True)


def time_classify(model: DHRDModel, rows: int, tokens: int, repeats: int) -> Timing:
    """Time the class logits alone."""
    batch = random_batch(model.eval(), rows, tokens)
    return time_and_memory(lambda: classify(model, batch), repeats, warm_up=True)


POINTS: dict[tuple[str, str], Callable[[int, Path, str], Timing]] = {
    ("rows", "reading"): reading,
    ("rows", "encoding"): encoding,
    ("rows", "training start-up"): start_up,
    ("rows", "prediction"): prediction,
    ("tokens", "DHRD step"): lambda tokens, _, backbone: time_step(untrained(backbone), 1, tokens, 3),
    ("tokens", "classify"): lambda tokens, _, backbone: time_classify(untrained(backbone), 1, tokens, 3),
    ("labels", "training start-up"): lambda n, folder, _: start_up(ROWS_WITH_LABELS, folder, _, n),
    ("labels", "DHRD step"): lambda n, folder, _: time_step(tiny_model(folder, n), 16, 80, 5),
    ("labels", "classify"): lambda n, folder, _: time_classify(tiny_model(folder, n), 16, 80, 5),
    ("labels", "metrics"): lambda n, *_: time_and_memory(
        lambda: task_metrics(["accuracy", "macro_f1"], *random_labels(n))
    ),
    ("labels", "bootstrap"): lambda n, *_: time_and_memory(
        lambda: bootstrap_interval(["macro_f1"], *random_labels(n), n_resamples=200)
    ),
}


# ---------------------------------------------------------------------- slopes


def log_slope(sizes: pd.Series, values: pd.Series) -> float | None:
    """Return the power with which values grow with sizes: least squares on the logs.

    None for fewer than two points, and where a value is missing: a slope of the others isn't the line's.
    """
    if len(sizes) < 2 or values.isna().any():
        return None
    return float(np.polyfit(np.log(sizes.astype(float)), np.log(values.astype(float)), 1)[0])


def growth_lines(points: pd.DataFrame) -> go.Figure:
    """Draw seconds and memory against size on log axes: a column per factor, a line per measured call.

    `points` has the columns factor, what, size, seconds and added_mib (missing where too small). The legend gives
    the `log_slope` of each line: 1 is proportional, 2 quadratic.
    """
    table = points.melt(["factor", "what", "size"], list(MEASURES), "measure").dropna(subset="value")
    lines = {}
    for (factor, what), part in points.groupby(["factor", "what"]):
        slopes = [log_slope(part["size"], part[name]) for name in MEASURES]
        lines[factor, what] = f"{what} by {factor}: " + ", ".join("—" if s is None else f"{s:.2f}" for s in slopes)
    table["line"] = [lines[key] for key in zip(table["factor"], table["what"], strict=True)]
    table["measure"] = table["measure"].map(MEASURES)
    figure = px.line(
        table,
        x="size",
        y="value",
        color="line",
        symbol="line",
        facet_col="factor",
        facet_row="measure",
        log_x=True,
        log_y=True,
        markers=True,
        labels={"line": "slope of seconds, of memory"},
        title="What do more rows, longer sequences and more labels cost? Log axes, slope by least squares",
        template=plots.TEMPLATE,
        height=760,
    )
    figure.for_each_annotation(lambda note: note.update(text=note.text.split("=")[1]))
    figure.update_xaxes(matches=None, title=None, showticklabels=True)
    figure.update_yaxes(matches=None, title=None, showticklabels=True)
    legend = {"orientation": "v", "x": 1.06, "y": 1, "yanchor": "top"}
    return figure.update_layout(legend=legend, margin={"t": 70, "r": 30, "b": 40})


if __name__ == "__main__":
    main()
