"""Fully sharded training (FSDP2): what it can't shard, its precision, and a backbone outside the GPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from accelerate.utils import parse_flag_from_env
from torch.distributed.fsdp import MixedPrecisionPolicy
from transformers import Trainer

from dhrd_lib.backbones import Backbone, load_backbone, resolve_device, resolve_dtype
from dhrd_lib.config import ConfigError, ModelConfig
from dhrd_lib.modeling import DHRDModel


def prepare_fsdp(trainer: Trainer) -> None:
    """Refuse what can't be sharded; keep losses, logits and summed gradients in float32."""
    plugin = trainer.accelerator.state.fsdp_plugin
    if plugin.fsdp_version != 2:
        raise ConfigError(f"accelerate's fsdp_version is {plugin.fsdp_version}; expected 2.")
    if trainer.args.bf16:
        # accelerate's policy would round the model's outputs and the gradients summed over the processes.
        plugin.mixed_precision_policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)


def load_unsharded(config: ModelConfig) -> Backbone | None:
    """Load the backbone into main memory under FSDP, as a GPU needn't hold it whole; None elsewhere."""
    if not parse_flag_from_env("ACCELERATE_USE_FSDP"):
        return None
    dtype = resolve_dtype(config.dtype, resolve_device(config.device))
    return load_backbone(config.backbone, "cpu", str(dtype).removeprefix("torch."))


@contextmanager
def gathered_lm_head(model: DHRDModel) -> Iterator[None]:
    """Compute the LM loss as the LM head's forward while this is open: FSDP gathers its weights for a call."""
    loss_sum, head = model.lm_loss_sum, model.lm_head

    def as_head(hidden: torch.Tensor, lm_labels: torch.Tensor) -> torch.Tensor:
        head.forward = loss_sum
        total = head(hidden, lm_labels)
        del head.forward  # Uncovers the class's own.
        return total

    model.lm_loss_sum = as_head
    yield
    del model.lm_loss_sum
