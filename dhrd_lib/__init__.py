"""Dual-Head Reasoning Distillation: a pooled classifier trained jointly with its LM head on rationales."""

import importlib
import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dhrd_lib.backbones import load_backbone as load_backbone
    from dhrd_lib.config import DataConfig as DataConfig
    from dhrd_lib.config import ModelConfig as ModelConfig
    from dhrd_lib.config import RunConfig as RunConfig
    from dhrd_lib.config import TrainingConfig as TrainingConfig
    from dhrd_lib.config import WorkbenchError as WorkbenchError
    from dhrd_lib.evaluation import task_metrics as task_metrics
    from dhrd_lib.modeling import DHRDModel as DHRDModel
    from dhrd_lib.modeling import build_model as build_model
    from dhrd_lib.runs import Run as Run
    from dhrd_lib.runs import load_run as load_run
    from dhrd_lib.runs import load_runs as load_runs
    from dhrd_lib.serving.classifier import load_classifier as load_classifier
    from dhrd_lib.studies.ablations import run_ablation as run_ablation
    from dhrd_lib.studies.comparison import compare_with_baseline as compare_with_baseline
    from dhrd_lib.studies.comparison import paper_config as paper_config
    from dhrd_lib.tasks import Task as Task
    from dhrd_lib.tasks import load_task as load_task
    from dhrd_lib.trainer import DHRDTrainer as DHRDTrainer
    from dhrd_lib.training import train as train

# Read when torch is imported. By default, threads spin 300,000 times at a barrier, for milliseconds: two processes
# on the same cores then take twice as long.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "3000")

# Loaded on first use, so that `import dhrd_lib` takes no time and an export is served without torch.
_MODULES = {
    "backbones": ("load_backbone",),
    "config": ("DataConfig", "ModelConfig", "RunConfig", "TrainingConfig", "WorkbenchError"),
    "evaluation": ("task_metrics",),
    "modeling": ("DHRDModel", "build_model"),
    "runs": ("Run", "load_run", "load_runs"),
    "serving.classifier": ("load_classifier",),
    "studies.ablations": ("run_ablation",),
    "studies.comparison": ("compare_with_baseline", "paper_config"),
    "tasks": ("Task", "load_task"),
    "trainer": ("DHRDTrainer",),
    "training": ("train",),
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}
__all__ = sorted(_MODULE_OF)


def __getattr__(name: str) -> object:
    """Load a public name from its module."""
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULE_OF[name]}"), name)


def __dir__() -> list[str]:
    return __all__
