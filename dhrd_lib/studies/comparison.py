"""DHRD against its pooled baseline: two runs per seed that differ in the losses of rationales alone."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
from transformers import TrainerCallback

from dhrd_lib.config import ConfigError, RunConfig
from dhrd_lib.runs import Run
from dhrd_lib.studies.report import TEMPLATES, tabulate, write_report
from dhrd_lib.training import train

PROFILES = {
    # Two epochs with the lowest 20 of 30 layers frozen take about 22 minutes on two CPU cores.
    "quick": {"tasks": ["support_triage"], "seeds": 1, "epochs": 2, "freeze_layers": 20},
    "full": {"tasks": ["support_triage", "everyday_nli"], "seeds": 5, "epochs": 3, "freeze_layers": 15},
}

# What makes a configuration its pooled baseline.
BASELINE = {"alpha": 0.0, "beta_delay": 0.0, "privileged_head": "none", "privileged_gamma": 0.0}


def profile_config(profile: str = "quick", task: str = "support_triage") -> RunConfig:
    """Return a profile's DHRD configuration for a task, without a seed in its name."""
    sizes = PROFILES[profile]
    return RunConfig(
        name=f"{profile}-{task}",
        model={"freeze_layers": sizes["freeze_layers"]},
        data={"task": task, "max_input_tokens": 256, "max_rationale_tokens": 128},
        training={"epochs": sizes["epochs"], "batch_size": 8, "learning_rate": 2e-4},
    )


def paper_config(backbone: str, task: str, processes: int = 8) -> RunConfig:
    """Return the paper's DHRD on a hub backbone and a task (paper, "Training set-up"), 256 rows per step.

    `processes` are those of the launch; they must divide 256, else it raises `ConfigError`. The paper's bfloat16 is
    the default on a GPU.
    """
    if 256 % processes:
        raise ConfigError(f"processes is {processes}; expected a divisor of 256, the rows per step.")
    model = Path(backbone).name
    rates = {"learning_rate": 2e-4, "classifier_learning_rate": 2e-4, "lr_schedule": "cosine", "warmup_steps": 5}
    batches = {"epochs": 3, "batch_size": 1, "gradient_accumulation_steps": 256 // processes}
    return RunConfig(
        name=f"paper-{model}-{task}",
        model={"backbone": backbone, "finetune": "lora", "lora_r": 16, "lora_alpha": 32, "lora_dropout": 0.1},
        data={"task": task, "max_input_tokens": 1024},  # 512 would cut a fifth of MultiRC's inputs
        training={"alpha": 0.5 if model == "Qwen3-4B" else 1.0, "weight_decay": 0.01, **rates, **batches},
    )


def comparison(profile: str = "quick") -> list[RunConfig]:
    """Return the runs of a profile: DHRD and the pooled baseline on each of its tasks and seeds."""
    sizes = PROFILES[profile]
    seeds = range(sizes["seeds"])
    return [run for task in sizes["tasks"] for run in with_baselines(profile_config(profile, task), seeds)]


def with_baselines(config: RunConfig, seeds: Iterable[int]) -> list[RunConfig]:
    """Return for each seed the configuration and its alpha = 0 twin: NAME-dhrd-seed0, NAME-baseline-seed0.

    Raises `ConfigError` where alpha or beta is 0.
    """
    alpha, beta = config.training.alpha, config.training.beta
    if config.training.setting in ("pooled baseline", "reasoning only"):
        raise ConfigError(f"alpha and beta are {alpha} and {beta}; expected both above 0, as in DHRD.")
    # DHRD first: the cached states of its rows serve the baseline too, whose rows are the inputs alone.
    changes = {"dhrd": {}, "baseline": {f"training.{name}": value for name, value in BASELINE.items()}}
    return [
        config.replace({"name": f"{config.name}-{setting}-seed{seed}", "training.seed": seed} | of)
        for seed in seeds
        for setting, of in changes.items()
    ]


@dataclass(frozen=True)
class Comparison:
    """The runs of one or more configurations and of their baselines, by seed."""

    runs: list[Run]

    @property
    def dhrd(self) -> list[Run]:
        """The runs that rationales train, by seed."""
        return [run for run in self.runs if run.config.training.setting != "pooled baseline"]

    @property
    def baselines(self) -> list[Run]:
        """The runs without a loss of rationales, by seed."""
        return [run for run in self.runs if run.config.training.setting == "pooled baseline"]

    def table(self) -> pd.DataFrame:
        """Return the metric of each split and setting, and DHRD's difference (see `report.tabulate`)."""
        return tabulate(self.runs)

    def write_report(self, path: str | Path) -> pd.DataFrame:
        """Write the HTML report of the runs, and return `table`."""
        return write_report(self.runs, path)

    def takeaways(self) -> str:
        """Return DHRD's differences on the final splits and the training times, as Markdown."""
        final = self.table().query("split != 'dev'").dropna(subset="difference")
        return TEMPLATES.get_template("takeaways.md.jinja").module.comparison(self, final).strip()


def compare_with_baseline(
    config: RunConfig,
    runs: str | Path = "runs",
    seeds: Sequence[int] = (0,),
    callbacks: Sequence[TrainerCallback] = (),
) -> Comparison:
    """Train a configuration and its pooled baseline with every seed: same rows, steps and selection on dev.

    Finished runs in `runs` are reused, stopped ones resume. Raises `ConfigError` where alpha or beta is 0.
    """
    return Comparison([train(run, runs, callbacks) for run in with_baselines(config, seeds)])
