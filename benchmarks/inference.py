"""Inference engines on one trained classifier: torch, ONNX Runtime and OpenVINO, float32 and int8, in one run.

    python benchmarks/inference.py --run runs/NAME [--split test] [--rounds 5] [--out runs/bench]

Writes OUT/inference.json and prints it. Every engine answers the whole split in turns with the others, so
that speed and accuracy come from the same answers; start-up is that of a fresh process up to its first prediction.
Without --run the backbone as it came is measured, on fewer texts: speed doesn't depend on what the weights say.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from onnx import TensorProto, helper, numpy_helper

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.harness import MIB, Measured, matmul_peak, measure, pooled_system, ratio
from dhrd_lib.backbones import layers_of
from dhrd_lib.config import ModelConfig
from dhrd_lib.modeling import DHRDModel, build_model
from dhrd_lib.runs import environment, load_run, write_json
from dhrd_lib.serving.classifier import CPU_PART_TOKENS, load_classifier, model_folder
from dhrd_lib.serving.export import export
from dhrd_lib.studies.statistics import paired_comparison
from dhrd_lib.tasks import load_rows, load_task

ROOT = Path(__file__).parents[1]
EXPORTS = {"ONNX Runtime": ("onnx", False), "OpenVINO": ("openvino", False)}
EXPORTS |= {f"{name} int8": (format, True) for name, (format, _) in EXPORTS.items()}
START = "import sys; from dhrd_lib import load_classifier; load_classifier(sys.argv[1]).predict([{row}])"


def main(arguments: list[str] | None = None) -> dict:
    """Measure, print, and write the JSON file; returns what stands in it."""
    options = parse(arguments)
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as scratch:
        source, rows, labels = trained(options) if options.run else untrained(Path(scratch), options)
        folders = {"torch": model_folder(source)}
        for name, (format, int8) in EXPORTS.items():
            folders[name] = export(source, format, int8=int8, out=Path(scratch) / f"{format}-{int8}")
        classifiers = {name: load_classifier(folder) for name, folder in folders.items()}
        cpu = torch.device("cpu")
        systems = [
            pooled_system(name, classifiers[name], device=cpu, weights=folder_mib(folders[name]))
            for name in folders
        ]
        found = measure(systems, rows, rounds=options.rounds, latency_queries=options.latency_queries)
        result = {
            "weights": Path(options.run).name if options.run else "untrained",
            "rows": len(rows),
            "engines": [{**one.row(), "folder_mib": folder_mib(folders[one.system.name])} for one in found],
            "to_torch": {one.system.name: against(found[0], one, labels) for one in found[1:]},
            "start_seconds": {name: start_seconds(folders[name], rows[0]) for name in folders},
            "start_seconds_empty_cache": {
                name: start_seconds(folders[name], rows[0], empty_cache=True) for name in EXPORTS
            },
            "gflop_per_second": {
                "torch float32": matmul_peak(classifiers["torch"], tokens=CPU_PART_TOKENS),
                **{
                    f"ONNX Runtime {kind}": onnx_matmuls(classifiers["torch"], kind) for kind in ("float32", "int8")
                },
            },
            "environment": environment(cpu),
        }
    result["seconds"] = time.perf_counter() - started
    write(result, Path(options.out))
    return result


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command's options."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", help="a trained run's folder")
    parser.add_argument("--split", default="test")
    parser.add_argument("--rows", type=int, default=0, help="at most so many rows; 0 is all, and 60 without --run")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--latency-queries", type=int, default=12)
    parser.add_argument("--backbone", default="smollm2-135m")
    parser.add_argument("--out", default="runs/bench")
    return parser.parse_args(arguments)


def trained(options: argparse.Namespace) -> tuple[Path, list[dict[str, Any]], np.ndarray]:
    """The run's folder, and the rows and gold labels of its split."""
    _, splits = load_rows(load_run(options.run).config.data)
    split = splits[options.split]
    split = split.select(range(min(options.rows or len(split), len(split))))
    return Path(options.run), split.to_list(), np.array(split["label"])


def untrained(scratch: Path, options: argparse.Namespace) -> tuple[Path, list[dict[str, Any]], np.ndarray]:
    """The backbone with a new head, saved, and some rows of support_triage."""
    task, splits = load_task("support_triage")
    build_model(ModelConfig(backbone=options.backbone, device="cpu"), task).save_pretrained(scratch / "model")
    split = splits[options.split].select(range(options.rows or 60))
    return scratch / "model", split.to_list(), np.array(split["label"])


def folder_mib(folder: Path) -> float:
    """The weights and the graph on disk, in MiB."""
    return sum(file.stat().st_size for file in folder.rglob("*model*") if file.is_file()) / MIB


def against(reference: Measured, one: Measured, labels: np.ndarray) -> dict[str, Any]:
    """Speed, logits, labels and accuracy of an engine against torch's, on the same rows."""
    expected, given = (logits_in_order(measured, len(labels)) for measured in (reference, one))
    said = [logits.argmax(1) for logits in (expected, given)]
    return {
        "queries_per_second_ratio": ratio(one, reference),
        "largest_logit_difference": float(np.abs(expected - given).max()),
        "rows_with_another_label": int((said[0] != said[1]).sum()),
        "accuracy": float((said[1] == labels).mean()),
        "accuracy_difference": asdict(paired_comparison(["accuracy"], labels, *said)),
    }


def logits_in_order(measured: Measured, rows: int) -> np.ndarray:
    """The logits of all rounds, in the rows' order: round r answered every so-manyth row from the r-th on."""
    rounds = len(measured.answers)
    logits = np.zeros((rows, measured.answers[0].shape[1]), dtype=np.float32)
    for number, answers in enumerate(measured.answers):
        logits[number::rounds] = answers
    return logits


def start_seconds(folder: Path, row: dict[str, Any], times: int = 3, empty_cache: bool = False) -> float:
    """The wall time of a fresh process that loads a classifier and answers one row, the median of a few.

    An export has left what its engine compiles in the cache; an empty one is what another machine has.
    """
    fields = {key: value for key, value in row.items() if isinstance(value, str)}
    command = [sys.executable, "-c", START.format(row=fields), str(folder)]
    seconds = []
    for _ in range(times):
        with tempfile.TemporaryDirectory() as scratch:
            env = {**os.environ, "DHRD_CACHE": scratch} if empty_cache else os.environ
            started = time.perf_counter()
            subprocess.run(command, check=True, cwd=ROOT, stderr=subprocess.DEVNULL, env=env)
            seconds.append(time.perf_counter() - started)
    return float(np.median(seconds))


def onnx_matmuls(model: DHRDModel, kind: str, repeats: int = 6) -> dict[str, float]:
    """GFLOP/s of ONNX Runtime's matrix products at the decoder's shapes, by shape; int8 quantises as it goes.

    What int8 can gain at all: the same shapes as `matmul_peak` has for torch.
    """
    linear = [module for module in layers_of(model.backbone).modules() if isinstance(module, torch.nn.Linear)]
    found = {}
    for out, width in sorted({tuple(module.weight.shape) for module in linear}):
        session = onnx_matmul(width, out, kind)
        x = np.random.default_rng(0).standard_normal((CPU_PART_TOKENS, width), dtype=np.float32)
        seconds = []
        for _ in range(repeats):
            started = time.perf_counter()
            session.run(None, {"x": x})
            seconds.append(time.perf_counter() - started)
        found[f"{CPU_PART_TOKENS} x {width} x {out}"] = 2 * x.size * out / min(seconds) / 1e9
    return found


def onnx_matmul(width: int, out: int, kind: str) -> onnxruntime.InferenceSession:
    """One matrix product as a graph."""
    weight = np.random.default_rng(0).standard_normal((width, out), dtype=np.float32)
    node = helper.make_node("MatMul", ["x", "w"], ["y"])
    constants = {"w": weight}
    if kind == "int8":
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


def write(result: dict, folder: Path) -> None:
    """The JSON file, and what is printed."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "inference.json", result)
    for engine in result["engines"]:
        name = engine["system"]
        line = (
            f"{name}: {engine['queries_per_second']:.2f} queries/s, {engine['latency_p50_ms']:.0f} ms one by one, "
        )
        line += f"{engine['folder_mib']:.0f} MiB, first prediction after {result['start_seconds'][name]:.1f} s"
        print(line)
    for name, to in result["to_torch"].items():
        speed, accuracy = to["queries_per_second_ratio"], to["accuracy_difference"]
        points, low, high = (f"{100 * accuracy[key]:+.1f}" for key in ("difference", "low", "high"))
        print(
            f"{name} / torch: {speed['value']:.2f} ({speed['low']:.2f} to {speed['high']:.2f}); accuracy {points} "
            f"points [{low}, {high}], {to['rows_with_another_label']} of {result['rows']} labels differ"
        )
    for name, shapes in result["gflop_per_second"].items():
        print(f"{name}: " + ", ".join(f"{shape} {rate:.0f} GFLOP/s" for shape, rate in shapes.items()))
    print(f"{result['seconds']:.0f} s in all; {folder / 'inference.json'}")


if __name__ == "__main__":
    main()
