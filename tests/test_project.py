"""The project's own files: pinned versions, notebooks fit to commit, figures that come from stored runs."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from conftest import ROOT

from dhrd_lib.studies import tables
from dhrd_lib.studies.statistics import points_interval

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
HEADINGS = ("## Set-up", "## Takeaways", "## What's next")


def test_every_requirement_is_pinned():
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    packages = [line for line in lines if line and not line.startswith("#")]
    assert all(re.fullmatch(r"[A-Za-z0-9_.\[\]-]+==[0-9][0-9a-z.]*", line) for line in packages)
    assert "torch==2.13.0" in packages


def cells(path: Path) -> list[dict]:
    return json.loads(path.read_text(encoding="utf-8"))["cells"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
class TestNotebook:
    def test_asks_a_question_and_has_its_headings(self, path):
        text = "\n".join("".join(c["source"]) for c in cells(path) if c["cell_type"] == "markdown")
        title = text.splitlines()[0]
        assert title.startswith("# ")
        assert title.rstrip("*").endswith("?")
        assert "GPU" in text
        assert [heading for heading in HEADINGS if heading not in text] == []

    def test_holds_no_output_and_no_machine_path(self, path):
        code = [c for c in cells(path) if c["cell_type"] == "code"]
        assert not any(c["outputs"] or c["execution_count"] for c in code)
        assert not re.search(r"[\"'](/home|/root|/tmp|/Users|/work|[A-Z]:\\)", path.read_text(encoding="utf-8"))

    def test_is_made_small_for_the_tests_by_mocking_its_parameters(self, path):
        mocks = [c["metadata"]["nbmake"]["mock"] for c in cells(path) if "nbmake" in c["metadata"]]
        (parameters,) = [c for c in cells(path) if "parameters" in c["metadata"].get("tags", [])]
        assert mocks
        names = {name for mock in mocks for name in mock}
        assert names <= set(re.findall(r"^(\w+) *=", "".join(parameters["source"]), re.MULTILINE))

    def test_defines_no_function_longer_than_ten_lines(self, path):
        for cell in cells(path):
            source = "".join(cell["source"]) if cell["cell_type"] == "code" else ""
            for body in re.findall(r"^def .*\n((?:(?:    .*)?\n?)*)", source, re.MULTILINE):
                assert len(body.strip().splitlines()) <= 10


def test_the_readmes_table_is_the_stored_comparison():
    stored = json.loads((ROOT / "notebooks" / "results" / "quick_comparison.json").read_text())
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for row in stored["rows"]:
        if row["split"] == "dev":
            continue
        value, low, high = (f"{100 * row[name]:.1f}" for name in ("value", "low", "high"))
        line = f"| `{row['split']}` | {row['setting']} | {value}% [{low}, {high}] |"
        if row["difference"] is not None:
            points, low, high = (f"{100 * row[name]:+.1f}" for name in ("difference", "diff_low", "diff_high"))
            line += f" {points} [{low}, {high}] | {row['p_value']:.3f} |"
        assert line in readme


def stored_benchmark(name: str) -> dict:
    return json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())


def in_points(row) -> str:
    return points_interval(row["difference"], row["low"], row["high"]).replace("\xa0", " ")


def test_the_readmes_throughput_is_the_stored_benchmarks():
    stored = stored_benchmark("throughput")
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for row in stored["systems"]:
        ratio = stored["ratios"].get(f"DHRD / {row['system']}")
        read = f"{row['queries']} | {row['read_tokens_per_query']:.0f}"
        said = f"{row['queries_per_second']:.3g} | {row['written_tokens_per_query']:.0f} |"
        assert f"| {row['system']} | {read} | {said}" + (f" {ratio['value']:.3g} |" if ratio else " |") in readme
    assert f"{stored['classify']['share']:.0%} of the matmul peak" in readme
    assert f"{stored['largest_logit_difference']:.0e}" in readme


def speed(stored: dict, engine: str) -> str:
    ratio = stored["to_torch"][engine]["queries_per_second_ratio"]
    return f"{ratio['value']:.2f} ({ratio['low']:.2f} to {ratio['high']:.2f})"


def test_the_readmes_exports_are_the_stored_benchmarks():
    stored, vnni = stored_benchmark("inference"), stored_benchmark("inference_vnni")
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for engine in stored["engines"]:
        name, start = engine["system"], stored["start_seconds"][engine["system"]]
        own = f"{engine['latency_p50_ms']:.0f} | {engine['folder_mib']:.0f} | {start:.1f}"
        if name == "torch":
            assert f"| torch | 1 | {own} | | |" in readme
            continue
        own += f" ({stored['start_seconds_empty_cache'][name]:.1f})"
        to = stored["to_torch"][name]
        other = f"{in_points(to['accuracy_difference'])} | {to['rows_with_another_label']} of {stored['rows']}"
        assert f"| {name} | {speed(stored, name)} | {own} | {other} |" in readme
    onnx, openvino = (speed(vnni, f"{name} int8") for name in ("ONNX Runtime", "OpenVINO"))
    assert f"ONNX Runtime answered {onnx} and OpenVINO\n{openvino} times as many queries" in readme


def test_the_readmes_cost_of_int8_is_the_stored_benchmark():
    stored, vnni = stored_benchmark("int8_accuracy"), stored_benchmark("int8_accuracy_vnni")
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert f"on all {stored['rows']} rows that neither" in readme
    for one in (stored, vnni):
        assert one["runs"] == [f"quick-support_triage-{setting}-seed0" for setting in ("baseline", "dhrd")]
        for name, found in one["engines"].items():
            points = in_points(found["accuracy_difference"])
            others = f"{found['rows_with_another_label']} of {len(one['runs']) * one['rows']:,}"
            assert f"| {name}{', with VNNI' * (one is vnni)} | {points} | {others} |" in readme


def test_the_readmes_ablations_are_the_stored_ones():
    results, readme = ROOT / "notebooks" / "results", (ROOT / "README.md").read_text(encoding="utf-8")
    weights = ["alpha", "beta", "alpha_schedule"]
    table = tables.load_results(results / "ablation_loss_weights_support_triage.json")
    baseline = dict(zip(weights, (0.0, 1.0, "constant"), strict=True))
    found = tables.compare(table[table["split"] == "test"], weights, baseline)
    told = re.findall(r"\| alpha ([\d.]+), beta ([\d.]+) \| (.+) \| ([\d.]+) \|", readme)
    assert len(told) == 5
    for alpha, beta, points, p in told:
        row = found[(found["alpha"] == float(alpha)) & (found["beta"] == float(beta))].iloc[0]
        assert (points, p) == (in_points(row), f"{row['p_holm']:.3f}")
    table = tables.load_results(results / "ablation_alignment_support_triage.json")
    table = table[(table["split"] == "test") & (table["alpha"] > 0) & (table["shuffled_share"] == 1)]
    for row in tables.compare(table, ["alignment"], {"alignment": "consistent"}).itertuples():
        if row.alignment != "shuffle_rationale_label":
            assert f"({in_points(row._asdict())})" in readme


def test_the_readmes_ablations_of_everyday_nli_are_the_stored_ones():
    results, readme = ROOT / "notebooks" / "results", (ROOT / "README.md").read_text(encoding="utf-8")
    weights = {"alpha": 0.0, "beta": 1.0, "alpha_schedule": "constant"}
    table = tables.load_results(results / "ablation_loss_weights_everyday_nli.json")
    table = table[table["split"] == "test"]
    (row,) = tables.compare(table, list(weights), weights).itertuples()
    first, second = (f"({value:.1%})" for value in tables.summarize(table, list(weights))["value"])
    assert f"leaves chance {first} and DHRD\nwith alpha 1 doesn't {second}: {in_points(row._asdict())}" in readme
    assert f"p {row.p_holm:.3f}. The label alone" in readme
    table = tables.load_results(results / "ablation_alignment_everyday_nli.json")
    table = table[(table["split"] == "test") & (table["alpha"] > 0) & (table["shuffled_share"] == 1)]
    values = tables.summarize(table, ["alignment"]).set_index("alignment")["value"]
    compared = tables.compare(table, ["alignment"], {"alignment": "consistent"}).set_index("alignment")
    told = f"{values['only_label']:.1%} there, {in_points(compared.loc['only_label'])} against\naligned rationales"
    assert f"The label alone reaches {told}" in readme
    assert (values[["shuffle_rationale", "shuffle_rationale_label"]] < 0.35).all()
    table = tables.load_results(results / "ablation_rationale_length_everyday_nli.json")
    table = table[(table["split"] == "test") & (table["max_rationale_tokens"] < 128)]
    first, second = tables.summarize(table, ["max_rationale_tokens"])["value"]
    assert f"Cut to 8 and 16 tokens, rationales give {first:.1%} and {second:.1%}" in readme
    by_seed = tables.by_seed(table)
    assert list((by_seed["value"] < 0.34).groupby(by_seed["max_rationale_tokens"]).sum()) == [1, 1]
    table = tables.load_results(results / "ablation_pooling_everyday_nli.json")
    table, chosen = table[(table["split"] == "test") & (table["alpha"] == 0)], ["pooling", "head"]
    values = tables.summarize(table, chosen).set_index(chosen)["value"].sort_values(ascending=False)
    assert list(values.index[:2]) == [("weightedmean", "mlp"), ("last", "mlp")]
    assert f"is level\nwith the last token ({values.iloc[0]:.1%})" in readme
    assert f"the others lie at {100 * values.iloc[-1]:.1f} to {values.iloc[2]:.1%}; none differs after" in readme
    assert (tables.compare(table, chosen, {"pooling": "last", "head": "mlp"})["p_holm"] > 0.05).all()


def test_the_readmes_two_seeds_are_the_stored_ones():
    stored = json.loads((ROOT / "notebooks" / "results" / "quick_two_seeds.json").read_text())
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for row in stored["rows"]:
        if row["split"] != "dev" and row["difference"] is not None:
            points, low, high = (f"{100 * row[name]:+.1f}" for name in ("difference", "diff_low", "diff_high"))
            assert f"{points} [{low}, {high}]" in readme
    seconds = {run["run"]: run["train_seconds"] for run in stored["by_seed"]}
    for seed in (0, 1):
        dhrd, baseline = (seconds[f"quick-support_triage-{setting}-seed{seed}"] for setting in ("dhrd", "baseline"))
        assert f"{dhrd / baseline:.1f}" in readme
    for run in stored["by_seed"]:
        if run["run"].endswith("seed1"):
            assert f"{100 * run['test']:.1f}%" in readme
            assert f"{100 * run['test_new_domain']:.1f}%" in readme
