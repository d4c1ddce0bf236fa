"""Tables of runs: they survive their file, and settings are compared seed by seed on the same rows."""

from __future__ import annotations

import json

import numpy as np
import pandas as pd
import pytest

from dhrd_lib.config import WorkbenchError
from dhrd_lib.studies import tables
from dhrd_lib.studies.ablations import AblationResult
from dhrd_lib.studies.statistics import bootstrap_interval
from dhrd_lib.studies.tables import compare, one_factor, summarize
from dhrd_lib.widgets import AblationDashboard


def made(predictions: dict[tuple, list[int]], labels: list[int]) -> pd.DataFrame:
    """Return a table by hand: predictions by (alpha, seed)."""
    shared = {"task": "t", "split": "test", "task_metrics": ("accuracy",), "groups": None, "labels": tuple(labels)}
    shared |= {"train_seconds": 1.0, "train_tokens": 10, "tokens_per_second": 10.0, "environment": {}}
    rows = [
        {
            "run": f"a{alpha}-s{seed}",
            "setting": "DHRD" if alpha else "pooled baseline",
            "alpha": alpha,
            "seed": seed,
        }
        | {"predictions": tuple(of), **shared}
        for (alpha, seed), of in predictions.items()
    ]
    return pd.DataFrame(rows)


def two_factors() -> pd.DataFrame:
    """Return two seeds of alpha 0 and 1 with `last` pooling, and of alpha 1 with `mean`."""
    labels = [0, 1] * 10
    runs = made({(alpha, seed): labels for alpha in (0.0, 1.0) for seed in (0, 1)}, labels).assign(pooling="last")
    mean = runs[runs["alpha"] == 1].assign(pooling="mean", predictions=[tuple([0] * 20)] * 2)
    return pd.concat([runs, mean.assign(run=mean["run"] + "-mean")], ignore_index=True)


def test_stored_table_loads_as_it_was(tmp_path):
    table = two_factors().assign(text=[[]] * 6, label=None, groups=[(f"q{i}",) * 20 for i in range(6)])
    table = table.assign(task=["t"] * 4 + ["u"] * 2, groups=[None] * 4 + [tuple("ab" * 10)] * 2)
    tables.store_results(table, tmp_path / "results.json")
    pd.testing.assert_frame_equal(tables.load_results(tmp_path / "results.json")[list(table)], table)
    assert set(json.loads((tmp_path / "results.json").read_text())["shared"]) >= {"split", "environment", "text"}


def test_summary_is_mean_over_seeds_with_bootstrap():
    labels = [0, 1] * 20
    wrong = [1 - labels[0], *labels[1:]]
    row = summarize(made({(1.0, 0): labels, (1.0, 1): wrong}, labels), ["alpha"]).iloc[0]
    expected = bootstrap_interval(["accuracy"], labels, [labels, wrong])
    assert (row["value"], row["low"], row["high"]) == (expected.value, expected.low, expected.high)
    assert row["value"] == pytest.approx(1 - 0.5 / 40)
    assert row["n_seeds"] == 2
    assert row["std"] == pytest.approx(np.std([1, 39 / 40], ddof=1))


def test_comparison_is_paired_by_seed_and_corrected():
    labels = [0, 1] * 20
    flipped = [1 - label for label in labels]
    runs = {(0.0, 0): labels, (0.0, 1): flipped, (1.0, 1): flipped, (1.0, 0): labels, (2.0, 0): flipped}
    rows = compare(made(runs, labels), ["alpha"], {"alpha": 0.0}).set_index("alpha")
    assert rows.loc[1.0, ["n_seeds", "difference", "low", "high"]].tolist() == [2, 0, 0, 0]
    assert rows.loc[2.0, "n_seeds"] == 1
    assert rows.loc[2.0, "difference"] == -1
    assert rows.loc[2.0, "p_holm"] == pytest.approx(2 * rows.loc[2.0, "p_value"])


def test_runs_that_cannot_be_compared_are_named():
    runs = made({(0.0, 0): [0, 1], (1.0, 0): [0, 1]}, [0, 1])
    with pytest.raises(WorkbenchError, match=r"no run is of the reference \{'alpha': 3.0\}"):
        compare(runs, ["alpha"], {"alpha": 3.0})
    with pytest.raises(WorkbenchError, match="'a0.0-s0' and 'a1.0-s0' have the same task, split, head and seed"):
        summarize(runs.assign(head="mlp"), ["head"])
    with pytest.raises(WorkbenchError, match="'a0.0-s0' and 'a1.0-s0' have different rows of t test"):
        compare(runs.assign(labels=[(0, 1), (1, 1)]), ["alpha"], {"alpha": 0.0})


def test_compare_without_other_settings_is_empty():
    assert compare(made({(0.0, 0): [0, 1]}, [0, 1]), ["alpha"], {"alpha": 0.0}).empty


def test_factors_differ_within_a_task():
    here = two_factors().assign(freeze_layers=26)
    assert tables.factors(here) == ["alpha", "pooling"]
    assert tables.factors(pd.concat([here, here.assign(task="u", freeze_layers=20)])) == ["alpha", "pooling"]


def test_one_factor_holds_others_where_most_values_were_run():
    table = two_factors()
    assert set(one_factor(table, "alpha")["pooling"]) == {"last"}
    assert set(one_factor(table, "pooling")["alpha"]) == {1.0}
    both = one_factor(table, "alpha", "pooling")
    assert len(both) == len(table)
    assert set(both["series"]) == {"pooling last", "pooling mean"}
    tasks = pd.concat([table, table.assign(task="u")])
    assert set(one_factor(tasks, "alpha")["series"]) == {"t", "u"}


def test_rationale_axes_leave_out_other_settings():
    columns = ["alpha", "alignment", "shuffled_share", "max_rationale_tokens"]
    cells = [
        (0.0, "consistent", 1.0, 128),
        (1.0, "consistent", 1.0, 128),
        (1.0, "shuffle_rationale", 0.25, 128),
        (1.0, "only_label", 1.0, 8),
        (1.0, "shuffle_rationale_label", 1.0, 16),
    ]
    table = pd.DataFrame(cells, columns=columns).assign(task="t", split="test")
    assert one_factor(table, "share_of_wrong_rationales")["share_of_wrong_rationales"].tolist() == [0, 0.25]
    assert one_factor(table, "rationale_tokens")["rationale_tokens"].tolist() == [128, 0]


def test_dashboard_shows_the_chosen_runs():
    dashboard = AblationDashboard(two_factors())
    dashboard.controls["factor"].value, dashboard.controls["line"].value = "pooling", None
    means, runs = dashboard.drawn().data
    assert (list(means.x), list(means.y)) == (["last", "mean"], [100, 50])
    assert set(runs.customdata[:, 0]) == {"a1.0-s0", "a1.0-s1", "a1.0-s0-mean", "a1.0-s1-mean"}
    dashboard.controls["metric"].value = "macro_f1"
    assert list(dashboard.drawn().data[0].y) == [100, pytest.approx(100 / 3)]


def test_auto_alpha_is_compared_and_drawn():
    labels = [0, 1] * 10
    table = made({(alpha, 0): labels for alpha in (0.0, 1.0, "auto")}, labels).assign(beta=1.0)
    result = AblationResult("loss_weights", table)
    assert result.summary()["alpha"].tolist() == [0.0, 1.0, "auto"]
    assert result.against(alpha=0.0)["alpha"].tolist() == [1.0, "auto"]
    assert result.plot("alpha").layout.xaxis.title.text == "alpha"
