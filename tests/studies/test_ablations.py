"""Ablations: settings share cells, results survive their file, and comparisons are seed by seed."""

from __future__ import annotations

import json

import numpy as np
import pandas as pd
import pytest
from typer.testing import CliRunner

from dhrd_lib.__main__ import app
from dhrd_lib.config import RunConfig
from dhrd_lib.runs import find_runs, write_json
from dhrd_lib.studies import ablations, plots
from dhrd_lib.studies.ablations import (
    ABLATIONS,
    ResultsError,
    collect,
    compare,
    load_results,
    store_results,
    summarise,
)
from dhrd_lib.studies.statistics import bootstrap_interval
from dhrd_lib.widgets import AblationDashboard

pytestmark = pytest.mark.usefixtures("own_cache")


def tiny_base(**changes: float | str) -> dict:
    sizes = {"backbone": "tiny", "freeze_layers": 2, "max_train_rows": 16, "max_eval_rows": 8, "epochs": 1}
    return ablations.base("support_triage", **(sizes | changes))


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def table(root):
    return ablations.run_ablation("loss_weights", tiny_base(), [0, 1], root)


def made(predictions: dict[tuple, list[int]], labels: list[int]) -> pd.DataFrame:
    """A table by hand: predictions by (alpha, seed)."""
    rows = [
        {
            "run": f"a{alpha}-s{seed}",
            "setting": "DHRD" if alpha else "pooled baseline",
            "alpha": alpha,
            "seed": seed,
            "task": "t",
            "split": "test",
            "task_metrics": ("accuracy",),
            "groups": None,
            "labels": tuple(labels),
            "predictions": tuple(said),
            "train_seconds": 1.0,
            "train_tokens": 10,
            "tokens_per_second": 10.0,
            "environment": {},
        }
        for (alpha, seed), said in predictions.items()
    ]
    return pd.DataFrame(rows)


@pytest.mark.parametrize("ablation", ABLATIONS)
def test_every_grid_of_an_ablation_is_one_and_has_the_cell_of_a_plain_setting(ablation):
    grids = ablations.grids(ablation, tiny_base(), [0])
    cells = {name: grid.config(name) for grid in grids for name in grid.cells}
    assert all(isinstance(config, RunConfig) for config in cells.values())
    plain = {"ablation-support_triage-seed0", "ablation-support_triage-alpha0.0-seed0"}
    assert plain <= set(cells)


def test_ablations_share_the_cells_that_they_have_in_common(root, table, monkeypatch):
    before = {run.name for run in find_runs(root)}
    begun, prepare = [], ablations.sweep.__globals__["train"].__globals__["_prepare"]
    monkeypatch.setitem(
        ablations.sweep.__globals__["train"].__globals__,
        "_prepare",
        lambda config: begun.append(config.name) or prepare(config),
    )
    ablations.run_ablation("rationale_length", tiny_base(), [0], root)
    assert begun
    assert not before & set(begun)
    assert all("only_label" in name or "max_rationale_tokens" in name for name in begun)


def test_a_run_without_a_class_loss_answers_by_cot_and_only_where_it_was_asked(root, table):
    told = table[table["beta"] == 0]
    assert set(told["split"]) == {"test"}
    stored = json.loads(next(root.glob("*beta0.0*seed0/cot_test.json")).read_text())
    assert list(told[told["seed"] == 0]["predictions"].iloc[0]) == stored["predictions"]
    assert len(stored["predictions"]) == 8
    assert set(table[table["beta"] > 0]["split"]) == {"dev", "test", "test_new_domain"}


def test_a_stored_table_is_the_one_that_was_collected(table, tmp_path):
    store_results(table, tmp_path / "results.json")
    again = load_results(tmp_path / "results.json")
    assert set(again) == set(table)
    pd.testing.assert_frame_equal(again[list(table)].map(repr), table.reset_index(drop=True).map(repr))
    assert "\n0" not in (tmp_path / "results.json").read_text()  # not a line a prediction


def test_a_file_without_results_is_named(tmp_path):
    write_json(tmp_path / "other.json", {"rows": []})
    with pytest.raises(
        ResultsError, match=r"other\.json holds no results of an ablation \(KeyError\('gold'\)\); expected"
    ):
        load_results(tmp_path / "other.json")


def test_a_summary_is_the_mean_over_seeds_with_the_bootstrap_over_seeds_and_rows():
    labels = [0, 1] * 20
    wrong = [1 - labels[0], *labels[1:]]
    found = summarise(made({(1.0, 0): labels, (1.0, 1): wrong}, labels), ["alpha"]).iloc[0]
    expected = bootstrap_interval(["accuracy"], labels, [labels, wrong])
    assert (found["value"], found["low"], found["high"]) == (expected.value, expected.low, expected.high)
    assert found["value"] == pytest.approx(1 - 0.5 / 40)
    assert found["n_seeds"] == 2
    assert found["std"] == pytest.approx(np.std([1, 39 / 40], ddof=1))


def test_a_comparison_is_paired_by_seed_and_corrected_for_the_settings_compared():
    labels = [0, 1] * 20
    flipped = [1 - label for label in labels]
    runs = {(0.0, 0): labels, (0.0, 1): flipped, (1.0, 1): flipped, (1.0, 0): labels, (2.0, 0): flipped}
    found = compare(made(runs, labels), ["alpha"], {"alpha": 0.0}).set_index("alpha")
    assert found.loc[1.0, ["n_seeds", "difference", "low", "high"]].tolist() == [2, 0, 0, 0]
    assert found.loc[2.0, "n_seeds"] == 1
    assert found.loc[2.0, "difference"] == -1
    assert found.loc[2.0, "p_holm"] == pytest.approx(2 * found.loc[2.0, "p_value"])


def test_a_reference_that_no_run_has_two_runs_of_one_seed_and_other_rows_are_refused():
    runs = made({(0.0, 0): [0, 1], (1.0, 0): [0, 1]}, [0, 1])
    with pytest.raises(ResultsError, match=r"no run is of the reference \{'alpha': 3.0\}"):
        compare(runs, ["alpha"], {"alpha": 3.0})
    with pytest.raises(ResultsError, match="runs 'a0.0-s0' and 'a1.0-s0' have the same head and seed"):
        summarise(runs.assign(head="mlp"), ["head"])
    other = runs.assign(labels=[(0, 1), (1, 1)])
    with pytest.raises(ResultsError, match="runs 'a0.0-s0' and 'a1.0-s0' have different rows of t test"):
        compare(other, ["alpha"], {"alpha": 0.0})


def test_a_failed_cell_is_named_with_its_reason_and_the_rest_are_trained(tmp_path):
    base = tiny_base(freeze_layers=0)
    base["model"]["finetune"] = "lora"
    base["data"]["max_train_rows"] = 1  # a shuffle needs two rows
    with pytest.raises(ResultsError, match=r"cells aren't trained; ablation-support_triage-.*Shuffling rationales"):
        ablations.run_ablation("alignment", base, [0], tmp_path)
    assert len(find_runs(tmp_path)) == 3


def test_the_command_trains_and_stores_an_ablation(root, table, tmp_path):
    write_json(tmp_path / "base.json", tiny_base())
    out = tmp_path / "stored.json"
    options = ["--base", str(tmp_path / "base.json"), "--seeds", "2", "--runs", str(root), "--out", str(out)]
    result = CliRunner().invoke(app, ["ablate", "loss_weights", *options], catch_exceptions=False)
    assert result.exit_code == 0
    assert len(load_results(out)) == len(table)
    assert collect(find_runs(root))["run"].nunique() >= table["run"].nunique()
    assert "pooled baseline" in result.output


def test_the_command_names_the_results_of_a_data_file_by_its_stem_and_makes_their_folder(tmp_path):
    rows = [{"text": f"text {i}", "label": ("fix", "refund")[i % 2], "rationale": "because"} for i in range(64)]
    (tmp_path / "data").mkdir()
    task = tmp_path / "data" / "my.jsonl"
    task.write_text("".join(json.dumps(row) + "\n" for row in rows))
    base = tiny_base()
    base["data"] |= {"task": str(task)}
    write_json(tmp_path / "base.json", base)
    runs, out = tmp_path / "new" / "runs", tmp_path / "other" / "new" / "out.json"
    command = ["ablate", "rationale_length", "--base", str(tmp_path / "base.json"), "--seeds", "1"]
    command += ["--runs", str(runs)]
    for more, expected in ([], runs / "ablation_rationale_length_my.json"), (["--out", str(out)], out):
        result = CliRunner().invoke(app, [*command, *more], catch_exceptions=False)
        assert result.exit_code == 0, result.output
        assert set(load_results(expected)["task"]) == {str(task)}


def test_a_task_beside_a_base_is_refused_in_one_sentence(tmp_path):
    write_json(tmp_path / "base.json", tiny_base())
    command = ["ablate", "pooling", "--task", "everyday_nli", "--base", str(tmp_path / "base.json")]
    result = CliRunner(env={"COLUMNS": "300"}).invoke(app, [*command, "--runs", str(tmp_path / "runs")])
    assert result.exit_code == 2
    told = " ".join(result.output.replace("│", " ").split())
    assert "--task is 'everyday_nli' and --base" in told
    assert "expected one of them: a base has a task." in told
    assert not (tmp_path / "runs").exists()


def test_a_tasks_own_sizes_are_its_bases_but_for_those_that_are_named():
    own = RunConfig.from_dict(ablations.base("everyday_nli", max_train_rows=32))
    assert (own.model.freeze_layers, own.data.max_train_rows, own.training.epochs) == (20, 32, 1)
    small = RunConfig.from_dict(ablations.base("cb"))
    assert (small.model.freeze_layers, small.data.max_train_rows, small.training.epochs) == (26, 208, 2)
    assert own.training.learning_rate < small.training.learning_rate
    with pytest.raises(ValueError, match="epoch'"):
        ablations.base("cb", epoch=1)


def test_several_tasks_make_one_table_each_from_its_stored_file_or_from_runs(root, table, tmp_path):
    bases = [tiny_base(), ablations.base("everyday_nli", backbone="tiny", max_train_rows=16)]
    one = table.assign(task="everyday_nli", run="stored").drop_duplicates(["run", "split"])
    store_results(one, tmp_path / ablations.results_name("loss_weights", bases[1]))
    found = ablations.stored_or_trained(tmp_path, "loss_weights", bases, [0, 1], root)
    assert found.groupby("task")["run"].nunique().to_dict() == {
        "support_triage": table["run"].nunique(),
        "everyday_nli": 1,
    }
    assert found.index.is_unique
    assert len(ablations.stored_or_trained("", "loss_weights", bases[:1], [0, 1], root)) == len(table)


def test_a_base_without_data_has_the_default_task():
    base = {"model": {"backbone": "tiny"}}
    assert {grid.name for grid in ablations.grids("pooling", base, [0])} == {"ablation-support_triage"}


# --------------------------------------------------------------------- what figures show of a table


def two_factors() -> pd.DataFrame:
    """Two seeds of alpha 0 and 1 with `last` pooling, and of alpha 1 with `mean`."""
    labels = [0, 1] * 10
    runs = made({(alpha, seed): labels for alpha in (0.0, 1.0) for seed in (0, 1)}, labels).assign(pooling="last")
    mean = runs[runs["alpha"] == 1].assign(pooling="mean", predictions=[tuple([0] * 20)] * 2)
    return pd.concat([runs, mean.assign(run=mean["run"] + "-mean")], ignore_index=True)


def test_factors_are_the_fields_that_differ_and_neither_seed_nor_what_was_measured():
    assert ablations.factors(two_factors()) == ["alpha", "pooling"]


def test_what_differs_between_tasks_alone_is_no_factor():
    here = two_factors().assign(freeze_layers=26)
    there = here.assign(task="u", freeze_layers=20)
    assert ablations.factors(pd.concat([here, there])) == ["alpha", "pooling"]


def test_one_factor_holds_the_others_at_the_value_of_most_runs():
    table = two_factors()
    assert set(ablations.one_factor(table, "alpha")["pooling"]) == {"last"}
    assert set(ablations.one_factor(table, "pooling")["alpha"]) == {1.0}
    both = ablations.one_factor(table, "alpha", "pooling")
    assert len(both) == len(table)
    assert set(both["series"]) == {"pooling last", "pooling mean"}


def test_the_dashboards_choices_choose_what_the_figure_shows_and_hover_names_the_run():
    dashboard = AblationDashboard(two_factors())
    dashboard.choices["factor"].value, dashboard.choices["line"].value = "pooling", None
    means, runs = dashboard.figure().data
    assert list(means.x) == ["last", "mean"]
    assert list(means.y) == [100, 50]
    assert set(runs.customdata[:, 0]) == {"a1.0-s0", "a1.0-s1", "a1.0-s0-mean", "a1.0-s1-mean"}
    dashboard.choices["metric"].value = "macro_f1"
    assert list(dashboard.figure().data[0].y) == [100, pytest.approx(100 / 3)]


def test_a_factor_of_numbers_has_a_line_with_a_band_that_ends_at_the_interval():
    table = two_factors().assign(series="all")
    last = table[table["pooling"] == "last"]
    summary = summarise(last, ["alpha", "series"]).assign(low=0.8, high=0.9)
    band, means, _ = plots.factor_effect(summary, ablations.by_seed(last), "alpha").data
    assert list(band.y) == [90, 90, 80, 80]
    assert means.mode == "lines+markers"
    assert list(means.x) == [0, 1]


def test_the_heat_map_has_the_mean_of_each_pair_of_weights():
    rows = [(0.0, 0.5, 0.4), (1.0, 0.5, 0.5), (0.0, 1.0, 0.6), (1.0, 1.0, 0.7)]
    summary = pd.DataFrame(rows, columns=["alpha", "beta", "value"]).assign(low=0.1, high=0.9)
    (cells,) = plots.weight_heat_map(summary).data
    assert cells.z.tolist() == [[40, 50], [60, 70]]
    assert cells.text[1][1] == "70.0%<br>[10.0, 90.0]"
    assert (list(cells.x), list(cells.y)) == (["0", "1"], ["0.5", "1"])


@pytest.mark.parametrize("draw", ["factor_effect", "weight_heat_map"])
def test_both_axes_have_titles_and_the_metric_its_unit(draw):
    table = two_factors().assign(series="all", beta=1.0)
    summary = summarise(table[table["pooling"] == "last"], ["alpha", "beta", "series"])
    figure = (
        plots.weight_heat_map(summary)
        if draw == "weight_heat_map"
        else plots.factor_effect(summary, ablations.by_seed(table), "alpha")
    )
    assert figure.layout.title.text.split("?")[1]
    assert figure.layout.xaxis.title.text
    assert figure.layout.yaxis.title.text
    assert "%" in figure.to_json()
