"""Configuration: what a run is, written down before it starts.

Four frozen dataclasses (`ModelConfig`, `DataConfig`, `TrainingConfig`, and `RunConfig`, which holds
one of each) check themselves when they are made and go to JSON and back without loss.
"""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

POOLING_MODES = ("last", "mean", "weightedmean", "max", "attention")
HEADS = ("mlp", "linear")
FINETUNE_MODES = ("auto", "full", "lora")
MARKERS = ("text", "special")
ALIGNMENTS = ("consistent", "only_label", "shuffle_rationale", "shuffle_rationale_label")
LM_SPANS = ("all", "rationale_label")
ALPHA_SCHEDULES = ("constant", "linear", "cosine")
LR_SCHEDULES = ("linear", "cosine", "constant")
DTYPES = ("auto", "float32", "bfloat16", "float16")


class ConfigError(ValueError):
    """A configuration value is not one that this workbench can run with."""


def _one_of(owner: object, name: str, allowed: tuple[str, ...]) -> None:
    value = getattr(owner, name)
    if value not in allowed:
        raise ConfigError(f"{name} is {value!r}; expected one of {', '.join(map(repr, allowed))}.")


def _whole(owner: object, name: str, minimum: int) -> None:
    value = getattr(owner, name)
    if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
        raise ConfigError(f"{name} is {value!r}; expected a whole number, {minimum} or more.")


def _number(
    owner: object, name: str, minimum: float = 0.0, below: float = math.inf, above: bool = False
) -> None:
    value = getattr(owner, name)
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    in_range = is_number and math.isfinite(value) and minimum <= value < below
    if not in_range or (above and value == minimum):
        low = f"above {minimum:g}" if above else f"{minimum:g} or more"
        high = "" if below == math.inf else f" and below {below:g}"
        raise ConfigError(f"{name} is {value!r}; expected a finite number, {low}{high}.")


@dataclass(frozen=True)
class ModelConfig:
    """The backbone, the head on it, and which of its weights are trained.

    `finetune="auto"` is "full" for backbones under 500 million parameters and "lora" (the paper's
    set-up) above. `freeze_layers=k` freezes the embedding and the lowest k layers; it belongs to full
    fine-tuning. `device` and `dtype` are "auto" or what torch calls them.
    """

    backbone: str = "smollm2-135m"
    pooling: str = "last"
    head: str = "mlp"
    markers: str = "text"
    finetune: str = "auto"
    freeze_layers: int = 0
    lora_r: int = 16
    lora_alpha: int = 32
    lora_dropout: float = 0.1
    device: str = "auto"
    dtype: str = "auto"

    def __post_init__(self) -> None:
        if not isinstance(self.backbone, str) or not self.backbone:
            raise ConfigError(f"backbone is {self.backbone!r}; expected a name, a folder or a hub id.")
        _one_of(self, "pooling", POOLING_MODES)
        _one_of(self, "head", HEADS)
        _one_of(self, "markers", MARKERS)
        _one_of(self, "finetune", FINETUNE_MODES)
        _one_of(self, "dtype", DTYPES)
        _whole(self, "freeze_layers", 0)
        _whole(self, "lora_r", 1)
        _whole(self, "lora_alpha", 1)
        _number(self, "lora_dropout", below=1.0)
        if self.finetune == "lora" and self.freeze_layers:
            raise ConfigError(
                f"freeze_layers is {self.freeze_layers} with finetune='lora', which freezes the whole "
                "backbone already; expected freeze_layers=0."
            )
        if self.markers == "special" and self.freeze_layers:
            raise ConfigError(
                f"markers is 'special' with freeze_layers={self.freeze_layers}, which freezes the "
                "embedding that new marker tokens need; expected markers='text' or freeze_layers=0."
            )


@dataclass(frozen=True)
class DataConfig:
    """The task, where its rows come from, and how they become token rows.

    `task` is a task's name or the path of a CSV, JSONL or Parquet file; the column fields (`text`,
    `label`, `rationale`, `group`, `template`) belong to a file. `max_train_rows` and `max_eval_rows`
    of 0 mean all rows. Lengths are in tokens. `dev_fraction` is the share of train that is cut off for
    model selection where the data brings no dev split of its own.
    """

    task: str = "support_triage"
    data_dir: str | None = None
    text: tuple[str, ...] = ()
    label: str | None = None
    rationale: str | None = None
    group: str | None = None
    template: str | None = None
    alignment: str = "consistent"
    max_input_tokens: int = 512
    max_rationale_tokens: int = 256
    dev_fraction: float = 0.1
    max_train_rows: int = 0
    max_eval_rows: int = 0
    split_seed: int = 0

    def __post_init__(self) -> None:
        text = (self.text,) if isinstance(self.text, str) else tuple(self.text)
        object.__setattr__(self, "text", text)
        if not isinstance(self.task, str) or not self.task:
            raise ConfigError(f"task is {self.task!r}; expected a task's name or a data file's path.")
        _one_of(self, "alignment", ALIGNMENTS)
        _whole(self, "max_input_tokens", 8)
        _whole(self, "max_rationale_tokens", 1)
        _number(self, "dev_fraction", above=True, below=1.0)
        _whole(self, "max_train_rows", 0)
        _whole(self, "max_eval_rows", 0)
        _whole(self, "split_seed", 0)


@dataclass(frozen=True)
class TrainingConfig:
    """The loss weights and the optimisation.

    `alpha` weighs the LM loss, `beta` the class loss (paper, "Loss"). `alpha_schedule` anneals alpha
    from its value at the first step to 0 at the last ("linear", "cosine") or keeps it. `lm_span` is
    the part of the sequence that the LM loss covers. `batch_size` is per device and step;
    `max_steps` of 0 means that `epochs` decides. Dev is evaluated and a checkpoint kept every
    `eval_steps` steps (0: once an epoch); `early_stopping_patience` counts evaluations without a gain
    (0: never stops early). `cache_trunk` keeps the states that leave frozen layers, and `lm_chunk_tokens`
    bounds the memory of the LM loss; neither changes a result.
    """

    alpha: float = 1.0
    beta: float = 1.0
    alpha_schedule: str = "constant"
    lm_span: str = "all"
    epochs: int = 3
    max_steps: int = 0
    batch_size: int = 16
    eval_batch_size: int = 32
    gradient_accumulation_steps: int = 1
    learning_rate: float = 1e-4
    classifier_learning_rate: float = 1e-3
    weight_decay: float = 0.01
    warmup_steps: int = 10
    lr_schedule: str = "linear"
    max_grad_norm: float = 1.0
    eval_steps: int = 0
    early_stopping_patience: int = 0
    cache_trunk: bool = True
    lm_chunk_tokens: int = 512
    logging_steps: int = 5
    report_to: tuple[str, ...] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        report_to = (self.report_to,) if isinstance(self.report_to, str) else tuple(self.report_to)
        object.__setattr__(self, "report_to", report_to)
        _number(self, "alpha")
        _number(self, "beta")
        if self.alpha == 0 and self.beta == 0:
            raise ConfigError("alpha and beta are both 0; expected at least one of them above 0.")
        _one_of(self, "alpha_schedule", ALPHA_SCHEDULES)
        _one_of(self, "lm_span", LM_SPANS)
        _one_of(self, "lr_schedule", LR_SCHEDULES)
        for name in ("epochs", "batch_size", "eval_batch_size", "gradient_accumulation_steps"):
            _whole(self, name, 1)
        for name in ("lm_chunk_tokens", "logging_steps"):
            _whole(self, name, 1)
        for name in ("max_steps", "warmup_steps", "eval_steps", "early_stopping_patience", "seed"):
            _whole(self, name, 0)
        for name in ("learning_rate", "classifier_learning_rate", "max_grad_norm"):
            _number(self, name, above=True)
        _number(self, "weight_decay")
        if not isinstance(self.cache_trunk, bool):
            raise ConfigError(f"cache_trunk is {self.cache_trunk!r}; expected true or false.")

    @property
    def setting(self) -> str:
        """What the paper calls a run with these weights: alpha = 0 is the baseline, beta = 0 CoT."""
        if self.alpha == 0:
            return "pooled baseline"
        return "DHRD" if self.beta > 0 else "reasoning only"


@dataclass(frozen=True)
class RunConfig:
    """One training run: a name for its folder, and a model, data and training configuration."""

    name: str = "run"
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)

    def __post_init__(self) -> None:
        plain = isinstance(self.name, str) and self.name.strip(".") and "/" not in self.name
        if not plain or "\\" in self.name or "\0" in self.name:
            raise ConfigError(f"name is {self.name!r}; expected a plain folder name.")

    def to_dict(self) -> dict[str, Any]:
        """The configuration as nested dicts of JSON values."""
        return json.loads(json.dumps(dataclasses.asdict(self)))

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> RunConfig:
        """The inverse of `to_dict`; raises `ConfigError` on a key that no field has."""
        parts = dict(values)
        for name, section in (("model", ModelConfig), ("data", DataConfig), ("training", TrainingConfig)):
            parts[name] = _build(section, parts.get(name, {}), where=f"{name}.")
        return _build(cls, parts, where="")

    def save(self, path: str | Path) -> None:
        """Write the configuration to a JSON file."""
        Path(path).write_text(json.dumps(self.to_dict(), indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> RunConfig:
        """Read a JSON file that `save` wrote, or that was written by hand."""
        try:
            values = json.loads(Path(path).read_text(encoding="utf-8"))
        except json.JSONDecodeError as error:
            raise ConfigError(f"{path} is not JSON: {error}.") from error
        return cls.from_dict(values)

    def replace(self, **changes: Any) -> RunConfig:
        """A copy with some fields changed; `training__alpha=0.5` reaches into a section."""
        values = self.to_dict()
        for key, value in changes.items():
            *section, name = key.split("__")
            target = values[section[0]] if section else values
            target[name] = value
        return RunConfig.from_dict(values)


def _build(cls: type, values: Any, where: str) -> Any:
    """Make a config dataclass from a mapping, refusing keys that it has no field for."""
    if dataclasses.is_dataclass(values):
        return values
    if not isinstance(values, dict):
        raise ConfigError(f"{where or 'config'} is {values!r}; expected a mapping of fields.")
    known = [f.name for f in dataclasses.fields(cls)]
    unknown = sorted(set(values) - set(known))
    if unknown:
        raise ConfigError(f"{where}{unknown[0]} is not a field; expected one of {', '.join(known)}.")
    return cls(**values)
