"""transformers' Trainer with DHRD's two losses, its order of rows and its optimizer."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import reduce
from datasets import Dataset
from torch import Tensor, nn
from torch.utils.data import Sampler
from transformers import EarlyStoppingCallback, PrinterCallback, Trainer, TrainerCallback, TrainerState
from transformers.trainer_callback import ExportableState

from dhrd_lib.config import ConfigError, TrainingConfig
from dhrd_lib.losses import TERMS, balanced_class_weights, denominators
from dhrd_lib.scaling.fsdp import gathered_lm_head, prepare_fsdp
from dhrd_lib.scaling.trunk_cache import skip_layers
from dhrd_lib.sequences import IGNORE_INDEX

FINITE_WANTED = "expected finite numbers, which a lower learning_rate, alpha or beta may give"


class LengthGroupedSampler(Sampler[int]):
    """Rows in random order, with rows of similar length in the same step of `group_size` rows over all devices;
    seed and epoch alone decide the order.
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
        rows = []
        for start in range(0, whole, self.rows_sorted):
            rows += sorted(order[start : min(start + self.rows_sorted, whole)], key=self.lengths.__getitem__)
        for group in torch.randperm(whole // self.group_size, generator=generator).tolist():
            yield from rows[group * self.group_size : (group + 1) * self.group_size]
        yield from order[whole:]


@dataclass
class Rows(torch.utils.data.Dataset):
    """Encoded rows for the trainer, each with its cached trunk states where there are any."""

    rows: Dataset
    states: Sequence[Any] | None = None

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, place: int) -> dict[str, Any]:
        row = self.rows[place]
        return row if self.states is None else {**row, "trunk_states": self.states[place]}


class LossWeights(TrainerCallback, ExportableState):
    """alpha and beta of each optimizer step: constant, scheduled, delayed, or (alpha) set by the gradients.

    With alpha "auto" the LM loss's gradient gets a share of the norm of the class loss's, both at the decoder's
    last states. Norms and cosine are averaged exponentially over steps, after GradNorm (Chen et al. 2018); where
    the mean cosine is negative, alpha only lets it be measured (Du et al. 2018).
    """

    DECAY, OFF = 0.9, 1e-8

    def __init__(self, **fields: Any) -> None:
        self.config = TrainingConfig(**fields)
        self.is_auto = self.config.alpha == "auto"
        self.alpha, self.beta, self.next_alpha, self.measured_steps = 0.0, 0.0, self.OFF, 0
        self.cosine, self.averages = 0.0, [0.0, 0.0, 0.0]  # of both norms and the cosine, biased alike
        self.moments, self.gradients = 0.0, {}  # (3,): the step's squared norms and dot product

    def state(self) -> dict[str, Any]:
        names = ("next_alpha", "measured_steps", "averages", "cosine")
        return {"args": self.config.to_dict(), "attributes": {name: getattr(self, name) for name in names}}

    def record(self, name: str, gradient: Tensor) -> None:
        """Add a micro-batch's gradients `(B, S, H)` to the step's moments once both are there."""
        self.gradients[name] = gradient.float()
        if len(self.gradients) == 2:
            a, b = self.gradients["class_loss"], self.gradients["lm_loss"] / self.alpha
            self.moments = self.moments + torch.stack([(a * a).sum(), (b * b).sum(), (a * b).sum()])
            self.gradients = {}

    def on_step_begin(self, args: Any, state: TrainerState, *_: Any, **kwargs: Any) -> None:
        """Set the weights of a step (0-based); a schedule anneals alpha to 0 at the last one."""
        progress = min(state.global_step / max(state.max_steps - 1, 1), 1.0)
        cosine = 0.5 * (1.0 + math.cos(math.pi * progress))
        factor = {"constant": 1.0, "linear": 1.0 - progress, "cosine": cosine}[self.config.alpha_schedule]
        self.alpha = self.next_alpha if self.is_auto else self.config.alpha * factor
        delayed = (state.global_step + 1) / state.max_steps <= self.config.beta_delay
        self.beta = 0.0 if delayed else self.config.beta

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        if not self.is_auto:
            return
        class_square, lm_square, dot = reduce(self.moments, "sum").tolist()
        self.moments = 0.0
        if class_square * lm_square == 0:  # No row of the step has a rationale.
            return
        self.measured_steps += 1
        norms = (math.sqrt(class_square), math.sqrt(lm_square))
        step = zip(self.averages, (*norms, dot / norms[0] / norms[1]), strict=True)
        self.averages = [self.DECAY * old + (1 - self.DECAY) * new for old, new in step]
        class_mean, lm_mean, cosine = self.averages
        self.cosine = cosine / (1 - self.DECAY**self.measured_steps)
        self.next_alpha = self.config.alpha_share * class_mean / lm_mean if cosine >= 0 else self.OFF


class DHRDTrainer(Trainer):
    """transformers' Trainer with the losses, each divided by its own count (`losses.denominators`) over all
    micro-batches and processes of a step, so neither accumulation nor data parallelism changes the result. Every
    term is logged.
    """

    def __init__(self, config: TrainingConfig, *, trunk_layers: int = 0, **kwargs: Any) -> None:
        callbacks = [LossWeights(**config.to_dict()), *kwargs.pop("callbacks", ())]
        if config.early_stopping_patience:
            callbacks.append(EarlyStoppingCallback(config.early_stopping_patience))
        super().__init__(callbacks=callbacks, **kwargs)
        self.remove_callback(PrinterCallback)
        if self.args.n_gpu > 1:
            expected = "expected `accelerate launch`, with a process per GPU, or CUDA_VISIBLE_DEVICES to name one"
            raise ConfigError(f"{self.args.n_gpu} GPUs are visible to one process; {expected}.")
        if self.is_fsdp_enabled:
            prepare_fsdp(self)
        self.config, self.trunk_layers = config, trunk_layers
        self.class_weights = None
        if config.class_weights == "balanced":
            labels, n_labels = self.train_dataset.rows["class_labels"][:], self.model.config.num_labels
            self.class_weights = balanced_class_weights(labels, n_labels).to(self.args.device)  # (K,)
        # compute_loss divides by the counts of the whole step; transformers must not divide again.
        self.loss_is_scaled_for_ga = True
        self._terms, self._steps = torch.zeros(len(TERMS)), set()  # since the last log

    # A private hook: transformers has no public one for the order of rows.
    def _get_train_sampler(self, train_dataset: Rows | None = None) -> LengthGroupedSampler:
        rows = (train_dataset or self.train_dataset).rows
        group = self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
        return LengthGroupedSampler(rows["length"][:], group, self.config.seed)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Create AdamW with a learning rate for the classifier; biases and norms aren't decayed."""
        config, model = self.config, self.model if model is None else model
        decayed, groups = set(self.get_decay_parameter_names(model)), defaultdict(list)
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                new = "classifier." in name or "pooling_query" in name
                groups[new, name in decayed].append(parameter)
        rates, decays = (config.learning_rate, config.classifier_learning_rate), (0.0, config.weight_decay)
        options = [{"params": of, "lr": rates[i], "weight_decay": decays[j]} for (i, j), of in groups.items()]
        optimizer_class, arguments = self.get_optimizer_cls_and_kwargs(self.args, model)
        self.optimizer = optimizer_class(options, **arguments)
        return self.optimizer

    # A private hook: transformers counts target tokens alone, and `num_items_in_batch` has no public twin.
    def _get_num_items_in_batch(self, batch_samples: list[dict[str, Any]], device: Any) -> Tensor | None:
        """Return the terms' denominators `(4,)` over all micro-batches and processes of a step."""
        if not batch_samples:
            return None
        keys = ("input_ids", "lm_labels", "rationale_end")
        counts = sum(denominators(*map(batch.get, keys)) for batch in batch_samples)
        # Integers: FSDP would round a float to bfloat16 on its way into the model.
        return self.accelerator.gather(counts[None].to(device)).sum(0)

    @property
    def weights(self) -> LossWeights:
        """The loss's weights; a resumed run replaces its callbacks."""
        return next(c for c in self.callback_handler.callbacks if isinstance(c, LossWeights))

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Return the total loss of a micro-batch (paper, "Loss"), as its share of the step's."""
        config, weights, inputs = self.config, self.weights, dict(inputs)
        states = inputs.pop("trunk_states", None)  # (B, S, H)
        if model.training:
            inputs |= {"alpha": weights.alpha, "beta": weights.beta}
            if weights.is_auto:
                inputs["record_gradient"] = weights.record
            if config.privileged_head != "none":
                inputs |= config.model_dump(include={"privileged_gamma", "privileged_temperature"})
        else:  # Dev's loss has the same weights at each step; the LM loss is part of it where it selects.
            inputs |= {"alpha": 0.0 if config.beta else config.alpha, "beta": config.beta}
        if inputs["alpha"] and "lm_labels" not in inputs:
            # No row has a rationale. Under FSDP each process waits for the others at the LM head.
            inputs["lm_labels"] = torch.full_like(inputs["input_ids"], IGNORE_INDEX)
        with ExitStack() as stack:
            if states is not None:
                stack.enter_context(skip_layers(self.model, range(self.trunk_layers), states))
            if self.is_fsdp_enabled:
                stack.enter_context(gathered_lm_head(self.model))
            outputs = model(**inputs, counts=num_items_in_batch, class_weights=self.class_weights)
        # With beta = 0 and alpha annealed to 0, a batch has no term, and still needs a gradient.
        loss = outputs.logits.sum() * 0 if outputs.loss is None else outputs.loss
        if model.training:
            step = self.state.global_step
            if not math.isfinite(loss.item()):
                raise ConfigError(f"the loss is {loss.item()} at step {step + 1}; {FINITE_WANTED}.")
            self._steps.add(step)
            self._terms += torch.tensor([outputs[term].item() if term in outputs else 0.0 for term in TERMS])
        # The counts are over all processes, and gradients are averaged over them: undo the average.
        loss = loss * self.accelerator.num_processes
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add every term to a training step's log: class loss, LM loss, and the last step's weights."""
        if "loss" in logs and "eval_loss" not in logs:
            config, weights = self.config, self.weights
            terms = self.accelerator.gather(self._terms.to(self.args.device)[None]).sum(0) / len(self._steps)
            taught = config.privileged_head != "none"
            trained = zip(TERMS, terms.tolist(), (True, config.alpha, taught, taught), strict=True)
            logs |= {name: term for name, term, is_trained in trained if is_trained}
            logs |= {"alpha": weights.alpha} | ({"beta": weights.beta} if config.beta_delay else {})
            logs |= {"lm_class_cosine": weights.cosine} if weights.is_auto else {}
            self._terms.zero_()
            self._steps.clear()
        super().log(logs, start_time)

    # A private hook: a run that stopped after its last step has none left, and transformers would train one more.
    def _run_epoch(self, **kwargs: Any) -> None:
        patience = (c for c in self.callback_handler.callbacks if isinstance(c, EarlyStoppingCallback))
        stopped = any(c.early_stopping_patience_counter >= c.early_stopping_patience for c in patience)
        if stopped or self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
        else:
            super()._run_epoch(**kwargs)

    # A private hook: under FSDP, transformers looks for the best checkpoint's folder before any process writes it.
    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        Path(self.args.output_dir, f"checkpoint-{self.state.global_step}").mkdir(parents=True, exist_ok=True)
        super()._save_checkpoint(model, trial)
