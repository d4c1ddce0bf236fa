"""The benchmarks: FLOPs are those that run, and each command writes its results with the environment."""

from __future__ import annotations

import json
import os

import numpy as np
import pandas as pd
import pytest
from conftest import tiny_model
from torch import nn

from benchmarks import compute, growth, throughput
from benchmarks.common import in_own_process
from dhrd_lib.backbones import layers_of


def test_flops_count_every_matrix_product(task):
    model = tiny_model(task)
    counted = []
    for module in layers_of(model.backbone).modules():
        if isinstance(module, nn.Linear):
            module.register_forward_hook(
                lambda module, args, _: counted.append(2 * args[0].numel() * module.out_features)
            )
    compute.classify(model, compute.random_batch(model, 2, 6))
    # Scores and mixing, 2 operations each, over 21 visible pairs per row: 4 layers, 2 heads of 8.
    attention = 4 * 2 * (2 * 2 * 21) * 16
    norms = sum(p.numel() for n, p in layers_of(model.backbone).named_parameters() if "norm" in n)
    assert compute.classify_flops(model, 2, 6) == sum(counted) + attention + 2 * norms * 12


def test_log_slope_is_the_power_of_growth():
    sizes = pd.Series([10, 100, 1000])
    assert growth.log_slope(sizes, 1e-3 * sizes**2) == pytest.approx(2)
    assert growth.log_slope(sizes, pd.Series([np.nan, 20.0, 200.0])) is None
    assert growth.log_slope(sizes[:1], sizes[:1]) is None


def test_throughput_writes_file_and_page(tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("DHRD_DATA_DIR", raising=False)
    limits = {"queries": 8, "rounds": 2, "latency-queries": 2, "max-new-tokens": 20, "square": 64}
    throughput.main(
        [*(f"--{name}={value}" for name, value in limits.items()), "--backbone=tiny", f"--out={tmp_path}"]
    )
    stored = json.loads((tmp_path / "throughput.json").read_text())
    names = {"pooled baseline", "CoT (paper's parameters)", "CoT (budget 16)"}
    assert {f"DHRD / {name}" for name in names} <= set(stored["ratios"])
    assert stored["environment"]["packages"]["torch"]
    assert (stored["settings"]["queries"], stored["settings"]["backbone"]) == (8, "tiny")
    page = (tmp_path / "throughput.html").read_text()
    assert "CoT (budget 16)" in page
    share, profile = stored["classify"], pd.DataFrame(stored["profile"])
    assert share["peak_gflop_per_second"] == max(share["peak_by_shape"].values())
    assert share["share"] == pytest.approx(share["gflop_per_second"] / share["peak_gflop_per_second"])
    assert profile["ms"].is_monotonic_decreasing
    assert 0 < profile["share"].sum() <= 1.0
    printed = capsys.readouterr().out
    assert "DHRD / pooled baseline: " in printed
    assert "of the matmul peak" in printed


def test_own_process_is_another_one():
    assert in_own_process(os.getpid) != os.getpid()


def test_growth_writes_points_slopes_and_page(tmp_path, monkeypatch):
    monkeypatch.setattr(growth, "in_own_process", lambda call, *arguments: call(*arguments))
    monkeypatch.setattr(growth, "ROWS_WITH_LABELS", 32)
    sizes = {"rows": ("40", "80"), "lengths": ("16", "32"), "labels": ("2", "4")}
    arguments = [word for name, values in sizes.items() for word in (f"--{name}", *values)]
    stored = growth.main([*arguments, "--out", str(tmp_path)])
    assert stored == json.loads((tmp_path / "growth.json").read_text())
    lines = {(row["factor"], row["what"]) for row in stored["slopes"]}
    assert lines == set(growth.POINTS)
    assert len(stored["points"]) == 2 * len(lines)
    assert all(row["seconds_slope"] is not None for row in stored["slopes"])
    short = {(point["factor"], point["what"]) for point in stored["points"] if point["added_mib"] is None}
    assert {(row["factor"], row["what"]) for row in stored["slopes"] if row["added_mib_slope"] is None} == short
    assert "slope" in (tmp_path / "growth.html").read_text()


@pytest.mark.slow
def test_train_step_measures_every_way(tmp_path):
    from benchmarks import train_step

    stored = train_step.main(["--backbone=tiny", "--rows=8", "--batch-size=4", f"--out={tmp_path}"])
    assert [way["way"] for way in stored["ways"]] == [way.name for way in train_step.WAYS]
    assert all(way["seconds"] > 0 for way in stored["ways"])


@pytest.mark.slow
def test_gpu_check_measures_and_trains_cells(tmp_path, capsys):
    from benchmarks import gpu_check

    small = {"backbone": "tiny", "rows": 8, "queries": 10, "max-new-tokens": 16, "sizes": 32, "seeds": 1}
    small |= {"freeze-layers": 2, "max-steps": 1, "workers": 1, "minutes": 3, "out": tmp_path}
    gpu_check.main([*(f"--{name}={value}" for name, value in small.items()), "--settings", "baseline", "alpha 1"])
    names = {"throughput.json", "gpu_train_step.json", "study_support_triage_gpu.json"}
    assert names <= {path.name for path in tmp_path.iterdir()}
    assert "2 of 2 cells" in capsys.readouterr().out


@pytest.mark.slow
def test_trunk_cache_changes_no_prediction(tmp_path):
    from benchmarks import trunk_cache

    stored = trunk_cache.main(["--backbone=tiny", "--freeze", "2", "--rows=16", f"--out={tmp_path}"])
    assert stored["whole_grid"]["cells"] == 24
    assert stored["ways"][-1]["same_answers"]


@pytest.mark.slow
def test_inference_compares_every_engine(tmp_path):
    from benchmarks import inference

    stored = inference.main(["--backbone=tiny", "--rows=10", "--latency-queries=2", f"--out={tmp_path}"])
    names = [engine["system"] for engine in stored["engines"]]
    assert names[:6] == ["torch", "pipeline", *inference.EXPORTS]
    assert all(stored["to_torch"][name]["rows_with_another_label"] == 0 for name in ("pipeline", "ONNX Runtime"))
