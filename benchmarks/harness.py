"""Throughput: queries per second and latency of several systems, measured side by side in one run.

Paper, "Throughput": pooled classifiers against CoT decoding on the same backbone. Timings compare only within a
run, so systems take turns round by round after a warm-up, and the device is synchronized around each timed call.
"""

from __future__ import annotations

import copy
import ctypes
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from threading import Event, Thread
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import plotly.express as px
import plotly.graph_objects as go
import psutil
import torch
from torch import nn
from transformers import pipeline

from dhrd_lib.config import ConfigError
from dhrd_lib.cot import CoT, CoTPredictions, Decoding, Generations
from dhrd_lib.inputs import MAX_TOKENS_PER_CPU_BATCH, Inputs, length_sorted_batches, render_inputs
from dhrd_lib.modeling import DHRDModel
from dhrd_lib.serving.classifier import ExportedClassifier
from dhrd_lib.serving.export import sequence_classifier
from dhrd_lib.studies import plots
from dhrd_lib.tasks import load_task

MIB = 2**20
CPU_TOKEN_BUDGETS, GPU_TOKEN_BUDGETS = (
    (MAX_TOKENS_PER_CPU_BATCH // 2, MAX_TOKENS_PER_CPU_BATCH),
    (4096, 16384, 65536),
)
MIXED_TASKS = ("everyday_nli", "support_triage", "boolq")


class Tokens(NamedTuple):
    """Token counts of a round: input tokens without padding, with padding, and generated tokens."""

    read: int
    padded: int
    written: int = 0


@dataclass(frozen=True)
class System:
    """One way to classify texts.

    `answer(texts, setting)` is the timed call, tokenization included; `encode(texts)` is the tokenization alone;
    `count(texts, setting, answers)` counts the tokens, untimed. `settings` are the batch sizes to choose the
    fastest from, in `unit` ("rows" or "tokens" per batch), smallest first. `probe` is a shorter `answer` for
    warm-up and choice. A slow system may join the first `rounds` rounds only, with `queries_per_round` of their
    texts, and only `latency_queries` of the latency measurements.
    """

    name: str
    answer: Callable[[Sequence[str], int], Any]
    encode: Callable[[Sequence[str]], Any]
    count: Callable[[Sequence[str], int, Any], Tokens]
    settings: tuple[int, ...]
    unit: str
    device: torch.device
    weights_mib: float
    probe: Callable[[Sequence[str], int], Any] | None = None
    rounds: int | None = None
    queries_per_round: int | None = None
    latency_queries: int | None = None


@dataclass
class Measurement:
    """Measurements of one system; each list holds one entry per round."""

    system: System
    setting: int = 0
    seconds: list[float] = field(default_factory=list)
    encode_seconds: list[float] = field(default_factory=list)
    queries: list[int] = field(default_factory=list)
    tokens: list[Tokens] = field(default_factory=list)
    answers: list[Any] = field(default_factory=list)
    added_mib: list[float] = field(default_factory=list)
    latency_seconds: list[float] = field(default_factory=list)

    def add_round(self, texts: Sequence[str]) -> None:
        """Answer a round's texts, and record time, memory and tokens."""
        system = self.system
        texts = texts[: system.queries_per_round]
        with memory_added(system.device) as added_mib:
            seconds, answers = timed(system.device, system.answer, texts, self.setting)
        self.seconds.append(seconds)
        self.encode_seconds.append(timed(system.device, system.encode, texts)[0])
        self.queries.append(len(texts))
        self.tokens.append(system.count(texts, self.setting, answers))
        self.answers.append(answers)
        self.added_mib.append(added_mib[0])

    def row(self) -> dict[str, Any]:
        """Return the figures as JSON values under names with units."""
        seconds, queries = sum(self.seconds), sum(self.queries)
        read, padded, written = (sum(counts) for counts in zip(*self.tokens, strict=True))
        p50, p95 = np.percentile(self.latency_seconds, [50, 95]) * 1000
        return {
            "system": self.system.name,
            "queries_per_second": queries / seconds,
            "tokens_per_second": (read + written) / seconds,
            "latency_p50_ms": float(p50),
            "latency_p95_ms": float(p95),
            "latency_queries": len(self.latency_seconds),
            "best_batch": self.setting,
            "best_batch_unit": self.system.unit,
            "tokenization_ms_per_query": 1000 * sum(self.encode_seconds) / queries,
            "compute_ms_per_query": 1000 * (seconds - sum(self.encode_seconds)) / queries,
            "padding_share": 1 - read / padded,
            "read_tokens_per_query": read / queries,
            "written_tokens_per_query": written / queries,
            "peak_memory_mib": self.system.weights_mib + max(self.added_mib),
            "weights_mib": self.system.weights_mib,
            "queries": queries,
            "rounds": len(self.seconds),
            "round_queries_per_second": [q / s for q, s in zip(self.queries, self.seconds, strict=True)],
        }


def measure(
    systems: Sequence[System],
    texts: Sequence[str],
    *,
    rounds: int = 5,
    latency_queries: int = 20,
    choice_queries: int = 32,
) -> list[Measurement]:
    """Measure systems on the same texts, interleaved.

    1. Warm-up: each system answers two texts at every batch size, untimed.
    2. Choice: each answers `choice_queries` texts at every batch size, and keeps the fastest.
    3. Rounds: in round r every system answers `texts[r::rounds]`; the order rotates from round to round.
    4. Latency: `latency_queries` texts one at a time at the smallest batch size, rotating text by text. A system
       with one text per round takes its latencies from the rounds.

    Raises `ConfigError` where there are fewer texts than rounds.
    """
    if len(texts) < rounds:
        raise ConfigError(f"There are {len(texts)} texts for {rounds} rounds; expected one per round or more.")
    results = [Measurement(system) for system in systems]
    for system in systems:
        for setting in system.settings:
            (system.probe or system.answer)(texts[:2], setting)
    for result in results:
        system = result.system
        probe, queries = system.probe or system.answer, texts[:choice_queries]
        choices = system.settings if len(system.settings) > 1 else ()
        seconds = [timed(system.device, probe, queries, setting)[0] for setting in choices]
        result.setting = system.settings[int(np.argmin(seconds or [0.0]))]
    for number in range(rounds):
        for result in _rotated(results, number):
            if number < (result.system.rounds or rounds):
                result.add_round(texts[number::rounds])
    for result in results:
        if max(result.queries) == 1:
            result.latency_seconds = list(result.seconds)
    waiting = [result for result in results if not result.latency_seconds]
    for number, text in enumerate(texts[:latency_queries]):
        due = [r for r in waiting if r.system.latency_queries is None or number < r.system.latency_queries]
        for result in _rotated(due, number):
            system = result.system
            result.latency_seconds.append(timed(system.device, system.answer, [text], system.settings[0])[0])
    return results


def _rotated(results: list[Measurement], number: int) -> list[Measurement]:
    start = number % max(len(results), 1)
    return results[start:] + results[:start]


def timed(device: torch.device, call: Callable[..., Any], *arguments: Any) -> tuple[float, Any]:
    """Return the wall time of a call in seconds, device work included, and its result."""
    synchronize(device)
    started = time.perf_counter()
    result = call(*arguments)
    synchronize(device)
    return time.perf_counter() - started, result


def synchronize(device: torch.device) -> None:
    """Wait for a GPU's queued work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextmanager
def memory_added(device: torch.device) -> Iterator[list[float]]:
    """Yield a list of one: the peak memory in MiB that the block adds to what was allocated before."""
    added = [0.0]
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        yield added
        added[0] = (torch.cuda.max_memory_allocated(device) - before) / MIB
        return
    with suppress(AttributeError, OSError, TypeError):  # glibc alone, which keeps freed memory for the next system
        ctypes.CDLL(None).malloc_trim(0)
    process, done = psutil.Process(), Event()
    before = process.memory_info().rss

    def watch() -> None:
        while not done.wait(0.02):
            added[0] = max(added[0], (process.memory_info().rss - before) / MIB)

    thread = Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield added
    finally:
        done.set()
        thread.join()


def ratio(first: Measurement, second: Measurement) -> dict[str, float]:
    """Compare queries per second, first over second, over the rounds that both took part in.

    `value` is from all their queries; `low` and `high` are the smallest and largest of a single round.
    """
    rounds = min(len(first.seconds), len(second.seconds))
    queries, seconds = (
        np.array([getattr(result, name)[:rounds] for result in (first, second)]) for name in ("queries", "seconds")
    )
    each = np.divide(*(queries / seconds))
    total = np.divide(*(queries.sum(1) / seconds.sum(1)))
    return {"value": float(total), "low": float(each.min()), "high": float(each.max()), "rounds": rounds}


# ---------------------------------------------------------------------- systems


def pooled_system(
    name: str,
    model: DHRDModel | ExportedClassifier,
    settings: tuple[int, ...] | None = None,
    *,
    device: torch.device | None = None,
    weights: float | None = None,
    **limits: int,
) -> System:
    """Wrap a pooled classifier with the batches of its `predict`: sorted by length, under a token budget.

    The answers are logits (N, K). An exported classifier needs `device` and `weights` (MiB).
    """
    device = device or model.device
    settings = settings or (CPU_TOKEN_BUDGETS if device.type == "cpu" else GPU_TOKEN_BUDGETS)

    def answer(texts: Sequence[str], max_batch_tokens: int) -> np.ndarray:
        return model.logits(model.encode(texts), max_batch_tokens)

    def count(texts: Sequence[str], max_batch_tokens: int, _: Any) -> Tokens:
        return _tokens_by_budget([len(row["input_ids"]) for row in model.encode(texts)], max_batch_tokens)

    weights = weights_mib(model) if weights is None else weights
    return System(name, answer, model.encode, count, settings, "tokens", device, weights, **limits)


def pipeline_system(
    name: str,
    model: DHRDModel,
    settings: tuple[int, ...] = (1, 8, 16, 32),
    dtype: torch.dtype = torch.float32,
    **limits: int,
) -> System:
    """Wrap the same weights as transformers' `pipeline("text-classification")`; the answers are logits (N, K).

    It gets its texts sorted by length, so that its batches have little padding.
    """
    tokenizer = copy.deepcopy(model.tokenizer)
    tokenizer.truncation_side = "left"  # as `SequenceFormat` cuts: the last token is the one that is pooled
    classifier = sequence_classifier(model)
    if classifier.dtype != dtype:
        classifier = copy.deepcopy(classifier).to(dtype)
    cut = {"truncation": True, "max_length": model.config.max_input_tokens}
    pipe = pipeline(
        "text-classification",
        model=classifier,
        tokenizer=tokenizer,
        device=model.device,
        function_to_apply="none",
        top_k=None,
    )

    def answer(inputs: Inputs, batch_size: int) -> np.ndarray:
        texts = render_inputs(model.config.template, inputs)
        order = np.argsort([len(text) for text in texts], kind="stable")
        entries = pipe([texts[place] for place in order], batch_size=batch_size, **cut)
        scores = [{entry["label"]: entry["score"] for entry in row} for row in entries]
        logits = np.array([[row[name] for name in model.label_names] for row in scores])
        return logits[np.argsort(order)]

    def encode(inputs: Inputs) -> list[Any]:
        texts = render_inputs(model.config.template, inputs)
        return [pipe.preprocess(text, **cut) for text in sorted(texts, key=len)]

    def count(texts: Sequence[str], batch_size: int, _: Any) -> Tokens:
        return _tokens_by_rows([encoded["input_ids"].shape[1] for encoded in encode(texts)], batch_size)

    return System(name, answer, encode, count, settings, "rows", model.device, weights_mib(classifier), **limits)


def cot_system(
    name: str,
    cot: CoT,
    decoding: Decoding | None = None,
    settings: tuple[int, ...] = (1,),
    *,
    reading: str = "parsed",
    **limits: int,
) -> System:
    """Wrap CoT decoding at one token budget, with answers parsed, or scored after the generated text.

    The answers are pairs of generated texts and answers. The probe generates 8 tokens.
    """
    decoding = decoding or Decoding()

    def decode(texts: Sequence[str], batch_size: int, max_new_tokens: int) -> tuple[Generations, CoTPredictions]:
        chosen = decoding.replace({"batch_size": batch_size, "max_new_tokens": max_new_tokens})
        generated = cot.generate(texts, chosen)
        return generated, cot.parse(generated) if reading == "parsed" else cot.score(generated)

    def answer(texts: Sequence[str], batch_size: int) -> tuple[Generations, CoTPredictions]:
        return decode(texts, batch_size, decoding.max_new_tokens)

    def probe(texts: Sequence[str], batch_size: int) -> tuple[Generations, CoTPredictions]:
        return decode(texts, batch_size, min(decoding.max_new_tokens, 8))

    def encode(texts: Sequence[str]) -> list[list[int]]:
        return [cot.encode_prompt(text) for text in texts]

    def count(texts: Sequence[str], batch_size: int, answers: tuple[Generations, CoTPredictions]) -> Tokens:
        lengths = sorted(map(len, encode(texts)), reverse=True)
        return _tokens_by_rows(lengths, batch_size)._replace(written=int(answers[0].tokens.sum()))

    device, weights = cot.lm.device, weights_mib(cot.lm)
    return System(name, answer, encode, count, settings, "rows", device, weights, probe=probe, **limits)


def lm_head_system(name: str, cot: CoT, **limits: int) -> System:
    """Wrap the LM head alone: verbalizers scored right after the input (budget 0), row by row."""

    def answer(texts: Sequence[str], batch_size: int) -> CoTPredictions:
        inputs = render_inputs(cot.task.template, texts)
        return cot.score(Generations(inputs, [[[]] for _ in inputs], 0, 0.0))

    def encode(texts: Sequence[str]) -> list[list[int]]:
        return [cot.encode_bare(text) for text in texts]

    def count(texts: Sequence[str], batch_size: int, _: Any) -> Tokens:
        return _tokens_by_rows([len(ids) for ids in encode(texts)], batch_size)

    return System(name, answer, encode, count, (1,), "rows", cot.lm.device, weights_mib(cot.lm), **limits)


def _tokens_by_budget(lengths: Sequence[int], max_batch_tokens: int) -> Tokens:
    batches = length_sorted_batches(lengths, max_batch_tokens)
    return Tokens(sum(lengths), sum(len(places) * lengths[places[0]] for places in batches))


def _tokens_by_rows(lengths: Sequence[int], batch_size: int) -> Tokens:
    batches = [lengths[first : first + batch_size] for first in range(0, len(lengths), batch_size)]
    return Tokens(sum(lengths), sum(len(batch) * max(batch) for batch in batches))


def weights_mib(model: nn.Module) -> float:
    """Return the memory of a model's weights in MiB, shared ones counted once."""
    return sum(p.numel() * p.element_size() for p in model.parameters()) / MIB


def mixed_texts(n: int = 500, seed: int = 0) -> tuple[list[str], str]:
    """Return n rendered inputs of mixed length in a seeded order, and a description of their sources.

    Equal shares come from the final splits of everyday_nli, support_triage, and BoolQ where DHRD_DATA_DIR has it.
    """
    names = [name for name in MIXED_TASKS if name != "boolq" or os.environ.get("DHRD_DATA_DIR")]
    rng = np.random.default_rng(seed)
    texts: list[str] = []
    for place, name in enumerate(names):
        task, splits = load_task(name)
        available = [text for split in task.test_splits for text in splits[split]["input_text"]]
        share = n // len(names) + (place < n % len(names))
        texts += [available[i] for i in rng.permutation(len(available))[:share]]
    missing = "" if "boolq" in names else " (no BoolQ: DHRD_DATA_DIR isn't set)"
    return [texts[i] for i in rng.permutation(len(texts))], f"{len(texts)} texts of {', '.join(names)}{missing}"


def throughput_bars(rows: pd.DataFrame) -> go.Figure:
    """Draw queries per second on a log axis, a bar per system, from the rows of `measure`."""
    # A log axis has no zero, so the bars' left end is a choice: a decade under the slowest.
    low, high = np.log10([rows["queries_per_second"].min(), rows["queries_per_second"].max()])
    hover = ["queries", "best_batch", "best_batch_unit", "latency_p50_ms", "latency_p95_ms"]
    options = {"hover_data": [*hover, "written_tokens_per_query"], "text_auto": ".3~g", "template": plots.TEMPLATE}
    title = "How many queries per second does each system answer? Log axis, best batch size"
    figure = px.bar(rows, x="queries_per_second", y="system", log_x=True, title=title, **options)
    figure.update_traces(textposition="outside", cliponaxis=False)
    figure.update_xaxes(title="queries per second", dtick=1, range=[np.floor(low), high + 0.25])
    figure.update_yaxes(title=None, autorange="reversed")
    return figure.update_layout(height=170 + 30 * len(rows), margin={"t": 50, "r": 50})
