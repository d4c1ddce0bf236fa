"""Trains configurations one after another, in each of several processes; `accelerate launch` starts it.

    accelerate launch --config_file FILE --num_processes 2 tests/many_processes.py ROOT CONFIG...

A configuration whose name begins with "stopped" is stopped in its fifth step and resumed.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback, TrainerState, TrainingArguments

sys.path.insert(0, str(Path(__file__).parents[1]))

from dhrd_lib.config import RunConfig
from dhrd_lib.training import train

FSDP = os.environ.get("ACCELERATE_USE_FSDP") == "true"


class Sharded(TrainerCallback):
    """Every process holds a part of each weight under FSDP, and all of it elsewhere."""

    def on_step_end(self, *_: Any, model: torch.nn.Module, **__: Any) -> None:
        assert {isinstance(parameter, DTensor) for parameter in model.parameters()} == {FSDP}


class Stopped(TrainerCallback):
    """Ends the training in its fifth step."""

    def on_step_begin(self, _: TrainingArguments, state: TrainerState, *__: Any, **___: Any) -> None:
        if state.global_step == 4:
            raise InterruptedError


def allow_fsdp_on_the_cpu() -> None:
    """accelerate gives FSDP to GPUs and the like alone, and leaves processes on the CPU with DDP without a word."""
    made = AcceleratorState.__init__

    def init(self: AcceleratorState, *args: Any, fsdp_plugin: Any = None, **kwargs: Any) -> None:
        made(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None:
            self.fsdp_plugin = fsdp_plugin
            self.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP

    AcceleratorState.__init__ = init


if __name__ == "__main__":
    torch.set_num_threads(1)
    if FSDP:
        allow_fsdp_on_the_cpu()
    for path in sys.argv[2:]:
        config = RunConfig.load(path)
        if config.name.startswith("stopped"):
            try:
                train(config, sys.argv[1], callbacks=[Stopped()])
            except InterruptedError:
                print(f"{config.name} was stopped")
        train(config, sys.argv[1], callbacks=[Sharded()])
