"""Chain-of-thought decoding with the same backbone: prompts, generation, and two ways to read an answer."""

from __future__ import annotations

import math
import time
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Any, Self

import numpy as np
import pandas as pd
import torch
from datasets import Dataset
from pydantic import Field, model_validator
from scipy.special import softmax
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dhrd_lib.backbones import Backbone, decoder_of, lm_logits
from dhrd_lib.config import Config, ConfigError, PositiveFloat, PositiveInt, Seed
from dhrd_lib.cot.answers import AnswerReader, vote
from dhrd_lib.evaluation import NO_ANSWER
from dhrd_lib.generation import check_context, encode_chat, end_ids, generate, left_padded, stream
from dhrd_lib.inputs import SENTINEL, Inputs, length_sorted_batches, render, render_inputs
from dhrd_lib.modeling import DHRDModel
from dhrd_lib.sequences import encode_example
from dhrd_lib.tasks import Task

PROMPT = """Read the text and answer its question. Explain step by step, in two or three sentences, which facts \
of the text lead to the answer. After the explanation write {sentinel}, and after that the answer, one of: \
{labels}.

{input}

Let's think step by step."""


class Decoding(Config):
    """How tokens are drawn; the defaults are the paper's (paper, "Training set-up").

    `n_samples` above 1 is self-consistency: that many rationales a row, and a vote. `early_stop` ends a row once
    its answer is settled; without it, every row gets `max_new_tokens`. `batch_size` counts sequences; draws depend
    on `seed` and on which rows share a batch.
    """

    sample: bool = True
    temperature: PositiveFloat = 0.1
    top_p: Annotated[float, Field(gt=0, le=1)] = 0.7
    max_new_tokens: PositiveInt = 500
    n_samples: PositiveInt = 1
    early_stop: bool = True
    batch_size: PositiveInt = 8
    seed: Seed = 0

    @model_validator(mode="after")
    def _greedy_has_one_sample(self) -> Self:
        if not self.sample and self.n_samples > 1:
            raise ConfigError(f"n_samples is {self.n_samples} with greedy decoding; expected 1, or sample=True.")
        return self

    def arguments(self, reader: AnswerReader, batch: int = 0) -> dict[str, Any]:
        """Return the arguments of `generation.generate`; a hub model's own defaults are not the paper's."""
        drawn = {"temperature": self.temperature, "top_p": self.top_p, "top_k": 0}
        end = {"is_complete": reader.is_settled} if self.early_stop else {"min_new_tokens": self.max_new_tokens}
        return {
            **(drawn if self.sample else dict.fromkeys(drawn)),
            **end,
            "max_new_tokens": self.max_new_tokens,
            "do_sample": self.sample,
            "repetition_penalty": 1.0,
            "seed": self.seed * 1_000_003 + batch,  # A batch's draws must not depend on how long the last one was.
        }


@dataclass(frozen=True)
class Generations:
    """The tokens decoded for N rows: `samples[row][i]` are the ids of one sample, up to its end.

    `inputs` are the rendered texts, `max_new_tokens` is a sample's budget, `seconds` the time for all of them.
    """

    inputs: list[str]
    samples: list[list[list[int]]]
    max_new_tokens: int
    seconds: float

    @property
    def tokens(self) -> np.ndarray:
        """The number of tokens decoded for each row, over all its samples: `(N,)`."""
        return np.array([sum(map(len, row)) for row in self.samples])

    @property
    def seconds_by_row(self) -> np.ndarray:
        """Each row's share of the decoding time, by its tokens: `(N,)`."""
        return self.seconds * self.tokens / self.tokens.sum()

    def truncated(self, budget: int) -> Generations:
        """Return what decoding with a smaller budget gives: the same first tokens. Its time is unknown (NaN)."""
        if budget > self.max_new_tokens:
            raise ConfigError(f"The budget is {budget}; at most {self.max_new_tokens} tokens were decoded.")
        return Generations(self.inputs, [[ids[:budget] for ids in row] for row in self.samples], budget, math.nan)


@dataclass(frozen=True)
class CoTPredictions:
    """Predictions for N rows: `prediction_ids (N,)` are class indices or `NO_ANSWER`, which counts as wrong.

    `probabilities (N, K)`: a class's probability (scored) or share of the votes (parsed); `tokens (N,)`: tokens
    spent on each row, over all its samples.
    """

    label_names: tuple[str, ...]
    prediction_ids: np.ndarray
    probabilities: np.ndarray
    tokens: np.ndarray

    @property
    def labels(self) -> list[str | None]:
        """Label names; None for a row without an answer."""
        return [None if i == NO_ANSWER else self.label_names[i] for i in self.prediction_ids]

    @property
    def unanswered(self) -> int:
        """The number of rows without an answer."""
        return int((self.prediction_ids == NO_ANSWER).sum())


@dataclass(frozen=True)
class CoT:
    """A backbone that reasons before it answers; made by `from_model` or `from_backbone`.

    `encode_prompt(input_text)` gives the ids that a rationale follows, `encode_bare(input_text)` those that the
    marker and the answer follow where no token is decoded (budget 0).
    """

    name: str
    lm: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    task: Task
    answer_marker: str
    encode_prompt: Callable[[str], list[int]]
    encode_bare: Callable[[str], list[int]]

    @classmethod
    def from_model(cls, model: DHRDModel) -> CoT:
        """Return CoT with a trained reasoning head (the paper's comparison: `beta = 0`), prompted as in training.

        The row is `[x, <REASON> r, <ANS> y]`, and at budget 0 `[x, <ANS> y]`, as in the paper's OnlyLabel.
        """
        fmt, config = model.sequence_format, model.config
        reason = fmt.encode(fmt.reason_marker)
        task = Task("", config.template, tuple(model.label_names), tuple(config.verbalizers))

        def encode(text: str) -> list[int]:
            return encode_example(fmt, text)["input_ids"]

        backbone = model.backbone, model.tokenizer
        return cls("fine-tuned", *backbone, task, fmt.answer_marker, lambda text: encode(text) + reason, encode)

    @classmethod
    def from_backbone(cls, backbone: Backbone, task: Task, examples: Sequence[Mapping[str, Any]] = ()) -> CoT:
        """Return zero-shot CoT with a bare backbone, prompted in words, or few-shot CoT with worked examples.

        Examples (see `pick_examples`) become earlier turns of the chat. A sentinel separates rationale and answer.
        """

        def question(text: str) -> tuple[str, str]:
            fields = {"input": text, "labels": ", ".join(task.verbalizers), "sentinel": SENTINEL}
            return "user", render(PROMPT, fields)

        turns = []
        for row in examples:
            answer = f"{row['rationale'].strip()} {SENTINEL} {task.verbalizers[row['label']]}"
            turns += [question(row["input_text"]), ("assistant", answer)]

        def encode(text: str) -> list[int]:
            return encode_chat(backbone.tokenizer, [*turns, question(text)])

        name = f"{len(examples)}-shot" if examples else "zero-shot"
        return cls(name, backbone.model, backbone.tokenizer, task, SENTINEL, encode, encode)

    @cached_property
    def reader(self) -> AnswerReader:
        """The reader of this prompt's answers."""
        return AnswerReader(self.answer_marker, self.task.label_names, self.task.verbalizers)

    def predict(self, inputs: Inputs, **decoding: Any) -> CoTPredictions:
        """Decode and parse predictions; `decoding` are fields of `Decoding`, such as `max_new_tokens`."""
        return self.parse(self.generate(inputs, Decoding(**decoding)))

    def generate(self, inputs: Inputs, decoding: Decoding) -> Generations:
        """Decode rationale and answer of each input; raise `ConfigError` where they don't fit the context."""
        texts, n = render_inputs(self.task.template, inputs), decoding.n_samples
        prompts = [ids for ids in map(self.encode_prompt, texts) for _ in range(n)]
        check_context(self.lm, prompts, decoding.max_new_tokens)
        new: dict[int, list[int]] = {}
        order = sorted(range(len(prompts)), key=lambda place: -len(prompts[place]))
        started = time.perf_counter()
        for number, first in enumerate(tqdm(range(0, len(order), decoding.batch_size), desc="CoT", delay=2)):
            places = order[first : first + decoding.batch_size]
            batch = [prompts[place] for place in places]
            rows = generate(self.lm, self.tokenizer, batch, **decoding.arguments(self.reader, number))
            new.update(zip(places, rows, strict=True))
        seconds = time.perf_counter() - started
        samples = [[new[place] for place in range(i, i + n)] for i in range(0, len(prompts), n)]
        return Generations(texts, samples, decoding.max_new_tokens, seconds)

    def stream(self, row: str | Mapping[str, Any], decoding: Decoding) -> Iterator[Generations]:
        """Decode one sample of one input and yield, after each token, all that was decoded so far.

        Closing it ends the decoding. Raises `ConfigError` as `generate` does.
        """
        (text,) = render_inputs(self.task.template, row)
        prompt = self.encode_prompt(text)
        check_context(self.lm, [prompt], decoding.max_new_tokens)
        with closing(stream(self.lm, self.tokenizer, prompt, **decoding.arguments(self.reader))) as steps:
            for ids, seconds in steps:
                yield Generations([text], [[ids]], decoding.max_new_tokens, seconds)

    def parse(self, generations: Generations) -> CoTPredictions:
        """Read the answers from the text after the marker; several samples vote (see `vote`)."""
        texts = [[self.tokenizer.decode(self._without_end(ids)) for ids in row] for row in generations.samples]
        read = np.array([[self.reader.read(text) for text in row] for row in texts])  # (N, samples)
        shares = (read[:, :, None] == np.arange(len(self.task.verbalizers))).mean(1)
        return CoTPredictions(self.task.label_names, vote(read), shares, generations.tokens)

    def score(self, generations: Generations, max_batch_tokens: int = 4096) -> CoTPredictions:
        """Read the answers from the LM head's probability of each verbalizer after rationale and marker.

        A rationale ends before the marker, or else where it was cut; what follows it isn't counted as spent.
        """
        encode = self.encode_prompt if generations.max_new_tokens else self.encode_bare
        texts = [self.answer_marker, *(f" {verbalizer}" for verbalizer in self.task.verbalizers)]
        marker, *answers = self.tokenizer(texts, add_special_tokens=False).input_ids
        prefixes, tokens = [], np.zeros(len(generations.samples), dtype=int)
        for i, (text, samples) in enumerate(zip(generations.inputs, generations.samples, strict=True)):
            prompt = encode(text)
            for ids in samples:
                rationale, spent = self._rationale(ids)
                prefixes.append(prompt + rationale + marker)
                tokens[i] += spent
        check_context(self.lm, prefixes, max(map(len, answers)))
        scores = score_continuations(self.lm, prefixes, answers, self.tokenizer.pad_token_id, max_batch_tokens)
        probabilities = softmax(scores, axis=1).reshape(len(tokens), -1, len(answers))  # (N, samples, K)
        predictions = vote(probabilities.argmax(2), probabilities)
        return CoTPredictions(self.task.label_names, predictions, probabilities.mean(1), tokens)

    def without_rationale(self, inputs: Inputs, max_batch_tokens: int = 4096) -> CoTPredictions:
        """Read the LM head alone: score the verbalizers right after the input, with no token decoded (budget 0)."""
        texts = render_inputs(self.task.template, inputs)
        return self.score(Generations(texts, [[[]] for _ in texts], 0, 0.0), max_batch_tokens)

    def _without_end(self, ids: list[int]) -> list[int]:
        return ids[:-1] if ids and ids[-1] in end_ids(self.lm, self.tokenizer) else ids

    def _rationale(self, ids: list[int]) -> tuple[list[int], int]:
        """Return the ids before the marker (all where there is none), and how many were decoded up to its end."""
        kept, marker = self._without_end(ids), self.answer_marker
        start = self.tokenizer.decode(kept).find(marker)
        if start < 0:
            return kept, len(ids)
        counts = range(len(kept) + 1)

        def characters(n: int) -> int:
            return len(self.tokenizer.decode(kept[:n]))

        spent = bisect_left(counts, start + len(marker), key=characters)
        return kept[: bisect_right(counts, start, key=characters) - 1], spent


@torch.inference_mode()
def score_continuations(
    lm: PreTrainedModel,
    prefixes: Sequence[list[int]],
    continuations: Sequence[list[int]],
    pad_token_id: int,
    max_batch_tokens: int = 4096,
) -> np.ndarray:
    """Return the summed log-probability of each of K continuations after each of N prefixes: `(N, K)`, nats.

    A prefix is read once, and its cached keys and values serve all K continuations. The LM head is computed only
    where a continuation's token is predicted.
    """
    scores = np.zeros((len(prefixes), len(continuations)), dtype=np.float32)
    k, steps = len(continuations), max(map(len, continuations)) - 1
    padded = [tokens + [pad_token_id] * (steps + 1 - len(tokens)) for tokens in continuations]
    after = torch.arange(steps, device=lm.device)
    for places in length_sorted_batches(list(map(len, prefixes)), max_batch_tokens):
        ids, mask = left_padded([prefixes[i] for i in places], pad_token_id, lm.device)  # (B, S)
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        out = decoder_of(lm)(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=steps > 0)
        log_probs = lm_logits(lm, out.last_hidden_state[:, -1]).float().log_softmax(-1)  # (B, V)
        batch = log_probs[:, [tokens[0] for tokens in continuations]]  # (B, K)
        if steps:
            out.past_key_values.batch_repeat_interleave(k)
            mask = mask.repeat_interleave(k, 0)  # (B * K, S)
            tokens = torch.tensor(padded, device=lm.device).repeat(len(places), 1)  # (B * K, steps + 1)
            hidden = decoder_of(lm)(
                input_ids=tokens[:, :-1],
                attention_mask=torch.cat([mask, mask.new_ones(len(mask), steps)], 1),
                position_ids=mask.sum(1, keepdim=True) + after,
                past_key_values=out.past_key_values,
                use_cache=True,
            ).last_hidden_state
            log_probs = lm_logits(lm, hidden).float().log_softmax(-1).gather(2, tokens[:, 1:, None]).squeeze(2)
            lengths = torch.tensor(list(map(len, continuations)), device=lm.device).repeat(len(places), 1)
            is_token = after + 1 < lengths.view(-1, 1)
            batch = batch + torch.where(is_token, log_probs, 0.0).sum(1).view(-1, k)
        scores[places] = batch.cpu().numpy()
    return scores


def pick_examples(train: Dataset, k: int, seed: int = 0) -> list[dict[str, Any]]:
    """Return k rows of train with a rationale, drawn with the seed, one of each label in turn, or `ConfigError`."""
    rows = [row for row in train.shuffle(seed=seed) if row["rationale"]]
    if len(rows) < k:
        raise ConfigError(f"{len(rows)} rows of train have a rationale; expected at least k={k}.")
    labels = pd.Series([row["label"] for row in rows])
    turns = labels.groupby(labels).cumcount()  # The n-th row of every label comes before the (n+1)-th of any.
    return [rows[place] for place in np.lexsort((labels, turns))[:k]]
