"""What int8 costs in accuracy: exports of trained runs on every row that they weren't trained on.

    python benchmarks/int8_accuracy.py runs/NAME [runs/OTHER ...] [--out runs/bench]

The runs must have the same rows, such as seeds or settings of one task. Writes OUT/int8_accuracy.json and prints
it. float32 is what each run's training stored. `benchmarks/inference.py` has the same comparison for one split,
beside the speed that int8 is taken for.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from dhrd_lib.runs import Run, environment, load_run, write_json
from dhrd_lib.serving.classifier import load_classifier
from dhrd_lib.serving.export import export
from dhrd_lib.studies.statistics import paired_comparison, points_interval
from dhrd_lib.tasks import load_rows

ENGINES = {"ONNX Runtime int8": "onnx", "OpenVINO int8": "openvino"}


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Export, answer, compare, print, and write the JSON file; returns what stands in it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", help="trained runs' folders")
    parser.add_argument("--out", default="runs/bench")
    options = parser.parse_args(arguments)
    runs = [load_run(folder) for folder in options.runs]
    labels, first = answers_of_training(runs[0])
    float32 = [first, *(answers_of_training(run)[1] for run in runs[1:])]
    result = {"runs": [run.name for run in runs], "rows": len(labels), "engines": {}}
    for name, format in ENGINES.items():
        int8 = [answers_of_export(run, format) for run in runs]
        result["engines"][name] = compared(labels, float32, int8)
        found = result["engines"][name]
        points = points_interval(*(found["accuracy_difference"][key] for key in ("difference", "low", "high")))
        others = f"{found['rows_with_another_label']} of {len(runs)} x {len(labels)} labels differ"
        print(f"{name}: {points} points, {others}")
    result["environment"] = environment(torch.device("cpu"))
    Path(options.out).mkdir(parents=True, exist_ok=True)
    write_json(Path(options.out) / "int8_accuracy.json", result)
    return result


def answers_of_training(run: Run) -> tuple[np.ndarray, np.ndarray]:
    """Gold labels and float32 predictions of all splits but train, by split and idx."""
    frames = [run.predictions(split).sort_values("idx") for split in sorted(run.metrics["splits"])]
    return tuple(np.concatenate([frame[name] for frame in frames]) for name in ("label_id", "prediction_id"))


def answers_of_export(run: Run, format: str) -> np.ndarray:
    """Predictions of a run's int8 export for the same rows, in the same order."""
    _, splits = load_rows(run.config.data)
    rows = [
        row for split in sorted(run.metrics["splits"]) for row in sorted(splits[split], key=lambda row: row["idx"])
    ]
    with tempfile.TemporaryDirectory() as scratch:
        classifier = load_classifier(export(run.folder, format, int8=True, out=Path(scratch) / format))
        return classifier.predict(rows).probabilities.argmax(1)


def compared(labels: np.ndarray, float32: list[np.ndarray], int8: list[np.ndarray]) -> dict[str, Any]:
    """int8 minus float32 over rows and runs, and how many labels differ."""
    return {
        "accuracy_difference": asdict(paired_comparison(["accuracy"], labels, float32, int8)),
        "accuracy_difference_by_run": [
            float((b == labels).mean() - (a == labels).mean()) for a, b in zip(float32, int8, strict=True)
        ],
        "rows_with_another_label": int(sum((a != b).sum() for a, b in zip(float32, int8, strict=True))),
    }


if __name__ == "__main__":
    main()
