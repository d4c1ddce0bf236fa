"""No dead field: every configuration field changes a run, or reaches what it controls."""

from __future__ import annotations

import pytest
from conftest import tiny_backbone
from small_runs import config, read_rows, weights, write_rows

from dhrd_lib.backbones import BackboneError
from dhrd_lib.config import DataConfig, ModelConfig, TrainingConfig
from dhrd_lib.modeling import DHRDModel
from dhrd_lib.runs import Run
from dhrd_lib.training import train

pytestmark = pytest.mark.usefixtures("own_cache")


CHANGES = {
    "model__backbone": None,  # a folder
    "model__pooling": "mean",
    "model__head": "linear",
    "model__finetune": "lora",
    "model__freeze_layers": 1,
    "model__dtype": "bfloat16",
    "data__alignment": "shuffle_rationale",
    "data__shuffled_share": 0.5,
    "data__order": "label_rationale",
    "data__max_input_tokens": 8,
    "data__max_rationale_tokens": 4,
    "data__truncation_side": "right",
    "data__metrics": ["macro_f1"],
    "data__dev_fraction": 0.3,
    "data__max_train_rows": 16,
    "data__max_eval_rows": 4,
    "data__split_seed": 1,
    "data__template": "{text}?",
    "data__rationale": None,
    "data__group": "idx",
    "training__class_weights": "balanced",
    "training__alpha": 0.5,
    "training__alpha_share": 2.0,
    "training__beta": 0.5,
    "training__alpha_schedule": "linear",
    "training__beta_delay": 0.5,
    "training__privileged_head": "shared",
    "training__privileged_gamma": 3.0,
    "training__privileged_temperature": 3.0,
    "training__lm_span": "rationale_label",
    "training__epochs": 1,
    "training__max_steps": 3,
    "training__batch_size": 4,
    "training__gradient_accumulation_steps": 2,
    "training__learning_rate": 1e-3,
    "training__classifier_learning_rate": 1e-3,
    "training__weight_decay": 0.5,
    "training__warmup_steps": 5,
    "training__lr_schedule": "cosine",
    "training__max_grad_norm": 0.01,
    "training__eval_steps": 2,
    "training__logging_steps": 2,
    "training__seed": 1,
}


# Some show only beside others, which both runs have.
TAUGHT = {"training__privileged_head": "separate", "training__privileged_gamma": 1.0}
TOGETHER = {
    "data__truncation_side": {"data__max_input_tokens": 8},
    "data__shuffled_share": {"data__alignment": "shuffle_rationale"},
    "training__alpha_share": {"training__alpha": "auto"},
    "training__privileged_gamma": TAUGHT,
    "training__privileged_temperature": TAUGHT,
}


def trace(run: Run) -> tuple:
    """What a run computed: its log, without times, and its final weights."""
    history = run.history.drop(columns=[c for c in run.history if "runtime" in c or "per_second" in c])
    total = sum(tensor.double().sum().item() for tensor in weights(run).values())
    return history.to_json(), total, tuple(run.metrics["splits"]), run.predictions("test").to_json()


@pytest.mark.parametrize("field", CHANGES)
def test_every_field_changes_the_run(table, tmp_path, finished, field):
    value, shared = CHANGES[field], TOGETHER.get(field, {})
    if field == "model__backbone":
        value = str(tmp_path / "qwen3")
        for part in tiny_backbone("qwen3")[:2]:
            part.save_pretrained(value)
    if field == "data__rationale":  # Left out, the column is found under its own name: name one that isn't there.
        with pytest.raises(ValueError, match="nowhere"):
            train(config(table, "changed", data__rationale="nowhere"), tmp_path)
        return
    if field == "training__class_weights":  # The table's two classes are equally frequent.
        rows = [row for i, row in enumerate(read_rows(table)) if i % 2 or i % 3]
        table = write_rows(tmp_path / "rows.jsonl", rows)
    if shared or field == "training__class_weights":
        finished = train(config(table, "before", **shared), tmp_path)
    changed = train(config(table, "changed", **{**shared, field: value}), tmp_path)
    assert trace(changed) != trace(finished)


def test_other_fields_reach_what_they_control(table, tmp_path, finished, monkeypatch):
    """Device, LoRA's numbers, chunk, evaluation batch, patience and reporting reach what they steer."""
    from dhrd_lib import training

    trainers = []
    init = training.DHRDTrainer.__init__

    def recording(self, *args, **kwargs):
        init(self, *args, **kwargs)
        trainers.append(self)

    monkeypatch.setattr(training.DHRDTrainer, "__init__", recording)
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "tensorboard"))
    changes = {"model__finetune": "lora", "model__lora_r": 3, "model__lora_alpha": 5, "model__lora_dropout": 0.25}
    changes |= {"training__lm_chunk_tokens": 7, "training__eval_batch_size": 5, "training__epochs": 6}
    changes |= {"training__early_stopping_patience": 1, "training__report_to": ["tensorboard"]}
    changes |= dict.fromkeys(("training__learning_rate", "training__classifier_learning_rate"), 1e-9)
    run = train(config(table, "changed", **changes), tmp_path)
    trainer, model = trainers[0], trainers[0].model
    layer = model.backbone.model.layers[0].self_attn.q_proj
    assert (layer.r["default"], layer.lora_alpha["default"], layer.lora_dropout["default"].p) == (3, 5, 0.25)
    assert model.config.lm_chunk_tokens == 7
    assert trainer.args.per_device_eval_batch_size == 5
    assert run.metrics["steps"] < 6 * finished.metrics["steps"] // 2  # Nothing gained: stopped early.
    assert any((tmp_path / "tensorboard").rglob("events.*"))
    with pytest.raises(BackboneError, match="device is 'nowhere'; expected one of"):
        train(config(table, "elsewhere", model__device="nowhere"), tmp_path)


def test_keep_model_false_keeps_predictions(table, tmp_path, finished):
    run = train(config(table, "light", training__keep_model=False), tmp_path)
    assert run.predictions("test").equals(finished.predictions("test"))
    with pytest.raises(
        FileNotFoundError, match=r"light.model holds no model; expected a folder of save_pretrained"
    ):
        DHRDModel.from_pretrained(run.folder / "model")


def test_every_field_is_tested():
    sections = {"model": ModelConfig, "data": DataConfig, "training": TrainingConfig}
    named = {f"{part}__{name}" for part, section in sections.items() for name in section.model_fields}
    steered = {
        *("model__device", "model__lora_r", "model__lora_alpha", "model__lora_dropout"),
        *("training__lm_chunk_tokens", "training__eval_batch_size", "training__early_stopping_patience"),
        "training__report_to",
        *("data__label_names", "data__encoding", "data__columns"),  # tests/data
        "training__cache_trunk",  # test_trunk_cache_changes_no_loss
        "training__keep_model",  # test_keep_model_false_keeps_predictions
        *("data__task", "data__data_dir", "data__text", "data__label"),  # tests/data
    }
    assert named == set(CHANGES) | steered
