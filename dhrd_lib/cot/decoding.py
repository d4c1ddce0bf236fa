"""Chain-of-thought decoding with the same backbone: prompts, generation, and two ways to read an answer."""

from __future__ import annotations

import math
import time
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Any

import numpy as np
import torch
from pydantic import Field
from scipy.special import softmax
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dhrd_lib.backbones import Backbone, autocast, lm_logits
from dhrd_lib.config import Config, ConfigError, PositiveFloat, PositiveInt, Seed
from dhrd_lib.cot.answers import AnswerReader
from dhrd_lib.evaluation import NO_ANSWER
from dhrd_lib.generation import check_context, encode_chat, end_ids, generate, stream
from dhrd_lib.inputs import SENTINEL, Inputs, render, render_inputs
from dhrd_lib.modeling import DHRDModel
from dhrd_lib.sequences import IGNORE_INDEX, encode_example
from dhrd_lib.tasks import Task

PROMPT = """Read the text and answer its question. Explain step by step, in two or three sentences, which facts \
of the text lead to the answer. After the explanation write {sentinel}, and after that the answer, one of: \
{labels}.

{input}

Let's think step by step."""


class Decoding(Config):
    """How tokens are drawn; the defaults are the paper's (paper, "Training set-up").

    `n_samples` above 1 is self-consistency: that many rationales a row, and a vote. `early_stop` ends a row once
    its answer is settled. `batch_size` counts sequences; draws depend on `seed` and on which rows share a batch.
    """

    sample: bool = True
    temperature: PositiveFloat = 0.1
    top_p: Annotated[float, Field(gt=0, le=1)] = 0.7
    max_new_tokens: PositiveInt = 500
    n_samples: PositiveInt = 1
    early_stop: bool = True
    batch_size: PositiveInt = 8
    seed: Seed = 0

    def arguments(self, reader: AnswerReader, batch: int = 0) -> dict[str, Any]:
        """Return the arguments of `generation.generate`; a hub model's own defaults are not the paper's."""
        n, drawn = self.max_new_tokens, {"temperature": self.temperature, "top_p": self.top_p, "top_k": 0}
        arguments = {"max_new_tokens": n, "do_sample": self.sample, "repetition_penalty": 1.0}
        arguments |= drawn if self.sample else dict.fromkeys(drawn)
        arguments |= {"is_complete": reader.is_settled} if self.early_stop else {"min_new_tokens": n}
        # A batch's draws must not depend on how long the last one was.
        return arguments | {"seed": self.seed * 1_000_003 + batch}


@dataclass(frozen=True)
class Generations:
    """The tokens decoded for N rows."""

    inputs: list[str]  # rendered texts
    samples: list[list[list[int]]]  # `samples[row][i]` are the ids of one sample, up to its end
    max_new_tokens: int  # of a sample
    seconds: float  # for all rows

    @property
    def tokens(self) -> np.ndarray:
        """The number of tokens decoded for each row, over all its samples: `(N,)`."""
        return np.array([sum(map(len, row)) for row in self.samples])

    def truncated(self, budget: int) -> Generations:
        """Return what decoding with a smaller budget gives: the same first tokens. Its time is unknown (NaN)."""
        if budget > self.max_new_tokens:
            raise ConfigError(f"The budget is {budget}; at most {self.max_new_tokens} tokens were decoded.")
        return Generations(self.inputs, [[ids[:budget] for ids in row] for row in self.samples], budget, math.nan)


@dataclass(frozen=True)
class CoTPredictions:
    """Predictions for N rows."""

    label_names: tuple[str, ...]
    prediction_ids: np.ndarray  # (N,), class indices or `NO_ANSWER`, which counts as wrong
    probabilities: np.ndarray  # (N, K), a class's probability (scored) or share of the votes (parsed)
    tokens: np.ndarray  # (N,), spent on each row, over all its samples

    @property
    def labels(self) -> list[str | None]:
        """Label names; None for a row without an answer."""
        return [None if i == NO_ANSWER else self.label_names[i] for i in self.prediction_ids]


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

        def bare(text: str) -> list[int]:
            return encode_example(fmt, text)["input_ids"]

        backbone = model.backbone, model.tokenizer
        return cls("fine-tuned", *backbone, task, fmt.answer_marker, lambda text: bare(text) + reason, bare)

    @classmethod
    def from_backbone(cls, backbone: Backbone, task: Task, examples: Sequence[Mapping[str, Any]] = ()) -> CoT:
        """Return zero-shot CoT with a bare backbone, prompted in words, or few-shot CoT with worked examples.

        Examples have a rationale and become earlier turns of the chat. A sentinel precedes the answer.
        """
        fields = {"labels": ", ".join(task.verbalizers), "sentinel": SENTINEL}

        def question(text: str) -> tuple[str, str]:
            return "user", render(PROMPT, {"input": text, **fields})

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
        texts, n, size = render_inputs(self.task.template, inputs), decoding.n_samples, decoding.batch_size
        prompts = [ids for ids in map(self.encode_prompt, texts) for _ in range(n)]
        check_context(self.lm, prompts, decoding.max_new_tokens)
        new: list[list[int]] = [[] for _ in prompts]
        order = sorted(range(len(prompts)), key=lambda place: -len(prompts[place]))
        started = time.perf_counter()
        for number, first in enumerate(tqdm(range(0, len(order), size), desc="CoT", delay=2)):
            places = order[first : first + size]
            batch = [prompts[place] for place in places]
            rows = generate(self.lm, self.tokenizer, batch, **decoding.arguments(self.reader, number))
            for place, ids in zip(places, rows, strict=True):
                new[place] = ids
        samples = [new[i : i + n] for i in range(0, len(new), n)]
        return Generations(texts, samples, decoding.max_new_tokens, time.perf_counter() - started)

    def stream(self, row: str | Mapping[str, Any], decoding: Decoding) -> Iterator[Generations]:
        """Yield all that was decoded of one input after each token; closing it ends the decoding."""
        (text,) = render_inputs(self.task.template, row)
        prompt = self.encode_prompt(text)
        check_context(self.lm, [prompt], decoding.max_new_tokens)
        for ids, seconds in stream(self.lm, self.tokenizer, prompt, **decoding.arguments(self.reader)):
            yield Generations([text], [[ids]], decoding.max_new_tokens, seconds)

    def parse(self, generations: Generations) -> CoTPredictions:
        """Read the answers from the text after the marker; the majority of several samples counts."""
        texts = [[self.tokenizer.decode(self._without_end(ids)) for ids in row] for row in generations.samples]
        read = np.array([[self.reader.read(text) for text in row] for row in texts])  # (N, samples)
        votes = read[:, :, None] == np.arange(len(self.task.verbalizers))  # (N, samples, K)
        # A tie goes to the class that was read first.
        majority = (votes.sum(1) * votes.shape[1] - votes.argmax(1)).argmax(1)
        predictions = np.where(votes.any((1, 2)), majority, NO_ANSWER)
        return CoTPredictions(self.task.label_names, predictions, votes.mean(1), generations.tokens)

    def score(self, generations: Generations) -> CoTPredictions:
        """Read the answers from the LM head's probability of each verbalizer after rationale and marker.

        What follows the marker isn't counted as spent. The probabilities of several samples are averaged.
        """
        encode = self.encode_prompt if generations.max_new_tokens else self.encode_bare
        texts = [self.answer_marker, *(f" {verbalizer}" for verbalizer in self.task.verbalizers)]
        marker, *answers = self.tokenizer(texts, add_special_tokens=False).input_ids
        rows = [list(map(self._rationale, row)) for row in generations.samples]
        prompts = map(encode, generations.inputs)
        prefixes = [
            ids + rationale + marker for ids, row in zip(prompts, rows, strict=True) for rationale, _ in row
        ]
        check_context(self.lm, prefixes, max(map(len, answers)))
        with autocast(self.lm):
            scores = score_continuations(self.lm, prefixes, answers)
        probabilities = softmax(scores, axis=1).reshape(len(rows), -1, len(answers)).mean(1)
        tokens = np.array([sum(spent for _, spent in row) for row in rows])
        return CoTPredictions(self.task.label_names, probabilities.argmax(1), probabilities, tokens)

    def _without_end(self, ids: list[int]) -> list[int]:
        return ids[:-1] if ids and ids[-1] in end_ids(self.lm, self.tokenizer) else ids

    def _rationale(self, ids: list[int]) -> tuple[list[int], int]:
        """Return the ids before the marker (all where there is none), and how many were decoded up to its end."""
        kept, marker = self._without_end(ids), self.answer_marker
        start = self.tokenizer.decode(kept).find(marker)
        if start < 0:
            return kept, len(ids)
        counts = {"a": range(len(kept) + 1), "key": lambda n: len(self.tokenizer.decode(kept[:n]))}
        return kept[: bisect_right(x=start, **counts) - 1], bisect_left(x=start + len(marker), **counts)


@torch.inference_mode()
def score_continuations(
    lm: PreTrainedModel, prefixes: Sequence[list[int]], continuations: Sequence[list[int]]
) -> np.ndarray:
    """Return the summed log-probability of each of K continuations after each of N prefixes: `(N, K)`, nats."""
    rows = [torch.tensor(ids, device=lm.device) for ids in continuations]
    targets = pad_sequence(rows, batch_first=True, padding_value=IGNORE_INDEX)  # (K, T)
    scores = []
    for prefix in prefixes:
        out = lm.get_decoder()(input_ids=torch.tensor([prefix], device=lm.device), use_cache=True)
        hidden = out.last_hidden_state[:, -1:].expand(len(rows), -1, -1)  # (K, 1, D)
        if targets.shape[1] > 1:
            out.past_key_values.batch_repeat_interleave(len(rows))
            inputs = targets[:, :-1].clamp(min=0)  # Padding follows its row, so that no token of it reads padding.
            after = lm.get_decoder()(input_ids=inputs, past_key_values=out.past_key_values, use_cache=True)
            hidden = torch.cat([hidden, after.last_hidden_state], 1)  # (K, T, D)
        losses = F.cross_entropy(lm_logits(lm, hidden).float().mT, targets, reduction="none")  # 0 at padding
        scores.append(-losses.sum(1))
    return torch.stack(scores).cpu().numpy()
