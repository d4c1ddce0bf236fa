"""The study's stages: what they train next, and what they keep of a cell."""

import pandas as pd
import pytest

from benchmarks import study, study_results
from benchmarks.study import Cell

BUDGET = ["budget 0.0001 12 8", "budget 0.0002 12 8"]


def results(right: dict[str, int], seeds=(100, 101), split="dev") -> pd.DataFrame:
    """Return results in which each setting has so many of 10 rows right."""
    rows = [
        {"setting": setting, "seed": seed, "predictions": (0,) * n_right + (1,) * (10 - n_right)}
        | {"run": Cell(setting, 128, seed, {}).name, "class_loss": 1.0, "split": split, "max_train_rows": 128}
        | {"labels": (0,) * 10, "task_metrics": ("accuracy",), "groups": None}
        for setting, n_right in right.items()
        for seed in seeds
    ]
    return pd.DataFrame(rows)


def test_budget_is_the_best_on_dev():
    table = pd.concat([results({BUDGET[0]: 5, BUDGET[1]: 6}), results({BUDGET[0]: 9}, split="test")])
    expected = {"training.learning_rate": 2e-4, "model.freeze_layers": 12, "training.batch_size": 8}
    assert study.budget(table) == expected


def test_screening_halves_only_complete_rounds():
    names = [name for name in study.SETTINGS if name != study.BASELINE]
    scores = {name: place % 10 for place, name in enumerate(names)} | {BUDGET[0]: 5, study.BASELINE: 5}
    table = results(scores)
    second = {cell.setting for cell in study.missing(study.screening_cells(table), table)}
    best = sorted(names, key=scores.get, reverse=True)[: (len(names) + 1) // 2]
    assert second == {study.BASELINE, *best}
    incomplete = table[table["run"] != Cell(names[0], 128, 101, {}).name]
    assert [cell.setting for cell in study.missing(study.screening_cells(incomplete), incomplete)] == [names[0]]


def test_a_cell_keeps_results_and_no_run(tmp_path):
    fields = study.SETTINGS[study.BASELINE] | {"model.backbone": "tiny", "training.epochs": 1}
    cell, path = Cell(study.BASELINE, 32, 100, fields), tmp_path / "study_support_triage.json"
    study.train_cell(cell, {"data.task": "support_triage"}, tmp_path, path)
    table = study.stored(path)
    assert set(table["setting"]) == {study.BASELINE, study.FLOOR}
    assert set(table["split"]) == {"dev", "test", "test_new_domain"}
    assert table[table["setting"] == study.BASELINE][["class_loss", "calibration_error"]].notna().all(axis=None)
    assert not study.missing([cell], table)
    assert not (tmp_path / cell.name).exists()


def test_takeaways_name_what_is_clear_of_zero():
    table = results({study.BASELINE: 4, "privileged": 9, study.FLOOR: 3}, range(5), "test").assign(task="triage")
    found = study_results.differences(table)
    assert found[["setting", "difference", "above_floor"]].to_numpy().tolist() == [["privileged", 0.5, True]]
    assert "`privileged` helps at 128 rows: +50.0" in study_results.takeaways(table)


@pytest.mark.parametrize("setting", study.SETTINGS)
def test_settings_are_configurations(setting):
    config = Cell(setting, 64, 3, study.SETTINGS[setting]).config({"data.task": "everyday_nli"})
    assert (config.data.split_seed, config.training.seed, config.data.max_train_rows) == (3, 3, 64)
