"""The backend: each model is loaded once, one computation runs at a time, clocks run inside the call."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from threading import Lock
from typing import Any, NamedTuple

import numpy as np
import torch

from app import runs
from app.settings import KEPT_MODELS, MAX_CHARACTERS, MAX_NEW_TOKENS, MAX_ROWS, Settings
from dhrd_lib.backbones import Backbone, load_backbone, resolve_device
from dhrd_lib.config import ConfigError
from dhrd_lib.cot import CoT, Decoding, Generations
from dhrd_lib.inputs import Predictions, TaskError, as_inputs, render_inputs, template_fields
from dhrd_lib.modeling import DHRDModel

ZERO_SHOT = "zero-shot"  # takes the place of a run's name: CoT of the bare backbone
_WARM_UP = ("A short text.", "A text of usual length, so that the second call has another one than the first.")
_CHUNK_ROWS = 16  # rows between two checks of whether the visitor still waits

Row = str | Mapping[str, Any]  # texts by the template's field; a str is the text of a one-field template


@dataclass(frozen=True)
class Answer:
    """One system's prediction for one input, and its inference cost.

    `label` is None where no answer could be parsed; `probabilities` are by label name. `latency_ms` is the time
    inside the call, tokenization included. `tokens_cut` input tokens were truncated.
    """

    label: str | None
    probabilities: dict[str, float]
    latency_ms: float
    tokens_read: int
    tokens_written: int = 0
    tokens_cut: int = 0


@dataclass(frozen=True)
class Stream:
    """Generated text so far, its tokens and ms; CoT's last one has the parsed answer."""

    text: str
    tokens: int
    latency_ms: float
    answer: Answer | None = None


class RowPredictions(NamedTuple):
    """Predictions for the first n rows, the seconds inside the calls, and how many inputs were truncated."""

    predictions: Predictions
    seconds: float
    inputs_cut: int


class Backend:
    """Predictions of stored runs and of CoT; one backend serves all visitors.

    The `KEPT_MODELS` most recently used models stay in memory, a run's until it is trained again. Errors that a
    visitor can fix are `WorkbenchError`s. Streams end where `is_stopped()` returns True or when they are closed.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self._models: OrderedDict[tuple[str, str], tuple[int, Any]] = OrderedDict()
        self._computing = Lock()

    def load(self, run: str, task: str, picked: Sequence[str | None] = ()) -> None:
        """Load and warm up the model of a run, or of zero-shot CoT on a task, if it isn't in memory."""
        with self._computing:
            self._cot(task, run, picked)

    def classify(self, run: str, row: Row) -> Answer:
        """Classify one input; the LM head isn't computed."""
        with self._computing:
            model = self._classifier(run)
            _check([row], model.config.template)
            elapsed_ms = _clock(model.device)
            labels, probabilities = model.predict([row])
            latency_ms = elapsed_ms()
            (encoded,) = model.encode([row])
        by_label = dict(zip(model.label_names, probabilities[0].tolist(), strict=True))
        tokens, cut = len(encoded["input_ids"]), encoded["input_tokens_cut"]
        return Answer(labels[0], by_label, latency_ms, tokens, tokens_cut=cut)

    def classify_rows(self, run: str, rows: Sequence[Row]) -> Iterator[RowPredictions]:
        """Classify 1 to `MAX_ROWS` inputs in their order; yields the predictions so far, at last those for all."""
        with self._computing:
            model = self._classifier(run)
            rows = as_inputs(rows)
            if not 1 <= len(rows) <= MAX_ROWS:
                raise TaskError(f"There are {len(rows):,} rows; expected 1 to {MAX_ROWS:,}.")
            _check(rows, model.config.template)
            logits, seconds, inputs_cut = [], 0.0, 0
            for first in range(0, len(rows), _CHUNK_ROWS):
                elapsed_ms = _clock(model.device)
                encoded = model.encode(rows[first : first + _CHUNK_ROWS])
                logits.append(model.logits(encoded))
                seconds += elapsed_ms() / 1000
                inputs_cut += sum(row["input_tokens_cut"] > 0 for row in encoded)
                predictions = Predictions.from_logits(np.concatenate(logits), model.label_names)
                yield RowPredictions(predictions, seconds, inputs_cut)

    def rationale(self, run: str, row: Row, is_stopped: Callable[[], bool]) -> Iterator[Stream]:
        """Stream the rationale of a run's reasoning head; the prediction doesn't depend on it."""
        with self._computing:
            model = self._model(run)
            _check([row], model.config.template)
            elapsed_ms, text = _clock(model.device), ""
            with closing(model.generate_rationale(row, model.config.max_rationale_tokens, stream=True)) as pieces:
                for piece in pieces:
                    text += piece
                    tokens = len(model.tokenizer(text, add_special_tokens=False).input_ids)
                    yield Stream(text, tokens, elapsed_ms())
                    if is_stopped():
                        return

    def cot(
        self,
        task: str,
        run: str,
        row: Row,
        max_new_tokens: int,
        is_stopped: Callable[[], bool],
        picked: Sequence[str | None] = (),
    ) -> Iterator[Stream]:
        """Stream CoT decoding token by token; the last one has the answer, unless it was stopped.

        The label is parsed from the generated text. The probabilities are the LM head's, of each label after that
        text, and aren't timed. Zero-shot CoT takes labels, fields and backbone of the task's reference run: the
        first of those `picked`, or else the task's first.
        """
        if type(max_new_tokens) is not int or not 1 <= max_new_tokens <= MAX_NEW_TOKENS:
            raise ConfigError(f"max_new_tokens is {max_new_tokens!r}; expected 1 to {MAX_NEW_TOKENS}.")
        with self._computing:
            cot = self._cot(task, run, picked)
            (text,) = _check([row], cot.task.template)
            elapsed_ms = _clock(cot.lm.device)
            tokens_read = len(cot.encode_prompt(text))
            before_ms, generations = elapsed_ms(), None
            with closing(cot.stream(row, Decoding(max_new_tokens=max_new_tokens))) as steps:
                for generations in steps:
                    yield _generated(cot, generations, before_ms)
                    if is_stopped():
                        return
            last = _generated(cot, generations, before_ms)
            (label,) = cot.parse(generations).labels
            probabilities = cot.score(generations).probabilities[0].tolist()
            by_label = dict(zip(cot.task.label_names, probabilities, strict=True))
            yield replace(last, answer=Answer(label, by_label, last.latency_ms, tokens_read, last.tokens))

    def _classifier(self, name: str) -> DHRDModel:
        if runs.find_run(self.settings.runs, name).config.training.beta == 0:
            problem = f"Run {name!r} was trained without the class loss (beta = 0), so its classifier is untrained"
            raise ConfigError(f"{problem}; expected CoT decoding for it, or another run.")
        return self._model(name)

    def _model(self, name: str) -> DHRDModel:
        run = runs.find_run(self.settings.runs, name)

        def load() -> DHRDModel:
            model = DHRDModel.from_pretrained(run.folder / "model").to(resolve_device(None))
            _warm_up(CoT.from_model(model))
            if run.config.training.beta > 0:
                for text in _WARM_UP:
                    model.predict([dict.fromkeys(template_fields(model.config.template), text)])
            return model

        # A run that is trained again has new metrics.
        return self._kept(("run", name), (run.folder / "metrics.json").stat().st_mtime_ns, load)

    def _cot(self, task: str, run: str, picked: Sequence[str | None]) -> CoT:
        if run != ZERO_SHOT:
            return CoT.from_model(self._model(run))
        reference = runs.reference_run(self.settings.runs, task, picked)
        name = reference.config.model.backbone if reference else self.settings.backbone
        known = runs.task_for(self.settings.runs, task, picked)

        def load() -> Backbone:
            backbone = load_backbone(name)
            _warm_up(CoT.from_backbone(backbone, known))
            return backbone

        return CoT.from_backbone(self._kept(("backbone", name), 0, load), known)

    def _kept(self, key: tuple[str, str], version: int, load: Callable[[], Any]) -> Any:
        """Return the model of a key, loaded where it isn't in memory in this version."""
        if key not in self._models or self._models[key][0] != version:
            self._models.pop(key, None)
            while len(self._models) >= KEPT_MODELS:  # before loading, or both would be in memory
                self._models.popitem(last=False)
            self._models[key] = version, load()
        self._models.move_to_end(key)
        return self._models[key][1]


def _warm_up(cot: CoT) -> None:
    """Decode twice: a model's first calls are slower, and no visitor's latency shall be one of them."""
    for text in _WARM_UP:
        cot.generate([dict.fromkeys(template_fields(cot.task.template), text)], Decoding(max_new_tokens=2))


def _check(rows: Sequence[Row], template: str) -> list[str]:
    """Return the texts that the model reads; raises `TaskError` where an input has none, or too long a one."""
    rendered = render_inputs(template, rows)
    for number, row in enumerate(rows, start=1):
        texts = [row] if isinstance(row, str) else [str(row[name]) for name in template_fields(template)]
        if (longest := max(map(len, texts))) > MAX_CHARACTERS:
            raise TaskError(f"input {number} has {longest:,} characters; expected at most {MAX_CHARACTERS:,}.")
    return rendered


def _clock(device: torch.device) -> Callable[[], float]:
    """Start a clock; it returns the elapsed ms once all that was computed before has ended."""

    def now_ms() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return 1000 * time.perf_counter()

    started_ms = now_ms()
    return lambda: now_ms() - started_ms


def _generated(cot: CoT, generations: Generations, before_ms: float) -> Stream:
    ids = generations.samples[0][0]
    text = cot.tokenizer.decode(ids, skip_special_tokens=True).rstrip("\N{REPLACEMENT CHARACTER}")
    return Stream(text, len(ids), before_ms + 1000 * generations.seconds)
