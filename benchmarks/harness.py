"""Throughput: how many queries a second each system answers, all measured side by side in one run.

Paper, "Throughput": pooled classifiers against CoT decoding on the same backbone. A time is only worth its
comparison, so systems take turns round by round, after a warm-up, with the device synchronised at both ends.
"""

from __future__ import annotations

import copy
import ctypes
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from threading import Event, Thread
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import psutil
import torch
from torch import nn
from transformers import (
    PreTrainedModel,
    TrainerCallback,
    TrainingArguments,
    pipeline,
)

from dhrd_lib.backbones import layers_of
from dhrd_lib.config import ConfigError
from dhrd_lib.cot.decoding import Answers, CoT, Decoding, Written
from dhrd_lib.inputs import length_sorted_batches
from dhrd_lib.modeling import DHRDModel
from dhrd_lib.serving.classifier import CPU_PART_TOKENS, ExportedClassifier
from dhrd_lib.serving.export import sequence_classifier
from dhrd_lib.tasks import load_task

MIB = 2**20
_CPU_BUDGETS, _GPU_BUDGETS = (CPU_PART_TOKENS // 2, CPU_PART_TOKENS), (4096, 16384, 65536)
MIXED_TASKS = ("everyday_nli", "support_triage", "boolq")


class Tokens(NamedTuple):
    """Tokens of some texts: read (real ones of the inputs), read with their padding, and written."""

    read: int
    padded: int
    written: int = 0


@dataclass(frozen=True)
class System:
    """One way to answer texts.

    `answer(texts, setting)` does it all, tokenisation included; `encode(texts)` is the tokenisation alone;
    `count(texts, setting, answers)` says how many tokens that were, and isn't timed. `settings` are the batch
    sizes to choose the fastest from, in `unit` ("rows" or "tokens" a batch), the smallest first. `probe` is a
    shorter `answer` for warm-up and choice, where a whole one takes minutes. A slow system may take part in the
    first `rounds` rounds only, with `queries_per_round` of their texts, and in the latencies with the first
    `latency_queries` of theirs.
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
class Measured:
    """What was measured of one system: a number a round in the lists, in seconds, queries and tokens."""

    system: System
    setting: int = 0
    seconds: list[float] = field(default_factory=list)
    encode_seconds: list[float] = field(default_factory=list)
    queries: list[int] = field(default_factory=list)
    tokens: list[Tokens] = field(default_factory=list)
    answers: list[Any] = field(default_factory=list)
    added_mib: list[float] = field(default_factory=list)
    latency_seconds: list[float] = field(default_factory=list)

    def row(self) -> dict[str, Any]:
        """The figures under names with units; JSON values only."""
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
            "tokenisation_ms_per_query": 1000 * sum(self.encode_seconds) / queries,
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
) -> list[Measured]:
    """Measure systems on the same texts, interleaved.

    1. Warm-up: each system answers two texts at every batch size, untimed.
    2. Choice: each answers `choice_queries` texts at every batch size, and keeps the fastest.
    3. Rounds: the texts are dealt into `rounds` slices; in round r every system answers slice r, and the order
       moves on by one from round to round. Memory is watched meanwhile.
    4. Latency: `latency_queries` texts one by one, the systems taking turns text by text. A system that answers
       one text a round at batch size 1 has its latencies from there.

    Raises `ConfigError` where there are fewer texts than rounds.
    """
    if len(texts) < rounds:
        raise ConfigError(f"There are {len(texts)} texts for {rounds} rounds; expected one a round or more.")
    found = [Measured(system) for system in systems]
    for one in found:
        for setting in one.system.settings:
            _probe(one.system)(texts[:2], setting)
    for one in found:
        one.setting = _fastest(one.system, texts[:choice_queries])
    for number in range(rounds):
        for one in _rotated(found, number):
            if number < (one.system.rounds or rounds):
                _round(one, texts[number::rounds])
    _latencies(found, texts[:latency_queries])
    return found


def _probe(system: System) -> Callable[[Sequence[str], int], Any]:
    return system.probe or system.answer


def _fastest(system: System, texts: Sequence[str]) -> int:
    if len(system.settings) == 1:
        return system.settings[0]
    return min(system.settings, key=lambda setting: _timed(system, _probe(system), texts, setting)[0])


def _rotated(found: list[Measured], number: int) -> list[Measured]:
    start = number % len(found)
    return found[start:] + found[:start]


def _round(one: Measured, texts: Sequence[str]) -> None:
    system = one.system
    texts = texts[: system.queries_per_round]
    with memory_added(system.device) as added_mib:
        seconds, answers = _timed(system, system.answer, texts, one.setting)
    encode_seconds, _ = _timed(system, system.encode, texts)
    one.seconds.append(seconds)
    one.encode_seconds.append(encode_seconds)
    one.queries.append(len(texts))
    one.tokens.append(system.count(texts, one.setting, answers))
    one.answers.append(answers)
    one.added_mib.append(added_mib[0])


def _latencies(found: list[Measured], texts: Sequence[str]) -> None:
    for one in found:
        if one.queries and max(one.queries) == 1:
            one.latency_seconds = list(one.seconds)
    timed = [one for one in found if not one.latency_seconds]
    for number, text in enumerate(texts):
        asked = [one for one in timed if number < (one.system.latency_queries or len(texts))]
        for one in _rotated(asked, number) if asked else ():
            seconds, _ = _timed(one.system, one.system.answer, [text], one.system.settings[0])
            one.latency_seconds.append(seconds)


def _timed(system: System, call: Callable[..., Any], *arguments: Any) -> tuple[float, Any]:
    synchronise(system.device)
    started = time.perf_counter()
    given = call(*arguments)
    synchronise(system.device)
    return time.perf_counter() - started, given


def synchronise(device: torch.device) -> None:
    """Wait for what was queued on the device, so that a clock sees all of it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextmanager
def memory_added(device: torch.device) -> Iterator[list[float]]:
    """The most memory that the block holds above what was held before, in MiB, in a list of one."""
    added = [0.0]
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        yield added
        added[0] = (torch.cuda.max_memory_allocated(device) - before) / MIB
        return
    _trim()
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


def _trim() -> None:
    """Give freed memory back, or the system measured first would pay for all of it."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (AttributeError, OSError, TypeError):  # not glibc
        return


def ratio(of: Measured, to: Measured) -> dict[str, float]:
    """How many times the queries a second of one system are another's, over the rounds that both took part in.

    `value` is from all their queries; `low` and `high` are the least and the greatest of a single round.
    """
    shared = range(min(len(of.seconds), len(to.seconds)))
    rates = [[one.queries[r] / one.seconds[r] for r in shared] for one in (of, to)]
    each = [a / b for a, b in zip(*rates, strict=True)]
    total = [sum(one.queries[r] for r in shared) / sum(one.seconds[r] for r in shared) for one in (of, to)]
    return {"value": total[0] / total[1], "low": min(each), "high": max(each), "rounds": len(each)}


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
    """A pooled classifier, as its `predict` runs it: length-sorted batches under a token budget.

    Without `settings`, budgets up to what `classify` takes at once on a CPU, and larger ones on a GPU. An exported
    classifier doesn't know its `device` and `weights` (in MiB); they must be given.
    """
    device = device or model.device
    settings = settings or (_CPU_BUDGETS if device.type == "cpu" else _GPU_BUDGETS)

    def answer(texts: Sequence[str], max_batch_tokens: int) -> np.ndarray:
        return model.classify_rows(model.encode_texts(texts), max_batch_tokens)

    def count(texts: Sequence[str], max_batch_tokens: int, _: Any) -> Tokens:
        lengths = [len(row["input_ids"]) for row in model.encode_texts(texts)]
        batches = length_sorted_batches(lengths, max_batch_tokens)
        return Tokens(sum(lengths), sum(len(places) * lengths[places[0]] for places in batches))

    weights = weights_mib(model) if weights is None else weights
    return System(name, answer, model.encode_texts, count, settings, "tokens", device, weights, **limits)


def pipeline_system(name: str, model: DHRDModel, settings: tuple[int, ...] = (1, 8, 16), **limits: int) -> System:
    """The same weights in transformers' own classifier and its `pipeline("text-classification")`.

    The answers are logits (N, K), so that they can be held against the model's own.
    """
    tokenizer = copy.deepcopy(model.tokenizer)
    # As `SequenceFormat.encode_input` cuts: at the front, because the last token is the one that is pooled.
    tokenizer.truncation_side = "left"
    classifier = sequence_classifier(model)
    cut = {"truncation": True, "max_length": model.config.max_input_tokens}
    pipe = pipeline(
        "text-classification",
        model=classifier,
        tokenizer=tokenizer,
        device=model.device,
        function_to_apply="none",
        top_k=None,
    )

    def answer(texts: Sequence[str], batch_size: int) -> np.ndarray:
        found = pipe(list(texts), batch_size=batch_size, **cut)
        logits = [{entry["label"]: entry["score"] for entry in entries} for entries in found]
        return np.array([[row[name] for name in model.label_names] for row in logits])

    def encode(texts: Sequence[str]) -> list[Any]:
        return [pipe.preprocess(text, **cut) for text in texts]

    def count(texts: Sequence[str], batch_size: int, _: Any) -> Tokens:
        lengths = [encoded["input_ids"].shape[1] for encoded in encode(texts)]
        return Tokens(sum(lengths), _padded(lengths, batch_size))

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
    """CoT decoding at one token budget, with the answers parsed, or scored after what was written.

    The answers are pairs of `cot.Written` and `cot.Answers`. The probe writes 8 tokens.
    """
    decoding = decoding or Decoding()

    def decode(texts: Sequence[str], chosen: Decoding) -> tuple[Written, Answers]:
        written = cot.write(texts, chosen)
        return written, cot.parse(written) if reading == "parsed" else cot.score(written)

    def answer(texts: Sequence[str], batch_size: int) -> tuple[Written, Answers]:
        return decode(texts, replace(decoding, batch_size=batch_size))

    def probe(texts: Sequence[str], batch_size: int) -> tuple[Written, Answers]:
        short = min(decoding.max_new_tokens, 8)
        return decode(texts, replace(decoding, batch_size=batch_size, max_new_tokens=short))

    def encode(texts: Sequence[str]) -> list[list[int]]:
        return [cot.encode_prompt(text) for text in texts]

    def count(texts: Sequence[str], batch_size: int, answers: tuple[Written, Answers]) -> Tokens:
        lengths = sorted(map(len, encode(texts)), reverse=True)
        written = sum(len(ids) for row in answers[0].samples for ids in row)
        return Tokens(sum(lengths), _padded(lengths, batch_size), written)

    device, weights = cot.lm.device, weights_mib(cot.lm)
    return System(name, answer, encode, count, settings, "rows", device, weights, probe=probe, **limits)


def lm_head_system(name: str, cot: CoT, settings: tuple[int, ...] = (1,), **limits: int) -> System:
    """The LM head alone: verbalizers scored right after the input (budget 0); the answers are `cot.Answers`."""

    def answer(texts: Sequence[str], max_batch_tokens: int) -> Answers:
        return cot.without_rationale(texts, max_batch_tokens=max_batch_tokens)

    def encode(texts: Sequence[str]) -> list[list[int]]:
        return [cot.encode_bare(text) for text in texts]

    def count(texts: Sequence[str], max_batch_tokens: int, _: Any) -> Tokens:
        lengths = [len(ids) for ids in encode(texts)]
        batches = length_sorted_batches(lengths, max_batch_tokens)
        return Tokens(sum(lengths), sum(len(places) * lengths[places[0]] for places in batches))

    return System(name, answer, encode, count, settings, "tokens", cot.lm.device, weights_mib(cot.lm), **limits)


def _padded(lengths: Sequence[int], batch_size: int) -> int:
    """Places that rows take in batches as they come, padded to each batch's longest."""
    batches = [lengths[first : first + batch_size] for first in range(0, len(lengths), batch_size)]
    return sum(len(batch) * max(batch) for batch in batches)


def weights_mib(model: nn.Module) -> float:
    """The memory of a model's weights, each counted once, in MiB."""
    return sum(p.numel() * p.element_size() for p in model.parameters()) / MIB


def mixed_texts(n: int = 500, seed: int = 0) -> tuple[list[str], str]:
    """n rendered inputs of unlike length in a seeded order, and a sentence that says whose they are.

    In equal parts from the final splits of everyday_nli, support_triage, and BoolQ where DHRD_DATA_DIR has it.
    """
    names = [name for name in MIXED_TASKS if name != "boolq" or os.environ.get("DHRD_DATA_DIR")]
    rng = np.random.default_rng(seed)
    texts: list[str] = []
    for place, name in enumerate(names):
        task, splits = load_task(name)
        own = [text for split in task.test_splits for text in splits[split]["input_text"]]
        share = n // len(names) + (place < n % len(names))
        texts += [own[i] for i in rng.permutation(len(own))[:share]]
    missing = "" if "boolq" in names else " (no BoolQ: DHRD_DATA_DIR isn't set)"
    return [texts[i] for i in rng.permutation(len(texts))], f"{len(texts)} texts of {', '.join(names)}{missing}"


# ---------------------------------------------------------------------- share of the matmul peak


def matmul_peak(model: DHRDModel, tokens: int = 1280, square: int = 2048, repeats: int = 3) -> dict[str, float]:
    """GFLOP/s of plain matrix products in the model's dtype, the best of `repeats` for each shape.

    The shapes are those of the decoder's own linear layers over so many tokens, and a square.
    """
    weight = model.get_input_embeddings().weight
    linear = [module for module in layers_of(model.backbone).modules() if isinstance(module, nn.Linear)]
    shapes = {tuple(module.weight.shape) for module in linear}
    found = {}
    with torch.inference_mode():
        for rows, (out, width) in [*((tokens, shape) for shape in sorted(shapes)), (square, (square, square))]:
            x, w = (torch.randn(n, width, device=weight.device, dtype=weight.dtype) for n in (rows, out))
            seconds = min(_seconds(lambda x=x, w=w: nn.functional.linear(x, w), weight.device, repeats + 1)[1:])
            found[f"{rows} x {width} x {out}"] = 2 * rows * width * out / seconds / 1e9
    return found


def classify_flops(model: DHRDModel, rows: int, tokens: int) -> float:
    """Floating-point operations of `classify`: two a weight and token in the decoder's layers, and attention.

    Embedding look-ups, norms and activations aren't counted; attention is counted as causal.
    """
    config = model.backbone.config.get_text_config()
    weights = sum(parameter.numel() for parameter in layers_of(model.backbone).parameters())
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    width = config.num_attention_heads * head_dim
    attention = 2 * config.num_hidden_layers * rows * tokens * (tokens + 1) * width
    return 2.0 * weights * rows * tokens + attention


def train_flops(
    lm: PreTrainedModel,
    tokens: int,
    supervised: int,
    *,
    frozen_layers: int = 0,
    cached: bool = False,
    lora: bool = False,
) -> float:
    """Floating-point operations of training on so many tokens: two a weight forward, four backward.

    A frozen layer has no backward pass, and none at all where its states are cached; LoRA has no gradient of the
    weights it stands beside, which halves the backward pass. The LM head reads `supervised` positions alone, and
    has no gradient of its own where the embeddings are frozen, as they are with frozen layers and with LoRA.
    Attention, norms and the adapters themselves aren't counted.
    """
    layers = layers_of(lm)
    trained = len(layers) - frozen_layers
    a_layer = sum(parameter.numel() for parameter in layers[0].parameters())
    in_layers = a_layer * tokens * (2 * (trained if cached else len(layers)) + (2 if lora else 4) * trained)
    head = lm.get_output_embeddings().weight.numel()
    return float(in_layers + head * supervised * (4 if lora or frozen_layers else 6))


class StepTimer(TrainerCallback):
    """Seconds of each optimiser step, without loading, evaluation and saving, and the peak memory so far in MiB."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.peak_memory_mib: list[float] = []

    def on_step_begin(self, args: TrainingArguments, *_: Any, **__: Any) -> None:
        """Start the clock."""
        synchronise(args.device)
        self._started = time.perf_counter()

    def on_step_end(self, args: TrainingArguments, *_: Any, **__: Any) -> None:
        """Stop it, after the optimiser."""
        synchronise(args.device)
        self.seconds.append(time.perf_counter() - self._started)
        self.peak_memory_mib.append(peak_memory_mib(args.device))


def peak_memory_mib(device: torch.device) -> float:
    """The most memory that this process has held: on the GPU, or of the machine."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / MIB
    import resource  # not on Windows, where all else here works

    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most / MIB if sys.platform == "darwin" else most / 1024


def peak_share(
    model: DHRDModel, rows: int = 16, tokens: int = 80, square: int = 2048, repeats: int = 5
) -> dict[str, Any]:
    """The share of the matmul peak that `classify` reaches, both at their best, measured in turns."""
    device = model.device
    ids = torch.randint(5, model.backbone.config.vocab_size - 5, (rows, tokens), device=device)
    mask = torch.ones_like(ids)
    model.eval()
    peaks, seconds = [matmul_peak(model, rows * tokens, square)], []
    with torch.inference_mode():
        _seconds(lambda: model.classify(ids, mask), device, 1)
        for _ in range(repeats):
            seconds += _seconds(lambda: model.classify(ids, mask), device, 1)
            peaks.append(matmul_peak(model, rows * tokens, square))
    peak = max(value for found in peaks for value in found.values())
    gflops = classify_flops(model, rows, tokens) / min(seconds) / 1e9
    return {
        "rows": rows,
        "tokens": tokens,
        "gflop_per_second": gflops,
        "gflop_per_second_median": classify_flops(model, rows, tokens) / float(np.median(seconds)) / 1e9,
        "peak_gflop_per_second": peak,
        "share": gflops / peak,
        "peak_by_shape": {shape: max(found[shape] for found in peaks) for shape in peaks[0]},
    }


def _seconds(call: Callable[[], Any], device: torch.device, repeats: int) -> list[float]:
    found = []
    for _ in range(repeats):
        synchronise(device)
        started = time.perf_counter()
        call()
        synchronise(device)
        found.append(time.perf_counter() - started)
    return found


def profile_classify(model: DHRDModel, rows: int = 16, tokens: int = 80) -> pd.DataFrame:
    """Where `classify` spends its time: milliseconds and share by operator, the slowest first."""
    ids = torch.randint(5, model.backbone.config.vocab_size - 5, (rows, tokens), device=model.device)
    with torch.inference_mode(), torch.profiler.profile() as profile:
        model.classify(ids, torch.ones_like(ids))
    on_gpu = model.device.type == "cuda"
    spent = {
        event.key: (event.self_device_time_total if on_gpu else event.self_cpu_time_total) / 1000
        for event in profile.key_averages()
    }
    table = pd.DataFrame({"operator": spent.keys(), "ms": spent.values()})
    table["share"] = table["ms"] / table["ms"].sum()
    return table.sort_values("ms", ascending=False, ignore_index=True)
