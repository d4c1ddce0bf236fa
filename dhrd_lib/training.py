"""Training: `DHRDTrainer` on transformers' Trainer, and `train(config)`, which makes a run from start to end."""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from accelerate.utils import broadcast_object_list, parse_flag_from_env
from datasets import Dataset, DatasetDict
from filelock import FileLock, Timeout
from scipy.special import log_softmax, softmax
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.utils.data import Sampler, Subset
from transformers import (
    EarlyStoppingCallback,
    EvalPrediction,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)
from transformers.integrations import get_available_reporting_integrations
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.trainer_callback import ExportableState, TrainerState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from dhrd_lib.backbones import Backbone, load_backbone, resolve_device, resolve_dtype, writing
from dhrd_lib.config import (
    ConfigError,
    ModelConfig,
    RunConfig,
    TrainingConfig,
    read_json,
    reason_of,
)
from dhrd_lib.evaluation import task_metrics
from dhrd_lib.modeling import DHRDModel, build_model
from dhrd_lib.runs import Run, environment, is_finished, load_run, write_json
from dhrd_lib.scaling.trunk_cache import TrunkStates, cached_trunk_states
from dhrd_lib.sequences import IGNORE_INDEX, DHRDCollator, SequenceReport, encode_split
from dhrd_lib.serving.classifier import label_names_of, read_config
from dhrd_lib.tasks import Task, groups_of, load_rows

# In a checkpoint's folder: what the run has come to, beside transformers' own state.
_PROGRESS = "progress.json"
_AS_WRITTEN = "what training wrote, or that checkpoint removed"
_FINITE_WANTED = "expected finite numbers, which a lower learning_rate, alpha or beta may give"
# How often the first of several processes tells the others that they wait for a run's folder.
_TELL_SECONDS = 5


class LengthGroupedSampler(Sampler[int]):
    """Rows in random order, but with rows of like length in the same step.

    The order depends on the seed and the epoch alone, so a resumed run sees the rows that an uninterrupted
    one would. `group_size` is the number of rows in one optimiser step over all devices.
    """

    def __init__(self, lengths: Sequence[int], group_size: int, seed: int, groups_sorted: int = 16) -> None:
        self.lengths = lengths
        self.group_size = group_size
        self.seed = seed
        self.rows_sorted = group_size * groups_sorted
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        order = torch.randperm(len(self.lengths), generator=generator).tolist()
        whole = len(order) - len(order) % self.group_size
        groups: list[list[int]] = []
        for start in range(0, whole, self.rows_sorted):
            window = sorted(order[start : min(start + self.rows_sorted, whole)], key=self.lengths.__getitem__)
            groups += [window[i : i + self.group_size] for i in range(0, len(window), self.group_size)]
        for group in torch.randperm(len(groups), generator=generator).tolist():
            yield from groups[group]
        yield from order[whole:]


class Rows(torch.utils.data.Dataset):
    """Encoded rows for the trainer, each with its cached trunk states where there are any."""

    def __init__(self, rows: Dataset, states: TrunkStates | None = None) -> None:
        self.rows = rows
        self.states = states

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, place: int) -> dict[str, Any]:
        row = self.rows[place]
        return row if self.states is None else {**row, "trunk_states": self.states[place]}


def scheduled_alpha(alpha: float, schedule: str, step: int, total_steps: int) -> float:
    """Alpha at an optimiser step (0-based): kept, or annealed to 0 at the last step."""
    if schedule == "constant":
        return alpha
    progress = min(step / max(total_steps - 1, 1), 1.0)
    if schedule == "linear":
        return alpha * (1.0 - progress)
    return alpha * 0.5 * (1.0 + math.cos(math.pi * progress))


class DHRDTrainer(Trainer):
    """transformers' Trainer with the two losses, each divided by its own count over the effective batch.

    The class loss is divided by the examples and the LM loss by the valid target tokens of all micro-batches
    and all processes of an optimiser step, so neither accumulation nor data parallelism changes the result.
    Every term is logged.
    """

    def __init__(self, config: TrainingConfig, *, trunk_layers: int = 0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if self.args.n_gpu > 1:
            raise ConfigError(
                f"{self.args.n_gpu} GPUs are visible to one process; expected `accelerate launch`, with one "
                "process a GPU (or CUDA_VISIBLE_DEVICES to name one)."
            )
        if self.is_fsdp_enabled:
            self._check_fsdp()
        self.config = config
        self.trunk_layers = trunk_layers
        # compute_loss divides by the counts of the whole step; nothing is left to divide.
        self.loss_is_scaled_for_ga = True
        self.valid_tokens = 0
        self.seconds_evaluating = 0.0
        self._patience: EarlyStoppingCallback | None = None
        if config.early_stopping_patience:
            self._patience = EarlyStoppingCallback(config.early_stopping_patience)
            self.add_callback(self._patience)
        self._seconds_before = 0.0
        self._started = time.perf_counter()
        self._terms = torch.zeros(2)
        self._terms_logged_at: int | None = None

    def _check_fsdp(self) -> None:
        """Refuse what can't be sharded; keep losses, logits and summed gradients in float32."""
        plugin = self.accelerator.state.fsdp_plugin
        if plugin.fsdp_version != 2:
            raise ConfigError(f"accelerate's fsdp_version is {plugin.fsdp_version}; expected 2.")
        if hasattr(self.model.lm_head, "token_adapter"):
            raise ConfigError(
                "FSDP can't share out the token rows that LoRA trains with markers='special'; expected "
                "markers='text', or accelerate's distributed_type MULTI_GPU."
            )
        if self.args.bf16:
            # accelerate's own policy rounds what the model gives, and what is added up over the processes.
            plugin.mixed_precision_policy = MixedPrecisionPolicy(
                param_dtype=torch.bfloat16, reduce_dtype=torch.float32
            )

    def _get_train_sampler(self, train_dataset: Rows | None = None) -> LengthGroupedSampler:
        rows = (train_dataset or self.train_dataset).rows
        group = self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
        return LengthGroupedSampler(rows["length"][:], group, self.config.seed)

    def create_optimizer(self, model: torch.nn.Module | None = None) -> torch.optim.Optimizer:
        """AdamW with the classifier's own learning rate; biases and norms aren't decayed."""
        if self.optimizer is None:
            model = self.model if model is None else model
            decayed = set(self.get_decay_parameter_names(model))
            groups: dict[tuple[bool, bool], list[torch.nn.Parameter]] = {}
            for name, parameter in model.named_parameters():
                if parameter.requires_grad:
                    new = "classifier." in name or "pooling_query" in name
                    groups.setdefault((new, name in decayed), []).append(parameter)
            optimizer_class, arguments = self.get_optimizer_cls_and_kwargs(self.args, model)
            self.optimizer = optimizer_class(
                [
                    {
                        "params": parameters,
                        "lr": self.config.classifier_learning_rate if new else self.config.learning_rate,
                        "weight_decay": self.config.weight_decay if decay else 0.0,
                    }
                    for (new, decay), parameters in groups.items()
                ],
                **arguments,
            )
        return self.optimizer

    def _get_num_items_in_batch(
        self, batch_samples: list[Mapping[str, torch.Tensor]], device: torch.device
    ) -> torch.Tensor | None:
        """Examples and valid LM target tokens of a step, over all its micro-batches and processes: `(2,)`."""
        if not batch_samples:
            return None
        examples = sum(len(batch["class_labels"]) for batch in batch_samples)
        tokens = sum(
            int((batch["lm_labels"] != IGNORE_INDEX).sum()) for batch in batch_samples if "lm_labels" in batch
        )
        # Whole numbers: FSDP would round a float to bfloat16 on its way into the model.
        counts = torch.tensor([[examples, tokens]], device=device)
        return self.accelerator.gather(counts).sum(0)

    def current_alpha(self) -> float:
        """Alpha of the optimiser step under way."""
        return scheduled_alpha(
            self.config.alpha, self.config.alpha_schedule, self.state.global_step, self.state.max_steps
        )

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, torch.Tensor],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | None = None,
    ) -> Any:
        """`beta * class CE + alpha * LM CE` of a micro-batch, as its share of the step's loss."""
        counts = num_items_in_batch
        taught = self.config.alpha > 0 and (model.training or self.config.beta == 0)
        if taught and "lm_labels" not in inputs:
            # No row has a rationale. Under FSDP each process waits for the others at the LM head.
            inputs = {**inputs, "lm_labels": torch.full_like(inputs["input_ids"], IGNORE_INDEX)}
        outputs = model(
            **inputs,
            alpha=self.current_alpha() if model.training else self.config.alpha,
            beta=self.config.beta,
            num_examples=None if counts is None else counts[0],
            num_lm_tokens=None if counts is None else counts[1],
            trunk_layers=self.trunk_layers,
        )
        # With beta = 0 and alpha annealed to 0, a batch has no term, and still needs a gradient.
        loss = outputs.logits.sum() * 0 if outputs.loss is None else outputs.loss
        if model.training and not math.isfinite(loss.item()):
            raise ConfigError(f"the loss is {loss.item()} at step {self.state.global_step + 1}; {_FINITE_WANTED}.")
        # The counts are over all processes, and gradients are averaged over them: undo the average.
        loss = loss * self.accelerator.num_processes
        if model.training:
            if self._terms_logged_at is None:  # A resumed run starts later than at 0.
                self._terms_logged_at = self.state.global_step
            self.valid_tokens += int(inputs["attention_mask"].sum())
            parts = [outputs.class_loss, outputs.lm_loss]
            self._terms += torch.tensor([0.0 if part is None else part.item() for part in parts])
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds every term to a training step's log: class loss, LM loss, and the alpha of the last step."""
        if "loss" in logs and "eval_loss" not in logs:
            steps = max(self.state.global_step - self._terms_logged_at, 1)
            terms = self.accelerator.gather(self._terms.to(self.args.device)[None]).sum(0) / steps
            logs["class_loss"] = terms[0].item()
            if self.config.alpha:
                logs["lm_loss"] = terms[1].item()
            logs["alpha"] = scheduled_alpha(
                self.config.alpha,
                self.config.alpha_schedule,
                self.state.global_step - 1,
                self.state.max_steps,
            )
            self._terms.zero_()
            self._terms_logged_at = self.state.global_step
        super().log(logs, start_time)

    def train(self, resume_from_checkpoint: str | None = None, **kwargs: Any) -> Any:
        """transformers' training, which counts on from what a checkpoint has counted."""
        self._started = time.perf_counter()
        if resume_from_checkpoint:
            self._take_up(Path(resume_from_checkpoint))
        return super().train(resume_from_checkpoint, **kwargs)

    def _take_up(self, checkpoint: Path) -> None:
        path = checkpoint / _PROGRESS
        if not path.is_file():  # It was written before there was one.
            return
        progress = read_json(path)
        names = ("train_seconds", "train_tokens", "evaluations_without_gain")
        if not (isinstance(progress, dict) and all(isinstance(progress.get(n), int | float) for n in names)):
            raise ConfigError(f"{path} lacks {', '.join(names)}, as numbers; expected {_AS_WRITTEN}.")
        self._seconds_before = progress["train_seconds"]
        # The file has the tokens of all processes, and `totals` adds the processes up.
        self.valid_tokens = progress["train_tokens"] if self.is_world_process_zero() else 0
        # transformers can restore callbacks, but puts others in the place of the caller's own.
        if self._patience:
            self._patience.early_stopping_patience_counter = progress["evaluations_without_gain"]

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: torch.nn.Module | None = None) -> None:
        with _reading_checkpoint(resume_from_checkpoint):
            TrainerState.load_from_json(Path(resume_from_checkpoint, TRAINER_STATE_NAME))
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """transformers' loading; where a file isn't there, transformers would begin anew without a word."""
        with _reading_checkpoint(checkpoint):
            for name in (OPTIMIZER_NAME, SCHEDULER_NAME) if checkpoint and not self.is_fsdp_enabled else ():
                if not Path(checkpoint, name).is_file():
                    raise FileNotFoundError(f"{name} isn't there")
            super()._load_optimizer_and_scheduler(checkpoint)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        with _reading_checkpoint(checkpoint):
            super()._load_rng_state(checkpoint)

    def _run_epoch(self, **kwargs: Any) -> None:
        """transformers' epoch; a run that was stopped after its last step has none left to train."""
        if self.state.global_step >= self.state.max_steps or self._is_out_of_patience():
            self.control.should_training_stop = True
        else:
            super()._run_epoch(**kwargs)

    def _evaluations_without_gain(self) -> int:
        return self._patience.early_stopping_patience_counter if self._patience else 0

    def _is_out_of_patience(self) -> bool:
        return bool(self._patience) and self._evaluations_without_gain() >= self.config.early_stopping_patience

    def totals(self) -> tuple[float, int]:
        """Seconds, evaluations left out, and tokens that the run was trained for, before it was stopped too."""
        seconds = time.perf_counter() - self._started - self.seconds_evaluating
        tokens = torch.tensor([self.valid_tokens], device=self.args.device)
        return self._seconds_before + seconds, int(self.accelerator.gather(tokens).sum())

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """transformers' evaluation, with its time kept apart from training's."""
        started = time.perf_counter()
        metrics = super().evaluate(*args, **kwargs)
        self.seconds_evaluating += time.perf_counter() - started
        return metrics

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        """Save a checkpoint with the run's progress, in a folder that stands before transformers looks for it.

        Under FSDP with sharded checkpoints it looks before anything is written, and the processes, some early
        and some late, find different things: one waits for the others to load the best weights. It also leaves
        out the model's configuration, whose labels a run that goes on is held to.
        """
        folder = Path(self._get_output_dir(trial), f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}")
        folder.mkdir(parents=True, exist_ok=True)
        seconds, tokens = self.totals()
        if self.is_world_process_zero():
            waited = self._evaluations_without_gain()
            progress = {"train_seconds": seconds, "train_tokens": tokens, "evaluations_without_gain": waited}
            write_json(folder / _PROGRESS, progress)
            if self.is_fsdp_enabled:
                self.model.config.save_pretrained(folder)
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, ExportableState):
                # transformers has places for those that the checkpoint knew, and a caller's may be new.
                self.state.stateful_callbacks.setdefault(type(callback).__name__, {})
        super()._save_checkpoint(model, trial)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """Save without the pickled arguments: the run's config.json says the same as text."""
        super()._save(output_dir, state_dict)
        Path(output_dir or self.args.output_dir, "training_args.bin").unlink(missing_ok=True)


@contextmanager
def _reading_checkpoint(checkpoint: str | None) -> Iterator[None]:
    """Around the reading of a checkpoint: a torn file or a pickle that isn't a state is a `ConfigError`.

    torch's own words are kept to their first sentence: a later one says how to run a payload after all.
    """
    try:
        yield
    except Exception as error:  # Torch, safetensors, transformers and accelerate each raise their own.
        found = f"{checkpoint} can't be gone on from ({reason_of(error)})"
        raise ConfigError(f"{found}; expected {_AS_WRITTEN}.") from error


@dataclass(frozen=True)
class _Prepared:
    """What a run works on: task, model, data, and each split's encoded rows."""

    task: Task
    model: DHRDModel
    data: DatasetDict
    rows: dict[str, Rows]
    reports: dict[str, SequenceReport]
    trunk_layers: int


@dataclass(frozen=True)
class _Outcome:
    """What training gave, beside the weights that every process has or has a part of."""

    train_seconds: float
    train_tokens: int
    resumed_from: Path | None
    logits: dict[str, np.ndarray]
    weights: dict[str, torch.Tensor] | None


def train(
    config: RunConfig,
    root: str | Path = "runs",
    callbacks: Sequence[TrainerCallback] = (),
    on_wait: Callable[[bool], None] = lambda waits: None,
) -> Run:
    """Train, select on dev, evaluate on the final splits, and store it all in `root/config.name`.

    A finished run is given back as it is; one that was stopped goes on from its last checkpoint; one that another
    process trains is waited for: `on_wait` is called with True where the wait begins, and with False where it ends.
    `callbacks` are transformers' own; they see every term of the loss in the logs.
    Raises `ConfigError` where the folder holds a run of another configuration, or checkpoints of other labels.
    """
    folder = Path(root) / config.name
    with writing(folder, "what is stored stays, and the same call goes on from it"):
        _claim(folder, config)
        with _alone_in(folder, config, on_wait) as finished:
            if not finished:
                _claim(folder, config)  # Of two that claimed it at the same moment, one finds the other's.
                _train(config, folder, callbacks)
            # Here, so that those of a run that was killed between its last file and this go too.
            drop_checkpoints(folder)
    return load_run(folder)


def drop_checkpoints(folder: Path) -> None:
    """Remove the checkpoints and the lock of a finished run, which nothing needs any more."""
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    with suppress(OSError):  # Whoever still waits for the lock finds the run finished.
        _lock_of(folder).unlink()


@contextmanager
def _alone_in(folder: Path, config: RunConfig, on_wait: Callable[[bool], None]) -> Iterator[bool]:
    """Hold a run's folder, in which one training works at a time; gives whether the run is finished by then.

    Of several processes the first one holds it for all. The others are told every few seconds how it stands, as
    torch gives up processes that it hears nothing of for long.
    """
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    # The trainer's own arguments, so that the processes are joined in the way that it needs.
    first = not several or _arguments(config, folder, resolve_device(config.model.device)).process_index == 0

    def told_by_the_first(value: bool) -> bool:
        return broadcast_object_list([value])[0] if several else value

    lock, waits = FileLock(_lock_of(folder)), False
    try:
        # A finished run needs no lock: its folder may be one that can't be written.
        while not told_by_the_first(first and (is_finished(folder) or _takes(lock, _TELL_SECONDS * waits))):
            if first and not waits:
                told = f"{folder} is being trained by another process; this one waits, and takes what it finishes."
                print(told, flush=True)
                on_wait(True)
            waits = True
        if first and waits:
            on_wait(False)
        yield told_by_the_first(is_finished(folder))
    finally:
        lock.release()


def _lock_of(folder: Path) -> Path:
    return folder / "training.lock"


def _takes(lock: FileLock, timeout_s: float) -> bool:
    try:
        lock.acquire(timeout=timeout_s)
    except Timeout:
        return False
    return True


def _train(config: RunConfig, folder: Path, callbacks: Sequence[TrainerCallback]) -> None:
    """Train a run that isn't finished, from its last checkpoint where there is one, and store what it gives."""
    _check_reporters(config.training.report_to)
    set_seed(config.training.seed)
    prepared = _prepare(config)
    for split, report in prepared.reports.items():
        print(f"{config.name} · {split}: {report}")
    trainer = _make_trainer(config, prepared, folder)
    for callback in callbacks:
        trainer.add_callback(callback)
    # Only the first process makes the folder otherwise, and the others may look before it does.
    (folder / "checkpoints").mkdir(exist_ok=True)
    checkpoint = _last_checkpoint(folder / "checkpoints")
    if checkpoint:
        _check_labels(checkpoint, prepared.task)
        _check_rows(folder / "rows.json", prepared.rows)
    elif trainer.is_world_process_zero():
        write_json(folder / "rows.json", _digests(prepared.rows))
    outcome = _run(trainer, prepared, checkpoint)
    for split, logits in outcome.logits.items():
        if not np.isfinite(logits).all():
            raise ConfigError(f"the trained model gives {split} logits that aren't finite; {_FINITE_WANTED}.")
    if trainer.is_world_process_zero():
        _store(config, prepared, trainer, folder, outcome)
    trainer.accelerator.wait_for_everyone()


def _check_reporters(names: Sequence[str]) -> None:
    known = sorted(get_available_reporting_integrations())
    odd = [name for name in names if name not in known]
    if odd and tuple(names) not in (("all",), ("none",)):
        expected = ", ".join(map(repr, ("all", "none", *known)))
        raise ConfigError(f"report_to has {odd[0]!r}, which isn't installed here; expected one of {expected}.")


def rerun(stored: Run, root: str | Path) -> Run:
    """Train a finished run's configuration anew, in another folder of runs.

    A repeat that was stopped goes on from its last checkpoint. Raises `ConfigError` where `root` holds the run
    itself, or a finished repeat.
    """
    folder = Path(root) / stored.config.name
    if is_finished(folder):
        raise ConfigError(f"{folder} is finished already; expected another folder for the repeat.")
    return train(stored.config, root)


def _run(trainer: DHRDTrainer, prepared: _Prepared, checkpoint: Path | None) -> _Outcome:
    """Train, and answer the final splits; every process takes part in all of it."""
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    seconds, tokens = trainer.totals()
    return _Outcome(
        train_seconds=seconds,
        train_tokens=tokens,
        resumed_from=checkpoint,
        logits={split: _logits(trainer, prepared, split) for split in ["dev", *prepared.task.test_splits]},
        # Under FSDP a process holds a part of each weight; the first one gets them whole.
        weights=trainer.accelerator.get_state_dict(trainer.model) if trainer.is_fsdp_enabled else None,
    )


def _logits(trainer: DHRDTrainer, prepared: _Prepared, split: str) -> np.ndarray:
    """Class logits `(N, K)` of a split's rows, in their order; each process computes its share of them."""
    rows = prepared.rows[split]
    if trainer.args.world_size == 1:
        return prepared.model.classify_rows(rows, trunk_layers=prepared.trunk_layers)
    order = np.argsort(rows.rows["length"], kind="stable")
    trainer.compute_metrics = None  # Dev's groups are no other split's.
    found = trainer.predict(Subset(rows, order.tolist())).predictions
    return found[np.argsort(order)]


def _claim(folder: Path, config: RunConfig) -> None:
    """Write the configuration, or check that the folder's is the same."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "config.json"
    if not path.is_file():
        write_json(path, config.to_dict())
    elif RunConfig.load(path) != config:
        raise ConfigError(
            f"{folder} holds a run of another configuration; expected the same, another name, or that "
            "folder removed."
        )


def _last_checkpoint(folder: Path) -> Path | None:
    """The last checkpoint that was written to its end; one that a kill broke off is passed over."""
    # A copy that somebody made goes by another name than the trainer's.
    found = (path for path in folder.glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdecimal())
    return max(filter(_is_whole, found), key=_step_of, default=None)


def _is_whole(checkpoint: Path) -> bool:
    # The trainer writes its state last.
    try:
        read_json(checkpoint / "trainer_state.json")
    except ConfigError:
        return False
    return True


def _step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.rsplit("-", 1)[1])


def _check_labels(checkpoint: Path, task: Task) -> None:
    """Refuse to go on with a classifier of other labels, which a file that changed meanwhile has."""
    saved = label_names_of(read_config(checkpoint), checkpoint / "config.json")
    if saved != list(task.label_names):
        there, now = (", ".join(map(repr, labels)) for labels in (saved, task.label_names))
        raise ConfigError(f"{checkpoint} has the labels {there}; expected those of the data, {now}.")


def _check_rows(path: Path, rows: Mapping[str, Rows]) -> None:
    """Refuse to go on with other rows than those that the run was begun with."""
    begun, now = read_json(path), _digests(rows)
    if not isinstance(begun, dict):
        raise ConfigError(f"{path} is a {type(begun).__name__}; expected a hash for each split, as training wrote.")
    changed = [split for split in now if now[split] != begun.get(split)]
    if changed:
        raise ConfigError(
            f"{path.parent} was begun with other rows in {', '.join(changed)} than the data has now; expected the "
            "same rows and tokenizer, or that folder removed."
        )


def _digests(rows: Mapping[str, Rows]) -> dict[str, str]:
    """For each split a hash of its encoded rows."""
    found = {}
    for split, own in rows.items():
        digest = hashlib.sha256()
        for batch in own.rows.iter(1000):
            digest.update(json.dumps(batch, sort_keys=True).encode())
        found[split] = digest.hexdigest()
    return found


def _prepare(config: RunConfig) -> _Prepared:
    data, training = config.data, config.training
    task, splits = load_rows(data)
    trunk_layers = config.model.freeze_layers if training.cache_trunk else 0
    model = build_model(
        config.model,
        task,
        backbone=None if trunk_layers else _unsharded_backbone(config.model),
        max_input_tokens=data.max_input_tokens,
        max_rationale_tokens=data.max_rationale_tokens,
        lm_chunk_tokens=training.lm_chunk_tokens,
        seed=training.seed,
    )
    _freeze_unused_head(model, training)
    fmt = replace(model.sequence_format, lm_span=training.lm_span)
    rows, reports = {}, {}
    for split in list(splits):
        taught = split == "train" or (split == "dev" and training.beta == 0)
        encoded, reports[split] = encode_split(
            splits[split],
            fmt,
            task.verbalizers,
            # With alpha = 0 nothing reads the rationale, so it needn't stand in the sequence.
            with_rationale=taught and training.alpha > 0,
            alignment=data.alignment,
            shuffled_share=data.shuffled_share,
            seed=training.seed,
        )
        if split == "train" and training.alpha > 0 and reports[split].lm_tokens == 0:
            raise ConfigError(
                f"alpha is {training.alpha} and none of the {len(encoded)} train rows has a rationale; "
                "expected some with one, or alpha=0."
            )
        if split == "dev":
            # Dev is evaluated in batches as it lies, so rows of like length lie together.
            order = sorted(range(len(encoded)), key=encoded["length"][:].__getitem__)
            encoded, splits[split] = encoded.select(order), splits[split].select(order)
        states = cached_trunk_states(model, encoded, trunk_layers) if trunk_layers else None
        rows[split] = Rows(encoded, states)
    return _Prepared(task, model, splits, rows, reports, trunk_layers)


def _unsharded_backbone(config: ModelConfig) -> Backbone | None:
    """Under FSDP the backbone in main memory, as a GPU needn't hold it whole; None elsewhere."""
    if not parse_flag_from_env("ACCELERATE_USE_FSDP"):
        return None
    dtype = resolve_dtype(config.dtype, resolve_device(config.device))
    return load_backbone(config.backbone, "cpu", str(dtype).removeprefix("torch."))


def _freeze_unused_head(model: DHRDModel, training: TrainingConfig) -> None:
    """A head whose loss has no weight gets no gradient; weight decay must not move it either."""
    if training.beta == 0:
        model.classifier.requires_grad_(False)
        if model.config.pooling == "attention":
            model.pooling_query.requires_grad_(False)
    tied = model.lm_head.weight is model.get_input_embeddings().weight
    if training.alpha == 0 and not tied:
        model.lm_head.requires_grad_(False)


def _make_trainer(config: RunConfig, prepared: _Prepared, folder: Path) -> DHRDTrainer:
    training = config.training
    device = resolve_device(config.model.device)
    groups = groups_of(prepared.data["dev"])

    def dev_metrics(prediction: EvalPrediction) -> dict[str, float]:
        logits, labels = prediction.predictions, prediction.label_ids
        found = task_metrics(prepared.task.metrics, labels, logits.argmax(1), groups)
        class_loss = -log_softmax(logits, axis=1)[range(len(labels)), labels].mean()
        return {**found, "class_loss": float(class_loss)}

    return DHRDTrainer(
        training,
        trunk_layers=prepared.trunk_layers,
        model=prepared.model,
        args=_arguments(config, folder, device),
        data_collator=DHRDCollator(prepared.model.tokenizer.pad_token_id),
        train_dataset=prepared.rows["train"],
        eval_dataset=prepared.rows["dev"],
        compute_metrics=dev_metrics,
    )


def _arguments(config: RunConfig, folder: Path, device: torch.device) -> TrainingArguments:
    training = config.training
    every = {"eval_strategy": "epoch", "save_strategy": "epoch"}
    if training.eval_steps:
        every = {"eval_strategy": "steps", "save_strategy": "steps"}
        every |= {"eval_steps": training.eval_steps, "save_steps": training.eval_steps}
    return TrainingArguments(
        output_dir=str(folder / "checkpoints"),
        per_device_train_batch_size=training.batch_size,
        per_device_eval_batch_size=training.eval_batch_size,
        gradient_accumulation_steps=training.gradient_accumulation_steps,
        num_train_epochs=training.epochs,
        max_steps=training.max_steps or -1,
        learning_rate=training.learning_rate,
        weight_decay=training.weight_decay,
        warmup_steps=training.warmup_steps,
        lr_scheduler_type={"constant": "constant_with_warmup"}.get(training.lr_schedule, training.lr_schedule),
        max_grad_norm=training.max_grad_norm,
        optim="adamw_torch_fused",
        logging_steps=training.logging_steps,
        logging_first_step=True,
        report_to=list(training.report_to) or "none",
        # Without a class loss, dev accuracy says nothing: the LM loss selects.
        metric_for_best_model="eval_primary" if training.beta else "eval_loss",
        greater_is_better=training.beta > 0,
        load_best_model_at_end=True,
        save_total_limit=1,
        seed=training.seed,
        bf16=device.type == "cuda" and config.model.dtype in ("auto", "bfloat16"),
        use_cpu=device.type == "cpu",
        remove_unused_columns=False,
        label_names=["class_labels"],
        dataloader_pin_memory=device.type == "cuda",
        **every,
    )


def _store(
    config: RunConfig,
    prepared: _Prepared,
    trainer: DHRDTrainer,
    folder: Path,
    outcome: _Outcome,
) -> None:
    """Write everything that the run gave; metrics.json last, since it marks the run as finished."""
    model, state = prepared.model, trainer.state
    pd.DataFrame(state.log_history).to_json(folder / "history.jsonl", orient="records", lines=True)
    splits = {}
    for split in ["dev", *prepared.task.test_splits]:
        frame = _predictions(prepared.data[split], outcome.logits[split])
        frame.to_json(folder / f"predictions_{split}.jsonl", orient="records", lines=True, force_ascii=False)
        splits[split] = task_metrics(
            prepared.task.metrics, frame["label"], frame["prediction"], groups_of(prepared.data[split])
        )
    if config.training.keep_model:
        model.save_pretrained(folder / "model", state_dict=outcome.weights)
    write_json(folder / "environment.json", environment(model.device))
    best = state.best_model_checkpoint
    write_json(
        folder / "metrics.json",
        {
            "task_metrics": list(prepared.task.metrics),
            "label_names": model.label_names,
            "splits": splits,
            "steps": state.global_step,
            "best_step": int(best.rsplit("-", 1)[1]) if best else state.global_step,
            "resumed_from_step": _step_of(outcome.resumed_from) if outcome.resumed_from else 0,
            "train_seconds": outcome.train_seconds,
            "train_tokens": outcome.train_tokens,
            "tokens_per_second": outcome.train_tokens / outcome.train_seconds,
            "sequences": {split: vars(report) for split, report in prepared.reports.items()},
        },
    )


def _predictions(dataset: Dataset, logits: np.ndarray) -> pd.DataFrame:
    return pd.DataFrame(
        {
            "idx": dataset["idx"],
            "input_text": dataset["input_text"],
            "label": dataset["label"],
            "prediction": logits.argmax(1),
            "probabilities": softmax(logits, axis=1).round(6).tolist(),
            "group": dataset["group"],
            "rationale": dataset["rationale"],
        }
    )
