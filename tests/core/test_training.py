"""Training: what a run stores, two denominators, and a baseline that is the baseline to the last bit."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from small_runs import assert_same_weights, config, logged, read_rows, weights, write_rows
from transformers import TrainerCallback, TrainerState

from dhrd_lib.backbones import load_backbone
from dhrd_lib.config import ConfigError, DataConfig, ModelConfig, RunConfig, TrainingConfig
from dhrd_lib.modeling import DHRDModel
from dhrd_lib.runs import find_runs, load_run, load_runs
from dhrd_lib.trainer import LengthGroupedSampler, LossWeights
from dhrd_lib.training import train

pytestmark = pytest.mark.usefixtures("own_cache")


def test_run_stores_everything(finished):
    assert RunConfig.load(finished.folder / "config.json") == finished.config
    assert torch.__version__.startswith(finished.environment["packages"]["torch"])  # which may add "+cu130"
    assert finished.environment["dtype"] == "float32"
    assert finished.test_splits == ["test"]
    predictions = finished.predictions("test")
    assert predictions["idx"].is_unique
    accuracy = (predictions["label"] == predictions["prediction"]).mean()
    assert finished.metrics["splits"]["test"]["accuracy"] == pytest.approx(accuracy)
    assert accuracy >= 0.8  # Even a tiny model learns the two classes.
    assert not (finished.folder / "checkpoints").exists()
    suffixes = {path.suffix for path in finished.folder.rglob("*") if path.is_file()}
    assert suffixes == {".json", ".jsonl", ".safetensors"}


def test_logged_terms_add_up(finished):
    terms = logged(finished, "loss", "class_loss", "lm_loss", "alpha")
    assert len(terms) == finished.metrics["steps"]
    for _, loss, class_loss, lm_loss, alpha in terms:
        assert alpha == 1.0
        assert loss == pytest.approx(class_loss + lm_loss, abs=1e-4)
    dev = finished.history["eval_primary"].dropna()
    assert len(dev) == finished.config.training.epochs


def test_stored_model_repeats_stored_predictions(finished):
    model = DHRDModel.from_pretrained(finished.folder / "model")
    rows = finished.predictions("test")
    found = model.predict(rows["input_text"].tolist())
    assert found.labels == rows["prediction"].tolist()
    np.testing.assert_allclose(found.probabilities, np.stack(rows["probabilities"]), atol=1e-5)


def test_finished_run_is_returned_other_config_refused(finished, monkeypatch):
    monkeypatch.setattr("dhrd_lib.training._train", lambda *_: pytest.fail("trained again"))
    assert train(finished.config, finished.folder.parent).metrics == finished.metrics
    with pytest.raises(ConfigError, match="holds a run of another configuration"):
        train(finished.config.replace({"training.alpha": 0.5}), finished.folder.parent)


def test_load_runs_has_a_row_per_run_and_split(finished):
    frame = load_runs(finished.folder.parent)
    assert set(frame["split"]) == {"dev", "test"}
    row = frame[frame["split"] == "test"].iloc[0]
    assert row["setting"] == "DHRD"
    assert row["primary"] == finished.metrics["splits"]["test"]["primary"]
    fields = {name for part in (ModelConfig, DataConfig, TrainingConfig) for name in part.model_fields}
    assert fields <= set(frame.columns)


def test_run_is_named_after_its_folder(finished, tmp_path, monkeypatch):
    for name in ("first", "second"):
        shutil.copytree(finished.folder, tmp_path / name)
    (tmp_path / "link").symlink_to(tmp_path / "second", target_is_directory=True)
    assert [run.name for run in find_runs(tmp_path)] == ["first", "link", "second"]
    assert load_runs(tmp_path)["run"].unique().tolist() == ["first", "link", "second"]
    monkeypatch.chdir(tmp_path / "first")
    assert load_run(".").name == "first"


def test_unreadable_run_is_left_out_with_warning(finished, tmp_path):
    shutil.copytree(finished.folder, tmp_path / "good")
    shutil.copytree(finished.folder, tmp_path / "torn")
    (tmp_path / "torn" / "metrics.json").write_text('{"splits": {')
    with pytest.warns(UserWarning, match=r"torn can't be loaded"):
        assert len(load_runs(tmp_path)) == 2
    with pytest.raises(FileNotFoundError, match="holds no finished run"):
        load_run(tmp_path)


def test_run_of_version_0_1_loads(finished, tmp_path):
    folder = shutil.copytree(finished.folder, tmp_path / "old")
    names, path = finished.label_names, folder / "predictions_test.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    indices = [{**row, **{name: names.index(row[name]) for name in ("label", "prediction")}} for row in rows]
    path.write_text("".join(json.dumps(row) + "\n" for row in indices))
    assert load_run(folder).predictions("test").equals(finished.predictions("test"))


def test_history_grows_while_the_run_trains(table, tmp_path):
    lines = []

    class Reader(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            lines.append(len((tmp_path / "run" / "history.jsonl").read_text().splitlines()))

    train(config(table, training__max_steps=4), tmp_path, callbacks=[Reader()])
    assert lines == [0, 1, 2, 3]


def test_alpha_zero_is_the_baseline_to_the_last_bit(table, tmp_path):
    bare = write_rows(tmp_path / "rows.jsonl", read_rows(table, rationale=None))
    ours = train(config(table, "ours", training__alpha=0.0), tmp_path)
    theirs = train(config(bare, "theirs", training__alpha=0.0, data__rationale=None), tmp_path)
    assert logged(ours, "loss", "class_loss") == logged(theirs, "loss", "class_loss")
    assert_same_weights(ours, theirs)


@pytest.mark.parametrize("head", ["separate", "shared"])
def test_privileged_pooling_without_lm_loss(table, tmp_path, head):
    changes = {**SEPARATE, "training__alpha": 0.0, "training__privileged_head": head}
    run = train(config(table, "taught", **changes), tmp_path)
    for _, loss, class_loss, label_loss, kl in logged(
        run, "loss", "class_loss", "privileged_class_loss", "privileged_kl"
    ):
        assert loss == pytest.approx(class_loss + label_loss + 2 * kl, abs=1e-4)
    assert "lm_loss" not in run.history
    assert DHRDModel.from_pretrained(run.folder / "model").privileged_classifier is None
    assert not [name for name in weights(run) if "privileged" in name]
    rows = run.predictions("test")
    assert run.model().predict(rows["input_text"].tolist()).labels == rows["prediction"].tolist()
    shuffled = train(config(table, "shuffled", **changes, data__alignment="shuffle_rationale"), tmp_path)
    assert logged(shuffled, "privileged_kl") != logged(run, "privileged_kl")
    bare = write_rows(tmp_path / "rows.jsonl", read_rows(table, rationale=None))
    with pytest.raises(ConfigError, match=f"privileged_head='{head}', and none of the .* expected .*'none'"):
        train(config(bare, **changes), tmp_path)


def test_alpha_without_any_rationale_is_refused(table, tmp_path):
    bare = write_rows(tmp_path / "rows.jsonl", read_rows(table, rationale=None))
    with pytest.raises(ConfigError, match=r"alpha is 1\.0 .* and none of the \d+ train rows has a rationale"):
        train(config(bare), tmp_path)


def test_beta_zero_trains_through_batch_without_rationale(table, tmp_path):
    changes = {"training__beta": 0.0, "training__batch_size": 1, "training__epochs": 1}
    losses = [loss for _, loss in logged(train(config(table, **changes), tmp_path), "loss")]
    assert losses.count(0.0) >= 1  # Two rows of the table have no rationale, and dev has at most one of them.
    assert all(np.isfinite(losses))


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"training__learning_rate": 1e30, "training__max_steps": 4}, "the loss is nan at step"),
        ({"training__alpha": 1e300}, "the loss is inf at step 1"),
        ({"training__learning_rate": 1e38, "training__max_steps": 1}, "logits that aren't finite"),
    ],
)
def test_diverging_run_is_not_stored(table, tmp_path, changes, problem):
    with pytest.raises(ConfigError, match=problem):
        train(config(table, **changes), tmp_path)
    assert not (tmp_path / "run" / "metrics.json").exists()


SEPARATE = {"training__privileged_head": "separate", "training__privileged_gamma": 2.0}


@pytest.mark.parametrize(
    ("changes", "terms"),
    [
        ({"training__alpha": 0.0}, ()),
        ({"training__alpha": 1.0}, ("lm_loss",)),
        ({"training__alpha": "auto"}, ("lm_loss", "lm_class_cosine")),
        ({**SEPARATE, "training__alpha": 0.0}, ("privileged_class_loss", "privileged_kl")),
    ],
)
def test_accumulation_equals_one_batch(table, tmp_path, changes, terms):
    whole = train(config(table, "whole", **changes), tmp_path)
    split = {"training__batch_size": 1, "training__gradient_accumulation_steps": 8}
    parts = train(config(table, "parts", **changes, **split), tmp_path)
    terms = ("loss", "class_loss", *terms)
    np.testing.assert_allclose(logged(whole, *terms), logged(parts, *terms), atol=1e-5)
    assert_same_weights(whole, parts, atol=2e-4)


def test_trunk_cache_changes_no_loss(table, tmp_path):
    changes = {"model__freeze_layers": 2}
    cached = train(config(table, "cached", **changes), tmp_path)
    plain = train(config(table, "plain", **changes, training__cache_trunk=False), tmp_path)
    terms = ("loss", "class_loss", "lm_loss")
    np.testing.assert_allclose(logged(cached, *terms), logged(plain, *terms), atol=1e-5)
    assert_same_weights(cached, plain, atol=1e-4)


def test_beta_zero_selects_by_dev_lm_loss(table, tmp_path):
    run = train(config(table, "cot", training__beta=0.0), tmp_path)
    first, *_, last = logged(run, "loss", "lm_loss")
    assert first[1] == pytest.approx(first[2], abs=1e-4)
    assert last[2] < first[2]
    dev = run.history.dropna(subset=["eval_loss"])
    assert run.metrics["best_step"] == dev.loc[dev["eval_loss"].idxmin(), "step"]
    fresh = train(config(table, "fresh", training__beta=0.0, training__max_steps=1), tmp_path)
    name = "classifier.0.weight"
    assert torch.equal(weights(run)[name], weights(fresh)[name])
    assert run.metrics["splits"] == {"dev": {}, "test": {}}
    assert not {"prediction", "prediction_id", "probabilities"} & set(run.predictions("test"))
    assert "eval_primary" not in run.history


def test_frozen_layers_do_not_change(table, tmp_path):
    trained = weights(train(config(table, "frozen", model__freeze_layers=2), tmp_path))
    for name, tensor in load_backbone("tiny").model.state_dict().items():
        if (name := f"backbone.{name}") in trained:
            frozen = "embed_tokens" in name or "layers.0." in name or "layers.1." in name
            assert torch.equal(trained[name], tensor) == frozen, name


def test_best_dev_checkpoint_is_kept(finished):
    dev = finished.history.dropna(subset=["eval_primary"])
    assert finished.metrics["best_step"] == dev.loc[dev["eval_primary"].idxmax(), "step"]
    best = dev["eval_primary"].max()
    assert finished.metrics["splits"]["dev"]["primary"] == pytest.approx(best)


def step_weights(step: int, steps: int, **fields: object) -> tuple[float, float]:
    weights = LossWeights(**fields)
    weights.on_step_begin(None, TrainerState(global_step=step, max_steps=steps))
    return weights.alpha, weights.beta


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [("constant", [2, 2, 2]), ("linear", [2, 1, 0]), ("cosine", [2, 1, 0])],
)
def test_alpha_schedules(schedule, expected):
    fields = {"alpha": 2.0, "alpha_schedule": schedule}
    assert [step_weights(step, 5, **fields)[0] for step in (0, 2, 4)] == pytest.approx(expected)


def test_auto_alpha_by_hand():
    auto, state = LossWeights(alpha="auto", alpha_share=0.5), TrainerState(max_steps=9)

    def step(*gradients: tuple[torch.Tensor, torch.Tensor]) -> float:
        auto.on_step_begin(None, state)
        for class_grad, lm_grad in gradients:
            auto.record("lm_loss", lm_grad * auto.alpha)
            auto.record("class_loss", class_grad)
        auto.on_step_end()
        return auto.alpha

    class_grad, lm_grad = torch.tensor([[[3.0, 4.0]]]), torch.tensor([[[2.0, 0.0]]])
    assert step((class_grad, lm_grad)) == 1e-8  # Norms 5 and 2, dot product 6.
    assert auto.cosine == pytest.approx(6 / 10)
    # Two micro-batches: (6, 8) and 0 have the norm 10, (2, 0) twice that of 8 squared.
    assert step((2 * class_grad, lm_grad), (0 * class_grad, lm_grad)) == pytest.approx(0.5 * 5 / 2)
    norms = 0.09 * 5 + 0.1 * 10, 0.09 * 2 + 0.1 * 8**0.5
    assert auto.cosine == pytest.approx((0.09 * 0.6 + 0.1 * 12 / (10 * 8**0.5)) / 0.19)
    expected = pytest.approx(0.5 * norms[0] / norms[1])
    assert step((class_grad, 0 * lm_grad)) == expected  # No row has a rationale: nothing is measured.
    assert (auto.measured_steps, step(*[(class_grad, -lm_grad)] * 9)) == (2, expected)
    while auto.cosine >= 0:
        step((class_grad, -class_grad))
    assert step((class_grad, lm_grad)) == 1e-8


@pytest.mark.parametrize("changes", [{}, {"model__freeze_layers": 2}, {"model__finetune": "lora"}])
def test_auto_alpha_balances_gradients(table, tmp_path, changes, monkeypatch):
    averages, on_step_end = [], LossWeights.on_step_end

    def recorded(self, *args, **kwargs):
        on_step_end(self, *args, **kwargs)
        averages.append(self.averages)

    monkeypatch.setattr(LossWeights, "on_step_end", recorded)
    run = train(config(table, training__alpha="auto", training__alpha_share=0.3, **changes), tmp_path)
    terms = logged(run, "loss", "class_loss", "lm_loss", "alpha", "lm_class_cosine")
    assert terms[0][4] == 1e-8
    for _, loss, class_loss, lm_loss, alpha, _ in terms:
        assert loss == pytest.approx(class_loss + alpha * lm_loss, abs=1e-4)
    class_norm, lm_norm, cosine = averages[0]
    assert terms[1][4] == pytest.approx(0.3 * class_norm / lm_norm if cosine >= 0 else 1e-8)
    assert run.config.training.setting == "DHRD"


def test_beta_delay_trains_the_lm_loss_alone_first(table, tmp_path):
    assert [step_weights(step, 5, beta=2.0, beta_delay=0.4)[1] for step in range(5)] == [0, 0, 2, 2, 2]
    assert step_weights(9, 10, beta=2.0, beta_delay=0.99) == (1.0, 2.0)  # The last step is always joint.
    run = train(config(table, training__beta_delay=0.5, training__max_steps=4, training__beta=2.0), tmp_path)
    terms = logged(run, "loss", "class_loss", "lm_loss", "beta")
    assert [beta for *_, beta in terms] == [0, 0, 2, 2]
    for _, loss, class_loss, lm_loss, beta in terms:
        assert loss == pytest.approx(beta * class_loss + lm_loss, abs=1e-4)


def test_sampler_groups_rows_of_similar_length():
    lengths = np.random.default_rng(0).integers(5, 200, 333).tolist()
    sampler = LengthGroupedSampler(lengths, group_size=8, seed=4)
    order = list(sampler)
    assert sorted(order) == list(range(333))
    spread = [np.ptp([lengths[i] for i in order[at : at + 8]]) for at in range(0, 328, 8)]
    assert np.mean(spread) < 40 < np.ptp(lengths)
    assert order == list(LengthGroupedSampler(lengths, group_size=8, seed=4))
    sampler.set_epoch(1)
    assert list(sampler) != order
    assert list(LengthGroupedSampler(lengths, group_size=8, seed=5)) != order
