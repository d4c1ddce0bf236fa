"""A configuration against its pooled baseline: twins that differ in alpha alone."""

from __future__ import annotations

import json

import pandas as pd
import pytest

from dhrd_lib.config import ConfigError, RunConfig
from dhrd_lib.studies.comparison import (
    PROFILES,
    compare_with_baseline,
    comparison,
    paper_config,
    with_baselines,
)
from dhrd_lib.training import train

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


@pytest.mark.parametrize(("backbone", "alpha"), [("meta-llama/Llama-3.2-3B", 1.0), ("Qwen/Qwen3-4B", 0.5)])
def test_paper_config_is_the_papers(backbone, alpha):
    config = paper_config(backbone, "rte")
    model, training = config.model, config.training
    assert (model.finetune, model.lora_r, model.lora_alpha, model.lora_dropout) == ("lora", 16, 32, 0.1)
    assert (training.alpha, training.beta, training.epochs, training.batch_size) == (alpha, 1.0, 3, 1)
    assert training.learning_rate == training.classifier_learning_rate == 2e-4
    assert (training.weight_decay, training.lr_schedule, training.warmup_steps) == (0.01, "cosine", 5)
    assert training.gradient_accumulation_steps == 32
    assert paper_config(backbone, "rte", processes=1).training.gradient_accumulation_steps == 256
    with pytest.raises(ConfigError, match="processes is 3"):
        paper_config(backbone, "rte", processes=3)


def test_paper_config_trains_on_superglue_files(tmp_path):
    row, labels = {"premise": "It rains.", "hypothesis": "It is wet."}, ("entailment", "contradiction", "neutral")
    for split, count in (("train", 250), ("val", 6)):  # CB's packaged rationales are for 250 rows.
        rows = [{"idx": n, **row, "label": labels[n % 3]} for n in range(count)]
        path = tmp_path / "CB" / f"{split}.jsonl"
        path.parent.mkdir(exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    small = {"data.data_dir": str(tmp_path), "data.max_train_rows": 8, "training.max_steps": 1}
    small |= {"model.device": "cpu", "data.max_input_tokens": 64, "training.gradient_accumulation_steps": 8}
    run = train(paper_config("tiny", "cb").replace(small), tmp_path / "runs")
    assert (run.name, run.metrics["steps"]) == ("paper-tiny-cb", 1)
    assert set(run.metrics["splits"]["validation"]) >= {"macro_f1", "accuracy"}
    assert run.metrics["sequences"]["train"]["lm_tokens"] > 0


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
