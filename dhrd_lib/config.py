"""Configuration: what a run is, written down before it starts.

Four frozen dataclasses (`ModelConfig`, `DataConfig`, `TrainingConfig`, and `RunConfig`, which holds
one of each) check themselves when they are made and go to JSON and back without loss. `TeacherConfig`
does the same for the writing of rationales.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

POOLING_MODES = ("last", "mean", "weightedmean", "max", "attention")
HEADS = ("mlp", "linear")
FINETUNE_MODES = ("auto", "full", "lora")
MARKERS = ("text", "special")
ALIGNMENTS = ("consistent", "only_label", "shuffle_rationale", "shuffle_rationale_label")
LM_SPANS = ("all", "rationale_label")
ALPHA_SCHEDULES = ("constant", "linear", "cosine")
LR_SCHEDULES = ("linear", "cosine", "constant")
DTYPES = ("auto", "float32", "bfloat16", "float16")
# Fields of `TrainingConfig`: runs that differ in these alone are the same setting.
CHANGES_NO_RESULT = ("report_to", "logging_steps", "cache_trunk", "lm_chunk_tokens", "keep_model")
TEACHER_KINDS = ("local", "openai")
PROTOCOLS = ("gold", "rejection", "human")
TOKEN_LIMITS = ("max_tokens", "max_completion_tokens")
_HIGHEST_SEED = 2**32 - 1  # NumPy's and scikit-learn's
_LOWEST_TEMPERATURE = 0.001


class WorkbenchError(ValueError):
    """Something the caller can mend; the message is one sentence that says what was found and expected."""


class ConfigError(WorkbenchError):
    """A configuration value is not one that this workbench can run with."""


def _one_of(owner: object, name: str, allowed: tuple[str, ...]) -> None:
    value = getattr(owner, name)
    if value not in allowed:
        raise ConfigError(f"{name} is {value!r}; expected one of {', '.join(map(repr, allowed))}.")


def _whole(owner: object, name: str, minimum: int, highest: float = math.inf) -> None:
    value = getattr(owner, name)
    if not is_whole(value, minimum) or value > highest:
        allowed = f"{minimum} or more" if highest == math.inf else f"{minimum} to {highest}"
        raise ConfigError(f"{name} is {value!r}; expected a whole number, {allowed}.")


def is_whole(value: Any, minimum: int = 0) -> bool:
    """Whether something is a whole number, the minimum or more; a truth value isn't one."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= minimum


def is_number(value: Any) -> bool:
    """Whether something is a number; a truth value isn't one."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def is_finite(value: float) -> bool:
    """Whether a number is one that a float can hold; `math.isfinite` fails on whole numbers that are too large."""
    return abs(value) <= sys.float_info.max


def _names(owner: object, name: str) -> tuple[str, ...]:
    """A field that has several names, of which one may stand alone."""
    value = getattr(owner, name)
    found = (value,) if isinstance(value, str) else value
    if not isinstance(found, list | tuple) or not all(isinstance(one, str) and one for one in found):
        raise ConfigError(f"{name} is {value!r}; expected a name, or a list of names.")
    return tuple(found)


def _number(
    owner: object,
    name: str,
    minimum: float = 0.0,
    below: float = math.inf,
    above: bool = False,
    highest: float = math.inf,
) -> None:
    value = getattr(owner, name)
    in_range = is_number(value) and is_finite(value) and minimum <= value < below and value <= highest
    if not in_range or (above and value == minimum):
        low = f"above {minimum:g}" if above else f"{minimum:g} or more"
        high = "" if below == math.inf else f" and below {below:g}"
        high += "" if highest == math.inf else f" and at most {highest:g}"
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
        if not isinstance(self.device, str) or not self.device:
            raise ConfigError(f"device is {self.device!r}; expected 'auto', or what torch calls it.")
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
    of 0 mean all rows; a draw of fewer keeps groups whole. `shuffled_share` is the share of the rows that a
    shuffled `alignment` gives another row's rationale. Lengths are in tokens. `dev_fraction` is the share of
    train that is cut off for model selection where the data brings no dev split of its own.
    """

    task: str = "support_triage"
    data_dir: str | None = None
    text: tuple[str, ...] = ()
    label: str | None = None
    rationale: str | None = None
    group: str | None = None
    template: str | None = None
    alignment: str = "consistent"
    shuffled_share: float = 1.0
    max_input_tokens: int = 512
    max_rationale_tokens: int = 256
    dev_fraction: float = 0.1
    max_train_rows: int = 0
    max_eval_rows: int = 0
    split_seed: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "text", _names(self, "text"))
        for name in ("data_dir", "label", "rationale", "group", "template"):
            if not isinstance(getattr(self, name), str | None):
                raise ConfigError(f"{name} is {getattr(self, name)!r}; expected a text, or null.")
        if not isinstance(self.task, str) or not self.task:
            raise ConfigError(f"task is {self.task!r}; expected a task's name or a data file's path.")
        _one_of(self, "alignment", ALIGNMENTS)
        _number(self, "shuffled_share", highest=1.0)
        _whole(self, "max_input_tokens", 8)
        _whole(self, "max_rationale_tokens", 1)
        _number(self, "dev_fraction", above=True, below=1.0)
        _whole(self, "max_train_rows", 0)
        _whole(self, "max_eval_rows", 0)
        _whole(self, "split_seed", 0, _HIGHEST_SEED)


@dataclass(frozen=True)
class TrainingConfig:
    """The loss weights and the optimisation.

    `alpha` weighs the LM loss, `beta` the class loss (paper, "Loss"). `alpha_schedule` anneals alpha
    from its value at the first step to 0 at the last ("linear", "cosine") or keeps it. `lm_span` is
    the part of the sequence that the LM loss covers. `batch_size` is per device and step;
    `max_steps` of 0 means that `epochs` decides. Dev is evaluated and a checkpoint kept every
    `eval_steps` steps (0: once an epoch); `early_stopping_patience` counts evaluations without a gain
    (0: never stops early). `cache_trunk` keeps the states that leave frozen layers, and `lm_chunk_tokens`
    bounds the memory of the LM loss; neither changes a result. `keep_model` of False leaves the weights out of
    the run's folder, which has the predictions all the same: a grid of many runs fits on a disk.
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
    keep_model: bool = True
    lm_chunk_tokens: int = 512
    logging_steps: int = 5
    report_to: tuple[str, ...] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "report_to", _names(self, "report_to"))
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
        for name in ("max_steps", "warmup_steps", "eval_steps", "early_stopping_patience"):
            _whole(self, name, 0)
        _whole(self, "seed", 0, _HIGHEST_SEED)
        for name in ("learning_rate", "classifier_learning_rate", "max_grad_norm"):
            _number(self, name, above=True)
        _number(self, "weight_decay")
        for name in ("cache_trunk", "keep_model"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name} is {getattr(self, name)!r}; expected true or false.")

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
        plain = isinstance(self.name, str) and self.name.strip(".") and not set(self.name) & set("/\\\0")
        if not plain or len(self.name.encode(errors="replace")) > 255:  # as long as file systems allow
            raise ConfigError(f"name is {self.name!r}; expected a plain folder name.")

    def to_dict(self) -> dict[str, Any]:
        """The configuration as nested dicts of JSON values."""
        return json.loads(json.dumps(dataclasses.asdict(self)))

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> RunConfig:
        """The inverse of `to_dict`; raises `ConfigError` on a key that no field has."""
        if not isinstance(values, dict):
            raise ConfigError(f"config is {values!r}; expected a mapping of fields.")
        parts = dict(values)
        for name, section in (("model", ModelConfig), ("data", DataConfig), ("training", TrainingConfig)):
            parts[name] = _build(section, parts.get(name, {}), where=f"{name}.")
        return _build(cls, parts, where="")

    def save(self, path: str | Path) -> None:
        """Write the configuration to a JSON file."""
        Path(path).write_text(json.dumps(self.to_dict(), indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> RunConfig:
        """Read a JSON file that `save` wrote, or that was written by hand; an error names the file."""
        values = read_json(path)
        try:
            return cls.from_dict(values)
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from error

    def replace(self, **changes: Any) -> RunConfig:
        """A copy with some fields changed; `training__alpha=0.5` reaches into a section."""
        values = self.to_dict()
        for key, value in changes.items():
            *section, name = key.split("__")
            target = values[section[0]] if section else values
            target[name] = value
        return RunConfig.from_dict(values)


@dataclass(frozen=True)
class TeacherConfig:
    """Who writes the rationales, and how they are asked (paper, "Teacher").

    `kind` is "local" (any causal LM that `load_backbone` takes) or "openai" (any server that speaks
    OpenAI's chat API). `model` of None is the embedded backbone, or what DHRD_TEACHER_MODEL names for a
    server; `base_url` of None is OPENAI_BASE_URL, or the hosted default. The key is never a part of the
    configuration: `api_key_env` is the name of the variable that holds it.

    `protocol` is "gold" (the label is given), "rejection" (it isn't; up to `tries` answers a row, until
    one agrees with it) or "human" (the rationales that the data brings; nobody is asked). `prompt` is a
    template of the row's fields, `input`, `labels`, `label` and `sentinel`; None is the protocol's own.

    `temperature` of None is the model's own, and 0 is greedy; `seed` of None sends none. `token_limit` is
    what the server calls the limit `max_tokens`. Prices are for the cost line; without them it has tokens
    only. `concurrency`, `timeout_s` (of one request) and `max_retries` belong to servers; `batch_size`,
    `device` and `dtype` to local models. None of these last changes what a stored rationale belongs to.
    """

    kind: str = "local"
    model: str | None = None
    base_url: str | None = None
    api_key_env: str = "OPENAI_API_KEY"
    protocol: str = "gold"
    tries: int = 4
    prompt: str | None = None
    temperature: float | None = 0.0
    top_p: float = 1.0
    max_tokens: int = 256
    token_limit: str = "max_tokens"
    seed: int | None = None
    concurrency: int = 4
    timeout_s: float = 60.0
    max_retries: int = 5
    usd_per_million_tokens_in: float | None = None
    usd_per_million_tokens_out: float | None = None
    batch_size: int = 8
    device: str = "auto"
    dtype: str = "auto"

    def __post_init__(self) -> None:
        _one_of(self, "kind", TEACHER_KINDS)
        _one_of(self, "protocol", PROTOCOLS)
        _one_of(self, "token_limit", TOKEN_LIMITS)
        _one_of(self, "dtype", DTYPES)
        for name in ("model", "prompt", "base_url"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, str) or not value.strip()):
                raise ConfigError(f"{name} is {value!r}; expected a text, or null.")
        # The value isn't repeated: whoever puts a key here must not find it in a log.
        if not isinstance(self.api_key_env, str) or not self.api_key_env.isidentifier():
            raise ConfigError("api_key_env isn't a variable's name; expected the name, never the key.")
        if self.base_url is not None:
            _check_base_url(self.base_url)
        for name in ("tries", "max_tokens", "concurrency", "batch_size"):
            _whole(self, name, 1)
        _whole(self, "max_retries", 0)
        _number(self, "timeout_s", above=True)
        _number(self, "top_p", above=True)
        if self.top_p > 1:
            raise ConfigError(f"top_p is {self.top_p!r}; expected a number above 0, and at most 1.")
        for name in ("temperature", "usd_per_million_tokens_in", "usd_per_million_tokens_out"):
            if getattr(self, name) is not None:
                _number(self, name)
        if self.seed is not None:
            _whole(self, "seed", 0, _HIGHEST_SEED)
        if self.temperature and self.temperature < _LOWEST_TEMPERATURE:
            told = f"temperature is {self.temperature!r}, by which no logit can be divided"
            raise ConfigError(f"{told}; expected 0, which is greedy, or {_LOWEST_TEMPERATURE} or more.")
        if self.protocol == "rejection" and self.tries > 1 and self.temperature == 0:
            raise ConfigError(
                f"temperature is 0 with protocol='rejection' and tries={self.tries}, so that every try says "
                "the same; expected a temperature above 0, or tries=1."
            )

    @classmethod
    def load(cls, path: str | Path) -> TeacherConfig:
        """Read a JSON file of fields; raises `ConfigError` on one that isn't known."""
        values = read_json(path)
        try:
            return _build(cls, values, where="teacher.")
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from error


def _check_base_url(base_url: str) -> None:
    """Refuse an address that isn't one, or that carries a secret, without repeating it."""
    try:
        parts = urlsplit(base_url)
        known = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:
        known = False
    if not known:
        raise ConfigError("base_url isn't an address; expected http://… or https://….")
    if parts.username or parts.password or parts.query or parts.fragment:
        raise ConfigError(
            "base_url has a user, password or query; expected host and path only, and the key in the "
            "variable that api_key_env names."
        )


def user_path(name: str | Path) -> Path:
    """A path with `~` and `~user` resolved; raises `ConfigError` where there is no such home."""
    try:
        return Path(name).expanduser()
    except RuntimeError as error:
        raise ConfigError(f"{name} begins with a home folder that isn't known here; expected a path.") from error


def cache_dir() -> Path:
    """Where backbones, states and graphs are kept for next time: `DHRD_CACHE`, or the user's cache folder."""
    named = os.environ.get("DHRD_CACHE")
    return user_path(named) if named else Path.home() / ".cache" / "dhrd"


def read_json(path: str | Path) -> Any:
    """What a JSON file says, with or without a byte order mark; raises `ConfigError`, which names the file."""
    try:
        return parse_json(Path(path).read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise ConfigError(f"{path} can't be read ({error.strerror}); expected a JSON file.") from error
    except ValueError as error:
        raise ConfigError(f"{path} is not JSON: {reason_of(error)}.") from error


def parse_json(text: str) -> Any:
    """What JSON says; raises `ValueError`, also on what would be lost or couldn't be written again.

    That is a key that stands twice in an object, and half a surrogate pair.
    """
    try:
        value = json.loads(text, object_pairs_hook=_distinct_keys)
        json.dumps(value, ensure_ascii=False).encode()
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    return value


def _distinct_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(pairs) != len(dict(pairs)):
        raise ValueError("a key stands twice")
    return dict(pairs)


def reason_of(error: Exception) -> str:
    """The first sentence of another library's error, in one line and without its full stop."""
    line = str(error).strip().partition("\n")[0]
    return line.partition(". ")[0].rstrip(" .:")


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
