"""Configuration of a run: what it trains, on which rows, and how. A wrong value is refused with one sentence."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from operator import attrgetter
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

Pooling = Literal["last", "mean", "weightedmean", "max", "attention"]
Head = Literal["mlp", "linear"]
Alignment = Literal["consistent", "only_label", "shuffle_rationale", "shuffle_rationale_label"]
DType = Literal["auto", "float32", "bfloat16", "float16"]
POOLING_MODES, HEADS, ALIGNMENTS = map(get_args, (Pooling, Head, Alignment))
# Fields of `TrainingConfig`: runs that differ in these alone are the same setting.
CHANGES_NO_RESULT = ("report_to", "logging_steps", "cache_trunk", "lm_chunk_tokens", "keep_model")

Count = Annotated[int, Field(ge=0)]
PositiveInt = Annotated[int, Field(ge=1)]
Weight = Annotated[float, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]  # NumPy's and scikit-learn's range
Name = Annotated[str, Field(min_length=1)]
Text = Annotated[str, Field(pattern=r"\S")]


def _as_tuple(value: Any) -> Any:
    return (value,) if isinstance(value, str) else tuple(value) if isinstance(value, list) else value


def _as_mapping(value: Any) -> Any:
    value = dict(enumerate(value)) if isinstance(value, list | tuple) else value
    return {str(label): name for label, name in value.items()} if isinstance(value, dict) else value


Names = Annotated[tuple[Name, ...], BeforeValidator(_as_tuple)]
Metric = Literal["accuracy", "macro_f1", "balanced_accuracy", "mcc"]


class WorkbenchError(ValueError):
    """Base class for errors the user can fix: one sentence with what was found and what was expected."""


class ConfigError(WorkbenchError):
    """A configuration has a wrong value or an unknown field."""


class BackboneError(WorkbenchError):
    """A backbone is missing, can't be loaded, or can't be used as a causal decoder."""


class Config(BaseModel):
    """Base of every configuration: frozen, strict about types, without unknown fields, JSON both ways."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    def __init__(self, **values: Any) -> None:
        if unknown := sorted(set(values) - set(type(self).model_fields)):
            raise ConfigError(f"{unknown[0]} is not a field; expected one of {', '.join(type(self).model_fields)}.")
        try:
            super().__init__(**values)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            # The kind of a value, such as alpha's number, is no part of its name.
            names = [name for name in first["loc"] if isinstance(name, str) and name != "constrained-float"]
            problem = first.get("ctx", {}).get("error")
            if isinstance(problem, ConfigError):  # a section's sentence, or one on several fields
                raise ConfigError(".".join([*names, str(problem)])) from None
            expected = problem or re.sub(r"^.* should (be |have )?", "", first["msg"])
            raise ConfigError(f"{'.'.join(names)} is {first['input']!r}; expected {expected}.") from None

    def _refuse(self, *conflicts: tuple[bool, str, str, str]) -> Self:
        """Raise on the first that is one of: is it a conflict, a field, another, what is expected."""
        for is_wrong, name, other, expected in conflicts:
            if is_wrong:
                value, other_value = attrgetter(name, other)(self)
                raise ConfigError(f"{name} is {value!r} with {other}={other_value!r}; expected {expected}.")
        return self

    def __hash__(self) -> int:
        return hash(self.model_dump_json())  # a field may be a dict, which pydantic's own hash can't take

    def to_dict(self) -> dict[str, Any]:
        """Return the configuration as nested dicts of JSON values."""
        return self.model_dump(mode="json")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Return the configuration of nested fields; raise `ConfigError` on a wrong one."""
        if isinstance(values, Mapping):
            return cls(**values)
        raise ConfigError(f"the configuration is {values!r}; expected a mapping of fields.")

    def save(self, path: str | Path) -> None:
        """Write the configuration to a JSON file."""
        Path(path).write_text(json.dumps(self.to_dict(), indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a JSON file of fields; raise `ConfigError`, which names the file."""
        values = read_json(path)
        try:
            return cls.from_dict(values)
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from None

    def replace(self, changes: Mapping[str, Any]) -> Self:
        """Return a checked copy with some fields changed; the key "training.alpha" reaches into a section."""
        values = self.to_dict()
        for key, value in changes.items():
            section, _, name = key.rpartition(".")
            fields = values.setdefault(section, {}) if section else values
            if not isinstance(fields, dict):
                raise ConfigError(f"{key} is not a field; expected one of {', '.join(values)}.")
            fields[name] = value
        return self.from_dict(values)


class ModelConfig(Config):
    """The backbone, the head on it, and which of its weights are trained.

    `finetune="auto"` is "full" for backbones under 500 million parameters and "lora" (the paper's set-up) above.
    `freeze_layers=k` freezes the embedding and the lowest k layers.
    """

    backbone: Name = "smollm2-135m"
    pooling: Pooling = "last"
    head: Head = "mlp"
    finetune: Literal["auto", "full", "lora"] = "auto"
    freeze_layers: Count = 0
    lora_r: PositiveInt = 16
    lora_alpha: PositiveInt = 32
    lora_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.1
    device: Name = "auto"
    dtype: DType = "auto"

    def __init__(self, **values: Any) -> None:
        values.pop("markers", None)  # Older configurations name theirs: the text ones.
        super().__init__(**values)

    @model_validator(mode="after")
    def _check(self) -> Self:
        return self._refuse((self.freeze_layers > 0 and self.finetune == "lora", "freeze_layers", "finetune", "0"))


class DataConfig(Config):
    """The task, where its rows come from, and how they become token rows.

    `task` is a task's name or the path of a data file or folder. `text` to `metrics` belong to a user's file
    (docs/guides/data.md): its columns, the `template`, `label_names` (a mapping, or a list for 0, 1, ...), the
    `encoding`, the `columns` of a CSV file without a header, and the `metrics` whose mean selects the checkpoint.
    `shuffled_share` of the rows get another row's rationale in a shuffled `alignment`; `order` is that of the parts
    after the input, `truncation_side` where inputs are cut. `dev_fraction` of train serves model selection where
    the data has no dev split. Row limits of 0 mean all rows.
    """

    task: Name = "support_triage"
    data_dir: str | None = None
    text: Names = ()
    label: str | None = None
    rationale: str | None = None
    group: str | None = None
    template: str | None = None
    label_names: Annotated[dict[str, Name], BeforeValidator(_as_mapping)] = {}
    encoding: str | None = None
    columns: Names = ()
    metrics: Annotated[tuple[Metric, ...], BeforeValidator(_as_tuple)] = ()
    alignment: Alignment = "consistent"
    shuffled_share: Annotated[float, Field(ge=0, le=1)] = 1.0
    order: Literal["rationale_label", "label_rationale"] = "rationale_label"
    max_input_tokens: Annotated[int, Field(ge=8)] = 512
    max_rationale_tokens: PositiveInt = 256
    truncation_side: Literal["left", "right"] = "left"
    dev_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.1
    max_train_rows: Count = 0
    max_eval_rows: Count = 0
    split_seed: Seed = 0


class TrainingConfig(Config):
    """The loss weights and the optimization.

    `alpha` weighs the LM loss, `beta` the class loss (paper, "Loss"); `alpha_schedule` anneals alpha to 0 at the
    last step or keeps it. With alpha "auto" the LM loss's gradient is `alpha_share` times as large as the class
    loss's, or off while they point apart. For the first `beta_delay` of the steps, a share, the LM loss trains
    alone. The `privileged_head`, a separate classifier or the input's (shared), learns the label from the
    rationale's last state and teaches the input's with the weight `privileged_gamma` at the
    `privileged_temperature` (docs/method.md). `lm_span` is the part of the sequence in the LM loss;
    `class_weights="balanced"` weighs a row's class loss by the inverse of its class's share. `batch_size` is per
    device and step; `max_steps` of 0 means `epochs`. Dev is evaluated and a checkpoint saved every `eval_steps`
    steps (0: once an epoch); `early_stopping_patience` counts evaluations without a gain (0: never). `cache_trunk`
    (the states that leave frozen layers) and `lm_chunk_tokens` change no result.
    """

    alpha: Weight | Literal["auto"] = 1.0
    beta: Weight = 1.0
    alpha_schedule: Literal["constant", "linear", "cosine"] = "constant"
    alpha_share: PositiveFloat = 0.5
    beta_delay: Annotated[float, Field(ge=0, lt=1)] = 0.0
    privileged_head: Literal["none", "separate", "shared"] = "none"
    privileged_gamma: Weight = 0.0
    privileged_temperature: PositiveFloat = 2.0
    lm_span: Literal["all", "rationale_label"] = "all"
    class_weights: Literal["none", "balanced"] = "none"
    epochs: PositiveInt = 3
    max_steps: Count = 0
    batch_size: PositiveInt = 16
    eval_batch_size: PositiveInt = 32
    gradient_accumulation_steps: PositiveInt = 1
    learning_rate: PositiveFloat = 1e-4
    classifier_learning_rate: PositiveFloat = 1e-3
    weight_decay: Weight = 0.01
    warmup_steps: Count = 10
    lr_schedule: Literal["linear", "cosine", "constant"] = "linear"
    max_grad_norm: PositiveFloat = 1.0
    eval_steps: Count = 0
    early_stopping_patience: Count = 0
    cache_trunk: bool = True
    keep_model: bool = True
    lm_chunk_tokens: PositiveInt = 512
    logging_steps: PositiveInt = 5
    report_to: Names = ()
    seed: Seed = 0

    @model_validator(mode="after")
    def _check(self) -> Self:
        auto, delayed, taught = self.alpha == "auto", self.beta_delay > 0, self.privileged_head != "none"
        return self._refuse(
            (self.alpha == 0 and self.beta == 0, "alpha", "beta", "at least one of them above 0"),
            (delayed and self.alpha == 0, "beta_delay", "alpha", "alpha above 0"),
            (delayed and self.beta == 0, "beta_delay", "beta", "beta above 0"),
            # Evaluations of an untrained classifier would use the patience up.
            (delayed and self.early_stopping_patience > 0, "beta_delay", "early_stopping_patience", "0"),
            (auto and self.beta == 0, "alpha", "beta", "beta above 0"),
            (auto and self.alpha_schedule != "constant", "alpha", "alpha_schedule", "'constant'"),
            (auto and delayed, "alpha", "beta_delay", "0"),
            (taught and self.beta == 0, "privileged_head", "beta", "beta above 0"),
            (self.privileged_gamma > 0 and not taught, "privileged_gamma", "privileged_head", "a head"),
        )

    @property
    def setting(self) -> str:
        """Return the paper's name for these weights: alpha = 0 is the baseline, beta = 0 CoT."""
        if self.alpha == 0:
            return "pooled baseline" if self.privileged_head == "none" else "privileged pooling"
        return "DHRD" if self.beta > 0 else "reasoning only"


class RunConfig(Config):
    """One training run: a name for its folder, and a model, data and training configuration."""

    name: str = "run"
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    training: TrainingConfig = TrainingConfig()

    @model_validator(mode="after")
    def _check(self) -> Self:
        name, data, head = self.name, self.data, "training.privileged_head"
        if not name.strip(".") or set(name) & set("/\\\0") or len(name.encode(errors="replace")) > 255:
            raise ConfigError(f"name is {name!r}; expected a plain folder name.")
        label_first, privileged = data.order == "label_rationale", self.training.privileged_head != "none"
        expected = "a rationale right after the input"  # A classifier that reads the label teaches nothing.
        return self._refuse(
            (label_first and self.training.beta == 0, "data.order", "training.beta", "beta above 0, for CoT"),
            (label_first and privileged, "data.order", head, expected),
            (data.alignment == "only_label" and privileged, "data.alignment", head, expected),
        )


def user_path(name: str | Path) -> Path:
    """Resolve `~` and `~user` in a path; one without such a home stays as it is."""
    return Path(os.path.expanduser(name))


def cache_dir() -> Path:
    """Return the folder of cached backbones, states and graphs: `DHRD_CACHE`, or the user's cache folder."""
    return user_path(os.environ.get("DHRD_CACHE") or "~/.cache/dhrd")


def read_json(path: str | Path) -> Any:
    """Read a JSON file, with or without a byte order mark; raise `ConfigError`, which names the file."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path} can't be read as JSON: {reason_of(error)}.") from error


def reason_of(error: Exception) -> str:
    """Return the first sentence of another library's error, on one line and without its full stop."""
    return str(error).strip().partition("\n")[0].partition(". ")[0].rstrip(" .:")
