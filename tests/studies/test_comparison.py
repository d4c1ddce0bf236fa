"""A configuration against its pooled baseline: twins that differ in alpha alone."""

from __future__ import annotations

import pandas as pd
import pytest

from dhrd_lib.config import ConfigError, RunConfig
from dhrd_lib.studies.comparison import PROFILES, compare_with_baseline, comparison, with_baselines

pytestmark = pytest.mark.usefixtures("own_cache")
TINY = {
    "name": "mine",
    "model": {"backbone": "tiny", "device": "cpu", "freeze_layers": 2},
    "data": {"max_train_rows": 24, "max_eval_rows": 12, "max_input_tokens": 64},
    "training": {"epochs": 1, "batch_size": 8, "alpha": 0.5},
}


def without(config: RunConfig, *fields: str) -> dict:
    values = config.to_dict() | {"name": None}
    return values | {"training": {name: of for name, of in values["training"].items() if name not in fields}}


@pytest.mark.parametrize("profile", PROFILES)
def test_profiles_pair_runs_that_differ_in_alpha(profile):
    configs = comparison(profile)
    assert len({config.name for config in configs}) == len(configs)
    for dhrd, baseline in zip(configs[::2], configs[1::2], strict=True):
        assert without(dhrd, "alpha") == without(baseline, "alpha")
        assert (dhrd.training.setting, baseline.training.setting) == ("DHRD", "pooled baseline")
    assert {config.training.seed for config in configs} == set(range(PROFILES[profile]["seeds"]))
    assert {config.data.task for config in configs} == set(PROFILES[profile]["tasks"])


@pytest.mark.parametrize("weight", ["alpha", "beta"])
def test_only_dhrd_has_a_baseline(weight):
    config = RunConfig.from_dict(TINY | {"training": {"alpha": 1.0, "beta": 1.0, weight: 0.0}})
    with pytest.raises(ConfigError, match="expected both above 0"):
        with_baselines(config, [0])


def test_comparison_trains_twins_and_tabulates_them(tmp_path):
    result = compare_with_baseline(RunConfig.from_dict(TINY), tmp_path, seeds=[0, 1])
    assert [run.name for run in result.dhrd] == ["mine-dhrd-seed0", "mine-dhrd-seed1"]
    assert [run.config.training.alpha for run in result.runs] == [0.5, 0, 0.5, 0]
    assert len(result.baselines) == 2
    table = result.table().set_index(["split", "setting"])
    report = result.write_report(tmp_path / "report.html").set_index(["split", "setting"])
    assert "DHRD" in (tmp_path / "report.html").read_text()
    columns = ["n_seeds", "value", "difference"]
    pd.testing.assert_frame_equal(table[columns].sort_index(), report[columns].sort_index())
