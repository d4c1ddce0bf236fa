"""The backend: each model loaded once, one computation at a time, clocks inside the call."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Lock

import numpy as np
import torch

from app import stored
from app.settings import KEPT_MODELS, MAX_CHARACTERS, MAX_FIELDS, MAX_NEW_TOKENS, Settings
from benchmarks.harness import synchronize
from dhrd_lib.backbones import Backbone, load_backbone, resolve_device
from dhrd_lib.config import ConfigError
from dhrd_lib.cot import CoT, Decoding, Generations
from dhrd_lib.evaluation import NO_ANSWER
from dhrd_lib.inputs import Predictions
from dhrd_lib.modeling import DHRDModel
from dhrd_lib.tasks import TaskError, render, template_fields

ZERO_SHOT = "zero-shot"  # stands in place of a run's name: CoT of the bare backbone
_WARM_UP = ("A short text.", "A text of a length that is usual, so that the second call is of another one.")
_PART_ROWS = 16  # rows of a file between two looks at whether somebody still waits for them

Texts = Mapping[str, str]  # by the field of the task's template


@dataclass(frozen=True)
class Answer:
    """What one system says about one input, and what it cost.

    `label` is None where no answer could be read; `probabilities` are by label name. `latency_ms` is the time
    inside the call, tokenisation included. `tokens_cut` were cut off the input's front.
    """

    label: str | None
    probabilities: dict[str, float]
    latency_ms: float
    tokens_read: int
    tokens_written: int = 0
    tokens_cut: int = 0


@dataclass(frozen=True)
class Stream:
    """A text on its way: what is written, in how many tokens and ms, and CoT's answer once it is whole."""

    text: str
    tokens: int
    latency_ms: float
    answer: Answer | None = None


@dataclass(frozen=True)
class _Loaded:
    """A model in memory; a run's with its folder, and when the files there were written that it was read from."""

    model: DHRDModel | Backbone
    folder: Path | None = None
    written: tuple[tuple[str, int], ...] = ()

    @property
    def is_current(self) -> bool:
        return self.folder is None or stored.written(self.folder) == self.written


class Backend:
    """Answers of stored runs and of CoT; made once for all visitors.

    The `KEPT_MODELS` models last used stay in memory, those of a run until its folder is written anew. What a
    visitor can mend raises a `WorkbenchError`. Streams end early where `is_stopped()` says so, and stop computing
    when they are closed.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self._models: OrderedDict[tuple[str, str], _Loaded] = OrderedDict()
        self._computing = Lock()

    def load(self, run: str, task: str, beside: Sequence[str | None] = ()) -> None:
        """Load and warm up what answers for a run, or for zero-shot CoT on a task, if it isn't in memory."""
        with self._computing:
            self._cot(task, run, beside)

    def classify(self, run: str, texts: Texts) -> Answer:
        """One input by a run's pooled classifier; the LM head isn't computed."""
        with self._computing:
            model = self._model(run)
            _check(texts, model.config.template)
            elapsed_ms = _clock(model.device)
            labels, probabilities = model.predict([texts])
            latency_ms = elapsed_ms()
            row = model.encode([texts])[0]
        shares = dict(zip(model.label_names, probabilities[0].tolist(), strict=True))
        tokens, cut = len(row["input_ids"]), row["input_tokens_cut"]
        return Answer(labels[0], shares, latency_ms, tokens, tokens_cut=cut)

    def classify_rows(self, run: str, rows: Sequence[Texts]) -> Iterator[tuple[np.ndarray, float, int]]:
        """Class probabilities of rows: `(n, K)` of each part of them, the seconds inside its call, and how many
        of its inputs were cut at the front.
        """
        with self._computing:
            model = self._model(run)
            for number, row in enumerate(rows, start=1):
                _check(row, model.config.template, f"Row {number}")
            for first in range(0, len(rows), _PART_ROWS):
                elapsed_ms = _clock(model.device)
                encoded = model.encode(rows[first : first + _PART_ROWS])
                found = Predictions.from_logits(model.logits(encoded), model.label_names).probabilities
                yield found, elapsed_ms() / 1000, sum(row["input_tokens_cut"] > 0 for row in encoded)

    def rationale(self, run: str, texts: Texts, is_stopped: Callable[[], bool]) -> Iterator[Stream]:
        """What a run's reasoning head writes about an input; the prediction doesn't depend on it."""
        with self._computing:
            model = self._model(run)
            _check(texts, model.config.template)
            elapsed_ms, text = _clock(model.device), ""
            with closing(model.generate_rationale(texts, model.config.max_rationale_tokens, stream=True)) as pieces:
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
        texts: Texts,
        max_new_tokens: int,
        is_stopped: Callable[[], bool],
        beside: Sequence[str | None] = (),
    ) -> Iterator[Stream]:
        """CoT decoding token by token; the last one brings the answer, unless it was stopped.

        The label is read from what was written. The probabilities are the LM head's, of each label after what
        was written, and aren't timed. Zero-shot, labels, fields and backbone are those of the runs that it stands
        `beside`, or of the task's first run.
        """
        if not 1 <= max_new_tokens <= MAX_NEW_TOKENS:
            raise ConfigError(f"The token budget is {max_new_tokens}; expected 1 to {MAX_NEW_TOKENS}.")
        with self._computing:
            cot = self._cot(task, run, beside)
            _check(texts, cot.template)
            elapsed_ms = _clock(cot.lm.device)
            tokens_read = len(cot.encode_prompt(render(cot.template, texts)))
            before_ms, written = elapsed_ms(), None
            with closing(cot.stream(texts, Decoding(max_new_tokens=max_new_tokens))) as steps:
                for written in steps:
                    yield _so_far(cot, written, before_ms)
                    if is_stopped():
                        return
            yield _whole(cot, written, before_ms, tokens_read)

    # ------------------------------------------------------------------ loading

    def _model(self, run: str) -> DHRDModel:
        return self._kept(("run", run), lambda: self._load_run(run))

    def _cot(self, task: str, run: str, beside: Sequence[str | None]) -> CoT:
        if run != ZERO_SHOT:
            return CoT.from_model(self._model(run))
        runs = stored.usable_runs(self.settings.runs)
        name = stored.backbone_of(runs, task, beside, self.settings.backbone)
        known = stored.shared_task(self.settings.runs, task, beside)
        return CoT.from_backbone(self._kept(("backbone", name), lambda: _load_backbone(name, known)), known)

    def _kept(self, key: tuple[str, str], load: Callable[[], _Loaded]) -> DHRDModel | Backbone:
        if key in self._models and not self._models[key].is_current:
            del self._models[key]
        if key not in self._models:
            while len(self._models) >= KEPT_MODELS:  # before loading, or both would be in memory
                self._models.popitem(last=False)
            self._models[key] = load()
        self._models.move_to_end(key)
        return self._models[key].model

    def _load_run(self, name: str) -> _Loaded:
        run = stored.find_run(self.settings.runs, name)
        written = stored.written(run.folder)  # before it is read, so that what is written meanwhile is newer
        model = DHRDModel.from_pretrained(run.folder / "model").to(resolve_device(None))
        _warm_up(CoT.from_model(model))
        for text in _WARM_UP:
            model.predict([dict.fromkeys(template_fields(model.config.template), text)])
        return _Loaded(model, run.folder, written)


def _load_backbone(name: str, task: stored.Task) -> _Loaded:
    backbone = load_backbone(name)
    _warm_up(CoT.from_backbone(backbone, task))
    return _Loaded(backbone)


def _warm_up(cot: CoT) -> None:
    """The first calls of a model are slower, and nobody's latency shall be one of them."""
    for text in _WARM_UP:
        cot.generate([dict.fromkeys(template_fields(cot.template), text)], Decoding(max_new_tokens=2))


def _check(texts: Texts, template: str, where: str = "The input") -> None:
    """Refuse an input that lacks a text, is empty, or is longer than the page says."""
    fields = template_fields(template)
    if len(fields) > MAX_FIELDS:
        raise TaskError(f"The task's template reads {len(fields)} texts; the app has room for {MAX_FIELDS}.")
    for name in fields:
        text = texts.get(name)
        if not isinstance(text, str):
            raise TaskError(f"{where} lacks the text {name!r}; expected {', '.join(map(repr, fields))}.")
        if len(text) > MAX_CHARACTERS:
            found = f"{len(text):,} characters in {name!r}"
            raise TaskError(f"{where} has {found}; expected at most {MAX_CHARACTERS:,}.")
    if not any(texts[name].strip() for name in fields):
        raise TaskError(f"{where} has no text; expected some.")
    render(template, texts, where)  # refuses half a character, which JSON may bring


def _clock(device: torch.device) -> Callable[[], float]:
    """A started clock in ms, with the device synchronized at both ends."""
    synchronize(device)
    started = time.perf_counter()

    def elapsed_ms() -> float:
        synchronize(device)
        return 1000 * (time.perf_counter() - started)

    return elapsed_ms


def _so_far(cot: CoT, written: Generations, before_ms: float) -> Stream:
    ids = written.samples[0][0]
    text = cot.tokenizer.decode(ids, skip_special_tokens=True).rstrip("\N{REPLACEMENT CHARACTER}")
    return Stream(text, len(ids), before_ms + 1000 * written.seconds)


def _whole(cot: CoT, written: Generations, before_ms: float, tokens_read: int) -> Stream:
    last = _so_far(cot, written, before_ms)
    said = int(cot.parse(written).prediction_ids[0])
    shares = dict(zip(cot.label_names, cot.score(written).probabilities[0].tolist(), strict=True))
    label = None if said == NO_ANSWER else cot.label_names[said]
    return replace(last, answer=Answer(label, shares, last.latency_ms, tokens_read, last.tokens))
