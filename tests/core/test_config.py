"""Configurations: each field is checked and goes to JSON and back; a wrong value is one sentence."""

from __future__ import annotations

import json
import re

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from dhrd_lib.config import ConfigError, DataConfig, ModelConfig, RunConfig, TrainingConfig

SECTIONS = {"model": ModelConfig, "data": DataConfig, "training": TrainingConfig}
ANY_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
FIELDS = [f"{section}.{field}" for section, of in SECTIONS.items() for field in of.model_fields]


def test_json_round_trip(tmp_path):
    config = RunConfig(
        name="mine",
        model=ModelConfig(backbone="tiny", pooling="mean", lora_dropout=0.2),
        data=DataConfig(task="my.csv", text=["a", "b"], label="y"),
        training=TrainingConfig(alpha=0.5, report_to="tensorboard", cache_trunk=False),
    )
    config.save(tmp_path / "config.json")
    path = tmp_path / "config.json"
    assert RunConfig.load(path) == config
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())  # a byte order mark
    assert RunConfig.load(path) == config
    assert (config.data.text, config.training.report_to) == (("a", "b"), ("tensorboard",))


def test_old_config_with_text_markers_loads():
    assert RunConfig.from_dict({"model": {"markers": "text"}}) == RunConfig()


def test_replace_reaches_into_sections():
    config = RunConfig().replace({"name": "other", "training.alpha": 0.25, "data": {"task": "cb"}})
    assert (config.name, config.training.alpha, config.data.task) == ("other", 0.25, "cb")
    with pytest.raises(ConfigError, match=r"^training\.alpha is -1; expected greater than or equal to 0\.$"):
        config.replace({"training.alpha": -1})
    for unknown in ("training.alhpa", "trainings.alpha", "name.alpha"):
        with pytest.raises(ConfigError, match=f"{unknown.split('.')[1]}|trainings"):
            config.replace({unknown: 1})


@pytest.mark.parametrize(
    ("section", "values"),
    [
        (ModelConfig, {"pooling": "median"}),
        (ModelConfig, {"lora_dropout": 1.0}),
        (ModelConfig, {"freeze_layers": 2, "finetune": "lora"}),
        (DataConfig, {"alignment": "random"}),
        (DataConfig, {"text": 3}),
        (DataConfig, {"split_seed": 2**32}),
        (TrainingConfig, {"alpha": 10**400}),
        (TrainingConfig, {"alpha": 0, "beta": 0.0}),
        (TrainingConfig, {"alpha": "Auto"}),
        (TrainingConfig, {"alpha": "auto", "beta": 0}),
        (TrainingConfig, {"alpha": "auto", "alpha_schedule": "linear"}),
        (TrainingConfig, {"alpha": "auto", "beta_delay": 0.5}),
        (TrainingConfig, {"beta_delay": 1.0}),
        (TrainingConfig, {"beta_delay": 0.5, "alpha": 0}),
        (TrainingConfig, {"beta_delay": 0.5, "beta": 0}),
        (TrainingConfig, {"beta_delay": 0.5, "early_stopping_patience": 2}),
        (TrainingConfig, {"privileged_head": "separate", "beta": 0}),
        (TrainingConfig, {"privileged_gamma": 1.0}),
        (TrainingConfig, {"beta": float("nan")}),
        (TrainingConfig, {"epochs": True}),
        (TrainingConfig, {"report_to": None}),
        (RunConfig, {"name": "../up"}),
        (RunConfig, {"name": "n" * 256}),
    ],
)
def test_wrong_value_is_refused(section, values):
    with pytest.raises(ConfigError, match=f"^{next(iter(values))} .*expected .*[.]$"):
        section(**values)


@pytest.mark.parametrize(
    ("changes", "other"),
    [
        ({"data.order": "label_rationale", "training.beta": 0}, "beta=0"),
        ({"data.order": "label_rationale", "training.privileged_head": "shared"}, "privileged_head='shared'"),
        ({"data.alignment": "only_label", "training.privileged_head": "shared"}, "privileged_head='shared'"),
    ],
)
def test_sections_that_do_not_fit_are_refused(changes, other):
    (name, value), *_ = changes.items()
    with pytest.raises(ConfigError, match=f"^{name} is '{value}' with training.{other}.*; expected .*[.]$"):
        RunConfig().replace(changes)


def test_unknown_field_is_named():
    with pytest.raises(ConfigError, match=r"^training\.alhpa is not a field; expected one of alpha, beta, "):
        RunConfig.from_dict({"training": {"alhpa": 1}})
    with pytest.raises(ConfigError, match="^nmae is not a field; expected one of name, model, data, training"):
        RunConfig.from_dict({"nmae": "x"})
    for wrong in ({"model": 3}, [1], None):
        with pytest.raises(ConfigError, match="expected a"):
            RunConfig.from_dict(wrong)


@pytest.mark.parametrize("content", [b"{", b"", b"[1]", b'{"name": "\xe9"}', b'{"training": {"gamma": 1}}', None])
def test_wrong_file_is_named(tmp_path, content):
    path = tmp_path / "config.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=re.escape(str(path))):
        RunConfig.load(path)


def test_setting_is_the_papers_name():
    assert TrainingConfig(alpha=0).setting == "pooled baseline"
    assert TrainingConfig(alpha=1, beta=1).setting == "DHRD"
    assert TrainingConfig(alpha=0, privileged_head="shared").setting == "privileged pooling"
    assert TrainingConfig(alpha=1, beta=0).setting == "reasoning only"


def test_configurations_are_frozen():
    with pytest.raises(ValidationError, match="frozen"):
        RunConfig().training.alpha = 2
    assert hash(DataConfig(label_names=["a", "b"])) == hash(DataConfig(label_names={"0": "a", "1": "b"}))


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.dictionaries(st.sampled_from(FIELDS), ANY_JSON, max_size=2), ANY_JSON)
def test_any_json_round_trips_or_is_refused(tmp_path, changes, other):
    path = tmp_path / "config.json"
    for values in (other, RunConfig().to_dict()):
        if isinstance(values, dict) and "model" in values:
            for key, value in changes.items():
                section, field = key.split(".")
                values[section][field] = value
        path.write_text(json.dumps(values))
        try:
            config = RunConfig.load(path)
        except ConfigError:
            continue
        config.save(path)
        assert RunConfig.load(path) == config
