"""Ablations: grids that share cells, results of runs or of stored files, and sentences computed from them."""

from __future__ import annotations

import json

import pytest
from conftest import ROOT
from typer.testing import CliRunner

from dhrd_lib.__main__ import app
from dhrd_lib.config import ConfigError, RunConfig, WorkbenchError
from dhrd_lib.runs import find_runs
from dhrd_lib.studies import ablations
from dhrd_lib.studies.ablations import ABLATIONS, run_ablation, task_base
from dhrd_lib.studies.tables import load_results, store_results

pytestmark = pytest.mark.usefixtures("own_cache")
TINY = {"backbone": "tiny", "freeze_layers": 2, "max_train_rows": 16, "max_eval_rows": 8, "epochs": 1}
STORED = ROOT / "notebooks" / "results"
TASKS = ["support_triage", "everyday_nli"]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def result(root):
    return run_ablation("loss_weights", seeds=2, runs=root, **TINY)


@pytest.mark.parametrize("name", ABLATIONS)
def test_every_ablation_has_the_plain_cells(name):
    cells = {run: grid.config(run) for grid in ablations.grids(name, task_base(), [0]) for run in grid.cells}
    assert {"ablation-support_triage-seed0", "ablation-support_triage-alpha0.0-seed0"} <= set(cells)


def test_another_base_has_other_runs():
    names = [ablations.grids("pooling", task_base(**of), [0])[0].name for of in ({}, TINY, {**TINY, "epochs": 2})]
    assert names[0] == "ablation-support_triage"
    assert len(set(names)) == 3


def test_task_has_sizes_that_fields_replace():
    nli = RunConfig.from_dict(task_base("everyday_nli", max_train_rows=32, pooling="mean"))
    assert (nli.model.freeze_layers, nli.data.max_train_rows, nli.training.epochs) == (20, 32, 1)
    assert nli.model.pooling == "mean"
    small = RunConfig.from_dict(task_base("cb"))
    assert (small.model.freeze_layers, small.data.max_train_rows, small.training.epochs) == (26, 208, 2)
    with pytest.raises(ConfigError, match="epoch is not a field"):
        task_base("cb", epoch=1)
    with pytest.raises(ConfigError, match="the ablation is 'x'"):
        run_ablation("x")


def test_ablations_share_common_cells(root, result):
    before = {run.name: (run.folder / "metrics.json").stat().st_mtime_ns for run in find_runs(root)}
    run_ablation("rationale_length", seeds=[0], runs=root, **TINY)
    after = {run.name: (run.folder / "metrics.json").stat().st_mtime_ns for run in find_runs(root)}
    assert before.items() <= after.items()
    assert len(after) == len(before) + 4


def test_run_without_class_loss_has_cot_figures_only(root, result):
    rows = result.table[result.table["beta"] == 0]
    assert set(rows["split"]) == {"test"}
    stored = json.loads(next(root.glob("*beta0.0*seed0/cot_test.json")).read_text())
    assert list(rows[rows["seed"] == 0]["predictions"].iloc[0]) == stored["predictions"]
    assert len(stored["predictions"]) == 8
    assert set(result.table[result.table["beta"] > 0]["split"]) == {"dev", "test", "test_new_domain"}


def test_failed_cell_is_named_and_the_rest_are_trained(tmp_path):
    fields = {**TINY, "freeze_layers": 0, "finetune": "lora", "max_train_rows": 1}  # a shuffle needs two
    with pytest.raises(WorkbenchError, match=r"cells failed; ablation-support_triage-.*Shuffling rationales"):
        run_ablation("alignment", seeds=[0], runs=tmp_path, **fields)
    assert len(find_runs(tmp_path)) == 3


def test_stored_results_replace_runs_of_the_same_base(root, result, tmp_path):
    bases = [task_base(task, **TINY, learning_rate=1e-3) for task in TASKS]
    mine, other_path = (tmp_path / ablations.results_name("loss_weights", base) for base in bases)
    store_results(result.table, mine)
    other = result.where(split="test", seed=0)
    nli = other.table.assign(task="everyday_nli", run="stored")
    store_results(nli, other_path)
    both = run_ablation("loss_weights", TASKS, [0], tmp_path / "none", stored=tmp_path, **TINY, learning_rate=1e-3)
    assert both.table.groupby("task")["run"].nunique().to_dict() == {
        "support_triage": result.table["run"].nunique(),
        "everyday_nli": 1,
    }
    assert both.table.index.is_unique
    assert not (tmp_path / "none").exists()
    wider = run_ablation("loss_weights", seeds=[0], runs=root, stored=tmp_path, **{**TINY, "max_eval_rows": 6})
    assert set(wider.table[wider.table["split"] == "test"]["labels"].map(len)) == {6}


def test_reference_takes_defaults_for_other_factors(result):
    rows = result.where(split="test").against(alpha=0.0)
    weights = rows[["alpha", "beta", "alpha_schedule"]].apply(tuple, axis=1).tolist()
    assert len(weights) == 9
    assert (0.0, 1.0, "constant") not in weights
    assert (0.0, 0.5, "constant") in weights
    assert set(rows["n_seeds"]) == {2}


def test_figures_have_a_line_per_task_and_split(result):
    figure = result.plot("alpha")
    assert {trace.name for trace in figure.data if trace.name} == {"test", "test_new_domain"}
    assert figure.layout.xaxis.title.text == "alpha"
    assert "%" in figure.layout.yaxis.title.text
    heads = run_ablation("pooling", TASKS, stored=STORED).where(split="test").plot("pooling", line="head")
    assert {trace.name for trace in heads.data} == {
        f"{task} head {head}" for task in TASKS for head in ("mlp", "linear")
    }


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("loss_weights", "Reasoning alone, decoded by CoT, is -28.3 [-37.4,\N{NO-BREAK SPACE}-20.0] points"),
        ("pooling", "ranges from 38.7% (max, mlp) to 54.5% (weightedmean, linear)"),
        ("alignment", "By share of wrong rationales: 40.2% with 0, 45.9% with 0.25"),
        ("rationale_length", "By rationale tokens: 39.6% with 0, 43.2% with 8"),
    ],
)
def test_takeaways_are_those_of_the_stored_runs(name, sentence):
    result = run_ablation(name, TASKS, stored=STORED)
    text = result.takeaways()
    assert sentence in text
    assert all(f"**{task}**" in text for task in TASKS)
    assert result.costs()["task"].tolist() == TASKS


def test_command_stores_and_prints_results(result, tmp_path, monkeypatch):
    monkeypatch.setattr(ablations, "run_ablation", lambda *_, **__: result)
    command = ["ablate", "loss_weights", "--seeds", "2", "--runs", str(tmp_path)]
    output = CliRunner().invoke(app, command, catch_exceptions=False).output
    assert len(load_results(tmp_path / "ablation_loss_weights_support_triage.json")) == len(result.table)
    assert "pooled baseline" in output


def test_results_of_a_data_file_are_named_by_its_stem(tmp_path):
    base = task_base(str(tmp_path / "data" / "my.jsonl"))
    assert ablations.results_name("pooling", base) == "ablation_pooling_my.json"
    assert {grid.name for grid in ablations.grids("pooling", base, [0])} == {"ablation-my"}
