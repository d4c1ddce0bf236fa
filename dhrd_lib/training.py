"""Training: `train(config)` makes a run from start to end."""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import PartialState
from datasets import Dataset, DatasetDict
from filelock import Timeout
from scipy.special import log_softmax, softmax
from torch.utils.data import Subset
from transformers import EvalPrediction, TrainerCallback, TrainerState, TrainingArguments, set_seed
from transformers.trainer_callback import ExportableState
from transformers.utils import logging

from dhrd_lib.backbones import compute_dtype, resolve_device
from dhrd_lib.config import ConfigError, RunConfig
from dhrd_lib.data.splits import groups_of
from dhrd_lib.evaluation import task_metrics
from dhrd_lib.modeling import DHRDModel, build_model
from dhrd_lib.progress import Progress
from dhrd_lib.runs import Run, environment, is_finished, load_run, run_lock, write_json
from dhrd_lib.scaling.fsdp import load_unsharded
from dhrd_lib.scaling.trunk_cache import cached_trunk_states, logits_from_states
from dhrd_lib.sequences import DHRDCollator, encode_split
from dhrd_lib.tasks import Task, load_rows
from dhrd_lib.trainer import FINITE_WANTED, DHRDTrainer, Rows


class RunLog(TrainerCallback, ExportableState):
    """Writes the training log to history.jsonl, shows the run's progress, and counts its seconds of training."""

    def __init__(self) -> None:
        self.seconds, self.notes = 0.0, {}

    def state(self) -> dict[str, Any]:
        return {"args": {}, "attributes": {"seconds": self.seconds}}

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, *_: Any, **kwargs: Any) -> None:
        folder = Path(args.output_dir).parent
        self.path, self.progress = folder / "history.jsonl", Progress(folder.name, "step")
        if state.is_world_process_zero:  # A resumed run's state has the log up to its checkpoint.
            self.path.write_text("".join(f"{json.dumps(log)}\n" for log in state.log_history), encoding="utf-8")

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self.started = time.perf_counter()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, *_: Any, **kwargs: Any) -> None:
        self.seconds += time.perf_counter() - self.started
        if state.is_world_process_zero:
            self.progress.update(state.global_step, state.max_steps, " · ".join(self.notes.values()))

    def on_log(self, args: TrainingArguments, state: TrainerState, *_: Any, logs: dict, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(f"{json.dumps(state.log_history[-1])}\n")
        labels = {"class_loss": "class loss", "lm_loss": "LM loss", args.metric_for_best_model: "dev"}
        self.notes |= {label: f"{label} {logs[name]:.3f}" for name, label in labels.items() if name in logs}

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        self.progress.close()


def train(config: RunConfig, root: str | Path = "runs", callbacks: Sequence[TrainerCallback] = ()) -> Run:
    """Train, select on dev, evaluate on the final splits, and store it all in `root/config.name`.

    A finished run is returned as it is, a stopped one resumes from its last checkpoint, and one that another
    process trains is waited for. `callbacks` are transformers'. Raises `ConfigError` where the folder holds a run
    of another configuration or of other rows, where a loss reads rationales and no train row has one, and where the
    loss isn't finite.
    """
    folder = Path(root) / config.name
    path = folder / "config.json"
    if not path.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        write_json(path, config.to_dict())
    elif RunConfig.load(path) != config:
        problem = f"{folder} holds a run of another configuration"
        raise ConfigError(f"{problem}; expected the same, another name, or that folder removed.")
    if not is_finished(folder):
        arguments = _training_arguments(config, folder)  # Joins the processes of a launch.
        with _locked(folder):
            if not is_finished(folder):
                _train(config, folder, arguments, callbacks)
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)  # Of a run that was killed at its end, too.
    with suppress(OSError):  # A process that still waits for the lock will see that the run is finished.
        (folder / "training.lock").unlink()
    return load_run(folder)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold the run's lock, of several processes in the first for all; wait while another training holds it."""
    state, lock = PartialState(), run_lock(folder)
    # Hides transformers' bars of loading and writing weights, meanwhile; those of downloads stay.
    hook = logging.set_tqdm_hook(lambda _, args, kwargs: logging.EmptyTqdm(*args, **kwargs))
    try:
        if state.is_main_process:
            try:
                lock.acquire(timeout=0)
            except Timeout:
                _print(f"{folder} is being trained by another process; waiting for its result.")
                lock.acquire()
        state.wait_for_everyone()
        yield
    finally:
        logging.set_tqdm_hook(hook)
        lock.release()


def _print(line: str) -> None:
    PartialState().print(line, flush=True)  # in the first process of a launch


def _train(config: RunConfig, folder: Path, arguments: TrainingArguments, callbacks: Sequence[Any]) -> None:
    """Train an unfinished run, from its last checkpoint where there is one, and store its results."""
    data, training = config.data, config.training
    set_seed(training.seed)
    _print(f"{config.name}: loading {data.task} and {config.model.backbone}")
    task, splits = load_rows(data)
    trunk_layers = config.model.freeze_layers if training.cache_trunk else 0
    backbone = None if trunk_layers else load_unsharded(config.model)
    model = build_model(config.model, task, data, training, backbone)
    encoded, reports = _encode(config, task, splits, model)
    for split, report in reports.items():
        counts = [f"{count:,} {name.replace('_', ' ')}" for name, count in report.items()]
        _print(f"{config.name} · {split}: {', '.join(counts)}")
    states = cached_trunk_states(model, encoded, trunk_layers) if trunk_layers else {}
    rows = {split: Rows(of, states.get(split)) for split, of in encoded.items()}

    def dev_metrics(prediction: EvalPrediction) -> dict[str, float]:
        logits, labels = prediction.predictions, prediction.label_ids
        metrics = task_metrics(task.metrics, labels, logits.argmax(1), groups_of(splits["dev"]))
        class_loss = -log_softmax(logits, axis=1)[range(len(labels)), labels].mean()
        return {**metrics, "class_loss": float(class_loss)}

    trainer = DHRDTrainer(
        training,
        trunk_layers=trunk_layers,
        model=model,
        args=arguments,
        data_collator=DHRDCollator(model.tokenizer.pad_token_id),
        train_dataset=rows["train"],
        eval_dataset=rows["dev"],
        compute_metrics=dev_metrics if training.beta else None,  # beta = 0 leaves the classifier untrained.
        callbacks=[RunLog(), *callbacks],
    )
    checkpoint = _last_checkpoint(folder / "checkpoints")
    digests = {}
    for split, of in encoded.items():
        digest = hashlib.sha256(json.dumps(model.label_names).encode())  # what its class indices mean
        for batch in of.remove_columns("rationale_end").iter(1000):  # Older runs' rows had none.
            digest.update(json.dumps(batch, sort_keys=True).encode())
        digests[split] = digest.hexdigest()
    if checkpoint:
        stored = json.loads((folder / "rows.json").read_text(encoding="utf-8"))
        if changed := [split for split in digests if digests[split] != stored.get(split)]:
            problem = f"{folder} was trained on other rows of {', '.join(changed)} than the data has now"
            raise ConfigError(f"{problem}; expected the same rows, labels and tokenizer, or that folder removed.")
    elif trainer.is_world_process_zero():
        write_json(folder / "rows.json", digests)
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)

    evaluated = ["dev", *task.test_splits]
    _print(f"{config.name}: evaluating {', '.join(evaluated)}")
    logits = {split: _logits(trainer, rows[split]) for split in evaluated} if training.beta else {}
    for split, of in logits.items():
        if not np.isfinite(of).all():
            raise ConfigError(f"the trained model has {split} logits that aren't finite; {FINITE_WANTED}.")
    model.privileged_classifier = None
    # Under FSDP a process holds a part of each weight; the first one gets them whole.
    weights = trainer.accelerator.get_state_dict(trainer.model) if trainer.is_fsdp_enabled else None
    if trainer.is_world_process_zero():
        metrics = {split: _store_predictions(folder, split, splits[split], task, logits) for split in evaluated}
        if training.keep_model:
            model.save_pretrained(folder / "model", state_dict=weights)
        dtype = "bfloat16 autocast" if arguments.bf16 else compute_dtype(model.backbone)
        write_json(folder / "environment.json", {**environment(model.device), "dtype": dtype})
        seconds = next(c for c in trainer.callback_handler.callbacks if isinstance(c, RunLog)).seconds
        state, tokens = trainer.state, trainer.state.num_input_tokens_seen
        results = {
            "task_metrics": list(task.metrics),
            "label_names": model.label_names,
            "splits": metrics,
            "steps": state.global_step,
            "best_step": state.best_global_step or state.global_step,
            "resumed_from_step": int(checkpoint.name.rsplit("-", 1)[1]) if checkpoint else 0,
            "train_seconds": seconds,
            "train_tokens": tokens,
            "tokens_per_second": tokens / seconds,
            "sequences": reports,
        }
        write_json(folder / "metrics.json", results)  # Written last: it marks the run as finished.
    trainer.accelerator.wait_for_everyone()


def _encode(config: RunConfig, task: Task, splits: DatasetDict, model: DHRDModel) -> tuple[dict, dict]:
    """Encode each split, with rationales where a loss reads them; sort dev's rows, in `splits` too, by length, as
    they are evaluated in batches in their order.
    """
    training = config.training
    reads_rationales = training.alpha != 0 or training.privileged_head != "none"
    fmt = replace(model.sequence_format, lm_span=training.lm_span, order=config.data.order)
    alignment = config.data.model_dump(include={"alignment", "shuffled_share"}) | {"seed": training.seed}
    rows, reports = {}, {}
    for split in list(splits):
        # Where no loss reads the rationale, the sequence has none.
        with_rationale = reads_rationales and (split == "train" or (split == "dev" and training.beta == 0))
        encoded, reports[split] = encode_split(
            splits[split], fmt, task.verbalizers, with_rationale=with_rationale, **alignment
        )
        if split == "train" and reads_rationales and reports[split]["lm_tokens"] == 0:
            problem = f"alpha is {training.alpha} with privileged_head={training.privileged_head!r}"
            problem += f", and none of the {len(encoded)} train rows has a rationale"
            raise ConfigError(f"{problem}; expected some with one, or alpha=0 and privileged_head='none'.")
        if split == "dev":
            order = sorted(range(len(encoded)), key=encoded["length"][:].__getitem__)
            encoded, splits[split] = encoded.select(order), splits[split].select(order)
        rows[split] = encoded
    return rows, reports


def _last_checkpoint(folder: Path) -> Path | None:
    """Return the last complete checkpoint; one that a kill cut off has no readable trainer state, written last."""
    for path in sorted(folder.glob("checkpoint-*"), key=lambda path: -int(path.name.rsplit("-", 1)[1])):
        with suppress(OSError, ValueError):
            TrainerState.load_from_json(str(path / "trainer_state.json"))
            return path
    return None


def _logits(trainer: DHRDTrainer, rows: Rows) -> np.ndarray:
    """Return the class logits `(N, K)` of a split's rows, in their order; each process computes its share."""
    if trainer.args.world_size == 1:
        if rows.states is None:
            return trainer.model.logits(rows.rows)
        return logits_from_states(trainer.model, rows.rows, rows.states, trainer.trunk_layers)
    order = np.argsort(rows.rows["length"], kind="stable")
    trainer.compute_metrics = None  # It has dev's groups.
    logits = trainer.predict(Subset(rows, order.tolist())).predictions
    return logits[np.argsort(order)]


def _store_predictions(
    folder: Path, split: str, dataset: Dataset, task: Task, logits: Mapping[str, np.ndarray]
) -> dict[str, float]:
    """Write a split's rows with their predictions, if there are any, and return the split's metrics."""
    names, metrics = np.array(task.label_names), {}
    frame = dataset.select_columns(["idx", "input_text", "label", "group", "rationale"]).to_pandas()
    frame["label"] = names[dataset["label"]]
    if split in logits:
        predictions = logits[split].argmax(1)
        frame["prediction"] = names[predictions]
        frame["probabilities"] = softmax(logits[split], axis=1).round(6).tolist()
        metrics = task_metrics(task.metrics, dataset["label"], predictions, groups_of(dataset))
    frame.to_json(folder / f"predictions_{split}.jsonl", orient="records", lines=True, force_ascii=False)
    return metrics


def _training_arguments(config: RunConfig, folder: Path) -> TrainingArguments:
    training, device = config.training, resolve_device(config.model.device)
    every, shared = "steps" if training.eval_steps else "epoch", ("learning_rate", "weight_decay", "warmup_steps")
    shared += ("gradient_accumulation_steps", "max_grad_norm", "logging_steps", "seed")
    return TrainingArguments(
        output_dir=str(folder / "checkpoints"),
        per_device_train_batch_size=training.batch_size,
        per_device_eval_batch_size=training.eval_batch_size,
        num_train_epochs=training.epochs,
        max_steps=training.max_steps or -1,
        lr_scheduler_type={"constant": "constant_with_warmup"}.get(training.lr_schedule, training.lr_schedule),
        optim="adamw_torch_fused",
        logging_first_step=True,
        report_to=list(training.report_to) or "none",
        eval_strategy=every,
        eval_steps=training.eval_steps or None,
        save_strategy=every,
        save_steps=training.eval_steps or 500,
        metric_for_best_model="eval_primary" if training.beta else "eval_loss",
        greater_is_better=training.beta > 0,  # With beta = 0 the LM loss selects.
        load_best_model_at_end=True,
        save_total_limit=1,
        bf16=device.type == "cuda" and config.model.dtype in ("auto", "bfloat16"),
        use_cpu=device.type == "cpu",
        remove_unused_columns=False,
        label_names=["class_labels"],
        include_num_input_tokens_seen="non_padding",
        restore_callback_states_from_checkpoint=True,
        dataloader_pin_memory=device.type == "cuda",
        disable_tqdm=True,
        **{name: getattr(training, name) for name in shared},
    )
