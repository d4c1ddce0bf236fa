"""Training: two denominators, exact resume, and a baseline that is the baseline to the last bit."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from safetensors.torch import load_file
from transformers import TrainerCallback

from dhrd_lib.backbones import BackboneError
from dhrd_lib.config import ConfigError, DataConfig, ModelConfig, RunConfig, TrainingConfig
from dhrd_lib.modeling import DHRDModel
from dhrd_lib.runs import Run, find_runs, load_run, load_runs
from dhrd_lib.trainer import LengthGroupedSampler, scheduled_alpha
from dhrd_lib.training import train

pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.fixture(scope="module")
def table(tmp_path_factory) -> Path:
    """48 rows with two classes that a tiny model can tell apart, two of them without a rationale."""
    rows = []
    for i in range(48):
        label = "refund" if i % 2 else "fix"
        words = ["money", "charged", "twice"] if i % 2 else ["app", "fault", "crash"]
        rows.append(
            {
                "idx": i,
                "text": " ".join(words[j % 3] for j in range(i % 7 + 2)),
                "label": label,
                "rationale": None if i in (4, 9) else f"case {i} is about {words[0]}",
            }
        )
    path = tmp_path_factory.mktemp("data") / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def config(table: Path, name: str = "run", **changes: object) -> RunConfig:
    base = RunConfig(
        name=name,
        model=ModelConfig(backbone="tiny", device="cpu"),
        data=DataConfig(task=str(table), text=("text",), label="label", rationale="rationale", dev_fraction=0.17),
        training=TrainingConfig(
            epochs=2,
            batch_size=8,
            learning_rate=3e-3,
            classifier_learning_rate=1e-2,
            warmup_steps=0,
            logging_steps=1,
        ),
    )
    return base.replace({key.replace("__", "."): value for key, value in changes.items()})


@pytest.fixture(scope="module")
def finished(table, tmp_path_factory) -> Run:
    return train(config(table), tmp_path_factory.mktemp("runs"))


def weights(run: Run) -> dict[str, torch.Tensor]:
    return load_file(run.folder / "model" / "model.safetensors")


def logged(run: Run, *terms: str) -> list[list[float]]:
    rows = run.history
    return rows[rows["loss"].notna()][["step", *terms]].astype(float).values.tolist()


def assert_same_weights(one: Run, two: Run, atol: float = 0.0) -> None:
    ours, theirs = weights(one), weights(two)
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=atol)


# ---------------------------------------------------------------------------- what a run stores


def test_run_stores_everything(finished):
    assert RunConfig.load(finished.folder / "config.json") == finished.config
    assert finished.environment["packages"]["torch"] == torch.__version__
    assert finished.test_splits == ["test"]
    predictions = finished.predictions("test")
    assert predictions["idx"].is_unique
    accuracy = (predictions["label"] == predictions["prediction"]).mean()
    assert finished.metrics["splits"]["test"]["accuracy"] == pytest.approx(accuracy)
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


def test_tiny_model_learns_two_classes(finished):
    assert finished.metrics["splits"]["test"]["accuracy"] >= 0.8


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


def test_folder_without_run_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no finished run"):
        load_run(tmp_path)


def test_unreadable_run_is_left_out_with_warning(finished, tmp_path):
    shutil.copytree(finished.folder, tmp_path / "good")
    shutil.copytree(finished.folder, tmp_path / "torn")
    (tmp_path / "torn" / "metrics.json").write_text('{"splits": {')
    with pytest.warns(UserWarning, match=r"torn can't be loaded"):
        frame = load_runs(tmp_path)
    assert len(frame) == 2


def test_run_of_version_0_1_loads(finished, tmp_path):
    folder = shutil.copytree(finished.folder, tmp_path / "old")
    names, path = finished.label_names, folder / "predictions_test.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    indices = [{**row, **{name: names.index(row[name]) for name in ("label", "prediction")}} for row in rows]
    path.write_text("".join(json.dumps(row) + "\n" for row in indices))
    assert load_run(folder).predictions("test").equals(finished.predictions("test"))


def test_overlap_of_train_and_test_is_stored(table, tmp_path):
    rows = [json.loads(line) for line in table.read_text().splitlines()]
    same = tmp_path / "rows.jsonl"
    same.write_text("".join(json.dumps({**row, "text": "the app crashed"}) + "\n" for row in rows))
    overlap = train(config(same, training__max_steps=1), tmp_path).metrics["overlap"]
    assert overlap == {"dev": 8, "test": 8}


def test_history_grows_while_the_run_trains(table, tmp_path):
    lines = []

    class Reader(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            lines.append(len((tmp_path / "run" / "history.jsonl").read_text().splitlines()))

    train(config(table, training__max_steps=4), tmp_path, callbacks=[Reader()])
    assert lines == [0, 1, 2, 3]


# ---------------------------------------------------------------------------- the fixed rules


def test_alpha_zero_is_the_baseline_to_the_last_bit(table, tmp_path):
    rows = [json.loads(line) for line in table.read_text().splitlines()]
    bare = tmp_path / "rows.jsonl"
    bare.write_text("".join(json.dumps({**row, "rationale": None}) + "\n" for row in rows))
    ours = train(config(table, "ours", training__alpha=0.0), tmp_path)
    theirs = train(config(bare, "theirs", training__alpha=0.0, data__rationale=None), tmp_path)
    assert logged(ours, "loss", "class_loss") == logged(theirs, "loss", "class_loss")
    assert_same_weights(ours, theirs)


def test_alpha_without_any_rationale_is_refused(table, tmp_path):
    rows = [json.loads(line) for line in table.read_text().splitlines()]
    bare = tmp_path / "rows.jsonl"
    bare.write_text("".join(json.dumps({**row, "rationale": None}) + "\n" for row in rows))
    with pytest.raises(ConfigError, match=r"alpha is 1\.0 and none of the \d+ train rows has a rationale"):
        train(config(bare), tmp_path)


def test_beta_zero_trains_through_batch_without_rationale(table, tmp_path):
    changes = {"training__beta": 0.0, "training__batch_size": 1, "training__epochs": 1}
    losses = [loss for _, loss in logged(train(config(table, **changes), tmp_path), "loss")]
    assert losses.count(0.0) >= 1  # Two rows of the table have no rationale, and dev has at most one of them.
    assert all(np.isfinite(losses))


def test_beta_zero_stores_no_class_figures(table, tmp_path):
    run = train(config(table, training__beta=0.0, training__max_steps=2), tmp_path)
    assert run.metrics["splits"] == {"dev": {}, "test": {}}
    assert not {"prediction", "prediction_id", "probabilities"} & set(run.predictions("test"))
    assert "eval_primary" not in run.history


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


@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_accumulation_equals_one_batch(table, tmp_path, alpha):
    whole = train(config(table, "whole", training__alpha=alpha), tmp_path)
    parts = config(
        table,
        "parts",
        training__alpha=alpha,
        training__batch_size=1,
        training__gradient_accumulation_steps=8,
    )
    parts = train(parts, tmp_path)
    np.testing.assert_allclose(logged(whole, "loss", "class_loss"), logged(parts, "loss", "class_loss"), atol=1e-5)
    assert_same_weights(whole, parts, atol=2e-4)


SCRIPT = """
import sys
import torch
torch.set_num_threads(1)
from dhrd_lib.config import RunConfig
from dhrd_lib.training import train
train(RunConfig.load(sys.argv[1]), sys.argv[2])
"""


def launch(arguments: list[str], **environment: str) -> subprocess.Popen:
    return subprocess.Popen(
        arguments,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.mark.timeout(240)
@pytest.mark.parametrize("alive_until", [3, 7])
def test_killed_run_resumes_to_same_weights(table, tmp_path, alive_until):
    changes = {"training__eval_steps": 2, "training__epochs": 2, "training__alpha_schedule": "linear"}
    straight = train(config(table, "straight", **changes), tmp_path)
    killed = config(table, "killed", **changes)
    killed.save(tmp_path / "killed.json")
    (tmp_path / "script.py").write_text(
        "import os, signal\n"
        "from dhrd_lib.trainer import DHRDTrainer\n"
        "step = DHRDTrainer.training_step\n"
        "def dies(self, *args, **kwargs):\n"
        f"    if self.state.global_step == {alive_until}: os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return step(self, *args, **kwargs)\n"
        "DHRDTrainer.training_step = dies\n" + SCRIPT
    )
    command = [sys.executable, str(tmp_path / "script.py"), str(tmp_path / "killed.json"), str(tmp_path)]
    process = launch(command, PYTHONPATH=str(ROOT))
    output, _ = process.communicate(timeout=200)
    assert process.returncode == -signal.SIGKILL, output
    resumed = train(killed, tmp_path)
    assert resumed.metrics["resumed_from_step"] == alive_until // 2 * 2
    terms = ("loss", "class_loss", "lm_loss", "alpha")
    assert logged(resumed, *terms) == logged(straight, *terms)
    assert_same_weights(resumed, straight)


HELD = """
import sys
from dhrd_lib.trainer import DHRDTrainer
step = DHRDTrainer.training_step
def waits(self, *args, **kwargs):
    if self.state.global_step == 3:
        print("IN STEP 3", flush=True)
        sys.stdin.readline()
    return step(self, *args, **kwargs)
DHRDTrainer.training_step = waits
"""


@pytest.mark.timeout(240)
@pytest.mark.parametrize("end", ["finished", "killed"])
def test_second_process_waits_for_run(table, tmp_path, end):
    own = config(table, training__eval_steps=2)
    own.save(tmp_path / "run.json")
    (tmp_path / "held.py").write_text(HELD + SCRIPT)
    (tmp_path / "script.py").write_text(SCRIPT)
    here = {"PYTHONPATH": str(ROOT)}
    command = [str(tmp_path / "run.json"), str(tmp_path / "runs")]
    first = launch([sys.executable, str(tmp_path / "held.py"), *command], **here)
    while "IN STEP 3" not in (line := first.stdout.readline()):
        assert line, "it ended before its third step"
    second = launch([sys.executable, str(tmp_path / "script.py"), *command], **here)
    while "being trained by another process" not in (line := second.stdout.readline()):
        assert line, "it didn't wait"
    first.send_signal(signal.SIGKILL if end == "killed" else signal.SIGCONT)
    first.communicate("go on\n", timeout=200)
    output, _ = second.communicate(timeout=200)
    assert second.returncode == 0, output
    # The one that waited trains where it has to, and from the checkpoint that is there.
    assert ("run · train:" in output) == (end == "killed")
    run = load_run(tmp_path / "runs" / "run")
    assert run.metrics["resumed_from_step"] == (2 if end == "killed" else 0)
    assert not list(run.folder.glob("*lock*"))


class StopAt(TrainerCallback):
    """Interrupt training at the beginning of a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt


class Steps(TrainerCallback):
    """Record the steps that were trained."""

    def __init__(self) -> None:
        self.trained = []

    def on_step_end(self, args, state, control, **kwargs):
        self.trained.append(state.global_step)


class StopOnceSaved(StopAt):
    """Interrupt training when a step's checkpoint is written."""

    def on_step_begin(self, args, state, control, **kwargs):
        pass

    def on_save(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt


@pytest.mark.parametrize("stops", [[3], [3, 5]])
def test_resume_keeps_tokens_and_seconds(table, tmp_path, stops):
    class Slow(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            time.sleep(0.3 if state.global_step < 2 else 0)

    own = config(table, training__eval_steps=2)
    straight = train(own, tmp_path / "straight")
    for step in stops:
        with pytest.raises(KeyboardInterrupt):
            train(own, tmp_path / "stopped", callbacks=[Slow(), StopAt(step)])
    resumed = train(own, tmp_path / "stopped")
    assert resumed.metrics["resumed_from_step"] == stops[-1] // 2 * 2
    assert resumed.metrics["train_tokens"] == straight.metrics["train_tokens"]
    # The two slow steps were trained before the first stop.
    assert resumed.metrics["train_seconds"] > 0.6
    seconds = resumed.metrics["train_tokens"] / resumed.metrics["tokens_per_second"]
    assert seconds == pytest.approx(resumed.metrics["train_seconds"])


@pytest.mark.parametrize("max_steps", [0, 6])
def test_resume_after_last_step_trains_no_other(table, tmp_path, max_steps):
    own = config(table, training__eval_steps=2, training__max_steps=max_steps)
    straight = train(own, tmp_path / "straight")
    last = straight.metrics["steps"]
    with pytest.raises(KeyboardInterrupt):
        train(own, tmp_path / "stopped", callbacks=[StopOnceSaved(last)])
    resumed = train(own, tmp_path / "stopped")
    assert resumed.metrics["resumed_from_step"] == last
    for name in ("steps", "best_step", "train_tokens", "splits"):
        assert resumed.metrics[name] == straight.metrics[name]
    assert_same_weights(resumed, straight)


@pytest.mark.parametrize("stopped", ["in its fourth step", "out of patience"])
def test_resume_restores_early_stopping_patience(table, tmp_path, stopped):
    idle = {"training__learning_rate": 1e-9, "training__classifier_learning_rate": 1e-9}
    own = config(table, training__eval_steps=1, training__early_stopping_patience=3, **idle)
    straight = train(own, tmp_path / "straight")
    assert straight.metrics["steps"] == 4  # The first evaluation sets the mark, and three don't reach above it.
    stop = StopOnceSaved(4) if stopped == "out of patience" else StopAt(3)
    with pytest.raises(KeyboardInterrupt):
        train(own, tmp_path / "stopped", callbacks=[stop])
    steps = Steps()
    resumed = train(own, tmp_path / "stopped", callbacks=[steps])
    assert steps.trained == ([] if stopped == "out of patience" else [4])
    for name in ("steps", "best_step", "train_tokens", "splits"):
        assert resumed.metrics[name] == straight.metrics[name]


@pytest.mark.parametrize("changed", ["a text", "nothing"])
def test_resume_requires_the_same_rows(table, tmp_path, changed):
    rows = shutil.copy(table, tmp_path / "rows.jsonl")
    own = config(rows, training__eval_steps=2)
    with pytest.raises(KeyboardInterrupt):
        train(own, tmp_path, callbacks=[StopAt(3)])
    if changed == "nothing":
        assert train(own, tmp_path).metrics["resumed_from_step"] == 2
    else:
        rows.write_text(rows.read_text().replace("money", "coins", 1))
        with pytest.raises(ConfigError, match="was trained on other rows of train than the data has now"):
            train(own, tmp_path)
        assert list((tmp_path / "run" / "checkpoints").iterdir())


def test_trunk_cache_changes_no_loss(table, tmp_path):
    changes = {"model__freeze_layers": 2}
    cached = train(config(table, "cached", **changes), tmp_path)
    plain = train(config(table, "plain", **changes, training__cache_trunk=False), tmp_path)
    terms = ("loss", "class_loss", "lm_loss")
    np.testing.assert_allclose(logged(cached, *terms), logged(plain, *terms), atol=1e-5)
    assert_same_weights(cached, plain, atol=1e-4)


def test_frozen_layers_do_not_change(table, tmp_path):
    from dhrd_lib.backbones import load_backbone

    run = train(config(table, "frozen", model__freeze_layers=2), tmp_path)
    own = load_backbone("tiny").model.state_dict()
    for name, tensor in weights(run).items():
        name = name.removeprefix("backbone.")
        if name in own:
            frozen = "embed_tokens" in name or "layers.0." in name or "layers.1." in name
            assert torch.equal(tensor, own[name]) == frozen, name


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


def test_best_dev_checkpoint_is_kept(finished):
    dev = finished.history.dropna(subset=["eval_primary"])
    assert finished.metrics["best_step"] == dev.loc[dev["eval_primary"].idxmax(), "step"]
    best = dev["eval_primary"].max()
    assert finished.metrics["splits"]["dev"]["primary"] == pytest.approx(best)


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [("constant", [2, 2, 2]), ("linear", [2, 1, 0]), ("cosine", [2, 1, 0])],
)
def test_alpha_schedules(schedule, expected):
    assert [scheduled_alpha(2.0, schedule, step, 5) for step in (0, 2, 4)] == pytest.approx(expected)


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


# ---------------------------------------------------------------------------- no dead field

CHANGES = {
    "model__backbone": "saved folder",
    "model__pooling": "mean",
    "model__head": "linear",
    "model__finetune": "lora",
    "model__freeze_layers": 1,
    "model__dtype": "bfloat16",
    "data__alignment": "shuffle_rationale",
    "data__shuffled_share": 0.5,
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
    "training__beta": 0.5,
    "training__alpha_schedule": "linear",
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


def trace(run: Run) -> tuple:
    """What a run computed: its log, without times, and its final weights."""
    history = run.history.drop(columns=[c for c in run.history if "runtime" in c or "per_second" in c])
    total = sum(tensor.double().sum().item() for tensor in weights(run).values())
    return history.to_json(), total, tuple(run.metrics["splits"]), run.predictions("test").to_json()


@pytest.mark.parametrize("field", CHANGES)
def test_every_field_changes_the_run(table, tmp_path, finished, field, tmp_path_factory):
    value = CHANGES[field]
    if value == "saved folder":
        from conftest import tiny_backbone

        backbone = tiny_backbone("qwen3")
        value = str(tmp_path_factory.mktemp("backbone"))
        backbone.model.save_pretrained(value)
        backbone.tokenizer.save_pretrained(value)
    if field == "data__rationale":
        # Left out, the column is found under its own name: name one that isn't there.
        with pytest.raises(ValueError, match="nowhere"):
            train(config(table, "changed", data__rationale="nowhere"), tmp_path)
        return
    if field == "data__truncation_side":
        finished = train(config(table, "cut", data__max_input_tokens=8), tmp_path)
        value = {field: value, "data__max_input_tokens": 8}
    if field == "training__class_weights":  # The table's two classes are equally frequent.
        rows = [row for i, row in enumerate(table.read_text().splitlines()) if i % 2 or i % 3]
        table = tmp_path / "imbalanced.jsonl"
        table.write_text("\n".join(rows))
        finished = train(config(table, "unweighted"), tmp_path)
    if field == "data__shuffled_share":
        finished = train(config(table, "all", data__alignment="shuffle_rationale"), tmp_path)
        value = {field: value, "data__alignment": "shuffle_rationale"}
    changed = train(config(table, "changed", **(value if isinstance(value, dict) else {field: value})), tmp_path)
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
    changes = {
        "model__finetune": "lora",
        "model__lora_r": 3,
        "model__lora_alpha": 5,
        "model__lora_dropout": 0.25,
        "training__lm_chunk_tokens": 7,
        "training__eval_batch_size": 5,
        "training__early_stopping_patience": 1,
        "training__learning_rate": 1e-9,
        "training__classifier_learning_rate": 1e-9,
        "training__epochs": 6,
        "training__report_to": ["tensorboard"],
    }
    run = train(config(table, "changed", **changes), tmp_path)
    trainer, model = trainers[0], trainers[0].model
    layer = model.backbone.model.layers[0].self_attn.q_proj
    assert (layer.r["default"], layer.lora_alpha["default"], layer.lora_dropout["default"].p) == (3, 5, 0.25)
    assert model.config.lm_chunk_tokens == 7
    assert trainer.args.per_device_eval_batch_size == 5
    assert run.metrics["steps"] < 6 * finished.metrics["steps"] // 2  # Nothing gained: stopped early.
    assert any((tmp_path / "tensorboard").rglob("events.*"))
    with pytest.raises(BackboneError, match="^device is 'nowhere' .*expected 'auto', 'cpu' or 'cuda'"):
        train(config(table, "elsewhere", model__device="nowhere"), tmp_path)


def test_keep_model_false_keeps_predictions(table, tmp_path, finished):
    run = train(config(table, "light", training__keep_model=False), tmp_path)
    assert run.predictions("test").equals(finished.predictions("test"))
    with pytest.raises(
        FileNotFoundError, match=r"light.model holds no model; expected a folder of save_pretrained"
    ):
        DHRDModel.from_pretrained(run.folder / "model")


def test_every_field_is_tested():
    named = {
        f"{part}__{name}"
        for part, section in (
            ("model", ModelConfig),
            ("data", DataConfig),
            ("training", TrainingConfig),
        )
        for name in section.model_fields
    }
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
