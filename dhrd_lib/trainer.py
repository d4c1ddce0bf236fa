"""transformers' Trainer with DHRD's two losses, its order of rows and its optimizer."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import reduce
from datasets import Dataset
from torch.utils.data import Sampler
from transformers import EarlyStoppingCallback, PrinterCallback, Trainer, TrainerCallback
from transformers.trainer_callback import ExportableState

from dhrd_lib.config import ConfigError, TrainingConfig
from dhrd_lib.scaling.fsdp import gathered_lm_head, prepare_fsdp
from dhrd_lib.scaling.trunk_cache import skip_layers
from dhrd_lib.sequences import IGNORE_INDEX

TERMS = ("class_loss", "lm_loss", "privileged_class_loss", "privileged_kl")
FINITE_WANTED = "expected finite numbers, which a lower learning_rate, alpha or beta may give"


class LengthGroupedSampler(Sampler[int]):
    """Rows in random order, with rows of similar length in the same step; seed and epoch alone decide the order.

    `group_size` is the number of rows in one optimizer step over all devices.
    """

    def __init__(self, lengths: Sequence[int], group_size: int, seed: int, groups_sorted: int = 16) -> None:
        self.lengths, self.group_size, self.seed, self.epoch = lengths, group_size, seed, 0
        self.rows_sorted = group_size * groups_sorted

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

    def __init__(self, rows: Dataset, states: Sequence[np.ndarray] | None = None) -> None:
        self.rows, self.states = rows, states

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, place: int) -> dict[str, Any]:
        row = self.rows[place]
        return row if self.states is None else {**row, "trunk_states": self.states[place]}


def scheduled_alpha(alpha: float, schedule: str, step: int, total_steps: int) -> float:
    """Return alpha at an optimizer step (0-based): kept, or annealed to 0 at the last step."""
    if schedule == "constant":
        return alpha
    progress = min(step / max(total_steps - 1, 1), 1.0)
    if schedule == "linear":
        return alpha * (1.0 - progress)
    return alpha * 0.5 * (1.0 + math.cos(math.pi * progress))


def scheduled_beta(beta: float, delay: float, step: int, total_steps: int) -> float:
    """Return beta at an optimizer step (0-based): 0 in the first `delay` of the steps, a share."""
    return 0.0 if (step + 1) / total_steps <= delay else beta


class TrainingClock(TrainerCallback, ExportableState):
    """Counts the seconds of training steps; checkpoints keep the count, so that a resumed run goes on from it."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint keeps."""
        return {"args": {}, "attributes": {"seconds": self.seconds}}

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self._started = time.perf_counter()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.seconds += time.perf_counter() - self._started


class AutoAlpha(TrainerCallback, ExportableState):
    """Sets alpha after each step: the LM loss's gradient gets a share of the norm of the classifier's.

    Both are gradients at the decoder's last states, the LM loss's without alpha. Norms and cosine are averaged
    exponentially over the steps, after GradNorm (Chen et al. 2018); where the mean cosine is negative, the LM loss
    is off (Du et al. 2018), but for the trace that measures it.
    """

    DECAY, OFF = 0.9, 1e-8

    def __init__(self, share: float) -> None:
        self.share, self.alpha, self.used, self.steps = share, self.OFF, self.OFF, 0
        self.averages = [0.0, 0.0, 0.0]  # Norms and cosine, without bias correction, which cancels in alpha.
        self.moments: torch.Tensor | float = 0.0  # (3,): the step's squared norms and dot product

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint keeps."""
        names = ("alpha", "steps", "averages")
        return {"args": {"share": self.share}, "attributes": {name: getattr(self, name) for name in names}}

    @property
    def cosine(self) -> float:
        """The mean cosine of the two gradients."""
        return self.averages[2] / (1 - self.DECAY ** max(self.steps, 1))

    def record(self, class_grad: torch.Tensor, lm_grad: torch.Tensor) -> None:
        """Add the gradients `(B, S, H)` of a micro-batch to the step's moments."""
        a, b = class_grad.float(), lm_grad.float() / self.alpha
        self.moments = self.moments + torch.stack([(a * a).sum(), (b * b).sum(), (a * b).sum()])

    def update(self, class_norm: float, lm_norm: float, dot: float) -> None:
        """Set the next step's alpha by the norms and the dot product of a step's gradients."""
        self.used = self.alpha
        if class_norm * lm_norm == 0:  # No row of the step has a rationale.
            return
        self.steps += 1
        step = zip(self.averages, (class_norm, lm_norm, dot / class_norm / lm_norm), strict=True)
        self.averages = [self.DECAY * old + (1 - self.DECAY) * new for old, new in step]
        class_mean, lm_mean, cosine = self.averages
        self.alpha = self.share * class_mean / lm_mean if cosine >= 0 else self.OFF

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        class_square, lm_square, dot = reduce(self.moments, "sum").tolist()
        self.update(math.sqrt(class_square), math.sqrt(lm_square), dot)
        self.moments = 0.0


class DHRDTrainer(Trainer):
    """transformers' Trainer with the losses, each divided by its own count over the effective batch.

    The class loss is divided by the examples, the LM loss by the valid target tokens and the privileged terms by
    the rationales of all micro-batches and processes of a step, so neither accumulation nor data parallelism
    changes the result. Every term is logged.
    """

    def __init__(
        self,
        config: TrainingConfig,
        *,
        trunk_layers: int = 0,
        class_weights: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> None:
        callbacks: list[TrainerCallback] = [TrainingClock(), *kwargs.pop("callbacks", ())]
        if config.alpha == "auto":
            callbacks.append(AutoAlpha(config.alpha_share))
        if config.early_stopping_patience:
            callbacks.append(EarlyStoppingCallback(config.early_stopping_patience))
        super().__init__(callbacks=callbacks, **kwargs)
        self.remove_callback(PrinterCallback)
        if self.args.n_gpu > 1:
            raise ConfigError(
                f"{self.args.n_gpu} GPUs are visible to one process; expected `accelerate launch`, with one "
                "process per GPU (or CUDA_VISIBLE_DEVICES to name one)."
            )
        if self.is_fsdp_enabled:
            prepare_fsdp(self)
        self.config = config
        self.trunk_layers = trunk_layers
        self.class_weights = None if class_weights is None else class_weights.to(self.args.device)  # (K,)
        # compute_loss divides by the counts of the whole step; transformers must not divide again.
        self.loss_is_scaled_for_ga = True
        self._terms = torch.zeros(len(TERMS))
        self._terms_logged_at: int | None = None

    # A private hook: transformers has no public one for the order of rows.
    def _get_train_sampler(self, train_dataset: Rows | None = None) -> LengthGroupedSampler:
        rows = (train_dataset or self.train_dataset).rows
        group = self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
        return LengthGroupedSampler(rows["length"][:], group, self.config.seed)

    def create_optimizer(self, model: torch.nn.Module | None = None) -> torch.optim.Optimizer:
        """Create AdamW with a learning rate for the classifier; biases and norms aren't decayed."""
        config, model = self.config, self.model if model is None else model
        decayed = set(self.get_decay_parameter_names(model))
        groups: dict[tuple[bool, bool], dict[str, Any]] = {}
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                new = "classifier." in name or "pooling_query" in name
                rate = config.classifier_learning_rate if new else config.learning_rate
                decay = config.weight_decay if name in decayed else 0.0
                group = groups.setdefault((new, name in decayed), {"params": [], "lr": rate, "weight_decay": decay})
                group["params"].append(parameter)
        optimizer_class, arguments = self.get_optimizer_cls_and_kwargs(self.args, model)
        self.optimizer = optimizer_class(list(groups.values()), **arguments)
        return self.optimizer

    # A private hook: transformers counts target tokens alone, and `num_items_in_batch` has no public twin.
    def _get_num_items_in_batch(
        self, batch_samples: list[Mapping[str, torch.Tensor]], device: torch.device
    ) -> torch.Tensor | None:
        """Return the examples, LM target tokens and rationales `(3,)` of a step, over all its micro-batches."""
        if not batch_samples:
            return None
        examples = sum(len(batch["class_labels"]) for batch in batch_samples)
        tokens = sum(
            int((batch["lm_labels"] != IGNORE_INDEX).sum()) for batch in batch_samples if "lm_labels" in batch
        )
        rationales = sum(int((batch["rationale_end"] > 0).sum()) for batch in batch_samples)
        # Integers: FSDP would round a float to bfloat16 on its way into the model.
        counts = torch.tensor([[examples, tokens, rationales]], device=device)
        return self.accelerator.gather(counts).sum(0)

    @property
    def _auto_alpha(self) -> AutoAlpha | None:
        return next((c for c in self.callback_handler.callbacks if isinstance(c, AutoAlpha)), None)

    def _alpha(self, step: int) -> float:
        if auto := self._auto_alpha:
            return auto.alpha if step == self.state.global_step else auto.used
        return scheduled_alpha(self.config.alpha, self.config.alpha_schedule, step, self.state.max_steps)

    def _beta(self, step: int) -> float:
        return scheduled_beta(self.config.beta, self.config.beta_delay, step, self.state.max_steps)

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, torch.Tensor],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | None = None,
    ) -> Any:
        """Return the total loss of a micro-batch (paper, "Loss"), as its share of the step's."""
        counts = num_items_in_batch
        lm_trained = self.config.alpha != 0 and (model.training or self.config.beta == 0)
        if lm_trained and "lm_labels" not in inputs:
            # No row has a rationale. Under FSDP each process waits for the others at the LM head.
            inputs = {**inputs, "lm_labels": torch.full_like(inputs["input_ids"], IGNORE_INDEX)}
        inputs = dict(inputs)
        states = inputs.pop("trunk_states", None)  # (B, S, H)
        step, auto = self.state.global_step, self._auto_alpha
        privileged = self.config.is_privileged and model.training
        with ExitStack() as stack:
            if states is not None:
                stack.enter_context(skip_layers(self.model, range(self.trunk_layers), states))
            if self.is_fsdp_enabled:
                stack.enter_context(gathered_lm_head(self.model))
            outputs = model(
                **inputs,
                alpha=self._alpha(step) if model.training or auto else self.config.alpha,
                beta=self._beta(step) if model.training else self.config.beta,
                record_gradients=auto.record if auto else None,
                num_examples=None if counts is None else counts[0],
                num_lm_tokens=None if counts is None else counts[1],
                class_weights=self.class_weights,
                num_rationales=None if counts is None else counts[2],
                privileged_gamma=self.config.privileged_gamma if privileged else None,
                privileged_temperature=self.config.privileged_temperature,
            )
        # With beta = 0 and alpha annealed to 0, a batch has no term, and still needs a gradient.
        loss = outputs.logits.sum() * 0 if outputs.loss is None else outputs.loss
        if model.training and not math.isfinite(loss.item()):
            raise ConfigError(f"the loss is {loss.item()} at step {self.state.global_step + 1}; {FINITE_WANTED}.")
        # The counts are over all processes, and gradients are averaged over them: undo the average.
        loss = loss * self.accelerator.num_processes
        if model.training:
            if self._terms_logged_at is None:  # A resumed run starts later than at 0.
                self._terms_logged_at = self.state.global_step
            parts = [getattr(outputs, term) for term in TERMS]
            self._terms += torch.tensor([0.0 if part is None else part.item() for part in parts])
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add every term to a training step's log: class loss, LM loss, and the last step's weights."""
        if "loss" in logs and "eval_loss" not in logs:
            steps = max(self.state.global_step - self._terms_logged_at, 1)
            terms = self.accelerator.gather(self._terms.to(self.args.device)[None]).sum(0) / steps
            trained = (True, self.config.alpha, self.config.is_privileged, self.config.is_privileged)
            logs |= {name: term for name, term, of in zip(TERMS, terms.tolist(), trained, strict=True) if of}
            logs["alpha"] = self._alpha(self.state.global_step - 1)
            if auto := self._auto_alpha:
                logs["lm_class_cosine"] = auto.cosine
            if self.config.beta_delay:
                logs["beta"] = self._beta(self.state.global_step - 1)
            self._terms.zero_()
            self._terms_logged_at = self.state.global_step
        super().log(logs, start_time)

    # A private hook: a run that stopped after its last step has none left, and transformers would train one more.
    def _run_epoch(self, **kwargs: Any) -> None:
        patience = [c for c in self.callback_handler.callbacks if isinstance(c, EarlyStoppingCallback)]
        stopped = any(c.early_stopping_patience_counter >= c.early_stopping_patience for c in patience)
        if stopped or self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
        else:
            super()._run_epoch(**kwargs)

    # A private hook: under FSDP, transformers looks for the best checkpoint's folder before any process writes it.
    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        Path(self.args.output_dir, f"checkpoint-{self.state.global_step}").mkdir(parents=True, exist_ok=True)
        super()._save_checkpoint(model, trial)

    # A private hook: the pickled arguments are left out, as config.json has the same as text.
    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        super()._save(output_dir, state_dict)
        Path(output_dir or self.args.output_dir, "training_args.bin").unlink(missing_ok=True)
