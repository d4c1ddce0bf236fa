"""Every field is checked, survives JSON, and changes something."""

from __future__ import annotations

import dataclasses
import re

import pytest

from dhrd_lib.config import ConfigError, DataConfig, ModelConfig, RunConfig, TrainingConfig


def test_json_round_trip_keeps_every_field(tmp_path):
    config = RunConfig(
        name="mine",
        model=ModelConfig(backbone="tiny", pooling="mean", lora_dropout=0.2),
        data=DataConfig(task="my.csv", text=("a", "b"), label="y"),
        training=TrainingConfig(alpha=0.5, report_to=("tensorboard",), cache_trunk=False),
    )
    config.save(tmp_path / "config.json")
    assert RunConfig.load(tmp_path / "config.json") == config


def test_replace_reaches_into_sections_and_checks():
    config = RunConfig().replace(name="other", training__alpha=0.25)
    assert (config.name, config.training.alpha) == ("other", 0.25)
    with pytest.raises(ConfigError, match="alpha"):
        config.replace(training__alpha=-1)


@pytest.mark.parametrize(
    ("section", "values", "message"),
    [
        (ModelConfig, {"pooling": "median"}, "pooling is 'median'; expected one of 'last', 'mean', "),
        (ModelConfig, {"head": "deep"}, "head is 'deep'; expected one of 'mlp', 'linear'."),
        (ModelConfig, {"backbone": ""}, "backbone is ''; expected a name, a folder or a hub id."),
        (ModelConfig, {"freeze_layers": -1}, "freeze_layers is -1; expected a whole number, 0 or more."),
        (ModelConfig, {"lora_dropout": 1.0}, "lora_dropout is 1.0; expected a finite number, 0 or more and "),
        (ModelConfig, {"finetune": "lora", "freeze_layers": 2}, "freeze_layers is 2 with finetune='lora'"),
        (
            ModelConfig,
            {"markers": "special", "freeze_layers": 2},
            "markers is 'special' with freeze_layers=2",
        ),
        (DataConfig, {"alignment": "random"}, "alignment is 'random'; expected one of 'consistent', "),
        (
            DataConfig,
            {"dev_fraction": 0},
            "dev_fraction is 0; expected a finite number, above 0 and below 1.",
        ),
        (DataConfig, {"task": ""}, "task is ''; expected a task's name or a data file's path."),
        (
            DataConfig,
            {"max_input_tokens": 8.5},
            "max_input_tokens is 8.5; expected a whole number, 8 or more.",
        ),
        (TrainingConfig, {"alpha": -0.1}, "alpha is -0.1; expected a finite number, 0 or more."),
        (TrainingConfig, {"beta": float("nan")}, "beta is nan; expected a finite number, 0 or more."),
        (
            TrainingConfig,
            {"alpha": 0, "beta": 0},
            "alpha and beta are both 0; expected at least one of them ",
        ),
        (TrainingConfig, {"epochs": 0}, "epochs is 0; expected a whole number, 1 or more."),
        (TrainingConfig, {"epochs": True}, "epochs is True; expected a whole number, 1 or more."),
        (TrainingConfig, {"learning_rate": 0}, "learning_rate is 0; expected a finite number, above 0."),
        (
            DataConfig,
            {"shuffled_share": 1.5},
            "shuffled_share is 1.5; expected a finite number, 0 or more and at most 1.",
        ),
        (TrainingConfig, {"keep_model": 1}, "keep_model is 1; expected true or false."),
        (TrainingConfig, {"cache_trunk": "no"}, "cache_trunk is 'no'; expected true or false."),
        (RunConfig, {"name": "../up"}, "name is '../up'; expected a plain folder name."),
        (RunConfig, {"name": ".."}, "name is '..'; expected a plain folder name."),
    ],
)
def test_a_bad_value_is_refused_in_one_sentence(section, values, message):
    with pytest.raises(ConfigError, match="^" + re.escape(message)):
        section(**values)


def test_an_unknown_field_is_refused_by_its_full_name():
    with pytest.raises(ConfigError, match=r"^training\.alhpa is not a field; expected one of alpha, beta, "):
        RunConfig.from_dict({"training": {"alhpa": 1}})
    with pytest.raises(ConfigError, match="^nmae is not a field; expected one of name, model, data, training"):
        RunConfig.from_dict({"nmae": "x"})
    with pytest.raises(ConfigError, match=r"^model\. is 3; expected a mapping of fields"):
        RunConfig.from_dict({"model": 3})


def test_a_file_that_is_not_json_is_named(tmp_path):
    path = tmp_path / "config.json"
    path.write_text("{")
    with pytest.raises(ConfigError, match=r"config\.json is not JSON"):
        RunConfig.load(path)


def test_setting_is_what_the_paper_calls_the_weights():
    assert TrainingConfig(alpha=0).setting == "pooled baseline"
    assert TrainingConfig(alpha=1, beta=1).setting == "DHRD"
    assert TrainingConfig(alpha=1, beta=0).setting == "reasoning only"


def test_configurations_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        RunConfig().training.alpha = 2
