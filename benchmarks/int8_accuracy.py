"""Accuracy cost of int8: exports of trained runs on every row that they weren't trained on.

    python -m benchmarks.int8_accuracy runs/NAME [runs/OTHER ...] [--out runs/bench]

The runs must share their rows, such as seeds or settings of one task. Writes OUT/int8_accuracy.json. The float32
predictions are those that training stored. `benchmarks.inference` compares one split, with the speed.
"""

from __future__ import annotations

import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import parse_args, write_result
from dhrd_lib.runs import Run, load_run
from dhrd_lib.serving.classifier import load_classifier
from dhrd_lib.serving.export import export
from dhrd_lib.studies.statistics import paired_comparison, points_interval
from dhrd_lib.tasks import load_rows

ENGINES = {"ONNX Runtime int8": "onnx", "OpenVINO int8": "openvino"}


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Export, predict, compare, print, and write the JSON file; return its contents."""
    options = parse_args(__doc__, arguments, runs=(..., "folders of trained runs"))
    runs = [load_run(folder) for folder in options.runs]
    labels, first = stored_predictions(runs[0])
    float32 = [first, *(stored_predictions(run)[1] for run in runs[1:])]
    result = {"runs": [run.name for run in runs], "rows": len(labels), "engines": {}}
    for name, format in ENGINES.items():
        int8 = [export_predictions(run, format) for run in runs]
        changed = [a != b for a, b in zip(float32, int8, strict=True)]
        result["engines"][name] = engine = {
            "accuracy_difference": asdict(paired_comparison(["accuracy"], labels, float32, int8)),
            "accuracy_difference_by_run": [
                float((b == labels).mean() - (a == labels).mean()) for a, b in zip(float32, int8, strict=True)
            ],
            "rows_with_another_label": int(np.sum(changed)),
        }
        points = points_interval(*(engine["accuracy_difference"][key] for key in ("difference", "low", "high")))
        print(f"{name}: {points} points, {np.sum(changed)} of {len(runs)} x {len(labels)} labels differ")
    return write_result("int8_accuracy", result, options)


def stored_predictions(run: Run) -> tuple[np.ndarray, np.ndarray]:
    """Return gold labels and float32 predictions (class indices) of all splits but train, by split and idx."""
    frames = [run.predictions(split).sort_values("idx") for split in sorted(run.metrics["splits"])]
    return tuple(np.concatenate([frame[name] for frame in frames]) for name in ("label_id", "prediction_id"))


def export_predictions(run: Run, format: str) -> np.ndarray:
    """Return the predictions (class indices) of a run's int8 export for the same rows, in the same order."""
    _, splits = load_rows(run.config.data)
    rows = [
        row for split in sorted(run.metrics["splits"]) for row in sorted(splits[split], key=lambda row: row["idx"])
    ]
    with tempfile.TemporaryDirectory() as scratch:
        classifier = load_classifier(export(run.folder, format, int8=True, out=Path(scratch) / format))
        return classifier.predict(rows).probabilities.argmax(1)


if __name__ == "__main__":
    main()
