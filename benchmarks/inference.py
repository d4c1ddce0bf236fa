"""Inference engines on one trained classifier: torch, transformers' pipeline, ONNX Runtime, OpenVINO, in one run.

    python -m benchmarks.inference --run runs/NAME [--split test] [--rounds 5] [--out runs/bench]

Writes OUT/inference.json. Every engine classifies the whole split in turns with the others, so speed and accuracy
come from the same predictions; start-up is that of a fresh process up to its first prediction. All are measured in
float32 and int8, as they have it, and in bfloat16 where the processor is faster at it; each at its best batch size.
Without --run an untrained backbone is measured on fewer texts: speed doesn't depend on the weights' values.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from onnx import TensorProto, helper, numpy_helper

from benchmarks.common import parse_args, write_result
from benchmarks.compute import linear_shapes, matmul_peak
from benchmarks.harness import MIB, Measurement, System, measure, pipeline_system, pooled_system, ratio, timed
from dhrd_lib.backbones import autocast_if_faster
from dhrd_lib.config import ModelConfig
from dhrd_lib.inputs import MAX_TOKENS_PER_CPU_BATCH
from dhrd_lib.modeling import DHRDModel, build_model
from dhrd_lib.runs import load_run
from dhrd_lib.serving.classifier import classifier_folder, load_classifier, openvino_engine
from dhrd_lib.serving.export import export
from dhrd_lib.studies.statistics import paired_comparison, points_interval
from dhrd_lib.tasks import load_rows, load_task

EXPORTS = {"ONNX Runtime": ("onnx", False), "OpenVINO": ("openvino", False)}
EXPORTS |= {f"{name} int8": (format, True) for name, (format, _) in EXPORTS.items()}
FIRST_PREDICTION = (
    "import json, sys; from dhrd_lib.serving.classifier import load_classifier; "
    "load_classifier(sys.argv[1]).predict([json.loads(sys.argv[2])])"
)


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Measure, print, and write the JSON file; return its contents."""
    options = parse_args(
        __doc__,
        arguments,
        run=("", "folder of a trained run"),
        split=("test", "split to classify"),
        rows=(0, "maximum number of rows; 0 is all, and 60 without --run"),
        rounds=(5, "rounds that the rows are split into"),
        latency_queries=(12, "rows classified one at a time"),
        backbone=("smollm2-135m", "without --run"),
    )
    with tempfile.TemporaryDirectory() as scratch:
        source, rows, labels = model_and_rows(options, Path(scratch))
        folders = {"torch": classifier_folder(source)}
        for name, (format, int8) in EXPORTS.items():
            folders[name] = export(source, format, int8=int8, out=Path(scratch) / f"{format}-{int8}")
        sizes = {name: folder_mib(folder) for name, folder in folders.items()}
        model = DHRDModel.from_pretrained(folders["torch"], dtype=torch.float32)
        results = measure(
            systems(model, folders, sizes), rows, rounds=options.rounds, latency_queries=options.latency_queries
        )
        result = {
            "weights": Path(options.run).name if options.run else "untrained",
            "rows": len(rows),
            "engines": [{**one.row(), "folder_mib": sizes.get(one.system.name)} for one in results],
            "to_torch": {one.system.name: compare(results[0], one, labels) for one in results[1:]},
            "start_seconds": {name: start_seconds(folders[name], rows[0]) for name in folders},
            "start_seconds_empty_cache": {
                name: start_seconds(folders[name], rows[0], empty_cache=True) for name in EXPORTS
            },
            "gflop_per_second": {
                "torch float32": matmul_peak(model, tokens=MAX_TOKENS_PER_CPU_BATCH),
                "ONNX Runtime float32": onnx_matmul_peak(model),
                "ONNX Runtime int8": onnx_matmul_peak(model, int8=True),
            },
        }
    print_result(result)
    return write_result("inference", result, options)


def model_and_rows(options: argparse.Namespace, scratch: Path) -> tuple[Path, list[dict[str, Any]], np.ndarray]:
    """Return the model's folder, and the rows and gold labels of the split (of support_triage without a run)."""
    if options.run:
        _, splits = load_rows(load_run(options.run).config.data)
        folder, n_rows = Path(options.run), options.rows
    else:
        task, splits = load_task("support_triage")
        folder, n_rows = scratch / "model", options.rows or 60
        build_model(ModelConfig(backbone=options.backbone, device="cpu"), task).save_pretrained(folder)
    rows = splits[options.split].to_list()[: n_rows or None]
    return folder, rows, np.array([row["label"] for row in rows])


def systems(model: DHRDModel, folders: dict[str, Path], sizes: dict[str, float]) -> list[System]:
    """Return torch, the pipeline and the exports in float32 and int8, and in bfloat16 where that is faster here."""
    cpu = {"device": torch.device("cpu")}
    exported = {name: load_classifier(folders[name]) for name in EXPORTS}
    found = [pooled_system("torch", model), pipeline_system("pipeline", model)]
    found += [pooled_system(name, of, weights=sizes[name], **cpu) for name, of in exported.items()]
    halved = DHRDModel.from_pretrained(folders["torch"], dtype=torch.float32)
    autocast_if_faster(halved.backbone)
    if getattr(halved.backbone, "has_autocast", False):
        engine = openvino_engine(folders["OpenVINO"], "bf16")
        openvino = replace(exported["OpenVINO"], engine=engine)
        found += [
            pooled_system("torch bfloat16", halved),
            pipeline_system("pipeline bfloat16", model, dtype=torch.bfloat16),
            pooled_system("OpenVINO bfloat16", openvino, weights=sizes["OpenVINO"], **cpu),
        ]
    return found


def folder_mib(folder: Path) -> float:
    """Return the size of the weights and the graph on disk in MiB."""
    return sum(file.stat().st_size for file in folder.rglob("*model*") if file.is_file()) / MIB


def compare(reference: Measurement, engine: Measurement, labels: np.ndarray) -> dict[str, Any]:
    """Compare an engine's speed, logits, labels and accuracy with torch's on the same rows."""
    logits = [np.zeros((len(labels), result.answers[0].shape[1]), np.float32) for result in (reference, engine)]
    for into, result in zip(logits, (reference, engine), strict=True):
        for number, answers in enumerate(result.answers):  # round r classified rows[r::rounds]
            into[number :: len(result.answers)] = answers
    expected, predicted = (values.argmax(1) for values in logits)
    return {
        "queries_per_second_ratio": ratio(engine, reference),
        "largest_logit_difference": float(np.abs(logits[0] - logits[1]).max()),
        "rows_with_another_label": int((expected != predicted).sum()),
        "accuracy": float((predicted == labels).mean()),
        "accuracy_difference": asdict(paired_comparison(["accuracy"], labels, expected, predicted)),
    }


def start_seconds(folder: Path, row: dict[str, Any], times: int = 3, empty_cache: bool = False) -> float:
    """Return the median wall time of a fresh process that loads a classifier and classifies one row.

    An export leaves what its engine compiles in the cache; an empty cache is what another machine has.
    """
    fields = json.dumps({key: value for key, value in row.items() if isinstance(value, str)})
    seconds = []
    for _ in range(times):
        with tempfile.TemporaryDirectory() as scratch:
            env = {**os.environ, "DHRD_CACHE": scratch} if empty_cache else None
            started = time.perf_counter()
            command = [sys.executable, "-c", FIRST_PREDICTION, str(folder), fields]
            subprocess.run(command, check=True, stderr=subprocess.DEVNULL, env=env)
            seconds.append(time.perf_counter() - started)
    return float(np.median(seconds))


def onnx_matmul_peak(model: DHRDModel, int8: bool = False, repeats: int = 6) -> dict[str, float]:
    """Return GFLOP/s of ONNX Runtime's matrix products by shape, as `matmul_peak` does for torch.

    int8 quantizes the activations on the fly; its rates bound the speed-up that int8 can have.
    """
    rates = {}
    for out, width in linear_shapes(model):
        session = onnx_matmul(width, out, int8)
        x = np.random.default_rng(0).standard_normal((MAX_TOKENS_PER_CPU_BATCH, width), dtype=np.float32)
        seconds = [timed(torch.device("cpu"), session.run, None, {"x": x})[0] for _ in range(repeats)]
        rates[f"{MAX_TOKENS_PER_CPU_BATCH} x {width} x {out}"] = 2 * x.size * out / min(seconds) / 1e9
    return rates


def onnx_matmul(width: int, out: int, int8: bool) -> onnxruntime.InferenceSession:
    """Return a session of one matrix product."""
    weight = np.random.default_rng(0).standard_normal((width, out), dtype=np.float32)
    node = helper.make_node("MatMul", ["x", "w"], ["y"])
    constants = {"w": weight}
    if int8:
        scale = np.abs(weight).max() / 127
        node = helper.make_node("DynamicQuantizeMatMul", ["x", "w", "scale"], ["y"], domain="com.microsoft")
        constants = {"w": np.round(weight / scale).astype(np.int8), "scale": np.array(scale, dtype=np.float32)}
    graph = helper.make_graph(
        [node],
        "product",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["rows", width])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["rows", out])],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=8)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def print_result(result: dict[str, Any]) -> None:
    """Print speed, size and start-up of each engine, its comparison with torch, and the rates of the products."""
    for engine in result["engines"]:
        name = engine["system"]
        line = (
            f"{name}: {engine['queries_per_second']:.2f} queries/s in batches of {engine['best_batch']} "
            f"{engine['best_batch_unit']}, {engine['latency_p50_ms']:.0f} ms one at a time"
        )
        if name in result["start_seconds"]:
            start = result["start_seconds"][name]
            line += f", {engine['folder_mib']:.0f} MiB, first prediction after {start:.1f} s"
        print(line)
    for name, engine in result["to_torch"].items():
        speed, accuracy = engine["queries_per_second_ratio"], engine["accuracy_difference"]
        points = points_interval(*(accuracy[key] for key in ("difference", "low", "high")))
        print(
            f"{name} / torch: {speed['value']:.2f} ({speed['low']:.2f} to {speed['high']:.2f}); accuracy {points} "
            f"points, {engine['rows_with_another_label']} of {result['rows']} labels differ"
        )
    for name, shapes in result["gflop_per_second"].items():
        print(f"{name}: " + ", ".join(f"{shape} {rate:.0f} GFLOP/s" for shape, rate in shapes.items()))


if __name__ == "__main__":
    main()
